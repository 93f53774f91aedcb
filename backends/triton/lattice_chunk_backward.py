"""The adjoint of chunked Lattice; notation of ``lattice_chunk``, a prefix d for a gradient, dY times ``scale`` in Q'.

What the reads of a piece send back depends on Φ and S alone, so all pieces are taken at once, in two launches: a
product of tiles may not be transposed on the chip, so what is needed both ways goes through scratch.

``measure``: from Q' to the norms and to E.

    dQ' = b∘(dY Sᵀ) − α∘(dY Φᵀ) + (W∘(dY Hmᵀ))E      dq = scale dQ'/ρ      R = dL/dρ² = −½ Q'∘dQ'/ρ²
    dα = −Q'∘(dY Φᵀ) − 2R∘α      N_ti = Σ_jl W_tj W_tl E_ji E_li G_jl, so with R̃ = W²ᵀR:
    dE = (Wᵀ∘(Hm dYᵀ))Q' + R̃∘(M E) + ½MᵀF + (Wᵀdα)∘A      F = 2R̃∘E      dA = (Wᵀdα)∘E

``absorb``: from there to Hm and Φ.

    dHm = (Wᵀ∘(E Q'ᵀ))dY + (strictlower(W)∘(F Eᵀ) + Wᵀ∘(E Fᵀ))Hm + dA Φ
    dΦ = ((b−α)∘Q')ᵀdY + dAᵀHm − Kᵀ dHm (decoding)

``retreat`` walks the pieces of a head from the last to the first, with D = dL/dS̃ at a piece's end:

    D = (G − φ'⟨φ',G⟩)/ρ  where a chunk ends in φ' with the gradient G      dU = D − Φ∘δ      δ_i = ⟨d_i, φ_i⟩
    dΦ −= α∘D + δ∘U + Kᵀ(w∘E)dU      dS = b D      U = S̃ − b S + α∘Φ

``collect`` takes all pieces at once again and adds what came through D.

    dHm += (w∘E)dU      dE += w∘(Hm dUᵀ)      dbeta = Z∘dE      dv = dHm      dk = beta∘dE − dHm Φᵀ (decoding)

With encoding, Z = K − A: dA −= beta∘dE. Where S is not Φ, ρ² has more terms and S a gradient of its own. A decay moves
every b_t and W_tj whose sum holds it, so dlog_decay_l sums over j < l ≤ t; each term has that decay as a factor, and
none is found by subtraction: where decays are strong, the rest would drown.

    weight (Q'), held ((b−α)∘Q', or −α∘Q'), dA, F, dP, dE [B,T,H,K]   dHm [B,T,H,V]   moments [·,H,3,K]
    dslots [R,H,K,V]: dΦ of the reads, later D   drunning: dS of the reads
"""

import torch
import triton
import triton.language as tl

from mixers.backend import Config
from mixers.problem import Arrays, Problem
from mixers.spec import Array

from .blocks import dot, span
from .kernel import dense, first_marks, gather, place, spread, wanted
from .lattice_chunk_forward import (
    Shape,
    Walk,
    afresh,
    afresh_square,
    among,
    decays,
    emptied,
    errors,
    first_row,
    gated,
    inputs,
    over,
    pairs,
    piece_end,
    piece_row,
    to_end,
    transposed,
    walk,
    writes,
)
from .lattice_slots import (
    DECODING,
    ENCODING,
    cut,
    directions,
    inverse,
    logs,
    put,
    put_slab,
    slab,
    squares,
    strengths,
    tile,
)


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
            if begun:
                live = 1 - emptied(key, value, strength, g, g_t, size, OBJECTIVE).to(tl.float32)
                toward, fresh = afresh(
                    key, value, strength, w, g, g_t, size, i, first_slots, OPERAND, K, V, BV, OBJECTIVE, PRECISION
                )
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
                more, p_first, crossed_first, met_first = afresh_square(e, along, fresh, hm, w, phi, toward, PRECISION)
                square = tl.maximum(square + more, fresh * fresh * met_first * met_first)
                turned -= 2 * fresh * met_first
            shrunk = inverse(tl.sqrt(square), PRECISION)
            weight *= shrunk
            out *= shrunk
            if GATED:
                empty = (square <= 0) & (i < K)[None, :]
                if tl.max(empty.to(tl.int32)) > 0:
                    origin = slab(first_slots, i, j, K, V).to(OPERAND)
                    out += tl.where(empty, scale * dot(up, tl.trans(origin), PRECISION), 0.0)
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
    for slot in range(0, BK, SLOTS):
        i = slot + tl.arange(0, SLOTS)
        more = dot(back, tile(weight_to, at, i, heads * K, size, K), DIGITS)
        if READ_NORM:
            f = tile(f_to, at, i, heads * K, size, K)
            more += among(0.5 * pairs_back(gram, wt, at), f, HALVES, DIGITS)
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


@triton.jit(do_not_specialize=["beta_b", "g_b", "tokens"])
def absorb(
    k, k_b, k_t, k_h, v, v_b, v_t, v_h, beta, beta_b, beta_t, beta_h, g, g_b, g_t, g_h, dy, dy_b, dy_t, dy_h,
    first_slots, pieces, slots, running, again, weight_from, held_from, da_from, f_from, dp_from, moments, turned_from,
    dh_to, dslots, drunning, tokens, heads, group,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    OBJECTIVE: tl.constexpr, READ_NORM: tl.constexpr, PER_SLOT: tl.constexpr, GATED: tl.constexpr,
    PACKED: tl.constexpr, CUT: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """What the reads of one piece and head send to Hm, Φ and S."""
    row = (tl.program_id(0) // heads).to(tl.int64)
    h = tl.program_id(0) % heads
    size = tl.load(pieces + row * 4 + 2).to(tl.int32)
    if size == 0:
        return
    n = tl.load(pieces + row * 4)
    first = tl.load(pieces + row * 4 + 1)
    resumed = tl.load(pieces + row * 4 + 3) != 0
    batch = tl.zeros_like(n) if PACKED else n
    at = tl.arange(0, BT)
    i = tl.arange(0, BK)
    j = tl.arange(0, BV)
    key = tile(k + batch * k_b + first * k_t + (h // group) * k_h, at, i, k_t, size, K).to(OPERAND)
    value = tile(v + batch * v_b + first * v_t + h * v_h, at, j, v_t, size, V).to(OPERAND)
    strength = strengths(beta + batch * beta_b + first * beta_t + h * beta_h, at, i, beta_t, size, K, PER_SLOT)
    up = tile(dy + batch * dy_b + first * dy_t + h * dy_h, at, j, dy_t, size, V).to(OPERAND)
    phi = slab(slots + (row * heads + h) * K * V, i, j, K, V).to(OPERAND)
    if GATED:
        g += batch * g_b + first * g_t + h * g_h
    w, b = decays(g, at, g_t, size, BT, GATED)
    wt = decays_back(g, at, g_t, size, BT, GATED)
    hm = errors(key, value, phi, OBJECTIVE, PRECISION)
    et = writes(key, value, phi, strength, OBJECTIVE, PRECISION)
    if OBJECTIVE == ENCODING:
        e = (strength * (key.to(tl.float32) - dot(hm, tl.trans(phi), PRECISION))).to(OPERAND)
    else:
        e = (strength * key.to(tl.float32)).to(OPERAND)
    if GATED:
        begun = tl.load(again + row * heads + h) > 0
        full = e
        if begun:
            live = 1 - emptied(key, value, strength, g, g_t, size, OBJECTIVE).to(tl.float32)
            e = (e.to(tl.float32) * live).to(OPERAND)
            et *= tl.trans(live)
    to = ((batch * tokens + first) * heads + h) * K
    weight = tile(weight_from + to, at, i, heads * K, size, K).to(OPERAND)
    da = tile(da_from + to, at, i, heads * K, size, K)
    dh = dot((wt * dot(e, tl.trans(weight), PRECISION)).to(OPERAND), up, PRECISION)
    dh += dot(da, phi, PRECISION)
    if READ_NORM:
        f = tile(f_from + to, at, i, heads * K, size, K).to(OPERAND)
        mixed = tl.where(at[:, None] > at[None, :], w, 0.0) * dot(f, et.to(OPERAND), PRECISION)
        mixed += wt * dot(e, tl.trans(f), PRECISION)
        dh += dot(mixed.to(OPERAND), hm, PRECISION)
    held = tile(held_from + to, at, i, heads * K, size, K)
    dphi = dot(tl.trans(held), up, PRECISION) + dot(tl.trans(da), hm, PRECISION)
    if resumed:
        from_s = ((row if CUT else n) * heads + h) * K * V
        ds = dot((tl.trans(weight).to(tl.float32) * b[None, :]).to(OPERAND), up, PRECISION)
        if READ_NORM:
            s = slab(running + from_s, i, j, K, V)
            dp = tile(dp_from + to, at, i, heads * K, size, K)
            if GATED:  # behind a reset dp belongs to first directions
                dp = tl.where((b > 0)[:, None], dp, tl.zeros_like(dp))
            dh += dot(dp, s.to(OPERAND), PRECISION)
            ds += dot(tl.trans(dp), hm, PRECISION)
            sums = moments + ((row if CUT else n) * heads + h) * 3 * K + i
            of_s = tl.load(sums, mask=i < K, other=0)[:, None]
            of_both = tl.load(sums + K, mask=i < K, other=0)[:, None]
            of_phi = tl.load(sums + 2 * K, mask=i < K, other=0)[:, None]
            ds += 2 * of_s * s.to(tl.float32) + of_both * phi.to(tl.float32)
            dphi += 2 * of_phi * phi.to(tl.float32) + of_both * s.to(tl.float32)
        put_slab(drunning + from_s, ds, i, j, K, V)
    if GATED:
        if begun:
            if READ_NORM:
                toward = slab(first_slots, i, j, K, V)
                dp = tile(dp_from + to, at, i, heads * K, size, K)
                dp = tl.where((b > 0)[:, None], tl.zeros_like(dp), dp)
                dh += dot(dp, toward.to(OPERAND), PRECISION)
                turned = tl.load(turned_from + (row * heads + h) * K + i, mask=i < K, other=0)
                dphi += turned[:, None] * toward
            else:
                void = emptied(key, value, strength, g, g_t, size, OBJECTIVE)
                own = tl.where(void, full.to(tl.float32) * weight.to(tl.float32), 0.0)
                dh += tl.sum(own, 1)[:, None] * up.to(tl.float32)
    if OBJECTIVE == DECODING:
        dphi -= dot(tl.trans(key), dh.to(OPERAND), PRECISION)
    put_slab(dslots + (row * heads + h) * K * V, dphi, i, j, K, V)
    put(dh_to + ((batch * tokens + first) * heads + h) * V, dh, at, j, heads * V, size, V)


@triton.jit
def piece_start(t, phase, every, CHUNK: tl.constexpr, LONGEST: tl.constexpr, MARKED: tl.constexpr):
    """The first token of the piece that ends before t."""
    begin = t - 1 - (phase + t - 1) % CHUNK % LONGEST
    if MARKED:
        begin = tl.maximum(begin, (t - 1) // every * every)
    return tl.maximum(begin, 0)


@triton.jit
def kept(slots, ends, row, i, j, K: tl.constexpr, V: tl.constexpr):
    """Φ of a piece, and ρ, α and the largest number of U at its end."""
    ends += row * 3 * K + i
    rho = tl.load(ends, mask=i < K, other=1)
    a = tl.load(ends + K, mask=i < K, other=0)
    return slab(slots + row * K * V, i, j, K, V), rho, a, tl.load(ends + 2 * K, mask=i < K, other=0)


@triton.jit(do_not_specialize=["beta_b", "g_b", "phase_n", "tokens", "every"])
def retreat(
    k, k_b, k_t, k_h, v, v_b, v_t, v_h, beta, beta_b, beta_t, beta_h, g, g_b, g_t, g_h,
    start, start_n, start_h, start_k, now, now_n, now_h, now_k, phase, phase_n, offsets, first_slots, marks,
    slots, running, ends, again, dslots, drunning, dlast_start, dlast_now, dmarked_start, dmarked_now,
    dstart, dnow, tokens, every, heads, group,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    CHUNK: tl.constexpr, LONGEST: tl.constexpr, OBJECTIVE: tl.constexpr, PER_SLOT: tl.constexpr,
    GATED: tl.constexpr, PACKED: tl.constexpr, MARKED: tl.constexpr, CUT: tl.constexpr, PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """The pieces of one sequence and head, from the last: D of each in place of its dΦ, then the first state's."""
    n = tl.program_id(0) // heads
    h = tl.program_id(0) % heads
    batch, first, total = span(n, tokens, offsets, PACKED)
    length = total.to(tl.int32)
    base = first_row(n, first, tokens, every, CHUNK, LONGEST, MARKED, PACKED)
    seen = tl.load(phase + n * phase_n)
    at = tl.arange(0, BT)
    i = tl.arange(0, BK)
    j = tl.arange(0, BV)
    k += batch * k_b + first * k_t + (h // group) * k_h
    v += batch * v_b + first * v_t + h * v_h
    beta += batch * beta_b + first * beta_t + h * beta_h
    if GATED:
        g += batch * g_b + first * g_t + h * g_h
    if MARKED:
        mark = tl.load(marks + n) if PACKED else n.to(tl.int64) * (tokens // every)
    own = (n.to(tl.int64) * heads + h) * K * V
    dphi = tl.zeros((BK, BV), tl.float32)
    ds = tl.zeros((BK, BV), tl.float32)
    if dlast_start is not None:
        dphi = slab(dlast_start + own, i, j, K, V).to(tl.float32)
    if dlast_now is not None:
        ds = slab(dlast_now + own, i, j, K, V).to(tl.float32)
    t = length
    begin = piece_start(t, seen, every, CHUNK, LONGEST, MARKED)
    row = (base + piece_row(begin, seen, every, CHUNK, LONGEST, MARKED)) * heads + h
    behind = row + heads
    if length > 0:
        unit = slab(slots + behind * K * V, i, j, K, V)
        phi, rho, a, most = kept(slots, ends, row, i, j, K, V)
        first_end = piece_end(length * 0, seen, every, length, CHUNK, LONGEST, MARKED)
        for part in tl.static_range(2):  # later pieces, whose S is Φ where no chunk is cut, then the first
            stop = first_end if part == 0 else length * 0
            while t > stop:
                earlier = piece_start(begin, seen, every, CHUNK, LONGEST, MARKED)
                before = (base + piece_row(earlier, seen, every, CHUNK, LONGEST, MARKED)) * heads + h
                phi_before, rho_before, a_before, most_before = kept(slots, ends, before, i, j, K, V)
                reads = slab(dslots + row * K * V, i, j, K, V)
                wide = begin.to(tl.int64)
                key = tile(k + wide * k_t, at, i, k_t, t - begin, K).to(OPERAND)
                strength = strengths(beta + wide * beta_t, at, i, beta_t, t - begin, K, PER_SLOT)
                done = (seen + t) % CHUNK == 0
                resumed = (begin == 0) | ((seen + begin) % CHUNK != 0)
                if GATED and CUT:  # the token that follows saw first directions
                    ds = tl.where((rho == 0)[:, None] & (t < length) & (not done), 0.0, ds)
                if MARKED and t % every == 0:
                    to = ((mark + t // every - 1) * heads + h) * K * V
                    if dmarked_start is not None:
                        dphi += slab(dmarked_start + to, i, j, K, V)
                    if dmarked_now is not None:
                        ds += slab(dmarked_now + to, i, j, K, V)
                w, b = to_end(g + wide * g_t if GATED else g, at, g_t, t - begin, GATED)
                if done:
                    ds += dphi
                    ds = inverse(rho, PRECISION)[:, None] * (ds - tl.sum(ds * unit, 1)[:, None] * unit)
                    dphi = tl.zeros((BK, BV), tl.float32)
                    ended = rho[:, None] * unit
                else:
                    last = behind if CUT else (tl.num_programs(0) // heads + n.to(tl.int64)) * heads + h
                    ended = tl.where((rho > 0)[:, None], slab(running + last * K * V, i, j, K, V), 0.0)
                put_slab(dslots + row * K * V, ds, i, j, K, V)
                from_s = row if CUT else n.to(tl.int64) * heads + h
                if CUT or part == 1:
                    s = phi
                    if resumed:
                        s = slab(running + from_s * K * V, i, j, K, V)
                    u = ended - b * s + a[:, None] * phi
                else:
                    u = ended - (b - a)[:, None] * phi
                live = tl.full((BT, BK), 1.0, tl.float32)
                if GATED:
                    if tl.load(again + row) > 0:
                        value = tile(v + wide * v_t, at, j, v_t, t - begin, V)
                        void = emptied(key, value, strength, g + wide * g_t, g_t, t - begin, OBJECTIVE)
                        of_first = tl.sum(tl.where(void, w[:, None], 0.0), 0)[:, None]
                        u -= of_first * slab(first_slots, i, j, K, V)
                        live = tl.where(void, 0.0, 1.0)
                strength *= live
                delta = tl.sum(ds * phi, 1)[:, None]
                du = ds - delta * phi
                # No rounding where nothing is written.
                dphi += reads - a[:, None] * ds - tl.where((most > 0)[:, None], delta * u, 0.0)
                if OBJECTIVE == DECODING:
                    e = (strength * w[:, None] * key.to(tl.float32)).to(OPERAND)
                    dh = dot(e, du.to(OPERAND), PRECISION)
                    dphi -= dot(tl.trans(key), dh.to(OPERAND), PRECISION)
                elif OBJECTIVE == ENCODING:
                    value = tile(v + wide * v_t, at, j, v_t, t - begin, V).to(OPERAND)
                    dat = tl.trans(strength) * w[None, :] * dot(du.to(OPERAND), tl.trans(value), PRECISION)
                    dphi -= dot(dat.to(OPERAND), value, PRECISION)
                ds *= b
                if CUT or part == 1:
                    if resumed:
                        ds += slab(drunning + from_s * K * V, i, j, K, V)
                unit, phi, rho, a, most = phi, phi_before, rho_before, a_before, most_before
                t, begin, behind, row = begin, earlier, row, before
    if length > 0:
        dphi = cut(dphi, tile(start + n.to(tl.int64) * start_n + h * start_h, i, j, start_k, K, V).to(tl.float32))
        ds = cut(ds, tile(now + n.to(tl.int64) * now_n + h * now_h, i, j, now_k, K, V).to(tl.float32))
    put_slab(dstart + own, dphi.to(dstart.dtype.element_ty), i, j, K, V)
    put_slab(dnow + own, ds.to(dnow.dtype.element_ty), i, j, K, V)


@triton.jit(do_not_specialize=["beta_b", "g_b", "dbeta_b", "tokens"])
def collect(
    k, k_b, k_t, k_h, v, v_b, v_t, v_h, beta, beta_b, beta_t, beta_h, g, g_b, g_t, g_h,
    dk, dk_b, dk_t, dk_h, dv, dv_b, dv_t, dv_h, dbeta, dbeta_b, dbeta_t, dbeta_h, dlog,
    first_slots, pieces, slots, running, again, dslots, de_from, dh_from, dg, tokens, heads, group,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    OBJECTIVE: tl.constexpr, PER_SLOT: tl.constexpr, GATED: tl.constexpr,
    PACKED: tl.constexpr, CUT: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr, DIGITS: tl.constexpr,
):  # fmt: skip
    """dk, dv, dbeta and dlog_decay of one piece and head."""
    row = (tl.program_id(0) // heads).to(tl.int64)
    h = tl.program_id(0) % heads
    size = tl.load(pieces + row * 4 + 2).to(tl.int32)
    if size == 0:
        return
    n = tl.load(pieces + row * 4)
    first = tl.load(pieces + row * 4 + 1)
    batch = tl.zeros_like(n) if PACKED else n
    at = tl.arange(0, BT)
    i = tl.arange(0, BK)
    j = tl.arange(0, BV)
    key = tile(k + batch * k_b + first * k_t + (h // group) * k_h, at, i, k_t, size, K).to(OPERAND)
    value = tile(v + batch * v_b + first * v_t + h * v_h, at, j, v_t, size, V).to(OPERAND)
    strength = strengths(beta + batch * beta_b + first * beta_t + h * beta_h, at, i, beta_t, size, K, PER_SLOT)
    wide = slab(slots + (row * heads + h) * K * V, i, j, K, V)
    phi = wide.to(OPERAND)
    if GATED:
        g += batch * g_b + first * g_t + h * g_h
    w, b = to_end(g, at, g_t, size, GATED)
    hm = value
    z = key.to(tl.float32)
    if OBJECTIVE == DECODING:
        hm = (value.to(tl.float32) - dot(key, phi, PRECISION)).to(OPERAND)
    elif OBJECTIVE == ENCODING:
        z -= dot(value, tl.trans(phi), PRECISION)
    d = slab(dslots + (row * heads + h) * K * V, i, j, K, V)
    exact: tl.constexpr = tl.float32 if GATED else OPERAND  # as in ``measure``
    du = d - tl.sum(d * wide, 1)[:, None] * wide
    through = w[:, None] * dot(hm.to(exact), tl.trans(du.to(exact)), DIGITS)
    e = strength * z
    if GATED:
        own = tl.zeros((BT,), tl.float32)
        if tl.load(again + row * heads + h) > 0:
            void = emptied(key, value, strength, g, g_t, size, OBJECTIVE)
            through = tl.where(void, 0.0, through)
            e = tl.where(void, 0.0, e)
            of_first = tl.sum(d * slab(first_slots, i, j, K, V), 1)
            own = w * tl.sum(tl.where(void, of_first[None, :], 0.0), 1)
    to = (batch * tokens + first) * heads + h
    de = through + tile(de_from + to * K, at, i, heads * K, size, K)
    dh = dot((w[:, None] * e).to(OPERAND), du.to(OPERAND), PRECISION)
    dh += tile(dh_from + to * V, at, j, heads * V, size, V)
    dkey = strength * de
    if OBJECTIVE == ENCODING:
        dh -= dot((strength * through).to(OPERAND), phi, PRECISION)
    elif OBJECTIVE == DECODING:
        dkey -= dot(dh.to(OPERAND), tl.trans(phi), PRECISION)
    put(dk + batch * dk_b + first * dk_t + h * dk_h, dkey.to(dk.dtype.element_ty), at, i, dk_t, size, K)
    put(dv + batch * dv_b + first * dv_t + h * dv_h, dh.to(dv.dtype.element_ty), at, j, dv_t, size, V)
    dbeta += batch * dbeta_b + first * dbeta_t + h * dbeta_h
    if PER_SLOT:
        put(dbeta, (z * de).to(dbeta.dtype.element_ty), at, i, dbeta_t, size, K)
    else:
        tl.store(dbeta + at * dbeta_t, tl.sum(z * de, 1).to(dbeta.dtype.element_ty), mask=at < size)
    if GATED:
        s = wide
        if tl.load(pieces + row * 4 + 3) != 0:
            s = slab(running + ((row if CUT else n) * heads + h) * K * V, i, j, K, V)
        each = own + tl.sum(e * through, 1)
        moved = tl.sum(tl.where(at[:, None] < at[None, :], each[:, None], 0.0), 0) + b * tl.sum(d * s)
        moved += tl.load(dg + (to + at * heads), mask=at < size, other=0)
        moved = tl.where(tl.exp(logs(g, at, g_t, size)) > 0, moved, 0.0)
        tl.store(dlog + (to + at * heads), moved.to(dlog.dtype.element_ty), mask=at < size)


def backward(problem: Problem, config: Config, x: Arrays, dout: Arrays, dx: Arrays) -> None:
    """Fill the gradients of ``x``."""
    shape, s = Shape.of(problem, back=True), problem.sizes
    if s.N * s.H == 0:
        return
    kind = torch.bfloat16 if problem.dtype == "bfloat16" else torch.float32
    common = shape.common | {"OPERAND": tl.bfloat16 if problem.dtype == "bfloat16" else tl.float32}
    found = walk(problem, shape, config, x, {}, keep=True)
    device = found.slots.device
    reads = {**common, "READ_NORM": problem.option["read_norm"], "num_warps": config["piece_warps"], "num_stages": 1}
    grid = (shape.rows * s.H,)
    dy = dout.get("y")
    dy = torch.zeros((s.B, s.T, s.H, s.V), dtype=x["v"].dtype, device=device) if dy is None else dense(dy)
    dq, dk = spread(problem, dx, "q"), spread(problem, dx, "k")

    def tokens(width: int, dtype: torch.dtype = kind) -> Array:
        return torch.empty((s.B, s.T, s.H, width), dtype=dtype, device=device)

    exact = kind if shape.slots["HALVES"] else torch.float32
    weight, f = tokens(s.K, exact), tokens(s.K, exact)
    held, da, dp = (tokens(s.K) for _ in range(3))
    de, dh, dg = tokens(s.K, torch.float32), tokens(s.V, torch.float32), tokens(1, torch.float32)
    moments = torch.empty((found.running.shape[0], s.H, 3, s.K), dtype=torch.float32, device=device)
    dslots, drunning = torch.empty_like(found.slots), torch.empty_like(found.running)
    states = (found.pieces, found.slots, found.running, found.again)
    turned = torch.empty((shape.rows, s.H, s.K), dtype=torch.float32, device=device) if gated(problem) else None
    rough = common["GATED"] and kind is torch.bfloat16
    digits = {"DIGITS": "tf32x3" if rough else common["PRECISION"]}
    measure[grid](
        *inputs(x),
        *place(dy, 0, 1, 2),
        *place(dq, 0, 1, 2),
        directions(problem, device),
        *(*states, weight, held, da, f, dp, de, moments, turned, dg),
        *(s.T, s.H, s.H // s.G, problem.option["scale"]),
        **(reads | digits | shape.slots | {"num_warps": config["turn_warps"]}),
    )
    absorb[grid](
        *inputs(x)[4:],
        *place(dy, 0, 1, 2),
        directions(problem, device),
        *(*states, weight, held, da, f, dp, moments, turned, dh, dslots, drunning),
        *(s.T, s.H, s.H // s.G),
        **reads,
    )
    _retreat(problem, config, shape, common, x, found, dout, dx, dslots, drunning)
    dbeta = dx["beta"]
    collect[grid](
        *inputs(x)[4:],
        *place(dk, 0, 1, 2),
        *place(dx["v"], 0, 1, 2),
        *place(dbeta, 0, 1, 2),
        dx.get("log_decay"),
        directions(problem, device),
        *(*states, dslots, de, dh, dg),
        *(s.T, s.H, s.H // s.G),
        **(common | digits),
        num_warps=config["piece_warps"],
        num_stages=1,
    )
    gather(problem, dx, "q", dq)
    gather(problem, dx, "k", dk)


def _retreat(
    problem: Problem,
    config: Config,
    shape: Shape,
    common: dict[str, object],
    x: Arrays,
    found: Walk,
    dout: Arrays,
    dx: Arrays,
    dslots: Array,
    drunning: Array,
) -> None:
    """Launch ``retreat``."""
    s, offsets = problem.sizes, x.get("offsets")

    def given(name: str) -> Array:
        return None if dout.get(name) is None else dout[name].contiguous()

    retreat[(s.N * s.H,)](
        *inputs(x)[4:],
        *place(dense(x["initial.start"]), 0, 1, 2),
        *place(dense(x["initial.now"]), 0, 1, 2),
        *place(x["initial.phase"], 0),
        *(offsets, directions(problem, found.slots.device), first_marks(problem, offsets)),
        *(found.slots, found.running, found.ends, found.again, dslots, drunning),
        *(given(name) for name in ("final.start", "final.now", "checkpoint.start", "checkpoint.now")),
        *(wanted(dx, x, "initial.start"), wanted(dx, x, "initial.now")),
        *(s.T, problem.flags.checkpoint_every, s.H, s.H // s.G),
        **common,
        **shape.chunk,
        num_warps=2 * config["chain_warps"],
        num_stages=1,
    )
