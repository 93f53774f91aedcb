"""Chunks of the linear and delta families, forward: what can be prepared, the chain, outputs.

A chunk of C tokens starts from a state S; rows are tokens, G a running sum of ``log_decay`` inside the chunk:

    L_ij = e^{G_i−G_j} (i ≥ j)        N = stril(beta_i (K Kᵀ∘L))        A = (I + N)⁻¹
    W = A diag(beta) (e^G∘K)          U = A diag(beta) V                P = scale · tril(Q Kᵀ∘L)
    U' = U − W S  (delta), V (linear)                                   Y = scale (e^G∘Q) S + P U'
    S_C = e^{G_C} S + (e^{G_C−G}∘K)ᵀ U'

``running`` sums decays, ``scores`` fills P and K Kᵀ∘L, ``solve`` A, for all chunks side by side: no state is in them,
so they are off the chain. Where there is no system to solve whoever reads computes P, if that is cheaper than loading.
``chain`` goes from chunk to chunk with the state on chip, in one of two forms: *fused*, where it computes
``U' = A beta (V − e^G∘K S)`` and also reads, so that states never leave the chip; *thin*, where it takes W and U from
``prepare`` and writes every chunk's first state and U', and ``outputs`` reads them side by side. With one decay a
channel the factors do not come out of the products: ``decays`` folds them into Q and K beforehand.

P, A and what is like them lie in memory by blocks of 16 tokens, those on the diagonal and below: ``blocks.kept``.

    q, k [B,T,G,K]   v [B,T,H,V]   w [B,T,H,K]   u [B,T,H,V]   p [B,T,H,C]   states [R,H,K,V], a row a chunk
    inward [B,T,H] = e^{G_i}, outward [B,T,H] = e^{G_C−G_i}, total [B,T,H] = G as ``blocks.falling`` takes it;
    fade [R,H,K] = e^{G_C}
"""

import triton
import triton.language as tl

from .blocks import LEAST_HALF, chunk, chunks, dot, fading, falling, first_row, inverse, kept, locate, pair_decays, span


@triton.jit
def lower(pairs, beta, beta_t, a, b, count, step):
    """A block of N: ``beta_i ⟨k_i, k_j⟩`` with its decay, for i in sub-chunk a and j in b."""
    t = tl.arange(0, 16)
    inside = a * 16 + t < count
    where = (a * 16 + t[:, None]).to(tl.int64) * step + b * 16 + t[None, :]
    found = tl.load(pairs + where, mask=inside[:, None], other=0.0)
    found *= tl.load(beta + (a * 16 + t) * beta_t, mask=inside, other=0.0).to(tl.float32)[:, None]
    return tl.where((a * 16 + t)[:, None] > (b * 16 + t)[None, :], found, 0.0)


@triton.jit
def put(x, a, b, value, count, step):
    """Store a block of a matrix of the chunk."""
    t = tl.arange(0, 16)
    where = (a * 16 + t[:, None]).to(tl.int64) * step + b * 16 + t[None, :]
    tl.store(x + where, value.to(x.dtype.element_ty), mask=(a * 16 + t < count)[:, None])


@triton.jit(do_not_specialize=["tokens", "sequences", "per", "every"])
def solve(
    beta, beta_b, beta_t, beta_h, pairs, a, offsets, tokens, sequences, per, every, heads, group,
    BT: tl.constexpr, PACKED: tl.constexpr, CHECKPOINTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A of one chunk of one head, by one warp: inverses of blocks of 16 tokens, then a substitution by blocks.

    ``A_ij = −A_ii Σ_m N_im A_mj``, m from j to i − 1.
    """
    pid = tl.program_id(0)
    head, row = pid % heads, (pid // heads).to(tl.int64)
    batch, start, count = locate(row, tokens, sequences, per, every, offsets, BT, CHECKPOINTS, PACKED)
    if count <= 0:
        return
    count = count.to(tl.int32)
    beta += batch * beta_b + start * beta_t + head * beta_h
    place = (batch * tokens + start) * heads + head
    a += place * BT
    pairs += place * BT
    step = heads * BT
    n00, n11 = lower(pairs, beta, beta_t, 0, 0, count, step), lower(pairs, beta, beta_t, 1, 1, count, step)
    n10 = lower(pairs, beta, beta_t, 1, 0, count, step)
    if BT == 64:
        n22, n33 = lower(pairs, beta, beta_t, 2, 2, count, step), lower(pairs, beta, beta_t, 3, 3, count, step)
        n20, n21 = lower(pairs, beta, beta_t, 2, 0, count, step), lower(pairs, beta, beta_t, 2, 1, count, step)
        n30, n31 = lower(pairs, beta, beta_t, 3, 0, count, step), lower(pairs, beta, beta_t, 3, 1, count, step)
        n32 = lower(pairs, beta, beta_t, 3, 2, count, step)
    a00, a11 = inverse(n00, 16, PRECISION), inverse(n11, 16, PRECISION)
    a10 = -dot(a11, dot(n10, a00, PRECISION), PRECISION)
    put(a, 0, 0, a00, count, step)
    put(a, 1, 0, a10, count, step)
    put(a, 1, 1, a11, count, step)
    if BT == 64:
        a22, a33 = inverse(n22, 16, PRECISION), inverse(n33, 16, PRECISION)
        a21, a32 = -dot(a22, dot(n21, a11, PRECISION), PRECISION), -dot(a33, dot(n32, a22, PRECISION), PRECISION)
        a20 = -dot(a22, dot(n20, a00, PRECISION) + dot(n21, a10, PRECISION), PRECISION)
        a31 = -dot(a33, dot(n31, a11, PRECISION) + dot(n32, a21, PRECISION), PRECISION)
        a30 = dot(n30, a00, PRECISION) + dot(n31, a10, PRECISION) + dot(n32, a20, PRECISION)
        put(a, 2, 0, a20, count, step)
        put(a, 2, 1, a21, count, step)
        put(a, 2, 2, a22, count, step)
        put(a, 3, 0, -dot(a33, a30, PRECISION), count, step)
        put(a, 3, 1, a31, count, step)
        put(a, 3, 2, a32, count, step)
        put(a, 3, 3, a33, count, step)


@triton.jit(do_not_specialize=["tokens", "sequences", "per", "every"])
def running(
    g, g_b, g_t, g_h, inward, outward, total, fade, offsets, tokens, sequences, per, every, heads, group,
    K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BH: tl.constexpr, PACKED: tl.constexpr,
    CHECKPOINTS: tl.constexpr,
):  # fmt: skip
    """Decays of a chunk of a block of heads: from its start, to its end, as a sum for ``falling``, and all together."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(heads, BH)
    row = (pid // blocks).to(tl.int64)
    batch, start, count = locate(row, tokens, sequences, per, every, offsets, BT, CHECKPOINTS, PACKED)
    if count <= 0:
        return
    t, h = tl.arange(0, BT)[:, None], (pid % blocks) * BH + tl.arange(0, BH)[None, :]
    g += batch * g_b + (start + t) * g_t + h.to(tl.int64) * g_h
    log = tl.load(g, mask=(t < count) & (h < heads), other=0.0).to(tl.float32)
    later = tl.load(g + g_t, mask=(t + 1 < count) & (h < heads), other=0.0).to(tl.float32)
    place, inside = (batch * tokens + start + t) * heads + h, (t < count) & (h < heads)
    tl.store(inward + place, tl.exp(tl.cumsum(log, axis=0)), mask=inside)
    tl.store(outward + place, tl.exp(tl.cumsum(later, axis=0, reverse=True)), mask=inside)
    tl.store(total + place, tl.cumsum(tl.maximum(log, LEAST_HALF), axis=0), mask=inside)
    left, c = tl.exp(tl.sum(log, axis=0))[:, None], tl.arange(0, BK)[None, :]
    h = (pid % blocks) * BH + tl.arange(0, BH)[:, None]
    tl.store(fade + (row * heads + h) * K + c, left, mask=(h < heads) & (c < K))


@triton.jit(do_not_specialize=["tokens", "sequences", "per", "every"])
def scores(
    q, q_b, q_t, q_h, k, k_b, k_t, k_h, g, g_b, g_t, g_h, p, pairs, total, offsets,
    tokens, sequences, per, every, heads, group, scale,
    K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, DELTA: tl.constexpr, DECAY: tl.constexpr,
    PACKED: tl.constexpr, CHECKPOINTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P of one chunk of one head, and K Kᵀ∘L as ``pairs``."""
    pid = tl.program_id(0)
    head, row = pid % heads, (pid // heads).to(tl.int64)
    batch, start, count = locate(row, tokens, sequences, per, every, offsets, BT, CHECKPOINTS, PACKED)
    if count <= 0:
        return
    t = tl.arange(0, BT)
    i, j = t[:, None], t[None, :]
    rows = i < count
    place = (batch * tokens + start + t) * heads + head
    q += batch * q_b + (start + i) * q_t + (head // group) * q_h
    k += batch * k_b + (start + i) * k_t + (head // group) * k_h
    qk, kk = tl.zeros([BT, BT], tl.float32), tl.zeros([BT, BT], tl.float32)
    for at in range(0, K, BK):
        c = at + tl.arange(0, BK)[None, :]
        inside = rows & (c < K)
        query, key = tl.load(q + c, mask=inside, other=0.0), tl.load(k + c, mask=inside, other=0.0)
        qk += dot(query, tl.trans(key), PRECISION)
        if DELTA:
            kk += dot(key, tl.trans(key), PRECISION)
    if DECAY == 1:
        g += batch * g_b + (start + t) * g_t + head * g_h
        log = tl.load(g, mask=t < count, other=0.0).to(tl.float32)
        sums = tl.load(total + place, mask=t < count, other=0.0)
        between = pair_decays(log, sums, BT, k.dtype.element_ty, PRECISION)
        qk *= between
        if DELTA:
            kk *= between
    reads = tl.where(i >= j, scale * qk, 0.0)
    tl.store(p + place[:, None] * BT + j, reads.to(p.dtype.element_ty), mask=rows & kept(i, j))
    if DELTA:
        tl.store(pairs + place[:, None] * BT + j, kk, mask=rows & kept(i, j))


@triton.jit
def falls(total, base, i, length, every, heads, BT: tl.constexpr, CHECKPOINTS: tl.constexpr):
    """The running sums of chunk i, which a chain asks for a chunk early, as in ``fading``."""
    at, count = chunk(i, length, every, BT, CHECKPOINTS)
    t = tl.arange(0, BT)
    return tl.load(total + base + (at + t).to(tl.int64) * heads, mask=t < count, other=0.0)


@triton.jit
def own_reads(qk, scale, BT: tl.constexpr, operand: tl.constexpr):
    """P of a chunk without a system to solve, from Q Kᵀ with its decays."""
    t = tl.arange(0, BT)
    return tl.where(t[:, None] >= t[None, :], scale * qk, 0.0).to(operand)


@triton.jit(do_not_specialize=["tokens", "sequences", "per", "every"])
def prepare(
    k, k_b, k_t, k_h, v, v_b, v_t, v_h, beta, beta_b, beta_t, beta_h, a, inward, w, u, offsets,
    tokens, sequences, per, every, heads, group,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr,
    PACKED: tl.constexpr, CHECKPOINTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W and U of one chunk of one head. With DECAY 2, k is e^G∘K."""
    pid = tl.program_id(0)
    head, row = pid % heads, (pid // heads).to(tl.int64)
    batch, start, count = locate(row, tokens, sequences, per, every, offsets, BT, CHECKPOINTS, PACKED)
    if count <= 0:
        return
    t = tl.arange(0, BT)
    rows = t[:, None] < count
    place = (batch * tokens + start + t) * heads + head
    k += batch * k_b + (start + t[:, None]) * k_t + (head // group) * k_h
    v += batch * v_b + (start + t[:, None]) * v_t + head * v_h
    beta += batch * beta_b + (start + t) * beta_t + head * beta_h
    strength = tl.load(beta, mask=t < count, other=0.0).to(tl.float32)[:, None]
    solved = tl.load(a + place[:, None] * BT + t[None, :], mask=rows & kept(t[:, None], t[None, :]), other=0.0)
    operand = k.dtype.element_ty
    for at in range(0, V, BV):
        c = at + tl.arange(0, BV)[None, :]
        inside = rows & (c < V)
        value = (tl.load(v + c, mask=inside, other=0.0).to(tl.float32) * strength).to(operand)
        found = dot(solved, value, PRECISION).to(u.dtype.element_ty)
        tl.store(u + place[:, None] * V + c, found, mask=inside)
    if DECAY == 1:
        strength *= tl.load(inward + place, mask=t < count, other=0.0)[:, None]
    for at in range(0, K, BK):
        c = at + tl.arange(0, BK)[None, :]
        inside = rows & (c < K)
        key = (tl.load(k + c, mask=inside, other=0.0).to(tl.float32) * strength).to(operand)
        found = dot(solved, key, PRECISION).to(w.dtype.element_ty)
        tl.store(w + place[:, None] * K + c, found, mask=inside)


@triton.jit
def read(reads, write, out, PRECISION: tl.constexpr):
    """``out + P U'``. Of alike keys writes cancel in the sum while their rounding adds up: it drops nothing."""
    rounded = write.to(reads.dtype)
    out = tl.dot(reads, rounded, out, input_precision=PRECISION)
    if write.dtype != reads.dtype:
        rest = (write - rounded.to(tl.float32)).to(reads.dtype)
        out = tl.dot(reads, rest, out, input_precision=PRECISION)
    return out


@triton.jit(do_not_specialize=["tokens", "per", "every"])
def chain(
    q, q_b, q_t, q_h, k, k_b, k_t, k_h, u, u_b, u_t, u_h, w, w_b, w_t, w_h, beta, beta_b, beta_t, beta_h, a, p,
    inward, outward, total, fade, first, first_n, first_h, first_k, first_v, last, checkpoints, y, states, written,
    offsets, marks, tokens, per, every, heads, group, scale,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DELTA: tl.constexpr,
    DECAY: tl.constexpr, FUSED: tl.constexpr, PACKED: tl.constexpr, CHECKPOINTS: tl.constexpr, MARKED: tl.constexpr,
    STORE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of values of one head of one sequence, chunk after chunk.

    Thin, it takes W as ``w`` and U as ``u``; fused, e^G∘K (K where DECAY is 1) as ``w`` and V as ``u``, and A besides.
    Thin and without ``states`` it is asked for the last state alone.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(V, BV)
    head = (pid // blocks) % heads
    n = pid // (blocks * heads)
    t, c, e = tl.arange(0, BT), tl.arange(0, BK), (pid % blocks) * BV + tl.arange(0, BV)
    inside, below = (c < K)[:, None] & (e < V)[None, :], kept(t[:, None], t[None, :])
    batch, start, length = span(n, tokens, offsets, PACKED)
    row = first_row(n, per, every, offsets, BT, CHECKPOINTS, PACKED)
    grid = c[:, None] * first_k + e[None, :] * first_v
    s = tl.load(first + n.to(tl.int64) * first_n + head * first_h + grid, mask=inside, other=0.0).to(tl.float32)
    operand = k.dtype.element_ty
    matrix = c[:, None] * V + e[None, :]
    # K as it was given both meets the state and enters it: it is loaded once.
    WHOLE: tl.constexpr = p is None or (DELTA and FUSED and DECAY < 2)
    if MARKED:
        mark = tl.load(marks + n) if PACKED else n.to(tl.int64) * (length // every)

    q += batch * q_b + start * q_t + (head // group) * q_h
    k += batch * k_b + start * k_t + (head // group) * k_h
    u += batch * u_b + start * u_t + head * u_h
    if DELTA and not WHOLE:
        w += batch * w_b + start * w_t + head * w_h
    if DELTA and FUSED:
        beta += batch * beta_b + start * beta_t + head * beta_h
    base = (batch * tokens + start) * heads + head
    if DECAY:
        ahead = fading(fade, row, length * 0, length, every, heads, head, c, K, BT, CHECKPOINTS)
    OWN: tl.constexpr = FUSED and p is None and DECAY == 1
    if OWN:
        sums_ahead = falls(total, base, length * 0, length, every, heads, BT, CHECKPOINTS)
    for i in range(chunks(length, every, BT, CHECKPOINTS)):
        if DECAY:
            left = ahead
            ahead = fading(fade, row, i + 1, length, every, heads, head, c, K, BT, CHECKPOINTS)
        if OWN:
            sums = sums_ahead
            sums_ahead = falls(total, base, i + 1, length, every, heads, BT, CHECKPOINTS)
        at, count = chunk(i, length, every, BT, CHECKPOINTS)
        here = at + t
        rows = (t < count)[:, None]
        place = base + here.to(tl.int64) * heads
        keys, values = rows & (c < K)[None, :], rows & (e < V)[None, :]
        held = s.to(operand)
        if states is not None:
            where = ((row + i) * heads + head) * K * V
            tl.store(states + where + matrix, held, mask=inside)
        if WHOLE:
            key = tl.load(k + here[:, None] * k_t + c[None, :], mask=keys, other=0.0)
        write = tl.load(u + here[:, None] * u_t + e[None, :], mask=values, other=0.0)
        if DELTA:
            if WHOLE:
                correction = key
            else:
                correction = tl.load(w + here[:, None] * w_t + c[None, :], mask=keys, other=0.0)
            known = dot(correction, held, PRECISION)
            if FUSED:
                if DECAY == 1:
                    known *= tl.load(inward + place, mask=t < count, other=0.0)[:, None]
                strength = tl.load(beta + here * beta_t, mask=t < count, other=0.0).to(tl.float32)
                missing = (strength[:, None] * (write.to(tl.float32) - known)).to(operand)
                solved = tl.load(a + place[:, None] * BT + t[None, :], mask=rows & below, other=0.0)
                write = dot(solved, missing, PRECISION)
            else:
                write = write.to(tl.float32) - known
                tl.store(written + place[:, None] * V + e[None, :], write.to(written.dtype.element_ty), mask=values)
        if not WHOLE:
            key = tl.load(k + here[:, None] * k_t + c[None, :], mask=keys, other=0.0)
        # The state is done with before reads begin, which are of its copy: registers do not hold more.
        leaving = write
        if DECAY == 1:
            out_of = tl.load(outward + place, mask=t < count, other=0.0)
            leaving = write.to(tl.float32) * out_of[:, None]
        if DECAY:
            s *= left[:, None]
        s = tl.dot(tl.trans(key), leaving.to(operand), s, input_precision=PRECISION)
        if FUSED:
            query = tl.load(q + here[:, None] * q_t + c[None, :], mask=keys, other=0.0)
            out = scale * dot(query, held, PRECISION)
            if DECAY == 1:
                out *= tl.load(inward + place, mask=t < count, other=0.0)[:, None]
            if p is None:
                qk = dot(query, tl.trans(key), PRECISION)
                if DECAY == 1:
                    qk *= falling(sums)
                reads = own_reads(qk, scale, BT, operand)
            else:
                reads = tl.load(p + place[:, None] * BT + t[None, :], mask=rows & below, other=0.0)
            out = read(reads, write, out, PRECISION)
            tl.store(y + place[:, None] * V + e[None, :], out.to(y.dtype.element_ty), mask=values)
        if MARKED:
            if (at + count) % every == 0:
                where = ((mark + (at + count) // every - 1) * heads + head) * K * V
                tl.store(checkpoints + where + matrix, s.to(checkpoints.dtype.element_ty), mask=inside)
    if STORE:
        where = (n.to(tl.int64) * heads + head) * K * V
        tl.store(last + where + matrix, s.to(last.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "sequences", "per", "every"])
def outputs(
    q, q_b, q_t, q_h, k, k_b, k_t, k_h, u, u_b, u_t, u_h, p, inward, total, states, y, offsets,
    tokens, sequences, per, every, heads, group, scale,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr,
    PACKED: tl.constexpr, CHECKPOINTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of outputs of one chunk of one head, from the chunk's first state and its writes u."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(V, BV)
    head, row = (pid // blocks) % heads, (pid // (blocks * heads)).to(tl.int64)
    batch, start, count = locate(row, tokens, sequences, per, every, offsets, BT, CHECKPOINTS, PACKED)
    if count <= 0:
        return
    t, e = tl.arange(0, BT), (pid % blocks) * BV + tl.arange(0, BV)
    rows = (t < count)[:, None]
    place = (batch * tokens + start + t) * heads + head
    q += batch * q_b + (start + t[:, None]) * q_t + (head // group) * q_h
    if p is None:
        k += batch * k_b + (start + t[:, None]) * k_t + (head // group) * k_h
        qk = tl.zeros([BT, BT], tl.float32)
    states += (row * heads + head) * K * V
    out = tl.zeros([BT, BV], tl.float32)
    for at in range(0, K, BK):
        c = at + tl.arange(0, BK)
        query = tl.load(q + c[None, :], mask=rows & (c < K)[None, :], other=0.0)
        grid = c[:, None] * V + e[None, :]
        held = tl.load(states + grid, mask=(c < K)[:, None] & (e < V)[None, :], other=0.0)
        out += dot(query, held, PRECISION)
        if p is None:
            key = tl.load(k + c[None, :], mask=rows & (c < K)[None, :], other=0.0)
            qk += dot(query, tl.trans(key), PRECISION)
    out *= scale
    if DECAY == 1:
        out *= tl.load(inward + place, mask=t < count, other=0.0)[:, None]
    values = rows & (e < V)[None, :]
    u += batch * u_b + (start + t[:, None]) * u_t + head * u_h
    write = tl.load(u + e[None, :], mask=values, other=0.0)
    if p is None:
        if DECAY == 1:
            qk *= falling(tl.load(total + place, mask=t < count, other=0.0))
        reads = own_reads(qk, scale, BT, q.dtype.element_ty)
    else:
        reads = tl.load(p + place[:, None] * BT + t[None, :], mask=rows & kept(t[:, None], t[None, :]), other=0.0)
    out = read(reads, write, out, PRECISION)
    tl.store(y + place[:, None] * V + e[None, :], out.to(y.dtype.element_ty), mask=values)
