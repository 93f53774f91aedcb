"""What kernels are written with, beside Numba's own language: typed memory, sums over lanes, vectors of shared memory.

    read = load("bfloat16")            read(address, index) -> float32; float64 where the kind is
    write = store("bfloat16")          write(address, index, value), rounded to nearest even
    total = sum_lanes(0, 3)            total(value): the sum over lanes that differ in bits 0 to 2, in every one of them
    swap = other_lane(4)               swap(value): the value of the lane whose number differs in bit 2
    quad(array, index)                 four neighbours of a shared array, in one access; index is a multiple of 4

Addresses are whole numbers, so that an array of any library costs a launch one number and a stride a number more. Each
name has a twin for Numba's simulator, which knows no addresses and no shuffles, and a warp there is four threads.
"""

from . import SIMULATED, WARP

KINDS = ("float64", "float32", "bfloat16", "float16")
COUNTS = ("int64", "int32", "int16", "int8", "bool", "uint8")

if SIMULATED:
    from .simulated import load, other_lane, quad, store, sum_lanes, warp_barrier
else:
    from .native import load, other_lane, quad, store, sum_lanes, warp_barrier

__all__ = ["COUNTS", "KINDS", "WARP", "load", "other_lane", "quad", "store", "sum_lanes", "warp_barrier"]
