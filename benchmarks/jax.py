"""JAX arrays: our kernels beside what one writes in JAX, in one process, as ratios.

python -m benchmarks.jax [--rounds 15] [--out benchmarks/results/jax.json]

On a CPU: exact Lattice and Lattice in chunks of 16, forward and with backward, at (1,1024,8,64,64), beside a jitted
``lax.scan`` over tokens and over chunks. On a GPU: the same at (8,2048,16,64,64), and the delta rule in bfloat16 at
(4,4096,16,128,128). Compile times of forward + backward are those of XLA, with tracing. Times are medians of rounds in
turns, ours and the peer's.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import mixers
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
    for turn in range(rounds + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if turn >= 2:
                found[name].append(1e3 * (time.perf_counter() - start))
    return found


def peers(name: str, shape: tuple[int, ...], chunk: int) -> dict[str, Callable[[Arrays], jax.Array]]:
    """What one writes instead."""
    if name != "lattice":
        return {}
    option = {"objective": "decoding", "read_norm": True, "scale": 1.0, "chunk_size": chunk}
    function, title = (over_tokens(lattice_token), "lax.scan") if chunk == 1 else (lattice_chunked, "naive chunks")
    batch, _, heads, keys, values = shape
    first = jnp.asarray(mixers.get("lattice").init_state(batch, heads, keys, values))
    return {title: lambda x: function(x, (first,), option)[0]}


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
        ("lattice", 1, large, "float32", ("jax",)),
        ("lattice", 16, large, "float32", ("jax",)),
        ("delta_rule", 1, wide, "bfloat16", ("jax",)),
    ]


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for name, chunk, shape, dtype, backends in cases():
        x = inputs(name, shape, dtype)
        given = {"chunk_size": chunk} if name == "lattice" else {}
        for backward in (False, True):
            runs, seconds = {}, {}
            ours = {b: mixers.get(name, backend=b, **given) for b in backends}
            functions: dict[str, Any] = {
                b: lambda x, mix=mix: mix(**x, return_state=False).y for b, mix in ours.items()
            } | peers(name, shape, chunk)
            for title, function in functions.items():
                with jax.default_matmul_precision("highest"):
                    runs[title], seconds[title] = compiled(function, x, backward)
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
