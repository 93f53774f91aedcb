"""Layers of the two systems that are made of others: HAM and memory caching.

layer = HybridLayer(d_model=256, heads=4, threshold=0.6)
layer = MemoryCachingLayer(d_model=256, heads=4, base="gated_delta_rule", segment=256)
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixers.nn.budget import KeepBudget
from mixers.nn.layer import LayerState, MixerLayer
from mixers.nn.norm import RMSNorm
from mixers.nn.precision import KeepsFloat32, parameter
from mixers.nn.rotary import positions, rotate
from mixers.result import Result


class Router(KeepsFloat32):
    """A learned score ``sigmoid(w₂ silu(W₁ x))`` of every token, ``[B,T,D]`` to ``[B,T]``, in float32.

    Args:
        d_model: width of a token.
        hidden: width inside.
    """

    def __init__(self, d_model: int, hidden: int) -> None:
        """See the class."""
        super().__init__()
        self.up, self.down = parameter(hidden, d_model), parameter(1, hidden)
        self.bias = parameter(1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform, as ``nn.Linear`` does; scores start around a half."""
        for weight in (self.up, self.down):
            nn.init.uniform_(weight, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        with torch.autocast(x.device.type, enabled=False):
            inner = F.silu(F.linear(x.to(self.up.dtype), self.up))
            return torch.sigmoid(F.linear(inner, self.down, self.bias))[..., 0]


class HybridLayer(MixerLayer):
    """HAM as a layer: the recurrence and the attention share projections of queries, keys and values.

    The attention's queries and keys are the shared ones, RMS-normed with a gain of their own and rotated by their
    positions. ``gate_rnn`` and ``gate_kv`` are independent sigmoids of the token.

    Args:
        d_model: width of a token.
        heads: value heads.
        router: as the mixer's option, or ``"learned"``: a small network scores every token, and gradients reach it
            through the logits of what it keeps.
        budget: moves the threshold towards a share of tokens to keep; one for all layers where they are given the same.
        router_dim: width inside of a learned router; ``d_model // 4`` by default.
        decay: see ``MixerLayer``; None for the delta rule without.
        options: further arguments of ``MixerLayer`` and options of the mixer, as ``threshold=0.6``, ``window=64``.

    Raises:
        ValueError: as ``MixerLayer``; the width of a key is odd.
    """

    def __init__(
        self,
        mixer: str = "ham",
        *,
        d_model: int,
        heads: int,
        router: str = "cosine",
        budget: KeepBudget | None = None,
        router_dim: int | None = None,
        decay: str | None = "softplus",
        **options: Any,
    ) -> None:
        """See the class."""
        learned = router == "learned"
        if learned:
            options.setdefault("score_grad", True)
        options["router"] = "given" if learned else router
        super().__init__(mixer, d_model=d_model, heads=heads, decay=decay, **options)
        width = self.shapes[0][1]
        if width % 2:
            raise ValueError(f"ham: key_dim is {width}; rotary positions turn pairs, so take an even number")
        self.query_norm, self.key_norm = RMSNorm(width), RMSNorm(width)
        self.router = Router(d_model, router_dim or max(1, d_model // 4)) if learned else None
        self.budget = budget

    def _more(self, x: Tensor, q: Tensor, k: Tensor, state: LayerState, offsets: Tensor | None) -> dict[str, Tensor]:
        places = positions(x.shape[1], state.seen, offsets, x.device)
        found = {"attn_q": rotate(self.query_norm(q), places), "attn_k": rotate(self.key_norm(k), places)}
        if self.router is not None:
            found["score"] = self.router(x)
        if self.budget is not None:
            found["threshold"] = self.budget.threshold
        return found

    def _ran(self, result: Result, real: Tensor | None) -> None:
        if self.budget is not None and self.training:
            self.budget.observe(result.kept, real)

    def _seen(self, x: Tensor, state: LayerState, offsets: Tensor | None) -> Tensor:
        rows = x.shape[0] if offsets is None else offsets.shape[0] - 1
        if offsets is None:
            new = torch.full((rows,), x.shape[1], dtype=torch.int32, device=x.device)
        else:
            new = offsets.diff().to(torch.int32)
        return new if state.seen is None else state.seen + new


class MemoryCachingLayer(MixerLayer):
    """Memory caching as a layer: the base's own layer with one more projection, the query of the memories.

    Args:
        d_model: width of a token.
        heads: value heads.
        base: the mixer that is wrapped: its name, or ``mixers.get(...)`` of it.
        options: further arguments of ``MixerLayer`` and options of the mixer, as ``segment=256``.

    Raises:
        ValueError: as ``MixerLayer``.
    """

    def __init__(
        self,
        mixer: str = "memory_caching",
        *,
        d_model: int,
        heads: int,
        base: Any = "gated_delta_rule",
        **options: Any,
    ) -> None:
        """See the class."""
        super().__init__(mixer, d_model=d_model, heads=heads, base=base, **options)
