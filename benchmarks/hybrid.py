"""HAM, memory caching, TTT-MLP and packed attention beside what one would write instead.

``python -m benchmarks.hybrid``.

Ours and the peer run in one process, in turns; a ratio is one of medians. ``graph`` holds times of CUDA graphs, where
both can be captured, ``eager`` those of plain calls, which hold the way through Python and the wait for the number of
kept tokens. HAM's threshold is set so that the wanted share of tokens is kept, by the router's own scores. On a machine
without a GPU the same rows run on its CPU, at the sizes that ``--tokens`` gives. Writes
``benchmarks/results/hybrid.json``, from which the docs draw time and bytes against the kept share.
"""

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mixers.autotune.device import device_of_kind
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import mixers
from benchmarks.inputs import first_state
from mixers.arrays.torch import library
from mixers.packed import packed_attention
from mixers.spec import Sizes

RESULT = Path(__file__).resolve().parent / "results" / "hybrid.json"
GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
SHARES = (0.0, 0.125, 0.25, 0.5, 1.0)

Run = Callable[[], Any]
Named = dict[str, Tensor]


def draw(batch: int, tokens: int, heads: int, width: int) -> Named:
    """Random inputs of the gated delta rule, and ``dy``."""
    make = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make, device=DEVICE)

    shape = (batch, tokens, heads, width)
    unit = torch.nn.functional.normalize(normal(*shape), dim=-1)
    return {
        "q": normal(*shape).to(DTYPE),
        "k": unit.to(DTYPE),
        "v": (normal(*shape) / width**0.5).to(DTYPE),
        "beta": torch.sigmoid(normal(*shape[:3])),
        "log_decay": -torch.nn.functional.softplus(normal(*shape[:3])) / 4,
        "dy": normal(*shape).to(DTYPE),
    }


def forward(call: Callable[..., Tensor], x: Named) -> Run:
    """Without gradients."""
    x = {name: a for name, a in x.items() if name != "dy"}

    def run() -> Tensor:
        with torch.no_grad():
            return call(**x)

    return run


def train(call: Callable[..., Tensor], x: Named) -> Run:
    """With gradients of everything."""
    leaves = {name: a.detach().requires_grad_() for name, a in x.items() if name != "dy"}
    return lambda: torch.autograd.grad(call(**leaves), list(leaves.values()), x["dy"], allow_unused=True)


PASSES = {"forward": forward, "forward+backward": train}


def sdpa(q: Tensor, k: Tensor, v: Tensor, **gates: Tensor) -> Tensor:
    """torch's fused causal attention."""
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def attention_and_delta(**x: Tensor) -> Tensor:
    """What HAM is measured against on a GPU: attention to everything beside the same recurrence."""
    return sdpa(**x) + mixers.get("gated_delta_rule")(**x).y


# On a CPU attention alone: there HAM has to be the faster one.
PEER, PEER_NAME = (attention_and_delta, "fused attention + delta rule") if GPU else (sdpa, "fused attention")


def threshold_for(x: Named, share: float) -> Tensor:
    """The threshold that keeps this share of the tokens."""
    given = {name: a for name, a in x.items() if name != "dy"}
    with torch.no_grad():
        score = mixers.get("ham", threshold=9.0)(**given).score.flatten().float()
    if share <= 0:
        return score.max() + 1
    return score.sort(descending=True).values[max(0, min(len(score), round(share * len(score))) - 1)]


def milliseconds(run: Run) -> float:
    """Of one call."""
    if not GPU:
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def alternate(runs: dict[str, Run], turns: int) -> dict[str, float]:
    """Medians of milliseconds, in turns."""
    for run in runs.values():
        run()
        run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            found[name].append(milliseconds(run))
    return {name: statistics.median(times) for name, times in found.items()}


def graphed(run: Run) -> Run:
    """The run as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def duel(name: str, shape: Any, runs: dict[str, Run], turns: int, **more: Any) -> dict[str, Any]:
    """One row: ours and the peer, eager and as graphs."""
    row: dict[str, Any] = {"name": name, "shape": list(shape), **more, "eager_ms": alternate(runs, turns)}
    if GPU:
        try:
            row["graph_ms"] = alternate({n: graphed(run) for n, run in runs.items()}, turns)
        except Exception as error:
            torch.cuda.synchronize()
            row["no_graph"] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    for kind in ("eager", "graph"):
        times = row.get(f"{kind}_ms")
        if times and len(times) == 2:
            row[f"{kind}_ratio"] = times["ours"] / times["peer"]
    return row


def ham_rows(shape: tuple[int, ...], share: float, passes: list[str], turns: int) -> Any:
    """HAM with some share kept, beside attention to everything and the recurrence."""
    x = draw(*shape)
    mix, threshold = mixers.get("ham"), threshold_for(x, share)
    with torch.no_grad():
        result = mix(**{n: a for n, a in x.items() if n != "dy"}, threshold=threshold)
    kept, held = float(result.kept.float().mean()), result.state.nbytes

    def ours(**given: Tensor) -> Tensor:
        return mix(**given, threshold=threshold).y

    for kind in passes:
        runs = {"ours": PASSES[kind](ours, x), "peer": PASSES[kind](PEER, x)}
        yield duel(f"ham {kind}", shape, runs, turns, kept=kept, state_bytes=held, peer=PEER_NAME)


def packed_rows(shape: tuple[int, ...], share: float, turns: int) -> Any:
    """Packed attention alone, with every ``1/share``-th token kept, beside torch's fused attention."""
    x = {name: a for name, a in draw(*shape).items() if name in ("q", "k", "v", "dy")}
    step = round(1 / share)
    kept = torch.arange(shape[1], device=DEVICE) % step == 0
    high = kept.int().cumsum(0).int()[None, :, None].expand(shape[0], -1, -1)
    low = torch.zeros_like(high)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(library, "auto", q, k[:, ::step], v[:, ::step], low, high, q.shape[-1] ** -0.5)[0]

    for kind, of in PASSES.items():
        runs = {"ours": of(ours, x), "peer": of(sdpa, x)}
        yield duel(f"packed attention {kind}", shape, runs, turns, kept=share, peer="fused attention over all")


def caching_rows(shape: tuple[int, ...], turns: int) -> Any:
    """Memory caching beside its base."""
    x = draw(*shape)
    query = torch.randn_like(x["q"])
    base = mixers.get("gated_delta_rule")
    for options in ({"aggregate": "gated"}, {"aggregate": "sparse", "top_k": 4}):
        mix = mixers.get("memory_caching", segment=256, **options)
        for kind, of in PASSES.items():
            runs = {
                "ours": of(lambda mix=mix, **x: mix(**x, memory_query=query).y, x),
                "peer": of(lambda **x: base(**x).y, x),
            }
            yield duel(f"memory_caching {options['aggregate']} {kind}", shape, runs, turns, peer="its base alone")


def mlp_rows(shape: tuple[int, ...], turns: int) -> Any:
    """TTT-MLP beside its dual form in jitted JAX, on the same device, in JAX's default precision of products."""
    x = draw(*shape)
    del x["log_decay"]
    x["beta"] = x["beta"] / shape[3]
    mix = mixers.get("ttt_mlp", chunk_size=16)
    row = duel("ttt_mlp forward+backward", shape, {"ours": train(lambda **x: mix(**x).y, x)}, turns)
    row["eager_ms"] |= alternate({"peer": in_jax(x)}, turns)
    yield row | {"eager_ratio": row["eager_ms"]["ours"] / row["eager_ms"]["peer"], "peer": "jitted JAX, dual form"}


def in_jax(x: Named) -> Run:
    """Forward and backward of TTT-MLP in jitted JAX; the call waits for its result."""
    import jax

    from benchmarks.peers.jax_scan import ttt_mlp_chunked

    arrays = {name: jax.numpy.asarray(a.float().cpu().numpy()).astype(str(a.dtype)[6:]) for name, a in x.items()}
    dy, width, heads = arrays.pop("dy"), x["q"].shape[3], x["q"].shape[2]
    spec = mixers.get_spec("ttt_mlp")
    sizes = Sizes(B=x["q"].shape[0], T=x["q"].shape[1], G=heads, H=heads, K=width, V=width, N=x["q"].shape[0])
    state = tuple(jax.numpy.asarray(a) for a in first_state(spec, sizes, {"chunk_size": 16})[:4])

    @jax.jit
    def train(x: Any, dy: Any) -> Any:
        y, pull = jax.vjp(lambda x: ttt_mlp_chunked(x, state, {"chunk_size": 16})[0], x)
        return pull(dy.astype(y.dtype))

    return lambda: jax.block_until_ready(train(arrays, dy))


def machine() -> dict[str, Any]:
    """What ran, on what, when."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": "python -m benchmarks.hybrid " + " ".join(sys.argv[1:]),
        "device": torch.cuda.get_device_name() if GPU else device_of_kind("cpu").id,
        "torch": torch.__version__,
        "dtype": str(DTYPE).removeprefix("torch."),
    }


def show(row: dict[str, Any]) -> str:
    """A short line."""
    times = [
        f"{kind} " + "/".join(f"{ms:.3f}" for ms in row[f"{kind}_ms"].values())
        + (f" = {row[f'{kind}_ratio']:.2f}x" if f"{kind}_ratio" in row else "")
        for kind in ("eager", "graph") if f"{kind}_ms" in row
    ]  # fmt: skip
    kept = f" kept {row['kept']:.3f}" if "kept" in row else ""
    return f"{row['name']} {tuple(row['shape'])}{kept}: {', '.join(times)} {row.get('no_graph', '')}"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hybrid", description=__doc__)
    parser.add_argument("--tokens", type=int, default=16384 if GPU else 4096, help="of the main rows")
    parser.add_argument("--long", type=int, default=65536 if GPU else 0, help="of the long one; 0 for none")
    parser.add_argument("--heads", type=int, default=16 if GPU else 4)
    parser.add_argument("--width", type=int, default=128 if GPU else 64)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--only", nargs="+", default=["packed", "ham", "caching", "mlp", "long", "trade"])
    parser.add_argument("--out", type=Path, default=RESULT)
    chosen = parser.parse_args()
    shape = (1, chosen.tokens, chosen.heads, chosen.width)
    small = (8, 2048, 16, 64) if GPU else (1, 256, 4, 32)
    turns, both = chosen.turns, list(PASSES)

    def trade() -> Any:
        for share in SHARES:
            for row in ham_rows(shape, share, ["forward"], turns):
                yield {**row, "trade": True}

    groups: dict[str, Callable[[], Any]] = {
        "packed": lambda: (row for share in (0.25, 1.0) for row in packed_rows(shape, share, turns)),
        "ham": lambda: ham_rows(shape, 0.25, both, turns),
        "caching": lambda: caching_rows(shape, turns),
        "mlp": lambda: mlp_rows(small, turns),
        "long": lambda: ham_rows((1, chosen.long, *shape[2:]), 0.25, ["forward"], turns) if chosen.long else (),
        "trade": trade,
    }
    found: dict[str, Any] = {"machine": machine(), "rows": []}
    for name in chosen.only:
        for row in groups[name]():
            found["rows"].append(row)
            print(show(row), flush=True)
            chosen.out.parent.mkdir(parents=True, exist_ok=True)
            chosen.out.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
