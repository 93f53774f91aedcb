"""A piece of a mini-batch of TTT-linear in scratch: its tokens, inner gradients, reads, and what it leaves behind.

Notation of ``ttt``; forward and backward share it.
"""

import numpy as np

from .compile import device
from .matmul import matmul, matmul_ta, matmul_tb
from .rows import load_head
from .simd import NARROW, add, fma, lanes, load, mul, splat, store, sub, total, zeros
from .tiles import deposit_tile, fetch_tile

NORM_EPS = 1e-6

# A state as callers hold it: W, A, c, a.
PARTS = ("weight", "weight_sum", "bias", "bias_sum")

# The most tokens of one piece: a longer mini-batch goes on through its running sums.
PIECE = 64


@device
def piece_length(t, stop, phase, chunk, every):
    """Tokens from ``t`` on that share a mini-batch, end before ``stop`` and pass no checkpoint."""
    count = min(stop - t, chunk - (t + phase) % chunk, PIECE)
    return min(count, every - t % every) if every > 0 else count


@device
def clear(tile, first, count):
    """Zeros in ``count`` elements from ``first`` on."""
    for i in range(first, first + count):
        tile[i] = 0


@device
def add_row(target, at, source, start, ld, factor):
    """A row of ``target`` plus ``factor`` times one of ``source``."""
    times = splat(target, factor, NARROW)
    for j in range(0, ld, lanes(target, NARROW)):
        store(target, at + j, fma(times, load(source, start + j, NARROW), load(target, at + j, NARROW)))


@device
def dot_row(x, at, y, start, ld):
    """The dot product of two rows."""
    sums = zeros(x, NARROW)
    for j in range(0, ld, lanes(x, NARROW)):
        sums = fma(load(x, at + j, NARROW), load(y, start + j, NARROW), sums)
    return total(sums)


@device
def scale_row(x, at, ld, factor):
    """A row times ``factor``."""
    times = splat(x, factor, NARROW)
    for j in range(at, at + ld, lanes(x, NARROW)):
        store(x, j, mul(times, load(x, j, NARROW)))


@device
def standardise(z, at, affine, ld, share, x):
    """``x = (z − mean)/std`` of the row at ``at``; returns 1/std. ``share`` is 1/D."""
    step = lanes(x, NARROW)
    sums = zeros(x, NARROW)
    for j in range(0, ld, step):
        sums = add(sums, load(z, at + j, NARROW))
    mean = splat(x, total(sums) * share, NARROW)
    sums = zeros(x, NARROW)
    for j in range(0, ld, step):
        centred = mul(sub(load(z, at + j, NARROW), mean), load(affine, 2 * ld + j, NARROW))
        store(x, at + j, centred)
        sums = fma(centred, centred, sums)
    inverse = x.dtype.type(1) / np.sqrt(total(sums) * share + x.dtype.type(NORM_EPS))
    scale_row(x, at, ld, inverse)
    return inverse


@device
def project(p, at, x, at_x, affine, ld, share, factor, out, at_out):
    """``out = factor · (p ⟂ x)``, row by row; returns mean(p∘x)."""
    step = lanes(x, NARROW)
    sums, along = zeros(x, NARROW), zeros(x, NARROW)
    for j in range(0, ld, step):
        value = load(p, at + j, NARROW)
        sums = add(sums, value)
        along = fma(value, load(x, at_x + j, NARROW), along)
    slope = total(along) * share
    mean, times, shift = splat(x, total(sums) * share, NARROW), splat(x, factor, NARROW), splat(x, slope, NARROW)
    for j in range(0, ld, step):
        rest = sub(sub(load(p, at + j, NARROW), mean), mul(shift, load(x, at_x + j, NARROW)))
        store(out, at_out + j, mul(mul(rest, load(affine, 2 * ld + j, NARROW)), times))
    return slope


@device
def copy(source, start, target, at, count):
    """``target[at : at + count] = source[start : start + count]``."""
    for i in range(count):
        target[at + i] = source[start + i]


@device
def unpack(parts, n, head, state, width, ld):
    """A state as callers hold it, ``(W, A, c, a)``, into padded scratch, one below another."""
    tile = width * ld
    clear(state, 0, 2 * tile + 2 * ld)
    fetch_tile(parts[0][n, head], state, ld)
    fetch_tile(parts[1][n, head], state[tile:], ld)
    copy(parts[2][n, head], 0, state, 2 * tile, width)
    copy(parts[3][n, head], 0, state, 2 * tile + ld, width)


@device
def pack(state, fresh, parts, n, head, width, ld):
    """``unpack``, the other way round; ``fresh``: A and a are 0, whatever is there."""
    tile = width * ld
    deposit_tile(state, parts[0][n, head], ld)
    copy(state, 2 * tile, parts[2][n, head], 0, width)
    if fresh:
        parts[1][n, head] = 0
        clear(parts[3][n, head], 0, width)
    else:
        deposit_tile(state[tile:], parts[1][n, head], ld)
        copy(state, 2 * tile + ld, parts[3][n, head], 0, width)


@device
def load_affine(affine_, head, affine, width, ld):
    """The rows w, w_b and the mask, which is 0 in the padding."""
    for i in range(3):
        for j in range(ld):
            affine[i * ld + j] = 0 if j >= width else 1 if i == 2 else affine_[i, head, j]


@device
def load_piece(row, first, g, head, q, k, v, beta, m, size, ld, rows, queries, values, b):
    """``m`` tokens: keys above queries in ``rows``, zeros where a piece falls short of ``size``."""
    load_head(k, row, first, g, m, rows, ld)
    load_head(q, row, first, g, m, queries, ld)
    load_head(v, row, first, head, m, values, ld)
    clear(rows, m * ld, (size - m) * ld)
    clear(queries, m * ld, (size - m) * ld)
    for i in range(m):
        b[i] = beta[row, first + i, head]


@device
def learn(z, state, at_c, rows, values, affine, b, m, size, ld, share, inner, write, inverse):
    """The inner gradients of ``m`` tokens from ``z = K W``.

    ``inner`` takes x̂, e, h and G one behind another, ``size`` rows each, ``write`` E and ``inverse`` 1/std.
    """
    step, area = lanes(z, NARROW), size * ld
    for i in range(m):
        at = i * ld
        add_row(z, at, state, at_c, ld, z.dtype.type(1))
        inverse[i] = standardise(z, at, affine, ld, share, inner)
        for j in range(0, ld, step):
            w = load(affine, j, NARROW)
            target = sub(load(values, at + j, NARROW), load(rows, at + j, NARROW))
            error = sub(fma(w, load(inner, at + j, NARROW), load(affine, ld + j, NARROW)), target)
            store(inner, area + at + j, error)
            store(inner, 2 * area + at + j, mul(w, error))
        project(inner, 2 * area + at, inner, at, affine, ld, share, inverse[i], inner, 3 * area + at)
        times = splat(z, b[i], NARROW)
        for j in range(0, ld, step):
            store(write, at + j, mul(times, load(inner, 3 * area + at + j, NARROW)))


@device
def absorb(state, sums, rows, write, m, width, ld, fresh, done, rate):
    """The state behind a piece; ``fresh``: its A and a are 0 and hold anything. Returns whether they are 0 now."""
    one, at_c, at_a = state.dtype.type(1), 2 * width * ld, 2 * width * ld + ld
    direct = fresh and done
    if fresh:
        clear(state, at_a, ld)
        if not done:
            clear(sums, 0, width * ld)
    # A mini-batch of one piece goes straight into W.
    target = state if direct else sums
    matmul_ta(target, ld, rows, ld, write, ld, width, width, m, -rate if direct else one, one)
    for i in range(m):
        add_row(state, at_a, write, i * ld, ld, one)
    if done:
        if not direct:
            add_row(state, 0, sums, 0, width * ld, -rate)
        add_row(state, at_c, state, at_a, ld, -rate)
    return done


@device
def reads(rows, queries, write, state, sums, m, width, ld, lds, fresh, s, r):
    """``S = tril(Q Kᵀ + 1)`` and ``R = S E + Q A + a``."""
    one, nil = r.dtype.type(1), r.dtype.type(0)
    matmul_tb(s, lds, queries, ld, rows, ld, m, m, width, one, nil)
    for i in range(m):
        for j in range(i + 1):
            s[i * lds + j] += one
        for j in range(i + 1, m):
            s[i * lds + j] = 0
    matmul(r, ld, s, lds, write, ld, m, width, m, one, nil)
    if not fresh:
        matmul(r, ld, queries, ld, sums, ld, m, width, width, one, one)
        for i in range(m):
            add_row(r, i * ld, state, 2 * width * ld + ld, ld, one)


@device
def shifted(z, state, at_c, r, rate, at, ld):
    """``Z̄ = Q W + c − rate∘R`` in place of ``Q W`` in the row at ``at``."""
    back = splat(z, -rate, NARROW)
    for j in range(0, ld, lanes(z, NARROW)):
        value = add(load(z, at + j, NARROW), load(state, at_c + j, NARROW))
        store(z, at + j, fma(back, load(r, at + j, NARROW), value))
