"""The GPU's driver, as far as arrays change hands: whose memory an address is, and streams that wait for each other.

Called through ``ctypes``: nothing is compiled, nothing imported, and the host waits for nothing.
"""

import collections
import contextlib
import ctypes
import functools
import threading
from typing import Any

_NAMES = ("libcuda.so.1", "nvcuda.dll")

# Numbers of cuda.h.
_NO_TIMING, _ORDINAL = 2, 9

# A stream's handle where nobody names one: the default one, which other blocking streams wait for.
DEFAULT_STREAM = 0


@functools.cache
def library() -> Any:
    """The driver's library; None without one."""
    for name in _NAMES:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    return None


def call(name: str, *arguments: Any) -> None:
    """Call the driver.

    Raises:
        RuntimeError: with the driver's own words, where it reports an error.
    """
    code = getattr(library(), name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        library().cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"{name}: {(text.value or b'unknown error').decode()} ({code})")


@functools.cache
def start() -> None:
    """Before anything else is asked."""
    call("cuInit", 0)


@functools.cache
def _primary(device: int) -> Any:
    """The context that every runtime shares on a device."""
    start()
    context = ctypes.c_void_p()
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    return context


def enter(device: int) -> None:
    """Make the device's context that of this thread, where this thread has none or another's."""
    current = ctypes.c_void_p()
    library().cuCtxGetCurrent(ctypes.byref(current))
    if current.value != _primary(device).value:
        call("cuCtxSetCurrent", _primary(device))


def device_of(address: int) -> int:
    """The number of the device whose memory this is; 0 where there is no driver to ask, or no memory."""
    if library() is None or not address:
        return 0
    start()
    found = ctypes.c_int()
    call("cuPointerGetAttribute", ctypes.byref(found), _ORDINAL, ctypes.c_uint64(address))
    return found.value


class Event:
    """What a stream has been given to do so far."""

    _handle: Any = None

    def __init__(self, stream: int, device: int) -> None:
        """Record it."""
        enter(device)
        self._handle = ctypes.c_void_p()
        call("cuEventCreate", ctypes.byref(self._handle), _NO_TIMING)
        call("cuEventRecord", self._handle, ctypes.c_void_p(stream))

    def __del__(self) -> None:
        if self._handle:
            library().cuEventDestroy_v2(self._handle)

    def done(self) -> bool:
        """Whether the device has done it; waits for nothing."""
        return bool(library().cuEventQuery(self._handle) == 0)

    def before(self, stream: int) -> None:
        """Let a stream wait for it."""
        call("cuStreamWaitEvent", ctypes.c_void_p(stream), self._handle, 0)


def follow(stream: int, leader: int, device: int) -> None:
    """Let a stream wait for what another has been given to do."""
    if stream != leader:
        Event(leader, device).before(stream)


_held: collections.deque[tuple[Event, Any]] = collections.deque()
_one_at_a_time = threading.Lock()


def hold(things: Any, stream: int, device: int) -> None:
    """Keep memory of a library that does not know of the stream, until the stream is through with it."""
    with _one_at_a_time:
        while _held and _held[0][0].done():
            _held.popleft()
        _held.append((Event(stream, device), things))
