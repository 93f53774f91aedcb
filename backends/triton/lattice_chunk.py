"""Lattice in chunks: which calls the kernels take, and their launches (the maths: ``lattice_chunk_forward``)."""

import dataclasses

import torch

from mixers.backend import Config, Pool, Support
from mixers.problem import Arrays, Problem
from mixers.spec import Array

from .kernel import TritonKernel, blank_unused
from .lattice_chunk_backward import backward
from .lattice_chunk_forward import Shape, area, gated, inputs, longest, walk
from .lattice_chunk_read import read
from .lattice_decode import decode
from .lattice_slots import directions

WIDEST = 256 * 128  # slots × values, in powers of two, whose products fit into shared memory
WIDEST_DECAYING_BACK = 32 * 256  # likewise, where values are wider than 128
WIDEST_FLOAT16_BACK = 128 * 64  # of a backward that multiplies float32, 64 tokens of float16 at a time


class LatticeChunk(TritonKernel):
    """Chunks of any length, resumed anywhere inside one."""

    name = "lattice.chunk"
    form = "chunk"
    mixers = frozenset({"lattice"})
    in_place = True

    def takes(self, problem: Problem) -> Support:
        """Only where the chunk is part of the model."""
        if problem.option["chunk_size"] == 1:
            return Support.no("runs chunk_size > 1; lattice.recurrent is the exact recurrence")
        _, _, key_dim, value_dim = problem.widths
        if area(problem) > WIDEST:
            return Support.no(
                f"slots fill shared memory: the product of K and V, each rounded up to a power of two, may be {WIDEST}"
                f", and K = {key_dim}, V = {value_dim}"
            )
        if gated(problem) and problem.flags.grad and value_dim > 128 and area(problem) > WIDEST_DECAYING_BACK:
            return Support.no(
                f"its gradients with log_decay fill shared memory: K up to 32 where V is above 128, and K = {key_dim}, "
                f"V = {value_dim}"
            )
        return Support.yes()

    def configs(self, problem: Problem) -> tuple[Config, ...]:
        """Warps of what walks along a head, of what takes slots of a piece in turns, and of what takes all at once.

        64 tokens are the rows of one warpgroup: more warps would each do the same.
        """
        wide = area(problem) > 64 * 64
        tokens = min(problem.option["chunk_size"], longest(problem, back=False))
        short = tokens <= 16 and not wide and not gated(problem)
        first = {
            "chain_warps": 8 if wide else 4,
            "turn_warps": 2 if short else 8 if wide and tokens <= 32 else 4,
            "piece_warps": 2 if short else 8 if wide else 4,
        }
        return (first, *(first | {"chain_warps": a, "piece_warps": b} for a in (4, 8) for b in (2, 4, 8)))

    def forward(self, problem: Problem, config: Config, x: Arrays, out: Arrays) -> None:
        """See ``Kernel``."""
        s, shape = problem.sizes, Shape.of(problem)
        blank_unused(problem, out)
        if s.N * s.H == 0:
            return
        found = walk(problem, shape, config, x, out, keep=False)
        read[(shape.rows * s.H,)](
            *inputs(x),
            directions(problem, found.slots.device),
            *(found.pieces, found.slots, found.running, found.again, out["y"]),
            *(s.T, s.H, s.H // s.G, problem.option["scale"]),
            **shape.common,
            **shape.slots,
            READ_NORM=problem.option["read_norm"],
            num_warps=config["turn_warps"],
            num_stages=1,
        )

    def decode(self, problem: Problem, config: Config, x: Arrays, pool: Pool, y: Array) -> None:
        """Fill ``y``, and the pool in place."""
        decode(problem, config, x, pool, y)

    def backward(self, problem: Problem, config: Config, x: Arrays, out: Arrays, dout: Arrays, dx: Arrays) -> None:
        """See ``Kernel``."""
        if not _goes_wide(problem):
            backward(problem, config, x, dout, dx)
            return
        exact = {name: torch.empty_like(dx[name], dtype=torch.float32) for name in "qkv"}
        wide = dataclasses.replace(problem, dtype="float32")
        backward(wide, config, x | {name: x[name].float() for name in "qkv"}, dout, dx | exact)
        for name, gradient in exact.items():
            dx[name].copy_(gradient)


def _goes_wide(problem: Problem) -> bool:
    """Whether a backward of half-precision inputs takes them as float32.

    Slots that decay: products in half precision fill shared memory, or Triton 3.6 compiles them wrongly. float16: its
    operands are float32 all the same, and 64 tokens of them at a time fill it.
    """
    if problem.dtype == "float32":
        return False
    if gated(problem):
        return area(problem) > 64 * 64 or problem.sizes.K > 128
    return problem.dtype == "float16" and area(problem) > WIDEST_FLOAT16_BACK


KERNELS = (LatticeChunk(),)
