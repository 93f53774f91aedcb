"""Lattice: a memory of unit vectors, each update orthogonal to the slot that it turns.

Every slot ``s_i`` is a unit vector. A token writes only the part of itself that the slot does not hold yet:

    s̃_i = μ_t s_i + beta_t z_i (h − s_i ⟨s_i, h⟩)        μ_t = e^{log_decay_t}, 1 when absent
    s_i ← s̃_i / ‖s̃_i‖
    y_t = scale · S_tᵀ q_t

    objective     loss               z              h
    decoding      ½‖v − Φᵀk‖²        k              v − Φᵀk      Φ: the slots as rows, before the token
    encoding      ½‖k − Φv‖²         k − Φv         v
    similarity    −⟨Φᵀk, v⟩          k              v

    q, k [B,T,G,K]   v [B,T,H,V]   beta [B,T,H] or [B,T,H,K]   log_decay [B,T,H]   S [N,H,K,V]   y [B,T,H,V]

With ``chunk_size=C > 1`` (part of the model: an approximation) the gradients of a whole chunk are taken at the chunk's
first slots ``Φ``, the running ``S̃`` adds them up, every read is of the normalised running slots (``read_norm=False``
reads ``S̃`` itself), and at the chunk's end ``Φ ← rownorm(S̃)``.

Source: arXiv 2504.05646. Ours: the optional decay, ``read_norm``, and the first state: slots of zeros have no
direction, so slots start as the rows of the orthonormal DCT-IV matrix; a slot of zeros, given or decayed to, stands for
its first direction.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mixers.algebra import device_of, like, read, rows_dot, unit_directions
from mixers.linear import KEY, QUERY, SCALAR_DECAY, VALUE, matrix_state, query, read_scale, recall
from mixers.spec import Arg, Array, Field, Memory, MixerSpec, Options, Sizes, StateLayout, choice, count, real, switch


class LatticeState(NamedTuple):
    """The state of Lattice with ``chunk_size > 1``, which may be cut anywhere inside a chunk.

    Attributes:
        start: ``[N,H,K,V]``, the slots at the chunk's first token.
        now: ``[N,H,K,V]``, the running slots, not normalised.
        phase: ``[N]`` int32, tokens of the chunk already seen.
    """

    start: Array
    now: Array
    phase: Array


CHUNKED = StateLayout(
    (
        Field("start", "N H K V", "slots at the chunk's first token"),
        Field("now", "N H K V", "running slots, not normalised"),
        Field("phase", "N", "tokens of the chunk already seen", counter=True),
    ),
    LatticeState,
)


def state_layout(options: Options) -> StateLayout:
    """A bare array for the exact recurrence, a ``LatticeState`` for chunks."""
    return matrix_state(options) if options["chunk_size"] == 1 else CHUNKED


def first_state(sizes: Sizes, options: Options) -> tuple[np.ndarray, ...]:
    """DCT-IV rows as slots (ours)."""
    slots = np.broadcast_to(unit_directions(sizes.K, sizes.V), (sizes.H, sizes.K, sizes.V))
    return (slots,) if options["chunk_size"] == 1 else (slots, slots, np.zeros((), np.int32))


def adopt(xp: Any, given: Any, sizes: Sizes, options: Options) -> tuple[Array, ...]:
    """A bare array of slots is the first state of a chunk."""
    if options["chunk_size"] == 1:
        return (given,)
    if isinstance(given, tuple):
        return given
    return given, given, xp.zeros(sizes.N, dtype=xp.int32, **device_of(given))


def unit_rows(xp: Any, slots: Array) -> Array:
    """Slots divided by their norms; a slot of zeros becomes its first direction."""
    square = xp.sum(slots * slots, axis=-1, keepdims=True)
    empty = square == 0
    unit = slots / xp.sqrt(xp.where(empty, xp.ones_like(square), square))
    return xp.where(empty, like(xp, unit_directions(*slots.shape[-2:]), slots), unit)


def normalised(xp: Any, slots: Array) -> Array:
    """Slots divided by their norms; those of zeros stay so, for the mixer to read as their first directions."""
    square = xp.sum(slots * slots, axis=-1, keepdims=True)
    return slots / xp.sqrt(xp.where(square == 0, xp.ones_like(square), square))


def given_slots(xp: Any, slots: Array) -> Array:
    """Slots as given, but for those of zeros, which stand for their first directions."""
    empty = xp.all(slots == 0, axis=-1, keepdims=True)
    return xp.where(empty, like(xp, unit_directions(*slots.shape[-2:]), slots), slots)


def update(xp: Any, options: Options, slots: Array, k: Array, v: Array) -> Array:
    """``Δ_i = z_i (h − φ_i ⟨φ_i, h⟩)``, ``[..., K, V]``: orthogonal to each unit slot."""
    h = v - read(xp, slots, k) if options["objective"] == "decoding" else v
    along = rows_dot(xp, slots, h)
    z = k - along if options["objective"] == "encoding" else k
    return z[..., :, None] * (h[..., None, :] - slots * along[..., :, None])


def step(
    xp: Any, options: Options, token: Mapping[str, Array], state: tuple[Array, ...]
) -> tuple[Array, tuple[Array, ...]]:
    """One token: turn the slots, read them, and at a chunk's end start the next chunk."""
    chunk = options["chunk_size"]
    start = given_slots(xp, state[0])
    now = start if chunk == 1 else given_slots(xp, state[1])
    beta, log_decay = token["beta"], token.get("log_decay")
    write = update(xp, options, start, token["k"], token["v"])
    kept = now if log_decay is None else now * xp.exp(log_decay)[..., None, None]
    now = kept + write * (beta[..., None, None] if beta.ndim == now.ndim - 2 else beta[..., None])
    slots = unit_rows(xp, now)
    y = options["scale"] * read(xp, slots if options["read_norm"] else now, token["q"])
    if chunk == 1:
        return y, (slots,)
    phase = state[2] + 1
    done = phase >= chunk
    at = done[:, None, None, None]
    state = xp.where(at, slots, start), xp.where(at, slots, now), xp.where(done, xp.zeros_like(phase), phase)
    return y, state


def slots_of(xp: Any, options: Options, token: Mapping[str, Array], state: tuple[Array, ...]) -> tuple[Array, ...]:
    """What a token behind this state would read: the running slots."""
    slots = given_slots(xp, state[-2] if len(state) > 1 else state[0])
    return (unit_rows(xp, slots) if len(state) > 1 and options["read_norm"] else slots,)


def _flops(sizes: Sizes, options: Options) -> float:
    prediction = 2.0 if options["objective"] == "decoding" else 0.0
    return (8.0 + prediction) * sizes.K * sizes.V


lattice = MixerSpec(
    name="lattice",
    summary="unit-vector slots turned by updates that are orthogonal to them",
    equations=(
        "s̃_i = μ_t s_i + beta_t z_i (h − s_i ⟨s_i, h⟩),   s_i ← s̃_i / ‖s̃_i‖,   μ_t = e^{log_decay_t}\n"
        "decoding: z = k, h = v − Sᵀk     encoding: z = k − S v, h = v     similarity: z = k, h = v\n"
        "y_t = scale · S_tᵀ q_t\n"
        "chunk_size > 1: z and h at the chunk's first slots, normalisation at its end (an approximation)"
    ),
    source="arXiv 2504.05646; decay, read_norm and the first state are ours",
    inputs=(
        QUERY,
        KEY,
        VALUE,
        Arg("beta", "B T H | B T H K", "write strength after its sigmoid, per head or per slot", draw="gate"),
        Arg(SCALAR_DECAY.name, SCALAR_DECAY.axes, SCALAR_DECAY.doc, optional=True, draw=SCALAR_DECAY.draw),
    ),
    options=(
        choice("objective", ("decoding", "encoding", "similarity"), "the loss whose gradient a token writes"),
        count("chunk_size", 1, "tokens whose gradients share one base point; 1 is exact", (1, 4, 16)),
        switch("read_norm", True, "read normalised slots"),
        real("scale", 1.0, "factor on the read; default 1"),
    ),
    state=state_layout,
    first=first_state,
    step=step,
    flops=_flops,
    memory=Memory((Field("slots", "N H K V"),), slots_of, recall, query, read_scale),
    adopt=adopt,
    learned=(normalised,),
    spacing=lambda options: options["chunk_size"] * -(-16 // options["chunk_size"]),
    kept=lambda options: (Field("slots", "R H K V", "slots at every spacing, unit rows"),),
    exact_in_chunks=False,
)

SPECS = (lattice,)
