"""Arrays as numbers: where they lie, how far apart their elements are, on which stream they are used.

    torch tensors        the current stream of their device
    ``View``             any other array of a GPU: the stream of its owner
    NumPy arrays         in the simulator

Nothing is copied and nothing waited for.
"""

import sys
from typing import Any

import numpy as np

from mixers.arrays.view import View
from mixers.spec import Array

# Bytes of an element, by the name of its dtype.
SIZES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "bfloat16": 2, "float16": 2, "int16": 2}


def _is_tensor(array: Array) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def address(array: Array) -> int:
    """Where an array's first element lies; 0 for None."""
    if array is None:
        return 0
    found: int
    if _is_tensor(array):
        found = array.data_ptr()
    elif isinstance(array, View):
        found = array.address
    else:
        found = array.__array_interface__["data"][0]
    return found


def strides(array: Array) -> tuple[int, ...]:
    """Elements from one to the next, along every axis."""
    if _is_tensor(array):
        found: tuple[int, ...] = array.stride()
        return found
    if isinstance(array, View):
        return array.strides
    return tuple(step // array.itemsize for step in array.strides)


def kind(array: Array) -> str:
    """The name of an array's dtype; empty for None."""
    if array is None:
        return ""
    found = _names.get(array.dtype)
    if found is None:
        found = _names[array.dtype] = str(array.dtype).removeprefix("torch.")
    return found


_names: dict[Any, str] = {}


def place(array: Array, axes: int) -> tuple[int, ...]:
    """An array as a kernel's arguments: its address and the strides of so many axes, zeros for those it has not."""
    if array is None:
        return (0,) * (axes + 1)
    if not axes:
        return (address(array),)
    steps = strides(array)[:axes]
    return (address(array), *steps, *(0,) * (axes - len(steps)))


def token(array: Array, axes: int) -> tuple[int, ...]:
    """As ``place`` of an array with a single token, without the step from token to token."""
    base, batch, _, *rest = place(array, axes)
    return base, batch, *rest


def device_of(array: Array) -> int:
    """The number of the GPU that holds an array."""
    index: int = array.device.index if _is_tensor(array) else array.device
    return index


def stream_of(array: Array) -> int:
    """The stream on which the caller works now."""
    if _is_tensor(array):
        handle: int = sys.modules["torch"]._C._cuda_getCurrentRawStream(array.device.index)
        return handle
    stream: int = array.stream
    return stream


def empty(shape: tuple[int, ...], dtype: str, like: Array) -> Array:
    """An array beside another, in its library, to be filled."""
    if _is_tensor(like):
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
    return like.make(shape, dtype) if isinstance(like, View) else np.empty(shape, dtype)
