"""Serving: a few tokens for sequences whose states live in a pool, written in place.

    gather pool[slots]  →  run  →  scatter to pool[out_slots]

in one launch where a kernel does so in place, in these three steps where none does.

Slot −1 is padding. Sequences that start afresh take the mixer's first state instead of their slot's.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

from mixers.algebra import device_of
from mixers.arrays import library_of
from mixers.arrays.numpy import first_state
from mixers.backend import Pool
from mixers.call import Call, check_kept, with_cache
from mixers.spec import Array

if TYPE_CHECKING:
    from mixers.mixer import Mixer

MOST_TOKENS = 16


def decode(
    mixer: "Mixer",
    q: Array,
    k: Array,
    v: Array,
    gates: dict[str, Any],
    pool: Any,
    slots: Array,
    out_slots: Array | None,
    fresh: Array | None,
) -> Array:
    """See ``Mixer.decode``."""
    spec = mixer.spec
    if spec.reserve is not None:
        raise ValueError(f"{spec.name}: its state grows with every token, so no pool of fixed slots can hold it")
    library = library_of(q, "q")
    if library.name == "jax":
        raise TypeError("decode writes its pool in place, which JAX arrays cannot; call the mixer on gathered states")
    xp = library.namespace
    fields = spec.state(mixer.options).fields
    pools = tuple(pool) if len(fields) > 1 else (pool,)
    if len(pools) != len(fields):
        raise ValueError(f"{spec.name}: the pool has {len(pools)} arrays, expected {[f.name for f in fields]}")
    if q.ndim != 4 or q.shape[1] > MOST_TOKENS:
        raise ValueError(f"{spec.name}: decode takes q [B,T,G,K] with T ≤ {MOST_TOKENS}, got {tuple(q.shape)}")
    batch, room = q.shape[0], pools[0].shape[0]
    target = slots if out_slots is None else out_slots
    for name, given in (("slots", slots), ("out_slots", target)):
        _check_slots(spec.name, library, name, given, batch, room)
    call = mixer.validated(q, k, v, **gates)
    _check_pool(call, pools)
    if fresh is not None:
        _check_fresh(spec.name, library, fresh, batch)

    y = library.decode(mixer, call, Pool(pools, slots, target, fresh))
    if y is not None:
        return y

    real = slots >= 0
    source = xp.where(real, slots, xp.zeros_like(slots))
    state = tuple(xp.take(p, source, axis=0) for p in pools)
    if fresh is not None:
        state = tuple(
            xp.where(_column(xp, fresh, s), first, xp.astype(s, first.dtype))
            for first, s in zip(_first_state(call), state, strict=True)
        )
    y, state = mixer(q, k, v, initial_state=state if len(fields) > 1 else state[0], **gates)
    state = state if isinstance(state, tuple) else (state,)
    library.scatter(pools, state, real & (target >= 0), target)
    return xp.where(_column(xp, real, y), y, xp.zeros((), dtype=y.dtype, **device_of(y)))


def _first_state(call: Call) -> tuple[Array, ...]:
    """The spec's first state of one sequence, in the working dtype: a pool of halves does not round it."""
    library, q = call.library, call.x["q"]
    wide = "float64" if library.dtype(q) == "float64" else "float32"
    first = first_state(call.spec, call.options, call.sizes, wide)
    return tuple(library.from_numpy(a, a.dtype.name, q) for a in first)


def _column(xp: Any, flags: Array, like: Array) -> Array:
    return xp.reshape(flags, (-1, *(1,) * (like.ndim - 1)))


def _check_pool(call: Call, pools: tuple[Array, ...]) -> None:
    """Kernels that work in place address a pool by its strides alone: it must hold what they will find there."""
    spec, room = call.spec, pools[0].shape[0]
    sizes = dataclasses.replace(call.sizes, N=room)
    for field, pool in zip(spec.state(call.options).fields, pools, strict=True):
        check_kept(spec, call.library, "pool", field, pool, call.x["q"])
        sizes = with_cache(sizes, field, pool)
        shape, expected = tuple(pool.shape), sizes.shape(field.axes)
        if shape != expected:
            axes = field.axes.replace("N", "slots").replace(" ", ",")
            raise ValueError(f"{spec.name}: the pool's {field.name} has shape {shape}, expected [{axes}] = {expected}")


def _check_fresh(mixer: str, library: Any, fresh: Array, batch: int) -> None:
    if library_of(fresh, "fresh") is not library:
        raise TypeError(f"{mixer}: fresh is no {library.name} array, but q is; convert it")
    if tuple(fresh.shape) != (batch,):
        raise ValueError(f"{mixer}: fresh has shape {tuple(fresh.shape)}, expected [B] = ({batch},) booleans")


def _check_slots(mixer: str, library: Any, name: str, slots: Array, batch: int, room: int) -> None:
    if library_of(slots, name) is not library:
        raise TypeError(f"{mixer}: {name} is no {library.name} array, but q is; convert it")
    if not library.dtype(slots).startswith("int"):
        raise TypeError(f"{mixer}: {name} has dtype {library.dtype(slots)}; expected int32")
    if tuple(slots.shape) != (batch,):
        raise ValueError(f"{mixer}: {name} has shape {tuple(slots.shape)}, expected [B] = ({batch},)")
    if batch and library.device(slots) == "cpu":
        low, high = int(slots.min()), int(slots.max())
        if low < -1 or high >= room:
            raise ValueError(
                f"{mixer}: {name} reach from {low} to {high}; the pool has slots 0 to {room - 1}, padding is -1"
            )
