"""The numbers that the page of the CUDA backend quotes, measured on this machine's GPU: ``python -m benchmarks.cuda``.

Sequences as CUDA graphs, the delta rule in turns with flash-linear-attention's fused recurrence in one process; single
tokens beside a copy of as many bytes; a long sequence beside the same kernel in float64; and the first call of a new
process whose kernels were compiled before. Kernels are compiled first, in ``--jobs`` processes at once. Writes
``benchmarks/results/cuda.json`` after every row; a row that fails says why and stops nobody.
"""

import argparse
import importlib.metadata
import itertools
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mixers
from benchmarks import floor
from benchmarks.case import FORWARD, TRAIN, Case
from benchmarks.gpu import Run, alternate, bound, draw, graph, machine, write

RESULT = Path(__file__).resolve().parent / "results" / "cuda.json"
SMALL, WIDE, MANY = (8, 2048, 16, 64), (4, 4096, 16, 128), (32, 2048, 16, 64)
POOLS = ((1, 16, 64), (1, 16, 128), (1024, 16, 64), (256, 16, 128))
LONG = 65536

# Multiply-adds of float32 that a multiprocessor does in a cycle, not those of tensor cores; of Ampere's first, half.
UNITS, OLD_UNITS = 128, 64

FIRST_CALL = """
import time, torch, mixers
x = {n: torch.ones(1, 4, 2, 64, device="cuda", dtype=torch.bfloat16) for n in "qkv"}
torch.cuda.synchronize()
begun = time.perf_counter()
mixers.get("delta_rule", backend="cuda")(**x, beta=torch.ones(1, 4, 2, device="cuda"))
torch.cuda.synchronize()
print(time.perf_counter() - begun)
"""


@dataclass(frozen=True)
class Row:
    """One measurement: ``measure(rates)`` gives its numbers, ``once()`` runs what it compiles."""

    name: str
    measure: Callable[[floor.Rates], dict[str, Any]]
    once: Callable[[], Any] | None = None


def rows() -> list[Row]:
    """Every measurement of the page."""
    sequences = [
        *itertools.product(("lattice",), (SMALL, WIDE), (FORWARD, TRAIN), ("float32", "bfloat16")),
        *itertools.product(("lattice",), (MANY,), (FORWARD, TRAIN), ("float32",)),
        *itertools.product(("delta_rule", "ttt_linear"), (SMALL,), (FORWARD, TRAIN), ("bfloat16",)),
    ]
    found = []
    for mixer, (batch, length, heads, width), kind, dtype in sequences:
        case = Case(mixer, batch, length, heads, width, width, kind, (), dtype, "cuda")
        found.append(
            Row(
                f"{mixer} {case.label} {dtype} {kind}",
                lambda rates, case=case: sequence(case),
                lambda case=case: [run() for run in runs_of(case).values()],
            )
        )
    for pool in POOLS:
        found.append(Row(f"token {pool}", lambda rates, pool=pool: token(*pool, rates), lambda p=pool: token_runs(*p)))
    found.append(Row(f"lattice T={LONG}", lambda rates: long(LONG), lambda: long(8)))
    found.append(Row("first call", lambda rates: first_call(), first_call))
    return found


def runs_of(case: Case) -> dict[str, Run]:
    """Ours and, for the delta rule, fla's ``fused_recurrent_delta_rule``."""
    x, mix = draw(case), mixers.get(case.mixer, backend="cuda")
    found = {"ours": bound(lambda **given: mix(**given, return_state=False).y, case.kind, x)}
    if case.mixer == "delta_rule":
        try:
            from fla.ops.delta_rule import fused_recurrent_delta_rule
        except ImportError:
            return found
        theirs = x | {"beta": x["beta"].to(x["q"].dtype)}
        found["fla"] = bound(lambda **given: fused_recurrent_delta_rule(**given)[0], case.kind, theirs)
    return found


def sequence(case: Case) -> dict[str, Any]:
    """Milliseconds, and the part of the multiprocessors' float32 rate that the specification's operations make."""
    runs = runs_of(case)  # whose arrays the graphs read
    times = alternate({name: graph(run) for name, run in runs.items()})
    ours = times["ours"] / 1e3
    row = {f"{name}_ms": ms for name, ms in times.items()} | {"ns_a_token": ours / case.length * 1e9}
    rate = float32_rate()
    if rate:
        row["of_float32_rate"] = case.flops / ours / rate
    if "fla" in times:
        row["ratio"] = times["fla"] / times["ours"]
    return row


def float32_rate() -> float:
    """Operations a second outside of tensor cores at the highest clock; 0 where that is not known."""
    device = torch.cuda.get_device_properties(0)
    units = OLD_UNITS if (device.major, device.minor) == (8, 0) else UNITS
    return 2e3 * units * float(device.multi_processor_count) * getattr(device, "clock_rate", 0)


def token_runs(batch: int, heads: int, width: int) -> tuple[dict[str, Run], int]:
    """One token of the delta rule by ``step`` and by ``decode``, and the bytes of states that it moves."""
    case = Case("delta_rule", batch, 1, heads, width, width, FORWARD, (), "bfloat16", "cuda")
    x: dict[str, Tensor] = {name: a for name, a in draw(case).items() if name != "dy"}
    given = {name: a[:, 0].contiguous() for name, a in x.items()}
    mix = mixers.get("delta_rule", backend="cuda")
    pool = torch.randn(batch, heads, width, width, device="cuda")
    slots = torch.arange(batch, dtype=torch.int32, device="cuda")

    def step() -> Any:
        with torch.no_grad():
            return mix.step(**given, state=pool).y

    def decode() -> Any:
        return mix.decode(**x, pool=pool, slots=slots)

    step()
    decode()
    return {"step": step, "decode": decode}, 2 * pool.numel() * pool.element_size()


def token(batch: int, heads: int, width: int, rates: floor.Rates) -> dict[str, Any]:
    """Microseconds of one token, of a copy of as many bytes, and the part of the copy's rate on large arrays."""
    runs, moved = token_runs(batch, heads, width)
    source = torch.ones(moved // 8, device="cuda")
    target = torch.empty_like(source)
    runs["copy"] = lambda: target.copy_(source)
    times = alternate({name: graph(run) for name, run in runs.items()})
    return {
        **{f"{name}_us": ms * 1e3 for name, ms in times.items()},
        **{f"{name}_of_copy_rate": moved / (ms / 1e3) / rates.copy for name, ms in times.items()},
    }


def long(length: int) -> dict[str, Any]:
    """Errors of float32 against the same kernel in float64 on one long sequence, and how far norms are from 1."""
    x = draw(Case("lattice", 1, length, 16, 64, 64, FORWARD, (), "float32", "cuda"))
    mix, found = mixers.get("lattice", backend="cuda"), []
    for kind in (torch.float32, torch.float64):
        with torch.no_grad():
            found.append(mix(**{name: a.to(kind) for name, a in x.items() if name != "dy"}))
    (y, state), (right, right_state) = found
    return {
        "finite": bool(torch.isfinite(y).all() and torch.isfinite(state).all()),
        "y_error": _error(y, right),
        "state_error": _error(state, right_state),
        "norm_error": float((state.norm(dim=-1) - 1).abs().max()),
    }


def _error(found: Tensor, right: Tensor) -> float:
    """The largest difference, by the largest number."""
    return float((found - right).abs().max() / right.abs().max())


def first_call() -> dict[str, float]:
    """Seconds of a first call in a new process, the best of three; one before has left its kernels on disk."""
    command = [sys.executable, "-c", FIRST_CALL]
    done = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(3)]
    return {"call_s": min(float(run.stdout.splitlines()[-1]) for run in done)}


def compile_first(wanted: list[Row], jobs: int) -> None:
    """Run every row once, each in a process of its own: compiling takes longest."""

    def one(row: Row) -> None:
        command = [sys.executable, "-m", "benchmarks.cuda", "--once", row.name]
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, (row for row in wanted if row.once)))


def told(number: Any) -> Any:
    """As JSON has it, which knows neither NaN nor infinity."""
    return str(number) if isinstance(number, float) and not math.isfinite(number) else number


def about() -> dict[str, Any]:
    """What ran, on what, when."""
    found = machine() | {"command": " ".join(["python -m benchmarks.cuda", *sys.argv[1:]])}
    for name in ("numba", "numba-cuda", "numpy"):
        try:
            found["versions"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found["versions"][name] = "not installed"
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=__doc__)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--jobs", type=int, default=min(16, os.cpu_count() or 1), help="processes that compile first")
    parser.add_argument("--once", default="", help="run the row of this name once, and measure nothing")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the JSON goes")
    chosen = parser.parse_args()
    wanted = [row for row in rows() if chosen.only in row.name]
    if chosen.once:
        for row in wanted:
            if row.name == chosen.once and row.once:
                row.once()
        torch.cuda.synchronize()
        return
    begun = time.perf_counter()
    if chosen.jobs:
        compile_first(wanted, chosen.jobs)
    found: dict[str, Any] = {"machine": about(), "compiled_in_s": time.perf_counter() - begun}
    rates = floor.measure("cuda", "bfloat16")
    found |= {"rates": vars(rates) | {"float32": float32_rate()}, "rows": []}
    print("\n".join(f"{name}: {value}" for name, value in found.items()), flush=True)
    for row in wanted:
        try:
            numbers = row.measure(rates)
        except Exception as error:
            numbers = {"error": f"{type(error).__name__}: {error}"[:300]}
        found["rows"].append({"name": row.name, **{n: told(number) for n, number in numbers.items()}})
        shown = (f"{name} {n:.4g}" if isinstance(n, float) else f"{name} {n}" for name, n in numbers.items())
        print(row.name, "|", ", ".join(shown), flush=True)
        write(found, chosen.out)  # a run that is cut short leaves what it has
        torch.cuda.empty_cache()
    found["seconds"] = time.perf_counter() - begun
    write(found, chosen.out)
    print(f"written: {chosen.out}, after {found['seconds']:.0f} s")


if __name__ == "__main__":
    main()
