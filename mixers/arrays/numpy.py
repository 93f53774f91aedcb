"""NumPy arrays: no gradients of their own, so ``Mixer.vjp`` is explicit.

This module is also how every kernel that takes NumPy arrays is called, whoever the arrays belong to: ``run_forward``
and ``run_backward`` allocate what a kernel fills.
"""

import dataclasses
from typing import Any

import array_api_compat.numpy as xp
import numpy as np

from mixers import reference
from mixers.backend import Pool
from mixers.call import Call
from mixers.mixer import Mixer
from mixers.packing import Pack, check_offsets
from mixers.plan import Plan
from mixers.primitive import by_custom, find
from mixers.problem import Arrays, Problem
from mixers.result import Result
from mixers.spec import Array, MixerSpec, Options, Sizes

# str(dtype) takes several microseconds, as long as the rest of validation.
_DTYPE_NAMES = {np.dtype(name): name for name in ("float64", "float32", "float16", "int64", "int32", "bool")}


def dtype_name(array: Array) -> str:
    """The name of an array's dtype."""
    return _DTYPE_NAMES.get(array.dtype) or str(array.dtype)


class NumPy:
    """See ``mixers.arrays.Library``."""

    name = "numpy"
    namespace: Any = xp

    def dtype(self, array: Array) -> str:
        """The name of an array's dtype."""
        return dtype_name(array)

    def device(self, array: Array) -> str:
        """Always the CPU."""
        return "cpu"

    def same_device(self, a: Array, b: Array) -> bool:
        """Always."""
        return True

    def expand(self, array: Array, shape: tuple[int, ...]) -> Array:
        """A read-only view with stride 0."""
        return np.broadcast_to(array, shape)

    def cast(self, array: Array, dtype: str) -> Array:
        """The array itself where it has the dtype already."""
        return array.astype(dtype, copy=False)

    def scan(self, step: Any, state: tuple[Array, ...], tokens: dict[str, Array]) -> tuple[Array, tuple[Array, ...]]:
        """A loop."""
        outputs = []
        for t in range(tokens["q"].shape[1]):
            y, state = step({name: a[:, t] for name, a in tokens.items()}, state)
            outputs.append(y)
        if isinstance(outputs[0], tuple):
            return tuple(np.stack(column, axis=1) for column in zip(*outputs, strict=True)), state
        return np.stack(outputs, axis=1), state

    def largest(self, counts: Array) -> int | None:
        """A Python number."""
        return int(counts.max(initial=0))

    def first_nan(self, array: Array) -> tuple[int, ...] | None:
        """A position."""
        where = np.argwhere(np.isnan(array))
        return tuple(int(n) for n in where[0]) if len(where) else None

    def host(self, counts: Array) -> np.ndarray | None:
        """The array itself."""
        return np.asarray(counts)

    def given(self, call: Call) -> Arrays:
        """See ``prepare``."""
        return prepare(call)[1]

    def call(self, mixer: Mixer, **arguments: Any) -> Result:
        """A call."""
        return mixer(**arguments)

    def serves(self, primitive: Any, of: Any, x: tuple[Any, ...]) -> bool:
        """No gradient is asked of what no tape records."""
        return find(*of) is not None

    def primitive(
        self, primitive: Any, of: Any, x: tuple[Any, ...], fixed: tuple[Any, ...], factor: float, how: str
    ) -> tuple[Any, ...]:
        """See ``mixers.arrays.Library``."""
        return by_custom(self, primitive, of, x, fixed, factor, how)

    def custom(self, forward: Any, backward: Any, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
        """Forward alone: gradients are asked of a tape."""
        outputs: tuple[Array, ...] = forward(*arrays)[0]
        return outputs

    def untraced(self, function: Any) -> Any:
        """The function itself."""
        return function

    def bounds(self, offsets: Array) -> list[int]:
        """Python numbers."""
        return [int(n) for n in offsets]

    def offsets(self, given: Any, like: Array) -> tuple[Pack | None, Array, int]:
        """A pack or an array of whole numbers."""
        if isinstance(given, Pack):
            return given, given.offsets, len(given)
        array = np.asarray(given)
        if array.ndim != 1 or array.size < 2 or array.dtype.kind not in "iu":
            raise ValueError(
                f"cu_seqlens has shape {array.shape} and dtype {array.dtype}; expected whole numbers [N+1], "
                "or mixers.pack(lengths)"
            )
        array = array.astype(np.int64, copy=False)
        longest = int(np.max(np.diff(array)))
        return Pack(array, None, longest), array, array.size - 1

    def from_numpy(self, values: np.ndarray, dtype: str, like: Array) -> Array:
        """The array in another dtype."""
        if dtype == "bfloat16":
            raise ValueError("NumPy has no bfloat16; take state_dtype='float16' or float32")
        return values.astype(dtype, copy=False)

    def scatter(self, pools: tuple[Array, ...], state: tuple[Array, ...], where: Array, target: Array) -> None:
        """Write states into their slots."""
        for pool, values in zip(pools, state, strict=True):
            pool[target[where]] = values[where]

    def decode(self, mixer: Mixer, call: Call, pool: Pool) -> Array | None:
        """No kernel of this library's arrays writes pools."""
        return None

    def warmup(self, mixer: Mixer, call: Call, grad: bool) -> None:
        """Run once, on zeros where gradients are concerned."""
        if not grad:
            self.run(mixer, call)
            return
        call = dataclasses.replace(call, flags=dataclasses.replace(call.flags, grad=True))
        out, back = self.vjp(mixer, call)
        back({"y": np.zeros_like(out["y"])})

    def prepare(self, mixer: Mixer) -> None:
        """Nothing to define."""

    def again(self, mixer: Mixer, x: Arrays, state: bool, checkpoint_every: int | None) -> Result | None:
        """The long way; ``Mixer.bind`` is the short one."""
        return None

    def run(self, mixer: Mixer, call: Call) -> Arrays:
        """Forward."""
        problem, x = prepare(call)
        plan = mixer.plan(problem)
        if plan.kernel is None:
            return reference.forward(self, call.spec, call.options, call.sizes, call.flags, x)
        return run_forward(plan, problem, x)

    def vjp(self, mixer: Mixer, call: Call) -> tuple[Arrays, Any]:
        """Forward, and a function from output gradients (by name) to input gradients (by name)."""
        problem, x = prepare(call)
        plan = mixer.plan(problem)
        if plan.kernel is None:
            raise ValueError(
                f"{call.spec.name}: backend='reference' has no gradients for NumPy arrays; pass torch or JAX arrays, "
                "or take a backend with kernels"
            )
        out = run_forward(plan, problem, x)
        return out, lambda dout: run_backward(plan, problem, x, out, dout)


def prepare(call: Call) -> tuple[Problem, Arrays]:
    """The problem of a call on host arrays, and its arrays with every default filled in; offsets are checked."""
    x = dict(call.x)
    if x["offsets"] is not None:
        check_offsets(x["offsets"], call.sizes.T)
    compute = "float64" if dtype_name(x["q"]) == "float64" else "float32"
    fill_first_state(call.spec, call.options, call.sizes, x, compute)
    return call.problem(), x


def fill_first_state(spec: MixerSpec, options: Any, sizes: Sizes, x: Arrays, dtype: str) -> None:
    """Name the spec's first state wherever the caller gave none."""
    fields = spec.state(options).fields
    if f"initial.{fields[0].name}" in x:
        return
    for f, first in zip(fields, first_state(spec, options, sizes, dtype), strict=True):
        x[f"initial.{f.name}"] = np.broadcast_to(first, (sizes.N, *first.shape))


def first_state(spec: MixerSpec, options: Options, sizes: Sizes, dtype: str) -> list[np.ndarray]:
    """The first state of one sequence, an array a field: numbers in ``dtype``, counters in int32."""
    fields = spec.state(options).fields
    return [
        np.array(first).astype(np.int32 if f.counter else dtype)
        for f, first in zip(fields, spec.first(sizes, options), strict=True)
    ]


def first_state_of(
    spec: MixerSpec, options: tuple[tuple[str, Any], ...], widths: tuple[int, int, int, int], dtype: str
) -> list[np.ndarray]:
    """The same from what a problem's hash holds: what is kept on a device is found again under that."""
    (groups, heads, key_dim, value_dim), chosen = widths, dict(options)
    sizes = Sizes(B=1, T=0, G=groups, H=heads, K=key_dim, V=value_dim, N=1, C=spec.chunk(chosen))
    return first_state(spec, chosen, sizes, dtype)


def _working(array: Array | None, dtype: str) -> Array | None:
    """Floating arrays in the working dtype; counters and offsets as they are."""
    if array is None or array.dtype.kind != "f":
        return array
    return array.astype(dtype, copy=False)


def _takes_any(plan: Plan) -> bool:
    """Whether the kernel takes arrays as they are, and rounds what it stores."""
    return plan.kernel is not None and plan.kernel.arrays == "any"


def run_forward(plan: Plan, problem: Problem, x: Arrays) -> Arrays:
    """Allocate, call the kernel, and round what is stored in another dtype than it was computed in."""
    compute = problem.compute_dtype
    shapes = problem.outputs()
    if _takes_any(plan):
        out: Arrays = {n: np.empty(s, d) for n, (s, d) in shapes.items() if not n.startswith("kept.")}
        plan.forward(problem, x, out)
        return out
    out = {n: np.empty(s, "int32" if d == "int32" else compute) for n, (s, d) in shapes.items()}
    plan.forward(problem, {name: _working(a, compute) for name, a in x.items()}, out)
    return out | {n: out[n].astype(d) for n, (_, d) in shapes.items() if d not in ("int32", compute, "bfloat16")}


def run_backward(plan: Plan, problem: Problem, x: Arrays, out: Arrays, dout: Arrays) -> Arrays:
    """Gradients of every floating array in ``x``, in the working dtype, or in its own where the kernel takes it so."""
    compute = problem.compute_dtype
    if _takes_any(plan):
        dx: Arrays = {n: np.empty(a.shape, a.dtype) for n, a in x.items() if a is not None and a.dtype.kind == "f"}
        plan.backward(problem, x, out, dout, dx)
        return dx
    dx = {n: np.empty(a.shape, compute) for n, a in x.items() if a is not None and a.dtype.kind == "f"}
    plan.backward(
        problem,
        {name: _working(a, compute) for name, a in x.items()},
        {name: _working(a, compute) for name, a in out.items()},
        {name: _working(a, compute) for name, a in dout.items()},
        dx,
    )
    return dx


library = NumPy()
