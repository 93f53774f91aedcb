"""What the kernels of Lattice share: objectives, and the first directions of slots.

    d_ij = cos(π (i + ½)(j + ½)/n)/‖·‖      n = max(K, V)      Σ_{j<V} cos² = V/2 + sin(2Vφ)/(4 sin φ),  φ = π(2i + 1)/(2n)

which is ``mixers.algebra.unit_directions``, an element at a time: only a slot of which nothing is left asks. It is a
call and never inlined, or the loops that ask would be too long to be unrolled and the slots would leave the registers.
"""

import math

from . import SIMULATED
from .source import intrinsic

OBJECTIVES = {"decoding": 0, "encoding": 1, "similarity": 2}
DECODING, ENCODING, SIMILARITY = 0, 1, 2


if SIMULATED:

    def first_direction(K, V):
        """``direction(i, j)``: a float64; slots that only fill a tile up are the first unit vector."""
        size = max(K, V)

        def direction(i, j):
            if i >= K or j >= V:
                return float(i >= K and j == 0)
            angle = math.pi * (2 * i + 1) / (2 * size)
            square = V / 2 + math.sin(2 * V * angle) / (4 * math.sin(angle))
            return math.cos(angle / 2 * (2 * j + 1)) / math.sqrt(square)

        return direction

else:
    from llvmlite import ir
    from numba.core import cgutils, types

    def first_direction(K, V):
        """``direction(i, j)``: a float64; slots that only fill a tile up are the first unit vector."""

        @intrinsic
        def direction(typing_context, i, j):
            def emit(context, builder, signature, values):
                return builder.call(_direction(builder.module, K, V), values)

            return types.float64(types.int64, types.int64), emit

        return direction

    def _direction(module, K, V):
        """The function in a module. The cosine's argument is in units of π, its turns whole numbers until the end."""
        real, word, size = ir.DoubleType(), ir.IntType(64), max(K, V)
        function = cgutils.get_or_insert_function(module, ir.FunctionType(real, [word, word]), "mixers_direction")
        if not function.is_declaration:
            return function
        function.linkage = "internal"
        function.attributes.add("noinline")
        builder = ir.IRBuilder(function.append_basic_block())
        cospi = cgutils.get_or_insert_function(module, ir.FunctionType(real, [real]), "__nv_cospi")
        root = cgutils.get_or_insert_function(module, ir.FunctionType(real, [real]), "llvm.sqrt.f64")
        i, j = function.args

        def odd(x):
            return builder.add(builder.shl(x, ir.Constant(word, 1)), ir.Constant(word, 1))

        def cosine(turns, per_turn, less):
            whole = builder.urem(turns, ir.Constant(word, 4 * per_turn))
            angle = builder.fdiv(builder.sitofp(whole, real), ir.Constant(real, 2.0 * per_turn))
            return builder.call(cospi, [builder.fsub(angle, ir.Constant(real, less))])

        over = cosine(builder.mul(odd(i), ir.Constant(word, 2 * V)), size, 0.5)
        under = builder.fmul(cosine(odd(i), size, 0.5), ir.Constant(real, 4.0))
        square = builder.fadd(builder.fdiv(over, under), ir.Constant(real, V / 2))
        found = builder.fdiv(cosine(builder.mul(odd(i), odd(j)), 2 * size, 0.0), builder.call(root, [square]))
        filler = builder.icmp_signed(">=", i, ir.Constant(word, K))
        outside = builder.or_(filler, builder.icmp_signed(">=", j, ir.Constant(word, V)))
        first = builder.and_(filler, builder.icmp_signed("==", j, ir.Constant(word, 0)))
        builder.ret(builder.select(outside, builder.uitofp(first, real), found))
        return function
