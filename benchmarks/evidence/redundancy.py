"""What memory slots do over time: ``python -m benchmarks.evidence.redundancy``.

Small byte-level models of Lattice and of the delta rule learn text. Then three recurrences run over held-out text, on
what the trained layers feed their mixers, and every token's update Δ_i of slot s_i is looked at:

    orthogonal   Δ_i = k_i (h − s_i⟨s_i,h⟩),   s_i ← norm(s_i + beta Δ_i)     Lattice as trained, h = v − Sᵀk
    plain        Δ_i = k_i h,                  s_i ← norm(s_i + beta Δ_i)     the same layers' inputs, unprojected
    delta        Δ_i = k_i h,                  s_i ← s_i + beta Δ_i           the delta rule as trained

    cosine       ⟨Δ_i, s_i⟩ / (‖Δ_i‖‖s_i‖)
    angle        between s_i before and after a token, degrees
    correlation  mean of |⟨s_i, s_j⟩| / (‖s_i‖‖s_j‖) over i ≠ j
    rank         exp of the entropy of σ² / Σσ², σ the singular values of the slots, each divided by its norm
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.evidence import reading
from benchmarks.evidence.command import Experiment, Fleet, main
from benchmarks.evidence.store import Row
from benchmarks.evidence.training import DEVICE, Training, model_of, train

UPDATES = {"orthogonal": "lattice", "plain": "lattice", "delta": "delta_rule"}
COSINES = torch.linspace(-1, 1, 41)
ANGLES = torch.cat([torch.zeros(1), torch.logspace(-3, 2.2553, 43)])  # the last is 180 degrees
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Settings:
    """Sizes.

    Attributes:
        d_model, layers, heads: the model.
        length, batch, steps: bytes of a window, windows a step, and steps.
        rate, seeds: every seed.
        examined, windows: bytes of a held-out window, and so many.
    """

    d_model: int = 128
    layers: int = 2
    heads: int = 2
    length: int = 1024
    batch: int = 16
    steps: int = 1000
    rate: float = 4e-3
    seeds: tuple[int, ...] = (0, 1, 2)
    examined: int = 1024
    windows: int = 8


FULL = Settings()
SMALL = Settings(d_model=64, length=256, batch=4, steps=400, rate=6e-3, seeds=(0, 1), examined=512, windows=4)
QUICK = Settings(d_model=32, length=32, batch=2, steps=6, seeds=(0,), examined=32, windows=2)


def fleets(settings: Settings, rows: list[Row]) -> list[Fleet]:
    """A fleet a trained mixer."""
    return [
        [{"update": update, "seed": seed} for seed in settings.seeds for update in UPDATES if UPDATES[update] == mixer]
        for mixer in dict.fromkeys(UPDATES.values())
    ]


def work(settings: Settings, fleet: Fleet) -> Iterator[tuple[Row, Row]]:
    """Train a model a seed, then watch its layers under each update."""
    mixer = UPDATES[fleet[0]["update"]]
    sizes = {"vocab": reading.VOCAB, "d_model": settings.d_model, "layers": settings.layers, "heads": settings.heads}
    trainings = {
        seed: Training(
            model_of(seed, mixer=mixer, **sizes),
            reading.loss_of,
            [reading.lessons(seed, settings.steps, settings.batch, settings.length)],
            settings.rate,
        )
        for seed in sorted({run["seed"] for run in fleet})
    }
    train(list(trainings.values()))
    windows = reading.held_out(settings.examined, settings.windows)
    for run in fleet:
        model = trainings[run["seed"]].model
        layers = [watch(heard, run["update"]) for heard in reading.overheard(model, windows)]
        yield run, {"bits": float(reading.bits(model, windows, settings.batch).mean()), "layers": layers}


@torch.no_grad()
def watch(heard: dict[str, Any], update: str) -> Row:
    """One layer's slots through held-out windows."""
    k, v, beta = (heard[name].float() for name in ("k", "v", "beta"))
    if update == "delta":  # the mixer divides its keys itself
        k = k / torch.sqrt(k.square().sum(-1, keepdim=True) + 1e-6)
    rows, tokens, heads, width = k.shape
    first = heard.get("initial_state")
    slots = torch.zeros(rows, heads, width, v.shape[-1], device=DEVICE) if first is None else first.float().expand(
        rows, -1, -1, -1
    )  # fmt: skip
    if update != "delta":
        slots = F.normalize(slots, dim=-1)
    cosines, angles = _Histogram(COSINES), _Histogram(ANGLES)
    times, correlation, rank = [], [], []
    for t in range(tokens):
        now = step(slots, k[:, t], v[:, t], beta[:, t], update, cosines)
        unit, after = F.normalize(slots, dim=-1), F.normalize(now, dim=-1)
        known = slots.square().sum(-1) > 1e-12
        # Of two unit vectors: 2 asin(‖a − b‖/2), which holds its digits where they are close.
        turned = 2 * torch.asin(((after - unit).square().sum(-1).sqrt() / 2).clamp(max=1))
        angles.add(torch.rad2deg(turned)[known])
        slots = now
        if t + 1 == tokens or (t + 1) & t == 0:
            times.append(t + 1)
            correlation.append(_correlation(slots))
            rank.append(_rank(slots))
    return {
        "cosine": cosines.found(), "angle": angles.found(),
        "time": times, "correlation": correlation, "rank": rank, "norm": float(slots.norm(dim=-1).mean()),
    }  # fmt: skip


def step(slots: Tensor, k: Tensor, v: Tensor, beta: Tensor, update: str, cosines: "_Histogram") -> Tensor:
    """One token: ``slots [B,H,K,V]``, ``k [B,H,K]``, ``v [B,H,V]``, ``beta [B,H]``."""
    error = v - torch.einsum("bhkv,bhk->bhv", slots, k)
    change = k[..., None] * error[:, :, None]
    if update == "orthogonal":
        along = torch.einsum("bhkv,bhv->bhk", slots, error)
        change = change - (k * along)[..., None] * slots
    cosine = F.cosine_similarity(change, slots, dim=-1, eps=1e-12)
    cosines.add(cosine[(slots.square().sum(-1) > 1e-12) & (change.square().sum(-1) > 1e-24)])
    moved = slots + beta[..., None, None] * change
    return moved if update == "delta" else F.normalize(moved, dim=-1)


def _correlation(slots: Tensor) -> float:
    unit = F.normalize(slots, dim=-1)
    off = (unit @ unit.mT).abs()
    n = off.shape[-1]
    return float((off.sum((-1, -2)) - off.diagonal(dim1=-2, dim2=-1).sum(-1)).mean() / (n * (n - 1)))


def _rank(slots: Tensor) -> float:
    share = torch.linalg.svdvals(F.normalize(slots, dim=-1).double()).square()
    share = share / share.sum(-1, keepdim=True).clamp(min=1e-30)
    return float(torch.exp(-(share * share.clamp(min=1e-30).log()).sum(-1)).mean())


class _Histogram:
    """Counts between edges, and quantiles of a sample."""

    def __init__(self, edges: Tensor) -> None:
        """See the class."""
        self.edges = edges.to(DEVICE)
        self.counts = torch.zeros(len(edges) - 1, dtype=torch.int64, device=DEVICE)
        self.sample: list[Tensor] = []

    def add(self, values: Tensor) -> None:
        """Count values, and keep a few of them."""
        values = values.flatten()
        place = torch.bucketize(values.contiguous(), self.edges[1:-1], right=True)
        self.counts += torch.bincount(place, minlength=len(self.counts))
        self.sample.append(values[:: max(1, len(values) // 64)])

    def found(self) -> Row:
        """As JSON."""
        sample = torch.cat(self.sample)
        points = torch.quantile(sample, torch.tensor(QUANTILES, device=DEVICE)) if len(sample) else torch.zeros(5)
        return {
            "edges": [round(x, 6) for x in self.edges.tolist()],
            "counts": self.counts.tolist(),
            "quantiles": dict(zip(map(str, QUANTILES), points.tolist(), strict=True)),
        }


if __name__ == "__main__":
    main(Experiment("redundancy", __doc__ or "", FULL, SMALL, QUICK, fleets, work))
