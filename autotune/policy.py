"""The choice: every kernel that could run a problem, those that cannot with their reasons, and the one that does.

What was asked for by name comes first, then what was measured (``mixers.autotune.knowledge``), then the first that can:
backends are asked in falling order of their ``preference``, a backend's kernels in the order in which it lists them;
kernels that do not suit a problem come last, whoever they belong to.

Forward and backward are chosen apart. What a forward keeps means the same to every kernel, but a backward must take
arrays as the forward's kernel did.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mixers.autotune.key import BACKWARD, FORWARD
from mixers.autotune.knowledge import Fact, facts

from mixers.backend import Backend, Config, Kernel, Support, installed
from mixers.problem import Problem
from mixers.spec import MixerSpec, unknown

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


@dataclass(frozen=True)
class Asked:
    """What a caller asked for by name.

    Attributes:
        backend: ``auto``, ``reference`` or an installed one.
        kernel: a kernel's name; empty for any.
        config: its configuration as sorted pairs; None for the one that is known to be best.
    """

    backend: str = "auto"
    kernel: str = ""
    config: tuple[tuple[str, int], ...] | None = None


@dataclass(frozen=True)
class Choice:
    """The candidate that runs a pass, and why.

    Attributes:
        candidate: a kernel with its configuration, or the reference.
        source: where the knowledge came from; empty for the heuristic.
        fact: what was measured; None where nothing was.
        doubted: measurements that were not believed.
    """

    candidate: Candidate
    source: str = ""
    fact: Fact | None = None
    doubted: tuple[Fact, ...] = ()


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


def check_kernel(spec: MixerSpec, asked: Asked) -> None:
    """Refuse a kernel that no backend has for a mixer, and a configuration of no kernel in particular.

    Raises:
        ValueError: with the nearest name.
    """
    if asked.config is not None and not asked.kernel:
        raise ValueError(f"config={dict(asked.config)} belongs to a kernel; name it, as kernel='delta.chunk'")
    if not asked.kernel:
        return
    backends = [b for b in installed().values() if asked.backend in ("auto", b.name) and b.status()]
    known = {k.name for b in backends for k in b.kernels() if spec.name in k.mixers}
    if asked.kernel not in known:
        raise ValueError(unknown(f"kernel of {spec.name}", asked.kernel, sorted(known)))


def candidates(problem: Problem, asked: Asked) -> Iterator[Candidate]:
    """Every way to run a problem, best first, as far as can be told without measuring."""
    if problem.spec.compose is not None:
        yield from _composed(problem, asked)
        return
    backends = [b for b in installed().values() if asked.backend in ("auto", b.name)]
    ordered = sorted(backends, key=lambda b: -b.preference)
    found = (c for b in ordered for c in _of_backend(problem, b, asked))
    yield from sorted(found, key=lambda c: c.kernel is not None and not c.kernel.suits(problem))
    if asked.backend in ("auto", REFERENCE) and not asked.kernel:
        varies = "its sums are its library's, whose order may depend on the batch"
        invariant = problem.flags.batch_invariant
        yield Candidate(REFERENCE, None, None, Support.no(varies) if invariant else Support.yes())


def _composed(problem: Problem, asked: Asked) -> Iterator[Candidate]:
    """A composition runs where a backend has kernels for its parts."""
    backends = [b for b in installed().values() if asked.backend in ("auto", b.name)]
    for b in sorted(backends, key=lambda b: -b.preference):
        support = _here(problem, b, asked)
        for part, options in problem.spec.parts(problem.option) if support else ():
            inner = dataclasses.replace(problem, spec=part, options=tuple(options.items()))
            found = list(_of_backend(inner, b, asked))
            if not any(c.support for c in found):
                why = "; ".join(c.support.reason for c in found) or "no kernel"
                support = Support.no(f"its {part.name} cannot run: {why}")
        yield Candidate(b.name, None, {} if support else None, support)
    if asked.backend in ("auto", REFERENCE):
        yield Candidate(REFERENCE, None, None, Support.yes())


def _here(problem: Problem, backend: Backend, asked: Asked) -> Support:
    """Whether a backend works on this machine, and for such arrays unless it was asked for by name."""
    status = backend.status()
    return backend.place.holds(problem) if status and asked.backend != backend.name else status


def _of_backend(problem: Problem, backend: Backend, asked: Asked) -> Iterator[Candidate]:
    status = _here(problem, backend, asked)
    if not status:
        yield Candidate(backend.name, None, None, status)
        return
    for kernel in backend.kernels():
        if problem.spec.name in kernel.mixers:
            yield _candidate(problem, backend, kernel, asked)


def _candidate(problem: Problem, backend: Backend, kernel: Kernel, asked: Asked) -> Candidate:
    if asked.kernel and kernel.name != asked.kernel:
        return Candidate(backend.name, kernel, None, Support.no(f"kernel={asked.kernel!r} was asked for"))
    support = _supports(problem, kernel)
    config = kernel.configs(problem)[0] if support else None
    if config is not None and asked.config is not None:
        given = dict(asked.config)
        if given.keys() != config.keys():
            names = ", ".join(config) or "no choices"
            support, config = Support.no(f"config={given}; its configuration is {names}"), None
        else:
            config = given
    return Candidate(backend.name, kernel, config, support)


def _supports(problem: Problem, kernel: Kernel) -> Support:
    """Whether a kernel runs a problem; one kernel for any batch, length or packing where that was asked for."""
    support = kernel.supports(problem)
    if not support or not problem.flags.batch_invariant:
        return support
    if not kernel.batch_invariant:
        return Support.no("the order of its sums may depend on the batch, and batch_invariant=True was asked for")
    for other in (problem, dataclasses.replace(problem, packed=True), dataclasses.replace(problem, single=True)):
        if not kernel.supports(other):
            return Support.no(f"batch_invariant=True, and of other calls: {kernel.supports(other).reason}")
    return Support.yes()


def whatever_the_batch(problem: Problem) -> Problem:
    """The problem that stands for all its batches, lengths and packings where one choice must serve them all."""
    if not problem.flags.batch_invariant:
        return problem
    sizes = dataclasses.replace(problem.sizes, B=1, N=1, T=1024)
    return dataclasses.replace(problem, packed=False, single=False, sizes=sizes)


def choose(problem: Problem, asked: Asked) -> Choice:
    """The candidate that runs a forward.

    Raises:
        ValueError: none can; the message lists every reason.
    """
    problem = whatever_the_batch(problem)
    found = list(candidates(problem, asked))
    able = [c for c in found if c.support]
    if not able:
        refused = (f"{c.name}: {c.support.reason}" for c in found)
        reasons = "; ".join(refused) or f"it has no kernel for {problem.spec.name}"
        raise ValueError(
            f"backend={asked.backend!r} cannot run {problem.spec.name} on {problem.library} arrays ({problem.device}): "
            f"{reasons}. backend='auto' takes whatever can"
        )
    return _best(problem, asked, able, FORWARD)


def choose_backward(problem: Problem, asked: Asked, forward: Candidate) -> Choice:
    """The candidate that runs the backward of ``forward``: the same kernel, unless another was measured."""
    problem = whatever_the_batch(problem)
    able = [c for c in candidates(problem, asked) if c.support and c.kernel is not None and fits(problem, c, forward)]
    same = [c for c in able if c.name == forward.name]
    choice = _best(problem, asked, same + [c for c in able if c.name != forward.name], BACKWARD)
    # Unmeasured, it goes with its forward, configuration and all.
    return choice if choice.fact is not None else dataclasses.replace(choice, candidate=forward)


def fits(problem: Problem, backward: Candidate, forward: Candidate) -> bool:
    """Whether a backward can follow a forward: it takes arrays as that one left them, kept ones or none."""
    one, other = backward.kernel, forward.kernel
    if one is None or other is None:
        return False
    recomputes = {name: installed()[name].recomputes for name in (backward.backend, forward.backend)}
    same_keep = problem.flags.recompute or recomputes[backward.backend] == recomputes[forward.backend]
    return same_keep and (one.arrays == other.arrays or "numpy" not in (one.arrays, other.arrays))


def _best(problem: Problem, asked: Asked, able: list[Candidate], part: str) -> Choice:
    """What was measured to be best, otherwise the first."""
    if asked.config is not None:
        return Choice(able[0], "asked for by name")
    by_name, doubted = {c.name: c for c in able if c.kernel is not None}, list[Fact]()
    for fact in facts(problem, part) if by_name else ():
        candidate = by_name.get(fact.entry.kernel)
        if candidate is None or fact.entry.backend not in ("auto", asked.backend):
            continue
        doubt = fact.doubt or _stale(problem, candidate, fact.entry.config)
        if not doubt:
            known = dataclasses.replace(candidate, config=dict(fact.entry.config))
            return Choice(known, fact.source, fact, tuple(doubted))
        doubted.append(dataclasses.replace(fact, doubt=doubt))
    return Choice(able[0], "asked for by name" if asked.kernel else "", None, tuple(doubted))


def _stale(problem: Problem, candidate: Candidate, config: Mapping[str, int]) -> str:
    assert candidate.kernel is not None
    if dict(config) in [dict(c) for c in candidate.kernel.configs(problem)]:
        return ""
    return f"{candidate.name} no longer has the configuration {dict(config)}"


def choose_in_place(problem: Problem, asked: Asked) -> Candidate | None:
    """The first candidate that can and decodes on a pool itself; None where there is none."""
    problem = whatever_the_batch(problem)
    able = (c for c in candidates(problem, asked) if c.support and c.kernel is not None and c.kernel.in_place)
    return next(able, None)
