"""Parameters that stay float32 whatever becomes of the model around them.

A decay of 0.999 a token is lost in eight bits of mantissa, so gates, inner norms and first states keep their precision
under ``model.to(torch.bfloat16)`` and under autocast. ``model.double()`` still widens them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_HALF = (torch.bfloat16, torch.float16)


class KeepsFloat32(nn.Module):
    """A module whose parameters follow a move to another device, and never one to a half precision."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in _HALF else moved

        return super()._apply(keep, recurse)  # type: ignore[no-untyped-call]


def parameter(*shape: int) -> nn.Parameter:
    """An unset parameter, float32 or wider."""
    return nn.Parameter(torch.empty(shape, dtype=torch.promote_types(torch.get_default_dtype(), torch.float32)))
