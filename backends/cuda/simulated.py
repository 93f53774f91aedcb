"""The device functions of ``device`` in Numba's simulator, where a thread of a GPU is one of Python.

A sum over lanes goes through memory that the block shares, with a barrier of the warp on either side.
"""

import ctypes
import functools
import sys
import threading

import numpy as np

from . import WARP
from .source import simulator

_CELLS = {
    "float64": ctypes.c_double, "float32": ctypes.c_float, "bfloat16": ctypes.c_uint16, "float16": ctypes.c_uint16,
    "int64": ctypes.c_int64, "int32": ctypes.c_int32, "int16": ctypes.c_int16, "int8": ctypes.c_int8,
    "bool": ctypes.c_uint8, "uint8": ctypes.c_uint8,
}  # fmt: skip


def _cell(kind, address, index):
    cell = _CELLS[kind]
    return cell.from_address(int(address) + int(index) * ctypes.sizeof(cell))


@functools.cache
def load(kind):
    """See ``native.load``."""

    def read(address, index):
        found = _cell(kind, address, index).value
        if kind == "bfloat16":
            return np.uint32(found << 16).view(np.float32)
        if kind == "float16":
            return np.float32(np.uint16(found).view(np.float16))
        return np.dtype(kind).type(found) if kind.startswith("float") else int(found)

    return read


fetch = load


@functools.cache
def widen(kind):
    """See ``native.widen``: ``fetch`` found a number already."""
    return lambda number: number


@functools.cache
def store(kind):
    """See ``native.store``."""

    def write(address, index, value):
        if kind == "bfloat16":
            bits = int(np.float32(value).view(np.uint32))
            value = 0x7FFF if np.isnan(value) else bits + 0x7FFF + (bits >> 16 & 1) >> 16
        elif kind == "float16":
            value = int(np.float16(value).view(np.uint16))
        _cell(kind, address, index).value = value

    return write


_lanes: dict[int, float] = {}


def warp_barrier():
    """The lanes of a warp wait for each other; other warps may wait elsewhere meanwhile."""
    thread = threading.current_thread()
    barriers = vars(thread._manager)
    barriers.setdefault(f"warp {thread.threadIdx.x // WARP}", threading.Barrier(WARP)).wait()


@functools.cache
def other_lane(flip):
    """See ``native.other_lane``: every lane leaves its number for the others."""

    def swap(value):
        thread = threading.current_thread()
        _lanes[thread.threadIdx.x] = value
        warp_barrier()
        other = _lanes[thread.threadIdx.x ^ flip]
        warp_barrier()
        return other

    return swap


@functools.cache
def sum_lanes(first, last):
    """See ``native.sum_lanes``."""
    swaps = [other_lane(1 << bit) for bit in range(first, last)]

    def total(value):
        for swap in swaps:
            value = value + swap(value)
        return value

    return total


def cell(array, index):
    """See ``native.cell``."""
    return array[index]


def quad(array, index):
    """See ``native.quad``."""
    return array[index], array[index + 1], array[index + 2], array[index + 3]


class _Shared(simulator.FakeCUDAShared):
    """Numba's shared memory, but that one array is made where several threads ask for it at the same moment."""

    _one_at_a_time = threading.Lock()

    def array(self, shape, dtype, alignment=None):
        if shape == 0:
            return super().array(shape, dtype)
        caller = sys._getframe(1)
        where = caller.f_code.co_filename, caller.f_lineno
        with self._one_at_a_time:
            if where not in self._allocations:
                self._allocations[where] = np.empty(shape, dtype)
            return self._allocations[where]


simulator.FakeCUDAShared = _Shared
