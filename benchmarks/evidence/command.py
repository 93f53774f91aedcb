"""The command line that the experiments share: fleets of runs, a process each, until time ends.

A fleet is a list of runs that learn side by side in one process; which comes next may depend on what is known. A
process that dies takes nothing with it but what it had not reported.
"""

import argparse
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from benchmarks.evidence.store import RESULTS, Row, Store

S = TypeVar("S")
Fleet = list[Row]


@dataclass(frozen=True)
class Experiment(Generic[S]):
    """What a script measures.

    Attributes:
        name: of its file.
        says: what it is about, in words.
        full: settings for a GPU.
        small: settings for a CPU, minutes on two cores.
        quick: settings that show in seconds that all of it runs.
        fleets: all runs that follow from what is known, as lists of what identifies each.
        work: runs a fleet; yields ``(identity, found)`` as runs end.
    """

    name: str
    says: str
    full: S
    small: S
    quick: S
    fleets: Callable[[S, list[Row]], list[Fleet]]
    work: Callable[[S, Fleet], Iterator[tuple[Row, Row]]]


def sweeps(jobs: Sequence[Row], rates: Sequence[float], seeds: Sequence[int], rows: list[Row]) -> list[Fleet]:
    """The first seed of every job at every rate; then the other seeds, each at the rate with the highest score."""
    first = [[job | {"rate": rate, "seed": seeds[0]} for rate in rates] for job in jobs]
    later = []
    for job, fleet in zip(jobs, first, strict=True):
        known = [row for row in rows if any(run.items() <= row.items() for run in fleet)]
        if len(known) == len(fleet):
            best = max(known, key=lambda row: row["score"])["rate"]
            later.append([job | {"rate": best, "seed": seed} for seed in seeds[1:]])
    return first + later


def main(experiment: Experiment[Any], words: Sequence[str] | None = None) -> None:
    """Run what the file does not have yet."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.evidence.{experiment.name}",
        description=experiment.says,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds; what is not done then is left out")
    parser.add_argument("--workers", type=int, default=4, help="processes that share the GPU")
    parser.add_argument("--memory", type=float, default=0.9, help="share of the GPU's memory that all of them may take")
    parser.add_argument(
        "--size", choices=("full", "small", "quick"), default="full", help="a GPU's, a CPU's, or a trial"
    )
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME=VALUE", help="runs whose identity says so")
    parser.add_argument("--out", type=Path, help="the JSON; by default the committed one, but for a trial")
    chosen = parser.parse_args(words)
    settings = getattr(experiment, chosen.size)
    home = Path("runs/evidence") if chosen.size == "quick" else RESULTS
    store = Store(chosen.out or home / f"{experiment.name}.json", asdict(settings))
    Sailing(experiment, settings, store, chosen.workers, chosen.memory, dict(w.split("=", 1) for w in chosen.only)).run(
        time.monotonic() + chosen.budget
    )


class Sailing:
    """Fleets in their order, so many at a time."""

    def __init__(
        self,
        experiment: Experiment[Any],
        settings: Any,
        store: Store,
        workers: int,
        memory: float,
        only: dict[str, str],
    ) -> None:
        """See ``main``."""
        self.experiment, self.settings, self.store, self.workers = experiment, settings, store, workers
        self.memory, self.only = memory / workers, only
        self.begun: list[Row] = []
        self.out: dict[Connection, tuple[Any, Fleet]] = {}

    def todo(self) -> Fleet:
        """The next fleet without what is known or under way; empty where nothing is left."""
        for fleet in self.experiment.fleets(self.settings, self.store.rows):
            left = [run for run in fleet if not self.store.has(run) and run not in self.begun and self._wanted(run)]
            if left:
                return left
        return []

    def _wanted(self, run: Row) -> bool:
        return all(str(run.get(name)) == value for name, value in self.only.items())

    def run(self, end: float) -> None:
        """Until all is done, or a moment of ``time.monotonic``."""
        spawn = multiprocessing.get_context("spawn")
        while time.monotonic() < end:
            while len(self.out) < self.workers and (fleet := self.todo()):
                ours, theirs = spawn.Pipe(duplex=False)
                how = (self.experiment.work, self.settings, fleet, theirs, self.memory)
                process = spawn.Process(target=_child, args=how, daemon=True)
                process.start()
                theirs.close()
                self.out[ours] = process, fleet
                self.begun += fleet
            if not self.out:
                return
            for pipe in wait(list(self.out), timeout=max(0.0, end - time.monotonic())):
                self._hear(pipe)  # type: ignore[arg-type]
        for process, _ in self.out.values():
            process.kill()
        print(f"time is up: {len(self.out)} fleets were under way", flush=True)

    def _hear(self, pipe: Connection) -> None:
        """A run, or the end of a process."""
        process, fleet = self.out[pipe]
        try:
            identity, found, error = pipe.recv()
        except EOFError:
            process.join()
            del self.out[pipe]
            if process.exitcode:
                self._failed(fleet[0], f"the process ended with {process.exitcode}")
            return
        if error:
            self._failed(identity, error)
            return
        self.store.add(identity | found)
        shown = {k: v for k, v in (identity | found).items() if isinstance(v, (int, float, str))}
        print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in shown.items()), flush=True)

    def _failed(self, identity: Row, error: str) -> None:
        self.store.fail(identity, error.splitlines()[-1])
        print(f"{identity}: {error}", flush=True)


def _child(work: Any, settings: Any, fleet: Fleet, pipe: Connection, memory: float) -> None:
    try:
        if torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(memory)
        for identity, found in work(settings, fleet):
            pipe.send((identity, found, ""))
    except Exception:
        pipe.send((fleet[0], {}, traceback.format_exc().strip()))
    pipe.close()
