"""What ``decays`` does, for chunks that may forget all within a few tokens: no exponent is ever positive.

Both tokens of a pair count from a border between them. A chunk is cut into tiles of 16 tokens. Tokens of two tiles
count from the border before the later one; a tile is halved again and again, and at the level of blocks of s tokens, i
in the second block of a pair and j in the first both count from the border between them,

    X_i = x_i e^{sum from the border to i}       Y_j = k_j e^{sum behind j up to the border}       pairs = X Yᵀ

so that every pair of tokens meets exactly once. Each exponent is a sum of non-positive numbers, never a difference:
nothing overflows, nothing cancels. The sums are products with matrices of zeros and ones.

    fold     what ``decays.fold`` finds, of chunks that are steep
    unfold   its adjoint

Steep chunks are few as a rule: programs look through all chunks for them, one program through many. Where ``decays``
has not run, ALL are taken.
"""

import triton
import triton.language as tl

from .blocks import LEAST, dot, locate, sums, upper_bits
from .decays import LOG2E, steep


@triton.jit
def sums_across(g, which, PRECISION: tl.constexpr):
    """``g which``."""
    if PRECISION == "ieee":
        return dot(g, which.to(tl.float32), PRECISION)
    ones, high = which.to(tl.float16), g.to(tl.float16)
    low = (g - high.to(tl.float32)).to(tl.float16)
    return dot(high, ones, PRECISION) + dot(low, ones, PRECISION)


@triton.jit
def spread(d, which, operand: tl.constexpr, PRECISION: tl.constexpr):
    """``d which`` for gradients, which may be of any size, in two parts that a product takes without rounding."""
    if PRECISION == "ieee":
        return dot(d, which.to(tl.float32), PRECISION)
    ones, high = which.to(operand), upper_bits(d, operand)
    return dot(high.to(operand), ones, PRECISION) + dot((d - high).to(operand), ones, PRECISION)


@triton.jit
def to_border(i, j, level):
    """Which decays lie between token i and the border of its pair of blocks: up to i behind it, after i before it."""
    return ((i ^ j) >> level == 0) & ((j <= i) == ((i >> level) & 1 == 1))


@triton.jit
def meet(i, j, level):
    """Which pairs meet at the level of blocks of 2**level: i in the second block of a pair, j in the first."""
    return ((i ^ j) >> level == 1) & (j < i)


@triton.jit
def get(x, step, t, c, count, K: tl.constexpr):
    """Columns c of the rows of tokens t, one of the two down and the other across."""
    return tl.load(x + t * step + c, mask=(t < count) & (c < K), other=0.0)


@triton.jit
def logs(g, g_t, t, c, count, K: tl.constexpr):
    """Decays, as powers of two."""
    return tl.maximum(get(g, g_t, t, c, count, K).to(tl.float32), LEAST) * LOG2E


@triton.jit
def put(x, step, t, c, value, count, K: tl.constexpr):
    """Store what ``get`` reads."""
    tl.store(x + t * step + c, value.to(x.dtype.element_ty), mask=(t < count) & (c < K))


@triton.jit
def fold_chunk(
    q, q_b, q_t, q_h, k, k_b, k_t, k_h, g, g_b, g_t, g_h, queries, keys_in, keys_out, fade, p, n,
    batch, start, count, row, head, tokens, heads, group, scale,
    K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, DELTA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tile after tile, by few warps: what is computed of a tile stays in one or two of them."""
    count = count.to(tl.int32)
    t, c = tl.arange(0, 16), tl.arange(0, BK)[None, :]
    i, j = t[:, None], t[None, :]
    q += batch * q_b + start * q_t + (head // group) * q_h
    k += batch * k_b + start * k_t + (head // group) * k_h
    g += batch * g_b + start * g_t + head * g_h
    place = (batch * tokens + start) * heads + head
    queries += place * K
    keys_out += place * K
    p += place * BT
    if DELTA:
        keys_in += place * K
        n += place * BT
    operand = k.dtype.element_ty
    wide, narrow = heads * K, heads * BT
    tiles = tl.cdiv(count, 16)
    for a in range(tiles):
        own = a * 16 + i
        query, key = get(q, q_t, own, c, count, K).to(tl.float32), get(k, k_t, own, c, count, K).to(tl.float32)
        log = logs(g, g_t, own, c, count, K)
        reads = tl.where(i == j, tl.sum(query * key, axis=1)[:, None], 0.0)
        writes = tl.zeros([16, 16], tl.float32)
        for level in tl.static_range(4):
            factor = tl.exp2(sums(to_border(i, j, level), log, PRECISION))
            near = (key * factor).to(operand)
            columns = tl.trans(near)
            here = meet(i, j, level)
            reads += tl.where(here, dot((query * factor).to(operand), columns, PRECISION), 0.0)
            if DELTA:
                writes += tl.where(here, dot(near, columns, PRECISION), 0.0)
        put(p, narrow, own, a * 16 + j, scale * reads, count, BT)
        if DELTA:
            put(n, narrow, own, a * 16 + j, writes, count, BT)

        into = tl.exp2(sums(j <= i, log, PRECISION))
        near_query, near_key = (query * into).to(operand), (key * into).to(operand)
        between = tl.zeros([16, BK], tl.float32)
        for step in range(a):
            earlier = (a - 1 - step) * 16
            other = logs(g, g_t, earlier + i, c, count, K)
            factor = tl.exp2(sums(j > i, other, PRECISION) + between)
            columns = tl.trans((get(k, k_t, earlier + i, c, count, K).to(tl.float32) * factor).to(operand))
            put(p, narrow, own, earlier + j, scale * dot(near_query, columns, PRECISION), count, BT)
            if DELTA:
                put(n, narrow, own, earlier + j, dot(near_key, columns, PRECISION), count, BT)
            between += sums(i + j >= 0, other, PRECISION)
        into *= tl.exp2(between)
        put(queries, wide, own, c, query * into, count, K)
        if DELTA:
            put(keys_in, wide, own, c, key * into, count, K)

    after = tl.zeros([16, BK], tl.float32)
    for step in range(tiles):
        own = (tiles - 1 - step) * 16 + i
        log = logs(g, g_t, own, c, count, K)
        out_of = tl.exp2(sums(j > i, log, PRECISION) + after)
        put(keys_out, wide, own, c, get(k, k_t, own, c, count, K).to(tl.float32) * out_of, count, K)
        after += sums(i + j >= 0, log, PRECISION)
    tl.store(fade + (row * heads + head) * K + i * 0 + c, tl.exp2(after), mask=(i == 0) & (c < K))


@triton.jit(do_not_specialize=["tokens", "sequences", "per", "every", "chunks"])
def fold(
    q, q_b, q_t, q_h, k, k_b, k_t, k_h, g, g_b, g_t, g_h, queries, keys_in, keys_out, fade, p, n, offsets,
    tokens, sequences, per, every, heads, group, scale, chunks,
    K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, DELTA: tl.constexpr, PACKED: tl.constexpr,
    CHECKPOINTS: tl.constexpr, ALL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Chunks of heads, one after the other."""
    for at in range(tl.program_id(0), chunks, tl.num_programs(0)):
        head, row = at % heads, (at // heads).to(tl.int64)
        batch, start, count = locate(row, tokens, sequences, per, every, offsets, BT, CHECKPOINTS, PACKED)
        if (count > 0) & (ALL or steep(fade, row * heads + head, K)):
            fold_chunk(
                q, q_b, q_t, q_h, k, k_b, k_t, k_h, g, g_b, g_t, g_h, queries, keys_in, keys_out, fade, p, n,
                batch, start, count, row, head, tokens, heads, group, scale, K, BT, BK, DELTA, PRECISION,
            )  # fmt: skip


@triton.jit
def unfold_block(
    q, q_b, q_t, q_h, k, k_b, k_t, k_h, g, g_b, g_t, g_h, keys_out, dp, dn, dqueries, dkeys_in, dkeys_out, dfade,
    dq, dk, dg, batch, start, count, row, head, block, tokens, heads, group,
    K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, DELTA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the last tile to the first.

    dp is scale times the gradient of P, dfade e^{G_C} times its own.
    """
    count = count.to(tl.int32)
    # Channels go down and tokens across, so that no product waits for its left operand to change hands.
    t, c = tl.arange(0, 16), block * BK + tl.arange(0, BK)[:, None]
    i, j = t[:, None], t[None, :]
    q += batch * q_b + start * q_t + (head // group) * q_h
    k += batch * k_b + start * k_t + (head // group) * k_h
    g += batch * g_b + start * g_t + head * g_h
    place = (batch * tokens + start) * heads + head
    keys_out += place * K
    dqueries += place * K
    dkeys_out += place * K
    dq += place * K
    dk += place * K
    dg += place * K
    dp += place * BT
    if DELTA:
        dkeys_in += place * K
        dn += place * BT
    operand = k.dtype.element_ty
    wide, narrow = heads * K, heads * BT

    # What passes over a tile decays with all of its g. Behind the last token there is no decay, so what belongs to it
    # is left out, large as it may be.
    passing = tl.load(dfade + (row * heads + head) * K + c, mask=c < K, other=0.0)
    tiles = tl.cdiv(count, 16)
    for a in range(tiles):
        leaving = get(dkeys_out, wide, a * 16 + j, c, count - 1, K).to(tl.float32)
        kept = get(keys_out, wide, a * 16 + j, c, count, K).to(tl.float32)
        passing += tl.sum(leaving * kept, axis=1)[:, None]
    for step in range(tiles):
        a = tiles - 1 - step
        own = a * 16 + j
        query, key = get(q, q_t, own, c, count, K).to(tl.float32), get(k, k_t, own, c, count, K).to(tl.float32)
        log = logs(g, g_t, own, c, count, K)
        # As they lie, and with axes swapped.
        reads = get(dp, narrow, a * 16 + i, a * 16 + j, count, BT)
        reads_t = get(dp, narrow, a * 16 + j, a * 16 + i, count, BT)
        if DELTA:
            writes = get(dn, narrow, a * 16 + i, a * 16 + j, count, BT)
            writes_t = get(dn, narrow, a * 16 + j, a * 16 + i, count, BT)
        alone = tl.sum(tl.where(i == j, reads.to(tl.float32), 0.0), axis=0)[None, :]
        dquery, dkey = alone * key, alone * query
        dlog = tl.zeros([BK, 16], tl.float32)
        for level in tl.static_range(4):
            factor = tl.exp2(sums_across(log, to_border(j, i, level), PRECISION))
            near_query, near_key = (query * factor).to(operand), (key * factor).to(operand)
            here, there = meet(i, j, level), meet(j, i, level)
            by_query = factor * dot(near_key, tl.where(there, reads_t, 0.0).to(operand), PRECISION)
            by_key = dot(near_query, tl.where(here, reads, 0.0).to(operand), PRECISION)
            if DELTA:
                # A token is in the first block or in the second: one product for both sides.
                pairs = tl.where(here, writes, 0.0) + tl.where(there, writes_t, 0.0)
                by_key += dot(near_key, pairs.to(operand), PRECISION)
            by_key *= factor
            dquery += by_query
            dkey += by_key
            change = query * by_query + key * by_key
            dlog += spread(change, to_border(i, j, level), operand, PRECISION)

        by_query, by_key = tl.zeros([BK, 16], tl.float32), tl.zeros([BK, 16], tl.float32)
        between = tl.zeros([BK, 16], tl.float32)
        for back in range(a):
            earlier = (a - 1 - back) * 16
            other = logs(g, g_t, earlier + j, c, count, K)
            factor = tl.exp2(sums_across(other, i > j, PRECISION) + between)
            near_key = (get(k, k_t, earlier + j, c, count, K).to(tl.float32) * factor).to(operand)
            by_query += dot(near_key, get(dp, narrow, own, earlier + i, count, BT), PRECISION)
            if DELTA:
                by_key += dot(near_key, get(dn, narrow, own, earlier + i, count, BT), PRECISION)
            between += sums_across(other, i + j >= 0, PRECISION)
        into, before = tl.exp2(sums_across(log, i <= j, PRECISION)), tl.exp2(between)
        by_query = into * (by_query + before * get(dqueries, wide, own, c, count, K).to(tl.float32))
        put(dq, wide, own, c, dquery + by_query, count, K)
        up = query * by_query
        if DELTA:
            by_key = into * (by_key + before * get(dkeys_in, wide, own, c, count, K).to(tl.float32))
            dkey += by_key
            up += key * by_key

        by_key, between = tl.zeros([BK, 16], tl.float32), tl.zeros([BK, 16], tl.float32)
        for b in range(a + 1, tiles):
            later = b * 16
            other = logs(g, g_t, later + j, c, count, K)
            factor = tl.exp2(sums_across(other, i <= j, PRECISION) + between)
            near_query = (get(q, q_t, later + j, c, count, K).to(tl.float32) * factor).to(operand)
            by_key += dot(near_query, get(dp, narrow, later + i, own, count, BT), PRECISION)
            if DELTA:
                near_key = (get(k, k_t, later + j, c, count, K).to(tl.float32) * factor).to(operand)
                by_key += dot(near_key, get(dn, narrow, later + i, own, count, BT), PRECISION)
            between += sums_across(other, i + j >= 0, PRECISION)
        behind = sums_across(log, i > j, PRECISION)
        by_key *= tl.exp2(behind)
        leaving = get(dkeys_out, wide, own, c, count, K).to(tl.float32)
        put(dk, wide, own, c, dkey + by_key + tl.exp2(behind + between) * leaving, count, K)
        down = key * by_key + leaving * get(keys_out, wide, own, c, count - 1, K).to(tl.float32)

        # The gradient of a sum goes to all that is summed: up to i, and behind j.
        dlog += spread(up, i >= j, operand, PRECISION) + spread(down, i < j, operand, PRECISION)
        passing -= tl.sum(down, axis=1)[:, None]
        put(dg, wide, own, c, dlog + passing, count, K)
        passing += tl.sum(up, axis=1)[:, None]


@triton.jit(do_not_specialize=["tokens", "sequences", "per", "every", "chunks"])
def unfold(
    q, q_b, q_t, q_h, k, k_b, k_t, k_h, g, g_b, g_t, g_h, keys_out, fade, dp, dn, dqueries, dkeys_in, dkeys_out, dfade,
    dq, dk, dg, offsets, tokens, sequences, per, every, heads, group, chunks,
    K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, DELTA: tl.constexpr, PACKED: tl.constexpr,
    CHECKPOINTS: tl.constexpr, ALL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Blocks of channels of chunks of heads, one after the other."""
    blocks = tl.cdiv(K, BK)
    for at in range(tl.program_id(0), chunks * blocks, tl.num_programs(0)):
        head, row = (at // blocks) % heads, (at // (blocks * heads)).to(tl.int64)
        batch, start, count = locate(row, tokens, sequences, per, every, offsets, BT, CHECKPOINTS, PACKED)
        if (count > 0) & (ALL or steep(fade, row * heads + head, K)):
            unfold_block(
                q, q_b, q_t, q_h, k, k_b, k_t, k_h, g, g_b, g_t, g_h, keys_out, dp, dn, dqueries, dkeys_in, dkeys_out,
                dfade, dq, dk, dg, batch, start, count, row, head, at % blocks, tokens, heads, group,
                K, BT, BK, DELTA, PRECISION,
            )  # fmt: skip
