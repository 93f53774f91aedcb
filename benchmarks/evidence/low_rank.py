"""Singular values of keys and values, and what Lattice keeps of them: ``python -m benchmarks.evidence.low_rank``.

Models of attention and of Lattice learn text. On held-out text, per layer and head, the keys ``[T,K]`` and values
``[T,V]`` of a window are decomposed, attention's keys before they are rotated by their positions and after it, and so
are Lattice's slots behind the window. What the slots keep: the share of ‖V‖² that lies in their r first directions,
beside the most that any r directions hold.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.evidence import reading
from benchmarks.evidence.command import Experiment, Fleet, main
from benchmarks.evidence.store import Row
from benchmarks.evidence.training import Training, model_of, train
from mixers.nn.rotary import positions, rotate


@dataclass(frozen=True)
class Settings:
    """Sizes.

    Attributes:
        d_model, layers, heads: the model.
        length, batch, steps: bytes of a window, windows a step, and steps.
        rate, seeds: every seed.
        windows: held-out windows.
    """

    d_model: int = 256
    layers: int = 4
    heads: int = 4
    length: int = 1024
    batch: int = 16
    steps: int = 1000
    rate: float = 2e-3
    seeds: tuple[int, ...] = (0, 1, 2)
    windows: int = 16
    mixers: tuple[str, ...] = ("attention", "lattice")


FULL = Settings()
SMALL = Settings(d_model=64, layers=2, heads=2, length=256, batch=4, steps=400, rate=6e-3, seeds=(0, 1))
QUICK = Settings(d_model=32, layers=2, heads=2, length=32, batch=2, steps=6, seeds=(0,), windows=2)


def fleets(settings: Settings, rows: list[Row]) -> list[Fleet]:
    """A fleet a mixer."""
    return [[{"mixer": mixer, "seed": seed} for seed in settings.seeds] for mixer in settings.mixers]


def work(settings: Settings, fleet: Fleet) -> Iterator[tuple[Row, Row]]:
    """Train, then decompose."""
    sizes = {"vocab": reading.VOCAB, "d_model": settings.d_model, "layers": settings.layers, "heads": settings.heads}
    trainings = [
        Training(
            model_of(run["seed"], mixer=run["mixer"], **sizes),
            reading.loss_of,
            [reading.lessons(run["seed"], settings.steps, settings.batch, settings.length)],
            settings.rate,
        )
        for run in fleet
    ]
    train(trainings)
    windows = reading.held_out(settings.length, settings.windows)
    for run, training in zip(fleet, trainings, strict=True):
        layers = [spectra(heard, run["mixer"]) for heard in reading.overheard(training.model, windows)]
        bits = reading.bits(training.model, windows, settings.batch)
        yield run, {"bits": float(bits.mean()), "layers": layers}


@torch.no_grad()
def spectra(heard: dict[str, Any], mixer: str) -> dict[str, list[float]]:
    """Shares of the sum of squares by rank, cumulated, means over windows and heads."""
    k, v = (heard[name].double().transpose(1, 2) for name in ("k", "v"))  # [B,H,T,·]
    found = {"keys": cumulated(k), "values": cumulated(v)}
    if mixer == "attention":
        places = positions(k.shape[2], None, None, k.device)
        found["keys_unrotated"] = cumulated(rotate(heard["k"].double(), -places).transpose(1, 2))
        return found
    slots = heard["state"].double()
    directions = torch.linalg.svd(slots, full_matrices=False).Vh  # [B,H,r,V]
    held = (v @ directions.mT).square().sum(2).cumsum(-1) / v.square().sum((2, 3))[..., None]
    return found | {"slots": cumulated(slots), "values_in_slots": held.mean((0, 1)).tolist()}


def cumulated(rows: Tensor) -> list[float]:
    """``[B,H,T,V]``: the share of the sum of squares in the r largest singular values, r = 1 … V."""
    squares = torch.linalg.svdvals(rows).square()
    shares: list[float] = (squares.cumsum(-1) / squares.sum(-1, keepdim=True)).mean((0, 1)).tolist()
    return shares


if __name__ == "__main__":
    main(Experiment("low_rank", __doc__ or "", FULL, SMALL, QUICK, fleets, work))
