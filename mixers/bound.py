"""A call on NumPy arrays whose problem and kernel were settled before: what a loop of many small calls needs.

bound = mix.bind(q, k, v, beta=b)
y, state = bound(q, k, v, beta=b)              arrays of the same shapes and dtypes, other numbers
"""

from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from mixers.call import Call
from mixers.result import Result
from mixers.spec import Array

if TYPE_CHECKING:
    from mixers.mixer import Mixer


class Bound:
    """One call of a mixer, bound to shapes, dtypes and a kernel.

    Attributes:
        problem: the call.
        plan: the kernel and its configuration; it stays, whatever is measured later.
    """

    def __init__(self, mixer: "Mixer", call: Call) -> None:
        """See ``Mixer.bind``."""
        from mixers.arrays.numpy import prepare

        self.problem, x = prepare(call)
        self.plan = mixer.plan(self.problem)
        if self.plan.kernel is None:
            raise ValueError(f"{call.spec.name}: no kernel runs this call, and the reference cannot be bound")
        compute = np.dtype(self.problem.compute_dtype)
        layout, fields = call.spec.state(call.options), call.spec.state(call.options).fields
        self._spec, self._pack = call.spec, layout.pack
        self._given = [(n, a.shape, a.dtype) for n, a in call.x.items() if a is not None and n != "offsets"]
        self._count, names = len(self._given), {name for name, _, _ in self._given}
        self._rest = {n: a for n, a in x.items() if n not in names}
        outputs = [(n, s, np.dtype(d)) for n, (s, d) in self.problem.outputs().items()]
        self._outputs, self._final = outputs, [f"final.{f.name}" for f in fields]
        self._only = self._final[0] if layout.type is None else ""
        plain = all(a.dtype == compute for a in x.values() if a is not None and a.dtype.kind == "f")
        self._plain = plain and all(d in (compute, np.int32) for _, _, d in outputs)
        self._forward, self._config = self.plan.kernel.forward, self.plan.config

    def __call__(self, q: Array, k: Array, v: Array, **gates: Array) -> Result:
        """Run the kernel.

        Raises:
            ValueError: an array is missing, or of another shape or dtype than what was bound.
        """
        x: dict[str, Any] = gates
        x["q"], x["k"], x["v"] = q, k, v
        if len(x) != self._count:
            self._refuse(x)
        try:
            for name, shape, dtype in self._given:
                array = x[name]
                if array.shape != shape or (array.dtype is not dtype and array.dtype != dtype):
                    self._refuse(x)
        except (KeyError, AttributeError):
            self._refuse(x)
        x.update(self._rest)
        if self._plain:
            out: dict[str, Any] = {}
            for name, shape, dtype in self._outputs:
                out[name] = np.empty(shape, dtype)
            self._forward(self.problem, self._config, x, out)
        else:
            from mixers.arrays.numpy import run_forward

            out = run_forward(self.plan, self.problem, x)
        state = out[self._only] if self._only else self._pack(tuple([out[name] for name in self._final]))
        return tuple.__new__(Result, (out["y"], state))  # without attributes of its own

    def _refuse(self, x: dict[str, Any]) -> NoReturn:
        """Say what is not as it was bound."""
        name = self._spec.name
        if len(x) != self._count:
            raise ValueError(f"{name}: bound to {[n for n, _, _ in self._given]}, got {sorted(x)}")
        for given, shape, dtype in self._given:
            array = x.get(given)
            here = None if array is None else (getattr(array, "shape", None), getattr(array, "dtype", None))
            if here != (shape, dtype):
                got = "is missing" if here is None else f"has shape {here[0]} and dtype {here[1]}"
                raise ValueError(f"{name}: {given} {got}, and is bound to {shape} and {dtype}; bind again")
        raise AssertionError(x)
