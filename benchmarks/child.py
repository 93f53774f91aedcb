"""What is measured in a process of its own: ``python -m benchmarks.child memory|start MIXER …`` prints JSON.

Nothing heavy is imported before its import is timed.
"""

import json
import sys
import time
from typing import Any

from benchmarks.memory import forget_peak, status


def memory(mixer: str, length: int, heads: int, width: int) -> dict[str, Any]:
    """What one forward and backward takes beyond its inputs and outputs.

    Inputs are what the call reads, the gradient of ``y`` too; outputs are ``y``, the last state and every gradient.
    The peak is that of the process, less what it held before the call and less the outputs that it still holds after.
    """
    import gc
    import tracemalloc

    import mixers
    from benchmarks import inputs
    from benchmarks.case import TRAIN, Case

    mix = mixers.get(mixer, backend="numba")

    def train(arrays: dict[str, Any]) -> list[Any]:
        x = dict(arrays)
        dy = x.pop("dy")
        result, pullback = mix.vjp(**x)
        state = result.state if isinstance(result.state, tuple) else (result.state,)
        return [result.y, *state, *pullback(dy).values()]

    def draw(tokens: int) -> dict[str, Any]:
        case = Case(mixer, 1, tokens, heads, width, width, TRAIN)
        return inputs.draw(case.spec, case.sizes)

    train(draw(512))  # compiled, threads up
    arrays = draw(length)
    gc.collect()
    given = sum(a.nbytes for a in arrays.values())

    tracemalloc.start()
    traced = train(arrays)
    allocated = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    returned = sum(a.nbytes for a in traced)
    del traced
    gc.collect()

    forget_peak()
    before = status("VmRSS")
    results = train(arrays)
    peak = status("VmHWM")
    assert len(results) > 1
    return {
        "input_bytes": given,
        "output_bytes": returned,
        "extra_bytes": max(peak - before - returned, 0),
        "extra_bytes_traced": max(allocated - returned, 0),
    }


def start(mixer: str) -> dict[str, Any]:
    """Seconds from a fresh interpreter to ``import mixers``, and to the first result and the first gradient."""
    before = set(sys.modules)
    clock = time.perf_counter()
    import mixers

    imported = time.perf_counter() - clock
    modules = {name.partition(".")[0] for name in set(sys.modules) - before}
    heavy = sorted(modules & {"numpy", "numba", "llvmlite", "torch", "jax", "jaxlib", "triton", "scipy"})

    clock = time.perf_counter()
    import numba  # noqa: F401
    import numpy as np

    compiler = time.perf_counter() - clock
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 64, 8, 64), dtype=np.float32) for _ in range(3))
    spec = mixers.get_spec(mixer)
    gates = {}
    for arg in spec.inputs[3:]:
        if not arg.optional:
            value = rng.random((1, 64, 8) if arg.axes.split("|")[0].split()[-1] == "H" else (1, 64, 8, 64), np.float32)
            gates[arg.name] = -value if arg.draw == "log_decay" else value

    clock = time.perf_counter()
    y = mixers.get(mixer, backend="numba")(q, k, v, **gates).y
    first = time.perf_counter() - clock
    clock = time.perf_counter()
    mixers.get(mixer, backend="numba").vjp(q, k, v, **gates)[1](np.ones_like(y))
    gradient = time.perf_counter() - clock
    return {
        "import_seconds": imported,
        "heavy_modules": heavy,
        "import_numba_seconds": compiler,
        "first_call_seconds": first,
        "first_gradient_seconds": gradient,
    }


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    found = start(*arguments) if name == "start" else memory(arguments[0], *map(int, arguments[1:]))
    print(json.dumps(found))
