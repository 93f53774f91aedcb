"""What a user would write or pick instead of this library.

One file a library. A peer gets the same inputs as ours, starts from the mixer's first state, and is checked against the
specification in ``test_peers.py``.
"""

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.case import Case
from benchmarks.inputs import Arrays

Run = Callable[[], Any]
"""One pass: ``(y, state)``, or ``(y, {name: gradient})`` with a backward."""

_MODULES = {"torch": "torch_eager", "jax": "jax_scan", "fla": "fla"}


@dataclass(frozen=True)
class Peer:
    """Another way to compute a mixer.

    Attributes:
        name: as the report prints it.
        version: of the library that runs it.
        mixer: the mixer that it computes.
        passes: the passes that it can do.
        build: arrays handed over and code compiled; what it returns is what gets timed.
        refuses: why it cannot run a case; empty where it can.
        devices: where it runs.
    """

    name: str
    version: str
    mixer: str
    passes: tuple[str, ...]
    build: Callable[[Case, Arrays], Run]
    refuses: Callable[[Case], str]
    devices: tuple[str, ...] = ("cpu", "cuda")


def find(mixer: str, device: str = "cpu") -> list[Peer]:
    """Every peer of a mixer whose library is installed and runs on a device."""
    found = []
    for library, module in _MODULES.items():
        if importlib.util.find_spec(library) is not None:
            peers = importlib.import_module(f"benchmarks.peers.{module}").peers(device)
            found += [peer for peer in peers if peer.mixer == mixer and device in peer.devices]
    return found


def fitting(case: Case) -> list[Peer]:
    """The peers that can run a case."""
    return [p for p in find(case.mixer, case.device) if case.kind in p.passes and not p.refuses(case)]


def build(case: Case, arrays: Arrays, word: str = "") -> dict[str, Run]:
    """Every peer that runs a case and whose name holds a word, ready to time.

    One that raises on its first run is left out with a warning: a library may refuse a device or a compiler.
    """
    runs = {}
    for peer in fitting(case):
        if word in peer.name:
            run = peer.build(case, arrays)
            try:
                run()
            except (RuntimeError, NotImplementedError) as error:
                warnings.warn(f"{peer.name} does not run {case.mixer} here: {error}", stacklevel=2)
            else:
                runs[peer.name] = run
    return runs


def kept_states(case: Case) -> float:
    """Bytes of one state a token: what a differentiated loop over tokens keeps, several times over."""
    return 4.0 * case.batch * case.length * case.heads * case.key_dim * case.value_dim
