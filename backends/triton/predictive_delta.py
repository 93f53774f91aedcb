"""The delta rule that also tells how badly it predicted every token, without a second scan; see ``mixers.hybrid``.

    p_t = S_{t-1}ᵀ k_t = e^{G_{t-1}} Sᵀ k_t + Σ_{j<t} e^{G_{t-1}−G_j} ⟨k_t, k_j⟩ u_j      in a chunk that starts from S

``delta_chunk``'s thin chain writes the first state S and the writes u of every chunk, from which outputs are read side
by side; one more kernel reads p of them, compares it with v and keeps nothing but the error.

    q, k [B,T,G,K]   v [B,T,H,V]   e [B,T,H] float32      G_{t-1} sums the decays of the chunk before t: 0 for its first
"""

import torch
import triton
import triton.language as tl

from mixers.backend import Config
from mixers.call import Call, validate
from mixers.delta import delta_rule, gated_delta_rule
from mixers.ham import COSINE_FLOOR
from mixers.problem import Flags
from mixers.spec import Array

from .blocks import LEAST, dot, locate, sums
from .delta_chunk import Cut, DeltaChunk, backward
from .delta_chunk_forward import read
from .kernel import WIDEST, at_most, place, runs_here

_KERNEL = DeltaChunk()


@triton.jit
def decays_before(g, BT: tl.constexpr, operand: tl.constexpr, PRECISION: tl.constexpr):
    """``e^{G_{t-1}}`` and ``e^{G_{t-1}−G_j}`` for t > j of a chunk's tokens, from their ``log_decay [BT]``."""
    i, j = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    g = tl.maximum(g, LEAST)
    first = tl.exp(tl.sum(tl.where(i > j, g[None, :], 0.0), axis=1))
    # Of pair (t, j) all g_m with j < m < t: a sum, never a difference.
    return first, tl.exp(sums(i > j, tl.where(i > j, g[:, None], 0.0), PRECISION))


@triton.jit(do_not_specialize=["tokens", "sequences", "per"])
def errors(
    k, k_b, k_t, k_h, v, v_b, v_t, v_h, beta, beta_b, beta_t, beta_h, g, g_b, g_t, g_h, written, states, e,
    tokens, sequences, per, every, heads, group, floor,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr,
    ROUTER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``e`` of one chunk of one head."""
    pid = tl.program_id(0)
    head, row = pid % heads, (pid // heads).to(tl.int64)
    batch, start, count = locate(row, tokens, sequences, per, every, None, BT, False, False)
    t = tl.arange(0, BT)
    rows = (t < count)[:, None]
    place = (batch * tokens + start + t) * heads + head
    k += batch * k_b + (start + t[:, None]) * k_t + (head // group) * k_h
    v += batch * v_b + (start + t[:, None]) * v_t + head * v_h
    pairs = tl.zeros([BT, BT], tl.float32)
    for at in range(0, K, BK):
        c = at + tl.arange(0, BK)[None, :]
        key = tl.load(k + c, mask=rows & (c < K), other=0.0)
        pairs += dot(key, tl.trans(key), PRECISION)
    log = tl.zeros([BT], tl.float32)
    if DECAY:
        log = tl.load(g + batch * g_b + (start + t) * g_t + head * g_h, mask=t < count, other=0.0).to(tl.float32)
        first, between = decays_before(log, BT, k.dtype.element_ty, PRECISION)
        pairs *= between
    pairs = tl.where(t[:, None] > t[None, :], pairs, 0.0).to(k.dtype.element_ty)
    states += (row * heads + head) * K * V
    strength = tl.load(beta + batch * beta_b + (start + t) * beta_t + head * beta_h, mask=t < count, other=0.0)
    met, size, wanted, missed = (tl.zeros([BT], tl.float32),) * 4
    for part in range(0, V, BV):
        x = part + tl.arange(0, BV)
        predicted = tl.zeros([BT, BV], tl.float32)
        for at in range(0, K, BK):
            c = at + tl.arange(0, BK)
            key = tl.load(k + c[None, :], mask=rows & (c < K)[None, :], other=0.0)
            grid = c[:, None] * V + x[None, :]
            held = tl.load(states + grid, mask=(c < K)[:, None] & (x < V)[None, :], other=0.0)
            predicted += dot(key, held, PRECISION)
        if DECAY:
            predicted *= first[:, None]
        values = rows & (x < V)[None, :]
        write = tl.load(written + place[:, None] * V + x[None, :], mask=values, other=0.0)
        predicted = read(pairs, write, predicted, PRECISION)
        value = tl.load(v + x[None, :], mask=values, other=0.0).to(tl.float32)
        if ROUTER == "cosine":
            met += tl.sum(predicted * value, axis=1)
            size += tl.sum(predicted * predicted, axis=1)
            wanted += tl.sum(value * value, axis=1)
        else:
            if ROUTER == "beta_l2":
                predicted *= tl.exp(log)[:, None]
            missing = predicted - value
            missed += tl.sum(missing * missing, axis=1)
    if ROUTER == "cosine":
        found = 1.0 - met / tl.maximum(tl.sqrt_rn(size) * tl.sqrt_rn(wanted), floor)
    else:
        found = tl.sqrt_rn(missed)
        if ROUTER == "beta_l2":
            found *= strength.to(tl.float32)
    tl.store(e + place, found, mask=t < count)


class PredictiveDelta:
    """See ``mixers.hybrid.PREDICTIVE``."""

    arrays = ("torch",)

    def serves(self, dtype: str, device: str, widths: tuple[int, int]) -> bool:
        """Widths up to 256 on a GPU, and no float64."""
        return runs_here(dtype, device) and all(1 <= width <= WIDEST for width in widths)

    def forward(
        self, x: tuple[Array, ...], fixed: tuple[Array, ...], factor: float, how: str
    ) -> tuple[Array, Array, Array]:
        """Output, last state, and the error of every token's heads; ``how`` is the router."""
        call, config = _prepared(x, factor, False)
        s, (_, _, v, beta, g, first) = call.sizes, x
        y, last = torch.empty_like(v, memory_format=torch.contiguous_format), torch.empty_like(first)
        cut = Cut(call.problem(), call.x, config["block_t"])
        cut.prepare()
        states, written = cut.chain(config, False, {"final.state": last}, None, exact=True)
        assert states is not None and written is not None
        cut.outputs(states, written, y)

        found = torch.empty((s.B, s.T, s.H), dtype=torch.float32, device=v.device)
        block_k, block_v = cut.wide
        # Three programs then share a multiprocessor: half precision needs six registers more, and spills none for it.
        registers = at_most(168) if cut.k.element_size() == 2 else {}
        tokens, rows, per, every, heads, group = cut.lengths()
        errors[(cut.rows * s.H,)](
            *place(cut.k, 0, 1, 2), *place(cut.v, 0, 1, 2), *place(beta, 0, 1, 2), *place(g, 0, 1, 2), written, states,
            found, tokens, rows, per, every, heads, group, COSINE_FLOOR,
            K=s.K, V=s.V, BT=cut.block_t, BK=block_k, BV=block_v, DECAY=g is not None, ROUTER=how,
            PRECISION=cut.precision, num_warps=4, num_stages=1, **registers,
        )  # fmt: skip
        return y, last, found

    def backward(
        self,
        x: tuple[Array, ...],
        fixed: tuple[Array, ...],
        factor: float,
        how: str,
        out: tuple[Array, ...],
        dout: tuple[Array, ...],
    ) -> tuple[Array, ...]:
        """Gradients of the recurrence: none flows through errors."""
        call, config = _prepared(x, factor, True)
        dx = [None if a is None else torch.empty_like(a, memory_format=torch.contiguous_format) for a in x]
        named = dict(zip(_NAMES, dx, strict=True))
        flowing = dict(zip(("y", "final.state"), dout, strict=True))
        backward(call.problem(), config, call.x, flowing, {n: d for n, d in named.items() if d is not None})
        return tuple(dx)


_NAMES = ("q", "k", "v", "beta", "log_decay", "initial.state")


def _prepared(x: tuple[Array, ...], factor: float, grad: bool) -> tuple[Call, Config]:
    """The call of the recurrence alone, and how its kernel runs it."""
    spec = delta_rule if x[4] is None else gated_delta_rule
    given = {n: a for n, a in zip(_NAMES[:5], x[:5], strict=True) if a is not None}
    options = spec.resolve({"scale": factor})
    call = validate(spec, options, given, x[5], None, Flags(grad=grad, recompute=True))
    return call, _KERNEL.configs(call.problem())[0]


PRIMITIVE = PredictiveDelta()
