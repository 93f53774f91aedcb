"""The choice: every kernel that could run a problem, those that cannot with their reasons, and the first that can.

Backends are asked in falling order of their ``preference``, a backend's kernels in the order in which it lists them;
kernels that do not suit a problem come last, whoever they belong to.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from mixers.backend import Backend, Config, Kernel, Support, installed
from mixers.problem import Problem
from mixers.spec import unknown

REFERENCE = "reference"


@dataclass(frozen=True)
class Candidate:
    """One way to run a problem, or the reason why it is none; without a kernel it is the reference, or a whole backend.

    Attributes:
        backend: its name.
        kernel: the kernel; None for the reference, and for a backend that is refused as a whole.
        config: the kernel's default configuration.
        support: yes, or no with a reason.
    """

    backend: str
    kernel: Kernel | None
    config: Config | None
    support: Support

    @property
    def name(self) -> str:
        """``backend`` or ``backend/kernel``."""
        return f"{self.backend}/{self.kernel.name}" if self.kernel else self.backend


def backend_names() -> tuple[str, ...]:
    """What ``backend=`` accepts."""
    return ("auto", REFERENCE, *sorted(installed()))


def check_backend(name: str) -> None:
    """Refuse a backend that is not installed.

    Raises:
        ValueError: with the nearest name, or with what to install where there is none at all.
    """
    if name in ("auto", REFERENCE) or name in installed():
        return
    message = unknown("backend", name, backend_names())
    if not installed():
        message += "; no backend is installed: pip install -e ."
    raise ValueError(message)


def candidates(problem: Problem, backend: str) -> Iterator[Candidate]:
    """Every way to run a problem under ``backend=``, best first."""
    if problem.spec.compose is not None:
        yield from _composed(problem, backend)
        return
    asked = [b for b in installed().values() if backend in ("auto", b.name)]
    found = (c for b in sorted(asked, key=lambda b: -b.preference) for c in _of_backend(problem, b, backend == b.name))
    yield from sorted(found, key=lambda c: c.kernel is not None and not c.kernel.suits(problem))
    if backend in ("auto", REFERENCE):
        yield Candidate(REFERENCE, None, None, Support.yes())


def _composed(problem: Problem, backend: str) -> Iterator[Candidate]:
    """A composition runs where a backend has kernels for its parts."""
    asked = [b for b in installed().values() if backend in ("auto", b.name)]
    for b in sorted(asked, key=lambda b: -b.preference):
        missing = ""
        for part, options in problem.spec.parts(problem.option):
            inner = dataclasses.replace(problem, spec=part, options=tuple(options.items()))
            found = list(_of_backend(inner, b, backend == b.name))
            if not any(c.support for c in found):
                why = "; ".join(c.support.reason for c in found) or "no kernel"
                missing = f"its {part.name} cannot run: {why}"
        support = Support.no(missing) if missing else Support.yes()
        yield Candidate(b.name, None, {} if support else None, support)
    if backend in ("auto", REFERENCE):
        yield Candidate(REFERENCE, None, None, Support.yes())


def _of_backend(problem: Problem, backend: Backend, explicit: bool) -> Iterator[Candidate]:
    status = backend.status()
    if status and not explicit:
        status = backend.place.holds(problem)
    if not status:
        yield Candidate(backend.name, None, None, status)
        return
    mine = (kernel for kernel in backend.kernels() if problem.spec.name in kernel.mixers)
    for kernel in mine:
        support = kernel.supports(problem)
        config = kernel.configs(problem)[0] if support else None
        yield Candidate(backend.name, kernel, config, support)


def choose(problem: Problem, backend: str) -> Candidate:
    """The first candidate that can.

    Raises:
        ValueError: none can; the message lists every reason.
    """
    refused = []
    for candidate in candidates(problem, backend):
        if candidate.support:
            return candidate
        refused.append(f"{candidate.name}: {candidate.support.reason}")
    reasons = "; ".join(refused) or f"it has no kernel for {problem.spec.name}"
    raise ValueError(
        f"backend={backend!r} cannot run {problem.spec.name} on {problem.library} arrays ({problem.device}): "
        f"{reasons}. backend='auto' takes whatever can"
    )


def choose_in_place(problem: Problem, backend: str) -> Candidate | None:
    """The first candidate that can and decodes on a pool itself; None where there is none."""
    able = (c for c in candidates(problem, backend) if c.support and c.kernel is not None and c.kernel.in_place)
    return next(able, None)
