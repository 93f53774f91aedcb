"""Lattice, exact (``chunk_size=1``): token by token, with the slots of a head on the chip.

    z = k (decoding, similarity) or k − a (encoding)      h = v − Sᵀk (decoding) or v      a_i = ⟨s_i, h⟩
    s̃_i = μ s_i + beta_i z_i (h − a_i s_i)      ρ_i = ‖s̃_i‖      s'_i = s̃_i/ρ_i      y = scale · S'ᵀq (or S̃ᵀq)

Rows of S lie inside a warp, so ⟨s_i, h⟩ and ρ_i cost no synchronisation; sums over the slots do. There is one of them a
token: it reads token t and predicts the value of token t+1. ρ is measured: the identity μ² + beta²z²(‖h‖² − a²) lets
rounding grow from token to token. Tokens are loaded two ahead of their use. A row of zeros becomes its first direction.

    q, k [B,T,G,K]   v, y [B,T,H,V]   beta [B,T,H] or [B,T,H,K]   log_decay [B,T,H]   states [N,H,K,V]
    kept [R,H,K,V]: the slots before every SEGMENT-th token, for the backward
"""

import torch
import triton
import triton.language as tl

from mixers.backend import Config, Pool, Support
from mixers.problem import Arrays, Problem
from mixers.spec import Array

from .blocks import span
from .kernel import TritonKernel, blank_unused, block, dense, first_marks, place
from .lattice_backward import backward
from .lattice_slots import (
    DECODING,
    OBJECTIVES,
    SEGMENT,
    adopt,
    column_sums,
    directions,
    put_slab,
    segment_row,
    slab,
    strength_of,
    turn_token,
    vector,
)
from .pool import put_window, seats, served, window


@triton.jit(do_not_specialize=["beta_b", "g_b", "tokens", "every"])
def forward(
    q, q_b, q_t, q_h, k, k_b, k_t, k_h, v, v_b, v_t, v_h, beta, beta_b, beta_t, beta_h, g, g_b, g_t, g_h,
    initial, initial_n, initial_h, initial_k, initial_v, source, source_n, source_h, source_k, source_v,
    target, target_n, target_h, target_k, target_v, slots, out_slots, fresh,
    offsets, first_slots, marks, y, marked, kept, tokens, every, heads, group, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SEGMENT: tl.constexpr,
    OBJECTIVE: tl.constexpr, READ_NORM: tl.constexpr, PER_SLOT: tl.constexpr, GATED: tl.constexpr,
    PACKED: tl.constexpr, MARKED: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """All tokens of one sequence and head. KEEP leaves the slots of every segment and neither reads nor returns.

    With ``slots`` states lie in a pool: ``source`` and ``target`` are the pool, ``initial`` is for the fresh.
    """
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
    if GATED:
        g += batch * g_b + first * g_t + h * g_h
    if not KEEP:
        y += ((batch * tokens + first) * heads + h) * V
    if MARKED:
        mark = tl.load(marks + n) if PACKED else n.to(tl.int64) * (tokens // every)
    where_from, where_to = seats(n, slots, out_slots)
    s = window(source + where_from * source_n + h * source_h, i, j, source_k, source_v, where_from >= 0, K, V)
    if fresh is not None:
        origin = window(initial + n.to(tl.int64) * initial_n + h * initial_h, i, j, initial_k, initial_v, True, K, V)
        s = tl.where(tl.load(fresh + n) != 0, origin, s)
    if length > 0:
        s = adopt(s, slab(first_slots, i, j, K, V))
    base = segment_row(n, first, tokens, SEGMENT, PACKED)
    key = vector(k, i, 0, k_t, length, K)
    value = vector(v, j, 0, v_t, length, V)
    query = vector(q, i, 0, q_t, length, K)
    next_key = vector(k, i, 1, k_t, length, K)
    next_value = vector(v, j, 1, v_t, length, V)
    next_query = vector(q, i, 1, q_t, length, K)
    strength = strength_of(beta, beta_t, 0, length, i, K, PER_SLOT)
    next_strength = strength_of(beta, beta_t, 1, length, i, K, PER_SLOT)
    p = tl.sum(s * key[:, None], 0) if OBJECTIVE == DECODING else tl.zeros((BV,), tl.float32)
    for t in range(length):
        later_key = vector(k, i, t + 2, k_t, length, K)
        later_value = vector(v, j, t + 2, v_t, length, V)
        later_strength = strength_of(beta, beta_t, t + 2, length, i, K, PER_SLOT)
        if not KEEP:
            later_query = vector(q, i, t + 2, q_t, length, K)
        if KEEP and t % SEGMENT == 0:
            put_slab(kept + ((base + t // SEGMENT) * heads + h) * K * V, s, i, j, K, V)
        s, rho, _, _ = turn_token(t, s, p, key, value, strength, g, g_t, first_slots, K, V, BK, BV, OBJECTIVE, GATED)
        if KEEP:
            if OBJECTIVE == DECODING:
                p = tl.sum(s * next_key[:, None], 0)
        else:
            weight = query * scale if READ_NORM else query * scale * rho
            if OBJECTIVE == DECODING:
                out, p = column_sums(s * weight[:, None], s * next_key[:, None])
            else:
                out = tl.sum(s * weight[:, None], 0)
            out = tl.where(where_from >= 0, out, 0.0)
            tl.store(y + tl.cast(t, tl.int64) * heads * V + j, out.to(y.dtype.element_ty), mask=j < V)
            query = next_query
            next_query = later_query
        if MARKED and (t + 1) % every == 0:
            put_slab(marked + ((mark + (t + 1) // every - 1) * heads + h) * K * V, s, i, j, K, V)
        key = next_key
        value = next_value
        strength = next_strength
        next_key = later_key
        next_value = later_value
        next_strength = later_strength
    if target is not None:
        target += where_to * target_n + h * target_h
        put_window(target, s, i, j, target_k, target_v, (where_from >= 0) & (where_to >= 0), K, V)


def launch(
    problem: Problem, config: Config, x: Arrays, out: Arrays, kept: Array | None = None, pool: Pool | None = None
) -> None:
    """The recurrence into ``out``, into ``kept`` for a backward, or into a pool."""
    s, option, beta, first = problem.sizes, problem.option, x["beta"], x["initial.state"]
    source, target = (pool.arrays[0], pool.arrays[0]) if pool else (first, out.get("final.state"))
    forward[(s.N * s.H,)](
        *place(dense(x["q"]), 0, 1, 2),
        *place(dense(x["k"]), 0, 1, 2),
        *place(dense(x["v"]), 0, 1, 2),
        *place(dense(beta) if beta.ndim == 4 else beta, 0, 1, 2),
        *place(x.get("log_decay"), 0, 1, 2),
        *place(first, 0, 1, 2, 3),
        *place(source, 0, 1, 2, 3),
        *place(target, 0, 1, 2, 3),
        *served(pool),
        x.get("offsets"),
        directions(problem, x["q"].device),
        first_marks(problem, x.get("offsets")),
        *(out.get("y"), out.get("checkpoint.state"), kept),
        *(s.T, problem.flags.checkpoint_every, s.H, s.H // s.G, option["scale"]),
        **constants(problem),
        READ_NORM=option["read_norm"],
        MARKED=out.get("checkpoint.state") is not None,
        KEEP=kept is not None,
        num_warps=config["num_warps"],
    )


def constants(problem: Problem) -> dict[str, int]:
    """What the kernels of both passes are told about a problem."""
    s = problem.sizes
    return {
        "K": s.K,
        "V": s.V,
        "BK": block(s.K),
        "BV": block(s.V),
        "SEGMENT": SEGMENT,
        "OBJECTIVE": OBJECTIVES[problem.option["objective"]],
        "PER_SLOT": problem.layout("beta") == "B T H K",
        "GATED": problem.layout("log_decay") is not None,
        "PACKED": problem.packed,
    }


class LatticeRecurrent(TritonKernel):
    """The exact recurrence, token by token."""

    name = "lattice.recurrent"
    form = "recurrent"
    mixers = frozenset({"lattice"})
    in_place = True

    def takes(self, problem: Problem) -> Support:
        """Only the exact recurrence."""
        if problem.option["chunk_size"] != 1:
            return Support.no(f"runs chunk_size=1, and chunk_size is {problem.option['chunk_size']}")
        return Support.yes()

    def configs(self, problem: Problem) -> tuple[Config, ...]:
        """Warps: enough to hold the slots in registers, few enough to meet fast."""
        s = problem.sizes
        area = block(s.K) * block(s.V)
        first = 4 if area <= 64 * 64 else 8 if area <= 128 * 128 else 16
        return tuple({"num_warps": warps} for warps in sorted((2, 4, 8, 16), key=lambda warps: warps != first))

    def forward(self, problem: Problem, config: Config, x: Arrays, out: Arrays) -> None:
        """See ``Kernel``."""
        s = problem.sizes
        blank_unused(problem, out)
        if s.N * s.H:
            launch(problem, config, x, out)

    def decode(self, problem: Problem, config: Config, x: Arrays, pool: Pool, y: Array) -> None:
        """Fill ``y``, and the pool in place."""
        if problem.sizes.N * problem.sizes.H:
            launch(problem, config, x, {"y": y}, pool=pool)

    def backward(self, problem: Problem, config: Config, x: Arrays, out: Arrays, dout: Arrays, dx: Arrays) -> None:
        """See ``Kernel``."""
        s = problem.sizes
        if s.N * s.H == 0:
            return
        rows = s.T // SEGMENT + s.N if problem.packed else s.N * (s.T // SEGMENT + 1)
        kept = torch.empty((rows, s.H, s.K, s.V), dtype=torch.float32, device=x["q"].device)
        launch(problem, config, x, {}, kept)
        backward(problem, config, constants(problem), x, kept, dout, dx)


KERNELS = (LatticeRecurrent(),)
