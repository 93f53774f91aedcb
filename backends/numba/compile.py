"""How a Python function becomes a CPU kernel.

    @kernel
    def forward(begin: Int, end: Int, q: In[4], k: In[4], offsets: Index[1], scale: Real, y: Out[4]):
        for item in range(begin, end):
            head(item, q, k, offsets, scale, y)

The annotations are the signature, so a kernel compiles once for each of float32 and float64 and never for a layout:
inputs may be strided or read-only, outputs are C-contiguous. ``forward(work, items, *arrays)`` spreads the items over
threads; for little work and wherever threads are unsafe it runs them here, one after another.
"""

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from . import threads
from .cache import DiskCache
from .part import PartCompiler

# ``nnan`` and ``ninf`` stay out: they would let LLVM fold away the checks and the infinities that hard resets need.
FASTMATH = {"reassoc", "contract", "nsz", "arcp"}

# Waking the other threads costs about as much as this many multiply-adds on one.
SERIAL_WORK = 400_000

_INNER: dict[str, Any] = {
    "fastmath": FASTMATH,
    "error_model": "numpy",
    "nogil": True,
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
    "pipeline_class": PartCompiler,
}

device = njit(**_INNER)
"""Compile a function that kernels call."""

leaf = njit(**_INNER, _nrt=False)
"""The same for a function that allocates nothing, and so need not count references, which costs as much as rows."""


class _Notes(threading.local):
    """Where calls of kernels are noted instead of made (see ``xla``): nowhere, unless a tape is set."""

    tape: Any = None


notes = _Notes()


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
    """A compiled function: ``kernel(work, items, *args)``, ``work`` in multiply-adds, ``args`` as annotated.

    The first of ``args`` is an array of the working type, float32 or float64, and decides which form runs.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        hints = inspect.get_annotations(function)
        self._hints = [hints[name] for name in inspect.signature(function).parameters]
        self._compiled: dict[np.dtype[Any], Any] = {}
        self._launchers: dict[np.dtype[Any], tuple[Any, int]] = {}

    def _types(self, dtype: np.dtype[Any]) -> list[types.Type]:
        real = types.float32 if dtype == np.float32 else types.float64
        return [hint.make(real) for hint in self._hints]

    def compiled(self, dtype: np.dtype[Any]) -> Any:
        """The function on items ``begin`` to ``end``, on this thread."""
        if dtype not in self._compiled:
            dispatcher = njit(fastmath=FASTMATH, error_model="numpy", nogil=True)(self._function)
            family = self._function.__module__.rpartition(".")[2]
            dispatcher._cache = DiskCache(f"{family}.{self._function.__qualname__}")
            dispatcher.compile(types.void(*self._types(dtype)))
            dispatcher.disable_compile()
            self._compiled[dtype] = dispatcher
        return self._compiled[dtype]

    def launcher(self, dtype: np.dtype[Any]) -> tuple[Any, int]:
        """What calls the function for every item, items side by side, and the address that it calls."""
        if dtype not in self._launchers:
            (result,) = self.compiled(dtype).overloads.values()
            address = result.library.get_pointer_to_function(result.fndesc.llvm_func_name)
            dispatcher = njit(nogil=True, parallel=True)(_launch)
            dispatcher._cache = DiskCache("launch")
            dispatcher.compile(types.void(types.int64, types.int64, types.Tuple(self._types(dtype)[2:])))
            dispatcher.disable_compile()
            self._launchers[dtype] = dispatcher, address
        return self._launchers[dtype]

    def __call__(self, work: float, items: int, *args: Any) -> None:
        if notes.tape is not None:
            notes.tape.call(self, work, items, args)
            return
        dtype = args[0].dtype
        if items > 1 and work > SERIAL_WORK and threads.parallel():
            launch, address = self.launcher(dtype)
            launch(address, items, args)
        else:
            self.compiled(dtype)(0, items, *args)


def _launch(address, items, args):
    for item in prange(items):
        _call(address, item, item + 1, args)


@intrinsic
def _call(typing_context, address, first, last, args):
    """Call the compiled function at an address: nothing of it is compiled again."""

    def emit(context, builder, signature, values):
        position, *rest = values
        kinds = (first, last, *args.types)
        pointer = context.call_conv.get_function_type(types.void, kinds).as_pointer()
        operands = [*rest[:-1], *cgutils.unpack_tuple(builder, rest[-1])]
        function = builder.inttoptr(position, pointer)
        status, _ = context.call_conv.call_function(builder, function, types.void, kinds, operands)
        with cgutils.if_unlikely(builder, status.is_error):
            context.call_conv.return_status_propagate(builder, status)
        return context.get_dummy_value()

    return types.void(address, first, last, args), emit


kernel = Kernel
