"""One token of TTT-MLP at once, where a backend has a kernel of it; what is traced of the state is only the phase.

    G1, G2 at the mini-batch's first weights      ΣW1' = ΣW1 + beta k G1ᵀ, and so the other three sums
    y = q + LN(gelu(q W̄1 + c̄1) W̄2 + c̄2),   W̄ = W − token_scale_phase ΣW'
    a mini-batch ends:  W' = W̄, ΣW' = 0, phase = 0;  else W' = W, phase + 1

    q, k [N,1,G,K]   v, y [N,1,H,K]   beta [N,1,H]   W1, ΣW1 [N,H,K,F]   W2, ΣW2 [N,H,F,K]   phase [N]

``mixers.ttt_mlp.step`` is the definition.
"""

from typing import Any

from mixers.primitive import Primitive, Shapes, run
from mixers.spec import Array
from mixers.ttt_mlp import LAYOUT

TOKEN = ("q", "k", "v", "beta", "norm_weight", "norm_bias", "token_scale")
STATE = tuple(field.name for field in LAYOUT.fields[:-1])


def _shapes(x: tuple[Array, ...], fixed: tuple[Array, ...], dtype: str, how: str) -> Shapes:
    wide = "float64" if dtype == "float64" else "float32"
    state = ((tuple(a.shape), wide) for a in x[len(TOKEN) :])
    return (tuple(x[2].shape), dtype), *state, (tuple(fixed[0].shape), "int32")


PRIMITIVE = Primitive("ttt_mlp_step", (*TOKEN, *STATE), ("phase",), ("y", *STATE, "phase"), _shapes, ())
"""``how`` is the length of a mini-batch."""


def ttt_mlp_step(
    library: Any, backend: str, chunk: int, token: dict[str, Array], state: tuple[Array, ...]
) -> tuple[Array, tuple[Array, ...]] | None:
    """``(y, state)`` by a backend's kernel where one serves these arrays, else None."""
    x = (*(token.get(name) for name in TOKEN), *state[:-1])
    found = run(library, PRIMITIVE, backend, x, (state[-1],), how=str(chunk))
    return None if found is None else (found[0], found[1:])
