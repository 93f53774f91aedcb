"""Arrays compared: which errs most, and by how much of what it may.

ratio = max over arrays of  max |got − wanted| / allowed(name, largest, overall)

Arrays are NumPy's, or torch's on both sides, which are compared on their device.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mixers.cases import Named
from mixers.spec import Array

EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""One unit in the last place of a number near 1."""

Allowed = Callable[[str, float, float], float]
"""The error that an array may have, from its name, its largest number and the largest of all arrays."""


@dataclass(frozen=True)
class Verdict:
    """What a case found.

    Attributes:
        ratio: the worst error over what is allowed; at most 1 where the law holds.
        reason: which array, its error and what is allowed.
    """

    ratio: float
    reason: str

    def __bool__(self) -> bool:
        return self.ratio <= 1


def compare(got: Mapping[str, Any], wanted: Mapping[str, Any], allowed: Allowed) -> Verdict:
    """The worst of all arrays; ``allowed(name, largest, overall)`` is the error that one may have: ``largest`` is the
    array's largest number, ``overall`` that of all arrays.

    An element that is not finite, where the wanted one is, is an infinite error.
    """
    worst = Verdict(0.0, "")
    overall = max((_largest(a) for a in wanted.values() if not _counts(a)), default=0.0)
    for name, truth in wanted.items():
        if name not in got:
            return Verdict(float("inf"), f"{name} is missing")
        if got[name].shape != truth.shape:
            return Verdict(float("inf"), f"{name} has shape {got[name].shape}, expected {truth.shape}")
        if 0 in truth.shape:
            continue
        if _counts(truth):
            error, limit, largest = _largest(got[name] - truth), 0.0, 1.0
        else:
            distance = abs(_wide(got[name]) - truth)
            error, largest = float(distance.max()), _largest(truth)
            if not error < math.inf:
                wrong = math.prod(distance.shape) - int((distance < math.inf).sum())
                return Verdict(float("inf"), f"{name} holds {wrong} numbers that are not finite")
            limit = allowed(name, largest, overall)
        ratio = error / limit if limit > 0 else (0.0 if error == 0 else float("inf"))
        if ratio > worst.ratio or not worst.reason:
            worst = Verdict(ratio, f"{name}: error {error:.2g}, allowed {limit:.2g}, largest number {largest:.2g}")
    return worst


def _counts(array: Array) -> bool:
    return "int" in str(array.dtype)


def _largest(array: Array) -> float:
    return float(abs(array).max()) if 0 not in array.shape else 0.0


def _wide(array: Array) -> Array:
    return array.astype(np.float64) if isinstance(array, np.ndarray) else array.double()


def worse(*verdicts: Verdict) -> Verdict:
    """The worst of several."""
    return max(verdicts, key=lambda v: v.ratio)


def errors(got: Named, truth: Named) -> dict[str, float]:
    """The largest absolute error of every array."""
    return {name: float(np.max(np.abs(got[name] - a))) if a.size else 0.0 for name, a in truth.items()}
