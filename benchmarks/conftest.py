"""Options of the benchmarks, what they are run on, and the report at the end."""

import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mixers
from benchmarks import floor, ours, page, report
from benchmarks.case import PASSES, STEP, Case

ROWS: pytest.StashKey[list[report.Row]] = pytest.StashKey()
LEFT_OUT: pytest.StashKey[list[str]] = pytest.StashKey()
DEFAULTS = {
    "mixers": "all",
    "lengths": "1024:4096",
    "batch": 1,
    "heads": 8,
    "width": 64,
    "dtype": "float32",
    "device": "auto",
    "backend": [],
    "ways": "chosen",
    "passes": "all",
    "peers": "fastest",
    "rounds": 7,
    "limit": 2.0,
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
        "device": "cpu, cuda, or auto: cuda where torch finds it",
        "backend": "a backend, may be repeated; reference is timed only when named; what auto takes, or all installed",
        "ways": "chosen (the kernel that a user gets) or all (every kernel that can)",
        "passes": "some of forward,forward_backward,step",
        "peers": "fastest (a short race, then in turns with ours) or none",
        "rounds": "turns of each",
        "limit": "seconds a call may take: what would take more, by a shorter sequence, is left out",
        "report": "folder of rows and page",
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


def device(config: pytest.Config) -> str:
    """Where to run."""
    asked = str(_option(config, "device"))
    if asked != "auto":
        return asked
    if importlib.util.find_spec("torch") is None:
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def cases(config: pytest.Config) -> Iterator[tuple[Case, ours.Way]]:
    """Every mixer in every way, pass and length."""
    backends = _option(config, "backend") or None
    find = ours.ways if _option(config, "ways") == "all" else ours.chosen
    width, batch, heads = (_option(config, name) for name in ("width", "batch", "heads"))
    for mixer in _list(config, "mixers", mixers.names()):
        spec = mixers.get_spec(mixer)
        exact = {o.name: o.default for o in spec.options}.get("chunk_size") == 1
        for options in ((), (("chunk_size", 16),)) if exact else ((),):
            for kind in _list(config, "passes", PASSES):
                several = lengths(_option(config, "lengths"))
                for length in several[:1] if kind == STEP else several:
                    dtype, where = _option(config, "dtype"), device(config)
                    case = Case(mixer, batch, length, heads, width, width, kind, options, dtype, where)
                    for way in find(case, backends):
                        yield case, way


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One benchmark a case and way."""
    if {"case", "way"} <= set(metafunc.fixturenames):
        found = list(cases(metafunc.config))
        ids = [f"{c.mixer}{''.join(f'-{v}' for _, v in c.options)}-{w.name}-{c.kind}-{c.length}" for c, w in found]
        metafunc.parametrize(("case", "way"), found, ids=[name.replace(" ", "_") for name in ids])


def pytest_configure(config: pytest.Config) -> None:
    """Rows gather here."""
    config.stash[ROWS], config.stash[LEFT_OUT] = [], []


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> list[report.Row]:
    """The report's rows."""
    return request.config.stash[ROWS]


@pytest.fixture
def left_out(request: pytest.FixtureRequest) -> list[str]:
    """Cases that were not run, with reasons."""
    return request.config.stash[LEFT_OUT]


@pytest.fixture
def limit(request: pytest.FixtureRequest) -> float:
    """Seconds that a call may take."""
    return float(_option(request.config, "limit"))


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    """Turns of each function."""
    return int(_option(request.config, "rounds"))


@pytest.fixture
def with_peers(request: pytest.FixtureRequest) -> bool:
    """Whether a peer runs beside ours."""
    return bool(_option(request.config, "peers") == "fastest")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table; and in a folder the same as JSON, and as a page with pictures."""
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
    left_out = config.stash[LEFT_OUT]
    for line in left_out:
        terminalreporter.write_line(f"left out: {line}")
    written = folder / "mixers.html"
    written.write_text(page.page(rows, machine(config), left_out))
    terminalreporter.write_line(f"page: {written}")


def machine(config: pytest.Config) -> str:
    """What ran, on what, when."""
    found = [name for name in ("sequence-mixers", "numpy", "numba", "torch", "triton", "jax") if _version(name)]
    versions = ", ".join(f"{name} {_version(name)}" for name in found)
    name = f"{platform.machine()}, {floor.cores()} cores"
    if device(config) == "cuda":
        import torch

        name = torch.cuda.get_device_name()
    command = " ".join(["pytest", *config.invocation_params.args])
    return f"{name}, {datetime.date.today()}, {versions}: {command}"


def _version(name: str) -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return ""
