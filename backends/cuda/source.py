"""``numba.cuda`` itself, and the little that it needs to be imported.

numba-cuda up to 0.30.4 registers ``np.row_stack``, a second name of ``np.vstack`` that NumPy 2.5 removed, and compiles
nothing without it: the name comes back for it. It is asked for late, when the first kernel is compiled, so it stays.
"""

import importlib.metadata

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
        np.row_stack = np.vstack  # type: ignore[attr-defined]


_lend_row_stack()

from numba import cuda  # noqa: E402

if SIMULATED:
    from numba.cuda.simulator import kernelapi as simulator

    intrinsic = None
else:
    from numba.cuda.extending import intrinsic

    simulator = None

__all__ = ["cuda", "intrinsic", "simulator"]
