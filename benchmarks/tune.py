"""The tuner's numbers: what dispatch costs, how long tuning takes, how near its choice comes to an exhaustive search's.

    python -m benchmarks.tune                 CPU: dispatch, tuning time, exhaustive search over ten problems
    python -m benchmarks.tune --device cuda   the same on a GPU
    python -m benchmarks.tune --only dispatch
    python -m benchmarks.tune --device cuda --only search --first 5 --seconds 200 --json found.json

Dispatch is measured against calling the kernel directly, beside a bare ``custom_op`` in the same turns: the fastest of
many short bursts, since what disturbs a microsecond only ever adds to it.

Tuning begins with a profile and caches of compiled code that are empty, so a first problem's seconds include all its
compilation. The exhaustive search then times every candidate, those too that the cost model left out, in turns; who is
far behind after two turns is timed no further. The problems are none of those that the cost model was written with.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from mixers.autotune.ahead import Ahead
from mixers.autotune.device import device_of_kind, stamp_of
from mixers.autotune.key import BACKWARD, FORWARD, to_json
from mixers.autotune.policy import Asked, candidates, choose, fits
from mixers.autotune.profile import Entry, config_text
from mixers.autotune.tuner import problem_of, tune_problem
from mixers.autotune.workshop import Lost, Workshop

import mixers
from benchmarks.timing import wait
from mixers.backend import Config, installed
from mixers.problem import Problem

BURSTS, CALLS = 60, 60

# Behind the best by so much after two turns, a candidate is not the best.
FAR = 1.3

Row = dict[str, Any]

# (mixer, options, B, T, H, K, V): widths and heads that no default was chosen for.
CPU = (
    ("linear_attention", {}, 1, 700, 3, 48, 80),
    ("ssd", {}, 2, 512, 6, 32, 32),
    ("gla", {}, 1, 900, 4, 96, 64),
    ("delta_rule", {}, 4, 300, 2, 24, 128),
    ("gated_delta_rule", {}, 1, 2000, 1, 64, 64),
    ("kda", {}, 1, 600, 5, 40, 40),
    ("lattice", {"chunk_size": 8}, 1, 500, 4, 64, 48),
    ("lattice", {}, 2, 400, 3, 32, 96),
    ("ttt_linear", {}, 1, 400, 4, 48, 48),
    ("attention", {}, 1, 700, 3, 80, 80),
)
GPU = (
    ("linear_attention", {}, 3, 3000, 12, 96, 96),
    ("ssd", {}, 16, 1024, 24, 64, 64),
    ("gla", {}, 2, 5000, 8, 64, 128),
    ("delta_rule", {}, 1, 8192, 8, 128, 64),
    ("gated_delta_rule", {}, 6, 1500, 20, 64, 128),
    ("kda", {}, 4, 2048, 12, 64, 64),
    ("lattice", {"chunk_size": 32}, 5, 2048, 12, 64, 64),
    ("lattice", {}, 3, 1024, 24, 48, 64),
    ("ttt_linear", {}, 4, 2048, 10, 64, 64),
    ("delta_rule", {}, 24, 700, 16, 96, 96),
)


def fastest(runs: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Microseconds of this thread a call, the least of many bursts in turns: other processes' turns do not count.

    A GPU's queue is empty when a burst begins, and holds all of it.
    """
    least = dict.fromkeys(runs, float("inf"))
    for _ in range(BURSTS):
        for name, run in runs.items():
            wait(run())
            start = time.thread_time()
            for _ in range(CALLS):
                run()
            least[name] = min(least[name], (time.thread_time() - start) / CALLS * 1e6)
    return least


def dispatch(device: str) -> dict[str, float]:
    """What a known problem costs beyond its kernel, in microseconds."""
    mix = mixers.get("delta_rule")
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 2, 1, 8), dtype=np.float32)
    x: dict[str, Any] = {"q": q, "k": k, "v": v, "beta": np.full((1, 2, 1), 0.5, np.float32)}
    runs: dict[str, Callable[[], Any]] = {}
    if device == "cpu":
        from mixers.arrays.numpy import prepare

        problem, arrays = prepare(mix.validated(**x))
        bound = mix.bind(**x)
        runs["kernel"] = direct(mix, problem, arrays)
        training = dataclasses.replace(problem, flags=dataclasses.replace(problem.flags, grad=True))
        runs["kernel, keeping states"] = direct(mix, training, arrays)
        runs["bound"] = lambda: bound(**x)
    try:
        import torch
    except ImportError:
        torch = None  # type: ignore[assignment]
    if torch is not None:
        torch.set_num_threads(1)
        t = {n: torch.from_numpy(a).to(device) for n, a in x.items()}
        leaf = {n: a.clone().requires_grad_() for n, a in t.items()}
        if device == "cuda":
            from mixers.arrays.operators import with_first_state

            problem = mix.validated(**t).problem()
            plan = mix.plan(problem)
            full = with_first_state(problem, t | {"offsets": None})
            kernel = plan.kernel
            assert kernel is not None
            out = {n: torch.empty(s, dtype=getattr(torch, d), device=device) for n, (s, d) in problem.outputs().items()}
            runs["kernel"] = runs["kernel, keeping states"] = lambda: kernel.forward(problem, plan.config, full, out)
        runs["torch"] = lambda: mix(**t)
        runs["torch, gradients"] = lambda: mix(**leaf)
        runs |= bare(torch, t["q"], leaf["q"])
    found = fastest(runs)
    costs = {}
    if "bound" in found:
        costs["a bound NumPy call"] = found["bound"] - found["kernel"]
    if "torch" in found:
        costs["an eager torch call"] = found["torch"] - found["kernel"]
        costs["an eager torch call with gradients"] = found["torch, gradients"] - found["kernel, keeping states"]
        costs["a bare custom_op"] = found["op"] - found["clone"]
        costs["a bare custom_op with gradients"] = found["op, gradients"] - found["clone"]
    return costs


def direct(mix: mixers.Mixer, problem: Problem, x: dict[str, Any]) -> Callable[[], Any]:
    """The kernel on arrays that are there."""
    plan, out = mix.plan(problem), {n: np.empty(s, d) for n, (s, d) in problem.outputs().items()}
    kernel = plan.kernel
    assert kernel is not None
    return lambda: kernel.forward(problem, plan.config, x, out)


def bare(torch: Any, tensor: Any, leaf: Any) -> dict[str, Callable[[], Any]]:
    """An operator that clones, and the clone."""
    op = torch.library.custom_op("benchmark::bare", lambda x: x.clone(), mutates_args=(), schema="(Tensor x) -> Tensor")
    op.register_autograd(lambda ctx, gradient: gradient)
    call = torch.ops.benchmark.bare
    return {"clone": tensor.clone, "op": lambda: call(tensor), "op, gradients": lambda: call(leaf)}


def exhaustive(shop: Workshop, ahead: Ahead, problem: Problem, entry: Entry, rounds: int) -> dict[str, float]:
    """Seconds of every candidate that can run, in turns, as the tuner's finals are."""
    part, forward = BACKWARD if f" {BACKWARD} " in entry.key else FORWARD, choose(problem, Asked()).candidate
    todo = {
        _label(c.name, config): (c.name, config)
        for c in candidates(problem, Asked())
        if c.support and c.kernel is not None and (part == FORWARD or fits(problem, c, forward))
        for config in c.kernel.configs(problem)
    }
    turns: dict[str, list[float]] = {label: [] for label in todo}
    ahead.start(problem, part, todo.values())
    ahead.settle()
    shop.open(to_json(problem), part, (forward.name, dict(forward.config or {})) if part == BACKWARD else None)
    for number in range(rounds):
        for label in list(turns):
            ahead.wait(problem, part, *todo[label])
            try:
                found = shop.ask("time", *todo[label], 60.0, seconds=0.05)
            except Lost as lost:
                found = {"failed": str(lost)}
            if "failed" in found:
                print(f"  {label}: {found['failed']}", flush=True)
                del turns[label]
            else:
                turns[label].append(found["seconds"])
        if number == 1:
            near = FAR * min(min(seconds) for seconds in turns.values())
            stay = {entry.default, _label(entry.kernel, entry.config)}
            turns = {label: seconds for label, seconds in turns.items() if label in stay or min(seconds) < near}
    middle = min if problem.device == "cpu" else statistics.median
    return {label: middle(seconds) for label, seconds in turns.items()} | {"": float(len(todo))}


def _label(name: str, config: Config) -> str:
    return f"{name} {config_text(config)}".strip()


def compared(entry: Entry, times: dict[str, float]) -> Row:
    """What was tuned beside what an exhaustive search found."""
    count, chosen = int(times.pop("")), _label(entry.kernel, entry.config)
    best = min(times, key=lambda label: times[label])
    row: Row = {
        "problem": f"{entry.key} {entry.shape}",
        "candidates": count,
        "tried": entry.candidates,
        "chosen": chosen,
        "ms": times[chosen] * 1e3,
        "best": best,
        "over_best": times[chosen] / times[best],
        "default": entry.default,
        "default_over_chosen": times.get(entry.default, float("nan")) / times[chosen],
    }
    print(f"  {row['problem']}: {chosen}, {row['over_best']:.3f} of the best of {count} ({best}), "
          f"default/chosen {row['default_over_chosen']:.3f}", flush=True)  # fmt: skip
    return row


def search(device: str, rounds: int, first: int, seconds: float, tell: Callable[[list[Row]], None]) -> None:
    """Each problem tuned, and searched exhaustively; ``tell`` is given all that was found so far."""
    rows, start = list[Row](), time.monotonic()
    library, dtype = ("numpy", "float32") if device == "cpu" else ("torch", "bfloat16")
    with Workshop() as shop, Ahead(device_of_kind(device)) as ahead:
        for name, given, *shape in (CPU if device == "cpu" else GPU)[first:]:
            if time.monotonic() - start > seconds:
                break
            spec = mixers.get_spec(name)
            b, t, h, k, v = shape
            problem = problem_of(spec, (b, t, h, k, v), dtype, library, device, True, (), spec.resolve(given))
            begun = time.monotonic()
            entries = tune_problem(problem)
            took = time.monotonic() - begun
            print(f"{problem}: tuned in {took:.1f} s", flush=True)
            for entry in entries:
                times = exhaustive(shop, ahead, problem, entry, rounds)
                rows.append(compared(entry, times) | {"tuned_in": took})
                tell(rows)


def about(device: str) -> dict[str, Any]:
    """The machine, how busy it was when this began, and the versions of what decides about speed."""
    versions = {n: v for b in installed().values() if b.status() for n, v in stamp_of(b).versions}
    return {
        "device": device_of_kind(device).id,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "versions": {"python": platform.python_version(), "numpy": np.__version__} | versions,
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", default="", choices=("", "dispatch", "search"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--first", type=int, default=0, help="begin with this problem")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no problem later than this")
    parser.add_argument("--cache", default="", help="where compiled code is kept; in an empty folder unless given")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found: dict[str, Any] = {"machine": about(given.device)}

    def write() -> None:
        if given.json:
            given.json.parent.mkdir(parents=True, exist_ok=True)
            given.json.write_text(json.dumps(found, indent=1) + "\n")

    def tell(rows: list[Row]) -> None:
        found["search"] = rows
        write()

    with tempfile.TemporaryDirectory() as folder:
        os.environ["MIXERS_PROFILE"] = str(Path(folder) / "profile.toml")
        if given.only != "search":
            found["dispatch_us"] = dispatch(given.device)
            for what, cost in found["dispatch_us"].items():
                print(f"{what} adds {cost:.1f} µs", flush=True)
            write()
        if given.only != "dispatch":
            cache = Path(given.cache or folder).absolute()
            os.environ["XDG_CACHE_HOME"], os.environ["TRITON_CACHE_DIR"] = str(cache), str(cache / "triton")
            search(given.device, given.rounds, given.first, given.seconds, tell)
            rows = found.get("search", [])
            near = sum(row["over_best"] <= 1.05 for row in rows)
            slower = sum(row["default_over_chosen"] < 0.98 for row in rows)
            longest = max((row["tuned_in"] for row in rows), default=0)
            print(f"{near} of {len(rows)} passes within 5 % of the best, {slower} slower than the default by over 2 %; "
                  f"forward and backward of a problem tuned in {longest:.0f} s at most")  # fmt: skip


if __name__ == "__main__":
    main()
