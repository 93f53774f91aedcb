"""CPUs, GPUs and TPUs through XLA: JAX arrays, in chunks or token by token, under every transformation of JAX.

Light to import: the kernels, and JAX with them, load when a plan is made.
"""

import importlib.util
from importlib import import_module

from mixers.backend import Kernel, Place, Support

_FAMILIES = ("delta_chunk", "lattice_chunk", "ttt_chunk", "attention", "steps")


class JaxBackend:
    """See ``mixers.backend.Backend``."""

    name = "jax"
    summary = "CPUs, GPUs and TPUs through XLA, JAX arrays"
    preference = 5
    recomputes = False
    place = Place(("jax",), ("cpu", "cuda", "tpu"))

    def status(self) -> Support:
        """Whether JAX can be imported."""
        if importlib.util.find_spec("jax") is None:
            return Support.no("jax is not installed: pip install 'sequence-mixers[jax]'")
        return Support.yes()

    def kernels(self) -> tuple[Kernel, ...]:
        """All kernels, in order of preference; imports JAX."""
        return tuple(kernel for family in _FAMILIES for kernel in import_module(f".{family}", __package__).KERNELS)


backend = JaxBackend()
