"""Packed-prefix attention in blocks: query t sees the gathered rows ``low_t`` to ``high_t``; see ``mixers.packed``.

    s_tj = scale·⟨q_t, k_j⟩     lse_t = log Σ_j e^{s_tj}     p_tj = e^{s_tj − lse_t}     y_t = Σ_j p_tj v_j
    ds_tj = p_tj (⟨dy_t, v_j⟩ − D_t),  D_t = ⟨dy_t, y_t⟩ − dlse_t     dv_j = Σ_t p_tj dy_t
    dk_j = scale Σ_t ds_tj q_t      dq_t = scale Σ_j ds_tj k_j

    q, y [N,T,H,E|V]     k, v [N,P,A,E|V]     low, high [N,T,1 or H]     lse, D [N,T,H]

As ``attention``: the ``m = H/A`` query heads that share a key head are one matrix of queries, row ``r`` is token
``r // m``. ``low`` and ``high`` never fall with t, so the queries that see a block of rows are a run, and so are the
rows that a block of queries sees. Maxima start at a low number, not at −∞: a query that sees nothing has weights of 0.
"""

from typing import Any

import numpy as np

from .attention import delta_block, scale_columns, soften_block
from .compile import Count, In, Index, Int, Out, Real, device, kernel
from .layout import padded, scratch
from .matmul import matmul, matmul_ta
from .rows import load_columns, load_rows, load_vector, transpose
from .simd import NARROW, exp, lanes, load, mul, splat, store, sub

LOWEST = -1e30
BLOCK_Q, BLOCK_K = 64, 64


@device
def bound(bounds, n, r, m, g):
    """``low`` or ``high`` of row ``r``."""
    return bounds[n, r // m, g * m + r % m if bounds.shape[2] > 1 else 0]


@device
def spanned(low, high, n, r, rows, m, g):
    """The gathered rows, from the first to past the last, that any of some queries sees."""
    first, last = bound(low, n, r, m, g), bound(high, n, r, m, g)
    for i in range(rows):
        first = min(first, bound(low, n, r + i, m, g))
        last = max(last, bound(high, n, r + i, m, g))
    return np.int64(first), np.int64(last)


@device
def hide(s, low, high, n, r, rows, m, g, position, count, row_step, query_step):
    """−∞ for the ``count`` rows from ``position`` on that a query does not see."""
    for i in range(rows):
        first, end = bound(low, n, r + i, m, g) - position, bound(high, n, r + i, m, g) - position
        for j in range(min(count, max(0, first))):
            s[j * row_step + i * query_step] = -np.inf
        for j in range(max(0, end), count):
            s[j * row_step + i * query_step] = -np.inf


@device
def forward_block(q, k, v, low, high, n, g, r, rows, scale, block, y, lse):
    """The output of ``rows`` queries from ``r`` on of key head ``g`` in row ``n`` of the batch."""
    width, depth, m = q.shape[3], v.shape[3], q.shape[2] // k.shape[2]
    ld, ldk, ldv = padded(rows, y), padded(width, y), padded(depth, y)
    queries, o, s = scratch(width * ld, y), scratch(depth * ld, y), scratch(block * ld, y)
    top, total, shrink = scratch(ld, y), scratch(ld, y), scratch(ld, y)
    tile_k, tile_v = scratch(block * ldk, y), scratch(block * ldv, y)
    load_columns(q, n, np.int64(0), g, m, r, rows, queries, ld)
    top[:] = LOWEST
    total[:] = 0
    o[:] = 0

    position, last = spanned(low, high, n, r, rows, m, g)
    while position < last:
        count = min(block, last - position)
        load_rows(k, n, position, g, np.int64(1), np.int64(0), count, scale, tile_k, ldk)
        load_rows(v, n, position, g, np.int64(1), np.int64(0), count, y.dtype.type(1), tile_v, ldv)
        matmul(s, ld, tile_k, ldk, queries, ld, count, rows, width, y.dtype.type(1), y.dtype.type(0))
        hide(s, low, high, n, r, rows, m, g, position, count, ld, 1)
        soften_block(s, ld, count, top, total, shrink)
        scale_columns(o, ld, depth, shrink)
        matmul_ta(o, ld, tile_v, ldv, s, ld, depth, rows, count, y.dtype.type(1), y.dtype.type(1))
        position += count

    for i in range(rows):
        t, h = (r + i) // m, g * m + (r + i) % m
        seen = total[i] > 0
        share = 1 / total[i] if seen else y.dtype.type(0)
        for j in range(depth):
            y[n, t, h, j] = o[j * ld + i] * share
        lse[n, t, h] = top[i] + np.log(total[i]) if seen else -np.inf


@kernel
def forward(
    begin: Int,
    end: Int,
    q: In[4],
    k: In[4],
    v: In[4],
    low: Count[3],
    high: Count[3],
    table: Index[2],
    scale: Real,
    block_q: Int,
    block_k: Int,
    y: Out[4],
    lse: Out[3],
):
    """``table`` lists blocks of queries: row of the batch and first row."""
    groups = k.shape[2]
    m = q.shape[2] // groups
    for item in range(begin, end):
        n, r, g = table[item // groups, 0], table[item // groups, 1], item % groups
        rows = min(block_q, q.shape[1] * m - r)
        forward_block(q, k, v, low, high, n, g, r, rows, scale, block_k, y, lse)


@device
def keys_block(q, k, v, low, high, n, g, position, scale, block_q, block_k, lse, dy, delta, dk, dv):
    """Gradients of the rows from ``position`` on."""
    width, depth, m = q.shape[3], v.shape[3], q.shape[2] // k.shape[2]
    one, nil = dk.dtype.type(1), dk.dtype.type(0)
    count = min(block_k, k.shape[1] - position)
    ld, ldk, ldv = padded(count, dk), padded(width, dk), padded(depth, dk)
    across_k, across_v = scratch(width * ld, dk), scratch(depth * ld, dk)
    tile_k, tile_v = scratch(count * ldk, dk), scratch(count * ldv, dk)
    load_rows(k, n, position, g, np.int64(1), np.int64(0), count, scale, tile_k, ldk)
    load_rows(v, n, position, g, np.int64(1), np.int64(0), count, one, tile_v, ldv)
    transpose(tile_k, ldk, count, width, across_k, ld)
    transpose(tile_v, ldv, count, depth, across_v, ld)
    sum_k, sum_v = scratch(count * ldk, dk), scratch(count * ldv, dk)
    sum_k[:] = 0
    sum_v[:] = 0

    tile_q, tile_dy = scratch(block_q * ldk, dk), scratch(block_q * ldv, dk)
    p, ds = scratch(block_q * ld, dk), scratch(block_q * ld, dk)
    lse_, delta_ = scratch(block_q, dk), scratch(block_q, dk)
    r, total = np.int64(0), q.shape[1] * m
    while r < total:
        rows = min(block_q, total - r)
        earliest, latest = spanned(low, high, n, r, rows, m, g)
        if latest > position and earliest < position + count:
            load_rows(q, n, np.int64(0), g, m, r, rows, one, tile_q, ldk)
            load_rows(dy, n, np.int64(0), g, m, r, rows, one, tile_dy, ldv)
            load_vector(lse, n, np.int64(0), g, m, r, rows, lse_)
            load_vector(delta, n, np.int64(0), g, m, r, rows, delta_)
            matmul(p, ld, tile_q, ldk, across_k, ld, rows, count, width, one, nil)
            matmul(ds, ld, tile_dy, ldv, across_v, ld, rows, count, depth, one, nil)
            hide(p, low, high, n, r, rows, m, g, position, count, 1, ld)
            for i in range(rows):
                less, shift = splat(p, lse_[i], NARROW), splat(p, delta_[i], NARROW)
                for j in range(i * ld, i * ld + ld, lanes(p, NARROW)):
                    weight = exp(sub(load(p, j, NARROW), less))
                    store(p, j, weight)
                    store(ds, j, mul(weight, sub(load(ds, j, NARROW), shift)))
            matmul_ta(sum_v, ldv, p, ld, tile_dy, ldv, count, depth, rows, one, one)
            matmul_ta(sum_k, ldk, ds, ld, tile_q, ldk, count, width, rows, one, one)
        r += rows

    for i in range(count):
        for j in range(width):
            dk[n, position + i, g, j] = scale * sum_k[i * ldk + j]
        for j in range(depth):
            dv[n, position + i, g, j] = sum_v[i * ldv + j]


@device
def queries_block(q, k, v, low, high, n, g, r, rows, scale, block, lse, dy, delta, dq):
    """The gradient of some queries."""
    width, depth, m = q.shape[3], v.shape[3], q.shape[2] // k.shape[2]
    one, nil = dq.dtype.type(1), dq.dtype.type(0)
    ld, ldk, ldv = padded(rows, dq), padded(width, dq), padded(depth, dq)
    across_q, across_dy, sum_q = scratch(width * ld, dq), scratch(depth * ld, dq), scratch(rows * ldk, dq)
    tile_k, tile_v = scratch(block * ldk, dq), scratch(block * ldv, dq)
    p, ds, lse_, delta_ = scratch(block * ld, dq), scratch(block * ld, dq), scratch(ld, dq), scratch(ld, dq)
    load_columns(q, n, np.int64(0), g, m, r, rows, across_q, ld)
    load_columns(dy, n, np.int64(0), g, m, r, rows, across_dy, ld)
    lse_[:] = 0
    delta_[:] = 0
    load_vector(lse, n, np.int64(0), g, m, r, rows, lse_)
    load_vector(delta, n, np.int64(0), g, m, r, rows, delta_)
    sum_q[:] = 0

    position, last = spanned(low, high, n, r, rows, m, g)
    while position < last:
        count = min(block, last - position)
        load_rows(k, n, position, g, np.int64(1), np.int64(0), count, scale, tile_k, ldk)
        load_rows(v, n, position, g, np.int64(1), np.int64(0), count, one, tile_v, ldv)
        matmul(p, ld, tile_k, ldk, across_q, ld, count, rows, width, one, nil)
        matmul(ds, ld, tile_v, ldv, across_dy, ld, count, rows, depth, one, nil)
        hide(p, low, high, n, r, rows, m, g, position, count, ld, 1)
        for j in range(count):
            for i in range(0, ld, lanes(p, NARROW)):
                weight = exp(sub(load(p, j * ld + i, NARROW), load(lse_, i, NARROW)))
                store(ds, j * ld + i, mul(weight, sub(load(ds, j * ld + i, NARROW), load(delta_, i, NARROW))))
        matmul_ta(sum_q, ldk, ds, ld, tile_k, ldk, rows, width, count, one, one)
        position += count

    for i in range(rows):
        t, h = (r + i) // m, g * m + (r + i) % m
        for j in range(width):
            dq[n, t, h, j] = sum_q[i * ldk + j]


@kernel
def backward_deltas(
    begin: Int, end: Int, y: In[4], dy: In[4], dlse: In[3], table: Index[2], groups: Int, block_q: Int, delta: Out[3]
):
    """``D`` of blocks of queries."""
    m = y.shape[2] // groups
    for item in range(begin, end):
        n, r, g = table[item // groups, 0], table[item // groups, 1], item % groups
        rows = min(block_q, y.shape[1] * m - r)
        delta_block(y, dy, n, np.int64(0), g, m, r, rows, delta)
        for i in range(r, r + rows):
            delta[n, i // m, g * m + i % m] -= dlse[n, i // m, g * m + i % m]


@kernel
def backward_keys(
    begin: Int,
    end: Int,
    q: In[4],
    k: In[4],
    v: In[4],
    low: Count[3],
    high: Count[3],
    table: Index[2],
    scale: Real,
    block_q: Int,
    block_k: Int,
    lse: In[3],
    dy: In[4],
    delta: In[3],
    dk: Out[4],
    dv: Out[4],
):
    """The gradients of blocks of rows, which ``table`` lists: row of the batch and first position."""
    groups = k.shape[2]
    for item in range(begin, end):
        n, position, g = table[item // groups, 0], table[item // groups, 1], item % groups
        keys_block(q, k, v, low, high, n, g, position, scale, block_q, block_k, lse, dy, delta, dk, dv)


@kernel
def backward_queries(
    begin: Int,
    end: Int,
    q: In[4],
    k: In[4],
    v: In[4],
    low: Count[3],
    high: Count[3],
    table: Index[2],
    scale: Real,
    block_q: Int,
    block_k: Int,
    lse: In[3],
    dy: In[4],
    delta: In[3],
    dq: Out[4],
):
    """The gradients of blocks of queries."""
    groups = k.shape[2]
    m = q.shape[2] // groups
    for item in range(begin, end):
        n, r, g = table[item // groups, 0], table[item // groups, 1], item % groups
        rows = min(block_q, q.shape[1] * m - r)
        queries_block(q, k, v, low, high, n, g, r, rows, scale, block_k, lse, dy, delta, dq)


def _blocks(batch: int, rows: int, size: int) -> np.ndarray:
    """Row of the batch and first row of every block, the last ones, which see most, first."""
    starts = np.arange(0, rows, size)[::-1]
    return (
        np.stack(np.broadcast_arrays(np.arange(batch)[None], starts[:, None]), axis=-1).reshape(-1, 2).astype(np.int64)
    )


class PackedAttention:
    """See ``mixers.packed``."""

    arrays = ("numpy", "torch")

    def serves(self, dtype: str, device: str, widths: tuple[int, int]) -> bool:
        """Everything on a CPU."""
        return device == "cpu"

    def forward(self, x: Any, fixed: Any, scale: float, how: str) -> tuple[Any, Any]:
        """Output and lse, in the arrays' own library."""
        (q, k, v), (low, high) = x, fixed
        like = q
        q, k, v, low, high = _all_hosts(q, k, v, low, high)
        batch, tokens, heads, _ = q.shape
        m, factor = heads // k.shape[2], q.dtype.type(scale)
        y = np.zeros((batch, tokens, heads, v.shape[3]), q.dtype)
        lse = np.full((batch, tokens, heads), -np.inf, q.dtype)
        if k.shape[1] and tokens:
            table = _blocks(batch, tokens * m, BLOCK_Q)
            work = _work(q, v, low, high)
            forward(work, len(table) * k.shape[2], q, k, v, low, high, table, factor, BLOCK_Q, BLOCK_K, y, lse)
        return _back(y, like), _in(lse, like)

    def backward(self, x: Any, fixed: Any, scale: float, how: str, out: Any, dout: Any) -> tuple[Any, Any, Any]:
        """Gradients of q, k and v."""
        (q, k, v), (low, high), (y, lse), (dy, dlse) = x, fixed, out, dout
        like = q
        q, k, v, low, high = _all_hosts(q, k, v, low, high)
        y, lse, dy, dlse = (_host(a) for a in (y, lse, dy, dlse))
        dq, dk, dv = (np.zeros(a.shape, a.dtype) for a in (q, k, v))
        if k.shape[1] and q.shape[1]:
            groups, m = k.shape[2], q.shape[2] // k.shape[2]
            delta, work = np.empty(lse.shape, lse.dtype), _work(q, v, low, high)
            lse = np.where(np.isfinite(lse), lse, 0).astype(lse.dtype)
            queries, rows = _blocks(q.shape[0], q.shape[1] * m, BLOCK_Q), _blocks(k.shape[0], k.shape[1], BLOCK_K)
            backward_deltas(float(q.size), len(queries) * groups, y, dy, dlse, queries, groups, BLOCK_Q, delta)
            inputs, sizes = (q, k, v, low, high), (q.dtype.type(scale), BLOCK_Q, BLOCK_K, lse, dy, delta)
            backward_keys(2.5 * work, len(rows) * groups, *inputs, rows, *sizes, dk, dv)
            backward_queries(1.5 * work, len(queries) * groups, *inputs, queries, *sizes, dq)
        return _back(dq, like), _back(dk, like), _back(dv, like)


def _all_hosts(q: Any, k: Any, v: Any, low: Any, high: Any) -> tuple[np.ndarray, ...]:
    """The arguments of both directions as NumPy arrays."""
    return (
        *(_host(a) for a in (q, k, v)),
        *(np.ascontiguousarray(_host(a, np.int32)) for a in (low, high)),
    )


def _work(q: np.ndarray, v: np.ndarray, low: np.ndarray, high: np.ndarray) -> float:
    """Multiplications, for the number of threads."""
    pairs = float(np.sum(high - low, dtype=np.float64)) * (q.shape[2] / high.shape[2])
    return pairs * (q.shape[3] + v.shape[3]) + 1.0


def _host(a: Any, dtype: Any = None) -> np.ndarray:
    """A NumPy array in the working dtype."""
    if not isinstance(a, np.ndarray):
        a = a.detach()
        a = (a.float() if a.is_floating_point() and a.element_size() < 4 else a).numpy()
    if dtype is None:
        dtype = np.float64 if a.dtype == np.float64 else np.float32
    return np.asarray(a, dtype)


def _in(a: np.ndarray, like: Any) -> Any:
    """In the library of another array."""
    if isinstance(like, np.ndarray):
        return a
    import torch

    return torch.from_numpy(a)


def _back(a: np.ndarray, like: Any) -> Any:
    """In the library and dtype of another array."""
    found = _in(a, like)
    return found.astype(like.dtype, copy=False) if isinstance(like, np.ndarray) else found.to(like.dtype)


PRIMITIVE = PackedAttention()
