"""Phases of a decoded batch to their pool, ``pool[out_slots[n]] = phases[n]``, once every block has read the old."""

import numpy as np

from .agreed import PHASE_THREADS
from .device import load, store
from .source import cuda


def build(*, slots, out_slots):
    """The kernel; both are dtypes of arrays."""
    read_slot, read_out_slot, read, write = load(slots), load(out_slots), load("int32"), store("int32")

    def kernel(phases, pool, pool_n, slots, slots_n, out_slots, out_slots_n, count):
        n = np.int64(cuda.blockIdx.x) * PHASE_THREADS + cuda.threadIdx.x
        if n < count:
            goes = read_out_slot(out_slots, n * out_slots_n)
            if read_slot(slots, n * slots_n) >= 0 and goes >= 0:
                write(pool, goes * pool_n, read(phases, n))

    return kernel
