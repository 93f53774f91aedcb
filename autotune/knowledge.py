"""What is known, in the order in which it is believed.

    explicit configuration  >  with using(profile)  >  the user's profile  >  a shipped profile  >  the heuristic

The user's own measurements count while the compiler, the libraries and the kernels' sources are those that were
measured. A shipped profile is for a family of devices; the newest kernels may be newer than it is.
"""

import contextlib
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mixers.autotune import agree
from mixers.autotune.device import device_of_kind, stamp_of
from mixers.autotune.key import key_of
from mixers.autotune.profile import Entry, Profile, load, user_path

from mixers.backend import installed
from mixers.problem import Problem

SHIPPED = Path(__file__).parent / "profiles"


@dataclass(frozen=True)
class Fact:
    """An entry, where it comes from, and why it may not be believed.

    Attributes:
        entry: what was measured.
        source: where that is written.
        doubt: why it does not count; empty where it does.
        far: whether that is for the number of heads alone.
    """

    entry: Entry
    source: str
    doubt: str = ""
    far: bool = False


# Profiles that callers named, the innermost last; and how often what is known has changed.
_using: list[Profile] = []
_measured = Profile()
_generation = 0


def generation() -> int:
    """A number that changes whenever what is known does: plans made before are made anew."""
    return _generation


def _changed() -> None:
    global _generation
    _generation += 1


@contextlib.contextmanager
def using(profile: Profile | Path | str) -> Iterator[Profile]:
    """Let a profile decide for as long as the block lasts, in the whole process.

    A backward, and a forward that is computed again in one, keep to the kernel of their forward, in the block or not.

    Args:
        profile: one, or the path of a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or of another version.
    """
    chosen = profile if isinstance(profile, Profile) else Profile.parse(Path(profile).read_text(encoding="utf-8"))
    _using.append(chosen)
    _changed()
    try:
        yield chosen
    finally:
        # By identity: blocks of several threads may end in another order than they began.
        del _using[next(i for i in reversed(range(len(_using))) if _using[i] is chosen)]
        _changed()


@functools.lru_cache(maxsize=8)
def _stored(path: Path, alone: bool) -> Profile:
    """The user's profile as it was when it was first asked for; another process's news wait for the next start."""
    return load(path) if alone else agree.shared(load(path))


def user() -> Profile:
    """The user's profile, rank 0's where there are several, with what this process has measured."""
    return _stored(user_path(), agree.group() is None).merged(_measured.entries.values())


@functools.cache
def _shipped(family: str) -> Profile:
    """The shipped profile of a family of devices; empty where there is none."""
    found = Profile()
    for file in sorted(SHIPPED.glob("*.toml")):
        text = file.read_text(encoding="utf-8")
        if f"device = {family!r}".replace("'", '"') in text:
            found = found.merged(Profile.parse(text).entries.values())
    return found


def forget() -> None:
    """Read the user's profile again when it is next asked for."""
    global _measured
    _measured = Profile()
    _stored.cache_clear()
    _changed()


def learn(entries: Iterable[Entry]) -> None:
    """Believe entries, for as long as this process lives."""
    global _measured
    _measured = _measured.merged(entries)
    _changed()


def measured() -> Iterable[Entry]:
    """What this process has measured."""
    return _measured.entries.values()


# What was measured serves as many heads, in powers of two, more or fewer.
REACH = 2


def facts(problem: Problem, part: str) -> Iterator[Fact]:
    """Everything that is known about a pass of a problem, the most believed first."""
    device, key, heads = device_of_kind(problem.device), key_of(problem, part), problem.parallel
    for profile in reversed(_using):
        for entry in profile.about(key, device.id, heads) + profile.about(key, device.family, heads):
            yield _fact(entry, "the profile in use", heads, _doubt(entry) if entry.device == device.id else "")
    for entry in user().about(key, device.id, heads):
        yield _fact(entry, f"the user's profile, {entry.date[:10]}", heads, _doubt(entry))
    for entry in _shipped(device.family).about(key, device.family, heads):
        yield _fact(entry, f"the shipped profile of {device.family}, {entry.date[:10]}", heads)


def _fact(entry: Entry, source: str, heads: int, doubt: str = "") -> Fact:
    apart = abs(entry.heads.bit_length() - heads.bit_length())
    if doubt or not apart:
        return Fact(entry, source, doubt)
    source = f"{source}, for {entry.heads} sequences × heads"
    if apart <= REACH:
        return Fact(entry, source)
    return Fact(entry, source, f"measured for {entry.heads} sequences × heads, and these are {heads}", far=True)


def _doubt(entry: Entry) -> str:
    """Why an entry is out of date."""
    backend = installed().get(entry.kernel.partition("/")[0])
    if backend is None:
        return f"{entry.kernel}'s backend is not installed"
    now = stamp_of(backend)
    if entry.stamp == now.id:
        return ""
    for name, version in now.versions:
        if entry.versions.get(name, version) != version:
            return f"measured with {name} {entry.versions[name]}, and this is {version}"
    return f"the kernels of {backend.name} have changed since it was measured"
