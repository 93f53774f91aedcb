"""Options of the benchmarks, what they are run on, and the report at the end."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mixers
from benchmarks import ours, report
from benchmarks.case import PASSES, STEP, Case

ROWS: pytest.StashKey[list[report.Row]] = pytest.StashKey()
DEFAULTS = {
    "mixers": "all",
    "lengths": "1024:4096",
    "batch": 1,
    "heads": 8,
    "width": 64,
    "dtype": "float32",
    "device": "cpu",
    "backend": [],
    "passes": "all",
    "peers": "fastest",
    "rounds": 7,
    "report": "runs/bench",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Sizes, mixers, backends and where the report goes."""
    group = parser.getgroup("mixers", "sequence mixers")
    words = {
        "mixers": "names, separated by commas",
        "lengths": "tokens: 1024:65536 doubles from the first to the last, 100,200 lists",
        "batch": "sequences",
        "heads": "heads",
        "width": "width of keys and values",
        "dtype": "float32, float64, bfloat16 or float16",
        "device": "cpu or cuda",
        "backend": "a backend, may be repeated; reference is timed only when named; all that are installed",
        "passes": "some of forward,forward_backward,step",
        "peers": "fastest (a short race, then in turns with ours) or none",
        "rounds": "turns of each",
        "report": "folder of table and pictures",
    }
    for name, default in DEFAULTS.items():
        how: dict[str, Any] = {"action": "append"} if isinstance(default, list) else {"type": type(default)}
        with contextlib.suppress(ValueError):  # the tests' own --backend means the same
            group.addoption(f"--{name}", default=default, help=f"{words[name]} (default {default or 'all'})", **how)


def _option(config: pytest.Config, name: str) -> Any:
    return config.getoption(f"--{name}", DEFAULTS[name])


def _list(config: pytest.Config, name: str, everything: tuple[str, ...]) -> list[str]:
    value = _option(config, name)
    return list(everything) if value == "all" else value.split(",")


def lengths(text: str) -> list[int]:
    """``1024:4096`` as 1024, 2048, 4096; ``100,200`` as it stands."""
    if ":" not in text:
        return [int(part) for part in text.split(",")]
    first, last = map(int, text.split(":"))
    found = [first]
    while found[-1] * 2 <= last:
        found.append(found[-1] * 2)
    return found


def cases(config: pytest.Config) -> Iterator[tuple[Case, ours.Way]]:
    """Every mixer in every way, pass and length."""
    backends = _option(config, "backend") or None
    width, batch, heads = (_option(config, name) for name in ("width", "batch", "heads"))
    for mixer in _list(config, "mixers", mixers.names()):
        spec = mixers.get_spec(mixer)
        exact = {o.name: o.default for o in spec.options}.get("chunk_size") == 1
        for options in ((), (("chunk_size", 16),)) if exact else ((),):
            for kind in _list(config, "passes", PASSES):
                for length in [1] if kind == STEP else lengths(_option(config, "lengths")):
                    dtype, device = _option(config, "dtype"), _option(config, "device")
                    case = Case(mixer, batch, length, heads, width, width, kind, options, dtype, device)
                    for way in ours.ways(case, backends):
                        yield case, way


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One benchmark a case and way."""
    if {"case", "way"} <= set(metafunc.fixturenames):
        found = list(cases(metafunc.config))
        ids = [f"{c.mixer}{''.join(f'-{v}' for _, v in c.options)}-{w.name}-{c.kind}-{c.length}" for c, w in found]
        metafunc.parametrize(("case", "way"), found, ids=[name.replace(" ", "_") for name in ids])


def pytest_configure(config: pytest.Config) -> None:
    """Rows gather here."""
    config.stash[ROWS] = []


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> list[report.Row]:
    """The report's rows."""
    return request.config.stash[ROWS]


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    """Turns of each function."""
    return int(_option(request.config, "rounds"))


@pytest.fixture
def with_peers(request: pytest.FixtureRequest) -> bool:
    """Whether a peer runs beside ours."""
    return bool(_option(request.config, "peers") == "fastest")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table; and in a folder the same as JSON, and pictures."""
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    folder = Path(_option(config, "report"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.json").write_text(json.dumps([row.record() for row in rows], indent=1) + "\n")
    rates = rows[0].rates
    terminalreporter.section("mixers and their peers")
    terminalreporter.write_line(report.table(report.HEADERS, map(report.cells, rows)))
    terminalreporter.write_line(
        f"\nfloor: {rates.copy / 1e9:.1f} GB/s copied, {rates.matmul / 1e9:.0f} GFLOP/s in a matrix product, measured "
        "here; ratio: the peer's time over ours, in turns in this process; ±: half the quartiles' distance"
    )
    try:
        pictures = report.plot(rows, folder)
    except ImportError:
        terminalreporter.write_line("no pictures: pip install matplotlib")
    else:
        terminalreporter.write_line("pictures: " + ", ".join(map(str, pictures)))
