"""The same kernels inside of XLA programs on a GPU: JAX arrays in and out, no Python while they run, no copies.

A kernel's Python half, which makes scratch and launches what is compiled, runs once, while JAX traces: on torch tensors
of the device ``meta``, which have a shape and no memory, under a ``Tape`` that notes each launch instead of making it.
What was noted becomes one call of XLA's foreign function interface: inputs are its arguments, scratch and outputs its
results. What torch itself computes in between, as the sum over a group of heads, becomes JAX's.

The launches travel with the call, as whole numbers:

    how many, then for each   0, buffer, offset, bytes                                               fill with zeros
                         or   1, kernel, three of grid, threads, shared memory, arguments, then for each
                                                      buffer, offset   or   −1, bits of a number

and a handler compiled by Numba hands them to the driver, on XLA's stream. A kernel is named by the hash of its binary:
a program that XLA has kept on disk finds it again once the same call is traced.
"""

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import inspect
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numba
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mixers.algebra import unit_directions
from mixers.arrays import ffi, gpu
from mixers.backend import Config, Kernel, Support
from mixers.problem import Arrays, Problem
from mixers.spec import Array

from .delta import KERNELS as DELTA
from .delta_chunk import KERNELS as DELTA_CHUNK
from .kernel import INTERPRETED, TritonKernel, _probe
from .lattice import KERNELS as LATTICE
from .lattice_chunk import KERNELS as LATTICE_CHUNK
from .lattice_slots import directions
from .ttt import KERNELS as TTT

META = torch.device("meta")
TARGET = "sequence_mixers.triton"

# Kinds of operations, and of arguments.
_ZEROS, _LAUNCH, _NUMBER = 0, 1, -1

# Arguments of a kernel, at most; places for compiled kernels, at most half of which are taken.
_MOST, _PLACES = 128, 1 << 14

# The attribute of cuda.h that lets a kernel have more shared memory than a program may assume.
_SHARED_MEMORY = 8


# Compiled kernels, where the handler finds them: pairs of a hash and the driver's handle.
_kernels = np.zeros((_PLACES, 2), np.int64)
_libraries: list[Any] = []
_lock = threading.RLock()


def loaded(name: str, binary: bytes, shared: int) -> int:
    """A compiled kernel, made known to the driver and to the handler, as the number that names it."""
    key = int.from_bytes(hashlib.sha256(name.encode() + binary).digest()[:8], "little") >> 1 or 1
    with _lock:
        place = key % _PLACES
        while _kernels[place, 0] not in (0, key):
            place = (place + 1) % _PLACES
        if _kernels[place, 0] == 0:
            if np.count_nonzero(_kernels[:, 0]) > _PLACES // 2:
                raise RuntimeError(f"more than {_PLACES // 2} kernels in one process")
            _kernels[place, 1] = _load(name, binary, shared)
            _kernels[place, 0] = key
    return key


def _load(name: str, binary: bytes, shared: int) -> int:
    """A handle that is good on every device."""
    gpu.start()
    library, kernel, devices = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int()
    gpu.call("cuLibraryLoadData", ctypes.byref(library), binary, None, None, 0, None, None, 0)
    gpu.call("cuLibraryGetKernel", ctypes.byref(kernel), library, name.encode())
    gpu.call("cuDeviceGetCount", ctypes.byref(devices))
    for device in range(devices.value):
        gpu.call("cuKernelSetAttribute", _SHARED_MEMORY, shared, kernel, device)
    _libraries.append((library, binary))
    assert kernel.value is not None
    return kernel.value


_Start = ctypes.CFUNCTYPE(
    ctypes.c_int32, ctypes.c_int64, *(ctypes.c_uint32,) * 7, *(ctypes.c_int64,) * 3
)  # cuLaunchKernel
_Fill = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int64, ctypes.c_uint8, ctypes.c_int64, ctypes.c_int64)


def handler(start: Any, fill: Any, stream_of: Any) -> Any:
    """A C function for XLA, from C functions as the driver's ``cuLaunchKernel`` and ``cuMemsetD8Async``."""
    introduced = ffi.introduced()
    failed = ffi.failure("a Triton kernel did not start: unknown, or refused by the driver")
    int64_at, put_int64, words = ffi.int64_at, ffi.put_int64, ffi.words
    args_count, args, results, attributes = ffi.ARGS_COUNT, ffi.ARGS, ffi.RESULTS, ffi.ATTRIBUTES
    array_data, buffer_data, table = ffi.ARRAY_DATA, ffi.BUFFER_DATA, _kernels.ctypes.data

    @numba.njit
    def address(frame, buffer, offset):
        count = int64_at(frame + args_count)
        source = int64_at(frame + args) + 8 * buffer
        if buffer >= count:
            source = int64_at(frame + results) + 8 * (buffer - count)
        return int64_at(int64_at(source) + buffer_data) + offset

    @numba.njit
    def kernel_of(key):
        place = key % _PLACES
        while int64_at(table + 16 * place) != key:
            if int64_at(table + 16 * place) == 0:
                return 0
            place = (place + 1) % _PLACES
        return int64_at(table + 16 * place + 8)

    def handle(frame):
        if introduced(frame):
            return 0
        numbers, pointers = words(_MOST), words(_MOST)
        stream = stream_of(frame)
        at = int64_at(int64_at(int64_at(frame + attributes)) + array_data)
        left = int64_at(at)
        at += 8
        while left > 0:
            left -= 1
            if int64_at(at) == _ZEROS:
                begin = address(frame, int64_at(at + 8), int64_at(at + 16))
                if fill(begin, 0, int64_at(at + 24), stream) != 0:
                    return failed(frame)
                at += 32
                continue
            kernel = kernel_of(int64_at(at + 8))
            x, y, z, threads = int64_at(at + 16), int64_at(at + 24), int64_at(at + 32), int64_at(at + 40)
            shared, count = int64_at(at + 48), int64_at(at + 56)
            at += 64
            for i in range(count):
                buffer, value = int64_at(at), int64_at(at + 8)
                put_int64(numbers + 8 * i, value if buffer == _NUMBER else address(frame, buffer, value))
                put_int64(pointers + 8 * i, numbers + 8 * i)
                at += 16
            if kernel == 0 or start(kernel, x, y, z, threads, 1, 1, shared, stream, pointers, 0) != 0:
                return failed(frame)
        return 0

    return numba.cfunc(numba.types.int64(numba.types.int64))(handle)


@functools.cache
def _registered() -> Any:
    """The handler, known to XLA."""
    driver = gpu.library()
    start = _Start(ctypes.cast(driver.cuLaunchKernel, ctypes.c_void_p).value or 0)
    fill = _Fill(ctypes.cast(driver.cuMemsetD8Async, ctypes.c_void_p).value or 0)
    found = handler(start, fill, ffi.stream_of())
    ffi.register(TARGET, found, "CUDA")
    return found


# Tracing a kernel's Python half.


@dataclass(frozen=True)
class Launch:
    """A kernel that is to run: as it was launched, and how it was compiled (a hash, threads, shared memory)."""

    function: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    compiled: tuple[int, int, int] = (0, 0, 0)
    types: dict[str, str] = dataclasses.field(default_factory=dict)

    def tensors(self) -> Iterator[torch.Tensor]:
        """What it reads or writes."""
        return (a for a in self.arguments.values() if isinstance(a, torch.Tensor))


@dataclass(frozen=True)
class Zeros:
    """Memory that is to be filled with zeros."""

    tensor: torch.Tensor

    def tensors(self) -> Iterator[torch.Tensor]:
        """What it writes."""
        return iter((self.tensor,))


Operation = Launch | Zeros


class Tape(TorchDispatchMode):
    """What a kernel's Python half did, turned into JAX as it goes: memory is known by its storage."""

    def __init__(self) -> None:
        super().__init__()
        self._whole: dict[int, torch.Tensor] = {}
        self._values: dict[int, Array] = {}
        self._given: set[int] = set()
        self._noted: list[Operation] = []

    def give(self, value: Array, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor that stands for a JAX array, which no kernel writes."""
        shape = value.shape if dtype is None else value.shape[:-1]
        tensor = torch.empty(shape, dtype=dtype or getattr(torch, str(value.dtype)), device=META)
        self.know(tensor, value)
        return tensor

    def know(self, tensor: torch.Tensor, value: Array) -> None:
        """The numbers of a tensor that no kernel writes."""
        key = _key(tensor)
        self._whole[key], self._values[key] = tensor, value
        self._given.add(key)

    def blank(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """A tensor that is to be filled."""
        tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=META)
        self._whole[_key(tensor)] = tensor
        return tensor

    def value(self, tensor: torch.Tensor) -> Array:
        """The numbers of a tensor, or of any view of one."""
        if not tensor.numel():
            return jnp.zeros(tensor.shape, _dtype(tensor))
        self._flush()
        key = _key(tensor)
        if key not in self._values:
            raise NotImplementedError("nothing that was traced fills a tensor")
        whole, value = self._whole[key], self._values[key]
        if tensor.is_contiguous() and tensor.numel() == whole.numel():
            return value.reshape(tensor.shape)
        places = np.full(tuple(tensor.shape), tensor.storage_offset())
        for axis, stride in enumerate(tensor.stride()):
            places += (np.arange(tensor.shape[axis]) * stride).reshape(-1, *(1,) * (tensor.ndim - axis - 1))
        return value.reshape(-1)[places]

    def hold(self, tensor: torch.Tensor, value: Array) -> None:
        """The numbers that JAX computed for a tensor."""
        whole = self._whole.setdefault(_key(tensor), tensor)
        if tensor.numel() != whole.numel() or not tensor.is_contiguous():
            raise NotImplementedError("a part of a tensor is filled")
        self._values[_key(tensor)] = jnp.broadcast_to(value, tensor.shape).astype(_dtype(tensor)).reshape(whole.shape)

    def launch(self, launch: Callable[..., Any], function: Any, args: Any, grid: Any, options: dict[str, Any]) -> None:
        """A kernel was launched; ``launch`` is how Triton does it."""
        if not all(grid):
            return
        signature = inspect.signature(function.fn)
        constants = {name: value for name, value in options.items() if name not in signature.parameters}
        bound = signature.bind(*args, **{name: v for name, v in options.items() if name in signature.parameters})
        bound.apply_defaults()
        noted = Launch(function, tuple(grid), dict(bound.arguments), constants)
        if not INTERPRETED:
            found = launch(function, *args, grid=grid, warmup=True, **options)
            about = found.metadata
            if about.num_ctas != 1 or getattr(about, "global_scratch_size", 0):
                raise NotImplementedError("a kernel of several blocks that work together, or with scratch of its own")
            key = loaded(found.name, found.kernel, about.shared)
            compiled = (key, 32 * about.num_warps, about.shared)
            noted = dataclasses.replace(noted, compiled=compiled, types=found.src.signature)
        self._noted.append(noted)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), options: Any = None) -> Any:
        """torch was asked for something, of a tensor that has no memory."""
        found = function(*args, **(options or {}))
        name = function._schema.name.removeprefix("aten::")
        if function.is_view or name == "_unsafe_view":
            return found
        if name in _BLANK or name in _FILLED:
            self._whole.setdefault(_key(found), found)
            if name in _FILLED and found.numel():
                self._noted.append(Zeros(found))
            return found
        if name not in _COMPUTED:
            raise NotImplementedError(f"{name} of torch on tensors that are only traced")
        sources = args[1:] if name == "copy_" else args
        values = [self.value(a) if isinstance(a, torch.Tensor) else a for a in sources]
        self.hold(found, _COMPUTED[name](*values))
        return found

    def _flush(self) -> None:
        """Make a call of everything that was noted since the last one."""
        noted, self._noted = self._noted, []
        if not noted:
            return
        keys = list(dict.fromkeys(_key(t) for operation in noted for t in operation.tensors()))
        known = [key for key in keys if key in self._values]
        kept = [key for key in known if key not in self._given]  # filled by an earlier call, and may be filled again
        filled = kept + [key for key in keys if key not in self._values]
        shapes = [_shape(self._whole[key]) for key in filled]
        buffers = {key: len(known) + i for i, key in enumerate(filled)} | {key: i for i, key in enumerate(known)}
        given = [self._values[key] for key in known]
        if INTERPRETED:
            found = jax.pure_callback(_Interpreter(self._whole, noted, known, filled), shapes, *given, **_ONE_BY_ONE)
        else:
            _registered()
            aliases = {known.index(key): i for i, key in enumerate(kept)}
            call = jax.ffi.ffi_call(TARGET, shapes, input_output_aliases=aliases, **_ONE_BY_ONE)
            found = call(*given, launches=_written(noted, buffers))
        self._values |= dict(zip(filled, found, strict=True))


_ONE_BY_ONE: Any = {"vmap_method": "sequential"}

# What torch may be asked for beside views: memory, memory with zeros, and what JAX computes instead.
_BLANK = frozenset(("empty", "empty_like", "empty_strided", "new_empty"))
_FILLED = frozenset(("zeros", "zeros_like", "new_zeros", "zero_"))
_COMPUTED: dict[str, Callable[..., Array]] = {
    "clone": lambda a: a,
    "_to_copy": lambda a: a,
    "copy_": lambda a, *rest: a,
    "add": lambda a, b: a + b,
    "sum": lambda a, axes=None, *rest: jnp.sum(a, axes if axes is None else tuple(axes)),
}


def _key(tensor: torch.Tensor) -> int:
    """Whose memory a tensor shows."""
    key: int = tensor.untyped_storage()._cdata
    return key


def _offset(tensor: torch.Tensor) -> int:
    """Bytes before a tensor's first number."""
    return int(tensor.storage_offset()) * tensor.element_size()


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shape(tensor: torch.Tensor) -> jax.ShapeDtypeStruct:
    """What XLA makes of a tensor; it has no 64-bit numbers without x64, so they are pairs."""
    if tensor.dtype == torch.int64:
        return jax.ShapeDtypeStruct((*tensor.shape, 2), jnp.int32)
    return jax.ShapeDtypeStruct(tuple(tensor.shape), jnp.dtype(_dtype(tensor)))


def _written(noted: list[Operation], buffers: dict[int, int]) -> np.ndarray:
    """Operations as whole numbers; see above."""
    numbers = [len(noted)]
    for operation in noted:
        if isinstance(operation, Zeros):
            tensor = operation.tensor
            numbers += [_ZEROS, buffers[_key(tensor)], _offset(tensor), tensor.numel() * tensor.element_size()]
            continue
        key, threads, shared = operation.compiled
        arguments = [
            _argument(operation.arguments[n], kind, buffers)
            for n, kind in operation.types.items()
            if kind != "constexpr"
        ]
        arguments += [(_NUMBER, 0)] * 2  # memory of a kernel's own, and a profiler's: none
        assert len(arguments) <= _MOST
        grid = (*operation.grid, 1, 1)[:3]
        numbers += [_LAUNCH, key, *grid, threads, shared, len(arguments), *(n for pair in arguments for n in pair)]
    return np.asarray(numbers, np.int64)


def _argument(value: Any, kind: str, buffers: dict[int, int]) -> tuple[int, int]:
    """A buffer and an offset, or the bits of a number."""
    if isinstance(value, torch.Tensor):
        return buffers[_key(value)], _offset(value)
    if kind in ("fp32", "f32"):
        return _NUMBER, struct.unpack("<i", struct.pack("<f", value))[0]
    if kind[0] not in "iu":
        raise NotImplementedError(f"an argument of type {kind}")
    return _NUMBER, int(value)


class _Interpreter:
    """The same operations in Triton's interpreter, on NumPy's memory."""

    def __init__(
        self, whole: dict[int, torch.Tensor], noted: list[Operation], known: list[int], filled: list[int]
    ) -> None:
        self._whole, self._noted, self._known, self._filled = dict(whole), noted, known, filled

    def __call__(self, *given: Any) -> list[np.ndarray]:
        memory = {key: np.array(value) for key, value in zip(self._known, given, strict=True)}
        for key in self._filled:
            about = _shape(self._whole[key])
            memory.setdefault(key, np.full(about.shape, 77, about.dtype))

        def tensor(of: Any) -> Any:
            if not isinstance(of, torch.Tensor):
                return of
            flat = torch.from_numpy(memory[_key(of)].reshape(-1).view(np.uint8)).view(of.dtype)
            return torch.as_strided(flat, of.shape, of.stride(), of.storage_offset())

        for operation in self._noted:
            if isinstance(operation, Zeros):
                tensor(operation.tensor).zero_()
            else:
                arguments = {name: tensor(value) for name, value in operation.arguments.items()}
                operation.function.run(grid=operation.grid, warmup=False, **arguments, **operation.constants)
        return [memory[key] for key in self._filled]


@contextlib.contextmanager
def _noting(tape: Tape) -> Iterator[None]:
    """Launches of this thread go to a tape."""
    kind, thread = type(_probe), threading.get_ident()
    with _lock:
        launch = kind.run

        def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            if threading.get_ident() != thread or warmup:
                return launch(self, *args, grid=grid, warmup=warmup, **options)
            return tape.launch(launch, self, args, grid, options)

        kind.run = run
        try:
            with tape:
                yield
        finally:
            kind.run = launch


class InXLA(Kernel):
    """A kernel of torch tensors on JAX arrays."""

    arrays = "jax"
    batch_invariant = True

    def __init__(self, kernel: TritonKernel) -> None:
        self._kernel = kernel
        self.name = f"{kernel.name}.xla"
        self.form = kernel.form
        self.mixers = kernel.mixers

    def supports(self, problem: Problem) -> Support:
        """Whether the arrays are JAX's, and the kernel's Python half asks for no numbers of theirs."""
        if problem.library != "jax":
            return Support.no(f"takes JAX arrays, not {problem.library} arrays")
        if problem.packed and problem.flags.checkpoint_every:
            return Support.no("checkpoints of a pack are placed by torch, and XLA calls it without any")
        if not (INTERPRETED or torch.cuda.is_available()):
            return Support.no("compiles for the GPU that torch finds, and this torch finds none")
        return self._kernel.supports(self._as_torch(problem))

    def suits(self, problem: Problem) -> bool:
        """As the kernel."""
        return self._kernel.suits(self._as_torch(problem))

    def configs(self, problem: Problem) -> tuple[Config, ...]:
        """The kernel's own."""
        return self._kernel.configs(self._as_torch(problem))

    def forward(self, problem: Problem, config: Config, x: Arrays, out: Arrays) -> None:
        """See ``Kernel``: puts arrays into ``out``."""
        tape = Tape()
        tensors = _given(tape, problem, x)
        shapes = {name: about for name, about in problem.outputs().items() if not name.startswith("kept.")}
        wanted = {name: tape.blank(shape, dtype) for name, (shape, dtype) in shapes.items()}
        with _noting(tape):
            self._kernel.forward(self._as_torch(problem), config, tensors, wanted)
        out |= {name: tape.value(tensor) for name, tensor in wanted.items()}

    def backward(self, problem: Problem, config: Config, x: Arrays, out: Arrays, dout: Arrays, dx: Arrays) -> None:
        """See ``Kernel``: puts arrays into ``dx``."""
        tape = Tape()
        tensors = _given(tape, problem, x)
        flows = {name: tape.give(value) for name, value in dout.items()}
        wanted = {n: tape.blank(a.shape, str(a.dtype)) for n, a in x.items() if jnp.issubdtype(a.dtype, jnp.floating)}
        with _noting(tape):
            self._kernel.backward(self._as_torch(problem), config, tensors, {}, flows, wanted)
        dx |= {name: tape.value(tensor) for name, tensor in wanted.items()}

    def _as_torch(self, problem: Problem) -> Problem:
        return dataclasses.replace(problem, library="torch")


def _given(tape: Tape, problem: Problem, x: Arrays) -> dict[str, Any]:
    """Tensors in place of JAX arrays, every optional one named, and the constants that kernels ask for."""
    tensors: dict[str, Any] = dict.fromkeys(("offsets", *(a.name for a in problem.spec.inputs)))
    given = dict(x)
    for f in problem.spec.state(problem.option).fields:
        if f.counter and f"initial.{f.name}" not in given:
            given[f"initial.{f.name}"] = jnp.zeros(problem.sizes.shape(f.axes), jnp.int32)
    offsets = given.pop("offsets", None)
    if offsets is not None:
        pairs = jnp.stack([offsets.astype(jnp.int32), jnp.zeros_like(offsets, jnp.int32)], -1)
        tensors["offsets"] = tape.give(pairs, torch.int64)
    tensors |= {name: tape.give(value) for name, value in given.items()}
    if problem.spec.name == "lattice":
        s = problem.sizes
        tape.know(directions(problem, META), jnp.asarray(unit_directions(s.K, s.V), jnp.float32))
    return tensors


KERNELS = tuple(InXLA(kernel) for kernel in (*DELTA_CHUNK, *DELTA, *LATTICE_CHUNK, *LATTICE, *TTT))
