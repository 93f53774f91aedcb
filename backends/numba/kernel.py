"""What every kernel of this backend has in common: where it runs, arrays that were left out, gradients in parts."""

from abc import abstractmethod
from typing import Any

import numpy as np

from mixers.backend import Kernel, Support
from mixers.problem import Problem


class NumbaKernel(Kernel):
    """A kernel on host memory."""

    arrays = "numpy"

    def supports(self, problem: Problem) -> Support:
        """Whether the arrays are on the CPU and the kernel takes the problem."""
        if problem.library not in ("numpy", "torch"):
            return Support.no(f"takes NumPy arrays and torch tensors, not those of {problem.library}")
        if problem.device != "cpu":
            return Support.no(f"runs on the CPU, and the arrays are on {problem.device}")
        return self.takes(problem)

    @abstractmethod
    def takes(self, problem: Problem) -> Support:
        """Whether the kernel runs this problem, once its arrays are on the CPU."""


def given(array: np.ndarray | None, ndim: int, dtype: Any) -> np.ndarray:
    """The array, or an empty one of ``ndim`` axes where it was left out: compiled kernels know no None."""
    return np.empty((0,) * ndim, dtype) if array is None else array


class Partial:
    """A gradient that work items write in ``parts`` summands, added in order: no atomics, always the same bits.

    Attributes:
        array: where the summands go, ``[parts, ...]``; None where the gradient is not wanted.
    """

    def __init__(self, gradient: np.ndarray | None, parts: int) -> None:
        self._gradient, self._parts = gradient, parts
        self.array: np.ndarray | None = None
        if gradient is not None:
            self.array = gradient[None] if parts == 1 else np.empty((parts, *gradient.shape), gradient.dtype)

    def add_up(self) -> None:
        """Add the summands."""
        if self._gradient is not None and self.array is not None and self._parts != 1:
            np.add.reduce(self.array, axis=0, out=self._gradient)
