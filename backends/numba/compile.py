"""How a Python function becomes a CPU kernel.

    @kernel
    def forward(q: In[4], k: In[4], offsets: Index[1], scale: Real, keep: Int, y: Out[4]):
        for item in prange(y.shape[0] * y.shape[2]):
            head(item, q, k, offsets, scale, keep, y)

The annotations are the signature, so a kernel compiles once for each of float32 and float64 and never for a layout:
inputs may be strided or read-only, outputs are C-contiguous. The same source is compiled twice, with and without
threads; ``forward(work, *arrays)`` takes the serial twin for little work and wherever threads are unsafe.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types

from . import threads
from .cache import DiskCache

# ``nnan`` and ``ninf`` stay out: they would let LLVM fold away the checks and the infinities that hard resets need.
FASTMATH = {"reassoc", "contract", "nsz", "arcp"}

# Waking the other threads costs about as much as this many multiply-adds on one.
SERIAL_WORK = 400_000

device = njit(fastmath=FASTMATH, error_model="numpy", nogil=True)
"""Compile a function that kernels call."""


class _Annotation:
    """One argument of a kernel: turns the working type into a Numba type."""

    def __init__(self, make: Callable[[types.Type], types.Type]) -> None:
        self.make = make


class _Arrays:
    """``In[4]``: an array annotation, subscripted by its number of axes."""

    def __init__(self, make: Callable[[types.Type, int], types.Type]) -> None:
        self._make = make

    def __getitem__(self, ndim: int) -> _Annotation:
        return _Annotation(lambda real: self._make(real, ndim))


def Parts(*parts: _Annotation) -> _Annotation:  # noqa: N802
    """Several arrays as one argument, a tuple."""
    return _Annotation(lambda real: types.Tuple([part.make(real) for part in parts]))


# ``Any``, so that a type checker takes ``In[4]`` as a type.
In: Any = _Arrays(lambda real, ndim: types.Array(real, ndim, "A", readonly=True))
Out: Any = _Arrays(lambda real, ndim: types.Array(real, ndim, "C"))
Index: Any = _Arrays(lambda real, ndim: types.Array(types.int64, ndim, "A", readonly=True))
Count: Any = _Arrays(lambda real, ndim: types.Array(types.int32, ndim, "A", readonly=True))
CountOut: Any = _Arrays(lambda real, ndim: types.Array(types.int32, ndim, "C"))
Int: Any = _Annotation(lambda real: types.int64)
Flag: Any = _Annotation(lambda real: types.boolean)
Real: Any = _Annotation(lambda real: real)


class Kernel:
    """A compiled function: ``kernel(work, *args)``, ``work`` in multiply-adds, ``args`` as annotated.

    The first argument is an array of the working type, float32 or float64, and decides which form runs.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        hints = inspect.get_annotations(function)
        self._hints = [hints[name] for name in inspect.signature(function).parameters]
        self._compiled: dict[tuple[np.dtype[Any], bool], Any] = {}

    def twin(self, dtype: Any, parallel: bool) -> Any:
        """The compiled form for ``dtype`` (float32 or float64), with or without threads."""
        key = (np.dtype(dtype), parallel)
        if key not in self._compiled:
            real = types.float32 if key[0] == np.float32 else types.float64
            dispatcher = njit(fastmath=FASTMATH, error_model="numpy", nogil=True, parallel=parallel)(self._function)
            dispatcher._cache = DiskCache(self._function, "parallel" if parallel else "serial")
            dispatcher.compile(types.void(*(hint.make(real) for hint in self._hints)))
            dispatcher.disable_compile()
            self._compiled[key] = dispatcher
        return self._compiled[key]

    def __call__(self, work: float, *args: Any) -> None:
        parallel = work > SERIAL_WORK and threads.parallel()
        self.twin(args[0].dtype, parallel)(*args)


kernel = Kernel
