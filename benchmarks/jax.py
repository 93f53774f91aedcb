"""JAX arrays: our kernels beside what one writes in JAX, in one process, as ratios.

python -m benchmarks.jax [--rounds 15] [--mixers lattice] [--compile] [--out benchmarks/results/jax.json]

On a CPU: exact Lattice and Lattice in chunks of 16, forward and with backward, at (1,1024,8,64,64), beside a jitted
``lax.scan`` over tokens and over chunks. On a GPU: the same at (8,2048,16,64,64), and the delta rule in bfloat16 at
(4,4096,16,128,128) beside fla's, on torch tensors. Compile times are those of tracing and XLA, and of what kernels
compile while they are traced. Times are medians of rounds in turns, ours and the peer's; a round makes as many calls as
take some 20 ms, and waits for the last, so that starting a call from Python does not count where the device is slower.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from mixers.autotune.key import FORWARD

import mixers
from benchmarks.case import TRAIN, Case
from benchmarks.peers.jax_scan import lattice_chunked, lattice_token, over_tokens
from mixers.cases import Setting, draw

Arrays = dict[str, jax.Array]
Run = Callable[[], Any]


def inputs(name: str, shape: tuple[int, int, int, int, int], dtype: str) -> Arrays:
    """Arguments of a call, in the arrays that a mixer cannot do without."""
    batch, tokens, heads, keys, values = shape
    spec = mixers.get_spec(name)
    arrays = tuple((a.name, " ".join(a.layouts[0])) for a in spec.inputs if not a.optional)
    x = draw(Setting(spec, (), arrays, heads, heads, keys, values, (tokens,) * batch), "float32")
    return {n: jnp.asarray(a, dtype if n in ("q", "k", "v") else "float32") for n, a in x.items()}


def compiled(function: Callable[[Arrays], jax.Array], x: Arrays, backward: bool) -> tuple[Run, float]:
    """A pass, compiled, and how many seconds that took."""
    start = time.perf_counter()
    if backward:

        def both(x: Arrays, dy: jax.Array) -> Any:
            y, pull = jax.vjp(function, x)
            return y, pull(dy)[0]

        shape = jax.eval_shape(function, x)
        dy = jnp.ones(shape.shape, shape.dtype)
        run = jax.jit(both).lower(x, dy).compile()
        return lambda: run(x, dy), time.perf_counter() - start
    forward = jax.jit(function).lower(x).compile()
    return lambda: forward(x), time.perf_counter() - start


def times(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every run, in turns."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    calls = {name: max(1, min(20, round(20 / _ms(run, 2)))) for name, run in runs.items()}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(_ms(run, calls[name]))
    return found


def _ms(run: Run, calls: int) -> float:
    """Milliseconds of a call, of several that follow each other."""
    wait(run())
    start = time.perf_counter()
    for _ in range(calls):
        last = run()
    wait(last)
    return 1e3 * (time.perf_counter() - start) / calls


def wait(result: Any) -> None:
    """Until a result is there: JAX's arrays, or torch's tensors."""
    if jax.tree.leaves(result)[0].__class__.__module__.startswith("torch"):
        import torch

        torch.cuda.synchronize()
    else:
        jax.block_until_ready(result)


def peers(name: str, shape: tuple[int, ...], chunk: int, backward: bool) -> dict[str, Callable[[Arrays], jax.Array]]:
    """What one writes in JAX instead."""
    if name != "lattice":
        return {}
    option = {"objective": "decoding", "read_norm": True, "scale": 1.0, "chunk_size": chunk}
    if chunk == 1 and shape[0] > 1 and backward:
        return {}  # a differentiated scan keeps every token's slots: tens of gigabytes
    function, title = (over_tokens(lattice_token), "lax.scan") if chunk == 1 else (lattice_chunked, "naive chunks")
    batch, _, heads, keys, values = shape
    first = jnp.asarray(mixers.get("lattice").init_state(batch, heads, keys, values))
    return {title: lambda x: function(x, (first,), option)[0]}


def beside(name: str, shape: tuple[int, int, int, int, int], dtype: str, backward: bool, x: Arrays) -> dict[str, Run]:
    """fla's kernel on torch tensors of the same numbers; nothing where it is not installed, or not asked for.

    Its tuner is given less time a configuration, as in ``benchmarks.gpu``.
    """
    if name == "lattice" or jax.default_backend() != "gpu":
        return {}
    try:
        from triton.runtime import driver
        from triton.testing import do_bench

        from benchmarks.peers.fla import peers
    except ImportError:
        return {}
    driver.active.get_benchmarker = lambda: functools.partial(do_bench, warmup=5, rep=20)
    case = Case(name, *shape, kind=TRAIN if backward else FORWARD, dtype=dtype, device="cuda")
    (peer,) = (peer for peer in peers("cuda") if peer.mixer == name)
    arrays = {n: np.array(a, np.float32) for n, a in x.items()}
    return {f"fla {peer.version}": peer.build(case, arrays | {"dy": np.ones(arrays["v"].shape, np.float32)})}


def cases() -> list[tuple[str, int, tuple[int, int, int, int, int], str, tuple[str, ...]]]:
    """Mixer, chunk, shape, dtype and our backends."""
    if jax.default_backend() == "cpu":
        small = (1, 1024, 8, 64, 64)
        both = ("numba", "jax")
        return [("lattice", 1, small, "float32", both), ("lattice", 16, small, "float32", both)] + [
            (name, 1, small, "float32", both) for name in ("delta_rule", "gated_delta_rule", "kda")
        ]
    large, wide = (8, 2048, 16, 64, 64), (4, 4096, 16, 128, 128)
    return [
        ("delta_rule", 1, wide, "bfloat16", ("triton", "jax")),
        ("lattice", 1, large, "float32", ("triton", "jax")),
        ("lattice", 16, large, "float32", ("triton", "jax")),
    ]


def compile_seconds() -> list[dict[str, Any]]:
    """How long a layer's mixer takes to compile, forward and backward, at two lengths: from shapes, nothing runs."""
    rows = []
    for name, chunk in (("lattice", 1), ("lattice", 16), ("delta_rule", 1), ("kda", 1), ("ttt_linear", 16)):
        mix = mixers.get(name, **({"chunk_size": chunk} if chunk > 1 else {}))
        for tokens in (1024, 65536):
            x = jax.eval_shape(lambda name=name, tokens=tokens: inputs(name, (1, tokens, 8, 64, 64), "float32"))
            start = time.perf_counter()
            jax.jit(jax.value_and_grad(lambda x, mix=mix: mix(**x).y.sum())).lower(x).compile()
            seconds = time.perf_counter() - start
            rows.append({"mixer": name, "chunk": chunk, "tokens": tokens, "seconds": seconds})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="how long compiling takes, and nothing else")
    parser.add_argument("--mixers", nargs="+", help="some of those above")
    parser.add_argument("--backends", nargs="+", help="of ours; those that are best here by default")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = compile_seconds() if options.compile else []
    for name, chunk, shape, dtype, preferred in [] if options.compile else cases():
        if options.mixers and name not in options.mixers:
            continue
        backends = options.backends or preferred
        x = inputs(name, shape, dtype)
        given = {"chunk_size": chunk} if name == "lattice" else {}
        for backward in (False, True):
            runs, seconds = {}, {}
            ours = {b: mixers.get(name, backend=b, **given) for b in backends if mixers.backend_status()[b]}
            functions: dict[str, Any] = {
                b: lambda x, mix=mix: mix(**x, return_state=False).y for b, mix in ours.items()
            } | peers(name, shape, chunk, backward)
            for title, function in functions.items():
                with jax.default_matmul_precision("highest"):
                    runs[title], seconds[title] = compiled(function, x, backward)
            runs |= beside(name, shape, dtype, backward, x)
            found = times(runs, options.rounds)
            row = {
                "mixer": name,
                "chunk": chunk,
                "shape": shape,
                "dtype": dtype,
                "backward": backward,
                "ms": {title: statistics.median(ms) for title, ms in found.items()},
                "spread_ms": {title: [min(ms), max(ms)] for title, ms in found.items()},
                "compile_s": seconds,
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    if options.out:
        device = str(jax.devices()[0])
        about = {"jax": jax.__version__, "device": device, "rounds": options.rounds, "cases": rows}
        options.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
