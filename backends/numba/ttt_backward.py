"""The adjoint of TTT-linear, a piece of a mini-batch at a time; notation of ``ttt``.

With ``d`` the gradient of a loss and dW, dc, dA, da those of the state behind a piece, from the last piece to the
first. A mini-batch that ends with the piece sends dA = −τ dW, da = −τ dc, dτ = −⟨dW, A⟩ − ⟨dc, a⟩ back.

    dZ̄ = ((w∘dy) ⟂ x̄)/std̄     N = dR = −rate∘dZ̄     drate = −⟨dZ̄, R⟩          dS = tril(N Eᵀ)
    dE = K dA + da + Sᵀ N       dbeta = ⟨dE, G⟩       Γ = beta∘dE/std
    dh = Γ ⟂ x̂                  de = w∘dh             dx̂ = w∘de − Γ mean(h∘x̂) − h mean(Γ∘x̂)
    dZ = (dx̂ ⟂ x̂)/std − x̂ mean(Γ∘G)      the second order: G itself holds x̂ (twice) and std
    dV = −de        dK = de + E dAᵀ + dSᵀ Q + dZ Wᵀ        dQ = dy + dS K + dZ̄ Wᵀ + N Aᵀ
    dW += Kᵀ dZ + Qᵀ dZ̄     dc += Σ dZ + dZ̄     dA += Qᵀ N     da += Σ N
    dw = Σ dy∘x̄ + dh∘e + de∘x̂     dw_b = Σ dy + de
"""

import numpy as np

from .compile import Count, In, Index, Int, Out, device, kernel
from .layout import checkpoint_row, kept_row, padded, scratch, span, zeroed
from .matmul import matmul, matmul_ta, matmul_tb
from .rows import load_head, store_head
from .simd import NARROW, add, fma, lanes, load, mul, splat, store, sub, zeros
from .tiles import add_tile, fetch_tile
from .ttt_rows import (
    PIECE,
    absorb,
    add_row,
    clear,
    copy,
    dot_row,
    learn,
    load_affine,
    load_piece,
    pack,
    piece_length,
    project,
    reads,
    scale_row,
    shifted,
    standardise,
    unpack,
)


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
            fetch_tile(kept_weight[keep + segment - 1, head], states, ld)
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
    begin: Int,
    end: Int,
    q: In[4],
    k: In[4],
    v: In[4],
    beta: In[3],
    affine: In[3],
    scale: In[1],
    weight0: In[4],
    weight_sum0: In[4],
    bias0: In[3],
    bias_sum0: In[3],
    phase: Count[1],
    offsets: Index[1],
    chunk: Int,
    spacing: Int,
    every: Int,
    kept_weight: In[4],
    kept_c: In[3],
    dy: In[4],
    dweight1: In[4],
    dweight_sum1: In[4],
    dbias1: In[3],
    dbias_sum1: In[3],
    dweight2: In[4],
    dweight_sum2: In[4],
    dbias2: In[3],
    dbias_sum2: In[3],
    dq: Out[4],
    dk: Out[4],
    dv: Out[4],
    dbeta: Out[3],
    daffine: Out[4],
    drate: Out[3],
    dweight0: Out[4],
    dweight_sum0: Out[4],
    dbias0: Out[3],
    dbias_sum0: Out[3],
):
    """``dq`` and ``dk`` have all H heads; ``daffine [N,2,H,D]`` and ``drate [N,H,C]``, which is added to, are parts."""
    state0 = (weight0, weight_sum0, bias0, bias_sum0)
    dstate1 = (dweight1, dweight_sum1, dbias1, dbias_sum1)
    dstate2 = (dweight2, dweight_sum2, dbias2, dbias_sum2)
    dstate0 = (dweight0, dweight_sum0, dbias0, dbias_sum0)
    heads, tokens = v.shape[2], q.shape[1]
    m = heads // k.shape[2]
    for item in range(begin, end):
        n, head = item // heads, item % heads
        row, first, last = span(n, tokens, offsets)
        keep = kept_row(n, first, tokens, spacing, offsets)
        mark = checkpoint_row(n, tokens, every, offsets) if every > 0 else 0
        backward_head(
            row, first, last - first, n, head, head // m, phase[n], chunk, spacing, every, keep, mark,
            q, k, v, beta, affine, scale, state0, kept_weight, kept_c, dy, dstate1, dstate2,
            dq, dk, dv, dbeta, daffine, drate[n, head], dstate0,
        )  # fmt: skip
