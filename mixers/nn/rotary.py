"""Rotary positions: what tells attention, which has no order of its own, how far apart two tokens are.

    pairs (x_i, x_{i+K/2}) are turned by the angle position · BASE^(−2i/K)

Positions count from the beginning of each sequence, whatever came before it in a pack.
"""

import torch
from torch import Tensor

BASE = 10000.0


def positions(tokens: int, past: Tensor | None, offsets: Tensor | None, device: torch.device) -> Tensor:
    """Each token's place in its own sequence, ``[N or 1, T]``; one row for a pack.

    Args:
        tokens: ``T``.
        past: ``[N]``, tokens that each sequence has seen before; None for none.
        offsets: ``[N+1]``, offsets of a pack.
        device: where to put them.
    """
    place = torch.arange(tokens, device=device)
    if offsets is None:
        return place[None] if past is None else place + past[:, None]
    sequence = torch.searchsorted(offsets[1:].contiguous(), place, right=True)
    place = place - offsets[sequence]
    return (place if past is None else place + past[sequence])[None]


def rotate(x: Tensor, places: Tensor) -> Tensor:
    """Turn ``[B,T,H,K]`` by its positions ``[B or 1, T]``; ``K`` is even."""
    half = x.shape[-1] // 2
    exponents = torch.arange(half, device=x.device, dtype=torch.float32) / half
    angle = places[..., None, None] * BASE**-exponents
    cos, sin = angle.cos(), angle.sin()
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
