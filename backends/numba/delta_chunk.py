"""The linear and delta families on a CPU, a chunk of tokens at a time: matrix products in place of rank-one updates.

Notation of ``delta``; a chunk's tokens are rows of matrices, S_0 is the state before it. With products of decays

    pre_t = D_first … D_t      post_j = D_{j+1} … D_last      D_tj = D_{j+1} … D_t

    M_tj = ⟨k_t, D_tj k_j⟩ for j < t          P_tj = ⟨q_t, D_tj k_j⟩ for j ≤ t
    R = V − (K∘pre) S_0                       u_t = beta_t (R_t − Σ_{j<t} M_tj u_j), by substitution
    Y = scale · ((Q∘pre) S_0 + P U)           S_C = pre_last ∘ S_0 + (K∘post)ᵀ U

(linear family: U = V). Decays are only ever multiplied together, numbers in [0, 1]: nothing overflows, and a hard reset
is a plain zero. A chunk is two halves. Inside a half M and P are built by letting every k_j fade, token by token; the
half below the diagonal is a matrix product, ``D_tj = pb_t ∘ sb_j`` with products counted from the border between them.

Backward, with dY scaled and dS the gradient of S_C:

    dU = Pᵀ dY + (K∘post) dS          z_t = dU_t − Σ_{j>t} M_jt e_j,   e_t = beta_t z_t,   dV = E
    dbeta_t = ⟨z_t, u_t / beta_t⟩     dM = −E Uᵀ,   dP = dY Uᵀ
    d(Q∘pre) = dY S_0ᵀ    d(K∘pre) = −E S_0ᵀ    d(K∘post) = U dSᵀ
    dS_0 = pre_last ∘ dS + (Q∘pre)ᵀ dY − (K∘pre)ᵀ E

Where ``x = y ∘ Π d``, every factor's dg gets ``x ∘ dx``: sums of such terms over later (pre) or earlier (post) tokens,
never a difference of two large sums.
"""

from collections import namedtuple

import numba
import numpy as np
from numba import prange

from mixers.backend import Config, Support
from mixers.problem import Arrays, Problem

from .compile import Flag, In, Index, Int, Out, Real, device, kernel
from .delta import (
    BACKWARD_ITEMS,
    FAMILY,
    Head,
    Operands,
    ask,
    give,
    load_turned,
    norm_factor,
    normal_gradient,
    row_dot,
    row_scale,
    silence,
    store_tile,
    take,
    take_decay,
)
from .kernel import NumbaKernel, Partial, given
from .layout import kept_row, padded, span, zeroed
from .matmul import matmul, matmul_ta, matmul_tb
from .simd import (
    NARROW,
    WIDE,
    add,
    fma,
    lanes,
    load,
    mul,
    splat_at,
    store,
    store_totals,
    sub,
    total,
    zeros,
)

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
def add_times(m, to, a, b, width):
    """``to += a ∘ b``, padded rows."""
    for i in range(0, width, lanes(m, NARROW)):
        store(m, to + i, fma(load(m, a + i, NARROW), load(m, b + i, NARROW), load(m, to + i, NARROW)))


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


@device
def forward_item(head, initial, scale, normed, y, final, kept):
    """One head, some columns; kept [R,K,·] is this sequence's own, empty if not wanted."""
    tokens, keys = head.q.shape
    ldk, ldv, ldc = padded(keys, y), padded(y.shape[1], y), padded(CHUNK, y)
    delta, fade = head.beta.shape[0] > 0, head.decay.shape[1] > 0
    at, w = key_places(ldk, ldc, fade)
    u = w + 4 * ldk
    rest = u + CHUNK * ldv
    read = rest + CHUNK * ldv
    s = read + CHUNK * ldv
    m = zeroed(s + keys * ldv, y)
    for i in range(keys):
        take(initial, i, m, s + i * ldv)
    for first in range(0, tokens, CHUNK):
        n = min(CHUNK, tokens - first)
        if kept.shape[0] > 0:
            store_tile(m, s, ldv, kept[first // CHUNK])
        take_chunk(head, first, n, ldk, normed, m, at)
        for t in range(n):
            take(head.v, first + t, m, u + t * ldv)
            ask(head.q, first + CHUNK + t)
            ask(head.k, first + CHUNK + t)
            ask(head.v, first + CHUNK + t)
        triangles(m, at, n, ldk, ldc, fade, w)
        if delta:
            predict(m, at, n, keys, ldk, ldc, ldv, s, u, rest)
        matmul(m[read:], ldv, m[at.qd :], ldk, m[s:], ldv, n, ldv, keys, scale, 0.0)
        top = min(n, HALF)
        matmul(m[read:], ldv, m[at.p :], ldc, m[u:], ldv, top, ldv, top, scale, 1.0)
        if n > HALF:
            bottom = m[read + HALF * ldv :]
            matmul(bottom, ldv, m[at.p + HALF * ldc :], ldc, m[u:], ldv, n - HALF, ldv, n, scale, 1.0)
        if fade:
            fade_rows(m, s, at.pre + (n - 1) * ldk, keys, ldv)
        matmul_ta(m[s:], ldv, m[at.ke :], ldk, m[u:], ldv, keys, ldv, n, 1.0, 1.0)
        for t in range(n):
            give(m, read + t * ldv, y, first + t)
    if final.shape[0] > 0:
        store_tile(m, s, ldv, final[0])


@kernel
def forward(
    q: In[4],
    k: In[4],
    v: In[4],
    beta: In[3],
    decay: In[4],
    initial: In[4],
    offsets: Index[1],
    scale: Real,
    normed: Flag,
    parts: Int,
    y: Out[4],
    final: Out[4],
    kept: Out[4],
):
    tokens, heads, columns = v.shape[1], v.shape[2], v.shape[3]
    size = (columns + parts - 1) // parts
    for item in prange(initial.shape[0] * heads * parts):
        n, h, part = item // parts // heads, item // parts % heads, item % parts
        start, stop = min(part * size, columns), min(part * size + size, columns)
        row, first, last = span(n, tokens, offsets)
        g = h // (heads // q.shape[2])
        head = Head(
            q[row, first:last, g],
            k[row, first:last, g],
            v[row, first:last, h, start:stop],
            beta[row, first:last, h],
            decay[row, first:last, h],
        )
        forward_item(
            head,
            initial[n, h, :, start:stop],
            scale,
            normed,
            y[row, first:last, h, start:stop],
            final[n : n + 1, h, :, start:stop],
            kept[kept_row(n, first, tokens, CHUNK, offsets) :, h, :, start:stop],
        )


# Backward

Gradients = namedtuple("Gradients", "qd kd ke qp kp ks q k g m p")
"""Where gradients lie, named as what they are gradients of."""


@device
def gradient_places(begin, ldk, ldc):
    """Places of gradients, and the first free one."""
    size = CHUNK * ldk
    m = begin + 9 * size
    p = m + CHUNK * ldc
    return (
        Gradients(
            begin,
            begin + size,
            begin + 2 * size,
            begin + 3 * size,
            begin + 4 * size,
            begin + 5 * size,
            begin + 6 * size,
            begin + 7 * size,
            begin + 8 * size,
            m,
            p,
        ),
        p + CHUNK * ldc,
    )


def _half_triangle_back(fade, delta):
    """Gradients through M and P inside one half, one vector of key channels at a time."""

    @device
    def half_triangle_back(m, at, g, start, stop, ldk, ldc, w):
        step = lanes(m, NARROW)
        for i in range(0, ldk, step):
            for j in range(start, stop):
                # The key fades from token to token, and leaves its trace in w ...
                x = load(m, at.k + j * ldk + i, NARROW)
                for t in range(j, stop):
                    row = t * ldk + i
                    if fade and t > j:
                        x = mul(x, load(m, at.d + row, NARROW))
                        store(m, w + (t - j) * step, x)
                    dp = splat_at(m, g.p + t * ldc + j, NARROW)
                    store(m, g.q + row, fma(dp, x, load(m, g.q + row, NARROW)))
                    if delta and t > j:
                        dm = splat_at(m, g.m + t * ldc + j, NARROW)
                        store(m, g.k + row, fma(dm, x, load(m, g.k + row, NARROW)))
                # ... along which its gradient comes back.
                dx = zeros(m, NARROW)
                for t in range(stop - 1, j - 1, -1):
                    row = t * ldk + i
                    dx = fma(splat_at(m, g.p + t * ldc + j, NARROW), load(m, at.q + row, NARROW), dx)
                    if t > j:
                        if delta:
                            dx = fma(splat_at(m, g.m + t * ldc + j, NARROW), load(m, at.k + row, NARROW), dx)
                        if fade:
                            past = load(m, w + (t - j) * step, NARROW)
                            store(m, g.g + row, fma(dx, past, load(m, g.g + row, NARROW)))
                            dx = mul(dx, load(m, at.d + row, NARROW))
                row = j * ldk + i
                store(m, g.k + row, add(load(m, g.k + row, NARROW), dx))

    return half_triangle_back


_half_back_plain = _half_triangle_back(False, False)
_half_back_delta = _half_triangle_back(False, True)
_half_back_fade = _half_triangle_back(True, False)
_half_back_fade_delta = _half_triangle_back(True, True)


@device
def triangles_back(m, at, g, n, ldk, ldc, fade, delta, w):
    """From gradients of M and P to those of q, k and g inside halves, and of qp, kp and ks between them."""
    m[g.q : g.m] = 0
    for start in range(0, n, HALF):
        stop = min(start + HALF, n)
        if fade and delta:
            _half_back_fade_delta(m, at, g, start, stop, ldk, ldc, w)
        elif fade:
            _half_back_fade(m, at, g, start, stop, ldk, ldc, w)
        elif delta:
            _half_back_delta(m, at, g, start, stop, ldk, ldc, w)
        else:
            _half_back_plain(m, at, g, start, stop, ldk, ldc, w)
    if n > HALF:
        row, below, size = HALF * ldk, HALF * ldc, n - HALF
        dp, dm, ks = m[g.p + below :], m[g.m + below :], m[at.ks :]
        matmul(m[g.qp + row :], ldk, dp, ldc, ks, ldk, size, ldk, HALF, 1.0, 0.0)
        matmul_ta(m[g.ks :], ldk, dp, ldc, m[at.qp + row :], ldk, HALF, ldk, size, 1.0, 0.0)
        if delta:
            matmul(m[g.kp + row :], ldk, dm, ldc, ks, ldk, size, ldk, HALF, 1.0, 0.0)
            matmul_ta(m[g.ks :], ldk, dm, ldc, m[at.kp + row :], ldk, HALF, ldk, size, 1.0, 1.0)


@device
def gather_plain(m, g, n, ldk, delta):
    """Without decays every faded key is the key: add its gradients up."""
    for i in range(0, n * ldk, lanes(m, NARROW)):
        dq = add(load(m, g.q + i, NARROW), load(m, g.qd + i, NARROW))
        dk = add(load(m, g.k + i, NARROW), load(m, g.ke + i, NARROW))
        if delta:
            dk = add(dk, load(m, g.kd + i, NARROW))
        if n > HALF:
            if i < HALF * ldk:
                dk = add(dk, load(m, g.ks + i, NARROW))
            else:
                dq = add(dq, load(m, g.qp + i, NARROW))
                if delta:
                    dk = add(dk, load(m, g.kp + i, NARROW))
        store(m, g.q + i, dq)
        store(m, g.k + i, dk)


@device
def gather_fade(m, at, g, n, ldk, delta, through):
    """Gradients of faded rows to those of rows and of decays; ``through`` is what the state's own decay gets."""
    for i in range(0, ldk, lanes(m, NARROW)):
        later = load(m, through + i, NARROW)
        border = zeros(m, NARROW)
        for t in range(n - 1, -1, -1):  # factors that reach back to the chunk's first token, or to the border
            row = t * ldk + i
            pre, dqd = load(m, at.pre + row, NARROW), load(m, g.qd + row, NARROW)
            dq, dk = fma(dqd, pre, load(m, g.q + row, NARROW)), load(m, g.k + row, NARROW)
            later = fma(dqd, load(m, at.qd + row, NARROW), later)
            if delta:
                dkd = load(m, g.kd + row, NARROW)
                dk = fma(dkd, pre, dk)
                later = fma(dkd, load(m, at.kd + row, NARROW), later)
            dg = add(load(m, g.g + row, NARROW), later)
            if t >= HALF:
                pb, dqp = load(m, at.pb + row, NARROW), load(m, g.qp + row, NARROW)
                dq = fma(dqp, pb, dq)
                border = fma(dqp, load(m, at.qp + row, NARROW), border)
                if delta:
                    dkp = load(m, g.kp + row, NARROW)
                    dk = fma(dkp, pb, dk)
                    border = fma(dkp, load(m, at.kp + row, NARROW), border)
                dg = add(dg, border)
            store(m, g.q + row, dq)
            store(m, g.k + row, dk)
            store(m, g.g + row, dg)
        earlier = zeros(m, NARROW)
        border = earlier
        for t in range(n):  # factors that reach on to the chunk's last token, or to the border
            row = t * ldk + i
            dg, dk = add(load(m, g.g + row, NARROW), earlier), load(m, g.k + row, NARROW)
            dke = load(m, g.ke + row, NARROW)
            dk = fma(dke, load(m, at.post + row, NARROW), dk)
            earlier = fma(dke, load(m, at.ke + row, NARROW), earlier)
            if t < HALF and n > HALF:
                dg = add(dg, border)
                dks = load(m, g.ks + row, NARROW)
                dk = fma(dks, load(m, at.sb + row, NARROW), dk)
                border = fma(dks, load(m, at.ks + row, NARROW), border)
            store(m, g.k + row, dk)
            store(m, g.g + row, dg)


@device
def give_chunk(m, at, g, first, n, ldk, normed, dq, dk, dg):
    """Write the gradients of a chunk's keys."""
    for t in range(n):
        row = t * ldk
        if normed:
            normal_gradient(m, at.q + row, g.q + row, ldk, m[at.factors + t])
            normal_gradient(m, at.k + row, g.k + row, ldk, m[at.factors + CHUNK + t])
        give(m, g.q + row, dq, first + t)
        give(m, g.k + row, dk, first + t)
        if dg.shape[1] == 1:
            acc = zeros(m, NARROW)
            for i in range(g.g + row, g.g + row + ldk, lanes(m, NARROW)):
                acc = add(acc, load(m, i, NARROW))
            dg[first + t, 0] = total(acc)
        elif dg.shape[1] > 1:
            give(m, g.g + row, dg, first + t)


@device
def backward_item(head, scale, normed, kept, dy, dfinal, dq, dk, dv, dbeta, dg, dinitial):
    """One head, some values: arrays as in ``forward_item``, with gradients beside them."""
    tokens, keys = head.q.shape
    columns = dy.shape[1]
    ldk, ldv, ldc = padded(keys, dq), padded(columns, dq), padded(CHUNK, dq)
    delta, fade = head.beta.shape[0] > 0, head.decay.shape[1] > 0
    at, free = key_places(ldk, ldc, fade)
    g, w = gradient_places(free, ldk, ldc)
    u = w + max(4 * ldk, HALF * lanes(dq, NARROW))
    rest = u + CHUNK * ldv
    gy = rest + CHUNK * ldv
    e = gy + CHUNK * ldv
    z = e + CHUNK * ldv
    s = z + CHUNK * ldv
    turned = s + keys * ldv
    ds = turned + columns * ldk
    through = ds + keys * ldv
    m = zeroed(through + ldk, dq)
    for i in range(keys):
        take(dfinal, i, m, ds + i * ldv)
    for chunk in range((tokens + CHUNK - 1) // CHUNK - 1, -1, -1):
        first = chunk * CHUNK
        n = min(CHUNK, tokens - first)
        take_chunk(head, first, n, ldk, normed, m, at)
        for t in range(n):
            take(head.v, first + t, m, u + t * ldv)
            take(dy, first + t, m, gy + t * ldv)
            row_scale(m, gy + t * ldv, ldv, scale)
            ask(head.q, first - CHUNK + t)
            ask(head.k, first - CHUNK + t)
            ask(head.v, first - CHUNK + t)
            ask(dy, first - CHUNK + t)
        before = kept[chunk]
        for i in range(keys):
            take(before, i, m, s + i * ldv)
        load_turned(before, m, turned, ldk)
        triangles(m, at, n, ldk, ldc, fade, w)
        if delta:
            predict(m, at, n, keys, ldk, ldc, ldv, s, u, rest)
        # Gradients of U, then of V
        matmul(m[e:], ldv, m[at.ke :], ldk, m[ds:], ldv, n, ldv, keys, 1.0, 0.0)
        matmul_ta(m[e:], ldv, m[at.p :], ldc, m[gy:], ldv, min(n, HALF), ldv, n, 1.0, 1.0)
        if n > HALF:
            p = m[at.p + HALF * ldc + HALF :]
            matmul_ta(m[e + HALF * ldv :], ldv, p, ldc, m[gy + HALF * ldv :], ldv, n - HALF, ldv, n - HALF, 1.0, 1.0)
        matmul_tb(m[g.p :], ldc, m[gy:], ldv, m[u:], ldv, n, n, ldv, 1.0, 0.0)
        if delta:
            solve(m, at, ldc, n, e, z, ldv, True)
            matmul_tb(m[g.m :], ldc, m[e:], ldv, m[u:], ldv, n, n, ldv, -1.0, 0.0)
            matmul(m[g.kd :], ldk, m[e:], ldv, m[turned:], ldk, n, ldk, columns, -1.0, 0.0)
            for t in range(n):
                dbeta[first + t] = row_dot(m, z + t * ldv, rest + t * ldv, ldv)
        matmul(m[g.qd :], ldk, m[gy:], ldv, m[turned:], ldk, n, ldk, columns, 1.0, 0.0)
        matmul_tb(m[g.ke :], ldk, m[u:], ldv, m[ds:], ldv, n, keys, ldv, 1.0, 0.0)
        triangles_back(m, at, g, n, ldk, ldc, fade, delta, w)
        if fade:
            decay = at.pre + (n - 1) * ldk
            for i in range(keys):
                m[through + i] = m[decay + i] * row_dot(m, s + i * ldv, ds + i * ldv, ldv)
            gather_fade(m, at, g, n, ldk, delta, through)
            fade_rows(m, ds, decay, keys, ldv)
        else:
            gather_plain(m, g, n, ldk, delta)
        matmul_ta(m[ds:], ldv, m[at.qd :], ldk, m[gy:], ldv, keys, ldv, n, 1.0, 1.0)
        if delta:
            matmul_ta(m[ds:], ldv, m[at.kd :], ldk, m[e:], ldv, keys, ldv, n, -1.0, 1.0)
        give_chunk(m, at, g, first, n, ldk, normed, dq, dk, dg)
        for t in range(n):
            give(m, e + t * ldv, dv, first + t)
    store_tile(m, ds, ldv, dinitial)


@kernel
def backward(
    q: In[4],
    k: In[4],
    v: In[4],
    beta: In[3],
    decay: In[4],
    kept: In[4],
    offsets: Index[1],
    scale: Real,
    normed: Flag,
    parts: Int,
    dy: In[4],
    dfinal: In[4],
    dq: Out[5],
    dk: Out[5],
    dv: Out[4],
    dbeta: Out[4],
    ddecay: Out[5],
    dinitial: Out[4],
):
    tokens, heads, columns = v.shape[1], v.shape[2], v.shape[3]
    share = heads // q.shape[2]
    size = (columns + parts - 1) // parts
    for item in prange(dinitial.shape[0] * heads * parts):
        n, h, part = item // parts // heads, item // parts % heads, item % parts
        start, stop = min(part * size, columns), min(part * size + size, columns)
        row, first, last = span(n, tokens, offsets)
        g, partial = h // share, h % share * parts + part
        head = Head(
            q[row, first:last, g],
            k[row, first:last, g],
            v[row, first:last, h, start:stop],
            beta[row, first:last, h],
            decay[row, first:last, h],
        )
        backward_item(
            head,
            scale,
            normed,
            kept[kept_row(n, first, tokens, CHUNK, offsets) :, h, :, start:stop],
            dy[row, first:last, h, start:stop],
            dfinal[n, h, :, start:stop],
            dq[partial, row, first:last, g],
            dk[partial, row, first:last, g],
            dv[row, first:last, h, start:stop],
            dbeta[part, row, first:last, h],
            ddecay[part, row, first:last, h],
            dinitial[n, h, :, start:stop],
        )


class DeltaChunk(NumbaKernel):
    """All six mixers a chunk at a time."""

    name = "delta.chunk"
    form = "chunk"
    mixers = FAMILY

    def takes(self, problem: Problem) -> Support:
        """Any problem but one whose checkpoints may fall inside of a chunk."""
        if problem.flags.checkpoint_every:
            return Support.no("checkpoints may fall inside of a chunk; delta.recurrent writes them")
        if problem.spec.spacing(problem.option) != CHUNK:
            return Support.no(f"the states kept for the backward pass are not {CHUNK} tokens apart")
        return Support.yes()

    def configs(self, problem: Problem) -> tuple[Config, ...]:
        """``block_t``: tokens in a chunk, fixed by the states that the forward pass keeps."""
        return ({"block_t": CHUNK},)

    def forward(self, problem: Problem, config: Config, x: Arrays, out: Arrays) -> None:
        """See ``mixers.backend.Kernel``."""
        o, sizes = Operands(problem, x), problem.sizes
        heads = max(sizes.N * sizes.H, 1)
        forward(
            problem.work() / 2,
            *o.inputs(x),
            o.initial,
            o.offsets,
            o.scale,
            o.normed,
            # Columns are independent: how they are shared out changes no bit of the result.
            max(1, min(sizes.V // 16, -(-numba.get_num_threads() // heads))),
            out["y"],
            given(out.get("final.state"), 4, o.dtype),
            given(out.get("kept.state"), 4, o.dtype),
        )

    def backward(self, problem: Problem, config: Config, x: Arrays, out: Arrays, dout: Arrays, dx: Arrays) -> None:
        """See ``mixers.backend.Kernel``."""
        o, sizes = Operands(problem, x), problem.sizes
        parts = max(1, min(sizes.V // 32, BACKWARD_ITEMS // max(sizes.N * sizes.H, 1)))
        share = sizes.H // max(sizes.G, 1) * parts
        dq, dk = (Partial(dx[name], share) for name in ("q", "k"))
        dbeta, ddecay = (Partial(dx.get(name), parts) for name in ("beta", "log_decay"))
        dy, dfinal, dinitial = dout.get("y"), dout.get("final.state"), dx.get("initial.state")
        backward(
            problem.work() * 2,
            *o.inputs(x),
            out["kept.state"],
            o.offsets,
            o.scale,
            o.normed,
            parts,
            silence(out["y"].shape, o.dtype) if dy is None else dy,
            silence(o.initial.shape, o.dtype) if dfinal is None else dfinal,
            dq.array,
            dk.array,
            dx["v"],
            given(dbeta.array, 4, o.dtype),
            given(None if ddecay.array is None else ddecay.array.reshape(parts, *o.decay.shape), 5, o.dtype),
            np.empty(o.initial.shape, o.dtype) if dinitial is None else dinitial,
        )
        for gradient in (dq, dk, dbeta, ddecay):
            gradient.add_up()


KERNELS = (DeltaChunk(),)
