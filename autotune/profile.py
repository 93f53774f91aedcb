"""What was measured, on disk: TOML, one table an entry, readable and mergeable.

Written atomically under a lock: what is there is read again, merged and replaced, so that many processes may tune at
once. A file that is damaged or of another format is set aside as ``.bad`` with one warning. Where nothing can be
written, entries live as long as the process.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
import platformdirs
import tomli
import tomli_w

log = logging.getLogger("mixers")

FORMAT = 1
PATIENCE = 60.0


@dataclass(frozen=True)
class Trial:
    """What became of one candidate.

    Attributes:
        name: ``backend/kernel``.
        config: its configuration.
        predicted: seconds, by the cost model.
        seconds: as measured, in the last round that it reached; 0 where it was not.
        error: its worst error over what is allowed; 0 where it was not compared.
        reason: why it was refused, or what became of it.
    """

    name: str
    config: Mapping[str, int]
    predicted: float
    seconds: float = 0.0
    error: float = 0.0
    reason: str = ""

    def text(self) -> str:
        """As one line of TOML."""
        numbers = (f"predicted {self.predicted:.3g}", f"took {self.seconds:.4g}", f"error {self.error:.3g}")
        return " | ".join((self.name, config_text(self.config), *numbers, self.reason))

    @classmethod
    def of(cls, line: str) -> "Trial":
        """From TOML.

        Raises:
            ValueError: it is no trial.
        """
        name, config, predicted, seconds, error, reason = line.split(" | ", 5)
        guess, took, wrong = (float(part.split()[1]) for part in (predicted, seconds, error))
        return cls(name, config_of(config), guess, took, wrong, reason)


@dataclass(frozen=True)
class Entry:
    """What is known about one pass of a problem on one device.

    Attributes:
        key: the problem and the pass, in words; see ``mixers.autotune.key``.
        heads: sequences × heads, rounded up to a power of two.
        device: its fingerprint, or the family of a shipped profile.
        stamp: of the backend whose kernel was chosen.
        backend: what the choice was made among: ``auto`` or a backend.
        kernel: ``backend/kernel``.
        config: its configuration.
        candidates: how many it was chosen from.
        shape: that it was measured at.
        seconds: its time.
        runner_up: the next best.
        runner_up_seconds: its time, 0 where there was none.
        default: what would run unmeasured.
        default_seconds: its time, 0 where it failed.
        error: the worst error over what is allowed.
        date: when, in UTC.
        versions: of compiler and libraries.
        drift: from the exact recurrence, of a chosen ``chunk_size``.
        trials: every candidate.
    """

    key: str
    heads: int
    device: str
    stamp: str
    backend: str
    kernel: str
    config: Mapping[str, int]
    candidates: int
    shape: str
    seconds: float
    runner_up: str
    runner_up_seconds: float
    default: str
    default_seconds: float
    error: float
    date: str
    versions: Mapping[str, str] = field(default_factory=dict)
    drift: float = 0.0
    trials: tuple[Trial, ...] = ()

    @property
    def id(self) -> str:
        """The name of its table."""
        return " | ".join((self.key, f"heads={self.heads}", self.backend, self.device, self.stamp))

    def table(self) -> dict[str, Any]:
        """As TOML holds it: one table, without tables in it."""
        found = {f.name: _rounded(getattr(self, f.name)) for f in dataclasses.fields(self)}
        found["config"] = config_text(self.config)
        found["versions"] = [f"{name} {version}" for name, version in self.versions.items()]
        found["trials"] = [t.text() for t in self.trials]
        return {name: value for name, value in found.items() if name not in _EMPTY or value != _EMPTY[name]}

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> "Entry":
        """From TOML.

        Raises:
            ValueError: a field is missing, unknown or of the wrong kind.
        """
        given = _EMPTY | dict(table)
        try:
            given["config"] = config_of(given["config"])
            given["versions"] = dict(line.split(" ", 1) for line in given["versions"])
            given["trials"] = tuple(Trial.of(line) for line in given["trials"])
            entry = cls(**given)
        except (TypeError, AttributeError, KeyError) as error:
            raise ValueError(str(error)) from None
        for f in dataclasses.fields(cls):
            value, kinds = getattr(entry, f.name), _KINDS.get(f.type, ())
            if kinds and not isinstance(value, kinds):
                raise ValueError(f"{f.name} is {value!r}")
        return entry


# What is left out where there is nothing to tell.
_EMPTY: dict[str, Any] = {
    "runner_up": "",
    "runner_up_seconds": 0.0,
    "default": "",
    "default_seconds": 0.0,
    "error": 0.0,
}
_EMPTY |= {"drift": 0.0, "versions": [], "trials": []}


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def config_text(config: Mapping[str, int]) -> str:
    """A configuration in words, as ``block_t=32 num_warps=4``."""
    return " ".join(f"{name}={value}" for name, value in config.items())


def config_of(text: str) -> dict[str, int]:
    """The configuration of ``config_text``.

    Raises:
        ValueError: it is none.
    """
    pairs = (word.partition("=") for word in text.split())
    return {name: int(value) for name, _, value in pairs}


_KINDS: dict[Any, tuple[type, ...]] = {str: (str,), int: (int,), float: (float, int)}


@dataclass(frozen=True)
class Profile:
    """Entries by id."""

    entries: Mapping[str, Entry] = field(default_factory=dict)

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> "Profile":
        """From entries; of several with one id the newest stays."""
        return cls().merged(entries)

    def merged(self, others: Iterable[Entry]) -> "Profile":
        """Together with others; the newer of two entries with one id stays."""
        found = dict(self.entries)
        for entry in others:
            known = found.get(entry.id)
            if known is None or known.date <= entry.date:
                found[entry.id] = entry
        return Profile(found)

    def about(self, key: str, device: str, heads: int = 0) -> list[Entry]:
        """Entries about a problem on a device, the nearest in heads first, and the newest of those."""
        found = [e for e in self._by_key.get(key, ()) if e.device == device]
        found.sort(key=lambda e: e.date, reverse=True)
        return sorted(found, key=lambda e: abs(e.heads.bit_length() - heads.bit_length()))

    @functools.cached_property
    def _by_key(self) -> dict[str, list[Entry]]:
        found: dict[str, list[Entry]] = {}
        for entry in self.entries.values():
            found.setdefault(entry.key, []).append(entry)
        return found

    def text(self) -> str:
        """As TOML."""
        tables = {name: entry.table() for name, entry in sorted(self.entries.items())}
        return "# Which kernel is fastest: measured by mixers.autotune. Safe to delete.\n" + tomli_w.dumps(
            {"format": FORMAT, "entry": tables}
        )

    @classmethod
    def parse(cls, text: str) -> "Profile":
        """From TOML.

        Raises:
            ValueError: it is no TOML, of another format, or an entry is damaged.
        """
        tables = tomli.loads(text)
        if tables.get("format") != FORMAT:
            raise ValueError(f"its format is {tables.get('format')!r}, and this is {FORMAT}")
        entries = tables.get("entry", {})
        if not isinstance(entries, dict) or not all(isinstance(t, dict) for t in entries.values()):
            raise ValueError("its entries are no tables")
        return cls.of(Entry.of(table) for table in entries.values())


def user_path() -> Path:
    """The user's profile: ``MIXERS_PROFILE``, or a file in the user's data folder."""
    given = os.environ.get("MIXERS_PROFILE")
    return Path(given) if given else Path(platformdirs.user_data_dir("sequence-mixers")) / "profile.toml"


# What was warned of already.
_warned: set[tuple[Path, str]] = set()


def _warn(path: Path, kind: str, message: str) -> None:
    if (path, kind) not in _warned:
        _warned.add((path, kind))
        log.warning("%s", message)


def load(path: Path) -> Profile:
    """The profile in a file, empty where there is none; a bad file is set aside."""
    try:
        return Profile.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Profile()
    except OSError as error:
        _warn(path, "read", f"profile {path} cannot be read ({error.strerror}); going on without it")
    except ValueError as error:
        _set_aside(path, str(error))
    return Profile()


def _set_aside(path: Path, reason: str) -> None:
    """Rename a bad file, unless somebody has mended it meanwhile."""
    try:
        with _lock(path):
            _current(path)
    except OSError as error:
        _warn(path, "bad", _BAD.format(path, reason.splitlines()[0], f"left where it is ({error.strerror})"))


_BAD = "profile {} is damaged or of another version ({}): {}"


def _lock(path: Path) -> Any:
    """A lock on a file, released when this process ends, however it does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return filelock.FileLock(str(path) + ".lock", timeout=PATIENCE)


def save(path: Path, entries: Iterable[Entry]) -> bool:
    """Merge entries into a file; False, after one warning, where it cannot be written."""
    try:
        with _lock(path):
            _replace(path, _current(path).merged(entries).text())
    except OSError as error:  # filelock's Timeout is one of them
        reason = error.strerror or type(error).__name__
        _warn(path, "write", f"profile {path} cannot be written ({reason}); what was measured is known to this process")
        return False
    return True


def _current(path: Path) -> Profile:
    """What is in a file whose lock is held; a bad one is set aside, as ``.bad``."""
    try:
        return Profile.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Profile()
    except ValueError as error:
        target = path.with_name(path.name + ".bad")
        if target.exists():
            target = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.bad")
        os.replace(path, target)
        _warn(path, "bad", _BAD.format(path, str(error).splitlines()[0], f"set aside as {target.name}"))
        return Profile()


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
