"""Mixers that are made of others: run by their parts' kernels and array operations, on any array library.

A composition is written once, over a ``Library`` and its namespace. Under torch and JAX its gradients are theirs; for
NumPy the same lines run on a tape (``mixers.arrays.tape``), which is also how ``Mixer.vjp`` gets its pullback.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

from mixers.problem import Arrays

if TYPE_CHECKING:
    from mixers.call import Call
    from mixers.mixer import Mixer


def run(mixer: "Mixer", call: "Call") -> Arrays:
    """Forward, differentiable where the library is."""
    spec, library = call.spec, call.library
    assert spec.compose is not None
    compose = spec.compose if spec.traced(call) else library.untraced(spec.compose)
    found: Arrays = compose(library, mixer, call, library.given(call))
    return found


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
