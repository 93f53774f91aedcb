"""What the kernels of Lattice share: objectives, and the first directions of slots.

    d_ij = cos(π (i + ½)(j + ½)/n) / ‖·‖        n = max(K, V)        Σ_{j<V} cos² = V/2 + sin(2Vφ)/(4 sin φ), φ = π(2i+1)/(2n)

which is ``mixers.algebra.unit_directions``, one element at a time: only a slot of which nothing is left asks.
"""

import math

import numpy as np

from .folds import cospi
from .source import cuda

OBJECTIVES = {"decoding": 0, "encoding": 1, "similarity": 2}
DECODING, ENCODING, SIMILARITY = 0, 1, 2


def first_direction(K, V, real):
    """``direction(i, j)``: an element; slots that only fill a tile up are the first unit vector."""
    number, size = np.dtype(real).type, max(K, V)
    zero, one = number(0), number(1)

    def direction(i, j):
        found = one if i >= K and j == 0 else zero
        if i < K and j < V:
            odd = np.int64(2 * i + 1)
            # sin x = cos(x − π/2), in units of π.
            turns = odd * 2 * V % (4 * size)
            square = V / 2 + cospi(turns / (2.0 * size) - 0.5) / (4 * cospi(odd / (2.0 * size) - 0.5))
            found = number(cospi(odd * (2 * j + 1) % (8 * size) / (4.0 * size)) / math.sqrt(square))
        return found

    return cuda.jit(device=True)(direction)
