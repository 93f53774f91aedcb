"""Linear attention and its gated kin: what is written stays, or fades.

    S_t = decay_t ∘ S_{t-1} + k_t v_tᵀ
    y_t = scale · S_tᵀ q_t

    linear_attention   no decay
    ssd                decay e^{g_t},        g [B,T,H]     one number a head: Mamba-2; retention holds it constant
    gla                decay diag(e^{g_t}),  g [B,T,H,K]   one number a key channel

    q, k [B,T,G,K]   v [B,T,H,V]   S [N,H,K,V]   y [B,T,H,V]

Exact in chunks: a kernel may take any number of tokens at a time.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mixers.algebra import outer, read
from mixers.spec import Arg, Array, Field, Memory, MixerSpec, Option, Options, Sizes, StateLayout, real

QUERY = Arg("q", "B T G K", "queries")
KEY = Arg("k", "B T G K", "keys", draw="unit")
VALUE = Arg("v", "B T H V", "values")
SCALAR_DECAY = Arg(
    "log_decay", "B T H", "natural logarithm of the decay, per token and head, at most 0", draw="log_decay"
)
CHANNEL_DECAY = Arg(
    "log_decay", "B T H K", "natural logarithm of the decay, per key channel, at most 0", draw="log_decay"
)

MATRIX = StateLayout((Field("state", "N H K V", "row i is slot i"),))


def scale_option(default: str) -> Option:
    """The factor on every read."""
    return real("scale", None if default != "1" else 1.0, f"factor on the read; default {default}")


def matrix_state(options: Options) -> StateLayout:
    """A bare ``[N,H,K,V]`` array."""
    return MATRIX


def zero_state(sizes: Sizes, options: Options) -> tuple[np.ndarray, ...]:
    """Nothing is remembered yet."""
    return (np.zeros((sizes.H, sizes.K, sizes.V)),)


def read_scale(options: Options, key_dim: int) -> float:
    """The option ``scale``, or ``K**-0.5``."""
    scale: float | None = options["scale"]
    return float(key_dim**-0.5) if scale is None else scale


def fade(xp: Any, state: Array, log_decay: Array | None) -> Array:
    """The state times ``e^{log_decay}``: per head ``[N,H]``, per slot ``[N,H,K]``, or not at all."""
    if log_decay is None:
        return state
    decay = xp.exp(log_decay)
    return state * (decay[..., None, None] if decay.ndim == state.ndim - 2 else decay[..., None])


def step(
    xp: Any, options: Options, token: Mapping[str, Array], state: tuple[Array, ...]
) -> tuple[Array, tuple[Array, ...]]:
    """One token of ``S_t = decay ∘ S_{t-1} + k vᵀ``, ``y = scale · Sᵀ q``."""
    memory = fade(xp, state[0], token.get("log_decay")) + outer(token["k"], token["v"])
    return read_scale(options, memory.shape[-2]) * read(xp, memory, token["q"]), (memory,)


def _matrix(xp: Any, options: Options, token: Mapping[str, Array], state: tuple[Array, ...]) -> tuple[Array, ...]:
    """The state itself."""
    return state


def recall(xp: Any, options: Options, token: Mapping[str, Array], memory: tuple[Array, ...]) -> Array:
    """``scale · Sᵀ q``."""
    q = token["q"]
    return read_scale(options, q.shape[-1]) * read(xp, memory[0], q)


def query(xp: Any, options: Options, q: Array) -> Array:
    """``q`` itself."""
    return q


MATRIX_MEMORY = Memory((Field("state", "N H K V"),), _matrix, recall, query, read_scale)


def _flops(sizes: Sizes, options: Options) -> float:
    return 4.0 * sizes.K * sizes.V


def _gated_flops(sizes: Sizes, options: Options) -> float:
    return 5.0 * sizes.K * sizes.V


def _spec(name: str, summary: str, decay: str, source: str, gates: tuple[Arg, ...], scale: str) -> MixerSpec:
    return MixerSpec(
        name=name,
        summary=summary,
        equations=f"S_t = {decay}S_{{t-1}} + k_t v_tᵀ\ny_t = scale · S_tᵀ q_t",
        source=source,
        inputs=(QUERY, KEY, VALUE, *gates),
        options=(scale_option(scale),),
        state=matrix_state,
        first=zero_state,
        step=step,
        flops=_gated_flops if gates else _flops,
        memory=MATRIX_MEMORY,
    )


linear_attention = _spec(
    "linear_attention",
    "adds every key-value pair to a matrix and never forgets",
    "",
    "Katharopoulos et al. 2020, arXiv 2006.16236, without its normaliser",
    (),
    "K**-0.5",
)
ssd = _spec(
    "ssd",
    "Mamba-2's recurrence: one decay a head and token",
    "e^{g_t} ",
    "Dao and Gu 2024, arXiv 2405.21060",
    (SCALAR_DECAY,),
    "1",
)
gla = _spec(
    "gla",
    "gated linear attention: one decay a key channel and token",
    "diag(e^{g_t}) ",
    "Yang et al. 2023, arXiv 2312.06635",
    (CHANNEL_DECAY,),
    "K**-0.5",
)

SPECS = (linear_attention, ssd, gla)
