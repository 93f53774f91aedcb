"""Gradients of q, k or a gate from their parts: over blocks of a head, over heads of a group, back through a norm.

dx_i = Σ_p Σ_h parts[p, i, h]      with a norm, x̂ = x ρ, ρ = (Σx² + 1e-6)^−½:  dx = ρ (dx̂ − x̂ ⟨x̂, dx̂⟩)

parts [P,B,T,H,K]   x, dx [B,T,G,K]      a warp has a row of dx
"""

import math

import numpy as np

from .device import WARP, load, store, sum_lanes
from .source import cuda


def build(*, wide, warps, real, kind, target):
    """The kernel for rows of up to ``wide`` warps; ``target`` is the dtype of dx, ``kind`` that of x."""
    WIDE, W = wide, warps
    number = np.dtype(real).type
    zero, one, eps = number(0), number(1), number(1e-6)
    across = sum_lanes(0, WARP.bit_length() - 1)
    read, read_part, write = load(kind), load(real), store(target)

    def kernel(parts, count, apart, x, x_b, x_t, x_h, x_d, dx, rows, tokens, heads, group, K, norm):
        lane = cuda.threadIdx.x % WARP
        at = np.int64(cuda.blockIdx.x) * W + cuda.threadIdx.x // WARP
        here = at < rows
        where, head = at // heads, at % heads
        found = cuda.local.array(WIDE, number)
        given = cuda.local.array(WIDE, number)
        squares, dots = zero, zero
        for i in range(WIDE):
            row = i * WARP + lane
            total, value = zero, zero
            if here and row < K:
                for p in range(count):
                    for h in range(group):
                        total += read_part(parts, p * apart + (at * group + h) * K + row)
                if norm != 0:
                    value = number(read(x, where // tokens * x_b + where % tokens * x_t + head * x_h + row * x_d))
            found[i], given[i] = total, value
            squares += value * value
            dots += value * total
        if norm != 0:
            rho = one / number(math.sqrt(across(squares) + eps))
            dots = across(dots) * rho * rho
            for i in range(WIDE):
                found[i] = rho * (found[i] - given[i] * dots)
        for i in range(WIDE):
            row = i * WARP + lane
            if here and row < K:
                write(dx, at * K + row, found[i])

    return kernel
