"""May a kernel run on several threads here?

Numba's thread layers differ: ``omp`` kills a forked child that enters it, ``workqueue`` aborts when two threads use it
at once, ``tbb`` minds neither. A kernel therefore runs on one thread in a forked process (a DataLoader worker) and
wherever only ``workqueue`` is left.
"""

import functools
import importlib
import os

from numba.core import config

_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@functools.cache
def layer() -> str:
    """The thread layer that Numba will take: ``tbb``, ``omp`` or ``workqueue``."""
    asked = config.THREADING_LAYER
    choices = config.THREADING_LAYER_PRIORITY if asked in ("default", "safe", "threadsafe", "forksafe") else [asked]
    for name in choices:
        with_module = {"tbb": "tbbpool", "omp": "omppool"}.get(name)
        if with_module is None:
            continue
        try:
            importlib.import_module(f"numba.np.ufunc.{with_module}")
        except ImportError:
            continue
        return name
    return "workqueue"


def parallel() -> bool:
    """Whether a kernel may spread over threads in this process."""
    return not _forked and config.NUMBA_NUM_THREADS > 1 and layer() != "workqueue"
