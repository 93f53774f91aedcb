"""TTT-linear in mini-batches: the tokens of one are rows of matrices, so that nearly all the work is products.

Rows are tokens i of a piece of a mini-batch that starts with weights W, c and running sums A, a (0 at a mini-batch's
first token). ``P⟂x̂ = P − mean(P) − x̂ mean(P∘x̂)`` is the derivative of a standardisation, its own adjoint.

    Z = K W + c       x̂ = (Z − mean)/std      e = w∘x̂ + w_b − (V − K)      h = w∘e
    G = (h ⟂ x̂)/std   E = beta∘G              S = tril(Q Kᵀ + 1)            R = S E + Q A + a
    Z̄ = Q W + c − rate∘R        x̄ = (Z̄ − mean)/std̄        y = Q + w∘x̄ + w_b        rate_i = token_scale of token i
    A ← A + Kᵀ E      a ← a + Σ E;  at the end of the mini-batch (τ = its last rate)  W ← W − τA, c ← c − τa, A, a ← 0

    q, k [B,T,G,D]   v, y [B,T,H,D]   beta [B,T,H]   W, A [N,H,D,D]   c, a [N,H,D]   w, w_b [H,D]   token_scale [C]

Kept for the backward: W, c at every ``spacing`` tokens (whole mini-batches) but the first, which is the first state.
"""

from typing import Any

import numpy as np

from mixers.backend import Config, Support
from mixers.problem import Arrays, Problem

from .compile import Count, In, Index, Int, Out, device, kernel
from .kernel import NumbaKernel, given
from .layout import checkpoint_row, kept_row, padded, scratch, span
from .matmul import matmul
from .rows import store_head
from .simd import NARROW, add, fma, lanes, load, store
from .tiles import deposit_tile
from .ttt_backward import backward
from .ttt_rows import (
    PARTS,
    PIECE,
    absorb,
    copy,
    learn,
    load_affine,
    load_piece,
    pack,
    piece_length,
    reads,
    shifted,
    standardise,
    unpack,
)


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
            deposit_tile(state, kept_weight[at, head], ld)
            copy(state, 2 * tile, kept_c[at, head], 0, width)
        if every > 0 and t % every == 0:
            pack(state, fresh, state2, mark + t // every - 1, head, width, ld)
    if state1[0].shape[0] > 0:
        pack(state, fresh, state1, n, head, width, ld)


@kernel
def forward(
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
    y: Out[4],
    weight1: Out[4],
    weight_sum1: Out[4],
    bias1: Out[3],
    bias_sum1: Out[3],
    weight2: Out[4],
    weight_sum2: Out[4],
    bias2: Out[3],
    bias_sum2: Out[3],
    kept_weight: Out[4],
    kept_c: Out[3],
):
    """``affine [2,H,D]`` holds w and w_b. States are ``(W, A, c, a)``: 0 the first, 1 the last, 2 checkpoints."""
    state0 = (weight0, weight_sum0, bias0, bias_sum0)
    state1 = (weight1, weight_sum1, bias1, bias_sum1)
    state2 = (weight2, weight_sum2, bias2, bias_sum2)
    heads, tokens = v.shape[2], q.shape[1]
    m = heads // k.shape[2]
    for item in range(begin, end):
        n, head = item // heads, item % heads
        row, first, last = span(n, tokens, offsets)
        keep = kept_row(n, first, tokens, spacing, offsets)
        mark = checkpoint_row(n, tokens, every, offsets) if every > 0 else 0
        forward_head(
            row, first, last - first, n, head, head // m, phase[n], chunk, spacing, every, keep, mark,
            q, k, v, beta, affine, scale, state0, y, state1, state2, kept_weight, kept_c,
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
            problem.sizes.N * problem.sizes.H,
            *_inputs(problem, x),
            out["y"],
            *_state(out, "final", dtype),
            *checkpoints,
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
            problem.sizes.N * problem.sizes.H,
            *_inputs(problem, x),
            out["kept.weight"],
            out["kept.bias"],
            np.broadcast_to(dtype.type(0), v.shape) if dy is None else dy,
            *_state(dout, "final", dtype),
            *_state(dout, "checkpoint", dtype),
            dq, dk, dx["v"], dx["beta"], daffine, drate, *_state(dx, "initial", dtype),
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
        *_state(x, "initial", dtype),
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
