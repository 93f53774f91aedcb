"""What every kernel of this backend has in common: where it runs, and how it names what it has computed.

A kernel of JAX arrays is a pure function: ``out`` and ``dx`` come empty and it puts arrays into them. What it needs for
the backward it puts into ``out`` as ``kept.*``, under names of its own.
"""

import functools
from abc import abstractmethod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mixers.backend import Kernel, Support
from mixers.problem import Arrays, Problem
from mixers.spec import Array

from . import backend


class JaxKernel(Kernel):
    """A kernel on JAX arrays."""

    arrays = "jax"

    def supports(self, problem: Problem) -> Support:
        """Whether the arrays are JAX's and the kernel takes the problem."""
        place = backend.place.holds(problem)
        if not place:
            return place
        if not _present(problem.device):
            return Support.no(f"JAX finds no {problem.device} on this machine")
        _, _, key_dim, value_dim = problem.widths
        if key_dim < 1 or value_dim < 1:
            return Support.no(f"takes widths from 1 up, and K = {key_dim}, V = {value_dim}")
        return self.takes(problem)

    @abstractmethod
    def takes(self, problem: Problem) -> Support:
        """Whether the kernel runs this problem, once its arrays are in the right place."""


@functools.cache
def _present(device: str) -> bool:
    try:
        return bool(jax.devices(device))
    except RuntimeError:  # JAX's answer for a kind that it has no support for
        return False


def wide(problem: Problem, array: Array) -> Array:
    """The array in the dtype of arithmetic."""
    return array.astype(problem.compute_dtype)


def precision(problem: Problem) -> lax.Precision:
    """How products are computed: half precision may round its operands to tf32, float32 only where it is allowed."""
    exact = problem.dtype in ("float32", "float64") and not problem.flags.allow_tf32
    return lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT


def floating(x: Arrays) -> Arrays:
    """The arrays that have gradients."""
    return {name: a for name, a in x.items() if a is not None and jnp.issubdtype(a.dtype, jnp.floating)}


def spread(problem: Problem, array: Array) -> Array:
    """Key heads ``[B,T,G,K]`` repeated for the value heads that share them."""
    times = problem.sizes.H // problem.sizes.G
    return array if times == 1 else jnp.repeat(array, times, axis=2)


def fields(problem: Problem) -> tuple[str, ...]:
    """The names of a state's floating arrays."""
    return tuple(f.name for f in problem.spec.state(problem.option).fields if not f.counter)


def flowing(problem: Problem, dout: Arrays, prefix: str, shapes: Any) -> tuple[Array, ...] | None:
    """Gradients of final states or of checkpoints; None where nothing flows back through any of them."""
    given = [dout.get(f"{prefix}.{name}") for name in fields(problem)]
    if all(g is None for g in given):
        return None
    dtype = problem.compute_dtype
    return tuple(jnp.zeros(s, dtype) if g is None else wide(problem, g) for g, s in zip(given, shapes, strict=True))
