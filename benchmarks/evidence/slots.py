"""Memory slots below, at and above the width of a value: ``python -m benchmarks.evidence.slots``.

Lattice with m slots of d numbers and TTT (linear) with a square matrix of as many numbers learn associations, as in
``recall``. Both run at the chunk of their defaults: Lattice exactly, TTT in mini-batches of 16.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.evidence import recall
from benchmarks.evidence.command import Experiment, Fleet, main, sweeps
from benchmarks.evidence.store import Row
from benchmarks.evidence.training import model_of
from mixers.nn import LanguageModel


@dataclass(frozen=True)
class Settings(recall.Settings):
    """Those of ``recall``, and:

    Attributes:
        slots: numbers of slots of Lattice.
        value: numbers of a slot.
        squares: widths of TTT's keys and values; each squared is a number of slots times ``value``.
    """

    slots: tuple[int, ...] = (8, 16, 32, 64, 128)
    value: int = 32
    squares: tuple[int, ...] = (16, 32, 64)
    widths: tuple[int, ...] = ()
    mixers: tuple[str, ...] = ("lattice", "ttt_linear")


FULL = Settings()
SMALL = Settings(
    words=512, length=64, pairs=(2, 4, 8, 16), examined=((64, 4), (64, 8), (64, 16), (128, 32)), d_model=64, batch=16,
    steps=600, rates=(3e-3, 1e-2), seeds=(0, 1), sequences=64, slots=(4, 16, 64), value=16, squares=(8, 16, 32),
)  # fmt: skip
QUICK = Settings(
    words=64, length=32, pairs=(2, 4), examined=((32, 4), (64, 8)), d_model=32, batch=8, steps=6, rates=(1e-2,),
    seeds=(0,), sequences=8, slots=(4, 16), value=8, squares=(8,),
)  # fmt: skip


def fleets(settings: Settings, rows: list[Row]) -> list[Fleet]:
    """Rates and seeds of every mixer and shape."""
    shapes = [("lattice", m, settings.value) for m in settings.slots] + [("ttt_linear", d, d) for d in settings.squares]
    jobs = [{"mixer": mixer, "slots": slots, "value": value} for mixer, slots, value in shapes]
    return sweeps(jobs, settings.rates, settings.seeds, rows)


def work(settings: Settings, fleet: Fleet) -> Iterator[tuple[Row, Row]]:
    """A fleet of one mixer."""
    sizes = {"vocab": settings.words, "d_model": settings.d_model, "layers": settings.layers, "heads": settings.heads}

    def make(run: Row) -> LanguageModel:
        return model_of(run["seed"], mixer=run["mixer"], key_dim=run["slots"], value_dim=run["value"], **sizes)

    return recall.learn(settings, fleet, make)


if __name__ == "__main__":
    main(Experiment("slots", __doc__ or "", FULL, SMALL, QUICK, fleets, work))
