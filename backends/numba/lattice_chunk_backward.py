"""The adjoint of chunked Lattice; notation of ``lattice_chunk``.

With ``D = dL/dS̃`` of one token from the next, ``s' = S̃/ρ``, q̂ = scale q/ρ:

    D_t = μ_{t+1} D_{t+1} + q̂ (dy − s' ⟨s',dy⟩)     dq = scale ⟨s', dy⟩      dμ = Σ ⟨D, S̃_{t-1}⟩
    dE = ⟨D,h⟩ − A ⟨D,φ⟩     dA = −E ⟨D,φ⟩ (− dZ if encoding)     dbeta = Z dE     dZ = beta dE     dk = dZ
    dh = Eᵀ D + dA Φ         dΦ = dAᵀ Hm − Σ_t (E A)_t ∘ D_t     decoding: dk −= Φ dh, dΦ −= Kᵀ dh

and at a chunk's end, with G = dΦ + μ D of the next chunk, ``D = (G − s' ⟨s', G⟩) / ρ``. The running slots of a segment
of ``spacing`` tokens (whole chunks) are computed once more from its first slots and stay in scratch.
"""

import numpy as np

from .compile import Count, Flag, In, Index, Int, Out, Real, device, kernel, leaf
from .lattice_chunk_slots import (
    BETA,
    DBETA,
    DH,
    DP,
    DQ,
    DS,
    EA,
    INV,
    QUERY,
    READ,
    RECORD,
    SY,
    TAU,
    WORK,
    E,
    Z,
    advance,
    prepare,
    unit_rows,
)
from .lattice_slots import DECODING, ENCODING, adopt_rows, cut_empty
from .layout import checkpoint_row, kept_row, padded, scratch, span, zeroed
from .matmul import matmul, matmul_ta, matmul_tb
from .simd import NARROW, add, fma, lanes, load, mul, splat, store, store_totals, sub, total, zeros
from .tiles import add_tile, deposit, deposit_tile, fetch, fetch_tile, fill, foresee


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
        cut_empty(start, dfirst_start)
        cut_empty(now, dfirst_now)


@kernel
def backward(
    begin: Int,
    end: Int,
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
    for item in range(begin, end):
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
