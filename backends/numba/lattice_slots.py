"""The slots of exact Lattice: what is measured of a token, what follows from it, and the pass that turns the rows.

Notation of ``lattice``; forward and backward share it. Vectors of slots lie one behind another in ``record``.
"""

import numpy as np

from .compile import leaf
from .layout import epsilon, smallest_normal
from .simd import (
    NARROW,
    PAIR,
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
from .tiles import fetch, fill

DECODING, ENCODING, SIMILARITY = 0, 1, 2
OBJECTIVES = {"decoding": DECODING, "encoding": ENCODING, "similarity": SIMILARITY}

# What is known of a token, a vector of slots each: F factors of the stored rows, then what was measured (A, R) and the
# coefficients (Z, W, C in units of M, INV = 1/n or 0 for a row of zeros), keys, strengths.
F, A, R, Z, W, C, M, IM, INV, KEY, BETA, RECORD = range(12)

# Coefficients of a pass: GAIN of h, CQ of the read, CK of the prediction; ALPHA rescales a row.
GAIN, CQ, CK, ALPHA, PASS = range(5)
FAR = 2.0**30  # factors of stored rows stay below this, and above its inverse
CANCELS = 1 / 16  # of the terms of n²: less than that, and the row is measured


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
def cut_empty(slots, gradient):
    """No gradient reaches rows of zeros, for which others stood in."""
    rows, columns = slots.shape
    for i in range(rows):
        j = 0
        while j < columns and slots[i, j] == 0:
            j += 1
        if j == columns:
            gradient[i, :] = 0


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
_turn_half, _turn_half_twice = _turn(PAIR)
_turn_narrow, _turn_narrow_twice = _turn(NARROW)


@leaf
def turn(s, at, to, ld, rows, h, coef, gain, c, y):
    """Turn the rows and sum them with the weights ``coef[c:]``."""
    whole = ld // lanes(s, PAIR) * lanes(s, PAIR)
    _turn_half(s, at, to, ld, rows, h, coef, gain, c, y, 0, whole)
    _turn_narrow(s, at, to, ld, rows, h, coef, gain, c, y, whole, ld)


@leaf
def turn_twice(s, at, to, ld, rows, h, coef, gain, c, y, d, p):
    """Turn the rows and sum them with two sets of weights."""
    whole = ld // lanes(s, PAIR) * lanes(s, PAIR)
    _turn_half_twice(s, at, to, ld, rows, h, coef, gain, c, y, d, p, 0, whole)
    _turn_narrow_twice(s, at, to, ld, rows, h, coef, gain, c, y, d, p, whole, ld)


@leaf
def weigh(record, at, kp, mu, hh, encoding):
    """From what was measured to the coefficients of a token; returns how many rows cancel, or vanish."""
    one = splat(record, 1, NARROW)
    nought = zeros(record, NARROW)
    two = splat(record, 2, NARROW)
    tiny = splat(record, smallest_normal(record) * 16, NARROW)
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
    eps = epsilon(record)
    tiny = smallest_normal(record) * 16
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
