"""NVIDIA GPUs through Triton: chunks on tensor cores, forward and backward, torch tensors in and out.

Light to import: the kernels, and Triton with them, load when a plan is made. Where JAX is imported, kernels run inside
of its programs too. With ``TRITON_INTERPRET=1`` the same
kernels run on CPU tensors in Triton's interpreter: slow, for tests, and only where ``backend="triton"`` asks for it.
"""

import contextlib
import ctypes
import importlib.util
import os
import sys
from importlib import import_module
from typing import Any

from mixers.backend import Kernel, Place, Support

_FAMILIES = ("delta_chunk", "delta", "lattice_chunk", "lattice", "ttt", "attention")
_PRIMITIVES = (
    "chosen_reads",
    "kept_rows",
    "packed_attention",
    "predictive_delta",
    "segment_weights",
    "state_reads",
    "ttt_mlp",
)


class TritonBackend:
    """See ``mixers.backend.Backend``."""

    name = "triton"
    summary = "NVIDIA GPUs, torch tensors and JAX arrays"
    preference = 20
    recomputes = True
    place = Place(("torch", "jax"), ("cuda",))
    libraries = ("torch", "triton")

    def status(self) -> Support:
        """Whether Triton and torch can be imported and there is a GPU, or its interpreter stands in for one."""
        for package in ("torch", "triton"):
            if importlib.util.find_spec(package) is None:
                return Support.no(f"{package} is not installed: pip install 'sequence-mixers[triton]'")
        if not _driver() and os.environ.get("TRITON_INTERPRET", "0") == "0":
            return Support.no("found no GPU driver; TRITON_INTERPRET=1 runs its kernels on a CPU, slowly, for tests")
        return Support.yes()

    def kernels(self) -> tuple[Kernel, ...]:
        """All kernels, in order of preference; imports Triton."""
        families = (*_FAMILIES, "xla") if "jax" in sys.modules else _FAMILIES
        return tuple(kernel for family in families for kernel in import_module(f".{family}", __package__).KERNELS)

    def primitives(self) -> dict[str, Any]:
        """Kernels that compositions call; see ``mixers.packed``."""
        return {name: import_module(f".{name}", __package__).PRIMITIVE for name in _PRIMITIVES}

    def compile_only(self, capability: int) -> None:
        """From now on compile what is launched, for a GPU that this process cannot see, and run nothing."""
        import_module(".ahead", __package__).compile_only(capability)


def _driver() -> bool:
    """Whether the library of a GPU's driver can be loaded; asks no device, and imports nothing heavy."""
    for name in ("libcuda.so.1", "libamdhip64.so"):
        with contextlib.suppress(OSError):
            ctypes.CDLL(name)
            return True
    return False


backend = TritonBackend()
