"""The device functions of ``device`` on a GPU: what LLVM and PTX have for them."""

import functools

from llvmlite import ir
from numba.core import cgutils, types

from . import WARP
from .source import intrinsic

# How the lanes of a warp exchange numbers.
_EVERY_LANE, _BUTTERFLY = 0xFFFFFFFF, 3
_HALVES = ("bfloat16", "float16")
_BITS = {
    "float64": 64, "float32": 32, "bfloat16": 16, "float16": 16,
    "int64": 64, "int32": 32, "int16": 16, "int8": 8, "bool": 8, "uint8": 8,
}  # fmt: skip


def _register(kind):
    """The Numba type in which numbers of a kind are computed with."""
    return types.float64 if kind == "float64" else types.float32 if "float" in kind else types.int64


def _pointer(builder, address, index, kind):
    """The place of an element of global memory, and its type there."""
    here = {"float64": ir.DoubleType(), "float32": ir.FloatType(), "float16": ir.HalfType()}.get(
        kind, ir.IntType(_BITS[kind])
    )
    size = ir.Constant(ir.IntType(64), _BITS[kind] // 8)
    return builder.inttoptr(builder.add(address, builder.mul(index, size)), ir.PointerType(here, 1))


@functools.cache
def load(kind):
    """``read(address, index)``: an element of global memory."""

    @intrinsic
    def read(typing_context, address, index):
        def emit(context, builder, signature, values):
            found = builder.load(_pointer(builder, *values, kind))
            if kind == "bfloat16":
                wide = builder.shl(builder.zext(found, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
                return builder.bitcast(wide, ir.FloatType())
            if kind == "float16":
                return builder.fpext(found, ir.FloatType())
            if kind in ("int32", "int16", "int8"):
                return builder.sext(found, ir.IntType(64))
            if kind in ("bool", "uint8"):
                return builder.zext(found, ir.IntType(64))
            return found

        return _register(kind)(types.int64, types.int64), emit

    return read


@functools.cache
def fetch(kind):
    """``bits(address, index)``: an element of global memory as it lies there, for ``widen``."""

    @intrinsic
    def bits(typing_context, address, index):
        def emit(context, builder, signature, values):
            found = builder.load(_pointer(builder, *values, "int16" if kind in _HALVES else kind))
            return builder.zext(found, ir.IntType(32)) if kind in _HALVES else found

        return (types.int32 if kind in _HALVES else _register(kind))(types.int64, types.int64), emit

    return bits


@functools.cache
def widen(kind):
    """``number(bits)``: what ``fetch`` found, as a number."""

    @intrinsic
    def number(typing_context, bits):
        def emit(context, builder, signature, values):
            (found,) = values
            if kind == "bfloat16":
                return builder.bitcast(builder.shl(found, ir.Constant(ir.IntType(32), 16)), ir.FloatType())
            if kind == "float16":
                half = builder.bitcast(builder.trunc(found, ir.IntType(16)), ir.HalfType())
                return builder.fpext(half, ir.FloatType())
            return found

        return _register(kind)(bits), emit

    return number


@functools.cache
def store(kind):
    """``write(address, index, value)``: an element of global memory, rounded to nearest even."""

    @intrinsic
    def write(typing_context, address, index, value):
        def emit(context, builder, signature, values):
            address, index, value = values
            if kind == "bfloat16":
                convert = ir.InlineAsm(
                    ir.FunctionType(ir.IntType(16), [ir.FloatType()]), "cvt.rn.bf16.f32 $0, $1;", "=h,f"
                )
                value = builder.call(convert, [value])
            elif kind == "float16":
                value = builder.fptrunc(value, ir.HalfType())
            elif _BITS[kind] < 64 and "float" not in kind:
                value = builder.trunc(value, ir.IntType(_BITS[kind]))
            builder.store(value, _pointer(builder, address, index, kind))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, _register(kind)), emit

    return write


def _from_lane(builder, value, flip):
    """The value of the lane whose number differs in the bits of ``flip``; 64 bits go in two halves."""
    kind, word = value.type, ir.IntType(32)
    if kind == ir.DoubleType():
        pair = builder.bitcast(value, ir.VectorType(word, 2))
        for i in (ir.Constant(word, 0), ir.Constant(word, 1)):
            part = _from_lane(builder, builder.extract_element(pair, i), flip)
            pair = builder.insert_element(pair, part, i)
        return builder.bitcast(pair, kind)
    pair = ir.LiteralStructType((word, ir.IntType(1)))
    shuffle = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(pair, [word] * 5), "llvm.nvvm.shfl.sync.i32"
    )
    butterfly = [ir.Constant(word, n) for n in (_EVERY_LANE, _BUTTERFLY, flip, WARP - 1)]
    found = builder.call(shuffle, [*butterfly[:2], builder.bitcast(value, word), *butterfly[2:]])
    return builder.bitcast(builder.extract_value(found, 0), kind)


@functools.cache
def other_lane(flip):
    """``swap(value)``: the value of the lane whose number differs in the bits of ``flip``."""

    @intrinsic
    def swap(typing_context, value):
        def emit(context, builder, signature, values):
            return _from_lane(builder, values[0], flip)

        return value(value), emit

    return swap


@functools.cache
def sum_lanes(first, last):
    """``total(value)``: the sum over lanes whose numbers differ in bits ``first`` to ``last − 1``."""

    @intrinsic
    def total(typing_context, value):
        def emit(context, builder, signature, values):
            (found,) = values
            for bit in range(first, last):
                found = builder.fadd(found, _from_lane(builder, found, 1 << bit))
            return found

        return value(value), emit

    return total


@intrinsic
def cell(typing_context, array, index):
    """One element of a shared array; an index from the end is not understood, and costs nothing."""

    def emit(context, builder, signature, values):
        held = context.make_array(signature.args[0])(context, builder, values[0])
        return builder.load(builder.gep(held.data, [values[1]]))

    return array.dtype(array, types.int64), emit


@intrinsic
def quad(typing_context, array, index):
    """Four neighbours of a shared array, whose first is at a multiple of 4."""
    real = array.dtype

    def emit(context, builder, signature, values):
        held = context.make_array(signature.args[0])(context, builder, values[0])
        place = builder.gep(held.data, [values[1]])
        element = place.type.pointee
        four = builder.bitcast(place, ir.PointerType(ir.VectorType(element, 4), place.type.addrspace))
        found = builder.load(four, align=16)
        parts = [builder.extract_element(found, ir.Constant(ir.IntType(32), i)) for i in range(4)]
        return context.make_tuple(builder, signature.return_type, parts)

    return types.UniTuple(real, 4)(array, types.int64), emit


@intrinsic
def warp_barrier(typing_context):
    """Wait for the other lanes, and see what they wrote to shared memory."""

    def emit(context, builder, signature, values):
        word = ir.IntType(32)
        barrier = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [word]), "llvm.nvvm.bar.warp.sync"
        )
        builder.call(barrier, [ir.Constant(word, _EVERY_LANE)])
        return context.get_dummy_value()

    return types.void(), emit
