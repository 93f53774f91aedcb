"""TTT-linear in mini-batches: the tokens of one are rows of matrices, so that nearly all the work is products.

Rows are tokens i of a piece of a mini-batch that starts with weights W, c and running sums A, a (0 at a mini-batch's
first token). ``P⟂x̂ = P − mean(P) − x̂ mean(P∘x̂)`` is the derivative of a standardisation, its own adjoint.

    Z = K W + c       x̂ = (Z − mean)/std      e = w∘x̂ + w_b − (V − K)      h = w∘e
    G = (h ⟂ x̂)/std   E = beta∘G              S = tril(Q Kᵀ + 1)            R = S E + Q A + a
    Z̄ = Q W + c − rate∘R        x̄ = (Z̄ − mean)/std̄        y = Q + w∘x̄ + w_b        rate_i = token_scale of token i
    A ← A + Kᵀ E      a ← a + Σ E;  at the end of the mini-batch (τ = its last rate)  W ← W − τA, c ← c − τa, A, a ← 0

Adjoint of a piece, with ``d`` the gradient of a loss and dW, dc, dA, da those of the state behind it, from the last
piece to the first. A mini-batch that ends here sends dA = −τ dW, da = −τ dc, dτ = −⟨dW, A⟩ − ⟨dc, a⟩ back.

    dZ̄ = ((w∘dy) ⟂ x̄)/std̄     N = dR = −rate∘dZ̄     drate = −⟨dZ̄, R⟩          dS = tril(N Eᵀ)
    dE = K dA + da + Sᵀ N       dbeta = ⟨dE, G⟩       Γ = beta∘dE/std
    dh = Γ ⟂ x̂                  de = w∘dh             dx̂ = w∘de − Γ mean(h∘x̂) − h mean(Γ∘x̂)
    dZ = (dx̂ ⟂ x̂)/std − x̂ mean(Γ∘G)      the second order: G itself holds x̂ (twice) and std
    dV = −de        dK = de + E dAᵀ + dSᵀ Q + dZ Wᵀ        dQ = dy + dS K + dZ̄ Wᵀ + N Aᵀ
    dW += Kᵀ dZ + Qᵀ dZ̄     dc += Σ dZ + dZ̄     dA += Qᵀ N     da += Σ N
    dw = Σ dy∘x̄ + dh∘e + de∘x̂     dw_b = Σ dy + de

    q, k [B,T,G,D]   v, y [B,T,H,D]   beta [B,T,H]   W, A [N,H,D,D]   c, a [N,H,D]   w, w_b [H,D]   token_scale [C]

Kept for the backward: W, c at every ``spacing`` tokens (whole mini-batches) but the first, which is the first state.
"""

from typing import Any

import numpy as np
from numba import prange

from mixers.backend import Config, Support
from mixers.problem import Arrays, Problem

from .compile import Count, In, Index, Int, Out, Parts, device, kernel
from .kernel import NumbaKernel, given
from .layout import add_tile, checkpoint_row, kept_row, load_tile, padded, scratch, span, store_tile, zeroed
from .matmul import matmul, matmul_ta, matmul_tb
from .rows import load_head, store_head
from .simd import NARROW, add, fma, lanes, load, mul, splat, store, sub, total, zeros

NORM_EPS = 1e-6

# A state as callers hold it: W, A, c, a.
PARTS = ("weight", "weight_sum", "bias", "bias_sum")
IN_STATE: Any = Parts(In[4], In[4], In[3], In[3])
OUT_STATE: Any = Parts(Out[4], Out[4], Out[3], Out[3])

# The most tokens of one piece: a longer mini-batch goes on through its running sums.
PIECE = 64


@device
def piece_length(t, stop, phase, chunk, every):
    """Tokens from ``t`` on that share a mini-batch, end before ``stop`` and pass no checkpoint."""
    count = min(stop - t, chunk - (t + phase) % chunk, PIECE)
    return min(count, every - t % every) if every > 0 else count


@device
def clear(tile, first, count):
    """Zeros in ``count`` elements from ``first`` on."""
    for i in range(first, first + count):
        tile[i] = 0


@device
def add_row(target, at, source, start, ld, factor):
    """A row of ``target`` plus ``factor`` times one of ``source``."""
    times = splat(target, factor, NARROW)
    for j in range(0, ld, lanes(target, NARROW)):
        store(target, at + j, fma(times, load(source, start + j, NARROW), load(target, at + j, NARROW)))


@device
def dot_row(x, at, y, start, ld):
    """The dot product of two rows."""
    sums = zeros(x, NARROW)
    for j in range(0, ld, lanes(x, NARROW)):
        sums = fma(load(x, at + j, NARROW), load(y, start + j, NARROW), sums)
    return total(sums)


@device
def scale_row(x, at, ld, factor):
    """A row times ``factor``."""
    times = splat(x, factor, NARROW)
    for j in range(at, at + ld, lanes(x, NARROW)):
        store(x, j, mul(times, load(x, j, NARROW)))


@device
def standardise(z, at, affine, ld, share, x):
    """``x = (z − mean)/std`` of the row at ``at``; returns 1/std. ``share`` is 1/D."""
    step = lanes(x, NARROW)
    sums = zeros(x, NARROW)
    for j in range(0, ld, step):
        sums = add(sums, load(z, at + j, NARROW))
    mean = splat(x, total(sums) * share, NARROW)
    sums = zeros(x, NARROW)
    for j in range(0, ld, step):
        centred = mul(sub(load(z, at + j, NARROW), mean), load(affine, 2 * ld + j, NARROW))
        store(x, at + j, centred)
        sums = fma(centred, centred, sums)
    inverse = x.dtype.type(1) / np.sqrt(total(sums) * share + x.dtype.type(NORM_EPS))
    scale_row(x, at, ld, inverse)
    return inverse


@device
def project(p, at, x, at_x, affine, ld, share, factor, out, at_out):
    """``out = factor · (p ⟂ x)``, row by row; returns mean(p∘x)."""
    step = lanes(x, NARROW)
    sums, along = zeros(x, NARROW), zeros(x, NARROW)
    for j in range(0, ld, step):
        value = load(p, at + j, NARROW)
        sums = add(sums, value)
        along = fma(value, load(x, at_x + j, NARROW), along)
    slope = total(along) * share
    mean, times, shift = splat(x, total(sums) * share, NARROW), splat(x, factor, NARROW), splat(x, slope, NARROW)
    for j in range(0, ld, step):
        rest = sub(sub(load(p, at + j, NARROW), mean), mul(shift, load(x, at_x + j, NARROW)))
        store(out, at_out + j, mul(mul(rest, load(affine, 2 * ld + j, NARROW)), times))
    return slope


@device
def copy(source, start, target, at, count):
    """``target[at : at + count] = source[start : start + count]``."""
    for i in range(count):
        target[at + i] = source[start + i]


@device
def unpack(parts, n, head, state, width, ld):
    """A state as callers hold it, ``(W, A, c, a)``, into padded scratch, one below another."""
    tile = width * ld
    clear(state, 0, 2 * tile + 2 * ld)
    load_tile(parts[0][n, head], state, ld)
    load_tile(parts[1][n, head], state[tile:], ld)
    copy(parts[2][n, head], 0, state, 2 * tile, width)
    copy(parts[3][n, head], 0, state, 2 * tile + ld, width)


@device
def pack(state, fresh, parts, n, head, width, ld):
    """``unpack``, the other way round; ``fresh``: A and a are 0, whatever is there."""
    tile = width * ld
    store_tile(state, parts[0][n, head], ld)
    copy(state, 2 * tile, parts[2][n, head], 0, width)
    if fresh:
        parts[1][n, head] = 0
        clear(parts[3][n, head], 0, width)
    else:
        store_tile(state[tile:], parts[1][n, head], ld)
        copy(state, 2 * tile + ld, parts[3][n, head], 0, width)


@device
def load_affine(affine_, head, affine, width, ld):
    """The rows w, w_b and the mask, which is 0 in the padding."""
    for i in range(3):
        for j in range(ld):
            affine[i * ld + j] = 0 if j >= width else 1 if i == 2 else affine_[i, head, j]


@device
def load_piece(row, first, g, head, q, k, v, beta, m, size, ld, rows, queries, values, b):
    """``m`` tokens: keys above queries in ``rows``, zeros where a piece falls short of ``size``."""
    load_head(k, row, first, g, m, rows, ld)
    load_head(q, row, first, g, m, queries, ld)
    load_head(v, row, first, head, m, values, ld)
    clear(rows, m * ld, (size - m) * ld)
    clear(queries, m * ld, (size - m) * ld)
    for i in range(m):
        b[i] = beta[row, first + i, head]


@device
def learn(z, state, at_c, rows, values, affine, b, m, size, ld, share, inner, write, inverse):
    """The inner gradients of ``m`` tokens from ``z = K W``.

    ``inner`` takes x̂, e, h and G one behind another, ``size`` rows each, ``write`` E and ``inverse`` 1/std.
    """
    step, area = lanes(z, NARROW), size * ld
    for i in range(m):
        at = i * ld
        add_row(z, at, state, at_c, ld, z.dtype.type(1))
        inverse[i] = standardise(z, at, affine, ld, share, inner)
        for j in range(0, ld, step):
            w = load(affine, j, NARROW)
            target = sub(load(values, at + j, NARROW), load(rows, at + j, NARROW))
            error = sub(fma(w, load(inner, at + j, NARROW), load(affine, ld + j, NARROW)), target)
            store(inner, area + at + j, error)
            store(inner, 2 * area + at + j, mul(w, error))
        project(inner, 2 * area + at, inner, at, affine, ld, share, inverse[i], inner, 3 * area + at)
        times = splat(z, b[i], NARROW)
        for j in range(0, ld, step):
            store(write, at + j, mul(times, load(inner, 3 * area + at + j, NARROW)))


@device
def absorb(state, sums, rows, write, m, width, ld, fresh, done, rate):
    """The state behind a piece; ``fresh``: its A and a are 0 and hold anything. Returns whether they are 0 now."""
    one, at_c, at_a = state.dtype.type(1), 2 * width * ld, 2 * width * ld + ld
    direct = fresh and done
    if fresh:
        clear(state, at_a, ld)
        if not done:
            clear(sums, 0, width * ld)
    # A mini-batch of one piece goes straight into W.
    target = state if direct else sums
    matmul_ta(target, ld, rows, ld, write, ld, width, width, m, -rate if direct else one, one)
    for i in range(m):
        add_row(state, at_a, write, i * ld, ld, one)
    if done:
        if not direct:
            add_row(state, 0, sums, 0, width * ld, -rate)
        add_row(state, at_c, state, at_a, ld, -rate)
    return done


@device
def reads(rows, queries, write, state, sums, m, width, ld, lds, fresh, s, r):
    """``S = tril(Q Kᵀ + 1)`` and ``R = S E + Q A + a``."""
    one, nil = r.dtype.type(1), r.dtype.type(0)
    matmul_tb(s, lds, queries, ld, rows, ld, m, m, width, one, nil)
    for i in range(m):
        for j in range(i + 1):
            s[i * lds + j] += one
        for j in range(i + 1, m):
            s[i * lds + j] = 0
    matmul(r, ld, s, lds, write, ld, m, width, m, one, nil)
    if not fresh:
        matmul(r, ld, queries, ld, sums, ld, m, width, width, one, one)
        for i in range(m):
            add_row(r, i * ld, state, 2 * width * ld + ld, ld, one)


@device
def shifted(z, state, at_c, r, rate, at, ld):
    """``Z̄ = Q W + c − rate∘R`` in place of ``Q W`` in the row at ``at``."""
    back = splat(z, -rate, NARROW)
    for j in range(0, ld, lanes(z, NARROW)):
        value = add(load(z, at + j, NARROW), load(state, at_c + j, NARROW))
        store(z, at + j, fma(back, load(r, at + j, NARROW), value))


@device
def forward_head(
    row, first, tokens, n, head, g, phase, chunk, spacing, every, keep, mark,
    q, k, v, beta, affine_, scale, state0, y, state1, state2, kept_weight, kept_c,
):  # fmt: skip
    """One head of one sequence; ``keep`` and ``mark`` are its first rows of kept states and of checkpoints."""
    width = q.shape[3]
    one, nil = y.dtype.type(1), y.dtype.type(0)
    ld, size = padded(width, y), min(PIECE, chunk, max(tokens, 1))
    lds, area, tile, share = padded(size, y), size * ld, width * ld, one / y.dtype.type(width)
    state, affine, inner = scratch(2 * tile + 2 * ld, y), scratch(3 * ld, y), scratch(4 * area, y)
    rows, z, s, b = scratch(2 * area, y), scratch(2 * area, y), scratch(size * lds, y), scratch(2 * size, y)
    values, write, r = scratch(area, y), scratch(area, y), scratch(area, y)
    sums, queries, later, inverse = state[tile:], rows[area:], z[area:], b[size:]
    unpack(state0, n, head, state, width, ld)
    load_affine(affine_, head, affine, width, ld)
    fresh, t = False, 0
    while t < tokens:
        m = piece_length(t, tokens, phase, chunk, every)
        place = (t + phase) % chunk
        load_piece(row, first + t, g, head, q, k, v, beta, m, size, ld, rows, queries, values, b)
        matmul(z, ld, rows, ld, state, ld, 2 * size, width, width, one, nil)
        learn(z, state, 2 * tile, rows, values, affine, b, m, size, ld, share, inner, write, inverse)
        reads(rows, queries, write, state, sums, m, width, ld, lds, fresh, s, r)
        for i in range(m):
            at = i * ld
            shifted(later, state, 2 * tile, r, scale[place + i], at, ld)
            standardise(later, at, affine, ld, share, inner)
            for j in range(0, ld, lanes(y, NARROW)):
                value = fma(load(affine, j, NARROW), load(inner, at + j, NARROW), load(affine, ld + j, NARROW))
                store(inner, at + j, add(value, load(queries, at + j, NARROW)))
        store_head(inner, ld, y, row, first + t, head, m)
        fresh = absorb(state, sums, rows, write, m, width, ld, fresh, place + m == chunk, scale[chunk - 1])
        t += m
        if kept_weight.shape[0] > 0 and t < tokens and (t + phase) % spacing == 0:
            at = keep + (t + phase) // spacing - 1
            store_tile(state, kept_weight[at, head], ld)
            copy(state, 2 * tile, kept_c[at, head], 0, width)
        if every > 0 and t % every == 0:
            pack(state, fresh, state2, mark + t // every - 1, head, width, ld)
    if state1[0].shape[0] > 0:
        pack(state, fresh, state1, n, head, width, ld)


@kernel
def forward(
    q: In[4],
    k: In[4],
    v: In[4],
    beta: In[3],
    affine: In[3],
    scale: In[1],
    state0: IN_STATE,
    phase: Count[1],
    offsets: Index[1],
    chunk: Int,
    spacing: Int,
    every: Int,
    y: Out[4],
    state1: OUT_STATE,
    state2: OUT_STATE,
    kept_weight: Out[4],
    kept_c: Out[3],
):
    """``affine [2,H,D]`` holds w and w_b. States are ``(W, A, c, a)``, ``[rows,H,...]``: 0 first, 1 last, 2 checkpoints."""
    heads, tokens = v.shape[2], q.shape[1]
    m = heads // k.shape[2]
    for item in prange(phase.shape[0] * heads):
        n, head = item // heads, item % heads
        row, first, last = span(n, tokens, offsets)
        keep = kept_row(n, first, tokens, spacing, offsets)
        mark = checkpoint_row(n, tokens, every, offsets) if every > 0 else 0
        forward_head(
            row, first, last - first, n, head, head // m, phase[n], chunk, spacing, every, keep, mark,
            q, k, v, beta, affine, scale, state0, y, state1, state2, kept_weight, kept_c,
        )  # fmt: skip


@device
def add_state(dstate, parts, n, head, width, ld):
    """The gradient of a returned state, on top of what flows back; parts that nothing flows into are empty."""
    tile = width * ld
    if parts[0].shape[0] > 0:
        add_tile(parts[0][n, head], dstate, ld)
    if parts[1].shape[0] > 0:
        add_tile(parts[1][n, head], dstate[tile:], ld)
    for j in range(width):
        if parts[2].shape[0] > 0:
            dstate[2 * tile + j] += parts[2][n, head, j]
        if parts[3].shape[0] > 0:
            dstate[2 * tile + ld + j] += parts[3][n, head, j]


@device
def backward_reads(
    z, state, at_c, r, affine, dy, scale, place, m, ld, share, seen, dh, dlater, dreads, dqueries, daffine, drate
):
    """From dy through the last standardisation: dZ̄ into ``dlater``, N into ``dreads``, the direct dQ."""
    step = lanes(z, NARROW)
    for i in range(m):
        at = i * ld
        shifted(z, state, at_c, r, scale[place + i], at, ld)
        spread = standardise(z, at, affine, ld, share, seen)
        for j in range(0, ld, step):
            dyj = load(dy, at + j, NARROW)
            store(dh, at + j, mul(load(affine, j, NARROW), dyj))
            store(daffine, j, fma(dyj, load(seen, at + j, NARROW), load(daffine, j, NARROW)))
            store(daffine, ld + j, add(dyj, load(daffine, ld + j, NARROW)))
            store(dqueries, at + j, dyj)
        project(dh, at, seen, at, affine, ld, share, spread, dlater, at)
        drate[place + i] -= dot_row(dlater, at, r, at, ld)
        times = splat(z, -scale[place + i], NARROW)
        for j in range(0, ld, step):
            store(dreads, at + j, mul(times, load(dlater, at + j, NARROW)))


@device
def backward_state(
    state, sums, dstate, dsums, rows, queries, write, dreads, m, width, ld, fresh, done, rate, dwrite, dkeys, dqueries
):
    """dE, dK and dQ through the state behind a piece and the sums before it; returns dτ.

    dA and da become those before the piece. Those behind a mini-batch that ends here went into W and c.
    """
    one, nil, tile = dwrite.dtype.type(1), dwrite.dtype.type(0), width * ld
    at_c, at_a, drate = 2 * tile, 2 * tile + ld, nil
    target, times = dstate if done else dsums, -rate if done else one
    matmul(dwrite, ld, rows, ld, target, ld, m, width, width, one, nil)
    matmul_tb(dkeys, ld, write, ld, target, ld, m, width, width, times, nil)
    for i in range(m):
        at = i * ld
        add_row(dwrite, at, dstate, at_c if done else at_a, ld, one)
        if done:
            drate -= dot_row(dwrite, at, write, at, ld)
            scale_row(dwrite, at, ld, times)
    if done and not fresh:
        drate -= dot_row(dstate, 0, sums, 0, tile) + dot_row(dstate, at_c, state, at_a, ld)
    if done or fresh:
        clear(dsums, 0, tile)
        clear(dstate, at_a, ld)
    if not fresh:
        if done:
            add_row(dsums, 0, dstate, 0, tile, times)
            add_row(dstate, at_a, dstate, at_c, ld, times)
        matmul_ta(dsums, ld, queries, ld, dreads, ld, width, width, m, one, one)
        for i in range(m):
            add_row(dstate, at_a, dreads, i * ld, ld, one)
        matmul_tb(dqueries, ld, dreads, ld, sums, ld, m, width, width, one, one)
    return drate


@device
def backward_learn(inner, inverse, b, affine, m, size, ld, share, dwrite, dh, daffine, dkeys, dvalues, dz, dbeta):
    """From dE to dZ, dV, dbeta and the direct part of dK; ``dh`` is scratch."""
    step, area = lanes(dh, NARROW), size * ld
    for i in range(m):
        at, at_e, at_h, at_g = i * ld, area + i * ld, 2 * area + i * ld, 3 * area + i * ld
        dbeta[i] = dot_row(dwrite, at, inner, at_g, ld)
        scale_row(dwrite, at, ld, b[i] * inverse[i])  # Γ from here on
        spread = splat(dh, -dot_row(dwrite, at, inner, at_g, ld) * share, NARROW)
        level = splat(dh, -dot_row(inner, at_h, inner, at, ld) * share, NARROW)
        slope = splat(dh, -project(dwrite, at, inner, at, affine, ld, share, dh.dtype.type(1), dh, at), NARROW)
        for j in range(0, ld, step):
            w, x, dhj = load(affine, j, NARROW), load(inner, at + j, NARROW), load(dh, at + j, NARROW)
            de = mul(w, dhj)
            dw = fma(dhj, load(inner, at_e + j, NARROW), load(daffine, j, NARROW))
            store(daffine, j, fma(de, x, dw))
            store(daffine, ld + j, add(de, load(daffine, ld + j, NARROW)))
            store(dvalues, at + j, sub(zeros(dh, NARROW), de))
            store(dkeys, at + j, add(de, load(dkeys, at + j, NARROW)))
            dx = fma(level, load(dwrite, at + j, NARROW), mul(w, de))
            store(dh, at + j, fma(slope, load(inner, at_h + j, NARROW), dx))
        project(dh, at, inner, at, affine, ld, share, inverse[i], dz, at)
        for j in range(0, ld, step):
            store(dz, at + j, fma(spread, load(inner, at + j, NARROW), load(dz, at + j, NARROW)))


@device
def backward_head(
    row, first, tokens, n, head, g, phase, chunk, spacing, every, keep, mark,
    q, k, v, beta, affine_, scale, state0, kept_weight, kept_c, dy_, dstate1, dstate2,
    dq, dk, dv, dbeta, daffine_, drate, dstate0,
):  # fmt: skip
    """The gradients of one head of one sequence, from its last segment to its first."""
    width = q.shape[3]
    one, nil = dq.dtype.type(1), dq.dtype.type(0)
    ld, size = padded(width, dq), min(PIECE, chunk, max(tokens, 1))
    lds, area, tile, share = padded(size, dq), size * ld, width * ld, one / dq.dtype.type(width)
    extent, at_c = 2 * tile + 2 * ld, 2 * tile
    # The pieces of one segment, each with the state before it.
    most = spacing // chunk * ((chunk + PIECE - 1) // PIECE + 1) + (spacing // every + 1 if every > 0 else 0)
    states, starts = scratch(min(most, max(tokens, 1)) * extent, dq), np.empty(most + 1, np.int64)
    affine, inner, b, values = scratch(3 * ld, dq), scratch(4 * area, dq), scratch(3 * size, dq), scratch(area, dq)
    rows, z, back, drows = scratch(2 * area, dq), scratch(2 * area, dq), scratch(2 * area, dq), scratch(2 * area, dq)
    write, r, dwrite, dreads = scratch(area, dq), scratch(area, dq), scratch(area, dq), scratch(area, dq)
    s, ds, dy, dvalues = scratch(size * lds, dq), scratch(size * lds, dq), scratch(area, dq), scratch(area, dq)
    queries, later, dlater, dqueries = rows[area:], z[area:], back[area:], drows[area:]
    inverse, dbeta_ = b[size:], b[2 * size :]
    dstate, daffine = zeroed(extent, dq), zeroed(2 * ld, dq)
    dsums = dstate[tile:]
    load_affine(affine_, head, affine, width, ld)
    add_state(dstate, dstate1, n, head, width, ld)

    stop = tokens
    while stop > 0:
        # The states before every piece of the last segment that is left.
        segment = (stop - 1 + phase) // spacing
        begin = max(0, segment * spacing - phase)
        if segment == 0:
            unpack(state0, n, head, states, width, ld)
        else:
            clear(states, 0, extent)
            load_tile(kept_weight[keep + segment - 1, head], states, ld)
            copy(kept_c[keep + segment - 1, head], 0, states, at_c, width)
        pieces, t = 0, begin
        while t < stop:
            m = piece_length(t, stop, phase, chunk, every)
            starts[pieces] = t
            pieces += 1
            if t + m < stop:
                state = states[pieces * extent :]
                copy(states, (pieces - 1) * extent, state, 0, extent)
                place = (t + phase) % chunk
                load_piece(row, first + t, g, head, q, k, v, beta, m, size, ld, rows, queries, values, b)
                matmul(z, ld, rows, ld, state, ld, m, width, width, one, nil)
                learn(z, state, at_c, rows, values, affine, b, m, size, ld, share, inner, write, inverse)
                fresh, done = place == 0 and t > 0, place + m == chunk
                absorb(state, state[tile:], rows, write, m, width, ld, fresh, done, scale[chunk - 1])
            t += m
        starts[pieces] = stop

        for p in range(pieces - 1, -1, -1):
            t, m = starts[p], starts[p + 1] - starts[p]
            place = (t + phase) % chunk
            fresh, done = place == 0 and t > 0, place + m == chunk
            state = states[p * extent :]
            sums = state[tile:]
            if every > 0 and (t + m) % every == 0:
                add_state(dstate, dstate2, mark + (t + m) // every - 1, head, width, ld)

            # The piece again, up to x̄ and back from it.
            load_piece(row, first + t, g, head, q, k, v, beta, m, size, ld, rows, queries, values, b)
            load_head(dy_, row, first + t, head, m, dy, ld)
            matmul(z, ld, rows, ld, state, ld, 2 * size, width, width, one, nil)
            learn(z, state, at_c, rows, values, affine, b, m, size, ld, share, inner, write, inverse)
            reads(rows, queries, write, state, sums, m, width, ld, lds, fresh, s, r)
            backward_reads(
                later, state, at_c, r, affine, dy, scale, place, m, ld, share,
                dvalues, dwrite, dlater, dreads, dqueries, daffine, drate,
            )  # fmt: skip
            drate[chunk - 1] += backward_state(
                state, sums, dstate, dsums, rows, queries, write, dreads, m, width, ld, fresh, done, scale[chunk - 1],
                dwrite, drows, dqueries,
            )  # fmt: skip

            # Through the scores, then token by token to Z, then through W.
            matmul_ta(dwrite, ld, s, lds, dreads, ld, m, width, m, one, one)
            matmul_tb(ds, lds, dreads, ld, write, ld, m, m, width, one, nil)
            for i in range(m):
                clear(ds, i * lds + i + 1, m - i - 1)
            matmul(dqueries, ld, ds, lds, rows, ld, m, width, m, one, one)
            matmul_ta(drows, ld, ds, lds, queries, ld, m, width, m, one, one)
            backward_learn(
                inner, inverse, b, affine, m, size, ld, share, dwrite, z, daffine, drows, dvalues, back, dbeta_
            )
            clear(back, m * ld, (size - m) * ld)
            clear(dlater, m * ld, (size - m) * ld)
            clear(drows, m * ld, (size - m) * ld)
            matmul_tb(drows, ld, back, ld, state, ld, size + m, width, width, one, one)
            matmul_ta(dstate, ld, rows, ld, back, ld, width, width, size + m, one, one)
            for i in range(size + m):
                add_row(dstate, at_c, back, i * ld, ld, one)
            store_head(dqueries, ld, dq, row, first + t, head, m)
            store_head(drows, ld, dk, row, first + t, head, m)
            store_head(dvalues, ld, dv, row, first + t, head, m)
            for i in range(m):
                dbeta[row, first + t + i, head] = dbeta_[i]
        stop = begin

    pack(dstate, False, dstate0, n, head, width, ld)
    for i in range(2):
        copy(daffine, i * ld, daffine_[n, i, head], 0, width)


@kernel
def backward(
    q: In[4],
    k: In[4],
    v: In[4],
    beta: In[3],
    affine: In[3],
    scale: In[1],
    state0: IN_STATE,
    phase: Count[1],
    offsets: Index[1],
    chunk: Int,
    spacing: Int,
    every: Int,
    kept_weight: In[4],
    kept_c: In[3],
    dy: In[4],
    dstate1: IN_STATE,
    dstate2: IN_STATE,
    dq: Out[4],
    dk: Out[4],
    dv: Out[4],
    dbeta: Out[3],
    daffine: Out[4],
    drate: Out[3],
    dstate0: OUT_STATE,
):
    """``dq`` and ``dk`` have all H heads; ``daffine [N,2,H,D]`` and ``drate [N,H,C]``, which is added to, are parts."""
    heads, tokens = v.shape[2], q.shape[1]
    m = heads // k.shape[2]
    for item in prange(phase.shape[0] * heads):
        n, head = item // heads, item % heads
        row, first, last = span(n, tokens, offsets)
        keep = kept_row(n, first, tokens, spacing, offsets)
        mark = checkpoint_row(n, tokens, every, offsets) if every > 0 else 0
        backward_head(
            row, first, last - first, n, head, head // m, phase[n], chunk, spacing, every, keep, mark,
            q, k, v, beta, affine, scale, state0, kept_weight, kept_c, dy, dstate1, dstate2,
            dq, dk, dv, dbeta, daffine, drate[n, head], dstate0,
        )  # fmt: skip


class TTTChunk(NumbaKernel):
    """Mini-batches as products of matrices, heads side by side."""

    name = "ttt.chunk"
    form = "chunk"
    mixers = frozenset({"ttt_linear"})

    def takes(self, problem: Problem) -> Support:
        """Everything."""
        return Support.yes()

    def configs(self, problem: Problem) -> tuple[Config, ...]:
        """Nothing to choose: the mini-batch belongs to the model."""
        return ({},)

    def forward(self, problem: Problem, config: Config, x: Arrays, out: Arrays) -> None:
        """Fill ``y``, states and kept weights."""
        every, dtype = problem.flags.checkpoint_every, x["q"].dtype
        tokens, phase, chunk = _lengths(x), x["initial.phase"], problem.option["chunk_size"]
        checkpoints = _state(out, "checkpoint", dtype)
        forward(
            _work(x) * 4.0,
            *_inputs(problem, x),
            out["y"],
            _state(out, "final", dtype),
            checkpoints,
            given(out.get("kept.weight"), 4, dtype),
            given(out.get("kept.bias"), 3, dtype),
        )
        if "final.phase" in out:
            out["final.phase"][...] = (phase + tokens) % chunk
        if every:
            counts = tokens // every
            sequence = np.repeat(np.arange(len(tokens)), counts)
            passed = (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + 1) * every
            for part in checkpoints:
                part[len(passed) :] = 0
            phases = np.zeros(out["checkpoint.phase"].size, np.int32)
            phases[: len(passed)] = (phase[sequence] + passed) % chunk
            out["checkpoint.phase"][...] = phases.reshape(out["checkpoint.phase"].shape)

    def backward(self, problem: Problem, config: Config, x: Arrays, out: Arrays, dout: Arrays, dx: Arrays) -> None:
        """Fill the gradients of inputs, parameters and first state."""
        v, dtype = x["v"], x["q"].dtype
        batch, tokens, heads, width = v.shape
        groups, sequences = x["q"].shape[2], x["initial.weight"].shape[0]
        dq, dk = (dx[name] if groups == heads else np.empty(v.shape, dtype) for name in ("q", "k"))
        daffine = np.empty((sequences, 2, heads, width), dtype)
        drate = np.zeros((sequences, heads, problem.option["chunk_size"]), dtype)
        dy = dout.get("y")
        backward(
            _work(x) * 11.0,
            *_inputs(problem, x),
            out["kept.weight"],
            out["kept.bias"],
            np.broadcast_to(dtype.type(0), v.shape) if dy is None else dy,
            _state(dout, "final", dtype),
            _state(dout, "checkpoint", dtype),
            dq, dk, dx["v"], dx["beta"], daffine, drate, _state(dx, "initial", dtype),
        )  # fmt: skip
        if groups != heads:
            for name, d in (("q", dq), ("k", dk)):
                np.sum(d.reshape(batch, tokens, groups, heads // groups, width), axis=3, out=dx[name])
        parts = (("norm_weight", daffine[:, 0], 0), ("norm_bias", daffine[:, 1], 0), ("token_scale", drate, (0, 1)))
        for name, part, axes in parts:
            if name in dx:
                np.sum(part, axis=axes, out=dx[name])


def _lengths(x: Arrays) -> np.ndarray:
    """Tokens of every sequence."""
    batch, tokens = x["q"].shape[:2]
    return np.full(batch, tokens) if x["offsets"] is None else np.diff(x["offsets"])


def _work(x: Arrays) -> float:
    batch, tokens, heads, width = x["v"].shape
    return float(batch * tokens * heads) * width * width


def _inputs(problem: Problem, x: Arrays) -> tuple[Any, ...]:
    """What both passes take, with the defaults of parameters filled in."""
    dtype, heads, width = x["q"].dtype, x["v"].shape[2], x["v"].shape[3]
    chunk = problem.option["chunk_size"]
    gain, shift, scale = (x.get(name) for name in ("norm_weight", "norm_bias", "token_scale"))
    affine = np.empty((2, heads, width), dtype)
    affine[0] = 1 if gain is None else gain
    affine[1] = 0 if shift is None else shift
    return (
        *(x[name] for name in ("q", "k", "v", "beta")),
        affine,
        (1.0 / np.arange(1, chunk + 1)).astype(dtype) if scale is None else scale,
        _state(x, "initial", dtype),
        x["initial.phase"],
        given(x["offsets"], 1, np.int64),
        chunk,
        problem.spec.spacing(problem.option),
        problem.flags.checkpoint_every,
    )


def _state(arrays: Arrays, place: str, dtype: Any) -> tuple[np.ndarray, ...]:
    """The parts of a state, or of its gradient, ``[rows,H,...]``; empty where one is missing."""
    parts = ((arrays.get(f"{place}.{name}"), 4 if "weight" in name else 3) for name in PARTS)
    return tuple(
        given(part if part is None else part.reshape(-1, *part.shape[1 - ndim :]), ndim, dtype) for part, ndim in parts
    )


KERNELS = (TTTChunk(),)
