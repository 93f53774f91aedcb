"""Rows of norm 1, nearly: ``x / sqrt(Σx² + eps)``, and the adjoint ``(dn − n ⟨n, dn⟩) / sqrt(Σx² + eps)``.

Roots and quotients are rounded correctly: in a row that has one direction alone, the adjoint's difference cancels.

x, n [B,T,G,K]
"""

import torch
import triton
import triton.language as tl

from mixers.delta import L2_EPS
from mixers.spec import Array

from .kernel import block, dense, place

ROWS = 16


@triton.jit(do_not_specialize=["rows", "tokens"])
def _forward(
    x, x_b, x_t, x_h, n, rows, tokens, heads, eps, K: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    r, c = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, BK)[None, :]
    inside = (r < rows) & (c < K)
    head, token = r % heads, r // heads
    at = (token // tokens) * x_b + (token % tokens) * x_t + head * x_h + c
    row = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    row = tl.div_rn(row, tl.sqrt_rn(tl.sum(row * row, axis=1, keep_dims=True) + eps))
    tl.store(n + r * K + c, row.to(n.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "tokens"])
def _backward(
    x, x_b, x_t, x_h, dn, dx, rows, tokens, heads, eps, K: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    r, c = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, BK)[None, :]
    inside = (r < rows) & (c < K)
    head, token = r % heads, r // heads
    at = (token // tokens) * x_b + (token % tokens) * x_t + head * x_h + c
    row = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    arriving = tl.load(dn + r * K + c, mask=inside, other=0.0).to(tl.float32)
    size = tl.sqrt_rn(tl.sum(row * row, axis=1, keep_dims=True) + eps)
    row = tl.div_rn(row, size)
    along = tl.sum(row * arriving, axis=1, keep_dims=True)
    tl.store(dx + r * K + c, ((arriving - row * along) / size).to(dx.dtype.element_ty), mask=inside)


def normalise(x: Array) -> Array:
    """The rows, normalised, in their own dtype."""
    n = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(_forward, dense(x), n)
    return n


def normalise_backward(x: Array, dn: Array, dx: Array) -> None:
    """Fill ``dx`` from the gradient of the normalised rows."""
    _launch(_backward, dense(x), dn, dx)


def _launch(kernel: object, x: Array, *rest: Array) -> None:
    batch, tokens, heads, width = x.shape
    rows = batch * tokens * heads
    if rows:
        kernel[(triton.cdiv(rows, ROWS),)](  # type: ignore[index]
            *place(x, 0, 1, 2), *rest, rows, tokens, heads, L2_EPS, K=width, BK=block(width), ROWS=ROWS
        )
