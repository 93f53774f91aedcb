"""Loss against the kept share on a recall task: ``python -m benchmarks.recall``.

A sequence is pairs of a key and a value, one a token, then questions: a key that was seen, whose value is to be named.
There are more pairs than a small recurrence can hold. Every run trains the same two-layer model of ``HybridLayer``
blocks with a budget (``KeepBudget``) that moves the threshold towards a share of tokens to keep; a share of 0 is the
recurrence alone, of 1 full attention beside it. Loss and accuracy are those of the questions, on new sequences. Writes
``benchmarks/results/recall.json``, from which the docs draw.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixers.nn import HybridLayer, KeepBudget

RESULT = Path(__file__).resolve().parent / "results" / "recall.json"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def batch(rows: int, pairs: int, questions: int, words: int, make: torch.Generator) -> tuple[Tensor, Tensor]:
    """Keys and values of all tokens ``[B,T,2]``, ``words`` for the value of a question; its answer, −100 elsewhere."""
    keys = torch.rand(rows, words, generator=make).argsort(1)[:, :pairs]
    values = torch.randint(words, (rows, pairs), generator=make)
    asked = torch.rand(rows, pairs, generator=make).argsort(1)[:, :questions]
    unknown = torch.full_like(asked, words)
    x = torch.stack([torch.cat([keys, keys.gather(1, asked)], 1), torch.cat([values, unknown], 1)], dim=2)
    answers = torch.cat([torch.full_like(keys, -100), values.gather(1, asked)], dim=1)
    return x.to(DEVICE), answers.to(DEVICE)


class Model(nn.Module):
    """Embedding, blocks of a hybrid layer and a perceptron, and a head."""

    def __init__(self, words: int, width: int, heads: int, share: float, depth: int = 2) -> None:
        """See the class."""
        super().__init__()
        # Shares of 0 and 1 are thresholds that nothing, or everything, reaches.
        fixed = {0.0: 10.0, 1.0: -10.0}.get(share)
        self.budgets = nn.ModuleList(KeepBudget(share, threshold=0.9, rate=0.02) for _ in range(0 if fixed else depth))
        self.keys, self.values = nn.Embedding(words, width), nn.Embedding(words + 1, width)
        self.mixers, self.mlps = nn.ModuleList(), nn.ModuleList()
        for i in range(depth):
            budget = {"threshold": fixed} if fixed else {"budget": self.budgets[i]}
            self.mixers.append(HybridLayer(d_model=width, heads=heads, key_dim=width // heads, **budget))
            self.mlps.append(nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)))
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2 * depth + 1))
        self.head = nn.Linear(width, words)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B,T,words]``."""
        x = self.keys(x[..., 0]) + self.values(x[..., 1])
        for i, (mixer, mlp) in enumerate(zip(self.mixers, self.mlps, strict=True)):
            x = x + mixer(self.norms[2 * i](x))[0]
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.head(self.norms[-1](x))

    def kept(self, x: Tensor) -> float:
        """The share of tokens that is kept, all layers together."""
        shares = []
        hooks = []
        for mixer in self.mixers:
            ran = mixer._ran

            def watch(result: Any, real: Tensor | None, ran: Any = ran) -> None:
                shares.append(float(result.kept.float().mean()))
                ran(result, real)

            mixer._ran = watch
            hooks.append((mixer, ran))
        self(x)
        for mixer, _ in hooks:
            del mixer._ran
        return statistics.mean(shares)


def run(share: float, seed: int, chosen: argparse.Namespace) -> dict[str, Any]:
    """Train one model and examine it."""
    torch.manual_seed(seed)
    make = torch.Generator().manual_seed(seed)
    sizes = chosen.pairs, chosen.questions, chosen.words
    model = Model(chosen.words, chosen.width, chosen.heads, share).to(DEVICE)
    optimiser = torch.optim.AdamW(model.parameters(), lr=chosen.rate, weight_decay=0.01)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimiser, chosen.rate, total_steps=chosen.steps, pct_start=0.1)
    start = time.perf_counter()
    for _ in range(chosen.steps):
        x, answers = batch(chosen.batch, *sizes, make)
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1), answers.flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        plan.step()
        for budget in model.budgets:
            budget.step()
    model.eval()
    examined = torch.Generator().manual_seed(10**6 + seed)
    with torch.no_grad():
        x, answers = batch(4 * chosen.batch, *sizes, examined)
        logits, asked = model(x), answers >= 0
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten())
        right = (logits.argmax(-1) == answers)[asked].float().mean()
        kept = model.kept(x)
    return {
        "target": share, "seed": seed, "kept": kept, "loss": float(loss), "accuracy": float(right),
        "seconds": time.perf_counter() - start,
    }  # fmt: skip


def main() -> None:
    """Train every share with every seed, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recall", description=__doc__)
    parser.add_argument("--shares", nargs="+", type=float, default=[0, 0.125, 0.25, 0.5, 0.75, 1])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=96)
    parser.add_argument("--questions", type=int, default=48)
    parser.add_argument("--words", type=int, default=256)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--out", type=Path, default=RESULT)
    chosen = parser.parse_args()
    found: dict[str, Any] = {
        "machine": {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": " ".join(["python -m benchmarks.recall", *sys.argv[1:]]),
            "gpu": torch.cuda.get_device_name() if DEVICE == "cuda" else "",
            "cpu": platform.machine(),
            "cores": os.cpu_count(),
            "versions": {"torch": torch.__version__},
        },
        "runs": [],
    }
    for share in chosen.shares:
        for seed in range(chosen.seeds):
            row = run(float(share), seed, chosen)
            found["runs"].append(row)
            print(" ".join(f"{name}={value:.4g}" for name, value in row.items()), flush=True)
            chosen.out.parent.mkdir(parents=True, exist_ok=True)
            chosen.out.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
