"""Measure the candidates of a problem and remember the fastest that is right.

    1  every supporting kernel with each of its configurations; the cost model leaves 8 of them a pass
    2  each runs once in the worker: what crashes, hangs, leaks or leaves a NaN is out, with its reason
    3  successive halving: short bursts, the slower half goes, longer bursts
    4  the guard compares the finalists with the float64 reference and with the default kernel
    5  finalists and default in turns, so that a machine that drifts picks no winner; one that is not clearly faster
       than the default does not replace it

The tuner raises because of no candidate.
"""

import datetime
import importlib
import logging
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mixers.autotune import agree, knowledge
from mixers.autotune.ahead import Ahead
from mixers.autotune.cost import predict
from mixers.autotune.device import device_of_kind, stamp_of
from mixers.autotune.journal import Decision, log
from mixers.autotune.key import BACKWARD, FORWARD, key_of, to_json
from mixers.autotune.policy import Asked, Candidate, candidates, choose, fits, whatever_the_batch
from mixers.autotune.profile import Entry, Profile, Trial, config_text, save, user_path
from mixers.autotune.workshop import Lost, Workshop

from mixers.backend import installed
from mixers.problem import Flags, Problem
from mixers.registry import get_spec
from mixers.spec import MixerSpec, Sizes

logger = logging.getLogger("mixers")

MOST = 8
FINALISTS = 3
ROUNDS = 7
BURST = 0.04
BUDGET = 24.0

# A time within this of the default's is the default's.
CLEAR = 0.99

Report = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is."""


def _silent(what: str, done: int, total: int) -> None: ...


def allowed() -> bool:
    """Whether anything may be measured: not with ``MIXERS_TUNE=off``."""
    return os.environ.get("MIXERS_TUNE", "").lower() != "off"


@dataclass
class Runner:
    """A candidate on its way through the rounds."""

    name: str
    config: Mapping[str, int]
    predicted: float
    default: bool = False
    seconds: float = 0.0
    error: float = 0.0
    reason: str = ""
    turns: list[float] = field(default_factory=list)

    def trial(self) -> Trial:
        """What became of it."""
        return Trial(self.name, dict(self.config), self.predicted, self.seconds, self.error, self.reason)


@dataclass
class Patience:
    """Seconds until a candidate counts as hanging.

    Attributes:
        first: for the first run, which may compile.
        guard: for the comparison with the reference.
        burst: for a burst of timing, beside what it should take.
    """

    first: float = 40.0
    guard: float = 60.0
    burst: float = 10.0


class Contest:
    """One pass of one problem."""

    def __init__(
        self,
        shop: Workshop,
        ahead: Ahead,
        problem: Problem,
        part: str,
        asked: Asked,
        forward: Candidate,
        report: Report,
    ) -> None:
        self.shop, self.ahead, self.problem, self.part, self.asked = shop, ahead, problem, part, asked
        self.forward, self.report = forward, report
        self.until = float("inf")
        self.patience = Patience()
        self.out: list[Runner] = []

    def line_up(self) -> tuple[list[Runner], list[Trial]]:
        """Who runs, the default first and the riskiest last; and who was refused."""
        device, forward = device_of_kind(self.problem.device), self.forward
        found, refused = [], []
        for c in candidates(self.problem, self.asked):
            if c.support and self.part == BACKWARD and not fits(self.problem, c, forward):
                c = replace(c, support=c.support.no("takes other arrays than the forward leaves"))
            if not c.support:
                refused.append(Trial(c.name, {}, 0.0, reason=c.support.reason))
            elif c.kernel is not None and c.config is not None:
                configs = (c.config,) if self.asked.config is not None else c.kernel.configs(self.problem)
                for rank, config in enumerate(_unlike(configs)):
                    cost = predict(self.problem, c.kernel, rank, self.part, device)
                    found.append((rank > 0, cost, Runner(c.name, config, cost)))
        if self.part == BACKWARD:
            found.sort(key=lambda f: (f[2].name, dict(f[2].config)) != (forward.name, dict(forward.config or {})))
        for _, _, runner in found[:1]:
            runner.default = True
        chosen = found[:1] + sorted(found[1:], key=lambda f: f[1])[: MOST - 1]
        left = [r for r in found if not any(r is c for c in chosen)]
        refused += [Trial(r.name, dict(r.config), cost, reason="left out by the cost model") for _, cost, r in left]
        chosen[1:] = sorted(chosen[1:], key=lambda f: f[:2])
        return [runner for _, _, runner in chosen], refused

    def ask(self, do: str, runner: Runner, patience: float, **rest: Any) -> dict[str, Any] | None:
        """Ask the worker about a candidate; None where that was its end."""
        try:
            found = self.shop.ask(do, runner.name, runner.config, patience, **rest)
        except Lost as lost:
            found = {"failed": str(lost)}
        if "failed" in found:
            runner.reason = found["failed"]
            self.out.append(runner)
            return None
        return found

    def attempt(self, runners: list[Runner]) -> list[Runner]:
        """Those that run once without harm."""
        left = list[Runner]()
        for number, runner in enumerate(runners):
            self.report(f"{self.part}: {runner.name}", number, len(runners))
            if time.monotonic() > self.until and left:
                runner.reason = "not tried: the time for tuning was over"
                self.out.append(runner)
                continue
            self.ahead.wait(self.problem, self.part, runner.name, runner.config)
            found = self.ask("try", runner, self.patience.first)
            if found is not None:
                runner.seconds = found["seconds"]
                left.append(runner)
        return left

    def clock(self, runner: Runner, seconds: float) -> bool:
        """Time a candidate for about so many seconds."""
        patience = self.patience.burst + 10 * (seconds + 4 * runner.seconds)
        found = self.ask("time", runner, patience, seconds=seconds)
        if found is not None:
            runner.seconds = found["seconds"]
        return found is not None

    def halve(self, runners: list[Runner]) -> list[Runner]:
        """All of them, the fastest first, the later ones timed less."""
        burst, left, behind = BURST, runners, list[Runner]()
        while left:
            left = sorted((r for r in left if self.clock(r, burst)), key=lambda r: r.seconds)
            if len(left) <= FINALISTS or time.monotonic() > self.until:
                break
            keep = max(FINALISTS, (len(left) + 1) // 2)
            behind, left, burst = left[keep:] + behind, left[:keep], 2 * burst
        return left + behind

    def guard(self, runners: list[Runner], default: Runner | None) -> list[Runner]:
        """The default and the fastest others that are right."""
        passed: list[Runner] = []
        against = default or (runners[0] if runners else None)
        for runner in ([default] if default else []) + [r for r in runners if r is not default]:
            if len(passed) >= FINALISTS or against is None:
                break
            self.report(f"{self.part}: comparing {runner.name}", len(passed), FINALISTS)
            self.ahead.wait_to_compare(self.problem, self.part, runner.name, runner.config)
            found = self.ask("guard", runner, self.patience.guard, default=[against.name, dict(against.config)])
            if found is None:
                continue
            if found["error"] < 0:
                runner.reason = f"wrong: {found['reason']}"
                self.out.append(runner)
                continue
            runner.error = found["error"]
            passed.append(runner)
        return passed

    def final(self, runners: list[Runner]) -> list[Runner]:
        """In turns; the fastest first."""
        for number in range(ROUNDS if len(runners) > 1 else 1):
            self.report(f"{self.part}: finals", number, ROUNDS)
            if number >= 3 and time.monotonic() > self.until + 5:
                break
            for runner in list(runners if number % 2 == 0 else reversed(runners)):
                if runner not in self.out and self.clock(runner, BURST):
                    runner.turns.append(runner.seconds)
        left = [r for r in runners if r not in self.out and r.turns]
        for runner in left:
            # What else runs on a CPU only ever adds to a time; a GPU is ours while we hold it.
            runner.seconds = (min if self.problem.device == "cpu" else statistics.median)(runner.turns)
        return sorted(left, key=lambda r: r.seconds)

    def run(self) -> tuple[Entry | None, tuple[Trial, ...]]:
        """The winner, and what became of everybody."""
        runners, refused = self.line_up()
        total, forward = len(runners), (self.forward.name, dict(self.forward.config or {}))
        self.ahead.start(self.problem, self.part, [(r.name, r.config) for r in runners])
        self.shop.open(to_json(self.problem), self.part, forward if self.part == BACKWARD else None)
        alive = sorted(self.attempt(runners), key=lambda r: r.seconds)
        likely = alive[: FINALISTS + 1] + [r for r in alive[FINALISTS + 1 :] if r.default]
        self.ahead.compare(self.problem, self.part, [(r.name, r.config) for r in likely])
        alive = self.halve(alive)
        default = next((r for r in alive if r.default), None)
        ranked = self.final(self.guard(alive, default))
        trials = tuple(r.trial() for r in runners) + tuple(refused)
        if not ranked:
            return None, trials
        winner = ranked[0]
        if default is not None and default in ranked and not _clearly(winner, default):
            winner = default
        return self._entry(winner, ranked, runners[0], total, trials), trials

    def _entry(
        self, winner: Runner, ranked: list[Runner], default: Runner, total: int, trials: tuple[Trial, ...]
    ) -> Entry:
        second = next((r for r in ranked if r is not winner), None)
        stamp, sizes = stamp_of(installed()[winner.name.partition("/")[0]]), self.problem.sizes
        return Entry(
            key=key_of(self.problem, self.part),
            heads=self.problem.parallel,
            device=device_of_kind(self.problem.device).id,
            stamp=stamp.id,
            backend=self.asked.backend,
            kernel=winner.name,
            config=dict(winner.config),
            candidates=total,
            shape=f"B={sizes.B} T={sizes.T} H={sizes.H} K={sizes.K} V={sizes.V}",
            seconds=winner.seconds,
            runner_up=_named(second),
            runner_up_seconds=second.seconds if second else 0.0,
            default=_named(default),
            default_seconds=default.seconds if default in ranked else 0.0,
            error=winner.error,
            date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            versions=dict(stamp.versions),
            trials=trials,
        )


def _unlike(configs: Iterable[Mapping[str, int]]) -> list[Mapping[str, int]]:
    found: list[Mapping[str, int]] = []
    for config in configs:
        if config not in found:
            found.append(config)
    return found


def _clearly(winner: Runner, default: Runner) -> bool:
    """Faster than the default by more than noise: all told, in the middle turn, and in all turns but one at most."""
    ratios = [mine / its for mine, its in zip(winner.turns, default.turns, strict=False)]
    lost = sum(ratio >= 1 for ratio in ratios)
    in_the_middle = statistics.median(ratios) < CLEAR
    return winner.seconds < CLEAR * default.seconds and in_the_middle and lost <= (len(ratios) >= 5)


def _named(runner: Runner | None) -> str:
    if runner is None:
        return ""
    return f"{runner.name} {config_text(runner.config)}".strip()


def tune_problem(
    problem: Problem,
    asked: Asked | None = None,
    parts: Iterable[str] = (),
    budget: float = BUDGET,
    report: Report = _silent,
) -> list[Entry]:
    """Measure a problem's passes, remember and return what was found; see ``tune_problems``."""
    return tune_problems([problem], asked, parts, budget, report)


def tune_problems(
    problems: Iterable[Problem],
    asked: Asked | None = None,
    parts: Iterable[str] = (),
    budget: float = BUDGET,
    report: Report = _silent,
    done: Callable[[list[Entry]], bool] = lambda entries: True,
) -> list[Entry]:
    """Measure the passes of problems of one device, remember and return what was found.

    Args:
        problems: the calls.
        asked: a backend or kernel to keep to.
        parts: ``forward`` and ``backward``; what a problem has by default.
        budget: seconds for all passes of a problem together, about; on a CPU without what compiling takes, once for a
            machine.
        report: told how far it is.
        done: given what was found of each problem; returns whether to go on.

    Raises:
        ValueError: no kernel runs a problem, or the worker's process knows no such mixer.
        RuntimeError: ``MIXERS_TUNE=off`` forbids it.
    """
    if not allowed():
        raise RuntimeError("MIXERS_TUNE=off: nothing is measured")
    asked, todo = asked or Asked(), [whatever_the_batch(problem) for problem in problems]
    entries = list[Entry]()
    with Workshop() as shop, Ahead(device_of_kind(todo[0].device)) as ahead:
        shop.start(todo[0].library)
        contests = [_contests(shop, ahead, problem, asked, tuple(parts), report) for problem in todo]
        for rounds in contests:
            ahead.settle()
            found = _run(rounds, budget)
            entries += found
            knowledge.learn(found)
            # All of it: whoever deleted or damaged the file meanwhile has lost nothing that was measured here.
            save(user_path(), knowledge.measured())
            if not done(found):
                break
    return entries


def _contests(
    shop: Workshop, ahead: Ahead, problem: Problem, asked: Asked, parts: tuple[str, ...], report: Report
) -> list[Contest]:
    """The passes of a problem; what they will run is being compiled from now on."""
    if problem.spec.compose is not None:
        of = ", ".join(dict.fromkeys(part.name for part, _ in problem.spec.parts(problem.option)))
        raise ValueError(f"{problem.spec.name} is composed of {of or 'array operations'}; tune those")
    forward = choose(problem, asked).candidate
    if forward.kernel is None:
        raise ValueError(f"no kernel runs {problem}; the reference has nothing to tune")
    found = []
    for part in _parts(problem, parts):
        contest = Contest(shop, ahead, problem, part, asked, forward, report)
        ahead.start(problem, part, [(r.name, r.config) for r in contest.line_up()[0]])
        found.append(contest)
    return found


def _parts(problem: Problem, asked: tuple[str, ...]) -> tuple[str, ...]:
    """The passes to measure; under JAX a backward is traced with its forward, and has its kernel."""
    if problem.library == "jax":
        return (FORWARD,)
    return asked or ((FORWARD, BACKWARD) if problem.flags.grad else (FORWARD,))


def _run(contests: list[Contest], budget: float) -> list[Entry]:
    """One pass after the other; a backward follows the forward that has won."""
    start, forward, entries = time.monotonic(), contests[0].forward, list[Entry]()
    for number, contest in enumerate(contests):
        # A pass that took more than its share leaves the next one half of its own.
        due, now = start + budget * (number + 1) / len(contests), time.monotonic()
        contest.forward, contest.until = forward, max(due, now + budget / len(contests) / 2) - 2
        entry, trials = contest.run()
        chosen, config = (entry.kernel, entry.config) if entry else ("", {})
        log.append(Decision(str(contest.problem), contest.part, chosen, config, "measured now", True, trials))
        if entry is None:
            reasons = "; ".join(f"{t.name}: {t.reason}" for t in trials if t.reason)
            logger.warning("no candidate for the %s of %s is right: %s", contest.part, contest.problem, reasons)
            continue
        entries.append(entry)
        if contest.part == FORWARD:
            forward = _candidate(contest.problem, contest.asked, entry)
    return entries


def _candidate(problem: Problem, asked: Asked, entry: Entry) -> Candidate:
    """The candidate that an entry names."""
    found = next(c for c in candidates(problem, asked) if c.name == entry.kernel)
    return replace(found, config=dict(entry.config))


def tune_new(problem: Problem, asked: Asked) -> None:
    """Measure a problem about which nothing is known, whatever its length and batch: for ``get(..., tune=True)``.

    Under ``torch.distributed`` rank 0 measures and tells the others.
    """
    problem = whatever_the_batch(problem)
    if not allowed() or asked.config is not None or _known(problem, asked):
        return
    if choose(problem, asked).candidate.kernel is None:
        return
    if agree.group() is None:
        tune_problem(problem, asked)
        return
    topic = f"{key_of(problem, FORWARD)} {problem.flags.grad}"
    found = Profile.of(tune_problem(problem, asked)) if agree.first() else Profile()
    knowledge.learn(agree.shared(found, topic).entries.values())


def _known(problem: Problem, asked: Asked) -> bool:
    parts = (FORWARD, BACKWARD) if problem.flags.grad else (FORWARD,)
    known = (knowledge.facts(problem, part) for part in parts)
    return all(any(f.entry.backend in ("auto", asked.backend) and not _outdated(f) for f in fs) for fs in known)


def _outdated(fact: knowledge.Fact) -> bool:
    """Whether it was measured on something else than this, not merely for another number of heads."""
    return bool(fact.doubt) and not fact.far


def tune(
    name: str | MixerSpec,
    shape: tuple[int, int, int, int, int],
    *,
    dtype: str = "float32",
    library: str = "numpy",
    device: str = "cpu",
    backend: str = "auto",
    parts: Iterable[str] = (FORWARD, BACKWARD),
    given: Iterable[str] = (),
    budget: float = BUDGET,
    report: Report = _silent,
    **options: Any,
) -> list[Entry]:
    """Measure the kernels of a mixer at one shape, and remember the fastest in the user's profile.

    Args:
        name: a mixer.
        shape: ``(B, T, H, K, V)``. What is found serves every T, and batches up to 4 times smaller or larger.
        dtype: of q, k and v.
        library: ``numpy``, ``torch`` or ``jax``.
        device: ``cpu`` or ``cuda``.
        backend: ``auto`` or one to keep to.
        parts: ``forward``, ``backward``.
        given: optional inputs that are passed all the same.
        budget: seconds, about.
        report: told how far it is.
        options: the mixer's.

    Returns:
        An entry a pass.

    Raises:
        ValueError: the mixer, an option or a part is unknown, or no kernel runs the problem.
        ImportError: the library is not installed.
        RuntimeError: ``MIXERS_TUNE=off`` forbids it.
    """
    spec = name if isinstance(name, MixerSpec) else get_spec(name)
    parts = tuple(parts)
    importlib.import_module(library)  # some backends have kernels for its arrays only where it is
    if not parts or not set(parts) <= {FORWARD, BACKWARD}:
        raise ValueError(f"parts={parts}; expected some of {FORWARD!r} and {BACKWARD!r}")
    problem = problem_of(spec, shape, dtype, library, device, BACKWARD in parts, tuple(given), spec.resolve(options))
    return tune_problem(problem, Asked(backend), parts, budget, report)


def problem_of(
    spec: MixerSpec,
    shape: tuple[int, int, int, int, int],
    dtype: str,
    library: str,
    device: str,
    grad: bool,
    given: tuple[str, ...],
    options: Mapping[str, Any],
) -> Problem:
    """The problem of a plain call of a shape."""
    b, t, h, k, v = shape
    spec = spec if spec.specialise is None else spec.specialise(options)
    layouts = tuple(
        (arg.name, " ".join(arg.layouts[0]))
        for arg in (*spec.inputs[3:], *spec.parameters)
        if not arg.optional or arg.name in given
    )
    sizes = Sizes(B=b, T=t, G=h, H=h, K=k, V=v, N=b, C=spec.chunk(options))
    flags = Flags(grad=grad, recompute=grad and device != "cpu")
    return Problem.of(spec, dict(options), sizes, flags, layouts=layouts, dtype=dtype, library=library, device=device)
