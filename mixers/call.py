"""From what a caller passed to a validated call: the one place where bad input is refused.

Every message names what was got, what was expected and what to do. Nothing here reads an array's contents, so the same
lines run under ``torch.compile`` and ``jax.jit``; the contents of offsets are checked where they are on the host.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from mixers.arrays import Library, library_of
from mixers.packing import Pack
from mixers.problem import Arrays, Flags, Problem
from mixers.spec import Arg, Array, Field, MixerSpec, Options, Sizes, unknown

FLOATING = ("float64", "float32", "bfloat16", "float16")
FLAGS = ("bool", "int32", "int64", "uint8", *FLOATING)


@dataclass(frozen=True, eq=False)
class Call:
    """A validated call: arrays by name (``initial.*`` absent for the default first state), and their sizes.

    ``given`` is the first state as the caller passed it, or None.
    """

    spec: MixerSpec
    options: dict[str, Any]
    library: Library
    x: Arrays
    sizes: Sizes
    flags: Flags
    pack: Pack | None = None
    given: Any = None

    @property
    def begins(self) -> bool:
        """Whether every counter starts: no first state was given, or the part alone that a layer learns.

        Then nobody need ask the device where sequences are, which waits, and cannot be done while a graph is captured.
        """
        count = len(self.given) if isinstance(self.given, (tuple, list)) else 1
        return self.given is None or count == len(self.spec.learned)

    def problem(self) -> Problem:
        """The call without its arrays."""
        q, given = self.x["q"], (*self.spec.inputs[3:], *self.spec.parameters)
        return Problem.of(
            self.spec,
            self.options,
            self.sizes,
            self.flags,
            layouts=tuple((a.name, _layout(a, self.x[a.name])) for a in given if self.x.get(a.name) is not None),
            dtype=self.library.dtype(q),
            library=self.library.name,
            device=self.library.device(q),
            packed=self.x.get("offsets") is not None,
        )


def _layout(arg: Arg, array: Array) -> str:
    return next(" ".join(layout) for layout in arg.layouts if len(layout) == array.ndim)


def validate(
    spec: MixerSpec,
    options: dict[str, Any],
    inputs: Arrays,
    initial_state: Any,
    cu_seqlens: Any,
    flags: Flags,
    token: bool = False,
) -> Call:
    """Check a call and name its arrays.

    Args:
        spec: the mixer.
        options: its options, resolved.
        inputs: ``q``, ``k``, ``v`` and everything passed by keyword.
        initial_state: as the caller passed it, or None.
        cu_seqlens: offsets, a ``Pack``, or None.
        flags: what else was asked for.
        token: inputs are one token, without the axis ``T``.

    Raises:
        TypeError: an argument is unknown, no array, or of another library, dtype or device.
        ValueError: an argument is missing or has the wrong shape.
    """
    library = library_of(inputs["q"], "q")
    bound = _axes(spec, options, library, inputs, token)
    x: Arrays = {a.name: inputs[a.name] for a in (*spec.inputs, *spec.parameters) if inputs.get(a.name) is not None}
    if token:
        x = {a.name: _one_token(x[a.name]) for a in spec.inputs if a.name in x} | {
            a.name: x[a.name] for a in spec.parameters if a.name in x
        }
    host, x["offsets"], sequences = _offsets(spec, library, cu_seqlens, bound, x["q"])
    sizes = Sizes(
        B=bound["B"],
        T=1 if token else bound["T"],
        G=bound["G"],
        H=bound["H"],
        K=bound["K"],
        V=bound.get("V", bound["K"]),
        N=sequences,
        C=spec.chunk(options),
        W=max(0, options.get("window", 0) - 1),
        J=bound.get("J", bound["G"]),
        A=bound.get("A", bound["G"]),
        D=bound.get("D", bound["H"]),
        E=bound.get("E", bound["K"]),
    )
    if initial_state is not None:
        sizes = _adopt(spec, options, library, initial_state, sizes, x)
    call = Call(spec, options, library, x, sizes, flags, host, initial_state)
    if spec.refuse is not None:
        spec.refuse(call, token)
    return call


def _one_token(array: Array) -> Array:
    """With an axis of time; Numba's arrays know of no new axes, but of new shapes."""
    if type(array).__module__.startswith("numba."):
        return array.reshape(array.shape[0], 1, *array.shape[1:])
    return array[:, None]


# The axes of NumPy arrays that were found in order: a decoded token looks like the one before it.
_seen: dict[tuple[Any, ...], dict[str, int]] = {}


def _axes(spec: MixerSpec, options: Options, library: Library, inputs: Arrays, token: bool) -> dict[str, int]:
    """The length of every axis of the inputs, which are checked."""
    if library.name != "numpy":
        return _check_inputs(spec, options, library, inputs, token)
    looks = ((n, type(a), getattr(a, "dtype", None), getattr(a, "shape", None)) for n, a in inputs.items())
    key = (spec, spec.chunk(options), token, *looks)
    found = _seen.get(key)
    if found is None:
        if len(_seen) >= 4096:
            _seen.clear()
        found = _seen[key] = _check_inputs(spec, options, library, inputs, token)
    return found


def _check_inputs(spec: MixerSpec, options: Options, library: Library, inputs: Arrays, token: bool) -> dict[str, int]:
    """Refuse what is missing, unknown or misshapen, in the order of the mixer's page."""
    bound: dict[str, int] = {}
    for arg in (*spec.inputs, *spec.parameters):
        array = inputs.get(arg.name)
        if array is None:
            if not arg.optional:
                raise ValueError(f"{spec.name}: {arg.name} is missing; it takes {_names(spec)}")
            continue
        _check_array(spec, library, arg, array, inputs["q"])
        _bind(spec, options, arg, array, bound, token)
    known = {arg.name for arg in (*spec.inputs, *spec.parameters)}
    for name, array in inputs.items():
        if name not in known and array is not None:
            raise TypeError(f"{spec.name}: {unknown('argument', name, spec.gates)}")
    _check_heads(spec, bound)
    return bound


def _names(spec: MixerSpec) -> str:
    return ", ".join(a.name + (" (optional)" if a.optional else "") for a in (*spec.inputs, *spec.parameters))


def _check_array(spec: MixerSpec, library: Library, arg: Arg, array: Array, inputs_q: Array) -> None:
    """Library, kind of dtype, device; ``q``, ``k`` and ``v`` also share one dtype."""
    name, strict = arg.name, arg.name in ("q", "k", "v")
    other = library_of(array, name)
    if other is not library:
        raise TypeError(
            f"{spec.name}: {name} is a {other.name} array and q a {library.name} array; convert them to one library"
        )
    dtype, wanted = library.dtype(array), library.dtype(inputs_q)
    allowed = FLAGS if arg.flag else FLOATING
    if dtype not in allowed:
        raise TypeError(f"{spec.name}: {name} has dtype {dtype}; expected one of {', '.join(allowed)}")
    if strict and dtype != wanted:
        raise TypeError(f"{spec.name}: {name} has dtype {dtype} and q {wanted}; q, k and v share one dtype")
    if not library.same_device(array, inputs_q):
        raise TypeError(f"{spec.name}: {name} is on {_place(array)} and q on {_place(inputs_q)}; move them together")


def _place(array: Array) -> str:
    """Where an array lies, for a message: Numba's have no device to tell."""
    return str(getattr(array, "device", "another GPU"))


def _bind(spec: MixerSpec, options: Options, arg: Arg, array: Array, bound: dict[str, int], token: bool) -> None:
    """Match an array's shape with its axes, given the axes that are known."""
    shape = array.shape
    for layout in arg.layouts:
        axes = tuple(axis for axis in layout if axis != "T") if token else layout
        if len(axes) != len(shape):
            continue
        for axis, size in zip(axes, shape, strict=True):
            known = spec.chunk(options) if axis == "C" else bound.get(axis)
            if known is None:
                bound[axis] = size
            elif known != size:
                raise ValueError(_wrong_shape(spec, options, arg, shape, bound, token))
        return
    raise ValueError(_wrong_shape(spec, options, arg, shape, bound, token))


def _wrong_shape(spec: MixerSpec, options: Options, arg: Arg, shape: Any, bound: dict[str, int], token: bool) -> str:
    bound = bound | {"C": spec.chunk(options)}
    layouts = [tuple(a for a in layout if a != "T") if token else layout for layout in arg.layouts]
    wanted = " or ".join(f"[{','.join(axes)}] = ({', '.join(str(bound.get(a, a)) for a in axes)})" for axes in layouts)
    got = tuple(int(n) for n in shape)
    swapped = len(got) > 2 and (got[0], got[2], got[1], *got[3:])
    fits = swapped and any(
        len(axes) == len(swapped) and all(bound.get(a, n) == n for a, n in zip(axes, swapped, strict=True))
        for axes in layouts
    )
    hint = "; it looks head-first: swap axes 1 and 2" if fits and not token else ""
    return f"{spec.name}: {arg.name} has shape {got}, expected {wanted}{hint}"


def _check_heads(spec: MixerSpec, bound: dict[str, int]) -> None:
    groups, heads = bound.setdefault("G", bound.get("H", 0)), bound.setdefault("H", bound.get("G", 0))
    if heads != groups and (groups == 0 or heads % groups):
        few, many = ("k, v", "q") if "G" in spec.arg("v").axes.split() else ("q, k", "v")
        raise ValueError(
            f"{spec.name}: {few} have {groups} heads and {many} has {heads}; expected a whole multiple "
            f"(each head of {few} serves H/G heads of {many}), never the other way round"
        )


def _offsets(
    spec: MixerSpec, library: Library, given: Any, bound: dict[str, int], q: Array
) -> tuple[Pack | None, Array | None, int]:
    """The pack if it is known on the host, its offsets as an array, and the number of sequences."""
    if given is None:
        return None, None, bound["B"]
    if bound["B"] != 1:
        raise ValueError(
            f"{spec.name}: cu_seqlens packs its sequences into one row, but the batch is {bound['B']}; "
            "pass either a batch of 1 or no cu_seqlens"
        )
    host, offsets, sequences = library.offsets(given, q)
    return host, offsets, sequences


def _adopt(spec: MixerSpec, options: Options, library: Library, given: Any, sizes: Sizes, x: Arrays) -> Sizes:
    """Check a first state and name its arrays; one without a batch axis is spread over all sequences."""
    fields = spec.state(options).fields
    if spec.adopt is None:
        state = tuple(given) if isinstance(given, (tuple, list)) and len(fields) > 1 else (given,)
    else:
        state = spec.adopt(library.namespace, given, sizes, options)
    if len(state) != len(fields):
        names = ", ".join(f.name for f in fields)
        raise ValueError(f"{spec.name}: the state has {len(state)} arrays, expected {len(fields)} ({names})")
    for f, array in zip(fields, state, strict=True):
        sizes = with_cache(sizes, f, array)
        x[f"initial.{f.name}"] = _check_state(spec, library, f, array, sizes, x["q"])
    return sizes


def with_cache(sizes: Sizes, field: Field, array: Array) -> Sizes:
    """The sizes with the length of a cache, where the array of a state is one."""
    axes = field.axes.split()
    for axis in set(axes) & {"M", "S"}:
        at = axes.index(axis) - len(axes)
        sizes = dataclasses.replace(sizes, **{axis: array.shape[at]}) if len(array.shape) >= -at else sizes
    return sizes


def check_kept(spec: MixerSpec, library: Library, what: str, field: Field, array: Array, q: Array) -> None:
    """Refuse an array of a state, or of a pool of them, that is of another library, kind or device than ``q``.

    Raises:
        TypeError: with ``what`` it is, what it was and what was expected.
    """
    name = f"the {what}'s {field.name}"
    other = library_of(array, name)
    if other is not library:
        raise TypeError(
            f"{spec.name}: {name} is a {other.name} array and q a {library.name} array; convert them to one library"
        )
    dtype = library.dtype(array)
    if dtype not in (("int32",) if field.counter else FLOATING):
        wanted = "int32" if field.counter else f"one of {', '.join(FLOATING)}"
        raise TypeError(f"{spec.name}: {name} has dtype {dtype}; expected {wanted}")
    if not library.same_device(array, q):
        raise TypeError(f"{spec.name}: {name} is on {_place(array)} and q on {_place(q)}; move them together")


def _check_state(spec: MixerSpec, library: Library, field: Field, array: Array, sizes: Sizes, q: Array) -> Array:
    check_kept(spec, library, "state", field, array, q)
    name, axes = field.name, field.axes
    expected = sizes.shape(axes)
    shape = tuple(array.shape)
    if shape == expected:
        return array
    if shape == expected[1:]:
        return library.expand(array, expected)
    raise ValueError(
        f"{spec.name}: the state's {name} has shape {shape}, expected [{axes.replace(' ', ',')}] = {expected}, "
        f"or {expected[1:]} to serve every sequence"
    )
