"""Profiles that are shipped: each can be read, and names problems, kernels and configurations that there are."""

import ast
import dataclasses
from pathlib import Path

import pytest
from mixers.autotune import knowledge
from mixers.autotune.device import device_of_kind
from mixers.autotune.key import BACKWARD, FORWARD, key_of
from mixers.autotune.policy import Asked, choose
from mixers.autotune.profile import Entry, Profile
from mixers.autotune.tuner import problem_of

import mixers
from mixers.backend import installed
from mixers.problem import Problem


def problem_named(entry: Entry) -> Problem:
    """The problem that an entry's words are about."""
    words = entry.key.split()
    at = next(i for i, word in enumerate(words) if word in (FORWARD, BACKWARD, "step"))
    options = {name: value for name, _, value in (word.partition("=") for word in words[1:at])}
    spec = mixers.get_spec(words[0])
    chosen = {o.name: _value(options[o.name]) for o in spec.options if o.name in options}
    library, device = ("numpy", "cpu") if words[at + 2] == "host" else (words[at + 2], words[at + 3])
    given = tuple(word.partition("[")[0] for word in words if "[" in word)
    b, t, h, k, v = (int(word.partition("=")[2]) for word in entry.shape.split())
    resolved = spec.resolve(chosen)
    return problem_of(spec, (b, t, h, k, v), words[at + 1], library, device, words[at] == BACKWARD, given, resolved)


def _value(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def check(entry: Entry, families: set[str]) -> None:
    """Refuse an entry that nothing on its device could be chosen by."""
    problem, part = problem_named(entry), BACKWARD if f" {BACKWARD} " in entry.key else FORWARD
    assert key_of(problem, part) == entry.key
    assert problem.parallel == entry.heads
    assert entry.device in families
    assert (entry.stamp, entry.trials) == ("", ())  # for a family, without what lost
    assert entry.versions and entry.date and 0 < entry.seconds <= max(entry.default_seconds, entry.seconds)
    backend, _, name = entry.kernel.partition("/")
    assert backend in installed()
    try:
        kernels = {k.name: k for k in installed()[backend].kernels()}
    except ImportError:  # another session has its libraries
        return
    assert name in kernels and problem.spec.name in kernels[name].mixers
    assert dict(entry.config) in [dict(c) for c in kernels[name].configs(problem)]


def shipped() -> list[Path]:
    """What lies in the package."""
    return sorted(knowledge.SHIPPED.glob("*"))


def test_what_is_shipped_can_be_chosen_by() -> None:
    """Every file is a profile of this format for one family, and its entries name what there is."""
    for path in shipped():
        profile = Profile.parse(path.read_text(encoding="utf-8"))
        families = {entry.device for entry in profile.entries.values()}
        assert path.suffix == ".toml"
        assert len(families) == 1, f"{path.name} is for {families}"
        for entry in profile.entries.values():
            check(entry, families)


def entry_of(part: str) -> Entry:
    """What shipping writes about a small problem that was measured here."""
    spec = mixers.get_spec("lattice")
    options = spec.resolve({"chunk_size": 16})
    problem = problem_of(spec, (1, 64, 2, 16, 16), "float32", "numpy", "cpu", part == BACKWARD, (), options)
    chosen = choose(problem, Asked()).candidate
    return Entry(
        key=key_of(problem, part),
        heads=problem.parallel,
        device=device_of_kind("cpu").family,
        stamp="",
        backend="auto",
        kernel=chosen.name,
        config=dict(chosen.config or {}),
        candidates=3,
        shape="B=1 T=64 H=2 K=16 V=16",
        seconds=0.001,
        runner_up="",
        runner_up_seconds=0.0,
        default=chosen.name,
        default_seconds=0.001,
        error=0.5,
        date="2026-11-21T12:00:00.000000Z",
        versions={"numba": "0.68.1"},
    )


@pytest.mark.parametrize("part", [FORWARD, BACKWARD])
def test_the_check_passes_what_shipping_writes_and_refuses_what_is_stale(
    part: str,
) -> None:
    entry = entry_of(part)
    (again,) = Profile.parse(Profile.of([entry]).text()).entries.values()
    check(again, {entry.device})
    stale = (
        {"kernel": "numba/lattice.gone"},
        {"kernel": "gone/lattice.chunk"},
        {"config": {"gone": 1}},
        {"key": entry.key.replace("chunk_size=16", "chunk_size=8 gone=1")},
        {"key": entry.key.replace("float32 host", "float32 host gone[BTH]")},
        {"heads": 64},
        {"device": "another device"},
        {"stamp": "0123abcd"},
        {"versions": {}},
    )
    for change in stale:
        with pytest.raises((AssertionError, ValueError)):
            check(dataclasses.replace(entry, **change), {entry.device})
