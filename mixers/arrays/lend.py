"""JAX arrays lent by DLPack, outside of ``jit``, to kernels that fill memory: the ``cuda`` backend's.

    out = serve(plan, problem, x, offsets)       names of ``mixers.problem``; differentiable by ``jax.grad``, not traced

JAX works on streams of its own, which it tells nobody. So kernels run on the default stream: it waits for whoever fills
an input (``__dlpack__(stream=…)``), JAX waits for it before it reads a result (``_Filled``), and what a kernel still
reads is kept until the stream is through with it. The host waits for nothing.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixers.arrays import gpu
from mixers.arrays.numpy import first_state_of
from mixers.arrays.view import View, by_dlpack
from mixers.plan import Plan
from mixers.problem import Arrays, Problem
from mixers.spec import Array


def serve(plan: Plan, problem: Problem, x: Arrays, offsets: np.ndarray | None) -> Arrays:
    """Run a kernel on the arrays of a call.

    Args:
        plan: with a kernel whose ``arrays`` are ``"any"``.
        problem: what it was chosen for.
        x: inputs, parameters and first state that were given, all of one device; ``None`` where left out.
        offsets: of a pack, on the host.

    Raises:
        TypeError: an array is traced by ``jit`` or ``vmap``, or they lie on several devices.
    """
    given = {name: a for name, a in x.items() if a is not None and name != "offsets"}
    if not any(isinstance(a, jax.core.Tracer) for a in given.values()):
        return _forward(plan, problem, offsets, given)

    # ``jax.grad`` outside of ``jit`` calls these with arrays, not with tracers.
    @jax.custom_vjp
    def run(x: Arrays) -> Arrays:
        return _forward(plan, problem, offsets, x)

    def keep(x: Arrays) -> tuple[Arrays, Arrays]:
        return _forward(plan, problem, offsets, x), x

    def back(x: Arrays, dout: Arrays) -> tuple[Arrays]:
        return (_backward(plan, problem, offsets, x, dout),)

    run.defvjp(keep, back)
    found: Arrays = run(given)
    return found


def _forward(plan: Plan, problem: Problem, offsets: np.ndarray | None, x: Arrays) -> Arrays:
    views, device = _lent(problem, x, offsets)
    shapes = {n: s for n, s in problem.outputs().items() if not n.startswith("kept.")}
    out = {name: jnp.empty(shape, dtype, device=device) for name, (shape, dtype) in shapes.items()}
    targets = {name: _view(a) for name, a in out.items()}
    plan.forward(problem, views, targets)
    return _handed_back(out, views["q"], (views, targets))


def _backward(plan: Plan, problem: Problem, offsets: np.ndarray | None, x: Arrays, dout: Arrays) -> Arrays:
    """Gradients of floating arrays; whole numbers have none, which JAX writes as ``float0``."""
    views, device = _lent(problem, x, offsets)
    given = {n: None if g.dtype == jax.dtypes.float0 else _view(g) for n, g in dout.items()}
    dx = {n: jnp.empty(a.shape, a.dtype, device=device) for n, a in x.items() if jnp.issubdtype(a.dtype, jnp.floating)}
    targets = {name: _view(a) for name, a in dx.items()}
    plan.backward(problem, views, {}, given, targets)
    found = _handed_back(dx, views["q"], (views, given, targets))
    return {n: found[n] if n in found else np.zeros(a.shape, jax.dtypes.float0) for n, a in x.items()}


def _lent(problem: Problem, x: Arrays, offsets: np.ndarray | None) -> tuple[dict[str, Any], Any]:
    """Views of the arrays and of the first state, and their device."""
    traced = [name for name, a in x.items() if isinstance(a, jax.core.Tracer)]
    if traced:
        raise TypeError(
            f"{problem.spec.name}: {', '.join(traced)} are traced, and this kernel runs outside of jit and vmap only; "
            "take backend='jax' inside of them"
        )
    devices = {device for a in x.values() for device in a.devices()}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise TypeError(f"{problem.spec.name}: the arrays lie on {names}; expected one device, so move them together")
    (device,) = devices
    views: dict[str, Any] = {name: _view(a) for name, a in x.items()}
    views["offsets"] = (
        None if offsets is None else _view(jax.device_put(offsets.astype(np.int64).view(np.int32), device))
    )
    fields = problem.spec.state(problem.option).fields
    if f"initial.{fields[0].name}" not in x:
        first = _first_state(problem.spec, problem.options, problem.widths, problem.compute_dtype, device)
        views |= {f"initial.{f.name}": _view(a).spread(problem.sizes.N) for f, a in zip(fields, first, strict=True)}
    return views, device


@functools.lru_cache(maxsize=64)
def _first_state(spec: Any, options: Any, widths: Any, dtype: str, device: Any) -> tuple[Array, ...]:
    """The first state of one sequence, on the device."""
    return tuple(jax.device_put(a, device) for a in first_state_of(spec, options, widths, dtype))


def _view(array: Array) -> View:
    return by_dlpack(array, functools.partial(_make, array.device))


def _make(device: Any, shape: tuple[int, ...], dtype: str) -> View:
    return _view(jnp.empty(shape, dtype, device=device))


class _Filled:
    """An array that a stream is filling: whoever takes it over waits for that stream."""

    def __init__(self, array: Array, stream: int, device: int) -> None:
        self._array, self._stream, self._device = array, stream, device

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()

    def __dlpack__(self, *, stream: int | None = None, **rest: Any) -> Any:
        if stream is not None:
            gpu.follow(stream, self._stream, self._device)
        return self._array.__dlpack__(stream=stream, **rest)


def _handed_back(arrays: Arrays, q: View, lent: Any) -> Arrays:
    """The arrays as JAX may read them, once the stream has filled them."""
    if q.device >= 0:
        gpu.hold(lent, q.stream, q.device)
    return {name: jax.dlpack.from_dlpack(_Filled(a, q.stream, q.device)) if a.size else a for name, a in arrays.items()}
