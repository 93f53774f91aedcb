"""TTT-MLP, a single token of every sequence in one launch; see ``mixers.ttt_mlp_step``."""

import functools
import math

from mixers.spec import Array
from mixers.ttt_mlp_step import STATE, TOKEN

from . import SIMULATED, WARP
from .arrays import SIZES, empty, kind, place, token
from .primitive import TokenKernel
from .program import Constants, Program, constants

STEP = Program("ttt_mlp_token")

WARPS = 2 if SIMULATED else 8

# Registers of 32 bits of a thread for the numbers of a matrix that are under way.
LOADED = 4 if SIMULATED else 16


class TTTMLPStep(TokenKernel):
    """See ``mixers.ttt_mlp_step``; rows of a head, of which a block has several, fit its shared memory."""

    widest = 128

    def forward(self, x: tuple[Array, ...], fixed: tuple[Array, ...], factor: float, how: str) -> tuple[Array, ...]:
        """Every result."""
        given, (phase,) = dict(zip((*TOKEN, *STATE), x, strict=True)), fixed
        q, v = given["q"], given["v"]
        rows, _, heads, width = v.shape
        real = "float64" if kind(q) == "float64" else "float32"
        y = empty(tuple(v.shape), kind(v), q)
        state = [empty(tuple(given[name].shape), real, q) for name in STATE]
        left = empty(tuple(phase.shape), "int32", q)
        numbers = (
            *token(q, 4), *token(given["k"], 4), *token(v, 4), *token(given["beta"], 3),
            *place(given["norm_weight"], 2), *place(given["norm_bias"], 2), *place(given["token_scale"], 1),
            *(n for name in STATE for n in place(given[name], 3 if name.startswith("bias") else 4)), *place(phase, 1),
            *(n for a in (y, *state, left) for n in place(a, 0)),
            width, given["weight1"].shape[3], heads, heads // q.shape[2], int(how),
        )  # fmt: skip
        chosen = _constants(width, real, kind(q), kind(given["beta"]))
        STEP(q, chosen, (rows, heads), WARPS * WARP, numbers)
        return y, *state, left


@functools.lru_cache(maxsize=256)
def _constants(width: int, real: str, kind: str, beta: str) -> Constants:
    keys = -(-width // WARP)
    together = math.gcd(4 * width, LOADED * 4 // (keys * SIZES[real]))
    shape = {"keys": keys, "together": together, "warps": WARPS}
    return constants(shape | {"real": real, "kind": kind, "beta": beta})


PRIMITIVE = TTTMLPStep()
