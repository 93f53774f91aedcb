"""Lattice in chunks (``chunk_size=C > 1``): gradients at the chunk's first slots Φ, the running slots S̃ beside them.

    Hm = V − KΦ (decoding) or V      A = Hm Φᵀ      Z = K (decoding, similarity) or K − A      E = beta ∘ Z
    S̃_t,i = μ_t S̃_{t-1},i + E_ti h_t − E_ti A_ti φ_i            ρ_ti = ‖S̃_ti‖ (measured)
    y_t = scale · Σ_i (q_ti / ρ_ti) S̃_ti  (or S̃ᵀq)               at the chunk's end Φ ← S̃_i / ρ_i

Everything at Φ is a product of a chunk's matrices; the running slots are turned, measured and read token by token, a
block of rows at a time while they are in the nearest cache. The norm is always that of the actual row: the closed form
of ρ² cancels where a value points along a slot. A call may start and end inside a chunk: it carries Φ (``start``), S̃
(``now``) and the tokens of the chunk already seen (``phase``). Rows of zeros stand for their first directions: in a
read, at a chunk's start, and for the token that follows.

Backward, D = dL/dS̃ of one token from the next, ``s' = S̃/ρ``, q̂ = scale q/ρ:

    D_t = μ_{t+1} D_{t+1} + q̂ (dy − s' ⟨s',dy⟩)     dq = scale ⟨s', dy⟩      dμ = Σ ⟨D, S̃_{t-1}⟩
    dE = ⟨D,h⟩ − A ⟨D,φ⟩     dA = −E ⟨D,φ⟩ (− dZ if encoding)     dbeta = Z dE     dZ = beta dE     dk = dZ
    dh = Eᵀ D + dA Φ         dΦ = dAᵀ Hm − Σ_t (E A)_t ∘ D_t     decoding: dk −= Φ dh, dΦ −= Kᵀ dh

and at a chunk's end, with G = dΦ + μ D of the next chunk, ``D = (G − s' ⟨s', G⟩) / ρ``. The running slots of a segment
of ``spacing`` tokens (whole chunks) are computed once more from its first slots and stay in scratch.

    q, k [B,T,G,K]   v, y [B,T,H,V]   beta [B,T,H,K or 1]   log_decay [B,T,H] or empty
    start, now [N,H,K,V]   phase [N]   kept [R,H,K,V]: slots where each segment of a sequence but its first starts
"""

import numpy as np
from numba import prange

from mixers.backend import Config, Support
from mixers.problem import Arrays, Problem

from .compile import Count, CountOut, Flag, In, Index, Int, Out, Real, device, kernel
from .kernel import NumbaKernel
from .lattice import (
    DECODING,
    ENCODING,
    HALF,
    add_tile,
    adopt_rows,
    arguments,
    blank_unused,
    deposit,
    deposit_tile,
    fetch,
    fetch_tile,
    fill,
    foresee,
    gather,
    given,
    grouped,
    leaf,
    rows_of,
)
from .layout import checkpoint_row, kept_row, padded, scratch, span, zeroed
from .matmul import matmul, matmul_ta, matmul_tb
from .simd import (
    NARROW,
    absolute,
    add,
    choose,
    div,
    fma,
    lanes,
    load,
    maximum,
    mul,
    splat,
    sqrt,
    store,
    store_totals,
    sub,
    total,
    zeros,
)

# What a token does to each slot, a vector of slots each.
E, EA, INV, Z, BETA, RECORD = range(6)

# Scratch vectors of slots: squared norms and read weights of a token; dots and weights of its adjoint.
SQUARE, QUERY, READ = range(3)
SY, DH, DP, DS, TAU, DQ, DBETA, WORK = range(3, 11)

# --------------------------------------------------------------------------------------------- one token, forward


@leaf
def turn(s, at, to, phi, base, ld, first, last, h, hs, mu, record, e, ea, work, square):
    """``s[to] = μ s[at] + e h − ea φ`` and the squared norms of the new rows; rows come in fours."""
    step = lanes(s, NARROW)
    decay = splat(s, mu, NARROW)
    for i in range(first, last, 4):
        i0 = i * ld
        i1 = i0 + ld
        i2 = i1 + ld
        i3 = i2 + ld
        e0 = splat(s, record[e + i], NARROW)
        e1 = splat(s, record[e + i + 1], NARROW)
        e2 = splat(s, record[e + i + 2], NARROW)
        e3 = splat(s, record[e + i + 3], NARROW)
        f0 = splat(s, -record[ea + i], NARROW)
        f1 = splat(s, -record[ea + i + 1], NARROW)
        f2 = splat(s, -record[ea + i + 2], NARROW)
        f3 = splat(s, -record[ea + i + 3], NARROW)
        r0 = zeros(s, NARROW)
        r1 = r0
        r2 = r0
        r3 = r0
        for j in range(0, ld, step):
            u = load(h, hs + j, NARROW)
            x = fma(f0, load(phi, base + i0 + j, NARROW), fma(e0, u, mul(decay, load(s, at + i0 + j, NARROW))))
            store(s, to + i0 + j, x)
            r0 = fma(x, x, r0)
            x = fma(f1, load(phi, base + i1 + j, NARROW), fma(e1, u, mul(decay, load(s, at + i1 + j, NARROW))))
            store(s, to + i1 + j, x)
            r1 = fma(x, x, r1)
            x = fma(f2, load(phi, base + i2 + j, NARROW), fma(e2, u, mul(decay, load(s, at + i2 + j, NARROW))))
            store(s, to + i2 + j, x)
            r2 = fma(x, x, r2)
            x = fma(f3, load(phi, base + i3 + j, NARROW), fma(e3, u, mul(decay, load(s, at + i3 + j, NARROW))))
            store(s, to + i3 + j, x)
            r3 = fma(x, x, r3)
        store_totals(work, square + i, r0, r1, r2, r3)


def _read(width):
    """One panel of ``out += Σ_i weights[w + i] s_i``."""

    @leaf
    def panel(s, at, ld, first, last, weights, w, out, left, right):
        j = left
        while j < right:
            x = load(out, j, width)
            for i in range(first, last):
                x = fma(splat(s, weights[w + i], width), load(s, at + i * ld + j, width), x)
            store(out, j, x)
            j += lanes(s, width)

    return panel


_read_half = _read(HALF)
_read_narrow = _read(NARROW)


@leaf
def read(s, at, ld, first, last, weights, w, out):
    """``out += Σ_i weights[w + i] s_i`` over some rows."""
    whole = ld // lanes(s, HALF) * lanes(s, HALF)
    _read_half(s, at, ld, first, last, weights, w, out, 0, whole)
    _read_narrow(s, at, ld, first, last, weights, w, out, whole, ld)


@leaf
def inverse_norms(s, at, ld, first, last, record, inv, work, kp):
    """``1/‖s_i‖`` of a block of rows from their squares, 0 for rows of zeros; returns how many those are.

    Squares that are close to underflow are measured again, in units of the row's largest element.
    """
    step = lanes(s, NARROW)
    tiny = np.finfo(s.dtype).tiny / np.finfo(s.dtype).eps
    one = splat(s, 1, NARROW)
    square = load(work, SQUARE * kp + first, NARROW)
    least = splat(s, tiny, NARROW)
    store(record, inv + first, div(one, sqrt(choose(square, least, one, square))))
    if total(choose(square, least, one, zeros(s, NARROW))) == 0:
        return 0
    voids = 0
    for i in range(first, last):
        if work[SQUARE * kp + i] < tiny:
            peak = zeros(s, NARROW)
            for j in range(0, ld, step):
                peak = maximum(absolute(load(s, at + i * ld + j, NARROW)), peak)
            store(work, SQUARE * kp + first, peak)
            most = work[SQUARE * kp + first]
            for j in range(1, step):
                most = max(most, work[SQUARE * kp + first + j])
            store(work, SQUARE * kp + first, square)
            if most < 16 * np.finfo(s.dtype).tiny:  # 1 / ρ would overflow
                voids += 1
                record[inv + i] = 0
                fill(s, at + i * ld, ld, 0)
                continue
            acc = zeros(s, NARROW)
            unit = splat(s, most, NARROW)
            for j in range(0, ld, step):
                x = div(load(s, at + i * ld + j, NARROW), unit)
                acc = fma(x, x, acc)
            record[inv + i] = 1 / (most * np.sqrt(total(acc)))
    return voids


@leaf
def advance(record, at, kp, s, pre, post, phi, base, ld, directions, h, hs, mu, scale, work, y, reads, read_norm):
    """One token: rows at ``pre`` become rows at ``post``; ``y`` gets their read. Returns how many became zeros.

    ``record[at:]`` holds E and EA, ``work`` the query; INV is filled in.
    """
    count = directions.shape[0]
    step = lanes(s, NARROW)
    rows = (count + 3) // 4 * 4
    factor = splat(s, scale, NARROW)
    voids = 0
    if reads:
        fill(y, 0, ld, 0)
    for i in range(0, kp, step):
        last = min(i + step, count)
        end = min(i + step, rows)
        turn(s, pre, post, phi, base, ld, i, end, h, hs, mu, record, at + E * kp, at + EA * kp, work, SQUARE * kp)
        voids += inverse_norms(s, post, ld, i, last, record, at + INV * kp, work, kp)
        if reads:
            x = mul(factor, load(work, QUERY * kp + i, NARROW))
            if read_norm:
                x = mul(x, load(record, at + INV * kp + i, NARROW))
            store(work, READ * kp + i, x)
            read(s, post, ld, i, last, work, READ * kp, y)
    if voids and reads and read_norm:
        for i in range(count):
            if record[at + INV * kp + i] == 0:
                for j in range(directions.shape[1]):
                    y[j] += scale * work[QUERY * kp + i] * directions[i, j]
    return voids


@leaf
def unit_rows(s, at, to, out, ld, directions, record, inv):
    """The slots that the next chunk starts from: rows divided by their norms, or first directions."""
    rows, columns = directions.shape
    for i in range(rows):
        if record[inv + i] == 0:
            for j in range(columns):
                out[to + i * ld + j] = directions[i, j]
        else:
            by = splat(s, record[inv + i], NARROW)
            for j in range(0, ld, lanes(s, NARROW)):
                store(out, to + i * ld + j, mul(by, load(s, at + i * ld + j, NARROW)))


@leaf
def copy(source, target):
    """``target = source``, padded scratch of one size."""
    for j in range(0, source.shape[0], lanes(source, NARROW)):
        store(target, j, load(source, j, NARROW))


@leaf
def _strengths(first, length, at, beta, encoding, keys, along, record, kp):
    """E = beta z and E A of the tokens of a chunk, from their keys and A."""
    step = lanes(record, NARROW)
    for u in range(at, at + length):
        strength = beta[first + u - at]
        block = u * RECORD * kp
        if strength.shape[0] == 1:
            fill(record, block + BETA * kp, kp, strength[0])
        else:
            fetch(strength, record, block + BETA * kp)
        for i in range(0, kp, step):
            a = load(along, u * kp + i, NARROW)
            z = load(keys, u * kp + i, NARROW)
            if encoding:
                z = sub(z, a)
            e = mul(load(record, block + BETA * kp + i, NARROW), z)
            store(record, block + Z * kp + i, z)
            store(record, block + E * kp + i, e)
            store(record, block + EA * kp + i, mul(e, a))


@leaf
def _fetch_rows(first, length, at, k, v, keys, hs, kp, ld):
    """Keys and values of the tokens of a chunk."""
    for u in range(length):
        fetch(k[first + u], keys, (at + u) * kp)
        fetch(v[first + u], hs, (at + u) * ld)


@device
def prepare(first, length, at, k, v, beta, objective, phi, base, ld, kp, keys, hs, along, predicted, record):
    """Everything of a chunk's tokens that is taken at Φ: rows ``at:`` of keys, h, A and of the records."""
    count = k.shape[1]
    width = v.shape[1]
    _fetch_rows(first, length, at, k, v, keys, hs, kp, ld)
    start = phi[base:]
    if objective == DECODING:
        matmul(predicted, ld, keys[at * kp :], kp, start, ld, length, width, count, 1, 0)
        for j in range(length * ld):
            hs[at * ld + j] -= predicted[j]
    matmul_tb(along[at * kp :], kp, hs[at * ld :], ld, start, ld, length, count, width, 1, 0)
    _strengths(first, length, at, beta, objective == ENCODING, keys, along, record, kp)


# --------------------------------------------------------------------------------------------- forward


@leaf
def _forward_tokens(
    first, length, phase, chunk, q, log_decay, directions, read_norm, scale, every, y, starts, nows, phases,
    phi, s, record, hs, work, out,
):  # fmt: skip
    """The tokens of one chunk, or of what of it lies in the sequence; Φ and S̃ are replaced at its end."""
    count, width = directions.shape
    kp = padded(count, phi)
    ld = padded(width, phi)
    voids = 0
    for u in range(length):
        t = first + u
        if voids:
            adopt_rows(s, ld, directions)
        fetch(q[t], work, QUERY * kp)
        if u + 1 < length:
            foresee(q[t + 1])
            foresee(y[t + 1])
        mu = np.exp(log_decay[t]) if log_decay.shape[0] else phi.dtype.type(1)
        at = u * RECORD * kp
        voids = advance(
            record, at, kp, s, 0, 0, phi, 0, ld, directions, hs, u * ld, mu, scale, work, out, True, read_norm
        )
        deposit(out, 0, y[t])
        done = phase + u + 1 >= chunk
        if done:
            unit_rows(s, 0, 0, phi, ld, directions, record, at + INV * kp)
            copy(phi, s)
            voids = 0
        if every and (t + 1) % every == 0:
            row = (t + 1) // every - 1
            deposit_tile(phi, starts[row], ld)
            deposit_tile(s, nows[row], ld)
            phases[row] = 0 if done else phase + u + 1
    return voids


@device
def _forward_head(
    q, k, v, beta, log_decay, start, now, phase, directions, objective, read_norm, scale, chunk, spacing, every,
    y, last_start, last_now, starts, nows, phases, kept,
):  # fmt: skip
    """One sequence and head: q, k [T,K], v, y [T,V], beta [T,·], states [K,V]; returns the last phase."""
    tokens, width = v.shape
    count = directions.shape[0]
    kp = padded(count, v)
    ld = padded(width, v)
    rows = (count + 3) // 4 * 4
    longest = max(1, min(chunk, tokens))
    phi = zeroed(rows * ld, v)
    s = zeroed(rows * ld, v)
    fetch_tile(start, phi, ld)
    fetch_tile(now, s, ld)
    if tokens:
        adopt_rows(phi, ld, directions)
        adopt_rows(s, ld, directions)
        keys = zeroed(longest * kp, v)
        along = zeroed(longest * kp, v)
        hs = zeroed(longest * ld, v)
        predicted = zeroed(longest * ld, v)
        record = zeroed(longest * RECORD * kp, v)
        work = zeroed(WORK * kp, v)
        out = zeroed(ld, v)
        t = 0
        position = phase
        while t < tokens:
            if kept.shape[0] and t and position % spacing == 0:
                deposit_tile(phi, kept[position // spacing - 1], ld)
            seen = position % chunk
            length = min(chunk - seen, tokens - t)
            prepare(t, length, 0, k, v, beta, objective, phi, 0, ld, kp, keys, hs, along, predicted, record)
            _forward_tokens(
                t, length, seen, chunk, q, log_decay, directions, read_norm, scale, every, y, starts, nows, phases,
                phi, s, record, hs, work, out,
            )  # fmt: skip
            t += length
            position += length
    if last_start.shape[0]:
        deposit_tile(phi, last_start, ld)
        deposit_tile(s, last_now, ld)
    return (phase + tokens) % chunk


@kernel
def forward(
    q: In[4],
    k: In[4],
    v: In[4],
    beta: In[4],
    log_decay: In[3],
    start: In[4],
    now: In[4],
    phase: Count[1],
    directions: In[2],
    offsets: Index[1],
    objective: Int,
    read_norm: Flag,
    scale: Real,
    spacing: Int,
    every: Int,
    chunk: Int,
    y: Out[4],
    last_start: Out[4],
    last_now: Out[4],
    last_phase: CountOut[1],
    starts: Out[4],
    nows: Out[4],
    phases: CountOut[2],
    kept: Out[4],
):
    tokens = v.shape[1]
    heads = v.shape[2]
    group = heads // max(1, k.shape[2])
    for item in prange(start.shape[0] * heads):
        n = item // heads
        head = item % heads
        row, first, last = span(n, tokens, offsets)
        mine = checkpoint_row(n, tokens, every, offsets) if every else 0
        at = _forward_head(
            q[row, first:last, head // group],
            k[row, first:last, head // group],
            v[row, first:last, head],
            beta[row, first:last, head],
            log_decay[row, first:last, head] if log_decay.shape[0] else log_decay[:0, 0, 0],
            start[n, head],
            now[n, head],
            phase[n],
            directions,
            objective,
            read_norm,
            scale,
            chunk,
            spacing,
            every,
            y[row, first:last, head],
            last_start[n, head] if last_start.shape[0] else y[0, :0, 0],
            last_now[n, head] if last_now.shape[0] else y[0, :0, 0],
            starts[mine:, head],
            nows[mine:, head],
            phases[head, mine:],
            kept[kept_row(n, first, tokens, spacing, offsets) :, head],
        )
        if head == 0 and last_phase.shape[0]:
            last_phase[n] = at


# --------------------------------------------------------------------------------------------- backward


@leaf
def read_dots(s, at, ld, first, last, dy, work, sy):
    """Row dots ``⟨s_i, dy⟩``; rows come in fours."""
    for i in range(first, last, 4):
        i0 = at + i * ld
        i1 = i0 + ld
        i2 = i1 + ld
        i3 = i2 + ld
        a0 = zeros(s, NARROW)
        a1 = a0
        a2 = a0
        a3 = a0
        for j in range(0, ld, lanes(s, NARROW)):
            g = load(dy, j, NARROW)
            a0 = fma(load(s, i0 + j, NARROW), g, a0)
            a1 = fma(load(s, i1 + j, NARROW), g, a1)
            a2 = fma(load(s, i2 + j, NARROW), g, a2)
            a3 = fma(load(s, i3 + j, NARROW), g, a3)
        store_totals(work, sy + i, a0, a1, a2, a3)


@leaf
def retreat(s, pre, post, base, ld, first, last, carry, dphi, h, hs, dy, mu, record, at, work, kp, dh, to):
    """D of some rows of one token, in pairs: ``D = μ D + q̂ (dy − τ s')``, what it adds to dΦ and dh, and its dots."""
    step = lanes(s, NARROW)
    decay = splat(s, mu, NARROW)
    for i in range(first, last, 2):
        i0 = i * ld
        i1 = i0 + ld
        q0 = splat(s, work[READ * kp + i], NARROW)
        q1 = splat(s, work[READ * kp + i + 1], NARROW)
        t0 = splat(s, -work[TAU * kp + i], NARROW)
        t1 = splat(s, -work[TAU * kp + i + 1], NARROW)
        n0 = splat(s, record[at + INV * kp + i], NARROW)
        n1 = splat(s, record[at + INV * kp + i + 1], NARROW)
        e0 = splat(s, record[at + E * kp + i], NARROW)
        e1 = splat(s, record[at + E * kp + i + 1], NARROW)
        f0 = splat(s, -record[at + EA * kp + i], NARROW)
        f1 = splat(s, -record[at + EA * kp + i + 1], NARROW)
        a0 = zeros(s, NARROW)
        a1 = a0
        b0 = a0
        b1 = a0
        c0 = a0
        c1 = a0
        for j in range(0, ld, step):
            u = load(h, hs + j, NARROW)
            g = load(dy, j, NARROW)
            d = fma(t0, mul(n0, load(s, post + i0 + j, NARROW)), g)
            d = fma(q0, d, mul(decay, load(carry, i0 + j, NARROW)))
            store(carry, i0 + j, d)
            store(dphi, i0 + j, fma(f0, d, load(dphi, i0 + j, NARROW)))
            x = fma(e0, d, load(dh, to + j, NARROW))
            a0 = fma(d, u, a0)
            b0 = fma(d, load(s, base + i0 + j, NARROW), b0)
            c0 = fma(d, load(s, pre + i0 + j, NARROW), c0)
            d = fma(t1, mul(n1, load(s, post + i1 + j, NARROW)), g)
            d = fma(q1, d, mul(decay, load(carry, i1 + j, NARROW)))
            store(carry, i1 + j, d)
            store(dphi, i1 + j, fma(f1, d, load(dphi, i1 + j, NARROW)))
            store(dh, to + j, fma(e1, d, x))
            a1 = fma(d, u, a1)
            b1 = fma(d, load(s, base + i1 + j, NARROW), b1)
            c1 = fma(d, load(s, pre + i1 + j, NARROW), c1)
        work[DH * kp + i] = total(a0)
        work[DH * kp + i + 1] = total(a1)
        work[DP * kp + i] = total(b0)
        work[DP * kp + i + 1] = total(b1)
        work[DS * kp + i] = total(c0)
        work[DS * kp + i + 1] = total(c1)


@leaf
def backward_token(
    at, kp, ld, s, pre, post, base, carry, dphi, hs, to, dy, mu, record, work, scale, read_norm, encoding,
    keys_from, along, dalong, dkeys, dh, directions, void,
):  # fmt: skip
    """The adjoint of one token but for what goes through Φ; returns dμ."""
    count = directions.shape[0]
    rows = (count + 3) // 4 * 4
    step = lanes(s, NARROW)
    factor = splat(s, scale, NARROW)
    nought = zeros(s, NARROW)
    fill(dh, to, ld, 0)
    for i in range(0, kp, step):
        last = min(i + step, rows)
        read_dots(s, post, ld, i, last, dy, work, SY * kp)
        inv = load(record, at + INV * kp + i, NARROW)
        sq = mul(factor, load(work, QUERY * kp + i, NARROW))
        sy = load(work, SY * kp + i, NARROW)
        if read_norm:
            sy = mul(inv, sy)
            sq = mul(inv, sq)
            store(work, TAU * kp + i, sy)
        else:
            store(work, TAU * kp + i, nought)
        store(work, READ * kp + i, sq)
        store(work, DQ * kp + i, mul(factor, sy))
        retreat(s, pre, post, base, ld, i, last, carry, dphi, hs, to, dy, mu, record, at, work, kp, dh, to)
    if void:
        for i in range(count):
            if record[at + INV * kp + i] == 0:
                x = s.dtype.type(0)
                if read_norm:
                    for j in range(directions.shape[1]):
                        x += directions[i, j] * dy[j]
                work[DQ * kp + i] = scale * x
    dmu = nought
    for i in range(0, kp, step):
        a = load(along, keys_from + i, NARROW)
        p = load(work, DP * kp + i, NARROW)
        de = sub(load(work, DH * kp + i, NARROW), mul(a, p))
        dz = mul(load(record, at + BETA * kp + i, NARROW), de)
        da = sub(nought, mul(load(record, at + E * kp + i, NARROW), p))
        if encoding:
            da = sub(da, dz)
        store(work, DBETA * kp + i, mul(load(record, at + Z * kp + i, NARROW), de))
        store(dkeys, keys_from + i, dz)
        store(dalong, keys_from + i, da)
        dmu = add(dmu, load(work, DS * kp + i, NARROW))
    return total(dmu)


@leaf
def scale_tile(tile, by):
    """Multiply every element."""
    x = splat(tile, by, NARROW)
    for j in range(0, tile.shape[0], lanes(tile, NARROW)):
        store(tile, j, mul(x, load(tile, j, NARROW)))


@leaf
def through_norm(s, post, ld, count, carry, dphi, record, inv):
    """From the gradient of a chunk's first slots, ``dΦ + D``, to D of the last token before."""
    step = lanes(s, NARROW)
    for i in range(count):
        by = splat(s, record[inv + i], NARROW)
        acc = zeros(s, NARROW)
        for j in range(i * ld, (i + 1) * ld, step):
            g = add(load(carry, j, NARROW), load(dphi, j, NARROW))
            store(carry, j, g)
            acc = fma(mul(by, load(s, post + j, NARROW)), g, acc)
        along = splat(s, total(acc), NARROW)
        for j in range(i * ld, (i + 1) * ld, step):
            x = mul(by, load(s, post + j, NARROW))
            store(carry, j, mul(by, sub(load(carry, j, NARROW), mul(along, x))))
    fill(dphi, 0, dphi.shape[0], 0)


@leaf
def cut_voids(carry, ld, count, record, inv):
    """Nothing flows back into a row that was zeros: the next token saw its first direction."""
    for i in range(count):
        if record[inv + i] == 0:
            fill(carry, i * ld, ld, 0)


@leaf
def _recompute(
    first, length, at, base, last, log_decay, directions, scale, s, tile, record, hs, mus, voids, work, kp, ld,
    restart, y,
):  # fmt: skip
    """The running slots of a chunk: tiles ``at + 1 :`` from tile ``at`` or, at a chunk's start, from Φ."""
    for u in range(at, at + length):
        pre = base if restart and u == at else u * tile
        mus[u] = np.exp(log_decay[first + u - at]) if log_decay.shape[0] else s.dtype.type(1)
        block = u * RECORD * kp
        voids[u] = advance(
            record, block, kp, s, pre, (u + 1) * tile, s, base, ld, directions, hs, u * ld, mus[u], scale, work, y,
            False, True,
        )  # fmt: skip
        if voids[u] and not (last and u == at + length - 1):
            adopt_rows(s[(u + 1) * tile :], ld, directions)


@leaf
def _backward_tokens(
    first, length, at, base, restart, full, mu, q, log_decay, directions, read_norm, encoding, scale, every,
    dy, dstarts, dnows, dq, dbeta, dlog_decay, carry, dphi, s, tile, record, hs, mus, voids, work,
    along, dalong, dkeys, dh, g,
):  # fmt: skip
    """The tokens of a chunk in reverse; ``mu`` is what D still has to be multiplied with, before and after. If the
    chunk is ``full``, the next one starts after its last token.
    """
    count, width = directions.shape
    kp = padded(count, s)
    ld = padded(width, s)
    one = s.dtype.type(1)
    for u in range(at + length - 1, at - 1, -1):
        t = first + u - at
        block = u * RECORD * kp
        post = (u + 1) * tile
        pre = base if restart and u == at else u * tile
        checkpoint = dstarts.shape[0] > 0 and (t + 1) % every == 0
        if full and u == at + length - 1:
            scale_tile(carry, mu)
            mu = one
            if checkpoint:
                add_tile(dstarts[(t + 1) // every - 1], carry, ld)
                add_tile(dnows[(t + 1) // every - 1], carry, ld)
            through_norm(s, post, ld, count, carry, dphi, record, block + INV * kp)
        else:
            if voids[u] and u < at + length - 1:
                cut_voids(carry, ld, count, record, block + INV * kp)
            if checkpoint:
                scale_tile(carry, mu)
                mu = one
                add_tile(dstarts[(t + 1) // every - 1], dphi, ld)
                add_tile(dnows[(t + 1) // every - 1], carry, ld)
        if dy.shape[0]:
            fetch(dy[t], g, 0)
            foresee(dy[max(t - 1, 0)])
        fetch(q[t], work, QUERY * kp)
        foresee(q[max(t - 1, 0)])
        dmu = backward_token(
            block, kp, ld, s, pre, post, base, carry, dphi, hs, u * ld, g, mu, record, work, scale, read_norm,
            encoding, u * kp, along, dalong, dkeys, dh, directions, voids[u],
        )  # fmt: skip
        mu = mus[u]
        deposit(work, DQ * kp, dq[t])
        if dbeta.shape[1] == 1:
            x = s.dtype.type(0)
            for i in range(count):
                x += work[DBETA * kp + i]
            dbeta[t, 0] = x
        else:
            deposit(work, DBETA * kp, dbeta[t])
        if dlog_decay.shape[0]:
            dlog_decay[t] = mu * dmu if mu > 0 else s.dtype.type(0)
    return mu


@leaf
def _deposit_rows(first, length, at, dkeys, dh, dk, dv, kp, ld):
    """dk and dv of the tokens of a chunk."""
    for u in range(length):
        deposit(dkeys, (at + u) * kp, dk[first + u])
        deposit(dh, (at + u) * ld, dv[first + u])


@device
def _backward_head(
    q, k, v, beta, log_decay, start, now, phase, directions, objective, read_norm, scale, chunk, spacing, every, kept,
    dy, dstart, dnow, dstarts, dnows, dq, dk, dv, dbeta, dlog_decay, dfirst_start, dfirst_now,
):  # fmt: skip
    """One sequence and head; shapes as in ``_forward_head``, gradients as what they belong to."""
    tokens, width = v.shape
    count = directions.shape[0]
    kp = padded(count, v)
    ld = padded(width, v)
    rows = (count + 3) // 4 * 4
    tile = rows * ld
    carry = zeroed(tile, v)
    dphi = zeroed(tile, v)
    if dstart.shape[0]:
        fetch_tile(dstart, dphi, ld)
    if dnow.shape[0]:
        fetch_tile(dnow, carry, ld)
    longest = max(1, min(spacing, tokens))
    starts = (longest + 1) * tile
    s = zeroed(starts + (longest // chunk + 2) * tile, v)
    keys = zeroed(longest * kp, v)
    along = zeroed(longest * kp, v)
    dalong = zeroed(longest * kp, v)
    dkeys = zeroed(longest * kp, v)
    hs = zeroed(longest * ld, v)
    dh = zeroed(longest * ld, v)
    record = zeroed(longest * RECORD * kp, v)
    mus = scratch(longest, v)
    voids = np.zeros(longest, np.int64)
    work = zeroed(WORK * kp, v)
    g = zeroed(ld, v)
    mu = v.dtype.type(1)
    encoding = objective == ENCODING
    for segment in range((phase + tokens - 1) // spacing if tokens else -1, -1, -1):
        first = max(segment * spacing - phase, 0)
        length = min((segment + 1) * spacing - phase, tokens) - first
        # Forward through the segment: Φ of its chunk c in tile starts + c, S̃ after its token u in tile u + 1.
        if segment == 0:
            fetch_tile(start, s[starts:], ld)
            adopt_rows(s[starts:], ld, directions)
            fetch_tile(now, s, ld)
            adopt_rows(s, ld, directions)
        else:
            fetch_tile(kept[segment - 1], s[starts:], ld)
            fetch_tile(kept[segment - 1], s, ld)
        chunks = 0
        at = 0
        while at < length:
            seen = (phase + first + at) % chunk
            size = min(chunk - seen, length - at)
            base = starts + chunks * tile
            prepare(first + at, size, at, k, v, beta, objective, s, base, ld, kp, keys, hs, along, dh, record)
            full = seen + size >= chunk
            _recompute(
                first + at, size, at, base, full or first + at + size == tokens, log_decay, directions, scale,
                s, tile, record, hs, mus, voids, work, kp, ld, at > 0, g,
            )  # fmt: skip
            at += size
            chunks += 1
            if full:
                inv = (at - 1) * RECORD * kp + INV * kp
                unit_rows(s, at * tile, starts + chunks * tile, s, ld, directions, record, inv)
        # And back.
        while at > 0:
            chunks -= 1
            base = starts + chunks * tile
            full = (phase + first + at) % chunk == 0
            size = min((phase + first + at - 1) % chunk + 1, at)
            at -= size
            resumed = at > 0
            mu = _backward_tokens(
                first + at, size, at, base, resumed, full, mu, q, log_decay, directions, read_norm, encoding, scale,
                every, dy, dstarts, dnows, dq, dbeta, dlog_decay, carry, dphi, s, tile, record, hs, mus, voids, work,
                along, dalong, dkeys, dh, g,
            )  # fmt: skip
            phi = s[base:]
            some = dalong[at * kp :]
            back = dh[at * ld :]
            matmul(back, ld, some, kp, phi, ld, size, width, count, 1, 1)
            matmul_ta(dphi, ld, some, kp, hs[at * ld :], ld, count, width, size, 1, 1)
            if objective == DECODING:
                matmul_tb(dkeys[at * kp :], kp, back, ld, phi, ld, size, count, width, -1, 1)
                matmul_ta(dphi, ld, keys[at * kp :], kp, back, ld, count, width, size, -1, 1)
            _deposit_rows(first + at, size, at, dkeys, dh, dk, dv, kp, ld)
    scale_tile(carry, mu)
    deposit_tile(dphi, dfirst_start, ld)
    deposit_tile(carry, dfirst_now, ld)
    if tokens:
        for i in range(count):
            if not start[i].any():
                dfirst_start[i, :] = 0
            if not now[i].any():
                dfirst_now[i, :] = 0


@kernel
def backward(
    q: In[4],
    k: In[4],
    v: In[4],
    beta: In[4],
    log_decay: In[3],
    start: In[4],
    now: In[4],
    phase: Count[1],
    directions: In[2],
    offsets: Index[1],
    objective: Int,
    read_norm: Flag,
    scale: Real,
    spacing: Int,
    every: Int,
    chunk: Int,
    kept: In[4],
    dy: In[4],
    dstart: In[4],
    dnow: In[4],
    dstarts: In[4],
    dnows: In[4],
    dq: Out[4],
    dk: Out[4],
    dv: Out[4],
    dbeta: Out[4],
    dlog_decay: Out[3],
    dfirst_start: Out[4],
    dfirst_now: Out[4],
):
    tokens = v.shape[1]
    heads = v.shape[2]
    group = heads // max(1, k.shape[2])
    for item in prange(start.shape[0] * heads):
        n = item // heads
        head = item % heads
        row, first, last = span(n, tokens, offsets)
        mine = checkpoint_row(n, tokens, every, offsets) if every else 0
        _backward_head(
            q[row, first:last, head // group],
            k[row, first:last, head // group],
            v[row, first:last, head],
            beta[row, first:last, head],
            log_decay[row, first:last, head] if log_decay.shape[0] else log_decay[:0, 0, 0],
            start[n, head],
            now[n, head],
            phase[n],
            directions,
            objective,
            read_norm,
            scale,
            chunk,
            spacing,
            every,
            kept[kept_row(n, first, tokens, spacing, offsets) :, head],
            dy[row, first:last, head] if dy.shape[0] else dy[:0, 0, 0],
            dstart[n, head] if dstart.shape[0] else dstart[:0, 0, 0],
            dnow[n, head] if dnow.shape[0] else dnow[:0, 0, 0],
            dstarts[mine:, head] if dstarts.shape[0] else dstarts[:0, 0],
            dnows[mine:, head] if dnows.shape[0] else dnows[:0, 0],
            dq[row, first:last, head],
            dk[row, first:last, head],
            dv[row, first:last, head],
            dbeta[row, first:last, head],
            dlog_decay[row, first:last, head] if dlog_decay.shape[0] else dlog_decay[:0, 0, 0],
            dfirst_start[n, head],
            dfirst_now[n, head],
        )


# --------------------------------------------------------------------------------------------- the kernel


class LatticeChunk(NumbaKernel):
    """Chunks of any length, resumed anywhere inside one."""

    name = "lattice.chunk"
    form = "chunk"
    mixers = frozenset({"lattice"})

    def takes(self, problem: Problem) -> Support:
        """Only where the chunk is part of the model."""
        if problem.option["chunk_size"] == 1:
            return Support.no("runs chunk_size > 1; lattice.recurrent is the exact recurrence")
        return Support.yes()

    def configs(self, problem: Problem) -> tuple[Config, ...]:
        """Nothing to choose."""
        return ({},)

    def forward(self, problem: Problem, config: Config, x: Arrays, out: Arrays) -> None:
        """See ``Kernel``."""
        q, k, v, beta, log_decay, *options = arguments(problem, x)
        s = problem.sizes
        checkpoints = s.T // problem.flags.checkpoint_every * s.B if problem.flags.checkpoint_every else 0
        phases = np.zeros((s.H, checkpoints), np.int32)  # of every head, so that no two write one number
        blank_unused(problem, x, out, ("checkpoint.start", "checkpoint.now"))
        forward(
            problem.work() / 2,
            *(q, k, v, beta, log_decay, x["initial.start"], x["initial.now"], x["initial.phase"], *options),
            problem.option["chunk_size"],
            out["y"],
            given(out.get("final.start"), q, 4),
            given(out.get("final.now"), q, 4),
            np.empty(0, np.int32) if out.get("final.phase") is None else out["final.phase"],
            given(rows_of(out.get("checkpoint.start")), q, 4),
            given(rows_of(out.get("checkpoint.now")), q, 4),
            phases,
            given(out.get("kept.slots"), q, 4),
        )
        if out.get("checkpoint.phase") is not None:
            out["checkpoint.phase"][...] = phases[0].reshape(out["checkpoint.phase"].shape)

    def backward(self, problem: Problem, config: Config, x: Arrays, out: Arrays, dout: Arrays, dx: Arrays) -> None:
        """See ``Kernel``."""
        q, k, v, beta, log_decay, *options = arguments(problem, x)
        dq, dk = grouped(problem, dx)
        dbeta = dx["beta"]
        dstarts, dnows = rows_of(dout.get("checkpoint.start")), rows_of(dout.get("checkpoint.now"))
        if (dstarts is None) != (dnows is None):  # the kernel takes both or none
            dstarts = np.zeros_like(dnows) if dstarts is None else dstarts
            dnows = np.zeros_like(dstarts) if dnows is None else dnows
        backward(
            problem.work() * 1.5,
            *(q, k, v, beta, log_decay, x["initial.start"], x["initial.now"], x["initial.phase"], *options),
            problem.option["chunk_size"],
            out["kept.slots"],
            given(dout.get("y"), q, 4),
            given(dout.get("final.start"), q, 4),
            given(dout.get("final.now"), q, 4),
            given(dstarts, q, 4),
            given(dnows, q, 4),
            *(dq, dk, dx["v"], dbeta[..., None] if dbeta.ndim == 3 else dbeta),
            given(dx.get("log_decay"), q, 3),
            dx["initial.start"],
            dx["initial.now"],
        )
        gather(problem, dx, dq, dk)


KERNELS = (LatticeChunk(),)
