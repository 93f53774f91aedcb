"""What kernels are written with, beside Numba's own language: typed memory, sums over lanes, vectors of shared memory.

    read = load("bfloat16")            read(address, index) -> float32; float64 where the kind is
    bits = fetch("bfloat16")           the same in two parts, bits(address, index) and later number(what it found): a
    number = widen("bfloat16")         thread waits for memory where it first computes with what it loaded
    write = store("bfloat16")          write(address, index, value), rounded to nearest even
    total = sum_lanes(0, 3)            total(value): the sum over lanes that differ in bits 0 to 2, in every one of them
    swap = other_lane(4)               swap(value): the value of the lane whose number differs in bit 2
    cell(array, index)                 an element of a shared array
    quad(array, index)                 four neighbours of a shared array, in one access; index is a multiple of 4

Addresses are whole numbers, so that an array of any library costs a launch one number and a stride a number more. Each
name has a twin for Numba's simulator, which knows no addresses and no shuffles, and a warp there is four threads.
"""

import numpy as np

from . import SIMULATED, WARP

KINDS = ("float64", "float32", "bfloat16", "float16")
COUNTS = ("int64", "int32", "int16", "int8", "bool", "uint8")

if SIMULATED:
    from .simulated import cell, fetch, load, other_lane, quad, store, sum_lanes, warp_barrier, widen
else:
    from .native import cell, fetch, load, other_lane, quad, store, sum_lanes, warp_barrier, widen


def held(kind):
    """The NumPy type of a local array of what ``fetch`` finds."""
    return np.int32 if kind in ("bfloat16", "float16") and not SIMULATED else np.dtype(real(kind)).type


def real(kind):
    """The dtype in which numbers of a kind are computed with."""
    return "float64" if kind == "float64" else "float32"


__all__ = [
    "COUNTS",
    "KINDS",
    "WARP",
    "cell",
    "fetch",
    "held",
    "load",
    "other_lane",
    "quad",
    "store",
    "sum_lanes",
    "warp_barrier",
    "widen",
]
