"""The truth: any mixer, token by token, on any array library, in float64 if asked.

A loop over the spec's ``step`` and nothing else. Its gradients are the array library's own; under JAX the loop is a
``lax.scan``. Half-precision inputs are computed in float32 and rounded at the end.
"""

import itertools
from collections.abc import Callable
from typing import Any

from mixers.algebra import device_of
from mixers.arrays import Library
from mixers.problem import Arrays, Flags
from mixers.spec import Array, MixerSpec, Options, Sizes

State = tuple[Array, ...]
Whole = Callable[[dict[str, Array], dict[str, Array], State, int], tuple[Any, State]]


def forward(
    library: Library,
    spec: MixerSpec,
    options: Options,
    sizes: Sizes,
    flags: Flags,
    x: Arrays,
    whole: Whole | None = None,
    reserves: bool = True,
) -> Arrays:
    """Run a mixer token by token.

    ``x`` is named as in ``mixers.problem``; so is the result, which holds ``y``, ``final.*`` and ``checkpoint.*``.
    ``whole`` takes the place of the loop: ``whole(inputs, constants, state, passed) -> (y, state)`` runs sequences of
    one length, of which ``passed`` tokens went before, on arrays as the caller passed them. Without ``reserves`` it
    makes room in caches itself.
    """
    xp = library.namespace
    dtype = _dtype_name(x["q"])
    compute = "float64" if dtype == "float64" else "float32"
    fields = spec.state(options).fields
    given = [a for a in spec.inputs if x.get(a.name) is not None]
    inputs = {a.name: x[a.name] if a.flag or whole else library.cast(x[a.name], compute) for a in given}
    constants = {a.name: library.cast(x[a.name], compute) for a in spec.parameters if x.get(a.name) is not None}
    state = tuple(x[f"initial.{f.name}"] for f in fields)
    state = tuple(
        a if f.counter or (whole and f.verbatim) else library.cast(a, compute)
        for f, a in zip(fields, state, strict=True)
    )
    if whole is None:
        inputs, whole = spread(xp, spec, fields, inputs, sizes), _loop(library, spec, options)

    if x.get("offsets") is None:
        y, state, checkpoints = _run(library, spec, options, flags, inputs, constants, state, whole, reserves)
    else:
        y, state, checkpoints = _run_pack(
            library, spec, options, flags, inputs, constants, state, x["offsets"], sizes, whole
        )

    stored = ["int32" if f.counter else dtype if f.verbatim else flags.state_dtype or compute for f in fields]
    y, *more = y if spec.results else (y,)
    result: Arrays = {"y": library.cast(y, dtype), **dict(zip(spec.results, more, strict=True))}
    result |= {f"final.{f.name}": library.cast(a, to) for f, a, to in zip(fields, state, stored, strict=True)}
    if flags.checkpoint_every:
        rows = zip(fields, checkpoints, stored, strict=True)
        result |= {f"checkpoint.{f.name}": library.cast(a, to) for f, a, to in rows}
    return result


def spread(xp: Any, spec: MixerSpec, fields: Any, inputs: dict[str, Array], sizes: Sizes) -> dict[str, Array]:
    """Repeat key heads for the value heads that share them, unless the state itself is grouped (a cache)."""
    if sizes.G == sizes.H or any("G" in f.axes for f in fields):
        return inputs
    grouped = {a.name for a in spec.inputs if "G" in a.axes.split()}
    times = sizes.H // sizes.G
    return {name: xp.repeat(a, times, axis=2) if name in grouped else a for name, a in inputs.items()}


def _loop(library: Library, spec: MixerSpec, options: Options) -> Whole:
    """Token by token."""

    def whole(inputs: dict[str, Array], constants: dict[str, Array], state: State, passed: int) -> tuple[Any, State]:
        def step(token: dict[str, Array], state: State) -> tuple[Array, State]:
            return spec.step(library.namespace, options, {**constants, **token}, state)

        return library.scan(step, state, inputs)

    return whole


def _run(
    library: Library,
    spec: MixerSpec,
    options: Options,
    flags: Flags,
    inputs: dict[str, Array],
    constants: dict[str, Array],
    state: State,
    whole: Whole,
    reserves: bool = True,
) -> tuple[Array, State, State]:
    """Sequences of equal length, side by side."""
    xp = library.namespace
    tokens = inputs["q"].shape[1]
    if spec.timed is not None:
        inputs = inputs | spec.timed(xp, tokens, inputs["q"])
    if not tokens:
        state = tuple(a * 1 for a in state)  # a copy, whose gradient is that of the state
    if reserves and spec.reserve is not None:
        state = spec.reserve(xp, state, tokens)

    every = flags.checkpoint_every or max(tokens, 1)
    outputs: list[Any] = []
    checkpoints = []
    # One piece without a range over its tokens, which would tie a compiler to their number.
    for first in range(0, max(tokens, 1), every) if flags.checkpoint_every else (0,):
        piece = {n: a[:, first : first + every] for n, a in inputs.items()} if flags.checkpoint_every else inputs
        y, state = whole(piece, constants, state, first) if tokens else (_nothing(xp, spec, options, inputs), state)
        outputs.append(y)
        if flags.checkpoint_every and first + every <= tokens:
            checkpoints.append(state)
    y = _joined(xp, spec, outputs)
    if not flags.checkpoint_every:
        return y, state, ()
    if checkpoints:
        return y, state, tuple(xp.stack(list(column), axis=1) for column in zip(*checkpoints, strict=True))
    return y, state, tuple(xp.zeros((a.shape[0], 0, *a.shape[1:]), dtype=a.dtype, **device_of(a)) for a in state)


def _run_pack(
    library: Library,
    spec: MixerSpec,
    options: Options,
    flags: Flags,
    inputs: dict[str, Array],
    constants: dict[str, Array],
    state: State,
    offsets: Array,
    sizes: Sizes,
    whole: Whole,
) -> tuple[Array, State, State]:
    """The sequences of a pack, one after another."""
    xp = library.namespace
    bounds = library.bounds(offsets)
    outputs, states, checkpoints = [], [], []
    for n, (first, last) in enumerate(itertools.pairwise(bounds)):
        piece = {name: a[:, first:last] for name, a in inputs.items()}
        start = tuple(a[n : n + 1] for a in state)
        if spec.reserve is not None:  # room for the whole row, so that the caches of all sequences are of one size
            start = spec.reserve(xp, start, sizes.T - (last - first))
        y, end, at = _run(library, spec, options, flags, piece, constants, start, whole)
        outputs.append(y)
        states.append(end)
        checkpoints.append(at)
    y = _joined(xp, spec, outputs)
    if spec.reserve is not None:
        states = _even(xp, states, 1)
        checkpoints = _even(xp, checkpoints, 2)
    state = tuple(xp.concat(list(column), axis=0) for column in zip(*states, strict=True))
    if not flags.checkpoint_every:
        return y, state, ()
    rows = sizes.T // flags.checkpoint_every
    columns = (xp.concat(list(column), axis=1) for column in zip(*checkpoints, strict=True))
    return y, state, tuple(_pad(xp, column, rows) for column in columns)


def _joined(xp: Any, spec: MixerSpec, outputs: list[Any]) -> Any:
    """Pieces one after another in time: of ``y``, or of each result."""
    if len(outputs) == 1:
        return outputs[0]
    if not spec.results:
        return xp.concat(outputs, axis=1)
    return tuple(xp.concat(list(column), axis=1) for column in zip(*outputs, strict=True))


def _even(xp: Any, states: list[State], axis: int) -> list[State]:
    """Caches of several sequences, as long as the longest of them: zeros behind the others along an axis."""
    longest = [max((a.shape[axis] for a in column if a.ndim > axis), default=0) for column in zip(*states, strict=True)]

    def pad(a: Array, rows: int) -> Array:
        if a.ndim <= axis or a.shape[axis] == rows:
            return a
        room = xp.zeros((*a.shape[:axis], rows - a.shape[axis], *a.shape[axis + 1 :]), dtype=a.dtype, **device_of(a))
        return xp.concat([a, room], axis=axis)

    return [tuple(pad(a, rows) for a, rows in zip(state, longest, strict=True)) for state in states]


def _pad(xp: Any, array: Array, rows: int) -> Array:
    """Zeros behind axis 1 until it has ``rows``."""
    shape = (array.shape[0], rows - array.shape[1], *array.shape[2:])
    return xp.concat([array, xp.zeros(shape, dtype=array.dtype, **device_of(array))], axis=1)


def _nothing(xp: Any, spec: MixerSpec, options: Options, inputs: dict[str, Array]) -> Any:
    """The output of no tokens: heads of the queries (where values share theirs) or of the values, as wide as those."""
    q, v = inputs["q"], inputs["v"]
    heads = q.shape[2] if "G" in spec.arg("v").axes.split() else v.shape[2]
    y = xp.zeros((q.shape[0], 0, heads, v.shape[3]), dtype=v.dtype, **device_of(v))
    if not spec.results:
        return y
    rows = (q.shape[0], 0, *((heads,) if options["decide"] == "head" else ()))
    return y, xp.zeros(rows, dtype=xp.bool, **device_of(v)), xp.zeros(rows, dtype=v.dtype, **device_of(v))


def _dtype_name(array: Array) -> str:
    return str(array.dtype).removeprefix("torch.")
