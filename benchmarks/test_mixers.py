"""Every mixer in every backend, form and pass, beside the fastest of its peers."""

import dataclasses
import functools
from typing import Any

import pytest

from benchmarks import floor, inputs, memory, ours, peers, report, timing
from benchmarks.case import Case

PEER = "peer"
_winners: dict[tuple[Any, ...], str] = {}
_longest: dict[tuple[Case, ours.Way | str], tuple[int, float]] = {}


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


def expected(case: Case, way: ours.Way | str) -> float:
    """Seconds that a call of ours or a peer may take, by the longest that was measured; 0 where nothing is known."""
    length, seconds = _longest.get((dataclasses.replace(case, length=0), way), (case.length, 0.0))
    return seconds * (case.length / length) ** (2 if case.spec.reserve is not None else 1)


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
    seconds = expected(case, way)
    if seconds > limit:
        would = f"a call would take {report.duration(seconds)}, and --limit is {report.duration(limit)}"
        left_out.append(f"{case.mixer} {case.label} {way.name}, {case.kind}: {would}")
        pytest.skip(left_out[-1])
    arrays = inputs.draw(case.spec, case.sizes, optional=case.optional)
    run = ours.build(case, arrays, way)
    used = memory.peak(run, case.device) if timing.wait(run()) is not None else None
    slow = expected(case, PEER) > limit
    name, peer = fastest_peer(case, arrays) if with_peers and not slow else ("", None)
    timings = timing.alternate({"ours": run} | ({"peer": peer} if peer else {}), rounds)
    rates = floor.measure(case.device, case.dtype)
    row = report.Row(case, ours.runs(case, arrays, way), timings["ours"], name, timings.get("peer"), rates, used)
    rows.append(row)
    if slow:
        left_out.append(f"the peer of {case.mixer} {case.label}, {case.kind}: it would take longer than --limit")
    same = dataclasses.replace(case, length=0)
    _longest[same, way] = case.length, row.ours.median
    if row.theirs:
        _longest[same, PEER] = case.length, row.theirs.median
    benchmark.group = f"{case.mixer} {case.kind}"
    benchmark.extra_info.update(row.record())
    calls, again = max(1, int(0.03 / row.ours.median)), 5 if row.ours.median < timing.LONG else 1
    benchmark.pedantic(functools.partial(_run, run), rounds=again, iterations=calls)


def _run(run: peers.Run) -> Any:
    return timing.wait(run())
