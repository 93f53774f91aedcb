"""JAX arrays: the reference as a ``lax.scan``, under ``jit``, ``grad`` and ``vmap``.

A result is registered as a pytree, so that it passes through JAX's transformations.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixers import reference
from mixers.arrays.numpy import library as host
from mixers.backend import Pool
from mixers.call import Call
from mixers.mixer import Mixer
from mixers.packing import Pack, check_offsets
from mixers.problem import Arrays
from mixers.result import Result
from mixers.spec import Array


class JAX:
    """See ``mixers.arrays.Library``."""

    name = "jax"
    namespace = jnp

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
        """The arrays, with the spec's first state wherever the caller gave none."""
        x = dict(call.x)
        if x["offsets"] is not None:
            check_offsets(x["offsets"], call.sizes.T)
        fill_first_state(call, x)
        return x

    def call(self, mixer: Mixer, **arguments: Any) -> Result:
        """A call."""
        return mixer(**arguments)

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
        """A pack or concrete whole numbers; the reference cuts a pack while it is traced."""
        if isinstance(given, jax.core.Tracer):
            raise TypeError("cu_seqlens is traced; pass a mixers.pack or a NumPy array, made outside of jit")
        return host.offsets(given, like)

    def from_numpy(self, values: np.ndarray, dtype: str, like: Array) -> Array:
        """A JAX array."""
        return jnp.asarray(values, dtype=dtype)

    def scatter(self, pools: tuple[Array, ...], state: tuple[Array, ...], where: Array, target: Array) -> None:
        """JAX arrays are immutable; ``decode`` has refused them."""

    def decode(self, mixer: Mixer, call: Call, pool: Pool) -> Array | None:
        """No kernel of this library's arrays writes pools."""
        return None

    def warmup(self, mixer: Mixer, call: Call, grad: bool) -> None:
        """Nothing to compile ahead: JAX compiles what is jitted."""
        self.run(mixer, call)

    def prepare(self, mixer: Mixer) -> None:
        """Nothing to define."""

    def run(self, mixer: Mixer, call: Call) -> Arrays:
        """The reference; kernels for JAX arrays come with the ``jax`` backend."""
        plan = mixer.plan(call.problem())
        if plan.kernel is not None:
            raise ValueError(f"backend {plan.backend!r} takes no JAX arrays")
        x = dict(call.x)
        if x["offsets"] is not None:
            check_offsets(x["offsets"], call.sizes.T)
        fill_first_state(call, x)
        return reference.forward(self, call.spec, call.options, call.sizes, call.flags, x)


def fill_first_state(call: Call, x: Arrays) -> None:
    """Name the spec's first state wherever the caller gave none."""
    fields = call.spec.state(call.options).fields
    if f"initial.{fields[0].name}" in x:
        return
    compute = "float64" if x["q"].dtype == jnp.float64 else "float32"
    for f, first in zip(fields, call.spec.first(call.sizes, call.options), strict=True):
        array = jnp.asarray(first, dtype="int32" if f.counter else compute)
        x[f"initial.{f.name}"] = jnp.broadcast_to(array, (call.sizes.N, *array.shape))


def _flatten(result: Result) -> tuple[tuple[Any, ...], None]:
    return (result[0], result[1], result.checkpoints, result.kept, result.score), None


jax.tree_util.register_pytree_node(Result, _flatten, lambda _, parts: Result(*parts))

library = JAX()
