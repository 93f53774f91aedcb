"""The adjoint of exact Lattice, token by token from the last to the first; notation of ``lattice``.

With ``G = dL/ds'``, ``γ = ⟨s', G⟩``, ``D = dL/ds̃ = (G − γ s') / n``, and c, w, n from now on in units of m,
D in units of 1/m:

    da = −c ⟨D,s⟩ (− dz if encoding)     dc = (⟨D,h⟩ − a ⟨D,s⟩) / m     dz = beta dc     dbeta = z dc
    dh = Σ_i (c_i D_i + da_i s_i)        ds_i = w_i D_i + da_i h + k_i dp                dμ = Σ ⟨D,s⟩ / m
    decoding: dp = −dh, dk_i += ⟨s_i, dp⟩

Only row dots touch the matrices, so a token is one sweep over carry and s, a block of rows at a time: the dots, the
algebra of its slots, then the new carry and the block's part of dh. What needs dp waits for the next sweep, when it is
known. The states of a segment of ``spacing`` tokens are computed once more from its kept state and stay in scratch,
with what was measured of every slot.
"""

import numpy as np

from .compile import Flag, In, Index, Int, Out, Real, device, kernel, leaf
from .lattice_slots import (
    BETA,
    DECODING,
    ENCODING,
    IM,
    INV,
    KEY,
    PASS,
    RECORD,
    A,
    C,
    F,
    M,
    R,
    W,
    Z,
    advance,
    cut_empty,
    fetch_strengths,
    measure,
    predict,
    residual,
)
from .layout import checkpoint_row, kept_row, padded, scratch, span, zeroed
from .simd import NARROW, PAIR, fma, lanes, load, mul, splat, store, store_totals, sub, total, zeros
from .tiles import accumulate, add_tile, deposit, deposit_tile, dot, fetch, fetch_tile, fill, foresee

# Vectors of slots in a backward token. The key of the token that came after waits in PENDING: its ``k dp`` is not added
# to the carry before the next sweep. CH to SP are dots; A to D and HA, HB weights of ``merge``; then gradients.
PENDING, CH, SY, CS, SP, WA, WP, WS, WH, WY, HA, HS, DQ, DK, DBETA, LATE, WORK = range(17)


@leaf
def cross(s, at, ld, first, last, carry, h, dy, dp, work, kp):
    """Row dots ``⟨carry,h⟩``, ``⟨s,dy⟩``, ``⟨carry,s⟩``, ``⟨s,dp⟩``; rows come in fours."""
    step = lanes(s, NARROW)
    for i in range(first, last, 4):
        i0 = i * ld
        i1 = i0 + ld
        i2 = i1 + ld
        i3 = i2 + ld
        a0 = zeros(s, NARROW)
        a1 = a0
        a2 = a0
        a3 = a0
        b0 = a0
        b1 = a0
        b2 = a0
        b3 = a0
        c0 = a0
        c1 = a0
        c2 = a0
        c3 = a0
        d0 = a0
        d1 = a0
        d2 = a0
        d3 = a0
        for j in range(0, ld, step):
            u = load(h, j, NARROW)
            g = load(dy, j, NARROW)
            o = load(dp, j, NARROW)
            x = load(s, at + i0 + j, NARROW)
            y = load(carry, i0 + j, NARROW)
            a0 = fma(y, u, a0)
            b0 = fma(x, g, b0)
            c0 = fma(x, y, c0)
            d0 = fma(x, o, d0)
            x = load(s, at + i1 + j, NARROW)
            y = load(carry, i1 + j, NARROW)
            a1 = fma(y, u, a1)
            b1 = fma(x, g, b1)
            c1 = fma(x, y, c1)
            d1 = fma(x, o, d1)
            x = load(s, at + i2 + j, NARROW)
            y = load(carry, i2 + j, NARROW)
            a2 = fma(y, u, a2)
            b2 = fma(x, g, b2)
            c2 = fma(x, y, c2)
            d2 = fma(x, o, d2)
            x = load(s, at + i3 + j, NARROW)
            y = load(carry, i3 + j, NARROW)
            a3 = fma(y, u, a3)
            b3 = fma(x, g, b3)
            c3 = fma(x, y, c3)
            d3 = fma(x, o, d3)
        store_totals(work, CH * kp + i, a0, a1, a2, a3)
        store_totals(work, SY * kp + i, b0, b1, b2, b3)
        store_totals(work, CS * kp + i, c0, c1, c2, c3)
        store_totals(work, SP * kp + i, d0, d1, d2, d3)


def _merge(width):
    """One panel of columns of ``merge``."""

    @leaf
    def panel(s, at, ld, first, last, carry, h, dy, dp, work, kp, out, left, right):
        j = left
        while j < right:
            u = load(h, j, width)
            g = load(dy, j, width)
            o = load(dp, j, width)
            acc = load(out, j, width)
            for i in range(first, last):
                y = load(carry, i * ld + j, width)
                x = load(s, at + i * ld + j, width)
                acc = fma(splat(s, work[HA * kp + i], width), y, acc)
                acc = fma(splat(s, work[HS * kp + i], width), x, acc)
                y = mul(splat(s, work[WA * kp + i], width), y)
                y = fma(splat(s, work[WP * kp + i], width), o, y)
                y = fma(splat(s, work[WS * kp + i], width), x, y)
                y = fma(splat(s, work[WH * kp + i], width), u, y)
                store(carry, i * ld + j, fma(splat(s, work[WY * kp + i], width), g, y))
            store(out, j, acc)
            j += lanes(s, width)

    return panel


_merge_half = _merge(PAIR)
_merge_narrow = _merge(NARROW)


@leaf
def merge(s, at, ld, first, last, carry, h, dy, dp, work, kp, out):
    """The new carry of some rows, and what they and s add to dh (``out``)."""
    whole = ld // lanes(s, PAIR) * lanes(s, PAIR)
    _merge_half(s, at, ld, first, last, carry, h, dy, dp, work, kp, out, 0, whole)
    _merge_narrow(s, at, ld, first, last, carry, h, dy, dp, work, kp, out, whole, ld)


@leaf
def unweigh(record, at, kp, i, work, query, scale, hh, hdy, hdp, flags, sums):
    """The algebra of a token's adjoint, for one vector of slots (see the module's docstring).

    Fills the weights of ``merge``, dq, dk, dbeta, and what was late in the dk of the token after; adds to ``sums`` the
    weights of dy, h and dp in dh, and dμ.
    """
    encoding, decoding, read_norm = flags
    dot_y = splat(record, hdy, NARROW)
    factor = splat(record, scale, NARROW)
    nought = zeros(record, NARROW)
    step = lanes(record, NARROW)
    f = load(record, at + F * kp + i, NARROW)
    a = load(record, at + A * kp + i, NARROW)
    r = load(record, at + R * kp + i, NARROW)
    w = load(record, at + W * kp + i, NARROW)
    c = load(record, at + C * kp + i, NARROW)
    inv = load(record, at + INV * kp + i, NARROW)
    over = load(record, at + IM * kp + i, NARROW)
    pending = load(work, PENDING * kp + i, NARROW)
    sp = mul(f, load(work, SP * kp + i, NARROW))
    sy = mul(f, load(work, SY * kp + i, NARROW))
    hp = splat(record, hdp, NARROW)
    gs = fma(pending, sp, mul(f, load(work, CS * kp + i, NARROW)))
    gh = fma(pending, hp, load(work, CH * kp + i, NARROW))
    sq = mul(factor, load(query, i, NARROW))
    grown = load(record, at + M * kp + i, NARROW)
    if read_norm:
        gs = fma(sq, sy, gs)
        gh = fma(sq, dot_y, gh)
        grown = inv
    # D = inv (carry + ...) + e dy − x (w s + c h)
    e = mul(grown, sq)
    x = mul(mul(inv, inv), mul(inv, fma(w, gs, mul(c, gh))))
    ds = sub(mul(inv, gs), mul(x, fma(w, r, mul(c, a))))
    dh = sub(mul(inv, gh), mul(x, fma(w, a, mul(c, splat(record, hh, NARROW)))))
    if not read_norm:
        ds = fma(e, sy, ds)
        dh = fma(e, dot_y, dh)
    dc = mul(over, sub(dh, mul(ds, a)))
    dz = mul(load(record, at + BETA * kp + i, NARROW), dc)
    da = sub(nought, mul(c, ds))
    if encoding:
        da = sub(da, dz)
    ci = mul(c, inv)
    wi = mul(w, inv)
    wx = mul(w, x)
    side = sub(da, mul(c, wx))
    store(work, LATE * kp + i, mul(inv, fma(w, sp, mul(c, hp))))
    store(work, DQ * kp + i, mul(mul(factor, grown), fma(w, sy, mul(c, dot_y))))
    store(work, DK * kp + i, dz)
    store(work, DBETA * kp + i, mul(load(record, at + Z * kp + i, NARROW), dc))
    store(work, HA * kp + i, ci)
    store(work, HS * kp + i, mul(f, side))
    store(work, WA * kp + i, wi)
    store(work, WP * kp + i, mul(wi, pending))
    store(work, WS * kp + i, sub(nought, mul(f, mul(w, wx))))
    store(work, WH * kp + i, side)
    store(work, WY * kp + i, mul(w, e))
    if decoding:
        store(work, PENDING * kp + i, load(record, at + KEY * kp + i, NARROW))
    store(sums, 0, fma(c, e, load(sums, 0, NARROW)))
    store(sums, step, sub(load(sums, step, NARROW), mul(mul(c, c), x)))
    store(sums, 2 * step, fma(ci, pending, load(sums, 2 * step, NARROW)))
    store(sums, 3 * step, fma(over, ds, load(sums, 3 * step, NARROW)))


@leaf
def retreat_carefully(
    record, at, to, kp, s, tile, post, ld, carry, h, dy, dp, work, query, scale, flags, directions, out, sums
):
    """``cross``, ``unweigh`` and ``merge`` of a token that took care, row by row and term by term."""
    encoding, decoding, read_norm = flags
    step = lanes(s, NARROW)
    zero = s.dtype.type(0)
    one = s.dtype.type(1)
    for i in range(directions.shape[0]):
        row = i * ld
        c = record[at + C * kp + i]
        inv = record[at + INV * kp + i]
        sq = scale * query[i]
        grown = record[at + M * kp + i]
        size = grown / inv if inv > 0 else zero  # n
        old = splat(s, record[at + F * kp + i], NARROW)
        new = splat(s, record[to + F * kp + i], NARROW)
        pending = splat(s, work[PENDING * kp + i], NARROW)
        read = splat(s, sq if read_norm else zero, NARROW)
        raw = splat(s, zero if read_norm else sq * grown, NARROW)
        along = splat(s, -record[at + A * kp + i], NARROW)
        over = splat(s, inv, NARROW)
        g0 = zeros(s, NARROW)
        y0 = g0
        p0 = g0
        for j in range(0, ld, step):
            x = mul(new, load(s, post + row + j, NARROW))
            g = load(dy, j, NARROW)
            o = load(dp, j, NARROW)
            z = fma(read, g, fma(pending, o, load(carry, row + j, NARROW)))
            store(carry, row + j, z)
            g0 = fma(x, z, g0)
            y0 = fma(x, g, y0)
            p0 = fma(x, o, p0)
        less = splat(s, -total(g0), NARROW)
        s0 = zeros(s, NARROW)
        h0 = s0
        for j in range(0, ld, step):
            x = mul(new, load(s, post + row + j, NARROW))
            d = fma(raw, load(dy, j, NARROW), mul(over, fma(less, x, load(carry, row + j, NARROW))))
            store(carry, row + j, d)
            x = mul(old, load(s, tile + row + j, NARROW))
            s0 = fma(d, x, s0)
            h0 = fma(d, fma(along, x, load(h, j, NARROW)), h0)
        ds = total(s0)
        dc = total(h0) * record[at + IM * kp + i]
        dz = dc * record[at + BETA * kp + i]
        da = -c * ds - (dz if encoding else zero)
        work[LATE * kp + i] = total(p0)
        work[DQ * kp + i] = scale * total(y0) * (one if read_norm else size)
        work[DK * kp + i] = dz
        work[DBETA * kp + i] = dc * record[at + Z * kp + i]
        if decoding:
            work[PENDING * kp + i] = record[at + KEY * kp + i]
        sums[3 * step] += ds * record[at + IM * kp + i]
        keep = splat(s, record[at + W * kp + i], NARROW)
        write = splat(s, c, NARROW)
        turned = splat(s, da, NARROW)
        for j in range(0, ld, step):
            d = load(carry, row + j, NARROW)
            x = mul(old, load(s, tile + row + j, NARROW))
            store(out, j, fma(turned, x, fma(write, d, load(out, j, NARROW))))
            store(carry, row + j, fma(turned, load(h, j, NARROW), mul(keep, d)))


@device
def _backward_head(
    q, k, v, beta, log_decay, initial, directions, objective, read_norm, scale, spacing, every, kept,
    dy, dfinal, dcheckpoint, dq, dk, dv, dbeta, dlog_decay, dinitial,
):  # fmt: skip
    """One sequence and head; shapes as in ``_forward_head``, gradients as what they belong to."""
    count = directions.shape[0]
    kp = padded(count, v)
    ld = padded(v.shape[1], v)
    rows = (count + 3) // 4 * 4
    carry = zeroed(rows * ld, v)
    if dfinal.shape[0]:
        fetch_tile(dfinal, carry, ld)
    s = zeroed((spacing + 1) * rows * ld, v)
    record = zeroed((spacing + 1) * RECORD * kp, v)
    hs = zeroed(spacing * ld, v)
    squares = scratch(spacing, v)
    mus = scratch(spacing, v)
    careful = np.zeros(spacing, np.bool_)
    slots = zeroed((PASS + WORK + 2) * kp, v)
    coef = slots[: PASS * kp]
    work = slots[PASS * kp : (PASS + WORK) * kp]
    query = slots[(PASS + WORK) * kp : (PASS + WORK + 1) * kp]
    follow = slots[(PASS + WORK + 1) * kp :]
    values = zeroed(4 * ld, v)
    p = values[:ld]
    g = values[ld : 2 * ld]
    dh = values[2 * ld : 3 * ld]
    dp = values[3 * ld :]
    sums = scratch(4 * lanes(v, NARROW), v)
    _backward_tokens(
        q, k, v, beta, log_decay, directions, objective, read_norm, scale, spacing, every, kept, dy, dcheckpoint,
        dq, dk, dv, dbeta, dlog_decay, carry, s, record, hs, squares, mus, careful, coef,
        work, query, follow, p, g, dh, dp, sums,
    )  # fmt: skip
    deposit_tile(carry, dinitial, ld)
    if v.shape[0]:
        cut_empty(initial, dinitial)


@leaf
def _recompute(
    first, length, k, v, beta, log_decay, directions, objective, read_norm, kept,
    s, record, hs, squares, mus, careful, coef, follow, p,
):  # fmt: skip
    """The states of a segment, from its kept one, and what was measured of its tokens."""
    tokens, width = v.shape
    count = directions.shape[0]
    kp = padded(count, v)
    ld = padded(width, v)
    tile = (count + 3) // 4 * 4 * ld
    block = RECORD * kp
    decoding = objective == DECODING
    flags = (objective == ENCODING, read_norm, False, True)
    fetch_tile(kept, s, ld)
    fill(record, F * kp, kp, 1)
    fetch(k[first], record, KEY * kp)
    if decoding:
        predict(s, 0, ld, count, record, KEY * kp, p)
    for u in range(length):
        t = first + u
        fetch(k[min(t + 1, tokens - 1)], follow, 0)
        fetch_strengths(beta[t], record, u * block, kp, count)
        foresee(k[min(t + 2, tokens - 1)])
        foresee(v[min(t + 1, tokens - 1)])
        mus[u] = np.exp(log_decay[t]) if log_decay.shape[0] else v.dtype.type(1)
        h = hs[u * ld :]
        if not decoding:
            fill(p, 0, ld, 0)
        squares[u] = residual(v[t], p, h, ld)
        careful[u] = advance(
            record, u * block, (u + 1) * block, kp, s, u * tile, (u + 1) * tile, ld, directions,
            h, squares[u], mus[u], follow, follow, 1, coef, p, p, flags,
        )  # fmt: skip
        for i in range(0, kp, lanes(s, NARROW)):
            store(record, (u + 1) * block + KEY * kp + i, load(follow, i, NARROW))


@leaf
def _backward_tokens(
    q, k, v, beta, log_decay, directions, objective, read_norm, scale, spacing, every, kept, dy, dcheckpoint,
    dq, dk, dv, dbeta, dlog_decay, carry, s, record, hs, squares, mus, careful, coef,
    work, query, follow, p, g, dh, dp, sums,
):  # fmt: skip
    """The loop of ``_backward_head``, in its scratch."""
    tokens, width = v.shape
    count = directions.shape[0]
    kp = padded(count, v)
    ld = padded(width, v)
    rows = (count + 3) // 4 * 4
    tile = rows * ld
    decoding = objective == DECODING
    flags = (objective == ENCODING, decoding, read_norm)
    zero = v.dtype.type(0)
    step = lanes(s, NARROW)
    for segment in range((tokens + spacing - 1) // spacing - 1, -1, -1):
        first = segment * spacing
        length = min(spacing, tokens - first)
        _recompute(
            first, length, k, v, beta, log_decay, directions, objective, read_norm, kept[segment],
            s, record, hs, squares, mus, careful, coef, follow, p,
        )  # fmt: skip
        for u in range(length - 1, -1, -1):
            t = first + u
            at = u * RECORD * kp
            h = hs[u * ld :]
            if dcheckpoint.shape[0] and (t + 1) % every == 0:
                add_tile(dcheckpoint[(t + 1) // every - 1], carry, ld)
            if dy.shape[0]:
                fetch(dy[t], g, 0)
                foresee(dy[max(t - 1, 0)])
            foresee(q[max(t - 1, 0)])
            fetch(q[t], query, 0)
            fill(sums, 0, 4 * step, 0)
            fill(dh, 0, ld, 0)
            if careful[u]:
                retreat_carefully(
                    record, at, at + RECORD * kp, kp, s, u * tile, (u + 1) * tile, ld, carry, h, g, dp, work, query,
                    scale, flags, directions, dh, sums,
                )  # fmt: skip
            else:
                hdy = dot(h, g, ld)
                hdp = dot(h, dp, ld)
                for i in range(0, kp, step):
                    cross(s, u * tile, ld, i, min(i + step, rows), carry, h, g, dp, work, kp)
                    unweigh(record, at, kp, i, work, query, scale, squares[u], hdy, hdp, flags, sums)
                    merge(s, u * tile, ld, i, min(i + step, count), carry, h, g, dp, work, kp, dh)
            if decoding and t + 1 < tokens:
                accumulate(work, LATE * kp, dk[t + 1])
            of_y = splat(s, total(load(sums, 0, NARROW)), NARROW)
            of_h = splat(s, total(load(sums, step, NARROW)), NARROW)
            of_p = splat(s, total(load(sums, 2 * step, NARROW)), NARROW)
            dmu = total(load(sums, 3 * step, NARROW))
            sign = splat(s, -1 if decoding else 0, NARROW)
            for j in range(0, ld, step):
                x = fma(of_y, load(g, j, NARROW), load(dh, j, NARROW))
                x = fma(of_h, load(h, j, NARROW), fma(of_p, load(dp, j, NARROW), x))
                store(dh, j, x)
                store(dp, j, mul(sign, x))
            deposit(dh, 0, dv[t])
            deposit(work, DQ * kp, dq[t])
            deposit(work, DK * kp, dk[t])
            if dbeta.shape[1] == 1:
                x = zero
                for i in range(count):
                    x += work[DBETA * kp + i]
                dbeta[t, 0] = x
            else:
                deposit(work, DBETA * kp, dbeta[t])
            if dlog_decay.shape[0]:
                dlog_decay[t] = mus[u] * dmu if mus[u] > 0 else zero
    if decoding and tokens:  # the first token's own prediction
        measure(s, 0, ld, rows, dp, work, LATE * kp, SP * kp)
        accumulate(work, LATE * kp, dk[0])
        for i in range(count):
            key = splat(s, work[PENDING * kp + i], NARROW)
            for j in range(0, ld, step):
                store(carry, i * ld + j, fma(key, load(dp, j, NARROW), load(carry, i * ld + j, NARROW)))


@kernel
def backward(
    begin: Int,
    end: Int,
    q: In[4],
    k: In[4],
    v: In[4],
    beta: In[4],
    log_decay: In[3],
    initial: In[4],
    directions: In[2],
    offsets: Index[1],
    objective: Int,
    read_norm: Flag,
    scale: Real,
    spacing: Int,
    every: Int,
    kept: In[4],
    dy: In[4],
    dfinal: In[4],
    dcheckpoint: In[4],
    dq: Out[4],
    dk: Out[4],
    dv: Out[4],
    dbeta: Out[4],
    dlog_decay: Out[3],
    dinitial: Out[4],
):
    tokens = v.shape[1]
    heads = v.shape[2]
    group = heads // max(1, k.shape[2])
    for item in range(begin, end):
        n = item // heads
        head = item % heads
        row, first, last = span(n, tokens, offsets)
        mine = checkpoint_row(n, tokens, every, offsets) if every else 0
        start = kept_row(n, first, tokens, spacing, offsets)
        _backward_head(
            q[row, first:last, head // group],
            k[row, first:last, head // group],
            v[row, first:last, head],
            beta[row, first:last, head],
            log_decay[row, first:last, head] if log_decay.shape[0] else log_decay[:0, 0, 0],
            initial[n, head],
            directions,
            objective,
            read_norm,
            scale,
            spacing,
            every,
            kept[start:, head],
            dy[row, first:last, head] if dy.shape[0] else dy[:0, 0, 0],
            dfinal[n, head] if dfinal.shape[0] else dfinal[:0, 0, 0],
            dcheckpoint[mine:, head] if dcheckpoint.shape[0] else dcheckpoint[:0, 0],
            dq[row, first:last, head],
            dk[row, first:last, head],
            dv[row, first:last, head],
            dbeta[row, first:last, head],
            dlog_decay[row, first:last, head] if dlog_decay.shape[0] else dlog_decay[:0, 0, 0],
            dinitial[n, head],
        )
