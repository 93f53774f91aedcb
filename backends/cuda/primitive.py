"""What the kernels of primitives have in common: a token of torch tensors at a time, and no gradient."""

from abc import ABC, abstractmethod

from mixers.call import FLOATING
from mixers.spec import Array

from . import SIMULATED


class TokenKernel(ABC):
    """A single token of every sequence; see ``mixers.primitive.PrimitiveKernel``."""

    arrays = ("torch",)
    widest = 256

    def serves(self, dtype: str, device: str, widths: tuple[int, int]) -> bool:
        """Any dtype where the kernels run, and widths that registers hold."""
        here = device == ("cpu" if SIMULATED else "cuda")
        return here and dtype in FLOATING and all(1 <= width <= self.widest for width in widths)

    @abstractmethod
    def forward(self, x: tuple[Array, ...], fixed: tuple[Array, ...], factor: float, how: str) -> tuple[Array, ...]:
        """The results."""

    def backward(
        self,
        x: tuple[Array, ...],
        fixed: tuple[Array, ...],
        factor: float,
        how: str,
        out: tuple[Array, ...],
        dout: tuple[Array, ...],
    ) -> tuple[Array, ...]:
        """Nobody asks: nothing flows back through such a primitive."""
        raise NotImplementedError("a token that is streamed has no gradient")
