"""Train a model for a while, and judge it.

    loss = mean over bytes of −log p(byte | what came before in its window)
    the learning rate rises over the first tenth of the time and falls to zero at its end

Time is what is shared out: every model gets the same number of seconds, however many bytes it reads in them; or the
same number of steps, which read the same bytes on any machine.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.demo.text import VOCAB, Text
from mixers.nn import LanguageModel

LENGTH = 256
BATCH = 8
BYTES_PER_STEP = BATCH * LENGTH
LEARNING_RATE = 6e-3
SIZES = {"vocab": VOCAB, "d_model": 128, "layers": 2, "heads": 2}


@dataclass
class Run:
    """What came of a training.

    Attributes:
        mixer: its name.
        seconds: time at each step.
        losses: bits a byte of each step's batch.
        bits: bits a byte on the held-out files.
        warmup: seconds of the first step, which compiles the kernels.
        kernels: which could have run, which ran, and why.
    """

    mixer: str
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    bits: float = math.nan
    warmup: float = math.nan
    kernels: str = ""

    @property
    def tokens_per_second(self) -> float:
        """Bytes learned from, by second of training."""
        return len(self.losses) * BYTES_PER_STEP / self.seconds[-1]


def optimizer_of(model: LanguageModel) -> torch.optim.AdamW:
    """Matrices decay; gains, gates, filters and first states do not."""
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    groups = [
        {"params": [p for p in model.parameters() if id(p) in linear], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if id(p) not in linear], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))


def loss_of(model: LanguageModel, rows: Tensor) -> Tensor:
    """Mean loss of windows ``[B,L+1]`` in nats, over what is not −1."""
    rows = rows.to(model.embed.weight.device)
    logits, _ = model(rows[:, :-1].clamp(min=0), return_state=False)
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), ignore_index=-1)


def update(model: LanguageModel, optimizer: torch.optim.Optimizer, rows: Tensor, rate: float) -> float:
    """One step; returns bits a byte."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = loss_of(model, rows)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item() / math.log(2)


def train(
    mixer: str, text: Text, seconds: float, steps: int, device: str, report: Callable[[Run], None]
) -> tuple[LanguageModel, torch.optim.Optimizer, Run]:
    """Train a model of one mixer, compilation not counted, calling ``report`` at every step.

    For so many steps; where that is 0, for so many seconds.
    """
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = LanguageModel(**SIZES, mixer=mixer).to(device)  # the same weights everywhere
    optimizer = optimizer_of(model)
    run = Run(mixer, kernels=kernels(model))

    start = time.perf_counter()
    loss_of(model, text.draw(LENGTH, BATCH, generator)).backward()
    run.warmup = time.perf_counter() - start

    start, done = time.perf_counter(), 0.0
    while done < 1:
        rate = LEARNING_RATE * min(10 * done + 0.01, 1.0, (1 - done) / 0.9)
        run.losses.append(update(model, optimizer, text.draw(LENGTH, BATCH, generator), rate))
        run.seconds.append(time.perf_counter() - start)
        done = len(run.losses) / steps if steps else run.seconds[-1] / seconds
        report(run)
    return model, optimizer, run


@torch.no_grad()
def bits_on(model: LanguageModel, text: Text) -> float:
    """Bits a byte on the held-out files, cut into windows as in training."""
    total, count = 0.0, 0
    for rows in text.windows(LENGTH, 4 * BATCH):
        real = int((rows[:, 1:] >= 0).sum())
        total += loss_of(model, rows).item() * real
        count += real
    return total / count / math.log(2)


def kernels(model: LanguageModel) -> str:
    """Every kernel that could serve the model's first layer, the one that does, and why."""
    layer = model.blocks[0].mixer
    device = model.embed.weight.device
    x = torch.zeros(BATCH, LENGTH, model.config["d_model"], device=device)
    q, k, v = (torch.zeros(BATCH, LENGTH, *shape, device=device) for shape in layer.shapes)
    return str(layer.mix.explain(q, k, v, **{name: gate(x) for name, gate in layer.gates.items()}))
