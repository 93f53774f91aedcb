"""The reads of chunked Lattice, all pieces at once (the maths: ``lattice_chunk_forward``).

What slots do not share, α, N, ρ and Q', is worked some slots at a time, so that a program's matrices fit into its
registers; Hm, M and W serve all of them. The piece whose S is not Φ, one a sequence if no chunk is cut, has a branch of
its own.
"""

import triton
import triton.language as tl

from .blocks import dot
from .lattice_pieces import afresh, afresh_square, among, decays, emptied, errors, over, pairs, transposed, writes
from .lattice_slots import ENCODING, inverse, put, slab, squares, strengths, tile


@triton.jit
def read_piece(
    q, q_t, k, k_t, v, v_t, beta, beta_t, g, g_t, first_slots, slots, running, begun, y, size, heads, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, SLOTS: tl.constexpr,
    OBJECTIVE: tl.constexpr, READ_NORM: tl.constexpr, PER_SLOT: tl.constexpr, GATED: tl.constexpr,
    PRECISION: tl.constexpr, HALVES: tl.constexpr, RESUMED: tl.constexpr,
):  # fmt: skip
    """``read`` where pointers stand at the piece's first token, its slots and S; RESUMED where S is not Φ."""
    at = tl.arange(0, BT)
    j = tl.arange(0, BV)
    every = tl.arange(0, BK)
    operand = k.dtype.element_ty
    value = tile(v, at, j, v_t, size, V)
    keys = tile(k, at, every, k_t, size, K)
    states = slab(slots, every, j, K, V).to(operand)
    hm = errors(keys, value, states, OBJECTIVE, PRECISION)
    w, b = decays(g, at, g_t, size, BT, GATED)
    if READ_NORM:
        w2 = w if HALVES else w * w
        m = pairs(dot(hm, transposed(keys, value, states, OBJECTIVE, PRECISION), PRECISION), w, at)
    weights = tl.zeros((BT, BT), tl.float32)
    out = tl.zeros((BT, BV), tl.float32)
    for slot in range(0, BK, SLOTS):
        i = slot + tl.arange(0, SLOTS)
        key = tile(k, at, i, k_t, size, K)
        strength = strengths(beta, at, i, beta_t, size, K, PER_SLOT)
        phi = slab(slots, i, j, K, V).to(operand)
        weight = tile(q, at, i, q_t, size, K).to(tl.float32) * scale
        et = writes(key, value, phi, strength, OBJECTIVE, PRECISION).to(operand)
        a = dot(hm, tl.trans(phi), PRECISION)
        e = strength * key.to(tl.float32)
        if OBJECTIVE == ENCODING:
            # ρ must see the very E that is read: of a Z that nearly cancels, two roundings have little in common.
            e = tl.trans(et) if PRECISION == "ieee" else strength * (key.to(tl.float32) - a)
        rounded = e
        if HALVES:  # here too
            rounded = e.to(operand)
            e = rounded.to(tl.float32)
        along = over(w, a * e, HALVES, PRECISION)
        if GATED:
            toward = slab(first_slots, i, j, K, V).to(operand)
            fresh = tl.zeros((BT, SLOTS), tl.float32)
            if begun:
                void = emptied(key, value, strength, g, g_t, size, OBJECTIVE).to(tl.float32)
                fresh = afresh(void, w, PRECISION)
        if RESUMED:
            s = slab(running, i, j, K, V).to(operand)
        if READ_NORM:
            square = over(w2, e * among(m, rounded, HALVES, PRECISION), HALVES, PRECISION)
            if RESUMED:
                p = dot(hm, tl.trans(s), PRECISION)
                wide = phi.to(tl.float32)
                unit = squares(wide)[None, :]
                left = b[:, None] * tl.sum(wide * s.to(tl.float32), 1)[None, :]
                least = left + along * (1 - unit)
                crossed = dot(w, e * p, PRECISION)
                square += (b * b)[:, None] * squares(s.to(tl.float32))[None, :] + along * along * (unit - 2)
                square += 2 * (b[:, None] * crossed - along * left)
                square = tl.maximum(square, least * least * inverse(unit, PRECISION))
            else:
                square = tl.maximum(square - along * along, 0.0) + (b * b)[:, None]
            if GATED and begun:
                more, _, _, met = afresh_square(e, along, fresh, hm, w, phi, toward, PRECISION)
                square = tl.maximum(square + more, fresh * fresh * met * met)
            empty = (square <= 0) & (i < K)[None, :]
            unread = tl.where(empty, weight, 0.0)
            weight *= inverse(tl.sqrt(square), PRECISION)
        weights += dot(weight.to(operand), et, PRECISION)
        if RESUMED:
            out += dot((b[:, None] * weight).to(operand), s, PRECISION)
            out -= dot((along * weight).to(operand), phi, PRECISION)
        else:
            out += dot(((b[:, None] - along) * weight).to(operand), phi, PRECISION)
        if GATED and begun:
            out += dot((fresh * weight).to(operand), toward, PRECISION)
        if GATED and READ_NORM and tl.max(empty.to(tl.int32)) > 0:
            out += dot(unread.to(operand), toward, PRECISION)
    out += dot((w * weights).to(operand), hm, PRECISION)
    put(y, out.to(y.dtype.element_ty), at, j, heads * V, size, V)


@triton.jit(do_not_specialize=["beta_b", "g_b", "tokens"])
def read(
    q, q_b, q_t, q_h, k, k_b, k_t, k_h, v, v_b, v_t, v_h, beta, beta_b, beta_t, beta_h, g, g_b, g_t, g_h,
    first_slots, pieces, slots, running, again, y, tokens, heads, group, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, SLOTS: tl.constexpr,
    OBJECTIVE: tl.constexpr, READ_NORM: tl.constexpr, PER_SLOT: tl.constexpr, GATED: tl.constexpr,
    PACKED: tl.constexpr, CUT: tl.constexpr, PRECISION: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """The reads of one piece and head; what slots do not share is worked SLOTS at a time."""
    row = (tl.program_id(0) // heads).to(tl.int64)
    h = tl.program_id(0) % heads
    size = tl.load(pieces + row * 4 + 2).to(tl.int32)
    if size == 0:
        return
    n = tl.load(pieces + row * 4)
    first = tl.load(pieces + row * 4 + 1)
    batch = tl.zeros_like(n) if PACKED else n
    q += batch * q_b + first * q_t + (h // group) * q_h
    k += batch * k_b + first * k_t + (h // group) * k_h
    v += batch * v_b + first * v_t + h * v_h
    beta += batch * beta_b + first * beta_t + h * beta_h
    y += ((batch * tokens + first) * heads + h) * V
    slots += (row * heads + h) * K * V
    running += ((row if CUT else n) * heads + h) * K * V
    begun = False
    if GATED:
        g += batch * g_b + first * g_t + h * g_h
        begun = tl.load(again + row * heads + h) > 0
    if tl.load(pieces + row * 4 + 3) != 0:
        read_piece(
            q, q_t, k, k_t, v, v_t, beta, beta_t, g, g_t, first_slots, slots, running, begun, y, size, heads, scale,
            K, V, BK, BV, BT, SLOTS, OBJECTIVE, READ_NORM, PER_SLOT, GATED, PRECISION, HALVES, True,
        )  # fmt: skip
    else:
        read_piece(
            q, q_t, k, k_t, v, v_t, beta, beta_t, g, g_t, first_slots, slots, running, begun, y, size, heads, scale,
            K, V, BK, BV, BT, SLOTS, OBJECTIVE, READ_NORM, PER_SLOT, GATED, PRECISION, HALVES, False,
        )  # fmt: skip
