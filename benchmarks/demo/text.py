"""Real text that every machine with Python has: the source of its own standard library.

    file = bytes          window = NUL, then L bytes of a file: the model reads the first L and predicts the last L

Source holds no NUL, so it stands for "here begins something".
"""

import itertools
import lzma
import math
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

VOCAB = 256
# Other people's packages, tests (left out of some installations) and tables of numbers.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
HELD_OUT_BYTES = 96 * 1024


@dataclass(frozen=True)
class Text:
    """Files to learn from and files to be judged by.

    Attributes:
        train: every training file, one after another, each behind a NUL.
        held_out: whole files that training never sees.
    """

    train: Tensor
    held_out: tuple[bytes, ...]

    @property
    def held_out_bytes(self) -> bytes:
        """The held-out files, one after another."""
        return b"".join(self.held_out)

    def windows(self, length: int, batch: int) -> Iterator[Tensor]:
        """Held-out files cut into windows of ``length`` bytes behind a NUL, ``[≤batch, length+1]``; −1 is nothing."""
        rows = []
        for file in self.held_out:
            for at in range(0, len(file), length):
                piece = np.frombuffer(file[at : at + length], np.uint8)
                rows.append(np.full(length + 1, -1))
                rows[-1][: len(piece) + 1] = [0, *piece]
        for at in range(0, len(rows), batch):
            yield torch.from_numpy(np.stack(rows[at : at + batch]))

    def draw(self, length: int, batch: int, generator: torch.Generator) -> Tensor:
        """Windows from anywhere in the training files, ``[batch, length+1]``."""
        at = torch.randint(len(self.train) - length, (batch, 1), generator=generator)
        rows = self.train[at + torch.arange(length)].long()
        return torch.cat([torch.zeros_like(at), rows], dim=1)


def standard_library(most: int = HELD_OUT_BYTES) -> Text:
    """Every 16th file is held out, up to so many bytes in all; the rest of them is left aside."""
    home = Path(sysconfig.get_path("stdlib"))
    files = sorted(p for p in home.rglob("*.py") if not _SKIPPED.intersection(p.relative_to(home).parts))
    held_out: list[bytes] = []
    for path in files[8::16]:
        file = path.read_bytes()
        if file and sum(map(len, held_out)) + len(file) <= most:
            held_out.append(file)
    train = b"".join(b"\0" + path.read_bytes() for i, path in enumerate(files) if i % 16 != 8)
    return Text(torch.frombuffer(bytearray(train), dtype=torch.uint8), tuple(held_out))


def lzma_bits(data: bytes) -> float:
    """Bits a byte of ``data`` packed by lzma at its strongest."""
    return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)


def bigram_entropy(data: bytes) -> float:
    """Bits a byte given the byte before, by the counts of ``data`` itself: no bigram model does better."""
    pairs, firsts = Counter(itertools.pairwise(data)), Counter(data[:-1])
    return -sum(n * math.log2(n / firsts[a]) for (a, _), n in pairs.items()) / (len(data) - 1)
