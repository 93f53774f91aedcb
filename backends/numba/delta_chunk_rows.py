"""A chunk of the linear and delta families in scratch: rows of keys with their decays, triangles, and their solution.

Notation of ``delta_chunk``; forward and backward share it.
"""

from collections import namedtuple

from .compile import device
from .delta_rows import norm_factor, row_scale, take, take_decay
from .matmul import matmul, matmul_tb
from .simd import NARROW, WIDE, fma, lanes, load, mul, splat_at, store, store_totals, sub, zeros

CHUNK = 32
HALF = CHUNK // 2
Keys = namedtuple("Keys", "q k d pre qd kd post ke pb qp kp sb ks factors beta m p")

"""Where a chunk's rows of keys lie (names as above; qp = q∘pb, ks = k∘sb, …), and the triangles m and p."""


@device
def key_places(ldk, ldc, fade):
    """Places of a chunk's keys, and the first free one; without decays all faded keys are the keys themselves."""
    size = CHUNK * ldk
    q, k = 0, size
    d, pre, qd, kd, post, ke, pb, qp, kp, sb, ks = k, k, q, k, k, k, k, q, k, k, k
    free = 2 * size
    if fade:
        d, pre, qd, kd, post, ke = free, free + size, free + 2 * size, free + 3 * size, free + 4 * size, free + 5 * size
        pb, qp, kp, sb, ks = free + 6 * size, free + 7 * size, free + 8 * size, free + 9 * size, free + 10 * size
        free += 11 * size
    m = free + 3 * ldc
    p = m + CHUNK * ldc
    return Keys(q, k, d, pre, qd, kd, post, ke, pb, qp, kp, sb, ks, free, free + 2 * ldc, m, p), p + CHUNK * ldc


@device
def times(m, to, a, b, width):
    """``to = a ∘ b``, padded rows."""
    for i in range(0, width, lanes(m, NARROW)):
        store(m, to + i, mul(load(m, a + i, NARROW), load(m, b + i, NARROW)))


@device
def copy(m, to, a, width):
    """``to = a``, padded rows."""
    for i in range(0, width, lanes(m, NARROW)):
        store(m, to + i, load(m, a + i, NARROW))


@device
def take_chunk(head, first, n, ldk, normed, m, at):
    """The inputs of n tokens but the values, and their decays multiplied up."""
    fade = head.decay.shape[1] > 0
    for t in range(n):
        row = t * ldk
        take(head.q, first + t, m, at.q + row)
        take(head.k, first + t, m, at.k + row)
        if normed:
            m[at.factors + t] = norm_factor(m, at.q + row, ldk)
            row_scale(m, at.q + row, ldk, m[at.factors + t])
            m[at.factors + CHUNK + t] = norm_factor(m, at.k + row, ldk)
            row_scale(m, at.k + row, ldk, m[at.factors + CHUNK + t])
        if fade:
            take_decay(head.decay, first + t, m, at.d + row, ldk)
        if head.beta.shape[0] > 0:
            m[at.beta + t] = head.beta[first + t]
    if fade:
        multiply_up(m, at, n, ldk)


@device
def multiply_up(m, at, n, ldk):
    """Products of decays from the left (pre; pb from the border) and from the right (post; sb up to the border)."""
    for t in range(n):
        row = t * ldk
        if t == 0:
            copy(m, at.pre, at.d, ldk)
        else:
            times(m, at.pre + row, at.pre + row - ldk, at.d + row, ldk)
        times(m, at.qd + row, at.q + row, at.pre + row, ldk)
        times(m, at.kd + row, at.k + row, at.pre + row, ldk)
        if t == HALF:
            copy(m, at.pb + row, at.d + row, ldk)
        elif t > HALF:
            times(m, at.pb + row, at.pb + row - ldk, at.d + row, ldk)
        if t >= HALF:
            times(m, at.qp + row, at.q + row, at.pb + row, ldk)
            times(m, at.kp + row, at.k + row, at.pb + row, ldk)
    for t in range(n - 1, -1, -1):
        row = t * ldk
        if t == n - 1:
            m[at.post + row : at.post + row + ldk] = 1
        else:
            times(m, at.post + row, at.post + row + ldk, at.d + row + ldk, ldk)
        times(m, at.ke + row, at.k + row, at.post + row, ldk)
        if t == HALF - 1:
            m[at.sb + row : at.sb + row + ldk] = 1
        elif t < HALF - 1 and n > HALF:
            times(m, at.sb + row, at.sb + row + ldk, at.d + row + ldk, ldk)
        if t < HALF and n > HALF:
            times(m, at.ks + row, at.k + row, at.sb + row, ldk)


def _half_triangle(fade):
    """M and P inside one half: four keys fade together from the first of them on."""

    @device
    def half_triangle(m, at, start, stop, ldk, ldc, w):
        for j in range(start, stop, 4):
            m[w : w + 4 * ldk] = 0
            for t in range(j, stop):
                if t < j + 4:
                    # Joins the group; what d does to a row of zeros, or to this one before it is copied, is nothing.
                    copy(m, w + (t - j) * ldk, at.k + t * ldk, ldk)
                a0 = zeros(m, NARROW)
                a1 = a0
                a2 = a0
                a3 = a0
                b0 = a0
                b1 = a0
                b2 = a0
                b3 = a0
                for i in range(0, ldk, lanes(m, NARROW)):
                    k = load(m, at.k + t * ldk + i, NARROW)
                    q = load(m, at.q + t * ldk + i, NARROW)
                    o = w + i
                    x0 = load(m, o, NARROW)
                    x1 = load(m, o + ldk, NARROW)
                    x2 = load(m, o + 2 * ldk, NARROW)
                    x3 = load(m, o + 3 * ldk, NARROW)
                    a0 = fma(x0, k, a0)
                    a1 = fma(x1, k, a1)
                    a2 = fma(x2, k, a2)
                    a3 = fma(x3, k, a3)
                    b0 = fma(x0, q, b0)
                    b1 = fma(x1, q, b1)
                    b2 = fma(x2, q, b2)
                    b3 = fma(x3, q, b3)
                    if fade and t + 1 < stop:  # for the next token
                        d = load(m, at.d + (t + 1) * ldk + i, NARROW)
                        store(m, o, mul(x0, d))
                        store(m, o + ldk, mul(x1, d))
                        store(m, o + 2 * ldk, mul(x2, d))
                        store(m, o + 3 * ldk, mul(x3, d))
                store_totals(m, at.m + t * ldc + j, a0, a1, a2, a3)
                store_totals(m, at.p + t * ldc + j, b0, b1, b2, b3)

    return half_triangle


_half_triangle_plain = _half_triangle(False)
_half_triangle_fade = _half_triangle(True)


@device
def triangles(m, at, n, ldk, ldc, fade, w):
    """M and P of a chunk; zeros above the diagonal, and M's own diagonal is never read."""
    m[at.m : at.p + CHUNK * ldc] = 0
    for start in range(0, n, HALF):
        stop = min(start + HALF, n)
        if fade:
            _half_triangle_fade(m, at, start, stop, ldk, ldc, w)
        else:
            _half_triangle_plain(m, at, start, stop, ldk, ldc, w)
    if n > HALF:
        row = HALF * ldk
        ks, below = m[at.ks :], HALF * ldc
        matmul_tb(m[at.m + below :], ldc, m[at.kp + row :], ldk, ks, ldk, n - HALF, HALF, ldk, 1.0, 0.0)
        matmul_tb(m[at.p + below :], ldc, m[at.qp + row :], ldk, ks, ldk, n - HALF, HALF, ldk, 1.0, 0.0)


def _substitute(width):
    """Columns of one vector: from ``R`` in u, ``rest = R − M U`` and ``U = beta rest``, top down."""

    @device
    def substitute(m, tri, ldc, beta, n, u, rest, ld):
        for t in range(n):
            x = load(m, u + t * ld, width)
            for j in range(t):
                x = sub(x, mul(splat_at(m, tri + t * ldc + j, width), load(m, u + j * ld, width)))
            store(m, rest + t * ld, x)
            store(m, u + t * ld, mul(splat_at(m, beta + t, width), x))

    return substitute


def _substitute_back(width):
    """Columns of one vector: from ``dU`` in e, ``z = dU − Mᵀ E`` and ``E = beta z``, bottom up."""

    @device
    def substitute_back(m, tri, ldc, beta, n, e, z, ld):
        for t in range(n - 1, -1, -1):
            x = load(m, e + t * ld, width)
            for j in range(t + 1, n):
                x = sub(x, mul(splat_at(m, tri + j * ldc + t, width), load(m, e + j * ld, width)))
            store(m, z + t * ld, x)
            store(m, e + t * ld, mul(splat_at(m, beta + t, width), x))

    return substitute_back


_substitute_wide, _substitute_narrow = _substitute(WIDE), _substitute(NARROW)
_substitute_back_wide, _substitute_back_narrow = _substitute_back(WIDE), _substitute_back(NARROW)


@device
def solve(m, at, ldc, n, u, rest, ldv, back):
    """Substitution over all columns, forth or back."""
    j = 0
    while j < ldv:
        if j + lanes(m, WIDE) <= ldv:
            if back:
                _substitute_back_wide(m, at.m, ldc, at.beta, n, u + j, rest + j, ldv)
            else:
                _substitute_wide(m, at.m, ldc, at.beta, n, u + j, rest + j, ldv)
            j += lanes(m, WIDE)
        else:
            if back:
                _substitute_back_narrow(m, at.m, ldc, at.beta, n, u + j, rest + j, ldv)
            else:
                _substitute_narrow(m, at.m, ldc, at.beta, n, u + j, rest + j, ldv)
            j += lanes(m, NARROW)


@device
def predict(m, at, n, keys, ldk, ldc, ldv, s, u, rest):
    """From V in u to U, the delta family."""
    matmul(m[u:], ldv, m[at.kd :], ldk, m[s:], ldv, n, ldv, keys, -1.0, 1.0)
    solve(m, at, ldc, n, u, rest, ldv, False)


@device
def fade_rows(m, s, decay, rows, ld):
    """Multiply row i of a tile by ``m[decay + i]``."""
    for i in range(rows):
        row_scale(m, s + i * ld, ld, m[decay + i])
