"""One token of memory caching behind its base's, where a backend has a kernel of it: weights, reads, and the caches.

    r' = r + k      m_own = r'/(tokens + 1), or r'      a_i = ⟨u, m_i⟩, i < segments, and a_own
    w = softmax over the own segment and the finished ones, or the ``top_k`` of these with the largest a_i; all 1 with
    "residual"      out = w_own y + scale Σ_i w_i C_iᵀ q
    tokens + 1 = segment: C_segments = S, m_segments = m_own, segments + 1, tokens = r' = 0; else tokens + 1

    q, k [N,1,G,K]   y, out [N,1,H,V]   u [N,1,H,K]   S [N,H,K,V]   C [N,M,H,K,V]   m [N,M,H,K]   r [N,H,K]

``mixers.memory_caching.step`` is the definition.
"""

from typing import Any, NamedTuple

from mixers.primitive import Primitive, Shapes, run, served
from mixers.spec import Array, Options


class Rules(NamedTuple):
    """What the options say to a kernel, as ``how`` tells it in words.

    Attributes:
        aggregate, pool, segment, top_k: as in ``mixers.memory_caching``.
        appends: a segment may end, so caches come back with one row more; else they come back empty, and stay.
    """

    aggregate: str
    pool: str
    segment: int
    top_k: int
    appends: bool

    @classmethod
    def of(cls, how: str) -> "Rules":
        """From words."""
        aggregate, pool, segment, top_k, appends = how.split()
        return cls(aggregate, pool, int(segment), int(top_k), bool(int(appends)))


def _how(options: Options, appends: bool) -> str:
    """``Rules`` in words; a tracer follows it."""
    words = (*(options[name] for name in ("aggregate", "pool", "segment", "top_k")), int(appends))
    return " ".join(str(word) for word in words)


def _shapes(x: tuple[Array, ...], fixed: tuple[Array, ...], dtype: str, how: str) -> Shapes:
    (_, _, y, _, _, kept, pooled, key_sum), (tokens, segments) = x, fixed
    wide, appends = "float64" if dtype == "float64" else "float32", Rules.of(how).appends
    caches = ((a.shape[0], a.shape[1] + 1 if appends else 0, *a.shape[2:]) for a in (kept, pooled))
    return (
        *((tuple(y.shape), dtype), *((shape, wide) for shape in caches), (tuple(key_sum.shape), wide)),
        *((tuple(a.shape), "int32") for a in (tokens, segments)),
    )


PRIMITIVE = Primitive(
    "memory_step",
    ("q", "k", "y", "memory_query", "online", "kept", "pooled", "key_sum"),
    ("tokens", "segments"),
    ("out", "kept", "pooled", "key_sum", "tokens", "segments"),
    _shapes,
    (),
)
"""``factor`` is the scale, ``how`` holds ``Rules``."""


MOST_ROWS = {"float32": 8191, "float64": 4095}
"""Rows of caches that a kernel takes, by their dtype: with a score and a weight of each in 64 KiB, which a block of
threads has for itself from Ampere on. Where there are more, a token goes the way of longer sequences."""


def serves(library: Any, backend: str, pooled: Array, *arrays: Array) -> bool:
    """Whether there is a kernel for a cache of so many rows, and for q, k, v and what else goes into a token."""
    few = pooled.shape[1] <= MOST_ROWS[library.dtype(pooled)]
    return few and served(library, PRIMITIVE, backend, arrays)


def memory_step(
    library: Any, backend: str, options: Options, appends: bool, x: tuple[Array, ...], fixed: tuple[Array, ...],
    scale: float,
) -> tuple[Array, ...]:  # fmt: skip
    """The results, of arrays that are served."""
    found = run(library, PRIMITIVE, backend, x, fixed, scale, _how(options, appends))
    assert found is not None
    return found
