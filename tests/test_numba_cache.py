"""Compiled kernels on disk: never stale, never in the way.

A small package of its own, with the backend's ``compile.py`` and what that imports, one kernel and a helper
in another file, runs in fresh processes; so nothing here compiles a real kernel or touches the user's cache.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mixers.backends.numba import cache

CALLER = """
from .compile import In, Int, Out, Real, kernel
from .helper import times


@kernel
def apply(begin: Int, end: Int, x: In[1], by: Real, y: Out[1]):
    for i in range(begin, end):
        y[i] = times(x[i], by)
"""
HELPER = """
from .compile import device


@device
def times(x, by):
    return {factor} * x * by
"""
PROGRAM = """
import os, sys
sys.path.insert(0, {home!r})
import numpy as np
from house import cache, caller
saved = []
save = cache.DiskCache.save_overload
cache.DiskCache.save_overload = lambda self, *rest: (saved.append(1), save(self, *rest))
y = np.empty(3)
caller.apply(float(os.environ.get("WORK", 0)), 3, np.ones(3)[::-1], 10.0, y)
assert (y == y[0]).all()
print(y[0], len(saved), cache.folder())
"""


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """The folder of the small package."""
    home = tmp_path / "house"
    home.mkdir()
    (home / "__init__.py").touch()
    for name in ("compile.py", "cache.py", "part.py", "threads.py"):
        shutil.copy(cache.HOME / name, home)
    (home / "caller.py").write_text(CALLER)
    (home / "helper.py").write_text(HELPER.format(factor=2))
    return home


def start(house: Path, **environment: str) -> subprocess.Popen[str]:
    places = {"XDG_CACHE_HOME": str(house.parent / "cache"), "TMPDIR": str(house.parent)}
    places["PYTHONDONTWRITEBYTECODE"] = "1"  # which misses an edit of the same length within a second
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(home=str(house.parent))],
        env={**os.environ, **places, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[float, int, Path]:
    """What the kernel said, how many compilations it took, and where they were kept."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    value, compiled, folder = out.split()
    return float(value), int(compiled), Path(folder)


def run(house: Path, **environment: str) -> tuple[float, int, Path]:
    return finish(start(house, **environment))


def test_a_second_process_compiles_nothing(house: Path) -> None:
    first, second = run(house), run(house)
    assert (first[0], second[0]) == (20.0, 20.0)
    assert (first[1], second[1]) == (1, 0)
    assert first[2] == second[2]
    assert first[2].is_relative_to(house.parent / "cache")


def test_threads_compile_no_more_than_a_launcher(house: Path) -> None:
    assert run(house)[:2] == (20.0, 1)
    assert run(house, WORK="1e9", NUMBA_NUM_THREADS="2")[:2] == (20.0, 1)
    assert run(house, WORK="1e9", NUMBA_NUM_THREADS="2")[:2] == (20.0, 0)


def test_an_edited_helper_recompiles_its_caller(house: Path) -> None:
    """The case that Numba's own cache gets wrong: the caller's file did not change."""
    assert run(house)[0] == 20.0
    (house / "helper.py").write_text(HELPER.format(factor=3))
    assert run(house)[:2] == (30.0, 1)
    (house / "helper.py").write_text(HELPER.format(factor=2))
    assert run(house)[:2] == (20.0, 0)


def test_a_new_file_changes_the_stamp(house: Path) -> None:
    stamps = {cache.stamp(house)}
    (house / "another.py").write_text("pass\n")
    stamps.add(cache.stamp(house))
    (house / "another.py").rename(house / "renamed.py")
    stamps.add(cache.stamp(house))
    inside = house / "inside"
    inside.mkdir()
    (inside / "deep.py").write_text("pass\n")
    stamps.add(cache.stamp(house))
    assert len(stamps) == 4


@pytest.mark.parametrize("module", ["numba", "llvmlite"])
def test_another_compiler_changes_the_stamp(house: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    before = cache.stamp(house)
    monkeypatch.setattr(getattr(cache, module), "__version__", "0.0.0")
    assert cache.stamp(house) != before


def test_another_cpu_changes_the_stamp(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cache.stamp(house)
    monkeypatch.setattr(cache.binding, "get_host_cpu_name", lambda: "abacus")
    assert cache.stamp(house) != before


def test_a_folder_that_cannot_be_written_gives_way_to_a_temporary_one(house: Path) -> None:
    blocked = house.parent / "file"
    blocked.touch()  # a file where a folder should be: not even root can write there
    value, compiled, folder = run(house, XDG_CACHE_HOME=str(blocked))
    assert (value, compiled) == (20.0, 1)
    assert folder.is_relative_to(house.parent)
    assert not folder.is_relative_to(blocked)
    assert run(house, XDG_CACHE_HOME=str(blocked)) == (20.0, 0, folder)


def test_a_temporary_folder_of_somebody_else_is_not_trusted(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code is code."""
    if not hasattr(os, "getuid"):
        pytest.skip("no owners on this system")
    monkeypatch.setattr(cache, "_writable", lambda folder: "cache" not in folder.parts and _make(folder))
    monkeypatch.setattr(cache.platformdirs, "user_cache_dir", lambda name: str(house.parent / "cache"))
    monkeypatch.setattr(cache.tempfile, "tempdir", str(house.parent))
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    cache.folder.cache_clear()
    try:
        found = cache.folder()
    finally:
        cache.folder.cache_clear()
    assert "54321" not in str(found)
    assert found.is_dir()


def _make(folder: Path) -> bool:
    folder.mkdir(parents=True, exist_ok=True)
    return True


@pytest.mark.parametrize("damage", [b"", b"not a kernel", None], ids=["empty", "foreign", "truncated"])
def test_a_damaged_file_is_a_miss(house: Path, damage: bytes | None) -> None:
    _, _, folder = run(house)
    files = list(folder.glob("*.kernel"))
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if damage is None else damage)
    assert run(house)[:2] == (20.0, 1)
    assert run(house)[:2] == (20.0, 0)
    assert {file.suffix for file in folder.iterdir()} == {".kernel"}


def test_two_processes_at_once(house: Path) -> None:
    both = [start(house), start(house)]
    assert [finish(process)[0] for process in both] == [20.0, 20.0]
    assert run(house)[1] == 0
