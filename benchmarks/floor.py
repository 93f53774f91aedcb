"""The least time that a problem could take on this machine: its bytes at the measured copy rate, its operations at the
measured matrix product rate, whichever is longer.
"""

import functools
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.case import Case

REPEATS = 7


@dataclass(frozen=True)
class Rates:
    """What a device was seen to do.

    Attributes:
        copy: bytes a second, read and written ones together.
        matmul: floating-point operations a second in a large matrix product of the dtype.
    """

    copy: float
    matmul: float

    def floor(self, case: Case) -> float:
        """Seconds that a case takes at the very least."""
        return max(case.bytes / self.copy, case.flops / self.matmul)


@functools.cache
def measure(device: str = "cpu", dtype: str = "float32") -> Rates:
    """Copy and matrix product rate of a device; a few hundred milliseconds, once a process."""
    return _measure_gpu(dtype) if device == "cuda" else _measure_cpu(dtype)


def _best(run: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _measure_cpu(dtype: str) -> Rates:
    """NumPy's own product; the copy is split over all cores. Half precision is computed in float32 here."""
    kind = np.float64 if dtype == "float64" else np.float32
    workers = cores()
    source, target = np.ones(1 << 26, np.float32), np.zeros(1 << 26, np.float32)
    parts = list(zip(np.array_split(source, workers), np.array_split(target, workers), strict=True))
    with ThreadPoolExecutor(workers) as pool:
        seconds = _best(lambda: list(pool.map(lambda part: np.copyto(part[1], part[0]), parts)))
    copy = 2 * source.nbytes / seconds
    matmul = 0.0
    for size in (1024, 2048):
        a = np.random.default_rng(0).standard_normal((size, size)).astype(kind)
        out = np.empty_like(a)
        matmul = max(matmul, 2 * size**3 / _best(lambda a=a, out=out: np.matmul(a, a, out=out)))
    return Rates(copy, matmul)


def _measure_gpu(dtype: str) -> Rates:
    import torch

    def seconds(run: Callable[[], Any]) -> float:
        run()
        times = []
        for _ in range(REPEATS):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return min(times)

    source = torch.ones(1 << 28, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / seconds(lambda: target.copy_(source))
    a = torch.randn(8192, 8192, device="cuda", dtype=getattr(torch, dtype))
    return Rates(copy, 2 * 8192**3 / seconds(lambda: a @ a))
