"""HAM, hybrid associative memory: attention sees only the tokens that the recurrence predicts badly.

    p_t = S_{t-1}ᵀ k_t                                before the update
    S_t, o_rnn = gated delta rule of every token      as in ``mixers.delta``
    e_t = 1 − ⟨p,v⟩ / max(‖p‖‖v‖, 1e-6)               router="cosine"
          ‖p − v‖                                     "l2"
          beta ‖e^{g} p − v‖                          "beta_l2"
          score_t, as the caller says                 "given"
    m_t = min over heads of e_t ≥ threshold           decide="all"; a head alone with decide="head"
    o_kv = softmax over {i ≤ t : m_i} of attn_scale ⟨q'_t, k'_i⟩, of v'_i          nothing is kept: 0
    y = gate_rnn ∘ o_rnn + gate_kv ∘ o_kv

    q, k [B,T,G,K]   v [B,T,H,V]   beta, log_decay, gate_rnn, gate_kv [B,T,H]   score, kept [B,T] or [B,T,H]
    q' = attn_q [B,T,J,E]   k' = attn_k [B,T,A,E]   v' = attn_v [B,T,D,V]   by default q, k and v; J, A, D divide H

A token is also seen by itself with ``include_self``, and by the ``window`` tokens up to it. ``max_kept`` caps the
cache: the oldest kept token leaves. No gradient flows through a decision, which is taken in float32 whatever the dtype;
``score_grad`` adds ``log e_i − stopgrad(log e_i)`` to the logits of token ``i``.

Source: arXiv 2603.22325. Ours: ``beta_l2``, ``decide="head"``, ``include_self``, ``window``, ``max_kept``,
``score_grad`` and ``attn_v``.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mixers.algebra import device_of, more_rows, outer, read, softmax, stop
from mixers.delta import BETA, delta_rule, gated_delta_rule
from mixers.linear import KEY, QUERY, SCALAR_DECAY, VALUE, fade, read_scale, scale_option, zero_state
from mixers.selection import at_least
from mixers.spec import Arg, Array, Field, MixerSpec, Option, Options, Sizes, StateLayout, choice, real, switch

COSINE_FLOOR = 1e-6
PAGE = 64
"""A cache without a cap has a whole number of pages of so many rows, of which at least one row is free."""


class HAMState(NamedTuple):
    """The recurrence, and the tokens that it predicted badly.

    Attributes:
        recurrence: ``[N,H,K,V]``, the state of the gated delta rule.
        keys: ``[N,M,A,E]``, kept keys in the order of their tokens; with ``max_kept`` a ring of that many rows. Heads
            are those of the values with ``decide="head"``.
        values: ``[N,M,D,V]``.
        count: ``[N]`` int32, tokens kept since the beginning; ``[N,H]`` with ``decide="head"``.
        window_keys: ``[N,W,A,E]``, the last ``W = window − 1`` tokens, newest last.
        window_values: ``[N,W,D,V]``.
        window_marks: ``[N,W]`` int32, how many tokens were kept up to and with each of them; 0 for one that was not
            kept, −1 for none; ``[N,W,H]`` with ``decide="head"``.
        bias: ``[N,M]``, zeros that carry gradients to the scores of kept tokens; of width 0 without ``score_grad``.
        window_bias: ``[N,W]``, the same for the window.
    """

    recurrence: Array
    keys: Array
    values: Array
    count: Array
    window_keys: Array
    window_values: Array
    window_marks: Array
    bias: Array
    window_bias: Array

    @property
    def nbytes(self) -> int:
        """The size of all its arrays in bytes."""
        return sum(int(a.nbytes) for a in self)


def layout_of(options: Options) -> StateLayout:
    """Heads decide alone, or all together."""
    alone = options["decide"] == "head"
    keys, values, head = ("H E", "H V", " H") if alone else ("A E", "D V", "")
    bias = options["score_grad"]
    return StateLayout(
        (
            Field("recurrence", "N H K V", "state of the gated delta rule"),
            Field("keys", f"N M {keys}", "kept keys", verbatim=True),
            Field("values", f"N M {values}", "kept values", verbatim=True),
            Field("count", f"N{head}", "tokens kept since the beginning", counter=True),
            Field("window_keys", f"N W {keys}", "keys of the last tokens", verbatim=True),
            Field("window_values", f"N W {values}", "values of the last tokens", verbatim=True),
            Field("window_marks", f"N W{head}", "which of them were kept", counter=True),
            Field("bias", f"N M{head}" if bias else "N O", "carries gradients to scores"),
            Field("window_bias", f"N W{head}" if bias else "N O", "the same for the window"),
        ),
        HAMState,
        bare=1,
    )


def first_state(sizes: Sizes, options: Options) -> tuple[np.ndarray, ...]:
    """Nothing is remembered, nothing kept."""
    room = {"M": options["max_kept"] or 0}
    found = []
    for f in layout_of(options).fields[1:]:
        shape = tuple(room[a] if a in room else sizes.shape(a)[0] for a in f.axes.split()[1:])
        fill = -1 if f.name == "window_marks" else 0
        found.append(np.full(shape, fill, np.int32 if f.counter else float))
    return (*zero_state(sizes, options), *found)


def adopt(xp: Any, given: Any, sizes: Sizes, options: Options) -> tuple[Array, ...]:
    """A bare state of the recurrence begins a sequence."""
    if isinstance(given, (tuple, list)):
        return tuple(given)
    rest = []
    for f, first in zip(layout_of(options).fields[1:], first_state(sizes, options)[1:], strict=True):
        dtype = xp.int32 if f.counter else given.dtype
        rest.append(xp.asarray(np.broadcast_to(first, (sizes.N, *first.shape)).copy(), dtype=dtype, **device_of(given)))
    return (given, *rest)


# Decisions.


def errors(xp: Any, options: Options, token: Mapping[str, Array], predicted: Array) -> Array:
    """``e [...,H]`` of every head, ``predicted`` being ``p [...,H,V]``."""
    v = token["v"]
    if options["router"] == "cosine":
        size = _norm(xp, predicted) * _norm(xp, v)
        size = xp.where(size > COSINE_FLOOR, size, xp.full_like(size, COSINE_FLOOR))
        return 1 - xp.sum(predicted * v, axis=-1) / size
    if options["router"] == "l2":
        return _norm(xp, predicted - v)
    decay = token.get("log_decay")
    faded = predicted if decay is None else predicted * xp.exp(decay)[..., None]
    return token["beta"] * _norm(xp, faded - v)


def _norm(xp: Any, x: Array) -> Array:
    """The Euclidean norm over the last axis; no gradient at 0."""
    square = xp.sum(x * x, axis=-1)
    zero = square == 0
    return xp.where(zero, xp.zeros_like(square), xp.sqrt(xp.where(zero, xp.ones_like(square), square)))


def scores(
    xp: Any, options: Options, token: Mapping[str, Array], predicted: Array | None, error: Array | None = None
) -> Array:
    """What is compared with the threshold: ``[...]`` for all heads, ``[...,H]`` for each alone.

    From predictions, or from errors that are known.
    """
    if options["router"] == "given":
        score, heads = token["score"], token["v"].shape[-2]
        if options["decide"] == "head" and score.ndim < token["v"].ndim - 1:
            score = xp.broadcast_to(score[..., None], (*score.shape, heads))
        return score
    error = errors(xp, options, token, predicted) if error is None else error
    return error if options["decide"] == "head" else xp.min(error, axis=-1)


def decisions(xp: Any, options: Options, token: Mapping[str, Array], score: Array) -> Array:
    """``score ≥ threshold`` in float32, or as the caller says; booleans shaped as the score."""
    forced = token.get("kept")
    if forced is not None:
        forced = forced != 0
        return xp.broadcast_to(forced[..., None], score.shape) if forced.ndim < score.ndim else forced
    threshold = token.get("threshold")
    if threshold is None:
        return at_least(xp, score, float(np.float32(options["threshold"])))
    return at_least(xp, score, xp.astype(threshold, xp.float32))


def lift(xp: Any, score: Array) -> Array:
    """``log e − stopgrad(log e)``: nothing but a gradient."""
    log = xp.log(xp.where(score > 0, score, xp.ones_like(score)))
    return log - stop(log)


# Attention.


def sides(xp: Any, options: Options, token: Mapping[str, Array]) -> tuple[Array, Array, Array]:
    """What attends, by default what the recurrence takes; with a head each where heads decide alone."""
    q, k, v = (
        token[name] if token.get(name) is not None else token[default]
        for name, default in (("attn_q", "q"), ("attn_k", "k"), ("attn_v", "v"))
    )
    if options["decide"] == "head":
        heads = token["v"].shape[-2]
        k, v = spread(xp, k, heads), spread(xp, v, heads)
    return q, k, v


def spread(xp: Any, x: Array, heads: int) -> Array:
    """``[...,A,E]`` with every head repeated for those that share it."""
    return x if x.shape[-2] == heads else xp.repeat(x, heads // x.shape[-2], axis=-2)


def logit_scale(options: Options, key_dim: int) -> float:
    """The option ``attn_scale``, or ``K**-0.5``."""
    scale: float | None = options["attn_scale"]
    return float(key_dim**-0.5) if scale is None else scale


def step(
    xp: Any, options: Options, token: Mapping[str, Array], state: tuple[Array, ...]
) -> tuple[Any, tuple[Array, ...]]:
    """One token: predict, decide, write into the recurrence and perhaps into the cache, read both."""
    held = HAMState(*state)
    k, v = token["k"], token["v"]
    predicted = read(xp, held.recurrence, k)
    faded = fade(xp, held.recurrence, token.get("log_decay"))
    write = token["beta"][..., None] * (v - read(xp, faded, k))
    recurrence = faded + outer(k, write)
    y = read_scale(options, k.shape[-1]) * read(xp, recurrence, token["q"])

    score = scores(xp, options, token, predicted)
    keep = decisions(xp, options, token, score)
    count = held.count + xp.astype(keep, held.count.dtype)
    attn_q, attn_k, attn_v = sides(xp, options, token)
    attn_k = attn_k[:, :: attn_k.shape[1] // held.keys.shape[2]]  # a key head that the reference has spread

    room = held.keys.shape[1]
    rows = xp.arange(room, **device_of(k))
    rows = xp.reshape(rows, (1, room, *(1,) * (count.ndim - 1)))
    slot = held.count % max(room, 1) if options["max_kept"] else held.count
    here = (rows == slot[:, None]) & keep[:, None]
    cache = tuple(
        xp.where(_to(xp, here, old.ndim), new[:, None], old)
        for old, new in ((held.keys, attn_k), (held.values, attn_v))
    )
    raised = lift(xp, score) if options["score_grad"] else None
    bias = held.bias if raised is None else xp.where(here, raised[:, None], held.bias)

    # Three groups of tokens: the cache, the window before this token, and this token.
    cached = xp.broadcast_to(rows < count[:, None], (count.shape[0], room, *count.shape[1:]))
    marks = held.window_marks
    outside = marks == 0
    if options["max_kept"]:
        outside = outside | ((marks > 0) & (marks <= count[:, None] - room))
    near = (outside & (marks >= 0)) if options["window"] > 1 else outside[:, :0]
    always = bool(options["include_self"] or options["window"])
    myself = ~keep if always else keep & ~keep
    seen = xp.concat([cached, near, myself[:, None]], axis=1)
    groups = (
        (cache[0], held.window_keys, attn_k[:, None]),
        (cache[1], held.window_values, attn_v[:, None]),
    )
    keys, values = (xp.concat(list(group), axis=1) for group in groups)
    added = None if raised is None else xp.concat([bias, held.window_bias, raised[:, None]], axis=1)
    attended = attend(xp, options, attn_q, keys, values, seen, added, v.shape[-2])

    y = gated(y, token.get("gate_rnn")) + gated(attended, token.get("gate_kv"))
    mark = xp.where(keep, count, xp.zeros_like(count))
    window = tuple(
        _shifted(xp, old, new) for old, new in ((held.window_keys, attn_k), (held.window_values, attn_v), (marks, mark))
    )
    window_bias = held.window_bias if raised is None else _shifted(xp, held.window_bias, raised)
    return (y, keep, score), (recurrence, *cache, count, *window, bias, window_bias)


def _to(xp: Any, flags: Array, ndim: int) -> Array:
    return xp.reshape(flags, (*flags.shape, *(1,) * (ndim - flags.ndim)))


def gated(x: Array, gate: Array | None) -> Array:
    """``[...,H,V]`` times a gate ``[...,H]``, where there is one."""
    return x if gate is None else x * gate[..., None]


def _shifted(xp: Any, ring: Array, new: Array) -> Array:
    """The newest token at the end, the oldest gone."""
    return xp.concat([ring[:, 1:], xp.astype(new, ring.dtype)[:, None]], axis=1) if ring.shape[1] else ring


def attend(
    xp: Any, options: Options, q: Array, keys: Array, values: Array, seen: Array, bias: Array | None, heads: int
) -> Array:
    """One token's attention, ``q [N,J,E]``, ``keys [N,M,A,E]``, ``values [N,M,D,V]``, ``seen [N,M]`` or ``[N,M,H]``."""
    q, keys, values = (spread(xp, x, heads) for x in (q, keys, values))
    logits = logit_scale(options, q.shape[-1]) * xp.sum(q[:, None] * keys, axis=-1)  # [N,M,H]
    if bias is not None:
        logits = logits + (bias if bias.ndim == 3 else bias[..., None])
    seen = seen if seen.ndim == 3 else xp.broadcast_to(seen[..., None], logits.shape)
    weights = softmax(xp, xp.permute_dims(logits, (0, 2, 1)), xp.permute_dims(seen, (0, 2, 1)))
    return xp.matmul(weights[:, :, None], xp.permute_dims(values, (0, 2, 1, 3)))[:, :, 0]


# A specification for every set of options, since the state depends on them.


def _growing(options: Options) -> tuple[str, ...]:
    """The fields with a row for every kept token; none where a cap gives them their size from the start."""
    names = ("keys", "values", "bias") if options["score_grad"] else ("keys", "values")
    return () if options["max_kept"] else names


def _reserve(options: Options) -> Any:
    """Room for as many tokens, where caches grow."""
    names = _growing(options)
    if not names:
        return None

    def reserve(xp: Any, state: tuple[Array, ...], tokens: int) -> tuple[Array, ...]:
        held = HAMState(*state)
        return tuple(held._replace(**{name: more_rows(xp, getattr(held, name), tokens) for name in names}))

    return reserve


def settle(call: Any, out: dict[str, Array]) -> dict[str, Array]:
    """The pages of what is kept, where that can be known: however a call was cut."""
    names = _growing(call.options)
    if not names:
        return out
    for prefix, axis in (("final", 1), ("checkpoint", 2)):
        counts = out.get(f"{prefix}.count")
        if counts is None:
            continue
        if call.sizes.T == 1 and out[f"{prefix}.keys"].shape[axis] == call.sizes.M:
            continue  # the composition has seen to it (``mixers.hybrid``), and to ask may be to wait
        most = call.library.largest(counts)
        for name in names if most is not None else ():
            out[f"{prefix}.{name}"] = _sized(call.library.namespace, out[f"{prefix}.{name}"], axis, most)
    return out


def paged(xp: Any, options: Options, held: HAMState, most: int) -> HAMState:
    """A state whose cache has the pages of ``most`` kept tokens."""
    return held._replace(**{name: _sized(xp, getattr(held, name), 1, most) for name in _growing(options)})


def _sized(xp: Any, rows: Array, axis: int, most: int) -> Array:
    """The pages of ``most`` kept tokens, by rows cut off or zeros put behind.

    One row of them is free: a single token finds room, and a full page that waits for its next token does not come and
    go with every one that is not kept.
    """
    found, room = rows.shape[axis], (most // PAGE + 1) * PAGE
    if found < room:
        return more_rows(xp, rows, room - found, axis)
    return rows if found == room else rows[(slice(None),) * axis + (slice(room),)]


def refuse(call: Any, token: bool) -> None:
    """Heads that do not fit, a score that is no number."""
    s = call.sizes
    for name, heads in (("attn_q", s.J), ("attn_k", s.A), ("attn_v", s.D)):
        if heads == 0 or s.H % heads:
            raise ValueError(f"ham: {name} has {heads} heads; expected a divisor of the {s.H} heads of v")
    score = call.x.get("score")
    at = None if score is None else call.library.first_nan(score)
    if at is not None:
        where = ", ".join(map(str, at))
        raise ValueError(f"ham: score is NaN at [{where}], the first of its positions; a decision wants a number")


def remark(mixer: Any, call: Any) -> str:
    """How much a call keeps, where that is worth saying."""
    from mixers.hybrid import decide

    kept = decide(mixer, call)
    if kept is None:
        return ""
    total, found = math.prod(kept.shape), int(kept.sum())
    if total and not found:
        how = "kept=" if call.x.get("kept") is not None else f"threshold={call.options['threshold']}"
        return f"{how} keeps none of the {total} decisions: the attention part is zero, the recurrence answers alone"
    return f"keeps {found} of {total} decisions"


@functools.lru_cache(maxsize=256)
def _specialised(key: str) -> MixerSpec:
    from mixers.hybrid import PRIMITIVES, compose

    options = json.loads(key)
    return dataclasses.replace(
        ham,
        inputs=_inputs(options),
        reserve=_reserve(options),
        compose=compose,
        traced=lambda call: call.x.get("offsets") is None,
        primitives=PRIMITIVES,
    )


def _inputs(options: Options) -> tuple[Arg, ...]:
    """A score where the caller routes, a decision a head where heads decide alone."""
    rows = "B T | B T H" if options["decide"] == "head" else "B T"
    score = Arg("score", rows, "what the caller's router says, compared with the threshold", draw="gate")
    return (
        *_RECURRENCE,
        *((score,) if options["router"] == "given" else ()),
        Arg("kept", rows, "forces the decisions", optional=True, draw="flag", flag=True),
        *_REST,
    )


def specialise(options: Options) -> MixerSpec:
    """The specification whose cache grows as the options say."""
    return _specialised(json.dumps(dict(options)))


def _parts(options: Options) -> tuple[tuple[MixerSpec, dict[str, Any]], ...]:
    """With decays and without, scaled as asked for and not at all, which is how predictions read."""
    specs, scales = (gated_delta_rule, delta_rule), (options["scale"], 1.0)
    return tuple((spec, spec.resolve({"scale": scale})) for spec in specs for scale in scales)


def _flops(sizes: Sizes, options: Options) -> float:
    return 9.0 * sizes.K * sizes.V + (sizes.K + sizes.V) * float(sizes.T)


def _is_threshold(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def _is_window(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_cap(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1)


_RECURRENCE = (
    QUERY,
    KEY,
    VALUE,
    BETA,
    Arg(SCALAR_DECAY.name, SCALAR_DECAY.axes, SCALAR_DECAY.doc, optional=True, draw=SCALAR_DECAY.draw),
)
_REST = (
    Arg("attn_q", "B T J E", "queries of the attention; default q", optional=True),
    Arg("attn_k", "B T A E", "its keys; default k", optional=True),
    Arg("attn_v", "B T D V", "its values; default v", optional=True),
    Arg("gate_rnn", "B T H", "factor on the recurrence's output; default 1", optional=True, draw="gate"),
    Arg("gate_kv", "B T H", "factor on the attention's output; default 1", optional=True, draw="gate"),
)
_ROUTERS = ("cosine", "l2", "beta_l2", "given")

ham = MixerSpec(
    name="ham",
    summary="a gated delta rule, and attention over the tokens that it predicts badly",
    equations=(
        "p_t = S_{t-1}ᵀ k_t,   o_rnn: the gated delta rule\n"
        "e_t = 1 − ⟨p,v⟩ / max(‖p‖‖v‖, 1e-6),   m_t = [min over heads of e_t ≥ threshold]\n"
        "o_kv = softmax over {i ≤ t : m_i} of attn_scale ⟨attn_q_t, attn_k_i⟩, of attn_v_i\n"
        "y = gate_rnn ∘ o_rnn + gate_kv ∘ o_kv"
    ),
    lends=lambda options: bool(options["score_grad"]),
    source="arXiv 2603.22325; beta_l2, decide='head', include_self, window, max_kept, score_grad, attn_v are ours",
    inputs=_inputs({"decide": "all", "router": "cosine"}),
    parameters=(Arg("threshold", "", "instead of the option, where it moves", optional=True, draw="gate"),),
    options=(
        Option("threshold", 0.5, "keeps a token whose error is as large", _is_threshold, "a number", (0.9,)),
        Option(
            "router",
            "cosine",
            "how a token's error is measured; 'given' takes score [B,T], or [B,T,H] with decide='head'",
            _ROUTERS.__contains__,
            "one of " + ", ".join(map(repr, _ROUTERS)),
            _ROUTERS[:3],
        ),
        choice("decide", ("all", "head"), "one decision for all heads, or one each"),
        switch("include_self", False, "a token sees itself, kept or not"),
        Option("window", 0, "a token sees the last so many, itself among them", _is_window, "a whole number", (0, 3)),
        Option("max_kept", None, "most tokens that are kept", _is_cap, "a whole number from 1 up, or None", (None, 4)),
        switch("score_grad", False, "let gradients reach the scores of kept tokens"),
        real("attn_scale", None, "factor on the logits of the attention; default K**-0.5"),
        scale_option("K**-0.5"),
    ),
    state=layout_of,
    first=first_state,
    step=step,
    flops=_flops,
    adopt=adopt,
    reserve=lambda xp, state, tokens: state,
    kept=lambda options: (),
    results=("kept", "score"),
    specialise=specialise,
    refuse=refuse,
    settle=settle,
    parts=_parts,
    remark=remark,
)

SPECS = (ham,)
