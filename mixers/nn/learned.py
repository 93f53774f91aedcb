"""What a mixer itself learns: its first state, where the spec's is not nothing, and its parameters.

All of it stays float32: a slot is a direction, and eight bits do not say where it points.
"""

from typing import Any

import array_api_compat.torch as xp
import numpy as np
import torch
from torch import nn

from mixers.mixer import Mixer
from mixers.nn.precision import KeepsFloat32, parameter
from mixers.spec import Sizes

# First values of the parameters that a spec names; the rest start at zero.
_ONES = {"norm_weight"}
_RATES = {"token_scale"}


class Learned(KeepsFloat32):
    """A mixer's parameters and learned first state.

    Args:
        mix: the mixer.
        sizes: heads and widths.

    Attributes:
        first: the leading fields of the first state, as ``spec.learned`` says, ``[H,K,V]`` and the like.
        named: the spec's parameters by name.
    """

    def __init__(self, mix: Mixer, sizes: Sizes) -> None:
        """See the class."""
        super().__init__()
        self.mix, self.sizes = mix, sizes
        self.first = nn.ParameterList([parameter(*value.shape) for value in self._first_values()])
        self.named = nn.ParameterDict(
            {arg.name: parameter(*sizes.shape(arg.axes)) for arg in mix.spec.parameters if arg.axes}
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The spec's own first state; unit gains, zero shifts, rates of 1/i."""
        with torch.no_grad():
            for tensor, value in zip(self.first, self._first_values(), strict=True):
                tensor.copy_(torch.from_numpy(value.copy()))
            for name, tensor in self.named.items():
                tensor.fill_(1.0 if name in _ONES else 0.0)
                if name in _RATES:
                    tensor.copy_(1.0 / torch.arange(1, len(tensor) + 1))

    def state(self) -> Any:
        """The first state, without a batch axis; None where the mixer's own is nothing."""
        arrays = tuple(valid(xp, tensor) for valid, tensor in zip(self.mix.spec.learned, self.first, strict=True))
        return (arrays[0] if len(arrays) == 1 else arrays) if arrays else None

    def _first_values(self) -> tuple[np.ndarray, ...]:
        spec = self.mix.spec
        return spec.first(self.sizes, self.mix.options)[: len(spec.learned)]
