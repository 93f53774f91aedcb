"""The adjoint of the linear and delta families, token by token; notation of ``delta``.

With ``dS_t`` the gradient of S_t, from the last token to the first:

    dS_t  += scale · q_t dy_tᵀ                      du_t = dS_tᵀ k_t
    dv_t   = beta_t du_t                            dbeta_t = ⟨du_t, v_t − p_t⟩,  p_t = S'_tᵀ k_t,  dp_t = −beta_t du_t
    dS'_t  = dS_t + k_t dp_tᵀ                       dk_t = dS_t u_t + S'_t dp_t
    dq_t   = scale · S_t dy_t                       dg_t = rowsum(dS'_t ∘ S'_t)
    dS_{t-1} = D_t dS'_t

(the linear family has dv = du and no dp). States are recomputed a segment at a time from those that the forward pass
kept, so only ``S_{t-1}`` is needed: ``S'_t = D_t S_{t-1}`` and ``S_t dy = D_t (S_{t-1} dy) + k_t ⟨u_t, dy⟩``. Here a
tile lies transposed, a row a value, so that dq, dk and dg are sums down columns that are whole vectors of keys.
With ``x̂ = x r``, ``r = (Σx² + 1e-6)^{-1/2}``, the normalisation's gradient is ``dx = r (dx̂ − x̂ ⟨x̂, dx̂⟩)``.
"""

from collections import namedtuple

from .compile import Flag, In, Index, Int, Out, Real, device, kernel
from .delta_rows import (
    Head,
    add_turned,
    ask,
    correct,
    give,
    load_turned,
    normal_gradient,
    places,
    row_dot,
    row_scale,
    take,
    take_keys,
    take_queries,
)
from .layout import checkpoint_row, kept_row, padded, span, zeroed
from .simd import NARROW, PAIR, add, fma, lanes, load, mul, splat, splat_at, store, store_totals, sub, total, zeros


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
    half, narrow = (_retreat_panel(width, fade, delta) for width in (PAIR, NARROW))

    @device
    def columns(m, ds, s, ld, rows, k, decay, u, dy, dp, own, dq, dk, dg):
        i = 0
        while i + lanes(m, PAIR) <= ld:
            half(m, ds + i, s + i, ld, rows, k + i, decay + i, u, dy, dp, own, dq + i, dk + i, dg + i)
            i += lanes(m, PAIR)
        if i < ld:
            narrow(m, ds + i, s + i, ld, rows, k + i, decay + i, u, dy, dp, own, dq + i, dk + i, dg + i)

    return columns


_retreat_plain = _retreat(False, False)
_retreat_delta = _retreat(False, True)
_retreat_fade = _retreat(True, False)
_retreat_fade_delta = _retreat(True, True)
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
    begin: Int,
    end: Int,
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
    for item in range(begin, end):
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
