"""Lattice in chunks where it is served: a few tokens, each as the definition has it, with the state in a pool.

    z, h at Φ      s_i ← μ s_i + beta_i z_i (h − φ_i ⟨φ_i, h⟩)      y = scale · (rownorm S)ᵀ q
    Φ ← S ← rownorm(S) where a chunk ends

A program has one head of one sequence; Φ and S stay in registers from the first token to the last. Every head reads
the phase, and the last one that is done counts it on.

    q, k [B,T,G,K]   v, y [B,T,H,V]   beta [B,T,H] or [B,T,H,K]   log_decay [B,T,H]   start, now [slots,H,K,V]
    phase [slots]
"""

import triton
import triton.language as tl

from mixers.backend import Config, Pool
from mixers.problem import Arrays, Problem
from mixers.spec import Array

from .kernel import block, dense, place
from .lattice_slots import DECODING, ENCODING, OBJECTIVES, adopt, directions, inverse, norms, slab, vector
from .pool import count_on, phase_of, put_window, seats, served, tickets, window


@triton.jit(do_not_specialize=["beta_b", "g_b", "tokens"])
def decode_tokens(
    q, q_b, q_t, q_h, k, k_b, k_t, k_h, v, v_b, v_t, v_h, beta, beta_b, beta_t, beta_h, g, g_b, g_t, g_h,
    first_start, fs_n, fs_h, fs_k, fs_v, first_now, fn_n, fn_h, fn_k, fn_v, first_phase, fp_n,
    start, s_n, s_h, s_k, s_v, now, n_n, n_h, n_k, n_v, phase, p_n, drawn,
    slots, out_slots, fresh, first_slots, y, tokens, heads, group, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, CHUNK: tl.constexpr,
    OBJECTIVE: tl.constexpr, READ_NORM: tl.constexpr, PER_SLOT: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """All tokens of one sequence and head."""
    n = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    i, j = tl.arange(0, BK), tl.arange(0, BV)
    where_from, where_to = seats(n, slots, out_slots)
    real = where_from >= 0
    phi = window(start + where_from * s_n + head * s_h, i, j, s_k, s_v, real, K, V)
    s = window(now + where_from * n_n + head * n_h, i, j, n_k, n_v, real, K, V)
    if fresh is not None:
        anew = tl.load(fresh + n) != 0
        phi = tl.where(anew, window(first_start + n * fs_n + head * fs_h, i, j, fs_k, fs_v, True, K, V), phi)
        s = tl.where(anew, window(first_now + n * fn_n + head * fn_h, i, j, fn_k, fn_v, True, K, V), s)
    seen = phase_of(n, where_from, phase, p_n, first_phase, fp_n, fresh)
    toward = slab(first_slots, i, j, K, V)
    q += n * q_b + (head // group) * q_h
    k += n * k_b + (head // group) * k_h
    v += n * v_b + head * v_h
    beta += n * beta_b + head * beta_h
    if GATED:
        g += n * g_b + head * g_h
    y += (n * tokens * heads + head) * V
    for t in range(tokens):
        phi = adopt(phi, toward)
        s = adopt(s, toward)
        h = vector(v, j, t, v_t, tokens, V)
        z = vector(k, i, t, k_t, tokens, K)
        if OBJECTIVE == DECODING:
            h -= tl.sum(phi * z[:, None], 0)
        a = tl.sum(phi * h[None, :], 1)
        if OBJECTIVE == ENCODING:
            z -= a
        if PER_SLOT:
            z *= vector(beta, i, t, beta_t, tokens, K)
        else:
            z *= tl.load(beta + t * beta_t).to(tl.float32)
        if GATED:
            s *= tl.exp(tl.load(g + t * g_t).to(tl.float32))
        s += z[:, None] * (h[None, :] - a[:, None] * phi)
        rho = norms(s, GATED, "ieee")
        unit = tl.where((rho > 0)[:, None], s * inverse(rho, "ieee")[:, None], toward)
        weight = scale * vector(q, i, t, q_t, tokens, K)
        out = tl.sum(weight[:, None] * (unit if READ_NORM else s), 0)
        out = tl.where(real, out, 0.0)
        tl.store(y + t * heads * V + j, out.to(y.dtype.element_ty), mask=j < V)
        done = (seen + t + 1) % CHUNK == 0
        phi = tl.where(done, unit, phi)
        s = tl.where(done, unit, s)
    there = real & (where_to >= 0)
    put_window(start + where_to * s_n + head * s_h, phi, i, j, s_k, s_v, there, K, V)
    put_window(now + where_to * n_n + head * n_h, s, i, j, n_k, n_v, there, K, V)
    count_on(seen, tokens, phase, p_n, where_from, where_to, drawn, heads, CHUNK)


def decode(problem: Problem, config: Config, x: Arrays, pool: Pool, y: Array) -> None:
    """Fill ``y``, and the pool in place."""
    s, option, beta = problem.sizes, problem.option, x["beta"]
    start, now, phase = pool.arrays
    begin, seats_ = (x[f"initial.{name}"] for name in ("start", "now")), served(pool)
    if s.N * s.H == 0:
        return
    decode_tokens[(s.N * s.H,)](
        *place(dense(x["q"]), 0, 1, 2),
        *place(dense(x["k"]), 0, 1, 2),
        *place(dense(x["v"]), 0, 1, 2),
        *place(dense(beta) if beta.ndim == 4 else beta, 0, 1, 2),
        *place(x.get("log_decay"), 0, 1, 2),
        *(part for first in begin for part in place(first, 0, 1, 2, 3)),
        *place(x["initial.phase"], 0),
        *place(start, 0, 1, 2, 3),
        *place(now, 0, 1, 2, 3),
        *place(phase, 0),
        tickets(phase),
        *seats_,
        directions(problem, y.device),
        *(y, s.T, s.H, s.H // s.G, option["scale"]),
        K=s.K,
        V=s.V,
        BK=block(s.K),
        BV=block(s.V),
        CHUNK=option["chunk_size"],
        OBJECTIVE=OBJECTIVES[option["objective"]],
        READ_NORM=option["read_norm"],
        PER_SLOT=problem.layout("beta") == "B T H K",
        GATED=problem.layout("log_decay") is not None,
        num_warps=config["chain_warps"],
    )
