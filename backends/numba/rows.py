"""Rows of arrays of any strides, copied into scratch memory and back.

    source [B,T,heads,width]   →   tile, row i at ``i * ld``, zeros in the padding

Rows may belong to several heads: row ``r`` of group ``g`` is token ``first + r // m`` and head ``g * m + r % m``, so
that the ``m`` heads of a group make one matrix. A single head is ``group = head, m = 1``.
"""

import numpy as np

from .compile import device
from .layout import padded, scratch
from .simd import NARROW, lanes, load, mul, splat, store


@device
def load_rows(source, row, first, group, m, r, count, factor, tile, ld):
    """``factor`` times rows ``r : r + count``, one below another."""
    width = source.shape[3]
    lane = lanes(tile, NARROW)
    times = splat(tile, factor, NARROW)
    even = source.strides[3] == source.itemsize
    for i in range(count):
        t, h = first + (r + i) // m, group * m + (r + i) % m
        j = 0
        if even:
            offset = row * source.strides[0] + t * source.strides[1] + h * source.strides[2]
            offset //= source.itemsize
            while j + lane <= width:
                store(tile, i * ld + j, mul(load(source, offset + j, NARROW), times))
                j += lane
        while j < width:
            tile[i * ld + j] = source[row, t, h, j] * factor
            j += 1
        while j < ld:
            tile[i * ld + j] = 0
            j += 1


@device
def load_head(source, row, first, head, count, tile, ld):
    """``count`` tokens of one head from ``first`` on, one below another."""
    load_rows(source, row, first, head, np.int64(1), np.int64(0), count, tile.dtype.type(1), tile, ld)


@device
def store_head(tile, ld, target, row, first, head, count):
    """``load_head``, the other way round; ``target`` is C-contiguous."""
    width = target.shape[3]
    lane = lanes(tile, NARROW)
    for i in range(count):
        offset = ((row * target.shape[1] + first + i) * target.shape[2] + head) * width
        j = 0
        while j + lane <= width:
            store(target, offset + j, load(tile, i * ld + j, NARROW))
            j += lane
        while j < width:
            target[row, first + i, head, j] = tile[i * ld + j]
            j += 1


@device
def transpose(tile, ldt, rows, width, out, ld):
    """``out[j, i] = tile[i, j]``, zeros behind the last row."""
    for j in range(width):
        for i in range(rows):
            out[j * ld + i] = tile[i * ldt + j]
        for i in range(rows, ld):
            out[j * ld + i] = 0


@device
def load_columns(source, row, first, group, m, r, count, out, ld):
    """``load_rows``, transposed: one row beside another."""
    width = source.shape[3]
    ldt = padded(width, out)
    tile = scratch(count * ldt, out)
    load_rows(source, row, first, group, m, r, count, out.dtype.type(1), tile, ldt)
    transpose(tile, ldt, count, width, out, ld)


@device
def load_vector(source, row, first, group, m, r, count, out):
    """The numbers in ``source [B,T,heads]`` that belong to these rows."""
    for i in range(count):
        out[i] = source[row, first + (r + i) // m, group * m + (r + i) % m]
