"""What a backend is: kernels, and for each the problems that it can run.

A backend is an object with the attributes of ``Backend``, named in the entry-point group ``mixers.backends``; this
library's own come in the same way as anybody else's. The core imports none of them by name.
"""

import functools
import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from mixers.problem import Arrays, Problem
from mixers.spec import Array

Config = Mapping[str, int]
"""A kernel's configuration: named whole numbers."""


@dataclass(frozen=True)
class Support:
    """Yes, or no with a reason."""

    reason: str = ""

    @classmethod
    def yes(cls) -> "Support":
        """It can."""
        return cls()

    @classmethod
    def no(cls, reason: str) -> "Support":
        """It cannot, and why."""
        if not reason:
            raise ValueError("a refusal needs a reason")
        return cls(reason)

    def __bool__(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class Place:
    """Where kernels run.

    Attributes:
        libraries: whose arrays they serve; ``cuda`` for every library with arrays of a GPU but torch and JAX.
        devices: where those may be.
    """

    libraries: tuple[str, ...]
    devices: tuple[str, ...]

    def holds(self, problem: Problem) -> Support:
        """Whether the arrays of a problem are there."""
        return self.serves(problem.library, problem.device)

    def serves(self, library: str, device: str) -> Support:
        """Whether arrays of a library on a device are there."""
        if (library if library in ("numpy", "torch", "jax") else "cuda") not in self.libraries:
            return Support.no(f"takes arrays of {' and '.join(self.libraries)}, not of {library}")
        if device not in self.devices:
            return Support.no(f"runs on {' and '.join(self.devices)}, and the arrays are on {device}")
        return Support.yes()


@dataclass(frozen=True)
class Pool:
    """States that a kernel reads and writes where they are; see ``Mixer.decode``.

    Attributes:
        arrays: one array ``[slots, ...]`` for each field of a state, of any strides.
        slots: ``[B]`` whole numbers, −1 for padding.
        out_slots: ``[B]``, where states are written.
        fresh: ``[B]`` booleans, or None.
    """

    arrays: tuple[Array, ...]
    slots: Array
    out_slots: Array
    fresh: Array | None


class Kernel(ABC):
    """One way to run a set of problems.

    Attributes:
        name: unique in its backend, as ``"delta.recurrent"``.
        form: ``"recurrent"`` or ``"chunk"``.
        mixers: the names of the mixers that it runs.
        arrays: the library whose arrays it takes: ``"numpy"``, ``"torch"`` or ``"jax"``, or ``"any"``. A kernel of
            NumPy arrays is given them in the working dtype; any other takes arrays as the caller passed them, fills
            outputs in their final dtype and gradients in that of their inputs, and does without ``kept.*``. A kernel of
            JAX arrays is a pure function, called while JAX traces: ``out`` and ``dx`` come empty, and it puts arrays
            into them, in any floating dtype; what it puts there as ``kept.*``, under names of its own, is what the
            backward gets as ``out``. A counter of the first state that is absent is zero.
        in_place: it has ``decode``.
        batch_invariant: with ``flags.batch_invariant`` the bits of a sequence do not depend on what else is in the
            batch, on how it is packed, nor on the number of threads.
    """

    name: str
    form: str
    mixers: frozenset[str]
    arrays: str
    in_place: bool = False
    batch_invariant: bool = False

    @abstractmethod
    def supports(self, problem: Problem) -> Support:
        """Whether it runs this problem, whose mixer is one of ``mixers``."""

    def suits(self, problem: Problem) -> bool:
        """Whether it is a good choice, as far as can be told without measuring: others are asked first where not."""
        return True

    @abstractmethod
    def configs(self, problem: Problem) -> tuple[Config, ...]:
        """Configurations worth trying; the first is the default."""

    @abstractmethod
    def forward(self, problem: Problem, config: Config, x: Arrays, out: Arrays) -> None:
        """Fill every array in ``out``, named as in ``problem.outputs()``.

        Arrays are in the working dtype (``problem.compute_dtype``), counters are int32; inputs may be strided or
        read-only, outputs are contiguous.
        """

    @abstractmethod
    def backward(self, problem: Problem, config: Config, x: Arrays, out: Arrays, dout: Arrays, dx: Arrays) -> None:
        """Fill every array in ``dx``: the gradients of the floating arrays of ``x`` that were given.

        ``out`` holds what ``forward`` filled, ``dout`` the gradients of ``y``, ``final.*`` and ``checkpoint.*``, None
        where nothing flows back. Gradients of a shared first state come as ``[N, ...]``; the caller sums them.
        """

    def decode(self, problem: Problem, config: Config, x: Arrays, pool: Pool, y: Array) -> None:
        """Fill ``y`` from states in a pool, and the pool with what becomes of them.

        ``x`` holds the inputs, and as ``initial.*`` the first state, for sequences that start afresh.
        """
        raise NotImplementedError(f"{self.name} does not write pools in place")


class Backend(Protocol):
    """A set of kernels.

    Attributes:
        name: as in ``mixers.get(..., backend=name)``.
        summary: where it runs, in a line.
        preference: ``auto`` asks backends in falling order of this number.
        recomputes: its kernels keep nothing for a backward, which computes their states again.
        place: where its kernels run; asked before they are loaded. ``auto`` never looks at a backend out of its place,
            a caller who names it may: a simulator runs elsewhere.
        libraries: optional, distributions whose versions decide about speed; its own name by default.
        compile_only: optional, ``compile_only(capability)`` makes a process compile what it launches and run nothing:
            for GPUs of a compute capability as 90, none of which it need see, or for its own CPU.
    """

    name: str
    summary: str
    preference: int
    recomputes: bool
    place: Place

    def status(self) -> Support:
        """Whether it works on this machine."""

    def kernels(self) -> tuple[Kernel, ...]:
        """Its kernels; the first call may import a compiler."""


def backend_status() -> dict[str, Support]:
    """Every backend by name: available on this machine, or why not."""
    return {"reference": Support.yes()} | {name: backend.status() for name, backend in installed().items()}


@functools.cache
def installed() -> dict[str, Backend]:
    """Every backend that is installed, by name."""
    found = {}
    for entry in importlib.metadata.entry_points(group="mixers.backends"):
        found[entry.name] = entry.load()
    return found
