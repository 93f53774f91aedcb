"""Why a call runs as it does: every candidate of every pass, with what is known of it."""

from dataclasses import dataclass

from mixers.autotune.cost import predict
from mixers.autotune.device import device_of_kind
from mixers.autotune.key import FORWARD
from mixers.autotune.policy import Candidate, Choice
from mixers.autotune.profile import Trial, config_text

from mixers.backend import Config
from mixers.problem import Problem


@dataclass(frozen=True)
class Row:
    """One candidate of one pass.

    Attributes:
        part: ``forward`` or ``backward``.
        name: ``backend/kernel``, or a backend that is refused as a whole.
        config: its configuration.
        chosen: whether it runs.
        predicted: seconds, by the cost model; 0 where it cannot run.
        seconds: as measured; 0 where it was not.
        error: over what is allowed, as compared with the reference; 0 where it was not.
        reason: why it was chosen or refused, and where that is known from.
    """

    part: str
    name: str
    config: Config
    chosen: bool
    predicted: float
    seconds: float
    error: float
    reason: str

    def __str__(self) -> str:
        config = config_text(self.config)
        numbers = [
            *([f"{_time(self.seconds)} (predicted {_time(self.predicted)})"] if self.seconds else []),
            *([f"predicted {_time(self.predicted)}"] if self.predicted and not self.seconds else []),
            *([f"error {self.error:.2g} of what is allowed"] if self.error else []),
        ]
        text = "; ".join((self.reason, *numbers))
        return f"  {'→' if self.chosen else ' '} {self.name:<28} {config:<16} {text}".rstrip()


@dataclass(frozen=True)
class Explanation:
    """Every way to run a call: prints as a table, the chosen one marked.

    Attributes:
        problem: the call.
        candidates: of the forward.
        choices: what was chosen, by pass; empty where nothing can run it.
        note: what else is to be said, as how ``chunk_size`` was found.
    """

    problem: Problem
    candidates: tuple[Candidate, ...]
    choices: tuple[tuple[str, Choice], ...] = ()
    note: str = ""

    @property
    def chosen(self) -> Candidate:
        """The candidate that runs the forward.

        Raises:
            LookupError: nothing can run the call; it says why, candidate by candidate.
        """
        if not self.choices:
            raise LookupError(f"nothing that was asked for can run this call:\n{self}")
        return self.choices[0][1].candidate

    @property
    def rows(self) -> tuple[Row, ...]:
        """The table."""
        parts = self.choices or ((FORWARD, None),)
        return tuple(row for part, choice in parts for row in self._rows(part, choice))

    def _rows(self, part: str, choice: Choice | None) -> list[Row]:
        device = device_of_kind(self.problem.device)
        chosen = choice.candidate if choice else None
        trials = _trials(choice)
        rows = []
        for candidate in self.candidates:
            mine = chosen is not None and bool(candidate.support) and candidate.name == chosen.name
            config = (chosen.config if mine and chosen else candidate.config) or {}
            trial = trials.pop((candidate.name, _pairs(config)), None)
            predicted = predict(self.problem, candidate.kernel, 0, part, device) if candidate.kernel else 0.0
            rows.append(
                Row(
                    part,
                    candidate.name,
                    config,
                    mine,
                    trial.predicted if trial and trial.predicted else predicted if candidate.support else 0.0,
                    trial.seconds if trial else 0.0,
                    trial.error if trial else 0.0,
                    _why(choice) if mine and choice else candidate.support.reason or _not(trial),
                )
            )
        rows += [Row(part, t.name, t.config, False, t.predicted, t.seconds, t.error, _not(t)) for t in trials.values()]
        return rows

    def __str__(self) -> str:
        lines = [str(self.problem), *([self.note] if self.note else [])]
        several = len(self.choices) > 1
        for part, choice in self.choices or ((FORWARD, None),):
            lines += [f"{part}:"] if several else []
            lines += [str(row) for row in self._rows(part, choice)]
            for fact in choice.doubted if choice else ():
                lines.append(f"    not believed: {fact.entry.kernel}, from {fact.source}: {fact.doubt}")
        return "\n".join(lines)


def _pairs(config: Config) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(config.items()))


def _trials(choice: Choice | None) -> dict[tuple[str, tuple[tuple[str, int], ...]], Trial]:
    """What was measured, by candidate; of a profile without its trials, what the entry itself tells."""
    if choice is None or choice.fact is None:
        return {}
    entry = choice.fact.entry
    trials = entry.trials or (Trial(entry.kernel, entry.config, 0.0, entry.seconds, entry.error),)
    return {(t.name, _pairs(t.config)): t for t in trials}


def _why(choice: Choice) -> str:
    if choice.fact is None:
        return f"chosen: {choice.source or 'the first that can, nothing was measured'}"
    entry = choice.fact.entry
    default = (
        f", {entry.default_seconds / entry.seconds:.2f} times as fast as the default" if entry.default_seconds else ""
    )
    return f"chosen: the fastest of {entry.candidates} at {entry.shape}{default}, by {choice.source}"


def _not(trial: Trial | None) -> str:
    return trial.reason if trial and trial.reason else "slower" if trial and trial.seconds else "can, but comes later"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"
