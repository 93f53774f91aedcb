"""The linear and delta families token by token: one token, a few, or states in a pool.

    S' = decay ∘ S      u = beta (v − S'ᵀ k) or v      S = S' + k uᵀ      y = scale · Sᵀ q

A program has a block of values of one head of one sequence; its rows of the state stay in registers from the first
token to the last, and a token that is served alone reads and writes its state once.

    q, k [B,T,G,K]   v, y [B,T,H,V]   beta [B,T,H]   log_decay [B,T,H] or [B,T,H,K]   S [N,H,K,V]
"""

from typing import Any

import triton
import triton.language as tl

from mixers.backend import Config, Pool, Support
from mixers.delta import L2_EPS
from mixers.linear import read_scale
from mixers.problem import Arrays, Problem
from mixers.spec import Array

from .blocks import span
from .delta_chunk import KERNELS as CHUNKED
from .delta_chunk import MIXERS, backward, decay_axes
from .kernel import PROCESSORS, TritonKernel, blank_unused, block, dense, first_marks, place
from .pool import put_window, seats, served, window


@triton.jit(do_not_specialize=["tokens", "every"])
def run(
    q, q_b, q_t, q_h, k, k_b, k_t, k_h, v, v_b, v_t, v_h, beta, beta_b, beta_t, beta_h, g, g_b, g_t, g_h,
    first, first_n, first_h, first_k, first_v, source, source_n, source_h, source_k, source_v,
    target, target_n, target_h, target_k, target_v, y, checkpoints, slots, out_slots, fresh, offsets, marks,
    tokens, every, heads, group, scale, eps,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DELTA: tl.constexpr, DECAY: tl.constexpr,
    NORM: tl.constexpr, PACKED: tl.constexpr, CHECKPOINTS: tl.constexpr,
):  # fmt: skip
    """A block of values of one head of one sequence, from its first token to its last."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(V, BV)
    head = (pid // blocks) % heads
    n = pid // (blocks * heads)
    c, e = tl.arange(0, BK), (pid % blocks) * BV + tl.arange(0, BV)
    inside = (c < K)[:, None] & (e < V)[None, :]
    batch, start, length = span(n, tokens, offsets, PACKED)

    where_from, where_to = seats(n, slots, out_slots)
    s = window(source + where_from * source_n + head * source_h, c, e, source_k, source_v, where_from >= 0, K, V)
    if fresh is not None:
        origin = window(first + n.to(tl.int64) * first_n + head * first_h, c, e, first_k, first_v, True, K, V)
        s = tl.where(tl.load(fresh + n) != 0, origin, s)

    q += batch * q_b + start * q_t + (head // group) * q_h + c
    k += batch * k_b + start * k_t + (head // group) * k_h + c
    v += batch * v_b + start * v_t + head * v_h + e
    y += ((batch * tokens + start) * heads + head) * V + e
    if DELTA:
        beta += batch * beta_b + start * beta_t + head * beta_h
    if DECAY:
        g += batch * g_b + start * g_t + head * g_h
    if CHECKPOINTS:
        mark = tl.load(marks + n) if PACKED else n.to(tl.int64) * (length // every)
        checkpoints += (mark * heads + head) * K * V + c[:, None] * V + e[None, :]
    for t in range(length):
        query = tl.load(q, mask=c < K, other=0.0).to(tl.float32)
        key = tl.load(k, mask=c < K, other=0.0).to(tl.float32)
        value = tl.load(v, mask=e < V, other=0.0).to(tl.float32)
        if NORM:
            query /= tl.sqrt(tl.sum(query * query) + eps)
            key /= tl.sqrt(tl.sum(key * key) + eps)
        if DECAY == 1:
            s *= tl.exp(tl.load(g).to(tl.float32))
        if DECAY == 2:
            s *= tl.exp(tl.load(g + c, mask=c < K, other=0.0).to(tl.float32))[:, None]
        if DELTA:
            value = tl.load(beta).to(tl.float32) * (value - tl.sum(s * key[:, None], axis=0))
            beta += beta_t
        s += key[:, None] * value[None, :]
        out = scale * tl.sum(s * query[:, None], axis=0)
        tl.store(y, tl.where(where_from >= 0, out, 0.0).to(y.dtype.element_ty), mask=e < V)
        q += q_t
        k += k_t
        v += v_t
        y += heads * V
        if DECAY:
            g += g_t
        if CHECKPOINTS and (t + 1) % every == 0:
            tl.store(checkpoints, s.to(checkpoints.dtype.element_ty), mask=inside)
            checkpoints += heads * K * V
    if target is not None:
        target += where_to * target_n + head * target_h
        put_window(target, s, c, e, target_k, target_v, (where_from >= 0) & (where_to >= 0), K, V)


class DeltaRecurrent(TritonKernel):
    """Token by token; gradients come from the chunked form, which is the same mathematics."""

    name = "delta.recurrent"
    form = "recurrent"
    mixers = MIXERS
    in_place = True

    def takes(self, problem: Problem) -> Support:
        """Everything."""
        return Support.yes()

    def configs(self, problem: Problem) -> tuple[Config, ...]:
        """Blocks of values as wide as leave work for every multiprocessor, a few kilobytes each."""
        _, _, key_dim, value_dim = problem.widths
        widest = max(16, min(block(value_dim), 8192 // block(key_dim)))
        sizes = [b for b in (64, 32, 16, 128) if b <= widest] or [widest]
        busy = [b for b in sizes if problem.parallel * -(-value_dim // b) >= 2 * PROCESSORS]
        order = sorted(busy, reverse=True)[:1] + sizes[::-1]
        return tuple({"block_v": b, "num_warps": 4 if b * block(key_dim) >= 2048 else 2} for b in dict.fromkeys(order))

    def forward(self, problem: Problem, config: Config, x: Arrays, out: Arrays) -> None:
        """Fill ``y`` and states."""
        blank_unused(problem, out)
        last, checkpoints = out.get("final.state"), out.get("checkpoint.state")
        _launch(problem, config, x, x["initial.state"], last, out["y"], checkpoints, None)

    def decode(self, problem: Problem, config: Config, x: Arrays, pool: Pool, y: Array) -> None:
        """Fill ``y``, and the pool in place."""
        _launch(problem, config, x, pool.arrays[0], pool.arrays[0], y, None, pool)

    def backward(self, problem: Problem, config: Config, x: Arrays, out: Arrays, dout: Arrays, dx: Arrays) -> None:
        """Fill the gradients."""
        backward(problem, CHUNKED[0].configs(problem)[0], x, dout, dx)


def _launch(
    problem: Problem,
    config: Config,
    x: Arrays,
    source: Array,
    target: Array | None,
    y: Array,
    checkpoints: Array | None,
    pool: Pool | None,
) -> None:
    s, every = problem.sizes, problem.flags.checkpoint_every
    q, k, v = (dense(x[name]) for name in ("q", "k", "v"))
    beta, g = x.get("beta"), x.get("log_decay")
    decay = decay_axes(problem)
    g = dense(g) if decay == 2 else g
    programs = s.N * s.H * triton.cdiv(s.V, config["block_v"])
    if programs == 0:
        return
    constants: dict[str, Any] = {
        "K": s.K,
        "V": s.V,
        "BK": block(s.K),
        "BV": config["block_v"],
        "DELTA": beta is not None,
        "DECAY": decay,
        "NORM": problem.option.get("qk_l2norm", False),
        "PACKED": problem.packed,
        "CHECKPOINTS": checkpoints is not None,
    }
    run[(programs,)](
        *place(q, 0, 1, 2), *place(k, 0, 1, 2), *place(v, 0, 1, 2), *place(beta, 0, 1, 2), *place(g, 0, 1, 2),
        *place(x["initial.state"], 0, 1, 2, 3), *place(source, 0, 1, 2, 3), *place(target, 0, 1, 2, 3),
        y, checkpoints, *served(pool), x["offsets"], first_marks(problem, x["offsets"]),
        s.T, every, s.H, s.H // s.G, read_scale(problem.option, s.K), L2_EPS,
        **constants, num_warps=config["num_warps"],
    )  # fmt: skip


KERNELS = (DeltaRecurrent(),)
