"""What the kernels of Lattice share: objectives, first directions, tiles of tokens and slots, decays, norms of rows.

Tokens are rows [t, ·], slots are rows [i, ·] of a state; blocks are powers of two, and what lies outside reads as zero.
"""

import functools

import torch
import triton
import triton.language as tl

from mixers.algebra import unit_directions
from mixers.problem import Problem
from mixers.spec import Array

OBJECTIVES = {"decoding": 0, "encoding": 1, "similarity": 2}
DECODING = tl.constexpr(0)
ENCODING = tl.constexpr(1)


def directions(problem: Problem, device: torch.device) -> Array:
    """The first directions of the slots, float32 ``[K,V]``."""
    return _directions(problem.sizes.K, problem.sizes.V, device)


@functools.lru_cache(maxsize=64)
def _directions(key_dim: int, value_dim: int, device: torch.device) -> Array:
    """Copied to the device once."""
    return torch.tensor(unit_directions(key_dim, value_dim), dtype=torch.float32, device=device)


@triton.jit
def tile(pointer, rows, columns, stride, size, WIDTH: tl.constexpr):
    """Rows below size and columns below WIDTH of a matrix, zeros elsewhere."""
    mask = (rows < size)[:, None] & (columns < WIDTH)[None, :]
    return tl.load(pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0)


@triton.jit
def put(pointer, x, rows, columns, stride, size, WIDTH: tl.constexpr):
    """Store what ``tile`` would load."""
    mask = (rows < size)[:, None] & (columns < WIDTH)[None, :]
    tl.store(pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :], x, mask=mask)


@triton.jit
def slab(pointer, rows, columns, K: tl.constexpr, V: tl.constexpr):
    """The slots of one head, contiguous; zeros outside."""
    mask = (rows < K)[:, None] & (columns < V)[None, :]
    return tl.load(pointer + (rows[:, None] * V + columns[None, :]), mask=mask, other=0)


@triton.jit
def put_slab(pointer, x, rows, columns, K: tl.constexpr, V: tl.constexpr):
    """Store what ``slab`` would load."""
    mask = (rows < K)[:, None] & (columns < V)[None, :]
    tl.store(pointer + (rows[:, None] * V + columns[None, :]), x, mask=mask)


@triton.jit
def strengths(pointer, rows, columns, stride, size, WIDTH: tl.constexpr, PER_SLOT: tl.constexpr):
    """beta of some tokens in float32: [tokens, slots], or [tokens, 1] where it is one for all slots."""
    if PER_SLOT:
        found = tile(pointer, rows, columns, stride, size, WIDTH)
    else:
        found = tl.load(pointer + rows.to(tl.int64) * stride, mask=rows < size, other=0)[:, None]
    return found.to(tl.float32)


@triton.jit
def logs(pointer, rows, stride, size):
    """log_decay of some tokens in float32; no decay outside."""
    inside = (rows >= 0) & (rows < size)
    return tl.load(pointer + rows.to(tl.int64) * stride, mask=inside, other=0).to(tl.float32)


@triton.jit
def squares(s):
    """``‖s_i‖²`` of every row."""
    return tl.sum(s * s, 1)


@triton.jit
def norms(s, CAREFUL: tl.constexpr, PRECISION: tl.constexpr):
    """``‖s_i‖`` of every row; CAREFUL where the square of a row may underflow, correctly rounded where PRECISION is."""
    if CAREFUL:
        peak = tl.max(tl.abs(s), 1)
        unit = tl.where(peak > 0, peak, 1)
        return peak * tl.sqrt_rn(squares(s / unit[:, None]))
    return tl.sqrt_rn(squares(s)) if PRECISION == "ieee" else tl.sqrt(squares(s))


@triton.jit
def inverse(x, PRECISION: tl.constexpr):
    """``1/x``, and 0 for 0; correctly rounded, which takes a branch a number, only where products are."""
    safe = tl.where(x > 0, x, 1.0)
    found = tl.div_rn(tl.full(x.shape, 1.0, tl.float32), safe) if PRECISION == "ieee" else 1.0 / safe
    return tl.where(x > 0, found, 0.0)


@triton.jit
def adopt(s, first):
    """Rows of zeros become their first directions."""
    return tl.where((tl.max(tl.abs(s), 1) == 0)[:, None], first, s)


@triton.jit
def cut(gradient, s):
    """No gradient reaches rows of zeros, for which others stood in."""
    return tl.where((tl.max(tl.abs(s), 1) == 0)[:, None], 0, gradient)


# Token by token.

SEGMENT = 16  # tokens whose slots the backward of the exact form computes again at a time


@triton.jit
def segment_row(n, first, tokens, SEGMENT: tl.constexpr, PACKED: tl.constexpr):
    """The row of kept slots where the segments of sequence n begin."""
    if PACKED:
        return first // SEGMENT + n
    return n.to(tl.int64) * (tokens // SEGMENT + 1)


@triton.jit
def vector(pointer, columns, t, stride, length, WIDTH: tl.constexpr):
    """Row t of a matrix in float32, zeros outside."""
    at = pointer + tl.cast(t, tl.int64) * stride + columns
    return tl.load(at, mask=columns < tl.where(t < length, WIDTH, 0), other=0).to(tl.float32)


@triton.jit
def column_sums(x, y):
    """Sums over the rows of two matrices, which meet in shared memory once."""
    return tl.split(tl.sum(tl.join(x, y), 0))


@triton.jit
def row_sums(x, y):
    """Sums over the columns of two matrices."""
    return tl.split(tl.sum(tl.join(x, y), 1))


@triton.jit
def strength_of(beta, beta_t, t, length, i, K: tl.constexpr, PER_SLOT: tl.constexpr):
    """beta of token t, a number a slot; zeros behind the last token."""
    if PER_SLOT:
        return vector(beta, i, t, beta_t, length, K)
    one = tl.load(beta + tl.cast(t, tl.int64) * beta_t, mask=t < length, other=0).to(tl.float32)
    return one + tl.zeros(i.shape, tl.float32)


@triton.jit
def turn_token(
    t, s, p, key, value, strength, g, g_t, first_slots,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OBJECTIVE: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """The slots after token t, ρ, a and h; p predicts the token's value."""
    i = tl.arange(0, BK)
    wide = tl.cast(t, tl.int64)
    mu = tl.exp(tl.load(g + wide * g_t).to(tl.float32)) if GATED else 1.0
    h = value - p if OBJECTIVE == DECODING else value
    a = tl.sum(s * h[None, :], 1)
    z = key - a if OBJECTIVE == ENCODING else key
    c = strength * z
    s = (mu - c * a)[:, None] * s + c[:, None] * h[None, :]
    rho = norms(s, GATED, "ieee")
    s *= inverse(rho, "ieee")[:, None]
    if GATED:  # only a reset leaves nothing of a row
        j = tl.arange(0, BV)
        gone = (rho == 0) & (i < K)
        s += tl.load(first_slots + i[:, None] * V + j[None, :], mask=gone[:, None] & (j < V)[None, :], other=0)
    return s, rho, a, h
