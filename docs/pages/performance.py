"""Tables and pictures of all committed measurements."""

import statistics
from pathlib import Path
from typing import Any

from pages import measured
from pages.figure import figure, save
from pages.markdown import code, duration, table


def parts(results: measured.Results, folder: Path) -> dict[str, str]:
    """The pieces that ``performance.md`` includes, by path; pictures are drawn beside them."""
    where = folder / "performance"
    where.mkdir(parents=True, exist_ok=True)
    growth_picture(results.cpu["growth"], where / "growth.svg")
    gpu_picture(results.gpu["duels"], where / "gpu.svg")
    kept_picture(results.recall["runs"], where / "kept.svg")
    trade_picture(results.hybrid["rows"], where / "trade.svg")
    made = {
        "cpu": cpu(results.cpu),
        "growth": growth(results.cpu),
        "gpu": gpu(results.gpu),
        "heads": heads(results.gpu),
        "serving": serving(results.gpu),
        "cuda": cuda(results.cuda),
        "hybrid": hybrid(results.hybrid),
        "kept": kept(results.recall),
    }
    return {f"performance/{name}.part.md": text + "\n" for name, text in made.items()}


def cpu(result: dict[str, Any]) -> str:
    """Ours beside peers, in turns."""
    rows = [
        [
            *(r["title"].split(", against")[0], r["case"], code(r["ours"])),
            *(duration(r["ours_seconds"]), f"{r['ours_spread']:.0%}"),
            *(r["peer"], duration(r["peer_seconds"]), f"{r['ratio']:.1f}×"),
            f"{r['ratio_worst_turn']:.1f} to {r['ratio_best_turn']:.1f}",
        ]
        for r in result["speed"]
    ]
    headers = ["what", "(B,T,H,K,V)", "kernel", "ours", "±", "peer", "its time", "ratio", "in single turns"]
    rates = result["rates"]
    return (
        f"{measured.provenance(result)} Copy {rates['copy_bytes_per_second'] / 1e9:.1f} GB/s, sgemm "
        f"{rates['sgemm_flops_per_second'] / 1e9:.0f} GFLOP/s, float32.\n\n{table(headers, rows)}"
    )


def growth(result: dict[str, Any]) -> str:
    """Time, memory and one token of every mixer."""
    memory = {r["mixer"]: r for r in result["memory"]}
    steps = {r["mixer"]: r for r in result["step"]}
    rows = [
        [
            f"[`{r['mixer']}`](made/mixers/{r['mixer']}.md)",
            *(duration(seconds) for seconds in r["seconds"].values()),
            f"{r['exponent']:.2f}",
            f"{memory[r['mixer']]['ratio']:.2f}",
            duration(steps[r["mixer"]]["seconds"]),
        ]
        for r in result["growth"]
    ]
    lengths = list(result["growth"][0]["seconds"])
    extra = f"extra memory at T = {result['memory'][0]['length']}"
    return table(["mixer", *(f"T = {t}" for t in lengths), "exponent", extra, "one `step`"], rows)


def gpu(result: dict[str, Any]) -> str:
    """Ours beside flash-linear-attention, a line a mixer and shape."""
    rates = result["rates"]
    return (
        f"{measured.provenance(result)} Copy {rates['copy'] / 1e12:.2f} TB/s, bfloat16 product "
        f"{rates['matmul'] / 1e12:.0f} TFLOP/s.\n\n"
        + table(
            [
                "mixer",
                "(B,T,H,D)",
                "forward",
                "fla",
                "",
                "forward + backward",
                "fla",
                "",
                "of the floor",
                "peak, fla's",
            ],
            (_duels(passes) for passes in _by_shape(result).values() if len(passes) == 2),
        )
    )


def heads(result: dict[str, Any]) -> str:
    """One sequence whose keys have fewer heads than its values."""
    rows = (
        [_named(d), str(d["shape"]).strip("[]"), str(d["key_heads"]), *_beside(d)]
        for passes in _by_shape(result).values()
        for d in passes.values()
        if len(passes) == 1 and d["pass"] == "forward"
    )
    return table(["mixer", "(B,T,H,D)", "key heads", "forward", "fla", ""], rows)


def _by_shape(result: dict[str, Any]) -> dict[Any, dict[str, Any]]:
    """Duels by mixer, options and shape, then by pass."""
    found: dict[Any, dict[str, Any]] = {}
    for d in result["duels"]:
        what = (d["mixer"], *d["options"].items(), *d["shape"], d["key_heads"])
        found.setdefault(what, {})[d["pass"]] = d
    return found


def _duels(passes: dict[str, Any]) -> list[str]:
    there, back = passes["forward"], passes["forward_backward"]
    peaks = [f"{back[who] / 1e6:.0f} MB" for who in ("ours_peak_bytes", "fla_peak_bytes") if back[who]]
    floor = f"{there['floor_fraction']:.0%}, {back['floor_fraction']:.0%}"
    shape = ",".join(map(str, there["shape"]))
    return [_named(there), shape, *_beside(there), *_beside(back), floor, ", ".join(peaks)]


def _named(duel: dict[str, Any]) -> str:
    """A mixer with its options, and the date where a time is older than its file and its kernel was another."""
    return ", ".join(
        [code(duel["mixer"]), *(f"{n} {value}" for n, value in duel["options"].items()), *measured.older(duel)]
    )


def _beside(duel: dict[str, Any]) -> list[str]:
    """Our time, the other's, and how many times as long that is."""
    theirs = duration(duel["fla_ms"] / 1e3) if duel["fla_ms"] else "refuses" if duel["fla_refuses"] else ""
    return [duration(duel["ours_ms"] / 1e3), theirs, f"{duel['ratio']:.2f}×" if duel["ratio"] else ""]


def serving(result: dict[str, Any]) -> str:
    """One decoded token, a line a shape."""
    found: dict[Any, dict[str, Any]] = {}
    for r in result["serving"]:
        found.setdefault((r["batch"], r["heads"], r["width"]), {})[r["form"]] = r
    rows = (
        [
            *map(str, shape),
            *(f"{r['microseconds']:.1f} µs ({r['copy_fraction']:.0%})" for r in forms.values()),
        ]
        for shape, forms in found.items()
    )
    names = [f"`{form}` (of the copy rate)" for form in next(iter(found.values()))]
    return table(["sequences", "heads", "width", *names], rows)


def cuda(result: dict[str, Any]) -> str:
    """Exact recurrences on the CUDA backend."""
    rows = [
        [
            *(r["name"], duration(r["ours_ms"] / 1e3), f"{r['ns_a_token']:.0f} ns"),
            duration(r["fla_ms"] / 1e3) if "fla_ms" in r else "",
        ]
        for r in result["rows"]
        if "ours_ms" in r
    ]
    tokens = [
        [r["name"], *(f"{r[f'{what}_us']:.2f} µs" for what in ("step", "decode", "copy"))]
        for r in result["rows"]
        if "step_us" in r
    ]
    return (
        f"{measured.provenance(result)}\n\n"
        + table(["what", "ours", "of one token's chain", "fla, token by token"], rows)
        + "\n\nOne token of (sequences, heads, width), delta rule:\n\n"
        + table(["", "`step`", "`decode`", "a copy of as many bytes"], tokens)
    )


def hybrid(result: dict[str, Any]) -> str:
    """What is made of other mixers, beside what one would write instead."""
    rows = []
    for r in result["rows"]:
        way = "graph" if "graph_ms" in r else "eager"
        times = r[f"{way}_ms"]
        theirs = duration(times["peer"] / 1e3) if "peer" in times else ""
        ratio = f"{times['peer'] / times['ours']:.2f}×" if "peer" in times else ""
        kept = f"{r['kept']:.0%}" if "kept" in r else ""
        shape = ",".join(map(str, r["shape"]))
        rows.append([r["name"], shape, kept, way, duration(times["ours"] / 1e3), r.get("peer", ""), theirs, ratio])
    machine = result["machine"]
    where = measured.provenance(
        {"machine": machine | {"gpu": machine["device"], "versions": {"torch": machine["torch"]}}}
    )
    headers = ["what", "(B,T,H,D)", "kept", "called", "ours", "beside", "its time", "ratio"]
    picture = "![Time and state of HAM against the share of tokens that is kept](made/performance/trade.svg)"
    return f"{where}\n\n{table(headers, rows)}\n\n{picture}"


def kept(result: dict[str, Any]) -> str:
    """Loss and right answers against the share of tokens that HAM keeps, a row a run."""
    rows = [
        [f"{r['target']:.3g}", str(r["seed"]), f"{r['kept']:.3f}", f"{r['loss']:.3f}", f"{r['accuracy']:.0%}"]
        for r in result["runs"]
    ]
    headers = ["share asked for", "seed", "share kept", "loss, nats", "right answers"]
    picture = "![Loss against the share of tokens that is kept](made/performance/kept.svg)"
    return f"{picture}\n\n{measured.provenance(result)}\n\n{table(headers, rows)}"


def growth_picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds against tokens on a CPU."""
    drawing, axes = figure()
    for row in rows:
        axes.plot([int(t) for t in row["seconds"]], list(row["seconds"].values()), marker="o", label=row["mixer"])
    axes.set(yscale="log", xlabel="tokens", ylabel="seconds, forward + backward", title="(1,T,8,64,64), float32, CPU")
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save(drawing, path)


def gpu_picture(duels: list[dict[str, Any]], path: Path) -> None:
    """Forward and backward of every mixer beside fla's, at the first shape."""
    first = duels[0]["shape"]
    chosen = [d for d in duels if d["shape"] == first and d["pass"] == "forward_backward"]
    names = [d["mixer"] + "".join(f" C={v}" for v in d["options"].values()) for d in chosen]
    drawing, axes = figure()
    places = range(len(chosen))
    axes.barh([p - 0.2 for p in places], [d["ours_ms"] for d in chosen], 0.4, label="ours")
    axes.barh([p + 0.2 for p in places], [d["fla_ms"] or 0 for d in chosen], 0.4, label="fla, where it runs")
    axes.set_yticks(list(places), names)
    axes.set(xlabel="milliseconds, forward + backward", title=f"{tuple(first)}, {chosen[0]['dtype']}, H200")
    axes.invert_yaxis()
    axes.legend(fontsize=8)
    save(drawing, path)


def kept_picture(runs: list[dict[str, Any]], path: Path) -> None:
    """A point a run, and the mean of every share."""
    drawing, axes = figure()
    axes.scatter([r["kept"] for r in runs], [r["loss"] for r in runs], alpha=0.4)
    shares = sorted({r["target"] for r in runs})
    means = [[statistics.mean(r[name] for r in runs if r["target"] == s) for s in shares] for name in ("kept", "loss")]
    axes.plot(*means, "o-")
    axes.set(xlabel="share of tokens kept", ylabel="loss of the answers, nats", ylim=(0, None))
    axes.grid(alpha=0.3)
    save(drawing, path)


def trade_picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Milliseconds of HAM's forward, and bytes of its state, against the kept share."""
    trade = sorted((row for row in rows if row.get("trade")), key=lambda row: row["kept"])
    kept = [row["kept"] for row in trade]
    drawing, left = figure()
    left.plot(kept, [row["graph_ms"]["ours"] for row in trade], "o-", label="HAM")
    left.plot(kept, [row["graph_ms"]["peer"] for row in trade], "--", label="attention to all, and the delta rule")
    left.set(xlabel="share of tokens kept", ylabel="milliseconds", ylim=(0, None))
    right = left.twinx()
    right.plot(kept, [row["state_bytes"] / 2**20 for row in trade], "s:", color="grey")
    right.set(ylabel="state, MiB (dotted)", ylim=(0, None))
    left.grid(alpha=0.3)
    left.legend(fontsize=8)
    save(drawing, path)
