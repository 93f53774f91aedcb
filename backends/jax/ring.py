"""A sequence spread over devices: each has a piece of T, and states of pieces compose.

    S_end = M S_begin + A            M [K,K] and A [K,V] of a piece: what it does to a state, and what it adds

Call ``ring`` inside of ``jax.shard_map`` over the axis of T. Every device runs its piece once from nothing, with the
identity beside it, which gives A and M; an associative scan over devices gives the state that each piece begins with;
every device then runs its piece from there. Only the linear and delta families compose so.

    q, k, v, gates: this device's tokens, as in a call   states [B,H,K,V]
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mixers.mixer import Mixer
from mixers.result import Result
from mixers.spec import Array

from .delta_chunk import KERNELS

COMPOSE = frozenset(name for kernel in KERNELS for name in kernel.mixers)


def ring(
    mix: Mixer, axis: str, q: Array, k: Array, v: Array, *, initial_state: Array | None = None, **gates: Array
) -> Result:
    """Mix a sequence whose tokens are spread over the devices of a mesh's axis.

    Args:
        mix: a mixer of the linear or delta family.
        axis: the name of the axis of the mesh along which T is sharded, in the order of its tokens.
        q: ``[B,T/n,G,K]``, this device's tokens.
        k: ``[B,T/n,G,K]``.
        v: ``[B,T/n,H,V]``.
        initial_state: ``[B,H,K,V]``, the same on every device; None for zeros.
        gates: as in a call, this device's tokens.

    Returns:
        ``(y, state)``: this device's ``y [B,T/n,H,V]``, and the state after the whole sequence, the same everywhere.

    Raises:
        ValueError: the states of the mixer do not compose.
    """
    if mix.spec.name not in COMPOSE:
        raise ValueError(
            f"ring: the states of {mix.spec.name} do not compose; expected one of {', '.join(sorted(COMPOSE))}"
        )
    (batch, _, heads, values), keys = v.shape, q.shape[-1]
    wide = "float64" if v.dtype == jnp.float64 else "float32"
    first = jnp.zeros((batch, heads, keys, values), wide) if initial_state is None else initial_state.astype(wide)

    nothing = jnp.zeros((*v.shape[:-1], keys), v.dtype)
    identity = jnp.broadcast_to(jnp.eye(keys, dtype=wide), (batch, heads, keys, keys))
    beside = jnp.concatenate([jnp.zeros((batch, heads, keys, values), wide), identity], -1)
    both = mix(q, k, jnp.concatenate([v, nothing], -1), initial_state=beside, **gates).state.astype(wide)
    adds, turns = jnp.split(lax.all_gather(both, axis), [values], -1)

    def after(one: tuple[Array, Array], two: tuple[Array, Array]) -> tuple[Array, Array]:
        return _product(two[0], one[0]), _product(two[0], one[1]) + two[1]

    turns, adds = lax.associative_scan(after, (turns, adds))
    ends, here = _product(turns, first[None]) + adds, lax.axis_index(axis)
    begins = jnp.concatenate([first[None], ends[:-1]])[here]
    y, state = mix(q, k, v, initial_state=begins, **gates)
    last = jnp.where(here == len(ends) - 1, state, 0)
    return Result(y, lax.psum(last, axis))  # type: ignore[no-untyped-call]


def _product(a: Any, b: Any) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
