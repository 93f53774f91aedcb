"""Rows of a cache and of new tokens, gathered in a given order.

    packed_r = [old, new]_{order_r}        d[old, new]_s = dpacked_{place_s}, 0 where place_s is −1

    old [N,M,A,E], old values [N,M,D,V]   new [N,T,·,·]   order [N,P] or [N,P,H], place [N,M+T] or [N,M+T,H], int32

``place`` is where a row goes to, so that nobody adds to what another adds to.
"""

from typing import Any

from mixers.algebra import joined, take_along
from mixers.primitive import Primitive, Shapes, run
from mixers.spec import Array


def _shapes(x: tuple[Array, ...], fixed: tuple[Array, ...], dtype: str, how: str) -> Shapes:
    rows = fixed[0].shape[1]
    return tuple(((a.shape[0], rows, *a.shape[2:]), dtype) for a in x[:2])


PRIMITIVE = Primitive(
    "kept_rows", ("k", "v", "old_k", "old_v"), ("order", "place"), ("keys", "values"), _shapes, ("keys", "values")
)


def kept_rows(
    library: Any, backend: str, new: tuple[Array, Array], old: tuple[Array, Array], order: Array, place: Array
) -> tuple[Array, Array]:
    """Keys and values, by a backend's kernel where one serves these arrays, by array operations where none does."""
    old = tuple(library.cast(a, library.dtype(b)) for a, b in zip(old, new, strict=True))
    found = run(library, PRIMITIVE, backend, (*new, *old), (order, place))
    if found is not None:
        keys, values = found
        return keys, values
    xp = library.namespace
    keys, values = (
        take_along(xp, rows, _wide(xp, order, rows))
        for rows in (joined(xp, [a, b], axis=1) for a, b in zip(old, new, strict=True))
    )
    return keys, values


def _wide(xp: Any, order: Array, rows: Array) -> Array:
    """The order for every number of a row."""
    order = order[..., None] if order.ndim == 3 else order[..., None, None]
    return xp.broadcast_to(order, (*order.shape[:2], *rows.shape[2:]))
