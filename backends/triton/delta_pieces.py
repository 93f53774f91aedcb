"""A long sequence of few heads over the whole card: pieces of it side by side, each from the state before it.

Where there is no system to solve, a piece scales the state that it starts from and adds to it. Both can be found
without that state:

    S_end = F ∘ S_first + E      E: the last state from zero      F: what the decays of its chunks leave, a channel each

``chain`` finds E of all pieces, ``carry`` goes from piece to piece, and ``chain`` runs over all pieces again with their
outputs. Keys and values are read twice; before, most multiprocessors had nothing to do. To the kernels pieces are the
sequences of a pack, and they begin where a chunk does.

    ends, firsts [N·pieces,H,K,V]   fade [R,H,K], a row a chunk   offsets [N·pieces+1]
"""

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl

from mixers.problem import Arrays, Problem
from mixers.spec import Array

from .blocks import chunks, first_row
from .kernel import PROCESSORS, block, place

# Shorter pieces are not worth their two passes; of more than these a head alone would spend its time in ``carry``.
SHORTEST, MOST = 256, 32

# As many programs as leave few multiprocessors without work.
ENOUGH = 3 * PROCESSORS // 4

# How many chunks ``carry`` multiplies the decays of at a time, and how many channels a program of it has.
TOGETHER, CHANNELS = tl.constexpr(32), 16


@triton.jit(do_not_specialize=["tokens", "pieces", "length", "count"])
def cuts(offsets, tokens, pieces, length, count, BLOCK: tl.constexpr):
    """Where pieces begin: so many of each sequence, of so much length but for the last of them."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    begin = (i // pieces).to(tl.int64) * tokens + tl.minimum(i % pieces * length, tokens)
    tl.store(offsets + i, begin, mask=i < count)


@triton.jit
def times(a, b):
    """For a reduction."""
    return a * b


@triton.jit(do_not_specialize=["per", "pieces"])
def carry(
    ends, fade, first, first_n, first_h, first_k, first_v, last, firsts, offsets, per, pieces, heads,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """From piece to piece, for some channels of a head: the state that each piece starts from, and the last."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(K, BK)
    head, n = (pid // blocks) % heads, pid // (blocks * heads)
    c, e = (pid % blocks) * BK + tl.arange(0, BK), tl.arange(0, BV)
    inside, matrix = (c < K)[:, None] & (e < V)[None, :], c[:, None] * V + e[None, :]
    grid = c[:, None] * first_k + e[None, :] * first_v
    s = tl.load(first + n.to(tl.int64) * first_n + head * first_h + grid, mask=inside, other=0.0).to(tl.float32)
    for i in range(pieces):
        piece = n * pieces + i
        where = (piece.to(tl.int64) * heads + head) * K * V + matrix
        tl.store(firsts + where, s, mask=inside)
        if DECAY:
            row = first_row(piece, per, 0, offsets, BT, False, True)
            count = chunks(tl.load(offsets + piece + 1) - tl.load(offsets + piece), 0, BT, False)
            left = tl.full([BK], 1.0, tl.float32)
            for at in range(0, count, TOGETHER):
                chunk = at + tl.arange(0, TOGETHER)[:, None]
                there = (chunk < count) & (c < K)[None, :]
                some = tl.load(fade + ((row + chunk) * heads + head) * K + c[None, :], mask=there, other=1.0)
                left *= tl.reduce(some, 0, times)
            s *= left[:, None]
        s += tl.load(ends + where, mask=inside, other=0.0)
    if last is not None:
        where = (n.to(tl.int64) * heads + head) * K * V + matrix
        tl.store(last + where, s.to(last.dtype.element_ty), mask=inside)


def enough(problem: Problem, block_v: int) -> int:
    """How many pieces of a sequence fill the card with chains of blocks of so many values."""
    if problem.packed or problem.flags.checkpoint_every or problem.flags.batch_invariant:
        return 1
    programs = problem.parallel * -(-problem.widths[3] // block_v)
    return min(MOST, triton.next_power_of_2(triton.cdiv(ENOUGH, max(programs, 1))))


@dataclasses.dataclass(frozen=True)
class Pieces:
    """A call whose sequences are cut.

    Attributes:
        whole: the call as it was asked for.
        count: pieces of each sequence.
        length: tokens of each but the last.
    """

    whole: Problem
    count: int
    length: int

    @classmethod
    def of(cls, problem: Problem, most: int, block_t: int) -> "Pieces | None":
        """At most so many pieces, of whole chunks; None where sequences are too short for two."""
        tokens = problem.sizes.T
        length = -(-max(SHORTEST, -(-tokens // most)) // block_t) * block_t
        count = -(-tokens // length)
        return cls(problem, count, length) if count > 1 else None

    @property
    def problem(self) -> Problem:
        """The pack of all pieces."""
        s = self.whole.sizes
        sizes = dataclasses.replace(s, B=1, T=s.B * s.T, N=s.N * self.count)
        return dataclasses.replace(self.whole, sizes=sizes, packed=True)

    def arrays(self, x: Arrays) -> Arrays:
        """The inputs of the pack, whose states are zero."""
        s, timed = self.whole.sizes, {arg.name for arg in self.whole.spec.inputs}
        row = {n: in_one_row(a) if n in timed and a is not None else a for n, a in x.items()}
        ends = s.N * self.count + 1
        offsets = torch.empty(ends, dtype=torch.int64, device=x["q"].device)
        cuts[(triton.cdiv(ends, 32),)](offsets, s.T, self.count, self.length, ends, BLOCK=32, num_warps=1)
        zero = torch.zeros((), dtype=torch.float32, device=offsets.device)
        return row | {"offsets": offsets, "initial.state": zero.expand(s.N * self.count, s.H, s.K, s.V)}

    def carry(self, cut: Any, ends: Array, first: Array, last: Array | None) -> Array:
        """The first states of all pieces, from the last ones of pieces that started from zero."""
        s, firsts = self.whole.sizes, torch.empty_like(ends)
        carry[(s.N * s.H * triton.cdiv(s.K, CHANNELS),)](
            ends, cut.fade, *place(first, 0, 1, 2, 3), last, firsts, cut.offsets, cut.per, self.count, s.H,
            K=s.K, V=s.V, BT=cut.block_t, BK=CHANNELS, BV=block(s.V), DECAY=cut.decay > 0,
            num_warps=4,
        )  # fmt: skip
        return firsts


def in_one_row(array: Array) -> Array:
    """A batch as one row, copied only where its sequences do not follow each other."""
    return array.reshape(1, array.shape[0] * array.shape[1], *array.shape[2:])
