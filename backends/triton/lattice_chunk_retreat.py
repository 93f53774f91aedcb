"""The adjoint of the chain of chunked Lattice, from the last piece of a head to the first (the maths:
``lattice_chunk_backward``).

A program has one head. The gradients of Φ and S lie in memory and are taken some slots at a time: those of a wide head
do not fit into registers, and of any head loads need no other layout than what is computed from them, so that all of a
piece's are on their way at once. What is loaded for a product is waited for on the spot, and comes last.
"""

import triton
import triton.language as tl

from .blocks import dot, span
from .lattice_pieces import emptied, first_row, piece_row, piece_start, to_end
from .lattice_slots import DECODING, ENCODING, cut, inverse, put_slab, slab, strengths, tile


@triton.jit(do_not_specialize=["beta_b", "g_b", "phase_n", "tokens", "every"])
def retreat(
    k, k_b, k_t, k_h, v, v_b, v_t, v_h, beta, beta_b, beta_t, beta_h, g, g_b, g_t, g_h,
    start, start_n, start_h, start_k, now, now_n, now_h, now_k, phase, phase_n, offsets, first_slots, marks,
    slots, running, ends, again, dslots, drunning, dlast_start, dlast_now, dmarked_start, dmarked_now,
    at_start, at_now, dstart, dnow, tokens, every, heads, group,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, SLOTS: tl.constexpr,
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
    j = tl.arange(0, BV)
    k += batch * k_b + first * k_t + (h // group) * k_h
    v += batch * v_b + first * v_t + h * v_h
    beta += batch * beta_b + first * beta_t + h * beta_h
    if GATED:
        g += batch * g_b + first * g_t + h * g_h
    if MARKED:
        mark = tl.load(marks + n) if PACKED else n.to(tl.int64) * (tokens // every)
    own = (n.to(tl.int64) * heads + h) * K * V
    at_start += own
    at_now += own
    for slot in range(0, BK, SLOTS):
        i = slot + tl.arange(0, SLOTS)
        dphi = tl.zeros((SLOTS, BV), tl.float32)
        ds = tl.zeros((SLOTS, BV), tl.float32)
        if dlast_start is not None:
            dphi = slab(dlast_start + own, i, j, K, V).to(tl.float32)
        if dlast_now is not None:
            ds = slab(dlast_now + own, i, j, K, V).to(tl.float32)
        put_slab(at_start, dphi, i, j, K, V)
        put_slab(at_now, ds, i, j, K, V)
    tl.debug_barrier()
    t = length
    while t > 0:
        begin = piece_start(t, seen, every, CHUNK, LONGEST, MARKED)
        wide = begin.to(tl.int64)
        row = (base + piece_row(begin, seen, every, CHUNK, LONGEST, MARKED)) * heads + h
        behind = (base + piece_row(t, seen, every, CHUNK, LONGEST, MARKED)) * heads + h
        behind = tl.where(t == length, row + heads, behind)
        done = (seen + t) % CHUNK == 0
        resumed = (begin == 0) | ((seen + begin) % CHUNK != 0)
        from_s = row if CUT else n.to(tl.int64) * heads + h
        w, b = to_end(g + wide * g_t if GATED else g, at, g_t, t - begin, GATED)
        dh = tl.zeros((BT, BV), tl.float32)
        for slot in range(0, BK, SLOTS):
            i = slot + tl.arange(0, SLOTS)
            dphi = slab(at_start, i, j, K, V)
            ds = slab(at_now, i, j, K, V)
            phi = slab(slots + row * K * V, i, j, K, V)
            reads = slab(dslots + row * K * V, i, j, K, V).to(tl.float32)
            unit = slab(slots + behind * K * V, i, j, K, V)
            rho = tl.load(ends + row * 3 * K + i, mask=i < K, other=1)
            a = tl.load(ends + row * 3 * K + K + i, mask=i < K, other=0)
            most = tl.load(ends + row * 3 * K + 2 * K + i, mask=i < K, other=0)
            key = tile(k + wide * k_t, at, i, k_t, t - begin, K).to(OPERAND)
            strength = strengths(beta + wide * beta_t, at, i, beta_t, t - begin, K, PER_SLOT)
            if GATED and CUT:  # the token that follows saw first directions
                ds = tl.where((rho == 0)[:, None] & (t < length) & (not done), 0.0, ds)
            if MARKED and t % every == 0:
                to = ((mark + t // every - 1) * heads + h) * K * V
                if dmarked_start is not None:
                    dphi += slab(dmarked_start + to, i, j, K, V)
                if dmarked_now is not None:
                    ds += slab(dmarked_now + to, i, j, K, V)
            s = phi
            if resumed:
                s = slab(running + from_s * K * V, i, j, K, V)
            if done:
                ds += dphi
                ds = inverse(rho, PRECISION)[:, None] * (ds - tl.sum(ds * unit, 1)[:, None] * unit)
                dphi = tl.zeros((SLOTS, BV), tl.float32)
                ended = rho[:, None] * unit
            else:
                last = behind if CUT else (tl.num_programs(0) // heads + n.to(tl.int64)) * heads + h
                ended = tl.where((rho > 0)[:, None], slab(running + last * K * V, i, j, K, V), 0.0)
            put_slab(dslots + row * K * V, ds, i, j, K, V)
            live = tl.full((BT, SLOTS), 1.0, tl.float32)
            if GATED:
                if tl.load(again + row) > 0:
                    value = tile(v + wide * v_t, at, j, v_t, t - begin, V)
                    void = emptied(key, value, strength, g + wide * g_t, g_t, t - begin, OBJECTIVE)
                    ended -= tl.sum(tl.where(void, w[:, None], 0.0), 0)[:, None] * slab(first_slots, i, j, K, V)
                    live = tl.where(void, 0.0, 1.0)
            strength *= live
            delta = tl.sum(ds * phi, 1)[:, None]
            du = ds - delta * phi
            u = ended - b * s + a[:, None] * phi
            # No rounding where nothing is written.
            dphi += reads - a[:, None] * ds - tl.where((most > 0)[:, None], delta * u, 0.0)
            if OBJECTIVE == DECODING:
                dh += dot((strength * w[:, None] * key.to(tl.float32)).to(OPERAND), du.to(OPERAND), PRECISION)
            elif OBJECTIVE == ENCODING:
                value = tile(v + wide * v_t, at, j, v_t, t - begin, V).to(OPERAND)
                dat = tl.trans(strength) * w[None, :] * dot(du.to(OPERAND), tl.trans(value), PRECISION)
                dphi -= dot(dat.to(OPERAND), value, PRECISION)
            ds *= b
            if resumed:
                ds += slab(drunning + from_s * K * V, i, j, K, V)
            put_slab(at_start, dphi, i, j, K, V)
            put_slab(at_now, ds, i, j, K, V)
        tl.debug_barrier()
        if OBJECTIVE == DECODING:
            for slot in range(0, BK, SLOTS):
                i = slot + tl.arange(0, SLOTS)
                key = tile(k + wide * k_t, at, i, k_t, t - begin, K).to(OPERAND)
                dphi = slab(at_start, i, j, K, V) - dot(tl.trans(key), dh.to(OPERAND), PRECISION)
                put_slab(at_start, dphi, i, j, K, V)
            tl.debug_barrier()
        t = begin
    for slot in range(0, BK, SLOTS):
        i = slot + tl.arange(0, SLOTS)
        dphi = slab(at_start, i, j, K, V)
        ds = slab(at_now, i, j, K, V)
        if length > 0:
            dphi = cut(dphi, tile(start + n.to(tl.int64) * start_n + h * start_h, i, j, start_k, K, V).to(tl.float32))
            ds = cut(ds, tile(now + n.to(tl.int64) * now_n + h * now_h, i, j, now_k, K, V).to(tl.float32))
        put_slab(dstart + own, dphi.to(dstart.dtype.element_ty), i, j, K, V)
        put_slab(dnow + own, ds.to(dnow.dtype.element_ty), i, j, K, V)
