"""JAX arrays: kernels as pure functions with a derivative of their own, the reference as a ``lax.scan``.

A kernel of JAX arrays becomes a ``custom_vjp`` under ``jit``, chosen while it is traced, from shapes and dtypes alone;
``jit``, ``grad``, ``vmap``, ``checkpoint``, ``eval_shape`` and ``shard_map`` work on that. Forward mode does not:
``backend="reference"`` has it. A result is registered as a pytree, so that it passes through JAX's transformations.
"""

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixers import reference
from mixers.arrays.numpy import first_state
from mixers.arrays.numpy import library as host
from mixers.backend import Pool
from mixers.call import Call
from mixers.mixer import Mixer
from mixers.packing import Pack, check_offsets
from mixers.plan import Plan
from mixers.primitive import by_custom, find
from mixers.problem import Arrays, Problem
from mixers.result import Result
from mixers.spec import Array

# Products of float32 are true ones wherever they run: left to itself, XLA rounds their operands to tf32 on a GPU.
_EXACT = {"matmul": functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)}


class JAX:
    """See ``mixers.arrays.Library``."""

    name = "jax"
    namespace = SimpleNamespace(**(vars(jnp) | _EXACT))

    def dtype(self, array: Array) -> str:
        """The name of an array's dtype."""
        return str(array.dtype)

    def device(self, array: Array) -> str:
        """The platform that traced code will run on."""
        if isinstance(array, jax.core.Tracer):
            return jax.default_backend().replace("gpu", "cuda")
        return str(next(iter(array.devices())).platform).replace("gpu", "cuda")

    def same_device(self, a: Array, b: Array) -> bool:
        """JAX itself refuses to mix committed devices."""
        return True

    def expand(self, array: Array, shape: tuple[int, ...]) -> Array:
        """Broadcast."""
        return jnp.broadcast_to(array, shape)

    def cast(self, array: Array, dtype: str) -> Array:
        """The array in another dtype."""
        return array.astype(dtype)

    def scan(self, step: Any, state: tuple[Array, ...], tokens: dict[str, Array]) -> tuple[Array, tuple[Array, ...]]:
        """``lax.scan`` over the tokens."""

        def body(state: tuple[Array, ...], token: dict[str, Array]) -> tuple[tuple[Array, ...], Array]:
            y, state = step(token, state)
            return state, y

        tokens = {name: jnp.moveaxis(a, 1, 0) for name, a in tokens.items()}
        state, outputs = jax.lax.scan(body, state, tokens)
        return jax.tree_util.tree_map(lambda a: jnp.moveaxis(a, 0, 1), outputs), state

    def largest(self, counts: Array) -> int | None:
        """A Python number; unknown while traced."""
        return None if isinstance(counts, jax.core.Tracer) else int(counts.max(initial=0))

    def first_nan(self, array: Array) -> tuple[int, ...] | None:
        """A position; unknown while traced."""
        return None if isinstance(array, jax.core.Tracer) else host.first_nan(np.asarray(array))

    def host(self, counts: Array) -> np.ndarray | None:
        """The numbers; unknown while traced."""
        return None if isinstance(counts, jax.core.Tracer) else np.asarray(counts)

    def given(self, call: Call) -> Arrays:
        """The arrays, with the spec's first state wherever the caller gave none.

        Raises:
            TypeError: offsets are traced, and what cuts a pack by itself must know them.
        """
        x = dict(call.x)
        if isinstance(x["offsets"], jax.core.Tracer):
            raise TypeError(_TRACED)
        if x["offsets"] is not None:
            check_offsets(np.asarray(x["offsets"]), call.sizes.T)
        fill_first_state(call, x, counters=True)
        return x

    def call(self, mixer: Mixer, **arguments: Any) -> Result:
        """A call."""
        return mixer(**arguments)

    def serves(self, primitive: Any, of: Any, x: tuple[Any, ...]) -> bool:
        """A gradient may be asked for at any time."""
        return bool(primitive.flows) and find(*of) is not None

    def primitive(
        self, primitive: Any, of: Any, x: tuple[Any, ...], fixed: tuple[Any, ...], factor: float, how: str
    ) -> tuple[Any, ...]:
        """See ``mixers.arrays.Library``."""
        return by_custom(self, primitive, of, x, fixed, factor, how)

    def custom(self, forward: Any, backward: Any, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
        """A ``custom_vjp``."""

        @jax.custom_vjp
        def run(*arrays: Array) -> tuple[Array, ...]:
            outputs: tuple[Array, ...] = forward(*arrays)[0]
            return outputs

        run.defvjp(forward, lambda saved, gradients: tuple(backward(saved, *gradients)))
        outputs: tuple[Array, ...] = run(*arrays)
        return outputs

    def untraced(self, function: Any) -> Any:
        """The function itself."""
        return function

    def bounds(self, offsets: Array) -> list[int]:
        """Python numbers."""
        return host.bounds(offsets)

    def offsets(self, given: Any, like: Array) -> tuple[Pack | None, Array, int]:
        """A pack or whole numbers; where they are traced, their number is all that is known of them."""
        if not isinstance(given, jax.core.Tracer):
            return host.offsets(given, like)
        if given.ndim != 1 or given.shape[0] < 2 or not jnp.issubdtype(given.dtype, jnp.integer):
            raise ValueError(
                f"cu_seqlens has shape {given.shape} and dtype {given.dtype}; expected whole numbers [N+1]"
            )
        return None, given, given.shape[0] - 1

    def from_numpy(self, values: np.ndarray, dtype: str, like: Array) -> Array:
        """A JAX array."""
        return jnp.asarray(values, dtype=dtype)

    def scatter(self, pools: tuple[Array, ...], state: tuple[Array, ...], where: Array, target: Array) -> None:
        """JAX arrays are immutable; ``decode`` has refused them."""

    def decode(self, mixer: Mixer, call: Call, pool: Pool) -> Array | None:
        """No kernel of this library's arrays writes pools."""
        return None

    def warmup(self, mixer: Mixer, call: Call, grad: bool) -> None:
        """Run once, backward too with ``grad``."""
        out = self.run(mixer, call)
        if grad:
            leaves = {n: a for n, a in call.x.items() if a is not None and jnp.issubdtype(a.dtype, jnp.floating)}

            def total(leaves: Arrays) -> Array:
                return self.run(mixer, dataclasses.replace(call, x={**call.x, **leaves}))["y"].astype("float32").sum()

            out = jax.grad(total)(leaves)
        jax.block_until_ready(out)  # type: ignore[no-untyped-call]

    def prepare(self, mixer: Mixer) -> None:
        """Nothing to define."""

    def again(self, mixer: Mixer, x: Arrays, state: bool, checkpoint_every: int | None) -> Result | None:
        """The long way; ``jit`` is the short one."""
        return None

    def run(self, mixer: Mixer, call: Call) -> Arrays:
        """A kernel, or the reference."""
        if call.flags.state_dtype == "float64" and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
            raise ValueError(
                "state_dtype='float64' needs JAX's x64 mode, which is off: jax.config.update('jax_enable_x64', True)"
            )
        problem = call.problem()
        plan = mixer.plan(problem)
        if plan.kernel is None:
            return reference.forward(self, call.spec, call.options, call.sizes, call.flags, self.given(call))
        x = {name: a for name, a in call.x.items() if a is not None}
        if "offsets" in x and not isinstance(x["offsets"], jax.core.Tracer):
            check_offsets(np.asarray(x["offsets"]), call.sizes.T)
        if plan.kernel.arrays == "any":
            from mixers.arrays.lend import serve

            return serve(plan, problem, call.x, call.x["offsets"])
        if plan.kernel.arrays != self.name:
            raise ValueError(f"backend {plan.backend!r} takes no JAX arrays")
        fill_first_state(call, x, counters=False)
        if not call.sizes.T:
            return _nothing(problem, x)
        if "offsets" in x:
            x["offsets"] = jnp.asarray(x["offsets"], jnp.int32)
        found: Arrays = _apply(_Static(plan, problem), vary(x, tuple(x.values())))
        return found


def vary(tree: Any, like: Any) -> Any:
    """Arrays of a tree, marked as different on every device of the mesh axes along which any of ``like`` differs.

    Under ``shard_map`` what is made anew is taken for the same on all devices, and a loop may not change that.
    """
    if not hasattr(jax, "typeof") or not hasattr(jax.lax, "pcast"):
        return tree
    axes = frozenset[Any]().union(*map(_varying, jax.tree.leaves(like)))
    if not axes:
        return tree

    def mark(array: Array) -> Array:
        missing = tuple(axes - _varying(array))
        return jax.lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(mark, tree)


def _varying(array: Array) -> frozenset[Any]:
    """The mesh axes along which an array differs; JAX has called them by two names."""
    kind: Any = jax.typeof(array)
    axes = getattr(kind, "manual_axis_type", None)
    found: frozenset[Any] = getattr(kind, "vma", frozenset()) if axes is None else axes.varying
    return found


_TRACED = (
    "cu_seqlens is traced; pass a mixers.pack or a NumPy array, made outside of jit: the reference, and what is "
    "composed of several mixers, cut a pack while it is traced (kernels of backend='jax' take traced offsets)"
)


def fill_first_state(call: Call, x: Arrays, counters: bool) -> None:
    """Name the spec's first state wherever the caller gave none; kernels take a missing counter for zeros."""
    fields = call.spec.state(call.options).fields
    if f"initial.{fields[0].name}" in x:
        return
    compute = "float64" if x["q"].dtype == jnp.float64 else "float32"
    for f, first in zip(fields, first_state(call.spec, call.options, call.sizes, compute), strict=True):
        if f.counter and not counters:
            continue
        dtype = x["q"].dtype if f.verbatim and not counters else first.dtype
        x[f"initial.{f.name}"] = jnp.broadcast_to(jnp.asarray(first, dtype=dtype), (call.sizes.N, *first.shape))


@dataclass(frozen=True, eq=False)
class _Static:
    """A plan and its problem as a static argument of ``jit``: equal where the same code runs on arrays of one shape."""

    plan: Plan
    problem: Problem

    def _key(self) -> tuple[Any, ...]:
        return self.plan.kernel, tuple(sorted(self.plan.config.items())), self.problem, self.problem.sizes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def keeping(self) -> Problem:
        """The problem of a forward that a backward follows."""
        return dataclasses.replace(self.problem, flags=dataclasses.replace(self.problem.flags, grad=True))


@functools.partial(jax.jit, static_argnums=0)
def _apply(static: _Static, x: Arrays) -> Arrays:
    """Run a kernel; compiled once for the shapes of its arrays, inside of another ``jit`` a part of it."""
    found: Arrays = _differentiable(static, x)
    return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(static: _Static, x: Arrays) -> Arrays:
    out: Arrays = {}
    static.plan.forward(static.problem, x, out)
    found: Arrays = vary(dict(_stored(static.problem, out)), x)
    return found


def _stored(problem: Problem, out: Arrays) -> Iterator[tuple[str, Array]]:
    """What the caller gets, in its dtypes."""
    for name, (shape, dtype) in problem.outputs().items():
        if not name.startswith("kept."):
            assert out[name].shape == shape, f"{name} has shape {out[name].shape}, expected {shape}"
            yield name, out[name].astype(dtype)


def _forward(static: _Static, primal: Arrays) -> tuple[Arrays, tuple[Arrays, Arrays]]:
    x = {name: p.value for name, p in primal.items()}
    out: Arrays = {}
    problem = static.keeping()
    static.plan.forward(problem, x, out)
    kept = {name: a for name, a in out.items() if name.startswith("kept.")}
    return vary(dict(_stored(problem, out)), x), (x, vary(kept, x))


def _backward(static: _Static, residuals: tuple[Arrays, Arrays], dout: Arrays) -> tuple[Arrays]:
    x, kept = residuals
    dx: Arrays = {}
    nothing = jax.custom_derivatives.SymbolicZero
    flowing = {
        name: a for name, a in dout.items() if not isinstance(a, nothing) and jnp.issubdtype(a.dtype, jnp.floating)
    }
    static.plan.backward(static.keeping(), x, kept, flowing, dx)
    found = {n: dx[n].astype(a.dtype) if jnp.issubdtype(a.dtype, jnp.floating) else None for n, a in x.items()}
    return (vary(found, x),)


_differentiable.defvjp(_forward, _backward, symbolic_zeros=True)


def _nothing(problem: Problem, x: Arrays) -> Arrays:
    """The outputs of no tokens: the first state is the last."""
    out: Arrays = {}
    for name, (shape, dtype) in problem.outputs().items():
        first = x.get(name.replace("final.", "initial."))
        out[name] = first.astype(dtype) if name.startswith("final.") and first is not None else jnp.zeros(shape, dtype)
    return out


def _flatten(result: Result) -> tuple[tuple[Any, ...], None]:
    return (result[0], result[1], result.checkpoints, result.kept, result.score), None


jax.tree_util.register_pytree_node(Result, _flatten, lambda _, parts: Result(*parts))

library = JAX()
