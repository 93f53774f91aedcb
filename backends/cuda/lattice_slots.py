"""What the kernels of Lattice share: objectives, and the first directions of slots.

    d_ij = cos(π (i + ½)(j + ½)/n)/‖·‖      n = max(K, V)
    Σ_{j<V} cos² = V/2 + sin(2Vφ)/(4 sin φ)      φ = π(2i + 1)/(2n)

which is ``mixers.algebra.unit_directions``, an element at a time: only a slot of which nothing is left asks. It is a
call and never inlined, or the loops that ask would be too long to be unrolled and the slots would leave the registers.
"""

import math

from . import SIMULATED
from .source import intrinsic

if SIMULATED:

    def direction(i, j, K, V):
        """An element, in float64; slots that only fill a tile up are the first unit vector."""
        if i >= K or j >= V:
            return float(i >= K and j == 0)
        angle = math.pi * (2 * i + 1) / (2 * max(K, V))
        square = V / 2 + math.sin(2 * V * angle) / (4 * math.sin(angle))
        return math.cos(angle / 2 * (2 * j + 1)) / math.sqrt(square)

else:
    from llvmlite import ir
    from numba.core import cgutils, types

    @intrinsic
    def direction(typing_context, i, j, K, V):
        """An element, in float64; slots that only fill a tile up are the first unit vector."""

        def emit(context, builder, signature, values):
            return builder.call(_direction(builder.module), values)

        return types.float64(*[types.int64] * 4), emit

    def _direction(module):
        """The function in a module. Cosines are taken of whole numbers of turns, and of π at the very end."""
        real, word = ir.DoubleType(), ir.IntType(64)
        function = cgutils.get_or_insert_function(module, ir.FunctionType(real, [word] * 4), "mixers_direction")
        if not function.is_declaration:
            return function
        function.linkage = "internal"
        function.attributes.add("noinline")
        builder = ir.IRBuilder(function.append_basic_block())
        cospi = cgutils.get_or_insert_function(module, ir.FunctionType(real, [real]), "__nv_cospi")
        root = cgutils.get_or_insert_function(module, ir.FunctionType(real, [real]), "llvm.sqrt.f64")
        i, j, K, V = function.args
        size = builder.select(builder.icmp_signed(">", K, V), K, V)

        def times(x, number):
            return builder.mul(x, ir.Constant(word, number))

        def odd(x):
            return builder.add(times(x, 2), ir.Constant(word, 1))

        def cosine(part, per_turn, less):
            angle = builder.sitofp(builder.urem(part, times(per_turn, 2)), real)
            angle = builder.fdiv(angle, builder.sitofp(per_turn, real))
            return builder.call(cospi, [builder.fsub(angle, ir.Constant(real, less))])

        over = cosine(builder.mul(odd(i), times(V, 2)), times(size, 2), 0.5)
        under = builder.fmul(cosine(odd(i), times(size, 2), 0.5), ir.Constant(real, 4.0))
        half = builder.fmul(builder.sitofp(V, real), ir.Constant(real, 0.5))
        square = builder.fadd(builder.fdiv(over, under), half)
        found = builder.fdiv(cosine(builder.mul(odd(i), odd(j)), times(size, 4), 0.0), builder.call(root, [square]))
        filler = builder.icmp_signed(">=", i, K)
        outside = builder.or_(filler, builder.icmp_signed(">=", j, V))
        first = builder.and_(filler, builder.icmp_signed("==", j, ir.Constant(word, 0)))
        builder.ret(builder.select(outside, builder.uitofp(first, real), found))
        return function
