"""The GPU driver, as far as launching compiled code needs it: link, load, launch.

    library = Library(cubin)                 loaded once, in every context
    function = library.function("name")
    launch(function, blocks, threads, packed arguments, stream)

Called through ``ctypes``, so that a kernel that was compiled before runs without Numba being imported.
"""

import contextlib
import ctypes
import functools
from dataclasses import dataclass
from typing import Any

_NAMES = ("libcuda.so.1", "nvcuda.dll")

# Numbers of cuda.h.
_MAX_SHARED, _LOCAL_BYTES, _REGISTERS = 8, 3, 4
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
_JIT_REGISTERS, _JIT_THREADS, _JIT_ERRORS, _JIT_ERRORS_BYTES = 0, 1, 5, 6
_INPUT_PTX = 1
_ARGUMENTS, _ARGUMENTS_BYTES = 1, 2
_LOG_BYTES = 16384


@functools.cache
def _driver() -> Any:
    for name in _NAMES:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    return None


def found() -> bool:
    """Whether the driver's library can be loaded; asks no device."""
    return _driver() is not None


def _call(name: str, *arguments: Any) -> None:
    """Call the driver.

    Raises:
        RuntimeError: with the driver's own words, where it reports an error.
    """
    code = getattr(_driver(), name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"{name}: {(text.value or b'unknown error').decode()} ({code})")


@functools.cache
def _start() -> None:
    _call("cuInit", 0)


@functools.cache
def _primary(device: int) -> Any:
    """The context that every runtime shares on a device."""
    _start()
    context = ctypes.c_void_p()
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    return context


def enter(device: int) -> None:
    """Make the device's context that of this thread, where this thread has none or another's."""
    current = ctypes.c_void_p()
    _driver().cuCtxGetCurrent(ctypes.byref(current))
    if current.value != _primary(device).value:
        _call("cuCtxSetCurrent", _primary(device))


@functools.cache
def capability(device: int) -> tuple[int, int]:
    """The compute capability of a device."""
    _start()
    numbers = []
    for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
        value = ctypes.c_int()
        _call("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        numbers.append(value.value)
    return numbers[0], numbers[1]


def assemble(ptx: str, device: int, threads: int, registers: int = 0) -> bytes:
    """Machine code for a device, with no more registers than a block of so many threads can have, or than asked.

    Raises:
        RuntimeError: with the assembler's messages.
    """
    enter(device)
    errors = ctypes.create_string_buffer(_LOG_BYTES)
    limit = (_JIT_REGISTERS, registers) if registers else (_JIT_THREADS, threads)
    options = (ctypes.c_int * 3)(limit[0], _JIT_ERRORS, _JIT_ERRORS_BYTES)
    values = (ctypes.c_void_p * 3)(limit[1], ctypes.addressof(errors), _LOG_BYTES)
    linker, code, size = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_size_t()
    _call("cuLinkCreate_v2", 3, options, values, ctypes.byref(linker))
    try:
        text = ptx.encode() + b"\0"
        _call("cuLinkAddData_v2", linker, _INPUT_PTX, text, ctypes.c_size_t(len(text)), None, 0, None, None)
        _call("cuLinkComplete", linker, ctypes.byref(code), ctypes.byref(size))
        assert code.value is not None
        return ctypes.string_at(code.value, size.value)
    except RuntimeError as error:
        error.add_note(errors.value.decode(errors="replace"))
        raise
    finally:
        _driver().cuLinkDestroy(linker)


@dataclass(frozen=True)
class Usage:
    """What a kernel takes of a multiprocessor: registers and bytes of local memory, a thread each."""

    registers: int
    local_bytes: int


class Function:
    """One kernel of loaded machine code."""

    def __init__(self, code: bytes, name: str) -> None:
        """Load; its context may be any."""
        self._code = code
        library, self._handle = ctypes.c_void_p(), ctypes.c_void_p()
        _call("cuLibraryLoadData", ctypes.byref(library), code, None, None, 0, None, None, 0)
        _call("cuLibraryGetKernel", ctypes.byref(self._handle), library, name.encode())

    def usage(self, device: int) -> Usage:
        """Registers and local memory."""
        numbers = []
        for attribute in (_REGISTERS, _LOCAL_BYTES):
            value = ctypes.c_int()
            _call("cuKernelGetAttribute", ctypes.byref(value), attribute, self._handle, device)
            numbers.append(value.value)
        return Usage(*numbers)

    def allow_shared(self, size: int, device: int) -> None:
        """Let a launch ask for this many bytes of dynamic shared memory."""
        _call("cuKernelSetAttribute", _MAX_SHARED, size, self._handle, device)

    def launch(self, grid: tuple[int, int], threads: int, shared: int, stream: int, arguments: bytes) -> None:
        """Queue the kernel on a stream; ``arguments`` as the kernel declares them, packed."""
        size = ctypes.c_size_t(len(arguments))
        extra = (ctypes.c_void_p * 5)(
            _ARGUMENTS,
            ctypes.cast(ctypes.c_char_p(arguments), ctypes.c_void_p),
            _ARGUMENTS_BYTES,
            ctypes.addressof(size),
            None,
        )
        _call("cuLaunchKernel", self._handle, *grid, 1, threads, 1, 1, shared, ctypes.c_void_p(stream), None, extra)


def clear(address: int, size: int, stream: int) -> None:
    """Queue zeros for some bytes."""
    _call("cuMemsetD8Async", ctypes.c_void_p(address), 0, ctypes.c_size_t(size), ctypes.c_void_p(stream))
