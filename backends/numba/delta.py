"""The linear and delta families on a CPU, token by token: one kernel for all six mixers.

    S'_t = D_t S_{t-1}                    D_t = diag(e^{g_t}), e^{g_t} or 1
    u_t  = beta_t (v_t − S'_tᵀ k_t)       delta family; u_t = v_t in the linear one
    S_t  = S'_t + k_t u_tᵀ
    y_t  = scale · S_tᵀ q_t

    q, k [B,T,G,K]   v, y [B,T,H,V]   beta [B,T,H]   g [B,T,H,K] or [B,T,H,1]   S [N,H,K,V]

Columns of S never meet, so a work item owns a few of them, which stay in the first-level cache for a whole sequence.

Forward. One pass over the columns a token: write, read ``y_t``, and predict the next token's ``S'_{t+1}ᵀ k_{t+1}``,
whose coefficients are ``k_{t+1} ∘ D_{t+1}``. The tile lies as S does, so that all three are sums down the columns.

Backward. With ``dS_t`` the gradient of S_t, from the last token to the first:

    dS_t  += scale · q_t dy_tᵀ                      du_t = dS_tᵀ k_t
    dv_t   = beta_t du_t                            dbeta_t = ⟨du_t, v_t − p_t⟩,  p_t = S'_tᵀ k_t,  dp_t = −beta_t du_t
    dS'_t  = dS_t + k_t dp_tᵀ                       dk_t = dS_t u_t + S'_t dp_t
    dq_t   = scale · S_t dy_t                       dg_t = rowsum(dS'_t ∘ S'_t)
    dS_{t-1} = D_t dS'_t

(the linear family has dv = du and no dp). States are recomputed a segment at a time from those that the forward pass
kept, so only ``S_{t-1}`` is needed: ``S'_t = D_t S_{t-1}`` and ``S_t dy = D_t (S_{t-1} dy) + k_t ⟨u_t, dy⟩``. Here a
tile lies transposed, a row a value, so that dq, dk and dg are sums down columns that are whole vectors of keys.
With ``x̂ = x r``, ``r = (Σx² + 1e-6)^{-1/2}``, the normalisation's gradient is ``dx = r (dx̂ − x̂ ⟨x̂, dx̂⟩)``.

Sums over grouped heads and over parts of the values are written apart and added in a fixed order.

All scratch of a work item is one array ``m``; a named tuple says where in it everything begins. So an inner loop has
one base address, and Numba counts no references to a dozen of arrays.
"""

from collections import namedtuple

import numba
import numpy as np
from numba import prange

from mixers.backend import Config, Support
from mixers.delta import L2_EPS
from mixers.linear import read_scale
from mixers.problem import Arrays, Problem

from .compile import Flag, In, Index, Int, Out, Real, device, kernel
from .kernel import NumbaKernel, Partial, given
from .layout import checkpoint_row, kept_row, padded, span, zeroed
from .simd import (
    NARROW,
    add,
    exp,
    fma,
    lanes,
    load,
    load_row,
    mul,
    prefetch_row,
    splat,
    splat_at,
    store,
    store_row,
    store_totals,
    sub,
    total,
    zeros,
)

HALF = 2 * NARROW
LINE = 64  # bytes of a cache line

# Bytes of a tile: with what streams past it, it stays in a first-level cache of 32 KiB. The backward pass has two.
FORWARD_TILE = 20 * 1024
BACKWARD_TILE = 8 * 1024

# Tokens that the forward pass brings into scratch at a time.
SEGMENT = 16

# The backward pass splits the values of a head until it has this many items. A constant, because it decides the order
# of sums, and results must not depend on the number of threads.
BACKWARD_ITEMS = 8

Head = namedtuple("Head", "q k v beta decay")
"""The inputs of one head of one sequence: q, k [T,K]; v [T,V]; beta [T] or empty; decay [T,K], [T,1] or empty."""

Places = namedtuple("Places", "q k decay faded q_factor k_factor beta")
"""Where the inputs of a segment of tokens lie in scratch, a padded row of keys a token."""


# Rows of inputs and outputs


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


# Forward: S as it lies, rows are key channels


def _forward_panel(width, fade, predict):
    """Write, read and predict in the columns of one vector of ``width`` bytes."""

    @device
    def panel(m, s, ld, rows, q, k, decay, faded, u, y, p, scale):
        write = load(m, u, width)
        read = zeros(m, width)
        guess = zeros(m, width)
        for i in range(rows):
            x = load(m, s, width)
            if fade:
                x = fma(splat_at(m, decay + i, width), x, mul(splat_at(m, k + i, width), write))
            else:
                x = fma(splat_at(m, k + i, width), write, x)
            store(m, s, x)
            read = fma(splat_at(m, q + i, width), x, read)
            if predict:
                guess = fma(splat_at(m, faded + i, width), x, guess)
            s += ld
        store(m, y, mul(splat(m, scale, width), read))
        if predict:
            store(m, p, guess)

    return panel


def _forward_pass(fade, predict):
    """``_forward_panel`` over all columns, two vectors at a time."""
    half, narrow = (_forward_panel(width, fade, predict) for width in (HALF, NARROW))

    @device
    def columns(m, s, ld, rows, q, k, decay, faded, u, y, p, scale):
        j = 0
        while j + lanes(m, HALF) <= ld:
            half(m, s + j, ld, rows, q, k, decay, faded, u + j, y + j, p + j, scale)
            j += lanes(m, HALF)
        if j < ld:
            narrow(m, s + j, ld, rows, q, k, decay, faded, u + j, y + j, p + j, scale)

    return columns


_write = _forward_pass(False, False)
_write_predict = _forward_pass(False, True)
_fade_write = _forward_pass(True, False)
_fade_write_predict = _forward_pass(True, True)


@device
def predict_first(m, s, ld, rows, faded, p):
    """``p = S'ᵀ k`` of a sequence's first token."""
    for j in range(0, ld, lanes(m, NARROW)):
        acc = zeros(m, NARROW)
        for i in range(rows):
            acc = fma(splat_at(m, faded + i, NARROW), load(m, s + i * ld + j, NARROW), acc)
        store(m, p + j, acc)


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
def forward_tokens(m, at, head, y, first, start, stop, s, ld, rows, ldk, fade, delta, v, p, scale):
    """The tokens ``start … stop − 1``, of the segment from ``first`` on, which is in scratch; y takes the place of v.

    Rows of one head lie far apart, so no hardware prefetcher sees them coming: the next segment's are asked for here.
    """
    for token in range(start, stop):
        ask(head.q, token + SEGMENT)
        ask(head.k, token + SEGMENT)
        ask(head.v, token + SEGMENT)
        ask(y, token)
        if fade:
            ask(head.decay, token + SEGMENT)
        t = token - first
        key = t * ldk
        q, k, decay, faded = at.q + key, at.k + key, at.decay + key, at.faded + key + ldk
        row, factor = v + t * ld, scale * m[at.q_factor + t]
        if delta:
            correct(m, row, p, row, row, m[at.beta + t], ld)
            if fade:
                _fade_write_predict(m, s, ld, rows, q, k, decay, faded, row, row, p, factor)
            else:
                _write_predict(m, s, ld, rows, q, k, decay, faded, row, row, p, factor)
        elif fade:
            _fade_write(m, s, ld, rows, q, k, decay, faded, row, row, p, factor)
        else:
            _write(m, s, ld, rows, q, k, decay, faded, row, row, p, factor)


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
def forward_columns(head, initial, scale, normed, spacing, every, block, y, final, kept, checkpoint):
    """One head, some columns: kept [R,K,·] and checkpoint [P,K,·] are this sequence's own, empty if not wanted.

    Columns are taken a block at a time, so that the keys of a segment are made ready once for all of them.
    """
    tokens, rows = head.q.shape
    columns = y.shape[1]
    step = SEGMENT  # a divisor of the spacing
    while spacing % step:
        step -= 1
    ldv, ldk, line = padded(block, y), padded(rows, y), padded(step + 1, y)
    delta, fade = head.beta.shape[0] > 0, head.decay.shape[1] > 0
    at, v = places(step + 1, ldk, line, fade)
    guesses = v + step * ldv
    tiles = guesses + padded(columns, y)
    m = zeroed(tiles + padded(columns, y) * rows, y)
    for j in range(0, columns, block):
        part = initial[:, j : j + block]
        for i in range(rows):
            take(part, i, m, tiles + j * rows + i * padded(part.shape[1], y))
    for first in range(0, tokens, step):
        size = min(step, tokens - first)
        take_queries(head, first, size, ldk, normed, m, at)
        take_keys(head, first, min(size + 1, tokens - first), ldk, normed, m, at)
        for j in range(0, columns, block):
            stop = min(j + block, columns)
            ld, s, p = padded(stop - j, y), tiles + j * rows, guesses + j
            own = Head(head.q, head.k, head.v[:, j:stop], head.beta, head.decay)
            read = y[:, j:stop]
            for t in range(size):
                take(own.v, first + t, m, v + t * ld)
            for t in range(size if stop - j < ld else 0):  # a wider block, or y, was there
                m[v + t * ld + stop - j : v + t * ld + ld] = 0
            if delta and first == 0:
                predict_first(m, s, ld, rows, at.faded, p)
            if kept.shape[0] > 0 and first % spacing == 0:
                store_tile(m, s, ld, kept[first // spacing, :, j:stop])
            token = first
            while token < first + size:
                end = first + size
                if every > 0:
                    end = min(end, (token // every + 1) * every)
                forward_tokens(m, at, own, read, first, token, end, s, ld, rows, ldk, fade, delta, v, p, scale)
                token = end
                if every > 0 and token % every == 0:
                    store_tile(m, s, ld, checkpoint[token // every - 1, :, j:stop])
            for t in range(size):
                give(m, v + t * ld, read, first + t)
    if final.shape[0] > 0:
        for j in range(0, columns, block):
            stop = min(j + block, columns)
            store_tile(m, tiles + j * rows, padded(stop - j, y), final[0, :, j:stop])


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
    spacing: Int,
    every: Int,
    block: Int,
    parts: Int,
    y: Out[4],
    final: Out[4],
    kept: Out[4],
    checkpoint: Out[5],
):
    tokens, heads, columns = v.shape[1], v.shape[2], v.shape[3]
    blocks = (columns + block - 1) // block
    size = (blocks + parts - 1) // parts * block
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
        keep = kept_row(n, first, tokens, spacing, offsets)
        mark = checkpoint_row(n, tokens, every, offsets) - row * checkpoint.shape[1] if every > 0 else 0
        forward_columns(
            head,
            initial[n, h, :, start:stop],
            scale,
            normed,
            spacing,
            every,
            block,
            y[row, first:last, h, start:stop],
            final[n : n + 1, h, :, start:stop],
            kept[keep:, h, :, start:stop],
            checkpoint[row, mark:, h, :, start:stop],
        )


# Backward: S transposed, rows are values in fours, columns key channels


@device
def dots(m, s, ld, rows, weight, sums):
    """``sums[j] = ⟨s_j, weight⟩`` for rows in fours."""
    for j in range(0, rows, 4):
        o = s + j * ld
        a0 = zeros(m, NARROW)
        a1 = a0
        a2 = a0
        a3 = a0
        for i in range(0, ld, lanes(m, NARROW)):
            x = load(m, weight + i, NARROW)
            a0 = fma(load(m, o + i, NARROW), x, a0)
            a1 = fma(load(m, o + ld + i, NARROW), x, a1)
            a2 = fma(load(m, o + 2 * ld + i, NARROW), x, a2)
            a3 = fma(load(m, o + 3 * ld + i, NARROW), x, a3)
        store_totals(m, sums + j, a0, a1, a2, a3)


def _update_read(fade, read):
    """``to_j = D s_j + w_j k`` and ``sums_j = ⟨to_j, x⟩`` for rows in fours; ``to`` may be ``s``."""

    @device
    def update_read(m, s, to, ld, rows, w, k, decay, x, sums):
        for j in range(0, rows, 4):
            w0 = splat_at(m, w + j, NARROW)
            w1 = splat_at(m, w + j + 1, NARROW)
            w2 = splat_at(m, w + j + 2, NARROW)
            w3 = splat_at(m, w + j + 3, NARROW)
            a0 = zeros(m, NARROW)
            a1 = a0
            a2 = a0
            a3 = a0
            for i in range(0, ld, lanes(m, NARROW)):
                o = s + j * ld + i
                kv = load(m, k + i, NARROW)
                x0 = load(m, o, NARROW)
                x1 = load(m, o + ld, NARROW)
                x2 = load(m, o + 2 * ld, NARROW)
                x3 = load(m, o + 3 * ld, NARROW)
                if fade:
                    d = load(m, decay + i, NARROW)
                    x0 = mul(d, x0)
                    x1 = mul(d, x1)
                    x2 = mul(d, x2)
                    x3 = mul(d, x3)
                x0 = fma(w0, kv, x0)
                x1 = fma(w1, kv, x1)
                x2 = fma(w2, kv, x2)
                x3 = fma(w3, kv, x3)
                o = to + j * ld + i
                store(m, o, x0)
                store(m, o + ld, x1)
                store(m, o + 2 * ld, x2)
                store(m, o + 3 * ld, x3)
                if read:
                    xv = load(m, x + i, NARROW)
                    a0 = fma(x0, xv, a0)
                    a1 = fma(x1, xv, a1)
                    a2 = fma(x2, xv, a2)
                    a3 = fma(x3, xv, a3)
            if read:
                store_totals(m, sums + j, a0, a1, a2, a3)

    return update_read


_update = _update_read(False, False)
_update_predict = _update_read(False, True)
_fade_update = _update_read(True, False)
_fade_update_predict = _update_read(True, True)


def _retreat_panel(width, fade, delta):
    """One token's dq, dk and dg in one vector of key channels, and the gradient of the state before it."""

    @device
    def panel(m, ds, s, ld, rows, k, decay, u, dy, dp, own, dq, dk, dg):
        kv = load(m, k, width)
        ak = zeros(m, width)
        aq = ak
        ap = ak
        ag = ak
        d = load(m, decay, width) if fade else ak
        for j in range(rows):
            x = load(m, ds, width)
            past = load(m, s, width)
            ak = fma(splat_at(m, u + j, width), x, ak)
            aq = fma(splat_at(m, dy + j, width), past, aq)
            if delta:
                pv = splat_at(m, dp + j, width)
                x = fma(pv, kv, x)
                if fade:
                    ap = fma(pv, past, ap)
                else:
                    ak = fma(pv, past, ak)
            if fade:
                ag = fma(x, past, ag)
                x = mul(d, x)
            if fade or delta:
                store(m, ds, x)
            ds += ld
            s += ld
        if fade:
            aq = mul(d, aq)
            store(m, dg, fma(d, ag, load(m, dg, width)))
            if delta:
                ak = fma(d, ap, ak)
        store(m, dq, add(load(m, dq, width), fma(splat(m, own, width), kv, aq)))
        store(m, dk, add(load(m, dk, width), ak))

    return panel


def _retreat(fade, delta):
    """``_retreat_panel`` over all key channels."""
    half, narrow = (_retreat_panel(width, fade, delta) for width in (HALF, NARROW))

    @device
    def columns(m, ds, s, ld, rows, k, decay, u, dy, dp, own, dq, dk, dg):
        i = 0
        while i + lanes(m, HALF) <= ld:
            half(m, ds + i, s + i, ld, rows, k + i, decay + i, u, dy, dp, own, dq + i, dk + i, dg + i)
            i += lanes(m, HALF)
        if i < ld:
            narrow(m, ds + i, s + i, ld, rows, k + i, decay + i, u, dy, dp, own, dq + i, dk + i, dg + i)

    return columns


_retreat_plain = _retreat(False, False)
_retreat_delta = _retreat(False, True)
_retreat_fade = _retreat(True, False)
_retreat_fade_delta = _retreat(True, True)


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


Block = namedtuple("Block", "s u rest dy p dp dq dk dg dbeta")
"""Where the rest of a backward pass lies: states, and rows of values, a token; gradients like the inputs."""


@device
def recompute(m, at, b, size, rows, ldk, ldv, fade, delta):
    """States before each token of a segment, from the first one's; the residuals ``v − p``; and ``u`` in place of v."""
    tile = rows * ldk
    if delta:
        dots(m, b.s, ldk, rows, at.faded, b.p)
    for t in range(size):
        u, key, s = b.u + t * ldv, t * ldk, b.s + t * tile
        k, decay, faded = at.k + key, at.decay + key, at.faded + key + ldk
        if delta:
            correct(m, u, b.p, b.rest + t * ldv, u, m[at.beta + t], ldv)
        if t + 1 < size:
            if delta and fade:
                _fade_update_predict(m, s, s + tile, ldk, rows, u, k, decay, faded, b.p)
            elif delta:
                _update_predict(m, s, s + tile, ldk, rows, u, k, decay, faded, b.p)
            elif fade:
                _fade_update(m, s, s + tile, ldk, rows, u, k, decay, faded, b.p)
            else:
                _update(m, s, s + tile, ldk, rows, u, k, decay, faded, b.p)


@device
def retreat(m, at, b, head, gradient, first, start, stop, ds, rows, ldk, ldv, fade, delta):
    """Walk back over the tokens ``stop − 1 … start`` of a segment; the gradient of v takes the place of dy.

    ``first`` is the place of the segment before it, whose rows are asked for here.
    """
    for t in range(stop - 1, start - 1, -1):
        ask(head.q, first + t)
        ask(head.k, first + t)
        ask(head.v, first + t)
        ask(gradient, first + t)
        if fade:
            ask(head.decay, first + t)
        key, row = t * ldk, t * ldv
        k, decay, s = at.k + key, at.decay + key, b.s + t * rows * ldk
        u, dy, dv = b.u + row, b.dy + row, b.p
        dq, dk, dg = b.dq + key, b.dk + key, b.dg + key
        _update_predict(m, ds, ds, ldk, rows, dy, at.q + key, decay, k, dv)
        own = row_dot(m, u, dy, ldv)
        if delta:
            beta = m[at.beta + t]
            m[b.dbeta + t] += row_dot(m, dv, b.rest + row, ldv)
            row_scale(m, dv, ldv, beta)
            minus = zeros(m, NARROW)
            for j in range(0, ldv, lanes(m, NARROW)):
                store(m, b.dp + j, sub(minus, load(m, dv + j, NARROW)))
        if delta and fade:
            _retreat_fade_delta(m, ds, s, ldk, rows, k, decay, u, dy, b.dp, own, dq, dk, dg)
        elif delta:
            _retreat_delta(m, ds, s, ldk, rows, k, decay, u, dy, b.dp, own, dq, dk, dg)
        elif fade:
            _retreat_fade(m, ds, s, ldk, rows, k, decay, u, dy, b.dp, own, dq, dk, dg)
        else:
            _retreat_plain(m, ds, s, ldk, rows, k, decay, u, dy, b.dp, own, dq, dk, dg)
        for j in range(0, ldv, lanes(m, NARROW)):
            store(m, dy + j, load(m, dv + j, NARROW))


@device
def normal_gradient(m, x, dx, ldk, factor):
    """From the gradient of a normalised row to that of the row: ``dx = r (dx̂ − x̂ ⟨x̂, dx̂⟩)``."""
    along = splat(m, row_dot(m, x, dx, ldk), NARROW)
    r = splat(m, factor, NARROW)
    for i in range(0, ldk, lanes(m, NARROW)):
        store(m, dx + i, mul(r, sub(load(m, dx + i, NARROW), mul(along, load(m, x + i, NARROW)))))


@device
def give_segment(m, at, b, first, size, ldk, normed, dq, dk, dbeta, dg):
    """Write the gradients of a segment's tokens."""
    for t in range(size):
        key = t * ldk
        if normed:
            normal_gradient(m, at.q + key, b.dq + key, ldk, m[at.q_factor + t])
            normal_gradient(m, at.k + key, b.dk + key, ldk, m[at.k_factor + t])
        give(m, b.dq + key, dq, first + t)
        give(m, b.dk + key, dk, first + t)
        if dbeta.shape[0] > 0:
            dbeta[first + t] = m[b.dbeta + t]
        if dg.shape[1] == 1:
            acc = zeros(m, NARROW)
            for i in range(b.dg + key, b.dg + key + ldk, lanes(m, NARROW)):
                acc = add(acc, load(m, i, NARROW))
            dg[first + t, 0] = total(acc)
        elif dg.shape[1] > 1:
            give(m, b.dg + key, dg, first + t)


@device
def load_block(head, dy, kept, first, size, j0, width, m, b, ldk, ldv, scale):
    """Values, their gradients and the first state of a segment, for the values ``j0 … j0 + width − 1``."""
    if width < ldv:  # whatever fills up the last block must be zeros
        m[b.u : b.dq] = 0
        m[b.s + width * ldk : b.s + (width + 3) // 4 * 4 * ldk] = 0
    load_turned(kept[:, j0 : j0 + width], m, b.s, ldk)
    v, gradient = head.v[:, j0 : j0 + width], dy[:, j0 : j0 + width]
    for t in range(size):
        take(v, first + t, m, b.u + t * ldv)
        take(gradient, first + t, m, b.dy + t * ldv)
        row_scale(m, b.dy + t * ldv, ldv, scale)


@device
def backward_columns(
    head, scale, normed, spacing, every, block, kept, dy, dfinal, dcheckpoint, dq, dk, dv, dbeta, dg, dinitial
):
    """One head, some values: arrays as in ``forward_columns``, with gradients beside them."""
    tokens, keys = head.q.shape
    values = dy.shape[1]
    delta, fade = head.beta.shape[0] > 0, head.decay.shape[1] > 0
    ldk, ldv, line = padded(keys, dq), padded(block, dq), padded(spacing + 1, dq)
    rows_of_keys, rows_of_values = spacing * ldk, spacing * ldv
    at, ds = places(spacing + 1, ldk, line, fade)
    s = ds + (values + 3) // 4 * 4 * ldk
    u = s + spacing * block * ldk
    rest = u + rows_of_values
    gy = rest + rows_of_values
    p = gy + rows_of_values
    dp = p + ldv
    gq = dp + ldv
    gk = gq + rows_of_keys
    gg = gk + rows_of_keys
    gbeta = gg + rows_of_keys
    b = Block(s, u, rest, gy, p, dp, gq, gk, gg, gbeta)
    m = zeroed(gbeta + line, dq)
    load_turned(dfinal, m, ds, ldk)
    for segment in range((tokens + spacing - 1) // spacing - 1, -1, -1):
        first = segment * spacing
        size = min(spacing, tokens - first)
        take_queries(head, first, size, ldk, normed, m, at)
        if normed:
            for t in range(size):
                row_scale(m, at.q + t * ldk, ldk, m[at.q_factor + t])
        take_keys(head, first, size, ldk, normed, m, at)
        m[b.dq : b.dbeta + line] = 0
        for j0 in range(0, values, block):
            width = min(block, values - j0)
            rows, tile = (width + 3) // 4 * 4, ds + j0 * ldk
            load_block(head, dy, kept[segment], first, size, j0, width, m, b, ldk, ldv, scale)
            recompute(m, at, b, size, rows, ldk, ldv, fade, delta)
            stop = size
            while stop > 0:
                start = 0
                if every > 0:
                    last = first + stop
                    if last % every == 0:
                        add_turned(dcheckpoint[last // every - 1, :, j0 : j0 + width], m, tile, ldk)
                    start = max(0, (last - 1) // every * every - first)
                retreat(m, at, b, head, dy, first - spacing, start, stop, tile, rows, ldk, ldv, fade, delta)
                stop = start
            gradient = dv[:, j0 : j0 + width]
            for t in range(size):
                give(m, b.dy + t * ldv, gradient, first + t)
        give_segment(m, at, b, first, size, ldk, normed, dq, dk, dbeta, dg)
    for i in range(keys):
        for j in range(values):
            dinitial[i, j] = m[ds + j * ldk + i]


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
    spacing: Int,
    every: Int,
    block: Int,
    parts: Int,
    dy: In[4],
    dfinal: In[4],
    dcheckpoint: In[5],
    dq: Out[5],
    dk: Out[5],
    dv: Out[4],
    dbeta: Out[4],
    ddecay: Out[5],
    dinitial: Out[4],
):
    tokens, heads, columns = v.shape[1], v.shape[2], v.shape[3]
    share = heads // q.shape[2]
    blocks = (columns + block - 1) // block
    size = (blocks + parts - 1) // parts * block
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
        keep = kept_row(n, first, tokens, spacing, offsets)
        mark = checkpoint_row(n, tokens, every, offsets) - row * dcheckpoint.shape[1] if every > 0 else 0
        backward_columns(
            head,
            scale,
            normed,
            spacing,
            every,
            block,
            kept[keep:, h, :, start:stop],
            dy[row, first:last, h, start:stop],
            dfinal[n, h, :, start:stop],
            dcheckpoint[row, mark:, h, :, start:stop],
            dq[partial, row, first:last, g],
            dk[partial, row, first:last, g],
            dv[row, first:last, h, start:stop],
            dbeta[part, row, first:last, h],
            ddecay[part, row, first:last, h],
            dinitial[n, h, :, start:stop],
        )


# The kernel as the rest of the library sees it

FAMILY = frozenset({"linear_attention", "ssd", "gla", "delta_rule", "gated_delta_rule", "kda"})


def silence(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Zeros without memory, in place of a gradient that does not flow."""
    return np.broadcast_to(np.zeros((), dtype), shape)


class Operands:
    """What forward and backward share: inputs as the kernels want them, and the options."""

    def __init__(self, problem: Problem, x: Arrays) -> None:
        self.dtype = problem.compute_dtype
        sizes, options = problem.sizes, problem.option
        beta, decay = x.get("beta"), x.get("log_decay")
        self.beta = given(beta, 3, self.dtype)
        self.decay = given(decay if decay is None or decay.ndim == 4 else decay[..., None], 4, self.dtype)
        self.offsets = np.empty(0, np.int64) if x.get("offsets") is None else np.asarray(x["offsets"], np.int64)
        self.scale = np.dtype(self.dtype).type(read_scale(options, sizes.K))
        self.normed = bool(options.get("qk_l2norm", False))
        self.spacing = problem.spec.spacing(options)
        self.every = problem.flags.checkpoint_every
        self.initial = x["initial.state"]

    def inputs(self, x: Arrays) -> tuple[np.ndarray, ...]:
        """q, k, v, beta and decay."""
        return x["q"], x["k"], x["v"], self.beta, self.decay


def vectors(problem: Problem) -> tuple[int, int]:
    """Numbers in a hardware vector, and bytes of a number."""
    size = np.dtype(problem.compute_dtype).itemsize
    return NARROW // size, size


def forward_block(problem: Problem) -> int:
    """Columns whose tile fits the cache: as many whole vectors, by powers of two."""
    step, size = vectors(problem)
    fits = FORWARD_TILE // (max(problem.sizes.K, 1) * size)
    block = step
    while 2 * block <= fits and block < problem.sizes.V:
        block *= 2
    return block


def backward_block(problem: Problem) -> int:
    """Values whose tile fits the cache: a multiple of four, by powers of two."""
    step, size = vectors(problem)
    row = -(-max(problem.sizes.K, 1) // step) * step * size
    block = 4
    while 2 * block * row <= BACKWARD_TILE and block < problem.sizes.V:
        block *= 2
    return block


class DeltaRecurrent(NumbaKernel):
    """All six mixers token by token."""

    name = "delta.recurrent"
    form = "recurrent"
    mixers = FAMILY

    def takes(self, problem: Problem) -> Support:
        """Every problem of the two families."""
        return Support.yes()

    def configs(self, problem: Problem) -> tuple[Config, ...]:
        """``block``: columns that a work item of the forward pass owns."""
        block, (step, _) = forward_block(problem), vectors(problem)
        return tuple({"block": b} for b in (block, 2 * block, block // 2) if b >= step)

    def forward(self, problem: Problem, config: Config, x: Arrays, out: Arrays) -> None:
        """See ``mixers.backend.Kernel``."""
        o, sizes = Operands(problem, x), problem.sizes
        step, _ = vectors(problem)
        block, heads = config["block"], max(sizes.N * sizes.H, 1)
        # Columns are independent: how they are shared out changes no bit of the result.
        threads = numba.get_num_threads()
        while block > step and heads * -(-sizes.V // block) < threads:
            block //= 2
        parts = max(1, min(-(-sizes.V // block), -(-threads // heads)))
        checkpoint = out.get("checkpoint.state")
        if checkpoint is not None and x.get("offsets") is not None:
            checkpoint[0, int((np.diff(o.offsets) // o.every).sum()) :] = 0
        forward(
            problem.work() / 2,
            *o.inputs(x),
            o.initial,
            o.offsets,
            o.scale,
            o.normed,
            o.spacing,
            0 if checkpoint is None else o.every,
            block,
            parts,
            out["y"],
            given(out.get("final.state"), 4, o.dtype),
            given(out.get("kept.state"), 4, o.dtype),
            given(checkpoint, 5, o.dtype),
        )

    def backward(self, problem: Problem, config: Config, x: Arrays, out: Arrays, dout: Arrays, dx: Arrays) -> None:
        """See ``mixers.backend.Kernel``."""
        o, sizes = Operands(problem, x), problem.sizes
        block = backward_block(problem)
        parts = max(1, min(-(-sizes.V // block), BACKWARD_ITEMS // max(sizes.N * sizes.H, 1)))
        share = sizes.H // max(sizes.G, 1) * parts
        dq, dk = (Partial(dx[name], share) for name in ("q", "k"))
        dbeta = Partial(dx.get("beta"), parts)
        ddecay = Partial(dx.get("log_decay"), parts)
        dy, dfinal, dcheckpoint = (dout.get(name) for name in ("y", "final.state", "checkpoint.state"))
        dinitial = dx.get("initial.state")
        backward(
            problem.work() * 2,
            *o.inputs(x),
            out["kept.state"],
            o.offsets,
            o.scale,
            o.normed,
            o.spacing,
            0 if dcheckpoint is None else o.every,
            block,
            parts,
            silence(out["y"].shape, o.dtype) if dy is None else dy,
            silence(o.initial.shape, o.dtype) if dfinal is None else dfinal,
            given(dcheckpoint, 5, o.dtype),
            dq.array,
            dk.array,
            dx["v"],
            given(dbeta.array, 4, o.dtype),
            given(None if ddecay.array is None else ddecay.array.reshape(parts, *o.decay.shape), 5, o.dtype),
            np.empty(o.initial.shape, o.dtype) if dinitial is None else dinitial,
        )
        for gradient in (dq, dk, dbeta, ddecay):
            gradient.add_up()


KERNELS = (DeltaRecurrent(),)
