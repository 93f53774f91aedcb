"""One token of HAM at once, where a backend has a kernel of it: what streaming asks for again and again.

    p = Sᵀk      S' = e^g S + beta k (v − e^g p)ᵀ      m = [min over heads of e(p, v) ≥ threshold]
    m: cache'_s = (k', v'),  s = count, or count mod M with max_kept      count' = count + m
    y = gate_rnn ∘ scale S'ᵀq + gate_kv ∘ softmax over what is kept, near, or the token itself of attn_scale ⟨q', ·⟩

    q, k [N,1,G,K]   v, y [N,1,H,V]   gates, score, kept [N,1,H]   cache [N,M,A,E] and [N,M,D,V]   count [N] or [N,H]

``mixers.ham.step`` is the definition.
"""

from typing import Any, NamedTuple

from mixers.ham import HAMState, logit_scale
from mixers.linear import read_scale
from mixers.primitive import Primitive, Shapes, alike, run, served
from mixers.spec import Array, Options

TOKEN = (
    *("q", "k", "v", "beta", "log_decay", "attn_q", "attn_k", "attn_v", "gate_rnn", "gate_kv"),
    *("score", "kept", "threshold"),
)
CACHES = ("keys", "values", "window_keys", "window_values")
COUNTERS = ("count", "window_marks")
STATE = ("recurrence", *CACHES, *COUNTERS)


class Rules(NamedTuple):
    """What the options say to a kernel, as ``how`` tells it in words.

    Attributes:
        router, decide, threshold: as in ``mixers.ham``.
        ring: the cache has a cap, ``max_kept``.
        always: a token sees itself, kept or not.
        scale: of the recurrence's read.
    """

    router: str
    decide: str
    ring: bool
    always: bool
    threshold: float
    scale: float

    @classmethod
    def of(cls, how: str) -> "Rules":
        """From words."""
        router, decide, ring, always, threshold, scale = how.split()
        return cls(router, decide, bool(int(ring)), bool(int(always)), float(threshold), float(scale))


def _how(options: Options, key_dim: int) -> str:
    """``Rules`` in words; a tracer follows it."""
    ring, always = int(options["max_kept"] is not None), int(bool(options["include_self"] or options["window"]))
    words = options["router"], options["decide"], ring, always, options["threshold"], read_scale(options, key_dim)
    return " ".join(str(word) for word in words)


def _shapes(x: tuple[Array, ...], fixed: tuple[Array, ...], dtype: str, how: str) -> Shapes:
    v, query, recurrence = x[2], x[TOKEN.index("attn_q")], x[len(TOKEN)]
    wide, attended = "float64" if dtype == "float64" else "float32", str(query.dtype).removeprefix("torch.")
    decided = (*v.shape[:2], *fixed[0].shape[1:])
    return (
        *((tuple(v.shape), dtype), (decided, "bool"), (decided, wide), (tuple(recurrence.shape), wide)),
        *((tuple(a.shape), attended) for a in x[len(TOKEN) + 1 :]),
        *((tuple(a.shape), "int32") for a in fixed),
    )


PRIMITIVE = Primitive(
    "ham_step", (*TOKEN, "recurrence", *CACHES), COUNTERS, ("y", "kept", "score", *STATE), _shapes, ()
)
"""``factor`` scales the attention's logits, ``how`` holds ``Rules``. What attends and the caches are of one dtype; what
is left out of the token is None. Everything is written anew, nothing in place."""


def ham_step(
    library: Any, backend: str, options: Options, token: dict[str, Array], held: HAMState
) -> tuple[Any, tuple[Array, ...]] | None:
    """``((y, kept, score), state)`` by a backend's kernel where one serves these arrays, else None."""
    given = (*(token.get(name) for name in TOKEN), held.recurrence, *(getattr(held, name) for name in CACHES))
    if options["score_grad"] or not served(library, PRIMITIVE, backend, given):
        return None
    wide = "float64" if library.dtype(token["q"]) == "float64" else "float32"
    pairs = (("attn_q", "q"), ("attn_k", "k"), ("attn_v", "v"))
    sides = alike(library, wide, *(token[a] if token.get(a) is not None else token[b] for a, b in pairs))
    token = {**token, **dict(zip(("attn_q", "attn_k", "attn_v"), sides, strict=True))}
    caches = (library.cast(getattr(held, name), library.dtype(sides[0])) for name in CACHES)
    x = (*(token.get(name) for name in TOKEN), held.recurrence, *caches)
    scale, how = logit_scale(options, sides[0].shape[-1]), _how(options, token["q"].shape[-1])
    found = run(library, PRIMITIVE, backend, x, (held.count, held.window_marks), scale, how)
    assert found is not None
    state = held._replace(**dict(zip(STATE, found[3:], strict=True)))
    return found[:3], tuple(state)
