"""A short causal depthwise convolution: each channel looks back over a few tokens.

    y_t = Σ_w weight_w ∘ x_{t−W+1+w}        x, y [B,T,C]   weight [C,W]   state [N,W−1,C]: the last W−1 inputs

It streams: the state that a call returns is the past of the next call. Sequences of a pack do not see each other.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def short_conv(
    x: Tensor,
    weight: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve along time, causally, each channel with its own filter.

    Args:
        x: ``[B,T,C]``; a batch of 1 where sequences are packed.
        weight: ``[C,W]``, used in the dtype of ``x``; the last column meets the token itself.
        state: ``[N,W−1,C]``, what came before each sequence; None for nothing, which is zeros.
        cu_seqlens: ``[N+1]`` offsets of the sequences of a pack, on the device of ``x``.
        lengths: ``[B]``, how many tokens of each row are real where the rest is padding behind them; the state returned
            is the one after the last real token.

    Returns:
        ``y [B,T,C]`` and the state after the last token, ``[N,W−1,C]``, both in the dtype of ``x``.

    Raises:
        ValueError: a shape does not fit, or a pack has a batch or ``lengths`` beside it.
    """
    past = weight.shape[-1] - 1
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    _check(x, weight, state, cu_seqlens, lengths, (sequences, past, x.shape[-1]))
    state = x.new_zeros(sequences, past, x.shape[-1]) if state is None else state.to(x.dtype)
    if x.shape[1] == 0:
        return x, state
    if cu_seqlens is not None:
        return _packed(x, weight, state, cu_seqlens)
    row = torch.cat([state, x], dim=1)
    y = _convolve(row, weight)
    if lengths is None:
        return y, row[:, x.shape[1] :]
    at = lengths[:, None] + torch.arange(past, device=x.device)
    return y, row.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))


def _packed(x: Tensor, weight: Tensor, state: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Lay the past of every sequence in front of it, convolve the one long row, and take the outputs of real tokens."""
    sequences, past, channels = state.shape
    tokens = torch.arange(x.shape[1], device=x.device)
    sequence = torch.searchsorted(offsets[1:].contiguous(), tokens, right=True)
    n = torch.arange(sequences, device=x.device)
    real = tokens + (sequence + 1) * past  # where each token lies in the long row
    before = (offsets[:-1] + n * past)[:, None] + torch.arange(past, device=x.device)
    row = x.new_zeros(x.shape[1] + sequences * past, channels)
    row = row.index_copy(0, before.flatten(), state.flatten(0, 1)).index_copy(0, real, x[0])
    y = _convolve(row[None], weight)[:, real - past]
    after = (offsets[1:] + n * past)[:, None] + torch.arange(past, device=x.device)
    return y, row[after]


def _convolve(row: Tensor, weight: Tensor) -> Tensor:
    """``[B,W−1+T,C]`` to ``[B,T,C]``; as an image of one line, channels last, which a CPU does five times faster."""
    image = row.transpose(1, 2)[:, :, None]
    return F.conv2d(image, weight.to(row.dtype)[:, None, None], groups=row.shape[-1])[:, :, 0].transpose(1, 2)


def _check(
    x: Tensor,
    weight: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    past: tuple[int, int, int],
) -> None:
    if x.ndim != 3:
        raise ValueError(f"short_conv: x has shape {tuple(x.shape)}, expected [B,T,C]")
    if weight.ndim != 2 or weight.shape[0] != x.shape[2]:
        raise ValueError(f"short_conv: weight has shape {tuple(weight.shape)}, expected [C,W] with C = {x.shape[2]}")
    if cu_seqlens is not None and (x.shape[0] != 1 or lengths is not None):
        raise ValueError(
            f"short_conv: cu_seqlens packs its sequences into one row, but the batch is {x.shape[0]}"
            f"{'' if lengths is None else ' and lengths were given too'}; pass one or the other"
        )
    if state is not None and tuple(state.shape) != past:
        raise ValueError(f"short_conv: state has shape {tuple(state.shape)}, expected [N,W−1,C] = {past}")


class ShortConv(nn.Module):
    """``short_conv`` with a learned filter.

    Args:
        channels: ``C``.
        size: ``W``, the tokens that an output sees, itself among them.
    """

    def __init__(self, channels: int, size: int = 4) -> None:
        """See the class."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform, as ``nn.Conv1d`` does."""
        nn.init.uniform_(self.weight, -(self.weight.shape[1] ** -0.5), self.weight.shape[1] ** -0.5)

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See ``short_conv``."""
        return short_conv(x, self.weight, state, cu_seqlens, lengths)

    def extra_repr(self) -> str:
        """Its sizes."""
        return f"channels={self.weight.shape[0]}, size={self.weight.shape[1]}"
