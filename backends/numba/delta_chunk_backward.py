"""The adjoint of the linear and delta families a chunk at a time; notation of ``delta_chunk``.

With dY scaled and dS the gradient of S_C:

    dU = Pᵀ dY + (K∘post) dS          z_t = dU_t − Σ_{j>t} M_jt e_j,   e_t = beta_t z_t,   dV = E
    dbeta_t = ⟨z_t, u_t / beta_t⟩     dM = −E Uᵀ,   dP = dY Uᵀ
    d(Q∘pre) = dY S_0ᵀ    d(K∘pre) = −E S_0ᵀ    d(K∘post) = U dSᵀ
    dS_0 = pre_last ∘ dS + (Q∘pre)ᵀ dY − (K∘pre)ᵀ E

Where ``x = y ∘ Π d``, every factor's dg gets ``x ∘ dx``: sums of such terms over later (pre) or earlier (post) tokens,
never a difference of two large sums.
"""

from collections import namedtuple

from .compile import Flag, In, Index, Int, Out, Real, device, kernel
from .delta_chunk_rows import CHUNK, HALF, fade_rows, key_places, predict, solve, take_chunk, triangles
from .delta_rows import Head, ask, give, load_turned, normal_gradient, row_dot, row_scale, store_tile, take
from .layout import kept_row, padded, span, zeroed
from .matmul import matmul, matmul_ta, matmul_tb
from .simd import NARROW, add, fma, lanes, load, mul, splat_at, store, total, zeros

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
