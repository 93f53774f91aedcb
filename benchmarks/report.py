"""Rows of measurements as a table in the terminal and as pictures."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.case import STEP, Case
from benchmarks.floor import Rates
from benchmarks.timing import Timing

TITLES = {"forward": "forward", "forward_backward": "forward + backward", "step": "one step"}


@dataclass(frozen=True)
class Row:
    """One mixer in one pass, and the peer that ran beside it.

    Attributes:
        case: what was timed.
        way: backend, form and arrays.
        ours: our time.
        peer: the peer's name; empty where there is none.
        theirs: its time.
        rates: what the machine can do.
    """

    case: Case
    way: str
    ours: Timing
    peer: str
    theirs: Timing | None
    rates: Rates

    @property
    def ratio(self) -> float | None:
        """How many times as long the peer takes."""
        return None if self.theirs is None else self.theirs.median / self.ours.median

    def record(self) -> dict[str, Any]:
        """As JSON."""
        seconds = self.ours.median
        return {
            "mixer": self.case.mixer,
            "options": dict(self.case.options),
            "way": self.way,
            "pass": self.case.kind,
            "sizes": [self.case.batch, self.case.length, self.case.heads, self.case.key_dim, self.case.value_dim],
            "dtype": self.case.dtype,
            "seconds": seconds,
            "spread": self.ours.spread,
            "tokens_per_second": self.case.tokens / seconds,
            "gflops": self.case.flops / seconds / 1e9,
            "floor_fraction": self.rates.floor(self.case) / seconds,
            "peer": self.peer,
            "peer_seconds": self.theirs.median if self.theirs else None,
            "peer_spread": self.theirs.spread if self.theirs else None,
            "ratio": self.ratio,
        }


HEADERS = (
    *("mixer", "(B,T,H,K,V)", "way", "pass"),
    *("time", "±", "tokens/s", "GFLOP/s", "of floor", "peer", "its time", "ratio"),
)


def cells(row: Row) -> list[str]:
    """A row of the table."""
    r = row.record()
    return [
        row.case.mixer,
        row.case.label,
        row.way,
        TITLES[row.case.kind],
        duration(r["seconds"]),
        f"{r['spread']:.0%}",
        quantity(r["tokens_per_second"]),
        f"{r['gflops']:.1f}",
        f"{r['floor_fraction']:.1%}",
        row.peer or "none",
        duration(row.theirs.median) if row.theirs else "",
        f"{row.ratio:.2f}×" if row.ratio else "",
    ]


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as they must be, text to the left, numbers to the right."""
    lines = [list(headers), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headers))]
    numeric = [all(not line[i] or line[i][0].isdigit() for line in lines[1:]) for i in range(len(headers))]

    def render(line: list[str]) -> str:
        columns = zip(line, widths, numeric, strict=True)
        return "  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in columns).rstrip()

    return "\n".join([render(lines[0]), "  ".join("─" * w for w in widths), *map(render, lines[1:])])


def duration(seconds: float) -> str:
    """Seconds in the unit that reads best."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def quantity(number: float) -> str:
    """A large number in thousands or millions."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def plot(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Time against length for every mixer and its peer, and all mixers side by side; a picture a pass."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for kind in dict.fromkeys(row.case.kind for row in rows):
        chosen = [row for row in rows if row.case.kind == kind]
        series: dict[str, list[Row]] = {}
        for row in chosen:
            options = "".join(f" {name}={value}" for name, value in row.case.options)
            series.setdefault(f"{row.case.mixer}{options} ({row.way})", []).append(row)
        if kind != STEP and any(len(points) > 1 for points in series.values()):
            written.append(_against_length(pyplot, series, kind, folder))
        written.append(_side_by_side(pyplot, series, kind, folder))
    return written


def _against_length(pyplot: Any, series: dict[str, list[Row]], kind: str, folder: Path) -> Path:
    """Solid lines are ours, dashed ones the peers."""
    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    for color, (name, points) in enumerate(series.items()):
        points = sorted(points, key=lambda row: row.case.length)
        style = {"color": f"C{color % 10}", "marker": "o", "markersize": 4}
        axes.plot([r.case.length for r in points], [r.ours.median for r in points], label=name, **style)
        beside = [r for r in points if r.theirs]
        if beside:
            axes.plot([r.case.length for r in beside], [r.theirs.median for r in beside], linestyle="--", **style)
    axes.set(yscale="log", xlabel="tokens", ylabel="seconds", title=f"{TITLES[kind]}; dashed: fastest peer")
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _save(pyplot, figure, folder / f"{kind}_time.png")


def _side_by_side(pyplot: Any, series: dict[str, list[Row]], kind: str, folder: Path) -> Path:
    """Tokens a second at the greatest length of each."""
    longest = [max(points, key=lambda row: row.case.length) for points in series.values()]
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.5 * len(longest)), layout="constrained")
    places = range(len(longest))
    axes.barh([p - 0.2 for p in places], [r.case.tokens / r.ours.median for r in longest], 0.4, label="ours")
    theirs = [r.case.tokens / r.theirs.median if r.theirs else 0 for r in longest]
    axes.barh([p + 0.2 for p in places], theirs, 0.4, label="fastest peer", color="0.7")
    axes.set_yticks(list(places), [f"{name}\nT={row.case.length}" for name, row in zip(series, longest, strict=True)])
    axes.set(xscale="log", xlabel="tokens a second", title=TITLES[kind])
    axes.invert_yaxis()
    axes.legend(fontsize=8)
    return _save(pyplot, figure, folder / f"{kind}_mixers.png")


def _save(pyplot: Any, figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
