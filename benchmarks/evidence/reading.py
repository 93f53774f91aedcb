"""The source of Python's standard library as lessons, and bits a byte on files that were held out.

window = NUL, then L bytes from anywhere in the training files: the model reads the first L and predicts the last L
"""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.demo.text import VOCAB as VOCAB
from benchmarks.demo.text import Text, standard_library
from benchmarks.evidence.training import DEVICE, half
from mixers.nn import LanguageModel

HELD_OUT_BYTES = 640 * 1024


@functools.cache
def library() -> Text:
    """The text of this Python."""
    return standard_library(HELD_OUT_BYTES)


def lessons(seed: int, steps: int, batch: int, length: int) -> Tensor:
    """``[S,B,L+1]`` bytes, the same for every model of a seed."""
    make = torch.Generator().manual_seed(seed)
    train = library().train.to(DEVICE)
    starts = torch.randint(len(train) - length, (steps, batch, 1), generator=make).to(DEVICE)
    rows = torch.empty(steps, batch, length + 1, dtype=torch.uint8, device=DEVICE)
    rows[..., 0] = 0
    for step in range(steps):
        rows[step, :, 1:] = train[starts[step] + torch.arange(length, device=DEVICE)]
    return rows


def held_out(length: int, most: int) -> Tensor:
    """Held-out files, one after another, cut into at most so many windows ``[W,L+1]``; a file begins with a NUL."""
    data = torch.frombuffer(bytearray(b"\0".join(library().held_out)), dtype=torch.uint8).to(DEVICE)
    windows = data[: len(data) // length * length].reshape(-1, length)[:most]
    return F.pad(windows, (1, 0))


def loss_of(model: LanguageModel, rows: Tensor) -> Tensor:
    """Mean loss of windows ``[B,L+1]``, in nats."""
    return losses_of(model, rows).mean()


def losses_of(model: LanguageModel, rows: Tensor) -> Tensor:
    """``[B,L]``, in nats."""
    rows = rows.long()
    logits, _ = model(rows[:, :-1], return_state=False)
    return F.cross_entropy(logits.float().transpose(1, 2), rows[:, 1:], reduction="none")


@torch.no_grad()
def bits(model: LanguageModel, windows: Tensor, batch: int) -> Tensor:
    """Mean bits a byte at every place of held-out windows, ``[L]``."""
    with half():
        found = torch.cat([losses_of(model, rows) for rows in windows.split(batch)])
    return found.double().mean(0) / math.log(2)


@torch.no_grad()
def overheard(model: LanguageModel, rows: Tensor) -> list[dict[str, Any]]:
    """What each block's mixer is called with on windows ``[B,L+1]``, and under ``state`` where it ends."""
    heard: list[dict[str, Any]] = []
    hooks = []
    for block in model.blocks:
        layer, mix = block.mixer, block.mixer.mix

        def call(q: Tensor, k: Tensor, v: Tensor, mix: Any = mix, **more: Any) -> Any:
            result = mix(q, k, v, **more)
            heard.append({"q": q, "k": k, "v": v, **more, "state": result.state})
            return result

        hooks.append((layer, mix))
        layer.mix = _Ear(mix, call)
    try:
        with half():
            model(rows[:, :-1].long())
    finally:
        for layer, mix in hooks:
            layer.mix = mix
    return heard


class _Ear:
    """A mixer that tells of its calls."""

    def __init__(self, mix: Any, call: Any) -> None:
        """See the class."""
        self.spec, self.options, self.__dict__["call"] = mix.spec, mix.options, call

    def __call__(self, *arrays: Tensor, **more: Any) -> Any:
        """As the mixer's."""
        return self.__dict__["call"](*arrays, **more)
