"""What was decided in this process, as data."""

import collections
from dataclasses import dataclass

from mixers.autotune.profile import Trial

from mixers.backend import Config

MOST = 4096


@dataclass(frozen=True)
class Decision:
    """A choice and its grounds.

    Attributes:
        problem: the call, in words.
        part: ``forward``, ``backward`` or ``chunk_size``.
        chosen: ``backend/kernel``; empty where nothing could be chosen.
        config: its configuration.
        source: where the knowledge came from.
        measured: whether it was measured now.
        trials: every candidate that was tried or refused.
    """

    problem: str
    part: str
    chosen: str
    config: Config
    source: str
    measured: bool = False
    trials: tuple[Trial, ...] = ()


log: collections.deque[Decision] = collections.deque(maxlen=MOST)
"""Decisions of this process, the newest last."""
