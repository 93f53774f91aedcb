"""The adjoint of chunked Lattice; notation of ``lattice_chunk``, a prefix d for a gradient, dY times ``scale`` in Q'.

What the reads of a piece send back depends on Φ and S alone, so all pieces are taken at once, in two launches: a
product of tiles may not be transposed on the chip, so what is needed both ways goes through scratch.

``measure``: from Q' to the norms and to E.

    dQ' = b∘(dY Sᵀ) − α∘(dY Φᵀ) + (W∘(dY Hmᵀ))E      dq = scale dQ'/ρ      R = dL/dρ² = −½ Q'∘dQ'/ρ²
    dα = −Q'∘(dY Φᵀ) − 2R∘α      N_ti = Σ_jl W_tj W_tl E_ji E_li G_jl, so with R̃ = W²ᵀR:
    dE = (Wᵀ∘(Hm dYᵀ))Q' + R̃∘(M E) + ½MᵀF + (Wᵀdα)∘A      F = 2R̃∘E      dA = (Wᵀdα)∘E

``absorb``: from there to Hm and Φ.

    dHm = (Wᵀ∘(E Q'ᵀ))dY + (strictlower(W)∘(F Eᵀ) + Wᵀ∘(E Fᵀ))Hm + dA Φ
    dΦ = ((b−α)∘Q')ᵀdY + dAᵀHm − Kᵀ dHm (decoding)

``retreat`` walks the pieces of a head from the last to the first, with D = dL/dS̃ at a piece's end:

    D = (G − φ'⟨φ',G⟩)/ρ  where a chunk ends in φ' with the gradient G      dU = D − Φ∘δ      δ_i = ⟨d_i, φ_i⟩
    dΦ −= α∘D + δ∘U + Kᵀ(w∘E)dU      dS = b D      U = S̃ − b S + α∘Φ

``collect`` takes all pieces at once again and adds what came through D.

    dHm += (w∘E)dU      dE += w∘(Hm dUᵀ)      dbeta = Z∘dE      dv = dHm      dk = beta∘dE − dHm Φᵀ (decoding)

With encoding, Z = K − A: dA −= beta∘dE. Where S is not Φ, ρ² has more terms and S a gradient of its own. A decay moves
every b_t and W_tj whose sum holds it, so dlog_decay_l sums over j < l ≤ t; each term has that decay as a factor, and
none is found by subtraction: where decays are strong, the rest would drown.

    weight (Q'), held ((b−α)∘Q', or −α∘Q'), dA, F, dP, dE [B,T,H,K]   dHm [B,T,H,V]   moments [·,H,3,K]
    dslots [R,H,K,V]: dΦ of the reads, later D   drunning: dS of the reads
"""

import torch
import triton
import triton.language as tl

from mixers.backend import Config
from mixers.problem import Arrays, Problem
from mixers.spec import Array

from .blocks import dot
from .kernel import dense, first_marks, gather, place, spread, wanted
from .lattice_chunk_absorb import absorb
from .lattice_chunk_forward import Shape, Walk, gated, inputs, walk
from .lattice_chunk_measure import measure
from .lattice_chunk_retreat import retreat
from .lattice_pieces import emptied, to_end
from .lattice_slots import DECODING, ENCODING, directions, logs, put, slab, strengths, tile


@triton.jit(do_not_specialize=["beta_b", "g_b", "dbeta_b", "tokens"])
def collect(
    k, k_b, k_t, k_h, v, v_b, v_t, v_h, beta, beta_b, beta_t, beta_h, g, g_b, g_t, g_h,
    dk, dk_b, dk_t, dk_h, dv, dv_b, dv_t, dv_h, dbeta, dbeta_b, dbeta_t, dbeta_h, dlog,
    first_slots, pieces, slots, running, again, dslots, de_from, dh_from, dg, tokens, heads, group,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    OBJECTIVE: tl.constexpr, PER_SLOT: tl.constexpr, GATED: tl.constexpr,
    PACKED: tl.constexpr, CUT: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr, DIGITS: tl.constexpr,
):  # fmt: skip
    """dk, dv, dbeta and dlog_decay of one piece and head."""
    row = (tl.program_id(0) // heads).to(tl.int64)
    h = tl.program_id(0) % heads
    size = tl.load(pieces + row * 4 + 2).to(tl.int32)
    if size == 0:
        return
    n = tl.load(pieces + row * 4)
    first = tl.load(pieces + row * 4 + 1)
    batch = tl.zeros_like(n) if PACKED else n
    at = tl.arange(0, BT)
    i = tl.arange(0, BK)
    j = tl.arange(0, BV)
    key = tile(k + batch * k_b + first * k_t + (h // group) * k_h, at, i, k_t, size, K).to(OPERAND)
    value = tile(v + batch * v_b + first * v_t + h * v_h, at, j, v_t, size, V).to(OPERAND)
    strength = strengths(beta + batch * beta_b + first * beta_t + h * beta_h, at, i, beta_t, size, K, PER_SLOT)
    wide = slab(slots + (row * heads + h) * K * V, i, j, K, V)
    phi = wide.to(OPERAND)
    if GATED:
        g += batch * g_b + first * g_t + h * g_h
    w, b = to_end(g, at, g_t, size, GATED)
    hm = value
    z = key.to(tl.float32)
    if OBJECTIVE == DECODING:
        hm = (value.to(tl.float32) - dot(key, phi, PRECISION)).to(OPERAND)
    elif OBJECTIVE == ENCODING:
        z -= dot(value, tl.trans(phi), PRECISION)
    d = slab(dslots + (row * heads + h) * K * V, i, j, K, V).to(tl.float32)
    exact: tl.constexpr = tl.float32 if GATED else OPERAND  # as in ``measure``
    du = d - tl.sum(d * wide, 1)[:, None] * wide
    through = w[:, None] * dot(hm.to(exact), tl.trans(du.to(exact)), DIGITS)
    e = strength * z
    if GATED:
        own = tl.zeros((BT,), tl.float32)
        if tl.load(again + row * heads + h) > 0:
            void = emptied(key, value, strength, g, g_t, size, OBJECTIVE)
            through = tl.where(void, 0.0, through)
            e = tl.where(void, 0.0, e)
            of_first = tl.sum(d * slab(first_slots, i, j, K, V), 1)
            own = w * tl.sum(tl.where(void, of_first[None, :], 0.0), 1)
    to = (batch * tokens + first) * heads + h
    de = through + tile(de_from + to * K, at, i, heads * K, size, K)
    dh = dot((w[:, None] * e).to(OPERAND), du.to(OPERAND), PRECISION)
    dh += tile(dh_from + to * V, at, j, heads * V, size, V)
    dkey = strength * de
    if OBJECTIVE == ENCODING:
        dh -= dot((strength * through).to(OPERAND), phi, PRECISION)
    elif OBJECTIVE == DECODING:
        dkey -= dot(dh.to(OPERAND), tl.trans(phi), PRECISION)
    put(dk + batch * dk_b + first * dk_t + h * dk_h, dkey.to(dk.dtype.element_ty), at, i, dk_t, size, K)
    put(dv + batch * dv_b + first * dv_t + h * dv_h, dh.to(dv.dtype.element_ty), at, j, dv_t, size, V)
    dbeta += batch * dbeta_b + first * dbeta_t + h * dbeta_h
    if PER_SLOT:
        put(dbeta, (z * de).to(dbeta.dtype.element_ty), at, i, dbeta_t, size, K)
    else:
        tl.store(dbeta + at * dbeta_t, tl.sum(z * de, 1).to(dbeta.dtype.element_ty), mask=at < size)
    if GATED:
        s = wide
        if tl.load(pieces + row * 4 + 3) != 0:
            s = slab(running + ((row if CUT else n) * heads + h) * K * V, i, j, K, V)
        each = own + tl.sum(e * through, 1)
        moved = tl.sum(tl.where(at[:, None] < at[None, :], each[:, None], 0.0), 0) + b * tl.sum(d * s)
        moved += tl.load(dg + (to + at * heads), mask=at < size, other=0)
        moved = tl.where(tl.exp(logs(g, at, g_t, size)) > 0, moved, 0.0)
        tl.store(dlog + (to + at * heads), moved.to(dlog.dtype.element_ty), mask=at < size)


def backward(problem: Problem, config: Config, x: Arrays, dout: Arrays, dx: Arrays) -> None:
    """Fill the gradients of ``x``."""
    shape, s = Shape.of(problem, back=True), problem.sizes
    if s.N * s.H == 0:
        return
    kind = torch.bfloat16 if problem.dtype == "bfloat16" else torch.float32
    common = shape.common | {"OPERAND": tl.bfloat16 if problem.dtype == "bfloat16" else tl.float32}
    found = walk(problem, shape, config, x, {}, keep=True)
    device = found.slots.device
    reads = {**common, "READ_NORM": problem.option["read_norm"], "num_warps": config["piece_warps"], "num_stages": 1}
    grid = (shape.rows * s.H,)
    dy = dout.get("y")
    dy = torch.zeros((s.B, s.T, s.H, s.V), dtype=x["v"].dtype, device=device) if dy is None else dense(dy)
    dq, dk = spread(problem, dx, "q"), spread(problem, dx, "k")

    def tokens(width: int, dtype: torch.dtype = kind) -> Array:
        return torch.empty((s.B, s.T, s.H, width), dtype=dtype, device=device)

    exact = kind if shape.slots["HALVES"] else torch.float32
    weight, f = tokens(s.K, exact), tokens(s.K, exact)
    held, da, dp = (tokens(s.K) for _ in range(3))
    de, dh, dg = tokens(s.K, torch.float32), tokens(s.V, torch.float32), tokens(1, torch.float32)
    moments = torch.empty((found.running.shape[0], s.H, 3, s.K), dtype=torch.float32, device=device)
    dslots, drunning = torch.empty_like(found.slots, dtype=exact), torch.empty_like(found.running)
    states = (found.pieces, found.slots, found.running, found.again)
    turned = torch.empty((shape.rows, s.H, s.K), dtype=torch.float32, device=device) if gated(problem) else None
    rough = common["GATED"] and kind is torch.bfloat16
    digits = {"DIGITS": "tf32x3" if rough else common["PRECISION"]}
    measure[grid](
        *inputs(x),
        *place(dy, 0, 1, 2),
        *place(dq, 0, 1, 2),
        directions(problem, device),
        *(*states, weight, held, da, f, dp, de, moments, turned, dg),
        *(s.T, s.H, s.H // s.G, problem.option["scale"]),
        **(reads | digits | shape.slots | {"num_warps": config["turn_warps"]}),
    )
    absorb[grid](
        *inputs(x)[4:],
        *place(dy, 0, 1, 2),
        directions(problem, device),
        *(*states, weight, held, da, f, dp, moments, turned, dh, dslots, drunning),
        *(s.T, s.H, s.H // s.G),
        **reads,
    )
    _retreat(problem, config, shape, common, x, found, dout, dx, dslots, drunning)
    dbeta = dx["beta"]
    collect[grid](
        *inputs(x)[4:],
        *place(dk, 0, 1, 2),
        *place(dx["v"], 0, 1, 2),
        *place(dbeta, 0, 1, 2),
        dx.get("log_decay"),
        directions(problem, device),
        *(*states, dslots, de, dh, dg),
        *(s.T, s.H, s.H // s.G),
        **(common | digits),
        num_warps=config["piece_warps"],
        num_stages=1,
    )
    gather(problem, dx, "q", dq)
    gather(problem, dx, "k", dk)


def _retreat(
    problem: Problem,
    config: Config,
    shape: Shape,
    common: dict[str, object],
    x: Arrays,
    found: Walk,
    dout: Arrays,
    dx: Arrays,
    dslots: Array,
    drunning: Array,
) -> None:
    """Launch ``retreat``."""
    s, offsets = problem.sizes, x.get("offsets")

    def given(name: str) -> Array:
        return None if dout.get(name) is None else dout[name].contiguous()

    retreat[(s.N * s.H,)](
        *inputs(x)[4:],
        *place(dense(x["initial.start"]), 0, 1, 2),
        *place(dense(x["initial.now"]), 0, 1, 2),
        *place(x["initial.phase"], 0),
        *(offsets, directions(problem, found.slots.device), first_marks(problem, offsets)),
        *(found.slots, found.running, found.ends, found.again, dslots, drunning),
        *(given(name) for name in ("final.start", "final.now", "checkpoint.start", "checkpoint.now")),
        *(torch.empty((s.N, s.H, s.K, s.V), dtype=torch.float32, device=dslots.device) for _ in range(2)),
        *(wanted(dx, x, "initial.start"), wanted(dx, x, "initial.now")),
        *(s.T, problem.flags.checkpoint_every, s.H, s.H // s.G),
        **common,
        **shape.chunk,
        SLOTS=min(shape.common["BK"], 64),
        num_warps=2 * config["chain_warps"],
        num_stages=1,
    )
