"""CPU kernels compiled by Numba: explicit SIMD, parallel over batch and heads, forward and backward.

Light to import: the kernels, and Numba with them, load when a plan is made. Where JAX is imported, kernels run inside
of its programs too.
"""

import importlib.util
import sys
from importlib import import_module
from typing import Any

from mixers.backend import Kernel, Place, Support

_FAMILIES = ("delta", "delta_chunk", "lattice", "lattice_chunk", "ttt", "attention")


class NumbaBackend:
    """See ``mixers.backend.Backend``."""

    name = "numba"
    summary = "any CPU, NumPy, torch and JAX arrays"
    preference = 10
    recomputes = False
    place = Place(("numpy", "torch", "jax"), ("cpu",))
    libraries = ("numba", "llvmlite", "numpy")

    def status(self) -> Support:
        """Whether Numba can be imported."""
        if importlib.util.find_spec("numba") is None:
            return Support.no("numba is not installed: pip install numba")
        return Support.yes()

    def kernels(self) -> tuple[Kernel, ...]:
        """All kernels, in order of preference; imports Numba."""
        families = (*_FAMILIES, "xla") if "jax" in sys.modules else _FAMILIES
        return tuple(kernel for family in families for kernel in import_module(f".{family}", __package__).KERNELS)

    def compile_only(self, capability: int) -> None:
        """See ``mixers.backend.Backend``; for the CPU of this machine."""
        import_module(".ahead", __package__).compile_only()

    def primitives(self) -> dict[str, Any]:
        """Kernels that compositions call; see ``mixers.packed``."""
        return {"packed_attention": import_module(".packed_attention", __package__).PRIMITIVE}


backend = NumbaBackend()
