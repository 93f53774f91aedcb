"""The numbers that the page of the CUDA backend quotes, measured on this machine's GPU: ``python -m benchmarks.cuda``.

Recurrences beside flash-linear-attention's fused one, in one process, in turns, as CUDA graphs; single tokens beside a
copy of as many bytes; and the first call of a new process whose kernels were compiled before. Writes
``benchmarks/results/cuda.json``.
"""

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import mixers
from benchmarks import floor
from benchmarks.case import FORWARD, TRAIN, Case
from benchmarks.gpu import Run, alternate, bound, draw, graph, machine

RESULT = Path(__file__).resolve().parent / "results" / "cuda.json"
SHAPES = ((8, 2048, 16, 64), (4, 4096, 16, 128))
MIXERS = ("lattice", "delta_rule", "gated_delta_rule", "kda", "linear_attention", "ssd", "gla")
DTYPES = {"lattice": ("float32", "bfloat16")}
POOLS = ((1, 16, 64), (1, 16, 128), (1024, 16, 64), (256, 16, 128))

FIRST_CALL = """
import time, torch, mixers
x = {n: torch.ones(1, 4, 2, 64, device="cuda", dtype=torch.bfloat16) for n in "qkv"}
torch.cuda.synchronize()
begun = time.perf_counter()
mixers.get("delta_rule", backend="cuda")(**x, beta=torch.ones(1, 4, 2, device="cuda"))
torch.cuda.synchronize()
print(time.perf_counter() - begun)
"""


def recurrences(mixer: str, shape: tuple[int, ...], kind: str, dtype: str = "bfloat16") -> dict[str, Any]:
    """Milliseconds of ours and, for the delta rule, of fla's ``fused_recurrent_delta_rule``."""
    batch, tokens, heads, width = shape
    case = Case(mixer, batch, tokens, heads, width, width, kind, (), dtype, "cuda")
    x = draw(case)
    mix = mixers.get(mixer, backend="cuda")
    runs: dict[str, Run] = {"ours": bound(lambda **given: mix(**given, return_state=False).y, kind, x)}
    if mixer == "delta_rule":
        from fla.ops.delta_rule import fused_recurrent_delta_rule

        theirs = x | {"beta": x["beta"].to(x["q"].dtype)}
        runs["fla"] = bound(lambda **given: fused_recurrent_delta_rule(**given)[0], kind, theirs)
    found = alternate({name: graph(run) for name, run in runs.items()})
    times = {f"{name}_ms": ms for name, ms in found.items()}
    return {"mixer": mixer, "shape": list(shape), "pass": kind, "dtype": dtype, **times}


def tokens(batch: int, heads: int, width: int, rates: floor.Rates) -> dict[str, Any]:
    """Microseconds of one token by ``step`` and by ``decode``, and their part of the copy rate."""
    case = Case("delta_rule", batch, 1, heads, width, width, FORWARD, (), "bfloat16", "cuda")
    x = {name: a for name, a in draw(case).items() if name != "dy"}
    token = {name: a[:, 0].contiguous() for name, a in x.items()}
    mix = mixers.get("delta_rule", backend="cuda")
    pool = torch.randn(batch, heads, width, width, device="cuda")
    slots = torch.arange(batch, dtype=torch.int32, device="cuda")
    with torch.no_grad():
        runs = {
            "step": graph(lambda: mix.step(**token, state=pool).y),
            "decode": graph(lambda: mix.decode(**x, pool=pool, slots=slots)),
        }
        found = alternate(runs)
    moved = 2 * pool.numel() * pool.element_size()
    return {
        "pool": [batch, heads, width],
        **{f"{name}_us": ms * 1e3 for name, ms in found.items()},
        **{f"{name}_of_copy": moved / (ms / 1e3) / rates.copy for name, ms in found.items()},
    }


def first_call() -> float:
    """Seconds of a first call in a new process; the one before it left its kernels on disk."""
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", FIRST_CALL], capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=__doc__)
    parser.add_argument("--mixers", nargs="+", default=MIXERS)
    parser.add_argument("--shapes", nargs="+", type=int, default=range(len(SHAPES)), help="numbers in SHAPES")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the JSON goes")
    chosen = parser.parse_args()
    rates = floor.measure("cuda", "bfloat16")
    found: dict[str, Any] = {"machine": machine(), "rates": vars(rates), "recurrences": [], "tokens": []}
    print("\n".join(f"{name}: {value}" for name, value in found["machine"].items()))
    for mixer in chosen.mixers:
        for shape in (SHAPES[i] for i in chosen.shapes):
            for kind, dtype in itertools.product((FORWARD, TRAIN), DTYPES.get(mixer, ("bfloat16",))):
                found["recurrences"].append(recurrences(mixer, shape, kind, dtype))
                print(found["recurrences"][-1], flush=True)
    for pool in POOLS:
        found["tokens"].append(tokens(*pool, rates))
        print(found["tokens"][-1], flush=True)
    found["first_call_s"] = first_call()
    print(f"first call of a new process: {found['first_call_s']:.3f} s")
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
