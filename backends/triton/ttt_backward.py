"""The adjoint of TTT-linear: three kernels, of which one is a chain; notation of ``ttt`` and ``ttt_rows``.

With ``d`` the gradient of a loss and dW, dc, dA, da those of the state behind a block; ``[d]`` are the tokens whose
mini-batches end with the block, ``[r]`` the rest. ``read_back``, a program a block:

    dZ̄ = ((w∘dy) ⟂ x̄)/std̄           dE₀ = (query∘(Q Kᵀ + 1))ᵀ dZ̄           dw = Σ dy∘x̄        dw_b = Σ dy

``learn_back``, a program a head, from the last block to the first; a token waits for the mini-batches behind it, so
that dE and dZ come in passes as E does:

    dE = dE₀ − τ [d] (K dW + dc) + [r] (K dA + da) + (key∘(K Kᵀ + 1))ᵀ dZ
    Γ = beta∘dE/std       dh = Γ ⟂ x̂       dx̂ = w∘w∘dh − Γ mean(h∘x̂) − h mean(Γ∘x̂)
    dZ = (dx̂ ⟂ x̂)/std − x̂ mean(Γ∘G)       the second order: G = (h ⟂ x̂)/std itself holds x̂ (twice) and std
    dA, da ← those of A, a before the block, where a mini-batch goes on there:
             Kᵀ(key∘dZ) + Qᵀ(query∘dZ̄) + (dA, or −τ dW if the mini-batch ends in the block)
    dW ← dW + Kᵀ dZ + Qᵀ dZ̄            dc ← dc + Σ dZ + dZ̄

``inputs_back``, a program a block:

    de = w∘dh    dV = −de    dbeta = ⟨dE, G⟩    dw += Σ dh∘e + de∘x̂    dw_b += Σ de,   e = w∘x̂ + w_b − (V − K)
    dK = de − τ [d] E dWᵀ + [r] E dAᵀ + dZ Wᵀ + key∘(dZ Aᵀ)
         + (query∘(dZ̄ Eᵀ))ᵀ Q + (key∘(dZ Eᵀ) + (key∘(dZ Eᵀ))ᵀ) K
    dQ = dy + dZ̄ Wᵀ + query∘(dZ̄ Aᵀ) + (query∘(dZ̄ Eᵀ)) K

The rates' gradients, where ``token_scale`` was given, are sums over what they multiply above; ``rates_back`` adds those
of a head's blocks. Transposed scores are products of their own, never transposed sums.
"""

import torch
import triton
import triton.language as tl

from mixers.problem import Arrays, Problem
from mixers.spec import Array

from .blocks import span
from .kernel import dense, first_marks, gather, place, spread
from .ttt_rows import (
    Layout,
    Scratch,
    add_dot,
    add_product,
    approach,
    centre_columns,
    column_adjoint,
    completed,
    copy,
    earlier,
    first_slot,
    last_rate,
    load_affine,
    load_columns,
    load_rate,
    load_row,
    load_tile,
    long,
    mini_batch,
    project,
    same,
    scores,
    standardise,
    store_columns,
    store_row,
    store_tile,
)


@triton.jit(do_not_specialize=("tokens", "qb", "qt", "qh", "kb", "kt", "kh", "yb", "yt", "yh", "gh", "heads", "group"))
def read_back(
    q, qb, qt, qh, k, kb, kt, kh, gain, gh, scale, dy, yb, yt, yh, offsets, tokens, heads, group,
    table, weights, sums, biases, bias_sums, write_, dread_, dwrite_, daffine, dplaces, dtaus,
    WIDTH: tl.constexpr, D: tl.constexpr, SLICE: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    CARRY: tl.constexpr, PACKED: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dZ̄ and dE₀ of one block, and what dy sends to w, w_b and the rates."""
    slot, head = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    rows = tl.load(table + slot * 4 + 2)
    i, d = tl.arange(0, ROWS), tl.arange(0, D)
    index = (slot * heads + head) * WIDTH
    daffine += slot * 2 * heads * WIDTH + head * WIDTH
    if rows == 0:
        store_row(daffine, d, tl.zeros((D,), tl.float32), WIDTH)
        store_row(daffine + heads * WIDTH, d, tl.zeros((D,), tl.float32), WIDTH)
        return
    n, t, place = tl.load(table + slot * 4), tl.load(table + slot * 4 + 1), tl.load(table + slot * 4 + 3)
    row, first, _ = span(n, tokens, offsets, PACKED)
    first += t
    qt, kt, yt = long(qt, ALIGNED), long(kt, ALIGNED), long(yt, ALIGNED)
    q += row * long(qb, ALIGNED) + first * qt + (head // group) * long(qh, ALIGNED)
    k += row * long(kb, ALIGNED) + first * kt + (head // group) * long(kh, ALIGNED)
    out = ((row * tokens + first) * heads + head) * WIDTH
    out_row = heads.to(tl.int64) * WIDTH
    mu, pi = mini_batch(place, i, CHUNK)
    rate, tau = load_rate(scale, pi, CHUNK), last_rate(scale, CHUNK)

    # Z̄ again, as in ``read``, in the parts that the rates multiply, whose gradients nearly cancel: here too.
    seen = tl.zeros((ROWS, D), tl.float32) + load_row(biases + index, d, WIDTH)[None, :]
    weights += index * WIDTH
    seen = add_product(seen, q, qt, weights, WIDTH, 1, i, rows, WIDTH, D, SLICE, PRECISION)
    carried = (place > 0) | (t == 0)
    before = tl.zeros((ROWS, D), tl.float32)
    if carried:
        at = slot if CARRY else n
        before += load_row(bias_sums + (at * heads + head) * WIDTH, d, WIDTH)[None, :]
        matrix = sums + (at * heads + head) * WIDTH * WIDTH
        before = add_product(before, q, qt, matrix, WIDTH, 1, i, rows, WIDTH, D, SLICE, PRECISION)
    weigh = scores(q, qt, k, kt, i, rows, WIDTH, ROWS, SLICE, PRECISION) + 1.0
    write = load_tile(write_ + out, out_row, i, d, rows, WIDTH)
    nothing = tl.zeros((ROWS, D), tl.float32)
    within = add_dot(nothing, weigh * tl.where(same(mu, i), 1.0, 0.0), write, PRECISION)
    across = add_dot(nothing, weigh * earlier(mu, 1.0), write, PRECISION)
    within += tl.where(mu > 0, 0.0, 1.0)[:, None] * before
    across += tl.where(mu > 0, 1.0, 0.0)[:, None] * before
    seen -= rate[:, None] * within + tau * across

    x, inverse = standardise(seen, d, WIDTH, D)
    w, _ = load_affine(gain, long(gh, False), None, gh, head, d, WIDTH)
    dy += row * long(yb, ALIGNED) + first * yt + head * long(yh, ALIGNED)
    flow = load_tile(dy, yt, i, d, rows, WIDTH).to(tl.float32)
    store_row(daffine, d, tl.sum(flow * x, 0), WIDTH)
    store_row(daffine + heads * WIDTH, d, tl.sum(flow, 0), WIDTH)
    dread = project(flow * w[None, :], x, d, WIDTH, D) * inverse[:, None]
    store_tile(dread_ + out, out_row, i, d, rows, dread, WIDTH)

    if dplaces is not None:
        tl.store(dplaces + (slot * heads + head) * ROWS + i, -tl.sum(dread * within, 1))
        tl.store(dtaus + (slot * heads + head) * 2, -tl.sum(tl.sum(dread * across, 1), 0))

    weigh = scores(k, kt, q, qt, i, rows, WIDTH, ROWS, SLICE, PRECISION) + 1.0
    past = tl.where(mu[:, None] < mu[None, :], tau, 0.0)
    present = tl.where((mu[:, None] == mu[None, :]) & (i[:, None] <= i[None, :]), rate[None, :], 0.0)
    dwrite = add_dot(nothing, weigh * -(past + present), dread, PRECISION)
    store_tile(dwrite_ + out, out_row, i, d, rows, dwrite, WIDTH)


_LENGTHS_BACK = ("tokens", "qb", "qt", "qh", "kb", "kt", "kh", "vb", "vt", "vh", "bb", "bt", "bh", "gh", "sh", "heads",
                 "group", "spacing")  # fmt: skip


@triton.jit(do_not_specialize=_LENGTHS_BACK)
def learn_back(
    q, qb, qt, qh, k, kb, kt, kh, v, vb, vt, vh, beta, bb, bt, bh, gain, gh, shift, sh, scale,
    offsets, marks, tokens, heads, group, spacing,
    table, counts, x_, inverse_, dread_, dwrite_, dz_, work, dweights, dbiases, dsums,
    dweight1, dweight_sum1, dbias1, dbias_sum1, dweight2, dweight_sum2, dbias2, dbias_sum2,
    dweight0, dweight_sum0, dbias0, dbias_sum0,
    WIDTH: tl.constexpr, D: tl.constexpr, SLICE: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    EVERY: tl.constexpr, CARRY: tl.constexpr, PACKED: tl.constexpr, RESIDENT: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dZ of every token, dE in place of dE₀, and the gradients of the state behind every block and of the first.

    ``work`` holds a dW that does not fit on chip, and dA lies in ``dsums``, as W and A do in ``learn``.
    """
    n, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    row, first, _ = span(n, tokens, offsets, PACKED)
    n, head = n.to(tl.int64), head.to(tl.int64)
    unit = n * heads + head
    begin = first_slot(n, first, tokens, spacing, PACKED)
    slot = begin + tl.load(counts + n) - 1
    if EVERY > 0:
        mark = tl.load(marks + n) if PACKED else n * (tokens // EVERY)

    qt, kt, vt = long(qt, ALIGNED), long(kt, ALIGNED), long(vt, ALIGNED)
    q += row * long(qb, ALIGNED) + first * qt + (head // group) * long(qh, ALIGNED)
    k += row * long(kb, ALIGNED) + first * kt + (head // group) * long(kh, ALIGNED)
    v += row * long(vb, ALIGNED) + first * vt + head * long(vh, ALIGNED)
    beta += row * long(bb, False) + first * long(bt, False) + head * long(bh, False)
    out = (row * tokens + first) * heads + head
    out_row = heads.to(tl.int64) * WIDTH

    i, d = tl.arange(0, ROWS), tl.arange(0, D)
    w, w_b = load_affine(gain, long(gh, False), shift, long(sh, False), head, d, WIDTH)
    tau = last_rate(scale, CHUNK)
    size: tl.constexpr = WIDTH * WIDTH
    if RESIDENT:
        dweight = tl.zeros((D, D), tl.float32)
        if dweight1 is not None:
            dweight = load_columns(dweight1 + unit * size, WIDTH, d, d, WIDTH, WIDTH).to(tl.float32)
    else:
        work += unit * size
        copy(dweight1, unit * size, WIDTH, work, WIDTH, D, SLICE)
    at = tl.maximum(slot, begin) if CARRY else n
    dsums += (at * heads + head) * size
    copy(dweight_sum1, unit * size, WIDTH, dsums, WIDTH, D, SLICE)
    dbias, dbias_sum = tl.zeros((D,), tl.float32), tl.zeros((D,), tl.float32)
    if dbias1 is not None:
        dbias = load_row(dbias1 + unit * WIDTH, d, WIDTH)
    if dbias_sum1 is not None:
        dbias_sum = load_row(dbias_sum1 + unit * WIDTH, d, WIDTH)
    tl.debug_barrier()
    if dweight_sum0 is not None and slot < begin:  # no token: the first state is the last one
        copy(dsums, 0, WIDTH, dweight_sum0 + unit * size, WIDTH, D, SLICE)

    while slot >= begin:
        t, rows, place = tl.load(table + slot * 4 + 1), tl.load(table + slot * 4 + 2), tl.load(table + slot * 4 + 3)
        mu, pi = mini_batch(place, i, CHUNK)
        end = place + rows
        done = completed(mu, end, CHUNK)
        index = (slot * heads + head) * WIDTH
        token = out + t * heads
        keys = load_columns(k + t * kt, kt, i, d, rows, WIDTH)
        queries = load_columns(q + t * qt, qt, i, d, rows, WIDTH)
        values = load_columns(v + t * vt, vt, i, d, rows, WIDTH)
        strengths = tl.load(beta + (t + i) * long(bt, False), mask=i < rows, other=0.0).to(tl.float32)
        x = load_columns(x_ + token * WIDTH, out_row, i, d, rows, WIDTH)
        inverse = tl.load(inverse_ + token + i * heads, mask=i < rows, other=0.0)
        dread = load_columns(dread_ + token * WIDTH, out_row, i, d, rows, WIDTH)
        dwrite = load_columns(dwrite_ + token * WIDTH, out_row, i, d, rows, WIDTH)

        behind = tl.minimum(i + 1, t)
        approach(k + t * kt, kt, behind, D)
        approach(q + t * qt, qt, behind, D)
        approach(v + t * vt, vt, behind, D)
        approach(x_ + token * WIDTH, out_row, behind, D)
        approach(dread_ + token * WIDTH, out_row, behind, D)
        approach(dwrite_ + token * WIDTH, out_row, behind, D)

        # What does not wait for dW.
        weigh = add_dot(tl.zeros((ROWS, ROWS), tl.float32) + 1.0, tl.trans(keys), keys, PRECISION)
        weigh *= tl.where(mu[:, None] > mu[None, :], -tau, 0.0)
        h = (w * w)[:, None] * x + w[:, None] * (w_b[:, None] - (values.to(tl.float32) - keys.to(tl.float32)))
        h = centre_columns(h, d, WIDTH, D)
        level = tl.sum(h * x, 0) * (1.0 / WIDTH)

        if dweight2 is not None:  # a constant, which must hold before EVERY divides
            if (t + rows) % EVERY == 0:
                here = (mark + (t + rows) // EVERY - 1) * heads + head
                if RESIDENT:
                    dweight += load_columns(dweight2 + here * size, WIDTH, d, d, WIDTH, WIDTH)
                else:
                    _accumulate(dweight2 + here * size, work, WIDTH, D, SLICE)
                dbias += load_row(dbias2 + here * WIDTH, d, WIDTH)
                dbias_sum += load_row(dbias_sum2 + here * WIDTH, d, WIDTH)
                _accumulate(dweight_sum2 + here * size, dsums, WIDTH, D, SLICE)
                tl.debug_barrier()
        dbias_sum = tl.where(end % CHUNK > 0, dbias_sum, 0.0)
        store_row(dbiases + index, d, dbias, WIDTH)

        target = dweights + index * WIDTH
        flow = tl.zeros((D, ROWS), tl.float32) + dbias[:, None]
        if RESIDENT:
            store_columns(target, WIDTH, d, d, WIDTH, dweight, WIDTH)
            flow = add_dot(flow, dweight, keys, PRECISION)
        else:
            for start in range(0, WIDTH, SLICE):
                s = start + tl.arange(0, SLICE)
                tile = load_columns(work, WIDTH, s, d, WIDTH, WIDTH)
                store_columns(target, WIDTH, s, d, WIDTH, tile, WIDTH)
                part = load_tile(k + t * kt, kt, i, s, rows, WIDTH)
                flow = add_dot(flow, tile, tl.trans(part), PRECISION)
        dwrite += tl.where(done, -tau, 0.0)[None, :] * flow
        if end % CHUNK > 0:
            flow = tl.zeros((D, ROWS), tl.float32) + dbias_sum[:, None]
            for start in range(0, WIDTH, SLICE):
                s = start + tl.arange(0, SLICE)
                tile = load_columns(dsums, WIDTH, s, d, WIDTH, WIDTH)
                part = load_tile(k + t * kt, kt, i, s, rows, WIDTH)
                flow = add_dot(flow, tile, tl.trans(part), PRECISION)
            dwrite += tl.where(done, 0.0, 1.0)[None, :] * flow

        batch = ((end - 1) // CHUNK).to(tl.int32)
        while batch > 0:
            dz = column_adjoint(dwrite, h, x, level, w, gain, strengths, inverse, d, WIDTH, D)
            felt = tl.where((mu == batch)[:, None], weigh, 0.0)
            dwrite = add_dot(dwrite, dz, felt, PRECISION)
            batch -= 1
        dz = column_adjoint(dwrite, h, x, level, w, gain, strengths, inverse, d, WIDTH, D)
        store_columns(dz_ + token * WIDTH, out_row, i, d, rows, dz, WIDTH)
        store_columns(dwrite_ + token * WIDTH, out_row, i, d, rows, dwrite, WIDTH)

        carried = (place > 0) | (t == 0)
        if carried:
            key_part = tl.where(mu > 0, -tau, 0.0)[None, :] * dz
            rate = load_rate(scale, pi, CHUNK)
            query_part = tl.where(mu > 0, -tau, -rate)[None, :] * dread
            ends = end >= CHUNK
            before = tl.sum(key_part + query_part, 1) + tl.where(ends, -tau * dbias, dbias_sum)
            if dweight_sum0 is not None and t == 0:
                _before(
                    k + t * kt, kt, key_part, q + t * qt, qt, query_part, i, rows, ends, tau, target, dsums,
                    dweight_sum0 + unit * size, WIDTH, D, SLICE, PRECISION,
                )  # fmt: skip
            if CARRY and t > 0:
                _before(
                    k + t * kt, kt, key_part, q + t * qt, qt, query_part, i, rows, ends, tau, target, dsums,
                    dsums - heads * size, WIDTH, D, SLICE, PRECISION,
                )  # fmt: skip
                tl.debug_barrier()
        else:
            before = tl.zeros((D,), tl.float32)
        dbias_sum = before
        if CARRY:
            dsums -= heads * size

        dbias += tl.sum(dz + dread, 1)
        if RESIDENT:
            dweight = add_dot(dweight, dz, tl.trans(keys), PRECISION)
            dweight = add_dot(dweight, dread, tl.trans(queries), PRECISION)
        else:
            for start in range(0, WIDTH, SLICE):
                s = start + tl.arange(0, SLICE)
                tile = load_columns(work, WIDTH, s, d, WIDTH, WIDTH)
                part = load_tile(k + t * kt, kt, i, s, rows, WIDTH)
                tile = add_dot(tile, dz, part, PRECISION)
                part = load_tile(q + t * qt, qt, i, s, rows, WIDTH)
                tile = add_dot(tile, dread, part, PRECISION)
                store_columns(work, WIDTH, s, d, WIDTH, tile, WIDTH)
            tl.debug_barrier()
        slot -= 1

    if dweight0 is not None:
        if RESIDENT:
            store_columns(dweight0 + unit * size, WIDTH, d, d, WIDTH, dweight, WIDTH)
        else:
            copy(work, 0, WIDTH, dweight0 + unit * size, WIDTH, D, SLICE)
        store_row(dbias0 + unit * WIDTH, d, dbias, WIDTH)
        store_row(dbias_sum0 + unit * WIDTH, d, dbias_sum, WIDTH)


@triton.jit
def _accumulate(source, target, WIDTH: tl.constexpr, D: tl.constexpr, SLICE: tl.constexpr):
    """Add one matrix in memory to another."""
    d = tl.arange(0, D)
    for start in range(0, WIDTH, SLICE):
        s = start + tl.arange(0, SLICE)
        tile = load_tile(target, WIDTH, s, d, WIDTH, WIDTH) + load_tile(source, WIDTH, s, d, WIDTH, WIDTH)
        store_tile(target, WIDTH, s, d, WIDTH, tile, WIDTH)


@triton.jit
def _before(k, kt, key_part, q, qt, query_part, i, rows, ends, tau, dweight, dsums, target,
            WIDTH: tl.constexpr, D: tl.constexpr, SLICE: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """dA before a block, from dW and dA behind it."""
    d = tl.arange(0, D)
    tl.debug_barrier()
    for start in range(0, WIDTH, SLICE):
        s = start + tl.arange(0, SLICE)
        if ends:
            tile = -tau * load_columns(dweight, WIDTH, s, d, WIDTH, WIDTH).to(tl.float32)
        else:
            tile = load_columns(dsums, WIDTH, s, d, WIDTH, WIDTH)
        part = load_tile(k, kt, i, s, rows, WIDTH)
        tile = add_dot(tile, key_part, part, PRECISION)
        part = load_tile(q, qt, i, s, rows, WIDTH)
        tile = add_dot(tile, query_part, part, PRECISION)
        store_columns(target, WIDTH, s, d, WIDTH, tile, WIDTH)


_LENGTHS_INPUTS = ("tokens", "qb", "qt", "qh", "kb", "kt", "kh", "vb", "vt", "vh", "bb", "bt", "bh", "yb", "yt", "yh",
                   "gh", "sh", "heads", "group")  # fmt: skip


@triton.jit(do_not_specialize=_LENGTHS_INPUTS)
def inputs_back(
    q, qb, qt, qh, k, kb, kt, kh, v, vb, vt, vh, beta, bb, bt, bh, gain, gh, shift, sh, scale, dy, yb, yt, yh,
    offsets, tokens, heads, group,
    table, weights, sums, bias_sums, write_, x_, inverse_, dread_, dwrite_, dz_, dweights, dbiases, dsums,
    dq, dk, dv, dbeta, daffine, dtaus,
    WIDTH: tl.constexpr, D: tl.constexpr, SLICE: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    CARRY: tl.constexpr, PACKED: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of one block's inputs, and what its inner gradients send to w, w_b and τ."""
    slot, head = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    rows = tl.load(table + slot * 4 + 2)
    i, d = tl.arange(0, ROWS), tl.arange(0, D)
    index = (slot * heads + head) * WIDTH
    daffine += slot * 2 * heads * WIDTH + head * WIDTH
    if rows == 0:
        store_row(daffine, d, tl.zeros((D,), tl.float32), WIDTH)
        store_row(daffine + heads * WIDTH, d, tl.zeros((D,), tl.float32), WIDTH)
        return
    n, t, place = tl.load(table + slot * 4), tl.load(table + slot * 4 + 1), tl.load(table + slot * 4 + 3)
    row, first, _ = span(n, tokens, offsets, PACKED)
    first += t
    qt, kt, vt, yt = long(qt, ALIGNED), long(kt, ALIGNED), long(vt, ALIGNED), long(yt, ALIGNED)
    q += row * long(qb, ALIGNED) + first * qt + (head // group) * long(qh, ALIGNED)
    k += row * long(kb, ALIGNED) + first * kt + (head // group) * long(kh, ALIGNED)
    v += row * long(vb, ALIGNED) + first * vt + head * long(vh, ALIGNED)
    dy += row * long(yb, ALIGNED) + first * yt + head * long(yh, ALIGNED)
    beta += row * long(bb, False) + first * long(bt, False) + head * long(bh, False)
    token = (row * tokens + first) * heads + head
    out, out_row = token * WIDTH, heads.to(tl.int64) * WIDTH
    mu, pi = mini_batch(place, i, CHUNK)
    rate, tau = load_rate(scale, pi, CHUNK), last_rate(scale, CHUNK)
    end = place + rows
    done = completed(mu, end, CHUNK)
    carried, goes_on = (place > 0) | (t == 0), end % CHUNK > 0
    size: tl.constexpr = WIDTH * WIDTH
    at = slot if CARRY else n
    weights += index * WIDTH
    dweights += index * WIDTH
    sums += (at * heads + head) * size
    bias_sums += (at * heads + head) * WIDTH
    dsums += (at * heads + head) * size

    # Token by token: from dE to the inner gradient's inputs.
    keys = load_tile(k, kt, i, d, rows, WIDTH)
    strengths = tl.load(beta + i * long(bt, False), mask=i < rows, other=0.0).to(tl.float32)
    inverse = tl.load(inverse_ + token + i * heads, mask=i < rows, other=0.0)
    x = load_tile(x_ + out, out_row, i, d, rows, WIDTH).to(tl.float32)
    dwrite = load_tile(dwrite_ + out, out_row, i, d, rows, WIDTH).to(tl.float32)
    w, w_b = load_affine(gain, long(gh, False), shift, long(sh, False), head, d, WIDTH)
    values = load_tile(v, vt, i, d, rows, WIDTH)
    error = w[None, :] * x + w_b[None, :] - (values.to(tl.float32) - keys.to(tl.float32))
    inner = project(w[None, :] * error, x, d, WIDTH, D) * inverse[:, None]
    tl.store(dbeta + token + i * heads, tl.sum(dwrite * inner, 1).to(dbeta.dtype.element_ty), mask=i < rows)
    dh = project(dwrite * (strengths * inverse)[:, None], x, d, WIDTH, D)
    derror = w[None, :] * dh
    inside = (i < rows)[:, None]
    store_row(daffine, d, tl.sum(tl.where(inside, dh * error + derror * x, 0.0), 0), WIDTH)
    store_row(daffine + heads * WIDTH, d, tl.sum(derror, 0), WIDTH)
    store_tile(dv + out, out_row, i, d, rows, -derror, WIDTH)

    # Products with W, A and with what flows into them.
    dkeys = add_product(derror, dz_ + out, out_row, weights, 1, WIDTH, i, rows, WIDTH, D, SLICE, PRECISION)
    flow = tl.zeros((ROWS, D), tl.float32)
    flow = add_product(
        flow, write_ + out, out_row, dweights, 1, WIDTH, i, rows, WIDTH, D, SLICE, PRECISION
    )  # fmt: skip
    dkeys += tl.where(done, -tau, 0.0)[:, None] * flow
    if goes_on:
        flow = tl.zeros((ROWS, D), tl.float32)
        flow = add_product(
            flow, write_ + out, out_row, dsums, 1, WIDTH, i, rows, WIDTH, D, SLICE, PRECISION
        )  # fmt: skip
        dkeys += tl.where(done, 0.0, 1.0)[:, None] * flow
    dqueries = load_tile(dy, yt, i, d, rows, WIDTH).to(tl.float32)
    dqueries = add_product(
        dqueries, dread_ + out, out_row, weights, 1, WIDTH, i, rows, WIDTH, D, SLICE, PRECISION
    )  # fmt: skip
    if carried:
        flow = tl.zeros((ROWS, D), tl.float32)
        flow = add_product(flow, dz_ + out, out_row, sums, 1, WIDTH, i, rows, WIDTH, D, SLICE, PRECISION)
        dkeys += tl.where(mu > 0, -tau, 0.0)[:, None] * flow
        flow = tl.zeros((ROWS, D), tl.float32)
        flow = add_product(
            flow, dread_ + out, out_row, sums, 1, WIDTH, i, rows, WIDTH, D, SLICE, PRECISION
        )  # fmt: skip
        dqueries -= tl.where(mu > 0, tau, rate)[:, None] * flow

    # Scores: what token i feels of j, and, transposed, of what feels it.
    feels = earlier(mu, -tau) - tl.where(same(mu, i), rate[:, None], 0.0)
    dscores = scores(dread_ + out, out_row, write_ + out, out_row, i, rows, WIDTH, ROWS, SLICE, PRECISION)
    dqueries = add_dot(dqueries, dscores * feels, keys, PRECISION)
    store_tile(dq + out, out_row, i, d, rows, dqueries, WIDTH)
    later = tl.where(mu[:, None] < mu[None, :], -tau, 0.0)
    felt = later - tl.where((mu[:, None] == mu[None, :]) & (i[:, None] <= i[None, :]), rate[None, :], 0.0)
    dscores = scores(write_ + out, out_row, dread_ + out, out_row, i, rows, WIDTH, ROWS, SLICE, PRECISION)
    queries = load_tile(q, qt, i, d, rows, WIDTH)
    dkeys = add_dot(dkeys, dscores * felt, queries, PRECISION)
    dscores = scores(dz_ + out, out_row, write_ + out, out_row, i, rows, WIDTH, ROWS, SLICE, PRECISION)
    both = dscores * earlier(mu, -tau)
    dscores = scores(write_ + out, out_row, dz_ + out, out_row, i, rows, WIDTH, ROWS, SLICE, PRECISION)
    both += dscores * later
    dkeys = add_dot(dkeys, both, keys, PRECISION)
    store_tile(dk + out, out_row, i, d, rows, dkeys, WIDTH)

    if dtaus is not None:
        write = load_tile(write_ + out, out_row, i, d, rows, WIDTH)
        dz = load_tile(dz_ + out, out_row, i, d, rows, WIDTH).to(tl.float32)
        # What Z took from the mini-batches before, and what W and c took from this block.
        weigh = scores(k, kt, k, kt, i, rows, WIDTH, ROWS, SLICE, PRECISION) + 1.0
        # With the very operands of ``learn``: what is left of these sums once they cancel is small.
        times = tl.where(tau == 0.0, 1.0, -tau)
        across = add_dot(tl.zeros((ROWS, D), tl.float32), weigh * earlier(mu, times), write, PRECISION) / times
        if carried:
            flow = tl.zeros((ROWS, D), tl.float32) + load_row(bias_sums, d, WIDTH)[None, :]
            flow = add_product(flow, k, kt, sums, WIDTH, 1, i, rows, WIDTH, D, SLICE, PRECISION)
            across += tl.where(mu > 0, 1.0, 0.0)[:, None] * flow
        dtau = -tl.sum(dz * across, 1)
        flow = tl.zeros((ROWS, D), tl.float32) + load_row(dbiases + index, d, WIDTH)[None, :]
        flow = add_product(flow, k, kt, dweights, WIDTH, 1, i, rows, WIDTH, D, SLICE, PRECISION)
        dtau -= tl.where(done, tl.sum(write.to(tl.float32) * flow, 1), 0.0)
        dtau = tl.sum(tl.where(i < rows, dtau, 0.0), 0)
        if carried & (end >= CHUNK):
            for start in range(0, WIDTH, SLICE):
                s = start + tl.arange(0, SLICE)
                tile = load_tile(dweights, WIDTH, s, d, WIDTH, WIDTH).to(tl.float32)
                dtau -= tl.sum(tl.sum(tile * load_tile(sums, WIDTH, s, d, WIDTH, WIDTH), 1), 0)
            dtau -= tl.sum(load_row(dbiases + index, d, WIDTH) * load_row(bias_sums, d, WIDTH), 0)
        tl.store(dtaus + (slot * heads + head) * 2 + 1, dtau)


@triton.jit(do_not_specialize=("tokens", "heads", "spacing"))
def rates_back(
    offsets, tokens, heads, spacing, table, counts, dplaces, dtaus, drate,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The gradients of ``token_scale`` from one head of one sequence, added to ``drate [N,H,C]``."""
    n, head = tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)
    _, first, _ = span(n, tokens, offsets, PACKED)
    slot = first_slot(n, first, tokens, spacing, PACKED)
    stop = slot + tl.load(counts + n)
    drate += (n.to(tl.int64) * heads + head) * CHUNK
    i = tl.arange(0, ROWS)
    dtau = tl.zeros((), tl.float32)
    while slot < stop:
        rows, place = tl.load(table + slot * 4 + 2), tl.load(table + slot * 4 + 3)
        mu, pi = mini_batch(place, i, CHUNK)
        dplace = tl.load(dplaces + (slot * heads + head) * ROWS + i)
        dtau += tl.load(dtaus + (slot * heads + head) * 2) + tl.load(dtaus + (slot * heads + head) * 2 + 1)
        # Tokens of one mini-batch have places of their own.
        batch = tl.zeros_like(slot)
        while batch * CHUNK < place + rows:
            mask = (mu == batch) & (i < rows)
            tl.store(drate + pi, tl.load(drate + pi, mask=mask, other=0.0) + dplace, mask=mask)
            tl.debug_barrier()
            batch += 1
        slot += 1
    tl.store(drate + CHUNK - 1, tl.load(drate + CHUNK - 1) + dtau)


def backward(
    problem: Problem,
    at: Layout,
    x: Arrays,
    found: Scratch,
    standard: Array,
    inverse: Array,
    dout: Arrays,
    dx: Arrays,
) -> None:
    """Fill the gradients; ``found``, ``standard`` (x̂) and ``inverse`` (1/std) are what ``learn`` left."""
    s, device, every = problem.sizes, x["q"].device, problem.flags.checkpoint_every
    q, k, v, beta = dense(x["q"]), dense(x["k"]), dense(x["v"]), x["beta"]
    gain, shift, scale = (dense(x.get(name)) for name in ("norm_weight", "norm_bias", "token_scale"))
    dy = dout.get("y")
    dy = dense(v.new_zeros(1).expand(v.shape) if dy is None else dy)
    if at.constants["ALIGNED"] and any(stride % 8 for stride in dy.stride()[:-1]):
        dy = dy.contiguous()
    dread, dwrite, dz = (torch.empty_like(found.write) for _ in range(3))
    daffine = torch.empty((2, at.slots, 2, s.H, s.K), dtype=torch.float32, device=device)
    dplaces = dtaus = None
    if scale is not None:
        dplaces = torch.empty((at.slots, s.H, at.constants["ROWS"]), dtype=torch.float32, device=device)
        dtaus = torch.empty((at.slots, s.H, 2), dtype=torch.float32, device=device)
    blocks, heads = (at.slots * s.H,), (s.N * s.H,)
    inputs = *place(q, 0, 1, 2), *place(k, 0, 1, 2)
    rest = *place(v, 0, 1, 2), *place(beta, 0, 1, 2), *place(gain, 0), *place(shift, 0), scale
    lengths, flow = (x["offsets"], s.T, s.H, s.H // s.G), place(dy, 0, 1, 2)
    read_back[blocks](
        *inputs, *place(gain, 0), scale, *flow, *lengths,
        found.table, found.weights, found.sums, found.biases, found.bias_sums, found.write, dread, dwrite,
        daffine[0], dplaces, dtaus, **at.constants, **at.launch,
    )  # fmt: skip

    work = None if at.resident else torch.empty((s.N, s.H, s.K, s.K), dtype=torch.float32, device=device)
    dweights, dsums = torch.empty_like(found.weights), torch.empty_like(found.sums)
    dbiases = torch.empty_like(found.biases)
    learn_back[heads](
        *inputs, *rest, x["offsets"], first_marks(problem, x["offsets"]), *lengths[1:], at.spacing,
        found.table, found.counts, standard, inverse, dread, dwrite, dz, work, dweights, dbiases, dsums,
        *(_contiguous(dout.get(f"{where}.{name}")) for where in ("final", "checkpoint") for name in _FIELDS),
        *(dx.get(f"initial.{name}") for name in _FIELDS),
        **at.constants, EVERY=every, RESIDENT=at.resident, **at.launch,
    )  # fmt: skip
    dq, dk = spread(problem, dx, "q"), spread(problem, dx, "k")
    inputs_back[blocks](
        *inputs, *rest, *flow, *lengths,
        found.table, found.weights, found.sums, found.bias_sums, found.write, standard, inverse, dread, dwrite, dz,
        dweights, dbiases, dsums, dq, dk, dx["v"], dx["beta"], daffine[1], dtaus,
        **at.constants, **at.launch,
    )  # fmt: skip
    gather(problem, dx, "q", dq)
    gather(problem, dx, "k", dk)

    for part, name in enumerate(("norm_weight", "norm_bias")):
        if name in dx:
            dx[name].copy_(daffine[:, :, part].sum((0, 1)))
    if scale is not None:
        drate = torch.zeros((s.N, s.H, at.constants["CHUNK"]), dtype=torch.float32, device=device)
        constants = {name: at.constants[name] for name in ("ROWS", "CHUNK", "PACKED")}
        rates_back[heads](
            x["offsets"], s.T, s.H, at.spacing, found.table, found.counts, dplaces, dtaus, drate, **constants,
            num_warps=1,
        )  # fmt: skip
        dx["token_scale"].copy_(drate.sum((0, 1)))


_FIELDS = ("weight", "weight_sum", "bias", "bias_sum")


def _contiguous(tensor: Array) -> Array:
    return None if tensor is None else tensor.contiguous()
