"""The same kernels inside of XLA programs on a CPU: JAX arrays in and out, no Python while they run, no copies.

A kernel's Python half, which names its arrays and calls what is compiled, runs once, while JAX traces: on arrays that
hold nothing and note what happens to them. Each call of a compiled function becomes a call of XLA's foreign function
interface, whose handler is a C function by Numba; each sum of partial gradients becomes JAX's.

A handler reads from the frame that XLA passes the arrays of the call in the order of the compiled function's arguments,
before them two small ones with its whole and its real numbers.
"""

import threading
from typing import Any

import jax
import jax.numpy as jnp
import numba
import numpy as np
from numba import types

from mixers.arrays import ffi
from mixers.backend import Config, Kernel, Support
from mixers.problem import Arrays, Problem
from mixers.spec import Array

from . import compile as compiler
from . import threads
from .compile import _call
from .delta_chunk import KERNELS as DELTA
from .kernel import NumbaKernel
from .lattice import KERNELS as LATTICE
from .lattice_chunk import KERNELS as LATTICE_CHUNK


def _handler(kernel: Any, dtype: Any) -> Any:
    """A C function that XLA calls, for a compiled kernel in one dtype."""
    kinds = kernel._types(dtype)[2:]
    (result,) = kernel.compiled(dtype).overloads.values()
    address = result.library.get_pointer_to_function(result.fndesc.llvm_func_name)
    names = {"introduced": ffi.introduced(), "int64_at": ffi.int64_at, "_call": _call, "address": address, "np": np}
    lines = [
        "def handler(frame):",
        "    if introduced(frame):",
        "        return 0",
        f"    args, results = int64_at(frame + {ffi.ARGS}), int64_at(frame + {ffi.RESULTS})",
    ]
    real = getattr(types, np.dtype(dtype).name)

    def take(name: str, source: str, place: int, ndim: int, kind: Any) -> None:
        names[f"{kind}_{ndim}"] = ffi.array_at(kind, ndim)
        lines.append(f"    {name} = {kind}_{ndim}({source} + {8 * place})")

    take("whole", "args", 0, 1, types.int32)
    take("reals", "args", 1, 1, real)
    inputs, outputs, numbers, fractions, values = 2, 0, 2, 0, []
    for i, kind in enumerate(kinds):
        if isinstance(kind, types.Array):
            index = kind.dtype == types.int64
            written = kind.mutable
            place, source = (outputs, "results") if written else (inputs, "args")
            take(f"a{i}", source, place, kind.ndim, types.int32 if kind.dtype in (types.int32, types.int64) else real)
            if index:
                lines.append(f"    a{i} = a{i}.astype(np.int64)")
            outputs, inputs = outputs + written, inputs + (not written)
            values.append(f"a{i}")
        elif kind in (types.float32, types.float64):
            values.append(f"reals[{fractions}]")
            fractions += 1
        else:
            values.append(f"bool(whole[{numbers}])" if kind == types.boolean else f"np.int64(whole[{numbers}])")
            numbers += 1
    lines.append(f"    values = ({', '.join(values)},)")
    if threads.parallel():
        names["launch"] = kernel.launcher(np.dtype(dtype))[0]
        lines += ["    if whole[1]:", "        launch(address, np.int64(whole[0]), values)", "        return 0"]
    lines += ["    _call(address, np.int64(0), np.int64(whole[0]), values)", "    return 0"]
    exec("\n".join(lines), names)
    return numba.cfunc(types.int64(types.int64), error_model="numpy")(names["handler"])


_handlers: dict[str, Any] = {}
_lock = threading.Lock()


def target(kernel: Any, dtype: Any) -> str:
    """The name under which XLA knows a compiled kernel."""
    family = kernel._function.__module__.rpartition(".")[2]
    name = f"sequence_mixers.{family}.{kernel._function.__qualname__}.{np.dtype(dtype).name}"
    with _lock:
        if name not in _handlers:
            handler = _handler(kernel, np.dtype(dtype))
            ffi.register(name, handler, "cpu")
            _handlers[name] = handler
    return name


# Tracing a kernel's Python half.


class Hollow(np.ndarray):
    """An array without numbers: a sum into one is noted instead of made."""

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        (out,) = options.get("out", (None,))
        if ufunc is not np.add or method != "reduce" or out is None:
            raise NotImplementedError(f"{ufunc.__name__}.{method} on an array that is only traced")
        _notes.tape.sum(inputs[0], options.get("axis", 0), out)
        return out

    def __array_function__(self, function: Any, kinds: Any, args: Any, options: Any) -> Any:
        if function is not np.sum:
            return super().__array_function__(function, kinds, args, options)
        _notes.tape.sum(args[0], options["axis"], options["out"])
        return options["out"]


_notes = compiler.notes


def hollow(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that takes no memory until somebody writes to it, which nobody does."""
    return np.empty(shape, dtype).view(Hollow)


class Tape:
    """What a kernel's Python half did, turned into JAX as it goes: ``held`` maps memory to JAX arrays."""

    def __init__(self, dtype: str) -> None:
        self._dtype = np.dtype(dtype)
        self._held: dict[int, tuple[np.ndarray, Array]] = {}

    def hold(self, array: np.ndarray, value: Array) -> None:
        """The numbers of a hollow array."""
        self._held[_base(array).ctypes.data] = (_base(array), value)

    def filled(self, name: str, array: np.ndarray) -> Array:
        """The numbers of an array that a kernel should have filled."""
        if array.size and _base(array).ctypes.data not in self._held:
            raise NotImplementedError(f"nothing that was traced fills {name}")
        return self.value(array)

    def value(self, array: np.ndarray) -> Array:
        """The numbers of an array, or of any view of one."""
        if array.size == 0:
            return jnp.zeros(array.shape, array.dtype if array.dtype != np.int64 else np.int32)
        base = _base(array)
        held = self._held.get(base.ctypes.data)
        if held is None:
            return _constant(array)
        if array.flags.c_contiguous and array.size == base.size:
            return held[1].reshape(array.shape)
        start = (array.ctypes.data - base.ctypes.data) // array.itemsize
        places = np.full(array.shape, start)
        for axis, stride in enumerate(array.strides):
            steps = np.arange(array.shape[axis]) * (stride // array.itemsize)
            places += steps.reshape(-1, *(1,) * (array.ndim - axis - 1))
        return held[1].reshape(-1)[places]

    def call(self, kernel: Any, work: float, items: int, args: tuple[Any, ...]) -> None:
        """A compiled function ran."""
        kinds = kernel._types(self._dtype)[2:]
        whole: list[int] = [items, int(items > 1 and work > compiler.SERIAL_WORK)]
        reals: list[Any] = []
        inputs: list[Any] = []
        outputs: list[Any] = []
        for kind, arg in zip(kinds, args, strict=True):
            if isinstance(kind, types.Array):
                (outputs if kind.mutable else inputs).append(arg)
            elif kind in (types.float32, types.float64):
                reals.append(arg)
            else:
                whole.append(int(arg))
        shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in outputs]
        run = jax.ffi.ffi_call(target(kernel, self._dtype), shapes, vmap_method="sequential")
        numbers = np.asarray(whole, np.int32), np.asarray(reals, self._dtype)
        found = run(*numbers, *(self.value(a) for a in inputs))
        for array, value in zip(outputs, found, strict=True):
            if array.size:
                base = _base(array)
                if array.size != base.size or not array.flags.c_contiguous:
                    raise NotImplementedError("a kernel fills a part of an array")
                self.hold(array, value.reshape(base.shape))

    def sum(self, array: np.ndarray, axis: Any, out: np.ndarray) -> None:
        """Partial gradients were added."""
        self.hold(out, jnp.sum(self.value(array), axis=axis).reshape(_base(out).shape))


def _base(array: np.ndarray) -> np.ndarray:
    """The array whose memory a view shows."""
    while isinstance(array.base, np.ndarray) and array.base.size:
        array = array.base
    return array


def _constant(array: np.ndarray) -> Array:
    """Numbers known while tracing; zeros without memory stay without."""
    if array.strides and not any(array.strides):
        return jnp.full(array.shape, array.flat[0], array.dtype)
    return jnp.asarray(np.asarray(array))


class InXLA(Kernel):
    """A kernel of NumPy arrays on JAX arrays of a CPU."""

    arrays = "jax"
    batch_invariant = True

    def __init__(self, kernel: NumbaKernel) -> None:
        self._kernel = kernel
        self.name = f"{kernel.name}.xla"
        self.form = kernel.form
        self.mixers = kernel.mixers

    def supports(self, problem: Problem) -> Support:
        """Whether the arrays are JAX's on a CPU, and the kernel's Python half asks for no numbers of theirs."""
        if problem.library != "jax" or problem.device != "cpu":
            return Support.no(f"takes JAX arrays on a CPU, not {problem.library} arrays on {problem.device}")
        if problem.flags.checkpoint_every:
            return Support.no("checkpoints are placed in Python, and XLA calls it without any")
        if not all(problem.widths):
            return Support.no("takes widths from 1 up")
        return self._kernel.takes(problem)

    def configs(self, problem: Problem) -> tuple[Config, ...]:
        """The kernel's own."""
        return self._kernel.configs(problem)

    def forward(self, problem: Problem, config: Config, x: Arrays, out: Arrays) -> None:
        """See ``Kernel``: puts arrays into ``out``."""
        shapes = {name: (shape, _working(problem, dtype)) for name, (shape, dtype) in problem.outputs().items()}
        tape, hollows = self._tape(problem, x)
        wanted = {name: hollow(*about) for name, about in shapes.items()}
        with _noting(tape):
            self._kernel.forward(problem, config, hollows, wanted)
        out |= {name: tape.filled(name, array) for name, array in wanted.items()}

    def backward(self, problem: Problem, config: Config, x: Arrays, out: Arrays, dout: Arrays, dx: Arrays) -> None:
        """See ``Kernel``: puts arrays into ``dx``."""
        tape, hollows = self._tape(problem, x)
        shapes = problem.outputs()
        before = {name: hollow(shape, _working(problem, dtype)) for name, (shape, dtype) in shapes.items()}
        for name, value in out.items():
            tape.hold(before[name], value)
        flows = {name: hollow(a.shape, problem.compute_dtype) for name, a in dout.items()}
        for name, value in dout.items():
            tape.hold(flows[name], value.astype(problem.compute_dtype))
        wanted = {n: hollow(a.shape, a.dtype) for n, a in hollows.items() if a is not None and a.dtype.kind == "f"}
        with _noting(tape):
            self._kernel.backward(problem, config, hollows, before, flows, wanted)
        dx |= {name: tape.filled(name, array) for name, array in wanted.items()}

    def _tape(self, problem: Problem, x: Arrays) -> tuple[Tape, Arrays]:
        """Hollow arrays in place of JAX's, in the working dtype, every optional one named."""
        tape = Tape(problem.compute_dtype)
        hollows: Arrays = dict.fromkeys(("offsets", *(a.name for a in problem.spec.inputs)))
        given = dict(x)
        for f in problem.spec.state(problem.option).fields:
            if f.counter and f"initial.{f.name}" not in given:
                given[f"initial.{f.name}"] = jnp.zeros(problem.sizes.shape(f.axes), jnp.int32)
        for name, value in given.items():
            counts = not jnp.issubdtype(value.dtype, jnp.floating)
            dtype = "int64" if name == "offsets" else "int32" if counts else problem.compute_dtype
            hollows[name] = hollow(value.shape, dtype)
            tape.hold(hollows[name], value.astype("int32" if counts else dtype))
        return tape, hollows


def _working(problem: Problem, dtype: str) -> str:
    return "int32" if dtype == "int32" else problem.compute_dtype


class _noting:
    """Calls of compiled functions go to a tape, in this thread."""

    def __init__(self, tape: Tape) -> None:
        self._tape = tape

    def __enter__(self) -> None:
        _notes.tape = self._tape

    def __exit__(self, *error: object) -> None:
        _notes.tape = None


KERNELS = tuple(InXLA(kernel) for kernel in (*DELTA, *LATTICE, *LATTICE_CHUNK))
