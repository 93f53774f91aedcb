"""TTT-MLP by whole mini-batches: a program a head, the network in memory, a slice of its inner width at a time.

Notation of ``mixers.ttt_mlp``; E1, E2 are G1, G2 times beta, and rows that are tokens there are columns here, so that
no sum of products is transposed on its way into the next product:

    Z1ᵀ = W1ᵀ Kᵀ + c1      Z2ᵀ = W2ᵀ X2ᵀ + c2      E1ᵀ = (W2 E2ᵀ)∘gelu'(Z1ᵀ)      [j ≤ i] in P and S:
    Z̄1ᵀ = W1ᵀ Qᵀ + c1 − E1ᵀ Pᵀ      P = token_scale∘(Q Kᵀ + 1)
    Z̄2ᵀ = W2ᵀ X̄2ᵀ + c2 − E2ᵀ Sᵀ     S = token_scale∘(X̄2 X2ᵀ + 1)

A mini-batch goes twice through the slices of the inner width F: for Z2, then, E2 being known, for all else. X2, which
S and W2 want as rows, is a product of its own.

    q, k [N,L,G,K]   v, y [N,L,H,K]   beta [N,L,H]   W1 [N,H,K,F]   c1 [N,H,F]   W2 [N,H,F,K]   c2 [N,H,K], contiguous
"""

import torch
import triton
import triton.language as tl

from mixers.spec import Array

from .kernel import block, dense, place, runs_here
from .ttt_rows import (
    NORM_EPS,
    SHORTEST,
    add_dot,
    centre_columns,
    column_gradient,
    last_rate,
    load_affine,
    load_columns,
    load_rate,
    load_row,
    load_tile,
    store_columns,
    store_row,
)

_GELU = tl.constexpr(2.0 * 0.7978845608028654)
_CUBE = tl.constexpr(0.044715)


@triton.jit
def gate(z):
    """``σ(2a)`` of the tanh form's argument a, so that gelu(z) = z σ."""
    return 1.0 / (1.0 + tl.exp((z + z * z * z * _CUBE) * -_GELU))


@triton.jit
def gelu_slope(z, s):
    """gelu' from z and its gate."""
    return s + z * s * (1.0 - s) * (1.0 + z * z * (3.0 * _CUBE)) * _GELU


_LENGTHS = ("tokens", "qb", "qt", "qh", "kb", "kt", "kh", "vb", "vt", "vh", "bb", "bt", "bh", "yb", "yt", "yh", "heads",
            "group", "step")  # fmt: skip


@triton.jit(do_not_specialize=_LENGTHS)
def learn(
    q, qb, qt, qh, k, kb, kt, kh, v, vb, vt, vh, beta, bb, bt, bh, gain, shift, scale,
    first1, firstc1, first2, firstc2, weight1, bias1, weight2, bias2, y,
    dy, yb, yt, yh, write_, x_, inverse_, dread_, scores_, daffine, drates,
    tokens, heads, group, step,
    WIDTH: tl.constexpr, INNER: tl.constexpr, D: tl.constexpr, SLICE: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All mini-batches of one head: y and the last weights; with dy, what a backward wants instead of y.

    The weights behind mini-batch m go to ``m·step`` heads behind the first place.
    """
    n, head = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    unit = n * heads + head
    q += n * qb + (head // group) * qh
    k += n * kb + (head // group) * kh
    v += n * vb + head * vh
    beta += n * bb + head * bh
    out = (n * tokens * heads + head) * WIDTH
    out_row = heads.to(tl.int64) * WIDTH
    size: tl.constexpr = WIDTH * INNER
    i, d = tl.arange(0, ROWS), tl.arange(0, D)
    inside = i < CHUNK
    w, w_b = load_affine(gain, WIDTH, shift, WIDTH, head, d, WIDTH)
    tau = last_rate(scale, CHUNK)
    rate = load_rate(scale, i, CHUNK)
    causal = (i[:, None] <= i[None, :]) & inside[None, :]
    if dy is not None:
        dy += n * yb + head * yh
        dgain, dshift, drate = tl.zeros((D,), tl.float32), tl.zeros((D,), tl.float32), tl.zeros((ROWS,), tl.float32)

    from1, fromc1, from2, fromc2 = (
        first1 + unit * size, firstc1 + unit * INNER, first2 + unit * size, firstc2 + unit * WIDTH
    )  # fmt: skip
    to1, toc1, to2, toc2 = weight1 + unit * size, bias1 + unit * INNER, weight2 + unit * size, bias2 + unit * WIDTH
    c2 = load_row(fromc2, d, WIDTH)
    for t in range(0, tokens, CHUNK):
        keys, queries = load_tile(k, kt, i, d, CHUNK, WIDTH), load_tile(q, qt, i, d, CHUNK, WIDTH)
        key_columns = load_columns(k, kt, i, d, CHUNK, WIDTH).to(tl.float32)
        value_columns = load_columns(v, vt, i, d, CHUNK, WIDTH).to(tl.float32)
        strengths = tl.load(beta + i * bt, mask=inside, other=0.0).to(tl.float32)
        z2 = tl.zeros((D, ROWS), tl.float32) + c2[:, None]
        for start in range(0, INNER, SLICE):
            f = start + tl.arange(0, SLICE)
            across = load_columns(from1, INNER, d, f, WIDTH, INNER)
            z1 = tl.zeros((SLICE, ROWS), tl.float32) + load_row(fromc1, f, INNER)[:, None]
            z1 = add_dot(z1, across, tl.trans(keys), PRECISION)
            back = load_columns(from2, WIDTH, f, d, INNER, WIDTH)
            z2 = add_dot(z2, back, z1 * gate(z1), PRECISION)
        pull = w[:, None] * (w_b[:, None] - (value_columns - key_columns))
        pull, z2 = centre_columns(pull, d, WIDTH, D), centre_columns(z2, d, WIDTH, D)
        write, inverse = column_gradient(z2, w, pull, strengths, gain, d, WIDTH, D, PRECISION)
        if dy is not None:
            store_columns(write_ + out, out_row, i, d, CHUNK, write, WIDTH)
            store_columns(x_ + out, out_row, i, d, CHUNK, z2 * inverse[None, :], WIDTH)
            tl.store(inverse_ + out // WIDTH + i * heads, inverse, mask=inside)

        weigh = add_dot(tl.zeros((ROWS, ROWS), tl.float32) + 1.0, keys, tl.trans(queries), PRECISION)
        weigh = tl.where(causal, weigh * rate[None, :], 0.0)
        both = tl.zeros((ROWS, ROWS), tl.float32) + 1.0
        seen = tl.zeros((D, ROWS), tl.float32) + c2[:, None]
        for start in range(0, INNER, SLICE):
            f = start + tl.arange(0, SLICE)
            across = load_columns(from1, INNER, d, f, WIDTH, INNER)
            z1 = tl.zeros((SLICE, ROWS), tl.float32) + load_row(fromc1, f, INNER)[:, None]
            z1 = add_dot(z1, across, tl.trans(keys), PRECISION)
            back = load_tile(from2, WIDTH, f, d, INNER, WIDTH)
            write1 = add_dot(tl.zeros((SLICE, ROWS), tl.float32), back, write, PRECISION) * gelu_slope(z1, gate(z1))
            read1 = tl.zeros((SLICE, ROWS), tl.float32) + load_row(fromc1, f, INNER)[:, None]
            read1 = add_dot(read1, across, tl.trans(queries), PRECISION)
            read1 = add_dot(read1, -write1, weigh, PRECISION)
            inner = read1 * gate(read1)
            back = load_columns(from2, WIDTH, f, d, INNER, WIDTH)
            seen = add_dot(seen, back, inner, PRECISION)
            rows = tl.zeros((ROWS, SLICE), tl.float32) + load_row(fromc1, f, INNER)[None, :]
            rows = add_dot(rows, keys, load_tile(from1, INNER, d, f, WIDTH, INNER), PRECISION)
            rows = tl.where(inside[:, None], rows * gate(rows), 0.0)
            both = add_dot(both, rows, inner, PRECISION)
            # What tokens beyond the mini-batch write is 0, since their beta is.
            across = add_dot(across, -tau * write1, keys, PRECISION)
            back = add_dot(back, -tau * write, rows, PRECISION)
            c1 = load_row(fromc1, f, INNER) - tau * tl.sum(write1, 1)
            tl.debug_barrier()
            store_columns(to1, INNER, d, f, WIDTH, across, INNER)
            store_columns(to2, WIDTH, f, d, INNER, back, WIDTH)
            store_row(toc1, f, c1, INNER)
        within = add_dot(tl.zeros((D, ROWS), tl.float32), write, tl.where(causal, both, 0.0), PRECISION)
        seen -= within * rate[None, :]
        c2 -= tau * tl.sum(write, 1)
        store_row(toc2, d, c2, WIDTH)

        seen = centre_columns(seen, d, WIDTH, D)
        inverse = tl.rsqrt(tl.sum(seen * seen, 0) * (1.0 / WIDTH) + NORM_EPS)
        seen *= inverse[None, :]
        if dy is None:
            residual = load_columns(q, qt, i, d, CHUNK, WIDTH).to(tl.float32)
            store_columns(y + out, out_row, i, d, CHUNK, residual + w_b[:, None] + w[:, None] * seen, WIDTH)
        else:
            flow = load_columns(dy, yt, i, d, CHUNK, WIDTH).to(tl.float32)
            dgain += tl.sum(flow * seen, 1)
            dshift += tl.sum(flow, 1)
            flow = centre_columns(flow * w[:, None], d, WIDTH, D)
            flow = (flow - seen * (tl.sum(flow * seen, 0) * (1.0 / WIDTH))[None, :]) * inverse[None, :]
            store_columns(dread_ + out, out_row, i, d, CHUNK, flow, WIDTH)
            drate -= tl.sum(flow * within, 0)
            scores = scores_ + (unit * tokens + t) * ROWS
            store_columns(scores, ROWS, i, i, CHUNK, tl.where(causal, both, 0.0), CHUNK)
            dy += CHUNK * yt
        tl.debug_barrier()
        from1, fromc1, from2, fromc2 = to1, toc1, to2, toc2
        to1 += step * size
        toc1 += step * INNER
        to2 += step * size
        toc2 += step * WIDTH
        q += CHUNK * qt
        k += CHUNK * kt
        v += CHUNK * vt
        beta += CHUNK * bt
        out += CHUNK * out_row
    if dy is not None:
        store_row(daffine + unit * 2 * WIDTH, d, dgain, WIDTH)
        store_row(daffine + (unit * 2 + 1) * WIDTH, d, dshift, WIDTH)
        tl.store(drates + unit * CHUNK + i, drate, mask=inside)


class MLPBatches:
    """See ``mixers.ttt_chunks.BATCHES``."""

    arrays = ("torch",)

    def serves(self, dtype: str, device: str, widths: tuple[int, int]) -> bool:
        """Widths up to 128 on a GPU, and no float64."""
        return runs_here(dtype, device) and 1 <= widths[0] <= 128

    def forward(self, x: tuple[Array, ...], fixed: tuple[Array, ...], factor: float, how: str) -> tuple[Array, ...]:
        """Output and last weights; ``how`` is the length of a mini-batch."""
        call = Call(x, int(how))
        y = torch.empty(call.v.shape, dtype=call.v.dtype, device=call.v.device)
        last = tuple(torch.empty_like(a) for a in call.first)
        call.learn(last, 0, y, None, (None,) * 7)
        return y, *last

    def backward(
        self,
        x: tuple[Array, ...],
        fixed: tuple[Array, ...],
        factor: float,
        how: str,
        out: tuple[Array, ...],
        dout: tuple[Array, ...],
    ) -> tuple[Array, ...]:
        """Gradients of tokens, first weights and parameters."""
        from .ttt_mlp_backward import backward

        return backward(Call(x, int(how)), x, dout)


class Call:
    """Arguments that the kernels share."""

    def __init__(self, x: tuple[Array, ...], chunk: int) -> None:
        self.q, self.k, self.v = (dense(a) for a in x[:3])
        self.beta, self.chunk = x[3], chunk
        self.first = tuple(a.float().contiguous() for a in x[4:8])
        self.gain, self.shift, self.scale = (None if a is None else a.float().contiguous() for a in x[8:11])
        (self.rows, self.tokens, self.heads, self.width), self.group = self.v.shape, self.v.shape[2] // self.q.shape[2]
        self.programs = (self.rows * self.heads,)
        wide = max(32, block(self.width))
        # The gradient of the rates is what is left of sums that cancel, by the same weights forward and backward; in
        # short mini-batches so is that of beta, of more of them.
        half = "bf16" if self.scale is None else "tf32x3" if chunk < SHORTEST else "parts"
        precision = {torch.float32: "ieee", torch.float16: "tf32x3", torch.bfloat16: half}[self.v.dtype]
        self.constants = {
            "WIDTH": self.width,
            "INNER": 4 * self.width,
            "D": wide,
            "SLICE": 64 if wide <= 64 else 32,
            "ROWS": max(32, block(chunk)),
            "CHUNK": chunk,
            "PRECISION": precision,
            "num_warps": 4 if wide <= 64 else 8,
            "num_stages": 1,
        }

    def learn(self, weights: tuple[Array, ...], step: int, y: Array, dy: Array, kept: tuple[Array, ...]) -> None:
        """Launch ``learn``."""
        learn[self.programs](
            *place(self.q, 0, 1, 2), *place(self.k, 0, 1, 2), *place(self.v, 0, 1, 2), *place(self.beta, 0, 1, 2),
            self.gain, self.shift, self.scale, *self.first, *weights, y, *place(dy, 0, 1, 2), *kept,
            self.tokens, self.heads, self.group, step, **self.constants,
        )  # fmt: skip


PRIMITIVE = MLPBatches()
