"""One decay a channel, in chunks: what a decay of one number a head leaves to the products must go into Q and K.

    D_ijc = Σ_{j<m≤i} g_mc        pairs_ij = Σ_c x_ic k_jc e^{D_ijc}    (x = q or k, i > j)

The exponential of a sum over (j, i] is a product of one for i and one for j. With G_i the sum up to i, of C tokens:

    X = x∘e^{G−G_C/2}    Y = k∘e^{G_C/2−G}    pairs = X Yᵀ

Exponents may be positive, so decays must be *gentle*: over a chunk no channel falls below ``GENTLE``, which leaves room
in float32 for what is above the diagonal, where exponents add up, and is dropped. Chunks with a steeper channel are for
``steep_decays``; their ``fade`` tells.

The factors are those of gated linear attention (arXiv 2312.06635); the place that they count from, and what is gentle,
are ours.

    fold           Q∘e^{G}, K∘e^{G}, K∘e^{G_C−G}, fade e^{G_C}: what meets the state
                   P = scale · (q, k) pairs, N = (k, k) pairs below the diagonal
    unfold_pairs   gradients of P and N as gradients of what meets the state, and all those of decays
    unfold         gradients of what meets the state as gradients of Q and K

A decay's gradient is a sum over all pairs that it lies between. ``Σ_{i≥m} (X∘dX)_i − (Y∘dY)_i`` is that sum, as pairs
with both tokens behind m cancel: to the last bit but for the order of the sum, since X and Y are the rounded ones that
the products took. In the adjoint both count from the chunk's end, where Y is what was stored.
"""

import triton
import triton.language as tl

from .blocks import LEAST, dot, gathered, kept, locate

LOG2E = tl.constexpr(1.4426950408889634)
# As a power of two, so that X and Y are within 2**50 both ways.
GENTLE = tl.constexpr(2.0**-100)

# A constant of one head would make the tokens of one channel contiguous. With that, and blocks of 32 channels, a kernel
# read memory that is not its own under Triton 3.6 on an H200, and gradients of decays were wrong.
PLAIN = ("tokens", "sequences", "per", "every", "heads")


@triton.jit
def steep(fade, chunk, K: tl.constexpr):
    """Whether a chunk of a head is not for this module."""
    c = tl.arange(0, triton.next_power_of_2(K))
    return tl.min(tl.load(fade + chunk * K + c, mask=c < K, other=1.0), axis=0) < GENTLE


@triton.jit
def powers(g, inside):
    """Decays as powers of two, summed up to every token of a chunk, and all together."""
    log = tl.maximum(tl.load(g, mask=inside, other=0.0).to(tl.float32), LEAST) * LOG2E
    return tl.cumsum(log, axis=0), tl.sum(log, axis=0)[None, :]


@triton.jit(do_not_specialize=PLAIN)
def fold(
    q, q_b, q_t, q_h, k, k_b, k_t, k_h, g, g_b, g_t, g_h, queries, keys_in, keys_out, fade, p, n, offsets,
    tokens, sequences, per, every, heads, group, scale,
    K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, DELTA: tl.constexpr, PACKED: tl.constexpr,
    CHECKPOINTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one head, some channels after the others. What it finds of a steep one is overwritten."""
    pid = tl.program_id(0)
    head, row = pid % heads, (pid // heads).to(tl.int64)
    batch, start, count = locate(row, tokens, sequences, per, every, offsets, BT, CHECKPOINTS, PACKED)
    if count <= 0:
        return
    t = tl.arange(0, BT)
    i, j = t[:, None], t[None, :]
    rows = i < count
    place = (batch * tokens + start + i) * heads + head
    q += batch * q_b + (start + i) * q_t + (head // group) * q_h
    k += batch * k_b + (start + i) * k_t + (head // group) * k_h
    g += batch * g_b + (start + i) * g_t + head * g_h
    operand = k.dtype.element_ty
    reads, writes = tl.zeros([BT, BT], tl.float32), tl.zeros([BT, BT], tl.float32)
    for at in range(0, K, BK):
        c = at + tl.arange(0, BK)[None, :]
        inside = rows & (c < K)
        wide = place * K + c
        until, total = powers(g + c, inside)
        query = tl.load(q + c, mask=inside, other=0.0).to(tl.float32)
        key = tl.load(k + c, mask=inside, other=0.0).to(tl.float32)
        middle, half = 0.5 * total, tl.exp2(0.5 * total)
        up, down = tl.exp2(until - middle), tl.exp2(middle - until)
        query, other = query * up, key * down
        columns = tl.trans(other.to(operand))
        reads += dot(query.to(operand), columns, PRECISION)
        tl.store(queries + wide, (query * half).to(operand), mask=inside)
        tl.store(keys_out + wide, (other * half).to(operand), mask=inside)
        if DELTA:
            key *= up
            writes += dot(key.to(operand), columns, PRECISION)
            tl.store(keys_in + wide, (key * half).to(operand), mask=inside)
        tl.store(fade + (row * heads + head) * K + c, half * half, mask=c < K)
    tl.store(p + place * BT + j, tl.where(i >= j, scale * reads, 0.0).to(operand), mask=rows & kept(i, j))
    if DELTA:
        tl.store(n + place * BT + j, tl.where(i > j, writes, 0.0), mask=rows & kept(i, j))


@triton.jit(do_not_specialize=PLAIN)
def unfold_pairs(
    queries, keys_in, keys_out, fade, dp, dn, dqueries, dkeys_in, dkeys_out, dfade, dg, offsets,
    tokens, sequences, per, every, heads, group,
    K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, DELTA: tl.constexpr, PACKED: tl.constexpr,
    CHECKPOINTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one head: to dqueries, dkeys_in and dkeys_out, which hold what the state brings, what pairs bring.

    dp is scale times the gradient of P, dfade e^{G_C} times its own.
    """
    pid = tl.program_id(0)
    head, row = pid % heads, (pid // heads).to(tl.int64)
    batch, start, count = locate(row, tokens, sequences, per, every, offsets, BT, CHECKPOINTS, PACKED)
    if count <= 0:
        return
    if steep(fade, row * heads + head, K):
        return
    t = tl.arange(0, BT)
    i, j = t[:, None], t[None, :]
    rows = i < count
    place = (batch * tokens + start + i) * heads + head
    operand = keys_out.dtype.element_ty
    below = rows & kept(i, j)
    reads = tl.where(i > j, tl.load(dp + place * BT + j, mask=below, other=0.0), 0.0)
    if DELTA:
        writes = tl.load(dn + place * BT + j, mask=below, other=0.0)
    for at in range(0, K, BK):
        c = at + tl.arange(0, BK)[None, :]
        inside = rows & (c < K)
        wide = place * K + c
        where = (row * heads + head) * K + c
        back = 1 / tl.load(fade + where, mask=c < K, other=1.0)
        y = tl.load(keys_out + wide, mask=inside, other=0.0)
        met = tl.load(queries + wide, mask=inside, other=0.0).to(tl.float32)
        x = (met * back).to(operand)
        dx, dmet = dot(reads, y, PRECISION), tl.load(dqueries + wide, mask=inside, other=0.0)
        dy = dot(tl.trans(reads), x, PRECISION)
        change = x.to(tl.float32) * dx + met * dmet
        tl.store(dqueries + wide, dmet + back * dx, mask=inside)
        if DELTA:
            met = tl.load(keys_in + wide, mask=inside, other=0.0).to(tl.float32)
            x = (met * back).to(operand)
            dx, dmet = dot(writes, y, PRECISION), tl.load(dkeys_in + wide, mask=inside, other=0.0)
            dy += dot(tl.trans(writes), x, PRECISION)
            change += x.to(tl.float32) * dx + met * dmet
            tl.store(dkeys_in + wide, dmet + back * dx, mask=inside)
        dmet = tl.load(dkeys_out + wide, mask=inside, other=0.0)
        tl.store(dkeys_out + wide, dmet + dy, mask=inside)
        # A sum up to a token gains what comes up to it; what leaves a token for the chunk's end decays behind it.
        change -= y.to(tl.float32) * dy
        leaving = y.to(tl.float32) * dmet
        dlog = gathered(i <= j, change, operand, PRECISION) + gathered(i > j, leaving, operand, PRECISION)
        dlog += tl.load(dfade + where, mask=c < K, other=0.0)
        tl.store(dg + wide, dlog.to(dg.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=PLAIN)
def unfold(
    q, q_b, q_t, q_h, k, k_b, k_t, k_h, g, g_b, g_t, g_h, fade, dp, dqueries, dkeys_in, dkeys_out, dq, dk, offsets,
    tokens, sequences, per, every, heads, group,
    K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, DELTA: tl.constexpr, PACKED: tl.constexpr,
    CHECKPOINTS: tl.constexpr,
):  # fmt: skip
    """A block of channels of one chunk of one head. A token's pair with itself has no decay, and is in dp alone."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(K, BK)
    head, row = (pid // blocks) % heads, (pid // (blocks * heads)).to(tl.int64)
    batch, start, count = locate(row, tokens, sequences, per, every, offsets, BT, CHECKPOINTS, PACKED)
    if count <= 0:
        return
    if steep(fade, row * heads + head, K):
        return
    t, c = tl.arange(0, BT)[:, None], (pid % blocks) * BK + tl.arange(0, BK)[None, :]
    inside = (t < count) & (c < K)
    place = (batch * tokens + start + t) * heads + head
    wide = place * K + c
    q += batch * q_b + (start + t) * q_t + (head // group) * q_h + c
    k += batch * k_b + (start + t) * k_t + (head // group) * k_h + c
    until, total = powers(g + batch * g_b + (start + t) * g_t + head * g_h + c, inside)
    into, out_of = tl.exp2(until), tl.exp2(total - until)
    alone = tl.load(dp + place * BT + t, mask=t < count, other=0.0).to(tl.float32)
    dquery = alone * tl.load(k, mask=inside, other=0.0).to(tl.float32)
    dquery += into * tl.load(dqueries + wide, mask=inside, other=0.0)
    tl.store(dq + wide, dquery.to(dq.dtype.element_ty), mask=inside)
    dkey = alone * tl.load(q, mask=inside, other=0.0).to(tl.float32)
    dkey += out_of * tl.load(dkeys_out + wide, mask=inside, other=0.0)
    if DELTA:
        dkey += into * tl.load(dkeys_in + wide, mask=inside, other=0.0)
    tl.store(dk + wide, dkey.to(dk.dtype.element_ty), mask=inside)
