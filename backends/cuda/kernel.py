"""What every kernel of this backend has in common: which arrays it takes, and how it refuses others.

Kernels take arrays as the caller gave them: any strides, gates and states in any floating dtype. They keep nothing for
the backward, which computes the states again: memory is what a GPU is short of.
"""

import ctypes
import math
from abc import abstractmethod
from typing import Any

from mixers.backend import Kernel, Place, Support
from mixers.problem import Arrays, Problem
from mixers.spec import Array

from . import SIMULATED, driver
from .arrays import SIZES, address, kind, stream_of

# Multiprocessors that heuristics reckon with: those of an H100 or H200.
PROCESSORS = 132

# Where a caller who names this backend may have arrays: JAX's are served outside of jit, so ``auto`` leaves them alone.
_GPU, _SIMULATOR = Place(("torch", "jax", "cuda"), ("cuda",)), Place(("numpy", "torch", "jax"), ("cpu",))


class CudaKernel(Kernel):
    """A kernel on arrays of a GPU."""

    arrays = "any"
    batch_invariant = True

    def supports(self, problem: Problem) -> Support:
        """Whether the arrays are where it runs, and its widths fit."""
        place = (_SIMULATOR if SIMULATED else _GPU).holds(problem)
        if not place:
            return place
        _, _, key_dim, value_dim = problem.widths
        if key_dim < 1 or value_dim < 1:
            return Support.no(f"takes widths from 1 up, and K = {key_dim}, V = {value_dim}")
        return self.takes(problem)

    @abstractmethod
    def takes(self, problem: Problem) -> Support:
        """Whether the kernel runs this problem, once its arrays are in the right place."""


def real_of(problem: Problem) -> str:
    """The dtype of arithmetic."""
    return problem.compute_dtype


def blank_unused(problem: Problem, out: Arrays) -> None:
    """Zeros for checkpoints of a pack, whose rows behind the last one nobody fills."""
    for name, array in out.items():
        if problem.packed and name.startswith("checkpoint."):
            clear(array)


def clear(array: Array) -> None:
    """Queue zeros for a contiguous array."""
    size = SIZES[kind(array)] * math.prod(array.shape)
    if SIMULATED:
        ctypes.memset(address(array), 0, size)
    elif size:
        driver.clear(address(array), size, stream_of(array))


def counts(sizes: Any) -> tuple[int, int]:
    """Value heads, and how many of them share a key head."""
    return sizes.H, sizes.H // sizes.G
