"""Gradients for NumPy: from gradients by output to gradients by input."""

from collections.abc import Callable
from typing import Any

import numpy as np

from mixers.call import Call
from mixers.problem import Arrays
from mixers.spec import Array

Pullback = Callable[..., dict[str, Any]]


def pullback(call: Call, out: Arrays, back: Callable[[Arrays], Arrays]) -> Pullback:
    """The second half of ``Mixer.vjp``; see there."""
    layout = call.spec.state(call.options)
    fields = layout.fields

    def named(prefix: str, given: Any) -> Arrays:
        if given is None:
            return {}
        nested = layout.flatten is not None and hasattr(given, "_fields")
        parts = layout.unpack(given) if nested else given if isinstance(given, tuple) else (given,)
        wanted = [f for f in fields if not f.counter]
        if len(parts) == len(fields):  # a whole state, counters and all
            parts = tuple(a for f, a in zip(fields, parts, strict=True) if not f.counter)
        result = {f"{prefix}.{f.name}": a for f, a in zip(wanted, parts, strict=True)}
        for name, gradient in result.items():
            _check(name, gradient, out[name])
        return result

    def pull(dy: Array | None, dstate: Any = None, dcheckpoints: Any = None) -> dict[str, Any]:
        if dy is not None:
            _check("y", dy, out["y"])
        dx = back({"y": dy, **named("final", dstate), **named("checkpoint", dcheckpoints)})
        inputs = {name: a for name, a in dx.items() if not name.startswith("initial.")}
        gradients = {name: a.astype(call.x[name].dtype, copy=False) for name, a in inputs.items()}
        if call.given is not None:
            gradients["initial_state"] = _state_gradient(call, dx)
        return gradients

    return pull


def _check(name: str, gradient: Array, output: Array) -> None:
    if gradient is not None and np.shape(gradient) != output.shape:
        raise ValueError(f"the gradient of {name} has shape {np.shape(gradient)}, expected {output.shape}")


def _state_gradient(call: Call, dx: Arrays) -> Any:
    """Gradients in the form in which the state was given: a shared one is summed over the sequences."""
    given, layout = call.given, call.spec.state(call.options)
    gradients = [dx.get(f"initial.{f.name}") for f in layout.fields]
    if not isinstance(given, tuple):
        # A bare array may stand for several fields (the first slots of a chunk are also its running slots), but not for
        # those that begin empty.
        total = sum(g for g in gradients[: layout.bare] if g is not None)
        return _reduce(total, given)
    if layout.flatten is not None and hasattr(given, "kept"):
        return layout.pack(tuple(_reduce(g, a) for g, a in zip(gradients, layout.unpack(given), strict=True)))
    parts = tuple(_reduce(g, a) for g, a in zip(gradients, given, strict=False))
    return type(given)(*parts) if hasattr(given, "_fields") else parts


def _reduce(gradient: Any, given: Array) -> Any:
    if gradient is None:
        return None
    if gradient.ndim > given.ndim:
        gradient = gradient.sum(axis=0)
    return gradient.astype(given.dtype, copy=False)
