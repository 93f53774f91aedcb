"""Sums of logarithms between two tokens of a chunk, and the inverse of a unit triangle.

    D_tj = e^{g_{j+1} + … + g_t} for t ≥ j, 0 above        (I + N)⁻¹ for a strictly lower N

Every exponent is a sum of logarithms of its own, a product with a matrix of zeros and ones: a difference of running
sums would lose what a reset to e^{−∞} leaves between them. Merging diagonal blocks is the stable way to the inverse; by
doubling, ``(I+N)(I+N²)…``, it is not.

    g [...,C,·]   D [...,C,C,·]   N [...,C,C]
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mixers.spec import Array

# e to this power is 0 in every dtype, and 0 times it is 0.
LOWEST = -2000.0

# A longer chunk has its sums from running sums of each column: a matrix of its size cubed would fill the memory.
_LARGEST = 64

EXACT = lax.Precision.HIGHEST


def logs(log_decay: Array) -> Array:
    """Logarithms without infinities."""
    return jnp.maximum(log_decay, LOWEST)


@functools.lru_cache(maxsize=16)
def _between(size: int) -> np.ndarray:
    """``[C,C,C]``: ones where ``j < l ≤ t``, axes t, j, l."""
    t, j, l = np.ogrid[:size, :size, :size]  # noqa: E741
    return ((j < l) & (l <= t)).astype(np.float32)


def between(log_decay: Array) -> Array:
    """D, from ``logs [...,C,K]``: ``[...,C,C,K]``; each of its columns from a matrix product."""
    *lead, size, width = log_decay.shape
    if size <= _LARGEST:
        ones = _between(size).reshape(size * size, size).astype(log_decay.dtype)
        sums = jnp.matmul(jnp.asarray(ones), log_decay, precision=EXACT).reshape(*lead, size, size, width)
    else:
        behind = np.tril(np.ones((size, size), bool), -1)[..., None]
        sums = jnp.cumsum(jnp.where(behind, log_decay[..., :, None, :], 0), axis=-3)
    lower = np.tril(np.ones((size, size), bool))[..., None]
    return jnp.where(lower, jnp.exp(sums), 0)


def before(log_decay: Array) -> Array:
    """``g_1 + … + g_t``."""
    size = log_decay.shape[-2]
    return jnp.matmul(jnp.asarray(np.tril(np.ones((size, size))), log_decay.dtype), log_decay, precision=EXACT)


def behind(log_decay: Array) -> Array:
    """``g_{t+1} + … + g_C``."""
    size = log_decay.shape[-2]
    return jnp.matmul(jnp.asarray(np.triu(np.ones((size, size)), 1), log_decay.dtype), log_decay, precision=EXACT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def unit_inverse(lower: Array, precision: lax.Precision) -> Array:
    """``(I + N)⁻¹``."""
    size = lower.shape[-1]
    index = np.arange(size)
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=lower.dtype), lower.shape)
    block = 1
    while block < size:
        row, column = index[:, None] // block, index[None, :] // block
        corner = jnp.where((row == column + 1) & (row % 2 == 1), lower, 0)
        if block == 1:
            inverse = inverse - corner
        else:
            inverse = inverse - jnp.matmul(
                jnp.matmul(inverse, corner, precision=precision), inverse, precision=precision
            )
        block *= 2
    return inverse


def _forward(lower: Array, precision: lax.Precision) -> tuple[Array, Array]:
    inverse = unit_inverse(lower, precision)
    return inverse, inverse


def _backward(precision: lax.Precision, inverse: Array, flow: Array) -> tuple[Array]:
    turned = jnp.swapaxes(inverse, -1, -2)
    return (-jnp.matmul(jnp.matmul(turned, flow, precision=precision), turned, precision=precision),)


unit_inverse.defvjp(_forward, _backward)
