"""A profile of its own for every test, and a backend that fails."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mixers.autotune import journal, knowledge

from mixers.backend import installed


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The tuner tunes CPU kernels here: once where those are checked, and once beside torch.

    What is shipped for kernels is checked wherever these can be imported.
    """
    backends, shipped = config.getoption("--backend"), collection_path.name == "test_shipped.py"
    return True if backends and "numba" not in backends and not shipped else None


@pytest.fixture(autouse=True)
def profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's profile of this test, not there yet."""
    path = tmp_path / "profile.toml"
    monkeypatch.setenv("MIXERS_PROFILE", str(path))
    knowledge.forget()
    journal.log.clear()
    yield path
    knowledge.forget()


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of shipped profiles of this test's own, with none in it."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    monkeypatch.setattr(knowledge, "SHIPPED", folder)
    knowledge._shipped.cache_clear()
    yield folder
    knowledge._shipped.cache_clear()


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``backend="faulty"``, found as any other package's is, by this process and by the tuner's worker."""
    info = tmp_path / "site" / "faulty-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mixers.backends]\nfaulty = faulty:backend\n")
    monkeypatch.setattr(sys, "path", [str(info.parent), str(Path(__file__).parent), *sys.path])
    installed.cache_clear()
    yield
    installed.cache_clear()
