"""Lattice, exact (``chunk_size=1``): one pass over the slots to measure a token, one to turn them.

    z = k (decoding, similarity) or k − a (encoding)         a_i = ⟨s_i, h⟩      r_i = ⟨s_i, s_i⟩
    h = v − Sᵀk (decoding) or v                              c_i = beta_i z_i    w_i = μ − c_i a_i
    s̃_i = w_i s_i + c_i h     n_i = ‖s̃_i‖     s'_i = s̃_i / n_i     y = scale · S'ᵀ q   (or S̃ᵀ q)

A row is stored as ``s_i = f_i ŝ_i`` with a number f a slot, so that turning it costs one multiply-add an element:
``ŝ'_i = ŝ_i + (c_i / (w_i f_i)) h``, ``f'_i = w_i f_i / n_i``; rows are rescaled where f leaves its range. The pass
that turns the rows also reads them (y) and predicts the next token (p = S'ᵀ k').

Norms. ``n² = w² r + 2 w c a + c² ‖h‖²`` with the measured r. The coefficients are first divided by
``m = max(|w|, |c| ‖h‖)``, for μ² may underflow where μ does not. Where the three terms cancel, the token is done over
term by term and its rows are measured; what remains of a row that cancels to rounding noise counts as zero, and a row
of zeros becomes its first direction.

Backward. With ``G = dL/ds'``, ``γ = ⟨s', G⟩``, ``D = dL/ds̃ = (G − γ s') / n``, and c, w, n from now on in units of m,
D in units of 1/m:

    da = −c ⟨D,s⟩ (− dz if encoding)     dc = (⟨D,h⟩ − a ⟨D,s⟩) / m     dz = beta dc     dbeta = z dc
    dh = Σ_i (c_i D_i + da_i s_i)        ds_i = w_i D_i + da_i h + k_i dp                dμ = Σ ⟨D,s⟩ / m
    decoding: dp = −dh, dk_i += ⟨s_i, dp⟩

Only row dots touch the matrices, so a token is one sweep over carry and s, a block of rows at a time: the dots, the
algebra of its slots, then the new carry and the block's part of dh. What needs dp waits for the next sweep, when it is
known. The states of a segment of ``spacing`` tokens are computed once more from its kept state and stay in scratch,
with what was measured of every slot.

    q, k [B,T,G,K]   v, y [B,T,H,V]   beta [B,T,H,K or 1]   log_decay [B,T,H] or empty   states [N,H,K,V]
    kept [R,H,K,V]   checkpoints [B·P,H,K,V] or empty
"""

from typing import Any

import numpy as np
from numba import njit, prange

from mixers.algebra import unit_directions
from mixers.backend import Config, Support
from mixers.problem import Arrays, Problem
from mixers.spec import Array

from .compile import FASTMATH, Flag, In, Index, Int, Out, Real, device, kernel
from .kernel import NumbaKernel
from .layout import checkpoint_row, kept_row, padded, scratch, span, zeroed
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
    prefetch,
    splat,
    sqrt,
    store,
    store_totals,
    sub,
    total,
    zeros,
)

DECODING, ENCODING, SIMILARITY = 0, 1, 2
OBJECTIVES = {"decoding": DECODING, "encoding": ENCODING, "similarity": SIMILARITY}

# What is known of a token, a vector of slots each: F factors of the stored rows, then what was measured (A, R) and the
# coefficients (Z, W, C in units of M, INV = 1/n or 0 for a row of zeros), keys, strengths.
F, A, R, Z, W, C, M, IM, INV, KEY, BETA, RECORD = range(12)

# Coefficients of a pass: GAIN of h, CQ of the read, CK of the prediction; ALPHA rescales a row.
GAIN, CQ, CK, ALPHA, PASS = range(5)

HALF = 2 * NARROW

# Functions that allocate nothing, and so need not count references: the atomic counts would cost a third of a token.
leaf = njit(fastmath=FASTMATH, error_model="numpy", nogil=True, _nrt=False)

FAR = 2.0**30  # factors of stored rows stay below this, and above its inverse
CANCELS = 1 / 16  # of the terms of n²: less than that, and the row is measured


# --------------------------------------------------------------------------------------------- rows and vectors


@leaf
def fetch(row, vector, at):
    """Copy a row of any stride into ``vector[at:]``."""
    n = row.shape[0]
    first = 0
    if row.strides[0] == row.itemsize:
        step = lanes(vector, NARROW)
        first = n // step * step
        for j in range(0, first, step):
            store(vector, at + j, load(row, j, NARROW))
    for j in range(first, n):
        vector[at + j] = row[j]


@leaf
def foresee(row):
    """Ask for a row that the next token will read."""
    line = 64 // row.itemsize
    if row.strides[0] == row.itemsize:
        for j in range(0, row.shape[0], line):
            prefetch(row, j)


@leaf
def deposit(vector, at, row):
    """Copy ``vector[at:]`` into a contiguous row."""
    n = row.shape[0]
    step = lanes(vector, NARROW)
    first = n // step * step
    for j in range(0, first, step):
        store(row, j, load(vector, at + j, NARROW))
    for j in range(first, n):
        row[j] = vector[at + j]


@leaf
def fetch_tile(source, tile, ld):
    """Copy ``source [rows, columns]`` of any layout into ``tile``."""
    for i in range(source.shape[0]):
        fetch(source[i], tile, i * ld)


@leaf
def deposit_tile(tile, target, ld):
    """Copy ``tile`` into a contiguous ``target [rows, columns]``."""
    for i in range(target.shape[0]):
        deposit(tile, i * ld, target[i])


@leaf
def accumulate(vector, at, row):
    """Add ``vector[at:]`` to a contiguous row."""
    n = row.shape[0]
    step = lanes(vector, NARROW)
    first = n // step * step
    for j in range(0, first, step):
        store(row, j, add(load(row, j, NARROW), load(vector, at + j, NARROW)))
    for j in range(first, n):
        row[j] += vector[at + j]


@leaf
def fill(vector, at, count, value):
    """``vector[at : at + count] = value``, whole hardware vectors."""
    x = splat(vector, value, NARROW)
    for j in range(0, count, lanes(vector, NARROW)):
        store(vector, at + j, x)


@leaf
def dot(x, y, count):
    """The dot product of two padded vectors."""
    acc = zeros(x, NARROW)
    for j in range(0, count, lanes(x, NARROW)):
        acc = fma(load(x, j, NARROW), load(y, j, NARROW), acc)
    return total(acc)


@leaf
def adopt_rows(tile, ld, directions):
    """Rows of zeros become their first directions."""
    rows, columns = directions.shape
    for i in range(rows):
        empty = True
        for j in range(columns):
            if tile[i * ld + j] != 0:
                empty = False
                break
        if empty:
            for j in range(columns):
                tile[i * ld + j] = directions[i, j]


@leaf
def add_tile(source, tile, ld):
    """Add ``source [rows, columns]`` of any layout to ``tile``."""
    rows, columns = source.shape
    for i in range(rows):
        for j in range(columns):
            tile[i * ld + j] += source[i, j]


@leaf
def normalise(tile, at, ld, rows, factors, f):
    """Divide rows by their norms, with the sign of their factors, which become 1."""
    step = lanes(tile, NARROW)
    for i in range(rows):
        row = at + i * ld
        acc = zeros(tile, NARROW)
        for j in range(0, ld, step):
            x = load(tile, row + j, NARROW)
            acc = fma(x, x, acc)
        by = factors[f + i] / abs(factors[f + i]) / np.sqrt(total(acc))
        for j in range(0, ld, step):
            store(tile, row + j, mul(splat(tile, by, NARROW), load(tile, row + j, NARROW)))
        factors[f + i] = 1


# --------------------------------------------------------------------------------------------- passes over the slots


@leaf
def predict(s, at, ld, rows, weights, w, p):
    """``p = Σ_i weights[w + i] s_i``."""
    for j in range(0, ld, lanes(s, NARROW)):
        acc = zeros(s, NARROW)
        for i in range(rows):
            acc = fma(splat(s, weights[w + i], NARROW), load(s, at + i * ld + j, NARROW), acc)
        store(p, j, acc)


@leaf
def measure(s, at, ld, rows, h, record, a, r):
    """``record[a + i] = ⟨s_i, h⟩``, ``record[r + i] = ⟨s_i, s_i⟩``; rows come in fours."""
    step = lanes(s, NARROW)
    for i in range(0, rows, 4):
        i0 = at + i * ld
        i1 = i0 + ld
        i2 = i1 + ld
        i3 = i2 + ld
        a0 = zeros(s, NARROW)
        a1 = a0
        a2 = a0
        a3 = a0
        r0 = a0
        r1 = a0
        r2 = a0
        r3 = a0
        for j in range(0, ld, step):
            y = load(h, j, NARROW)
            x0 = load(s, i0 + j, NARROW)
            x1 = load(s, i1 + j, NARROW)
            x2 = load(s, i2 + j, NARROW)
            x3 = load(s, i3 + j, NARROW)
            a0 = fma(x0, y, a0)
            a1 = fma(x1, y, a1)
            a2 = fma(x2, y, a2)
            a3 = fma(x3, y, a3)
            r0 = fma(x0, x0, r0)
            r1 = fma(x1, x1, r1)
            r2 = fma(x2, x2, r2)
            r3 = fma(x3, x3, r3)
        store_totals(record, a + i, a0, a1, a2, a3)
        store_totals(record, r + i, r0, r1, r2, r3)


def _turn(width):
    """Turn one panel of columns: ``s[to] = s[at] + gain h``, and weighted sums of the new rows."""

    @leaf
    def one(s, at, to, ld, rows, h, coef, gain, c, y, first, last):
        j = first
        while j < last:
            x = load(h, j, width)
            acc = zeros(s, width)
            for i in range(rows):
                row = fma(splat(s, coef[gain + i], width), x, load(s, at + i * ld + j, width))
                store(s, to + i * ld + j, row)
                acc = fma(splat(s, coef[c + i], width), row, acc)
            store(y, j, acc)
            j += lanes(s, width)

    @leaf
    def two(s, at, to, ld, rows, h, coef, gain, c, y, d, p, first, last):
        j = first
        while j < last:
            x = load(h, j, width)
            acc = zeros(s, width)
            bcc = acc
            for i in range(rows):
                row = fma(splat(s, coef[gain + i], width), x, load(s, at + i * ld + j, width))
                store(s, to + i * ld + j, row)
                acc = fma(splat(s, coef[c + i], width), row, acc)
                bcc = fma(splat(s, coef[d + i], width), row, bcc)
            store(y, j, acc)
            store(p, j, bcc)
            j += lanes(s, width)

    return one, two


# Panels of two hardware vectors run at the peak; with four, loads and stores get in the way.
_turn_half, _turn_half_twice = _turn(HALF)
_turn_narrow, _turn_narrow_twice = _turn(NARROW)


@leaf
def turn(s, at, to, ld, rows, h, coef, gain, c, y):
    """Turn the rows and sum them with the weights ``coef[c:]``."""
    whole = ld // lanes(s, HALF) * lanes(s, HALF)
    _turn_half(s, at, to, ld, rows, h, coef, gain, c, y, 0, whole)
    _turn_narrow(s, at, to, ld, rows, h, coef, gain, c, y, whole, ld)


@leaf
def turn_twice(s, at, to, ld, rows, h, coef, gain, c, y, d, p):
    """Turn the rows and sum them with two sets of weights."""
    whole = ld // lanes(s, HALF) * lanes(s, HALF)
    _turn_half_twice(s, at, to, ld, rows, h, coef, gain, c, y, d, p, 0, whole)
    _turn_narrow_twice(s, at, to, ld, rows, h, coef, gain, c, y, d, p, whole, ld)


# --------------------------------------------------------------------------------------------- algebra a slot


@leaf
def weigh(record, at, kp, mu, hh, encoding):
    """From what was measured to the coefficients of a token; returns how many rows cancel, or vanish."""
    one = splat(record, 1, NARROW)
    nought = zeros(record, NARROW)
    two = splat(record, 2, NARROW)
    tiny = splat(record, np.finfo(record.dtype).tiny * 16, NARROW)
    part = splat(record, CANCELS, NARROW)
    decay = splat(record, mu, NARROW)
    square_h = splat(record, hh, NARROW)
    norm_h = sqrt(square_h)
    odd = nought
    for i in range(at, at + kp, lanes(record, NARROW)):
        f = load(record, i + F * kp, NARROW)
        a = mul(f, load(record, i + A * kp, NARROW))
        r = mul(mul(f, f), load(record, i + R * kp, NARROW))
        z = load(record, i + KEY * kp, NARROW)
        if encoding:
            z = sub(z, a)
        c = mul(load(record, i + BETA * kp, NARROW), z)
        w = sub(decay, mul(c, a))
        m = maximum(absolute(w), mul(absolute(c), norm_h))
        over = div(one, choose(m, tiny, one, m))
        odd = add(odd, choose(m, tiny, one, nought))
        w = mul(w, over)
        c = mul(c, over)
        terms = fma(mul(w, w), r, mul(mul(c, c), square_h))
        square = fma(mul(two, mul(w, c)), a, terms)
        odd = add(odd, choose(square, mul(part, terms), one, nought))
        store(record, i + A * kp, a)
        store(record, i + R * kp, r)
        store(record, i + Z * kp, z)
        store(record, i + W * kp, w)
        store(record, i + C * kp, c)
        store(record, i + M * kp, m)
        store(record, i + IM * kp, over)
        store(record, i + INV * kp, div(one, sqrt(choose(nought, square, square, one))))
    return total(odd)


@leaf
def turn_carefully(
    record, at, to, kp, s, tile, target, ld, h, hh, mu, query, follow, scale, coef, read_norm, directions
):  # fmt: skip
    """A token some of whose rows cancel, term by term: ``s̃ = μ s + c (h − a s)``, divided by its measured norm.

    A row of zeros, or of rounding noise alone, becomes its first direction. The rows at ``target`` are the new ones,
    and the coefficients only read them.
    """
    eps = np.finfo(record.dtype).eps
    tiny = np.finfo(record.dtype).tiny * 16
    zero = record.dtype.type(0)
    one = record.dtype.type(1)
    rows, columns = directions.shape
    step = lanes(s, NARROW)
    for i in range(rows):
        w = record[at + W * kp + i]
        c = record[at + C * kp + i]
        small = record[at + M * kp + i] < tiny
        if small:  # w and c were left as they are
            record[at + M * kp + i] = one
        old = splat(s, record[at + F * kp + i], NARROW)
        along = splat(s, -record[at + A * kp + i], NARROW)
        keep = splat(s, mu * record[at + IM * kp + i], NARROW)
        write = splat(s, c, NARROW)
        acc = zeros(s, NARROW)
        for j in range(0, ld, step):
            x = mul(old, load(s, tile + i * ld + j, NARROW))
            x = fma(write, fma(along, x, load(h, j, NARROW)), mul(keep, x))
            store(s, target + i * ld + j, x)
            acc = fma(x, x, acc)
        square = total(acc)
        terms = w * w * record[at + R * kp + i] + c * c * hh
        inv = zero
        if small or square <= (4 * eps) * (4 * eps) * terms:
            for j in range(columns):
                s[target + i * ld + j] = directions[i, j]
        else:
            inv = 1 / np.sqrt(square)
            by = splat(s, inv, NARROW)
            for j in range(0, ld, step):
                store(s, target + i * ld + j, mul(by, load(s, target + i * ld + j, NARROW)))
        x = scale * query[i]
        if not read_norm:
            x *= record[at + M * kp + i] / inv if inv > 0 else zero
        record[at + INV * kp + i] = inv
        record[to + F * kp + i] = one
        coef[GAIN * kp + i] = zero
        coef[CQ * kp + i] = x
        coef[CK * kp + i] = follow[i]


@leaf
def plan_pass(record, at, to, kp, query, follow, scale, coef, read_norm):
    """Coefficients of the pass that turns the rows; returns how many factors would leave their range.

    ``query`` and ``follow`` are the query of this token and the key of the next.
    """
    far = splat(record, FAR, NARROW)
    near = splat(record, 1 / FAR, NARROW)
    one = splat(record, 1, NARROW)
    nought = zeros(record, NARROW)
    factor = splat(record, scale, NARROW)
    odd = nought
    for i in range(0, kp, lanes(record, NARROW)):
        inv = load(record, at + INV * kp + i, NARROW)
        wf = mul(load(record, at + W * kp + i, NARROW), load(record, at + F * kp + i, NARROW))
        f = mul(wf, inv)
        size = absolute(f)
        odd = add(odd, choose(size, near, one, choose(far, size, one, nought)))
        store(record, to + F * kp + i, f)
        store(coef, GAIN * kp + i, div(load(record, at + C * kp + i, NARROW), wf))
        x = mul(factor, load(query, i, NARROW))
        if not read_norm:
            x = mul(x, div(load(record, at + M * kp + i, NARROW), choose(nought, inv, inv, one)))
        store(coef, CQ * kp + i, mul(x, f))
        store(coef, CK * kp + i, mul(load(follow, i, NARROW), f))
    return total(odd)


@leaf
def rescale(record, at, to, kp, query, follow, scale, coef, read_norm, s, tile, target, ld, rows):
    """The pass in two steps, for factors out of range: rows times ``w f / n`` first, then ``c / n`` of h."""
    one = record.dtype.type(1)
    zero = record.dtype.type(0)
    for i in range(kp):
        inv = record[at + INV * kp + i]
        x = scale * query[i]
        if not read_norm:
            x *= record[at + M * kp + i] / inv if inv > 0 else zero
        coef[GAIN * kp + i] = record[at + C * kp + i] * inv
        coef[CQ * kp + i] = x
        coef[CK * kp + i] = follow[i]
        coef[ALPHA * kp + i] = record[to + F * kp + i]
        record[to + F * kp + i] = one
    for i in range(rows):
        by = splat(s, coef[ALPHA * kp + i], NARROW)
        for j in range(0, ld, lanes(s, NARROW)):
            store(s, target + i * ld + j, mul(by, load(s, tile + i * ld + j, NARROW)))


@leaf
def advance(record, at, to, kp, s, tile, target, ld, directions, h, hh, mu, query, follow, scale, coef, y, p, flags):
    """One token: rows at ``tile`` become the rows at ``target``; returns whether that took care.

    ``record[at:]`` holds F, KEY and BETA; the rest is filled in, and the factors after the token at ``record[to:]``.
    ``flags`` are (encoding, read_norm, reads, predicts): what y and p are wanted.
    """
    encoding, read_norm, reads, predicts = flags
    count = directions.shape[0]
    rows = (count + 3) // 4 * 4
    measure(s, tile, ld, rows, h, record, at + A * kp, at + R * kp)
    careful = weigh(record, at, kp, mu, hh, encoding) > 0
    source = tile
    if careful:
        turn_carefully(
            record, at, to, kp, s, tile, target, ld, h, hh, mu, query, follow, scale, coef, read_norm, directions
        )
        source = target
    elif plan_pass(record, at, to, kp, query, follow, scale, coef, read_norm) > 0:
        rescale(record, at, to, kp, query, follow, scale, coef, read_norm, s, tile, target, ld, rows)
        source = target
    if reads and predicts:
        turn_twice(s, source, target, ld, count, h, coef, GAIN * kp, CQ * kp, y, CK * kp, p)
    elif reads:
        turn(s, source, target, ld, count, h, coef, GAIN * kp, CQ * kp, y)
    else:
        turn(s, source, target, ld, count, h, coef, GAIN * kp, CK * kp, p)
    return careful


@leaf
def fetch_strengths(beta, record, at, kp, count):
    """The write strengths of one token, one for all slots or one each."""
    if beta.shape[0] == 1:
        fill(record, at + BETA * kp, kp, beta[0])
    else:
        fetch(beta, record, at + BETA * kp)


@leaf
def residual(v, p, h, ld):
    """``h = v − p``; returns ``⟨h, h⟩``."""
    fetch(v, h, 0)
    acc = zeros(h, NARROW)
    for j in range(0, ld, lanes(h, NARROW)):
        x = sub(load(h, j, NARROW), load(p, j, NARROW))
        store(h, j, x)
        acc = fma(x, x, acc)
    return total(acc)


# --------------------------------------------------------------------------------------------- forward


@leaf
def _forward_tokens(
    q, k, v, beta, log_decay, directions, objective, read_norm, scale, spacing, every, y, final, checkpoint, kept,
    s, record, coef, query, follow, h, p, out,
):  # fmt: skip
    """The loop of ``_forward_head``, in its scratch."""
    tokens, width = v.shape
    count = directions.shape[0]
    kp = padded(count, v)
    ld = padded(width, v)
    one = v.dtype.type(1)
    fill(record, F * kp, kp, 1)
    decoding = objective == DECODING
    flags = (objective == ENCODING, read_norm, True, decoding)
    fetch(k[0], follow, 0)
    if decoding:
        predict(s, 0, ld, count, follow, 0, p)
    for t in range(tokens):
        if kept.shape[0] and t % spacing == 0:
            if t:
                normalise(s, 0, ld, count, record, F * kp)
            deposit_tile(s, kept[t // spacing], ld)
        for i in range(0, kp, lanes(s, NARROW)):
            store(record, KEY * kp + i, load(follow, i, NARROW))
        fetch_strengths(beta[t], record, 0, kp, count)
        fetch(q[t], query, 0)
        if t + 2 < tokens:
            foresee(k[t + 2])
            foresee(q[t + 1])
            foresee(v[t + 1])
            foresee(y[t + 1])
        if decoding:
            fetch(k[min(t + 1, tokens - 1)], follow, 0)
        elif t + 1 < tokens:
            fetch(k[t + 1], follow, 0)
        mu = one
        if log_decay.shape[0]:
            mu = np.exp(log_decay[t])
        hh = residual(v[t], p, h, ld)
        advance(record, 0, 0, kp, s, 0, 0, ld, directions, h, hh, mu, query, follow, scale, coef, out, p, flags)
        deposit(out, 0, y[t])
        if every and (t + 1) % every == 0:
            normalise(s, 0, ld, count, record, F * kp)
            deposit_tile(s, checkpoint[(t + 1) // every - 1], ld)
    if final.shape[0]:
        normalise(s, 0, ld, count, record, F * kp)
        deposit_tile(s, final, ld)


@device
def _forward_head(
    q, k, v, beta, log_decay, initial, directions, objective, read_norm, scale, spacing, every,
    y, final, checkpoint, kept,
):  # fmt: skip
    """One sequence and head: q, k [T,K], v, y [T,V], beta [T,·], states [K,V], checkpoint and kept [·,K,V]."""
    tokens, width = v.shape
    count = initial.shape[0]
    kp = padded(count, v)
    ld = padded(width, v)
    rows = (count + 3) // 4 * 4
    s = zeroed(rows * ld, v)
    fetch_tile(initial, s, ld)
    if tokens == 0:
        if final.shape[0]:
            deposit_tile(s, final, ld)
        return
    adopt_rows(s, ld, directions)
    record = zeroed(RECORD * kp, v)
    coef = zeroed(PASS * kp, v)
    query = zeroed(kp, v)
    follow = zeroed(kp, v)
    h = zeroed(ld, v)
    p = zeroed(ld, v)
    out = zeroed(ld, v)
    _forward_tokens(
        q, k, v, beta, log_decay, directions, objective, read_norm, scale, spacing, every, y, final, checkpoint, kept,
        s, record, coef, query, follow, h, p, out,
    )  # fmt: skip


@kernel
def forward(
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
    y: Out[4],
    final: Out[4],
    checkpoint: Out[4],
    kept: Out[4],
):
    tokens = v.shape[1]
    heads = v.shape[2]
    group = heads // max(1, k.shape[2])
    for item in prange(initial.shape[0] * heads):
        n = item // heads
        head = item % heads
        row, first, last = span(n, tokens, offsets)
        mine = checkpoint_row(n, tokens, every, offsets) if every else 0
        start = kept_row(n, first, tokens, spacing, offsets)
        _forward_head(
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
            y[row, first:last, head],
            final[n, head] if final.shape[0] else y[0, :0, 0],
            checkpoint[mine:, head],
            kept[start:, head],
        )


# --------------------------------------------------------------------------------------------- backward

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


_merge_half = _merge(HALF)
_merge_narrow = _merge(NARROW)


@leaf
def merge(s, at, ld, first, last, carry, h, dy, dp, work, kp, out):
    """The new carry of some rows, and what they and s add to dh (``out``)."""
    whole = ld // lanes(s, HALF) * lanes(s, HALF)
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
        for i in range(count):
            empty = True
            for j in range(v.shape[1]):
                if initial[i, j] != 0:
                    empty = False
                    break
            if empty:
                dinitial[i, :] = 0


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
    for item in prange(initial.shape[0] * heads):
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


# --------------------------------------------------------------------------------------------- the kernel


def arguments(problem: Problem, x: Arrays) -> tuple[Any, ...]:
    """What both passes take: arrays with missing ones empty, then the options."""
    q, option = x["q"], problem.option
    beta = x["beta"]
    directions = unit_directions(problem.sizes.K, problem.sizes.V).astype(q.dtype)
    return (
        q,
        x["k"],
        x["v"],
        beta[..., None] if beta.ndim == 3 else beta,
        given(x.get("log_decay"), q, 3),
        directions,
        given(x.get("offsets"), np.empty(0, np.int64), 1),
        OBJECTIVES[option["objective"]],
        option["read_norm"],
        option["scale"],
        problem.spec.spacing(option),
        problem.flags.checkpoint_every,
    )


def given(array: Array, like: Array, ndim: int) -> Array:
    """The array, or an empty one where it is missing."""
    return np.empty((0,) + (1,) * (ndim - 1), like.dtype) if array is None else array


def rows_of(array: Array) -> Array:
    """Checkpoints ``[B,P,H,K,V]`` as ``[B·P,H,K,V]``; None stays None."""
    return None if array is None else array.reshape(array.shape[0] * array.shape[1], *array.shape[2:])


def blank_unused(problem: Problem, x: Arrays, out: Arrays, names: tuple[str, ...]) -> None:
    """Zeros in the checkpoint rows behind the last one of a pack."""
    every, offsets = problem.flags.checkpoint_every, x.get("offsets")
    if every and offsets is not None:
        used = int(np.sum(np.diff(offsets) // every))
        for name in names:
            rows_of(out[name])[used:] = 0


def grouped(problem: Problem, dx: Arrays) -> tuple[Array, Array]:
    """Where dq and dk go, a value head each: the gradients themselves, or partial sums of a group."""
    s = problem.sizes
    if s.G == s.H:
        return dx["q"], dx["k"]
    shape = (s.B, s.T, s.H, s.K)
    return np.empty(shape, dx["q"].dtype), np.empty(shape, dx["k"].dtype)


def gather(problem: Problem, dx: Arrays, dq: Array, dk: Array) -> None:
    """Sum the partial gradients of a group of value heads."""
    s = problem.sizes
    if s.G != s.H:
        shape = (s.B, s.T, s.G, s.H // s.G, s.K)
        np.sum(dq.reshape(shape), axis=3, out=dx["q"])
        np.sum(dk.reshape(shape), axis=3, out=dx["k"])


class LatticeRecurrent(NumbaKernel):
    """The exact recurrence, token by token."""

    name = "lattice.recurrent"
    form = "recurrent"
    mixers = frozenset({"lattice"})

    def takes(self, problem: Problem) -> Support:
        """Only the exact recurrence."""
        if problem.option["chunk_size"] != 1:
            return Support.no(f"runs chunk_size=1, and chunk_size is {problem.option['chunk_size']}")
        return Support.yes()

    def configs(self, problem: Problem) -> tuple[Config, ...]:
        """Nothing to choose."""
        return ({},)

    def forward(self, problem: Problem, config: Config, x: Arrays, out: Arrays) -> None:
        """See ``Kernel``."""
        q, k, v, beta, log_decay, *options = arguments(problem, x)
        blank_unused(problem, x, out, ("checkpoint.state",))
        forward(
            problem.work() / 2,
            *(q, k, v, beta, log_decay, x["initial.state"], *options, out["y"]),
            given(out.get("final.state"), q, 4),
            given(rows_of(out.get("checkpoint.state")), q, 4),
            given(out.get("kept.slots"), q, 4),
        )

    def backward(self, problem: Problem, config: Config, x: Arrays, out: Arrays, dout: Arrays, dx: Arrays) -> None:
        """See ``Kernel``."""
        q, k, v, beta, log_decay, *options = arguments(problem, x)
        dq, dk = grouped(problem, dx)
        dbeta = dx["beta"]
        backward(
            problem.work() * 1.5,
            *(q, k, v, beta, log_decay, x["initial.state"], *options, out["kept.slots"]),
            given(dout.get("y"), q, 4),
            given(dout.get("final.state"), q, 4),
            given(rows_of(dout.get("checkpoint.state")), q, 4),
            *(dq, dk, dx["v"], dbeta[..., None] if dbeta.ndim == 3 else dbeta),
            given(dx.get("log_decay"), q, 3),
            dx["initial.state"],
        )
        gather(problem, dx, dq, dk)


KERNELS = (LatticeRecurrent(),)
