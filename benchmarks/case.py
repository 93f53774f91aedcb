"""One thing to time: a mixer, its sizes, its options and a pass."""

import math
from dataclasses import dataclass
from typing import Any

import mixers
from mixers.spec import MixerSpec, Sizes

FORWARD = "forward"
TRAIN = "forward_backward"
STEP = "step"
PASSES = (FORWARD, TRAIN, STEP)

# A backward costs two products for each of the forward's, as in the usual count for training.
WORK = {FORWARD: 1.0, TRAIN: 3.0, STEP: 1.0}
ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Case:
    """A mixer at given sizes, in a given pass.

    Attributes:
        mixer: as in ``mixers.get(name)``.
        batch: sequences.
        length: tokens; a step takes one of them.
        heads: heads of values, and of keys unless ``key_heads`` says otherwise.
        key_dim: width of queries and keys.
        value_dim: width of values.
        kind: ``"forward"``, ``"forward_backward"`` or ``"step"``.
        options: options that differ from the defaults, as pairs.
        dtype: of q, k and v; gates are float32 or wider.
        device: ``"cpu"`` or ``"cuda"``.
        optional: optional inputs that are passed all the same.
        key_heads: heads of queries and keys where they are fewer; 0 for as many as values have.
    """

    mixer: str
    batch: int
    length: int
    heads: int
    key_dim: int
    value_dim: int
    kind: str = FORWARD
    options: tuple[tuple[str, Any], ...] = ()
    dtype: str = "float32"
    device: str = "cpu"
    optional: tuple[str, ...] = ()
    key_heads: int = 0

    @property
    def spec(self) -> MixerSpec:
        """The mixer's specification."""
        return mixers.get_spec(self.mixer)

    @property
    def option(self) -> dict[str, Any]:
        """Every option with its value."""
        return {o.name: o.default for o in self.spec.options} | dict(self.options)

    @property
    def sizes(self) -> Sizes:
        """The length of every axis."""
        b, h = self.batch, self.heads
        chunk = self.option.get("chunk_size", 1)
        return Sizes(B=b, T=self.length, G=self.key_heads or h, H=h, K=self.key_dim, V=self.value_dim, N=b, C=chunk)

    @property
    def scale(self) -> float:
        """The factor on the read."""
        scale = self.option.get("scale")
        return self.key_dim**-0.5 if scale is None else scale

    @property
    def tokens(self) -> int:
        """Tokens that one call processes."""
        return self.batch * (1 if self.kind == STEP else self.length)

    @property
    def flops(self) -> float:
        """Floating-point operations of the recurrence, by the specification; three times as many with a backward."""
        return self.spec.flops(self.sizes, self.option) * self.tokens * self.heads * WORK[self.kind]

    @property
    def bytes(self) -> float:
        """Bytes that must move: every input read once, every output written once.

        The forward reads its inputs and the first state and writes the output and the last state. A backward reads the
        inputs and the output's gradient and writes a gradient for each input.
        """
        sizes, item = self.sizes, ITEM_BYTES[self.dtype]
        wide = max(item, 4)
        inputs = 0.0
        for arg in self.spec.inputs:
            if not arg.optional or arg.name in self.optional:
                count = math.prod(sizes.shape(" ".join(arg.layouts[0]))) * self.tokens / (self.batch * self.length)
                inputs += count * (item if arg.name in "qkv" else wide)
        width = self.value_dim if self.spec.arg("v").layouts[0][-1] == "V" else self.key_dim
        output = self.tokens * self.heads * width * item
        state = 0.0
        if self.spec.reserve is None:
            state = 2 * wide * sum(math.prod(sizes.shape(f.axes)) for f in self.spec.state(self.option).fields)
        forward = inputs + output + state
        return forward if self.kind != TRAIN else forward + 2 * inputs + output

    @property
    def label(self) -> str:
        """Sizes as ``(B,T,H,K,V)`` and options that differ from the defaults."""
        heads = f"{self.key_heads}/{self.heads}" if self.key_heads else self.heads
        sizes = f"({self.batch},{self.length},{heads},{self.key_dim},{self.value_dim})"
        return " ".join([sizes, *(f"{name}={value}" for name, value in self.options)])
