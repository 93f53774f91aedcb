"""What a measurement depends on: the device, and the compiler and sources of the backend that ran there."""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import inspect
import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from mixers.backend import Backend

VECTORS = ("neon", "asimd", "sve", "sse4_2", "avx", "avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "amx_tile")

# Attributes of a device, as the CUDA driver numbers them.
_PROCESSORS, _MAJOR, _MINOR = 16, 75, 76


@dataclass(frozen=True)
class Device:
    """A device that never changes its fingerprint while its hardware and driver stay.

    Attributes:
        kind: ``cpu``, ``cuda`` or ``tpu``.
        name: the maker's.
        processors: cores that this process may use, or multiprocessors.
        detail: what else decides speed: vector extensions; compute capability, memory and driver.
    """

    kind: str
    name: str
    processors: int
    detail: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """The fingerprint, in words."""
        unit = "cores" if self.kind == "cpu" else "multiprocessors"
        return ", ".join((self.name, f"{self.processors} {unit}", *self.detail))

    @property
    def family(self) -> str:
        """What a shipped profile is for: a GPU by name and capability, a CPU by architecture."""
        if self.kind == "cpu":
            return f"generic {platform.machine().lower().replace('amd64', 'x86_64')} CPU"
        return ", ".join((self.name, *self.detail[:1]))


def device_of_kind(kind: str) -> Device:
    """The device of a kind that this process uses: the current GPU where there are several."""
    return _cpu(cores()) if kind == "cpu" else _gpu(_current_gpu()) if kind == "cuda" else Device(kind, kind, 1)


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _cpu(cores: int) -> Device:
    name, flags = platform.processor() or platform.machine(), set[str]()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            field, _, value = (part.strip() for part in line.partition(":"))
            if field == "model name":
                name = value
            elif field in ("flags", "Features"):
                flags |= set(value.split())
                break
    found = " ".join(v for v in VECTORS if v in flags)
    return Device("cpu", name, cores, (found,) if found else ())


@functools.cache
def _driver() -> Any:
    """The CUDA driver's library; None where there is none."""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        with contextlib.suppress(OSError):
            found = ctypes.CDLL(name)
            return found if found.cuInit(0) == 0 else None
    return None


def _current_gpu() -> int:
    """The ordinal of the current context; 0 where there is none yet."""
    number = ctypes.c_int(0)
    driver = _driver()
    return number.value if driver is not None and driver.cuCtxGetDevice(ctypes.byref(number)) == 0 else 0


@functools.cache
def _gpu(ordinal: int) -> Device:
    driver = _driver()
    if driver is None:
        return Device("cuda", "unknown GPU", 1)
    handle, number, memory, name = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(128)
    driver.cuDeviceGet(ctypes.byref(handle), ordinal)

    def attribute(which: int) -> int:
        driver.cuDeviceGetAttribute(ctypes.byref(number), which, handle)
        return number.value

    driver.cuDeviceGetName(name, len(name), handle)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), handle)
    capability = f"sm_{attribute(_MAJOR)}{attribute(_MINOR)}"
    processors = attribute(_PROCESSORS)
    driver.cuDriverGetVersion(ctypes.byref(number))
    cuda = f"CUDA {number.value // 1000}.{number.value % 1000 // 10}"
    detail = (capability, f"{memory.value >> 30} GiB", f"driver {_driver_version() or cuda}")
    return Device("cuda", name.value.decode(), processors, detail)


def _driver_version() -> str:
    with contextlib.suppress(OSError, IndexError):
        return Path("/sys/module/nvidia/version").read_text().strip()
    return ""


@dataclass(frozen=True)
class Stamp:
    """What a backend was when it was measured.

    Attributes:
        versions: of its compiler and libraries, as sorted pairs.
        sources: a digest of its files.
    """

    versions: tuple[tuple[str, str], ...]
    sources: str

    @property
    def id(self) -> str:
        """A short digest of both."""
        return hashlib.sha256(repr((self.versions, self.sources)).encode()).hexdigest()[:8]


_stamps: dict[str, Stamp] = {}


def stamp_of(backend: Backend) -> Stamp:
    """The versions and sources of a backend."""
    if backend.name not in _stamps:
        libraries = getattr(backend, "libraries", (backend.name,))
        versions = tuple(sorted((name, _version(name)) for name in libraries))
        _stamps[backend.name] = Stamp(versions, _sources(backend))
    return _stamps[backend.name]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        # A wheel on the path without its metadata still tells.
        found = importlib.util.find_spec(name.replace("-", "_"))
        return "none" if found is None else str(getattr(importlib.import_module(found.name), "__version__", "unknown"))


def _sources(backend: Backend) -> str:
    digest, file = hashlib.sha256(), Path(inspect.getfile(type(backend)))
    for source in sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]:
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:12]
