"""A residual block: mix along time, then think about each token.

    x = x + mixer(norm(x))
    x = x + mlp(norm(x))           mlp(x) = W₂ (silu(a) ∘ b),   a, b = W₁ x

x is [B,T,D].
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mixers.nn.hybrid import HybridLayer, MemoryCachingLayer
from mixers.nn.layer import LayerState, MixerLayer
from mixers.nn.norm import RMSNorm
from mixers.packing import Pack

# Mixers whose layer is more than the projections that their specification asks for.
_LAYERS = {"ham": HybridLayer, "memory_caching": MemoryCachingLayer}


class SwiGLU(nn.Module):
    """A gated feed-forward network.

    Args:
        d_model: width of a token.
        hidden: width inside; by default 8/3 of ``d_model``, rounded up to a multiple of 16.
    """

    def __init__(self, d_model: int, hidden: int | None = None) -> None:
        """See the class."""
        super().__init__()
        hidden = -(-8 * d_model // 48) * 16 if hidden is None else hidden
        self.up = nn.Linear(d_model, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[...,D]`` to ``[...,D]``."""
        gate, value = self.up(x).chunk(2, dim=-1)
        y: Tensor = self.down(F.silu(gate) * value)
        return y


class Block(nn.Module):
    """Norm, mixer, norm, SwiGLU, each pair around a residual.

    Args:
        mixer: see ``MixerLayer``, as everything else but ``hidden``.
        d_model: width of a token.
        heads: heads of the mixer.
        hidden: width inside of the SwiGLU.
        options: further arguments of ``MixerLayer``.
    """

    def __init__(
        self, mixer: str = "lattice", *, d_model: int, heads: int, hidden: int | None = None, **options: Any
    ) -> None:
        """See the class."""
        super().__init__()
        self.mixer_norm = RMSNorm(d_model)
        layer = _LAYERS.get(mixer, MixerLayer)
        self.mixer = layer(mixer, d_model=d_model, heads=heads, **options)
        self.mlp_norm = RMSNorm(d_model)
        self.mlp = SwiGLU(d_model, hidden)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        cu_seqlens: Tensor | Pack | None = None,
        mask: Tensor | None = None,
        return_state: bool = True,
    ) -> tuple[Tensor, LayerState | None]:
        """``(x [B,T,D], state)``; arguments as in ``MixerLayer``."""
        y, state = self.mixer(self.mixer_norm(x), state, cu_seqlens, mask, return_state)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), state
