"""Measurements that are committed in ``benchmarks/results``, read as they are."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@dataclass(frozen=True)
class Results:
    """One folder of results.

    Attributes:
        cpu: ``python -m benchmarks.cpu``.
        gpu: ``python -m benchmarks.gpu``.
        cuda: ``python -m benchmarks.cuda``.
        hybrid: ``python -m benchmarks.hybrid``.
        recall: ``python -m benchmarks.recall``.
    """

    cpu: dict[str, Any]
    gpu: dict[str, Any]
    cuda: dict[str, Any]
    hybrid: dict[str, Any]
    recall: dict[str, Any]


def load(folder: Path = RESULTS) -> Results:
    """Read them."""
    return Results(**{f.name: json.loads((folder / f"{f.name}.json").read_text()) for f in fields(Results)})


def provenance(result: dict[str, Any]) -> str:
    """Where, when and with what something was measured."""
    machine = result["machine"]
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"{device}, {machine['date'][:10]}, {versions}: `{machine['command']}`."


def older(duel: dict[str, Any]) -> list[str]:
    """The day of a time that is older than its file, as words; its kernel has changed since."""
    return [f"earlier kernel, {duel['date']}"] if "date" in duel else []


@dataclass(frozen=True)
class Row:
    """One time of one mixer.

    Attributes:
        where: the device.
        shape: ``(B,T,H,K,V)``, options and dtype.
        what: the pass.
        kernel: what ran.
        seconds: ours.
        floor: the fraction of the least time that bytes and operations allow; None where it was not taken.
        peer: the other's name; empty for none.
        theirs: its seconds; None where it refused.
    """

    where: str
    shape: str
    what: str
    kernel: str
    seconds: float
    floor: float | None = None
    peer: str = ""
    theirs: float | None = None


PASSES = {"forward": "forward", "forward_backward": "forward + backward"}


def rows(results: Results, mixer: str) -> list[Row]:
    """Every time of a mixer, GPU first."""
    return [*_gpu(results, mixer), *_cuda(results, mixer), *_hybrid(results, mixer), *_cpu(results, mixer)]


def _gpu(results: Results, mixer: str) -> list[Row]:
    device, found = results.gpu["machine"]["gpu"], []
    for duel in results.gpu["duels"]:
        if duel["mixer"] == mixer:
            b, t, h, d = duel["shape"]
            heads = h if duel["key_heads"] == h else f"{duel['key_heads']}/{h}"
            options = "".join(f" {n}={v}" for n, v in duel["options"].items())
            shape = ", ".join([f"({b},{t},{heads},{d},{d}){options} {duel['dtype']}", *older(duel)])
            theirs = duel["fla_ms"] and duel["fla_ms"] / 1e3
            peer = "" if mixer == "lattice" else "fla"
            kernel, seconds = duel["kernel"], duel["ours_ms"] / 1e3
            found.append(
                Row(device, shape, PASSES[duel["pass"]], kernel, seconds, duel["floor_fraction"], peer, theirs)
            )
    return found


def _cuda(results: Results, mixer: str) -> list[Row]:
    found = []
    for row in results.cuda["rows"]:
        name, *rest = row["name"].split()
        if name == mixer and "ours_ms" in row:
            shape, dtype, what = rest
            theirs = row["fla_ms"] / 1e3 if "fla_ms" in row else None
            peer = "fla, token by token" if theirs else ""
            kernel, device = "cuda/recurrent", results.cuda["machine"]["gpu"]
            found.append(
                Row(device, f"{shape} {dtype}", PASSES[what], kernel, row["ours_ms"] / 1e3, None, peer, theirs)
            )
    return found


def _hybrid(results: Results, mixer: str) -> list[Row]:
    """As CUDA graphs where there are any, else as called."""
    device, found = results.hybrid["machine"]["device"], []
    for row in results.hybrid["rows"]:
        name, *how = row["name"].split()
        if name == mixer:
            way = "graph_ms" if "graph_ms" in row else "eager_ms"
            details = [*how[:-1], *([f"keeps {row['kept']:.0%}"] if "kept" in row else [])]
            shape = " ".join([f"({','.join(map(str, row['shape']))})", *details, way.removesuffix("_ms")])
            times = {who: ms / 1e3 for who, ms in row[way].items()}
            peer, what = row.get("peer", ""), how[-1].replace("+", " + ")
            found.append(Row(device, shape, what, "composed", times["ours"], None, peer, times.get("peer")))
    return found


def _cpu(results: Results, mixer: str) -> list[Row]:
    device, found = results.cpu["machine"]["cpu"], []
    titles = {"lattice": "Lattice", "delta_rule": "delta rule"}
    for row in results.cpu["speed"]:
        if mixer in titles and row["title"].startswith(titles[mixer]):
            what, peer = PASSES[row["pass"]], row["peer"]
            seconds, theirs = row["ours_seconds"], row["peer_seconds"]
            shape = f"{row['case']} float32"
            found.append(Row(device, shape, what, row["ours"], seconds, row["floor_fraction"], peer, theirs))
    for row in results.cpu["growth"]:
        if row["mixer"] == mixer:
            for length in ("1024", "16384"):
                shape = f"(1,{length},8,64,64) float32"
                found.append(Row(device, shape, "forward + backward", "numba", row["seconds"][length]))
    for row in results.cpu["step"]:
        if row["mixer"] == mixer:
            found.append(Row(device, "(1,·,8,64,64) float32", "one token, `step`", "numba", row["seconds"]))
    return found
