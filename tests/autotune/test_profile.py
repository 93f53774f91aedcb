"""The file of a profile: nothing is lost, nothing breaks a program."""

import dataclasses
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mixers.autotune import commands, knowledge
from mixers.autotune.profile import Entry, Profile, Trial, load, save, user_path
from typer.testing import CliRunner

from mixers.cli import app

ENTRY = Entry(
    key="lattice chunk_size=16 forward float32 host K=64 V=64 beta[BTH]",
    heads=8,
    device="a CPU, 2 cores",
    stamp="0123abcd",
    backend="auto",
    kernel="numba/lattice.chunk",
    config={"block": 8, "parts": 2},
    candidates=3,
    shape="B=1 T=1024 H=8 K=64 V=64",
    seconds=0.00125,
    runner_up="numba/lattice.chunk block=4 parts=2",
    runner_up_seconds=0.0014,
    default="numba/lattice.chunk block=4 parts=2",
    default_seconds=0.0014,
    error=0.25,
    date="2026-11-21T12:00:00.000000Z",
    versions={"numba": "0.68.1"},
    trials=(Trial("cuda", {}, 0.0, reason="no driver | found"), Trial("numba/x", {"block": 4}, 0.001, 0.0014, 0.5)),
)


def test_an_entry_survives_its_text() -> None:
    profile = Profile.of([ENTRY])
    assert Profile.parse(profile.text()) == profile
    assert profile.text().count("[") == profile.text().count("]")
    assert 'kernel = "numba/lattice.chunk"' in profile.text()
    assert 'config = "block=8 parts=2"' in profile.text()


def test_the_newer_of_two_entries_stays() -> None:
    newer = dataclasses.replace(ENTRY, kernel="numba/other", date="2026-12-01")
    for entries in ([ENTRY, newer], [newer, ENTRY]):
        assert Profile.of(entries).entries[ENTRY.id].kernel == "numba/other"


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("format = 1", "format = 2"),
        lambda text: text.replace("heads = 8", 'heads = "many"'),
        lambda text: text.replace("seconds", "minutes"),
        lambda text: "\x00" + text,
        lambda text: "entry = 3\nformat = 1",
        lambda text: '[project]\nname = "another program\'s"',
        lambda text: text.encode("utf-16").decode("latin-1"),
    ],
    ids=["truncated", "version", "kind", "field", "bytes", "shape", "foreign", "encoding"],
)
def test_a_bad_file_is_set_aside_with_one_warning(
    profile: Path, caplog: pytest.LogCaptureFixture, damage: object
) -> None:
    bad = damage(Profile.of([ENTRY]).text())  # type: ignore[operator]
    profile.write_text(bad)
    with caplog.at_level(logging.WARNING, "mixers"):
        assert load(profile) == Profile()
        assert load(profile) == Profile()
    assert len(caplog.records) == 1
    assert "set aside as profile.toml.bad" in caplog.text
    assert (profile.parent / "profile.toml.bad").read_text() == bad
    assert save(profile, [ENTRY])
    assert load(profile) == Profile.of([ENTRY])


def test_a_bad_file_that_is_written_to_is_set_aside_too(profile: Path) -> None:
    for number in range(2):
        profile.write_text("no profile")
        assert save(profile, [ENTRY])
        assert len(list(profile.parent.glob("*.bad"))) == number + 1
        assert load(profile) == Profile.of([ENTRY])


TUNES = """
import sys
from mixers.autotune import profile, tuner
from mixers.autotune.ahead import Ahead
from mixers.autotune.key import FORWARD
from mixers.autotune.workshop import Workshop
import mixers

def answer(self, do, name, config, patience, **rest):
    return {"seconds": 0.001, "error": 0.5, "reason": ""}

Ahead.start = Ahead.compare = Workshop.start = Workshop.open = lambda *rest: None
Workshop.ask = answer
spec, number = mixers.get_spec("linear_attention"), int(sys.argv[1])
for width in (8, 16, 24):
    shape = (1, 32, 1, width, 8 * (number + 1))
    problem = tuner.problem_of(spec, shape, "float32", "numpy", "cpu", False, (), spec.resolve({}))
    (entry,) = tuner.tune_problem(problem)
    assert entry.id in profile.load(profile.user_path()).entries
"""


def test_eight_processes_that_tune_at_once_lose_nothing(profile: Path) -> None:
    """Each tunes three problems; what their workers would measure is made up."""
    profile.write_text("no profile")  # and whoever comes first sets this aside
    running = [subprocess.Popen([sys.executable, "-c", TUNES, str(n)], stderr=subprocess.DEVNULL) for n in range(8)]
    assert [process.wait(120) for process in running] == [0] * 8
    found = {(e.key.split()[-2], e.key.split()[-1]) for e in load(profile).entries.values()}
    assert found == {(f"K={width}", f"V={8 * n}") for width in (8, 16, 24) for n in range(1, 9)}
    assert not list(profile.parent.glob(".profile*"))
    assert (profile.parent / "profile.toml.bad").read_text() == "no profile"


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="folders cannot be made read-only here")
def test_a_folder_that_cannot_be_written_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever runs this: a file stands where the folder should be, which even root cannot write to."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MIXERS_PROFILE", str(tmp_path / "file" / "profile.toml"))
    knowledge.forget()
    with caplog.at_level(logging.WARNING, "mixers"):
        assert not save(user_path(), [ENTRY])
        assert not save(user_path(), [ENTRY])
        knowledge.learn([ENTRY])
    assert "cannot be written" in caplog.text
    assert len([r for r in caplog.records if "cannot be written" in r.message]) == 1
    assert knowledge.user() == Profile.of([ENTRY])


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "300"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_the_command_tunes_and_shows_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def tune(name: str, shape: tuple[int, ...], **rest: Any) -> list[Entry]:
        rest["report"]("forward: numba/lattice.chunk", 1, 2)
        asked.append((name, shape, rest["chunk_size"], rest["parts"]))
        return [ENTRY]

    monkeypatch.setattr(commands, "tune", tune)
    code, text = run("tune", "lattice", "--shape", "1,1024,8,64,64", "-o", "chunk_size=16")
    assert (code, asked) == (0, [("lattice", (1, 1024, 8, 64, 64), 16, ("forward", "backward"))])
    for word in (ENTRY.key, "numba/lattice.chunk block=8 parts=2", "1.25", "1.4", f"remembered in {user_path()}"):
        assert word in text.replace("\n", "")
    assert run("tune", "latice")[0] == 2
    monkeypatch.undo()
    monkeypatch.setenv("MIXERS_TUNE", "off")
    code, text = run("tune", "lattice")
    assert code == 2 and "MIXERS_TUNE=off" in text


def test_commands_show_merge_and_export(profile: Path, tmp_path: Path) -> None:
    other, target = tmp_path / "other.toml", tmp_path / "exported.toml"
    other.write_text(Profile.of([ENTRY]).text())
    code, text = run("profile", "merge", str(other))
    assert (code, "1 entries merged" in text) == (0, True)
    code, text = run("profile", "show")
    assert code == 0
    for word in ("lattice chunk_size=16 forward", "numba/lattice.chunk block=8 parts=2", "1.25", "2026-11-21"):
        assert word in text
    assert run("profile", "export", str(target))[0] == 0
    assert Profile.parse(target.read_text()) == Profile.of([ENTRY])
    assert run("profile", "export", str(target), "--ship")[0] == 0
    (shipped,) = Profile.parse(target.read_text()).entries.values()
    assert (shipped.device.startswith("generic "), shipped.trials, shipped.stamp) == (True, (), "")
    other.write_text("nothing")
    assert run("profile", "merge", str(other))[0] == 2
