"""The vocabulary of a mixer: what goes in, what is remembered, and one token of its mathematics.

A ``MixerSpec`` is declared once, in its family's file, and everything else reads it: validation, dispatch, the
reference, the tests, the benchmarks, the layers and the documentation.

Axes are single letters:

    B batch   T time   H value heads   G key heads (H = m·G)   K key width or slots   V value width
    N sequences (B of them, or the N of a pack)   C the option ``chunk_size``   M cache length
    R kept states   P checkpoints   F four times K
    S finished segments that a state holds   W tokens of a window that a state holds   O nothing: a length of 0
    J, A, D heads of a second set of queries, keys and values   E width of those keys
"""

import difflib
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

Array = Any
"""An array of NumPy, torch or JAX."""

Options = Mapping[str, Any]
"""A mixer's options, every one of them resolved to a value."""


@dataclass(frozen=True)
class Arg:
    """One array that a caller passes.

    Attributes:
        name: the keyword, as in ``mix(..., beta=b)``.
        axes: the accepted layouts, as ``"B T H"`` or ``"B T H | B T H K"``.
        doc: what it means, in a line.
        optional: may be left out.
        draw: how tests and benchmarks draw it: ``"normal"``, ``"unit"`` (rows of norm 1), ``"gate"`` (0 to 1),
            ``"log_decay"`` (non-positive), ``"positive"`` or ``"flag"``.
        flag: yes or no a token: booleans, or whole numbers that are 0 for no.
    """

    name: str
    axes: str
    doc: str
    optional: bool = False
    draw: str = "normal"
    flag: bool = False

    @functools.cached_property
    def layouts(self) -> tuple[tuple[str, ...], ...]:
        """Each accepted layout as a tuple of axis letters."""
        return tuple(tuple(layout.split()) for layout in self.axes.split("|"))


@dataclass(frozen=True)
class Option:
    """One keyword of ``mixers.get``.

    Attributes:
        name: the keyword.
        default: its value when left out.
        doc: what it means, in a line.
        check: returns True for a value that is allowed.
        expected: the allowed values in words, for the message of a refusal.
        trials: values worth testing.
        normal: turns an allowed value into the one that is stored: a number, a word or None.
    """

    name: str
    default: Any
    doc: str
    check: Callable[[Any], bool]
    expected: str
    trials: tuple[Any, ...] = ()
    normal: Callable[[Any], Any] = lambda value: value


def choice(name: str, values: tuple[str, ...], doc: str) -> Option:
    """An option that takes one of some words; the first is the default."""
    return Option(name, values[0], doc, values.__contains__, "one of " + ", ".join(map(repr, values)), values)


def switch(name: str, default: bool, doc: str) -> Option:
    """An option that is on or off."""
    return Option(name, default, doc, lambda value: isinstance(value, bool), "True or False", (True, False))


def count(name: str, default: int, doc: str, trials: tuple[int, ...] = ()) -> Option:
    """An option that takes a whole number from 1 up."""
    valid = lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 1  # noqa: E731
    return Option(name, default, doc, valid, "a whole number from 1 up", trials)


def real(name: str, default: float | None, doc: str) -> Option:
    """An option that takes a finite number, or None for a default that depends on the sizes."""
    valid = lambda value: (  # noqa: E731
        value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value))
    )
    return Option(name, default, doc, valid, "a finite number")


@dataclass(frozen=True)
class Field:
    """One array of a state, or one that a forward pass keeps for its backward.

    Attributes:
        name: its name.
        axes: its axes, as ``"N H K V"``.
        doc: what it holds, in a line.
        counter: an int32 count rather than a number that has a gradient.
        verbatim: a copy of inputs, stored in their dtype.
    """

    name: str
    axes: str
    doc: str = ""
    counter: bool = False
    verbatim: bool = False


@dataclass(frozen=True)
class StateLayout:
    """The arrays of a state and how a caller sees them.

    Attributes:
        fields: the arrays, in order.
        type: the named tuple that holds them; None where the state is a single, bare array.
        flatten: a state as the arrays of ``fields``, where ``type`` puts some of them in a tuple of their own.
        bare: how many leading fields a bare array given as a state stands for; None for all.
    """

    fields: tuple[Field, ...]
    type: Callable[..., Any] | None = None
    flatten: Callable[[Any], tuple[Array, ...]] | None = None
    bare: int | None = None

    def pack(self, arrays: tuple[Array, ...]) -> Any:
        """Arrays in the order of ``fields`` as the caller sees them."""
        return arrays[0] if self.type is None else self.type(*arrays)

    def unpack(self, state: Any) -> tuple[Array, ...]:
        """A state that ``pack`` made, as its arrays."""
        if self.flatten is not None:
            return self.flatten(state)
        return tuple(state) if isinstance(state, tuple) else (state,)


@dataclass(frozen=True)
class Sizes:
    """The length of every axis of a call."""

    B: int
    T: int
    G: int
    H: int
    K: int
    V: int
    N: int
    C: int = 1
    M: int = 0
    R: int = 0
    P: int = 0
    S: int = 0
    O: int = 0  # noqa: E741
    W: int = 0
    J: int = 0
    A: int = 0
    D: int = 0
    E: int = 0

    @property
    def F(self) -> int:
        """The width of an inner network of two layers."""
        return 4 * self.K

    def shape(self, axes: str) -> tuple[int, ...]:
        """The shape of an array with these axes."""
        return tuple(getattr(self, axis) for axis in axes.split())


Step = Callable[[Any, Options, Mapping[str, Array], tuple[Array, ...]], tuple[Any, tuple[Array, ...]]]


@dataclass(frozen=True)
class Memory:
    """What a state can be read by, apart from the writing of it: a snapshot that serves later queries.

    Attributes:
        fields: its arrays, in order, one sequence's worth a row ``N``.
        of: ``of(xp, options, token, state)``: the memory of a state; ``token`` holds the parameters.
        recall: ``recall(xp, options, token, memory) -> y``: the mixer's own read of it, any axes before the heads.
        query: ``query(xp, options, q)``: what the rows of a matrix are weighted with, where the read is
            ``scale · Sᵀ query`` and so linear in the memory: a read of a mixture is the mixture of the reads. None
            where it is not.
        scale: ``scale(options, key_dim)``.
    """

    fields: tuple[Field, ...]
    of: Callable[[Any, Options, Mapping[str, Array], tuple[Array, ...]], tuple[Array, ...]]
    recall: Callable[[Any, Options, Mapping[str, Array], tuple[Array, ...]], Array]
    query: Callable[[Any, Options, Array], Array] | None = None
    scale: Callable[[Options, int], float] = lambda options, key_dim: 1.0

    @property
    def linear(self) -> bool:
        """Whether a mixture of memories reads as the mixture of their reads."""
        return self.query is not None


@dataclass(frozen=True, eq=False)
class MixerSpec:
    """A sequence mixer, described once.

    Attributes:
        name: as in ``mixers.get(name)``.
        summary: what it is, in a line.
        equations: the mathematics, as printed on its page.
        source: the paper and equation, or "ours".
        inputs: arrays with a time axis; ``q``, ``k``, ``v`` first.
        parameters: arrays without one.
        options: keywords of ``mixers.get``.
        state: the state's layout under given options.
        first: the first state of one sequence, one float64 NumPy array a field, without the axis ``N``.
        step: one token: ``step(xp, options, token, state) -> (y, state)``. ``token`` holds one time step of every input
            (``q [N,H,K]``, ...; key heads are already spread over value heads unless the state itself is grouped), the
            parameters, and None for what was left out. ``xp`` is the array-API namespace.
        adopt: turns what a caller passed as a state into the arrays of ``state``.
        spacing: tokens between the states that a forward pass keeps for its backward.
        kept: the arrays that a forward pass keeps for its backward; axis ``R`` counts kept states.
        keeps_output: the backward also needs ``y``.
        exact_in_chunks: True where a chunk is an implementation's business; False where it is part of the model.
        flops: floating-point operations per token and head, forward.
        tolerance: relative error allowed against float64, by dtype.
        reserve: grows a state that is a cache by a number of tokens; None for states of fixed size.
        learned: the leading fields of the first state that a layer learns, and that ``adopt`` takes alone: for each the
            function ``f(xp, array)`` that turns any real array into a valid one.
        memory: how its states are read by later queries; None where a state is no memory of matrices.
        results: what a step returns behind ``y``, by name; the step then returns ``(y, *results)`` for it.
        picks: whether, under given options, only the largest of some numbers are read: among equal ones rounding
            decides.
        specialise: the specification under given options, where inputs or state depend on them.
        chunk: tokens that share a base point: the length of the axis ``C``.
        timed: inputs that follow from the length of a sequence, ``f(xp, tokens, like)``, ``[1, T, ...]`` each.
        lends: whether, under given options, a gradient is lent to what has none, so that it is not the derivative of
            the result and no difference of results shows it.
        refuse: a last check of a call, ``f(call, token)``, that raises.
        settle: cuts what ``reserve`` grew too far: ``f(call, outputs)``; never while something is traced.
        compose: runs a call on whole sequences by other mixers and array operations: ``f(library, mixer, call, x)``,
            named as in ``mixers.problem``. Every backend but the reference then runs that.
        traced: whether a compiler may follow ``compose`` in a call, ``f(call)``: not where numbers decide about shapes.
        parts: the specifications and options of the mixers that ``compose`` calls.
        primitives: the operations that ``compose`` has backends' kernels for; see ``mixers.primitive``.
        remark: something to say in an explanation: ``f(mixer, call)``, empty for nothing.
    """

    name: str
    summary: str
    equations: str
    source: str
    inputs: tuple[Arg, ...]
    options: tuple[Option, ...]
    state: Callable[[Options], StateLayout]
    first: Callable[[Sizes, Options], tuple[np.ndarray, ...]]
    step: Step
    flops: Callable[[Sizes, Options], float]
    parameters: tuple[Arg, ...] = ()
    adopt: Callable[[Any, Any, Sizes, Options], tuple[Array, ...]] | None = None
    spacing: Callable[[Options], int] = lambda options: 32
    kept: Callable[[Options], tuple[Field, ...]] = lambda options: (Field("state", "R H K V"),)
    keeps_output: bool = False
    exact_in_chunks: bool = True
    reserve: Callable[[Any, tuple[Array, ...], int], tuple[Array, ...]] | None = None
    learned: tuple[Callable[[Any, Array], Array], ...] = ()
    memory: Memory | None = None
    results: tuple[str, ...] = ()
    picks: Callable[[Options], bool] = lambda options: False
    lends: Callable[[Options], bool] = lambda options: False
    specialise: "Callable[[Options], MixerSpec] | None" = None
    chunk: Callable[[Options], int] = lambda options: int(options.get("chunk_size", 1))
    timed: Callable[[Any, int, Array], dict[str, Array]] | None = None
    refuse: Callable[[Any, bool], None] | None = None
    settle: Callable[[Any, dict[str, Array]], dict[str, Array]] | None = None
    compose: Callable[[Any, Any, Any, dict[str, Array]], dict[str, Array]] | None = None
    traced: Callable[[Any], bool] = lambda call: False
    parts: Callable[[Options], "tuple[tuple[MixerSpec, dict[str, Any]], ...]"] = lambda options: ()
    primitives: tuple[Any, ...] = ()
    remark: Callable[[Any, Any], str] | None = None
    tolerance: Mapping[str, float] = field(
        default_factory=lambda: MappingProxyType({"float64": 1e-10, "float32": 2e-5, "bfloat16": 2e-2, "float16": 3e-3})
    )

    @property
    def gates(self) -> tuple[str, ...]:
        """Names of everything that is passed by keyword: gates, then parameters."""
        return tuple(arg.name for arg in (*self.inputs[3:], *self.parameters))

    def arg(self, name: str) -> Arg:
        """An input or parameter by name."""
        return next(arg for arg in (*self.inputs, *self.parameters) if arg.name == name)

    def resolve(self, given: Options) -> dict[str, Any]:
        """Options with their defaults filled in.

        Raises:
            ValueError: an option is unknown or its value is not allowed.
        """
        known = {option.name: option for option in self.options}
        for name, value in given.items():
            if name not in known:
                raise ValueError(unknown(f"option of {self.name}", name, known))
            if not known[name].check(value):
                raise ValueError(f"{self.name}: option {name}={value!r}; expected {known[name].expected}")
        return {name: option.normal(given.get(name, option.default)) for name, option in known.items()}

    def __str__(self) -> str:
        """The mixer's page."""
        sizes = Sizes(B=1, T=1024, G=1, H=1, K=64, V=64, N=1)
        options = self.resolve({})
        cost = self.flops(sizes, options)
        exact = "exact: a kernel takes as many tokens at a time as it likes"
        chunks = exact if self.exact_in_chunks else "part of the model: chunk_size is an option, and changes the result"
        sections = {
            "Equations": self.equations.splitlines(),
            "Inputs": _table((a.name, _brackets(a.axes), _note(a)) for a in self.inputs),
            "Parameters": _table((a.name, _brackets(a.axes), _note(a)) for a in self.parameters),
            "Options": _table((o.name, repr(o.default), f"{o.doc} ({o.expected})") for o in self.options),
            "State": _table((f.name, _brackets(f.axes), f.doc) for f in self.state(options).fields),
            "Chunks": [chunks],
            "Cost": [f"{cost:,.0f} floating-point operations a token and head at K = V = 64, T = 1024"],
            "Source": [self.source],
        }
        text = [f"{self.name}: {self.summary}"]
        for title, lines in sections.items():
            if lines:
                text += ["", title, *("    " + line for line in lines)]
        return "\n".join(text)


def unknown(what: str, name: str, known: Any) -> str:
    """The message that refuses an unknown name and offers the nearest known one."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {what}: {name!r}{hint} (known: {', '.join(map(str, known)) or 'none'})"


def _brackets(axes: str) -> str:
    """``"B T H | B T H K"`` as ``[B,T,H] or [B,T,H,K]``."""
    return " or ".join(f"[{','.join(layout.split())}]" for layout in axes.split("|"))


def _note(arg: Arg) -> str:
    return arg.doc + (" (optional)" if arg.optional else "")


def _table(rows: Iterable[tuple[str, str, str]]) -> list[str]:
    rows = list(rows)
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
    return [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in rows]
