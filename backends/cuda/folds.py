"""More device functions: sums that lanes share out among themselves, votes, and the arithmetic of norms.

    fold(8, 0, 2)(array)          sums of 8 numbers over lanes that differ in bits 0 and 1: each of the four keeps two,
                                  at the front of the array: bit 0 chooses the half, bit 1 the half of that
    unfold(8, 0, 2)(array)        the way back: from the two numbers that each lane keeps to all 8, in every lane
    load_bits, widen = later(kind, real)   a load whose number is made when it is wanted, so that nobody waits for it
    any_lane(flag)                whether any lane of the warp says so
    rsqrt(x)                      1/√x
    fma(x, y, z)                  x y + z, rounded once
    base = shared_place(array)    where a shared array lies, worked out once and kept in a register
    onward(real)(base, index)     the address of its index-th number, kept in a register too
    get(real, 4)(base, i)         four neighbours of it as a tuple, i a multiple of 4; so for 2 and 1
    put(real)(base, i, x)         one of them; put_four(real)(base, i, a, b, c, d)
    read_four(real)(address, i)   four neighbours of global memory, i a multiple of 4 and 16 bytes for each; write_four

A fold of n numbers costs n − 1 exchanges where n sums would cost n a bit. Each name has a twin for the simulator.
"""

import functools
import threading

import numpy as np

from . import SIMULATED, WARP
from .agreed import shares
from .source import intrinsic

if SIMULATED:
    from .simulated import _cell, _lanes, load, warp_barrier
else:
    from llvmlite import ir
    from numba.core import cgutils, types

    from .native import _BITS, _EVERY_LANE, _from_lane, _pointer, _register, load


def _lane(builder):
    """The number of this thread in its block, of which its lane is the low bits."""
    kind = ir.FunctionType(ir.IntType(32), [])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.nvvm.read.ptx.sreg.tid.x"), [])


def _fold_native(count, first, last):
    @intrinsic
    def total(typing_context, array):
        def emit(context, builder, signature, values):
            word = ir.IntType(32)
            held = context.make_array(signature.args[0])(context, builder, values[0])
            places = [builder.gep(held.data, [ir.Constant(ir.IntType(64), i)]) for i in range(count)]
            numbers = [builder.load(place) for place in places]
            lane = _lane(builder)
            for bit in range(first, last):
                half = len(numbers) // 2
                if len(numbers) % 2:
                    numbers = [builder.fadd(x, _from_lane(builder, x, 1 << bit)) for x in numbers]
                    continue
                flag = builder.icmp_unsigned(
                    "!=", builder.and_(lane, ir.Constant(word, 1 << bit)), ir.Constant(word, 0)
                )
                low, high = numbers[:half], numbers[half:]
                numbers = [
                    builder.fadd(builder.select(flag, b, a), _from_lane(builder, builder.select(flag, a, b), 1 << bit))
                    for a, b in zip(low, high, strict=True)
                ]
            for place, x in zip(places, numbers, strict=False):
                builder.store(x, place)
            return context.get_dummy_value()

        return types.void(array), emit

    return total


def _unfold_native(count, first, last):
    kept, chosen = shares(count, first, last)

    @intrinsic
    def spread(typing_context, array):
        def emit(context, builder, signature, values):
            word = ir.IntType(32)
            held = context.make_array(signature.args[0])(context, builder, values[0])
            places = [builder.gep(held.data, [ir.Constant(ir.IntType(64), i)]) for i in range(count)]
            numbers = [builder.load(place) for place in places[:kept]]
            lane = _lane(builder)
            for bit, _ in reversed(chosen):
                flag = builder.icmp_unsigned(
                    "!=", builder.and_(lane, ir.Constant(word, 1 << bit)), ir.Constant(word, 0)
                )
                others = [_from_lane(builder, x, 1 << bit) for x in numbers]
                pairs = list(zip(numbers, others, strict=True))
                numbers = [builder.select(flag, b, a) for a, b in pairs] + [
                    builder.select(flag, a, b) for a, b in pairs
                ]
            for place, x in zip(places, numbers, strict=True):
                builder.store(x, place)
            return context.get_dummy_value()

        return types.void(array), emit

    return spread


def _unfold_simulated(count, first, last):
    kept, chosen = shares(count, first, last)

    def spread(array):
        thread = threading.current_thread()
        lane, have = thread.threadIdx.x, kept
        for bit, _ in reversed(chosen):
            own = [array[i] for i in range(have)]
            _lanes[lane] = own
            warp_barrier()
            other = _lanes[lane ^ 1 << bit]
            warp_barrier()
            low, high = (other, own) if lane >> bit & 1 else (own, other)
            for i in range(have):
                array[i], array[have + i] = low[i], high[i]
            have *= 2

    return spread


def _fold_simulated(count, first, last):
    def total(array):
        thread = threading.current_thread()
        lane, kept = thread.threadIdx.x, count
        for bit in range(first, last):
            _lanes[lane] = [array[i] for i in range(kept)]
            warp_barrier()
            other = _lanes[lane ^ 1 << bit]
            warp_barrier()
            offset = 0
            if kept % 2 == 0:
                kept //= 2
                offset = kept if lane >> bit & 1 else 0
            for i in range(kept):
                array[i] = array[offset + i] + other[offset + i]

    return total


@functools.cache
def fold(count, first, last):
    """``total(array)``: the first ``count`` numbers of a local array, summed over lanes; see ``shares``."""
    return (_fold_simulated if SIMULATED else _fold_native)(count, first, last)


@functools.cache
def unfold(count, first, last):
    """``spread(array)``: all numbers of a fold, at the front of a local array, from what the lanes keep of them."""
    return (_unfold_simulated if SIMULATED else _unfold_native)(count, first, last)


if SIMULATED:

    def any_lane(flag):
        """A vote of a warp."""
        thread = threading.current_thread()
        lane = thread.threadIdx.x
        _lanes[lane] = bool(flag)
        warp_barrier()
        found = any(_lanes[lane // WARP * WARP + i] for i in range(WARP))
        warp_barrier()
        return found

    def rsqrt(x):
        """In the dtype of x."""
        return type(x)(1) / np.sqrt(x)

    def fma(x, y, z):
        """In their dtype; rounded twice here, but always."""
        return x * y + z

    def later(kind, real):
        """A load, and what makes a number of what it found; the type in between."""
        return load(kind), np.dtype(real).type, np.dtype(real).type

    def shared_place(array):
        """The array itself."""
        return array

    def onward(real):
        """See the module: the rest of the array."""
        return lambda base, index: base[index:]

    @functools.cache
    def get(real, count):
        """See the module."""

        def found(base, index):
            return tuple(base[index + i] for i in range(count))

        return found

    @functools.cache
    def put(real):
        """See the module."""

        def store(base, index, x):
            base[index] = x

        return store

    @functools.cache
    def put_four(real):
        """See the module."""

        def store(base, index, a, b, c, d):
            base[index : index + 4] = a, b, c, d

        return store

    @functools.cache
    def read_four(real):
        """See the module."""

        def read(address, index):
            return tuple(np.dtype(real).type(_cell(real, address, index + i).value) for i in range(4))

        return read

    @functools.cache
    def write_four(real):
        """See the module."""

        def write(address, index, a, b, c, d):
            for i, x in enumerate((a, b, c, d)):
                _cell(real, address, index + i).value = x

        return write

else:

    @intrinsic
    def any_lane(typing_context, flag):
        """A vote of a warp."""

        def emit(context, builder, signature, values):
            word, bit = ir.IntType(32), ir.IntType(1)
            pair = ir.LiteralStructType((word, bit))
            vote = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(pair, [word, word, bit]), "llvm.nvvm.vote.sync"
            )
            some = ir.Constant(word, 1)
            found = builder.call(vote, [ir.Constant(word, _EVERY_LANE), some, values[0]])
            return builder.extract_value(found, 1)

        return types.boolean(types.boolean), emit

    @intrinsic
    def rsqrt(typing_context, x):
        """Of a float32 the hardware's, which is right to one unit in the last place."""

        def emit(context, builder, signature, values):
            double = signature.args[0] == types.float64
            kind = ir.DoubleType() if double else ir.FloatType()
            name = "llvm.sqrt.f64" if double else "llvm.nvvm.rsqrt.approx.ftz.f"
            function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind]), name)
            found = builder.call(function, values)
            return builder.fdiv(ir.Constant(kind, 1), found) if double else found

        return x(x), emit

    @intrinsic
    def fma(typing_context, x, y, z):
        """Never taken apart, and nothing else is contracted into it."""

        def emit(context, builder, signature, values):
            kind = ir.DoubleType() if signature.return_type == types.float64 else ir.FloatType()
            name = "llvm.fma.f64" if kind == ir.DoubleType() else "llvm.fma.f32"
            function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * 3), name)
            return builder.call(function, values)

        return x(x, x, x), emit

    def later(kind, real):
        """A load, and what makes a number of what it found; the type in between."""
        if kind not in ("bfloat16", "float16"):
            return load(kind), _same, np.float64 if kind == "float64" else np.float32
        return _load_bits(kind), _widen(kind), np.int32

    @intrinsic
    def _same(typing_context, x):
        return x(x), lambda context, builder, signature, values: values[0]

    @functools.cache
    def _load_bits(kind):
        """16 bits as they are."""

        @intrinsic
        def read(typing_context, address, index):
            def emit(context, builder, signature, values):
                place = _pointer(builder, *values, "int16")
                return builder.zext(builder.load(place), ir.IntType(32))

            return types.int32(types.int64, types.int64), emit

        return read

    @functools.cache
    def _widen(kind):
        """A float32 of 16 bits."""

        @intrinsic
        def wide(typing_context, bits):
            def emit(context, builder, signature, values):
                if kind == "bfloat16":
                    found = builder.shl(values[0], ir.Constant(ir.IntType(32), 16))
                    return builder.bitcast(found, ir.FloatType())
                half = builder.bitcast(builder.trunc(values[0], ir.IntType(16)), ir.HalfType())
                return builder.fpext(half, ir.FloatType())

            return types.float32(types.int32), emit

        return wide

    @intrinsic
    def shared_place(typing_context, array):
        """The address of a shared array in its own space; left to itself, the compiler asks for it at every access."""

        def emit(context, builder, signature, values):
            data = context.make_array(signature.args[0])(context, builder, values[0]).data
            place = builder.addrspacecast(data, ir.PointerType(data.type.pointee, 3))
            word = ir.IntType(32)
            move = ir.InlineAsm(ir.FunctionType(word, [word]), "mov.u32 $0, $1;", "=r,r", side_effect=True)
            return builder.call(move, [builder.ptrtoint(place, word)])

        return types.int32(array), emit

    @functools.cache
    def onward(real):
        """See the module: what a lane gets from itself, no compiler knows how to work out again."""

        @intrinsic
        def there(typing_context, base, index):
            def emit(context, builder, signature, values):
                size = ir.Constant(ir.IntType(32), _BITS[real] // 8)
                return _from_lane(builder, builder.add(values[0], builder.mul(values[1], size)), 0)

            return types.int32(types.int32, types.int32), emit

        return there

    def _shared(builder, base, index, real, count):
        """A vector of shared memory, and its alignment."""
        size, word = _BITS[real] // 8, ir.IntType(32)
        at = builder.add(base, builder.mul(builder.trunc(index, word), ir.Constant(word, size)))
        kind = ir.DoubleType() if real == "float64" else ir.FloatType()
        kind = kind if count == 1 else ir.VectorType(kind, count)
        return builder.inttoptr(at, ir.PointerType(kind, 3)), min(16, size * count)

    @functools.cache
    def get(real, count):
        """See the module."""

        @intrinsic
        def found(typing_context, base, index):
            def emit(context, builder, signature, values):
                place, align = _shared(builder, *values, real, count)
                four = builder.load(place, align=align)
                parts = [builder.extract_element(four, ir.Constant(ir.IntType(32), i)) for i in range(count)]
                return context.make_tuple(builder, signature.return_type, parts)

            def emit_one(context, builder, signature, values):
                place, align = _shared(builder, *values, real, 1)
                return context.make_tuple(builder, signature.return_type, [builder.load(place, align=align)])

            return types.UniTuple(_register(real), count)(types.int32, types.int64), emit_one if count == 1 else emit

        return found

    @functools.cache
    def put(real):
        """See the module."""

        @intrinsic
        def store(typing_context, base, index, x):
            def emit(context, builder, signature, values):
                place, align = _shared(builder, values[0], values[1], real, 1)
                builder.store(values[2], place, align=align)
                return context.get_dummy_value()

            return types.void(types.int32, types.int64, _register(real)), emit

        return store

    @functools.cache
    def put_four(real):
        """See the module."""

        @intrinsic
        def store(typing_context, base, index, a, b, c, d):
            def emit(context, builder, signature, values):
                base, index, *parts = values
                place, align = _shared(builder, base, index, real, 4)
                four = ir.Constant(place.type.pointee, ir.Undefined)
                for i, part in enumerate(parts):
                    four = builder.insert_element(four, part, ir.Constant(ir.IntType(32), i))
                builder.store(four, place, align=align)
                return context.get_dummy_value()

            return types.void(types.int32, types.int64, *[_register(real)] * 4), emit

        return store

    def _four(builder, address, index, real):
        """A vector of global memory."""
        place = _pointer(builder, address, index, real)
        return builder.bitcast(place, ir.PointerType(ir.VectorType(place.type.pointee, 4), 1))

    @functools.cache
    def read_four(real):
        """See the module."""

        @intrinsic
        def read(typing_context, address, index):
            def emit(context, builder, signature, values):
                found = builder.load(_four(builder, *values, real), align=16)
                parts = [builder.extract_element(found, ir.Constant(ir.IntType(32), i)) for i in range(4)]
                return context.make_tuple(builder, signature.return_type, parts)

            return types.UniTuple(_register(real), 4)(types.int64, types.int64), emit

        return read

    @functools.cache
    def write_four(real):
        """See the module."""

        @intrinsic
        def write(typing_context, address, index, a, b, c, d):
            def emit(context, builder, signature, values):
                address, index, *parts = values
                place = _four(builder, address, index, real)
                four = ir.Constant(place.type.pointee, ir.Undefined)
                for i, part in enumerate(parts):
                    four = builder.insert_element(four, part, ir.Constant(ir.IntType(32), i))
                builder.store(four, place, align=16)
                return context.get_dummy_value()

            return types.void(types.int64, types.int64, *[_register(real)] * 4), emit

        return write
