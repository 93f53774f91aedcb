"""The adjoint of TTT-MLP by whole mini-batches; notation of ``ttt_mlp``, ``d`` before what a loss is derived by.

``learn`` runs again, keeping the weights before every mini-batch, E2, x̂2, S and dZ̄2. ``unlearn``, a program a head,
goes back through the mini-batches, twice through the slices of each; dW1, … are those of the weights behind it:

    dS = [j ≤ i] −r∘(dZ̄2 E2ᵀ)        dX̄2 = dZ̄2 W2ᵀ + dS X2        dX2 = dSᵀ X̄2 − τ E2 dW2ᵀ        r = token_scale
    dZ̄1 = dX̄2∘gelu'(Z̄1)              dP = [j ≤ i] −r∘(dZ̄1 E1ᵀ)
    dE1 = −(r∘P)ᵀ dZ̄1 − τ (K dW1 + dc1)                            dU = dE1∘gelu'(Z1),   U = E2 W2ᵀ
    dE2 = −(r∘S)ᵀ dZ̄2 − τ (X2 dW2 + dc2) + dU W2                    dZ2 from dE2 as in ``ttt_backward``
    dZ1 = dE1∘U∘gelu''(Z1) + (dX2 + dZ2 W2ᵀ)∘gelu'(Z1)
    dW1 ← dW1 + Qᵀ dZ̄1 + Kᵀ dZ1       dW2 ← dW2 + X̄2ᵀ dZ̄2 + E2 ᵀdU + X2ᵀ dZ2       dc1, dc2: their sums
    dQ = dy + dZ̄1 W1ᵀ + dP K          dK = de + dZ1 W1ᵀ − τ E1 dW1ᵀ + dPᵀ Q

``inputs_back``, a program a mini-batch, does what remains for the tokens. Transposed products are products of their
own, or come back from memory.
"""

import torch
import triton
import triton.language as tl

from mixers.spec import Array

from .kernel import dense, place
from .ttt_mlp import Call, gate, gelu_slope
from .ttt_rows import (
    add_dot,
    centre_columns,
    column_adjoint,
    last_rate,
    load_affine,
    load_columns,
    load_rate,
    load_row,
    load_tile,
    project,
    store_columns,
    store_row,
    store_tile,
)


@triton.jit
def gelu_curve(z, s):
    """gelu'' from z and its gate."""
    steep = (1.0 + z * z * 0.134145) * 1.5957691216057308
    first = s * (1.0 - s)
    return first * steep * (2.0 + z * (1.0 - 2.0 * s) * steep) + z * z * first * (0.26829 * 1.5957691216057308)


_LENGTHS = ("tokens", "qb", "qt", "qh", "kb", "kt", "kh", "vb", "vt", "vh", "bb", "bt", "bh", "yb", "yt", "yh", "heads",
            "group", "step")  # fmt: skip


@triton.jit(do_not_specialize=_LENGTHS)
def unlearn(
    q, qb, qt, qh, k, kb, kt, kh, v, vb, vt, vh, beta, bb, bt, bh, gain, shift, scale, dy, yb, yt, yh,
    first1, firstc1, first2, firstc2, weight1, bias1, weight2, bias2,
    write_, x_, inverse_, dread_, scores_, work, dweight1, dbias1, dweight2, dbias2,
    dwrite_, dq, dk_, dweigh_, drates, tokens, heads, group, step,
    WIDTH: tl.constexpr, INNER: tl.constexpr, D: tl.constexpr, SLICE: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dE2, dP, dq and most of dk; the gradients of the last weights become those of the first, in place."""
    n, head = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    unit = n * heads + head
    q += n * qb + (head // group) * qh
    k += n * kb + (head // group) * kh
    v += n * vb + head * vh
    beta += n * bb + head * bh
    dy += n * yb + head * yh
    out_row = heads.to(tl.int64) * WIDTH
    size: tl.constexpr = WIDTH * INNER
    i, d = tl.arange(0, ROWS), tl.arange(0, D)
    inside = i < CHUNK
    w, w_b = load_affine(gain, WIDTH, shift, WIDTH, head, d, WIDTH)
    tau, rate = last_rate(scale, CHUNK), load_rate(scale, i, CHUNK)
    above = (i[:, None] <= i[None, :]) & inside[None, :]  # of rows j and columns i
    below = (i[None, :] <= i[:, None]) & inside[:, None]
    work += unit * INNER * ROWS
    dweight1 += unit * size
    dbias1 += unit * INNER
    dweight2 += unit * size
    dc2 = load_row(dbias2 + unit * WIDTH, d, WIDTH)
    drate, dtau = tl.zeros((ROWS,), tl.float32), tl.zeros((), tl.float32)
    square = tl.zeros((ROWS, ROWS), tl.float32)
    wide, tall = tl.zeros((D, ROWS), tl.float32), tl.zeros((SLICE, ROWS), tl.float32)
    count = tokens // CHUNK
    for back in range(count):
        m = (count - 1 - back).to(tl.int64)
        if m == 0:
            from1, fromc1, from2 = first1 + unit * size, firstc1 + unit * INNER, first2 + unit * size
        else:
            at = (m - 1) * step + unit
            from1, fromc1, from2 = weight1 + at * size, bias1 + at * INNER, weight2 + at * size
        t = m * CHUNK
        out = ((n * tokens + t) * heads + head) * WIDTH
        keys, queries = load_tile(k + t * kt, kt, i, d, CHUNK, WIDTH), load_tile(q + t * qt, qt, i, d, CHUNK, WIDTH)
        key_columns = load_columns(k + t * kt, kt, i, d, CHUNK, WIDTH)
        write = load_columns(write_ + out, out_row, i, d, CHUNK, WIDTH)
        write_rows = load_tile(write_ + out, out_row, i, d, CHUNK, WIDTH)
        dread = load_columns(dread_ + out, out_row, i, d, CHUNK, WIDTH)
        dread_rows = load_tile(dread_ + out, out_row, i, d, CHUNK, WIDTH)
        weigh_above = tl.where(above, add_dot(square + 1.0, keys, tl.trans(queries), PRECISION), 0.0)
        weigh_below = tl.where(below, add_dot(square + 1.0, queries, tl.trans(keys), PRECISION), 0.0)
        ds_above = tl.where(above, add_dot(square, write_rows, dread, PRECISION) * -rate[None, :], 0.0)
        ds_below = tl.where(below, add_dot(square, dread_rows, write, PRECISION) * -rate[:, None], 0.0)
        dwrite, flow2, dweigh = wide, wide + dc2[:, None], square
        dkeys = wide
        dqueries = load_columns(dy + t * yt, yt, i, d, CHUNK, WIDTH).to(tl.float32)
        for start in range(0, INNER, SLICE):
            f = start + tl.arange(0, SLICE)
            c1 = load_row(fromc1, f, INNER)
            across, down = load_columns(from1, INNER, d, f, WIDTH, INNER), load_tile(from1, INNER, d, f, WIDTH, INNER)
            z = add_dot(tall + c1[:, None], across, tl.trans(keys), PRECISION)
            s = gate(z)
            slope = gelu_slope(z, s)
            rows = load_tile(from2, WIDTH, f, d, INNER, WIDTH)
            felt = add_dot(tall, rows, write, PRECISION)
            write1 = felt * slope
            within = add_dot(tall, write1, weigh_above, PRECISION)
            read = add_dot(tall + c1[:, None], across, tl.trans(queries), PRECISION) - within * rate[None, :]
            s_read = gate(read)
            dinner = add_dot(add_dot(tall, rows, dread, PRECISION), z * s, ds_above, PRECISION)
            dread1 = dinner * gelu_slope(read, s_read)
            drate -= tl.sum(dread1 * within, 0)
            dqueries = add_dot(dqueries, down, dread1, PRECISION)

            drows = load_tile(dweight2, WIDTH, f, d, INNER, WIDTH)
            dx = add_dot(tall, read * s_read, ds_below, PRECISION)
            dx -= tau * add_dot(tall, drows, write, PRECISION)
            flow2 = add_dot(flow2, load_columns(dweight2, WIDTH, f, d, INNER, WIDTH), z * s, PRECISION)
            dacross, dc1 = load_columns(dweight1, INNER, d, f, WIDTH, INNER), load_row(dbias1, f, INNER)
            flow1 = add_dot(tall + dc1[:, None], dacross, tl.trans(keys), PRECISION)
            dtau -= tl.sum(tl.sum(flow1 * write1, 1), 0)
            moved = dread1 * -rate[None, :]
            dwrite1 = add_dot(-tau * flow1, moved, weigh_below, PRECISION)
            dkeys -= tau * add_dot(wide, load_tile(dweight1, INNER, d, f, WIDTH, INNER), write1, PRECISION)

            # E1 again, as rows.
            columns = load_columns(from2, WIDTH, f, d, INNER, WIDTH)
            z_rows = add_dot(tl.zeros((ROWS, SLICE), tl.float32) + c1[None, :], keys, down, PRECISION)
            write1_rows = add_dot(tl.zeros((ROWS, SLICE), tl.float32), write_rows, columns, PRECISION)
            dweigh = add_dot(dweigh, write1_rows * gelu_slope(z_rows, gate(z_rows)), moved, PRECISION)

            dfelt = dwrite1 * slope
            dwrite = add_dot(dwrite, columns, dfelt, PRECISION)
            dz = dwrite1 * felt * gelu_curve(z, s) + dx * slope
            store_tile(work, ROWS, f, i, INNER, dz, ROWS)
            drows = add_dot(add_dot(drows, read * s_read, dread_rows, PRECISION), dfelt, write_rows, PRECISION)
            dacross = add_dot(dacross, dread1, queries, PRECISION)
            tl.debug_barrier()
            store_tile(dweight2, WIDTH, f, d, INNER, drows, WIDTH)
            store_columns(dweight1, INNER, d, f, WIDTH, dacross, INNER)
            store_row(dbias1, f, dc1 + tl.sum(dread1, 1), INNER)

        both = load_tile(scores_ + (unit * tokens + t) * ROWS, ROWS, i, i, CHUNK, CHUNK)
        dwrite = add_dot(dwrite - tau * flow2, dread * -rate[None, :], both, PRECISION)
        dtau -= tl.sum(tl.sum(flow2 * write, 1), 0)
        store_columns(dwrite_ + out, out_row, i, d, CHUNK, dwrite, WIDTH)
        dweigh = tl.where(above, dweigh, 0.0)
        store_tile(dweigh_ + (unit * tokens + t) * ROWS, ROWS, i, i, CHUNK, dweigh, ROWS)
        dqueries = add_dot(dqueries, key_columns, dweigh, PRECISION)
        store_columns(dq + out, out_row, i, d, CHUNK, dqueries, WIDTH)

        x = load_columns(x_ + out, out_row, i, d, CHUNK, WIDTH)
        inverse = tl.load(inverse_ + out // WIDTH + i * heads, mask=inside, other=0.0)
        strengths = tl.load(beta + t * bt + i * bt, mask=inside, other=0.0).to(tl.float32)
        value_columns = load_columns(v + t * vt, vt, i, d, CHUNK, WIDTH).to(tl.float32)
        h = (w * w)[:, None] * x + w[:, None] * (w_b[:, None] - (value_columns - key_columns.to(tl.float32)))
        h = centre_columns(h, d, WIDTH, D)
        level = tl.sum(h * x, 0) * (1.0 / WIDTH)
        dz2 = column_adjoint(dwrite, h, x, level, w, gain, strengths, inverse, d, WIDTH, D)
        dc2 += tl.sum(dz2 + dread, 1)
        tl.debug_barrier()
        for start in range(0, INNER, SLICE):
            f = start + tl.arange(0, SLICE)
            c1 = load_row(fromc1, f, INNER)
            across, down = load_columns(from1, INNER, d, f, WIDTH, INNER), load_tile(from1, INNER, d, f, WIDTH, INNER)
            z = add_dot(tall + c1[:, None], across, tl.trans(keys), PRECISION)
            rows = load_tile(from2, WIDTH, f, d, INNER, WIDTH)
            dz = load_tile(work, ROWS, f, i, INNER, ROWS)
            dz += add_dot(tall, rows, dz2, PRECISION) * gelu_slope(z, gate(z))
            dkeys = add_dot(dkeys, down, dz, PRECISION)
            z_rows = add_dot(tl.zeros((ROWS, SLICE), tl.float32) + c1[None, :], keys, down, PRECISION)
            columns = load_columns(dweight2, WIDTH, f, d, INNER, WIDTH)
            columns = add_dot(columns, dz2, z_rows * gate(z_rows), PRECISION)
            dacross = load_columns(dweight1, INNER, d, f, WIDTH, INNER)
            dacross = add_dot(dacross, dz, keys, PRECISION)
            dc1 = load_row(dbias1, f, INNER) + tl.sum(dz, 1)
            tl.debug_barrier()
            store_columns(dweight2, WIDTH, f, d, INNER, columns, WIDTH)
            store_columns(dweight1, INNER, d, f, WIDTH, dacross, INNER)
            store_row(dbias1, f, dc1, INNER)
        store_columns(dk_ + out, out_row, i, d, CHUNK, dkeys, WIDTH)
        tl.debug_barrier()
    store_row(dbias2 + unit * WIDTH, d, dc2, WIDTH)
    drate += tl.load(drates + unit * CHUNK + i, mask=inside, other=0.0)
    tl.store(drates + unit * CHUNK + i, drate + tl.where(i == CHUNK - 1, dtau, 0.0), mask=inside)


_LENGTHS_INPUTS = ("tokens", "qb", "qt", "qh", "kb", "kt", "kh", "vb", "vt", "vh", "bb", "bt", "bh", "heads", "group")


@triton.jit(do_not_specialize=_LENGTHS_INPUTS)
def inputs_back(
    q, qb, qt, qh, k, kb, kt, kh, v, vb, vt, vh, beta, bb, bt, bh, gain, shift,
    x_, inverse_, dwrite_, dk_, dweigh_, dk, dv, dbeta, daffine, tokens, heads, group,
    WIDTH: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv and dbeta of one mini-batch, and what its inner gradients send to w and w_b."""
    piece, head = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    count = tokens // CHUNK
    n, t = piece // count, piece % count * CHUNK
    q += n * qb + t * qt + (head // group) * qh
    k += n * kb + t * kt + (head // group) * kh
    v += n * vb + t * vt + head * vh
    beta += n * bb + t * bt + head * bh
    i, d = tl.arange(0, ROWS), tl.arange(0, D)
    inside = i < CHUNK
    token = (n * tokens + t) * heads + head
    out, out_row = token * WIDTH, heads.to(tl.int64) * WIDTH
    w, w_b = load_affine(gain, WIDTH, shift, WIDTH, head, d, WIDTH)
    keys, values = load_tile(k, kt, i, d, CHUNK, WIDTH), load_tile(v, vt, i, d, CHUNK, WIDTH)
    strengths = tl.load(beta + i * bt, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.load(inverse_ + token + i * heads, mask=inside, other=0.0)
    x = load_tile(x_ + out, out_row, i, d, CHUNK, WIDTH)
    dwrite = load_tile(dwrite_ + out, out_row, i, d, CHUNK, WIDTH)
    error = w[None, :] * x + w_b[None, :] - (values.to(tl.float32) - keys.to(tl.float32))
    inner = project(w[None, :] * error, x, d, WIDTH, D) * inverse[:, None]
    tl.store(dbeta + token + i * heads, tl.sum(dwrite * inner, 1).to(dbeta.dtype.element_ty), mask=inside)
    dh = project(dwrite * (strengths * inverse)[:, None], x, d, WIDTH, D)
    derror = w[None, :] * dh
    store_tile(dv + out, out_row, i, d, CHUNK, -derror, WIDTH)
    daffine += (piece * heads + head) * 2 * WIDTH
    store_row(daffine, d, tl.sum(tl.where(inside[:, None], dh * error + derror * x, 0.0), 0), WIDTH)
    store_row(daffine + WIDTH, d, tl.sum(derror, 0), WIDTH)
    dweigh = load_tile(dweigh_ + ((n * heads + head) * tokens + t) * ROWS, ROWS, i, i, CHUNK, ROWS)
    dkeys = derror + load_tile(dk_ + out, out_row, i, d, CHUNK, WIDTH)
    dkeys = add_dot(dkeys, dweigh, load_tile(q, qt, i, d, CHUNK, WIDTH), PRECISION)
    store_tile(dk + out, out_row, i, d, CHUNK, dkeys, WIDTH)


def backward(call: Call, x: tuple[Array, ...], dout: tuple[Array, ...]) -> tuple[Array, ...]:
    """Gradients of ``x`` from those of y and of the last weights."""
    dy, v, device = dense(dout[0]), call.v, call.v.device
    rows, tokens, heads, width = v.shape
    count = tokens // call.chunk

    def empty(*shape: int) -> Array:
        return torch.empty(shape, dtype=torch.float32, device=device)

    size, side = call.constants, call.constants["ROWS"]
    weights = tuple(empty(count, *a.shape) for a in call.first)
    write, standard, dread, dwrite, dkeys = (empty(*v.shape) for _ in range(5))
    inverse, scores, dweigh = empty(*v.shape[:3]), empty(rows, heads, tokens, side), empty(rows, heads, tokens, side)
    daffine, drates = empty(rows * heads, 2, width), empty(rows * heads, call.chunk)
    call.learn(weights, rows * heads, None, dy, (write, standard, inverse, dread, scores, daffine, drates))

    dweights = tuple(d.to(torch.float32, copy=True, memory_format=torch.contiguous_format) for d in dout[1:])
    grouped = call.group > 1
    dq, dk = (torch.empty_like(v, dtype=torch.float32 if grouped else v.dtype, memory_format=torch.contiguous_format)
              for _ in range(2))  # fmt: skip
    inputs = tuple(n for a in (call.q, call.k, call.v, call.beta) for n in place(a, 0, 1, 2))
    unlearn[call.programs](
        *inputs, call.gain, call.shift, call.scale, *place(dy, 0, 1, 2), *call.first, *weights,
        write, standard, inverse, dread, scores, empty(rows * heads, size["INNER"], side), *dweights,
        dwrite, dq, dkeys, dweigh, drates, tokens, heads, call.group, rows * heads, **size,
    )  # fmt: skip
    dv, dbeta = (torch.empty(a.shape, dtype=a.dtype, device=device) for a in (v, call.beta))
    parts = empty(rows * count, heads, 2, width)
    shared = {name: size[name] for name in ("WIDTH", "D", "ROWS", "CHUNK", "PRECISION")}
    inputs_back[(rows * count * heads,)](
        *inputs, call.gain, call.shift, standard, inverse, dwrite, dkeys, dweigh, dk, dv, dbeta, parts,
        tokens, heads, call.group, **shared, num_warps=4, num_stages=1,
    )  # fmt: skip
    if grouped:
        dq, dk = (a.view(rows, tokens, heads // call.group, call.group, width).sum(3).to(v.dtype) for a in (dq, dk))
    affine = daffine.view(rows, heads, 2, width).sum(0) + parts.sum(0)
    parameters = affine[:, 0].clone(), affine[:, 1].clone(), drates.sum(0)
    given = (d.to(a.dtype) if a is not None else None for d, a in zip(parameters, x[8:], strict=True))
    return dq, dk, dv, dbeta, *(d.to(a.dtype) for d, a in zip(dweights, x[4:8], strict=True)), *given
