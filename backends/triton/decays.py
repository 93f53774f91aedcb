"""One decay a channel, in chunks: what a decay of one number a head leaves to the products must go into Q and K.

    D_ijc = Σ_{j<m≤i} g_mc        pairs_ij = Σ_c x_ic k_jc e^{D_ijc}    (x = q or k, i > j)

The exponential of a sum over (j, i] is a product of one for i and one for j only if both count from a token between
them: ``e^{−G_j}`` alone overflows. So a chunk is halved again and again. At the level of blocks of s tokens, i in the
second block of a pair and j in the first both count from the border between them,

    X_i = x_i e^{sum from the border to i}       Y_j = k_j e^{sum behind j up to the border}       pairs = X Yᵀ

and every pair of tokens meets at exactly one level. Each exponent is a sum of non-positive numbers, never a difference:
nothing overflows, nothing cancels. The sums are products with matrices of zeros and ones.

    fold     Q∘e^{G}, K∘e^{G}, K∘e^{G_C−G}, fade e^{G_C}: what meets the state
             P = scale · (q, k) pairs, N = (k, k) pairs
    unfold   its adjoint
"""

import triton
import triton.language as tl

from .blocks import dot, locate

# e^{−10⁴} is zero, and its multiples are numbers: −∞, a hard reset, is read as this.
LEAST = tl.constexpr(-1e4)


@triton.jit
def sums(which, g, PRECISION: tl.constexpr):
    """``which g`` for a matrix of zeros and ones; two halves of g keep more of it than one tf32 would."""
    if PRECISION == "ieee":
        return dot(which.to(tl.float32), g, PRECISION)
    ones, high = which.to(tl.float16), g.to(tl.float16)
    low = (g - high.to(tl.float32)).to(tl.float16)
    return dot(ones, high, PRECISION) + dot(ones, low, PRECISION)


@triton.jit
def to_border(i, j, s):
    """Which decays lie between token i and the border of its pair of blocks: up to i behind it, after i before it."""
    behind = i // s % 2 == 1
    return (i // s == j // s) & ((behind & (j <= i)) | ((i // s % 2 == 0) & (j > i)))


@triton.jit
def meet(i, j, s):
    """Which pairs meet at the level of blocks of s: i in the second block of a pair, j in the first."""
    return (i // (2 * s) == j // (2 * s)) & (i // s % 2 == 1) & (j // s % 2 == 0)


@triton.jit(do_not_specialize=["tokens", "sequences", "per", "every"])
def fold(
    q, q_b, q_t, q_h, k, k_b, k_t, k_h, g, g_b, g_t, g_h, queries, keys_in, keys_out, fade, p, n, offsets,
    tokens, sequences, per, every, heads, group, scale,
    K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, DELTA: tl.constexpr, PACKED: tl.constexpr,
    CHECKPOINTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one head."""
    pid = tl.program_id(0)
    head, row = pid % heads, (pid // heads).to(tl.int64)
    batch, start, count = locate(row, tokens, sequences, per, every, offsets, BT, CHECKPOINTS, PACKED)
    if count <= 0:
        return
    t = tl.arange(0, BT)
    i, j = t[:, None], t[None, :]
    rows = i < count
    place = ((batch * tokens + start + t) * heads + head)[:, None]
    q += batch * q_b + (start + i) * q_t + (head // group) * q_h
    k += batch * k_b + (start + i) * k_t + (head // group) * k_h
    g += batch * g_b + (start + i) * g_t + head * g_h
    operand = k.dtype.element_ty
    reads, writes = tl.zeros([BT, BT], tl.float32), tl.zeros([BT, BT], tl.float32)
    for at in range(0, K, BK):
        c = at + tl.arange(0, BK)[None, :]
        inside = rows & (c < K)
        query = tl.load(q + c, mask=inside, other=0.0).to(tl.float32)
        key = tl.load(k + c, mask=inside, other=0.0).to(tl.float32)
        log = tl.maximum(tl.load(g + c, mask=inside, other=0.0).to(tl.float32), LEAST)
        into = tl.exp(sums(j <= i, log, PRECISION))
        out_of = tl.exp(sums(j > i, log, PRECISION))
        tl.store(queries + place * K + c, (query * into).to(queries.dtype.element_ty), mask=inside)
        tl.store(keys_out + place * K + c, (key * out_of).to(keys_out.dtype.element_ty), mask=inside)
        if DELTA:
            tl.store(keys_in + place * K + c, (key * into).to(keys_in.dtype.element_ty), mask=inside)
        total = tl.exp(tl.sum(log, axis=0))
        channel = at + tl.arange(0, BK)
        tl.store(fade + (row * heads + head) * K + channel, total, mask=channel < K)

        reads += tl.where(i == j, tl.sum(query * key, axis=1)[:, None], 0.0)
        s = 1
        while s < BT:
            factor = tl.exp(sums(to_border(i, j, s), log, PRECISION))
            columns = tl.trans((key * factor).to(operand))
            here = meet(i, j, s)
            reads += tl.where(here, dot((query * factor).to(operand), columns, PRECISION), 0.0)
            if DELTA:
                writes += tl.where(here, dot((key * factor).to(operand), columns, PRECISION), 0.0)
            s *= 2
    tl.store(p + place * BT + j, (scale * reads).to(p.dtype.element_ty), mask=rows)
    if DELTA:
        tl.store(n + place * BT + j, writes, mask=rows)


@triton.jit(do_not_specialize=["tokens", "sequences", "per", "every"])
def unfold(
    q, q_b, q_t, q_h, k, k_b, k_t, k_h, g, g_b, g_t, g_h, dp, dn, dqueries, dkeys_in, dkeys_out, dfade, dq, dk, dg,
    offsets, tokens, sequences, per, every, heads, group,
    K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, DELTA: tl.constexpr, PACKED: tl.constexpr,
    CHECKPOINTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of channels of one chunk of one head.

    dp is scale times the gradient of P, dfade e^{G_C} times its own.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(K, BK)
    head, row = (pid // blocks) % heads, (pid // (blocks * heads)).to(tl.int64)
    batch, start, count = locate(row, tokens, sequences, per, every, offsets, BT, CHECKPOINTS, PACKED)
    if count <= 0:
        return
    t = tl.arange(0, BT)
    i, j, c = t[:, None], t[None, :], (pid % blocks) * BK + tl.arange(0, BK)[None, :]
    inside = (i < count) & (c < K)
    query = tl.load(q + batch * q_b + (start + i) * q_t + (head // group) * q_h + c, mask=inside, other=0.0)
    key = tl.load(k + batch * k_b + (start + i) * k_t + (head // group) * k_h + c, mask=inside, other=0.0)
    log = tl.load(g + batch * g_b + (start + i) * g_t + head * g_h + c, mask=inside, other=0.0)
    query, key, log = query.to(tl.float32), key.to(tl.float32), tl.maximum(log.to(tl.float32), LEAST)
    operand = k.dtype.element_ty
    place = (batch * tokens + start + t) * heads + head
    # As they lie, and with axes swapped.
    reads = tl.load(dp + place[:, None] * BT + j, mask=i < count, other=0.0)
    reads_t = tl.load(dp + place[None, :] * BT + i, mask=j < count, other=0.0)
    if DELTA:
        writes = tl.load(dn + place[:, None] * BT + j, mask=i < count, other=0.0)
        writes_t = tl.load(dn + place[None, :] * BT + i, mask=j < count, other=0.0)

    own = tl.sum(tl.where(i == j, reads.to(tl.float32), 0.0), axis=1)[:, None]
    dquery, dkey = own * key, own * query
    up = tl.zeros([BT, BK], tl.float32)
    s = 1
    while s < BT:
        factor = tl.exp(sums(to_border(i, j, s), log, PRECISION))
        near_query, near_key = (query * factor).to(operand), (key * factor).to(operand)
        here, there = meet(i, j, s), meet(j, i, s)
        by_query = factor * dot(tl.where(here, reads, 0.0).to(operand), near_key, PRECISION)
        column = dot(tl.where(there, reads_t, 0.0).to(operand), near_query, PRECISION)
        dquery += by_query
        up += query * by_query
        if DELTA:
            by_key = factor * dot(tl.where(here, writes, 0.0).to(operand), near_key, PRECISION)
            column += dot(tl.where(there, writes_t, 0.0).to(operand), near_key, PRECISION)
            dkey += by_key
            up += key * by_key
        column *= factor
        dkey += column
        up -= key * column
        s *= 2

    into = tl.exp(sums(j <= i, log, PRECISION))
    out_of = tl.exp(sums(j > i, log, PRECISION))
    place = place[:, None] * K + c
    reading = tl.load(dqueries + place, mask=inside, other=0.0).to(tl.float32) * into
    leaving = tl.load(dkeys_out + place, mask=inside, other=0.0).to(tl.float32) * out_of
    up += query * reading
    dkey += leaving
    if DELTA:
        entering = tl.load(dkeys_in + place, mask=inside, other=0.0).to(tl.float32) * into
        up += key * entering
        dkey += entering
    tl.store(dq + place, (dquery + reading).to(dq.dtype.element_ty), mask=inside)
    tl.store(dk + place, dkey.to(dk.dtype.element_ty), mask=inside)
    # Sums up to i hold g_m for m ≤ i, those behind i for m > i: all of them but the ones for m ≤ i. Behind the last
    # token there is no decay, so what belongs to it is left out, large as it may be.
    down = tl.where(i < count - 1, key * leaving, 0.0)
    total = tl.load(dfade + (row * heads + head) * K + c, mask=c < K, other=0.0) + tl.sum(down, axis=0)[None, :]
    found = tl.cumsum(up - down, axis=0, reverse=True) + total
    tl.store(dg + place, found.to(dg.dtype.element_ty), mask=inside)
