"""Gates: from a token to its write strength or its decay.

    a = W x                                                    x [B,T,D]   a [B,T,H], or [B,T,H,K] through a thin W

    SigmoidGate     high · sigmoid(a + bias)                   in (0, high): 1, or 2 for negative eigenvalues
    SoftplusDecay   −exp(A_log) · softplus(a + dt_bias)        in (−∞, 0): Mamba's
    BoundedDecay    lower_bound · sigmoid(exp(A_log) · (a + dt_bias))   in (lower_bound, 0)

    A_log [H]   bias, dt_bias [H] or [H,K]

All of it is float32, parameters included, whatever the model's dtype and under autocast.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixers.nn.precision import KeepsFloat32, parameter

# A decay starts at −rate·dt with these ranges, as in Mamba: memories from a token to a thousand tokens long.
RATE = (1.0, 16.0)
DT = (1e-3, 1e-1)


class Gate(KeepsFloat32):
    """The projection under every gate.

    Args:
        d_model: width of a token.
        heads: numbers a token.
        channels: numbers a head; 0 for a single one, without an axis. They come through a bottleneck of this width.
    """

    def __init__(self, d_model: int, heads: int, channels: int = 0) -> None:
        """See the class."""
        super().__init__()
        self.shape = (heads, channels) if channels else (heads,)
        self.down = parameter(channels, d_model) if channels else None
        self.weight = parameter(math.prod(self.shape), channels or d_model)

    def reset_parameters(self) -> None:
        """Uniform, as ``nn.Linear`` does."""
        for weight in (self.down, self.weight):
            if weight is not None:
                nn.init.uniform_(weight, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """``[B,T,D]`` to ``[B,T,H]`` or ``[B,T,H,K]``, float32 (float64 where the parameters are)."""
        with torch.autocast(x.device.type, enabled=False):
            a = x.to(self.weight.dtype)
            if self.down is not None:
                a = F.linear(a, self.down)
            a = F.linear(a, self.weight)
            return self.squash(a.reshape(*a.shape[:-1], *self.shape))

    def squash(self, a: Tensor) -> Tensor:
        """From the projection to the gate's range."""
        raise NotImplementedError

    def over_channels(self, per_head: Tensor) -> Tensor:
        """``[H]`` in a shape that multiplies ``[...,H]`` or ``[...,H,K]``."""
        return per_head[:, None] if len(self.shape) == 2 else per_head


class Projection(Gate):
    """``a`` itself: a query of a second kind. ``W`` is whole, since nothing here has to be thin.

    Args:
        d_model, heads, channels: see ``Gate``.
    """

    def __init__(self, d_model: int, heads: int, channels: int = 0) -> None:
        """See the class."""
        super().__init__(d_model, heads * (channels or 1))
        self.shape = (heads, channels) if channels else (heads,)
        self.reset_parameters()

    def squash(self, a: Tensor) -> Tensor:
        """See the class."""
        return a


class SigmoidGate(Gate):
    """``high · sigmoid(a + bias)``.

    Args:
        d_model, heads, channels: see ``Gate``.
        high: upper end of the range; 2 lets a delta rule's transition have negative eigenvalues.
    """

    def __init__(self, d_model: int, heads: int, channels: int = 0, *, high: float = 1.0) -> None:
        """See the class."""
        super().__init__(d_model, heads, channels)
        self.high = high
        self.bias = parameter(*self.shape)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts around the middle of its range."""
        super().reset_parameters()
        nn.init.zeros_(self.bias)

    def squash(self, a: Tensor) -> Tensor:
        """See the class."""
        return self.high * torch.sigmoid(a + self.bias)

    def extra_repr(self) -> str:
        """Its range."""
        return f"0..{self.high:g}"


class SoftplusDecay(Gate):
    """``−exp(A_log) · softplus(a + dt_bias)``.

    Args:
        d_model, heads, channels: see ``Gate``.
    """

    def __init__(self, d_model: int, heads: int, channels: int = 0) -> None:
        """See the class."""
        super().__init__(d_model, heads, channels)
        self.A_log = parameter(heads)
        self.dt_bias = parameter(*self.shape)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Rates uniform in ``RATE``, time steps log-uniform in ``DT``."""
        super().reset_parameters()
        rate, dt = _draw(self.A_log, self.dt_bias)
        with torch.no_grad():
            self.A_log.copy_(rate.log())
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def squash(self, a: Tensor) -> Tensor:
        """See the class."""
        return -self.over_channels(self.A_log.exp()) * F.softplus(a + self.dt_bias)


class BoundedDecay(Gate):
    """``lower_bound · sigmoid(exp(A_log) · (a + dt_bias))``: never below ``lower_bound``, so never to underflow.

    Args:
        d_model, heads, channels: see ``Gate``.
        lower_bound: the strongest decay of a token, a negative logarithm.
    """

    def __init__(self, d_model: int, heads: int, channels: int = 0, *, lower_bound: float = -5.0) -> None:
        """See the class."""
        if not lower_bound < 0:
            raise ValueError(f"lower_bound={lower_bound}; expected a negative number, the logarithm of a decay")
        super().__init__(d_model, heads, channels)
        self.lower_bound = lower_bound
        self.A_log = parameter(heads)
        self.dt_bias = parameter(*self.shape)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts with the decays of ``SoftplusDecay``, where the bound allows."""
        super().reset_parameters()
        rate, dt = _draw(self.A_log, self.dt_bias)
        with torch.no_grad():
            nn.init.zeros_(self.A_log)
            share = (self.over_channels(rate) * dt / -self.lower_bound).clamp(max=0.9)
            self.dt_bias.copy_(torch.logit(share))

    def squash(self, a: Tensor) -> Tensor:
        """See the class."""
        return self.lower_bound * torch.sigmoid(self.over_channels(self.A_log.exp()) * (a + self.dt_bias))

    def extra_repr(self) -> str:
        """Its range."""
        return f"{self.lower_bound:g}..0"


def _draw(rate_like: Tensor, dt_like: Tensor) -> tuple[Tensor, Tensor]:
    """Rates uniform, time steps log-uniform."""
    rate = torch.empty_like(rate_like).uniform_(*RATE)
    dt = torch.empty_like(dt_like).uniform_(math.log(DT[0]), math.log(DT[1])).exp()
    return rate, dt
