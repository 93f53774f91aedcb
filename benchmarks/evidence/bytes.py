"""A byte-level language model of every mixer: ``python -m benchmarks.evidence.bytes``.

Models of 30 million parameters read the same bytes of the standard library's source, at one learning rate: the loss
against bytes read, bits a byte on held-out files, and what becomes of them on texts 16 times as long as those that were
learned from. HAM with shares of tokens that it keeps, memory caching with lengths of its segments.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.evidence import reading
from benchmarks.evidence.command import Experiment, Fleet, main
from benchmarks.evidence.recall import MIXERS
from benchmarks.evidence.store import Row
from benchmarks.evidence.training import Training, curve, model_of, train
from mixers.nn import KeepBudget


@dataclass(frozen=True)
class Settings:
    """Sizes.

    Attributes:
        d_model, layers, heads, hidden: the model; ``hidden`` is the width inside of its SwiGLU.
        length, batch, steps: bytes of a window, windows a step, and steps.
        rate: the learning rate of all.
        seeds: the first for everything, then the others.
        longer: how much longer the examined windows are, and so many of them.
        windows: see ``longer``.
        shares: of tokens that HAM keeps.
        segments: lengths of memory caching's segments.
    """

    d_model: int = 640
    layers: int = 6
    heads: int = 10
    hidden: int = 1536
    length: int = 512
    batch: int = 32
    steps: int = 400
    rate: float = 1e-3
    seeds: tuple[int, ...] = (0, 1)
    longer: int = 16
    windows: int = 32
    shares: tuple[float, ...] = (0.0, 0.125, 0.25, 0.5, 1.0)
    segments: tuple[int, ...] = (64, 128, 256)
    mixers: tuple[str, ...] = tuple(MIXERS)


FULL = Settings()
SMALL = Settings(
    d_model=128, layers=2, heads=2, hidden=320, length=128, batch=8, steps=300, rate=4e-3, windows=16,
    shares=(0.0, 0.25, 1.0), segments=(32, 64),
)  # fmt: skip
QUICK = Settings(
    d_model=32, layers=2, heads=2, hidden=48, length=32, batch=2, steps=6, seeds=(0,), longer=4, windows=2,
    shares=(0.5,), segments=(16,),
)  # fmt: skip


def fleets(settings: Settings, rows: list[Row]) -> list[Fleet]:
    """One model a process: it fills a GPU."""
    runs: Fleet = []
    for seed in settings.seeds:
        for mixer in settings.mixers:
            if mixer == "ham":
                runs += [{"mixer": mixer, "share": share, "seed": seed} for share in settings.shares]
            elif mixer == "memory_caching":
                runs += [{"mixer": mixer, "segment": segment, "seed": seed} for segment in settings.segments]
            else:
                runs.append({"mixer": mixer, "seed": seed})
    return [[run] for run in runs]


def options(run: Row) -> dict[str, Any]:
    """What makes a run's mixer; a share of 0 or 1 is a threshold that nothing, or everything, reaches."""
    if "share" in run:
        fixed = {0.0: 10.0, 1.0: -10.0}.get(run["share"])
        return {"threshold": fixed} if fixed else {"budget": KeepBudget(run["share"], threshold=0.9, rate=0.02)}
    return {"segment": run["segment"]} if "segment" in run else {}


def work(settings: Settings, fleet: Fleet) -> Iterator[tuple[Row, Row]]:
    """Train and examine."""
    for run in fleet:
        sizes = {"d_model": settings.d_model, "layers": settings.layers, "heads": settings.heads}
        model = model_of(
            run["seed"], vocab=reading.VOCAB, hidden=settings.hidden, mixer=run["mixer"], **sizes, **options(run)
        )
        rows = reading.lessons(run["seed"], settings.steps, settings.batch, settings.length)
        training = Training(model, reading.loss_of, [rows], settings.rate)
        seconds = train([training])
        yield run, report(settings, training) | {"seconds": seconds}


@torch.no_grad()
def report(settings: Settings, training: Training) -> Row:
    """What a training came to."""
    model, length = training.model, settings.length
    short = reading.bits(model, reading.held_out(length, settings.windows * settings.longer), settings.batch)
    found: Row = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bits": float(short.mean()),
        "curve": [value / math.log(2) for value in curve(training.losses)],
        "captured": training.captured,
    }
    if training.budgets:
        found["kept"] = float(training.kept[-max(1, settings.steps // 20) :].mean())
    if training.why:
        found["why"] = training.why
    long = reading.bits(model, reading.held_out(length * settings.longer, settings.windows), 4)
    ends = [length * 2**i for i in range(int(math.log2(settings.longer)) + 1)]
    places = zip([0, *ends], ends, strict=False)
    return found | {"by_place": {str(end): float(long[start:end].mean()) for start, end in places}}


if __name__ == "__main__":
    main(Experiment("bytes", __doc__ or "", FULL, SMALL, QUICK, fleets, work))
