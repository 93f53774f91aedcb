"""TTT-linear where it is served: a few tokens, each as the definition has it, with the state in a pool.

    x̂ = LN(k W + c)      e = beta (h ⟂ x̂)/std      A ← A + k eᵀ      a ← a + e
    y = q + w∘LN(q (W − rate A) + c − rate a) + w_b      W, c ← W − τ A, c − τ a;  A, a ← 0 where a mini-batch ends

A program has one head of one sequence, whose W and A stay on chip from the first token to the last. Every head reads
the phase, and the last one that is done counts it on.

    q, k [B,T,G,D]   v, y [B,T,H,D]   beta [B,T,H]   w, w_b [H,D]   token_scale [C]
    W, A [slots,H,D,D]   c, a [slots,H,D]   phase [slots]
"""

import triton
import triton.language as tl

from mixers.backend import Pool
from mixers.problem import Arrays, Problem
from mixers.spec import Array

from .kernel import block, dense, place
from .pool import count_on, phase_of, put_window, seats, served, tickets, window
from .ttt_rows import inner_gradient, last_rate, load_affine, load_rate, load_row, standardise


@triton.jit
def _row(pointer, d, stride, there, WIDTH: tl.constexpr):
    """A vector of any stride in float32; zeros where it is not there."""
    return tl.load(pointer + d * stride, mask=d < tl.where(there, WIDTH, 0), other=0.0).to(tl.float32)


@triton.jit
def _put_row(pointer, x, d, stride, there, WIDTH: tl.constexpr):
    """Store what ``_row`` would load."""
    tl.store(pointer + d * stride, x.to(pointer.dtype.element_ty), mask=d < tl.where(there, WIDTH, 0))


@triton.jit(do_not_specialize=["tokens"])
def decode_tokens(
    q, q_b, q_t, q_h, k, k_b, k_t, k_h, v, v_b, v_t, v_h, beta, beta_b, beta_t, beta_h, gain, gain_h, shift, shift_h,
    scale, first_weight, fw_n, fw_h, fw_r, fw_d, first_sum, fs_n, fs_h, fs_r, fs_d, first_bias, fb_n, fb_h, fb_d,
    first_bias_sum, fa_n, fa_h, fa_d, first_phase, fp_n, weight, w_n, w_h, w_r, w_d, sums, s_n, s_h, s_r, s_d,
    bias, b_n, b_h, b_d, bias_sum, a_n, a_h, a_d, phase, p_n, drawn, slots, out_slots, fresh, y, tokens, heads, group,
    WIDTH: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """All tokens of one sequence and head."""
    n = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    r, d = tl.arange(0, D), tl.arange(0, D)
    where_from, where_to = seats(n, slots, out_slots)
    real = where_from >= 0
    matrix = window(weight + where_from * w_n + head * w_h, r, d, w_r, w_d, real, WIDTH, WIDTH)
    total = window(sums + where_from * s_n + head * s_h, r, d, s_r, s_d, real, WIDTH, WIDTH)
    c = _row(bias + where_from * b_n + head * b_h, d, b_d, real, WIDTH)
    a = _row(bias_sum + where_from * a_n + head * a_h, d, a_d, real, WIDTH)
    if fresh is not None:
        anew = tl.load(fresh + n) != 0
        first = window(first_weight + n * fw_n + head * fw_h, r, d, fw_r, fw_d, anew, WIDTH, WIDTH)
        matrix = tl.where(anew, first, matrix)
        first = window(first_sum + n * fs_n + head * fs_h, r, d, fs_r, fs_d, anew, WIDTH, WIDTH)
        total = tl.where(anew, first, total)
        c = tl.where(anew, _row(first_bias + n * fb_n + head * fb_h, d, fb_d, anew, WIDTH), c)
        a = tl.where(anew, _row(first_bias_sum + n * fa_n + head * fa_h, d, fa_d, anew, WIDTH), a)
    seen = phase_of(n, where_from, phase, p_n, first_phase, fp_n, fresh)
    w, w_b = load_affine(gain, gain_h, shift, shift_h, head, d, WIDTH)
    tau = last_rate(scale, CHUNK)
    q += n * q_b + (head // group) * q_h
    k += n * k_b + (head // group) * k_h
    v += n * v_b + head * v_h
    beta += n * beta_b + head * beta_h
    y += (n * tokens * heads + head) * WIDTH
    for t in range(tokens):
        key, query = load_row(k + t * k_t, d, WIDTH), load_row(q + t * q_t, d, WIDTH)
        keys, queries = load_row(k + t * k_t, r, WIDTH), load_row(q + t * q_t, r, WIDTH)
        pull = w * (w_b - (load_row(v + t * v_t, d, WIDTH) - key))
        z = c + tl.sum(matrix * keys[:, None], 0)
        strength = tl.load(beta + t * beta_t).to(tl.float32)
        write, _, _ = inner_gradient(z[None, :], w * w, pull[None, :], strength, d, WIDTH, D)
        write = tl.sum(write, 0)  # of the one row
        total += keys[:, None] * write[None, :]
        a += write
        place = (seen + t) % CHUNK
        rate = load_rate(scale, place, CHUNK)
        z = c - rate * a + tl.sum((matrix - rate * total) * queries[:, None], 0)
        x, _ = standardise(z[None, :], d, WIDTH, D)
        out = query + w * tl.sum(x, 0) + w_b
        out = tl.where(real, out, 0.0)
        tl.store(y + t * heads * WIDTH + d, out.to(y.dtype.element_ty), mask=d < WIDTH)
        if place == CHUNK - 1:
            matrix -= tau * total
            c -= tau * a
            total = tl.zeros_like(total)
            a = tl.zeros_like(a)
    there = real & (where_to >= 0)
    put_window(weight + where_to * w_n + head * w_h, matrix, r, d, w_r, w_d, there, WIDTH, WIDTH)
    put_window(sums + where_to * s_n + head * s_h, total, r, d, s_r, s_d, there, WIDTH, WIDTH)
    _put_row(bias + where_to * b_n + head * b_h, c, d, b_d, there, WIDTH)
    _put_row(bias_sum + where_to * a_n + head * a_h, a, d, a_d, there, WIDTH)
    count_on(seen, tokens, phase, p_n, where_from, where_to, drawn, heads, CHUNK)


def decode(problem: Problem, x: Arrays, pool: Pool, y: Array) -> None:
    """Fill ``y``, and the pool in place."""
    s, chunk, where = problem.sizes, problem.option["chunk_size"], served(pool)
    if s.N * s.H == 0:
        return
    weight, bias, weight_sum, bias_sum, phase = pool.arrays
    wide = block(s.K)
    decode_tokens[(s.N * s.H,)](
        *(part for name in ("q", "k", "v") for part in place(dense(x[name]), 0, 1, 2)),
        *place(x["beta"], 0, 1, 2),
        *place(dense(x.get("norm_weight")), 0),
        *place(dense(x.get("norm_bias")), 0),
        dense(x.get("token_scale")),
        *(part for name in ("weight", "weight_sum") for part in place(x[f"initial.{name}"], 0, 1, 2, 3)),
        *(part for name in ("bias", "bias_sum") for part in place(x[f"initial.{name}"], 0, 1, 2)),
        *place(x["initial.phase"], 0),
        *place(weight, 0, 1, 2, 3),
        *place(weight_sum, 0, 1, 2, 3),
        *place(bias, 0, 1, 2),
        *place(bias_sum, 0, 1, 2),
        *place(phase, 0),
        tickets(phase),
        *(*where, y, s.T, s.H, s.H // s.G),
        WIDTH=s.K,
        D=wide,
        CHUNK=chunk,
        num_warps=4 if wide <= 64 else 8 if wide <= 128 else 16,
    )
