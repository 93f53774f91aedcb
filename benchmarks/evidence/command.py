"""The command line that the experiments share: fleets of runs, a process each, until time ends.

A fleet is a list of runs that learn side by side in one process. A process that dies takes nothing with it but what it
had not reported.
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

from benchmarks.evidence.store import RESULTS, Row, Store

S = TypeVar("S")
Fleet = list[Row]


@dataclass(frozen=True)
class Experiment(Generic[S]):
    """What a script measures.

    Attributes:
        name: of its file.
        says: what it is about, in words.
        full: settings of the committed results.
        quick: settings that show in seconds that all of it runs.
        fleets: all runs, as lists of what identifies each.
        work: runs a fleet; yields ``(identity, found)`` as runs end.
    """

    name: str
    says: str
    full: S
    quick: S
    fleets: Callable[[S], list[Fleet]]
    work: Callable[[S, Fleet], Iterator[tuple[Row, Row]]]


def main(experiment: Experiment[Any], words: Sequence[str] | None = None) -> None:
    """Run what the file does not have yet."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.evidence.{experiment.name}",
        description=experiment.says,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds; what is not done then is left out")
    parser.add_argument("--workers", type=int, default=4, help="processes that share the GPU")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, into runs/evidence: shows that it all runs")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME=VALUE", help="runs whose identity says so")
    parser.add_argument("--out", type=Path, help="the JSON; by default the committed one")
    chosen = parser.parse_args(words)
    settings = experiment.quick if chosen.quick else experiment.full
    home = Path("runs/evidence") if chosen.quick else RESULTS
    store = Store(chosen.out or home / f"{experiment.name}.json", asdict(settings))
    wanted = dict(word.split("=", 1) for word in chosen.only)
    todo = [
        [run for run in fleet if not store.has(run) and all(str(run.get(k)) == v for k, v in wanted.items())]
        for fleet in experiment.fleets(settings)
    ]
    sail(experiment, settings, [fleet for fleet in todo if fleet], store, chosen.workers, chosen.budget)


def sail(
    experiment: Experiment[Any], settings: Any, todo: list[Fleet], store: Store, workers: int, budget: float
) -> None:
    """Fleets in their order, so many at a time, until they or the seconds end."""
    spawn, end = multiprocessing.get_context("spawn"), time.monotonic() + budget
    sailing: dict[Connection, tuple[Any, Fleet]] = {}
    while (todo or sailing) and time.monotonic() < end:
        while todo and len(sailing) < workers:
            fleet = todo.pop(0)
            ours, theirs = spawn.Pipe(duplex=False)
            process = spawn.Process(target=_child, args=(experiment.work, settings, fleet, theirs), daemon=True)
            process.start()
            theirs.close()
            sailing[ours] = process, fleet
        for pipe in wait(list(sailing), timeout=max(0.0, end - time.monotonic())):
            _hear(pipe, sailing, store)  # type: ignore[arg-type]
    for process, _ in sailing.values():
        process.kill()
    if todo or sailing:
        print(f"time is up: {len(todo) + len(sailing)} fleets are not through")


def _hear(pipe: Connection, sailing: dict[Connection, tuple[Any, Fleet]], store: Store) -> None:
    """A run, or the end of a process."""
    process, fleet = sailing[pipe]
    try:
        identity, found, error = pipe.recv()
    except EOFError:
        process.join()
        del sailing[pipe]
        if process.exitcode:
            store.fail(fleet[0], f"the process ended with {process.exitcode}")
            print(f"{fleet[0]}: the process ended with {process.exitcode}", flush=True)
        return
    if error:
        store.fail(identity, error.splitlines()[-1])
        print(f"{identity}: {error}", flush=True)
    else:
        store.add(identity | found)
        shown = {k: v for k, v in found.items() if isinstance(v, (int, float, str))}
        words = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in (identity | shown).items())
        print(" ".join(words), flush=True)


def _child(work: Any, settings: Any, fleet: Fleet, pipe: Connection) -> None:
    try:
        for identity, found in work(settings, fleet):
            pipe.send((identity, found, ""))
    except Exception:
        pipe.send((fleet[0], {}, traceback.format_exc()))
    pipe.close()
