"""The adjoint of exact Lattice, token by token from the last to the first; notation of ``lattice``.

With ``G = dL/ds'`` (the carry and ``scale q dyᵀ``), ``D = dL/ds̃ = (G − s'⟨s',G⟩)/ρ``, c = beta z, x = h − a s:

    dc = ⟨D,x⟩      dbeta = z dc      dz = beta dc      da = −c ⟨D,s⟩ (− dz if encoding)      dμ = Σ ⟨D,s⟩
    dh = Σ_i (c_i d_i + da_i s_i)     dS = (μ − c a)∘D + da hᵀ      decoding: dS −= k dhᵀ, dk −= S dh

Slots of a segment are computed once more from its kept ones and wait in scratch with a, ρ and h of each token. No
gradient reaches a row of zeros, for which its first direction stood in.

    dq, dk parts [B,T,H,K]   states [P,SEGMENT,K,V], measured [P,SEGMENT,2K+V], one of each a program
"""

import torch
import triton
import triton.language as tl

from mixers.backend import Config
from mixers.problem import Arrays, Problem
from mixers.spec import Array

from .blocks import span
from .kernel import dense, first_marks, gather, place, spread, wanted
from .lattice_slots import (
    DECODING,
    ENCODING,
    SEGMENT,
    cut,
    directions,
    inverse,
    put_slab,
    row_sums,
    segment_row,
    slab,
    strength_of,
    tile,
    turn_token,
    vector,
)


@triton.jit(
    do_not_specialize=[
        "beta_b", "g_b", "dbeta_b", "dlog_b", "tokens", "every",
    ]
)  # fmt: skip
def retrace(
    q, q_b, q_t, q_h, k, k_b, k_t, k_h, v, v_b, v_t, v_h, beta, beta_b, beta_t, beta_h, g, g_b, g_t, g_h,
    dy, dy_b, dy_t, dy_h, dq, dq_b, dq_t, dq_h, dk, dk_b, dk_t, dk_h, dv, dv_b, dv_t, dv_h,
    dbeta, dbeta_b, dbeta_t, dbeta_h, dlog, dlog_b, dlog_t, dlog_h,
    initial, initial_n, initial_h, initial_k, offsets, first_slots, marks, kept, states, measured,
    dfinal, dmarked, dinitial, tokens, every, heads, group, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SEGMENT: tl.constexpr,
    OBJECTIVE: tl.constexpr, READ_NORM: tl.constexpr, PER_SLOT: tl.constexpr, GATED: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """All tokens of one sequence and head, a segment at a time."""
    n = tl.program_id(0) // heads
    h = tl.program_id(0) % heads
    batch, first, total = span(n, tokens, offsets, PACKED)
    length = total.to(tl.int32)
    i = tl.arange(0, BK)
    j = tl.arange(0, BV)
    q += batch * q_b + first * q_t + (h // group) * q_h
    k += batch * k_b + first * k_t + (h // group) * k_h
    v += batch * v_b + first * v_t + h * v_h
    beta += batch * beta_b + first * beta_t + h * beta_h
    dq += batch * dq_b + first * dq_t + h * dq_h
    dk += batch * dk_b + first * dk_t + h * dk_h
    dv += batch * dv_b + first * dv_t + h * dv_h
    dbeta += batch * dbeta_b + first * dbeta_t + h * dbeta_h
    if dy is not None:
        dy += batch * dy_b + first * dy_t + h * dy_h
    if GATED:
        g += batch * g_b + first * g_t + h * g_h
        dlog += batch * dlog_b + first * dlog_t + h * dlog_h
    if dmarked is not None:
        mark = tl.load(marks + n) if PACKED else n.to(tl.int64) * (tokens // every)
    states += tl.program_id(0).to(tl.int64) * SEGMENT * K * V
    measured += tl.program_id(0).to(tl.int64) * SEGMENT * (2 * K + V)
    own = (n.to(tl.int64) * heads + h) * K * V
    base = segment_row(n, first, tokens, SEGMENT, PACKED)
    carry = tl.zeros((BK, BV), tl.float32)
    if dfinal is not None:
        carry = slab(dfinal + own, i, j, K, V).to(tl.float32)
    segment = (length - 1) // SEGMENT if length > 0 else -1
    while segment >= 0:
        begin = segment * SEGMENT
        count = tl.minimum(SEGMENT, length - begin)
        s = slab(kept + ((base + segment) * heads + h) * K * V, i, j, K, V)
        for u in range(count):
            t = begin + u
            key = vector(k, i, t, k_t, length, K)
            p = tl.sum(s * key[:, None], 0) if OBJECTIVE == DECODING else tl.zeros((BV,), tl.float32)
            put_slab(states + u * K * V, s, i, j, K, V)
            s, rho, a, hm = turn_token(
                t, s, p, key, vector(v, j, t, v_t, length, V),
                strength_of(beta, beta_t, t, length, i, K, PER_SLOT), g, g_t, first_slots,
                K, V, BK, BV, OBJECTIVE, GATED,
            )  # fmt: skip
            to = measured + u * (2 * K + V)
            tl.store(to + i, a, mask=i < K)
            tl.store(to + K + i, rho, mask=i < K)
            tl.store(to + 2 * K + j, hm, mask=j < V)
        tl.debug_barrier()
        for back in range(count):
            u = count - 1 - back
            t = begin + u
            wide = tl.cast(t, tl.int64)
            if dmarked is not None and (t + 1) % every == 0:
                carry += slab(dmarked + ((mark + (t + 1) // every - 1) * heads + h) * K * V, i, j, K, V)
            key = vector(k, i, t, k_t, length, K)
            s = slab(states + u * K * V, i, j, K, V)
            at = measured + u * (2 * K + V)
            a = tl.load(at + i, mask=i < K, other=0)
            rho = tl.load(at + K + i, mask=i < K, other=0)
            hm = tl.load(at + 2 * K + j, mask=j < V, other=0)
            strength = strength_of(beta, beta_t, t, length, i, K, PER_SLOT)
            mu = tl.exp(tl.load(g + wide * g_t).to(tl.float32)) if GATED else 1.0
            z = key - a if OBJECTIVE == ENCODING else key
            c = strength * z
            x = hm[None, :] - a[:, None] * s
            over = inverse(rho, "ieee")
            turned = (mu * s + c[:, None] * x) * over[:, None]
            if dy is not None:
                up = vector(dy, j, t, dy_t, length, V)
                query = vector(q, i, t, q_t, length, K) * scale
                read = turned
                if GATED:
                    gone = (rho == 0) & (i < K)
                    inside = gone[:, None] & (j < V)[None, :]
                    read += tl.load(first_slots + i[:, None] * V + j[None, :], mask=inside, other=0)
                if READ_NORM:
                    carry += query[:, None] * up[None, :]
                    along, met = row_sums(turned * carry, read * up[None, :])
                else:
                    along, met = row_sums(turned * carry, turned * up[None, :])
                    met *= rho
                tl.store(dq + wide * dq_t + i, (met * scale).to(dq.dtype.element_ty), mask=i < K)
            else:
                along = tl.sum(turned * carry, 1)
                tl.store(dq + wide * dq_t + i, tl.zeros((BK,), dq.dtype.element_ty), mask=i < K)
            d = (carry - along[:, None] * turned) * over[:, None]
            if dy is not None and not READ_NORM:
                d += query[:, None] * up[None, :]
            of_s, of_x = row_sums(d * s, d * x)
            dz = strength * of_x
            da = -c * of_s
            if OBJECTIVE == ENCODING:
                da -= dz
            dh = tl.sum(c[:, None] * d + da[:, None] * s, 0)
            carry = (mu - c * a)[:, None] * d + da[:, None] * hm[None, :]
            if OBJECTIVE == DECODING:
                carry -= key[:, None] * dh[None, :]
                dz -= tl.sum(s * dh[None, :], 1)
            tl.store(dk + wide * dk_t + i, dz.to(dk.dtype.element_ty), mask=i < K)
            tl.store(dv + wide * dv_t + j, dh.to(dv.dtype.element_ty), mask=j < V)
            if PER_SLOT:
                tl.store(dbeta + wide * dbeta_t + i, (z * of_x).to(dbeta.dtype.element_ty), mask=i < K)
            else:
                tl.store(dbeta + wide * dbeta_t, tl.sum(z * of_x).to(dbeta.dtype.element_ty))
            if GATED:
                tl.store(dlog + wide * dlog_t, tl.where(mu > 0, mu * tl.sum(of_s), 0.0).to(dlog.dtype.element_ty))
            if GATED and u > 0:  # the slots before were adopted where nothing was left of them
                before = tl.load(measured + (u - 1) * (2 * K + V) + K + i, mask=i < K, other=1)
                carry = tl.where((before == 0)[:, None], 0.0, carry)
        tl.debug_barrier()
        segment -= 1
    if length > 0:
        given = tile(initial + n.to(tl.int64) * initial_n + h * initial_h, i, j, initial_k, K, V)
        carry = cut(carry, given.to(tl.float32))
    put_slab(dinitial + own, carry.to(dinitial.dtype.element_ty), i, j, K, V)


def backward(
    problem: Problem, config: Config, constants: dict[str, int], x: Arrays, kept: Array, dout: Arrays, dx: Arrays
) -> None:
    """Fill the gradients of ``x`` from the slots that the forward kept of every segment."""
    s, option, beta, dbeta = problem.sizes, problem.option, x["beta"], dx["beta"]
    dq, dk = spread(problem, dx, "q"), spread(problem, dx, "k")
    programs = s.N * s.H
    dy, dfinal, dmarked = (dout.get(name) for name in ("y", "final.state", "checkpoint.state"))
    retrace[(programs,)](
        *place(dense(x["q"]), 0, 1, 2),
        *place(dense(x["k"]), 0, 1, 2),
        *place(dense(x["v"]), 0, 1, 2),
        *place(dense(beta) if beta.ndim == 4 else beta, 0, 1, 2),
        *place(x.get("log_decay"), 0, 1, 2),
        *place(dense(dy), 0, 1, 2),
        *place(dq, 0, 1, 2),
        *place(dk, 0, 1, 2),
        *place(dx["v"], 0, 1, 2),
        *place(dbeta, 0, 1, 2),
        *place(dx.get("log_decay"), 0, 1, 2),
        *place(dense(x["initial.state"]), 0, 1, 2),
        x.get("offsets"),
        directions(problem, kept.device),
        first_marks(problem, x.get("offsets")),
        kept,
        torch.empty((programs, SEGMENT, s.K, s.V), dtype=torch.float32, device=kept.device),
        torch.empty((programs, SEGMENT, 2 * s.K + s.V), dtype=torch.float32, device=kept.device),
        *(None if d is None else d.contiguous() for d in (dfinal, dmarked)),
        wanted(dx, x, "initial.state"),
        *(s.T, problem.flags.checkpoint_every, s.H, s.H // s.G, option["scale"]),
        **constants,
        READ_NORM=option["read_norm"],
        num_warps=config["num_warps"],
    )
    gather(problem, dx, "q", dq)
    gather(problem, dx, "k", dk)
