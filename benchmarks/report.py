"""Rows of measurements, as JSON and as a table in the terminal."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.case import Case
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
        memory: bytes that a call holds at its highest beyond its inputs; None where that is unknown.
    """

    case: Case
    way: str
    ours: Timing
    peer: str
    theirs: Timing | None
    rates: Rates
    memory: int | None = None

    @property
    def floor_fraction(self) -> float:
        """The least time that bytes and operations allow, over our time."""
        return self.rates.floor(self.case) / self.ours.median

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
            "floor_fraction": self.floor_fraction,
            "peak_bytes": self.memory,
            "peer": self.peer,
            "peer_seconds": self.theirs.median if self.theirs else None,
            "peer_spread": self.theirs.spread if self.theirs else None,
            "ratio": self.ratio,
        }


HEADERS = (
    *("mixer", "(B,T,H,K,V)", "way", "pass"),
    *("time", "±", "tokens/s", "GFLOP/s", "of floor", "memory", "peer", "its time", "ratio"),
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
        "" if row.memory is None else f"{row.memory / 1e6:.1f} MB",
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
