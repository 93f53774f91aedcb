"""From the reads of chunked Lattice to its norms and to E, all pieces at once (the maths: ``lattice_chunk_backward``).

As in ``lattice_chunk_read``, what slots do not share is worked some slots at a time. What follows from Q' and F of all
tokens is added in a second round, which reads them back from memory.
"""

import triton
import triton.language as tl

from .blocks import dot
from .lattice_pieces import afresh, afresh_square, among, decays, emptied, errors, over, pairs, transposed, writes
from .lattice_slots import ENCODING, inverse, logs, put, slab, squares, strengths, tile


@triton.jit
def pairs_back(gram, wt, rows):
    """Mᵀ of a piece."""
    return tl.where(rows[:, None] < rows[None, :], 2 * wt * gram, tl.where(rows[:, None] == rows[None, :], gram, 0.0))


@triton.jit
def decays_back(g, rows, stride, size, BT: tl.constexpr, GATED: tl.constexpr):
    """Wᵀ of a piece."""
    above = rows[:, None] <= rows[None, :]
    if GATED:
        each = logs(g, rows, stride, size)
        exponents = tl.cumsum(tl.where(rows[:, None] < rows[None, :], each[None, :], 0.0), 1)
        return tl.where(above, tl.exp(exponents), 0.0)
    return tl.where(above, 1.0, 0.0)


@triton.jit
def of_decays(moved, level, at, size, PRECISION: tl.constexpr):
    """From the gradients of W and b, times themselves, to those of a piece's log decays."""
    later = tl.where(at[:, None] > at[None, :], moved, 0.0)
    before = dot(later, tl.where(at[:, None] < at[None, :], 1.0, 0.0), PRECISION) + level[:, None]
    inside = (at[:, None] >= at[None, :]) & (at < size)[:, None]
    return tl.sum(tl.where(inside, before, 0.0), 0)


@triton.jit
def measure_piece(
    q, q_t, k, k_t, v, v_t, beta, beta_t, g, g_t, dy, dy_t, dq, dq_t,
    first_slots, slots, running, begun, weight_to, held_to, da_to, f_to, dp_to, de_to, moments, turned_to, dg,
    size, heads, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, SLOTS: tl.constexpr,
    OBJECTIVE: tl.constexpr, READ_NORM: tl.constexpr, PER_SLOT: tl.constexpr, GATED: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr, DIGITS: tl.constexpr, HALVES: tl.constexpr,
    RESUMED: tl.constexpr,
):  # fmt: skip
    """``measure`` where pointers stand at the piece's first token, its slots and S; RESUMED where S is not Φ."""
    at = tl.arange(0, BT)
    j = tl.arange(0, BV)
    every = tl.arange(0, BK)
    value = tile(v, at, j, v_t, size, V).to(OPERAND)
    up = tile(dy, at, j, dy_t, size, V).to(OPERAND)
    keys = tile(k, at, every, k_t, size, K).to(OPERAND)
    states = slab(slots, every, j, K, V).to(OPERAND)
    hm = errors(keys, value, states, OBJECTIVE, PRECISION)
    ht = transposed(keys, value, states, OBJECTIVE, PRECISION)
    w, b = decays(g, at, g_t, size, BT, GATED)
    wt = decays_back(g, at, g_t, size, BT, GATED)
    toward_h = w * dot(up, ht, PRECISION)
    # Behind a reset y hardly depends on the size of E: what comes to E on two ways cancels, all but a few digits.
    exact: tl.constexpr = tl.float32 if GATED else OPERAND
    forth = toward_h.to(exact)
    w2 = w if HALVES else w * w
    wt2 = wt if HALVES else wt * wt
    if READ_NORM:
        gram = dot(hm, ht, PRECISION)
    moved = tl.zeros((BT, BT), tl.float32)  # how every W_tj and b_t is moved, times itself
    level = tl.zeros((BT,), tl.float32)
    for slot in range(0, BK, SLOTS):
        i = slot + tl.arange(0, SLOTS)
        key = tile(k, at, i, k_t, size, K).to(OPERAND)
        strength = strengths(beta, at, i, beta_t, size, K, PER_SLOT)
        phi = slab(slots, i, j, K, V).to(OPERAND)
        a = dot(hm, tl.trans(phi), PRECISION)
        z = key.to(tl.float32) - a if OBJECTIVE == ENCODING else key.to(tl.float32)
        e = strength * z
        live = tl.full((BT, SLOTS), 1.0, tl.float32)
        if GATED:
            et = writes(key, value, phi, strength, OBJECTIVE, PRECISION)
            toward = slab(first_slots, i, j, K, V).to(OPERAND)
            fresh = tl.zeros((BT, SLOTS), tl.float32)
            p_first, crossed_first, met_first = fresh, fresh, fresh
            if begun:
                void = emptied(key, value, strength, g, g_t, size, OBJECTIVE).to(tl.float32)
                fresh = afresh(void, w, PRECISION)
                live = 1 - void
                e *= live
                et *= tl.trans(live)
        rounded = e.to(exact)
        if HALVES:  # one E here too
            e = rounded.to(tl.float32)
        along = over(w, a * e, HALVES, DIGITS)
        part_phi = dot(up, tl.trans(phi), PRECISION)
        part_s = part_phi
        if RESUMED:
            s = slab(running, i, j, K, V).to(OPERAND)
            part_s = dot(up, tl.trans(s), PRECISION)
        to_weight = b[:, None] * part_s - along * part_phi + dot(forth, rounded, DIGITS)
        if GATED and begun:
            to_weight += fresh * dot(up, tl.trans(toward), PRECISION)
        weight = tile(q, at, i, q_t, size, K).to(tl.float32) * scale
        out = scale * to_weight
        d_along = -part_phi
        to_square = tl.zeros((BT, SLOTS), tl.float32)
        if READ_NORM:
            x = among(pairs(gram, w, at), rounded, HALVES, DIGITS)
            square = over(w2, e * x, HALVES, DIGITS)
            turned = -2 * along
            less = b[:, None] * b[:, None] + tl.zeros((BT, SLOTS), tl.float32)  # b² times what R multiplies it with
            if RESUMED:
                p = dot(hm, tl.trans(s), PRECISION)
                crossed = dot(w, e * p, DIGITS)
                wide = phi.to(tl.float32)
                unit = squares(wide)[None, :]
                left = b[:, None] * tl.sum(wide * s.to(tl.float32), 1)[None, :]
                least = left + along * (1 - unit)
                of_s = less * squares(s.to(tl.float32))[None, :]
                less = of_s + b[:, None] * crossed - along * left
                square += of_s + along * along * (unit - 2) + 2 * (b[:, None] * crossed - along * left)
                square = tl.maximum(square, least * least * inverse(unit, PRECISION))
                turned = 2 * (along * (unit - 2) - left)
            elif GATED:  # Φ in few digits is not quite of norm 1, which counts where all else cancels
                off = 1 - squares(phi.to(tl.float32))[None, :]
                square += less * (1 - off) + 2 * b[:, None] * along * off
                square = tl.maximum(square - along * along * (1 + off), 0.0)
                turned = 2 * (b[:, None] * off - along * (1 + off))
                less = less * (1 - off) + b[:, None] * along * off
            else:
                square = tl.maximum(square - along * along, 0.0) + less
            if GATED and begun:
                more, p_first, crossed_first, met = afresh_square(e, along, fresh, hm, w, phi, toward, PRECISION)
                met_first = met + tl.zeros((BT, SLOTS), tl.float32)
                square = tl.maximum(square + more, fresh * fresh * met_first * met_first)
                turned -= 2 * fresh * met_first
            shrunk = inverse(tl.sqrt(square), PRECISION)
            weight *= shrunk
            out *= shrunk
            if GATED:
                empty = (square <= 0) & (i < K)[None, :]
                if tl.max(empty.to(tl.int32)) > 0:
                    out += tl.where(empty, scale * dot(up, tl.trans(toward), PRECISION), 0.0)
            to_square = -0.5 * weight * to_weight * shrunk * shrunk
            spread_back = over(wt2, to_square, HALVES, DIGITS)
            f = 2 * spread_back * e
            put(f_to, f.to(f_to.dtype.element_ty), at, i, heads * K, size, K)
            d_along = to_square * turned - weight * part_phi
            de = spread_back * x
        else:
            d_along *= weight
            de = to_square
        put(dq, out.to(dq.dtype.element_ty), at, i, dq_t, size, K)
        put(weight_to, weight.to(weight_to.dtype.element_ty), at, i, heads * K, size, K)
        held = -along * weight if RESUMED else (b[:, None] - along) * weight
        put(held_to, held.to(held_to.dtype.element_ty), at, i, heads * K, size, K)
        m = over(wt, d_along, HALVES, DIGITS)
        de += m * a
        da = m * e
        d_crossed = 2 * b[:, None] * to_square
        if RESUMED and READ_NORM:
            m = dot(wt, d_crossed, DIGITS)
            de += m * p
            dp = m * e
            put(dp_to, dp.to(dp_to.dtype.element_ty), at, i, heads * K, size, K)
            tl.store(moments + i, tl.sum(to_square * (b * b)[:, None], 0), mask=i < K)
            tl.store(moments + K + i, tl.sum(-2 * to_square * b[:, None] * along, 0), mask=i < K)
            tl.store(moments + 2 * K + i, tl.sum(to_square * along * along, 0), mask=i < K)
        if GATED:
            if begun:
                d_fresh = weight * dot(up, tl.trans(toward), PRECISION)
                if READ_NORM:
                    ones = squares(toward.to(tl.float32))[None, :]
                    d_fresh += 2 * to_square * (crossed_first - along * met_first + fresh * ones)
                    d_crossed_first = 2 * fresh * to_square
                    m = dot(wt, d_crossed_first, DIGITS)
                    de += m * p_first
                    dp_first = m * e
                    if RESUMED:
                        dp_first += dp
                    put(dp_to, dp_first.to(dp_to.dtype.element_ty), at, i, heads * K, size, K)
                    tl.store(turned_to + i, tl.sum(-2 * to_square * fresh * along, 0), mask=i < K)
                    moved += w * dot(d_crossed_first, et * dot(toward, ht, PRECISION), PRECISION)
                moved += w * dot(d_fresh, tl.trans(1 - live), PRECISION)
                de *= live
                if not READ_NORM:  # the token that empties a slot reads its write, and none reads it later
                    own = tl.sum(hm.to(tl.float32) * up.to(tl.float32), 1)[:, None]
                    de += (1 - live) * (own * weight + d_along * a)
                    da += (1 - live) * d_along * strength * z
            moved += w * dot(d_along, et * dot(phi, ht, PRECISION), PRECISION)
            moved += toward_h * dot(weight.to(OPERAND), et.to(OPERAND), PRECISION)
            level += b * tl.sum(weight * part_s, 1)
            if READ_NORM:
                xt = dot(et, pairs_back(gram, wt, at), PRECISION)
                moved += 2 * w2 * dot(to_square, et * xt, PRECISION) + w * gram * dot(f, et, PRECISION)
                level += 2 * tl.sum(to_square * less, 1)
                if RESUMED:
                    moved += w * dot(d_crossed, et * dot(s, ht, PRECISION), PRECISION)
        put(da_to, da.to(da_to.dtype.element_ty), at, i, heads * K, size, K)
        put(de_to, de, at, i, heads * K, size, K)
    if GATED:
        tl.store(dg + at * heads, of_decays(moved, level, at, size, PRECISION), mask=at < size)
    # What follows from Q' and F is added once they lie in memory: fewer matrices are alive at a time.
    tl.debug_barrier()
    back = (wt * dot(hm, tl.trans(up), PRECISION)).to(exact)
    if READ_NORM:  # G again: of another precision, which two bfloat16 have none of, lest it be kept from above
        mt = 0.5 * pairs_back(dot(hm, ht, "ieee" if HALVES else PRECISION), wt, at)
    for slot in range(0, BK, SLOTS):
        i = slot + tl.arange(0, SLOTS)
        more = dot(back, tile(weight_to, at, i, heads * K, size, K), DIGITS)
        if READ_NORM:
            f = tile(f_to, at, i, heads * K, size, K)
            more += among(mt, f, HALVES, DIGITS)
        strength = strengths(beta, at, i, beta_t, size, K, PER_SLOT)
        if GATED and begun:
            key = tile(k, at, i, k_t, size, K).to(OPERAND)
            more = tl.where(emptied(key, value, strength, g, g_t, size, OBJECTIVE), 0.0, more)
        de = tile(de_to, at, i, heads * K, size, K) + more
        put(de_to, de, at, i, heads * K, size, K)
        if OBJECTIVE == ENCODING:
            da = tile(da_to, at, i, heads * K, size, K).to(tl.float32) - strength * de
            put(da_to, da.to(da_to.dtype.element_ty), at, i, heads * K, size, K)


@triton.jit(do_not_specialize=["beta_b", "g_b", "tokens"])
def measure(
    q, q_b, q_t, q_h, k, k_b, k_t, k_h, v, v_b, v_t, v_h, beta, beta_b, beta_t, beta_h, g, g_b, g_t, g_h,
    dy, dy_b, dy_t, dy_h, dq, dq_b, dq_t, dq_h,
    first_slots, pieces, slots, running, again, weight_to, held_to, da_to, f_to, dp_to, de_to, moments, turned_to, dg,
    tokens, heads, group, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, SLOTS: tl.constexpr,
    OBJECTIVE: tl.constexpr, READ_NORM: tl.constexpr, PER_SLOT: tl.constexpr, GATED: tl.constexpr,
    PACKED: tl.constexpr, CUT: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr, DIGITS: tl.constexpr,
    HALVES: tl.constexpr,
):  # fmt: skip
    """dq, and what the reads of one piece and head send to its norms and to E."""
    row = (tl.program_id(0) // heads).to(tl.int64)
    h = tl.program_id(0) % heads
    size = tl.load(pieces + row * 4 + 2).to(tl.int32)
    if size == 0:
        return
    n = tl.load(pieces + row * 4)
    first = tl.load(pieces + row * 4 + 1)
    batch = tl.zeros_like(n) if PACKED else n
    own = row * heads + h
    from_s = (row if CUT else n) * heads + h
    to = (batch * tokens + first) * heads + h
    q += batch * q_b + first * q_t + (h // group) * q_h
    k += batch * k_b + first * k_t + (h // group) * k_h
    v += batch * v_b + first * v_t + h * v_h
    beta += batch * beta_b + first * beta_t + h * beta_h
    dy += batch * dy_b + first * dy_t + h * dy_h
    dq += batch * dq_b + first * dq_t + h * dq_h
    begun = False
    if GATED:
        g += batch * g_b + first * g_t + h * g_h
        begun = tl.load(again + own) > 0
        turned_to += own * K
    if tl.load(pieces + row * 4 + 3) != 0:
        measure_piece(
            q, q_t, k, k_t, v, v_t, beta, beta_t, g, g_t, dy, dy_t, dq, dq_t,
            first_slots, slots + own * K * V, running + from_s * K * V, begun,
            weight_to + to * K, held_to + to * K, da_to + to * K, f_to + to * K, dp_to + to * K, de_to + to * K,
            moments + from_s * 3 * K, turned_to, dg + to, size, heads, scale,
            K, V, BK, BV, BT, SLOTS, OBJECTIVE, READ_NORM, PER_SLOT, GATED, PRECISION, OPERAND, DIGITS, HALVES, True,
        )  # fmt: skip
    else:
        measure_piece(
            q, q_t, k, k_t, v, v_t, beta, beta_t, g, g_t, dy, dy_t, dq, dq_t,
            first_slots, slots + own * K * V, running + from_s * K * V, begun,
            weight_to + to * K, held_to + to * K, da_to + to * K, f_to + to * K, dp_to + to * K, de_to + to * K,
            moments + from_s * 3 * K, turned_to, dg + to, size, heads, scale,
            K, V, BK, BV, BT, SLOTS, OBJECTIVE, READ_NORM, PER_SLOT, GATED, PRECISION, OPERAND, DIGITS, HALVES, False,
        )  # fmt: skip
