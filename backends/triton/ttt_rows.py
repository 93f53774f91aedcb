"""A block of TTT-linear: where it lies, how its tokens weigh on each other, and its inner gradients.

A block holds up to ``ROWS`` tokens: whole mini-batches of b tokens where they fit, a piece of one where they do not.
Token i of a block has place π_i in its mini-batch, which is number μ_i of those that the block touches, counted from 0.
The block starts with weights W, c and, inside a mini-batch, with running sums A, a. Two matrices say how much of the
inner gradient E_j token i feels, τ being the last rate of a mini-batch and ``rate_i = token_scale[π_i]``:

    key_ij = −τ [μ_j < μ_i]         query_ij = −τ [μ_j < μ_i] − rate_i [μ_j = μ_i, j ≤ i]
    of A, a:  key_i = −τ [μ_i > 0]  query_i = −τ if μ_i > 0 else −rate_i

The blocks of all sequences are listed in a table: sequence, first token in it, tokens, place of the first. Sequence n
has its blocks from slot ``offsets[n] // spacing + 2n`` on in a pack, ``n (T // spacing + 2)`` in a batch; slots that
are left over hold no tokens.

Matrices in memory are ``[..., D, D]``, taken ``SLICE`` rows at a time.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from mixers.backend import Config
from mixers.problem import Arrays, Problem
from mixers.spec import Array

from .blocks import upper_bits
from .kernel import INTERPRETED, block, dense, precision

NORM_EPS = tl.constexpr(1e-6)

_INTERPRETED = tl.constexpr(INTERPRETED)

# Mini-batches of fewer tokens want more digits.
SHORTEST = 16

# Width of a block of 64 rows: of products with 16 columns Triton 3.6 reads past the end of shared memory, and those
# with 32 are not trusted either.
NARROWEST = 64


@triton.jit
def long(stride, ALIGNED: tl.constexpr):
    """A stride in 64 bits; ALIGNED promises that rows start where 8 numbers can be read at once."""
    stride = stride.to(tl.int64)
    if ALIGNED:
        stride = tl.multiple_of(stride, 8)
    return stride


@triton.jit
def first_slot(n, first, tokens, spacing, PACKED: tl.constexpr):
    """The slot of a sequence's first block."""
    if PACKED:
        return first // spacing + 2 * n.to(tl.int64)
    return n.to(tl.int64) * (tokens // spacing + 2)


@triton.jit
def cut(t, place, length, CHUNK: tl.constexpr, ROWS: tl.constexpr, EVERY: tl.constexpr):
    """Tokens of the block that starts at ``t``: up to the end of a mini-batch, of the sequence, or to a checkpoint."""
    whole: tl.constexpr = max(ROWS // CHUNK, 1) * CHUNK
    rows = tl.minimum(tl.minimum(whole - place, ROWS), length - t)
    if EVERY > 0:
        rows = tl.minimum(rows, EVERY - t % EVERY)
    return rows


@triton.jit
def load_tile(base, stride, i, d, rows, WIDTH: tl.constexpr):
    """Rows below ``rows`` and columns below the width; zeros elsewhere."""
    return tl.load(base + i[:, None] * stride + d[None, :], mask=(i < rows)[:, None] & (d < WIDTH)[None, :], other=0.0)


@triton.jit
def store_tile(base, stride, i, d, rows, tile, WIDTH: tl.constexpr):
    """The other way round."""
    mask = (i < rows)[:, None] & (d < WIDTH)[None, :]
    tl.store(base + i[:, None] * stride + d[None, :], tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_columns(base, stride, i, d, rows, WIDTH: tl.constexpr):
    """What ``load_tile`` loads, its rows as columns."""
    return tl.load(base + i[None, :] * stride + d[:, None], mask=(i < rows)[None, :] & (d < WIDTH)[:, None], other=0.0)


@triton.jit
def store_columns(base, stride, i, d, rows, tile, WIDTH: tl.constexpr):
    """The other way round."""
    mask = (i < rows)[None, :] & (d < WIDTH)[:, None]
    tl.store(base + i[None, :] * stride + d[:, None], tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def approach(base, stride, back, D: tl.constexpr):
    """Ask for rows that will be loaded later, ``back`` before the base, so that they wait in the cache by then."""
    if not _INTERPRETED:
        line: tl.constexpr = 1024 // base.dtype.element_ty.primitive_bitwidth
        lines: tl.constexpr = max(D // line, 1)
        at = base - back[:, None] * stride + (tl.arange(0, lines) * line)[None, :]
        fetch: tl.constexpr = "prefetch.global.L2 [$1]; mov.b32 $0, 0;"
        tl.inline_asm_elementwise(fetch, "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def load_row(base, d, WIDTH: tl.constexpr):
    """One row, in float32."""
    return tl.load(base + d, mask=d < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def store_row(base, d, row, WIDTH: tl.constexpr):
    """One row."""
    tl.store(base + d, row.to(base.dtype.element_ty), mask=d < WIDTH)


@triton.jit
def load_affine(gain, gain_h, shift, shift_h, head, d, WIDTH: tl.constexpr):
    """The rows w and w_b; 1 and 0 where they were not given."""
    w = tl.where(d < WIDTH, 1.0, 0.0)
    if gain is not None:
        w = load_row(gain + head * gain_h, d, WIDTH)
    w_b = tl.zeros_like(w)
    if shift is not None:
        w_b = load_row(shift + head * shift_h, d, WIDTH)
    return w, w_b


@triton.jit
def load_rate(scale, place, CHUNK: tl.constexpr):
    """``token_scale`` at a place; 1/i, counted from 1, where none was given."""
    if scale is None:
        rate = 1.0 / (place + 1).to(tl.float32)
    else:
        rate = tl.load(scale + place % CHUNK).to(tl.float32)
    return rate


@triton.jit
def last_rate(scale, CHUNK: tl.constexpr):
    """τ, the rate at a mini-batch's end."""
    if scale is None:
        rate = 1.0 / CHUNK
    else:
        rate = tl.load(scale + (CHUNK - 1)).to(tl.float32)
    return rate


@triton.jit
def mini_batch(place, i, CHUNK: tl.constexpr):
    """μ and π of every token of a block."""
    at = (place + i).to(tl.int32)
    return at // CHUNK, at % CHUNK


@triton.jit
def completed(mu, end, CHUNK: tl.constexpr):
    """Which tokens' mini-batches end with the block, whose last token has place ``end − 1`` from the first's start."""
    return (mu + 1) * CHUNK <= end


@triton.jit
def copy(source, start, stride, target, WIDTH: tl.constexpr, D: tl.constexpr, SLICE: tl.constexpr):
    """A matrix in memory to another place, where its rows follow each other; zeros where there is none."""
    d = tl.arange(0, D)
    for begin in range(0, WIDTH, SLICE):
        s = begin + tl.arange(0, SLICE)
        tile = tl.zeros((SLICE, D), tl.float32)
        if source is not None:
            tile = load_tile(source + start, stride, s, d, WIDTH, WIDTH).to(tl.float32)
        store_tile(target, WIDTH, s, d, WIDTH, tile, WIDTH)


@triton.jit
def add_dot(sums, a, b, PRECISION: tl.constexpr):
    """``sums + A B``. "parts" takes float32 matrices as sums of two in bfloat16; inputs in bfloat16 have one part."""
    if PRECISION == "bf16":
        sums = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), sums)
    elif PRECISION == "parts":
        # Bits are cut off, not rounded: rounding one number at a time is what a GPU does slowest.
        left, right = a, b
        if a.dtype != tl.bfloat16:
            left = upper_bits(a, tl.bfloat16)
        if b.dtype != tl.bfloat16:
            right = upper_bits(b, tl.bfloat16)
        sums = tl.dot(left.to(tl.bfloat16), right.to(tl.bfloat16), sums)
        if a.dtype != tl.bfloat16:
            sums = tl.dot((a - left).to(tl.bfloat16), right.to(tl.bfloat16), sums)
        if b.dtype != tl.bfloat16:
            sums = tl.dot(left.to(tl.bfloat16), (b - right).to(tl.bfloat16), sums)
    else:
        sums = tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision=PRECISION)
    return sums


@triton.jit
def add_product(sums, x, stride, matrix, across, down, i, rows, WIDTH: tl.constexpr, D: tl.constexpr,
                SLICE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """``sums + X M``, X rows in memory and M a matrix in memory, element ``(r, s)`` at ``r·across + s·down``."""
    d = tl.arange(0, D)
    for start in range(0, WIDTH, SLICE):
        s = start + tl.arange(0, SLICE)
        part = load_tile(x, stride, i, s, rows, WIDTH)
        mask = (s < WIDTH)[:, None] & (d < WIDTH)[None, :]
        m = tl.load(matrix + s[:, None] * across + d[None, :] * down, mask=mask, other=0.0)
        sums = add_dot(sums, part, m, PRECISION)
    return sums


@triton.jit
def scores(x, x_stride, y, y_stride, i, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, SLICE: tl.constexpr,
           PRECISION: tl.constexpr):  # fmt: skip
    """``X Yᵀ`` of rows in memory."""
    sums = tl.zeros((ROWS, ROWS), tl.float32)
    for start in range(0, WIDTH, SLICE):
        s = start + tl.arange(0, SLICE)
        left = load_tile(x, x_stride, i, s, rows, WIDTH)
        right = load_tile(y, y_stride, i, s, rows, WIDTH)
        sums = add_dot(sums, left, tl.trans(right), PRECISION)
    return sums


@triton.jit
def earlier(mu, factor):
    """``factor [μ_j < μ_i]``."""
    return tl.where(mu[None, :] < mu[:, None], factor, 0.0)


@triton.jit
def same(mu, i):
    """Whether token j lies in token i's mini-batch, and not behind it."""
    return (mu[None, :] == mu[:, None]) & (i[None, :] <= i[:, None])


@triton.jit
def standardise(z, d, WIDTH: tl.constexpr, D: tl.constexpr):
    """``(z − mean)/std`` of every row, and 1/std."""
    z = z - (tl.sum(z, 1) * (1.0 / WIDTH))[:, None]
    if WIDTH < D:
        z = tl.where((d < WIDTH)[None, :], z, 0.0)
    spread = tl.sqrt_rn(tl.sum(z * z, 1) * (1.0 / WIDTH) + NORM_EPS)
    inverse = tl.div_rn(tl.full(spread.shape, 1.0, tl.float32), spread)
    return z * inverse[:, None], inverse


@triton.jit
def inner_gradient(z, squared, pull, beta, d, WIDTH: tl.constexpr, D: tl.constexpr):
    """E, x̂ and 1/std from Z; ``squared`` is w∘w and ``pull`` w∘(w_b − (V − K))."""
    x, inverse = standardise(z, d, WIDTH, D)
    h = squared[None, :] * x + pull
    mean = tl.sum(h, 1) * (1.0 / WIDTH)
    slope = tl.sum(h * x, 1) * (1.0 / WIDTH)
    write = (h - mean[:, None] - x * slope[:, None]) * (beta * inverse)[:, None]
    if WIDTH < D:
        write = tl.where((d < WIDTH)[None, :], write, 0.0)
    return write, x, inverse


@triton.jit
def _add_four(a, b, c, e, f, g, h, j):
    return a + f, b + g, c + h, e + j


@triton.jit
def _add_two(a, b, c, e):
    return a + c, b + e


@triton.jit
def sum_two(a, b):
    """Sums of columns, in one round through the warps."""
    if _INTERPRETED:
        return tl.sum(a, 0), tl.sum(b, 0)
    return tl.reduce((a, b), 0, _add_two)


@triton.jit
def _add_three(a, b, c, e, f, g):
    return a + e, b + f, c + g


@triton.jit
def sum_three(a, b, c):
    """Likewise."""
    if _INTERPRETED:
        return tl.sum(a, 0), tl.sum(b, 0), tl.sum(c, 0)
    return tl.reduce((a, b, c), 0, _add_three)


@triton.jit
def sum_four(a, b, c, e):
    """Likewise."""
    if _INTERPRETED:
        return tl.sum(a, 0), tl.sum(b, 0), tl.sum(c, 0), tl.sum(e, 0)
    return tl.reduce((a, b, c, e), 0, _add_four)


@triton.jit
def centre_columns(z, d, WIDTH: tl.constexpr, D: tl.constexpr):
    """``z − mean`` of every column."""
    z -= (tl.sum(z, 0) * (1.0 / WIDTH))[None, :]
    if WIDTH < D:
        z = tl.where((d < WIDTH)[:, None], z, 0.0)
    return z


@triton.jit
def column_gradient(z, w, pull, beta, gain, d, WIDTH: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr):
    """E and 1/std from the columns of Z and of ``pull``, w∘(w_b − (V − K)), both centred; ``gain`` None where w is 1.

    All sums over a column at once, since each is a way through all warps: h = w∘w∘x̂ + pull, x̂ = Z/std.
    """
    if gain is None:
        squares, slope = sum_two(z * z, pull * z)
        stretched = squares
    else:
        squared = (w * w)[:, None] * z
        squares, tilt, stretched, slope = sum_four(z * z, squared, squared * z, pull * z)
    variance = squares * (1.0 / WIDTH) + NORM_EPS
    if PRECISION == "ieee":
        inverse = tl.div_rn(tl.full(variance.shape, 1.0, tl.float32), tl.sqrt_rn(variance))
    else:
        inverse = tl.rsqrt(variance)
    slope = (stretched * inverse + slope) * inverse * (1.0 / WIDTH)
    if gain is None:
        steep = ((1.0 - slope) * inverse)[None, :] * z
    else:
        steep = (squared - (tilt * (1.0 / WIDTH))[None, :] - z * slope[None, :]) * inverse[None, :]
        if WIDTH < D:
            steep = tl.where((d < WIDTH)[:, None], steep, 0.0)
    return (steep + pull) * (beta * inverse)[None, :], inverse


@triton.jit
def project(p, x, d, WIDTH: tl.constexpr, D: tl.constexpr):
    """``P ⟂ x̂``, row by row."""
    p = p - (tl.sum(p, 1) * (1.0 / WIDTH))[:, None] - x * (tl.sum(p * x, 1) * (1.0 / WIDTH))[:, None]
    if WIDTH < D:
        p = tl.where((d < WIDTH)[None, :], p, 0.0)
    return p


@triton.jit
def column_adjoint(de, h, x, level, w, gain, beta, inverse, d, WIDTH: tl.constexpr, D: tl.constexpr):
    """From dE to dZ, by columns: h centred, ``level`` the mean of h∘x̂, ``gain`` None where w is 1."""
    part: tl.constexpr = 1.0 / WIDTH
    gamma = de * (beta * inverse)[None, :]
    mean, slope, along = sum_three(gamma, gamma * x, gamma * h)
    mean, slope = mean * part, slope * part
    along = along * part - level * slope
    if gain is None:
        steep = slope * (1.0 + NORM_EPS * inverse * inverse - 2.0 * level) + along
        dz = (gamma - mean[None, :]) * (1.0 - level)[None, :] - h * slope[None, :] - x * steep[None, :]
    else:
        dx = (w * w)[:, None] * (gamma - mean[None, :] - x * slope[None, :])
        dx -= gamma * level[None, :] + h * slope[None, :]
        mean, steep = sum_two(dx, dx * x)
        dz = dx - (mean * part)[None, :] - x * (steep * part + along)[None, :]
    dz *= inverse[None, :]
    if WIDTH < D:
        dz = tl.where((d < WIDTH)[:, None], dz, 0.0)
    return dz


def multiplied(problem: Problem, adjoint: bool, rates: bool = False) -> str:
    """How products are computed; see ``add_dot``. ``rates`` asks for the gradient of ``token_scale``.

    bfloat16 asks less of y than of gradients: the layer norm makes y nearly blind to the size of E, so that the
    gradients of beta and of the rates are what is left of sums that cancel. Two parts of bfloat16 keep beta's.
    Three tf32 products keep what is left for the rates, and the digits that float16 has and one tf32 product has not.
    Mini-batches of a few tokens learn so often from what they have just read that they want more digits throughout.
    """
    if problem.dtype == "float32":
        return precision(problem)
    short = problem.option["chunk_size"] < SHORTEST
    if problem.dtype == "float16" or (adjoint and (short or rates)):
        return "tf32x3"
    return "parts" if adjoint or short else "bf16"


@dataclass(frozen=True)
class Layout:
    """What both passes hand to their kernels: constants, and how the blocks lie in scratch.

    Attributes:
        constants: the ``constexpr`` arguments that all kernels share.
        join: blocks of ``learn`` that are one to ``read``, which wants fewer weights.
        operand: the dtype of W and E in scratch.
        slots: blocks of all sequences, and a few to spare.
        spacing: tokens between a sequence's slots, at least.
        resident: whether W stays on chip.
        launch: warps and stages.
    """

    constants: dict[str, Any]
    join: int
    operand: torch.dtype
    slots: int
    spacing: int
    resident: bool
    launch: dict[str, int]

    @classmethod
    def of(cls, problem: Problem, config: Config, x: Arrays, adjoint: bool) -> "Layout":
        """The layout of a call."""
        s, chunk, every, rows = (
            problem.sizes,
            problem.option["chunk_size"],
            problem.flags.checkpoint_every,
            config["rows"],
        )
        full = min(max(rows // chunk, 1) * chunk, rows)
        # Blocks that are cut short: at the end of a long mini-batch, before and behind a checkpoint.
        carry = chunk > rows or every > 0
        join = 1 if adjoint or carry or s.K <= NARROWEST // 2 else 2
        a_token = 1 / (join * full) + (chunk > rows) / chunk + (2 / every if every else 0)
        spacing = max(1, int(1 / a_token))
        multiply = multiplied(problem, adjoint, rates=x.get("token_scale") is not None)
        operand = torch.bfloat16 if multiply == "bf16" else torch.float32
        # Tiles of true float32 products, which no tensor core computes, must be small.
        wide, exact = operand == torch.float32, multiply == "ieee"
        # Where 8 warps add slices of 32 rows to a matrix in memory that its block does not fill, Triton 3.6 stores the
        # first one alone.
        gaps = multiply == "parts" and 128 < s.K < block(s.K)
        constants = {
            "WIDTH": s.K,
            "D": block(s.K),
            "SLICE": 64 if gaps else 32 if wide or s.K > 128 else block(s.K),
            "ROWS": rows,
            "CHUNK": chunk,
            "CARRY": carry,
            "PACKED": problem.packed,
            "ALIGNED": _aligned(x),
            "PRECISION": multiply,
        }
        launch = {"num_warps": config["num_warps"], "num_stages": config["num_stages"]}
        widest = 64 if exact else 128
        return cls(constants, join, operand, s.B * (s.T // spacing) + 2 * s.N, spacing, widest >= s.K, launch)


def _aligned(x: Arrays) -> bool:
    """Whether every row of what is read by rows starts where 8 numbers can be read at once."""
    tensors = (dense(x[name]) for name in ("q", "k", "v", "initial.weight", "initial.weight_sum"))
    return x["q"].shape[-1] % 8 == 0 and all(stride % 8 == 0 for t in tensors for stride in t.stride()[:-1])


@dataclass(frozen=True)
class Scratch:
    """What ``learn`` leaves behind; see there."""

    table: Array
    counts: Array
    weights: Array
    sums: Array
    biases: Array
    bias_sums: Array
    write: Array
