"""Tables and pictures of all committed measurements."""

from pathlib import Path
from typing import Any

from pages import measured
from pages.markdown import code, duration, table


def parts(results: measured.Results, folder: Path) -> dict[str, str]:
    """The pieces that ``performance.md`` includes, by path; pictures are drawn beside them."""
    where = folder / "performance"
    where.mkdir(parents=True, exist_ok=True)
    growth_picture(results.cpu["growth"], where / "growth.svg")
    gpu_picture(results.gpu["duels"], where / "gpu.svg")
    made = {
        "cpu": cpu(results.cpu),
        "growth": growth(results.cpu),
        "gpu": gpu(results.gpu),
        "serving": serving(results.gpu),
        "cuda": cuda(results.cuda),
    }
    return {f"performance/{name}.part.md": text + "\n" for name, text in made.items()}


def cpu(result: dict[str, Any]) -> str:
    """Ours beside peers, in turns."""
    rows = [
        [
            *(r["title"], r["case"], code(r["ours"]), duration(r["ours_seconds"]), f"{r['ours_spread']:.0%}"),
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
    """Ours beside flash-linear-attention."""
    rows = []
    for d in result["duels"]:
        options = "".join(f" {n}={v}" for n, v in d["options"].items())
        shape = "(" + ",".join(map(str, d["shape"])) + ")"
        if d["key_heads"] != d["shape"][2]:
            shape += f", {d['key_heads']} key heads"
        theirs = duration(d["fla_ms"] / 1e3) if d["fla_ms"] else "refuses" if d["fla_refuses"] else ""
        rows.append(
            [
                *(code(d["mixer"]) + options, shape, measured.PASSES[d["pass"]], code(d["kernel"])),
                *(duration(d["ours_ms"] / 1e3), f"{d['floor_fraction']:.0%}", theirs),
                f"{d['ratio']:.2f}×" if d["ratio"] else "",
            ]
        )
    headers = ["mixer", "(B,T,H,D)", "pass", "kernel", "ours", "of the floor", "fla", "ratio"]
    rates = result["rates"]
    return (
        f"{measured.provenance(result)} Copy {rates['copy'] / 1e12:.2f} TB/s, bfloat16 product "
        f"{rates['matmul'] / 1e12:.0f} TFLOP/s.\n\n{table(headers, rows)}"
    )


def serving(result: dict[str, Any]) -> str:
    """One decoded token."""
    rows = (
        [
            *(r["form"], str(r["batch"]), str(r["heads"]), str(r["width"])),
            *(f"{r['microseconds']:.1f} µs", f"{r['copy_fraction']:.0%}"),
        ]
        for r in result["serving"]
    )
    return table(["call", "sequences", "heads", "width", "time", "of the copy rate"], rows)


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


def _figure() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "mixers"  # the same picture from the same numbers
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(8, 4.8), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def growth_picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds against tokens on a CPU."""
    figure, axes = _figure()
    for row in rows:
        axes.plot([int(t) for t in row["seconds"]], list(row["seconds"].values()), marker="o", label=row["mixer"])
    axes.set(yscale="log", xlabel="tokens", ylabel="seconds, forward + backward", title="(1,T,8,64,64), float32, CPU")
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _save(figure, path)


def gpu_picture(duels: list[dict[str, Any]], path: Path) -> None:
    """Forward and backward of every mixer beside fla's, at the first shape."""
    first = duels[0]["shape"]
    chosen = [d for d in duels if d["shape"] == first and d["pass"] == "forward_backward"]
    names = [d["mixer"] + "".join(f" C={v}" for v in d["options"].values()) for d in chosen]
    figure, axes = _figure()
    places = range(len(chosen))
    axes.barh([p - 0.2 for p in places], [d["ours_ms"] for d in chosen], 0.4, label="ours")
    axes.barh([p + 0.2 for p in places], [d["fla_ms"] or 0 for d in chosen], 0.4, label="fla, where it runs")
    axes.set_yticks(list(places), names)
    axes.set(xlabel="milliseconds, forward + backward", title=f"{tuple(first)}, {chosen[0]['dtype']}, H200")
    axes.invert_yaxis()
    axes.legend(fontsize=8)
    _save(figure, path)
