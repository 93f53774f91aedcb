"""Mixers that are made of others: run by their parts' kernels and array operations, on any array library.

A composition is written once, over a ``Library`` and its namespace. Under torch and JAX its gradients are theirs; for
NumPy the same lines run on a tape (``mixers.arrays.tape``), which is also how ``Mixer.vjp`` gets its pullback.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

from mixers.backend import installed
from mixers.problem import Arrays

if TYPE_CHECKING:
    from mixers.call import Call
    from mixers.mixer import Mixer


def run(mixer: "Mixer", call: "Call") -> Arrays:
    """Forward, differentiable where the library is.

    Raises:
        ValueError: the arrays are not where the backend that was asked for runs.
    """
    spec, library = call.spec, call.library
    assert spec.compose is not None
    x = library.given(call)
    if not mixer.parts:
        _refuse_elsewhere(mixer, call)
    compose = spec.compose if spec.traced(call) else library.untraced(spec.compose)
    found: Arrays = compose(library, mixer, call, x)
    return found


def _refuse_elsewhere(mixer: "Mixer", call: "Call") -> None:
    """What has parts leaves that to them; a backend of GPUs may be simulated, and is left to its kernels."""
    place = installed()[mixer.backend].place if mixer.backend in installed() else None
    if place is not None and "cpu" in place.devices:
        served = place.serves(call.library.name, call.library.device(call.x["q"]))
        if not served:
            raise ValueError(f"{call.spec.name}: backend {mixer.backend!r} {served.reason}")


def vjp(mixer: "Mixer", call: "Call") -> tuple[Arrays, Any]:
    """Forward on a tape, and a function from output gradients (by name) to input gradients (by name)."""
    from mixers.arrays.tape import Tape

    tape = Tape()
    x = call.library.given(call)
    leaves = {n: tape.leaf(a) if a is not None and a.dtype.kind == "f" else a for n, a in x.items()}
    assert call.spec.compose is not None
    out = call.spec.compose(tape, mixer, dataclasses.replace(call, library=tape, x=leaves), leaves)
    if call.spec.settle is not None:
        out = call.spec.settle(dataclasses.replace(call, library=tape), out)
    plain = {name: tape.value(a) for name, a in out.items()}

    def back(dout: Arrays) -> Arrays:
        return tape.gradients(out, dout, {n: a for n, a in leaves.items() if a is not None and x[n].dtype.kind == "f"})

    return plain, back


def warmup(mixer: "Mixer", call: "Call", grad: bool) -> None:
    """Run once, backward too where gradients are concerned."""
    if not grad:
        run(mixer, call)
    elif call.library.name == "numpy":
        import numpy as np

        out, back = vjp(mixer, call)
        back({"y": np.zeros_like(out["y"])})
    else:
        call.library.warmup(mixer, call, grad)
