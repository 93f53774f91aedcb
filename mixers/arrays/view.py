"""Where the memory of an array lies: what kernels for GPUs need to know of arrays that are not torch's.

    __cuda_array_interface__       CuPy, Numba: the stream that it names, else the default one
    __dlpack__                     JAX and whoever else has it: handed over in the order of the default stream

Nothing is copied and nothing waited for.
"""

import ctypes
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mixers.arrays.gpu import DEFAULT_STREAM, device_of
from mixers.spec import Array


@dataclass(frozen=True, eq=False, slots=True)
class View:
    """Memory that somebody else owns.

    Attributes:
        address: of the first element.
        shape: as of any array.
        strides: elements from one to the next, along every axis.
        dtype: its name.
        device: the number of the GPU; −1 for the host's memory, which simulators work on.
        stream: on which the owner works.
        owner: what keeps the memory.
        make: ``make(shape, dtype) -> View``, more memory of the same library and device.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: int
    stream: int
    owner: Any
    make: "Callable[[tuple[int, ...], str], View]"

    def spread(self, count: int) -> "View":
        """The same along a new first axis."""
        return dataclasses.replace(self, shape=(count, *self.shape), strides=(0, *self.strides))


def dtype_name(array: Array) -> str:
    """``float32``, whichever library says so."""
    return str(array.dtype).rpartition(".")[2]


def dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous array."""
    steps, step = [], 1
    for length in reversed(shape):
        steps.append(step)
        step *= length
    return tuple(reversed(steps))


def by_interface(array: Array, make: Callable[[tuple[int, ...], str], View]) -> View:
    """An array with ``__cuda_array_interface__``."""
    about = array.__cuda_array_interface__
    shape, size, address = tuple(about["shape"]), int(about["typestr"][2:]), about["data"][0]
    steps = about.get("strides")
    return View(
        address=address,
        shape=shape,
        strides=dense(shape) if steps is None else tuple(step // size for step in steps),
        dtype=dtype_name(array),
        device=number_of(array, address),
        stream=about.get("stream") or DEFAULT_STREAM,
        owner=array,
        make=make,
    )


def number_of(array: Array, address: int | None = None) -> int:
    """The number of the GPU that holds an array: the library's own, else the driver's."""
    number: Any = getattr(getattr(array, "device", None), "id", None)
    if isinstance(number, int):
        return number
    if hasattr(array, "__dlpack_device__"):
        return int(array.__dlpack_device__()[1])
    return device_of(array.__cuda_array_interface__["data"][0] if address is None else address)


# dlpack.h: kinds of devices and of numbers.
ON_HOST, ON_CUDA = 1, 2
_LEGACY_STREAM = 1
_KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 6: "bool"}


class _Tensor(ctypes.Structure):
    """``DLTensor``."""

    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device", ctypes.c_int32),
        ("axes", ctypes.c_int32), ("kind", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("offset", ctypes.c_uint64),
    )  # fmt: skip


_unwrap = ctypes.pythonapi.PyCapsule_GetPointer
_unwrap.argtypes, _unwrap.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p


def by_dlpack(array: Array, make: Callable[[tuple[int, ...], str], View]) -> View:
    """An array with ``__dlpack__``; what comes later on the default stream waits for whoever fills it now."""
    host = array.__dlpack_device__()[0] == ON_HOST
    capsule = array.__dlpack__() if host else array.__dlpack__(stream=_LEGACY_STREAM)
    about = _Tensor.from_address(_unwrap(capsule, b"dltensor"))
    shape = tuple(about.shape[: about.axes])
    kind = _KINDS.get(about.kind, "unknown")
    return View(
        address=(about.data or 0) + about.offset,
        shape=shape,
        strides=tuple(about.strides[: about.axes]) if about.strides else dense(shape),
        dtype=kind if kind == "bool" else f"{kind}{about.bits}",
        device=-1 if host else about.device,
        stream=DEFAULT_STREAM,
        owner=(array, capsule),
        make=make,
    )
