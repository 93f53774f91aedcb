"""One thing to time: a mixer, its sizes, its options and a pass."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from mixers.autotune import cost
from mixers.autotune.cost import traffic
from mixers.autotune.key import BACKWARD, FORWARD

import mixers
from mixers.spec import MixerSpec, Sizes

TRAIN = "forward_backward"
STEP = "step"
PASSES = (FORWARD, TRAIN, STEP)
WORK = {FORWARD: cost.WORK[FORWARD], TRAIN: cost.WORK[FORWARD] + cost.WORK[BACKWARD], STEP: cost.WORK[FORWARD]}


@dataclass(frozen=True)
class Case:
    """A mixer at given sizes, in a given pass.

    Attributes:
        mixer: as in ``mixers.get(name)``.
        batch: sequences.
        length: tokens; a step is the last of them.
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
        sizes, spec = self.sizes, self.spec
        if self.kind == STEP:
            sizes = dataclasses.replace(sizes, T=1, M=self.length - 1)
        given = {a.name: " ".join(a.layouts[0]) for a in spec.inputs if not a.optional or a.name in self.optional}
        moved = traffic(spec, sizes, self.option, self.dtype, given)
        return moved[FORWARD] + (moved[BACKWARD] if self.kind == TRAIN else 0.0)

    @property
    def label(self) -> str:
        """Sizes as ``(B,T,H,K,V)`` and options that differ from the defaults."""
        heads = f"{self.key_heads}/{self.heads}" if self.key_heads else self.heads
        sizes = f"({self.batch},{self.length},{heads},{self.key_dim},{self.value_dim})"
        return " ".join([sizes, *(f"{name}={value}" for name, value in self.options)])
