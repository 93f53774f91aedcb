"""The delta rule that also tells how badly it predicted every token, without a second scan; see ``mixers.hybrid``.

    p_t = S_{t-1}ᵀ k_t is what k_t reads one token earlier, so with q'_t = k_{t+1}, in a chunk that starts from S:
    S_tᵀ q'_t = (e^G∘Q') S + tril(Q' Kᵀ∘L) U'

``delta_chunk``'s thin chain writes the first state S and the writes U' of every chunk, from which outputs are read side
by side: they are read twice, by q and by q'. A last kernel compares every read with the value of the next token.

    q, k, q' [B,T,G,K]   v, reads [B,T,H,V]   begin [B,H,V], what the first key reads   e [B,T,H] float32
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

from . import delta_chunk_forward as forwards
from .delta_chunk import Cut, DeltaChunk, backward
from .kernel import WIDEST, block, dense, place, runs_here

ROWS = 16
_KERNEL = DeltaChunk()


@triton.jit(do_not_specialize=["rows", "tokens"])
def score(
    reads, begin, v, v_b, v_t, v_h, beta, beta_b, beta_t, beta_h, g, g_b, g_t, g_h, e, rows, tokens, heads, floor,
    V: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr, ROUTER: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """``e`` of some tokens' heads, from the reads of the tokens before them."""
    r, c = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BV)[None, :]
    head, token, batch = r % heads, r // heads % tokens, r // heads // tokens
    inside = (r < rows)[:, None] & (c < V)
    earlier = tl.load(reads + (r - heads)[:, None] * V + c, mask=inside & (token > 0)[:, None], other=0.0)
    initial = tl.load(begin + (batch * heads + head)[:, None] * V + c, mask=inside & (token == 0)[:, None], other=0.0)
    predicted = earlier + initial
    at = batch * v_b + token * v_t + head * v_h
    value = tl.load(v + at[:, None] + c, mask=inside, other=0.0).to(tl.float32)
    if ROUTER == "cosine":
        size = tl.sqrt_rn(tl.sum(predicted * predicted, axis=1)) * tl.sqrt_rn(tl.sum(value * value, axis=1))
        found = 1.0 - tl.sum(predicted * value, axis=1) / tl.maximum(size, floor)
    else:
        if ROUTER == "beta_l2" and DECAY:
            log = tl.load(g + batch * g_b + token * g_t + head * g_h, mask=r < rows, other=0.0).to(tl.float32)
            predicted *= tl.exp(log)[:, None]
        missing = predicted - value
        found = tl.sqrt_rn(tl.sum(missing * missing, axis=1))
        if ROUTER == "beta_l2":
            found *= tl.load(beta + batch * beta_b + token * beta_t + head * beta_h, mask=r < rows, other=0.0)
    tl.store(e + r, found, mask=r < rows)


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
        s, (_, k, v, beta, g, first) = call.sizes, x
        y, last = torch.empty_like(v, memory_format=torch.contiguous_format), torch.empty_like(first)
        cut = Cut(call.problem(), call.x, config["block_t"])
        cut.prepare()
        states, written = cut.chain(config, False, {"final.state": last}, None, exact=True)
        assert states is not None and written is not None
        cut.outputs(states, written, y)

        later = torch.empty_like(cut.k, memory_format=torch.contiguous_format)
        later[:, :-1], later[:, -1] = cut.k[:, 1:], 0
        reads = _read_again(cut, later, states, written)
        keys = k[:, 0].float().repeat_interleave(s.H // s.G, dim=1)
        begin = torch.matmul(keys[:, :, None], first.float())[:, :, 0].contiguous()
        errors = torch.empty((s.B, s.T, s.H), dtype=torch.float32, device=v.device)
        rows = errors.numel()
        score[(triton.cdiv(rows, ROWS),)](
            reads, begin, *place(dense(v), 0, 1, 2), *place(beta, 0, 1, 2), *place(g, 0, 1, 2), errors, rows, s.T,
            s.H, COSINE_FLOOR, V=s.V, BV=block(s.V), ROWS=ROWS, ROUTER=how, DECAY=g is not None,
        )  # fmt: skip
        return y, last, errors

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


def _read_again(cut: Cut, queries: Array, states: Array, written: Array) -> Array:
    """What other queries read of the states and writes of all chunks, unscaled, in float32."""
    s = cut.problem.sizes
    cut.q, cut.scale = queries, 1.0
    forwards.scores[(cut.rows * s.H,)](
        *place(cut.q, 0, 1, 2), *place(cut.k, 0, 1, 2), *place(cut.g, 0, 1, 2),
        cut.p, None, cut.total, cut.offsets, *cut.lengths(), cut.scale,
        **cut.constants(cut.wide[0]), DELTA=False, DECAY=cut.decay, PRECISION=cut.precision,
        num_warps=4, num_stages=1,
    )  # fmt: skip
    reads = cut.scratch(s.V, torch.float32)
    cut.outputs(states, written, reads)
    return reads


PRIMITIVE = PredictiveDelta()
