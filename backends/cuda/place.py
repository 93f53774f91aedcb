"""Where a block works, which its threads ask once: the tokens of its sequence, and the part of a state that a lane has.

    batch, start, length = span(offsets, n, tokens)         rows of a batch, or pieces of one row that is packed
    width = aligned(V)                                      columns of a row that is read and written in fours
    row = marks_before(offsets, n, tokens, every)           checkpoints of the sequences before
    warp, lane, m, band, row0, column0, mine = seat(…)(thread)    how ``lattice_forward`` lays a state over a block
    own, leads = own_rows(…)[1](lane)                       the rows that a lane keeps of a sum over values

Functions of the device, which the compiler puts where they are called; ``for_device`` makes one.
"""

import functools

import numpy as np

from . import SIMULATED
from .agreed import shares
from .device import WARP, load
from .source import cuda

_read = load("int64")

# What a lane adds where no bit chooses anything: Numba cannot loop over an empty tuple.
NO_BITS = ((0, 0),)


def for_device(function):
    """Compiled where it is called; in the simulator a plain function."""
    return function if SIMULATED else cuda.jit(function, device=True, inline="always")


@for_device
def span(offsets, n, tokens):
    """The row of a sequence, its first token there and how many it has."""
    if offsets == 0:
        return n, np.int64(0), tokens
    start = np.int64(_read(offsets, n))
    return np.int64(0), start, np.int64(_read(offsets, n + 1)) - start


@for_device
def aligned(width):
    """The next multiple of four."""
    return (width + 3) // 4 * 4


@for_device
def marks_before(offsets, n, tokens, every):
    """How many checkpoints lie before those of sequence ``n``."""
    if offsets == 0:
        return n * (tokens // every)
    count = np.int64(0)
    for before in range(n):
        count += (_read(offsets, before + 1) - _read(offsets, before)) // every
    return count


@functools.cache
def seat(rows, columns, lanes):
    """``places(thread)`` for a layout; ``mine`` is the first column that the lane keeps of a fold."""
    M = WARP // lanes
    BITS = M.bit_length() - 1
    R, L, CHOSEN = rows, lanes, shares(columns, 0, BITS)[1] or NO_BITS

    @for_device
    def places(thread):
        warp, lane = thread // np.int32(WARP) & np.int32(31), thread & np.int32(WARP - 1)
        m, band = lane & np.int32(M - 1), lane >> np.int32(BITS)
        row0, column0 = warp * np.int32(R * M) + m * np.int32(R), np.int32(4) * band
        mine = np.int32(0)
        for bit, offset in CHOSEN:
            mine += (lane >> np.int32(bit) & np.int32(1)) * np.int32(offset)
        mine = (mine >> np.int32(2)) * np.int32(4 * L) + column0 + (mine & np.int32(3))
        return warp, lane, m, band, row0, column0, mine

    return places


@functools.cache
def own_rows(rows, lanes):
    """``count, place``: of a sum over the values a lane keeps so many rows; ``place(lane)`` is the first of them, and
    whether no lane before has the same."""
    first, last = (WARP // lanes).bit_length() - 1, WARP.bit_length() - 1
    count, chosen = shares(rows, first, last)
    CHOSEN = chosen or NO_BITS
    REST = sum(1 << bit for bit in range(first, last)) - sum(1 << bit for bit, _ in chosen)

    @for_device
    def place(lane):
        row = np.int32(0)
        for bit, offset in CHOSEN:
            row += (lane >> np.int32(bit) & np.int32(1)) * np.int32(offset)
        return row, lane & np.int32(REST) == np.int32(0)

    return count, place
