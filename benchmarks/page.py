"""One HTML page that needs nothing beside it: pictures of a run's rows, mixer beside mixer, and their table."""

import html
import io
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import report
from benchmarks.case import STEP
from benchmarks.report import Row

Measure = Callable[[Row], float | None]

CURVES: tuple[tuple[str, str, Measure], ...] = (
    ("time", "seconds a call", lambda row: row.ours.median),
    ("memory", "bytes at the highest, beyond inputs", lambda row: row.memory or None),
    ("throughput", "tokens a second", lambda row: row.case.tokens / row.ours.median),
    ("distance from the floor", "least possible time over time", lambda row: row.floor_fraction),
)

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1rem; color: #222; }
h1, h2 { line-height: 1.2; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(28rem, 100%), 1fr)); }
svg { max-width: 100%; height: auto; } .table { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; }
th, td { border-bottom: 1px solid #ddd; padding: 0.2rem 0.6rem; text-align: left; white-space: nowrap; }
td { font-variant-numeric: tabular-nums; }
"""


def page(rows: Sequence[Row], machine: str, left_out: Sequence[str]) -> str:
    """The page; pictures are left out where matplotlib is not installed.

    Args:
        rows: what was measured.
        machine: device, date, versions and command, in words.
        left_out: cases that were not run, with reasons.
    """
    parts = ["<!doctype html><html lang='en'><meta charset='utf-8'>"]
    parts.append("<meta name='viewport' content='width=device-width'><link rel='icon' href='data:,'>")
    parts.append(f"<title>mixers side by side</title><style>{STYLE}</style>")
    parts.append(f"<h1>Mixers side by side</h1><p>{html.escape(machine)}</p>")
    for kind in dict.fromkeys(row.case.kind for row in rows):
        chosen = [row for row in rows if row.case.kind == kind]
        parts.append(f"<h2>{html.escape(report.TITLES[kind])}</h2>")
        parts.append(f"<div class='pictures'>{''.join(pictures(chosen, kind))}</div>")
        parts.append(f"<div class='table'>{table(chosen)}</div>")
    if left_out:
        parts.append("<h2>Left out</h2><ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in left_out) + "</ul>")
    return "\n".join(parts) + "</html>\n"


def table(rows: Sequence[Row]) -> str:
    """The same columns as in the terminal."""
    lines = [f"<tr>{''.join(f'<th>{html.escape(title)}</th>' for title in report.HEADERS)}</tr>"]
    for row in rows:
        lines.append(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in report.cells(row))}</tr>")
    return f"<table>{''.join(lines)}</table>"


def series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by mixer, options and kernel."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        options = "".join(f" {name}={value}" for name, value in row.case.options)
        found.setdefault(f"{row.case.mixer}{options} ({row.way})", []).append(row)
    return {name: sorted(points, key=lambda row: row.case.length) for name, points in found.items()}


def pictures(rows: Sequence[Row], kind: str) -> list[str]:
    """Curves against length, or bars where there is one length; dashed or grey is the fastest peer."""
    try:
        import matplotlib
    except ImportError:
        return ["<p>No pictures: pip install matplotlib</p>"]
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = series(rows)
    if kind == STEP or all(len(points) == 1 for points in lines.values()):
        return [_bars(pyplot, lines, kind)]
    return [_curve(pyplot, lines, title, unit, measure) for title, unit, measure in CURVES]


def _curve(pyplot: Any, lines: dict[str, list[Row]], title: str, unit: str, measure: Measure) -> str:
    figure, axes = pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")
    for color, (name, points) in enumerate(lines.items()):
        style = {"color": f"C{color % 10}", "marker": "o", "markersize": 4}
        found = [(row.case.length, measure(row)) for row in points if measure(row) is not None]
        axes.plot(*zip(*found, strict=True), label=name, **style) if found else None
        beside = [row for row in points if row.theirs] if title == "time" else []
        if beside:
            seconds = [row.theirs.median for row in beside if row.theirs]
            axes.plot([row.case.length for row in beside], seconds, linestyle="--", **style)
    axes.set(yscale="log", xlabel="tokens", ylabel=unit, title=title + ("; dashed: peer" if title == "time" else ""))
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return _svg(pyplot, figure)


def _bars(pyplot: Any, lines: dict[str, list[Row]], kind: str) -> str:
    figure, axes = pyplot.subplots(figsize=(9, 1.4 + 0.5 * len(lines)), layout="constrained")
    rows, places = [points[-1] for points in lines.values()], range(len(lines))
    axes.barh([p - 0.2 for p in places], [row.ours.median * 1e6 for row in rows], 0.4, label="ours")
    theirs = [row.theirs.median * 1e6 if row.theirs else 0 for row in rows]
    axes.barh([p + 0.2 for p in places], theirs, 0.4, label="fastest peer, where there is one", color="0.7")
    axes.set_yticks(list(places), list(lines))
    word = "decode latency: microseconds a token" if kind == STEP else "microseconds a call"
    axes.set(xscale="log", xlabel=word, title=report.TITLES[kind])
    axes.invert_yaxis()
    axes.legend(fontsize=7)
    return _svg(pyplot, figure)


def _svg(pyplot: Any, figure: Any) -> str:
    """The picture as it goes into a page, without the heading of a file."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    text = out.getvalue()
    return text[text.index("<svg") :]
