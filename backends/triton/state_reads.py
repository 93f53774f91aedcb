"""Reading many states at once, each token with its own weights; see ``mixers.state_reads``.

    out_t = w_t,own y_t + Σ_{i < seen_t} w_ti C_iᵀ q_t          here with the scale in w
    M_ti = C_i dout_t      dq_t = Σ_i w_ti M_ti      dw_ti = ⟨q_t, M_ti⟩      dw_t,own = ⟨dout_t, y_t⟩
    dC_i = Σ_t q_t (w_ti dout_t)ᵀ      dy_t = w_t,own dout_t

    y, out [N,T,H,V]   q [N,T,G,K]   C [N,S,H,K,V]   w [N,H,S+1,T] float32, own last   seen [T]

A block of tokens of one head keeps its queries and goes through the states that its last token sees; every product of
queries and a state is exact in the operands' dtype, weighted and added in float32. ``dC`` goes through the tokens that
see a state. Every number is written once, by one program. Where states hold nearly the same, the gradient of a softmax
behind ``w`` is what is left of nearly equal ``dw``: for them states go into the product in two parts.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from mixers.spec import Array

from .blocks import dot
from .kernel import INTERPRETED, block, dense, place, runs_here

WIDEST = 128


@triton.jit(do_not_specialize=["tokens", "states", "blocks"])
def forward(
    y, y_b, y_t, y_h, q, q_b, q_t, q_h, kept, weights, seen, out, tokens, states, heads, group, scale, blocks,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of outputs of one head; the last blocks, which see most, first."""
    pid = tl.program_id(0)
    parts: tl.constexpr = (V + BV - 1) // BV
    part, head = pid % parts, pid // parts % heads
    n = (pid // (parts * heads) % (tl.num_programs(0) // (parts * heads * blocks))).to(tl.int64)
    at = (blocks - 1 - pid // (tl.num_programs(0) // blocks)) * BT
    t, c, e = at + tl.arange(0, BT), tl.arange(0, BK), part * BV + tl.arange(0, BV)
    inside = t < tokens
    sees = tl.load(seen + t, mask=inside, other=0)
    values = inside[:, None] & (e < V)[None, :]
    query = tl.load(
        q + n * q_b + tl.cast(at, tl.int64) * q_t + head // group * q_h + ((t - at) * q_t)[:, None] + c[None, :],
        mask=inside[:, None] & (c < K)[None, :],
        other=0.0,
    ).to(kept.dtype.element_ty)
    base = n * y_b + tl.cast(at, tl.int64) * y_t + head * y_h
    online = tl.load(y + base + ((t - at) * y_t)[:, None] + e[None, :], mask=values, other=0.0)
    weights += (n * heads + head) * (states + 1) * tokens
    own = tl.load(weights + tl.cast(states, tl.int64) * tokens + t, mask=inside, other=0.0)
    acc = own[:, None] * online.to(tl.float32)
    kept += (n * states * heads + head) * K * V + c[:, None] * V + e[None, :]
    matrix = (c < K)[:, None] & (e < V)[None, :]
    for i in range(tl.max(sees)):
        state = tl.load(kept + tl.cast(i, tl.int64) * heads * K * V, mask=matrix, other=0.0)
        weight = scale * tl.load(weights + tl.cast(i, tl.int64) * tokens + t, mask=i < sees, other=0.0)
        acc += weight[:, None] * dot(query, state, PRECISION)
    base = ((n * tokens + at) * heads + head) * V
    tl.store(out + base + ((t - at) * heads * V)[:, None] + e[None, :], acc.to(out.dtype.element_ty), mask=values)


@triton.jit(do_not_specialize=["tokens", "states", "blocks"])
def backward_tokens(
    y, y_b, y_t, y_h, q, q_b, q_t, q_h, kept, weights, seen, dout, dy, dq, dweights,
    tokens, states, heads, group, scale, blocks,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of online outputs, queries and weights of one head."""
    pid = tl.program_id(0)
    head = pid % heads
    n = (pid // heads % (tl.num_programs(0) // (heads * blocks))).to(tl.int64)
    at = (blocks - 1 - pid // (tl.num_programs(0) // blocks)) * BT
    t, c, e = at + tl.arange(0, BT), tl.arange(0, BK), tl.arange(0, BV)
    inside = t < tokens
    sees = tl.load(seen + t, mask=inside, other=0)
    keys, values = inside[:, None] & (c < K)[None, :], inside[:, None] & (e < V)[None, :]
    query = tl.load(
        q + n * q_b + tl.cast(at, tl.int64) * q_t + head // group * q_h + ((t - at) * q_t)[:, None] + c[None, :],
        mask=keys,
        other=0.0,
    ).to(tl.float32)
    here = ((n * tokens + at) * heads + head) * V + ((t - at) * heads * V)[:, None] + e[None, :]
    arriving = tl.load(dout + here, mask=values, other=0.0)
    base = n * y_b + tl.cast(at, tl.int64) * y_t + head * y_h
    online = tl.load(y + base + ((t - at) * y_t)[:, None] + e[None, :], mask=values, other=0.0).to(tl.float32)
    row = (n * heads + head) * (states + 1) * tokens
    weights, dweights = weights + row, dweights + row
    last = tl.cast(states, tl.int64) * tokens
    own = tl.load(weights + last + t, mask=inside, other=0.0)
    flowing = arriving.to(tl.float32)
    tl.store(dweights + last + t, tl.sum(flowing * online, axis=1), mask=inside)
    tl.store(dy + here, (own[:, None] * flowing).to(dy.dtype.element_ty), mask=values)
    operand = q.dtype.element_ty
    arriving = arriving.to(operand)
    kept += (n * states * heads + head) * K * V + c[None, :] * V + e[:, None]
    matrix = (c < K)[None, :] & (e < V)[:, None]
    acc = tl.zeros([BT, BK], tl.float32)
    for i in range(tl.max(sees)):
        across = tl.load(kept + tl.cast(i, tl.int64) * heads * K * V, mask=matrix, other=0.0)
        weight = scale * tl.load(weights + tl.cast(i, tl.int64) * tokens + t, mask=i < sees, other=0.0)
        high = across.to(operand)
        met = dot(arriving, high, PRECISION)
        if operand != tl.float32:
            met += dot(arriving, (across - high.to(tl.float32)).to(operand), PRECISION)
        tl.store(dweights + tl.cast(i, tl.int64) * tokens + t, scale * tl.sum(query * met, axis=1), mask=i < sees)
        acc += weight[:, None] * met
    base = ((n * tokens + at) * heads + head) * K
    tl.store(dq + base + ((t - at) * heads * K)[:, None] + c[None, :], acc.to(dq.dtype.element_ty), mask=keys)


@triton.jit(do_not_specialize=["tokens", "states"])
def backward_states(
    q, q_b, q_t, q_h, weights, seen, first, dout, dkept, tokens, states, heads, group, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of one state of one head, from all tokens that see it; the most seen first."""
    pid = tl.program_id(0)
    parts: tl.constexpr = (V + BV - 1) // BV
    part, head = pid % parts, pid // parts % heads
    batch = tl.num_programs(0) // (parts * heads * states)
    n, i = (pid // (parts * heads) % batch).to(tl.int64), pid // (parts * heads * batch)
    c, e = tl.arange(0, BK), part * BV + tl.arange(0, BV)
    weights += ((n * heads + head) * (states + 1) + i) * tokens
    q += n * q_b + head // group * q_h
    dout += (n * tokens * heads + head) * V
    acc = tl.zeros([BK, BV], tl.float32)
    for at in range(tl.load(first + i), tokens, BT):
        t = at + tl.arange(0, BT)
        inside = t < tokens
        across = tl.load(
            q + tl.cast(at, tl.int64) * q_t + ((t - at) * q_t)[None, :] + c[:, None],
            mask=inside[None, :] & (c < K)[:, None],
            other=0.0,
        ).to(dout.dtype.element_ty)
        weight = scale * tl.load(weights + t, mask=inside, other=0.0)
        arriving = tl.load(
            dout + tl.cast(at, tl.int64) * heads * V + ((t - at) * heads * V)[:, None] + e[None, :],
            mask=inside[:, None] & (e < V)[None, :],
            other=0.0,
        )
        shared = (weight[:, None] * arriving.to(tl.float32)).to(dout.dtype.element_ty)
        acc += dot(across, shared, PRECISION)
    base = ((n * states + i) * heads + head) * K * V
    tl.store(dkept + base + c[:, None] * V + e[None, :], acc, mask=(c < K)[:, None] & (e < V)[None, :])


class StateReads:
    """See ``mixers.state_reads``."""

    arrays = ("torch",)

    def serves(self, dtype: str, device: str, widths: tuple[int, int]) -> bool:
        """Widths up to 128 on a GPU, and no float64."""
        return runs_here(dtype, device) and all(1 <= width <= WIDEST for width in widths)

    def forward(self, x: tuple[Array, ...], fixed: tuple[Array, ...], factor: float, how: str) -> tuple[Array, ...]:
        """The outputs."""
        call = _Call(x, fixed[0], factor)
        out = torch.empty(call.y.shape, dtype=call.y.dtype, device=call.y.device)
        size = call.sizes("forward")
        blocks = triton.cdiv(call.tokens, size["BT"])
        grid = (blocks * triton.cdiv(call.widths["V"], size["BV"]) * call.rows,)
        if out.numel():
            forward[grid](*call.arrays, call.kept, call.weights, call.seen, out, *call.counts, blocks, **size)
        return (out,)

    def backward(
        self,
        x: tuple[Array, ...],
        fixed: tuple[Array, ...],
        factor: float,
        how: str,
        out: tuple[Array, ...],
        dout: tuple[Array, ...],
    ) -> tuple[Array, ...]:
        """Gradients of y, q, the states and the weights."""
        call, (y, q, kept, _), d = _Call(x, fixed[0], factor), x, dout[0].contiguous()
        _, _, heads, group, _ = call.counts
        dy = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        wide = q.dtype if group == 1 else torch.float32
        dq = torch.empty((*q.shape[:2], heads, q.shape[3]), dtype=wide, device=q.device)
        dkept = torch.empty(kept.shape, dtype=kept.dtype, device=q.device)
        dweights = torch.zeros_like(call.weights)
        size = call.sizes("tokens")
        blocks = triton.cdiv(call.tokens, size["BT"])
        if d.numel():
            backward_tokens[(blocks * call.rows,)](
                *call.arrays, kept.float().contiguous(), call.weights, call.seen, d, dy, dq, dweights, *call.counts,
                blocks, **size,
            )  # fmt: skip
        size = call.sizes("states")
        grid = (triton.cdiv(call.widths["V"], size["BV"]) * call.rows * kept.shape[1],)
        if dkept.numel():
            row = torch.arange(kept.shape[1], dtype=call.seen.dtype, device=q.device)
            first = torch.searchsorted(call.seen, row, right=True, out_int32=True)
            backward_states[grid](
                *call.arrays[4:], call.weights, call.seen, first, d, dkept, *call.counts, **size
            )  # fmt: skip
        if group > 1:
            dq = dq.unflatten(2, (-1, group)).sum(3).to(q.dtype)
        return dy, dq, dkept, dweights


class _Call:
    """The arguments that all kernels share."""

    def __init__(self, x: tuple[Array, ...], seen: Array, scale: float) -> None:
        y, q, kept, weights = x
        self.y, q, self.seen = dense(y), dense(q), seen.to(torch.int32).contiguous()
        self.weights, self.kept = weights.float().contiguous(), kept.to(q.dtype).contiguous()
        self.arrays = (*place(self.y, 0, 1, 2), *place(q, 0, 1, 2))
        heads, self.tokens, self.rows = y.shape[2], y.shape[1], y.shape[0] * y.shape[2]
        self.counts = self.tokens, kept.shape[1], heads, heads // q.shape[2], scale
        self.widths = {"K": q.shape[3], "V": y.shape[3]}
        self._half = q.element_size() == 2

    def sizes(self, kernel: str) -> dict[str, Any]:
        """Blocks, warps and stages; never narrower than 64 where tensor cores multiply, nor than 32 elsewhere."""
        least = 64 if self._half and not INTERPRETED else 32
        wide_k, wide_v = (max(least, block(width)) for width in self.widths.values())
        if self._half and not INTERPRETED:
            tokens, warps, stages = _HALVES[kernel]
            found = {"BV": wide_v, "BT": tokens, "num_warps": warps, "num_stages": stages}
        else:
            found = {"BV": wide_v if kernel == "tokens" else 32, "BT": 32, "num_warps": 8, "num_stages": 1}
        return {**self.widths, "BK": wide_k, "PRECISION": "ieee", **found}


# Tokens of a block, warps, stages, in bfloat16 and float16.
_HALVES = {"forward": (128, 8, 3), "tokens": (128, 8, 1), "states": (64, 8, 3)}

PRIMITIVE = StateReads()
