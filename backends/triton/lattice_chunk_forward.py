"""Lattice in chunks (``chunk_size=C > 1``): gradients at the chunk's first slots Φ, the running slots S̃ beside them.

A chunk is worked in pieces of at most 64 tokens (see ``longest``); rows of a piece's matrices are its tokens. From the
piece's first running slots S (Φ itself at a chunk's start), with b, W counted from its first token:

    W_tj = [j≤t] e^{g_{j+1} + … + g_t}     b_t = e^{g_1 + … + g_t}
    Hm = V − KΦ (decoding) or V            A = Hm Φᵀ            E = beta ∘ (K − A) (encoding) or beta ∘ K
    S̃_t,i = b_t s_i − α_ti φ_i + Σ_j W_tj E_ji h_j              α = W(A∘E)
    ρ² = b² + N − α²   where S = Φ         N = W²(E∘(M E))    M = 2 strictlower(W)∘G + diag(G)    G = Hm Hmᵀ
    ρ² = b²‖s‖² + 2b(W(E∘P) − α⟨φ,s⟩) + N + α²(‖φ‖² − 2)     P = Hm Sᵀ     elsewhere
    Y = scale · ((b∘Q')S − (α∘Q')Φ + (W∘(Q'Eᵀ))Hm)           Q' = Q/ρ, or Q without ``read_norm``

``ρ²`` stays above the square of what is left of φ in S̃: N and α² cancel where a value points along a slot. Every
exponent is a sum of log decays of its own, so a reset (−∞) makes no NaN. A slot that a reset empties, as its write is
zero, goes on as its first direction τ: ``f_ti τ_i`` joins S̃, with f_ti = W_tr of the token r that emptied it.

Two launches. ``chain`` walks the pieces of a head and leaves Φ (and S where it is not Φ) of each in scratch. It needs
neither A nor the norms of the inside: with ``U = (w∘E)ᵀHm``, w the last row of W, ``α_i = ⟨φ_i, u_i⟩``, and a chunk
ends with ``Φ ← rownorm(b S − α∘Φ + U)``, measured. ``read`` takes all pieces at once. A checkpoint ends a piece.

    q, k [B,T,G,K]   v, y [B,T,H,V]   beta [B,T,H] or [B,T,H,K]   log_decay [B,T,H]   start, now [N,H,K,V]   phase [N]
    pieces [R,4]: sequence, first token, tokens (0: no piece), whether S is not Φ     slots, running [R,H,K,V]
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from mixers.backend import Config
from mixers.problem import Arrays, Problem
from mixers.spec import Array

from .blocks import dot, span, upper_bits
from .kernel import block, dense, first_marks, place, precision
from .lattice_slots import (
    DECODING,
    ENCODING,
    OBJECTIVES,
    adopt,
    directions,
    inverse,
    logs,
    norms,
    put,
    put_slab,
    slab,
    squares,
    strengths,
    tile,
)


@triton.jit
def piece_row(t, phase, every, CHUNK: tl.constexpr, LONGEST: tl.constexpr, MARKED: tl.constexpr):
    """The piece of a sequence that token t lies in, counted along it with gaps."""
    position = phase + t
    row = position // CHUNK * ((CHUNK + LONGEST - 1) // LONGEST) + position % CHUNK // LONGEST
    return row + t // every if MARKED else row


@triton.jit
def first_row(
    n, first, tokens, every, CHUNK: tl.constexpr, LONGEST: tl.constexpr, MARKED: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """The row of scratch where the pieces of sequence n begin; one row is left behind the last piece."""
    each: tl.constexpr = (CHUNK + LONGEST - 1) // LONGEST
    if PACKED:
        row = (first // CHUNK + 2 * n) * each + n
        return row + first // every + n if MARKED else row
    count = (tokens // CHUNK + 2) * each + 1
    return n.to(tl.int64) * (count + tokens // every + 1 if MARKED else count)


@triton.jit
def piece_end(t, phase, every, length, CHUNK: tl.constexpr, LONGEST: tl.constexpr, MARKED: tl.constexpr):
    """The token after the piece that begins with t."""
    seen = (phase + t) % CHUNK
    end = t + tl.minimum(CHUNK - seen, LONGEST - seen % LONGEST)
    if MARKED:
        end = tl.minimum(end, (t // every + 1) * every)
    return tl.minimum(end, length)


@triton.jit
def errors(key, value, phi, OBJECTIVE: tl.constexpr, PRECISION: tl.constexpr):
    """Hm of a piece."""
    if OBJECTIVE == DECODING:
        return (value.to(tl.float32) - dot(key, phi, PRECISION)).to(key.dtype)
    return value


@triton.jit
def writes(key, value, phi, beta, OBJECTIVE: tl.constexpr, PRECISION: tl.constexpr):
    """Eᵀ of a piece, or of some of its slots; never by transposing a product."""
    et = tl.trans(key).to(tl.float32)
    if OBJECTIVE == ENCODING:
        et -= dot(phi, tl.trans(value), PRECISION)
    return et * tl.trans(beta)


@triton.jit
def transposed(key, value, phi, OBJECTIVE: tl.constexpr, PRECISION: tl.constexpr):
    """Hmᵀ of a piece."""
    ht = tl.trans(value)
    if OBJECTIVE == DECODING:
        ht = (ht.to(tl.float32) - dot(tl.trans(phi), tl.trans(key), PRECISION)).to(key.dtype)
    return ht


@triton.jit
def to_end(g, rows, stride, size, GATED: tl.constexpr):
    """w of a piece, the last row of W, and the last number of b."""
    if GATED:
        rest = tl.exp(tl.cumsum(logs(g, rows + 1, stride, size), reverse=True))
        return rest, tl.exp(tl.sum(logs(g, rows, stride, size)))
    return tl.full(rows.shape, 1.0, tl.float32), tl.full((), 1.0, tl.float32)


@triton.jit
def emptied(key, value, beta, g, stride, size, OBJECTIVE: tl.constexpr):
    """Where a reset meets a write of zero before the piece's last token: the slot goes on as its first direction."""
    at = tl.arange(0, key.shape[0])
    gone = (tl.exp(logs(g, at, stride, size)) == 0) & (at < size - 1)
    void = gone[:, None] & (beta == 0) & (key == key)
    if OBJECTIVE != ENCODING:
        void |= gone[:, None] & (key == 0)
    if OBJECTIVE != DECODING:
        void |= (gone & (tl.max(tl.abs(value), 1) == 0))[:, None]
    return void


@triton.jit
def fetch(
    t, end, k, k_t, v, v_t, beta, beta_t,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, PER_SLOT: tl.constexpr,
):  # fmt: skip
    """Keys, values and strengths of the tokens from t to end."""
    at = tl.arange(0, BT)
    i = tl.arange(0, BK)
    j = tl.arange(0, BV)
    wide = t.to(tl.int64)
    key = tile(k + wide * k_t, at, i, k_t, end - t, K)
    value = tile(v + wide * v_t, at, j, v_t, end - t, V)
    return key, value, strengths(beta + wide * beta_t, at, i, beta_t, end - t, K, PER_SLOT)


@triton.jit
def turn(
    key, value, strength, phi, s, g, g_t, size, first_slots, ends, again,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    OBJECTIVE: tl.constexpr, GATED: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S̃ behind the last token of a piece, its unit rows, and S̃ with first directions for rows of zeros."""
    at = tl.arange(0, BT)
    i = tl.arange(0, BK)
    j = tl.arange(0, BV)
    hm = errors(key, value, phi.to(key.dtype), OBJECTIVE, PRECISION)
    et = writes(key, value, phi.to(key.dtype), strength, OBJECTIVE, PRECISION)
    if GATED:
        w, b = to_end(g, at, g_t, size, GATED)
        et *= w[None, :]
        s *= b
        void = emptied(key, value, strength, g, g_t, size, OBJECTIVE) & (i < K)[None, :]
        begun = tl.max(void.to(tl.int32))
        tl.store(again, begun)
        if begun > 0:
            s += tl.sum(tl.where(void, w[:, None], 0.0), 0)[:, None] * slab(first_slots, i, j, K, V)
    u = dot(et.to(key.dtype), hm, PRECISION)
    a = tl.sum(phi * u, 1)
    s += u - a[:, None] * phi
    rho = norms(s, GATED, PRECISION)
    if KEEP:
        tl.store(ends + i, rho, mask=i < K)
        tl.store(ends + K + i, a, mask=i < K)
        tl.store(ends + 2 * K + i, tl.max(tl.abs(u), 1), mask=i < K)
    unit = s * inverse(rho, PRECISION)[:, None]
    adopted = s
    if GATED and tl.min(tl.where(i < K, rho, 1.0)) == 0:  # only a reset leaves nothing of a row
        toward = slab(first_slots, i, j, K, V)
        unit = tl.where((rho > 0)[:, None], unit, toward)
        adopted = tl.where((rho > 0)[:, None], s, toward)
    return s, unit, adopted


@triton.jit
def note(
    t, end, n, h, row, first, resumed, phi, s, pieces, slots, running, heads,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Where a piece lies, its Φ, and its S if it is not Φ."""
    if h == 0:
        tl.store(pieces + row * 4, n.to(tl.int64))
        tl.store(pieces + row * 4 + 1, first + t)
        tl.store(pieces + row * 4 + 2, (end - t).to(tl.int64))
        tl.store(pieces + row * 4 + 3, resumed.to(tl.int64))
    i = tl.arange(0, BK)
    j = tl.arange(0, BV)
    put_slab(slots + (row * heads + h) * K * V, phi, i, j, K, V)
    if resumed:
        put_slab(running + ((row if CUT else n.to(tl.int64)) * heads + h) * K * V, s, i, j, K, V)


@triton.jit(do_not_specialize=["beta_b", "g_b", "phase_n", "tokens", "every"])
def chain(
    k, k_b, k_t, k_h, v, v_b, v_t, v_h, beta, beta_b, beta_t, beta_h, g, g_b, g_t, g_h,
    start, start_n, start_h, start_k, now, now_n, now_h, now_k, phase, phase_n, offsets, first_slots, marks,
    pieces, slots, running, ends, again, last_start, last_now, last_phase, marked_start, marked_now, marked_phase,
    tokens, every, heads, group,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    CHUNK: tl.constexpr, LONGEST: tl.constexpr, OBJECTIVE: tl.constexpr, PER_SLOT: tl.constexpr,
    GATED: tl.constexpr, PACKED: tl.constexpr, MARKED: tl.constexpr, CUT: tl.constexpr, KEEP: tl.constexpr,
    STATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The pieces of one sequence and head, in order: Φ and S of each, the last state, checkpoints.

    KEEP also leaves ρ, α and the largest number of U at every piece's end, and what lies behind the last one (S̃ in a
    row of its own where S has one a sequence): the backward walks along them.
    """
    n = tl.program_id(0) // heads
    h = tl.program_id(0) % heads
    batch, first, size = span(n, tokens, offsets, PACKED)
    length = size.to(tl.int32)
    base = first_row(n, first, tokens, every, CHUNK, LONGEST, MARKED, PACKED)
    seen = tl.load(phase + n * phase_n)
    i = tl.arange(0, BK)
    j = tl.arange(0, BV)
    k += batch * k_b + first * k_t + (h // group) * k_h
    v += batch * v_b + first * v_t + h * v_h
    beta += batch * beta_b + first * beta_t + h * beta_h
    if GATED:
        g += batch * g_b + first * g_t + h * g_h
    if MARKED:
        mark = tl.load(marks + n) if PACKED else n.to(tl.int64) * (tokens // every)
    last = (n.to(tl.int64) * heads + h) * K * V
    phi = tile(start + n.to(tl.int64) * start_n + h * start_h, i, j, start_k, K, V).to(tl.float32)
    s = tile(now + n.to(tl.int64) * now_n + h * now_h, i, j, now_k, K, V).to(tl.float32)
    if length == 0:
        if STATE:
            put_slab(last_start + last, phi, i, j, K, V)
            put_slab(last_now + last, s, i, j, K, V)
            if h == 0:
                tl.store(last_phase + n, seen)
    else:
        toward = slab(first_slots, i, j, K, V)
        phi = adopt(phi, toward)
        s = adopt(s, toward)
        t = length * 0
        end = piece_end(t, seen, every, length, CHUNK, LONGEST, MARKED)
        key, value, strength = fetch(t, end, k, k_t, v, v_t, beta, beta_t, K, V, BK, BV, BT, PER_SLOT)
        for part in tl.static_range(2):  # the first piece, whose S is not Φ, then the others
            stop = tl.minimum(length, 1) if part == 0 else length
            while t < stop:
                then = tl.maximum(end, piece_end(end, seen, every, length, CHUNK, LONGEST, MARKED))
                later = fetch(end, then, k, k_t, v, v_t, beta, beta_t, K, V, BK, BV, BT, PER_SLOT)
                row = base + piece_row(t, seen, every, CHUNK, LONGEST, MARKED)
                resumed = (t == 0) | ((seen + t) % CHUNK != 0)
                from_s = s if CUT or part == 0 else phi
                note(t, end, n, h, row, first, resumed, phi, from_s, pieces, slots, running, heads, K, V, BK, BV, CUT)
                raw, unit, adopted = turn(
                    key, value, strength, phi, from_s, g + t.to(tl.int64) * g_t if GATED else g, g_t, end - t,
                    first_slots, ends + (row * heads + h) * 3 * K if KEEP else ends,
                    again + row * heads + h if GATED else again,
                    K, V, BK, BV, BT, OBJECTIVE, GATED, KEEP, PRECISION,
                )  # fmt: skip
                done = (seen + end) % CHUNK == 0
                phi = tl.where(done, unit, phi)
                raw = tl.where(done, unit, raw)
                if MARKED and not KEEP and end % every == 0:
                    to = ((mark + end // every - 1) * heads + h) * K * V
                    put_slab(marked_start + to, phi, i, j, K, V)
                    put_slab(marked_now + to, raw, i, j, K, V)
                    if h == 0:
                        tl.store(marked_phase + mark + end // every - 1, (seen + end) % CHUNK)
                if end == length:
                    if STATE:
                        put_slab(last_start + last, phi, i, j, K, V)
                        put_slab(last_now + last, raw, i, j, K, V)
                        if h == 0:
                            tl.store(last_phase + n, (seen + end) % CHUNK)
                    if KEEP:
                        row += 1
                        put_slab(slots + (row * heads + h) * K * V, phi, i, j, K, V)
                        behind = row if CUT else tl.num_programs(0) // heads + n.to(tl.int64)
                        put_slab(running + (behind * heads + h) * K * V, raw, i, j, K, V)
                if CUT:
                    s = tl.where(done, unit, adopted)
                key, value, strength = later
                t = end
                end = then


@triton.jit
def decays(g, rows, stride, size, BT: tl.constexpr, GATED: tl.constexpr):
    """W and b of a piece."""
    below = rows[:, None] >= rows[None, :]
    if GATED:
        each = logs(g, rows, stride, size)
        exponents = tl.cumsum(tl.where(rows[:, None] > rows[None, :], each[:, None], 0.0), 0)
        return tl.where(below, tl.exp(exponents), 0.0), tl.exp(tl.cumsum(each))
    return tl.where(below, 1.0, 0.0), tl.full((BT,), 1.0, tl.float32)


@triton.jit
def halves(x):
    """Two bfloat16 numbers whose sum is x, to 16 bits."""
    high = upper_bits(x, tl.bfloat16)
    return high.to(tl.bfloat16), (x - high).to(tl.bfloat16)


@triton.jit
def over(w, x, HALVES: tl.constexpr, PRECISION: tl.constexpr):
    """``W x`` for W, W² or their transposes; with HALVES nothing decays, and W is of zeros and ones."""
    if HALVES:
        ones = w.to(tl.bfloat16)
        high, low = halves(x)
        return dot(ones, high, PRECISION) + dot(ones, low, PRECISION)
    return dot(w, x, PRECISION)


@triton.jit
def among(m, x, HALVES: tl.constexpr, PRECISION: tl.constexpr):
    """``M x`` of a matrix between tokens; HALVES keeps 16 bits of M, and of x where it has them."""
    if HALVES:
        high, low = halves(m)
        if x.dtype == tl.bfloat16:
            found = dot(high, x, PRECISION) + dot(low, x, PRECISION)
        else:
            first, rest = halves(x)
            found = dot(high, first, PRECISION) + (dot(low, first, PRECISION) + dot(high, rest, PRECISION))
    else:
        found = dot(m, x, PRECISION)
    return found


@triton.jit
def pairs(gram, w, rows):
    """M of a piece: ``N = W²(E∘(M E))``."""
    return tl.where(rows[:, None] > rows[None, :], 2 * w * gram, tl.where(rows[:, None] == rows[None, :], gram, 0.0))


@triton.jit
def afresh(
    key, value, beta, w, g, stride, size, i, first_slots, dtype: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, OBJECTIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """First directions τ of the slots i, and f of every token: S̃ holds f∘τ since a slot was emptied."""
    at = tl.arange(0, key.shape[0])
    toward = slab(first_slots, i, tl.arange(0, BV), K, V).to(dtype)
    void = emptied(key, value, beta, g, stride, size, OBJECTIVE).to(tl.float32)
    return toward, dot(tl.where(at[:, None] > at[None, :], w, 0.0), void, PRECISION)


@triton.jit
def afresh_square(e, along, fresh, hm, w, phi, toward, PRECISION: tl.constexpr):
    """What f∘τ adds to ρ², Hm τᵀ, W(E∘Hm τᵀ) and ⟨φ,τ⟩."""
    wide = toward.to(tl.float32)
    p = dot(hm, tl.trans(toward), PRECISION)
    crossed = dot(w, e * p, PRECISION)
    met = tl.sum(phi.to(tl.float32) * wide, 1)[None, :]
    return fresh * (fresh * squares(wide)[None, :] + 2 * (crossed - along * met)), p, crossed, met


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
        if RESUMED:
            s = slab(running, i, j, K, V).to(operand)
        if GATED and begun:
            toward, fresh = afresh(
                key, value, strength, w, g, g_t, size, i, first_slots, operand, K, V, BV, OBJECTIVE, PRECISION
            )
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
            out += dot(unread.to(operand), slab(first_slots, i, j, K, V).to(operand), PRECISION)
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


def area(problem: Problem) -> int:
    """How many numbers the slots of a head are, once their widths are powers of two."""
    return block(problem.sizes.K) * block(problem.sizes.V)


def longest(problem: Problem, back: bool) -> int:
    """Tokens of a piece: what keeps products short in true float32, and tiles in shared memory."""
    if problem.dtype == "float32":
        return 16
    if back:
        return 64 if area(problem) <= (64 * 64 if problem.dtype == "float16" else 128 * 128) else 16
    return 64 if area(problem) <= 128 * 128 else 32


def narrowest(problem: Problem, back: bool) -> int:
    """Rows that a piece is filled up to.

    Under Triton 3.6 products that are 16 columns wide on tensor cores are wrong, or out of bounds, where the next
    product takes them: those of wide slots, and those from which the backward makes the gradient of ``log_decay``.
    """
    if problem.dtype == "float32":
        return 16
    return 32 if area(problem) > 64 * 64 or (back and gated(problem)) else 16


def gated(problem: Problem) -> bool:
    """Whether slots decay."""
    return problem.layout("log_decay") is not None


@dataclass(frozen=True)
class Shape:
    """How a problem is cut, and what kernels of both passes are told about it."""

    rows: int
    common: dict[str, Any]
    chunk: dict[str, Any]
    slots: dict[str, Any]
    cut: bool

    @classmethod
    def of(cls, problem: Problem, back: bool = False) -> "Shape":
        """The pieces of a problem's sequences are bounded by its sizes: phases and offsets stay on the device."""
        s, option, every = problem.sizes, problem.option, problem.flags.checkpoint_every
        chunk = option["chunk_size"]
        most = min(longest(problem, back), 1 << (chunk - 1).bit_length())
        each = triton.cdiv(chunk, most)
        chunks, marks = (s.T // chunk + 2 * s.N, s.N) if problem.packed else (s.N * (s.T // chunk + 2), s.N)
        if every:
            marks += s.T // every * (1 if problem.packed else s.N)
        common = {
            "K": s.K,
            "V": s.V,
            "BK": block(s.K),
            "BV": block(s.V),
            "BT": max(block(most), narrowest(problem, back)),
            "OBJECTIVE": OBJECTIVES[option["objective"]],
            "PER_SLOT": problem.layout("beta") == "B T H K",
            "GATED": gated(problem),
            "PACKED": problem.packed,
            "CUT": each > 1 or bool(every),
            "PRECISION": precision(problem) if problem.dtype == "float32" else "tf32",
        }
        pieces = {"CHUNK": chunk, "LONGEST": most, "MARKED": bool(every)}
        slots = {
            "SLOTS": min(block(s.K), 64 if area(problem) <= 64 * 64 else 32),
            "HALVES": problem.dtype == "bfloat16" and not gated(problem),
        }
        return cls(chunks * each + s.N + (marks if every else 0), common, pieces, slots, bool(common["CUT"]))


@dataclass(frozen=True)
class Walk:
    """What ``chain`` leaves in scratch."""

    pieces: Array
    slots: Array
    running: Array
    ends: Array | None
    again: Array | None


def walk(problem: Problem, shape: Shape, config: Config, x: Arrays, out: Arrays, keep: bool) -> Walk:
    """Launch ``chain``; for a backward (``keep``) the slots stay in float32."""
    s, k = problem.sizes, dense(x["k"])
    stored = torch.float32 if keep else k.dtype

    def empty(rows: int, *axes: int, dtype: torch.dtype = torch.float32) -> Array:
        return torch.empty((rows, s.H, *axes), dtype=dtype, device=k.device)

    found = Walk(
        pieces=torch.zeros((shape.rows, 4), dtype=torch.int64, device=k.device),
        slots=empty(shape.rows, s.K, s.V, dtype=stored),
        running=empty(shape.rows if shape.cut else 2 * s.N if keep else s.N, s.K, s.V, dtype=stored),
        ends=empty(shape.rows, 3, s.K) if keep else None,
        again=empty(shape.rows, dtype=torch.int32) if gated(problem) else None,
    )
    beta, first, now, phase = x["beta"], dense(x["initial.start"]), dense(x["initial.now"]), x["initial.phase"]
    chain[(s.N * s.H,)](
        *place(k, 0, 1, 2),
        *place(dense(x["v"]), 0, 1, 2),
        *place(dense(beta) if beta.ndim == 4 else beta, 0, 1, 2),
        *place(x.get("log_decay"), 0, 1, 2),
        *place(first, 0, 1, 2),
        *place(now, 0, 1, 2),
        *place(phase, 0),
        x.get("offsets"),
        directions(problem, k.device),
        first_marks(problem, x.get("offsets")),
        *(found.pieces, found.slots, found.running, found.ends, found.again),
        *(out.get(f"final.{name}") for name in ("start", "now", "phase")),
        *(out.get(f"checkpoint.{name}") for name in ("start", "now", "phase")),
        *(s.T, problem.flags.checkpoint_every, s.H, s.H // s.G),
        **shape.common,
        **shape.chunk,
        KEEP=keep,
        STATE=out.get("final.start") is not None,
        num_warps=config["chain_warps"],
        num_stages=1,
    )
    return found


def inputs(x: Arrays) -> tuple[Any, ...]:
    """q, k, v, beta and log_decay with their strides."""
    beta = x["beta"]
    return (
        *place(dense(x["q"]), 0, 1, 2),
        *place(dense(x["k"]), 0, 1, 2),
        *place(dense(x["v"]), 0, 1, 2),
        *place(dense(beta) if beta.ndim == 4 else beta, 0, 1, 2),
        *place(x.get("log_decay"), 0, 1, 2),
    )
