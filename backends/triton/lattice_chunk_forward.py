"""Lattice in chunks (``chunk_size=C > 1``): gradients at the chunk's first slots Φ, the running slots S̃ beside them.

A chunk is worked in pieces of at most 64 tokens (see ``longest``); rows of a piece's matrices are its tokens. From the
piece's first running slots S (Φ itself at a chunk's start), with b, W counted from its first token:

    W_tj = [j≤t] e^{g_{j+1} + … + g_t}     b_t = e^{g_1 + … + g_t}
    Hm = V − KΦ (decoding) or V            A = Hm Φᵀ            E = beta ∘ (K − A) (encoding) or beta ∘ K
    S̃_t,i = b_t s_i − α_ti φ_i + Σ_j W_tj E_ji h_j              α = W(A∘E)
    ρ² = b² + N − α²   where S = Φ         N = W²(E∘(M E))    M = 2 strictlower(W)∘G + diag(G)    G = Hm Hmᵀ
    ρ² = b²‖s‖² + 2b(W(E∘P) − α⟨φ,s⟩) + N + α²(‖φ‖² − 2)     P = Hm Sᵀ     elsewhere
    Y = scale · ((b∘Q')S − (α∘Q')Φ + (W∘(Q'Eᵀ))Hm)           Q' = Q/ρ, or Q without ``read_norm``

``ρ²`` stays above the square of what is left of φ in S̃: N and α² cancel where a value points along a slot. Every
exponent is a sum of log decays of its own, so a reset (−∞) makes no NaN. A slot that a reset empties, as its write is
zero, goes on as its first direction τ: ``f_ti τ_i`` joins S̃, with f_ti = W_tr of the token r that emptied it.

Two launches. ``chain`` walks the pieces of a head and leaves Φ (and S where it is not Φ) of each in scratch. It needs
neither A nor the norms of the inside: with ``U = (w∘E)ᵀHm``, w the last row of W, ``α_i = ⟨φ_i, u_i⟩``, and a chunk
ends with ``Φ ← rownorm(b S − α∘Φ + U)``, measured. ``read`` takes all pieces at once. A checkpoint ends a piece.

    q, k [B,T,G,K]   v, y [B,T,H,V]   beta [B,T,H] or [B,T,H,K]   log_decay [B,T,H]   start, now [N,H,K,V]   phase [N]
    pieces [R,4]: sequence, first token, tokens (0: no piece), whether S is not Φ     slots, running [R,H,K,V]
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from mixers.backend import Config
from mixers.problem import Arrays, Problem
from mixers.spec import Array

from .blocks import dot, span
from .kernel import block, dense, first_marks, place, precision
from .lattice_pieces import emptied, errors, first_row, piece_end, piece_row, to_end, writes
from .lattice_slots import (
    OBJECTIVES,
    adopt,
    directions,
    inverse,
    norms,
    put_slab,
    slab,
    strengths,
    tile,
)


@triton.jit
def fetch(
    t, end, k, k_t, v, v_t, beta, beta_t,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, PER_SLOT: tl.constexpr,
):  # fmt: skip
    """Keys, values and strengths of the tokens from t to end."""
    at = tl.arange(0, BT)
    i = tl.arange(0, BK)
    j = tl.arange(0, BV)
    wide = t.to(tl.int64)
    key = tile(k + wide * k_t, at, i, k_t, end - t, K)
    value = tile(v + wide * v_t, at, j, v_t, end - t, V)
    return key, value, strengths(beta + wide * beta_t, at, i, beta_t, end - t, K, PER_SLOT)


@triton.jit
def turn(
    key, value, strength, phi, s, g, g_t, size, first_slots, ends, again,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    OBJECTIVE: tl.constexpr, GATED: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S̃ behind the last token of a piece, its unit rows, and S̃ with first directions for rows of zeros."""
    at = tl.arange(0, BT)
    i = tl.arange(0, BK)
    j = tl.arange(0, BV)
    hm = errors(key, value, phi.to(key.dtype), OBJECTIVE, PRECISION)
    et = writes(key, value, phi.to(key.dtype), strength, OBJECTIVE, PRECISION)
    if GATED:
        w, b = to_end(g, at, g_t, size, GATED)
        et *= w[None, :]
        s *= b
        void = emptied(key, value, strength, g, g_t, size, OBJECTIVE) & (i < K)[None, :]
        begun = tl.max(void.to(tl.int32))
        tl.store(again, begun)
        if begun > 0:
            s += tl.sum(tl.where(void, w[:, None], 0.0), 0)[:, None] * slab(first_slots, i, j, K, V)
    u = dot(et.to(key.dtype), hm, PRECISION)
    a = tl.sum(phi * u, 1)
    s += u - a[:, None] * phi
    rho = norms(s, GATED, PRECISION)
    if KEEP:
        tl.store(ends + i, rho, mask=i < K)
        tl.store(ends + K + i, a, mask=i < K)
        tl.store(ends + 2 * K + i, tl.max(tl.abs(u), 1), mask=i < K)
    unit = s * inverse(rho, PRECISION)[:, None]
    adopted = s
    if GATED and tl.min(tl.where(i < K, rho, 1.0)) == 0:  # only a reset leaves nothing of a row
        toward = slab(first_slots, i, j, K, V)
        unit = tl.where((rho > 0)[:, None], unit, toward)
        adopted = tl.where((rho > 0)[:, None], s, toward)
    return s, unit, adopted


@triton.jit
def note(
    t, end, n, h, row, first, resumed, phi, s, pieces, slots, running, heads,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Where a piece lies, its Φ, and its S if it is not Φ."""
    if h == 0:
        tl.store(pieces + row * 4, n.to(tl.int64))
        tl.store(pieces + row * 4 + 1, first + t)
        tl.store(pieces + row * 4 + 2, (end - t).to(tl.int64))
        tl.store(pieces + row * 4 + 3, resumed.to(tl.int64))
    i = tl.arange(0, BK)
    j = tl.arange(0, BV)
    put_slab(slots + (row * heads + h) * K * V, phi, i, j, K, V)
    if resumed:
        put_slab(running + ((row if CUT else n.to(tl.int64)) * heads + h) * K * V, s, i, j, K, V)


@triton.jit(do_not_specialize=["beta_b", "g_b", "phase_n", "tokens", "every"])
def chain(
    k, k_b, k_t, k_h, v, v_b, v_t, v_h, beta, beta_b, beta_t, beta_h, g, g_b, g_t, g_h,
    start, start_n, start_h, start_k, now, now_n, now_h, now_k, phase, phase_n, offsets, first_slots, marks,
    pieces, slots, running, ends, again, last_start, last_now, last_phase, marked_start, marked_now, marked_phase,
    tokens, every, heads, group,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    CHUNK: tl.constexpr, LONGEST: tl.constexpr, OBJECTIVE: tl.constexpr, PER_SLOT: tl.constexpr,
    GATED: tl.constexpr, PACKED: tl.constexpr, MARKED: tl.constexpr, CUT: tl.constexpr, KEEP: tl.constexpr,
    STATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The pieces of one sequence and head, in order: Φ and S of each, the last state, checkpoints.

    KEEP also leaves ρ, α and the largest number of U at every piece's end, and what lies behind the last one (S̃ in a
    row of its own where S has one a sequence): the backward walks along them.
    """
    n = tl.program_id(0) // heads
    h = tl.program_id(0) % heads
    batch, first, size = span(n, tokens, offsets, PACKED)
    length = size.to(tl.int32)
    base = first_row(n, first, tokens, every, CHUNK, LONGEST, MARKED, PACKED)
    seen = tl.load(phase + n * phase_n)
    i = tl.arange(0, BK)
    j = tl.arange(0, BV)
    k += batch * k_b + first * k_t + (h // group) * k_h
    v += batch * v_b + first * v_t + h * v_h
    beta += batch * beta_b + first * beta_t + h * beta_h
    if GATED:
        g += batch * g_b + first * g_t + h * g_h
    if MARKED:
        mark = tl.load(marks + n) if PACKED else n.to(tl.int64) * (tokens // every)
    last = (n.to(tl.int64) * heads + h) * K * V
    phi = tile(start + n.to(tl.int64) * start_n + h * start_h, i, j, start_k, K, V).to(tl.float32)
    s = tile(now + n.to(tl.int64) * now_n + h * now_h, i, j, now_k, K, V).to(tl.float32)
    if length == 0:
        if STATE:
            put_slab(last_start + last, phi, i, j, K, V)
            put_slab(last_now + last, s, i, j, K, V)
            if h == 0:
                tl.store(last_phase + n, seen)
    else:
        toward = slab(first_slots, i, j, K, V)
        phi = adopt(phi, toward)
        s = adopt(s, toward)
        t = length * 0
        end = piece_end(t, seen, every, length, CHUNK, LONGEST, MARKED)
        key, value, strength = fetch(t, end, k, k_t, v, v_t, beta, beta_t, K, V, BK, BV, BT, PER_SLOT)
        for part in tl.static_range(2):  # the first piece, whose S is not Φ, then the others
            stop = tl.minimum(length, 1) if part == 0 else length
            while t < stop:
                then = tl.maximum(end, piece_end(end, seen, every, length, CHUNK, LONGEST, MARKED))
                later = fetch(end, then, k, k_t, v, v_t, beta, beta_t, K, V, BK, BV, BT, PER_SLOT)
                row = base + piece_row(t, seen, every, CHUNK, LONGEST, MARKED)
                resumed = (t == 0) | ((seen + t) % CHUNK != 0)
                from_s = s if CUT or part == 0 else phi
                note(t, end, n, h, row, first, resumed, phi, from_s, pieces, slots, running, heads, K, V, BK, BV, CUT)
                raw, unit, adopted = turn(
                    key, value, strength, phi, from_s, g + t.to(tl.int64) * g_t if GATED else g, g_t, end - t,
                    first_slots, ends + (row * heads + h) * 3 * K if KEEP else ends,
                    again + row * heads + h if GATED else again,
                    K, V, BK, BV, BT, OBJECTIVE, GATED, KEEP, PRECISION,
                )  # fmt: skip
                done = (seen + end) % CHUNK == 0
                phi = tl.where(done, unit, phi)
                raw = tl.where(done, unit, raw)
                if MARKED and not KEEP and end % every == 0:
                    to = ((mark + end // every - 1) * heads + h) * K * V
                    put_slab(marked_start + to, phi, i, j, K, V)
                    put_slab(marked_now + to, raw, i, j, K, V)
                    if h == 0:
                        tl.store(marked_phase + mark + end // every - 1, (seen + end) % CHUNK)
                if end == length:
                    if STATE:
                        put_slab(last_start + last, phi, i, j, K, V)
                        put_slab(last_now + last, raw, i, j, K, V)
                        if h == 0:
                            tl.store(last_phase + n, (seen + end) % CHUNK)
                    if KEEP:
                        row += 1
                        put_slab(slots + (row * heads + h) * K * V, phi, i, j, K, V)
                        behind = row if CUT else tl.num_programs(0) // heads + n.to(tl.int64)
                        put_slab(running + (behind * heads + h) * K * V, raw, i, j, K, V)
                if CUT:
                    s = tl.where(done, unit, adopted)
                key, value, strength = later
                t = end
                end = then


def area(problem: Problem) -> int:
    """How many numbers the slots of a head are, once their widths are powers of two."""
    return block(problem.sizes.K) * block(problem.sizes.V)


def longest(problem: Problem, back: bool) -> int:
    """Tokens of a piece: what keeps products short in true float32, and tiles in shared memory.

    Under Triton 3.6 products of 64 tokens that are 32 columns wide were seen to go out of bounds: narrow heads take 32.
    """
    if problem.dtype == "float32":
        return 16
    if min(block(problem.sizes.K), block(problem.sizes.V)) < 64:
        return 32
    if back:
        return 64 if area(problem) <= (64 * 64 if problem.dtype == "float16" else 128 * 128) else 16
    return 64 if area(problem) <= 128 * 128 else 32


def narrowest(problem: Problem, back: bool) -> int:
    """Rows that a piece is filled up to.

    Under Triton 3.6 products that are 16 columns wide on tensor cores are wrong, or out of bounds, where the next
    product takes them: those of wide slots, and those from which the backward makes the gradient of ``log_decay``.
    """
    if problem.dtype == "float32":
        return 16
    return 32 if area(problem) > 64 * 64 or (back and gated(problem)) else 16


def gated(problem: Problem) -> bool:
    """Whether slots decay."""
    return problem.layout("log_decay") is not None


@dataclass(frozen=True)
class Shape:
    """How a problem is cut, and what kernels of both passes are told about it."""

    rows: int
    common: dict[str, Any]
    chunk: dict[str, Any]
    slots: dict[str, Any]
    cut: bool

    @classmethod
    def of(cls, problem: Problem, back: bool = False) -> "Shape":
        """The pieces of a problem's sequences are bounded by its sizes: phases and offsets stay on the device."""
        s, option, every = problem.sizes, problem.option, problem.flags.checkpoint_every
        chunk = option["chunk_size"]
        most = min(longest(problem, back), 1 << (chunk - 1).bit_length())
        each = triton.cdiv(chunk, most)
        chunks, marks = (s.T // chunk + 2 * s.N, s.N) if problem.packed else (s.N * (s.T // chunk + 2), s.N)
        if every:
            marks += s.T // every * (1 if problem.packed else s.N)
        common = {
            "K": s.K,
            "V": s.V,
            "BK": block(s.K),
            "BV": block(s.V),
            "BT": max(block(most), narrowest(problem, back)),
            "OBJECTIVE": OBJECTIVES[option["objective"]],
            "PER_SLOT": problem.layout("beta") == "B T H K",
            "GATED": gated(problem),
            "PACKED": problem.packed,
            "CUT": each > 1 or bool(every),
            "PRECISION": precision(problem) if problem.dtype == "float32" else "tf32",
        }
        pieces = {"CHUNK": chunk, "LONGEST": most, "MARKED": bool(every)}
        slots = {
            "SLOTS": min(block(s.K), 64),
            "HALVES": problem.dtype == "bfloat16" and not gated(problem),
        }
        return cls(chunks * each + s.N + (marks if every else 0), common, pieces, slots, bool(common["CUT"]))


@dataclass(frozen=True)
class Walk:
    """What ``chain`` leaves in scratch."""

    pieces: Array
    slots: Array
    running: Array
    ends: Array | None
    again: Array | None


def walk(problem: Problem, shape: Shape, config: Config, x: Arrays, out: Arrays, keep: bool) -> Walk:
    """Launch ``chain``; for a backward (``keep``) the slots stay in float32."""
    s, k = problem.sizes, dense(x["k"])
    stored = torch.float32 if keep else k.dtype

    def empty(rows: int, *axes: int, dtype: torch.dtype = torch.float32) -> Array:
        return torch.empty((rows, s.H, *axes), dtype=dtype, device=k.device)

    found = Walk(
        pieces=torch.zeros((shape.rows, 4), dtype=torch.int64, device=k.device),
        slots=empty(shape.rows, s.K, s.V, dtype=stored),
        running=empty(shape.rows if shape.cut else 2 * s.N if keep else s.N, s.K, s.V, dtype=stored),
        ends=empty(shape.rows, 3, s.K) if keep else None,
        again=empty(shape.rows, dtype=torch.int32) if gated(problem) else None,
    )
    beta, first, now, phase = x["beta"], dense(x["initial.start"]), dense(x["initial.now"]), x["initial.phase"]
    chain[(s.N * s.H,)](
        *place(k, 0, 1, 2),
        *place(dense(x["v"]), 0, 1, 2),
        *place(dense(beta) if beta.ndim == 4 else beta, 0, 1, 2),
        *place(x.get("log_decay"), 0, 1, 2),
        *place(first, 0, 1, 2),
        *place(now, 0, 1, 2),
        *place(phase, 0),
        x.get("offsets"),
        directions(problem, k.device),
        first_marks(problem, x.get("offsets")),
        *(found.pieces, found.slots, found.running, found.ends, found.again),
        *(out.get(f"final.{name}") for name in ("start", "now", "phase")),
        *(out.get(f"checkpoint.{name}") for name in ("start", "now", "phase")),
        *(s.T, problem.flags.checkpoint_every, s.H, s.H // s.G),
        **shape.common,
        **shape.chunk,
        KEEP=keep,
        STATE=out.get("final.start") is not None,
        num_warps=config["chain_warps"],
        num_stages=1,
    )
    return found


def inputs(x: Arrays) -> tuple[Any, ...]:
    """q, k, v, beta and log_decay with their strides."""
    beta = x["beta"]
    return (
        *place(dense(x["q"]), 0, 1, 2),
        *place(dense(x["k"]), 0, 1, 2),
        *place(dense(x["v"]), 0, 1, 2),
        *place(dense(beta) if beta.ndim == 4 else beta, 0, 1, 2),
        *place(x.get("log_decay"), 0, 1, 2),
    )
