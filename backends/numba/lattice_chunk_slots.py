"""The running slots of chunked Lattice: a chunk's matrices, and the token that turns, measures and reads the rows.

Notation of ``lattice_chunk``; forward and backward share it.
"""

import numpy as np

from .compile import device, leaf
from .lattice_slots import DECODING, ENCODING
from .layout import epsilon, smallest_normal
from .matmul import matmul, matmul_tb
from .simd import (
    NARROW,
    PAIR,
    absolute,
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

# What a token does to each slot, a vector of slots each.
E, EA, INV, Z, BETA, RECORD = range(6)

# Scratch vectors of slots: squared norms and read weights of a token; dots and weights of its adjoint.
SQUARE, QUERY, READ = range(3)
SY, DH, DP, DS, TAU, DQ, DBETA, WORK = range(3, 11)


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


_read_half = _read(PAIR)
_read_narrow = _read(NARROW)


@leaf
def read(s, at, ld, first, last, weights, w, out):
    """``out += Σ_i weights[w + i] s_i`` over some rows."""
    whole = ld // lanes(s, PAIR) * lanes(s, PAIR)
    _read_half(s, at, ld, first, last, weights, w, out, 0, whole)
    _read_narrow(s, at, ld, first, last, weights, w, out, whole, ld)


@leaf
def inverse_norms(s, at, ld, first, last, record, inv, work, kp):
    """``1/‖s_i‖`` of a block of rows from their squares, 0 for rows of zeros; returns how many those are.

    Squares that are close to underflow are measured again, in units of the row's largest element.
    """
    step = lanes(s, NARROW)
    tiny = smallest_normal(s) / epsilon(s)
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
            if most < 16 * smallest_normal(s):  # 1 / ρ would overflow
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
