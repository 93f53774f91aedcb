"""Which tokens of a sequence are kept, from a score each: decisions as HAM's ``kept=`` takes them.

threshold   score_t ≥ threshold                      the one rule of these that needs no later token
quantile    the share of a sequence's tokens with the largest scores, rounded up
top         the so many of a sequence with the largest scores
recent      the last so many of a sequence

score [B,T] or [B,T,H], larger is kept first; of equal scores the earlier. Decided in float32 whatever the dtype.
"""

from typing import Any

import array_api_compat

from mixers.algebra import device_of, stop
from mixers.spec import Array


def at_least(xp: Any, score: Array, threshold: Any) -> Array:
    """``score ≥ threshold`` in float32."""
    return xp.astype(stop(score), xp.float32) >= threshold


def select(
    score: Array,
    *,
    threshold: float | None = None,
    quantile: float | None = None,
    top: int | None = None,
    recent: int | None = None,
    cu_seqlens: Any = None,
) -> Array:
    """Decisions by one rule, booleans shaped as ``score``.

    Args:
        score: ``[B,T]``, or ``[B,T,H]`` where heads decide alone, of NumPy, torch or JAX.
        threshold: keeps what scores as much.
        quantile: keeps this share of each sequence, 0 to 1.
        top: keeps so many of each sequence.
        recent: keeps the last so many of each sequence.
        cu_seqlens: ``[N+1]``, where the sequences of a pack begin and end; B is 1 then.

    Raises:
        ValueError: not one rule, a share or number that is none.
    """
    rules = {"threshold": threshold, "quantile": quantile, "top": top, "recent": recent}
    given = {name: amount for name, amount in rules.items() if amount is not None}
    if len(given) != 1:
        raise ValueError(f"select takes one of {', '.join(rules)}; got {', '.join(given) or 'none'}")
    ((rule, amount),) = given.items()
    if rule == "quantile" and not 0 <= amount <= 1:
        raise ValueError(f"quantile={amount}; expected a share of tokens, from 0 to 1")
    if rule in ("top", "recent") and (amount != int(amount) or amount < 0):
        raise ValueError(f"{rule}={amount}; expected a whole number of tokens, from 0 up")
    xp = array_api_compat.array_namespace(score)
    if rule == "threshold":
        return at_least(xp, score, amount)

    place, length, begin = _sequences(xp, score, cu_seqlens)
    if rule == "recent":
        return xp.broadcast_to(place >= length - int(amount), score.shape)
    # Ranked within its own sequence: sorted by score, and then, in that order, by sequence.
    order = xp.argsort(-xp.astype(stop(score), xp.float32), axis=1, stable=True)
    of = xp.broadcast_to(begin, score.shape)
    order = xp.take_along_axis(order, xp.argsort(xp.take_along_axis(of, order, axis=1), axis=1, stable=True), axis=1)
    rank = xp.argsort(order, axis=1, stable=True) - begin
    return rank < (int(amount) if rule == "top" else xp.ceil(xp.astype(length, xp.float32) * amount - 1e-4))


def _sequences(xp: Any, score: Array, cu_seqlens: Any) -> tuple[Array, Array, Array]:
    """Every token's place in its sequence, the sequence's length and beginning; ``[1,T]``, ``[1,T,1]``."""
    tokens = score.shape[1]
    at, here = xp.arange(tokens, **device_of(score)), device_of(score)
    begin, end = xp.zeros_like(at), xp.zeros_like(at) + tokens
    if cu_seqlens is not None:
        offsets = xp.astype(xp.asarray(cu_seqlens, **here), at.dtype)
        later = at[:, None] >= offsets[None, 1:-1]
        begin = xp.max(xp.where(later, offsets[None, 1:-1], 0), axis=1) if later.shape[1] else begin
        end = xp.min(xp.where(later, tokens, offsets[None, 1:-1]), axis=1) if later.shape[1] else end
    shape = (1, tokens, *(1,) * (score.ndim - 2))
    return tuple(xp.reshape(a, shape) for a in (at - begin, end - begin, begin))
