"""States in a pool: where kernels find those of a sequence, and where they leave them.

pool [slots, ...] of any strides   slots, out_slots [B], −1 for none   fresh [B]   phase [slots]
"""

import triton
import triton.language as tl

from mixers.backend import Pool
from mixers.spec import Array


def served(pool: Pool | None) -> tuple[Array, Array, Array]:
    """Slots to read, slots to write, and which sequences start afresh; nothing without a pool."""
    if pool is None:
        return None, None, None
    fresh = pool.fresh
    return pool.slots.contiguous(), pool.out_slots.contiguous(), None if fresh is None else fresh.contiguous()


@triton.jit
def seats(n, slots, out_slots):
    """Where the state of sequence n comes from and goes to: its slots of a pool, its own row without one."""
    where_from, where_to = tl.cast(n, tl.int64), tl.cast(n, tl.int64)
    if slots is not None:
        where_from = tl.load(slots + n).to(tl.int64)
        where_to = tl.load(out_slots + n).to(tl.int64)
    return where_from, where_to


@triton.jit
def window(pointer, rows, columns, down, across, there, K: tl.constexpr, V: tl.constexpr):
    """A matrix ``[K,V]`` of any strides in float32; zeros outside, and where it is not ``there``."""
    mask = (rows < tl.where(there, K, 0))[:, None] & (columns < V)[None, :]
    return tl.load(pointer + rows[:, None] * down + columns[None, :] * across, mask=mask, other=0).to(tl.float32)


@triton.jit
def put_window(pointer, x, rows, columns, down, across, there, K: tl.constexpr, V: tl.constexpr):
    """Store what ``window`` would load; nothing where there is no place."""
    mask = (rows < tl.where(there, K, 0))[:, None] & (columns < V)[None, :]
    tl.store(pointer + rows[:, None] * down + columns[None, :] * across, x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def phase_of(n, where_from, phase, phase_n, first_phase, first_n, fresh):
    """Tokens that a sequence's chunk has seen; 0 for padding."""
    seen = tl.load(phase + where_from * phase_n, mask=where_from >= 0, other=0)
    if fresh is not None:
        seen = tl.where(tl.load(fresh + n) != 0, tl.load(first_phase + n * first_n), seen)
    return seen


@triton.jit(do_not_specialize=["sequences", "tokens"])
def _advance(phase, phase_n, first_phase, first_n, slots, out_slots, fresh, sequences, tokens,
             CHUNK: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < sequences
    where_from = tl.load(slots + n, mask=inside, other=-1).to(tl.int64)
    where_to = tl.load(out_slots + n, mask=inside, other=-1).to(tl.int64)
    seen = tl.load(phase + where_from * phase_n, mask=where_from >= 0, other=0)
    if fresh is not None:
        anew = tl.load(fresh + n, mask=inside, other=0) != 0
        seen = tl.where(anew, tl.load(first_phase + n * first_n, mask=inside, other=0), seen)
    there = (where_from >= 0) & (where_to >= 0)
    tl.store(phase + where_to * phase_n, (seen + tokens) % CHUNK, mask=there)


def advance(
    sequences: int, tokens: int, chunk: int, phase: Array, first_phase: Array, where: tuple[Array, Array, Array]
) -> None:
    """Count the tokens of a pool's chunks on: a launch of its own, for every head reads the phase."""
    block = 128
    _advance[(triton.cdiv(sequences, block),)](
        *(phase, phase.stride(0), first_phase, first_phase.stride(0), *where, sequences, tokens),
        CHUNK=chunk,
        BLOCK=block,
        num_warps=4,
    )
