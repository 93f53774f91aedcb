"""XLA's foreign function interface, for C functions compiled by Numba: what they read of the frame that XLA passes.

A handler is ``numba.cfunc(int64(int64))`` of a function of a frame's address. It first lets ``introduced`` answer the
call by which XLA asks for its version, and returns 0, or what ``failure`` makes of a message. Byte offsets are those of
``xla/ffi/api/c_api.h``, which only grows at its ends.
"""

import ctypes
import functools
import re
from pathlib import Path
from typing import Any

import jax
import numba
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

# Offsets in XLA_FFI_CallFrame, XLA_FFI_Buffer, XLA_FFI_Array and XLA_FFI_Api.
API, CONTEXT, ARGS_COUNT, ARGS, RESULTS, ATTRIBUTES = 16, 24, 56, 72, 112, 160
BUFFER_DATA, BUFFER_DIMS = 24, 40
ARRAY_DATA = 16
_FUNCTIONS = 48

# Offsets in XLA_FFI_CallFrame, XLA_FFI_Metadata_Extension and XLA_FFI_Metadata, and the extension's number.
_EXTENSION, _TYPE, _ABOUT, _VERSION, _METADATA = 8, 8, 24, 24, 1

# XLA_FFI_Error_Create_Args and XLA_FFI_Stream_Get_Args are as large; the number of an internal error.
_FOUR_WORDS, _INTERNAL = 32, 13


@intrinsic
def int64_at(context, address):  # type: ignore[no-untyped-def]
    """The eight bytes at an address."""

    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        return builder.load(builder.inttoptr(values[0], cgutils.intp_t.as_pointer()))

    return types.int64(types.int64), emit


@intrinsic
def int32_at(context, address):  # type: ignore[no-untyped-def]
    """The four bytes at an address."""

    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        found = builder.load(builder.inttoptr(values[0], cgutils.int32_t.as_pointer()))
        return builder.sext(found, cgutils.intp_t)

    return types.int64(types.int64), emit


@intrinsic
def put_int64(context, address, value):  # type: ignore[no-untyped-def]
    """Write eight bytes."""

    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        builder.store(values[1], builder.inttoptr(values[0], cgutils.intp_t.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@intrinsic
def put_int32(context, address, value):  # type: ignore[no-untyped-def]
    """Write four bytes."""

    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        pointer = builder.inttoptr(values[0], cgutils.int32_t.as_pointer())
        builder.store(builder.trunc(values[1], cgutils.int32_t), pointer)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@functools.cache
def array_at(dtype: Any, ndim: int) -> Any:
    """``array(place)``: the XLA_FFI_Buffer whose address stands at a place, as an array of Numba's."""
    kind = types.Array(dtype, ndim, "C")

    @intrinsic
    def array(context, place):  # type: ignore[no-untyped-def]
        def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
            def word(address: Any, offset: int) -> Any:
                pointer = builder.inttoptr(address, cgutils.intp_t.as_pointer())
                return builder.load(builder.gep(pointer, [cgutils.intp_t(offset // 8)]))

            buffer = word(values[0], 0)
            dims = word(buffer, BUFFER_DIMS)
            shape = [word(dims, 8 * axis) for axis in range(ndim)]
            item = cgutils.intp_t(context.get_abi_sizeof(context.get_data_type(dtype)))
            strides = [item]
            for length in shape[:0:-1]:
                strides.insert(0, builder.mul(strides[0], length))
            data = builder.inttoptr(word(buffer, BUFFER_DATA), context.get_data_type(dtype).as_pointer())
            found = context.make_array(kind)(context, builder)
            populate_array(found, data, shape, strides[:ndim], item, None)
            return found._getvalue()

        return kind(types.int64), emit

    return array


@intrinsic(prefer_literal=True)
def words(context, count):  # type: ignore[no-untyped-def]
    """The address of so many eight-byte words, a literal number, that last as long as the call."""
    size = count.literal_value

    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        space = cgutils.alloca_once(builder, cgutils.intp_t, size=cgutils.intp_t(size))
        return builder.ptrtoint(space, cgutils.intp_t)

    return types.int64(count), emit


@intrinsic
def _call(context, address, argument):  # type: ignore[no-untyped-def]
    """What the C function at an address returns."""

    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        kind = cgutils.ir.FunctionType(cgutils.intp_t, [cgutils.intp_t])
        return builder.call(builder.inttoptr(values[0], kind.as_pointer()), [values[1]])

    return types.int64(types.int64, types.int64), emit


@functools.cache
def _header() -> str:
    return (Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h").read_text()


@functools.cache
def version() -> tuple[int, int]:
    """The version of the interface that this jaxlib has."""
    found = [re.search(rf"#define XLA_FFI_API_{part} (\d+)", _header()) for part in ("MAJOR", "MINOR")]
    major, minor = (int(match.group(1)) if match else 0 for match in found)
    return major, minor


def _function(name: str) -> int:
    """Where XLA_FFI_Api keeps one of its functions."""
    names = re.findall(r"_XLA_FFI_API_STRUCT_FIELD\((XLA_FFI_\w+)\);", _header())
    return _FUNCTIONS + 8 * names.index(name)


@functools.cache
def introduced() -> Any:
    """``introduced(frame)``: whether XLA asked for the version, and was told."""
    major, minor = version()

    @numba.njit
    def answer(frame):  # type: ignore[no-untyped-def]
        extension = int64_at(frame + _EXTENSION)
        if extension == 0 or int32_at(extension + _TYPE) != _METADATA:
            return False
        about = int64_at(extension + _ABOUT)
        put_int32(about + _VERSION, major)
        put_int32(about + _VERSION + 4, minor)
        return True

    return answer


@functools.cache
def stream_of() -> Any:
    """``stream_of(frame)``: the stream of a GPU that a handler is to use."""
    place = _function("XLA_FFI_Stream_Get")

    @numba.njit
    def ask(frame):  # type: ignore[no-untyped-def]
        asked = words(4)
        put_int64(asked, _FOUR_WORDS)
        put_int64(asked + 8, 0)
        put_int64(asked + 16, int64_at(frame + CONTEXT))
        put_int64(asked + 24, 0)
        _call(int64_at(int64_at(frame + API) + place), asked)
        return int64_at(asked + 24)

    return ask


@functools.cache
def failure(message: str) -> Any:
    """``failure(frame)``: what a handler returns to say that it failed, and why."""
    place = _function("XLA_FFI_Error_Create")
    text = ctypes.create_string_buffer(message.encode())
    _texts.append(text)
    address = ctypes.addressof(text)

    @numba.njit
    def fail(frame):  # type: ignore[no-untyped-def]
        told = words(4)
        put_int64(told, _FOUR_WORDS)
        put_int64(told + 8, 0)
        put_int64(told + 16, address)
        put_int64(told + 24, _INTERNAL)
        return _call(int64_at(int64_at(frame + API) + place), told)

    return fail


# Messages that compiled code points to.
_texts: list[Any] = []


def register(name: str, handler: Any, platform: str) -> None:
    """Make a compiled C function known to XLA; the caller keeps it."""
    pointer = ctypes.cast(handler.address, ctypes.c_void_p)
    capsule = jax.ffi.pycapsule(pointer)  # type: ignore[no-untyped-call]
    jax.ffi.register_ffi_target(name, capsule, platform=platform)
