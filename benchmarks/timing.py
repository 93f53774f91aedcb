"""Time functions side by side: in one process, in turns, each turn left alone by the thread pools of the others.

torch, JAX and Numba keep a pool of threads each, and a pool that has just worked spins for a while. So every turn
starts with a pause, runs the function untimed until its own pool is awake, and only then reads the clock.
"""

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

PAUSE = 0.02
WARM = 0.005
LONG = 0.3  # seconds of a call beside which a pool's awakening is nothing


@dataclass(frozen=True)
class Timing:
    """Seconds a call, one number a turn."""

    turns: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle turn."""
        return statistics.median(self.turns)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, relative to the median."""
        if len(self.turns) < 4:
            return (max(self.turns) - min(self.turns)) / 2 / self.median
        low, _, high = statistics.quantiles(self.turns, n=4)
        return (high - low) / 2 / self.median


def wait(result: Any) -> Any:
    """Block until a result is computed: JAX and GPUs answer before they are done."""
    if "jax" in sys.modules:
        import jax

        if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(result)):
            jax.block_until_ready(result)
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
    return result


def once(run: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    wait(run())
    return time.perf_counter() - start


def turn(run: Callable[[], Any], *, seconds: float = 0.03, calls: int = 50) -> float:
    """Seconds a call: a pause, calls until the pool is awake, then the mean of as many as fit into ``seconds``.

    A long call is its own turn.
    """
    time.sleep(PAUSE)
    spent = last = once(run)
    if last > LONG:
        return last
    while spent < WARM:
        last = once(run)
        spent += last
    number = max(1, min(calls, int(seconds / max(last, 1e-9))))
    start = time.perf_counter()
    for _ in range(number):
        result = run()
        wait(result)
    return (time.perf_counter() - start) / number


def alternate(runs: Mapping[str, Callable[[], Any]], rounds: int = 11) -> dict[str, Timing]:
    """Time functions in turns, so that whatever else the machine does meets them all alike."""
    for run in runs.values():
        wait(run())
    turns: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for number in range(rounds):
        for name in order if number % 2 == 0 else reversed(order):
            turns[name].append(turn(runs[name]))
    return {name: Timing(tuple(seconds)) for name, seconds in turns.items()}


def fastest(runs: Mapping[str, Callable[[], Any]], rounds: int = 3) -> str:
    """The name of the fastest function, by a short race."""
    if len(runs) == 1:
        return next(iter(runs))
    timings = alternate(runs, rounds)
    return min(timings, key=lambda name: min(timings[name].turns))
