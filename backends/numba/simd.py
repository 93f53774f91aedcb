"""Vectors as Numba values: explicit SIMD for the inner loops of the CPU kernels.

Numba leaves vectorisation to LLVM, which must first prove that a kernel's scratch arrays do not overlap; over a row of
64 numbers that proof costs more than the arithmetic. Here a vector is a value of its own type, so that accumulators
stay in registers and every load, multiply-add and store is the one that was written:

    acc = zeros(a, WIDE)                                # 4 hardware vectors, kept in registers
    for i in range(rows):
        acc = fma(splat(a, q[i], WIDE), load(a, i * stride, WIDE), acc)
    store(y, 0, acc)

A width is counted in bytes: ``NARROW`` is one hardware vector of this CPU, ``WIDE`` is four of them. An array argument
decides the element type (``lanes(a, NARROW)`` says how many fit). The arrays are one-dimensional and contiguous; an
offset counts elements. Nothing checks bounds: kernels pad their scratch to whole vectors (see ``scratch``).
"""

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

_FLAGS = ("reassoc", "contract", "nsz", "arcp")
_FEATURES = binding.get_host_cpu_features()

NARROW = 64 if _FEATURES.get("avx512f") else 32 if _FEATURES.get("avx2") else 16
PAIR = 2 * NARROW
WIDE = 4 * NARROW


class Vec(types.Type):
    """The Numba type of a vector of ``lanes`` numbers of type ``dtype``."""

    def __init__(self, dtype, lanes):
        self.dtype, self.lanes = dtype, lanes
        super().__init__(name=f"Vec({dtype}x{lanes})")


@register_model(Vec)
class _VecModel(models.PrimitiveModel):
    def __init__(self, manager, vec):
        element = manager.lookup(vec.dtype).get_value_type()
        super().__init__(manager, vec, ir.VectorType(element, vec.lanes))


def _vec(array, width):
    if not isinstance(width, types.IntegerLiteral) or not isinstance(array, types.Array):
        return None
    return Vec(array.dtype, width.literal_value * 8 // array.dtype.bitwidth)


def _address(context, builder, array_type, array, offset, vec):
    data = context.make_array(array_type)(context, builder, array).data
    pointer = builder.gep(data, [offset])
    return builder.bitcast(pointer, context.get_value_type(vec).as_pointer())


def _element_bytes(vec):
    return vec.dtype.bitwidth // 8


def _splat(builder, value, vector):
    """Broadcast a scalar to every lane: one ``vbroadcast``."""
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    mask = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), [0] * vector.count)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), mask)


@intrinsic(prefer_literal=True)
def lanes(typingctx, array, width):
    """How many elements of ``array`` fill ``width`` bytes: a compile-time constant."""
    vec = _vec(array, width)
    if vec is None:
        return None

    def codegen(context, builder, signature, args):
        return context.get_constant(types.intp, vec.lanes)

    return types.intp(array, width), codegen


@intrinsic(prefer_literal=True)
def zeros(typingctx, array, width):
    """A vector of zeros."""
    vec = _vec(array, width)
    if vec is None:
        return None

    def codegen(context, builder, signature, args):
        return ir.Constant(context.get_value_type(vec), None)

    return vec(array, width), codegen


@intrinsic(prefer_literal=True)
def splat(typingctx, array, value, width):
    """``value`` in every lane, as elements of ``array``."""
    vec = _vec(array, width)
    if vec is None:
        return None

    def codegen(context, builder, signature, args):
        value = context.cast(builder, args[1], signature.args[1], vec.dtype)
        return _splat(builder, value, context.get_value_type(vec))

    return vec(array, value, width), codegen


@intrinsic(prefer_literal=True)
def load(typingctx, array, offset, width):
    """``array[offset : offset + lanes]``."""
    vec = _vec(array, width)
    if vec is None:
        return None

    def codegen(context, builder, signature, args):
        pointer = _address(context, builder, signature.args[0], args[0], args[1], vec)
        return builder.load(pointer, align=_element_bytes(vec))

    return vec(array, types.intp, width), codegen


def _emit_prefetch(builder, pointer):
    byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), [byte, number, number, number]), "llvm.prefetch"
    )
    builder.call(function, [builder.bitcast(pointer, byte), number(0), number(3), number(1)])


@intrinsic
def prefetch(typingctx, array, offset):
    """Ask for the cache line of ``array[offset]``, which will be read soon."""
    if not isinstance(array, types.Array):
        return None

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        _emit_prefetch(builder, builder.gep(data, [args[1]]))
        return context.get_dummy_value()

    return types.void(array, types.intp), codegen


@intrinsic
def store(typingctx, array, offset, vec):
    """``array[offset : offset + lanes] = vec``."""
    if not isinstance(vec, Vec):
        return None

    def codegen(context, builder, signature, args):
        pointer = _address(context, builder, signature.args[0], args[0], args[1], vec)
        builder.store(args[2], pointer, align=_element_bytes(vec))
        return context.get_dummy_value()

    return types.void(array, types.intp, vec), codegen


@intrinsic(prefer_literal=True)
def splat_at(typingctx, array, offset, width):
    """``array[offset]`` in every lane; unlike an index in Numba, the offset is never looked at for its sign."""
    vec = _vec(array, width)
    if vec is None:
        return None

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return _splat(builder, builder.load(builder.gep(data, [args[1]])), context.get_value_type(vec))

    return vec(array, types.intp, width), codegen


def _row_address(context, builder, array_type, array, row, offset, vec):
    """The address of an element of a matrix whose rows are contiguous and lie ``strides[0]`` bytes apart."""
    matrix = context.make_array(array_type)(context, builder, array)
    stride = builder.extract_value(matrix.strides, 0)
    byte = builder.gep(builder.bitcast(matrix.data, ir.IntType(8).as_pointer()), [builder.mul(row, stride)])
    return builder.bitcast(builder.gep(builder.bitcast(byte, matrix.data.type), [offset]), vec.as_pointer())


@intrinsic
def prefetch_row(typingctx, array, row, offset):
    """Ask for the cache line of ``array[row, offset]``; the row may lie beyond the array."""
    if not isinstance(array, types.Array):
        return None

    def codegen(context, builder, signature, args):
        element = context.get_value_type(array.dtype)
        _emit_prefetch(builder, _row_address(context, builder, signature.args[0], *args, element))
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp), codegen


@intrinsic(prefer_literal=True)
def load_row(typingctx, array, row, offset, width):
    """``array[row, offset : offset + lanes]`` of a matrix with contiguous rows, without making a view of the row."""
    vec = _vec(array, width)
    if vec is None:
        return None

    def codegen(context, builder, signature, args):
        pointer = _row_address(context, builder, signature.args[0], *args[:3], context.get_value_type(vec))
        return builder.load(pointer, align=_element_bytes(vec))

    return vec(array, types.intp, types.intp, width), codegen


@intrinsic
def store_row(typingctx, array, row, offset, vec):
    """``array[row, offset : offset + lanes] = vec``, as ``load_row``."""
    if not isinstance(vec, Vec):
        return None

    def codegen(context, builder, signature, args):
        pointer = _row_address(context, builder, signature.args[0], *args[:3], context.get_value_type(vec))
        builder.store(args[3], pointer, align=_element_bytes(vec))
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, vec), codegen


def _elementwise(emit, arity, doc):
    def typer(vecs):
        return vecs[0] if all(isinstance(v, Vec) and v == vecs[0] for v in vecs) else None

    def codegen(context, builder, signature, args):
        return emit(builder, *args)

    # An intrinsic's arguments are counted by its Python function, so there is one for each arity.
    def unary(typingctx, x):
        vec = typer((x,))
        return vec and (vec(x), codegen)

    def binary(typingctx, x, y):
        vec = typer((x, y))
        return vec and (vec(x, y), codegen)

    def ternary(typingctx, x, y, z):
        vec = typer((x, y, z))
        return vec and (vec(x, y, z), codegen)

    def quaternary(typingctx, a, b, x, y):
        vec = typer((a, b, x, y))
        return vec and (vec(a, b, x, y), codegen)

    operation = (unary, binary, ternary, quaternary)[arity - 1]
    operation.__doc__ = doc
    return intrinsic(operation)


def _emit_fma(builder, x, y, z):
    return builder.fadd(builder.fmul(x, y, flags=_FLAGS), z, flags=_FLAGS)


fma = _elementwise(_emit_fma, 3, "``x * y + z``, contracted to one fused instruction.")
mul = _elementwise(lambda builder, x, y: builder.fmul(x, y, flags=_FLAGS), 2, "``x * y``.")
add = _elementwise(lambda builder, x, y: builder.fadd(x, y, flags=_FLAGS), 2, "``x + y``.")
maximum = _elementwise(
    lambda builder, x, y: builder.select(builder.fcmp_ordered(">", x, y), x, y),
    2,
    "The larger of two; ``y`` if ``x`` is NaN.",
)
sub = _elementwise(lambda builder, x, y: builder.fsub(x, y, flags=_FLAGS), 2, "``x - y``.")
div = _elementwise(lambda builder, x, y: builder.fdiv(x, y), 2, "``x / y``, correctly rounded.")


def _emit_choose(builder, a, b, x, y):
    return builder.select(builder.fcmp_ordered("<", a, b), x, y)


def _emit_named(name):
    """A call of LLVM's own function of one vector."""

    def emit(builder, x):
        bits = 32 if isinstance(x.type.element, ir.FloatType) else 64
        kind = ir.FunctionType(x.type, [x.type])
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{x.type.count}f{bits}")
        return builder.call(function, [x])

    return emit


choose = _elementwise(_emit_choose, 4, "``x`` where ``a < b``, else ``y``.")
sqrt = _elementwise(_emit_named("sqrt"), 1, "The square root.")
absolute = _elementwise(_emit_named("fabs"), 1, "The absolute value.")

# e^x = 2^n e^f with n = round(x / ln 2) and |f| <= ln(2)/2; e^f = 1 + f + f^2 p(f). Per element size in bits: the terms
# of p from the highest down, ln 2 as a short and a long part, the exponent's bias and position, and the least x.
_EXP = {
    32: (
        (0.0013926183587713494, 0.008363179052722578, 0.041666554617204574, 0.16666576989698775, 0.5),
        (0.693359375, -0.00021219444005469057),
        (127, 23),
        -87.33,
    ),
    64: (
        (
            *(2.510038549551032e-08, 2.7620088445409746e-07, 2.7557268459997064e-06, 2.4801521295954376e-05),
            *(0.00019841269863053618, 0.0013888888917213717, 0.008333333333330062, 0.04166666666662413),
            *(0.16666666666666669, 0.5000000000000001),
        ),
        (0.693147175014019, 5.5459262969660605e-09),
        (1023, 52),
        -708.39,
    ),
}


def _emit_exp(builder, x):
    vector = x.type
    bits = 32 if isinstance(vector.element, ir.FloatType) else 64
    terms, (short, long), (bias, position), least = _EXP[bits]
    whole = ir.VectorType(ir.IntType(bits), vector.count)

    def constant(value, kind=vector):
        return ir.Constant(kind, [value] * vector.count)

    def fma(a, b, c):  # contracted, but never reassociated: the remainder must stay exact
        return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))

    name = f"llvm.rint.v{vector.count}f{bits}"
    rint = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector]), name)
    small = builder.fcmp_ordered("<", x, constant(least))
    x = builder.select(small, constant(least), x)
    n = builder.call(rint, [builder.fmul(x, constant(1.4426950408889634))])
    f = fma(n, constant(-long), fma(n, constant(-short), x))
    p = constant(terms[0])
    for term in terms[1:]:
        p = fma(p, f, constant(term))
    p = builder.fadd(fma(p, builder.fmul(f, f), f), constant(1.0))
    power = builder.shl(builder.add(builder.fptosi(n, whole), constant(bias, whole)), constant(position, whole))
    return builder.select(small, constant(0.0), builder.fmul(p, builder.bitcast(power, vector)))


@intrinsic
def exp(typingctx, x):
    """``e**x`` for ``x <= 0``, to about an ulp; 0 where it would be denormal, so at minus infinity too."""
    if not isinstance(x, Vec):
        return None

    def codegen(context, builder, signature, args):
        return _emit_exp(builder, args[0])

    return x(x), codegen


def _shuffle(builder, x, y, indices):
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(indices)), list(indices))
    return builder.shuffle_vector(x, y, mask)


def _fold(builder, x, lanes_left):
    """Halve a vector by adding its upper half to its lower, down to ``lanes_left`` lanes."""
    count = x.type.count
    while count > lanes_left:
        half = count // 2
        low, high = (_shuffle(builder, x, x, range(s, s + half)) for s in (0, half))
        x, count = builder.fadd(low, high, flags=_FLAGS), half
    return x


@intrinsic
def total(typingctx, vec):
    """The sum over a vector's lanes."""
    if not isinstance(vec, Vec):
        return None

    def codegen(context, builder, signature, args):
        last = _fold(builder, args[0], 1)
        return builder.extract_element(last, ir.Constant(ir.IntType(32), 0))

    return vec.dtype(vec), codegen


@intrinsic
def store_totals(typingctx, array, offset, a, b, c, d):
    """``array[offset : offset + 4] = total(a), total(b), total(c), total(d)``, in about a third of the shuffles."""
    if not isinstance(a, Vec) or not (a == b == c == d):
        return None
    quad = Vec(a.dtype, 4)

    def codegen(context, builder, signature, args):
        # Fold to one hardware vector, then transpose and add: pairs interleave, then pairs of pairs.
        keep = max(4, NARROW // _element_bytes(a))
        a_, b_, c_, d_ = (_fold(builder, x, keep) for x in args[2:])
        n = a_.type.count

        def pair(x, y, step):
            even, odd = [], []
            for base in range(0, n, 2 * step):
                even += [base + i for i in range(step)] + [n + base + i for i in range(step)]
                odd += [base + step + i for i in range(step)] + [n + base + step + i for i in range(step)]
            low, high = _shuffle(builder, x, y, even), _shuffle(builder, x, y, odd)
            return builder.fadd(low, high, flags=_FLAGS)

        sums = _fold(builder, pair(pair(a_, b_, 1), pair(c_, d_, 1), 2), 4)
        pointer = _address(context, builder, signature.args[0], args[0], args[1], quad)
        builder.store(sums, pointer, align=_element_bytes(quad))
        return context.get_dummy_value()

    return types.void(array, types.intp, a, b, c, d), codegen
