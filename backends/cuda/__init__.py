"""NVIDIA GPUs through Numba-CUDA: exact recurrences with the state in registers, and states decoded where they are.

Light to import: kernels load when a plan is made, and Numba only where one is not yet compiled. With
``NUMBA_ENABLE_CUDASIM=1`` the same kernels run on NumPy arrays and CPU tensors in Numba's simulator: slow, for tests,
and only where ``backend="cuda"`` asks for it.
"""

import importlib.util
import os
from importlib import import_module
from typing import Any

from mixers.backend import Kernel, Place, Support

# A simulator is chosen by Numba's own switch.
SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")

# Threads that exchange numbers; few are simulated, for each is one of Python's.
WARP = 4 if SIMULATED else 32

_FAMILIES = ("delta", "lattice", "ttt")
_PRIMITIVES = ("ham_step", "memory_step", "ttt_mlp_step")


class CudaBackend:
    """See ``mixers.backend.Backend``."""

    name = "cuda"
    summary = "NVIDIA GPUs, exact recurrences and decoding, arrays of any library"
    preference = 25
    recomputes = True
    place = Place(("torch", "cuda"), ("cuda",))
    libraries = ("numba", "numba-cuda")

    def status(self) -> Support:
        """Whether Numba-CUDA is installed and a driver found, or Numba's simulator stands in for both."""
        if importlib.util.find_spec("numba") is None:
            return Support.no("numba is not installed: pip install 'sequence-mixers[cuda]'")
        if SIMULATED:
            return Support.yes()
        if importlib.util.find_spec("numba_cuda") is None:
            return Support.no("numba-cuda is not installed: pip install 'sequence-mixers[cuda]'")
        from .driver import found

        if not found():
            return Support.no("found no GPU driver; NUMBA_ENABLE_CUDASIM=1 simulates one, slowly, for tests")
        return Support.yes()

    def kernels(self) -> tuple[Kernel, ...]:
        """All kernels, in order of preference."""
        return tuple(kernel for family in _FAMILIES for kernel in import_module(f".{family}", __package__).KERNELS)

    def primitives(self) -> dict[str, Any]:
        """Kernels that compositions call: a token of each at once."""
        return {name: import_module(f".{name}", __package__).PRIMITIVE for name in _PRIMITIVES}

    def compile_only(self, capability: int) -> None:
        """See ``mixers.backend.Backend``; as far as PTX."""
        import_module(".ahead", __package__).compile_only(capability)


backend = CudaBackend()
