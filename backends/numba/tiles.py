"""Rows and tiles: scratch memory with padded rows on one side, a caller's arrays of any layout on the other.

A tile is one-dimensional, row ``i`` at ``i * ld``. What is fetched may be strided; a deposit's target is contiguous.
"""

from .compile import leaf
from .simd import NARROW, add, fma, lanes, load, prefetch, splat, store, total, zeros


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
def add_tile(source, tile, ld):
    """Add ``source [rows, columns]`` of any layout to ``tile``."""
    rows, columns = source.shape
    for i in range(rows):
        for j in range(columns):
            tile[i * ld + j] += source[i, j]
