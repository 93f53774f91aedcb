"""Reading a few states of many, each token its own; see ``mixers.chosen_reads``.

    out_t = w_t,own y_t + Σ_r w_tr C_{i_tr}ᵀ q_t                here with the scale in w
    M_tr = C_i dout_t      dq_t = Σ_r w_tr M_tr      dw_tr = ⟨q_t, M_tr⟩      dC_i = Σ q_t (w_tr dout_t)ᵀ

    y, out [N,T,H,V]   q [N,T,G,K]   C [N,S,H,K,V]   w [N,H,R+1,T] float32, own last   index i [N,H,R,T], −1 for none

The sum of dC goes over the choices that fell on i. ``group`` counts and then lists these for every state, as
``r·T + t``; ``read`` keeps a state on chip and goes through its list, a tile of choices at a time; a choice's read has
a row of its own, and ``add`` sums a token's rows. Nothing is sorted, and nobody adds to what another adds to.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from mixers.spec import Array

from .blocks import dot
from .kernel import INTERPRETED, block, dense, place, runs_here

WIDEST = 128
PARTS = 4
"""Programs that share the list of a state."""


@triton.jit(do_not_specialize=["tokens", "states"])
def group(index, first, lists, starts, counts, tokens, states, R: tl.constexpr, SIZE: tl.constexpr):
    """The choices that fell on one state of one head, slot after slot, in the order of tokens; or their number."""
    pid = tl.program_id(0)
    row, i = pid // states, pid % states
    index += tl.cast(row, tl.int64) * R * tokens
    start, found = tl.load(first + i), 0
    if lists is not None:
        lists += tl.cast(row, tl.int64) * R * tokens + tl.load(starts + pid)
    for r in tl.static_range(R):
        for at in range(start, tokens, SIZE):
            t = at + tl.arange(0, SIZE)
            here = tl.load(index + r * tokens + t, mask=t < tokens, other=-1) == i
            if lists is None:
                found += tl.sum(here.to(tl.int32))
            else:
                order = tl.cumsum(here.to(tl.int32), axis=0)
                tl.store(lists + found + order - 1, r * tokens + t, mask=here)
                found += tl.max(order)
    if lists is None:
        tl.store(counts + pid, found)


@triton.jit
def chosen(x, x_t, t, there, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The rows of some tokens."""
    c = tl.arange(0, BLOCK)[None, :]
    return tl.load(x + t.to(tl.int64)[:, None] * x_t + c, mask=there[:, None] & (c < WIDTH), other=0.0)


@triton.jit(do_not_specialize=["tokens", "states"])
def read(
    x, x_b, x_t, x_h, group, kept, weights, lists, starts, counts, q, q_b, q_t, q_h, q_group, dweights, rows,
    tokens, states, heads, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, R: tl.constexpr,
    PARTS: tl.constexpr, BACK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``w Cᵀ x`` of a state's choices; BACK ``w C x`` for a gradient x of outputs, and gradients of weights."""
    pid = tl.program_id(0)
    part, at = pid % PARTS, pid // PARTS
    i, row = at % states, at // states
    head, n = row % heads, tl.cast(row // heads, tl.int64)
    count = tl.load(counts + at)
    if part * BT >= count:
        return
    lists += tl.cast(row, tl.int64) * R * tokens + tl.load(starts + at)
    weights += tl.cast(row, tl.int64) * (R + 1) * tokens
    x += n * x_b + head // group * x_h
    kept += ((n * states + i) * heads + head) * K * V
    c, e = tl.arange(0, BK), tl.arange(0, BV)
    if BACK:
        state = tl.load(kept + c[None, :] * V + e[:, None], mask=(c < K)[None, :] & (e < V)[:, None], other=0.0)
        q += n * q_b + head // q_group * q_h
        dweights += tl.cast(row, tl.int64) * (R + 1) * tokens
    else:
        state = tl.load(kept + c[:, None] * V + e[None, :], mask=(c < K)[:, None] & (e < V)[None, :], other=0.0)
    width: tl.constexpr = K if BACK else V
    for step in range(part * BT, count, PARTS * BT):
        there = step + tl.arange(0, BT) < count
        choice = tl.load(lists + step + tl.arange(0, BT), mask=there, other=0)
        t, slot = choice % tokens, choice // tokens
        found = dot(chosen(x, x_t, t, there, V if BACK else K, BV if BACK else BK), state, PRECISION)
        if BACK:
            query = chosen(q, q_t, t, there, K, BK)
            tl.store(dweights + choice, scale * tl.sum(query.to(tl.float32) * found, axis=1), mask=there)
        found *= scale * tl.load(weights + choice, mask=there, other=0.0)[:, None]
        where = (((n * tokens + t) * heads + head) * R + slot) * width
        o = tl.arange(0, BK if BACK else BV)[None, :]
        tl.store(rows + where[:, None] + o, found.to(rows.dtype.element_ty), mask=there[:, None] & (o < width))


@triton.jit(do_not_specialize=["tokens"])
def add(
    rows, index, y, y_b, y_t, y_h, weights, out, tokens, heads,
    V: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """A token's rows together, and its online output where there is one."""
    pid = tl.program_id(0)
    head, blocks = pid % heads, tl.cdiv(tokens, BT)
    n, t = tl.cast(pid // (heads * blocks), tl.int64), pid // heads % blocks * BT + tl.arange(0, BT)
    c = tl.arange(0, BV)[None, :]
    inside = (t < tokens)[:, None] & (c < V)
    place = (n * tokens + t) * heads + head
    acc = tl.zeros([BT, BV], tl.float32)
    if y is not None:
        own = tl.load(weights + ((n * heads + head) * (R + 1) + R) * tokens + t, mask=t < tokens, other=0.0)
        online = tl.load(y + n * y_b + t.to(tl.int64)[:, None] * y_t + head * y_h + c, mask=inside, other=0.0)
        acc += own[:, None] * online.to(tl.float32)
    for r in tl.static_range(R):
        there = tl.load(index + ((n * heads + head) * R + r) * tokens + t, mask=t < tokens, other=-1) >= 0
        acc += tl.load(rows + (place * R + r)[:, None] * V + c, mask=inside & there[:, None], other=0.0).to(tl.float32)
    tl.store(out + place[:, None] * V + c, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "states"])
def gather_states(
    q, q_b, q_t, q_h, group, weights, lists, starts, counts, dout, dkept, tokens, states, heads, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of one state."""
    at = tl.program_id(0)
    i, row = at % states, at // states
    head, n = row % heads, tl.cast(row // heads, tl.int64)
    lists += tl.cast(row, tl.int64) * R * tokens + tl.load(starts + at)
    weights += tl.cast(row, tl.int64) * (R + 1) * tokens
    q += n * q_b + head // group * q_h
    dout += (n * tokens * heads + head) * V
    acc = tl.zeros([BK, BV], tl.float32)
    count = tl.load(counts + at)
    for step in range(0, count, BT):
        there = step + tl.arange(0, BT) < count
        choice = tl.load(lists + step + tl.arange(0, BT), mask=there, other=0)
        t = choice % tokens
        arriving = chosen(dout, heads * V, t, there, V, BV)
        weight = scale * tl.load(weights + choice, mask=there, other=0.0)
        shared = (weight[:, None] * arriving.to(tl.float32)).to(arriving.dtype)
        acc += dot(tl.trans(chosen(q, q_t, t, there, K, BK)).to(arriving.dtype), shared, PRECISION)
    c, e = tl.arange(0, BK)[:, None], tl.arange(0, BV)[None, :]
    base = ((n * states + i) * heads + head) * K * V
    tl.store(dkept + base + c * V + e, acc.to(dkept.dtype.element_ty), mask=(c < K) & (e < V))


class ChosenReads:
    """See ``mixers.chosen_reads``."""

    arrays = ("torch",)

    def serves(self, dtype: str, device: str, widths: tuple[int, int]) -> bool:
        """Widths up to 128 on a GPU, and no float64."""
        return runs_here(dtype, device) and all(1 <= width <= WIDEST for width in widths)

    def forward(self, x: tuple[Array, ...], fixed: tuple[Array, ...], factor: float, how: str) -> tuple[Array, ...]:
        """The outputs."""
        call, y = _Call(x, fixed, factor), dense(x[0])
        out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        if out.numel():
            call.add(call.read(call.q, None), y, out)
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
        call, (y, q, kept, _), d = _Call(x, fixed, factor), x, dout[0].contiguous()
        own = call.weights[:, :, -1].transpose(1, 2)[..., None]
        dweights, dy = torch.zeros_like(call.weights), (own * d).to(y.dtype)
        dweights[:, :, -1] = (d.float() * y).sum(-1).transpose(1, 2)
        dq = torch.empty(
            (*y.shape[:3], q.shape[3]), dtype=q.dtype if call.share == 1 else torch.float32, device=q.device
        )
        dkept = torch.empty(kept.shape, dtype=kept.dtype, device=q.device)
        if d.numel():
            call.add(call.read(d, dweights), None, dq)
            gather_states[(call.counts.numel(),)](
                *place(call.q, 0, 1, 2), call.share, call.weights, *call.lists, d, dkept, *call.lengths,
                **call.constants(warps=8),
            )  # fmt: skip
        dq = dq if call.share == 1 else dq.unflatten(2, (-1, call.share)).sum(3).to(q.dtype)
        return dy, dq, dkept, dweights


class _Call:
    """The arguments that all kernels share, and the lists of choices."""

    def __init__(self, x: tuple[Array, ...], fixed: tuple[Array, ...], scale: float) -> None:
        y, q, kept, weights = x
        self.q, self.weights, self.kept = dense(q), weights.float().contiguous(), kept.to(q.dtype).contiguous()
        self.index, first = (a.to(torch.int32).contiguous() for a in fixed)
        rows, states, heads = kept.shape[:3]
        tokens, self.slots, self.share = y.shape[1], self.index.shape[2], heads // q.shape[2]
        self.lengths, self.widths = (tokens, states, heads, scale), (q.shape[3], y.shape[3])
        self.counts = torch.empty((rows * heads, states), dtype=torch.int32, device=q.device)
        lists = torch.empty((rows * heads, self.slots * tokens), dtype=torch.int32, device=q.device)
        starts = self.counts
        for known in (None, lists):
            starts = starts if known is None else self.counts.cumsum(1, dtype=torch.int32) - self.counts
            group[(self.counts.numel(),)](
                self.index, first, known, starts, self.counts, tokens, states, R=self.slots,
                SIZE=64 if INTERPRETED else 2048, num_warps=8,
            )  # fmt: skip
        self.lists = lists, starts, self.counts

    def read(self, x: Array, dweights: Array | None) -> Array:
        """A row ``[N,T,H,R,·]`` a choice: of queries, or back of gradients of outputs."""
        tokens, _, heads, _ = self.lengths
        back = dweights is not None
        width = self.widths[0 if back else 1]
        rows = torch.empty((x.shape[0], tokens, heads, self.slots, width), dtype=self.q.dtype, device=x.device)
        read[(self.counts.numel() * PARTS,)](
            *place(x, 0, 1, 2), heads // x.shape[2], self.kept, self.weights, *self.lists,
            *place(self.q if back else None, 0, 1, 2), self.share, dweights, rows, *self.lengths,
            **self.constants(), PARTS=PARTS, BACK=back,
        )  # fmt: skip
        return rows

    def add(self, rows: Array, y: Array | None, out: Array) -> None:
        """Sums of rows."""
        tokens, _, heads, _ = self.lengths
        size, width = 32, out.shape[3]
        add[(out.shape[0] * heads * triton.cdiv(tokens, size),)](
            rows, self.index, *place(y, 0, 1, 2), self.weights, out, tokens, heads,
            V=width, BV=block(width), BT=size, R=self.slots,
        )  # fmt: skip

    def constants(self, warps: int = 4) -> dict[str, Any]:
        """What products are compiled for."""
        half = self.q.element_size() == 2 and not INTERPRETED
        wide_k, wide_v = (max(64 if half else 32, block(width)) for width in self.widths)
        return {
            "K": self.widths[0],
            "V": self.widths[1],
            "BK": wide_k,
            "BV": wide_v,
            "BT": 64 if half else 32,
            "R": self.slots,
            "PRECISION": "ieee",
            "num_warps": warps if half else 8,
            "num_stages": 2 if half else 1,
        }


PRIMITIVE = ChosenReads()
