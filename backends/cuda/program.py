"""A GPU program: built from constants, compiled once for a machine, launched with plain numbers.

    forward = Program("delta_forward", "build")
    forward(like, constants, blocks, threads, (addresses and strides …), (floats …))

``build(**constants)`` of the named module returns the kernel, a Python function whose arguments are 64-bit whole
numbers (addresses, strides, lengths), then float64s: so a new length, batch or layout never compiles anything. Machine
code is kept on disk under a stamp of this folder's sources and the compilers' versions; where it is found, Numba is
not even imported. In the simulator the same function runs as it is.
"""

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import logging
import os
import re
import struct
import sys
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import platformdirs

from mixers.arrays.gpu import enter
from mixers.spec import Array

from . import SIMULATED, driver
from .arrays import device_of, stream_of

log = logging.getLogger("mixers")

HOME = Path(__file__).parent

# Constants by name; a kernel is compiled for each set of them.
Constants = tuple[tuple[str, Any], ...]

# A simulated block waits for its threads by asking them again and again, and each must get its turn.
_TURN = 1e-5


@functools.cache
def stamp(home: Path = HOME) -> str:
    """A digest of the sources in ``home`` and of the compilers."""
    digest = hashlib.sha256()
    for file in sorted(home.rglob("*.py")):
        digest.update(file.relative_to(home).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    for package in ("numba", "numba-cuda", "llvmlite"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            digest.update(f"{package} {importlib.metadata.version(package)}\0".encode())
    return digest.hexdigest()[:20]


@functools.cache
def folder() -> Path:
    """Where machine code lives: the user's cache folder, else one for this process."""
    mine = Path(platformdirs.user_cache_dir("sequence-mixers")) / "cuda" / stamp()
    try:
        mine.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=mine).close()
    except OSError:
        return Path(tempfile.mkdtemp(prefix="sequence-mixers-"))
    return mine


class Program:
    """A kernel for every set of constants: ``program(like, constants, blocks, threads, numbers, reals)``."""

    def __init__(self, module: str, build: str = "build") -> None:
        """``module`` of this folder, and the name of its builder there."""
        self.module, self.build = module, build
        self.functions: dict[tuple[tuple[int, int], Constants, int, int, int], driver.Function] = {}

    def __call__(
        self,
        like: Array,
        constants: Constants,
        blocks: int | tuple[int, int],
        threads: int,
        numbers: Sequence[int],
        reals: Sequence[float] = (),
        shared: int = 0,
        registers: int = 0,
    ) -> None:
        """Queue it on the current stream of ``like``'s library and device; nothing is waited for.

        A grid has ``blocks``, or so many along two axes, the second up to 65535. ``shared`` bytes of dynamic shared
        memory a block; at most so many ``registers`` a thread, 0 for what a block of this size can have.
        """
        grid = blocks if isinstance(blocks, tuple) else (blocks, 1)
        if 0 in grid:
            return
        if SIMULATED:
            self._simulate(constants, grid, threads, (*numbers, *reals), shared)
            return
        device = device_of(like)
        enter(device)
        function = self.function(constants, device, threads, shared, registers)
        arguments = struct.pack(f"{len(numbers)}q{len(reals)}d", *numbers, *reals)
        function.launch(grid, threads, shared, stream_of(like), arguments)

    def function(
        self, constants: Constants, device: int, threads: int, shared: int = 0, registers: int = 0
    ) -> driver.Function:
        """The kernel, loaded; compiled where this machine has not seen it yet."""
        capability = driver.capability(device)
        key = capability, constants, threads, shared, registers
        found = self.functions.get(key)
        if found is None:
            found = self.functions[key] = driver.Function(
                self._code(constants, capability, device, threads, registers), ENTRY
            )
            if shared > 48 * 1024:
                found.allow_shared(shared, device)
        return found

    def _code(
        self, constants: Constants, capability: tuple[int, int], device: int, threads: int, registers: int
    ) -> bytes:
        file = self._file("cubin", constants, capability, threads, registers)
        with contextlib.suppress(OSError):
            return file.read_bytes()
        log.info("compiling %s, once for this machine; kept in %s", file.stem, folder())
        code = driver.assemble(self.text(constants, capability), device, threads, registers)
        _keep(file, code)
        return code

    def text(self, constants: Constants, capability: tuple[int, int]) -> str:
        """``ptx``, by whichever process of this machine needed it first."""
        file = self._file("ptx", constants, capability)
        with contextlib.suppress(OSError):
            return file.read_text()
        text = self.ptx(constants, capability)
        _keep(file, text.encode())
        return text

    def _file(self, kind: str, *what: Any) -> Path:
        name = f"{self.module}.{self.build}"
        digest = hashlib.sha256(repr((name, *what)).encode()).hexdigest()[:20]
        return folder() / f"{name}.{digest}.{kind}"

    def ptx(self, constants: Constants, capability: tuple[int, int]) -> str:
        """The kernel in PTX, for a compute capability; needs no GPU."""
        function = self.python(constants)
        from .source import cuda

        numba = sys.modules["numba"]
        arguments = function.__code__.co_varnames[: function.__code__.co_argcount]
        reals = function.__annotations__
        signature = numba.void(*(numba.float64 if name in reals else numba.int64 for name in arguments))
        text, _ = cuda.compile_ptx(function, signature, cc=capability)
        return _finished(text)

    def python(self, constants: Constants) -> Callable[..., None]:
        """The kernel as a Python function."""
        module = importlib.import_module(f".{self.module}", __package__)
        function: Callable[..., None] = getattr(module, self.build)(**dict(constants))
        return function

    @functools.cached_property
    def _simulated(self) -> dict[Constants, Any]:
        return {}

    def _simulate(self, constants: Constants, grid: tuple[int, int], threads: int, arguments: Any, shared: int) -> None:
        from .source import cuda

        if constants not in self._simulated:
            self._simulated[constants] = cuda.jit(self.python(constants))
        turn = sys.getswitchinterval()
        sys.setswitchinterval(_TURN)
        try:
            self._simulated[constants][grid, threads, 0, shared](*arguments)
        finally:
            sys.setswitchinterval(turn)


def _keep(file: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    part = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
    with contextlib.suppress(OSError):  # a full disk costs a compilation next time, nothing more
        part.write_bytes(content)
        os.replace(part, file)


# Numba's own name of a kernel says where its source lies, and machine code that says so is no two checkouts' own.
ENTRY = "mixers_kernel"


def _finished(ptx: str) -> str:
    """The text with its one kernel called ``ENTRY``, and its shared arrays where four floats may be read at once.

    Numba aligns a shared array to one element, and not every version of it can be asked for more.
    """
    name = ptx.split(".visible .entry ", 1)[1].split("(", 1)[0]
    return re.sub(r"\.shared \.align [48] ", ".shared .align 16 ", ptx).replace(name, ENTRY)


def constants(given: Mapping[str, Any]) -> Constants:
    """Constants in an order of their own."""
    return tuple(sorted(given.items()))
