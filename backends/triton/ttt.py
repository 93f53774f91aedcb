"""TTT-linear in blocks of mini-batches: a short chain learns, and all that does not wait for it runs in parallel.

Rows are the tokens i of a block, which may hold several mini-batches; ``key`` and ``query`` are the matrices of
``ttt_rows`` that say how much token i feels of the inner gradient of token j, or of the sums A, a before the block.

    Z = K W + c + key∘(K A + a) + (key∘(K Kᵀ + 1)) E        x̂ = (Z − mean)/std        h = w∘(w∘x̂ + w_b − (V − K))
    E = beta∘(h ⟂ x̂)/std                                    P ⟂ x̂ = P − mean(P) − x̂ mean(P∘x̂)
    Z̄ = Q W + c + query∘(Q A + a) + (query∘(Q Kᵀ + 1)) E    y = Q + w∘(Z̄ − mean)/std̄ + w_b
    W ← W − τ (A + Kᵀ E), c ← c − τ (a + Σ E) over the mini-batches that end;    A, a: the rest

E waits for the mini-batches before it in the block: ``key∘(K Kᵀ + 1)`` is zero but for blocks below its diagonal, so E
is right in the first mini-batch after one pass over all rows, in the first two after two, and so on. A pass is one
product of a small matrix and a standardisation; products with W come once a block, with as many rows as tensor cores
like. ``learn`` does this, a program a head, and leaves E and the W, c before every block in scratch; ``read`` computes
y from them, a program a block.

    q, k [B,T,G,D]   v, y, E [B,T,H,D]   beta [B,T,H]   W, A [N,H,D,D]   c, a [N,H,D]   w, w_b [H,D]   token_scale [C]

W stays on chip where it fits. Operands of products are float32, multiplied as ``ttt_rows.multiplied`` says.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from mixers.backend import Config, Pool, Support
from mixers.problem import Arrays, Problem
from mixers.spec import Array

from .blocks import span
from .kernel import TritonKernel, blank_unused, dense, first_marks, place
from .ttt_backward import backward
from .ttt_decode import decode
from .ttt_rows import (
    Layout,
    Scratch,
    add_dot,
    add_product,
    centre_columns,
    column_gradient,
    completed,
    copy,
    cut,
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
    multiplied,
    same,
    scores,
    standardise,
    store_columns,
    store_row,
    store_tile,
)


@triton.jit
def _deposit(sums, bias_sums, carried, k, stride, rest, i, rows, target, target_bias, WIDTH: tl.constexpr,
             D: tl.constexpr, SLICE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """``A + Kᵀ E`` and ``a + Σ E`` of the mini-batch that goes on; A and a only where they are carried."""
    d = tl.arange(0, D)
    for start in range(0, WIDTH, SLICE):
        s = start + tl.arange(0, SLICE)
        tile = load_columns(sums, WIDTH, s, d, tl.where(carried, WIDTH, 0), WIDTH)
        keys = load_tile(k, stride, i, s, rows, WIDTH)
        tile = add_dot(tile, rest, keys, PRECISION)
        store_columns(target, WIDTH, s, d, WIDTH, tile, WIDTH)
    bias_sum = tl.where(carried, load_row(bias_sums, d, WIDTH), 0.0)
    store_row(target_bias, d, bias_sum + tl.sum(rest, 1), WIDTH)


@triton.jit
def _learn_from(state, learned, keys, tau, PRECISION: tl.constexpr):
    """W behind a block.

    In true float32 a block's sum is rounded to itself before it joins W, whose digits it may lack: in one accumulator
    every token would be rounded to those of W. There E lacks −τ, as Triton makes one accumulator of a plain sum.
    """
    if PRECISION == "ieee":
        return state - tau * tl.dot(learned, keys.to(tl.float32), input_precision=PRECISION)
    return add_dot(state, learned, keys, PRECISION)


_LEARN_LENGTHS = ("tokens", "kb", "kt", "kh", "vb", "vt", "vh", "bb", "bt", "bh", "gh", "sh",
                  "w0n", "w0h", "w0r", "c0n", "c0h", "a0n", "a0h", "r0n", "r0h", "r0r", "pn", "heads", "group",
                  "spacing")  # fmt: skip


@triton.jit(do_not_specialize=_LEARN_LENGTHS)
def learn(
    k, kb, kt, kh, v, vb, vt, vh, beta, bb, bt, bh, gain, gh, shift, sh, scale,
    weight0, w0n, w0h, w0r, weight_sum0, r0n, r0h, r0r, bias0, c0n, c0h, bias_sum0, a0n, a0h, phase0, pn,
    offsets, marks, tokens, heads, group, spacing,
    table, counts, work, weights, sums, biases, bias_sums, write_, x_, inverse_,
    weight1, weight_sum1, bias1, bias_sum1, phase1, weight2, weight_sum2, bias2, bias_sum2, phase2,
    WIDTH: tl.constexpr, D: tl.constexpr, SLICE: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    EVERY: tl.constexpr, CARRY: tl.constexpr, PACKED: tl.constexpr, RESIDENT: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr, JOIN: tl.constexpr,
):  # fmt: skip
    """E of every token, the weights before every block, and the states that are returned: 1 the last, 2 checkpoints.

    ``work [N,H,D,D]`` holds a W that does not fit on chip. A lies in ``sums``: with CARRY before every block, without
    it before the first alone, since no other one starts inside a mini-batch. ``x_`` and ``inverse_`` keep x̂ and 1/std
    for a backward.
    """
    n, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    row, first, length = span(n, tokens, offsets, PACKED)
    n, head = n.to(tl.int64), head.to(tl.int64)
    unit = n * heads + head
    slot = first_slot(n, first, tokens, spacing, PACKED)
    mark = first
    if weight2 is not None:
        mark = tl.load(marks + n) if PACKED else n * (tokens // EVERY)
    begun = tl.load(phase0 + n * long(pn, False)).to(tl.int64)

    kt, vt = long(kt, ALIGNED), long(vt, ALIGNED)
    k += row * long(kb, ALIGNED) + first * kt + (head // group) * long(kh, ALIGNED)
    v += row * long(vb, ALIGNED) + first * vt + head * long(vh, ALIGNED)
    beta += row * long(bb, False) + first * long(bt, False) + head * long(bh, False)
    out = (row * tokens + first) * heads + head
    out_row = heads.to(tl.int64) * WIDTH

    i, d = tl.arange(0, ROWS), tl.arange(0, D)
    w, w_b = load_affine(gain, long(gh, False), shift, long(sh, False), head, d, WIDTH)
    tau = last_rate(scale, CHUNK)
    bias = load_row(bias0 + n * long(c0n, False) + head * long(c0h, False), d, WIDTH)
    weight0 += n * long(w0n, ALIGNED) + head * long(w0h, ALIGNED)
    if RESIDENT:
        weight = load_columns(weight0, long(w0r, ALIGNED), d, d, WIDTH, WIDTH).to(tl.float32)
    else:
        work += unit * WIDTH * WIDTH
        copy(weight0, 0, long(w0r, ALIGNED), work, WIDTH, D, SLICE)
    weight_sum0 += n * long(r0n, ALIGNED) + head * long(r0h, ALIGNED)
    at = slot if CARRY else n
    sums += (at * heads + head) * WIDTH * WIDTH
    bias_sums += (at * heads + head) * WIDTH
    store_row(bias_sums, d, load_row(bias_sum0 + n * long(a0n, False) + head * long(a0h, False), d, WIDTH), WIDTH)
    copy(weight_sum0, 0, long(r0r, ALIGNED), sums, WIDTH, D, SLICE)
    tl.debug_barrier()

    t, place, blocks = tl.zeros_like(first), begun, tl.zeros_like(first)
    rows = cut(t, place, length, CHUNK, ROWS, EVERY)
    last_t, joined = t, rows * 0
    keys, values = load_columns(k, kt, i, d, rows, WIDTH), load_columns(v, vt, i, d, rows, WIDTH)
    strengths = tl.load(beta + i * long(bt, False), mask=i < rows, other=0.0).to(tl.float32)
    while t < length:
        mu, _ = mini_batch(place, i, CHUNK)
        end = place + rows
        carried = (place > 0) | (t == 0)
        index = (slot * heads + head) * WIDTH
        opens = blocks % JOIN == 0
        if head == 0:
            if opens:
                tl.store(table + slot * 4, n)
                tl.store(table + slot * 4 + 1, t)
                tl.store(table + slot * 4 + 3, place)
            joined = tl.where(opens, rows, joined + rows)
            tl.store(table + slot * 4 + 2, joined)
        # The next block is on its way while this one is at work.
        at_t, at_place, at_rows = t + rows, end % CHUNK, cut(t + rows, end % CHUNK, length, CHUNK, ROWS, EVERY)
        next_keys = load_columns(k + at_t * kt, kt, i, d, at_rows, WIDTH)
        next_values = load_columns(v + at_t * vt, vt, i, d, at_rows, WIDTH)
        next_beta = beta + (at_t + i) * long(bt, False)
        next_strengths = tl.load(next_beta, mask=i < at_rows, other=0.0).to(tl.float32)

        # What does not wait for W: how blocks of mini-batches feel each other, and where the norm is pulled.
        weigh = add_dot(tl.zeros((ROWS, ROWS), tl.float32) + 1.0, tl.trans(keys), keys, PRECISION)
        weigh *= tl.where(mu[:, None] < mu[None, :], -tau, 0.0)
        pull = w[:, None] * (w_b[:, None] - (values.to(tl.float32) - keys.to(tl.float32)))
        pull = centre_columns(pull, d, WIDTH, D)
        if opens:
            store_row(biases + index, d, bias, WIDTH)

        target = weights + index * WIDTH
        z = tl.zeros((D, ROWS), tl.float32) + bias[:, None]
        if RESIDENT:
            if opens:
                store_columns(target, WIDTH, d, d, WIDTH, weight, WIDTH)
            z = add_dot(z, weight, keys, PRECISION)
        else:
            for start in range(0, WIDTH, SLICE):
                s = start + tl.arange(0, SLICE)
                tile = load_columns(work, WIDTH, s, d, WIDTH, WIDTH)
                if opens:
                    store_columns(target, WIDTH, s, d, WIDTH, tile, WIDTH)
                part = load_tile(k + t * kt, kt, i, s, rows, WIDTH)
                z = add_dot(z, tile, tl.trans(part), PRECISION)
        if carried & (end > CHUNK):
            product = tl.zeros((D, ROWS), tl.float32) + load_row(bias_sums, d, WIDTH)[:, None]
            for start in range(0, WIDTH, SLICE):
                s = start + tl.arange(0, SLICE)
                tile = load_columns(sums, WIDTH, s, d, WIDTH, WIDTH)
                part = load_tile(k + t * kt, kt, i, s, rows, WIDTH)
                product = add_dot(product, tile, tl.trans(part), PRECISION)
            z -= tl.where(mu > 0, tau, 0.0)[None, :] * product

        # E has no mean, so that Z keeps its own.
        z = centre_columns(z, d, WIDTH, D)
        batch = tl.zeros_like(place).to(tl.int32)
        while (batch + 1) * CHUNK < end:
            write, inverse = column_gradient(z, w, pull, strengths, gain, d, WIDTH, D, PRECISION)
            felt = tl.where((mu == batch)[:, None], weigh, 0.0)
            z = add_dot(z, write, felt, PRECISION)
            batch += 1
        write, inverse = column_gradient(z, w, pull, strengths, gain, d, WIDTH, D, PRECISION)

        token = out + t * heads
        done = completed(mu, end, CHUNK)
        learned = write * tl.where(done, 1.0 if PRECISION == "ieee" else -tau, 0.0)[None, :]
        if PRECISION == "ieee":
            bias -= tau * tl.sum(learned, 1)
        else:
            bias += tl.sum(learned, 1)
        if RESIDENT:
            weight = _learn_from(weight, learned, tl.trans(keys), tau, PRECISION)
        else:
            for start in range(0, WIDTH, SLICE):
                s = start + tl.arange(0, SLICE)
                part = load_tile(k + t * kt, kt, i, s, rows, WIDTH)
                tile = load_columns(work, WIDTH, s, d, WIDTH, WIDTH)
                tile = _learn_from(tile, learned, part, tau, PRECISION)
                if carried & (end >= CHUNK):
                    tile -= tau * load_columns(sums, WIDTH, s, d, WIDTH, WIDTH)
                store_columns(work, WIDTH, s, d, WIDTH, tile, WIDTH)
            tl.debug_barrier()
        store_columns(write_ + token * WIDTH, out_row, i, d, rows, write, WIDTH)
        if x_ is not None:
            store_columns(x_ + token * WIDTH, out_row, i, d, rows, z * inverse[None, :], WIDTH)
            tl.store(inverse_ + token + i * heads, inverse, mask=i < rows)
        if carried & (end >= CHUNK):
            if RESIDENT:
                weight -= tau * load_columns(sums, WIDTH, d, d, WIDTH, WIDTH)
            bias -= tau * load_row(bias_sums, d, WIDTH)

        if CARRY:
            onward = carried & (end < CHUNK)
            rest = tl.where(done[None, :], 0.0, write)
            if weight2 is not None:  # a constant, which must hold before EVERY divides
                if at_t % EVERY == 0:
                    index = ((mark + at_t // EVERY - 1) * heads + head) * WIDTH
                    if RESIDENT:
                        store_columns(weight2 + index * WIDTH, WIDTH, d, d, WIDTH, weight, WIDTH)
                    else:
                        copy(work, 0, WIDTH, weight2 + index * WIDTH, WIDTH, D, SLICE)
                    store_row(bias2 + index, d, bias, WIDTH)
                    _deposit(
                        sums, bias_sums, onward, k + t * kt, kt, rest, i, rows, weight_sum2 + index * WIDTH,
                        bias_sum2 + index, WIDTH, D, SLICE, PRECISION,
                    )  # fmt: skip
                    if head == 0:
                        tl.store(phase2 + mark + at_t // EVERY - 1, at_place.to(tl.int32))
            if (at_place > 0) & (at_t < length):
                _deposit(
                    sums, bias_sums, onward, k + t * kt, kt, rest, i, rows, sums + heads * WIDTH * WIDTH,
                    bias_sums + heads * WIDTH, WIDTH, D, SLICE, PRECISION,
                )  # fmt: skip
                tl.debug_barrier()
            sums += heads * WIDTH * WIDTH
            bias_sums += heads * WIDTH
        keys, values, strengths = next_keys, next_values, next_strengths
        # Not `last_t = t`: Triton 3.6 then takes last_t for a constant, that of before the loop.
        last_t = tl.maximum(last_t, t)
        t, place, rows, blocks = at_t, at_place, at_rows, blocks + 1
        slot += tl.where(blocks % JOIN == 0, 1, 0)

    if head == 0:
        tl.store(counts + n, blocks)
    if weight1 is not None:
        index = unit * WIDTH
        if RESIDENT:
            store_columns(weight1 + index * WIDTH, WIDTH, d, d, WIDTH, weight, WIDTH)
        else:
            copy(work, 0, WIDTH, weight1 + index * WIDTH, WIDTH, D, SLICE)
        store_row(bias1 + index, d, bias, WIDTH)
        if head == 0:
            tl.store(phase1 + n, place.to(tl.int32))
        # The last block's E comes back from memory, which keeps all this out of the loop.
        tl.debug_barrier()
        if CARRY:
            back = tl.where(blocks > 0, 1, 0) * heads * WIDTH
            sums -= back * WIDTH
            bias_sums -= back
        last_rows, last_place = length - last_t, (begun + last_t) % CHUNK
        end = last_place + last_rows
        mu, _ = mini_batch(last_place, i, CHUNK)
        write = load_columns(write_ + (out + last_t * heads) * WIDTH, out_row, i, d, last_rows, WIDTH).to(tl.float32)
        rest = tl.where(completed(mu, end, CHUNK)[None, :], 0.0, write)
        onward = ((last_place > 0) | (last_t == 0)) & (end < CHUNK) | (blocks == 0)
        _deposit(
            sums, bias_sums, onward, k + last_t * kt, kt, rest, i, last_rows, weight_sum1 + index * WIDTH,
            bias_sum1 + index, WIDTH, D, SLICE, PRECISION,
        )  # fmt: skip


_READ_LENGTHS = ("tokens", "qb", "qt", "qh", "kb", "kt", "kh", "gh", "sh", "heads", "group")


@triton.jit(do_not_specialize=_READ_LENGTHS)
def read(
    q, qb, qt, qh, k, kb, kt, kh, gain, gh, shift, sh, scale, offsets, tokens, heads, group,
    table, weights, sums, biases, bias_sums, write_, y,
    WIDTH: tl.constexpr, D: tl.constexpr, SLICE: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    CARRY: tl.constexpr, PACKED: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of one block, from E and the weights before it."""
    slot, head = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    rows = tl.load(table + slot * 4 + 2)
    if rows == 0:
        return
    n, t, place = tl.load(table + slot * 4), tl.load(table + slot * 4 + 1), tl.load(table + slot * 4 + 3)
    row, first, _ = span(n, tokens, offsets, PACKED)
    first += t
    i, d = tl.arange(0, ROWS), tl.arange(0, D)
    qt, kt = long(qt, ALIGNED), long(kt, ALIGNED)
    q += row * long(qb, ALIGNED) + first * qt + (head // group) * long(qh, ALIGNED)
    k += row * long(kb, ALIGNED) + first * kt + (head // group) * long(kh, ALIGNED)
    out = ((row * tokens + first) * heads + head) * WIDTH
    out_row = heads.to(tl.int64) * WIDTH
    index = (slot * heads + head) * WIDTH
    mu, pi = mini_batch(place, i, CHUNK)
    rate, tau = load_rate(scale, pi, CHUNK), last_rate(scale, CHUNK)

    seen = tl.zeros((ROWS, D), tl.float32) + load_row(biases + index, d, WIDTH)[None, :]
    seen = add_product(seen, q, qt, weights + index * WIDTH, WIDTH, 1, i, rows, WIDTH, D, SLICE, PRECISION)
    if (place > 0) | (t == 0):
        at = slot if CARRY else n
        part = tl.zeros((ROWS, D), tl.float32) + load_row(bias_sums + (at * heads + head) * WIDTH, d, WIDTH)[None, :]
        matrix = sums + (at * heads + head) * WIDTH * WIDTH
        part = add_product(part, q, qt, matrix, WIDTH, 1, i, rows, WIDTH, D, SLICE, PRECISION)
        seen -= tl.where(mu > 0, tau, rate)[:, None] * part
    weigh = scores(q, qt, k, kt, i, rows, WIDTH, ROWS, SLICE, PRECISION) + 1.0
    weigh *= earlier(mu, -tau) - tl.where(same(mu, i), rate[:, None], 0.0)
    write = load_tile(write_ + out, out_row, i, d, rows, WIDTH)
    seen = add_dot(seen, weigh, write, PRECISION)

    x, _ = standardise(seen, d, WIDTH, D)
    w, w_b = load_affine(gain, long(gh, False), shift, long(sh, False), head, d, WIDTH)
    x = x * w[None, :] + w_b[None, :] + load_tile(q, qt, i, d, rows, WIDTH).to(tl.float32)
    store_tile(y + out, out_row, i, d, rows, x, WIDTH)


def _run_learn(
    problem: Problem, at: Layout, x: Arrays, out: Arrays, kept: tuple[Array, Array] | tuple[None, None] = (None, None)
) -> Scratch:
    """Launch ``learn``; ``out`` holds the states to fill, ``kept`` takes x̂ and 1/std."""
    s, k, v, beta = problem.sizes, dense(x["k"]), dense(x["v"]), x["beta"]

    def empty(*shape: int, dtype: Any = torch.float32) -> Array:
        return torch.empty(shape, dtype=dtype, device=k.device)

    found = Scratch(
        table=torch.zeros((at.slots, 4), dtype=torch.int64, device=k.device),
        counts=empty(s.N, dtype=torch.int64),
        weights=empty(at.slots, s.H, s.K, s.K, dtype=at.operand),
        sums=empty(at.slots if at.constants["CARRY"] else s.N, s.H, s.K, s.K),
        biases=empty(at.slots, s.H, s.K),
        bias_sums=empty(at.slots if at.constants["CARRY"] else s.N, s.H, s.K),
        write=empty(s.B, s.T, s.H, s.K, dtype=at.operand),
    )
    work = None if at.resident else empty(s.N, s.H, s.K, s.K)
    learn[(s.N * s.H,)](
            *place(k, 0, 1, 2), *place(v, 0, 1, 2), *place(beta, 0, 1, 2),
            *place(dense(x.get("norm_weight")), 0), *place(dense(x.get("norm_bias")), 0), dense(x.get("token_scale")),
            *(part for name, axes in _FIELDS.items() for part in place(dense(x[f"initial.{name}"]), *axes)),
            x["offsets"], first_marks(problem, x["offsets"]), s.T, s.H, s.H // s.G, at.spacing,
            found.table, found.counts, work, found.weights, found.sums, found.biases, found.bias_sums, found.write,
            *kept, *(out.get(f"{where}.{name}") for where in ("final", "checkpoint") for name in _FIELDS),
            **at.constants, EVERY=problem.flags.checkpoint_every, RESIDENT=at.resident, JOIN=at.join, **at.launch,
        )  # fmt: skip
    return found


# A state's fields, and the axes whose strides a kernel takes.
_FIELDS = {"weight": (0, 1, 2), "weight_sum": (0, 1, 2), "bias": (0, 1), "bias_sum": (0, 1), "phase": (0,)}


def _run_read(problem: Problem, at: Layout, x: Arrays, found: Scratch, y: Array) -> None:
    """Launch ``read``."""
    s = problem.sizes
    read[(at.slots * s.H,)](
        *place(dense(x["q"]), 0, 1, 2), *place(dense(x["k"]), 0, 1, 2),
        *place(dense(x.get("norm_weight")), 0), *place(dense(x.get("norm_bias")), 0), dense(x.get("token_scale")),
        x["offsets"], s.T, s.H, s.H // s.G,
        found.table, found.weights, found.sums, found.biases, found.bias_sums, found.write, y,
        **(at.constants | {"ROWS": at.join * at.constants["ROWS"]}), **at.launch,
    )  # fmt: skip


class TTTChunk(TritonKernel):
    """Blocks of mini-batches: a chain that learns, reads in parallel."""

    name = "ttt.chunk"
    form = "chunk"
    mixers = frozenset({"ttt_linear"})
    in_place = True

    def takes(self, problem: Problem) -> Support:
        """Everything."""
        return Support.yes()

    def configs(self, problem: Problem) -> tuple[Config, ...]:
        """Rows of a block, of one mini-batch or of several; longer blocks were slower on an H200."""
        rows = 16 if multiplied(problem, adjoint=False) == "ieee" else 32
        warps = (4, 8) if problem.widths[2] <= 64 else (8, 4)
        return tuple({"rows": rows, "num_warps": n, "num_stages": 1} for n in warps)

    def forward(self, problem: Problem, config: Config, x: Arrays, out: Arrays) -> None:
        """Fill ``y`` and states."""
        blank_unused(problem, out)
        at = Layout.of(problem, config, x, adjoint=False)
        _run_read(problem, at, x, _run_learn(problem, at, x, out), out["y"])

    def decode(self, problem: Problem, config: Config, x: Arrays, pool: Pool, y: Array) -> None:
        """Fill ``y``, and the pool in place."""
        decode(problem, x, pool, y)

    def backward(self, problem: Problem, config: Config, x: Arrays, out: Arrays, dout: Arrays, dx: Arrays) -> None:
        """Fill the gradients of inputs, parameters and first state."""
        at, v = Layout.of(problem, config, x, adjoint=True), x["v"]
        standard = torch.empty(v.shape, dtype=at.operand, device=v.device)
        inverse = torch.empty(v.shape[:3], dtype=torch.float32, device=v.device)
        found = _run_learn(problem, at, x, {}, (standard, inverse))
        backward(problem, at, x, found, standard, inverse, dout, dx)


KERNELS = (TTTChunk(),)
