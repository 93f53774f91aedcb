"""Lattice in chunks (``chunk_size=C > 1``): gradients at the chunk's first slots Φ, the running slots S̃ beside them.

    Hm = V − KΦ (decoding) or V      A = Hm Φᵀ      Z = K (decoding, similarity) or K − A      E = beta ∘ Z
    S̃_t,i = μ_t S̃_{t-1},i + E_ti h_t − E_ti A_ti φ_i            ρ_ti = ‖S̃_ti‖ (measured)
    y_t = scale · Σ_i (q_ti / ρ_ti) S̃_ti  (or S̃ᵀq)               at the chunk's end Φ ← S̃_i / ρ_i

Everything at Φ is a product of a chunk's matrices; the running slots are turned, measured and read token by token, a
block of rows at a time while they are in the nearest cache. The norm is always that of the actual row: the closed form
of ρ² cancels where a value points along a slot. A call may start and end inside a chunk: it carries Φ (``start``), S̃
(``now``) and the tokens of the chunk already seen (``phase``). Rows of zeros stand for their first directions: in a
read, at a chunk's start, and for the token that follows.

    q, k [B,T,G,K]   v, y [B,T,H,V]   beta [B,T,H,K or 1]   log_decay [B,T,H] or empty
    start, now [N,H,K,V]   phase [N]   kept [R,H,K,V]: slots where each segment of a sequence but its first starts
"""

import numpy as np

from mixers.backend import Config, Support
from mixers.problem import Arrays, Problem

from .compile import Count, CountOut, Flag, In, Index, Int, Out, Real, device, kernel, leaf
from .kernel import NumbaKernel, blank_unused, gather, given, grouped, rows_of
from .lattice import arguments
from .lattice_chunk_backward import backward
from .lattice_chunk_slots import INV, QUERY, RECORD, WORK, advance, copy, prepare, unit_rows
from .lattice_slots import adopt_rows
from .layout import checkpoint_row, kept_row, padded, span, zeroed
from .tiles import deposit, deposit_tile, fetch, fetch_tile, foresee


@leaf
def _forward_tokens(
    first, length, phase, chunk, q, log_decay, directions, read_norm, scale, every, y, starts, nows, phases,
    phi, s, record, hs, work, out,
):  # fmt: skip
    """The tokens of one chunk, or of what of it lies in the sequence; Φ and S̃ are replaced at its end."""
    count, width = directions.shape
    kp = padded(count, phi)
    ld = padded(width, phi)
    voids = 0
    for u in range(length):
        t = first + u
        if voids:
            adopt_rows(s, ld, directions)
        fetch(q[t], work, QUERY * kp)
        if u + 1 < length:
            foresee(q[t + 1])
            foresee(y[t + 1])
        mu = np.exp(log_decay[t]) if log_decay.shape[0] else phi.dtype.type(1)
        at = u * RECORD * kp
        voids = advance(
            record, at, kp, s, 0, 0, phi, 0, ld, directions, hs, u * ld, mu, scale, work, out, True, read_norm
        )
        deposit(out, 0, y[t])
        done = phase + u + 1 >= chunk
        if done:
            unit_rows(s, 0, 0, phi, ld, directions, record, at + INV * kp)
            copy(phi, s)
            voids = 0
        if every and (t + 1) % every == 0:
            row = (t + 1) // every - 1
            deposit_tile(phi, starts[row], ld)
            deposit_tile(s, nows[row], ld)
            phases[row] = 0 if done else phase + u + 1
    return voids


@device
def _forward_head(
    q, k, v, beta, log_decay, start, now, phase, directions, objective, read_norm, scale, chunk, spacing, every,
    y, last_start, last_now, starts, nows, phases, kept,
):  # fmt: skip
    """One sequence and head: q, k [T,K], v, y [T,V], beta [T,·], states [K,V]; returns the last phase."""
    tokens, width = v.shape
    count = directions.shape[0]
    kp = padded(count, v)
    ld = padded(width, v)
    rows = (count + 3) // 4 * 4
    longest = max(1, min(chunk, tokens))
    phi = zeroed(rows * ld, v)
    s = zeroed(rows * ld, v)
    fetch_tile(start, phi, ld)
    fetch_tile(now, s, ld)
    if tokens:
        adopt_rows(phi, ld, directions)
        adopt_rows(s, ld, directions)
        keys = zeroed(longest * kp, v)
        along = zeroed(longest * kp, v)
        hs = zeroed(longest * ld, v)
        predicted = zeroed(longest * ld, v)
        record = zeroed(longest * RECORD * kp, v)
        work = zeroed(WORK * kp, v)
        out = zeroed(ld, v)
        t = 0
        position = phase
        while t < tokens:
            if kept.shape[0] and t and position % spacing == 0:
                deposit_tile(phi, kept[position // spacing - 1], ld)
            seen = position % chunk
            length = min(chunk - seen, tokens - t)
            prepare(t, length, 0, k, v, beta, objective, phi, 0, ld, kp, keys, hs, along, predicted, record)
            _forward_tokens(
                t, length, seen, chunk, q, log_decay, directions, read_norm, scale, every, y, starts, nows, phases,
                phi, s, record, hs, work, out,
            )  # fmt: skip
            t += length
            position += length
    if last_start.shape[0]:
        deposit_tile(phi, last_start, ld)
        deposit_tile(s, last_now, ld)
    return (phase + tokens) % chunk


@kernel
def forward(
    begin: Int,
    end: Int,
    q: In[4],
    k: In[4],
    v: In[4],
    beta: In[4],
    log_decay: In[3],
    start: In[4],
    now: In[4],
    phase: Count[1],
    directions: In[2],
    offsets: Index[1],
    objective: Int,
    read_norm: Flag,
    scale: Real,
    spacing: Int,
    every: Int,
    chunk: Int,
    y: Out[4],
    last_start: Out[4],
    last_now: Out[4],
    last_phase: CountOut[1],
    starts: Out[4],
    nows: Out[4],
    phases: CountOut[2],
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
        at = _forward_head(
            q[row, first:last, head // group],
            k[row, first:last, head // group],
            v[row, first:last, head],
            beta[row, first:last, head],
            log_decay[row, first:last, head] if log_decay.shape[0] else log_decay[:0, 0, 0],
            start[n, head],
            now[n, head],
            phase[n],
            directions,
            objective,
            read_norm,
            scale,
            chunk,
            spacing,
            every,
            y[row, first:last, head],
            last_start[n, head] if last_start.shape[0] else y[0, :0, 0],
            last_now[n, head] if last_now.shape[0] else y[0, :0, 0],
            starts[mine:, head],
            nows[mine:, head],
            phases[head, mine:],
            kept[kept_row(n, first, tokens, spacing, offsets) :, head],
        )
        if head == 0 and last_phase.shape[0]:
            last_phase[n] = at


class LatticeChunk(NumbaKernel):
    """Chunks of any length, resumed anywhere inside one."""

    name = "lattice.chunk"
    form = "chunk"
    mixers = frozenset({"lattice"})

    def takes(self, problem: Problem) -> Support:
        """Only where the chunk is part of the model."""
        if problem.option["chunk_size"] == 1:
            return Support.no("runs chunk_size > 1; lattice.recurrent is the exact recurrence")
        return Support.yes()

    def configs(self, problem: Problem) -> tuple[Config, ...]:
        """Nothing to choose."""
        return ({},)

    def forward(self, problem: Problem, config: Config, x: Arrays, out: Arrays) -> None:
        """See ``Kernel``."""
        q, k, v, beta, log_decay, *options = arguments(problem, x)
        s = problem.sizes
        checkpoints = s.T // problem.flags.checkpoint_every * s.B if problem.flags.checkpoint_every else 0
        phases = np.zeros((s.H, checkpoints), np.int32)  # of every head, so that no two write one number
        blank_unused(problem, x, out, ("checkpoint.start", "checkpoint.now"))
        forward(
            problem.work() / 2,
            s.N * s.H,
            *(q, k, v, beta, log_decay, x["initial.start"], x["initial.now"], x["initial.phase"], *options),
            problem.option["chunk_size"],
            out["y"],
            given(out.get("final.start"), 4, q.dtype),
            given(out.get("final.now"), 4, q.dtype),
            np.empty(0, np.int32) if out.get("final.phase") is None else out["final.phase"],
            given(rows_of(out.get("checkpoint.start")), 4, q.dtype),
            given(rows_of(out.get("checkpoint.now")), 4, q.dtype),
            phases,
            given(out.get("kept.slots"), 4, q.dtype),
        )
        if out.get("checkpoint.phase") is not None:
            out["checkpoint.phase"][...] = phases[0].reshape(out["checkpoint.phase"].shape)

    def backward(self, problem: Problem, config: Config, x: Arrays, out: Arrays, dout: Arrays, dx: Arrays) -> None:
        """See ``Kernel``."""
        q, k, v, beta, log_decay, *options = arguments(problem, x)
        dq, dk = grouped(problem, dx)
        dbeta = dx["beta"]
        dstarts, dnows = rows_of(dout.get("checkpoint.start")), rows_of(dout.get("checkpoint.now"))
        if (dstarts is None) != (dnows is None):  # the kernel takes both or none
            dstarts = np.zeros_like(dnows) if dstarts is None else dstarts
            dnows = np.zeros_like(dstarts) if dnows is None else dnows
        backward(
            problem.work() * 1.5,
            problem.sizes.N * problem.sizes.H,
            *(q, k, v, beta, log_decay, x["initial.start"], x["initial.now"], x["initial.phase"], *options),
            problem.option["chunk_size"],
            out["kept.slots"],
            given(dout.get("y"), 4, q.dtype),
            given(dout.get("final.start"), 4, q.dtype),
            given(dout.get("final.now"), 4, q.dtype),
            given(dstarts, 4, q.dtype),
            given(dnows, 4, q.dtype),
            *(dq, dk, dx["v"], dbeta[..., None] if dbeta.ndim == 3 else dbeta),
            given(dx.get("log_decay"), 3, q.dtype),
            dx["initial.start"],
            dx["initial.now"],
        )
        gather(problem, dx, dq, dk)


KERNELS = (LatticeChunk(),)
