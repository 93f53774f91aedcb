"""Hand arrays over, and gradients back: one file an array library.

A library is recognised by the type of what was passed, among those already imported: nothing here imports torch or JAX
for somebody who does not use them.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mixers.problem import Arrays
from mixers.spec import Array

if TYPE_CHECKING:
    from mixers.backend import Pool
    from mixers.call import Call
    from mixers.mixer import Mixer
    from mixers.packing import Pack
    from mixers.primitive import Primitive
    from mixers.result import Result


class Library(Protocol):
    """What the rest of ``mixers`` asks of an array library."""

    name: str

    @property
    def namespace(self) -> Any:
        """Its array-API namespace."""

    def dtype(self, array: Array) -> str:
        """The name of an array's dtype, as ``float32``."""

    def device(self, array: Array) -> str:
        """The kind of device that holds it: ``cpu``, ``cuda``, ``tpu``."""

    def same_device(self, a: Array, b: Array) -> bool:
        """Whether two arrays lie on one device."""

    def expand(self, array: Array, shape: tuple[int, ...]) -> Array:
        """The array repeated along new leading axes, without a copy where the library can."""

    def cast(self, array: Array, dtype: str) -> Array:
        """The array in another dtype."""

    def scan(self, step: Any, state: tuple[Array, ...], tokens: dict[str, Array]) -> tuple[Array, tuple[Array, ...]]:
        """Run ``step(token, state) -> (y, state)`` along axis 1 of all ``tokens``; stack the outputs there."""

    def largest(self, counts: Array) -> int | None:
        """The largest of some counts, 0 for none; None while they are traced."""

    def first_nan(self, array: Array) -> tuple[int, ...] | None:
        """The first position of a NaN; None for none, and where looking would cost a wait."""

    def host(self, counts: Array) -> np.ndarray | None:
        """Whole numbers as a NumPy array; None while they are traced."""

    def given(self, call: "Call") -> Arrays:
        """The arrays of a call with its first state filled in; offsets are checked where that costs no wait."""

    def call(self, mixer: "Mixer", **arguments: Any) -> "Result":
        """A mixer as a part of a composition."""

    def serves(self, primitive: "Primitive", of: Any, x: tuple[Array, ...]) -> bool:
        """Whether ``mixers.primitive.find(*of)`` is a kernel, with the gradients that may be asked for."""

    def primitive(
        self, primitive: "Primitive", of: Any, x: tuple[Array, ...], fixed: tuple[Array, ...], factor: float, how: str
    ) -> tuple[Array, ...]:
        """The results of a primitive that is served."""

    def untraced(self, function: Any) -> Any:
        """The function, left out of a compiler's graph where the library has a compiler that would follow it."""

    def bounds(self, offsets: Array) -> list[int]:
        """The offsets of a pack as Python numbers."""

    def offsets(self, given: Any, like: Array) -> "tuple[Pack | None, Array, int]":
        """``cu_seqlens`` as the caller gave it: a pack if its contents are on the host, an array, the sequences."""

    def from_numpy(self, values: np.ndarray, dtype: str, like: Array) -> Array:
        """A NumPy array as one of this library, beside ``like``."""

    def scatter(self, pools: tuple[Array, ...], state: tuple[Array, ...], where: Array, target: Array) -> None:
        """Write ``state[n]`` to ``pool[target[n]]`` wherever ``where[n]``, in place."""

    def decode(self, mixer: "Mixer", call: "Call", pool: "Pool") -> Array | None:
        """The outputs of a call whose states live in a pool; None where no kernel works on pools of this library."""

    def warmup(self, mixer: "Mixer", call: "Call", grad: bool) -> None:
        """Compile what the call will run."""

    def prepare(self, mixer: "Mixer") -> None:
        """Define what must exist before a call of the mixer is traced."""

    def again(self, mixer: "Mixer", x: Arrays, state: bool, checkpoint_every: int | None) -> "Result | None":
        """The result of a call like one that was seen before; None where the long way must be gone."""

    def run(self, mixer: "Mixer", call: "Call") -> Arrays:
        """Run a call, differentiably where the library has autodiff; arrays named as in ``mixers.problem``."""


# The array types by which a library is recognised, and where each is found.
_TYPES = {"numpy": ("ndarray",), "torch": ("Tensor",), "jax": ("Array",)}
_known: dict[type, Library] = {}


def library_of(array: Any, name: str) -> Library:
    """The library that an array belongs to.

    Raises:
        TypeError: it is no array of NumPy, torch or JAX, and has no memory on a GPU to show.
    """
    kind = type(array)
    found = _known.get(kind)
    if found is None:
        found = _known[kind] = _recognise(array, name)
    return found


def _recognise(array: Any, name: str) -> Library:
    for library, types in _TYPES.items():
        module = sys.modules.get(library)
        if module is not None and isinstance(array, tuple(getattr(module, t) for t in types)):
            chosen: Library = importlib.import_module(f"mixers.arrays.{library}").library
            return chosen
    if hasattr(array, "__cuda_array_interface__") or hasattr(array, "__dlpack_device__"):
        cuda = importlib.import_module("mixers.arrays.cuda")
        if cuda.is_cuda_array(array):
            others: Library = cuda.library_for(cuda.package_of(array))
            return others
    got = f"{type(array).__module__}.{type(array).__qualname__}"
    raise TypeError(
        f"{name} is a {got}; expected an array of NumPy, torch or JAX, or one of a GPU with __cuda_array_interface__"
    )


def prepare(mixer: "Mixer") -> None:
    """Let every library that is imported already get ready for a mixer."""
    for name, types in _TYPES.items():
        module = sys.modules.get(name)
        if module is not None:
            library = importlib.import_module(f"mixers.arrays.{name}").library
            library.prepare(mixer)
            # Known before anything is traced: a tracer cannot look for modules.
            _known.update({getattr(module, kind): library for kind in types})
