"""Weights of finished segments and of the unfinished one, from causal prefix pools of keys; see
``mixers.segment_weights``.

    r_t = Σ_{j ≤ t in its segment} k_j      a_t,own = ⟨u_t, r_t⟩ / n_t      a_ti = ⟨u_t, m_i⟩, i < seen_t
    w_t = softmax(a_t)                      da = w ∘ (dw − ⟨w, dw⟩)         du_t = Σ_i da_ti m_i + (da_t,own/n_t) r_t
    dk_j = Σ_{t ≥ j in its segment} (da_t,own/n_t) u_t + dm/n               dm_i = Σ_t da_ti u_t

    k [N,T,G,K]   u [N,T,H,K]   m [N,S,H,K] float32   w [N,H,S+1,T] float32   own, factor [N,H,T] float32

``pool`` goes through a segment with the sum of its keys; ``weigh`` takes a block of tokens over all pools, states down
and tokens across, twice: for the sum, and for the weights. With TOP it takes the best pool, the next best, and so on,
of equal ones the earliest, which is a pass over the pools each.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from mixers.spec import Array

from .blocks import dot, gathered
from .kernel import INTERPRETED, block, dense, place, runs_here

WIDEST = 256
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def rows_of(x, x_t, at, last, K: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr):
    """Some tokens' rows."""
    r, c = tl.arange(0, BT), tl.arange(0, BK)
    inside = (at + r < last)[:, None] & (c < K)[None, :]
    return tl.load(x + tl.cast(at, tl.int64) * x_t + (r * x_t)[:, None] + c[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=["tokens", "pieces", "before"])
def pool(
    k, k_b, k_t, k_h, u, u_b, u_t, u_h, key_sum, cuts, own, pooled, last_sum, tokens, pieces, before, heads, group,
    K: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, MEAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A segment of one head: scores of its tokens with its own pool, and what is left of its keys."""
    pid = tl.program_id(0)
    head, p, n = pid % heads, pid // heads % pieces, (pid // (heads * pieces)).to(tl.int64)
    c, r = tl.arange(0, BK), tl.arange(0, BT)
    k += n * k_b + head // group * k_h
    u += n * u_b + head * u_h
    total = tl.load(key_sum + (n * heads + head) * K + c, mask=c < tl.where(p == 0, K, 0), other=0.0).to(tl.float32)
    passed = tl.where(p == 0, before, 0)
    first, last = tl.load(cuts + p), tl.load(cuts + p + 1)
    for at in range(first, last, BT):
        key, query = rows_of(k, k_t, at, last, K, BK, BT), rows_of(u, u_t, at, last, K, BK, BT)
        pairs = dot(query, tl.trans(key), PRECISION)
        found = tl.sum(tl.where(r[:, None] >= r[None, :], pairs, 0.0), axis=1)
        found += tl.sum(query.to(tl.float32) * total[None, :], axis=1)
        if MEAN:
            found /= (passed + at - first + 1 + r).to(tl.float32)
        tl.store(own + (n * heads + head) * tokens + at + r, found, mask=at + r < last)
        total += tl.sum(key.to(tl.float32), axis=0)
    if p == pieces - 1:
        tl.store(last_sum + (n * heads + head) * K + c, total, mask=c < K)
    else:
        if MEAN:
            total /= (passed + last - first).to(tl.float32)
        tl.store(pooled + ((n * (pieces - 1) + p) * heads + head) * K + c, total, mask=c < K)


@triton.jit
def scored(
    pools, query, i, count, step, sees, K: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr, PRECISION: tl.constexpr
):
    """Scores of some pools with some tokens, −∞ where unseen; pools go in two parts in half precision."""
    s, c = i + tl.arange(0, BS), tl.arange(0, BK)
    mean = tl.load(pools + s[:, None] * step + c[None, :], mask=(s < count)[:, None] & (c < K)[None, :], other=0.0)
    high = mean.to(query.dtype)
    found = dot(high, query, PRECISION)
    if query.dtype != tl.float32:
        found += dot((mean - high.to(tl.float32)).to(query.dtype), query, PRECISION)
    return tl.where(s[:, None] < sees[None, :], found, float("-inf"))


@triton.jit(do_not_specialize=["tokens", "count", "blocks"])
def weigh(
    u, u_b, u_t, u_h, pools, own, seen, weights, index, tokens, count, heads, blocks,
    K: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr, BT: tl.constexpr, TOP: tl.constexpr, SLOTS: tl.constexpr,
    ONE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The weights of a block of tokens of one head; ONE block holds all pools."""
    pid = tl.program_id(0)
    head = pid % heads
    n, at = (pid // (heads * blocks)).to(tl.int64), pid // heads % blocks * BT
    t, c, s = at + tl.arange(0, BT), tl.arange(0, BK), tl.arange(0, BS)
    inside = t < tokens
    sees = tl.load(seen + t, mask=inside, other=0)
    query = tl.load(
        u + n * u_b + tl.cast(at, tl.int64) * u_t + head * u_h + ((t - at) * u_t)[None, :] + c[:, None],
        mask=inside[None, :] & (c < K)[:, None],
        other=0.0,
    )
    mine = tl.load(own + (n * heads + head) * tokens + t, mask=inside, other=0.0)
    pools += (n * count * heads + head) * K
    most, step = tl.max(sees), heads * K
    if ONE:
        only = scored(pools, query, 0, count, step, sees, K, BK, BS, PRECISION)
    if TOP == 0:
        weights += (n * heads + head) * (count + 1) * tokens
        top, total = mine, tl.full([BT], 1.0, tl.float32)
        for i in range(0, most, BS):
            a = only if ONE else scored(pools, query, i, count, step, sees, K, BK, BS, PRECISION)
            higher = tl.maximum(top, tl.max(a, axis=0))
            total = total * tl.exp2((top - higher) * LOG2E) + tl.sum(tl.exp2((a - higher[None, :]) * LOG2E), axis=0)
            top = higher
        for i in range(0, count, BS):
            w = tl.zeros([BS, BT], tl.float32)
            if i < most:
                a = only if ONE else scored(pools, query, i, count, step, sees, K, BK, BS, PRECISION)
                w = tl.exp2((a - top[None, :]) * LOG2E) / total[None, :]
            where = (i + s[:, None]).to(tl.int64) * tokens + t[None, :]
            tl.store(weights + where, w, mask=(i + s < count)[:, None] & inside[None, :])
        mine = tl.exp2((mine - top) * LOG2E) / total
        tl.store(weights + tl.cast(count, tl.int64) * tokens + t, mine, mask=inside)
    else:
        slot = tl.arange(0, SLOTS)[:, None]
        found, chosen = tl.full([SLOTS, BT], float("-inf"), tl.float32), tl.full([SLOTS, BT], -1, tl.int32)
        value, place = tl.full([BT], float("inf"), tl.float32), tl.full([BT], -1, tl.int32)
        for j in tl.static_range(TOP):
            best, where = tl.full([BT], float("-inf"), tl.float32), tl.full([BT], -1, tl.int32)
            for i in range(0, most, BS):
                a = only if ONE else scored(pools, query, i, count, step, sees, K, BK, BS, PRECISION)
                row = i + s[:, None]
                left = (a < value[None, :]) | ((a == value[None, :]) & (row > place[None, :]))
                a = tl.where(left, a, float("-inf"))
                high = tl.max(a, axis=0)
                lowest = tl.min(tl.where(a == high[None, :], row, 2147483647), axis=0)
                where = tl.where(high > best, lowest, where)
                best = tl.maximum(best, high)
            found = tl.where(slot == j, best[None, :], found)
            chosen = tl.where(slot == j, where[None, :], chosen)
            value, place = best, where
        top = tl.maximum(mine, tl.max(found, axis=0))
        found, mine = tl.exp2((found - top[None, :]) * LOG2E), tl.exp2((mine - top) * LOG2E)
        total = tl.sum(found, axis=0) + mine
        weights += (n * heads + head) * (TOP + 1) * tokens
        index += (n * heads + head) * TOP * tokens
        stored = (slot < TOP) & inside[None, :]
        tl.store(weights + slot * tokens + t[None, :], found / total[None, :], mask=stored)
        tl.store(index + slot * tokens + t[None, :], chosen, mask=stored)
        tl.store(weights + TOP * tokens + t, mine / total, mask=inside)


@triton.jit(do_not_specialize=["tokens", "pieces", "before"])
def pool_back(
    k, k_b, k_t, k_h, u, u_b, u_t, u_h, key_sum, cuts, down, dpooled, dlast, dk, du, dkey_sum,
    tokens, pieces, before, heads, group,
    K: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, MEAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a segment's keys, its part of those of u (added to what is there), and of the first key sum."""
    pid = tl.program_id(0)
    head, p, n = pid % heads, pid // heads % pieces, (pid // (heads * pieces)).to(tl.int64)
    c, r = tl.arange(0, BK), tl.arange(0, BT)
    lower = r[:, None] >= r[None, :]
    k += n * k_b + head // group * k_h
    u += n * u_b + head * u_h
    down += (n * heads + head) * tokens
    step = heads * K
    place = n * tokens * step + head * K
    total = tl.load(key_sum + (n * heads + head) * K + c, mask=c < tl.where(p == 0, K, 0), other=0.0).to(tl.float32)
    passed = tl.where(p == 0, before, 0)
    first, last = tl.load(cuts + p), tl.load(cuts + p + 1)
    for at in range(first, last, BT):
        key = rows_of(k, k_t, at, last, K, BK, BT)
        running = dot(lower.to(key.dtype), key, PRECISION) + total[None, :]
        slope = tl.load(down + at + r, mask=at + r < last, other=0.0)
        if MEAN:
            slope /= (passed + at - first + 1 + r).to(tl.float32)
        where = du + place + (at + r).to(tl.int64)[:, None] * step + c[None, :]
        stored = (at + r < last)[:, None] & (c < K)[None, :]
        tl.store(where, tl.load(where, mask=stored, other=0.0) + slope[:, None] * running, mask=stored)
        total += tl.sum(key.to(tl.float32), axis=0)

    # Back from the last block: what reaches the sum after a token reaches the token.
    if p == pieces - 1:
        reaches = tl.load(dlast + (n * heads + head) * K + c, mask=c < K, other=0.0)
    else:
        reaches = tl.load(dpooled + ((n * (pieces - 1) + p) * heads + head) * K + c, mask=c < K, other=0.0)
        if MEAN:
            reaches /= (passed + last - first).to(tl.float32)
    for b in range(tl.cdiv(last - first, BT)):
        at = first + (tl.cdiv(last - first, BT) - 1 - b) * BT
        query = rows_of(u, u_t, at, last, K, BK, BT)
        slope = tl.load(down + at + r, mask=at + r < last, other=0.0)
        if MEAN:
            slope /= (passed + at - first + 1 + r).to(tl.float32)
        d = slope[:, None] * query.to(tl.float32)
        found = gathered(r[:, None] <= r[None, :], d, query.dtype, PRECISION) + reaches[None, :]
        stored = (at + r < last)[:, None] & (c < K)[None, :]
        tl.store(dk + place + (at + r).to(tl.int64)[:, None] * step + c[None, :], found, mask=stored)
        reaches += tl.sum(d, axis=0)
    if p == 0:
        tl.store(dkey_sum + (n * heads + head) * K + c, reaches, mask=c < K)


class SegmentWeights:
    """See ``mixers.segment_weights``."""

    arrays = ("torch",)

    def serves(self, dtype: str, device: str, widths: tuple[int, int]) -> bool:
        """Widths up to 256 on a GPU, and no float64."""
        return runs_here(dtype, device) and 1 <= widths[0] <= WIDEST

    def forward(self, x: tuple[Array, ...], fixed: tuple[Array, ...], factor: float, how: str) -> tuple[Array, ...]:
        """Weights, the pools that were chosen, pools of finished segments, and the keys of the last one."""
        call = _Call(x, fixed, factor, how)
        rows, tokens, heads, width = call.u.shape
        wide = {"dtype": torch.float32, "device": call.u.device}
        own = torch.empty((rows, heads, tokens), **wide)
        pooled, last = (
            torch.empty((rows, call.pieces - 1, heads, width), **wide),
            torch.empty((rows, heads, width), **wide),
        )
        pool[(rows * heads * call.pieces,)](*call.arrays, own, pooled, last, *call.counts, **call.constants())
        pools = torch.cat([call.pooled, pooled], dim=1)
        count = pools.shape[1]
        weights = torch.empty((rows, heads, (call.top or count) + 1, tokens), **wide)
        index = torch.empty((rows, heads, call.top, tokens), dtype=torch.int32, device=call.u.device)
        size = 32 if INTERPRETED else 64
        blocks = triton.cdiv(tokens, size)
        weigh[(rows * heads * blocks,)](
            *place(call.u, 0, 1, 2), pools, own, call.seen, weights, index, tokens, count, heads, blocks,
            K=width, BK=call.wide, BS=size, BT=size, TOP=call.top, SLOTS=triton.next_power_of_2(max(call.top, 1)),
            ONE=count <= size, PRECISION="ieee", num_warps=call.warps, num_stages=1,
        )  # fmt: skip
        return weights, index, pooled, last

    def backward(
        self,
        x: tuple[Array, ...],
        fixed: tuple[Array, ...],
        factor: float,
        how: str,
        out: tuple[Array, ...],
        dout: tuple[Array, ...],
    ) -> tuple[Array, ...]:
        """Gradients of k, the pools that there were, the first key sum, and u."""
        call = _Call(x, fixed, factor, how)
        (k, before, key_sum, u), (weights, index, pooled, _), (dweights, dpooled, dlast) = x, out, dout
        rows, tokens, heads, width = u.shape
        slopes = weights * (dweights - (weights * dweights).sum(2, keepdim=True))
        slopes, down = slopes[:, :, :-1], slopes[:, :, -1].contiguous()
        pools = torch.cat([call.pooled, pooled], dim=1)
        if call.top:
            wide = slopes.new_zeros((rows, heads, pools.shape[1] + 1, tokens))
            slopes = wide.scatter_(2, index.long() + 1, slopes)[:, :, 1:]  # what chose nothing lands in the first row
        du = torch.einsum("nhst,nshk->nthk", slopes, pools).contiguous()
        dpools = torch.einsum("nhst,nthk->nshk", slopes, u.float())
        dpools[:, before.shape[1] :] += dpooled
        dnew = dpools[:, before.shape[1] :].contiguous()
        dk = torch.empty((rows, tokens, heads, width), dtype=torch.float32, device=u.device)
        dsum = torch.empty((rows, heads, width), dtype=torch.float32, device=u.device)
        pool_back[(rows * heads * call.pieces,)](
            *call.arrays, down, dnew, dlast.contiguous(), dk, du, dsum, *call.counts, **call.constants(back=True)
        )
        dk = dk.unflatten(2, (k.shape[2], -1)).sum(3).to(k.dtype)
        return dk, dpools[:, : before.shape[1]].to(before.dtype), dsum.to(key_sum.dtype), du.to(u.dtype)


class _Call:
    """The arguments that kernels share."""

    def __init__(self, x: tuple[Array, ...], fixed: tuple[Array, ...], factor: float, how: str) -> None:
        k, pooled, key_sum, u = x
        self.k, self.u = dense(k), dense(u)
        self.pooled, key_sum = pooled.float(), key_sum.float().contiguous()
        cuts, self.seen = (a.to(torch.int32).contiguous() for a in fixed)
        kind, top = how.split()
        self.top, self.mean, self.pieces = int(top), kind == "mean", cuts.shape[0] - 1
        self.arrays = (*place(self.k, 0, 1, 2), *place(self.u, 0, 1, 2), key_sum, cuts)
        heads = u.shape[2]
        self.counts = u.shape[1], self.pieces, int(factor), heads, heads // k.shape[2]
        half = u.element_size() == 2 and not INTERPRETED
        self.wide, self.warps = max(64 if half else 32, block(u.shape[3])), 4 if half else 8

    def constants(self, back: bool = False) -> dict[str, Any]:
        """What ``pool`` and ``pool_back`` are compiled for; the latter spills with blocks of 64 tokens."""
        half = self.warps == 4 and not back
        return {
            "K": self.u.shape[3],
            "BK": self.wide,
            "BT": 64 if half else 32,
            "MEAN": self.mean,
            "PRECISION": "ieee",
            "num_warps": 4 if half else 8,
            "num_stages": 2 if half else 1,
        }


PRIMITIVE = SegmentWeights()
