"""What may not cost a GPU one launch a token or a chunk: two loops as Pallas kernels, lowered through Triton.

    lattice   one program a head and sequence; its slots stay in registers from the first token to the last
    chain     one program a head and block of values; the state stays in registers from the first chunk to the last

    exact Lattice   h = v − Sᵀk    a = S h    s̃ = μ s + beta z (h − a s)    s ← s̃/‖s̃‖    y = scale · Sᵀq
    chain           S_{j+1} = d_j ∘ S_j + A_j − L_jᵀ (R_j S_j)

Rows and columns beyond K and V are zeros in registers: a slot of zeros stays one there. Norms are measured.

    q, k [N,H,T,K]   v, y [N,H,T,V]   beta, log_decay [N,H,T,·]   S [N,H,K,V]   A [J,N,H,K,V]   L, R [J,N,H,C,K]
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mixers.algebra import unit_directions
from mixers.spec import Array

WIDEST = 128


def padded(width: int) -> int:
    """The power of two, from 16 up, that holds a width."""
    return max(16, 1 << (width - 1).bit_length())


def _grown(array: Array, *sizes: int) -> Array:
    """Zeros behind the last axes until they have these sizes."""
    lead = array.ndim - len(sizes)
    pads = [(0, 0)] * lead + [(0, size - have) for size, have in zip(sizes, array.shape[lead:], strict=True)]
    return jnp.pad(array, pads)


def _call(kernel: Any, shapes: Any, grid: tuple[int, ...], warps: int, interpret: bool) -> Any:
    from jax.experimental.pallas import triton

    params = triton.CompilerParams(num_warps=warps, num_stages=1)
    return pl.pallas_call(kernel, out_shape=shapes, grid=grid, compiler_params=params, interpret=interpret)


def _lattice_tokens(
    objective: str, read_norm: bool, scale: float, every: int,
    q: Any, k: Any, v: Any, beta: Any, mu: Any, first: Any, empty: Any, y: Any, last: Any, starts: Any,
) -> None:  # fmt: skip
    """One head of one sequence."""
    n, h = pl.program_id(0), pl.program_id(1)
    spare = empty[...]

    def token(t: Array, slots: Array) -> Array:
        key, value, query = k[n, h, t], v[n, h, t], q[n, h, t]
        strength, decay = beta[n, h, t], mu[n, h, t]
        held = value
        if objective == "decoding":
            held = value - jnp.sum(slots * key[:, None], axis=0)
        along = jnp.sum(slots * held[None, :], axis=1)
        z = strength * (key - along if objective == "encoding" else key)
        turned = slots * (decay - z * along)[:, None] + z[:, None] * held[None, :]
        square = jnp.sum(turned * turned, axis=1)
        void = square == 0.0
        unit = turned * jnp.where(void, 0.0, lax.rsqrt(jnp.where(void, 1.0, square)))[:, None]
        unit = jnp.where(void[:, None], spare, unit)
        read = unit if read_norm else turned
        y[n, h, t] = scale * jnp.sum(read * query[:, None], axis=0)
        return unit

    def block(b: Array, slots: Array) -> Array:
        starts[n, h, b] = slots
        return lax.fori_loop(b * every, b * every + every, token, slots)

    last[n, h] = lax.fori_loop(0, q.shape[2] // every, block, first[n, h])


def lattice(
    tokens: dict[str, Array], first: Array, objective: str, read_norm: bool, scale: float, every: int,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Exact Lattice: y ``[N,T,H,V]``, the last slots, and those before every so many tokens ``[N,H,·,K,V]``.

    Args:
        tokens: q, k, v, beta and log_decay, ``[N,T,H,…]`` in float32, key heads repeated.
        first: ``[N,H,K,V]``, none of its rows zero.
        objective, read_norm, scale: as in the specification.
        every: tokens between the slots that are kept.
        interpret: run in Pallas's interpreter.
    """
    (count, length, heads, values), keys = tokens["v"].shape, tokens["k"].shape[-1]
    wide, high = padded(values), padded(keys)
    rest = -length % every  # tokens without strength behind the last: they turn nothing
    q, k, v = (jnp.swapaxes(tokens[name], 1, 2) for name in ("q", "k", "v"))
    beta, log_decay = tokens["beta"], tokens.get("log_decay")
    beta = jnp.swapaxes(beta if beta.ndim == 4 else jnp.broadcast_to(beta[..., None], tokens["k"].shape), 1, 2)
    mu = jnp.ones((count, heads, length)) if log_decay is None else jnp.exp(jnp.swapaxes(log_decay, 1, 2))
    kernel = functools.partial(_lattice_tokens, objective, read_norm, scale, every)
    shapes = [
        jax.ShapeDtypeStruct((count, heads, length + rest, wide), jnp.float32),
        jax.ShapeDtypeStruct((count, heads, high, wide), jnp.float32),
        jax.ShapeDtypeStruct((count, heads, -(-length // every), high, wide), jnp.float32),
    ]
    run = _call(kernel, shapes, (count, heads), 4 if high * wide <= 4096 else 8, interpret)
    spare = _grown(jnp.asarray(unit_directions(keys, values), jnp.float32), high, wide)
    tall = length + rest
    y, last, starts = run(
        *(_grown(a, tall, high) for a in (q, k)), _grown(v, tall, wide), _grown(beta, tall, high),
        jnp.pad(mu, [(0, 0), (0, 0), (0, rest)], constant_values=1), _grown(first, high, wide), spare,
    )  # fmt: skip
    return jnp.swapaxes(y[:, :, :length, :values], 1, 2), last[..., :keys, :values], starts[..., :keys, :values]


def _chain_chunks(
    block: int, fades: bool, erases: bool, add: Any, decay: Any, left: Any, right: Any, first: Any, before: Any,
    last: Any, precision: Any = None,
) -> None:  # fmt: skip
    """One head of one sequence, a block of values."""
    n, h = pl.program_id(0), pl.program_id(1)
    columns = pl.ds(pl.program_id(2) * block, block)

    def chunk(j: Array, state: Array) -> Array:
        before[j, n, h, :, columns] = state
        after = add[j, n, h, :, columns] + (state * decay[j, n, h][:, None] if fades else state)
        if erases:
            read = jnp.dot(right[j, n, h], state, precision=precision, preferred_element_type=jnp.float32)
            after = after - jnp.dot(left[j, n, h].T, read, precision=precision, preferred_element_type=jnp.float32)
        return after

    last[n, h, :, columns] = lax.fori_loop(0, add.shape[0], chunk, first[n, h, :, columns])


def chain(
    add: Array, decay: Array | None, left: Array | None, right: Array | None, first: Array, precision: lax.Precision,
    interpret: bool = False,
) -> tuple[Array, Array]:  # fmt: skip
    """States before all chunks ``[J,N,H,K,V]``, and the last; names as in ``chain``."""
    chunks, count, heads, keys, values = add.shape
    high, block = padded(keys), min(32, padded(values))
    wide = -(-padded(values) // block) * block
    fades, erases = decay is not None, left is not None and right is not None
    nothing = jnp.zeros((1, 1, 1, 1), jnp.float32)
    size = padded(left.shape[-2]) if left is not None else 1
    kernel = functools.partial(_chain_chunks, block, fades, erases, precision=precision)
    shapes = [
        jax.ShapeDtypeStruct((chunks, count, heads, high, wide), jnp.float32),
        jax.ShapeDtypeStruct((count, heads, high, wide), jnp.float32),
    ]
    run = _call(kernel, shapes, (count, heads, wide // block), 4, interpret)
    before, last = run(
        _grown(add, high, wide),
        _grown(jnp.broadcast_to(decay, (*add.shape[:3], keys)), high) if decay is not None else nothing,
        _grown(left, size, high) if left is not None else nothing,
        _grown(right, size, high) if right is not None else nothing,
        _grown(first, high, wide),
    )
    return before[..., :keys, :values], last[..., :keys, :values]
