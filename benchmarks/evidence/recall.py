"""Accuracy of associative recall against the size of the state: ``python -m benchmarks.evidence.recall``.

Two-layer models of every mixer, all of the same width, with states of three sizes, learn sequences of 256 words with 4
to 64 pairs (see ``associations``) and are examined on 64 to 1024 words with 4 to 256 pairs. Every mixer gets the same
learning rates with one seed, and more seeds with the rate that did best.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.evidence.associations import associations
from benchmarks.evidence.command import Experiment, Fleet, main, sweeps
from benchmarks.evidence.store import Row
from benchmarks.evidence.training import DEVICE, Training, curve, half, model_of, train
from mixers.nn import KeepBudget, LanguageModel

# What each mixer is given beyond its defaults, those first that take longest.
MIXERS: dict[str, dict[str, Any]] = {
    "ttt_mlp": {},
    "ttt_linear": {},
    "ham": {},
    "memory_caching": {"segment": 64},
    "lattice": {},
    "kda": {},
    "gated_delta_rule": {},
    "delta_rule": {},
    "linear_attention": {},
    "attention": {},
}
KEPT = 0.25  # the share of tokens that HAM's attention is to see


@dataclass(frozen=True)
class Settings:
    """Sizes.

    Attributes:
        words: the vocabulary.
        length, pairs: what is learned.
        examined: lengths and numbers of pairs that are asked about at the end.
        d_model, layers, heads: the model.
        widths: widths of a head's keys and values, which make the state.
        batch, steps: sequences a step, and steps.
        rates, seeds: see ``sweeps``.
        sequences: of each examination.
    """

    words: int = 8192
    length: int = 256
    pairs: tuple[int, ...] = (4, 8, 16, 32, 64)
    examined: tuple[tuple[int, int], ...] = ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
    d_model: int = 128
    layers: int = 2
    heads: int = 2
    widths: tuple[int, ...] = (16, 32, 64)
    batch: int = 32
    steps: int = 1500
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    seeds: tuple[int, ...] = (0, 1, 2)
    sequences: int = 128
    mixers: tuple[str, ...] = tuple(MIXERS)


FULL = Settings()
SMALL = Settings(
    words=512, length=64, pairs=(2, 4, 8, 16), examined=((64, 4), (64, 8), (64, 16), (128, 32)), d_model=64,
    widths=(8, 32), batch=16, steps=600, rates=(3e-3, 1e-2), seeds=(0, 1), sequences=64,
)  # fmt: skip
QUICK = Settings(
    words=64, length=32, pairs=(2, 4), examined=((32, 4), (64, 8)), d_model=32, widths=(16,), batch=8, steps=8,
    rates=(1e-2,), seeds=(0,), sequences=8,
)  # fmt: skip


def fleets(settings: Settings, rows: list[Row]) -> list[Fleet]:
    """Rates and seeds of every mixer and width."""
    jobs = [{"mixer": m, "width": w} for w in reversed(settings.widths) for m in settings.mixers]
    return sweeps(jobs, settings.rates, settings.seeds, rows)


def model(settings: Settings, mixer: str, width: int, seed: int, **options: Any) -> LanguageModel:
    """A model with heads of a width."""
    if mixer == "ham":
        options["budget"] = KeepBudget(KEPT, threshold=0.9, rate=0.02)
    sizes = {"vocab": settings.words, "d_model": settings.d_model, "layers": settings.layers, "heads": settings.heads}
    return model_of(seed, **sizes, mixer=mixer, key_dim=width, value_dim=width, **MIXERS[mixer] | options)


def loss_of(model: LanguageModel, tokens: Tensor, places: Tensor, answers: Tensor) -> Tensor:
    """Mean loss of the answers, in nats."""
    return F.cross_entropy(logits_at(model, tokens, places).flatten(0, 1), answers.flatten())


def logits_at(model: LanguageModel, tokens: Tensor, places: Tensor) -> Tensor:
    """``[B,P,words]`` at the questions."""
    x, _ = model.hidden(tokens.long(), None, return_state=False)
    return model.logits(x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))).float()


def lessons(settings: Settings, seed: int) -> list[Tensor]:
    """Every step's batch, the same for all mixers."""
    make = torch.Generator(DEVICE).manual_seed(seed)
    drawn = associations(settings.steps * settings.batch, settings.length, settings.pairs, settings.words, make)
    return [a.unflatten(0, (settings.steps, settings.batch)) for a in drawn]


@torch.no_grad()
def examine(settings: Settings, model: LanguageModel) -> dict[str, float]:
    """The share of right answers by length and pairs, on sequences that no training sees."""
    found = {}
    for length, pairs in settings.examined:
        make = torch.Generator(DEVICE).manual_seed(10**6 + length)
        tokens, places, answers = associations(settings.sequences, length, [pairs], settings.words, make)
        parts = zip(*(a.split(settings.batch) for a in (tokens, places, answers)), strict=True)
        with half():
            right = [logits_at(model, x, at).argmax(-1) == wanted for x, at, wanted in parts]
        found[f"{length}/{pairs}"] = float(torch.cat(right).float().mean())
    return found


@torch.no_grad()
def state_bytes(settings: Settings, model: LanguageModel) -> float:
    """What a layer carries from token to token for one sequence, behind a sequence as it learned."""
    tokens = lessons(settings, 0)[0][0].long()
    with half():
        _, states = model.hidden(tokens, None)
    total = sum({a.data_ptr(): a.nbytes for s in states or () for a in arrays(s.mixer)}.values())
    return total / len(tokens) / settings.layers


def arrays(state: Any) -> Iterator[Tensor]:
    """The arrays of a state, however deep."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, tuple):
        for part in state:
            yield from arrays(part)


def work(settings: Settings, fleet: Fleet) -> Iterator[tuple[Row, Row]]:
    """A fleet of one mixer."""
    return learn(settings, fleet, lambda run: model(settings, run["mixer"], run["width"], run["seed"]))


def learn(settings: Settings, fleet: Fleet, make: Callable[[Row], LanguageModel]) -> Iterator[tuple[Row, Row]]:
    """Train a fleet's models, then examine them."""
    batches = {seed: lessons(settings, seed) for seed in {run["seed"] for run in fleet}}
    trainings = [Training(make(run), loss_of, batches[run["seed"]], run["rate"]) for run in fleet]
    seconds = train(trainings)
    for run, training in zip(fleet, trainings, strict=True):
        yield run, report(settings, training) | {"fleet_seconds": seconds}


def report(settings: Settings, training: Training) -> Row:
    """What a training came to."""
    found = {
        "loss": float(training.losses[-max(1, settings.steps // 20) :].mean()),
        "state_bytes": state_bytes(settings, training.model),
        "captured": training.captured,
        "curve": curve(training.losses),
    }
    if training.budgets:
        found["kept"] = float(training.kept[-max(1, settings.steps // 20) :].mean())
    if training.why:
        found["why"] = training.why
    accuracy = examine(settings, training.model)
    return found | {"accuracy": accuracy, "score": statistics.mean(accuracy.values())}


if __name__ == "__main__":
    main(Experiment("recall", __doc__ or "", FULL, SMALL, QUICK, fleets, work))
