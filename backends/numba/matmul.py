"""Small dense matrix products on scratch memory, at most of one core's peak.

    matmul     out[m, n] = alpha · a[m, k] · b[k, n]   + beta · out
    matmul_ta  out[m, n] = alpha · a[k, m]ᵀ · b[k, n]  + beta · out
    matmul_tb  out[m, n] = alpha · a[m, k] · b[n, k]ᵀ  + beta · out

Every matrix is row-major in one-dimensional contiguous memory, with a leading dimension; a part of one is a slice
(``a[i * lda :]``). With ``beta == 0`` the old ``out`` is never read. Nothing is packed: operands fit a core's own
caches.

Padding: ``matmul`` and ``matmul_ta`` work on whole hardware vectors of columns, so rows of ``b`` and ``out`` must be
readable and writable up to ``padded(n)`` (the padding of ``out`` becomes the product with that of ``b``: zeros if it
holds zeros). ``matmul_tb`` works on whole vectors of the sum instead: rows of ``a`` and ``b`` are read up to
``padded(k)``, where at least one of them holds zeros and neither holds a NaN; it writes nothing beyond column n.
"""

import numpy as np

from .compile import device
from .simd import NARROW, PAIR, WIDE, fma, lanes, load, mul, splat, store, store_totals, zeros


def _panel(width, rows):
    """A register tile: ``rows`` (4 or 8) rows by one vector of ``width`` bytes, summed over k."""

    @device
    def settle(out, at, acc, alpha, beta):
        acc = mul(splat(out, alpha, width), acc)
        if beta != 0:
            acc = fma(splat(out, beta, width), load(out, at, width), acc)
        store(out, at, acc)

    @device
    def one(out, at, a, start, step, b, col, ldb, k, alpha, beta):
        x = zeros(out, width)
        for p in range(k):
            x = fma(splat(out, a[start + p * step], width), load(b, p * ldb + col, width), x)
        settle(out, at, x, alpha, beta)

    @device
    def four(out, at, ldo, a, start, row, step, b, col, ldb, k, alpha, beta):
        x0 = zeros(out, width)
        x1 = x0
        x2 = x0
        x3 = x0
        s1 = start + row
        s2 = s1 + row
        s3 = s2 + row
        for p in range(k):
            y = load(b, p * ldb + col, width)
            i = p * step
            x0 = fma(splat(out, a[start + i], width), y, x0)
            x1 = fma(splat(out, a[s1 + i], width), y, x1)
            x2 = fma(splat(out, a[s2 + i], width), y, x2)
            x3 = fma(splat(out, a[s3 + i], width), y, x3)
        settle(out, at, x0, alpha, beta)
        settle(out, at + ldo, x1, alpha, beta)
        settle(out, at + 2 * ldo, x2, alpha, beta)
        settle(out, at + 3 * ldo, x3, alpha, beta)

    @device
    def eight(out, at, ldo, a, start, row, step, b, col, ldb, k, alpha, beta):
        x0 = zeros(out, width)
        x1 = x0
        x2 = x0
        x3 = x0
        x4 = x0
        x5 = x0
        x6 = x0
        x7 = x0
        far = start + 4 * row
        for p in range(k):
            y = load(b, p * ldb + col, width)
            i = start + p * step
            j = far + p * step
            x0 = fma(splat(out, a[i], width), y, x0)
            x1 = fma(splat(out, a[i + row], width), y, x1)
            x2 = fma(splat(out, a[i + 2 * row], width), y, x2)
            x3 = fma(splat(out, a[i + 3 * row], width), y, x3)
            x4 = fma(splat(out, a[j], width), y, x4)
            x5 = fma(splat(out, a[j + row], width), y, x5)
            x6 = fma(splat(out, a[j + 2 * row], width), y, x6)
            x7 = fma(splat(out, a[j + 3 * row], width), y, x7)
        settle(out, at, x0, alpha, beta)
        settle(out, at + ldo, x1, alpha, beta)
        settle(out, at + 2 * ldo, x2, alpha, beta)
        settle(out, at + 3 * ldo, x3, alpha, beta)
        settle(out, at + 4 * ldo, x4, alpha, beta)
        settle(out, at + 5 * ldo, x5, alpha, beta)
        settle(out, at + 6 * ldo, x6, alpha, beta)
        settle(out, at + 7 * ldo, x7, alpha, beta)

    block = eight if rows == 8 else four

    @device
    def columns(out, ldo, a, row, step, b, ldb, m, col, k, alpha, beta):
        """All rows of one column panel."""
        whole = m // rows * rows
        for i in range(0, whole, rows):
            block(out, i * ldo + col, ldo, a, i * row, row, step, b, col, ldb, k, alpha, beta)
        for i in range(whole, m):
            one(out, i * ldo + col, a, i * row, step, b, col, ldb, k, alpha, beta)

    return columns


# 16 accumulators of one hardware vector each, or 8 for the last column.
_wide = _panel(WIDE, 4)
_half = _panel(PAIR, 8)
_narrow = _panel(NARROW, 8)


# Every type of an argument is a compilation, and a literal is a type of its own: ``alpha`` and ``beta`` go on in the
# working type, a step of 1 as a plain number.
_ONE = np.int64(1)


@device
def _product(out, ldo, a, row, step, b, ldb, m, n, k, alpha, beta):
    """``out += a · b`` where element (i, p) of ``a`` lies at ``i * row + p * step``."""
    wide = lanes(out, WIDE)
    half = lanes(out, PAIR)
    col = 0
    while n - col > wide - lanes(out, NARROW):
        _wide(out, ldo, a, row, step, b, ldb, m, col, k, alpha, beta)
        col += wide
    while n - col > half - lanes(out, NARROW):
        _half(out, ldo, a, row, step, b, ldb, m, col, k, alpha, beta)
        col += half
    if col < n:
        _narrow(out, ldo, a, row, step, b, ldb, m, col, k, alpha, beta)


@device
def matmul(out, ldo, a, lda, b, ldb, m, n, k, alpha, beta):
    """``out[m, n] = alpha · a[m, k] · b[k, n] + beta · out``."""
    _product(out, ldo, a, lda, _ONE, b, ldb, m, n, k, out.dtype.type(alpha), out.dtype.type(beta))


@device
def matmul_ta(out, ldo, a, lda, b, ldb, m, n, k, alpha, beta):
    """``out[m, n] = alpha · a[k, m]ᵀ · b[k, n] + beta · out``."""
    _product(out, ldo, a, _ONE, lda, b, ldb, m, n, k, out.dtype.type(alpha), out.dtype.type(beta))


@device
def _dots(sums, a, i0, i1, i2, i3, b, j0, j1, j2, j3, k):
    """``sums[4 r + c]`` = dot product of row ``i_r`` of a and row ``j_c`` of b, offsets given."""
    x00 = zeros(sums, NARROW)
    x01 = x00
    x02 = x00
    x03 = x00
    x10 = x00
    x11 = x00
    x12 = x00
    x13 = x00
    x20 = x00
    x21 = x00
    x22 = x00
    x23 = x00
    x30 = x00
    x31 = x00
    x32 = x00
    x33 = x00
    for p in range(0, k, lanes(sums, NARROW)):
        b0 = load(b, j0 + p, NARROW)
        b1 = load(b, j1 + p, NARROW)
        b2 = load(b, j2 + p, NARROW)
        b3 = load(b, j3 + p, NARROW)
        y = load(a, i0 + p, NARROW)
        x00 = fma(y, b0, x00)
        x01 = fma(y, b1, x01)
        x02 = fma(y, b2, x02)
        x03 = fma(y, b3, x03)
        y = load(a, i1 + p, NARROW)
        x10 = fma(y, b0, x10)
        x11 = fma(y, b1, x11)
        x12 = fma(y, b2, x12)
        x13 = fma(y, b3, x13)
        y = load(a, i2 + p, NARROW)
        x20 = fma(y, b0, x20)
        x21 = fma(y, b1, x21)
        x22 = fma(y, b2, x22)
        x23 = fma(y, b3, x23)
        y = load(a, i3 + p, NARROW)
        x30 = fma(y, b0, x30)
        x31 = fma(y, b1, x31)
        x32 = fma(y, b2, x32)
        x33 = fma(y, b3, x33)
    store_totals(sums, 0, x00, x01, x02, x03)
    store_totals(sums, 4, x10, x11, x12, x13)
    store_totals(sums, 8, x20, x21, x22, x23)
    store_totals(sums, 12, x30, x31, x32, x33)


@device
def matmul_tb(out, ldo, a, lda, b, ldb, m, n, k, alpha, beta):
    """``out[m, n] = alpha · a[m, k] · b[n, k]ᵀ + beta · out``."""
    _product_tb(out, ldo, a, lda, b, ldb, m, n, k, out.dtype.type(alpha), out.dtype.type(beta))


@device
def _product_tb(out, ldo, a, lda, b, ldb, m, n, k, scale, keep):
    sums = np.empty(16, out.dtype)
    for j in range(0, n, 4):
        # Past the edge the last row stands in, and its result is dropped.
        j1, j2, j3 = min(j + 1, n - 1) * ldb, min(j + 2, n - 1) * ldb, min(j + 3, n - 1) * ldb
        columns = min(4, n - j)
        for i in range(0, m, 4):
            i1, i2, i3 = min(i + 1, m - 1) * lda, min(i + 2, m - 1) * lda, min(i + 3, m - 1) * lda
            _dots(sums, a, i * lda, i1, i2, i3, b, j * ldb, j1, j2, j3, k)
            for r in range(min(4, m - i)):
                at = (i + r) * ldo + j
                if columns == 4:
                    if keep != 0:
                        for c in range(4):
                            out[at + c] = scale * sums[4 * r + c] + keep * out[at + c]
                    else:
                        for c in range(4):
                            out[at + c] = scale * sums[4 * r + c]
                else:
                    for c in range(columns):
                        old = out[at + c] if keep != 0 else out.dtype.type(0)
                        out[at + c] = scale * sums[4 * r + c] + keep * old
