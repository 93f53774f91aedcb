"""Pieces that kernels are made of: where a sequence lies, sound products, sums of decays.

offsets [N+1]   first token of each sequence of a pack; without one, sequence n is row n of the batch
"""

import triton
import triton.language as tl


@triton.jit
def span(n, tokens, offsets, PACKED: tl.constexpr):
    """Row of the batch, first token in it, and length of sequence n; 64 bits, for offsets into large tensors."""
    if PACKED:
        first = tl.load(offsets + n)
        return tl.zeros_like(first), first, tl.load(offsets + n + 1) - first
    return n.to(tl.int64), tl.zeros_like(n).to(tl.int64), tokens + tl.zeros_like(n).to(tl.int64)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """``a b`` in float32; float32 operands as PRECISION says."""
    return tl.dot(a, b, input_precision=PRECISION)
