"""The adjoint of chunks of the linear and delta families; notation of ``delta_chunk_forward``.

Nothing is kept by the forward: W, U, P, A, every chunk's first state S and its writes U' are computed again. With d the
gradient of a loss, dS that of a chunk's last state, and q̂ = e^G∘Q, k̂ = e^G∘K, ǩ = e^{G_C−G}∘K:

    chain, from the last chunk to the first
        dU' = Pᵀ dY + ǩ dS          dS ← e^{G_C} dS + scale q̂ᵀ dY − Wᵀ dU'   (linear: without W)
    chunks, all side by side
        dP = tril(dY U'ᵀ)           dq̂ = scale dY Sᵀ            dǩ = U' dSᵀ
        Z = Aᵀ dU'                  dk̂ = −beta∘Z Sᵀ             M = −stril(Z U'ᵀ), beta times it that of K Kᵀ∘L
        dQ = e^G∘dq̂ + scale (dP∘L) K
        dK = e^{G_C−G}∘dǩ + scale (dP∘L)ᵀ Q + e^G∘dk̂ + (beta∘M∘L) K + (beta∘M∘L)ᵀ K
        dV = beta∘Z                 dbeta = Σ Z∘V − Σ (Z Sᵀ)∘k̂ + Σ_j M∘(K Kᵀ∘L)
    decays: sums that end at i gain q̂·dq̂ + k̂·dk̂, and so on; see ``blocks.decay_gradient``

Neither W nor U is needed: with ``dW = −dU' Sᵀ``, what W and U bring into M is ``Z Uᵀ − Z Sᵀ Wᵀ = Z U'ᵀ``.

A transposed product is computed with its factors the other way round, or its transpose is: on Hopper, Triton 3.4 to
3.7 miscompiles a product whose operand is the transpose of another product.
"""

import triton
import triton.language as tl

from .blocks import (
    chunk,
    chunks,
    decay_gradient,
    dot,
    fading,
    first_row,
    kept,
    locate,
    pair_decays,
    pair_decays_gradient,
    span,
)


@triton.jit(do_not_specialize=["tokens", "per", "every"])
def chain_back(
    q, q_b, q_t, q_h, k, k_b, k_t, k_h, dy, dy_b, dy_t, dy_h, w, p, inward, outward, fade,
    dlast, dlast_n, dlast_h, dlast_k, dlast_v, dmarks, dstates, dwritten, dfirst, offsets, marks,
    tokens, per, every, heads, group, scale,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DELTA: tl.constexpr,
    DECAY: tl.constexpr, PACKED: tl.constexpr, CHECKPOINTS: tl.constexpr, ARRIVES: tl.constexpr,
    MARKED: tl.constexpr, STORE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of values of one head of one sequence, from its last chunk to its first: dS of every chunk, and dU'."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(V, BV)
    head = (pid // blocks) % heads
    n = pid // (blocks * heads)
    t, c, e = tl.arange(0, BT), tl.arange(0, BK), (pid % blocks) * BV + tl.arange(0, BV)
    inside, below = (c < K)[:, None] & (e < V)[None, :], kept(t[None, :], t[:, None])
    batch, start, length = span(n, tokens, offsets, PACKED)
    row = first_row(n, per, every, offsets, BT, CHECKPOINTS, PACKED)
    operand = k.dtype.element_ty
    matrix = c[:, None] * V + e[None, :]
    ds = tl.zeros([BK, BV], tl.float32)
    if ARRIVES:
        grid = c[:, None] * dlast_k + e[None, :] * dlast_v
        ds += tl.load(dlast + n.to(tl.int64) * dlast_n + head * dlast_h + grid, mask=inside, other=0.0).to(tl.float32)
    if MARKED:
        mark = tl.load(marks + n) if PACKED else n.to(tl.int64) * (length // every)

    q += batch * q_b + start * q_t + (head // group) * q_h
    k += batch * k_b + start * k_t + (head // group) * k_h
    dy += batch * dy_b + start * dy_t + head * dy_h
    base = (batch * tokens + start) * heads + head
    number = chunks(length, every, BT, CHECKPOINTS)
    if DECAY:
        final = tl.maximum(number - 1, 0)
        ahead = fading(fade, row, final, length, every, heads, head, c, K, BT, CHECKPOINTS)
    for step in range(number):
        i = number - 1 - step
        if DECAY:
            left, before = ahead, tl.maximum(i - 1, 0)
            ahead = fading(fade, row, before, length, every, heads, head, c, K, BT, CHECKPOINTS)
        at, count = chunk(i, length, every, BT, CHECKPOINTS)
        here = at + t
        rows = (t < count)[:, None]
        place = base + here.to(tl.int64) * heads
        keys, values = rows & (c < K)[None, :], rows & (e < V)[None, :]
        if MARKED:
            if (at + count) % every == 0:
                where = ((mark + (at + count) // every - 1) * heads + head) * K * V
                ds += tl.load(dmarks + where + matrix, mask=inside, other=0.0).to(tl.float32)
        held = ds.to(operand)
        where = ((row + i) * heads + head) * K * V
        tl.store(dstates + where + matrix, held, mask=inside)

        arriving = tl.load(dy + here[:, None] * dy_t + e[None, :], mask=values, other=0.0)
        key = tl.load(k + here[:, None] * k_t + c[None, :], mask=keys, other=0.0)
        dwrite = dot(key, held, PRECISION)
        if DECAY == 1:
            dwrite *= tl.load(outward + place, mask=t < count, other=0.0)[:, None]
        # P with its axes swapped: rows are columns of the chunk.
        reads = tl.load(p + place[None, :] * BT + t[:, None], mask=(t < count)[None, :] & below, other=0.0)
        dwrite += dot(reads, arriving, PRECISION)
        tl.store(dwritten + place[:, None] * V + e[None, :], dwrite.to(dwritten.dtype.element_ty), mask=values)

        query = tl.load(q + here[:, None] * q_t + c[None, :], mask=keys, other=0.0)
        if DECAY == 1:
            into = tl.load(inward + place, mask=t < count, other=0.0)
            arriving = (arriving.to(tl.float32) * into[:, None]).to(operand)
        if DECAY:
            ds *= left[:, None]
        ds += scale * dot(tl.trans(query), arriving, PRECISION)
        if DELTA:
            correction = tl.load(w + place[:, None] * K + c[None, :], mask=keys, other=0.0)
            ds -= dot(tl.trans(correction), dwrite.to(operand), PRECISION)
    if STORE:
        where = (n.to(tl.int64) * heads + head) * K * V
        tl.store(dfirst + where + matrix, ds.to(dfirst.dtype.element_ty), mask=inside)


@triton.jit
def products(x, y, rows, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """``X Yᵀ`` of the rows of a chunk."""
    found = tl.zeros([BT, BT], tl.float32)
    for at in range(0, K, BK):
        c = at + tl.arange(0, BK)[None, :]
        left, right = tl.load(x + c, mask=rows & (c < K), other=0.0), tl.load(y + c, mask=rows & (c < K), other=0.0)
        found += dot(left, tl.trans(right), PRECISION)
    return found


@triton.jit(do_not_specialize=["tokens", "sequences", "per", "every"])
def pairs_back(
    q, q_b, q_t, q_h, k, k_b, k_t, k_h, v, v_b, v_t, v_h, beta, beta_b, beta_t, beta_h, g, g_b, g_t, g_h,
    u, u_b, u_t, u_h, dy, dy_b, dy_t, dy_h, pairs, a, total, dwritten, dv, dp, dn, own, dstrength, dlog, offsets,
    tokens, sequences, per, every, heads, group, scale,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DELTA: tl.constexpr,
    DECAY: tl.constexpr, PACKED: tl.constexpr, CHECKPOINTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one head: what multiplies K and Q inside of it, and for the delta rule Z, in the place of dU'.

    ``dp`` is scale dP∘L below its diagonal, ``own`` the diagonal; with DECAY 2 they are one, without L. ``dn`` is
    beta∘M∘L. ``dstrength`` and ``dlog`` are what pairs and values bring to the gradients of beta and decays.
    """
    pid = tl.program_id(0)
    head, row = pid % heads, (pid // heads).to(tl.int64)
    batch, start, count = locate(row, tokens, sequences, per, every, offsets, BT, CHECKPOINTS, PACKED)
    if count <= 0:
        return
    t = tl.arange(0, BT)
    rows = (t < count)[:, None]
    place = (batch * tokens + start + t) * heads + head
    i, j = t[:, None], t[None, :]
    operand = k.dtype.element_ty
    q += batch * q_b + (start + t[:, None]) * q_t + (head // group) * q_h
    k += batch * k_b + (start + t[:, None]) * k_t + (head // group) * k_h
    u += batch * u_b + (start + t[:, None]) * u_t + head * u_h
    dy += batch * dy_b + (start + t[:, None]) * dy_t + head * dy_h
    if DELTA:
        v += batch * v_b + (start + t[:, None]) * v_t + head * v_h
        strength = tl.load(beta + batch * beta_b + (start + t) * beta_t + head * beta_h, mask=t < count, other=0.0)
        strength = strength.to(tl.float32)[:, None]
        # A with its axes swapped.
        solved = tl.load(a + place[None, :] * BT + i, mask=(t < count)[None, :] & kept(j, i), other=0.0)
        found = tl.zeros([BT], tl.float32)

    reads, writes = tl.zeros([BT, BT], tl.float32), tl.zeros([BT, BT], tl.float32)
    for at in range(0, V, BV):
        e = at + tl.arange(0, BV)[None, :]
        inside = rows & (e < V)
        write = tl.trans(tl.load(u + e, mask=inside, other=0.0))
        reads += dot(tl.load(dy + e, mask=inside, other=0.0), write, PRECISION)
        if DELTA:
            z = dot(solved, tl.load(dwritten + place[:, None] * V + e, mask=inside, other=0.0), PRECISION)
            found += tl.sum(z * tl.load(v + e, mask=inside, other=0.0).to(tl.float32), axis=1)
            tl.store(dv + place[:, None] * V + e, (strength * z).to(dv.dtype.element_ty), mask=inside)
            z = z.to(operand)
            writes -= dot(z, write, PRECISION)
            tl.store(dwritten + place[:, None] * V + e, z, mask=inside)
    reads *= scale
    if DECAY == 2:
        reads = tl.where(i >= j, reads, 0.0)
    else:
        # A token's own pair has no decay: among the others' its rounding would drown theirs.
        tl.store(own + place, tl.sum(tl.where(i == j, reads, 0.0), axis=1), mask=t < count)
        reads = tl.where(i > j, reads, 0.0)
    if DECAY == 1:
        g += batch * g_b + (start + t) * g_t + head * g_h
        log = tl.load(g, mask=t < count, other=0.0).to(tl.float32)
        sums = tl.load(total + place, mask=t < count, other=0.0)
        fades = pair_decays(log, sums, BT, operand, PRECISION)
        reads *= fades
        change = reads * products(q, k, rows, K, BT, BK, PRECISION)
    tl.store(dp + place[:, None] * BT + j, reads.to(operand), mask=rows & kept(i, j))
    if DELTA:
        writes = tl.where(i > j, writes, 0.0)
        if DECAY == 2:
            kk = tl.load(pairs + place[:, None] * BT + j, mask=rows & (i > j), other=0.0)
        else:
            kk = products(k, k, rows, K, BT, BK, PRECISION)
        if DECAY == 1:
            kk *= fades
        found += tl.sum(writes * kk, axis=1)
        tl.store(dstrength + place, found, mask=t < count)
        writes *= strength
        if DECAY == 1:
            change += writes * kk
            writes *= fades
        tl.store(dn + place[:, None] * BT + j, writes.to(operand), mask=rows & kept(i, j))
    if DECAY == 1:
        tl.store(dlog + place, pair_decays_gradient(change, log, BT, operand, PRECISION), mask=t < count)


@triton.jit(do_not_specialize=["tokens", "sequences", "per", "every"])
def chunks_back(
    q, q_b, q_t, q_h, k, k_b, k_t, k_h, beta, beta_b, beta_t, beta_h, u, u_b, u_t, u_h, dy, dy_b, dy_t, dy_h,
    z, dp, dn, own, dstrength, dlog, states, dstates, inward, outward, fade, dq, dk, dkeys_in, dbeta, dg, dfade,
    offsets, tokens, sequences, per, every, heads, group, scale,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DELTA: tl.constexpr,
    DECAY: tl.constexpr, PACKED: tl.constexpr, CHECKPOINTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one head, from what ``pairs_back`` left: dQ, dK, and the gradients of beta and decays.

    Where pairs have neither a system to solve nor a decay of their own, dP is one product and computed here. With
    DECAY 2, k is e^G∘K, dq and dk are what meets the state; pairs are left to ``decays.unfold_pairs``.
    """
    pid = tl.program_id(0)
    head, row = pid % heads, (pid // heads).to(tl.int64)
    batch, start, count = locate(row, tokens, sequences, per, every, offsets, BT, CHECKPOINTS, PACKED)
    if count <= 0:
        return
    t = tl.arange(0, BT)
    rows = (t < count)[:, None]
    place = (batch * tokens + start + t) * heads + head
    q += batch * q_b + (start + t[:, None]) * q_t + (head // group) * q_h
    k += batch * k_b + (start + t[:, None]) * k_t + (head // group) * k_h
    u += batch * u_b + (start + t[:, None]) * u_t + head * u_h
    dy += batch * dy_b + (start + t[:, None]) * dy_t + head * dy_h
    states += (row * heads + head) * K * V
    dstates += (row * heads + head) * K * V
    pair, below = place[:, None] * BT + t[None, :], rows & kept(t[:, None], t[None, :])
    if DELTA:
        strength = tl.load(beta + batch * beta_b + (start + t) * beta_t + head * beta_h, mask=t < count, other=0.0)
        strength = strength.to(tl.float32)[:, None]
        found = tl.load(dstrength + place, mask=t < count, other=0.0)
    if not DELTA and DECAY != 1:
        i, j = t[:, None], t[None, :]
        reads = scale * products(dy, u, rows, V, BT, BV, PRECISION)
        if DECAY == 2:
            tl.store(dp + pair, tl.where(i >= j, reads, 0.0).to(dp.dtype.element_ty), mask=below)
        else:
            alone = tl.sum(tl.where(i == j, reads, 0.0), axis=1)[:, None]
            reads = tl.where(i > j, reads, 0.0).to(k.dtype.element_ty)
    elif DECAY < 2:
        reads = tl.load(dp + pair, mask=below, other=0.0)
        alone = tl.load(own + place, mask=t < count, other=0.0)[:, None]
        if DELTA:
            writes = tl.load(dn + pair, mask=below, other=0.0)
    if DECAY == 1:
        into = tl.load(inward + place, mask=t < count, other=0.0)[:, None]
        out_of = tl.load(outward + place, mask=t < count, other=0.0)[:, None]
        up, down, across = tl.zeros([BT], tl.float32), tl.zeros([BT], tl.float32), 0.0
    for at in range(0, K, BK):
        c = at + tl.arange(0, BK)
        dquery, dkey = tl.zeros([BT, BK], tl.float32), tl.zeros([BT, BK], tl.float32)
        dkey_in, faded = tl.zeros([BT, BK], tl.float32), tl.zeros([BK], tl.float32)
        for to in range(0, V, BV):
            e = to + tl.arange(0, BV)[None, :]
            inside = rows & (e < V)
            grid, known = c[:, None] * V + e, (c < K)[:, None] & (e < V)
            state = tl.load(states + grid, mask=known, other=0.0)
            dstate = tl.load(dstates + grid, mask=known, other=0.0)
            dquery += dot(tl.load(dy + e, mask=inside, other=0.0), tl.trans(state), PRECISION)
            dkey += dot(tl.load(u + e, mask=inside, other=0.0), tl.trans(dstate), PRECISION)
            if DELTA:
                gained = tl.load(z + place[:, None] * V + e, mask=inside, other=0.0)
                dkey_in -= dot(gained, tl.trans(state), PRECISION)
            if DECAY:
                faded += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), axis=1)
        keys = rows & (c < K)[None, :]
        at_keys = place[:, None] * K + c[None, :]
        # One gradient after the other, as registers hold no more.
        dquery *= scale
        if DELTA or DECAY < 2:
            key = tl.load(k + c[None, :], mask=keys, other=0.0)
        if DECAY == 1:
            dquery *= into
            dkey *= out_of
            dkey_in *= into
            down += tl.sum(key.to(tl.float32) * dkey, axis=1)
            across += tl.sum(faded)
        if DELTA:
            found += tl.sum(dkey_in * key.to(tl.float32), axis=1)
            dkey_in *= strength
            if DECAY == 1:
                up += tl.sum(key.to(tl.float32) * dkey_in, axis=1)
            if DECAY == 2:
                tl.store(dkeys_in + at_keys, dkey_in, mask=keys)
            else:
                dkey += dkey_in
        if DECAY < 2:
            query = tl.load(q + c[None, :], mask=keys, other=0.0)
            if DECAY == 1:
                up += tl.sum(query.to(tl.float32) * dquery, axis=1)
            dquery += dot(reads, key, PRECISION) + alone * key.to(tl.float32)
        tl.store(dq + at_keys, dquery.to(dq.dtype.element_ty), mask=keys)
        if DECAY < 2:
            # Products with matrices whose axes are swapped, as what they are with axes swapped.
            columns = dot(tl.trans(query), reads, PRECISION)
            dkey += alone * query.to(tl.float32)
            if DELTA:
                columns += dot(tl.trans(key), writes, PRECISION)
                dkey += dot(writes, key, PRECISION)
            dkey += tl.trans(columns)
        else:
            where = (row * heads + head) * K + c
            faded *= tl.load(fade + where, mask=c < K, other=0.0)
            tl.store(dfade + where, faded, mask=c < K)
        tl.store(dk + at_keys, dkey.to(dk.dtype.element_ty), mask=keys)
    if DELTA:
        tl.store(dbeta + place, found.to(dbeta.dtype.element_ty), mask=t < count)
    if DECAY == 1:
        last = (batch * tokens + start + count - 1) * heads + head
        change = tl.load(dlog + place, mask=t < count, other=0.0)
        change += decay_gradient(up, down, across * tl.load(inward + last), BT)
        tl.store(dg + place, change.to(dg.dtype.element_ty), mask=t < count)
