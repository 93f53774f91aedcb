"""A walk over pieces: one ``lax.scan`` forward, one backward, and nothing kept but the state before each piece.

    state_j+1, y_j = piece(constants, state_j, tokens_j, about_j)

The backward computes a piece again and differentiates it, last piece first. In a pack, a piece that begins a sequence
starts from that sequence's first state.

    state: arrays [B,…]   tokens: a dictionary of [J,B,H,C,·]   y [J,B,H,C,·]   initial: arrays [N,…]
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mixers.arrays.jax import vary
from mixers.problem import Arrays
from mixers.spec import Array

from .pieces import Pieces

State = tuple[Array, ...]
Piece = Callable[[Arrays, State, Arrays, Arrays], tuple[State, Array]]


@dataclass(frozen=True)
class Walked:
    """What a walk leaves behind: states as the caller sees them, ``starts [J,B,…]`` for the backward."""

    y: Array
    final: State
    checkpoints: State
    starts: State


def about(pieces: Pieces) -> Arrays:
    """What is known of each piece but its tokens, along J."""
    found = {name: getattr(pieces, name) for name in ("valid", "phase", "ends", "sequence", "begins")}
    return {name: jnp.asarray(a) for name, a in found.items() if a is not None}


def _column(flag: Array, like: Array) -> Array:
    return flag.reshape(flag.shape + (1,) * (like.ndim - flag.ndim))


def start(initial: State, state: State, now: Arrays) -> State:
    """The state before a piece: the first of its sequence where it begins one."""
    if "begins" not in now:
        return state
    return tuple(jnp.where(now["begins"], i[now["sequence"]][None], a) for i, a in zip(initial, state, strict=True))


def opening(pieces: Pieces, initial: State) -> State:
    """The state before the first piece; a pack takes its own there."""
    return tuple(i[:1] for i in initial) if pieces.sequence is not None else initial


def stacked(pieces: Pieces) -> bool:
    """Whether states after all pieces are needed: for the ends of a pack's sequences, and for checkpoints."""
    return pieces.last is not None or pieces.marks is not None


def states_of(pieces: Pieces, initial: State, last: State, after: State) -> tuple[State, State]:
    """Final states and checkpoints, from the state after the last piece or those after all."""
    final = last if pieces.last is None else finals(pieces, initial, after)
    return final, checkpoints(pieces, after) if pieces.marks is not None else ()


def finals(pieces: Pieces, initial: State, after: State) -> State:
    """The states of a pack's sequences behind their last pieces; an empty sequence keeps its first."""
    last = jnp.asarray(pieces.last)
    at, full = jnp.minimum(last, pieces.count - 1), last < pieces.count
    return tuple(jnp.where(_column(full, i), a[at, 0], i) for i, a in zip(initial, after, strict=True))


def checkpoints(pieces: Pieces, after: State) -> State:
    """``[B,P,…]``: the states behind the pieces that end with a checkpoint."""
    return tuple(_at_marks(pieces, a) for a in after)


def _at_marks(pieces: Pieces, after: Array) -> Array:
    """``[B,P,…]`` from ``[J,B,…]``."""
    marks = jnp.asarray(pieces.marks)
    rows = jnp.moveaxis(after, 0, 1)
    if marks.shape[0] == 1:
        return jnp.take(rows, marks[0], axis=1, mode="fill", fill_value=0)
    return jax.vmap(lambda row, at: jnp.take(row, at, axis=0, mode="fill", fill_value=0))(rows, marks)


def walk(pieces: Pieces, piece: Piece, constants: Arrays, initial: State, tokens: Arrays, keep: bool) -> Walked:
    """Forward."""
    both = stacked(pieces)

    def body(state: State, now: Any) -> tuple[State, Any]:
        tokens, known = now
        state = start(initial, state, known)
        after, y = piece(constants, state, tokens, known)
        return after, (y, state if keep else (), after if both else ())

    last, (y, starts, after) = lax.scan(body, opening(pieces, initial), (tokens, about(pieces)))
    final, checkpoints = states_of(pieces, initial, last, after)
    return Walked(y, final, checkpoints, starts)


def back(
    pieces: Pieces,
    piece: Piece,
    constants: Arrays,
    initial: State,
    tokens: Arrays,
    starts: State,
    dy: Array,
    dfinal: State | None,
    dcheckpoints: State | None,
) -> tuple[Arrays, State, Arrays]:
    """Backward: gradients of constants, first states and tokens."""
    dinitial, dlast, dafter = pull_states(pieces, initial, dfinal, dcheckpoints)

    def body(carry: Any, now: Any) -> tuple[Any, Arrays]:
        dconstants, dinitial, dstate = carry
        tokens, known, state, dy, more = now
        dstate = tuple(d + m for d, m in zip(dstate, more, strict=True)) if more else dstate
        _, pull = jax.vjp(lambda c, s, t: piece(c, s, t, known), constants, state, tokens)
        dmine, dstate, dtokens = pull((dstate, dy))
        dinitial, dstate = start_back(dinitial, dstate, known)
        return (jax.tree.map(jnp.add, dconstants, dmine), dinitial, dstate), dtokens

    nothing = vary(jax.tree.map(jnp.zeros_like, constants), starts)
    known = about(pieces)
    carry = (nothing, dinitial, dlast)
    (dconstants, dinitial, dfirst), dtokens = lax.scan(body, carry, (tokens, known, starts, dy, dafter), reverse=True)
    return dconstants, opening_back(pieces, dinitial, dfirst), dtokens


def pull_states(
    pieces: Pieces, initial: State, dfinal: State | None, dcheckpoints: State | None
) -> tuple[State, State, State]:
    """Gradients of ``states_of``: of first states, of the state after the last piece, of those after all."""
    last = tuple(jnp.zeros_like(a) for a in opening(pieces, initial))
    dinitial = tuple(jnp.zeros_like(a) for a in initial)
    dlast, dafter = last, ()
    after = tuple(jnp.zeros((pieces.count, *a.shape), a.dtype) for a in last)
    if dfinal is not None and pieces.last is None:
        dlast = dfinal
    elif dfinal is not None:
        dinitial, dafter = jax.vjp(lambda *given: finals(pieces, *given), initial, after)[1](dfinal)
    if dcheckpoints is not None:
        (more,) = jax.vjp(lambda after: checkpoints(pieces, after), after)[1](dcheckpoints)
        dafter = tuple(d + m for d, m in zip(dafter, more, strict=True)) if dafter else more
    return dinitial, dlast, dafter


def start_back(dinitial: State, dstate: State, now: Arrays) -> tuple[State, State]:
    """Gradients of ``start``: what flows into a sequence's first state leaves the walk there."""
    if "begins" not in now:
        return dinitial, dstate
    here = tuple(jnp.where(now["begins"], d, 0) for d in dstate)
    dinitial = tuple(i.at[now["sequence"]].add(h[0]) for i, h in zip(dinitial, here, strict=True))
    return dinitial, tuple(jnp.where(now["begins"], 0, d) for d in dstate)


def opening_back(pieces: Pieces, dinitial: State, dfirst: State) -> State:
    """Gradients of ``opening``."""
    if pieces.sequence is not None:
        return dinitial
    return tuple(i + d for i, d in zip(dinitial, dfirst, strict=True))
