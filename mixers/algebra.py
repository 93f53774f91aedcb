"""The few matrix operations that every mixer's step is made of, over any array library.

S [..., K, V]   state, row i is slot i      k, q [..., K]      u, v [..., V]
"""

import functools
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from array_api_compat import is_torch_array

from mixers.spec import Array


def read(xp: Any, state: Array, query: Array) -> Array:
    """``Sᵀ q``: rows of the state weighted by the query, ``[..., V]``."""
    return xp.matmul(query[..., None, :], state)[..., 0, :]


def rows_dot(xp: Any, state: Array, value: Array) -> Array:
    """``S u``: the dot product of every row with a value, ``[..., K]``."""
    return xp.matmul(state, value[..., :, None])[..., 0]


def outer(key: Array, value: Array) -> Array:
    """``k uᵀ``, ``[..., K, V]``."""
    return key[..., :, None] * value[..., None, :]


@functools.lru_cache(maxsize=64)
def directions(rows: int, columns: int) -> np.ndarray:
    """The orthonormal DCT-IV matrix of size ``max(rows, columns)``, cut to ``[rows, columns]``; float64, read-only."""
    size = max(rows, columns)
    index = np.arange(size) + 0.5
    matrix: np.ndarray = math.sqrt(2.0 / size) * np.cos(math.pi / size * np.outer(index, index))[:rows, :columns]
    matrix.flags.writeable = False
    return matrix


@functools.lru_cache(maxsize=64)
def unit_directions(rows: int, columns: int) -> np.ndarray:
    """``directions`` with rows of norm 1; float64, read-only."""
    matrix = directions(rows, columns)
    unit: np.ndarray = matrix / np.linalg.norm(matrix, axis=-1, keepdims=True)
    unit.flags.writeable = False
    return unit


def softmax(xp: Any, logits: Array, seen: Array) -> Array:
    """Softmax over the last axis of what is seen, zeros elsewhere; all zeros where nothing is."""
    low = xp.where(seen, logits, xp.full_like(logits, -math.inf))
    top = xp.max(low, axis=-1, keepdims=True)
    top = stop(xp.where(top == -math.inf, xp.zeros_like(top), top))
    weights = xp.where(seen, xp.exp(xp.where(seen, logits - top, xp.zeros_like(logits))), xp.zeros_like(logits))
    total = xp.sum(weights, axis=-1, keepdims=True)
    return weights / xp.where(total == 0, xp.ones_like(total), total)


def stop(x: Array) -> Array:
    """The same numbers, through which no gradient flows."""
    if hasattr(x, "detach"):
        return x.detach()
    jax = sys.modules.get("jax")
    return jax.lax.stop_gradient(x) if jax is not None and isinstance(x, jax.Array) else x


def device_of(array: Array) -> dict[str, Any]:
    """The keyword that creates an array beside ``array``; libraries with one device, or none to name, need none."""
    return {"device": array.device} if is_torch_array(array) else {}


def take_along(xp: Any, array: Array, index: Array, axis: int = 1) -> Array:
    """``array[n, index[n, i, …], …]``; torch's ``take_along_dim`` would tie a compiler to the number of rows."""
    return array.gather(axis, index) if is_torch_array(array) else xp.take_along_axis(array, index, axis=axis)


def inverse(xp: Any, place: Array, size: int) -> Array:
    """``order[n, place[n, s, …], …] = s`` for rows of ``size``, of places that are −1 or all different.

    Rows that no place names hold any index.
    """
    nowhere = place < 0
    source = xp.arange(place.shape[1], **device_of(place))
    if is_torch_array(place):
        where = place.masked_fill(nowhere, size).long()
        source = source.reshape(1, -1, *(1,) * (place.ndim - 2)).expand(place.shape)
        found: Array = source.new_zeros((place.shape[0], size + 1, *place.shape[2:])).scatter(1, where, source)
        return found[:, :size]
    return xp.argsort(xp.where(nowhere, xp.full_like(place, size), place), axis=1, stable=True)[:, :size]


def joined(xp: Any, parts: Sequence[Array], axis: int) -> Array:
    """Parts one after another, the empty ones left out: a single one is not copied."""
    filled = [part for part in parts if part.shape[axis]] or list(parts[:1])
    return filled[0] if len(filled) == 1 else xp.concat(filled, axis=axis)


def more_rows(xp: Any, a: Array, rows: int, axis: int = 1) -> Array:
    """Zeros behind an axis."""
    shape = (*a.shape[:axis], rows, *a.shape[axis + 1 :])
    return joined(xp, [a, xp.zeros(shape, dtype=a.dtype, **device_of(a))], axis=axis)


def like(xp: Any, matrix: np.ndarray, array: Array) -> Array:
    """A NumPy matrix as an array of another's library, dtype and device."""
    return xp.asarray(np.array(matrix), dtype=array.dtype, **device_of(array))  # a copy: torch wants no read-only view
