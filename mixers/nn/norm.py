"""Root-mean-square normalisation, in the dtype of what it normalises.

    y = weight ∘ x / sqrt(mean(x²) + eps)           x, y [...,D]   weight [D]

Under autocast a float32 gain meets half-precision tokens: it is rounded to them, so that the fused kernel runs.
"""

import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6


class RMSNorm(nn.RMSNorm):
    """See the module.

    Args:
        width: ``D``.
    """

    def __init__(self, width: int) -> None:
        """See the class."""
        super().__init__(width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        """``[...,D]`` to ``[...,D]``."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
