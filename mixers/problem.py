"""One normalised call: what a kernel is chosen for, and the arrays that it must fill.

A ``Problem`` is built after validation, holds no arrays, and hashes without its length: a plan made for it serves every
other length. Arrays travel beside it in plain dictionaries, under these names:

    q, k, v, beta, ...     inputs and parameters; None where an optional one was left out
    initial.<field>        the first state, always present, [N, ...] (a shared one has stride 0 along N)
    offsets                int64 [N+1] where sequences are packed, None where they are not
    y                      the output
    final.<field>          the last state
    checkpoint.<field>     states after every ``checkpoint_every`` tokens, [B, P, ...]; a pack fills its P in order of
                           its sequences and leaves zeros behind
    kept.<field>           what the backward needs; sequence n of a pack keeps its states from row
                           ``offsets[n] // spacing + n`` on, row b of a batch from ``b · (T // spacing + 2)``
"""

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any

from mixers.spec import Array, MixerSpec, Sizes

Arrays = dict[str, Array]
"""Arrays by name; None where one was left out."""


@dataclass(frozen=True)
class Flags:
    """What a caller asked for beside the mathematics.

    Attributes:
        grad: a backward will follow, so keep what it needs.
        recompute: keep nothing all the same: the kernel computes its states again.
        state: return the last state.
        checkpoint_every: also return states after every so many tokens; 0 for none.
        state_dtype: storage of returned states; empty for the default.
        allow_tf32: float32 products may round their operands to tf32.
        batch_invariant: the bits of a sequence must not depend on the batch that it is in.
    """

    grad: bool = False
    recompute: bool = False
    state: bool = True
    checkpoint_every: int = 0
    state_dtype: str = ""
    allow_tf32: bool = False
    batch_invariant: bool = False


@dataclass(frozen=True)
class Problem:
    """One call, without its arrays.

    Attributes:
        spec: the mixer.
        options: its options as sorted pairs.
        layouts: the axes of every optional or ambiguous input that is present, as ``(("beta", "B T H"),)``.
        dtype: of q, k and v.
        library: ``numpy``, ``torch`` or ``jax``, or the package of another array of a GPU, as ``cupy``.
        device: ``cpu``, ``cuda`` or ``tpu``.
        packed: several sequences lie in one row.
        flags: what else was asked for.
        widths: ``(G, H, K, V)``.
        parallel: sequences × value heads, rounded up to a power of two; the heads of one sequence alone where nothing
            may depend on the batch.
        single: one token a sequence, as in ``step``.
        sizes: every axis; its ``B``, ``N`` and ``T`` are no part of equality or hash.
    """

    spec: MixerSpec
    options: tuple[tuple[str, Any], ...]
    layouts: tuple[tuple[str, str], ...]
    dtype: str
    library: str
    device: str
    packed: bool
    flags: Flags
    widths: tuple[int, int, int, int]
    parallel: int
    single: bool
    sizes: Sizes = field(compare=False)

    @classmethod
    def of(
        cls,
        spec: MixerSpec,
        options: dict[str, Any],
        sizes: Sizes,
        flags: Flags,
        *,
        layouts: tuple[tuple[str, str], ...],
        dtype: str,
        library: str,
        device: str,
        packed: bool = False,
    ) -> "Problem":
        """A problem from its sizes."""
        parallel = sizes.H if flags.batch_invariant else sizes.N * sizes.H
        return cls(
            spec=spec,
            options=tuple(options.items()),
            layouts=layouts,
            dtype=dtype,
            library=library,
            device=device,
            packed=packed,
            flags=flags,
            widths=(sizes.G, sizes.H, sizes.K, sizes.V),
            parallel=1 << (parallel - 1).bit_length() if parallel else 0,
            single=sizes.T == sizes.N if packed else sizes.T == 1,
            sizes=sizes,
        )

    def __str__(self) -> str:
        s = self.sizes
        return (
            f"{self.spec.name} (B={s.B}, T={s.T}, H={s.H}, K={s.K}, V={s.V}), {self.dtype} {self.library} arrays on "
            f"{self.device}"
        )

    @property
    def option(self) -> dict[str, Any]:
        """The options as a dictionary."""
        return dict(self.options)

    @property
    def compute_dtype(self) -> str:
        """The dtype of arithmetic and of kept states: float32, or float64 where q is."""
        return "float64" if self.dtype == "float64" else "float32"

    def layout(self, name: str) -> str | None:
        """The axes of an input, None where it was left out."""
        return dict(self.layouts).get(name)

    def work(self) -> float:
        """Floating-point operations of a forward pass."""
        s = self.sizes
        return self.spec.flops(s, self.option) * s.B * s.T * s.H

    def outputs(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of every array that a forward pass fills."""
        return _outputs(self.spec, self.options, self.sizes, self.flags, self.dtype)


# A decoded token asks for the same shapes again and again.
@functools.lru_cache(maxsize=1024)
def _outputs(
    spec: MixerSpec, options: tuple[tuple[str, Any], ...], sizes: Sizes, flags: Flags, dtype: str
) -> dict[str, tuple[tuple[int, ...], str]]:
    return outputs(spec, dict(options), sizes, flags, dtype)


def outputs(
    spec: MixerSpec, options: dict[str, Any], sizes: Sizes, flags: Flags, dtype: str
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every array that a forward pass fills; sizes may be symbolic."""
    compute = "float64" if dtype == "float64" else "float32"
    fields = spec.state(options).fields
    grown = grow(sizes, spec, flags, options)

    def stored(f: Any) -> str:
        return "int32" if f.counter else dtype if f.verbatim else flags.state_dtype or compute

    value = "H V" if any(arg.name == "v" and arg.axes.endswith("V") for arg in spec.inputs) else "H K"
    result = {"y": (sizes.shape(f"B T {value}"), dtype)}
    if flags.state:
        result |= {f"final.{f.name}": (grown.shape(f.axes), stored(f)) for f in fields}
    if flags.checkpoint_every:
        result |= {f"checkpoint.{f.name}": (grown.shape(f.axes.replace("N", "B P", 1)), stored(f)) for f in fields}
    if flags.grad and not flags.recompute:
        result |= {f"kept.{f.name}": (grown.shape(f.axes), compute) for f in spec.kept(options)}
    return result


def grow(sizes: Sizes, spec: MixerSpec, flags: Flags, options: dict[str, Any]) -> Sizes:
    """Sizes with the axes that follow from the others: the grown cache, kept states, checkpoints."""
    every = flags.checkpoint_every
    return dataclasses.replace(
        sizes,
        M=sizes.M + sizes.T,
        R=sizes.B * (sizes.T // spec.spacing(options) + 1) + sizes.N,
        P=sizes.T // every if every else 0,
    )
