"""Several sequences in one row: where each begins and ends.

offsets = cumsum of lengths, from 0: sequence n is tokens offsets[n] : offsets[n+1]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Pack:
    """Offsets made once for every layer of a model, on the host and on a device.

    Attributes:
        offsets: int64 ``[N+1]`` on the host.
        tensor: the same as a torch tensor on the device that was asked for; None without one.
        longest: the longest sequence.
    """

    offsets: np.ndarray
    tensor: Any
    longest: int

    def __len__(self) -> int:
        return len(self.offsets) - 1


def pack(lengths: Sequence[int], device: Any = None) -> Pack:
    """Offsets of sequences of these lengths; pass the result as ``cu_seqlens=``.

    Args:
        lengths: tokens of every sequence, each at least 0.
        device: a torch device to hold a copy; None for NumPy and JAX.

    Raises:
        ValueError: there is no sequence, or a length is negative or no whole number.
    """
    sizes = np.asarray(lengths)
    if sizes.ndim != 1 or sizes.size == 0 or sizes.dtype.kind not in "iu" or (sizes < 0).any():
        raise ValueError(f"pack: got lengths {lengths!r}; expected a list of whole numbers from 0 up")
    offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    tensor = None
    if device is not None:
        import torch

        tensor = torch.from_numpy(offsets).to(device)
    return Pack(offsets, tensor, int(sizes.max()))


def check_offsets(offsets: np.ndarray, tokens: int) -> None:
    """Refuse offsets that do not cut ``tokens`` into sequences.

    Raises:
        ValueError: they do not start at 0, fall, or do not end at ``tokens``.
    """
    if offsets[0] != 0:
        raise ValueError(f"cu_seqlens starts at {int(offsets[0])}; expected 0")
    if offsets[-1] != tokens:
        raise ValueError(f"cu_seqlens ends at {int(offsets[-1])}; expected the {tokens} tokens of the row")
    if (np.diff(offsets) < 0).any():
        at = int(np.argmax(np.diff(offsets) < 0))
        raise ValueError(f"cu_seqlens falls from {int(offsets[at])} to {int(offsets[at + 1])} at {at + 1}")
