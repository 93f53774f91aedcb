"""Which kernel runs a problem, with which configuration: measured, guarded, remembered.

mixers.autotune.tune("lattice", (1, 1024, 8, 64, 64))      measure, and remember in the user's profile
with mixers.autotune.using(profile): ...                   let a profile decide
mixers.autotune.log                                        what was decided in this process, and why

Light to import: what measures loads when something is to be measured.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixers.autotune.journal import log as log
    from mixers.autotune.knowledge import using as using
    from mixers.autotune.profile import Entry as Entry
    from mixers.autotune.profile import Profile as Profile
    from mixers.autotune.tuner import tune as tune

_HOMES = {"Entry": "profile", "Profile": "profile", "log": "journal", "tune": "tuner", "using": "knowledge"}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"mixers.autotune.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'mixers.autotune' has no attribute {name!r}")
