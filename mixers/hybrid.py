"""HAM by its parts: the recurrence by a backend's kernel, attention over kept tokens that were gathered.

recurrence   o_rnn = delta(q, k, v)
predictions  p_t = S_{t-1}ᵀ k_t: the same recurrence read by the next token's key, so p_{t+1} is its output at t
decisions    m_t, float32
gather       kept keys and values of cache and tokens, in order; query t sees the first n_t = count + Σ_{i≤t} m_i
window       shifts by 0 … window − 1 tokens of what the gathered rows do not hold, merged by their lse
token        alone: all of this at once, where a backend has a kernel of that (``mixers.ham_step``)
"""

import math
from typing import Any

from mixers import ham, reference
from mixers.algebra import device_of, inverse, read, stop, take_along
from mixers.call import Call
from mixers.ham import HAMState, paged, sides, spread
from mixers.ham_step import PRIMITIVE as STEP
from mixers.ham_step import ham_step
from mixers.kept_rows import PRIMITIVE as KEPT
from mixers.kept_rows import kept_rows
from mixers.mixer import Mixer
from mixers.packed import PRIMITIVE as PACKED
from mixers.packed import merge, packed_attention
from mixers.primitive import Primitive, Shapes, alike, run
from mixers.problem import Arrays
from mixers.spec import Array, Options


def _shapes(x: tuple[Array, ...], fixed: tuple[Array, ...], dtype: str, how: str) -> Shapes:
    v, first = x[2], x[5]
    wide = "float64" if dtype == "float64" else "float32"
    return (tuple(v.shape), dtype), (tuple(first.shape), wide), (tuple(v.shape[:3]), wide)


PREDICTIVE = Primitive(
    "predictive_delta",
    ("q", "k", "v", "beta", "log_decay", "first"),
    (),
    ("y", "last", "error"),
    _shapes,
    ("y", "last"),
)
"""The recurrence that also tells the error of every token's heads, ``[N,T,H]``, by the router that ``how`` names."""

PRIMITIVES = (KEPT, PACKED, PREDICTIVE, STEP)


def compose(library: Any, mixer: Mixer, call: Call, x: Arrays) -> Arrays:
    """See the module; named as in ``mixers.problem``."""
    alone = call.sizes.T == 1 and call.x.get("offsets") is None and call.spec.reserve is not None

    def whole(
        inputs: dict[str, Array], constants: dict[str, Array], state: tuple[Array, ...], passed: int
    ) -> tuple[Any, tuple[Array, ...]]:
        token, held = {**constants, **inputs}, HAMState(*state)
        return _alone(library, mixer, call, token, held) if alone else _whole(library, mixer, token, held)

    return reference.forward(library, call.spec, call.options, call.sizes, call.flags, x, whole, reserves=not alone)


def decide(mixer: Mixer, call: Call) -> Any:
    """The decisions of a call as a NumPy array, the recurrence alone being run; None where they cannot be known."""
    library = call.library
    if call.x.get("offsets") is not None or call.sizes.T == 0:
        return None
    x = library.given(call)
    token = {a.name: x.get(a.name) for a in (*call.spec.inputs, *call.spec.parameters)}
    _, keep = _decisions(library, mixer, token, x["initial.recurrence"])
    return library.host(keep)


def _recurrence(mixer: Mixer, token: dict[str, Array], unscaled: bool) -> Mixer:
    """The part that runs over every token; see ``ham._parts``."""
    return mixer.parts[2 * (token.get("log_decay") is None) + unscaled]


def _gates(token: dict[str, Array]) -> dict[str, Array]:
    return {name: token[name] for name in ("beta", "log_decay") if token.get(name) is not None}


def _ran(library: Any, mixer: Mixer, token: dict[str, Array], first: Array) -> tuple[Array, Array, Array | None]:
    """Output and last state of the recurrence, and errors where one kernel finds all three."""
    options = mixer.options
    if options["router"] != "given" and not options["score_grad"] and token["k"].shape[1] > 1:
        x = tuple(token.get(name) for name in ("q", "k", "v", "beta", "log_decay"))
        scale = token["k"].shape[3] ** -0.5 if options["scale"] is None else options["scale"]
        found = run(library, PREDICTIVE, mixer.backend, (*x, first), (), scale, options["router"])
        if found is not None:
            y, state, error = found
            return y, state, error
    result = library.call(
        _recurrence(mixer, token, False),
        q=token["q"],
        k=token["k"],
        v=token["v"],
        initial_state=first,
        **_gates(token),
    )
    return result.y, result.state, None


def _decisions(
    library: Any, mixer: Mixer, token: dict[str, Array], first: Array, error: Array | None = None
) -> tuple[Array, Array]:
    """Scores and decisions of every token, from the errors of its heads where they are known."""
    xp, options = library.namespace, mixer.options
    wide = "float64" if library.dtype(token["q"]) == "float64" else "float32"
    names = () if error is not None else ("k", "v", "beta", "log_decay", "score")
    held = {n: library.cast(token[n], wide) for n in names if token.get(n) is not None}
    held |= {name: token.get(name) for name in ("kept", "threshold")}
    predicted = None
    if options["router"] != "given" and error is None:
        if not options["score_grad"]:
            held = {n: a if a is None else stop(a) for n, a in held.items()}
            first = stop(first)
        predicted = _predictions(library, mixer, held, library.cast(first, wide))
    score = ham.scores(xp, options, held, predicted, error)
    return score, ham.decisions(xp, options, held, score)


def _predictions(library: Any, mixer: Mixer, token: dict[str, Array], first: Array) -> Array:
    """``S_{t-1}ᵀ k_t`` of every token, ``[N,T,H,V]``."""
    xp, k, v = library.namespace, token["k"], token["v"]
    heads = v.shape[2]
    begin = read(xp, first, spread(xp, k[:, 0], heads))[:, None]
    if k.shape[1] == 1:
        return begin
    # The last token's read is of no use, so it does not run.
    short = {n: a[:, :-1] for n, a in _gates(token).items()}
    reads = library.call(
        _recurrence(mixer, token, True),
        q=k[:, 1:],
        k=k[:, :-1],
        v=v[:, :-1],
        initial_state=first,
        return_state=False,
        **short,
    ).y
    return xp.concat([begin, reads], axis=1)


def _alone(
    library: Any, mixer: Mixer, call: Call, token: dict[str, Array], held: HAMState
) -> tuple[Any, tuple[Array, ...]]:
    """A single token, whose cache is given rows only where it has not its pages or the last free row may be taken.

    Kept tokens are counted before the token, and again only behind one that may take that row.
    """
    xp, most = library.namespace, library.largest(held.count)
    if most is None:
        assert call.spec.reserve is not None
        return _whole(library, mixer, token, HAMState(*call.spec.reserve(xp, held, 1)))
    held = paged(xp, mixer.options, held, most)
    outputs, state = _whole(library, mixer, token, held)
    after = HAMState(*state)
    most = library.largest(after.count) if most + 1 == held.keys.shape[1] else None
    return outputs, state if most is None else paged(xp, mixer.options, after, most)


def _whole(library: Any, mixer: Mixer, token: dict[str, Array], held: HAMState) -> tuple[Any, tuple[Array, ...]]:
    """Sequences of one length, side by side."""
    xp, options = library.namespace, mixer.options
    v = token["v"]
    if v.shape[1] == 1:
        found = ham_step(library, mixer.backend, options, token, held)
        if found is not None:
            return found
    heads, dtype = v.shape[2], library.dtype(v)
    wide = "float64" if dtype == "float64" else "float32"
    y, state, error = _ran(library, mixer, token, held.recurrence)
    score, keep = _decisions(library, mixer, token, held.recurrence, error)
    raised = ham.lift(xp, score) if options["score_grad"] else None

    q, k, value = alike(library, wide, *sides(xp, options, token))
    q = spread(xp, q, heads)
    scale = ham.logit_scale(options, q.shape[-1])
    rows = _Rows(library, options, held, keep)
    packed_k, packed_v = rows.packed(library, mixer.backend, (k, value), (held.keys, held.values))
    seen_k, seen_v, queries = packed_k[:, : rows.most], packed_v[:, : rows.most], q
    if raised is not None:
        # One more number a key: its bias, met by a one among the queries.
        bias = xp.concat([held.bias, library.cast(raised, wide)], axis=1)
        packed_b = rows.packed_plain(bias)
        packed_b = packed_b[..., None, None] if packed_b.ndim == 2 else packed_b[..., None]
        seen_b = library.cast(packed_b[:, : rows.most], library.dtype(k))
        seen_k = xp.concat([seen_k, xp.broadcast_to(seen_b, (*seen_k.shape[:3], 1))], axis=-1)
        queries = xp.concat([q, xp.full_like(q[..., :1], 1 / scale)], axis=-1)
    attended, lse = packed_attention(library, mixer.backend, queries, seen_k, seen_v, rows.low, rows.high, scale)
    if options["include_self"] or options["window"]:
        near = _near(library, options, rows, held, keep, q, k, value, raised, scale)
        attended = merge(xp, (library.cast(attended, wide), library.cast(lse, wide)), near)

    # Without gates a sum of two numbers in half precision is rounded once, as it would be of wider ones.
    y, attended = (
        x if token.get(gate) is None else ham.gated(library.cast(x, wide), library.cast(token[gate], wide))
        for x, gate in ((y, "gate_rnn"), (attended, "gate_kv"))
    )
    y = y + attended
    cache = rows.cache(packed_k, held.keys), rows.cache(packed_v, held.values)
    marks = xp.where(keep, rows.ordinal, xp.zeros_like(rows.ordinal))
    window = (_last(xp, held.window_keys, k), _last(xp, held.window_values, value), _last(xp, held.window_marks, marks))
    biases = (held.bias, held.window_bias)
    if raised is not None:
        biases = rows.cache_plain(packed_b, held.bias), _last(xp, held.window_bias, raised)
    return (library.cast(y, dtype), keep, score), (state, *cache, rows.count, *window, *biases)


def _last(xp: Any, ring: Array, new: Array) -> Array:
    """The last tokens, as many as before."""
    width = ring.shape[1]
    if not width:
        return ring
    return xp.concat([ring, xp.astype(new, ring.dtype)], axis=1)[:, -width:]


class _Rows:
    """Where kept tokens lie: in the cache as it was, among the new tokens, gathered, and in the cache as it will be.

    Attributes:
        low, high: ``[N,T,1]`` or ``[N,T,H]``, the gathered rows that a query sees.
        ordinal: ``[N,T]`` or ``[N,T,H]``, tokens kept since the beginning, up to and with each token.
        count: ``[N]`` or ``[N,H]``, the same after the last one.
    """

    def __init__(self, library: Any, options: Options, held: HAMState, keep: Array) -> None:
        xp = self._xp = library.namespace
        self._cap = options["max_kept"]
        self._room = room = held.keys.shape[1]
        tokens, before = keep.shape[1], held.count
        running = xp.cumulative_sum(xp.astype(keep, xp.int32), axis=1)
        running = xp.astype(running, before.dtype)
        self.ordinal = before[:, None] + running
        self.count = self.ordinal[:, -1]
        here = device_of(keep)
        shape = (1, room, *(1,) * (before.ndim - 1))
        row = xp.astype(xp.reshape(xp.arange(room, **here), shape), before.dtype)
        now = before[:, None]
        cached = now
        age = xp.broadcast_to(row, (before.shape[0], room, *before.shape[1:]))
        if self._cap:
            cached = xp.where(now < room, now, xp.full_like(now, room))
            age = xp.where(now < room, age, (age - now) % room)
        self._gone = (now - cached)[:, 0]
        high = cached + running
        low = xp.zeros_like(high)
        if self._cap:
            low = xp.where(high > room, high - room, low)
        self.low, self.high = (a if a.ndim == 3 else a[..., None] for a in (low, high))

        # Where every row of cache and tokens goes to, −1 for nowhere, and from where every gathered row comes. Without
        # a cap gathered rows are the cache that follows: what holds nothing stays where it is.
        self.total = high[:, -1]
        stays = row < cached
        if not self._cap:
            stays = stays | (row >= self.total[:, None])
        nowhere = xp.full_like(running, -1)
        place = xp.where(keep, cached + running - 1, nowhere)
        self.place = xp.concat([xp.where(stays, age, xp.full_like(age, -1)), place], axis=1)
        most = library.largest(high)
        self.most = room + tokens if most is None and self._cap else room if most is None else most
        self.order = inverse(xp, self.place, self.most if self._cap else room)

    def packed(
        self, library: Any, backend: str, new: tuple[Array, Array], old: tuple[Array, Array]
    ) -> tuple[Array, Array]:
        """Kept keys and values, gathered."""
        return kept_rows(library, backend, new, old, self.order, self.place)

    def packed_plain(self, rows: Array) -> Array:
        """Kept rows of ``[N,M+T]`` or ``[N,M+T,H]``, gathered."""
        return take_along(self._xp, rows, self.order)

    def _wide(self, index: Array, rows: Array) -> Array:
        return self._xp.broadcast_to(index, (*index.shape[:2], *rows.shape[2:]))

    def cache(self, packed: Array, old: Array) -> Array:
        """The cache that follows, from gathered rows ``[N,P,A,E]``; rows that hold nothing stay as they were."""
        xp, room = self._xp, self._room
        if not room:
            return old
        if not self._cap:
            return packed
        if not packed.shape[1]:
            return old
        # Slot s of the ring holds the last token whose number, less one, is s modulo the cap.
        slot = xp.reshape(xp.arange(room, **device_of(self.count)), (1, room, *(1,) * (self.count.ndim - 1)))
        count = self.count[:, None]
        ordinal = count - (count - 1 - xp.astype(slot, count.dtype)) % room
        place = ordinal - 1 - self._gone[:, None]
        place = xp.where(ordinal > 0, place, xp.zeros_like(place))
        index = xp.astype(place, self.order.dtype)
        index = index[..., None] if index.ndim == 3 else index[..., None, None]
        return self._filled(take_along(xp, packed, self._wide(index, packed)), old)

    def cache_plain(self, packed: Array, old: Array) -> Array:
        """The cache that follows, from gathered ``[N,P,A,1]``, as ``[N,M]`` or ``[N,M,H]``."""
        held = self.cache(packed, old[..., None] if old.ndim == 3 else old[..., None, None])[..., 0]
        return held if self.count.ndim == 2 else held[..., 0]

    def _filled(self, rows: Array, old: Array) -> Array:
        """The old rows where nothing is kept."""
        xp, room = self._xp, self._room
        row = xp.reshape(xp.arange(room, **device_of(self.count)), (1, room, *(1,) * (self.count.ndim - 1)))
        filled = row < self.count[:, None]
        filled = filled[..., None] if filled.ndim == 3 else filled[..., None, None]
        return xp.where(filled, rows, xp.astype(old, rows.dtype))


def _near(
    library: Any,
    options: Options,
    rows: _Rows,
    held: HAMState,
    keep: Array,
    q: Array,
    k: Array,
    v: Array,
    raised: Array | None,
    scale: float,
) -> tuple[Array, Array]:
    """Attention to the last tokens, as far as the gathered rows do not hold them: ``(y, lse)``."""
    xp = library.namespace
    wide = "float64" if library.dtype(v) == "float64" else "float32"
    tokens, heads, ring = q.shape[1], q.shape[2], held.window_keys.shape[1]
    marks = xp.where(keep, rows.ordinal, xp.zeros_like(rows.ordinal))
    marks = xp.concat([held.window_marks, marks], axis=1)
    keys, values = (
        xp.concat([library.cast(old, wide), library.cast(new, wide)], axis=1)
        for old, new in ((held.window_keys, k), (held.window_values, v))
    )
    biases = None if raised is None else xp.concat([held.window_bias, raised], axis=1)
    q = library.cast(q, wide)
    logits, seen = [], []
    for shift in range(max(options["window"], 1)):
        at = slice(ring - shift, ring - shift + tokens)
        score = scale * xp.sum(q * spread(xp, keys[:, at], heads), axis=-1)
        if biases is not None:
            bias = biases[:, at]
            score = score + (bias if bias.ndim == 3 else bias[..., None])
        mark = marks[:, at]
        unseen = mark == 0
        if options["max_kept"]:
            unseen = unseen | ((mark > 0) & (mark <= rows.ordinal - options["max_kept"]))
        unseen = unseen if unseen.ndim == 3 else xp.broadcast_to(unseen[..., None], score.shape)
        logits.append(score)
        seen.append(unseen)
    stacked, visible = xp.stack(logits, axis=-1), xp.stack(seen, axis=-1)
    top = stop(xp.max(xp.where(visible, stacked, xp.full_like(stacked, -math.inf)), axis=-1, keepdims=True))
    top = xp.where(top == -math.inf, xp.zeros_like(top), top)
    weights = xp.where(visible, stacked - top, xp.zeros_like(stacked))
    weights = xp.where(visible, xp.exp(weights), xp.zeros_like(stacked))
    total = xp.sum(weights, axis=-1)
    empty = total == 0
    total = xp.where(empty, xp.ones_like(total), total)
    y = sum(
        weights[..., shift][..., None] * spread(xp, values[:, ring - shift : ring - shift + tokens], heads)
        for shift in range(stacked.shape[-1])
    )
    lse = xp.where(empty, xp.full_like(total, -math.inf), top[..., 0] + xp.log(total))
    return y / total[..., None], lse
