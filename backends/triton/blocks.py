"""Pieces that kernels are made of: where sequences and chunks lie, the inverse inside a chunk, sums of decays.

A sequence is cut into chunks of BT tokens; where checkpoints are asked for, every checkpoint starts a new chunk, so
that states are wanted at ends of chunks only. The chunks of all sequences are counted as rows: sequence n of a batch
has its rows from ``n · per`` on, sequence n of a pack from ``chunks(offsets[n]) + n``, and rows that no chunk uses stay
empty. So the number of rows is known on the host while the offsets are not.

    offsets [N+1]   first token of each sequence of a pack      every   tokens between checkpoints
"""

import triton
import triton.language as tl

# e^{−10⁴} is zero, and its multiples are numbers: −∞, a hard reset, is read as this.
LEAST = tl.constexpr(-1e4)
# In bfloat16 nothing shows beside what is e^{64} times larger.
LEAST_HALF = tl.constexpr(-64.0)


@triton.jit
def span(n, tokens, offsets, PACKED: tl.constexpr):
    """Row of the batch, first token in it, and length of sequence n; 64 bits, for offsets into large tensors."""
    if PACKED:
        first = tl.load(offsets + n)
        return first * 0, first, tl.load(offsets + n + 1) - first
    wide = tl.cast(n, tl.int64)
    return wide, wide * 0, wide * 0 + tokens


@triton.jit
def chunks(tokens, every, BT: tl.constexpr, CHECKPOINTS: tl.constexpr):
    """How many chunks so many tokens are."""
    if CHECKPOINTS:
        return (tokens // every) * tl.cdiv(every, BT) + tl.cdiv(tokens % every, BT)
    return tl.cdiv(tokens, BT)


@triton.jit
def chunk(i, length, every, BT: tl.constexpr, CHECKPOINTS: tl.constexpr):
    """First token of chunk i of a sequence, and how many tokens it has."""
    if CHECKPOINTS:
        per = tl.cdiv(every, BT)
        part = i // per
        first = part * every + (i - part * per) * BT
        return first, tl.minimum(tl.minimum((part + 1) * every, length) - first, BT)
    return i * BT, tl.minimum(length - i * BT, BT)


@triton.jit
def first_row(n, per, every, offsets, BT: tl.constexpr, CHECKPOINTS: tl.constexpr, PACKED: tl.constexpr):
    """The row of a sequence's first chunk."""
    if PACKED:
        return chunks(tl.load(offsets + n), every, BT, CHECKPOINTS) + n
    return tl.cast(n, tl.int64) * per


@triton.jit
def locate(
    row, tokens, sequences, per, every, offsets, BT: tl.constexpr, CHECKPOINTS: tl.constexpr, PACKED: tl.constexpr
):
    """Row of the batch, first token in it, and tokens of the chunk in a row; no tokens where the row stays empty."""
    if PACKED:
        low, high = row * 0, row * 0 + sequences
        while high - low > 1:
            middle = (low + high) // 2
            if first_row(middle, per, every, offsets, BT, CHECKPOINTS, PACKED) <= row:
                low = middle
            else:
                high = middle
        n = low
    else:
        n = row // per
    batch, start, length = span(n, tokens, offsets, PACKED)
    i = row - first_row(n, per, every, offsets, BT, CHECKPOINTS, PACKED)
    first, count = chunk(i, length, every, BT, CHECKPOINTS)
    return batch, start + first, count


@triton.jit
def fading(
    fade, row, i, length, every, heads, head, c,
    K: tl.constexpr, BT: tl.constexpr, CHECKPOINTS: tl.constexpr,
):  # fmt: skip
    """What chunk i leaves of every channel of a state.

    Triton stages loads ahead only where they go into products, so a chain asks for this one a chunk before its use: for
    a vector, as one number would go to a uniform register, which is waited for at once.
    """
    _, count = chunk(i, length, every, BT, CHECKPOINTS)
    return tl.load(fade + ((row + i) * heads + head) * K + c, mask=c < tl.where(count > 0, K, 0), other=1.0)


@triton.jit
def kept(i, j):
    """Which pairs of tokens have a place in memory: blocks of 16 rows and columns on the diagonal and below it."""
    return i // 16 >= j // 16


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """``a b`` in float32; float32 operands as PRECISION says."""
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def inverse(n, BT: tl.constexpr, PRECISION: tl.constexpr):
    """``(I + n)⁻¹`` of a strictly lower matrix, by merging diagonal blocks of 1, 2, 4, … rows.

    ``A ← A − A (n∘mask) A``, the mask being the lower left quarters of the blocks that are merged: two products a level
    and stable on keys of any likeness, where doubling, ``(I+n)(I+n²)…``, is not.
    """
    i, j = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    # Blocks of one row are merged without a product: A is the identity.
    a = tl.where(i == j, 1.0, 0.0) - tl.where((i // 2 == j // 2) & (i % 2 == 1) & (j % 2 == 0), n, 0.0)
    for level in tl.static_range(1, 9):
        if (1 << level) < BT:
            merged = i // (2 << level) == j // (2 << level)
            quarter = merged & (i % (2 << level) >= 1 << level) & (j % (2 << level) < 1 << level)
            a -= dot(dot(a, tl.where(quarter, n, 0.0), PRECISION), a, PRECISION)
    return a


@triton.jit
def sums(which, g, PRECISION: tl.constexpr):
    """``which g`` for a matrix of zeros and ones; two halves of g keep more of it than one tf32 would."""
    if PRECISION == "ieee":
        return dot(which.to(tl.float32), g, PRECISION)
    ones, high = which.to(tl.float16), g.to(tl.float16)
    low = (g - high.to(tl.float32)).to(tl.float16)
    return dot(ones, high, PRECISION) + dot(ones, low, PRECISION)


@triton.jit
def upper_bits(d, operand: tl.constexpr):
    """The part of a float32 that bfloat16, or tf32, holds without rounding: bits, not a rounded number."""
    kept: tl.constexpr = -65536 if operand == tl.bfloat16 else -8192
    return (d.to(tl.int32, bitcast=True) & kept).to(tl.float32, bitcast=True)


@triton.jit
def gathered(which, d, operand: tl.constexpr, PRECISION: tl.constexpr):
    """``which d`` for gradients, which may be of any size."""
    if PRECISION == "ieee":
        return dot(which.to(tl.float32), d, PRECISION)
    ones, high = which.to(operand), upper_bits(d, operand)
    return dot(ones, high.to(operand), PRECISION) + dot(ones, (d - high).to(operand), PRECISION)


@triton.jit
def between(g, BT: tl.constexpr, PRECISION: tl.constexpr):
    """``Σ_{j<m≤i} g_m`` for every pair ``i ≥ j``, from ``g [BT, 1]``: a sum, never a difference, as −∞ − −∞ is none."""
    i, j = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    return sums(i >= j, tl.where(i > j, tl.maximum(g, LEAST), 0.0), PRECISION)


@triton.jit
def falling(total):
    """``e^{G_i−G_j}`` for every pair ``i ≥ j`` of a running sum ``G [BT]`` that never rises; 1 above."""
    return tl.exp(tl.minimum(total[:, None] - total[None, :], 0.0))


@triton.jit
def pair_decays(g, total, BT: tl.constexpr, operand: tl.constexpr, PRECISION: tl.constexpr):
    """``e^{Σ_{j<m≤i} g_m}`` for every pair ``i ≥ j``, from ``g [BT]``; 1 or less above.

    bfloat16 takes differences of one running sum, ``total [BT]`` of ``running``, which is cheaper: it never falls below
    BT · LEAST_HALF, where its last bit is an eighth of one of bfloat16's.
    """
    if operand == tl.bfloat16:
        return falling(total)
    return tl.exp(between(g[:, None], BT, PRECISION))


@triton.jit
def pair_decays_gradient(d, g, BT: tl.constexpr, operand: tl.constexpr, PRECISION: tl.constexpr):
    """Gradient of every g_m from d, that of the exponents of ``pair_decays`` for i > j: ``Σ_{i≥m>j} d_ij``.

    float32 adds these; bfloat16 adds all ``i ≥ m`` and takes those away of which j is not before m either. What was
    held at LEAST_HALF has none.
    """
    i, j = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    if operand == tl.bfloat16:
        found = tl.cumsum(tl.sum(d, axis=1) - tl.sum(d, axis=0), axis=0, reverse=True)
        return tl.where(g > LEAST_HALF, found, 0.0)
    return tl.sum(tl.where(i > j, gathered(j >= i, d, operand, PRECISION), 0.0), axis=1)


@triton.jit
def decay_gradient(up, down, total, BT: tl.constexpr):
    """Gradient of every g_m from those of sums over it.

    ``up_i`` belongs to ``Σ_{m≤i} g_m``, ``down_i`` to ``Σ_{m>i} g_m``, ``total`` to the sum of all. What belongs to no
    decay, ``down`` of the last token, may be e^{50} times what does: it is left out, not added and taken away again.
    """
    i, m = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    before = tl.sum(tl.where(i < m, down[:, None], 0.0), axis=0)
    return tl.cumsum(up, axis=0, reverse=True) + before + total
