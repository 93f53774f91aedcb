"""Sub-quadratic sequence mixers: described once as mathematics, run by each device's own fast kernels.

mix = mixers.get("lattice")
y, state = mix(q, k, v, beta=beta)
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

# A checkout, installed or not, holds `backends` and `autotune` beside this folder; an installed wheel has them inside.
_here = Path(__file__).parent
if not (_here / "backends").exists() and (_here.parent / "backends" / "__init__.py").exists():
    __path__.append(str(_here.parent))

if TYPE_CHECKING:
    from mixers.attention import AttentionState as AttentionState
    from mixers.backend import backend_status as backend_status
    from mixers.ham import HAMState as HAMState
    from mixers.lattice import LatticeState as LatticeState
    from mixers.memory_caching import MemoryCachingState as MemoryCachingState
    from mixers.mixer import Mixer as Mixer
    from mixers.mixer import get as get
    from mixers.packing import Pack as Pack
    from mixers.packing import pack as pack
    from mixers.registry import get_spec as get_spec
    from mixers.registry import names as names
    from mixers.registry import register as register
    from mixers.result import Result as Result
    from mixers.selection import select as select
    from mixers.spec import MixerSpec as MixerSpec
    from mixers.ttt import TTTLinearState as TTTLinearState
    from mixers.ttt_mlp import TTTMLPState as TTTMLPState

# What is public and where it lives; each is imported when first asked for, so that `import mixers` stays instant.
_HOMES = {
    "AttentionState": "attention",
    "HAMState": "ham",
    "LatticeState": "lattice",
    "MemoryCachingState": "memory_caching",
    "Mixer": "mixer",
    "MixerSpec": "spec",
    "Pack": "packing",
    "Result": "result",
    "TTTLinearState": "ttt",
    "TTTMLPState": "ttt_mlp",
    "backend_status": "backend",
    "get": "mixer",
    "get_spec": "registry",
    "names": "registry",
    "pack": "packing",
    "register": "registry",
    "select": "selection",
}

__all__ = sorted(_HOMES)

__version__: str


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"mixers.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if name == "__version__":
        return _version()
    if name in ("nn", "autotune", "spec"):
        return importlib.import_module(f"mixers.{name}")
    raise AttributeError(f"module 'mixers' has no attribute {name!r}")


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("sequence-mixers")
    except metadata.PackageNotFoundError:
        return "0+checkout"  # never installed


def __dir__() -> list[str]:
    return [*__all__, "autotune", "nn"]
