"""How much each token reads of every finished segment and of its own: causal prefix pools of keys, and a softmax.

    r_t = Σ_{j ≤ t in its segment} k_j      a_t,own = ⟨u_t, r_t / n_t⟩      a_ti = ⟨u_t, m_i⟩,  i < seen_t
    w_t = softmax over its own segment and the finished ones, or the ``top`` of these with the largest a_ti

    k [N,T,G,K]   u [N,T,H,K]   m [N,S,H,K], the mean r/n (or sum r) of each finished segment   n_t: its tokens so far
    w [N,H,S+1,T], own last; with ``top`` [N,H,top+1,T] and the segments that were chosen, [N,H,top,T], −1 for none

A segment that was cut by an earlier call has ``before`` tokens and the sum ``key_sum [N,H,K]`` of their keys.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from mixers.algebra import device_of, joined, softmax, stop, take_along
from mixers.primitive import Primitive, Shapes, alike, run
from mixers.spec import Array


@dataclass(frozen=True)
class Cuts:
    """Where the segments of some tokens lie.

    Attributes:
        tokens: how many there are.
        ends: behind the last token of every segment that ends among them.
        before: tokens of the first segment that went before.
        segment: tokens of a segment; 0 where these differ.
        finished: segments that ended before.
    """

    tokens: int
    ends: list[int]
    before: int
    segment: int
    finished: int

    @property
    def alone(self) -> int:
        """How many segments from the first one on are of a length of their own."""
        return int(bool(self.before and self.ends)) if self.segment else len(self.ends)

    def runs(self) -> list[tuple[int, int, int]]:
        """Segments of equal length side by side: first token, the one behind the last, how many segments."""
        cuts = [0, *self.ends, self.tokens]
        found = [(cuts[i], cuts[i + 1], 1) for i in range(self.alone)]
        found.append((cuts[self.alone], cuts[-2], len(self.ends) - self.alone))
        return [run for run in [*found, (cuts[-2], cuts[-1], 1)] if run[0] < run[1]]

    def sees(self, token: int) -> int:
        """Finished segments before a token."""
        return self.finished + sum(end <= token for end in self.ends)

    # As arrays, made where the others lie: a copy from the host could be captured in no graph.

    def bounds(self, xp: Any, beside: Array) -> Array:
        """The first token of every segment, and behind the last of all, int32; the unfinished one may have none."""
        here = {"dtype": xp.int32, **device_of(beside)}
        if not self.segment:
            return xp.concat([xp.full((1,), at, **here) for at in (0, *self.ends, self.tokens)])
        found = xp.arange(len(self.ends) + 2, **here) * self.segment - self.before
        found = xp.where(found > 0, found, xp.zeros_like(found))
        return xp.where(found < self.tokens, found, xp.full_like(found, self.tokens))

    def seen(self, xp: Any, beside: Array) -> Array:
        """Finished segments before each token, int32 ``[T]``."""
        at = xp.arange(self.tokens, dtype=xp.int32, **device_of(beside))
        if self.segment:
            return (at + self.before) // self.segment + self.finished
        return sum((xp.astype(at >= end, xp.int32) for end in self.ends), xp.zeros_like(at) + self.finished)

    def first(self, xp: Any, beside: Array) -> Array:
        """The first token that sees each finished segment, int32 ``[S]``."""
        before = xp.zeros((self.finished,), dtype=xp.int32, **device_of(beside))
        return xp.concat([before, self.bounds(xp, beside)[1:-1]])

    def passed(self, xp: Any, beside: Array) -> Array:
        """Tokens of its segment up to and with each token, int32 ``[T]``."""
        at = xp.arange(self.tokens, dtype=xp.int32, **device_of(beside)) + self.before
        if self.segment:
            return at % self.segment + 1
        lengths = (last - first for first, last in itertools.pairwise([-self.before, *self.ends]))
        gone = zip(self.ends, lengths, strict=True)
        return sum((-xp.astype(at - self.before >= end, xp.int32) * length for end, length in gone), at + 1)


class Weights(NamedTuple):
    """What tokens read, and what segments leave.

    Attributes:
        weights: see the module.
        chosen: the segments that were chosen; None where all are read.
        pooled: ``[N,P,H,K]``, those of the segments that end.
        key_sum: ``[N,H,K]``, of the last one.
    """

    weights: Array
    chosen: Array | None
    pooled: Array
    key_sum: Array


def _shapes(x: tuple[Array, ...], fixed: tuple[Array, ...], dtype: str, how: str) -> Shapes:
    (_, before, _, u), top = x, int(how.split()[1])
    (rows, tokens, heads, width), ends = u.shape, fixed[0].shape[0] - 2
    slots = (top or before.shape[1] + ends) + 1
    return (
        ((rows, heads, slots, tokens), "float32"),
        ((rows, heads, top, tokens), "int32"),
        ((rows, ends, heads, width), "float32"),
        ((rows, heads, width), "float32"),
    )


PRIMITIVE = Primitive(
    "segment_weights",
    ("k", "pooled", "key_sum", "u"),
    ("bounds", "seen"),
    ("weights", "index", "pooled", "key_sum"),
    _shapes,
    ("weights", "pooled", "key_sum"),
)
"""``factor`` is ``before``, ``how`` the pool and ``top`` (0 for all); widths are those of keys; no float64."""


def segment_weights(
    library: Any, backend: str, k: Array, pooled: Array, key_sum: Array, u: Array, cuts: Cuts, pool: str, top: int
) -> Weights:
    """By a backend's kernel where one serves these arrays, by array operations where none does.

    ``top`` is less than the number of segments, or 0 for all of them.
    """
    xp = library.namespace
    k, u = alike(library, library.dtype(key_sum), k, u)
    fixed = cuts.bounds(xp, u), cuts.seen(xp, u)
    found = run(library, PRIMITIVE, backend, (k, pooled, key_sum, u), fixed, float(cuts.before), f"{pool} {top}")
    if found is not None:
        weights, index, *left = found
        return Weights(weights, index if top else None, *left)
    heads, wide = u.shape[2], library.dtype(key_sum)
    k, u = library.cast(k, wide), xp.permute_dims(library.cast(u, wide), (0, 2, 3, 1))  # u [N,H,K,T]
    k = k if k.shape[2] == heads else xp.repeat(k, heads // k.shape[2], axis=2)
    running, new, last = pools(xp, k, key_sum, cuts, pool)
    own = xp.sum(u * xp.permute_dims(running, (0, 2, 3, 1)), axis=2)[:, :, None]
    means = xp.permute_dims(joined(xp, [pooled, new], axis=1), (0, 2, 1, 3))
    old = xp.matmul(means, u)  # [N,H,S,T]
    row = xp.arange(old.shape[2], **device_of(old))[:, None]
    seen = xp.broadcast_to(row < fixed[1][None, :], old.shape)
    index = None
    if top:
        low = stop(xp.where(seen, old, xp.full_like(old, -math.inf)))
        index = xp.argsort(-low, axis=2, stable=True)[:, :, :top]
        seen, old = take_along(xp, xp.astype(seen, xp.int32), index, 2) > 0, take_along(xp, old, index, 2)
        index = xp.where(seen, index, xp.full_like(index, -1))
    scores = xp.concat([old, own], axis=2)
    seen = xp.concat([seen, own == own], axis=2)
    weights = softmax(xp, xp.permute_dims(scores, (0, 1, 3, 2)), xp.permute_dims(seen, (0, 1, 3, 2)))
    return Weights(xp.permute_dims(weights, (0, 1, 3, 2)), index, new, last)


def pools(xp: Any, k: Array, key_sum: Array, cuts: Cuts, pool: str) -> tuple[Array, Array, Array]:
    """The pool of every token's segment so far ``[N,T,H,K]``, of every segment that ends, and the last sum of keys."""
    rows, _, heads, width = k.shape
    parts = []
    for first, last, count in cuts.runs():
        piece = xp.reshape(k[:, first:last], (rows, count, (last - first) // count, heads, width))
        piece = xp.cumulative_sum(piece, axis=2)
        if not first:
            others = xp.zeros((rows, count - 1, heads, width), dtype=k.dtype, **device_of(k))
            piece = piece + xp.concat([key_sum[:, None], others], axis=1)[:, :, None]
        parts.append(xp.reshape(piece, (rows, last - first, heads, width)))
    sums = joined(xp, parts, axis=1)
    over = bool(cuts.ends) and cuts.ends[-1] == cuts.tokens
    left = xp.zeros_like(key_sum) if over else sums[:, -1]
    number = xp.astype(cuts.passed(xp, k), k.dtype)[None, :, None, None]
    means = sums if pool == "sum" else sums / number
    return means, _at(xp, means, cuts), left


def _at(xp: Any, means: Array, cuts: Cuts) -> Array:
    """The rows of the last tokens of segments."""
    if not cuts.ends:
        return means[:, :0]
    if not cuts.segment:
        return xp.concat([means[:, end - 1 : end] for end in cuts.ends], axis=1)
    return means[:, cuts.ends[0] - 1 : cuts.ends[-1] : cuts.segment]
