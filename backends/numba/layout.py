"""Where things lie: scratch memory, padded rows, sequences inside a batch or a pack.

Scratch is one-dimensional, aligned to a cache line, with rows padded to whole hardware vectors and zeros in the
padding, so that an inner loop needs no tail. ``ld`` (leading dimension) is such a padded row length.
"""

import numpy as np

from .compile import device, leaf
from .simd import NARROW, lanes

_LINE = 64


@device
def scratch(size, like):
    """``size`` uninitialised elements of ``like``'s dtype, aligned to 64 bytes."""
    spare = _LINE // like.itemsize
    buffer = np.empty(size + spare, like.dtype)
    skip = (_LINE - buffer.ctypes.data % _LINE) % _LINE // like.itemsize
    return buffer[skip : skip + size]


@device
def zeroed(size, like):
    """``scratch`` of zeros."""
    buffer = scratch(size, like)
    buffer[:] = 0
    return buffer


@leaf
def epsilon(like):
    """The distance from 1 to the next number of ``like``'s dtype; ``np.finfo`` would load SciPy with the kernel."""
    return like.dtype.type(2.0**-23 if like.itemsize == 4 else 2.0**-52)


@leaf
def smallest_normal(like):
    """The smallest normal number of ``like``'s dtype."""
    return like.dtype.type(2.0**-126 if like.itemsize == 4 else 2.0**-1022)


@device
def padded(width, like):
    """``width`` rounded up to whole hardware vectors of ``like``."""
    step = lanes(like, NARROW)
    return (width + step - 1) // step * step


@device
def span(sequence, tokens, offsets):
    """``(row, first, last)``: where a sequence lies; ``offsets`` is empty for a batch."""
    if offsets.shape[0] == 0:
        return sequence, 0, tokens
    return 0, offsets[sequence], offsets[sequence + 1]


@device
def kept_row(sequence, first, tokens, spacing, offsets):
    """The first row of a sequence's kept states (see ``mixers.problem``)."""
    if offsets.shape[0] == 0:
        return sequence * (tokens // spacing + 2)
    return first // spacing + sequence


@device
def checkpoint_row(sequence, tokens, every, offsets):
    """The first row of a sequence's checkpoints, rows counted over the whole batch."""
    if offsets.shape[0] == 0:
        return sequence * (tokens // every)
    row = 0
    for before in range(sequence):
        row += (offsets[before + 1] - offsets[before]) // every
    return row
