"""Packed-prefix attention in blocks: query t sees the gathered rows ``low_t`` to ``high_t``; see ``mixers.packed``.

    s_tj = scale·⟨q_t, k_j⟩     lse_t = log Σ_j e^{s_tj}     p_tj = e^{s_tj − lse_t}     y_t = Σ_j p_tj v_j
    ds_tj = p_tj (⟨dy_t, v_j⟩ − D_t),  D_t = ⟨dy_t, y_t⟩ − dlse_t     dv_j = Σ_t p_tj dy_t
    dk_j = scale Σ_t ds_tj q_t      dq_t = scale Σ_j ds_tj k_j

    q, y [N,T,H,E|V]     k, v [N,P,A,E|V]     low, high [N,T,1 or H]     lse, D [N,T,H] float32

The ``m = H/A`` query heads that share a key head are one matrix of queries, row ``r`` is token ``r // m``. ``low`` and
``high`` never fall with t, so the queries that see a block of rows are a run, and so are the rows that a block of
queries sees: first some that only part of the block sees, then those that all of it sees, which need no mask, then some
more in part. Weights are computed again in the backward, ``dq`` by blocks of queries, which also find D, ``dk`` and
``dv`` by blocks of rows: every number is written once, by one program.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from mixers.spec import Array

from .blocks import dot
from .kernel import INTERPRETED, block, dense, place, runs_here

WIDEST = 128  # on tensor cores wider rows spill

# Maxima start at a low number, not at −∞: a query that sees nothing has weights of 0.
LOWEST = tl.constexpr(-1e30)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def pieces(first, inner, outer, last, SIZE: tl.constexpr):
    """A run from ``first`` to ``last`` of which all from ``inner`` to ``outer`` needs no mask, in steps of SIZE.

    Returns the number of steps before that part, in it, and behind it.
    """
    before = tl.maximum(tl.cdiv(tl.minimum(inner, last) - first, SIZE), 0)
    middle = first + before * SIZE
    within = tl.maximum(outer - middle, 0) // SIZE
    behind = tl.maximum(tl.cdiv(last - middle - within * SIZE, SIZE), 0)
    return before, within, behind


@triton.jit
def rows_of(x, n, t0, r, x_b, x_t, x_h, g, m, inside, c, width):
    """Queries ``r`` of key head g, whose first is of token t0: one row of a tile each."""
    x += n.to(tl.int64) * x_b + t0.to(tl.int64) * x_t + g * m * x_h
    at = (r // m - t0) * x_t + (r % m) * x_h
    return tl.load(x + at[:, None] + c[None, :], mask=inside[:, None] & (c < width)[None, :], other=0.0)


@triton.jit
def seen_by(bounds, n, t0, r, tokens, bound_heads, g, m, inside, other):
    """``low`` or ``high`` of some queries."""
    bounds += (n.to(tl.int64) * tokens + t0) * bound_heads
    head = tl.where(bound_heads > 1, g * m + r % m, 0)
    return tl.load(bounds + (r // m - t0) * bound_heads + head, mask=inside, other=other)


@triton.jit
def soften(
    q, k, v, k_t, v_t, n, g, position, rows, low, high, scale, o, top, total,
    E: tl.constexpr, V: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, MASKED: tl.constexpr,
    DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of rows into the running softmax; ``scale`` is positive."""
    j, e, c = tl.arange(0, BK), tl.arange(0, BE), tl.arange(0, BV)
    there = position + j < rows
    if DESCRIBED:
        across = tl.trans(k.load([n, position, g * E]).reshape([BK, BE]))
    else:
        k += position.to(tl.int64) * k_t
        across = tl.load(k + e[:, None] + (j * k_t)[None, :], mask=(e < E)[:, None] & there[None, :], other=0.0)
    s = dot(q, across, PRECISION)
    if MASKED:
        at = (position + j)[None, :]
        s = tl.where((at >= low[:, None]) & (at < high[:, None]), s, float("-inf"))
    higher = tl.maximum(top, tl.max(s, axis=1) * scale)
    p = tl.exp2(s * scale - higher[:, None])
    shrink = tl.exp2(top - higher)
    if DESCRIBED:
        values = v.load([n, position, g * V]).reshape([BK, BV])
    else:
        v += position.to(tl.int64) * v_t
        values = tl.load(v + (j * v_t)[:, None] + c[None, :], mask=there[:, None] & (c < V)[None, :], other=0.0)
    o = tl.dot(p.to(values.dtype), values, o * shrink[:, None], input_precision=PRECISION)
    return o, higher, total * shrink + tl.sum(p, axis=1)


@triton.jit(do_not_specialize=["tokens", "rows", "blocks"])
def forward(
    q, q_b, q_t, q_h, k, k_b, k_t, k_h, v, v_b, v_t, v_h, low, high, y, lse,
    tokens, rows, blocks, groups, scale,
    M: tl.constexpr, BOUND_HEADS: tl.constexpr, E: tl.constexpr, V: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The output of a block of queries; the last blocks, which see most, first."""
    pid = tl.program_id(0)
    g, n = pid % groups, pid // groups % (tl.num_programs(0) // (groups * blocks))
    r0 = (blocks - 1 - pid // (tl.num_programs(0) // blocks)) * BQ
    r, t0, e, c = r0 + tl.arange(0, BQ), r0 // M, tl.arange(0, BE), tl.arange(0, BV)
    inside = r < tokens * M
    lows = seen_by(low, n, t0, r, tokens, BOUND_HEADS, g, M, inside, 2147483647)
    highs = seen_by(high, n, t0, r, tokens, BOUND_HEADS, g, M, inside, 0)
    first, last = tl.min(lows), tl.max(highs)
    inner = tl.max(tl.where(inside, lows, 0))
    outer = tl.minimum(tl.min(tl.where(inside, highs, 2147483647)), rows)
    before, within, behind = pieces(first, inner, outer, last, BK)

    queries = rows_of(q, n, t0, r, q_b, q_t, q_h, g, M, inside, e, E)
    if not DESCRIBED:
        k += n.to(tl.int64) * k_b + g * k_h
        v += n.to(tl.int64) * v_b + g * v_h
    o, total = tl.zeros([BQ, BV], tl.float32), tl.zeros([BQ], tl.float32)
    top = tl.full([BQ], LOWEST, tl.float32)
    for i in range(within):
        position = first + (before + i) * BK
        o, top, total = soften(
            queries, k, v, k_t, v_t, n, g, position, rows, lows, highs, scale * LOG2E, o, top, total,
            E, V, BE, BV, BK, False, DESCRIBED, PRECISION,
        )  # fmt: skip
    for i in range(before + behind):
        position = first + tl.where(i < before, i, within + i) * BK
        o, top, total = soften(
            queries, k, v, k_t, v_t, n, g, position, rows, lows, highs, scale * LOG2E, o, top, total,
            E, V, BE, BV, BK, True, DESCRIBED, PRECISION,
        )  # fmt: skip

    seen = total > 0
    heads = groups * M
    place = (n.to(tl.int64) * tokens + t0) * heads + g * M
    at = (r // M - t0) * heads + r % M
    o = o * tl.where(seen, 1.0 / tl.where(seen, total, 1.0), 0.0)[:, None]
    tl.store(
        y + place * V + (at * V)[:, None] + c[None, :],
        o.to(y.dtype.element_ty),
        mask=inside[:, None] & (c < V)[None, :],
    )
    found = tl.where(seen, top * LN2 + tl.log(tl.where(seen, total, 1.0)), float("-inf"))
    tl.store(lse + place + at, found, mask=inside)


@triton.jit
def weigh(
    q, dy, less, delta, k, v, k_t, v_t, position, rows, low, high, scale, dq,
    E: tl.constexpr, V: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What one block of rows adds to the gradient of some queries."""
    j, e, c = tl.arange(0, BK), tl.arange(0, BE), tl.arange(0, BV)
    there = position + j < rows
    k += position.to(tl.int64) * k_t
    v += position.to(tl.int64) * v_t
    keys = tl.load(k + (j * k_t)[:, None] + e[None, :], mask=there[:, None] & (e < E)[None, :], other=0.0)
    across = tl.load(v + c[:, None] + (j * v_t)[None, :], mask=(c < V)[:, None] & there[None, :], other=0.0)
    p = tl.exp2(dot(q, tl.trans(keys), PRECISION) * scale - less[:, None])
    met = dot(dy, across, PRECISION)
    if MASKED:
        at = (position + j)[None, :]
        p = tl.where((at >= low[:, None]) & (at < high[:, None]), p, 0.0)
        met = tl.where((high - low > 1)[:, None], met, 0.0)
    ds = p * (met - delta[:, None])
    return dq + dot(ds.to(keys.dtype), keys, PRECISION)


@triton.jit(do_not_specialize=["tokens", "rows", "blocks"])
def backward_queries(
    q, q_b, q_t, q_h, k, k_b, k_t, k_h, v, v_b, v_t, v_h, low, high, y, lse, dy, dlse, delta, dq,
    tokens, rows, blocks, groups, scale,
    M: tl.constexpr, BOUND_HEADS: tl.constexpr, E: tl.constexpr, V: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """D and the gradient of a block of queries."""
    pid = tl.program_id(0)
    g, n = pid % groups, pid // groups % (tl.num_programs(0) // (groups * blocks))
    r0 = (blocks - 1 - pid // (tl.num_programs(0) // blocks)) * BQ
    r, t0, e, c = r0 + tl.arange(0, BQ), r0 // M, tl.arange(0, BE), tl.arange(0, BV)
    inside = r < tokens * M
    lows = seen_by(low, n, t0, r, tokens, BOUND_HEADS, g, M, inside, 2147483647)
    highs = seen_by(high, n, t0, r, tokens, BOUND_HEADS, g, M, inside, 0)
    first, last = tl.min(lows), tl.max(highs)
    inner = tl.max(tl.where(inside, lows, 0))
    outer = tl.minimum(tl.min(tl.where(inside, highs, 2147483647)), rows)
    before, within, behind = pieces(first, inner, outer, last, BK)

    heads = groups * M
    place = (n.to(tl.int64) * tokens + t0) * heads + g * M
    at = (r // M - t0) * heads + r % M
    wide = inside[:, None] & (c < V)[None, :]
    arriving = tl.load(dy + place * V + (at * V)[:, None] + c[None, :], mask=wide, other=0.0)
    output = tl.load(y + place * V + (at * V)[:, None] + c[None, :], mask=wide, other=0.0)
    # What sees one row alone moves no weight: both products are left out, whose sums differ in their order.
    shift = tl.where(highs - lows > 1, tl.sum(arriving.to(tl.float32) * output.to(tl.float32), axis=1), 0.0)
    shift -= tl.load(dlse + place + at, mask=inside, other=0.0)
    tl.store(delta + place + at, shift, mask=inside)
    less = tl.load(lse + place + at, mask=inside, other=float("-inf"))
    less = tl.where(less == float("-inf"), float("inf"), less * LOG2E)

    queries = rows_of(q, n, t0, r, q_b, q_t, q_h, g, M, inside, e, E)
    k += n.to(tl.int64) * k_b + g * k_h
    v += n.to(tl.int64) * v_b + g * v_h
    found = tl.zeros([BQ, BE], tl.float32)
    for i in range(within):
        position = first + (before + i) * BK
        found = weigh(
            queries, arriving, less, shift, k, v, k_t, v_t, position, rows, lows, highs, scale * LOG2E, found,
            E, V, BE, BV, BK, False, PRECISION,
        )  # fmt: skip
    for i in range(before + behind):
        position = first + tl.where(i < before, i, within + i) * BK
        found = weigh(
            queries, arriving, less, shift, k, v, k_t, v_t, position, rows, lows, highs, scale * LOG2E, found,
            E, V, BE, BV, BK, True, PRECISION,
        )  # fmt: skip
    tl.store(
        dq + place * E + (at * E)[:, None] + e[None, :],
        (found * scale).to(dq.dtype.element_ty),
        mask=inside[:, None] & (e < E)[None, :],
    )


@triton.jit
def collect(
    k, v, q, q_b, q_t, q_h, low, high, lse, dy, delta, n, g, r0, tokens, heads, at, scale, dk, dv,
    M: tl.constexpr, BOUND_HEADS: tl.constexpr, E: tl.constexpr, V: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr,
    BQ: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one block of queries adds to the gradients of some rows ``at``; tiles lie with rows down, queries across."""
    r, t0, e, c = r0 + tl.arange(0, BQ), r0 // M, tl.arange(0, BE), tl.arange(0, BV)
    inside = r < tokens * M
    place = (n.to(tl.int64) * tokens + t0) * heads + g * M
    here = (r // M - t0) * heads + r % M
    queries = rows_of(q, n, t0, r, q_b, q_t, q_h, g, M, inside, e, E)
    less = tl.load(lse + place + here, mask=inside, other=float("-inf"))
    less = tl.where(less == float("-inf"), float("inf"), less * LOG2E)
    p = tl.exp2(dot(k, tl.trans(queries), PRECISION) * scale - less[None, :])
    if MASKED:
        lows = seen_by(low, n, t0, r, tokens, BOUND_HEADS, g, M, inside, 2147483647)
        highs = seen_by(high, n, t0, r, tokens, BOUND_HEADS, g, M, inside, 0)
        p = tl.where((at[:, None] >= lows[None, :]) & (at[:, None] < highs[None, :]), p, 0.0)
    wide = inside[:, None] & (c < V)[None, :]
    arriving = tl.load(dy + place * V + (here * V)[:, None] + c[None, :], mask=wide, other=0.0)
    shift = tl.load(delta + place + here, mask=inside, other=0.0)
    dv += dot(p.to(arriving.dtype), arriving, PRECISION)
    met = dot(v, tl.trans(arriving), PRECISION)
    if MASKED:
        met = tl.where((highs - lows > 1)[None, :], met, 0.0)
    ds = p * (met - shift[None, :])
    return dk + dot(ds.to(queries.dtype), queries, PRECISION), dv


@triton.jit(do_not_specialize=["tokens", "rows", "blocks", "parts"])
def backward_rows(
    q, q_b, q_t, q_h, k, k_b, k_t, k_h, v, v_b, v_t, v_h, low, high, runs, lse, dy, delta, dk, dv,
    tokens, rows, blocks, groups, parts, scale,
    M: tl.constexpr, BOUND_HEADS: tl.constexpr, E: tl.constexpr, V: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of rows from one of ``parts`` parts of the queries that see it; the most seen first."""
    pid = tl.program_id(0)
    g, part = pid % groups, pid // groups % parts
    batch = tl.num_programs(0) // (groups * blocks * parts)
    n, position = pid // (groups * parts) % batch, pid // (groups * parts * batch) * BK
    at, e, c = position + tl.arange(0, BK), tl.arange(0, BE), tl.arange(0, BV)
    there, heads = at < rows, groups * M
    k += n.to(tl.int64) * k_b + g * k_h + position.to(tl.int64) * k_t
    v += n.to(tl.int64) * v_b + g * v_h + position.to(tl.int64) * v_t
    j = tl.arange(0, BK)
    keys = tl.load(k + (j * k_t)[:, None] + e[None, :], mask=there[:, None] & (e < E)[None, :], other=0.0)
    values = tl.load(v + (j * v_t)[:, None] + c[None, :], mask=there[:, None] & (c < V)[None, :], other=0.0)

    # The run of queries that see any of the block, and that of those that see all of it.
    runs += ((n.to(tl.int64) * groups + g) * blocks + position // BK) * 4
    first, inner, outer, last = tl.load(runs), tl.load(runs + 1), tl.load(runs + 2), tl.load(runs + 3)
    share = tl.cdiv(tl.cdiv(tl.maximum(last - first, 0), parts), BQ) * BQ
    first += part * share
    last = tl.minimum(last, first + share)
    before, within, behind = pieces(first * M, tl.maximum(inner, first) * M, tl.minimum(outer, last) * M, last * M, BQ)
    dk_, dv_ = tl.zeros([BK, BE], tl.float32), tl.zeros([BK, BV], tl.float32)
    for i in range(within):
        dk_, dv_ = collect(
            keys, values, q, q_b, q_t, q_h, low, high, lse, dy, delta, n, g, first * M + (before + i) * BQ,
            tokens, heads, at, scale * LOG2E, dk_, dv_, M, BOUND_HEADS, E, V, BE, BV, BQ, False, PRECISION,
        )  # fmt: skip
    for i in range(before + behind):
        dk_, dv_ = collect(
            keys, values, q, q_b, q_t, q_h, low, high, lse, dy, delta, n, g,
            first * M + tl.where(i < before, i, within + i) * BQ,
            tokens, heads, at, scale * LOG2E, dk_, dv_, M, BOUND_HEADS, E, V, BE, BV, BQ, True, PRECISION,
        )  # fmt: skip

    out = ((part * batch + n).to(tl.int64) * rows + position) * groups + g
    tl.store(
        dk + out * E + (j * groups * E)[:, None] + e[None, :],
        (dk_ * scale).to(dk.dtype.element_ty),
        mask=there[:, None] & (e < E)[None, :],
    )
    tl.store(
        dv + out * V + (j * groups * V)[:, None] + c[None, :],
        dv_.to(dv.dtype.element_ty),
        mask=there[:, None] & (c < V)[None, :],
    )


class PackedAttention:
    """See ``mixers.packed``."""

    arrays = ("torch",)

    def serves(self, dtype: str, device: str, widths: tuple[int, int]) -> bool:
        """Widths up to 128 on a GPU, and no float64."""
        return runs_here(dtype, device) and all(1 <= width <= WIDEST for width in widths)

    def forward(self, x: tuple[Array, ...], fixed: tuple[Array, ...], scale: float, how: str) -> tuple[Array, Array]:
        """Output and lse."""
        (q, k, v), (low, high) = x, fixed
        y = torch.empty((*q.shape[:3], _fitting(v)), dtype=v.dtype, device=q.device)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        if not q.numel() or not k.numel():
            return torch.zeros((*q.shape[:3], v.shape[3]), dtype=v.dtype, device=q.device), lse.fill_(-math.inf)
        call = _Call(q, k, v, low, high, scale)
        size = _sizes(call.q, call.v, "forward")
        described = not INTERPRETED and q.element_size() == 2
        forward[call.grid(size)](
            *(call.described(size["BK"]) if described else call.arrays), y, lse, *call.counts(size),
            **call.constants(size), DESCRIBED=described,
        )  # fmt: skip
        return y[..., : v.shape[3]].contiguous(), lse

    def backward(
        self,
        x: tuple[Array, ...],
        fixed: tuple[Array, ...],
        scale: float,
        how: str,
        out: tuple[Array, ...],
        dout: tuple[Array, ...],
    ) -> tuple[Array, ...]:
        """Gradients of q, k and v."""
        (q, k, v), (low, high), (y, lse), (dy, dlse) = x, fixed, out, dout
        if not q.numel() or not k.numel():
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        call = _Call(q, k, v, low, high, scale)
        y, dy, dlse = _fitted(y).contiguous(), _fitted(dy).contiguous(), dlse.float().contiguous()
        lse, delta = lse.contiguous(), torch.empty_like(lse, memory_format=torch.contiguous_format)
        dq = torch.empty(call.q.shape, dtype=q.dtype, device=q.device)
        size = _sizes(call.q, call.v, "queries")
        backward_queries[call.grid(size)](
            *call.arrays, y, lse, dy, dlse, delta, dq, *call.counts(size), **call.constants(size)
        )
        size = _sizes(call.q, call.v, "rows")
        blocks, groups = triton.cdiv(k.shape[1], size["BK"]), k.shape[2]
        parts = _parts(blocks * groups, triton.cdiv(q.shape[1] * call.share, 4 * size["BQ"]))
        dk, dv = (
            torch.empty((parts, *a.shape), dtype=a.dtype if parts == 1 else torch.float32, device=a.device)
            for a in (call.k, call.v)
        )
        backward_rows[(blocks * q.shape[0] * groups * parts,)](
            *call.arrays, call.runs(size["BK"]), lse, dy, delta, dk, dv,
            q.shape[1], k.shape[1], blocks, groups, parts, call.scale, **call.constants(size),
        )  # fmt: skip
        dq = dq if call.sign > 0 else dq * call.sign
        dk, dv = (d[0] if parts == 1 else d.sum(0).to(q.dtype) for d in (dk, dv))
        return tuple(d[..., : a.shape[3]].contiguous() for d, a in ((dq, q), (dk, k), (dv, v)))


class _Call:
    """The arguments that all kernels share."""

    def __init__(self, q: Array, k: Array, v: Array, low: Array, high: Array, scale: float) -> None:
        # Kernels take positive factors: the largest product is then that of the largest logit.
        self.sign = (scale > 0) - (scale < 0)
        self.q, self.k, self.v = (_fitted(a) for a in (q if scale > 0 else q * self.sign, k, v))
        self.low, self.high = (a.to(torch.int32).contiguous() for a in (low, high))
        self.scale, self.share = abs(scale) or 1.0, q.shape[2] // k.shape[2]
        self.arrays = (*(n for a in (self.q, self.k, self.v) for n in place(a, 0, 1, 2)), self.low, self.high)

    def described(self, block: int) -> tuple[Any, ...]:
        """``arrays`` with descriptors of keys and values in their places, for Hopper's copies of whole blocks."""

        def of(a: Array) -> tuple[Any, ...]:
            flat = a.flatten(2)
            return TensorDescriptor(flat, flat.shape, flat.stride(), [1, block, a.shape[3]]), 0, 0, 0

        return (*place(self.q, 0, 1, 2), *of(self.k), *of(self.v), self.low, self.high)

    def blocks(self, size: dict[str, int]) -> int:
        """Blocks of queries of a row of the batch and a head of keys."""
        return triton.cdiv(self.q.shape[1] * self.share, size["BQ"])

    def grid(self, size: dict[str, int]) -> tuple[int]:
        """A program a block of queries."""
        return (self.blocks(size) * self.q.shape[0] * self.k.shape[2],)

    def counts(self, size: dict[str, int]) -> tuple[Any, ...]:
        """Lengths, and the factor on logits."""
        return self.q.shape[1], self.k.shape[1], self.blocks(size), self.k.shape[2], self.scale

    def constants(self, size: dict[str, int]) -> dict[str, Any]:
        """What a kernel is compiled for."""
        width, depth = self.q.shape[3], self.v.shape[3]
        return {
            "M": self.share,
            "BOUND_HEADS": self.low.shape[2],
            "E": width,
            "V": depth,
            "BE": _wide(width),
            "BV": _wide(depth),
            "PRECISION": "ieee",
            **size,
        }

    def runs(self, block: int) -> Array:
        """For every block of rows the tokens that see it, int32 ``[N,A,blocks,4]``.

        The first token that sees any of it, the first of those that see all of it and the one past their last, and the
        one past the last that sees any.
        """
        rows, groups, tokens = self.k.shape[1], self.k.shape[2], self.q.shape[1]
        start = torch.arange(0, rows, block, dtype=torch.int32, device=self.q.device)
        low, high = (a.transpose(1, 2).contiguous() for a in (self.low, self.high))  # [N,1 or H,T]
        start = start.expand(*low.shape[:2], -1).contiguous()
        end = start + block
        found = [
            torch.searchsorted(high, start, right=True, out_int32=True),
            torch.searchsorted(high, end.clamp(max=rows), out_int32=True),
            torch.searchsorted(low, start, right=True, out_int32=True),
            torch.searchsorted(low, end, out_int32=True),
        ]
        if low.shape[1] > 1:  # of the heads that share a head of keys: all that any of them needs
            shape = (low.shape[0], groups, self.share, -1)
            first, inner, outer, last = (a.view(shape) for a in found)
            found = [first.amin(2), inner.amax(2), outer.amin(2), last.amax(2)]
        runs = torch.stack(found, dim=-1).clamp(max=tokens)
        return runs.expand(-1, groups, -1, -1).contiguous()


def _fitting(x: Array) -> int:
    """The width that rows of a tensor have in the kernels: in half precision that of a whole block.

    Rows of 20 bfloat16 values in blocks of 32 came out wrong on an H200 (Triton 3.6), whole blocks of 64 and 128 right.
    """
    width: int = x.shape[3]
    return max(64, block(width)) if x.element_size() == 2 else width


def _fitted(x: Array) -> Array:
    """The tensor with zeros behind its rows up to their width in the kernels, and rows that start at 16 bytes."""
    more = _fitting(x) - x.shape[3]
    if more:
        return torch.nn.functional.pad(x, (0, more))
    x = dense(x)
    aligned = x.element_size() > 2 or all(n % 8 == 0 for n in (x.storage_offset(), *x.stride()[:3]))
    return x if aligned else x.contiguous()


def _wide(width: int) -> int:
    """The power of two, from 32 up, that holds a width: products of 16 columns go wrong where they feed others."""
    return max(32, block(width))


def _parts(programs: int, most: int) -> int:
    """How many programs share the queries of a block of rows, so that few rows keep a GPU busy; not by the batch."""
    return max(1, min(256 // programs, most, 16))


def _sizes(q: Array, v: Array, kernel: str) -> dict[str, int]:
    """Queries and rows of a block, warps and stages."""
    width = max(_wide(q.shape[3]), _wide(v.shape[3]))
    if INTERPRETED:
        found = (32, 32, 4, 1)
    elif q.element_size() == 4:
        found = _SINGLES[max(width, 64)]
    else:
        found = _HALVES[kernel, max(width, 64)]
    return dict(zip(("BQ", "BK", "num_warps", "num_stages"), found, strict=True))


# True float32 products take registers by the width: small blocks of many warps, by width.
_SINGLES = {64: (32, 32, 8, 1), 128: (16, 32, 8, 1)}

# For bfloat16 and float16, by kernel and width.
_HALVES = {
    ("forward", 64): (128, 64, 4, 3),
    ("forward", 128): (64, 64, 4, 3),
    ("queries", 64): (128, 64, 8, 3),
    ("queries", 128): (128, 64, 8, 2),
    ("rows", 64): (64, 128, 8, 2),
    ("rows", 128): (64, 128, 8, 2),
}

PRIMITIVE = PackedAttention()
