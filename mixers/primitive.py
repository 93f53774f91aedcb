"""Operations of compositions for which a backend may have kernels: what they take, what they return, who serves them.

A backend lists its kernels by the name of a primitive, as ``backend.primitives()``. A composition calls ``run``, and
goes another way where that finds none.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from mixers.backend import installed
from mixers.spec import Array

Shapes = tuple[tuple[tuple[Any, ...], str], ...]


@dataclass(frozen=True)
class Primitive:
    """What an operation takes and returns.

    Attributes:
        name: as in ``backend.primitives()``.
        takes: arrays that gradients may reach; any but the first three may be None.
        fixed: arrays that no gradient reaches.
        results: what it returns.
        shapes: shape and dtype of every result, ``f(x, fixed, dtype, how)``, ``dtype`` being that of the first array.
        flows: the results through which gradients come back; none where it serves only calls that ask for no gradient.
    """

    name: str
    takes: tuple[str, ...]
    fixed: tuple[str, ...]
    results: tuple[str, ...]
    shapes: Callable[[tuple[Array, ...], tuple[Array, ...], str, str], Shapes]
    flows: tuple[str, ...]


class PrimitiveKernel(Protocol):
    """A backend's kernel of a primitive.

    Attributes:
        arrays: the libraries whose arrays it takes.
    """

    arrays: tuple[str, ...]

    def serves(self, dtype: str, device: str, widths: tuple[int, int]) -> bool:
        """Whether it runs on arrays of a dtype and device, of these widths of keys and values."""

    def forward(self, x: tuple[Array, ...], fixed: tuple[Array, ...], factor: float, how: str) -> tuple[Array, ...]:
        """The results."""

    def backward(
        self,
        x: tuple[Array, ...],
        fixed: tuple[Array, ...],
        factor: float,
        how: str,
        out: tuple[Array, ...],
        dout: tuple[Array, ...],
    ) -> tuple[Array, ...]:
        """Gradients of ``x``, None for what was None; ``dout`` holds those of the results that flow, never None."""


@functools.lru_cache(maxsize=256)
def find(
    name: str, backend: str, library: str, dtype: str, device: str, widths: tuple[int, int]
) -> PrimitiveKernel | None:
    """The kernel of the backend that is asked for, or of the best one that works where the arrays are."""
    for found in sorted(installed().values(), key=lambda b: -b.preference):
        primitives = getattr(found, "primitives", None)
        if backend not in ("auto", found.name) or primitives is None or not found.status():
            continue
        if library not in found.place.libraries or (backend == "auto" and device not in found.place.devices):
            continue
        kernel: PrimitiveKernel | None = primitives().get(name)
        if kernel is not None and library in kernel.arrays and kernel.serves(dtype, device, widths):
            return kernel
    return None


def alike(library: Any, wide: str, *arrays: Array) -> tuple[Array, ...]:
    """Arrays of one dtype, as kernels multiply: their own, or ``wide`` where theirs differ."""
    if len({library.dtype(a) for a in arrays}) == 1:
        return arrays
    return tuple(library.cast(a, wide) for a in arrays)


def run(
    library: Any,
    primitive: Primitive,
    backend: str,
    x: tuple[Array, ...],
    fixed: tuple[Array, ...] = (),
    factor: float = 1.0,
    how: str = "",
) -> tuple[Array, ...] | None:
    """The results of a backend's kernel, or None where there is none; widths are those of ``x[1]`` and ``x[2]``."""
    of = _of(library, primitive, backend, x)
    if not library.serves(primitive, of, x):
        return None
    results: tuple[Array, ...] = library.primitive(primitive, of, x, fixed, factor, how)
    return results


def served(library: Any, primitive: Primitive, backend: str, x: tuple[Array, ...]) -> bool:
    """Whether ``run`` would find a kernel: the first three arrays tell, and whether gradients of any are asked for."""
    found: bool = library.serves(primitive, _of(library, primitive, backend, x), x)
    return found


def _of(library: Any, primitive: Primitive, backend: str, x: tuple[Array, ...]) -> tuple[Any, ...]:
    """What ``find`` takes."""
    widths = (x[1].shape[-1], x[2].shape[-1])
    return primitive.name, backend, library.name, library.dtype(x[0]), library.device(x[0]), widths


def by_custom(
    library: Any, primitive: Primitive, of: Any, x: tuple[Array, ...], fixed: tuple[Array, ...], factor: float, how: str
) -> tuple[Array, ...]:
    """``Library.primitive`` through ``Library.custom``."""
    kernel = find(*of)
    assert kernel is not None

    def forward(*x: Array) -> tuple[tuple[Array, ...], Any]:
        found = kernel.forward(x, fixed, factor, how)
        return found, (x, found)

    def backward(saved: Any, *dout: Array) -> tuple[Array, ...]:
        x, out = saved
        flowing = tuple(d for name, d in zip(primitive.results, dout, strict=True) if name in primitive.flows)
        return kernel.backward(x, fixed, factor, how, out, flowing)

    results: tuple[Array, ...] = library.custom(forward, backward, x)
    return results
