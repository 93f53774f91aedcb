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


class Kernel(ABC):
    """One way to run a set of problems.

    Attributes:
        name: unique in its backend, as ``"delta.recurrent"``.
        form: ``"recurrent"`` or ``"chunk"``.
        mixers: the names of the mixers that it runs.
        arrays: the library whose arrays it takes: ``"numpy"``, ``"torch"`` or ``"jax"``.
    """

    name: str
    form: str
    mixers: frozenset[str]
    arrays: str

    @abstractmethod
    def supports(self, problem: Problem) -> Support:
        """Whether it runs this problem, whose mixer is one of ``mixers``."""

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


class Backend(Protocol):
    """A set of kernels.

    Attributes:
        name: as in ``mixers.get(..., backend=name)``.
        summary: where it runs, in a line.
        preference: ``auto`` asks backends in falling order of this number.
    """

    name: str
    summary: str
    preference: int

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
