"""The numbers that the README quotes, measured on this machine's CPU: ``python -m benchmarks.cpu``.

Every comparison runs ours and the peer in one process, in turns; a ratio is one of medians. Memory, import and first
call are measured in processes of their own. Writes ``benchmarks/results/cpu.json``.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import mixers
from benchmarks import floor, inputs, ours, peers, timing
from benchmarks.case import STEP, TRAIN, Case
from benchmarks.report import duration, quantity, table

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "cpu.json"

LATTICE = Case("lattice", 1, 1024, 8, 64, 64)
DELTA = Case("delta_rule", 1, 2048, 8, 64, 64)
OURS = ours.Way("numba")  # the kernel that a user gets
CHUNK_16 = (("chunk_size", 16),)


@dataclass(frozen=True)
class Duel:
    """Ours against the fastest of some peers.

    Attributes:
        title: what is compared.
        case: what ours computes.
        peers: the peers whose names hold this; the fastest of them runs.
        target: how many times as long the peer is to take at least; None where we only look.
        peer_case: what the peer computes, where that is another model.
    """

    title: str
    case: Case
    peers: str
    target: float | None = None
    peer_case: Case | None = None


DUELS = (
    Duel("Lattice exact, forward, against jax.lax.scan", LATTICE, "jax scan", 4.0),
    Duel(
        "Lattice exact, forward + backward, against JAX in chunks of 16",
        replace(LATTICE, kind=TRAIN),
        "jax chunk",
        4.0,
        replace(LATTICE, kind=TRAIN, options=CHUNK_16),
    ),
    Duel("Lattice in chunks of 16, forward, against JAX", replace(LATTICE, options=CHUNK_16), "jax chunk"),
    Duel(
        "Lattice in chunks of 16, forward + backward, against JAX",
        replace(LATTICE, kind=TRAIN, options=CHUNK_16),
        "jax chunk",
        4.0,
    ),
    Duel("Lattice exact, forward + backward, against jax.lax.scan", replace(LATTICE, kind=TRAIN), "jax scan"),
    Duel("Lattice exact, forward, against a torch loop", LATTICE, "torch loop"),
    Duel("delta rule, forward, against the best of torch and JAX in chunks", DELTA, "chunk", 2.0),
    Duel("delta rule, forward + backward, likewise", replace(DELTA, kind=TRAIN), "chunk", 2.0),
    Duel("delta rule, forward, against jax.lax.scan", DELTA, "jax scan"),
)


def duel(item: Duel, rounds: int, rates: floor.Rates) -> dict[str, Any]:
    """Race the peers, then the winner and ours in turns."""
    case, other = item.case, item.peer_case or item.case
    arrays = inputs.draw(case.spec, case.sizes)
    entrants = peers.build(other, arrays, item.peers)
    mine = ours.build(case, arrays, OURS)
    if not entrants:
        return {"title": item.title, "skipped": "no peer is installed"}
    peer = timing.fastest(entrants)
    times = timing.alternate({"ours": mine, "peer": entrants[peer]}, rounds)
    own, theirs = times["ours"], times["peer"]
    by_turn = [b / a for a, b in zip(own.turns, theirs.turns, strict=True)]
    return {
        "title": item.title,
        "case": case.label,
        "pass": case.kind,
        "ours": OURS.mixer(case).explain(**{n: a for n, a in arrays.items() if n != "dy"}).chosen.name,
        "peer": peer,
        "ours_seconds": own.median,
        "ours_spread": own.spread,
        "peer_seconds": theirs.median,
        "peer_spread": theirs.spread,
        "ratio": theirs.median / own.median,
        "ratio_worst_turn": min(by_turn),
        "ratio_best_turn": max(by_turn),
        "target": item.target,
        "gflops": case.flops / own.median / 1e9,
        "sgemm_fraction": case.flops / own.median / rates.matmul,
        "floor_fraction": rates.floor(case) / own.median,
    }


def child(*arguments: str) -> dict[str, Any]:
    """Run ``benchmarks.child``."""
    command = [sys.executable, "-m", "benchmarks.child", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def memory(mixer: str, length: int = 16384) -> dict[str, Any]:
    """Extra memory of a forward and backward, relative to inputs and outputs together."""
    found = child("memory", mixer, str(length), "8", "64")
    passed = found["input_bytes"] + found["output_bytes"]
    return {"mixer": mixer, "length": length, **found, "ratio": found["extra_bytes"] / passed, "target": 3.0}


def growth(mixer: str, first: int = 10, last: int = 16) -> dict[str, Any]:
    """Seconds of a forward and backward for each power of two."""
    seconds: dict[int, float] = {}
    for power in range(first, last + 1):
        case = Case(mixer, 1, 2**power, 8, 64, 64, TRAIN)
        run = ours.build(case, inputs.draw(case.spec, case.sizes), OURS)
        seconds[2**power] = statistics.median(timing.turn(run) for _ in range(3))
    per_token = [s / t for t, s in seconds.items()]
    slope = np.polyfit(np.log(list(seconds)), np.log(list(seconds.values())), 1)[0]
    return {
        "mixer": mixer,
        "seconds": {str(t): s for t, s in seconds.items()},
        "exponent": float(slope),
        "per_token_last_over_first": per_token[-1] / per_token[0],
        "per_token_worst_over_best": max(per_token) / min(per_token),
    }


def step(mixer: str) -> dict[str, Any]:
    """Seconds of one token on NumPy arrays, everything included."""
    case = Case(mixer, 1, 1, 8, 64, 64, STEP)
    run = ours.build(case, inputs.draw(case.spec, case.sizes), OURS)
    turns = [timing.turn(run, seconds=0.1, calls=1000) for _ in range(9)]
    return {"mixer": mixer, "seconds": statistics.median(turns), "fastest": min(turns), "target": 100e-6}


def start(mixer: str, processes: int = 5) -> dict[str, Any]:
    """Medians over fresh processes, the first of which may compile."""
    found = [child("start", mixer) for _ in range(processes + 1)]
    keys = ("import_seconds", "import_numba_seconds", "first_call_seconds", "first_gradient_seconds")
    middle = {key: statistics.median(f[key] for f in found[1:]) for key in keys}
    return {
        "mixer": mixer,
        "heavy_modules": found[-1]["heavy_modules"],
        **middle,
        "earlier_first_call_seconds": found[0]["first_call_seconds"],
        "target_import": 0.2,
        "target_first_call": 0.5,
    }


def machine() -> dict[str, Any]:
    """What ran, on what, when."""
    versions = {}
    for name in ("sequence-mixers", "numpy", "numba", "llvmlite", "torch", "jax", "jaxlib"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": "python -m benchmarks.cpu " + " ".join(sys.argv[1:]),
        "cpu": cpu_model(),
        "cores": floor.cores(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "load_average_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def cpu_model() -> str:
    """The processor's name, and its widest vectors."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    wide = next((name for name in ("avx512f", "avx2") if name in fields.get("flags", "").split()), "")
    return f"{fields.get('model name', platform.processor())} {wide}".strip()


def _print_duels(rows: list[dict[str, Any]]) -> None:
    lines = []
    for r in rows:
        if "skipped" in r:
            lines.append([r["title"], "", r["skipped"], *[""] * 7])
            continue
        lines.append(
            [
                r["title"],
                r["case"],
                f"{duration(r['ours_seconds'])} ±{r['ours_spread']:.0%}",
                f"{duration(r['peer_seconds'])} ±{r['peer_spread']:.0%}",
                r["peer"],
                f"{r['ratio']:.2f}×",
                f"{r['ratio_worst_turn']:.2f} to {r['ratio_best_turn']:.2f}",
                _verdict(r["target"], r["ratio"] >= (r["target"] or 0), f"≥ {r['target']}×"),
                f"{r['gflops']:.1f}",
                f"{r['sgemm_fraction']:.1%}",
            ]
        )
    headers = ("", "(B,T,H,K,V)", "ours", "peer", "which", "ratio", "by turn", "target", "GFLOP/s", "of sgemm")
    print(table(headers, lines))


def _verdict(target: Any, met: bool, words: str) -> str:
    return "" if target is None else f"{words} {'met' if met else 'MISSED'}"


def _print_memory(rows: list[dict[str, Any]]) -> None:
    lines = [
        [
            r["mixer"],
            str(r["length"]),
            quantity(r["input_bytes"] + r["output_bytes"]) + "B",
            quantity(r["extra_bytes"]) + "B",
            quantity(r["extra_bytes_traced"]) + "B",
            f"{r['ratio']:.2f}×",
            _verdict(r["target"], r["ratio"] <= r["target"], f"≤ {r['target']}×"),
        ]
        for r in rows
    ]
    print(table(("memory", "T", "inputs + outputs", "extra (process)", "extra (NumPy)", "ratio", "target"), lines))


def _print_growth(rows: list[dict[str, Any]]) -> None:
    lengths = list(rows[0]["seconds"])
    lines = [
        [
            r["mixer"],
            *(duration(s) for s in r["seconds"].values()),
            f"{r['exponent']:.3f}",
            f"{r['per_token_last_over_first']:.2f}",
        ]
        for r in rows
    ]
    print(table(("forward + backward", *lengths, "exponent", "a token, last/first"), lines))


def _print_steps(rows: list[dict[str, Any]]) -> None:
    lines = [
        [
            r["mixer"],
            duration(r["seconds"]),
            duration(r["fastest"]),
            _verdict(True, r["seconds"] < r["target"], f"< {duration(r['target'])}"),
        ]
        for r in rows
    ]
    print(table(("step, NumPy, (1,·,8,64,64)", "median turn", "fastest turn", "target"), lines))


def _light(row: dict[str, Any]) -> bool:
    return row["import_seconds"] < row["target_import"] and not set(row["heavy_modules"]) - {"numpy"}


def _print_start(rows: list[dict[str, Any]]) -> None:
    lines = [
        [
            r["mixer"],
            duration(r["import_seconds"]),
            ", ".join(r["heavy_modules"]) or "none",
            _verdict(True, _light(r), "< 0.2 s"),
            duration(r["import_numba_seconds"]),
            duration(r["first_call_seconds"]),
            duration(r["first_gradient_seconds"]),
            _verdict(True, r["first_call_seconds"] < r["target_first_call"], "< 0.5 s"),
            duration(r["earlier_first_call_seconds"]),
        ]
        for r in rows
    ]
    headers = (
        "fresh process",
        "import mixers",
        "brings in",
        "target",
        "import numba",
        "first call",
        "first gradient",
        "target",
        "first call before",
    )
    print(table(headers, lines))


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    sections = ("speed", "memory", "growth", "step", "start")
    parser.add_argument("--only", nargs="+", choices=sections, default=sections, help="sections to measure")
    parser.add_argument("--mixers", nargs="+", choices=mixers.names(), help="for memory, growth, step and start")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each side of a comparison")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the JSON goes")
    chosen = parser.parse_args()

    found: dict[str, Any] = {"machine": machine()}
    print("\n".join(f"{name}: {value}" for name, value in found["machine"].items()))
    if (found["machine"]["load_average_before"] or 0) > 0.5:
        print("the machine is busy: times are too long, and ratios unsure")
    rates = floor.measure()
    found["rates"] = {"copy_bytes_per_second": rates.copy, "sgemm_flops_per_second": rates.matmul}
    print(f"copy {rates.copy / 1e9:.1f} GB/s, sgemm {rates.matmul / 1e9:.0f} GFLOP/s\n")

    every = chosen.mixers or list(mixers.names())
    linear = [m for m in every if mixers.get_spec(m).reserve is None]
    work: dict[str, tuple[Callable[[Any], dict[str, Any]], Any, Callable[[Any], None]]] = {
        "speed": (lambda item: duel(item, chosen.rounds, rates), DUELS, _print_duels),
        "memory": (memory, linear, _print_memory),
        "growth": (growth, linear, _print_growth),
        "step": (step, linear, _print_steps),
        "start": (start, chosen.mixers or ["lattice", "delta_rule"], _print_start),
    }
    for name in chosen.only:
        measure, items, show = work[name]
        rows = []
        for number, item in enumerate(items, 1):
            print(f"\r{name} {number}/{len(items)}", end="", file=sys.stderr, flush=True)
            rows.append(measure(item))
        print("\r" + " " * 40 + "\r", end="", file=sys.stderr)
        found[name] = rows
        show(rows)
        print()
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    print(f"written: {chosen.out}")


if __name__ == "__main__":
    main()
