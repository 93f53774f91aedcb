"""Lattice, exact (``chunk_size=1``): one pass over the slots to measure a token, one to turn them.

    z = k (decoding, similarity) or k − a (encoding)         a_i = ⟨s_i, h⟩      r_i = ⟨s_i, s_i⟩
    h = v − Sᵀk (decoding) or v                              c_i = beta_i z_i    w_i = μ − c_i a_i
    s̃_i = w_i s_i + c_i h     n_i = ‖s̃_i‖     s'_i = s̃_i / n_i     y = scale · S'ᵀ q   (or S̃ᵀ q)

A row is stored as ``s_i = f_i ŝ_i`` with a number f a slot, so that turning it costs one multiply-add an element:
``ŝ'_i = ŝ_i + (c_i / (w_i f_i)) h``, ``f'_i = w_i f_i / n_i``; rows are rescaled where f leaves its range. The pass
that turns the rows also reads them (y) and predicts the next token (p = S'ᵀ k').

Norms. ``n² = w² r + 2 w c a + c² ‖h‖²`` with the measured r. The coefficients are first divided by
``m = max(|w|, |c| ‖h‖)``, for μ² may underflow where μ does not. Where the three terms cancel, the token is done over
term by term and its rows are measured; what remains of a row that cancels to rounding noise counts as zero, and a row
of zeros becomes its first direction.

    q, k [B,T,G,K]   v, y [B,T,H,V]   beta [B,T,H,K or 1]   log_decay [B,T,H] or empty   states [N,H,K,V]
    kept [R,H,K,V]   checkpoints [B·P,H,K,V] or empty
"""

from typing import Any

import numpy as np

from mixers.algebra import unit_directions
from mixers.backend import Config, Support
from mixers.problem import Arrays, Problem

from .compile import Flag, In, Index, Int, Out, Real, device, kernel, leaf
from .kernel import NumbaKernel, blank_unused, gather, given, grouped, rows_of
from .lattice_backward import backward
from .lattice_slots import (
    DECODING,
    ENCODING,
    KEY,
    OBJECTIVES,
    PASS,
    RECORD,
    F,
    adopt_rows,
    advance,
    fetch_strengths,
    normalise,
    predict,
    residual,
)
from .layout import checkpoint_row, kept_row, padded, span, zeroed
from .simd import NARROW, lanes, load, store
from .tiles import deposit, deposit_tile, fetch, fetch_tile, fill, foresee


@leaf
def _forward_tokens(
    q, k, v, beta, log_decay, directions, objective, read_norm, scale, spacing, every, y, final, checkpoint, kept,
    s, record, coef, query, follow, h, p, out,
):  # fmt: skip
    """The loop of ``_forward_head``, in its scratch."""
    tokens, width = v.shape
    count = directions.shape[0]
    kp = padded(count, v)
    ld = padded(width, v)
    one = v.dtype.type(1)
    fill(record, F * kp, kp, 1)
    decoding = objective == DECODING
    flags = (objective == ENCODING, read_norm, True, decoding)
    fetch(k[0], follow, 0)
    if decoding:
        predict(s, 0, ld, count, follow, 0, p)
    for t in range(tokens):
        if kept.shape[0] and t % spacing == 0:
            if t:
                normalise(s, 0, ld, count, record, F * kp)
            deposit_tile(s, kept[t // spacing], ld)
        for i in range(0, kp, lanes(s, NARROW)):
            store(record, KEY * kp + i, load(follow, i, NARROW))
        fetch_strengths(beta[t], record, 0, kp, count)
        fetch(q[t], query, 0)
        if t + 2 < tokens:
            foresee(k[t + 2])
            foresee(q[t + 1])
            foresee(v[t + 1])
            foresee(y[t + 1])
        if decoding:
            fetch(k[min(t + 1, tokens - 1)], follow, 0)
        elif t + 1 < tokens:
            fetch(k[t + 1], follow, 0)
        mu = one
        if log_decay.shape[0]:
            mu = np.exp(log_decay[t])
        hh = residual(v[t], p, h, ld)
        advance(record, 0, 0, kp, s, 0, 0, ld, directions, h, hh, mu, query, follow, scale, coef, out, p, flags)
        deposit(out, 0, y[t])
        if every and (t + 1) % every == 0:
            normalise(s, 0, ld, count, record, F * kp)
            deposit_tile(s, checkpoint[(t + 1) // every - 1], ld)
    if final.shape[0]:
        normalise(s, 0, ld, count, record, F * kp)
        deposit_tile(s, final, ld)


@device
def _forward_head(
    q, k, v, beta, log_decay, initial, directions, objective, read_norm, scale, spacing, every,
    y, final, checkpoint, kept,
):  # fmt: skip
    """One sequence and head: q, k [T,K], v, y [T,V], beta [T,·], states [K,V], checkpoint and kept [·,K,V]."""
    tokens, width = v.shape
    count = initial.shape[0]
    kp = padded(count, v)
    ld = padded(width, v)
    rows = (count + 3) // 4 * 4
    s = zeroed(rows * ld, v)
    fetch_tile(initial, s, ld)
    if tokens == 0:
        if final.shape[0]:
            deposit_tile(s, final, ld)
        return
    adopt_rows(s, ld, directions)
    record = zeroed(RECORD * kp, v)
    coef = zeroed(PASS * kp, v)
    query = zeroed(kp, v)
    follow = zeroed(kp, v)
    h = zeroed(ld, v)
    p = zeroed(ld, v)
    out = zeroed(ld, v)
    _forward_tokens(
        q, k, v, beta, log_decay, directions, objective, read_norm, scale, spacing, every, y, final, checkpoint, kept,
        s, record, coef, query, follow, h, p, out,
    )  # fmt: skip


@kernel
def forward(
    begin: Int,
    end: Int,
    q: In[4],
    k: In[4],
    v: In[4],
    beta: In[4],
    log_decay: In[3],
    initial: In[4],
    directions: In[2],
    offsets: Index[1],
    objective: Int,
    read_norm: Flag,
    scale: Real,
    spacing: Int,
    every: Int,
    y: Out[4],
    final: Out[4],
    checkpoint: Out[4],
    kept: Out[4],
):
    tokens = v.shape[1]
    heads = v.shape[2]
    group = heads // max(1, k.shape[2])
    for item in range(begin, end):
        n = item // heads
        head = item % heads
        row, first, last = span(n, tokens, offsets)
        mine = checkpoint_row(n, tokens, every, offsets) if every else 0
        start = kept_row(n, first, tokens, spacing, offsets)
        _forward_head(
            q[row, first:last, head // group],
            k[row, first:last, head // group],
            v[row, first:last, head],
            beta[row, first:last, head],
            log_decay[row, first:last, head] if log_decay.shape[0] else log_decay[:0, 0, 0],
            initial[n, head],
            directions,
            objective,
            read_norm,
            scale,
            spacing,
            every,
            y[row, first:last, head],
            final[n, head] if final.shape[0] else y[0, :0, 0],
            checkpoint[mine:, head],
            kept[start:, head],
        )


def arguments(problem: Problem, x: Arrays) -> tuple[Any, ...]:
    """What both passes take: arrays with missing ones empty, then the options."""
    q, option = x["q"], problem.option
    beta = x["beta"]
    directions = unit_directions(problem.sizes.K, problem.sizes.V).astype(q.dtype)
    return (
        q,
        x["k"],
        x["v"],
        beta[..., None] if beta.ndim == 3 else beta,
        given(x.get("log_decay"), 3, q.dtype),
        directions,
        given(x.get("offsets"), 1, np.int64),
        OBJECTIVES[option["objective"]],
        option["read_norm"],
        option["scale"],
        problem.spec.spacing(option),
        problem.flags.checkpoint_every,
    )


class LatticeRecurrent(NumbaKernel):
    """The exact recurrence, token by token."""

    name = "lattice.recurrent"
    form = "recurrent"
    mixers = frozenset({"lattice"})

    def takes(self, problem: Problem) -> Support:
        """Only the exact recurrence."""
        if problem.option["chunk_size"] != 1:
            return Support.no(f"runs chunk_size=1, and chunk_size is {problem.option['chunk_size']}")
        return Support.yes()

    def configs(self, problem: Problem) -> tuple[Config, ...]:
        """Nothing to choose."""
        return ({},)

    def forward(self, problem: Problem, config: Config, x: Arrays, out: Arrays) -> None:
        """See ``Kernel``."""
        q, k, v, beta, log_decay, *options = arguments(problem, x)
        blank_unused(problem, x, out, ("checkpoint.state",))
        forward(
            problem.work() / 2,
            problem.sizes.N * problem.sizes.H,
            *(q, k, v, beta, log_decay, x["initial.state"], *options, out["y"]),
            given(out.get("final.state"), 4, q.dtype),
            given(rows_of(out.get("checkpoint.state")), 4, q.dtype),
            given(out.get("kept.slots"), 4, q.dtype),
        )

    def backward(self, problem: Problem, config: Config, x: Arrays, out: Arrays, dout: Arrays, dx: Arrays) -> None:
        """See ``Kernel``."""
        q, k, v, beta, log_decay, *options = arguments(problem, x)
        dq, dk = grouped(problem, dx)
        dbeta = dx["beta"]
        backward(
            problem.work() * 1.5,
            problem.sizes.N * problem.sizes.H,
            *(q, k, v, beta, log_decay, x["initial.state"], *options, out["kept.slots"]),
            given(dout.get("y"), 4, q.dtype),
            given(dout.get("final.state"), 4, q.dtype),
            given(rows_of(dout.get("checkpoint.state")), 4, q.dtype),
            *(dq, dk, dx["v"], dbeta[..., None] if dbeta.ndim == 3 else dbeta),
            given(dx.get("log_decay"), 3, q.dtype),
            dx["initial.state"],
        )
        gather(problem, dx, dq, dk)


KERNELS = (LatticeRecurrent(),)
