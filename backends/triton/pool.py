"""States in a pool: where kernels find those of a sequence, and where they leave them.

pool [slots, ...] of any strides   slots, out_slots [B], −1 for none   fresh [B]   phase [slots]
"""

import torch
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


@triton.jit
def count_on(seen, tokens, phase, phase_n, where_from, where_to, tickets, heads, CHUNK: tl.constexpr):
    """Leave how many tokens a chunk has seen: the last of a sequence's heads does, since all of them read it.

    It puts its ticket back to zero.
    """
    tl.debug_barrier()  # every warp has read the phase
    there = (where_from >= 0) & (where_to >= 0)
    drawn = tl.atomic_add(tickets + where_to, 1, mask=there)
    last = there & (drawn == heads - 1)
    tl.store(tickets + where_to, 0, mask=last)
    tl.store(phase + where_to * phase_n, (seen + tokens) % CHUNK, mask=last)


_tickets: dict[tuple[torch.device, int, int], Array] = {}


def tickets(phase: Array) -> Array:
    """A zero for each slot of a pool, int32, known by where its phases lie; zeros again after every launch.

    They are kept, for a graph may hold a launch: who gets that memory next finds its tickets there. Those that are made
    while a graph is captured are the graph's, which writes the zeros before each of its launches, and nobody else's.
    """
    where = phase.device, phase.data_ptr(), len(phase)
    found = _tickets.get(where)
    if found is None:
        found = torch.zeros(len(phase), dtype=torch.int32, device=phase.device)
        if not (phase.is_cuda and torch.cuda.is_current_stream_capturing()):
            _tickets[where] = found
    return found
