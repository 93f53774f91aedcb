"""The delta rule and its gated kin: a write replaces what the key already reads.

    S'  = decay_t ∘ S_{t-1}
    u_t = beta_t (v_t − S'ᵀ k_t)
    S_t = S' + k_t u_tᵀ
    y_t = scale · S_tᵀ q_t

    delta_rule         no decay
    gated_delta_rule   decay e^{g_t},        g [B,T,H]
    kda                decay diag(e^{g_t}),  g [B,T,H,K]   Kimi delta attention

    q, k [B,T,G,K]   v [B,T,H,V]   beta [B,T,H]   S [N,H,K,V]   y [B,T,H,V]

``qk_l2norm=True`` first divides q and k by ``sqrt(Σx² + 1e-6)``. Exact in chunks.
"""

from collections.abc import Mapping
from typing import Any

from mixers.algebra import outer, read
from mixers.linear import (
    CHANNEL_DECAY,
    KEY,
    MATRIX_MEMORY,
    QUERY,
    SCALAR_DECAY,
    VALUE,
    fade,
    matrix_state,
    read_scale,
    scale_option,
    zero_state,
)
from mixers.spec import Arg, Array, Memory, MixerSpec, Options, Sizes, switch

BETA = Arg("beta", "B T H", "write strength, after its sigmoid", draw="gate")
L2_EPS = 1e-6


def l2_normalise(xp: Any, x: Array) -> Array:
    """``x / sqrt(Σx² + 1e-6)`` over the last axis."""
    return x / xp.sqrt(xp.sum(x * x, axis=-1, keepdims=True) + L2_EPS)


def step(
    xp: Any, options: Options, token: Mapping[str, Array], state: tuple[Array, ...]
) -> tuple[Array, tuple[Array, ...]]:
    """One token: forget, correct what the key reads towards the value, read."""
    q, k = token["q"], token["k"]
    if options["qk_l2norm"]:
        q, k = l2_normalise(xp, q), l2_normalise(xp, k)
    faded = fade(xp, state[0], token.get("log_decay"))
    write = token["beta"][..., None] * (token["v"] - read(xp, faded, k))
    memory = faded + outer(k, write)
    return read_scale(options, memory.shape[-2]) * read(xp, memory, q), (memory,)


def recall(xp: Any, options: Options, token: Mapping[str, Array], memory: tuple[Array, ...]) -> Array:
    """``scale · Sᵀ q``, with q normalised where the mixer does that."""
    q = query(xp, options, token["q"])
    return read_scale(options, q.shape[-1]) * read(xp, memory[0], q)


def query(xp: Any, options: Options, q: Array) -> Array:
    """``q``, normalised where that is asked for."""
    return l2_normalise(xp, q) if options["qk_l2norm"] else q


def _flops(sizes: Sizes, options: Options) -> float:
    return 6.0 * sizes.K * sizes.V


def _gated_flops(sizes: Sizes, options: Options) -> float:
    return 7.0 * sizes.K * sizes.V


def _spec(name: str, summary: str, decay: str, source: str, gates: tuple[Arg, ...]) -> MixerSpec:
    return MixerSpec(
        name=name,
        summary=summary,
        equations=(
            f"S'  = {decay}S_{{t-1}}\nu_t = beta_t (v_t − S'ᵀ k_t)\nS_t = S' + k_t u_tᵀ\ny_t = scale · S_tᵀ q_t"
        ),
        source=source,
        inputs=(QUERY, KEY, VALUE, BETA, *gates),
        options=(
            scale_option("K**-0.5"),
            switch("qk_l2norm", False, "divide q and k by sqrt(Σx² + 1e-6) first"),
        ),
        state=matrix_state,
        first=zero_state,
        step=step,
        flops=_gated_flops if gates else _flops,
        memory=Memory(MATRIX_MEMORY.fields, MATRIX_MEMORY.of, recall, query, read_scale),
    )


delta_rule = _spec(
    "delta_rule",
    "a linear memory that corrects itself: each write replaces what its key reads",
    "",
    "Schlag et al. 2021, arXiv 2102.11174; Yang et al. 2024, arXiv 2406.06484",
    (),
)
gated_delta_rule = _spec(
    "gated_delta_rule",
    "the delta rule with one decay a head and token",
    "e^{g_t} ",
    "Yang et al. 2024, arXiv 2412.06464",
    (SCALAR_DECAY,),
)
kda = _spec(
    "kda",
    "Kimi delta attention: the delta rule with one decay a key channel and token",
    "diag(e^{g_t}) ",
    "Kimi Team 2025, arXiv 2510.26692",
    (CHANNEL_DECAY,),
)

SPECS = (delta_rule, gated_delta_rule, kda)
