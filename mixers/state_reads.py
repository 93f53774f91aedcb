"""Reading many states at once, each token with weights of its own.

    out_t = w_t,own y_t + scale Σ_{i < seen_t} w_ti C_iᵀ q_t

    y, out [N,T,H,V]   q [N,T,G,K]   C [N,S,H,K,V]   w [N,H,S+1,T], own last   seen [T] int32, never falling

What a token does not see has a weight of 0.
"""

from typing import Any

from mixers.primitive import Primitive, Shapes, run
from mixers.segment_weights import Cuts
from mixers.spec import Array

BLOCK = 256


def _shapes(x: tuple[Array, ...], fixed: tuple[Array, ...], dtype: str, how: str) -> Shapes:
    return ((tuple(x[0].shape), dtype),)


PRIMITIVE = Primitive("state_reads", ("y", "q", "kept", "weights"), ("seen",), ("out",), _shapes, ("out",))
"""``factor`` is the scale; widths are those of q and of a state's rows."""


def state_reads(
    library: Any, backend: str, y: Array, q: Array, kept: Array, weights: Array, cuts: Cuts, scale: float
) -> Array:
    """``out`` by a backend's kernel where one serves these arrays, by array operations where none does."""
    found = run(library, PRIMITIVE, backend, (y, q, kept, weights), (cuts.seen(library.namespace, q),), scale)
    return by_arrays(library, y, q, kept, weights, cuts, scale) if found is None else found[0]


def by_arrays(library: Any, y: Array, q: Array, kept: Array, weights: Array, cuts: Cuts, scale: float) -> Array:
    """Blocks of tokens: ``[w_t1 ∘ q_t, w_t2 ∘ q_t, …]`` times the states below each other, one product each."""
    xp, wide = library.namespace, library.dtype(weights)
    rows, tokens, heads, values = y.shape
    count, width = kept.shape[1], q.shape[3]
    weights = xp.permute_dims(weights, (0, 1, 3, 2))  # [N,H,T,S+1]
    q = xp.permute_dims(scale * library.cast(q, wide), (0, 2, 1, 3))
    q = q if q.shape[1] == heads else xp.repeat(q, heads // q.shape[1], axis=1)
    out = xp.permute_dims(library.cast(y, wide), (0, 2, 1, 3)) * weights[..., count:]
    below = xp.reshape(xp.permute_dims(library.cast(kept, wide), (0, 2, 1, 3, 4)), (rows, heads, count * width, values))
    parts = []
    for at in range(0, tokens, BLOCK):
        last = min(at + BLOCK, tokens)
        sees, part = cuts.sees(last - 1), out[:, :, at:last]
        if sees:
            spread = weights[:, :, at:last, :sees, None] * q[:, :, at:last, None]
            spread = xp.reshape(spread, (rows, heads, last - at, sees * width))
            part = part + xp.matmul(spread, below[:, :, : sees * width])
        parts.append(part)
    return library.cast(xp.permute_dims(xp.concat(parts, axis=2), (0, 2, 1, 3)), library.dtype(y))
