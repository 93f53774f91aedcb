"""``numba.cuda`` itself, and the little that it needs to be imported.

numba-cuda up to 0.30.4 registers ``np.row_stack``, a second name of ``np.vstack`` that NumPy 2.5 removed, and cannot be
imported under it. The name is lent while it is imported; a numba-cuda that does without it never asks.
"""

import warnings

import numpy as np

from . import SIMULATED

_lend = not hasattr(np, "row_stack")
if _lend:
    np.row_stack = np.vstack
try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from numba import cuda
    if SIMULATED:
        intrinsic = None
    else:
        from numba.cuda.extending import intrinsic
finally:
    if _lend:
        del np.row_stack

__all__ = ["cuda", "intrinsic"]
