"""Tokens of the linear and delta families in scratch: queries, keys, decays and what follows from them.

Notation of ``delta``; forward and backward, token by token and in chunks, share it. All scratch of a work item is one
array ``m``; a named tuple says where in it everything begins. So an inner loop has one base address, and Numba counts
no references to a dozen of arrays.
"""

from collections import namedtuple

import numpy as np

from mixers.delta import L2_EPS

from .compile import device
from .simd import NARROW, exp, fma, lanes, load, load_row, mul, prefetch_row, splat, store, store_row, sub, total, zeros

LINE = 64  # bytes of a cache line

# Tokens that the forward pass brings into scratch at a time.
SEGMENT = 16
Head = namedtuple("Head", "q k v beta decay")

"""The inputs of one head of one sequence: q, k [T,K]; v [T,V]; beta [T] or empty; decay [T,K], [T,1] or empty."""

Places = namedtuple("Places", "q k decay faded q_factor k_factor beta")

"""Where the inputs of a segment of tokens lie in scratch, a padded row of keys a token."""


@device
def take(source, t, m, at):
    """Copy ``source[t]``, of any stride, into scratch."""
    width = source.shape[1]
    i = 0
    if source.strides[1] == source.itemsize:
        while i + lanes(m, NARROW) <= width:
            store(m, at + i, load_row(source, t, i, NARROW))
            i += lanes(m, NARROW)
    while i < width:
        m[at + i] = source[t, i]
        i += 1


@device
def give(m, at, target, t):
    """Copy a row of scratch into ``target[t]``, whose elements are contiguous."""
    width = target.shape[1]
    i = 0
    while i + lanes(m, NARROW) <= width:
        store_row(target, t, i, load(m, at + i, NARROW))
        i += lanes(m, NARROW)
    while i < width:
        target[t, i] = m[at + i]
        i += 1


@device
def store_tile(m, at, ld, target):
    """Copy a tile into an output with contiguous rows."""
    for i in range(target.shape[0]):
        give(m, at + i * ld, target, i)


@device
def row_dot(m, a, b, width):
    """The dot product of two padded rows."""
    acc = zeros(m, NARROW)
    for i in range(0, width, lanes(m, NARROW)):
        acc = fma(load(m, a + i, NARROW), load(m, b + i, NARROW), acc)
    return total(acc)


@device
def row_scale(m, at, width, factor):
    """Multiply a padded row by a number."""
    by = splat(m, factor, NARROW)
    for i in range(at, at + width, lanes(m, NARROW)):
        store(m, i, mul(by, load(m, i, NARROW)))


@device
def norm_factor(m, at, width):
    """``(Σx² + 1e-6)^{-1/2}`` of a padded row."""
    return m.dtype.type(1) / np.sqrt(row_dot(m, at, at, width) + m.dtype.type(L2_EPS))


@device
def take_decay(source, t, m, at, width):
    """``e^g`` of every key channel; ``source[t]`` holds one g, or one a channel."""
    if source.shape[1] == 1:
        g = exp(splat(m, source[t, 0], NARROW))
        for i in range(at, at + width, lanes(m, NARROW)):
            store(m, i, g)
    else:
        take(source, t, m, at)
        m[at + source.shape[1] : at + width] = 0  # the padding, which held the last e^g
        for i in range(at, at + width, lanes(m, NARROW)):
            store(m, i, exp(load(m, i, NARROW)))


@device
def take_keys(head, first, size, ldk, normed, m, at):
    """Keys, decays and their products, which predict, of the tokens ``first … first + size − 1``; and beta."""
    fade, delta = head.decay.shape[1] > 0, head.beta.shape[0] > 0
    for t in range(size):
        key = at.k + t * ldk
        take(head.k, first + t, m, key)
        if normed:
            factor = norm_factor(m, key, ldk)
            m[at.k_factor + t] = factor
            row_scale(m, key, ldk, factor)
        if delta:
            m[at.beta + t] = head.beta[first + t]
        if fade:
            decay, faded = at.decay + t * ldk, at.faded + t * ldk
            take_decay(head.decay, first + t, m, decay, ldk)
            for i in range(0, ldk, lanes(m, NARROW)):
                store(m, faded + i, mul(load(m, key + i, NARROW), load(m, decay + i, NARROW)))


@device
def take_queries(head, first, size, ldk, normed, m, at):
    """Queries as they are, and the factors that normalise them."""
    for t in range(size):
        row = at.q + t * ldk
        take(head.q, first + t, m, row)
        m[at.q_factor + t] = norm_factor(m, row, ldk) if normed else m.dtype.type(1)


@device
def correct(m, v, p, rest, u, beta, ld):
    """``rest = v − p``, ``u = beta · rest``."""
    b = splat(m, beta, NARROW)
    for j in range(0, ld, lanes(m, NARROW)):
        r = sub(load(m, v + j, NARROW), load(m, p + j, NARROW))
        store(m, rest + j, r)
        store(m, u + j, mul(b, r))


@device
def ask(source, t):
    """Ask the memory for ``source[t]``, which may lie beyond the end."""
    for i in range(0, source.shape[1], LINE // source.itemsize):
        prefetch_row(source, t, i)


@device
def places(tokens, ldk, line, fade):
    """Places for a segment of ``tokens``; without decays the products that predict are the keys themselves."""
    size = tokens * ldk
    k = size
    decay = k + size
    faded = decay + size if fade else k
    numbers = (faded + size) if fade else k + size
    return Places(0, k, decay, faded, numbers, numbers + line, numbers + 2 * line), numbers + 3 * line


@device
def load_turned(source, m, at, ld):
    """Copy ``source [K, values]`` into a tile whose rows are values."""
    for i in range(source.shape[0]):
        for j in range(source.shape[1]):
            m[at + j * ld + i] = source[i, j]


@device
def add_turned(source, m, at, ld):
    """Add ``source [K, values]`` to a tile whose rows are values."""
    for i in range(source.shape[0]):
        for j in range(source.shape[1]):
            m[at + j * ld + i] += source[i, j]


@device
def normal_gradient(m, x, dx, ldk, factor):
    """From the gradient of a normalised row to that of the row: ``dx = r (dx̂ − x̂ ⟨x̂, dx̂⟩)``."""
    along = splat(m, row_dot(m, x, dx, ldk), NARROW)
    r = splat(m, factor, NARROW)
    for i in range(0, ldk, lanes(m, NARROW)):
        store(m, dx + i, mul(r, sub(load(m, dx + i, NARROW), mul(along, load(m, x + i, NARROW)))))
