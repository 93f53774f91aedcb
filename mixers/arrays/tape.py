"""Gradients for compositions on NumPy arrays: operations leave a trace, which is walked back.

    tape = Tape()
    x = tape.leaf(array)
    y = tape.namespace.exp(x) * 2
    tape.gradients({"y": y}, {"y": dy}, {"x": x})

Only what compositions use is here; whatever else is asked for is refused, so that no gradient is lost in silence.
Kernels take part as one operation each (``Tape.call``, ``Tape.custom``).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import array_api_compat.numpy as xp
import numpy as np

from mixers.arrays.numpy import NumPy
from mixers.mixer import Mixer
from mixers.primitive import by_custom, find
from mixers.problem import Arrays
from mixers.result import Result

Pull = Callable[[list[Any]], Sequence[Any]]


class Variable:
    """An array that operations are traced through."""

    __array_ufunc__ = None
    __slots__ = ("tape", "value")

    def __init__(self, tape: "Tape", value: np.ndarray) -> None:
        self.tape, self.value = tape, np.asarray(value)

    shape = property(lambda self: self.value.shape)
    ndim = property(lambda self: self.value.ndim)
    dtype = property(lambda self: self.value.dtype)
    size = property(lambda self: self.value.size)
    nbytes = property(lambda self: self.value.nbytes)

    def detach(self) -> np.ndarray:
        """Its numbers."""
        return self.value

    def __add__(self, other: Any) -> "Variable":
        return self.tape.pointwise(np.add, (self, other), lambda g, a, b: (g, g))

    __radd__ = __add__

    def __sub__(self, other: Any) -> "Variable":
        return self.tape.pointwise(np.subtract, (self, other), lambda g, a, b: (g, -g))

    def __rsub__(self, other: Any) -> "Variable":
        return self.tape.pointwise(np.subtract, (other, self), lambda g, a, b: (g, -g))

    def __mul__(self, other: Any) -> "Variable":
        return self.tape.pointwise(np.multiply, (self, other), lambda g, a, b: (g * b, g * a))

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> "Variable":
        return self.tape.pointwise(np.divide, (self, other), lambda g, a, b: (g / b, -g * a / (b * b)))

    def __rtruediv__(self, other: Any) -> "Variable":
        return self.tape.pointwise(np.divide, (other, self), lambda g, a, b: (g / b, -g * a / (b * b)))

    def __neg__(self) -> "Variable":
        return self.tape.pointwise(np.negative, (self,), lambda g, a: (-g,))

    def __getitem__(self, at: Any) -> "Variable":
        def pull(g: list[Any]) -> tuple[Any]:
            out = np.zeros_like(self.value)
            if _is_view(at):
                out[at] = g[0]
            else:
                np.add.at(out, at, g[0])
            return (out,)

        return self.tape.one(self.value[at], (self,), pull)

    # Comparisons decide, and no gradient flows through a decision.
    def __lt__(self, other: Any) -> Any:
        return self.value < plain(other)

    def __le__(self, other: Any) -> Any:
        return self.value <= plain(other)

    def __gt__(self, other: Any) -> Any:
        return self.value > plain(other)

    def __ge__(self, other: Any) -> Any:
        return self.value >= plain(other)

    def __eq__(self, other: Any) -> Any:
        return self.value == plain(other)

    def __ne__(self, other: Any) -> Any:
        return self.value != plain(other)

    __hash__ = object.__hash__


def plain(a: Any) -> Any:
    """The numbers of a variable; anything else as it is."""
    return a.value if isinstance(a, Variable) else a


def _is_view(at: Any) -> bool:
    parts = at if isinstance(at, tuple) else (at,)
    return all(p is None or p is Ellipsis or isinstance(p, (slice, int, np.integer)) for p in parts)


def _unbroadcast(g: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if g.shape == shape:
        return g
    extra = g.ndim - len(shape)
    g = g.sum(axis=tuple(range(extra))) if extra else g
    axes = tuple(i for i, n in enumerate(shape) if n == 1 and g.shape[i] != 1)
    return g.sum(axis=axes, keepdims=True) if axes else g


class Tape(NumPy):
    """NumPy as a library (see ``mixers.arrays.Library``) whose floating arrays are traced."""

    def __init__(self) -> None:
        """An empty tape."""
        self._nodes: list[tuple[list[Variable], tuple[Any, ...], Pull]] = []
        self.namespace: Any = Namespace(self)

    def leaf(self, array: np.ndarray) -> Variable:
        """An array to take gradients of."""
        return Variable(self, array)

    def value(self, a: Any) -> Any:
        """Numbers."""
        return plain(a)

    def one(self, value: Any, inputs: tuple[Any, ...], pull: Pull) -> Variable:
        """The result of an operation with one output."""
        return self.record([value], inputs, pull)[0]

    def record(self, values: Sequence[Any], inputs: tuple[Any, ...], pull: Pull) -> list[Variable]:
        """The results of an operation; ``pull`` takes their gradients (None for 0) to those of its inputs."""
        outputs = [Variable(self, value) for value in values]
        self._nodes.append((outputs, inputs, pull))
        return outputs

    def pointwise(self, function: Any, inputs: tuple[Any, ...], pull: Callable[..., Sequence[Any]]) -> Variable:
        """An operation element by element, with broadcasting."""
        values = tuple(plain(a) for a in inputs)

        def back(g: list[Any]) -> list[Any]:
            return [
                _unbroadcast(np.asarray(part), a.shape) if isinstance(a, Variable) else None
                for part, a in zip(pull(g[0], *values), inputs, strict=True)
            ]

        return self.one(function(*values), inputs, back)

    def gradients(self, outputs: Mapping[str, Any], seeds: Arrays, leaves: Mapping[str, Variable]) -> Arrays:
        """Gradients of the leaves by name; zeros where nothing flows back."""
        held: dict[int, Any] = {}

        def add(a: Any, g: Any) -> None:
            if isinstance(a, Variable) and g is not None:
                held[id(a)] = held[id(a)] + g if id(a) in held else g

        for name, seed in seeds.items():
            if seed is not None:
                add(outputs[name], np.asarray(seed, plain(outputs[name]).dtype))
        for results, inputs, pull in reversed(self._nodes):
            flowing = [held.pop(id(r), None) for r in results]
            if any(g is not None for g in flowing):
                for a, g in zip(inputs, pull(flowing), strict=True):
                    add(a, g)
        return {name: np.array(held.get(id(a), np.zeros_like(a.value)), a.dtype) for name, a in leaves.items()}

    # What a library does.

    def dtype(self, array: Any) -> str:
        """The name of an array's dtype."""
        return super().dtype(plain(array))

    def cast(self, array: Any, dtype: str) -> Any:
        """The array itself where it has the dtype already."""
        return self.namespace.astype(array, dtype)

    def expand(self, array: Any, shape: tuple[int, ...]) -> Any:
        """Broadcast."""
        return self.namespace.broadcast_to(array, shape)

    def largest(self, counts: Any) -> int | None:
        """A Python number."""
        return super().largest(plain(counts))

    def host(self, counts: Any) -> np.ndarray | None:
        """The numbers."""
        return super().host(plain(counts))

    def scan(self, step: Any, state: tuple[Any, ...], tokens: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
        """A loop."""
        outputs = []
        for t in range(next(iter(tokens.values())).shape[1]):
            y, state = step({name: a[:, t] for name, a in tokens.items()}, state)
            outputs.append(y)
        return self.namespace.stack(outputs, axis=1), state

    def call(self, mixer: Mixer, **arguments: Any) -> Result:
        """A mixer as one operation."""
        state = arguments.pop("initial_state", None)
        layout = mixer.spec.state(mixer.options)
        parts = () if state is None else layout.unpack(state)
        given = {n: a for n, a in arguments.items() if isinstance(a, Variable)}
        plain_state = None if state is None else layout.pack(tuple(plain(a) for a in parts))
        result, pullback = mixer.vjp(**{n: plain(a) for n, a in arguments.items()}, initial_state=plain_state)
        floating = [i for i, f in enumerate(layout.fields) if not f.counter]
        groups = [(result.y,)]
        for held in (result.state, result.checkpoints):
            groups.append(() if held is None else layout.unpack(held))

        def pull(g: list[Any]) -> list[Any]:
            seeds: list[Any] = [g[0]]
            at = 1
            for group in groups[1:]:
                found = [
                    np.zeros_like(group[i]) if g[at + n] is None else g[at + n].astype(group[i].dtype, copy=False)
                    for n, i in enumerate(floating if group else [])
                ]
                at += len(found)
                seeds.append(tuple(found) if found else None)
            seeds[0] = np.zeros_like(result.y) if seeds[0] is None else seeds[0].astype(result.y.dtype, copy=False)
            back = pullback(*seeds)
            dstate = back.get("initial_state")
            flat = () if dstate is None else (tuple(dstate) if isinstance(dstate, tuple) else (dstate,))
            return [*(back.get(name) for name in given), *(flat if flat else (None,) * len(parts))]

        outputs = [result.y] + [group[i] for group in groups[1:] if group for i in floating]
        made = self.record(outputs, (*given.values(), *parts), pull)
        traced: list[Any] = []
        at = 1
        for group in groups[1:]:
            if not group:
                traced.append(None)
                continue
            arrays = list(group)
            for i in floating:
                arrays[i] = made[at]
                at += 1
            traced.append(layout.pack(tuple(arrays)))
        return Result(made[0], *traced)

    def serves(self, primitive: Any, of: Any, x: tuple[Any, ...]) -> bool:
        """A tape is there for gradients."""
        return bool(primitive.flows) and find(*of) is not None

    def primitive(
        self, primitive: Any, of: Any, x: tuple[Any, ...], fixed: tuple[Any, ...], factor: float, how: str
    ) -> tuple[Any, ...]:
        """See ``mixers.arrays.Library``."""
        return by_custom(self, primitive, of, x, fixed, factor, how)

    def custom(self, forward: Any, backward: Any, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
        """An operation with a gradient of its own; see ``mixers.arrays.Library.custom``."""
        outputs, saved = forward(*(plain(a) for a in arrays))

        def pull(g: list[Any]) -> Sequence[Any]:
            flowing = (np.zeros_like(o) if d is None else d for o, d in zip(outputs, g, strict=True))
            found: Sequence[Any] = backward(saved, *flowing)
            return found

        return tuple(self.record(outputs, arrays, pull))


class Namespace:
    """The array-API namespace of a tape, as far as compositions go."""

    # Results without a gradient: made from numbers alone, or whole numbers and decisions.
    _FLAT = frozenset(
        [
            "arange",
            "zeros",
            "ones",
            "full",
            "zeros_like",
            "ones_like",
            "full_like",
            "asarray",
            "argsort",
            "all",
            "any",
            "logical_not",
            "bool",
            "int32",
            "int64",
            "float32",
            "float64",
            "searchsorted",
            "flip",
        ]
    )

    def __init__(self, tape: Tape) -> None:
        self._tape = tape

    def __getattr__(self, name: str) -> Any:
        if name not in self._FLAT:
            raise AttributeError(f"the tape knows no {name!r}")
        found = getattr(xp, name)
        if not callable(found) or isinstance(found, type):
            return found
        return lambda *args, **kw: found(*(plain(a) for a in args), **kw)

    def _pointwise(self, function: Any, slope: Any, a: Any) -> Any:
        if not isinstance(a, Variable):
            return function(a)
        value = function(a.value)
        return self._tape.one(value, (a,), lambda g: (g[0] * slope(a.value, value),))

    def exp(self, a: Any) -> Any:
        """``e^a``."""
        return self._pointwise(np.exp, lambda x, y: y, a)

    def log(self, a: Any) -> Any:
        """Natural logarithm."""
        return self._pointwise(np.log, lambda x, y: 1 / x, a)

    def sqrt(self, a: Any) -> Any:
        """Square root."""
        return self._pointwise(np.sqrt, lambda x, y: 0.5 / y, a)

    def tanh(self, a: Any) -> Any:
        """Hyperbolic tangent."""
        return self._pointwise(np.tanh, lambda x, y: 1 - y * y, a)

    def where(self, at: Any, a: Any, b: Any) -> Any:
        """``a`` where true, ``b`` elsewhere."""
        at = plain(at)
        if not isinstance(a, Variable) and not isinstance(b, Variable):
            return np.where(at, a, b)

        def pull(g: Any, *_: Any) -> tuple[Any, Any]:
            return np.where(at, g, 0), np.where(at, 0, g)

        return self._tape.pointwise(lambda x, y: np.where(at, x, y), (a, b), pull)

    def astype(self, a: Any, dtype: Any) -> Any:
        """Another dtype."""
        if not isinstance(a, Variable):
            return a.astype(dtype, copy=False)
        if a.dtype == np.dtype(dtype):
            return a
        if np.dtype(dtype).kind != "f":
            return a.value.astype(dtype)
        return self._tape.one(a.value.astype(dtype), (a,), lambda g: (g[0].astype(a.dtype),))

    def _view(self, a: Any, make: Any, back: Any) -> Any:
        return self._tape.one(make(a.value), (a,), lambda g: (back(g[0]),)) if isinstance(a, Variable) else make(a)

    def reshape(self, a: Any, shape: Any) -> Any:
        """Another shape."""
        return self._view(a, lambda x: np.reshape(x, shape), lambda g: g.reshape(a.shape))

    def permute_dims(self, a: Any, axes: tuple[int, ...]) -> Any:
        """Axes in another order."""
        return self._view(a, lambda x: np.transpose(x, axes), lambda g: np.transpose(g, np.argsort(axes)))

    def broadcast_to(self, a: Any, shape: tuple[int, ...]) -> Any:
        """Repeated along new or short axes."""
        return self._view(a, lambda x: np.broadcast_to(x, shape), lambda g: _unbroadcast(g, a.shape))

    def repeat(self, a: Any, times: int, axis: int) -> Any:
        """Every entry of an axis ``times`` times."""
        at = axis % a.ndim

        def back(g: np.ndarray) -> np.ndarray:
            total: np.ndarray = g.reshape(*g.shape[:at], a.shape[at], times, *g.shape[at + 1 :]).sum(axis=at + 1)
            return total

        return self._view(a, lambda x: np.repeat(x, times, axis=axis), back)

    def _reduced(self, g: np.ndarray, axis: Any, keepdims: bool) -> np.ndarray:
        return g if keepdims or axis is None else np.expand_dims(g, axis)

    def sum(self, a: Any, axis: Any = None, keepdims: bool = False) -> Any:
        """Sum."""
        return self._view(
            a,
            lambda x: np.sum(x, axis=axis, keepdims=keepdims),
            lambda g: np.broadcast_to(self._reduced(g, axis, keepdims), a.shape),
        )

    def mean(self, a: Any, axis: int, keepdims: bool = False) -> Any:
        """Mean."""
        return self.sum(a, axis=axis, keepdims=keepdims) * (1.0 / a.shape[axis])

    def max(self, a: Any, axis: int, keepdims: bool = False) -> Any:
        """Largest; its gradient is shared among equals."""
        if not isinstance(a, Variable):
            return np.max(a, axis=axis, keepdims=keepdims)
        top = np.max(a.value, axis=axis, keepdims=True)
        at = a.value == top
        share = at / np.sum(at, axis=axis, keepdims=True)
        value = top if keepdims else np.squeeze(top, axis)
        return self._tape.one(value, (a,), lambda g: (share * self._reduced(g[0], axis, keepdims),))

    def min(self, a: Any, axis: int, keepdims: bool = False) -> Any:
        """Smallest."""
        return -self.max(-a, axis=axis, keepdims=keepdims)

    def concat(self, arrays: list[Any], axis: int = 0) -> Any:
        """One after another."""
        if not any(isinstance(a, Variable) for a in arrays):
            return np.concatenate(arrays, axis=axis)
        cuts = np.cumsum([a.shape[axis] for a in arrays])[:-1]
        value = np.concatenate([plain(a) for a in arrays], axis=axis)
        return self._tape.one(value, tuple(arrays), lambda g: np.split(g[0], cuts, axis=axis))

    def stack(self, arrays: list[Any], axis: int = 0) -> Any:
        """Side by side along a new axis."""
        if not any(isinstance(a, Variable) for a in arrays):
            return np.stack(arrays, axis=axis)
        value = np.stack([plain(a) for a in arrays], axis=axis)
        return self._tape.one(value, tuple(arrays), lambda g: list(np.moveaxis(g[0], axis, 0)))

    def take(self, a: Any, index: Any, axis: int) -> Any:
        """Entries of an axis."""

        def back(g: np.ndarray) -> np.ndarray:
            out: np.ndarray = np.zeros_like(a.value)
            np.add.at(np.moveaxis(out, axis, 0), np.asarray(index), np.moveaxis(g, axis, 0))
            return out

        return self._view(a, lambda x: np.take(x, index, axis=axis), back)

    def take_along_axis(self, a: Any, index: Any, axis: int) -> Any:
        """An entry of an axis for every place of the others; an index of length 1 elsewhere serves all."""
        wide = tuple(index.shape[i] if i == axis else n for i, n in enumerate(a.shape))
        index = np.broadcast_to(index, wide)

        def back(g: np.ndarray) -> np.ndarray:
            out: np.ndarray = np.zeros_like(a.value)
            grid: list[Any] = list(np.ogrid[tuple(slice(n) for n in wide)])
            grid[axis] = index
            np.add.at(out, tuple(grid), g)
            return out

        return self._view(a, lambda x: np.take_along_axis(x, index, axis), back)

    def cumulative_sum(self, a: Any, axis: int) -> Any:
        """Running sums."""
        return self._view(
            a,
            lambda x: np.cumsum(x, axis=axis),
            lambda g: np.flip(np.cumsum(np.flip(g, axis), axis=axis), axis),
        )

    def matmul(self, a: Any, b: Any) -> Any:
        """Products of matrices, with leading axes broadcast."""
        if not isinstance(a, Variable) and not isinstance(b, Variable):
            return np.matmul(a, b)
        x, y = plain(a), plain(b)

        def pull(g: list[Any]) -> tuple[Any, Any]:
            dx = _unbroadcast(np.matmul(g[0], np.swapaxes(y, -1, -2)), x.shape) if isinstance(a, Variable) else None
            dy = _unbroadcast(np.matmul(np.swapaxes(x, -1, -2), g[0]), y.shape) if isinstance(b, Variable) else None
            return dx, dy

        return self._tape.one(np.matmul(x, y), (a, b), pull)
