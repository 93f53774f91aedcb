"""Causal softmax attention: the baseline of every comparison.

    y_t = Σ_{j≤t} softmax_j(attn_scale · ⟨q_t, k_j⟩) v_j

    q [B,T,H,K]   k [B,T,G,K]   v [B,T,G,V]   y [B,T,H,V]   cache: keys [N,M,G,K], values [N,M,G,V], length [N]

Queries may have more heads than keys and values (grouped-query attention). The state is the cache: it grows with every
token, which is what the other mixers are here to avoid.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mixers.algebra import device_of
from mixers.spec import Arg, Array, Field, MixerSpec, Options, Sizes, StateLayout, real


class AttentionState(NamedTuple):
    """A key-value cache.

    Attributes:
        keys: ``[N,M,G,K]``, of which the first ``length[n]`` are filled.
        values: ``[N,M,G,V]``.
        length: ``[N]`` int32, tokens seen.
    """

    keys: Array
    values: Array
    length: Array


LAYOUT = StateLayout(
    (
        Field("keys", "N M G K", "keys of every token so far", verbatim=True),
        Field("values", "N M G V", "values of every token so far", verbatim=True),
        Field("length", "N", "tokens seen", counter=True),
    ),
    AttentionState,
)


def first_state(sizes: Sizes, options: Options) -> tuple[np.ndarray, ...]:
    """An empty cache."""
    return np.zeros((0, sizes.G, sizes.K)), np.zeros((0, sizes.G, sizes.V)), np.zeros((), np.int32)


def reserve(xp: Any, state: tuple[Array, ...], tokens: int) -> tuple[Array, ...]:
    """The cache with room for more tokens."""
    keys, values, length = state
    return _append_zeros(xp, keys, tokens), _append_zeros(xp, values, tokens), length


def _append_zeros(xp: Any, x: Array, tokens: int) -> Array:
    room = xp.zeros((x.shape[0], tokens, *x.shape[2:]), dtype=x.dtype, **device_of(x))
    return xp.concat([x, room], axis=1)


def step(
    xp: Any, options: Options, token: Mapping[str, Array], state: tuple[Array, ...]
) -> tuple[Array, tuple[Array, ...]]:
    """One token: write it into the cache, then attend to all that is filled."""
    keys, values, length = state
    q, (n, room, groups, width) = token["q"], keys.shape
    slot = xp.arange(room, **device_of(keys))[None, :]
    here = (slot == length[:, None])[:, :, None, None]
    keys = xp.where(here, token["k"][:, None], keys)
    values = xp.where(here, token["v"][:, None], values)
    seen = (slot <= length[:, None])[:, None, None, :]

    scale = width**-0.5 if options["attn_scale"] is None else options["attn_scale"]
    q = xp.reshape(q, (n, groups, q.shape[1] // groups, width))
    scores = scale * xp.matmul(q, xp.permute_dims(keys, (0, 2, 3, 1)))
    scores = xp.where(seen, scores, xp.full_like(scores, -math.inf))
    weights = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
    weights = weights / xp.sum(weights, axis=-1, keepdims=True)
    y = xp.matmul(weights, xp.permute_dims(values, (0, 2, 1, 3)))
    return xp.reshape(y, (n, -1, y.shape[-1])), (keys, values, length + 1)


def _flops(sizes: Sizes, options: Options) -> float:
    return (sizes.K + sizes.V) * float(sizes.T)


attention = MixerSpec(
    name="attention",
    summary="causal softmax attention, the baseline",
    equations="y_t = Σ_{j≤t} softmax_j(attn_scale · ⟨q_t, k_j⟩) v_j",
    source="Vaswani et al. 2017, arXiv 1706.03762",
    inputs=(
        Arg("q", "B T H K", "queries"),
        Arg("k", "B T G K", "keys"),
        Arg("v", "B T G V", "values"),
    ),
    options=(real("attn_scale", None, "factor on the scores; default K**-0.5"),),
    state=lambda options: LAYOUT,
    first=first_state,
    step=step,
    flops=_flops,
    reserve=reserve,
    keeps_output=True,
    kept=lambda options: (Field("lse", "B T H", "logarithm of the softmax's denominator"),),
)

SPECS = (attention,)
