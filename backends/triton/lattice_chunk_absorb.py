"""From the reads of chunked Lattice to Hm, Φ and S, all pieces at once (the maths: ``lattice_chunk_backward``)."""

import triton
import triton.language as tl

from .blocks import dot
from .lattice_chunk_measure import decays_back
from .lattice_pieces import decays, emptied, errors, writes
from .lattice_slots import DECODING, ENCODING, put, put_slab, slab, strengths, tile


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
