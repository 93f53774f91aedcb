"""What a call holds at its highest. Light to import: a process that times its imports asks for it too."""

import contextlib
import ctypes
import gc
import sys
from collections.abc import Callable
from typing import Any


def status(field: str) -> int:
    """A field of ``/proc/self/status`` in bytes: ``VmRSS`` now, ``VmHWM`` at its highest.

    Not ``ru_maxrss``: under Linux a child inherits its parent's.
    """
    with open("/proc/self/status") as lines:
        for line in lines:
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def forget_peak() -> None:
    """Start ``VmHWM`` anew; where the kernel does not let us, an earlier and higher peak counts against us."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak(run: Callable[[], Any], device: str) -> int | None:
    """Bytes at the highest of one call beyond what was held before it, its results among them; None where unknown.

    On a CPU they are the process's own pages: free ones are given back first, or their reuse would hide what is taken.
    """
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    forget_peak()
    before = status("VmRSS")
    result = run()
    highest = status("VmHWM") - before
    del result
    return max(highest, 0)
