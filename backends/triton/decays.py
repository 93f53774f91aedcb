"""One decay a channel, in chunks: what a decay of one number a head leaves to the products must go into Q and K.

    D_ijc = Σ_{j<m≤i} g_mc        pairs_ij = Σ_c x_ic k_jc e^{D_ijc}    (x = q or k, i > j)

The exponential of a sum over (j, i] is a product of one for i and one for j only if both count from a token between
them: ``e^{−G_j}`` alone overflows. A chunk is halved again and again; at the level of blocks of s tokens, i in the
second block of a pair and j in the first both count from the border between them,

    X_i = x_i e^{sum from the border to i}       Y_j = k_j e^{sum behind j up to the border}       pairs = X Yᵀ

so that every pair of tokens meets exactly once. Each exponent is a sum of non-positive numbers, never a difference:
nothing overflows, nothing cancels. Up to blocks of 8 tokens, sums are products of tiles of 16 tokens with matrices of
zeros and ones; of whole tiles their totals are added up.

    fold     Q∘e^{G}, K∘e^{G}, K∘e^{G_C−G}, fade e^{G_C}: what meets the state
             P = scale · (q, k) pairs, N = (k, k) pairs below the diagonal tiles and in them
    unfold   its adjoint; there tokens of two tiles count from the border before the later one

fold has all tiles of a chunk at work side by side. Levels of a tile are products of 16 tokens, of which the half is of
use; as products of the whole chunk, of which a sixteenth is, they would be three times as much for tensor cores, and
masks as large as a chunk would cost more than the products.
"""

import triton
import triton.language as tl

from .blocks import LEAST, dot, locate, sums, upper_bits

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sums_across(g, which, PRECISION: tl.constexpr):
    """``g which``."""
    if PRECISION == "ieee":
        return dot(g, which.to(tl.float32), PRECISION)
    ones, high = which.to(tl.float16), g.to(tl.float16)
    low = (g - high.to(tl.float32)).to(tl.float16)
    return dot(high, ones, PRECISION) + dot(low, ones, PRECISION)


@triton.jit
def exp(x):
    """``e^x`` where what is less than a normal number may be zero, which is one instruction and a product."""
    return tl.exp2(x * LOG2E)


@triton.jit
def tile_sums(which, g, PRECISION: tl.constexpr):
    """``which g`` in every tile, of g in float16 as it is."""
    which = tl.broadcast_to(which, [g.shape[0], 16, 16])
    if g.dtype == tl.float16:
        return dot(which.to(tl.float16), g, PRECISION)
    return sums(which, g, PRECISION)


@triton.jit
def total_over(which, total, PARTS: tl.constexpr):
    """Sums over those tiles that a row of ``which [tiles, tiles, 1]`` names, from totals of all: one for all tokens."""
    found = tl.sum(tl.where(which, total[None, :, :], 0.0), axis=1)
    return tl.reshape(found, [total.shape[0] * PARTS, 1, total.shape[1] // PARTS])


@triton.jit
def of_parts(pairs, TILES: tl.constexpr, PARTS: tl.constexpr):
    """Pairs of tokens of a tile, from those of its parts."""
    if PARTS == 1:
        return pairs
    return tl.sum(tl.reshape(pairs, [TILES, PARTS, 16, 16]), axis=1)


@triton.jit
def of_second(second, key, behind, DELTA: tl.constexpr):
    """Keys of first blocks and of second ones, which are asked for only where keys meet keys."""
    if DELTA:
        return tl.where(second == 1, key, behind)
    return behind


@triton.jit
def side_by_side(x, TILES: tl.constexpr, PARTS: tl.constexpr):
    """Tokens by channels, from parts of tiles."""
    W: tl.constexpr = x.shape[2]
    return tl.reshape(tl.permute(tl.reshape(x, [TILES, PARTS, 16, W]), 0, 2, 1, 3), [TILES * 16, PARTS * W])


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


@triton.jit(do_not_specialize=["tokens", "sequences", "per", "every"])
def fold(
    q, q_b, q_t, q_h, k, k_b, k_t, k_h, g, g_b, g_t, g_h, queries, keys_in, keys_out, fade, p, n, offsets,
    tokens, sequences, per, every, heads, group, scale,
    K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, W: tl.constexpr, DELTA: tl.constexpr, PACKED: tl.constexpr,
    CHECKPOINTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one head. A warp has W channels of a tile, and products within tiles stay in it."""
    pid = tl.program_id(0)
    head, row = pid % heads, (pid // heads).to(tl.int64)
    batch, start, count = locate(row, tokens, sequences, per, every, offsets, BT, CHECKPOINTS, PACKED)
    if count <= 0:
        return
    count = count.to(tl.int32)
    TILES: tl.constexpr = BT // 16
    PARTS: tl.constexpr = BK // W
    part, t = tl.arange(0, TILES * PARTS)[:, None, None], tl.arange(0, 16)
    i, j = t[None, :, None], t[None, None, :]
    own, c = part // PARTS * 16 + i, part % PARTS * W + tl.arange(0, W)[None, None, :]
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
    query, key = get(q, q_t, own, c, count, K), get(k, k_t, own, c, count, K)
    log = tl.maximum(get(g, g_t, own, c, count, K).to(tl.float32), LEAST)
    tile, other = tl.arange(0, TILES)[:, None, None], tl.arange(0, TILES)[None, :, None]
    total = tl.reshape(tl.sum(log, axis=1), [TILES, BK])
    channel = tl.arange(0, BK)
    tl.store(fade + (row * heads + head) * K + channel, exp(tl.sum(total, axis=0)), mask=channel < K)
    if g.dtype.element_ty.primitive_bitwidth == 16 and PRECISION != "ieee":
        log = log.to(tl.float16)  # which holds all that bfloat16 does of a decay

    # Pairs within tiles.
    reads = tl.where(i == j, dot(query, tl.permute(key, 0, 2, 1), PRECISION), 0.0)
    writes = tl.zeros([TILES * PARTS, 16, 16], tl.float32)
    query, key = query.to(tl.float32), key.to(tl.float32)
    for level in range(4):
        factor = exp(tile_sums(to_border(i, j, level), log, PRECISION))
        near_key = (key * factor).to(operand)
        columns, here = tl.permute(near_key, 0, 2, 1), meet(i, j, level)
        reads += tl.where(here, dot((query * factor).to(operand), columns, PRECISION), 0.0)
        if DELTA:
            writes += tl.where(here, dot(near_key, columns, PRECISION), 0.0)
    put(p, narrow, tile * 16 + i, tile * 16 + j, scale * of_parts(reads, TILES, PARTS), count, BT)
    if DELTA:
        put(n, narrow, tile * 16 + i, tile * 16 + j, of_parts(writes, TILES, PARTS), count, BT)

    # What meets the state, and pairs of two tiles: of neighbours, and of the two halves of a chunk of 64, whose outer
    # tiles have another between them and the border.
    behind = key * exp(tile_sums(j > i, log, PRECISION))
    put(keys_out, wide, own, c, behind * exp(total_over(other > tile, total, PARTS)), count, K)
    into = exp(tile_sums(j <= i, log, PRECISION))
    before = exp(total_over(other < tile, total, PARTS))
    key *= into
    if DELTA:
        put(keys_in, wide, own, c, key * before, count, K)
    near_key = side_by_side(of_second(own // 16 % 2, key, behind, DELTA).to(operand), TILES, PARTS)
    if TILES == 4:
        passed = exp(total_over(to_border(tile, other, 1) & (tile != other), total, PARTS))
        far_key = of_second(own // 32, key, behind, DELTA) * passed
        far_key = side_by_side(far_key.to(operand), TILES, PARTS)
    query *= into
    put(queries, wide, own, c, query * before, count, K)
    x, y = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    stored, halves = (x < count) & (x // 16 > y // 16), x // 32 > y // 32
    columns = tl.trans(near_key)
    reads = dot(side_by_side(query.to(operand), TILES, PARTS), columns, PRECISION)
    if TILES == 4:
        far_columns = tl.trans(far_key)
        far_query = side_by_side((query * passed).to(operand), TILES, PARTS)
        reads = tl.where(halves, dot(far_query, far_columns, PRECISION), reads)
    tl.store(p + x * narrow + y, (scale * reads).to(operand), mask=stored)
    if DELTA:
        writes = dot(near_key, columns, PRECISION)
        if TILES == 4:
            writes = tl.where(halves, dot(far_key, far_columns, PRECISION), writes)
        tl.store(n + x * narrow + y, writes, mask=stored)


@triton.jit(do_not_specialize=["tokens", "sequences", "per", "every"])
def unfold(
    q, q_b, q_t, q_h, k, k_b, k_t, k_h, g, g_b, g_t, g_h, keys_out, dp, dn, dqueries, dkeys_in, dkeys_out, dfade,
    dq, dk, dg, offsets, tokens, sequences, per, every, heads, group,
    K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, DELTA: tl.constexpr, PACKED: tl.constexpr,
    CHECKPOINTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of channels of one chunk of one head, from its last tile to its first.

    dp is scale times the gradient of P, dfade e^{G_C} times its own.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(K, BK)
    head, row = (pid // blocks) % heads, (pid // (blocks * heads)).to(tl.int64)
    batch, start, count = locate(row, tokens, sequences, per, every, offsets, BT, CHECKPOINTS, PACKED)
    if count <= 0:
        return
    count = count.to(tl.int32)
    # Channels go down and tokens across, so that no product waits for its left operand to change hands.
    t, c = tl.arange(0, 16), (pid % blocks) * BK + tl.arange(0, BK)[:, None]
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
