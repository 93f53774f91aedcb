"""Arrays of any library as numbers: where they lie, how far apart their elements are, on which stream they are used.

    torch tensors                        the current stream of their device
    ``__cuda_array_interface__``         the stream that it names, else the default one
    NumPy arrays                         in the simulator

Nothing is copied and nothing waited for.
"""

import sys
from typing import Any

from mixers.spec import Array

# Bytes of an element, by the name of its dtype.
SIZES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "bfloat16": 2, "float16": 2, "int16": 2}
_CODES = {"f8": "float64", "f4": "float32", "f2": "float16", "i8": "int64", "i4": "int32", "i2": "int16", "i1": "int8"}
_CODES |= {"b1": "bool", "u1": "uint8"}


def _is_tensor(array: Array) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def _interface(array: Array) -> Any:
    """The description of a device array, or of a NumPy one, which has the same fields."""
    found = getattr(array, "__cuda_array_interface__", None)
    return array.__array_interface__ if found is None else found


def address(array: Array) -> int:
    """Where an array's first element lies; 0 for None."""
    if array is None:
        return 0
    found: int = array.data_ptr() if _is_tensor(array) else _interface(array)["data"][0]
    return found


def strides(array: Array) -> tuple[int, ...]:
    """Elements from one to the next, along every axis."""
    if _is_tensor(array):
        found: tuple[int, ...] = array.stride()
        return found
    about = _interface(array)
    if about.get("strides") is not None:
        size = int(about["typestr"][2:])
        return tuple(step // size for step in about["strides"])
    steps, step = [], 1
    for length in reversed(about["shape"]):
        steps.append(step)
        step *= length
    return tuple(reversed(steps))


def kind(array: Array) -> str:
    """The name of an array's dtype; empty for None."""
    if array is None:
        return ""
    found = _names.get(array.dtype)
    if found is None:
        found = _names[array.dtype] = _name(array)
    return found


_names: dict[Any, str] = {}


def _name(array: Array) -> str:
    if _is_tensor(array):
        return str(array.dtype).removeprefix("torch.")
    return _CODES[_interface(array)["typestr"][1:]]


def place(array: Array, axes: int) -> tuple[int, ...]:
    """An array as a kernel's arguments: its address and the strides of so many axes, zeros for those it has not."""
    if array is None:
        return (0,) * (axes + 1)
    if not axes:
        return (address(array),)
    steps = strides(array)[:axes]
    return (address(array), *steps, *(0,) * (axes - len(steps)))


def device_of(array: Array) -> int:
    """The number of the device that holds an array."""
    if _is_tensor(array):
        index: int = array.device.index
        return index
    return 0


def stream_of(array: Array) -> int:
    """The stream on which the caller works now."""
    if _is_tensor(array):
        handle: int = sys.modules["torch"]._C._cuda_getCurrentRawStream(array.device.index)
        return handle
    return _interface(array).get("stream") or 0


def empty(shape: tuple[int, ...], dtype: str, like: Array) -> Array:
    """An array beside another, in its library, to be filled."""
    if _is_tensor(like):
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
    namespace = sys.modules[type(like).__module__.partition(".")[0]]
    return namespace.empty(shape, dtype)
