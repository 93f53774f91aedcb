"""Tables and pictures of the experiments in ``benchmarks/results/evidence``.

Where runs differ in nothing but their seed, a cell is their mean, and between brackets the least and the most.
"""

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pages.figure import figure, save
from pages.markdown import code, quantity, table
from pages.measured import RESULTS, provenance

Row = dict[str, Any]
Result = dict[str, Any]


def parts(folder: Path) -> dict[str, str]:
    """The pieces that the pages include, by path; pictures are drawn beside them."""
    where = folder / "evidence"
    where.mkdir(parents=True, exist_ok=True)
    return {f"evidence/{name}.part.md": part(name, where) for name in EXPERIMENTS}


def part(name: str, where: Path) -> str:
    """Picture, origin and table of an experiment, as a page of ``docs/evidence`` includes them."""
    file = RESULTS / "evidence" / f"{name}.json"
    if not file.exists():
        return "Nothing is committed for it yet.\n"
    tell, draw, shows = EXPERIMENTS[name]
    result = json.loads(file.read_text())
    draw(result, where / f"{name}.svg")
    return f"![{shows}](../made/evidence/{name}.svg)\n\n{origin(result)}\n\n{tell(result)}\n"


def origin(result: Result) -> str:
    """Where it ran, with which settings, and what failed."""
    used = sorted({row["on"] for row in result["runs"]})
    where = {provenance({"machine": result["machines"][i]}): None for i in used}
    settings = ", ".join(f"{name} {_plain(value)}" for name, value in result["settings"].items())
    failed = "".join(f"\n\nFailed: {json.dumps(row)}." for row in result["failures"])
    return "\n\n".join(where) + f"\n\nSettings: {settings}.{failed}"


def _plain(value: Any) -> str:
    """A setting in words."""
    if isinstance(value, list):
        return " / ".join("×".join(map(str, v)) if isinstance(v, list) else str(v) for v in value)
    return str(value)


def grouped(rows: Iterable[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by what they are, in their order."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(name) for name in names), []).append(row)
    return found


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """The mean of several seeds, and their range."""
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ({format(min(values), form)} to {format(max(values), form)})"


def mean(rows: Iterable[Row], read: Callable[[Row], float]) -> float:
    """Of several seeds."""
    return statistics.mean(map(read, rows))


def settled(rows: Iterable[Row]) -> list[Row]:
    """The runs at the learning rate that all seeds were given, because the first did best with it."""
    return max(grouped(rows, "rate").values(), key=lambda runs: (len(runs), mean(runs, lambda row: row["score"])))


# Associative recall.


def recall(result: Result) -> str:
    """Every mixer and width at its best rate."""
    return _recalled(result, ("mixer", "width"), ["mixer", "width"])


def slots(result: Result) -> str:
    """Lattice and TTT by the shape of their state."""
    return _recalled(result, ("mixer", "slots", "value"), ["mixer", "slots", "numbers of a slot"])


def _recalled(result: Result, names: tuple[str, ...], headers: list[str]) -> str:
    asked = list(result["runs"][0]["accuracy"])
    order = result["settings"]["mixers"]
    ordered = sorted(result["runs"], key=lambda row: (order.index(row["mixer"]), *(row[name] for name in names[1:])))
    rows = []
    for what, runs in grouped(ordered, *names).items():
        chosen = settled(runs)
        rows.append(
            [
                *(code(what[0]), *map(str, what[1:])),
                quantity(mean(chosen, lambda r: r["state_bytes"])),
                f"{chosen[0]['rate']:g}",
                *(spread([r["accuracy"][name] for r in chosen], ".0%") for name in asked),
            ]
        )
    return table([*headers, "bytes of state", "rate", *asked], rows)


def _hardest(result: Result) -> tuple[str, str]:
    """The longest examination with the most pairs that were learned, and the longest of all."""
    settings = result["settings"]
    return f"{settings['length']}/{max(settings['pairs'])}", list(result["runs"][0]["accuracy"])[-1]


def _seed_bars(axes: Any, x: Sequence[float], groups: Sequence[Sequence[float]], **style: Any) -> None:
    """Means with the range of their seeds."""
    means = [statistics.mean(g) for g in groups]
    low = [m - min(g) for m, g in zip(means, groups, strict=True)]
    high = [max(g) - m for m, g in zip(means, groups, strict=True)]
    axes.errorbar(x, means, yerr=[low, high], marker="o", markersize=4, capsize=2, **style)


def recall_picture(result: Result, path: Path) -> None:
    """Accuracy against bytes, at the hardest that was learned and beyond."""
    drawing, all_axes = figure(1, 2, sharey=True)
    for axes, name in zip(all_axes.flat, _hardest(result), strict=True):
        for color, mixer in enumerate(result["settings"]["mixers"]):
            rows = [row for row in result["runs"] if row["mixer"] == mixer]
            chosen = [settled(runs) for runs in grouped(rows, "width").values()]
            chosen.sort(key=lambda runs: mean(runs, lambda r: r["state_bytes"]))
            x = [mean(runs, lambda r: r["state_bytes"]) for runs in chosen]
            _seed_bars(
                axes, x, [[r["accuracy"][name] for r in runs] for runs in chosen], label=mixer, color=f"C{color}"
            )
        words, pairs = name.split("/")
        axes.set(
            xscale="log", xlabel="bytes of state, a layer", title=f"{words} words, {pairs} pairs", ylim=(-0.02, 1.02)
        )
        axes.grid(alpha=0.3)
    all_axes.flat[0].set_ylabel("right answers")
    all_axes.flat[0].legend(fontsize=7)
    save(drawing, path)


def slots_picture(result: Result, path: Path) -> None:
    """Accuracy against numbers of state, Lattice and TTT."""
    drawing, all_axes = figure(1, 2, sharey=True)
    for axes, name in zip(all_axes.flat, _hardest(result), strict=True):
        for (mixer,), rows in grouped(result["runs"], "mixer").items():
            shapes = grouped(rows, "slots", "value")
            chosen = [[r["accuracy"][name] for r in settled(runs)] for runs in shapes.values()]
            _seed_bars(axes, [m * d for m, d in shapes], chosen, label=mixer)
            for (m, d), values in zip(shapes, chosen, strict=True):
                axes.annotate(
                    f"{m}×{d}", (m * d, statistics.mean(values)), (3, 4), textcoords="offset points", fontsize=7
                )
        words, pairs = name.split("/")
        axes.set_xscale("log", base=2)
        axes.set(xlabel="numbers of state, a head", title=f"{words} words, {pairs} pairs", ylim=(-0.02, 1.02))
        axes.grid(alpha=0.3)
    all_axes.flat[0].set_ylabel("right answers")
    all_axes.flat[0].legend(fontsize=8)
    save(drawing, path)


# Chunk size.


def chunk_size(result: Result) -> str:
    """Loss at the rate of all seeds, and times where they were measured."""
    times = {row["chunk_size"]: row for row in result["runs"] if row["what"] == "time"}
    rows = []
    for (chunk,), runs in grouped((r for r in result["runs"] if r["what"] == "loss"), "chunk_size").items():
        chosen, time = settled(runs), times.get(chunk)
        shown = [f"{time[name]:.3g} ms" for name in TIMES] if time else []
        rows.append([str(chunk), spread([r["bits"] for r in chosen]), f"{chosen[0]['rate']:g}", *shown])
    return table(["chunk_size", "bits a byte, held out", "rate", *(TIMES.values() if times else ())], rows)


TIMES = {"forward_ms": "forward", "forward_backward_ms": "forward + backward"}


def chunk_size_picture(result: Result, path: Path) -> None:
    """Loss against the chunk size, and time."""
    times = [row for row in result["runs"] if row["what"] == "time"]
    drawing, all_axes = figure(1, 2 if times else 1, squeeze=False)
    loss = grouped((r for r in result["runs"] if r["what"] == "loss"), "chunk_size")
    _seed_bars(all_axes.flat[0], [c for (c,) in loss], [[r["bits"] for r in settled(runs)] for runs in loss.values()])
    all_axes.flat[0].set(ylabel="bits a byte, held out")
    for axes in all_axes.flat[1:]:
        for name, label in TIMES.items():
            axes.plot([r["chunk_size"] for r in times], [r[name] for r in times], marker="o", label=label)
        axes.set(ylabel="milliseconds", yscale="log")
        axes.legend(fontsize=8)
    for axes in all_axes.flat:
        axes.set_xscale("log", base=2)
        axes.set(xlabel="chunk_size")
        axes.grid(alpha=0.3)
    save(drawing, path)


# Redundancy.


def redundancy(result: Result) -> str:
    """Medians and ends, by update and layer; means over seeds."""
    rows = []
    for (update,), runs in grouped(result["runs"], "update").items():
        for layer in range(len(runs[0]["layers"])):
            found = [run["layers"][layer] for run in runs]
            cosine, angle = ([f[what]["quantiles"] for f in found] for what in ("cosine", "angle"))
            rows.append(
                [
                    *(update, str(layer + 1)),
                    *(f"{mean(cosine, lambda q, at=at: q[at]):.2g}" for at in ("0.05", "0.5", "0.95")),
                    *(f"{mean(angle, lambda q, at=at: q[at]):.2g}°" for at in ("0.5", "0.95")),
                    *(
                        spread([f[what][-1] for f in found], form)
                        for what, form in (("correlation", ".3f"), ("rank", ".1f"))
                    ),
                ]
            )
    headers = [
        "update",
        "layer",
        "cosine, 5 %",
        "median",
        "95 %",
        "angle, median",
        "95 %",
        "correlation at the end",
        "rank",
    ]
    return table(headers, rows)


def redundancy_picture(result: Result, path: Path) -> None:
    """Distributions of cosine and angle, correlation and rank over time; all layers, heads and seeds together."""
    drawing, all_axes = figure(2, 2)
    for color, ((update,), runs) in enumerate(grouped(result["runs"], "update").items()):
        layers = [layer for run in runs for layer in run["layers"]]
        for axes, what in zip(all_axes.flat[:2], ("cosine", "angle"), strict=True):
            edges = layers[0][what]["edges"]
            counts = [sum(layer[what]["counts"][i] for layer in layers) for i in range(len(edges) - 1)]
            axes.stairs([c / sum(counts) for c in counts], edges, label=update, color=f"C{color}")
        for axes, what in zip(all_axes.flat[2:], ("correlation", "rank"), strict=True):
            for i in range(len(layers[0]["time"])):
                values = [layer[what][i] for layer in layers]
                axes.plot([layers[0]["time"][i]] * 2, [min(values), max(values)], color=f"C{color}", alpha=0.3)
            means = [statistics.mean(layer[what][i] for layer in layers) for i in range(len(layers[0]["time"]))]
            axes.plot(layers[0]["time"], means, marker="o", markersize=3, label=update, color=f"C{color}")
            axes.set_xscale("log", base=2)
    cosine, angle, correlation, rank = all_axes.flat
    cosine.set(xlabel="cosine of update and slot", ylabel="share", yscale="log")
    angle.set(xlabel="degrees that a slot turns in a token", xscale="log")
    correlation.set(xlabel="tokens", ylabel="mean |cosine| of two slots")
    rank.set(xlabel="tokens", ylabel="effective rank of the slots")
    cosine.legend(fontsize=8)
    for axes in all_axes.flat:
        axes.grid(alpha=0.3)
    save(drawing, path)


# Low rank.

SPECTRA = {
    "keys": "keys",
    "keys_unrotated": "keys before their rotation",
    "values": "values",
    "slots": "slots behind the window",
    "values_in_slots": "values within the slots' directions",
}


def low_rank(result: Result) -> str:
    """How many directions hold so much, by mixer and layer; means over windows, heads and seeds."""
    rows = []
    for (mixer,), runs in grouped(result["runs"], "mixer").items():
        for what, words in SPECTRA.items():
            for layer in range(len(runs[0]["layers"])):
                shares = [run["layers"][layer][what] for run in runs if what in run["layers"][layer]]
                if shares:
                    need = (
                        [1 + next((i for i, x in enumerate(s) if x >= least), len(s)) for s in shares]
                        for least in (0.9, 0.99)
                    )
                    rows.append([code(mixer), words, str(layer + 1), *(spread(n, ".0f") for n in need)])
    return table(["model", "of what", "layer", "directions for 90 %", "for 99 %"], rows)


def low_rank_picture(result: Result, path: Path) -> None:
    """The share of the sum of squares against rank; a line a layer, mean over seeds."""
    models = grouped(result["runs"], "mixer")
    drawing, all_axes = figure(1, len(models), sharey=True)
    for axes, ((mixer,), runs) in zip(all_axes.flat, models.items(), strict=True):
        for color, (what, words) in enumerate(SPECTRA.items()):
            for layer in range(len(runs[0]["layers"])):
                shares = [run["layers"][layer][what] for run in runs if what in run["layers"][layer]]
                if shares:
                    line = [statistics.mean(column) for column in zip(*shares, strict=True)]
                    label = words if layer == 0 else None
                    axes.plot(range(1, len(line) + 1), line, color=f"C{color}", alpha=1 - 0.2 * layer, label=label)
        axes.set(xlabel="largest singular values", title=mixer, ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    all_axes.flat[0].set_ylabel("share of the sum of squares")
    save(drawing, path)


# Bytes.


def _kind(row: Row) -> str:
    """A mixer with what it was given."""
    if "share" in row:
        return f"{row['mixer']}, keeps {row['share']:g}"
    return f"{row['mixer']}, segments of {row['segment']}" if "segment" in row else str(row["mixer"])


def by_kind(result: Result) -> dict[str, list[Row]]:
    """Rows by mixer and option."""
    found: dict[str, list[Row]] = {}
    for row in result["runs"]:
        found.setdefault(_kind(row), []).append(row)
    return found


def bytes_(result: Result) -> str:
    """Bits a byte: held-out windows as learned, and places of long ones."""
    ends = [int(end) for end in result["runs"][0]["by_place"]]
    spans = [f"{start} to {end}" for start, end in zip([0, *ends], ends, strict=False)]
    rows = []
    for kind, runs in sorted(by_kind(result).items(), key=lambda item: mean(item[1], lambda r: r["bits"])):
        kept = [r["kept"] for r in runs if "kept" in r]
        rows.append(
            [
                *(kind, str(len(runs)), spread([r["bits"] for r in runs])),
                f"{statistics.mean(kept):.0%}" if kept else "",
                *(f"{_at(runs, end):.2f}" for end in ends),
            ]
        )
    return table(["mixer", "seeds", "bits a byte, held out", "kept", *(f"bytes {span}" for span in spans)], rows)


def _at(runs: Iterable[Row], end: int) -> float:
    """Bits a byte at the places up to one, from the end before."""
    return mean(runs, lambda row: row["by_place"][str(end)])


def bytes_picture(result: Result, path: Path) -> None:
    """Loss against bytes read; bits against place; HAM against what it keeps; memory caching against its segments."""
    kinds, settings = by_kind(result), result["settings"]
    drawing, all_axes = figure(2, 2)
    learning, places, shares, segments = all_axes.flat
    for color, (kind, runs) in enumerate(k for k in kinds.items() if _leads(k[1][0], settings)):
        style = {"color": f"C{color % 10}", "label": kind}
        curve = [statistics.mean(column) for column in zip(*(r["curve"] for r in runs), strict=True)]
        seen = settings["steps"] * settings["batch"] * settings["length"]
        learning.plot([seen * (i + 0.5) / len(curve) / 1e6 for i in range(len(curve))], curve, **style)
        ends = [int(end) for end in runs[0]["by_place"]]
        places.plot(
            ends,
            [mean(runs, lambda r, end=end: r["by_place"][str(end)]) for end in ends],
            marker="o",
            markersize=3,
            **style,
        )
    learning.set(xlabel="millions of bytes read", ylabel="bits a byte, training", ylim=(None, 4))
    learning.legend(fontsize=6)
    places.set_xscale("log", base=2)
    places.set(xlabel="place in a held-out window, up to", ylabel="bits a byte")
    for axes, mixer, what, words in (
        (shares, "ham", "share", "HAM: share of tokens to keep"),
        (segments, "memory_caching", "segment", "memory caching: tokens of a segment"),
    ):
        groups = grouped(sorted((r for r in result["runs"] if r["mixer"] == mixer), key=lambda r: r[what]), what)
        _seed_bars(axes, [x for (x,) in groups], [[r["bits"] for r in runs] for runs in groups.values()])
        axes.set(xlabel=words, ylabel="bits a byte, held out")
    for axes in all_axes.flat:
        axes.grid(alpha=0.3)
    save(drawing, path)


def _leads(row: Row, settings: Row) -> bool:
    """One line a mixer in the pictures of all: HAM and memory caching with the middle of what they were given."""
    share, segment = (sorted(settings[name])[len(settings[name]) // 2] for name in ("shares", "segments"))
    return row.get("share", share) == share and row.get("segment", segment) == segment


EXPERIMENTS: dict[str, tuple[Callable[[Result], str], Callable[[Result, Path], None], str]] = {
    "recall": (recall, recall_picture, "Right answers against bytes of state"),
    "chunk_size": (chunk_size, chunk_size_picture, "Bits a byte, and milliseconds, against the chunk size"),
    "slots": (slots, slots_picture, "Right answers against numbers of state"),
    "redundancy": (redundancy, redundancy_picture, "Cosines and angles; correlation and rank over time"),
    "low_rank": (low_rank, low_rank_picture, "Share of the sum of squares against the number of directions"),
    "bytes": (bytes_, bytes_picture, "Loss against bytes read and against place, shares and segments"),
}
