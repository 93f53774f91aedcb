"""Packed-prefix attention: query t attends to rows ``low_t`` to ``high_t`` of gathered keys and values.

    s_tj = scale·⟨q_t, k_j⟩,  low_t ≤ j < high_t      lse_t = log Σ_j e^{s_tj}      y_t = Σ_j e^{s_tj − lse_t} v_j

    q [N,T,H,E]   k [N,P,A,E]   v [N,P,D,V]   low, high [N,T,1] or [N,T,H] int32   y [N,T,H,V]   lse [N,T,H]

``A`` and ``D`` divide ``H``. What sees no row gets 0 and an lse of −inf. Rows are gathered in order, so a block of
queries touches a run of rows and no more: work falls with the number of rows that were gathered.
"""

import math
from typing import Any

from mixers.algebra import device_of, stop
from mixers.primitive import Primitive, Shapes, run
from mixers.spec import Array

BLOCK = 256


def _shapes(x: tuple[Array, ...], fixed: tuple[Array, ...], dtype: str, how: str) -> Shapes:
    q, v = x[0], x[2]
    lse = "float64" if dtype == "float64" else "float32"
    return ((*q.shape[:3], v.shape[3]), dtype), (tuple(q.shape[:3]), lse)


PRIMITIVE = Primitive("packed_attention", ("q", "k", "v"), ("low", "high"), ("y", "lse"), _shapes, ("y", "lse"))
"""Its kernels take as many heads of keys as of values; y has the dtype of q, lse that of arithmetic."""


def packed_attention(
    library: Any, backend: str, q: Array, k: Array, v: Array, low: Array, high: Array, scale: float
) -> tuple[Array, Array]:
    """``(y, lse)`` by a backend's kernel where one serves these arrays, by array operations where none does."""
    if k.shape[2] != v.shape[2]:
        most = max(k.shape[2], v.shape[2])
        most = most if most % min(k.shape[2], v.shape[2]) == 0 else q.shape[2]
        k, v = (a if a.shape[2] == most else library.namespace.repeat(a, most // a.shape[2], axis=2) for a in (k, v))
    found = run(library, PRIMITIVE, backend, (q, k, v), (low, high), scale)
    if found is None:
        return by_arrays(library, q, k, v, low, high, scale)
    y, lse = found
    return y, lse


def by_arrays(library: Any, q: Array, k: Array, v: Array, low: Array, high: Array, scale: float) -> tuple[Array, Array]:
    """Blocks of queries, each against the rows that it can see, as far as these are known."""
    xp = library.namespace
    tokens, rows = q.shape[1], k.shape[1]
    lows, highs = library.host(low), library.host(high)
    parts = []
    for at in range(0, tokens, BLOCK):
        block = slice(at, at + BLOCK)
        first, last = 0, rows
        if lows is not None and highs is not None:
            first, last = int(lows[:, block].min(initial=rows)), int(highs[:, block].max(initial=0))
        span = slice(min(first, last), last)
        parts.append(
            _block(
                xp, q[:, block], k[:, span], v[:, span], low[:, block] - span.start, high[:, block] - span.start, scale
            )
        )
    y, lse = (xp.concat(list(column), axis=1) for column in zip(*parts, strict=True))
    return y, lse


def _block(xp: Any, q: Array, k: Array, v: Array, low: Array, high: Array, scale: float) -> tuple[Array, Array]:
    """One block of queries against all of some rows."""
    heads, rows = q.shape[2], k.shape[1]
    if not rows:
        zeros = xp.zeros((*q.shape[:3], v.shape[3]), dtype=v.dtype, **device_of(v))
        return zeros, xp.full(q.shape[:3], -math.inf, dtype=v.dtype, **device_of(v))
    logits = scale * _grouped(xp, xp.permute_dims(q, (0, 2, 1, 3)), xp.permute_dims(k, (0, 2, 3, 1)))  # [N,H,T,P]
    row = xp.arange(rows, **device_of(k))
    seen = (row >= low[..., None]) & (row < high[..., None])  # [N,T,1 or H,P]
    seen = xp.broadcast_to(xp.permute_dims(seen, (0, 2, 1, 3)), (q.shape[0], heads, q.shape[1], rows))
    top = stop(xp.max(xp.where(seen, logits, xp.full_like(logits, -math.inf)), axis=-1, keepdims=True))
    top = xp.where(top == -math.inf, xp.zeros_like(top), top)
    shifted = xp.where(seen, logits - top, xp.zeros_like(logits))
    weights = xp.where(seen, xp.exp(shifted), xp.zeros_like(logits))
    total = xp.sum(weights, axis=-1, keepdims=True)
    empty = total == 0
    total = xp.where(empty, xp.ones_like(total), total)
    y = _grouped(xp, weights / total, xp.permute_dims(v, (0, 2, 1, 3)))
    lse = xp.where(empty, xp.full_like(total, -math.inf), top + xp.log(total))[..., 0]
    return xp.permute_dims(y, (0, 2, 1, 3)), xp.permute_dims(lse, (0, 2, 1))


def _grouped(xp: Any, a: Array, b: Array) -> Array:
    """``a [N,H,T,·] @ b [N,A,·,·]``: heads that share one of ``b`` are rows of one matrix."""
    n, heads, rows, inner = a.shape
    groups = b.shape[1]
    wide = xp.reshape(a, (n, groups, heads // groups * rows, inner))
    return xp.reshape(xp.matmul(wide, b), (n, heads, rows, b.shape[3]))


def merge(xp: Any, a: tuple[Array, Array], b: tuple[Array, Array]) -> Array:
    """Two attentions over disjoint tokens as one: ``(y, lse)`` each."""
    top = stop(xp.where(a[1] > b[1], a[1], b[1]))
    top = xp.where(top == -math.inf, xp.zeros_like(top), top)
    left, right = xp.exp(a[1] - top)[..., None], xp.exp(b[1] - top)[..., None]
    total = left + right
    return (left * a[0] + right * b[0]) / xp.where(total == 0, xp.ones_like(total), total)
