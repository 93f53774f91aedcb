"""The chain from chunk to chunk of a linear memory: all that must wait for its predecessor.

    S_{j+1} = d_j ∘ S_j + A_j − L_jᵀ (R_j S_j)        backward: G_j = d_j ∘ G_{j+1} + E_j − R_jᵀ (L_j G_{j+1})

Both directions are one recurrence with L and R exchanged. What goes in is computed for all chunks at once, before; what
follows from the states, behind.

    S, A, G, E [J,B,H,K,V]   d [J,B,H,K] or [J,B,H,1], or None: no decay   L, R [J,B,H,C,K], or None: nothing is erased
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from mixers.spec import Array

from . import gpu
from .pieces import Pieces
from .walk import State, about, opening, pull_states, stacked, start, start_back, states_of


class Link(NamedTuple):
    """What a chunk does to the state; see above."""

    add: Array
    decay: Array | None
    left: Array | None
    right: Array | None


def follow(state: Array, link: Link, precision: lax.Precision) -> Array:
    """One chunk further; any leading axes."""
    after = link.add + (state if link.decay is None else state * link.decay[..., None])
    if link.left is None or link.right is None:
        return after
    read = jnp.matmul(link.right, state, precision=precision)
    return after - jnp.matmul(jnp.swapaxes(link.left, -1, -2), read, precision=precision)


def chain(
    pieces: Pieces, links: Link, initial: State, precision: lax.Precision, fused: bool
) -> tuple[Array, State, State]:
    """States before all chunks ``[J,B,H,K,V]``, final states, checkpoints; ``fused``: in one kernel of a GPU."""
    both = stacked(pieces)
    if fused and not both:
        before, last = gpu.chain(*links, initial[0], precision)
        return before, (last,), ()

    def body(state: State, now: tuple[Link, dict[str, Array]]) -> tuple[State, tuple[Array, State]]:
        link, known = now
        state = start(initial, state, known)
        after = (follow(state[0], link, precision),)
        return after, (state[0], after if both else ())

    last, (before, after) = lax.scan(body, opening(pieces, initial), (links, about(pieces)))
    return before, *states_of(pieces, initial, last, after)


def chain_back(
    pieces: Pieces,
    links: Link,
    initial: State,
    flow: Array,
    dfinal: State | None,
    dcheckpoints: State | None,
    precision: lax.Precision,
    fused: bool,
) -> tuple[Array, State]:
    """Gradients of the states behind all chunks, and of the first states; ``flow``: of those before, from the reads."""
    dinitial, dlast, dafter = pull_states(pieces, initial, dfinal, dcheckpoints)
    links = Link(flow, links.decay, links.right, links.left)
    if fused and not stacked(pieces):
        turned = (None if a is None else jnp.flip(a, 0) for a in links)
        behind, first = gpu.chain(*turned, dlast[0], precision)
        return jnp.flip(behind, 0), (dinitial[0] + first,)

    def body(
        carry: tuple[State, State], now: tuple[Link, dict[str, Array], State]
    ) -> tuple[tuple[State, State], Array]:
        dinitial, dstate = carry
        link, known, more = now
        after = dstate[0] + more[0] if more else dstate[0]
        return start_back(dinitial, (follow(after, link, precision),), known), after

    (dinitial, dfirst), behind = lax.scan(body, (dinitial, dlast), (links, about(pieces), dafter), reverse=True)
    if pieces.sequence is None:
        dinitial = (dinitial[0] + dfirst[0],)
    return behind, dinitial
