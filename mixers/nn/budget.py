"""A budget of tokens to keep: a threshold that follows what was kept.

    threshold ← threshold + rate · (kept − target)         a feedback loop, no gradient of the loss

``kept`` is the share of tokens that were kept since the last step, over every layer that holds the budget and over all
data-parallel ranks.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class KeepBudget(nn.Module):
    """See the module.

    Args:
        target: share of tokens to keep, 0 to 1.
        threshold: where it starts.
        rate: how far a step moves it.
        start_step: steps that pass before it moves.
        freeze_step: the step from which on it rests; None for never.

    Attributes:
        threshold: a float32 number, as a buffer: it is saved, moved and loaded with the model.
        steps: steps taken.
    """

    threshold: Tensor
    steps: Tensor
    seen: Tensor

    def __init__(
        self,
        target: float,
        *,
        threshold: float = 0.5,
        rate: float = 0.01,
        start_step: int = 0,
        freeze_step: int | None = None,
    ) -> None:
        """See the class.

        Raises:
            ValueError: the target is no share.
        """
        super().__init__()
        if not 0 <= target <= 1:
            raise ValueError(f"target={target}; expected a share of tokens, from 0 to 1")
        self.target, self.rate, self.start_step, self.freeze_step = target, rate, start_step, freeze_step
        self.register_buffer("threshold", torch.tensor(float(threshold), dtype=torch.float32))
        self.register_buffer("steps", torch.tensor(0, dtype=torch.int64))
        # Tokens kept, and tokens, since the last step: not worth saving.
        self.register_buffer("seen", torch.zeros(2, dtype=torch.float64), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Follow a move to another device; a threshold and its counts keep their precision."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def observe(self, kept: Tensor, real: Tensor | None = None) -> None:
        """Count decisions ``[B,T]`` or ``[B,T,H]``; ``real [B,T]`` is false at padding."""
        if real is not None:
            kept = kept & (real if kept.ndim == 2 else real[..., None])
        heads = kept.shape[2] if kept.ndim == 3 else 1
        total = kept[..., 0].numel() if kept.ndim == 3 else kept.numel()
        tokens = real.sum() * heads if real is not None else torch.full((), total * heads, device=kept.device)
        self.seen += torch.stack([kept.sum(), tokens]).to(self.seen)

    @torch.no_grad()
    def step(self) -> None:
        """Move the threshold by what was counted since the last step; after each step of the optimiser."""
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(self.seen)
        kept = self.seen[0] / self.seen[1].clamp(min=1)
        moves = (self.seen[1] > 0) & (self.steps >= self.start_step)
        if self.freeze_step is not None:
            moves = moves & (self.steps < self.freeze_step)
        change = self.rate * (kept - self.target)
        self.threshold += torch.where(moves, change, torch.zeros_like(change)).to(self.threshold)
        self.steps += 1
        self.seen.zero_()

    def extra_repr(self) -> str:
        """The target."""
        return f"target={self.target}, rate={self.rate}"
