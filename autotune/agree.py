"""Under ``torch.distributed`` all ranks believe what rank 0 knows, so that they run the same kernels.

Rank 0 puts its user's profile into the group's store when it makes its first plan, and the others read it when they
make theirs. No collective is entered: ranks that plan other problems, or none, hold nobody up. What is then chosen
follows from the profile, the problem and the device alone.
"""

import datetime
import logging
import sys
from typing import Any

from mixers.autotune.profile import Profile

log = logging.getLogger("mixers")

PATIENCE = datetime.timedelta(seconds=60)


def group() -> Any:
    """``torch.distributed`` where a group of several ranks has been made; None otherwise."""
    torch = sys.modules.get("torch")
    distributed = getattr(torch, "distributed", None)
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed if distributed.get_world_size() > 1 else None


def first() -> bool:
    """Whether this process decides: rank 0, or one that is alone."""
    distributed = group()
    return distributed is None or distributed.get_rank() == 0


def shared(profile: Profile, topic: str = "profile") -> Profile:
    """Rank 0's profile on every rank."""
    distributed = group()
    if distributed is None:
        return profile
    store, name = distributed.distributed_c10d._get_default_store(), f"mixers/{topic}"
    if distributed.get_rank() == 0:
        store.set(name, profile.text())
        return profile
    try:
        store.wait([name], PATIENCE)
    except Exception as error:  # the store's own kinds of errors differ between versions
        log.warning("rank 0 has told no profile within %s (%s); this rank goes by its own", PATIENCE, error)
        return profile
    return Profile.parse(store.get(name).decode())
