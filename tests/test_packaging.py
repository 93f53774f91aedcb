"""The package as it is installed: what the wheel holds, what importing costs, how backends are found."""

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

import mixers
from mixers.backend import backend_status, installed

ROOT = Path(__file__).parents[1]
HOMES = ("mixers", "backends", "autotune")
HEAVY = ("torch", "jax", "triton", "numba", "numba.cuda")


def run(code: str, *, path: Path | None = None, cwd: Path) -> str:
    """Run code in a fresh interpreter, ``path`` first among what it imports from."""
    start = f"import sys; sys.path.insert(0, {str(path)!r})\n" if path else ""
    done = subprocess.run([sys.executable, "-c", start + code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of this checkout."""
    return build(checkout(tmp_path_factory.mktemp("source") / "checkout"), tmp_path_factory.mktemp("wheel"))


def checkout(source: Path) -> Path:
    """A copy of this checkout with a stray package beside the others, and a profile as one is shipped."""
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "dist", "__pycache__", "*.egg-info", "runs")
    )
    (source / "stray").mkdir()
    (source / "stray" / "__init__.py").touch()
    (source / "autotune" / "profiles").mkdir(exist_ok=True)
    (source / "autotune" / "profiles" / "some_device.toml").touch()
    return source


def build(source: Path, target: Path) -> Path:
    """The wheel of some source, dated as a release is: ``nox -s dist``."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(target), str(source)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"SOURCE_DATE_EPOCH": "1700000000"})
    (built,) = target.glob("*.whl")
    return built


def test_the_same_source_makes_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    source = checkout(tmp_path / "elsewhere")
    os.utime(source / "mixers" / "spec.py", (1_800_000_000, 1_800_000_000))
    again = build(source, tmp_path / "wheel")
    assert digest(again) == digest(wheel)


def digest(file: Path) -> str:
    """What pytest compares in no time, where bytes take it minutes."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if not n.split("/")[0].endswith(".dist-info")}
        info = [n for n in archive.namelist() if n.endswith(".dist-info/licenses/LICENSE")]
    sources = {
        ("mixers/" if home == "mixers" else f"mixers/{home}/") + file.relative_to(ROOT / home).as_posix()
        for home in HOMES
        for file in (*(ROOT / home).rglob("*.py"), *(ROOT / home).rglob("profiles/*.toml"))
    }
    assert names == sources | {"mixers/py.typed", "mixers/autotune/profiles/some_device.toml"}
    assert len(info) == 1


def test_wheel_works_unpacked_and_finds_its_backends(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(home)
    code = (
        "import mixers, mixers.backends, mixers.autotune\n"
        "from mixers.backend import backend_status, installed\n"
        "print(*mixers.__path__, mixers.backends.__path__[0], *installed(), backend_status()['numba'].reason)"
    )
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["mixers.backends"]
    assert run(code, path=home, cwd=tmp_path).split() == [f"{home}/mixers", f"{home}/mixers/backends", *ours]


def test_import_is_instant_and_light(tmp_path: Path) -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import mixers; took = time.perf_counter() - start\n"
        f"print(took, [m for m in {HEAVY} if m in sys.modules])"
    )
    answers = [run(code, cwd=tmp_path).split(maxsplit=1) for _ in range(3)]
    assert all(heavy == "[]" for _, heavy in answers)
    assert min(float(took) for took, _ in answers) < 0.2


def test_a_numpy_call_on_the_reference_imports_no_other_library(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np, mixers\n"
        "x = np.ones((1, 3, 1, 4)); mixers.get('linear_attention', backend='reference')(x, x, x)\n"
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    assert run(code, cwd=tmp_path) == "[]"


def test_version_stands_in_one_place() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert mixers.__version__ == declared == importlib.metadata.version("sequence-mixers")
    assert f"## {declared}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_pins_are_what_the_library_accepts() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for text in (
        *project["dependencies"],
        *extras["torch"],
        *extras["jax"],
        *extras["bench"],
        *extras["docs"],
        *extras["dev"],
    ):
        wanted = Requirement(text)
        pin = pins.get(wanted.name, pins.get(wanted.name.replace("-", "_")))
        assert pin is not None, f"constraints.txt does not pin {wanted.name}"
        assert pin in wanted.specifier


@pytest.fixture
def never_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No distribution declares anything."""
    missing = importlib.metadata.PackageNotFoundError("sequence-mixers")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **selected: ())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: (_ for _ in ()).throw(missing))
    installed.cache_clear()
    yield
    installed.cache_clear()


def test_a_checkout_that_was_never_installed_says_so_and_runs_the_reference(never_installed: None) -> None:
    assert list(backend_status()) == ["reference"]
    assert mixers.__version__ == "0+checkout"
    with pytest.raises(ValueError, match=r"unknown backend: 'numba'.*no backend is installed: pip install -e \."):
        mixers.get("delta_rule", backend="numba")
    x = np.ones((1, 3, 1, 4))
    y, state = mixers.get("linear_attention")(x, x, x)
    assert y.shape == (1, 3, 1, 4)
    assert state.shape == (1, 1, 4, 4)


def test_a_checkout_is_a_whole_package_from_its_own_root(tmp_path: Path) -> None:
    """`backends` and `autotune` beside the folder `mixers` are its subpackages, wherever the checkout lies."""
    for home in HOMES:
        shutil.copytree(ROOT / home, tmp_path / home, ignore=shutil.ignore_patterns("__pycache__"))
    code = "import mixers.backends.numba, mixers.autotune; print(mixers.__file__, mixers.backends.numba.__file__)"
    expected = [str(tmp_path / "mixers" / "__init__.py"), str(tmp_path / "backends" / "numba" / "__init__.py")]
    assert run(code, cwd=tmp_path).split() == expected
