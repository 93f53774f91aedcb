"""The GPU driver, as far as launching compiled code needs it: link, load, launch.

    library = Library(cubin)                 loaded once, in every context
    function = library.function("name")
    launch(function, blocks, threads, packed arguments, stream)

Called through ``ctypes``, so that a kernel that was compiled before runs without Numba being imported; how it is found
and called, and which device is the current one, is the business of ``mixers.arrays.gpu``.
"""

import ctypes
import functools
from dataclasses import dataclass

from mixers.arrays.gpu import call, enter, library, start

# Numbers of cuda.h.
_MAX_SHARED, _LOCAL_BYTES, _REGISTERS = 8, 3, 4
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
_JIT_REGISTERS, _JIT_THREADS, _JIT_ERRORS, _JIT_ERRORS_BYTES = 0, 1, 5, 6
_INPUT_PTX = 1
_ARGUMENTS, _ARGUMENTS_BYTES = 1, 2
_LOG_BYTES = 16384


def found() -> bool:
    """Whether the driver's library can be loaded; asks no device."""
    return library() is not None


@functools.cache
def capability(device: int) -> tuple[int, int]:
    """The compute capability of a device."""
    start()
    numbers = []
    for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
        value = ctypes.c_int()
        call("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
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
    call("cuLinkCreate_v2", 3, options, values, ctypes.byref(linker))
    try:
        text = ptx.encode() + b"\0"
        call("cuLinkAddData_v2", linker, _INPUT_PTX, text, ctypes.c_size_t(len(text)), None, 0, None, None)
        call("cuLinkComplete", linker, ctypes.byref(code), ctypes.byref(size))
        assert code.value is not None
        return ctypes.string_at(code.value, size.value)
    except RuntimeError as error:
        error.add_note(errors.value.decode(errors="replace"))
        raise
    finally:
        library().cuLinkDestroy(linker)


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
        call("cuLibraryLoadData", ctypes.byref(library), code, None, None, 0, None, None, 0)
        call("cuLibraryGetKernel", ctypes.byref(self._handle), library, name.encode())

    def usage(self, device: int) -> Usage:
        """Registers and local memory."""
        numbers = []
        for attribute in (_REGISTERS, _LOCAL_BYTES):
            value = ctypes.c_int()
            call("cuKernelGetAttribute", ctypes.byref(value), attribute, self._handle, device)
            numbers.append(value.value)
        return Usage(*numbers)

    def allow_shared(self, size: int, device: int) -> None:
        """Let a launch ask for this many bytes of dynamic shared memory."""
        call("cuKernelSetAttribute", _MAX_SHARED, size, self._handle, device)

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
        call("cuLaunchKernel", self._handle, *grid, 1, threads, 1, 1, shared, ctypes.c_void_p(stream), None, extra)


def clear(address: int, size: int, stream: int) -> None:
    """Queue zeros for some bytes."""
    call("cuMemsetD8Async", ctypes.c_void_p(address), 0, ctypes.c_size_t(size), ctypes.c_void_p(stream))
