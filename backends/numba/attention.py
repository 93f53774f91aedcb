"""Causal softmax attention in blocks: no matrix of scores in memory, only one block of it at a time.

    s_tj = attn_scale·⟨q_t, k_j⟩     lse_t = log Σ_{j≤t} e^{s_tj}     p_tj = e^{s_tj − lse_t}     y_t = Σ_{j≤t} p_tj v_j

Forward, for a block of queries: a maximum, a denominator and an output run along the blocks of keys,

    m' = max(m, s)     l ← e^{m−m'} l + Σ_j e^{s_j−m'}     o ← e^{m−m'} o + Σ_j e^{s_j−m'} v_j     y = o/l

Backward, with D_t = ⟨dy_t, y_t⟩ and the scores computed again from q, k and lse:

    ds_tj = p_tj (⟨dy_t, v_j⟩ − D_t)     dv_j = Σ_t p_tj dy_t
    dk_j = attn_scale Σ_t ds_tj q_t      dq_t = attn_scale Σ_j ds_tj k_j

    q, y [B,T,H,K|V]     k, v [B,T,G,K|V]     lse, D [B,T,H]     cache: keys, values [N,M,G,K|V], length [N]

The ``m = H/G`` query heads that share a key head are one matrix of queries: row ``r`` is token ``r // m`` and head
``g·m + r % m``. Keys are counted by position in the grown cache: those below ``length`` lie in the first state, seen by
every query, and token t has position ``length + t``. Keys are loaded times ``attn_scale``.

Queries lie along the lanes in the forward and in the pass for dq, keys in the pass for dk and dv: maxima and
denominators are then whole vectors, and nothing is transposed more than once a block.
"""

from typing import Any

import numpy as np
from numba import get_num_threads

from mixers.backend import Config, Support
from mixers.problem import Arrays, Problem

from .compile import Count, Flag, In, Index, Int, Out, Real, device, kernel
from .kernel import NumbaKernel, given
from .layout import padded, scratch, span
from .matmul import matmul, matmul_ta
from .rows import load_columns, load_rows, load_vector, transpose
from .simd import NARROW, WIDE, add, exp, fma, lanes, load, maximum, mul, splat, store, sub, zeros


@device
def load_keys(old, new, n, row, first, length, g, position, count, factor, tile, ld):
    """``factor`` times the keys, or values, from ``position`` on: all of them in the first state, or all new."""
    cached = position < length
    source = old if cached else new
    begin = position if cached else first + position - length
    load_rows(source, n if cached else row, begin, g, np.int64(1), np.int64(0), count, factor, tile, ld)


def _soften(width):
    @device
    def soften(s, ld, keys, lane, top, total, shrink):
        """One vector of queries meets a block of keys: scores become weights; maximum and denominator follow."""
        high = load(top, lane, width)
        before = high
        for j in range(keys):
            high = maximum(load(s, j * ld + lane, width), high)
        factor = exp(sub(before, high))
        sums = mul(factor, load(total, lane, width))
        for j in range(keys):
            p = exp(sub(load(s, j * ld + lane, width), high))
            store(s, j * ld + lane, p)
            sums = add(sums, p)
        store(top, lane, high)
        store(total, lane, sums)
        store(shrink, lane, factor)

    return soften


_soften_wide, _soften_narrow = _soften(WIDE), _soften(NARROW)


@device
def soften_block(s, ld, keys, top, total, shrink):
    """``soften`` for every vector of queries."""
    lane = 0
    while lane + lanes(s, WIDE) <= ld:
        _soften_wide(s, ld, keys, lane, top, total, shrink)
        lane += lanes(s, WIDE)
    while lane < ld:
        _soften_narrow(s, ld, keys, lane, top, total, shrink)
        lane += lanes(s, NARROW)


@device
def scale_columns(o, ld, rows, factor):
    """``o[i, lane] *= factor[lane]``; most blocks raise no maximum, and then there is nothing to do."""
    changed = False
    for i in range(ld):
        changed |= factor[i] != 1
    if changed:
        for i in range(rows):
            for j in range(0, ld, lanes(o, NARROW)):
                store(o, i * ld + j, mul(load(o, i * ld + j, NARROW), load(factor, j, NARROW)))


@device
def forward_block(q, k, v, keys0, values0, length, row, first, n, g, r, rows, scale, block, y, lse):
    """The output of ``rows`` queries from ``r`` on of key head ``g`` in sequence ``n``."""
    width, depth, m = q.shape[3], v.shape[3], q.shape[2] // k.shape[2]
    ld, ldk, ldv = padded(rows, y), padded(width, y), padded(depth, y)
    queries, o, s = scratch(width * ld, y), scratch(depth * ld, y), scratch(block * ld, y)
    top, total, shrink = scratch(ld, y), scratch(ld, y), scratch(ld, y)
    tile_k, tile_v = scratch(block * ldk, y), scratch(block * ldv, y)
    load_columns(q, row, first, g, m, r, rows, queries, ld)
    top[:] = -np.inf
    total[:] = 0
    o[:] = 0

    last = length + (r + rows - 1) // m + 1
    position = 0
    while position < last:
        stop = length if position < length else last
        count = min(block, stop - position)
        load_keys(keys0, k, n, row, first, length, g, position, count, scale, tile_k, ldk)
        load_keys(values0, v, n, row, first, length, g, position, count, y.dtype.type(1), tile_v, ldv)
        matmul(s, ld, tile_k, ldk, queries, ld, count, rows, width, y.dtype.type(1), y.dtype.type(0))
        for j in range(count):
            for i in range(min(rows, (position + j - length) * m - r)):
                s[j * ld + i] = -np.inf
        soften_block(s, ld, count, top, total, shrink)
        scale_columns(o, ld, depth, shrink)
        matmul_ta(o, ld, tile_v, ldv, s, ld, depth, rows, count, y.dtype.type(1), y.dtype.type(1))
        position += count

    for i in range(rows):
        t, h = first + (r + i) // m, g * m + (r + i) % m
        share = 1 / total[i]
        for j in range(depth):
            y[row, t, h, j] = o[j * ld + i] * share
        if lse.shape[0] > 0:
            lse[row, t, h] = top[i] + np.log(total[i])


@kernel
def forward(
    begin: Int,
    end: Int,
    q: In[4],
    k: In[4],
    v: In[4],
    keys0: In[4],
    values0: In[4],
    length: Count[1],
    offsets: Index[1],
    table: Index[2],
    scale: Real,
    block_q: Int,
    block_k: Int,
    y: Out[4],
    lse: Out[3],
):
    """``table`` lists blocks of queries: sequence and first row."""
    groups = k.shape[2]
    m = q.shape[2] // groups
    for item in range(begin, end):
        n, r, g = table[item // groups, 0], table[item // groups, 1], item % groups
        row, first, last = span(n, q.shape[1], offsets)
        rows = min(block_q, (last - first) * m - r)
        forward_block(q, k, v, keys0, values0, length[n], row, first, n, g, r, rows, scale, block_k, y, lse)


@device
def delta_block(y, dy, row, first, g, m, r, rows, delta):
    """``D`` of some queries, added up in the order of a product of matrices: a query with one key has gradient 0."""
    ld, depth = padded(rows, delta), y.shape[3]
    a, b, sums = scratch(depth * ld, delta), scratch(depth * ld, delta), scratch(ld, delta)
    load_columns(y, row, first, g, m, r, rows, a, ld)
    load_columns(dy, row, first, g, m, r, rows, b, ld)
    for i in range(0, ld, lanes(delta, NARROW)):
        sum_ = zeros(delta, NARROW)
        for j in range(depth):
            sum_ = fma(load(a, j * ld + i, NARROW), load(b, j * ld + i, NARROW), sum_)
        store(sums, i, sum_)
    for i in range(rows):
        delta[row, first + (r + i) // m, g * m + (r + i) % m] = sums[i]


@device
def keys_block(
    q, k, v, keys0, values0, length, row, first, tokens, n, g, position, scale,
    block_q, block_k, lse, dy, delta, dq, dk, dv, dkeys0, dvalues0, fused,
):  # fmt: skip
    """Gradients of the keys and values from ``position`` on; ``fused`` adds their part of dq as well."""
    width, depth, m = q.shape[3], v.shape[3], q.shape[2] // k.shape[2]
    one, nil = dq.dtype.type(1), dq.dtype.type(0)
    cached = position < length
    count = min(block_k, (length if cached else length + tokens) - position)
    ld, ldk, ldv = padded(count, dq), padded(width, dq), padded(depth, dq)
    across_k, across_v = scratch(width * ld, dq), scratch(depth * ld, dq)
    tile_k, tile_v = scratch(count * ldk, dq), scratch(count * ldv, dq)
    load_keys(keys0, k, n, row, first, length, g, position, count, scale, tile_k, ldk)
    load_keys(values0, v, n, row, first, length, g, position, count, one, tile_v, ldv)
    transpose(tile_k, ldk, count, width, across_k, ld)
    transpose(tile_v, ldv, count, depth, across_v, ld)
    sum_k, sum_v = scratch(count * ldk, dq), scratch(count * ldv, dq)
    sum_k[:] = 0
    sum_v[:] = 0

    tile_q, tile_dy, part = scratch(block_q * ldk, dq), scratch(block_q * ldv, dq), scratch(block_q * ldk, dq)
    p, ds = scratch(block_q * ld, dq), scratch(block_q * ld, dq)
    lse_, delta_ = scratch(block_q, dq), scratch(block_q, dq)
    r = max(0, position - length) * m
    while r < tokens * m:
        rows = min(block_q, tokens * m - r)
        load_rows(q, row, first, g, m, r, rows, one, tile_q, ldk)
        load_rows(dy, row, first, g, m, r, rows, one, tile_dy, ldv)
        load_vector(lse, row, first, g, m, r, rows, lse_)
        load_vector(delta, row, first, g, m, r, rows, delta_)
        matmul(p, ld, tile_q, ldk, across_k, ld, rows, count, width, one, nil)
        matmul(ds, ld, tile_dy, ldv, across_v, ld, rows, count, depth, one, nil)
        for i in range(rows):
            # Row r + i sees positions below length + (r + i) // m + 1.
            for j in range(max(0, length + (r + i) // m + 1 - position), count):
                p[i * ld + j] = -np.inf
            less, shift = splat(p, lse_[i], NARROW), splat(p, delta_[i], NARROW)
            for j in range(i * ld, i * ld + ld, lanes(p, NARROW)):
                weight = exp(sub(load(p, j, NARROW), less))
                store(p, j, weight)
                store(ds, j, mul(weight, sub(load(ds, j, NARROW), shift)))
        matmul_ta(sum_v, ldv, p, ld, tile_dy, ldv, count, depth, rows, one, one)
        matmul_ta(sum_k, ldk, ds, ld, tile_q, ldk, count, width, rows, one, one)
        if fused:
            matmul(part, ldk, ds, ld, tile_k, ldk, rows, width, count, one, nil)
            for i in range(rows):
                t, h = first + (r + i) // m, g * m + (r + i) % m
                for j in range(width):
                    dq[row, t, h, j] += part[i * ldk + j]
        r += rows

    for i in range(count):
        t = position + i
        if cached:
            for j in range(width):
                dkeys0[n, t, g, j] += scale * sum_k[i * ldk + j]
            for j in range(depth):
                dvalues0[n, t, g, j] += sum_v[i * ldv + j]
        else:
            t += first - length
            for j in range(width):
                dk[row, t, g, j] += scale * sum_k[i * ldk + j]
            for j in range(depth):
                dv[row, t, g, j] += sum_v[i * ldv + j]


@device
def queries_block(
    q, k, v, keys0, values0, length, row, first, n, g, r, rows, scale, block, lse, dy, delta, dq
):  # fmt: skip
    """The gradient of some queries, in the order of additions of ``keys_block``."""
    width, depth, m = q.shape[3], v.shape[3], q.shape[2] // k.shape[2]
    one, nil = dq.dtype.type(1), dq.dtype.type(0)
    ld, ldk, ldv = padded(rows, dq), padded(width, dq), padded(depth, dq)
    across_q, across_dy, sum_q = scratch(width * ld, dq), scratch(depth * ld, dq), scratch(rows * ldk, dq)
    tile_k, tile_v = scratch(block * ldk, dq), scratch(block * ldv, dq)
    p, ds, lse_, delta_ = scratch(block * ld, dq), scratch(block * ld, dq), scratch(ld, dq), scratch(ld, dq)
    load_columns(q, row, first, g, m, r, rows, across_q, ld)
    load_columns(dy, row, first, g, m, r, rows, across_dy, ld)
    lse_[:] = 0
    delta_[:] = 0
    load_vector(lse, row, first, g, m, r, rows, lse_)
    load_vector(delta, row, first, g, m, r, rows, delta_)
    sum_q[:] = 0

    last = length + (r + rows - 1) // m + 1
    position = 0
    while position < last:
        stop = length if position < length else last
        count = min(block, stop - position)
        load_keys(keys0, k, n, row, first, length, g, position, count, scale, tile_k, ldk)
        load_keys(values0, v, n, row, first, length, g, position, count, one, tile_v, ldv)
        matmul(p, ld, tile_k, ldk, across_q, ld, count, rows, width, one, nil)
        matmul(ds, ld, tile_v, ldv, across_dy, ld, count, rows, depth, one, nil)
        for j in range(count):
            for i in range(min(rows, (position + j - length) * m - r)):
                p[j * ld + i] = -np.inf
            for i in range(0, ld, lanes(p, NARROW)):
                weight = exp(sub(load(p, j * ld + i, NARROW), load(lse_, i, NARROW)))
                store(ds, j * ld + i, mul(weight, sub(load(ds, j * ld + i, NARROW), load(delta_, i, NARROW))))
        matmul_ta(sum_q, ldk, ds, ld, tile_k, ldk, rows, width, count, one, one)
        position += count

    for i in range(rows):
        t, h = first + (r + i) // m, g * m + (r + i) % m
        for j in range(width):
            dq[row, t, h, j] = sum_q[i * ldk + j]


@kernel
def backward_deltas(
    begin: Int,
    end: Int,
    y: In[4],
    dy: In[4],
    offsets: Index[1],
    queries: Index[2],
    groups: Int,
    block_q: Int,
    fused: Flag,
    delta: Out[3],
    dq: Out[4],
):
    """``D`` of blocks of queries, which ``queries`` lists: sequence and first row. ``fused``: dq starts from 0."""
    m = y.shape[2] // groups
    for item in range(begin, end):
        n, r, g = queries[item // groups, 0], queries[item // groups, 1], item % groups
        row, first, last = span(n, y.shape[1], offsets)
        rows = min(block_q, (last - first) * m - r)
        delta_block(y, dy, row, first, g, m, r, rows, delta)
        if fused:
            for i in range(r, r + rows):
                dq[row, first + i // m, g * m + i % m, :] = 0


@kernel
def backward_keys(
    begin: Int,
    end: Int,
    q: In[4],
    k: In[4],
    v: In[4],
    keys0: In[4],
    values0: In[4],
    length: Count[1],
    offsets: Index[1],
    keys: Index[2],
    scale: Real,
    block_q: Int,
    block_k: Int,
    fused: Flag,
    lse: In[3],
    dy: In[4],
    delta: In[3],
    dq: Out[4],
    dk: Out[4],
    dv: Out[4],
    dkeys0: Out[4],
    dvalues0: Out[4],
):
    """The gradients of blocks of keys, which ``keys`` lists: sequence and first position. All of them are added to.

    ``fused`` walks all keys of a head in one item and shares the scores with dq (``keys`` lists sequences).
    """
    groups = k.shape[2]
    for item in range(begin, end):
        n, at, g = keys[item // groups, 0], keys[item // groups, 1], item % groups
        row, first, last = span(n, q.shape[1], offsets)
        position = at
        while position < length[n] + last - first and (fused or position == at):
            keys_block(
                q, k, v, keys0, values0, length[n], row, first, last - first, n, g, position, scale,
                block_q, block_k, lse, dy, delta, dq, dk, dv, dkeys0, dvalues0, fused,
            )  # fmt: skip
            position = min(position + block_k, length[n]) if position < length[n] else position + block_k


@kernel
def backward_queries(
    begin: Int,
    end: Int,
    q: In[4],
    k: In[4],
    v: In[4],
    keys0: In[4],
    values0: In[4],
    length: Count[1],
    offsets: Index[1],
    queries: Index[2],
    scale: Real,
    block_q: Int,
    block_k: Int,
    lse: In[3],
    dy: In[4],
    delta: In[3],
    dq: Out[4],
):
    """The gradients of blocks of queries, with scores of their own."""
    groups = k.shape[2]
    m = q.shape[2] // groups
    for item in range(begin, end):
        n, r, g = queries[item // groups, 0], queries[item // groups, 1], item % groups
        row, first, last = span(n, q.shape[1], offsets)
        rows = min(block_q, (last - first) * m - r)
        queries_block(q, k, v, keys0, values0, length[n], row, first, n, g, r, rows, scale, block_k, lse, dy, delta, dq)


def _lengths(offsets: np.ndarray | None, batch: int, tokens: int) -> np.ndarray:
    """Tokens of every sequence."""
    return np.full(batch, tokens) if offsets is None else np.diff(offsets)


def _cut(lengths: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Sequence and first index of every block."""
    counts = -(-lengths // block)
    sequence = np.repeat(np.arange(len(lengths)), counts)
    return sequence, (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)) * block


def _deal(sequence: np.ndarray, start: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """A table of blocks in which every thread's contiguous share is about as dear as the others'."""
    table = np.stack([sequence, start], axis=1).astype(np.int64)
    threads = get_num_threads()
    if threads == 1:
        return table
    order = np.argsort(-cost, kind="stable")
    return np.ascontiguousarray(table[np.concatenate([order[i::threads] for i in range(threads)])])


class AttentionChunk(NumbaKernel):
    """Blocks of queries against blocks of keys, with an online softmax."""

    name = "attention.chunk"
    form = "chunk"
    mixers = frozenset({"attention"})

    def takes(self, problem: Problem) -> Support:
        """Everything but checkpoints."""
        if problem.flags.checkpoint_every:
            return Support.no("every earlier cache is the first rows of the last one: cut it, without checkpoint_every")
        return Support.yes()

    def configs(self, problem: Problem) -> tuple[Config, ...]:
        """Rows of a block of queries and of keys."""
        return ({"block_q": 64, "block_k": 64}, {"block_q": 128, "block_k": 64}, {"block_q": 64, "block_k": 128})

    def forward(self, problem: Problem, config: Config, x: Arrays, out: Arrays) -> None:
        """Fill ``y``, the grown cache and ``lse``."""
        q, k, v, offsets = x["q"], x["k"], x["v"], x["offsets"]
        filled = x["initial.length"]
        tokens = _lengths(offsets, *q.shape[:2])
        m = q.shape[2] // k.shape[2]
        sequence, start = _cut(tokens * m, config["block_q"])
        seen = filled[sequence] + start // m
        table = _deal(sequence, start, seen)
        forward(
            float(seen.sum()) * config["block_q"] * k.shape[2] * (q.shape[3] + v.shape[3]) + 1.0,
            len(table) * k.shape[2],
            q, k, v, x["initial.keys"], x["initial.values"], filled, given(offsets, 1, np.int64),
            table, _scale(problem, q), config["block_q"], config["block_k"],
            out["y"], given(out.get("kept.lse"), 3, q.dtype),
        )  # fmt: skip
        if "final.keys" in out:
            out["final.length"][...] = filled + tokens
            for name, new in (("keys", k), ("values", v)):
                _append(x[f"initial.{name}"], new, filled, offsets, out[f"final.{name}"])

    def backward(self, problem: Problem, config: Config, x: Arrays, out: Arrays, dout: Arrays, dx: Arrays) -> None:
        """Fill the gradients of inputs and cache."""
        q, k, v, offsets = x["q"], x["k"], x["v"], x["offsets"]
        filled = x["initial.length"]
        tokens = _lengths(offsets, *q.shape[:2])
        for name in ("keys", "values"):
            _split(dout.get(f"final.{name}"), dx[name[0]], filled, offsets, dx[f"initial.{name}"])
        dy = dout.get("y")
        if dy is None:
            dx["q"][...] = 0
            return

        m = q.shape[2] // k.shape[2]
        sequence, start = _cut(tokens * m, config["block_q"])
        queries = _deal(sequence, start, filled[sequence] + start // m)
        old_sequence, old = _cut(filled * (tokens > 0), config["block_k"])
        sequence, start = _cut(tokens, config["block_k"])
        pairs = tokens * (filled + (tokens + 1) / 2)
        # One item a head saves two products of seven, where there are heads enough to go round.
        fused = len(filled) * k.shape[2] >= 2 * get_num_threads() or get_num_threads() == 1
        if fused:
            keys = _deal(np.arange(len(filled)), np.zeros(len(filled)), pairs)
        else:
            keys = _deal(
                np.concatenate([old_sequence, sequence]),
                np.concatenate([old, start + filled[sequence]]),
                np.concatenate([tokens[old_sequence], tokens[sequence] - start]),
            )
        groups, delta = k.shape[2], np.empty(q.shape[:3], q.dtype)
        work = float(pairs.sum()) * q.shape[2] * (q.shape[3] + v.shape[3]) + 1.0
        inputs = q, k, v, x["initial.keys"], x["initial.values"], filled, given(offsets, 1, np.int64)
        options, back = (_scale(problem, q), config["block_q"], config["block_k"]), (out["kept.lse"], dy, delta)
        backward_deltas(
            q.size, len(queries) * groups, out["y"], dy, inputs[-1], queries, groups, config["block_q"], fused,
            delta, dx["q"],
        )  # fmt: skip
        backward_keys(
            2.5 * work, len(keys) * groups, *inputs, keys, *options, fused, *back,
            dx["q"], dx["k"], dx["v"], dx["initial.keys"], dx["initial.values"],
        )  # fmt: skip
        if not fused:
            backward_queries(1.5 * work, len(queries) * groups, *inputs, queries, *options, *back, dx["q"])


def _scale(problem: Problem, q: np.ndarray) -> Any:
    scale = problem.option["attn_scale"]
    return q.dtype.type(q.shape[3] ** -0.5 if scale is None else scale)


def _pieces(filled: np.ndarray, offsets: np.ndarray | None, tokens: int) -> list[tuple[int, int, int, int, int]]:
    """Of every sequence: its number, its row, its first and last token, and the cache's length."""
    if offsets is None:
        return [(n, n, 0, tokens, int(length)) for n, length in enumerate(filled)]
    return [(n, 0, int(offsets[n]), int(offsets[n + 1]), int(length)) for n, length in enumerate(filled)]


def _append(
    old: np.ndarray, new: np.ndarray, filled: np.ndarray, offsets: np.ndarray | None, cache: np.ndarray
) -> None:
    """The old cache, the new tokens written at its length, zeros behind."""
    cache[:, : old.shape[1]] = old
    cache[:, old.shape[1] :] = 0
    for n, row, first, last, length in _pieces(filled, offsets, new.shape[1]):
        cache[n, length : length + last - first] = new[row, first:last]


def _split(
    dcache: np.ndarray | None, dnew: np.ndarray, filled: np.ndarray, offsets: np.ndarray | None, dold: np.ndarray
) -> None:
    """The adjoint of ``_append``: fills ``dnew`` and ``dold``."""
    if dcache is None:
        dnew[...] = 0
        dold[...] = 0
        return
    dold[...] = dcache[:, : dold.shape[1]]
    for n, row, first, last, length in _pieces(filled, offsets, dnew.shape[1]):
        dnew[row, first:last] = dcache[n, length : length + last - first]
        dold[n, length : length + last - first] = 0


KERNELS = (AttentionChunk(),)
