"""A row of tokens cut into pieces of equal room, none of which lies in two sequences.

Token t of a row is at place ``target[t]`` of ``J`` pieces with room for C tokens each; place c of piece j holds token
``index[j·C + c]``, or nothing. A piece ends where its sequence does, where a checkpoint is taken and, where a chunk is
part of the model, at the chunk's end: so states are needed at the ends of pieces alone.

    tokens [B,T,H,·]   pieces [J,B,H,C,·]   offsets [N+1]   phase [N]: tokens of its chunk that a sequence has seen

Without offsets and phase all this is known before anything is traced, and mostly a reshape. With them it is computed
with the arrays: their values may change without a new trace, their number may not.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixers.problem import Problem
from mixers.spec import Array


@dataclass(frozen=True)
class Pieces:
    """Where every token goes; ``R`` is B, or 1 where all rows are cut alike.

    Attributes:
        room: C.
        tokens: T.
        plain: pieces follow each other without gaps but for the end.
        whole: every piece begins where a chunk of the model does.
        closed: and ends where one does.
        index: ``[R,J·C]``; T for an empty place.
        target: ``[R,T]``.
        valid: ``[J,R,C]``, which places hold a token; None where all do.
        phase: ``[J,R]``, tokens of its chunk that lie before the piece; None where no chunk is part of the model.
        ends: ``[J,R]``, whether the piece ends a chunk.
        sequence: ``[J]``, the sequence of each piece of a pack; None for a batch.
        begins: ``[J]``, whether the piece begins a sequence.
        last: ``[N]``, the last piece of each sequence, J for an empty one; None for a batch.
        marks: ``[R,P]``, the pieces that end with a checkpoint, J where there is none; None where none is wanted.
        last_phase, mark_phase: ``[N]``, ``[R,P]``: the phases there.
    """

    room: int
    tokens: int
    plain: bool
    whole: bool
    closed: bool
    index: Array
    target: Array
    valid: Array | None
    phase: Array | None
    ends: Array | None
    sequence: Array | None
    begins: Array | None
    last: Array | None
    marks: Array | None
    last_phase: Array | None
    mark_phase: Array | None

    @property
    def count(self) -> int:
        """J."""
        count: int = self.index.shape[1] // self.room
        return count

    def split(self, x: Array) -> Array:
        """``[B,T,H,…]`` as ``[J,B,H,C,…]``, zeros in empty places."""
        batch, _, *rest = x.shape
        if self.plain:
            x = jnp.pad(x, [(0, 0), (0, self.index.shape[1] - self.tokens)] + [(0, 0)] * len(rest))
        else:
            x = _take(x, self.index)
        x = x.reshape(batch, self.count, self.room, *rest)
        return jnp.transpose(x, (1, 0, 3, 2, *range(4, x.ndim)))

    def join(self, y: Array) -> Array:
        """The way back."""
        count, batch, heads, room, *rest = y.shape
        y = jnp.transpose(y, (1, 0, 3, 2, *range(4, y.ndim))).reshape(batch, count * room, heads, *rest)
        return y[:, : self.tokens] if self.plain else _take(y, self.target)


def _take(x: Array, index: Array) -> Array:
    """Rows of ``x [B,T,…]`` at ``index [R,n]``, zeros beyond the last."""
    if index.shape[0] == 1:
        return jnp.take(x, index[0], axis=1, mode="fill", fill_value=0)
    return jax.vmap(lambda row, at: jnp.take(row, at, axis=0, mode="fill", fill_value=0))(x, index)


def cut(problem: Problem, room: int, offsets: Array | None, phase: Array | None, *, aligned: bool) -> Pieces:
    """Cut the rows of a problem.

    Args:
        problem: the call.
        room: C.
        offsets: of a pack, or None.
        phase: of the sequences; None for zeros.
        aligned: pieces end where the model's chunks do; ``room`` is then the model's chunk.
    """
    s, every = problem.sizes, problem.flags.checkpoint_every
    chunk = problem.option.get("chunk_size", 0)
    if offsets is None and (phase is None or not aligned):
        found = _row(np, s.T, room, every, chunk, aligned, np.array([0, s.T]), None, None)
        found = {name: a if a is None else a[None] for name, a in found.items()}
        if phase is not None:
            found |= _phases(phase, found, chunk)
    else:
        n = s.N if offsets is not None else 1
        count = min(s.T, s.T // room + 2 * n + (s.T // every if every else 0))

        def row(offsets: Array, phase: Array | None) -> dict[str, Array]:
            return _row(jnp, s.T, room, every, chunk, aligned, offsets, phase, count)

        if offsets is not None:
            found = {name: a if a is None else a[None] for name, a in row(offsets, phase).items()}
        else:
            found = jax.vmap(lambda p: row(jnp.array([0, s.T]), p[None]))(phase)
    packed = offsets is not None
    plain = isinstance(found["index"], np.ndarray) and bool((found["target"][0] == np.arange(s.T)).all())
    full = isinstance(found["valid"], np.ndarray) and bool(found["valid"].all())
    return Pieces(
        room=room,
        tokens=s.T,
        plain=plain,
        whole=plain and phase is None,
        closed=plain and phase is None and bool(np.all(found["ends"])),
        index=found["index"],
        target=found["target"],
        valid=None if full else _first(found["valid"]),
        phase=_first(found["phase"]) if chunk else None,
        ends=_first(found["ends"]) if chunk else None,
        sequence=found["sequence"][0] if packed else None,
        begins=found["begins"][0] if packed else None,
        last=found["last"][0] if packed else None,
        marks=found["marks"] if every else None,
        last_phase=found["last_phase"].reshape(-1) if chunk else None,
        mark_phase=found["mark_phase"] if every and chunk else None,
    )


def _first(array: Array) -> Array:
    """Pieces before rows."""
    return array.swapaxes(0, 1)


def _phases(phase: Array, found: dict[str, Any], chunk: int) -> dict[str, Array]:
    """Phases of rows that are cut alike."""
    return {
        name: (found[name] + phase[:, None]) % chunk
        for name in ("phase", "last_phase", "mark_phase")
        if found[name] is not None
    }


def _row(
    xp: Any,
    tokens: int,
    room: int,
    every: int,
    chunk: int,
    aligned: bool,
    offsets: Array,
    phase: Array | None,
    count: int | None,
) -> dict[str, Any]:
    """One row; ``count`` is J, None to find it."""
    t = xp.arange(tokens)
    sequence = xp.sum(offsets[None, 1:] <= t[:, None], axis=1)
    phases = xp.zeros_like(offsets[:-1]) if phase is None else phase
    position = t - offsets[sequence]
    seen = position + phases[sequence]
    begins = (position == 0) | ((seen if aligned else position) % room == 0)
    if every:
        begins = begins | (position % every == 0)
    piece = xp.cumsum(begins) - 1
    count = int(piece[-1]) + 1 if count is None else count
    starts = _starts(xp, begins, count)
    lengths, places = starts[1:] - starts[:-1], xp.arange(room)
    valid = places < lengths[:, None]
    head = xp.minimum(starts[:-1], tokens - 1)
    used = lengths > 0
    ages = offsets[1:] - offsets[:-1]
    found = {
        "index": xp.where(valid, starts[:-1, None] + places, tokens).reshape(-1),
        "target": piece * room + t - starts[piece],
        "valid": valid,
        "phase": seen[head] % chunk if chunk else None,
        "ends": used & ((seen[head] + lengths) % chunk == 0) if chunk else None,
        "sequence": sequence[head],
        "begins": used & (position[head] == 0),
        "last": xp.where(ages > 0, piece[xp.maximum(offsets[1:] - 1, 0)], count),
        "marks": None,
        "last_phase": (phases + ages) % chunk if chunk else None,
        "mark_phase": None,
    }
    if every:
        marks = ages // every
        total = xp.cumsum(marks)
        rows = xp.arange(tokens // every)
        n = xp.minimum(xp.sum(total[None, :] <= rows[:, None], axis=1), len(offsets) - 2)
        after = (rows - total[n] + marks[n] + 1) * every
        real = rows < total[-1]
        found["marks"] = xp.where(real, piece[xp.minimum(offsets[n] + after, tokens) - 1], count)
        if chunk:
            found["mark_phase"] = xp.where(real, (phases[n] + after) % chunk, 0)
    return found


def _starts(xp: Any, begins: Array, count: int) -> Array:
    """The first token of every piece, and the end of the last; T beyond it."""
    if xp is np:
        return np.append(np.flatnonzero(begins), len(begins))
    return jnp.nonzero(begins, size=count + 1, fill_value=begins.shape[0])[0]
