"""Lattice at chunks of 1 to 256 tokens, loss and speed: ``python -m benchmarks.evidence.chunk_size``.

A chunk is part of Lattice's model: the gradients of so many tokens are taken at one base point. Small byte-level models
of every chunk size read the same text; beside them stands the time of the mixer alone, forward and backward.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

import mixers
from benchmarks import timing
from benchmarks.evidence import reading
from benchmarks.evidence.command import Experiment, Fleet, main, sweeps
from benchmarks.evidence.store import Row
from benchmarks.evidence.training import DEVICE, GPU, Training, curve, model_of, train


@dataclass(frozen=True)
class Settings:
    """Sizes.

    Attributes:
        chunks: sizes of a chunk.
        d_model, layers, heads: the model.
        length, batch, steps: bytes of a window, windows a step, and steps.
        rates, seeds: see ``sweeps``.
        windows: held-out windows.
        timed: batch, tokens, heads and width of the timed call, in bfloat16.
    """

    chunks: tuple[int, ...] = (1, 4, 16, 64, 256)
    d_model: int = 128
    layers: int = 2
    heads: int = 2
    length: int = 1024
    batch: int = 16
    steps: int = 1000
    rates: tuple[float, ...] = (2e-3, 6e-3)
    seeds: tuple[int, ...] = (0, 1, 2)
    windows: int = 256
    timed: tuple[int, int, int, int] = (8, 2048, 16, 64)


FULL = Settings()
SMALL = Settings(
    d_model=64, length=256, batch=4, steps=400, rates=(6e-3,), seeds=(0, 1), windows=64, timed=(1, 1024, 8, 64)
)
QUICK = Settings(
    chunks=(1, 16), d_model=32, length=32, batch=2, steps=6, rates=(2e-3,), seeds=(0,), windows=2, timed=(1, 64, 2, 16)
)


def fleets(settings: Settings, rows: list[Row]) -> list[Fleet]:
    """The times first, alone; then rates and seeds of every chunk size."""
    jobs = [{"chunk_size": c, "what": "loss"} for c in settings.chunks]
    times = [{"chunk_size": c, "what": "time"} for c in settings.chunks]
    return [times, *sweeps(jobs, settings.rates, settings.seeds, rows)]


def work(settings: Settings, fleet: Fleet) -> Iterator[tuple[Row, Row]]:
    """Times, or a fleet of trainings."""
    if fleet[0]["what"] == "time":
        for run in fleet:
            yield run, times(settings, run["chunk_size"])
        return
    sizes = {"vocab": reading.VOCAB, "d_model": settings.d_model, "layers": settings.layers, "heads": settings.heads}
    lessons = {s: reading.lessons(s, settings.steps, settings.batch, settings.length) for s in settings.seeds}
    trainings = [
        Training(
            model_of(r["seed"], mixer="lattice", chunk_size=r["chunk_size"], **sizes),
            reading.loss_of,
            [lessons[r["seed"]]],
            r["rate"],
        )
        for r in fleet
    ]
    train(trainings)
    windows = reading.held_out(settings.length, settings.windows)
    for run, training in zip(fleet, trainings, strict=True):
        bits = float(reading.bits(training.model, windows, settings.batch).mean())
        yield run, {"bits": bits, "score": -bits, "captured": training.captured, "curve": curve(training.losses)}


def times(settings: Settings, chunk: int) -> Row:
    """Milliseconds of the mixer alone, on a GPU as CUDA graphs; medians of 7 turns."""
    batch, tokens, heads, width = settings.timed
    make = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(3, batch, tokens, heads, width, generator=make, device=DEVICE)
    x[:2] = torch.nn.functional.normalize(x[:2], dim=-1)
    dtype = torch.bfloat16 if GPU else torch.float32
    beta = torch.rand(batch, tokens, heads, generator=make, device=DEVICE)
    arrays = [a.to(dtype).requires_grad_() for a in (x[0], x[1], x[2] / width**0.5)] + [beta.requires_grad_()]
    dy = torch.randn(x[2].shape, generator=make, device=DEVICE).to(dtype)
    mix = mixers.get("lattice", chunk_size=chunk)

    def forward() -> Any:
        with torch.no_grad():
            return mix(*arrays[:3], beta=arrays[3], return_state=False).y

    def both() -> Any:
        return torch.autograd.grad(mix(*arrays[:3], beta=arrays[3], return_state=False).y, arrays, dy)

    return {name: _milliseconds(run) for name, run in (("forward_ms", forward), ("forward_backward_ms", both))}


def _milliseconds(run: Any) -> float:
    if GPU:
        from benchmarks.gpu import graph

        run = graph(run)
    return 1e3 * timing.alternate({"": run}, 7)[""].median


if __name__ == "__main__":
    main(Experiment("chunk_size", __doc__ or "", FULL, SMALL, QUICK, fleets, work))
