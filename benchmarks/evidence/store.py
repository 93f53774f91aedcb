"""Results as JSON, written after every run: what is done when time ends is kept, and is not done again."""

import importlib.metadata
import itertools
import json
import os
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parents[1] / "results" / "evidence"

Row = dict[str, Any]


class Store:
    """One experiment's file.

    Args:
        path: the file; it may hold what earlier calls found.
        settings: what every run has in common, as JSON.

    Attributes:
        rows: what each run is (mixer, seed, …), what it found, and under ``on`` which of ``machines`` it ran on.

    Raises:
        ValueError: the file was made with other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """See the class."""
        self.path, self.settings = path, dict(settings)
        known = json.loads(path.read_text()) if path.exists() else {}
        if known and known["settings"] != json.loads(json.dumps(self.settings)):
            raise ValueError(
                f"{path} was made with other settings: {known['settings']}; delete it, or give another --out"
            )
        self.machines: list[Row] = [*known.get("machines", ()), machine()]
        self.rows: list[Row] = known.get("runs", [])
        self.failures: list[Row] = []

    def has(self, identity: Mapping[str, Any]) -> bool:
        """Whether a run is known."""
        return any(identity.items() <= row.items() for row in self.rows)

    def add(self, row: Row) -> None:
        """Keep a run."""
        self.rows.append(row | {"on": len(self.machines) - 1})
        self._write()

    def fail(self, identity: Mapping[str, Any], reason: str) -> None:
        """Keep why a run came to nothing."""
        self.failures.append(dict(identity) | {"reason": reason})
        self._write()

    def _write(self) -> None:
        """All of it, or nothing."""
        found = {"machines": self.machines, "settings": self.settings, "runs": self.rows, "failures": self.failures}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(found, indent=1, default=_plain) + "\n")
        os.replace(part, self.path)


def _plain(value: Any) -> Any:
    return value.tolist()


def machine() -> Row:
    """What runs, on what, when."""
    versions = {}
    for name in ("sequence-mixers", "torch", "triton", "numba", "numba-cuda"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    size = "".join(f" --size {value}" for word, value in itertools.pairwise(sys.argv) if word == "--size")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"python -m benchmarks.evidence.{Path(sys.argv[0]).stem}{size}",
        "gpu": gpu,
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
    }
