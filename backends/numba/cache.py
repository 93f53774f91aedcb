"""Compiled kernels on disk, keyed by everything that can change them.

Numba's own cache watches one source file, so an edited helper in another file leaves its callers stale, and it raises
where it cannot write. Here a kernel is stored under a stamp of every file of this folder, the versions of Numba and
llvmlite and the CPU; a folder that cannot be written gives way to a temporary one, and a damaged file is a miss.
"""

import contextlib
import functools
import hashlib
import logging
import os
import pickle
import tempfile
import uuid
from pathlib import Path

import llvmlite
import numba
import platformdirs
from llvmlite import binding
from numba.core import caching, compiler, serialize
from numba.core.runtime import rtsys

log = logging.getLogger("mixers")

HOME = Path(__file__).parent


def stamp(home: Path = HOME) -> str:
    """A digest of the sources in ``home``, of the compiler and of the CPU."""
    digest = hashlib.sha256()
    for file in sorted(home.rglob("*.py")):
        digest.update(file.relative_to(home).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    machine = (binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten())
    digest.update(repr((numba.__version__, llvmlite.__version__, machine)).encode())
    return digest.hexdigest()[:20]


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


@functools.cache
def folder() -> Path:
    """Where compiled kernels live: the user's cache folder, else a private temporary one."""
    mine = Path(platformdirs.user_cache_dir("sequence-mixers")) / "numba" / stamp()
    if _writable(mine):
        return mine
    shared = (
        Path(tempfile.gettempdir()) / f"sequence-mixers-{os.getuid() if hasattr(os, 'getuid') else 'user'}" / stamp()
    )
    # Compiled code is code: a folder that somebody else made ahead of us is not to be trusted.
    if _writable(shared) and (not hasattr(os, "getuid") or shared.parent.stat().st_uid == os.getuid()):
        return shared
    return Path(tempfile.mkdtemp(prefix="sequence-mixers-"))


class DiskCache(caching._Cache):
    """The overloads of one function on disk, under its name and signature."""

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def cache_path(self) -> str:
        return str(folder())

    def _file(self, signature) -> Path:
        digest = hashlib.sha256(repr(signature).encode()).hexdigest()[:16]
        return folder() / f"{self._name}.{digest}.kernel"

    def load_overload(self, sig, target_context):
        # Of all that Numba loads before it compiles, compiled code needs its allocator alone; the rest takes 0.5 s.
        rtsys.initialize(target_context)
        try:
            payload = pickle.loads(self._file(sig).read_bytes())
            return compiler.CompileResult._rebuild(target_context, *payload)
        except Exception:  # missing, damaged or truncated: whatever it is, compiling again mends it
            log.info("compiling %s, once for this machine; kept in %s", self._name, folder())
            return None

    def save_overload(self, sig, data) -> None:
        file = self._file(sig)
        part = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
        with contextlib.suppress(OSError):  # a full disk costs a compilation next time, nothing more
            part.write_bytes(serialize.dumps(data._reduce()))
            os.replace(part, file)

    def enable(self) -> None: ...
    def disable(self) -> None: ...
    def flush(self) -> None: ...
