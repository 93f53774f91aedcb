"""What every kernel of this backend has in common: where it runs, arrays that were left out, gradients in parts."""

import functools
from abc import abstractmethod
from typing import Any

import numpy as np

from mixers.backend import Kernel, Support
from mixers.problem import Arrays, Problem
from mixers.spec import Array

from . import backend


class NumbaKernel(Kernel):
    """A kernel on host memory."""

    arrays = "numpy"
    batch_invariant = True

    def supports(self, problem: Problem) -> Support:
        """Whether the arrays are on the CPU and the kernel takes the problem."""
        if problem.library == "jax":
            return Support.no("takes NumPy arrays; kernels named .xla take JAX's")
        return backend.place.holds(problem) and self.takes(problem)

    @abstractmethod
    def takes(self, problem: Problem) -> Support:
        """Whether the kernel runs this problem, once its arrays are on the CPU."""


def given(array: np.ndarray | None, ndim: int, dtype: Any) -> np.ndarray:
    """The array, or an empty one of ``ndim`` axes where it was left out: compiled kernels know no None."""
    return _empty(ndim, dtype) if array is None else array


@functools.cache
def _empty(ndim: int, dtype: Any) -> np.ndarray:
    return np.empty((0,) * ndim, dtype)


def heads_at_once(problem: Problem) -> int:
    """Heads among which work is shared out: those of one sequence, where nothing may depend on the batch."""
    s = problem.sizes
    return max(s.H if problem.flags.batch_invariant else s.N * s.H, 1)


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


def rows_of(array: Array) -> Array:
    """Checkpoints ``[B,P,H,K,V]`` as ``[B·P,H,K,V]``; None stays None."""
    return None if array is None else array.reshape(array.shape[0] * array.shape[1], *array.shape[2:])


def blank_unused(problem: Problem, x: Arrays, out: Arrays, names: tuple[str, ...]) -> None:
    """Zeros in the checkpoint rows behind the last one of a pack."""
    every, offsets = problem.flags.checkpoint_every, x.get("offsets")
    if every and offsets is not None:
        used = int(np.sum(np.diff(offsets) // every))
        for name in names:
            rows_of(out[name])[used:] = 0


def grouped(problem: Problem, dx: Arrays) -> tuple[Array, Array]:
    """Where dq and dk go, a value head each: the gradients themselves, or partial sums of a group."""
    s = problem.sizes
    if s.G == s.H:
        return dx["q"], dx["k"]
    shape = (s.B, s.T, s.H, s.K)
    return np.empty(shape, dx["q"].dtype), np.empty(shape, dx["k"].dtype)


def gather(problem: Problem, dx: Arrays, dq: Array, dk: Array) -> None:
    """Sum the partial gradients of a group of value heads."""
    s = problem.sizes
    if s.G != s.H:
        shape = (s.B, s.T, s.G, s.H // s.G, s.K)
        np.sum(dq.reshape(shape), axis=3, out=dx["q"])
        np.sum(dk.reshape(shape), axis=3, out=dx["k"])
