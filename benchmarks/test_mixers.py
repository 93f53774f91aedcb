"""Every mixer in every backend, form and pass, beside the fastest of its peers."""

import dataclasses
import functools
from typing import Any

import pytest

from benchmarks import floor, inputs, memory, ours, peers, report, timing
from benchmarks.case import Case

_winners: dict[tuple[Any, ...], str] = {}


def fastest_peer(case: Case, arrays: inputs.Arrays) -> tuple[str, peers.Run | None]:
    """The peer that wins a short race; the winner at one length runs at the others too, where it can."""
    key = (case.mixer, case.kind, case.options, case.dtype)
    known = _winners.get(key, "")
    runs = peers.build(case, arrays, known) or peers.build(case, arrays)
    if not runs:
        return "", None
    winner = timing.fastest(runs)
    _winners.setdefault(key, winner)
    return winner, runs[winner]


def expected(case: Case, way: ours.Way, rows: list[report.Row]) -> float:
    """Seconds that a case may take, by the longest that was measured of the same; 0 where nothing is known."""
    same = [
        r for r in rows if dataclasses.replace(r.case, length=case.length) == case and r.way.startswith(way.backend)
    ]
    if way.backend == "auto":
        same = [r for r in rows if dataclasses.replace(r.case, length=case.length) == case]
    if not same:
        return 0.0
    last = max(same, key=lambda row: row.case.length)
    grows = 2 if case.spec.reserve is not None else 1
    return last.ours.median * (case.length / last.case.length) ** grows


def test_mixer(
    benchmark: Any,
    case: Case,
    way: ours.Way,
    rows: list[report.Row],
    left_out: list[str],
    rounds: int,
    limit: float,
    with_peers: bool,
) -> None:
    seconds = expected(case, way, rows)
    if seconds > limit:
        left_out.append(f"{case.mixer} {case.label}, {case.kind}: a call would take {seconds:.0f} s (--limit)")
        pytest.skip(left_out[-1])
    arrays = inputs.draw(case.spec, case.sizes, optional=case.optional)
    run = ours.build(case, arrays, way)
    used = memory.peak(run, case.device) if timing.wait(run()) is not None else None
    name, peer = fastest_peer(case, arrays) if with_peers else ("", None)
    timings = timing.alternate({"ours": run} | ({"peer": peer} if peer else {}), rounds)
    rates = floor.measure(case.device, case.dtype)
    row = report.Row(case, ours.runs(case, arrays, way), timings["ours"], name, timings.get("peer"), rates, used)
    rows.append(row)
    benchmark.group = f"{case.mixer} {case.kind}"
    benchmark.extra_info.update(row.record())
    calls = max(1, int(0.03 / row.ours.median))
    benchmark.pedantic(functools.partial(_run, run), rounds=5, iterations=calls, warmup_rounds=1)


def _run(run: peers.Run) -> Any:
    return timing.wait(run())
