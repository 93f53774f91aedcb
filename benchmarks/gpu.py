"""The numbers that the page of GPU figures quotes, measured on this machine's GPU: ``python -m benchmarks.gpu``.

Every comparison runs ours and flash-linear-attention's kernel in one process, in turns, as CUDA graphs, so that only
the device's time counts; a ratio is one of medians. Eager times, which hold the way through Python, stand beside, and
the times of single kernels as torch's profiler sees them. Compiling takes longest: ``--jobs 16`` does that first, in so
many processes. Writes ``benchmarks/results/gpu.json``.
"""

import argparse
import contextlib
import datetime
import functools
import importlib.metadata
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from triton.runtime import driver
from triton.testing import do_bench

import mixers
from benchmarks import floor
from benchmarks.case import FORWARD, STEP, TRAIN, Case
from benchmarks.peers import fla
from benchmarks.report import duration, quantity, table
from mixers.nn import MixerLayer

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "gpu.json"

# Batch, tokens, heads, width.
SHAPES = (
    (8, 2048, 16, 64),
    (4, 4096, 16, 128),
    (1, 16384, 16, 128),
    (1, 8192, 96, 128),
    (2, 16384, 16, 128),
    (4, 2048, 16, 128),
    (4, 4096, 64, 128),
    (8, 2048, 32, 256),
    (8, 1024, 8, 64),
)
PEERED = ("delta_rule", "gated_delta_rule", "kda", "gla", "ssd", "linear_attention")
TTT_SHAPES = SHAPES[:3]
LATTICE = (
    *((shape, (("chunk_size", c),)) for shape in SHAPES[:2] for c in (16, 64)),
    (SHAPES[0], ()),
)
# One sequence of so many tokens, (key heads, value heads) of width 128.
SERVED = tuple((length, *heads) for length in (8192, 32768) for heads in ((16, 16), (16, 32), (8, 16), (4, 8), (2, 8)))
POOLS = ((1, 16, 64), (1, 16, 128), (256, 16, 64), (256, 16, 128))

Run = Callable[[], Any]


def draw(case: Case) -> dict[str, Tensor]:
    """Random inputs on the GPU, of the kinds that the specification names, and ``dy``."""
    generator = torch.Generator("cuda").manual_seed(0)
    half = getattr(torch, case.dtype)
    found = {}
    for arg in case.spec.inputs:
        if arg.optional:
            continue
        x = torch.randn(case.sizes.shape(" ".join(arg.layouts[0])), device="cuda", generator=generator)
        if arg.draw == "unit":
            x = torch.nn.functional.normalize(x, dim=-1)
        elif arg.draw == "gate":
            x = torch.sigmoid(x)
        elif arg.draw == "log_decay":
            x = -torch.nn.functional.softplus(x) / 4
        found[arg.name] = x.to(half) if arg.name in ("q", "k", "v") else x
    if case.mixer == "ttt_linear":
        found["beta"] /= case.key_dim  # an inner learning rate, which comes divided by the width
    found["v"] /= case.value_dim**0.5
    found["dy"] = torch.randn(found["v"].shape, device="cuda", generator=generator).to(half)
    return found


def ours(case: Case, x: dict[str, Tensor]) -> Run:
    """A pass of the kernel that a user gets."""
    mix = mixers.get(case.mixer, **dict(case.options))
    return bound(lambda **given: mix(**given).y, case.kind, x)  # with the last state, as the peer


def theirs(case: Case, x: dict[str, Tensor]) -> Run:
    """The same of flash-linear-attention, which tunes itself at its first call of a shape.

    Its tuner times each configuration for an eighth of a second; a fifth of that tells them apart as well.
    """
    import fla.ops

    driver.active.get_benchmarker = lambda: functools.partial(do_bench, warmup=5, rep=20)

    call = fla_calls()[case.mixer]
    return bound(lambda **given: call(fla.ops, given, case.scale)[0], case.kind, x)


def fla_calls() -> dict[str, Any]:
    """fla's functions, and for its time only its TTT, whose model is a little another."""
    return fla.CALLS | {"ttt_linear": _ttt}


def _ttt(ops: Any, x: dict[str, Tensor], scale: float) -> Any:
    heads, width = x["q"].shape[2:]
    weight, bias = torch.ones(heads, width, device="cuda"), torch.zeros(heads, width, device="cuda")
    from fla.ops.ttt import chunk_ttt_linear

    eta = x["beta"][..., None].to(x["q"].dtype)
    return chunk_ttt_linear(x["q"], x["k"], x["v"], weight, bias, eta, chunk_size=16)


def bound(call: Callable[..., Tensor], kind: str, x: dict[str, Tensor]) -> Run:
    x = dict(x)
    dy = x.pop("dy")
    if kind == FORWARD:

        def forward() -> Tensor:
            with torch.no_grad():
                return call(**x)

        return forward
    leaves = {name: a.detach().requires_grad_() for name, a in x.items()}
    return lambda: torch.autograd.grad(call(**leaves), list(leaves.values()), dy)


def milliseconds(run: Run, repeats: int) -> float:
    """Of one call, by events around several."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def graph(run: Run) -> Run:
    """The run as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        held = run()

    def replay() -> Any:
        captured.replay()
        return held

    return replay


def alternate(runs: dict[str, Run], turns: int = 7) -> dict[str, float]:
    """Medians of milliseconds, measured in turns; a turn lasts some ten milliseconds."""
    for run in runs.values():
        run()
    torch.cuda.synchronize()
    repeats = {name: max(1, min(50, int(10 / max(milliseconds(run, 2), 1e-3)))) for name, run in runs.items()}
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns):
        for name in runs if turn % 2 == 0 else reversed(list(runs)):
            found[name].append(milliseconds(runs[name], repeats[name]))
    return {name: statistics.median(times) for name, times in found.items()}


def peak(run: Run) -> int:
    """Bytes that a call allocates at most, beside what is there already."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def kernels(run: Run, calls: int = 3) -> dict[str, float]:
    """Microseconds that each kernel of a call takes, longest first; those of a launch that comes twice are added."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    found = {event.key: event.self_device_time_total / calls for event in seen.key_averages()}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def duel(case: Case, peer: bool, rates: floor.Rates) -> dict[str, Any]:
    """Ours, and fla's where it has one and does not refuse."""
    x = draw(case)
    runs, refusal = {"ours": ours(case, x)}, ""
    if peer:
        other = theirs(case, x)
        try:
            other()
            runs["fla"] = other
        except Exception as error:
            refusal = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
    memory = {name: peak(run) for name, run in runs.items()} if case.kind == TRAIN else {}
    eager = alternate(runs, turns=3)
    graphs, failed = dict(runs), {}
    for name, run in runs.items():
        try:
            graphs[name] = graph(run)
        except Exception as error:
            failed[name] = f"no graph: {str(error).splitlines()[0][:160]}"
    device = alternate(graphs)
    mix = mixers.get(case.mixer, **dict(case.options))
    seconds = device["ours"] / 1e3
    return {
        "mixer": case.mixer,
        "shape": [case.batch, case.length, case.heads, case.key_dim],
        "key_heads": case.key_heads or case.heads,
        "options": dict(case.options),
        "pass": case.kind,
        "dtype": case.dtype,
        "kernel": mix.explain(**{n: a for n, a in x.items() if n != "dy"}).chosen.name,
        "ours_ms": device["ours"],
        "fla_ms": device.get("fla"),
        "ratio": device["fla"] / device["ours"] if "fla" in device else None,
        "ours_eager_ms": eager["ours"],
        "fla_eager_ms": eager.get("fla"),
        "fla_refuses": refusal,
        "without_graph": failed,
        "ours_peak_bytes": memory.get("ours"),
        "fla_peak_bytes": memory.get("fla"),
        "tokens_per_second": case.tokens / seconds,
        "tflops": case.flops / seconds / 1e12,
        "floor_fraction": rates.floor(case) / seconds,
        "kernels_us": kernels(runs["ours"]),
    }


def served(batch: int, heads: int, width: int, form: str, rates: floor.Rates) -> dict[str, Any]:
    """One token through ``step`` or ``decode`` in a graph, beside the bytes that must move."""
    case = Case("gated_delta_rule", batch, 1, heads, width, width, STEP, dtype="bfloat16", device="cuda")
    x = {name: a for name, a in draw(case).items() if name != "dy"}
    mix = mixers.get(case.mixer)
    state = mix.init_state(batch, heads, width, like=x["q"])
    slots = torch.arange(batch, device="cuda", dtype=torch.int32)
    token = {name: a[:, 0] for name, a in x.items()}

    def step() -> Any:
        with torch.no_grad():
            return mix.step(**token, state=state)

    def decode() -> Any:
        return mix.decode(**x, pool=state, slots=slots)

    run = step if form == "step" else decode
    seconds = alternate({"ours": graph(run)})["ours"] / 1e3
    moved = case.bytes / seconds
    return {
        "form": form,
        "batch": batch,
        "heads": heads,
        "width": width,
        "microseconds": seconds * 1e6,
        "bytes_per_second": moved,
        "copy_fraction": moved / rates.copy,
    }


PRODUCTS = ("gemm", "cutlass", "nvjet", "cublas", "splitK")  # in the names of matrix product kernels


LAYER = {"d_model": 2048, "heads": 32, "key_heads": 16, "key_dim": 128, "value_dim": 128}


def layer_step(batch: int = 64) -> dict[str, Any]:
    """One token through a layer: projections, convolution, gates, norms, the recurrence, in a graph."""
    layer = MixerLayer("gated_delta_rule", **LAYER).to("cuda", torch.bfloat16)
    x = torch.randn(batch, LAYER["d_model"], device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        _, state = layer.step(x)

    @torch.no_grad()
    def run() -> Any:
        return layer.step(x, state)

    seconds = alternate({"ours": graph(run)})["ours"] / 1e3
    each = kernels(run)
    products = sum(us for name, us in each.items() if any(part in name for part in PRODUCTS))
    return {
        "batch": batch,
        **LAYER,
        "microseconds": seconds * 1e6,
        "share_outside_products": 1 - products / sum(each.values()),
        "kernels_us": each,
    }


def machine() -> dict[str, Any]:
    """What ran, on what, when."""
    versions = {}
    for name in ("sequence-mixers", "torch", "triton", "fla-core", "flash-linear-attention"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    device = torch.cuda.get_device_properties(0)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": "python -m benchmarks.gpu "
        + " ".join(itertools.takewhile(lambda word: word != "--out", sys.argv[1:])),
        "gpu": device.name,
        "multiprocessors": device.multi_processor_count,
        "versions": versions,
    }


def show(row: dict[str, Any]) -> list[str]:
    """A line of the table."""
    batch, length, heads, width = row["shape"]
    heads = heads if heads == row["key_heads"] else f"{row['key_heads']}/{heads}"
    shape = f"{batch},{length},{heads},{width}" + "".join(f" C={c}" for c in row["options"].values())
    other = duration(row["fla_ms"] / 1e3) if row["fla_ms"] else "refuses" if row["fla_refuses"] else ""
    ratio = f"{row['ratio']:.2f}×" if row["ratio"] else ""
    memory = "" if row["ours_peak_bytes"] is None else quantity(row["ours_peak_bytes"]) + "B"
    memory += f" / {quantity(row['fla_peak_bytes'])}B" if row["fla_peak_bytes"] else ""
    return [
        row["mixer"],
        shape,
        row["pass"],
        duration(row["ours_ms"] / 1e3),
        other,
        ratio,
        duration(row["ours_eager_ms"] / 1e3),
        f"{row['tflops']:.1f}",
        f"{row['floor_fraction']:.0%}",
        memory,
    ]


def cases(names: list[str], shapes: list[tuple[int, int, int, int]]) -> list[tuple[Case, bool]]:
    """What is timed, and whether beside fla."""
    found = []
    for name in names:
        if name == "lattice":
            wanted = [(shape, options) for shape, options in LATTICE if shape in shapes]
        else:
            wanted = [(shape, ()) for shape in shapes if name != "ttt_linear" or shape in TTT_SHAPES]
        for (b, t, h, d), options in wanted:
            for kind in (FORWARD, TRAIN):
                case = Case(name, b, t, h, d, d, kind, options, "bfloat16", "cuda")
                found.append((case, name in (*PEERED, "ttt_linear")))
    return found


def family(case: Case) -> str:
    """What cases share whose kernels are compiled together: lengths and batches are no part of it."""
    return ",".join(map(str, (case.mixer, case.key_heads or case.heads, case.heads, case.key_dim)))


def compile_first(wanted: list[tuple[Case, bool]], jobs: int) -> None:
    """Every family in a process of its own, so that the caches of compiled kernels are full, and of fla's tuner."""
    gpus = itertools.cycle(map(str, range(torch.cuda.device_count())))

    def one(name: str, gpu: str) -> None:
        command = [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:], "--once", name]
        env = os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False, env=env)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, dict.fromkeys(family(case) for case, _ in wanted), gpus))


def once(case: Case, peer: bool) -> None:
    """Run a case and its peer, for what they compile."""
    x = draw(case)
    ours(case, x)()
    if peer:
        theirs(case, x)()
    torch.cuda.synchronize()


def serving_cases() -> list[Case]:
    """Prefills of one long sequence."""
    return [
        Case("gated_delta_rule", 1, length, heads, 128, 128, FORWARD, (), "bfloat16", "cuda", key_heads=keys)
        for length, keys, heads in SERVED
    ]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--mixers", nargs="+", default=[*PEERED, "ttt_linear", "lattice"])
    parser.add_argument("--shapes", nargs="+", type=int, default=range(len(SHAPES)), help="numbers in SHAPES")
    parser.add_argument("--alone", action="store_true", help="without fla")
    parser.add_argument("--serve", action=argparse.BooleanOptionalAction, default=True, help="step and decode too")
    parser.add_argument("--jobs", type=int, default=0, help="compile in so many processes first")
    parser.add_argument("--once", metavar="FAMILY", help="run every case of it once and measure nothing")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the JSON goes")
    chosen = parser.parse_args()

    wanted = cases(chosen.mixers, [SHAPES[i] for i in chosen.shapes])
    wanted += [(case, True) for case in serving_cases()] if chosen.serve else []
    wanted = [(replace(case, dtype=chosen.dtype), peer and not chosen.alone) for case, peer in wanted]
    if chosen.once:
        for case, peer in wanted:
            if family(case) == chosen.once:
                with contextlib.suppress(Exception):  # what fails will say so when it is measured
                    once(case, peer)
        return
    if chosen.jobs:
        compile_first(wanted, chosen.jobs)
    rates = floor.measure("cuda", chosen.dtype)
    found: dict[str, Any] = {"machine": machine(), "rates": vars(rates), "duels": [], "serving": []}
    print("\n".join(f"{name}: {value}" for name, value in found["machine"].items()))
    print(f"copy {rates.copy / 1e12:.2f} TB/s, {chosen.dtype} products {rates.matmul / 1e12:.0f} TFLOP/s\n")
    headers = ("mixer", "(B,T,H,D)", "pass", "ours", "fla", "ratio", "eager", "TFLOP/s", "of floor", "peak ours / fla")
    for case, peer in wanted:
        try:
            row = duel(case, peer, rates)
        except torch.cuda.OutOfMemoryError as error:
            print(f"{case.mixer} {case.label} {case.kind}: {error}", flush=True)
            continue
        found["duels"].append(row)
        print(" | ".join(show(row)), flush=True)
        write(found, chosen.out)  # a run that is cut short leaves what it has
        torch.cuda.empty_cache()
    print("\n" + table(headers, [show(row) for row in found["duels"]]))
    if chosen.serve:
        for batch, heads, width in POOLS:
            for form in ("step", "decode"):
                row = served(batch, heads, width, form, rates)
                found["serving"].append(row)
                speed = f"{row['microseconds']:.1f} µs, {row['copy_fraction']:.0%} of the copy rate"
                print(f"{form} ({batch},{heads},{width}): {speed}", flush=True)
        found["layer_step"] = row = layer_step()
        print(f"layer.step: {row['microseconds']:.1f} µs, {row['share_outside_products']:.0%} outside the products")
    write(found, chosen.out)
    print(f"written: {chosen.out}")


def write(found: dict[str, Any], path: Path) -> None:
    """As JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
