"""Every mixer in every backend, form and pass, beside the fastest of its peers."""

import functools
from typing import Any

from benchmarks import floor, inputs, ours, peers, report, timing
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


def test_mixer(
    benchmark: Any, case: Case, way: ours.Way, rows: list[report.Row], rounds: int, with_peers: bool
) -> None:
    arrays = inputs.draw(case.spec, case.sizes, optional=case.optional)
    run = ours.build(case, arrays, way)
    name, peer = fastest_peer(case, arrays) if with_peers else ("", None)
    timings = timing.alternate({"ours": run} | ({"peer": peer} if peer else {}), rounds)
    row = report.Row(case, way.name, timings["ours"], name, timings.get("peer"), floor.measure(case.device, case.dtype))
    rows.append(row)
    benchmark.group = f"{case.mixer} {case.kind}"
    benchmark.extra_info.update(row.record())
    calls = max(1, int(0.03 / row.ours.median))
    benchmark.pedantic(functools.partial(_run, run), rounds=5, iterations=calls, warmup_rounds=1)


def _run(run: peers.Run) -> Any:
    return timing.wait(run())
