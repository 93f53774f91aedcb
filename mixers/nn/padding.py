"""Padding: rows put in order, real tokens first, so that no mixer ever meets a padding token among real ones.

A neutral token (``beta = 0``, ``log_decay = 0``, ``v = 0``) leaves an exact recurrence alone, yet it would still move
the phase of a chunk that is part of the model, fill a cache, stand between a convolution and its past, and under left
padding shift every position. So a padded batch is laid out as a pack of 2B sequences, ``real, padding, real, …``: each
row's real tokens are a sequence of their own, whichever side was padded, and the padding behind them another, whose
output and state are dropped. All shapes are static and nothing waits for the device, so it can be compiled.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Padding(NamedTuple):
    """Where the tokens of a padded batch go.

    Attributes:
        mask: ``[B,T]`` bool, true at real tokens.
        order: ``[B,T]``, which token comes at each place: real ones first, in their order.
        lengths: ``[B]``, real tokens of each row.
    """

    mask: Tensor
    order: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> "Padding":
        """From a mask ``[B,T]``."""
        return cls(mask, torch.argsort(~mask, dim=1, stable=True), mask.sum(1))

    @property
    def offsets(self) -> Tensor:
        """``[2B+1]``: each row as two sequences, its real tokens and its padding."""
        rows, width = self.mask.shape
        starts = torch.arange(rows, device=self.mask.device) * width
        bounds = torch.stack([starts, starts + self.lengths], dim=1).flatten()
        return torch.cat([bounds, bounds.new_full((1,), rows * width)])

    def sort(self, x: Tensor) -> Tensor:
        """``[B,T,D]`` with real tokens first and zeros behind them."""
        x = torch.where(self.mask[..., None], x, torch.zeros_like(x))
        return x.gather(1, self.order[..., None].expand_as(x))

    def restore(self, y: Tensor) -> Tensor:
        """The inverse of ``sort``: tokens back in their places, zeros at padding."""
        y = torch.zeros_like(y).scatter(1, self.order[..., None].expand_as(y), y)
        return torch.where(self.mask[..., None], y, torch.zeros_like(y))


def each(state: Any, function: Any) -> Any:
    """A state with a function applied to every array of it."""
    if state is None or isinstance(state, Tensor):
        return None if state is None else function(state)
    parts = tuple(each(part, function) for part in state)
    return type(state)(*parts) if hasattr(state, "_fields") else parts
