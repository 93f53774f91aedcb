"""``numba.cuda`` itself, and the little that it needs to be imported.

numba-cuda up to 0.30.4 registers ``np.row_stack``, a second name of ``np.vstack`` that NumPy 2.5 removed, and compiles
nothing without it: the name comes back for it. It is asked for late, when the first kernel is compiled, so it stays.
"""

import importlib
import importlib.metadata
from typing import Any

import numpy as np

from . import SIMULATED

LAST_TO_ASK = (0, 30, 4)


def _lend_row_stack() -> None:
    """Give NumPy the name, where NumPy has none and numba-cuda asks for it."""
    if hasattr(np, "row_stack"):
        return
    try:
        version = importlib.metadata.version("numba-cuda")
    except importlib.metadata.PackageNotFoundError:
        return
    if tuple(int(part) for part in version.split(".")[:3] if part.isdigit()) <= LAST_TO_ASK:
        setattr(np, "row_stack", np.vstack)  # noqa: B010  its types know no such name


_lend_row_stack()

from numba import cuda  # noqa: E402

# One of the two has what the other stands in for.
intrinsic: Any = None if SIMULATED else importlib.import_module("numba.cuda.extending").intrinsic
simulator: Any = importlib.import_module("numba.cuda.simulator.kernelapi") if SIMULATED else None

__all__ = ["cuda", "intrinsic", "simulator"]
