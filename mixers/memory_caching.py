"""Memory caching: a recurrence that also keeps its states at the ends of segments and reads them later.

A sequence is cut in segments. The memory ``C_i`` at the end of each finished one is kept, read-only; a token in segment
``s`` reads its online memory and the kept ones, each by the base mixer's own read (its ``scale`` included):

    residual   y = online_t + Σ_{i<s} C_i(q_t)
    gated      y = γ_s online_t + Σ_{i<s} γ_i C_i(q_t),   γ = softmax_{i≤s} ⟨u_t, m_i⟩
    soup       the memories themselves are mixed with γ, then read: differs from gated where the read is not linear
    sparse     gated over the online memory and the top_k finished segments of the largest ⟨u_t, m_i⟩

    u_t [B,T,H,K]  the input memory_query      m_i [N,H,K]  mean (or sum) of the keys of segment i; of its tokens so far
    where it is not finished

``init="checkpoint"`` lets a segment start from the last state, ``"independent"`` from the base's first.

Source: arXiv 2602.24281. Ours: the mean as the default pool, the causal mean of the unfinished segment, and that
segments of equal length go on across calls.
"""

import functools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mixers import attention, delta, lattice, linear, ttt, ttt_mlp
from mixers.algebra import device_of, like, more_rows, softmax, stop
from mixers.spec import (
    Arg,
    Array,
    Field,
    Memory,
    MixerSpec,
    Option,
    Options,
    Sizes,
    StateLayout,
    choice,
    count,
    unknown,
)

BASES: dict[str, MixerSpec] = {s.name: s for family in (linear, delta, lattice, ttt, ttt_mlp) for s in family.SPECS}
"""Mixers that may be wrapped, and those that a caller wrapped before."""

QUERY = Arg("memory_query", "B T H K", "what the segments' keys are matched with")
UNUSED_QUERY = Arg(QUERY.name, QUERY.axes, "not read by aggregate='residual'", optional=True)

OWN = (
    Field("pooled", "N S H K", "mean or sum of the keys of each finished segment"),
    Field("key_sum", "N H K", "sum of the keys of the segment so far"),
    Field("tokens", "N", "tokens of the segment so far", counter=True),
    Field("segments", "N", "finished segments", counter=True),
)


class MemoryCachingState(NamedTuple):
    """The base's state and the memories that are kept.

    Attributes:
        base: the base mixer's own state.
        kept: the memories of finished segments, ``[N,S,H,K,V]``; a tuple where the base's memory is one.
        pooled: ``[N,S,H,K]``, the mean (or sum) of their keys.
        key_sum: ``[N,H,K]``, the sum of the keys of the segment so far.
        tokens: ``[N]`` int32, its tokens.
        segments: ``[N]`` int32, finished segments: the rows of ``kept`` that are filled.
    """

    base: Any
    kept: Any
    pooled: Array
    key_sum: Array
    tokens: Array
    segments: Array

    @property
    def nbytes(self) -> int:
        """The size of all its arrays in bytes."""
        base, kept = (part if isinstance(part, tuple) else (part,) for part in (self.base, self.kept))
        return sum(int(a.nbytes) for a in (*base, *kept, *self[2:]))


def base_name(base: Any) -> str:
    """A base as an option: its name, and behind a colon its options where there are any."""
    if isinstance(base, str):
        return base
    if isinstance(base, MixerSpec):
        BASES.setdefault(base.name, base)
        return base.name
    BASES.setdefault(base.spec.name, base.spec)
    options = {o.name: base.options[o.name] for o in base.spec.options if base.options[o.name] != o.default}
    return str(base.spec.name) + (":" + json.dumps(options, sort_keys=True) if options else "")


def _is_base(base: Any) -> bool:
    if isinstance(base, MixerSpec) or (hasattr(base, "spec") and hasattr(base, "options")):
        return True
    return isinstance(base, str)


@functools.lru_cache(maxsize=256)
def base_of(name: str) -> tuple[MixerSpec, dict[str, Any]]:
    """The specification and the options of a base.

    Raises:
        ValueError: it is unknown, or has no matrix state.
    """
    word, _, options = name.partition(":")
    if word in (attention.attention.name, "ham", "memory_caching"):
        kind = "its state is a cache" if word != "memory_caching" else "it keeps memories already"
        raise ValueError(
            f"memory_caching: base={word!r} has no matrix state to keep ({kind}); take one of {', '.join(BASES)}"
        )
    if word not in BASES:
        raise ValueError(unknown("base of memory_caching", word, BASES))
    spec = BASES[word]
    if spec.memory is None:
        raise ValueError(
            f"memory_caching: base={word!r} has no matrix state to keep (its spec names no memory); take one of "
            f"{', '.join(n for n, s in BASES.items() if s.memory is not None)}"
        )
    return spec, spec.resolve(json.loads(options) if options else {})


def layout_of(options: Options) -> StateLayout:
    """The base's fields, what is kept of each segment, and the segment so far."""
    base, base_options = base_of(options["base"])
    inner, memory = base.state(base_options), _memory(base)
    fields = tuple(_renamed(f, f"base_{f.name}", f.axes) for f in inner.fields)
    kept = tuple(_renamed(f, f"kept_{f.name}", f.axes.replace("N", "N S", 1)) for f in memory.fields)
    cut = len(fields), len(fields) + len(kept)

    def build(*arrays: Array) -> MemoryCachingState:
        held = arrays[cut[0] : cut[1]]
        return MemoryCachingState(inner.pack(arrays[: cut[0]]), held[0] if len(held) == 1 else held, *arrays[cut[1] :])

    def flatten(state: MemoryCachingState) -> tuple[Array, ...]:
        held = state.kept if isinstance(state.kept, tuple) else (state.kept,)
        return (*inner.unpack(state.base), *held, *state[2:])

    return StateLayout((*fields, *kept, *OWN), build, flatten, bare=len(fields))


def _renamed(field: Field, name: str, axes: str) -> Field:
    return Field(name, axes, field.doc, field.counter, field.verbatim)


def _memory(base: MixerSpec) -> Memory:
    assert base.memory is not None
    return base.memory


def first_state(sizes: Sizes, options: Options) -> tuple[np.ndarray, ...]:
    """The base's first state, and nothing kept."""
    base, base_options = base_of(options["base"])
    own = layout_of(options).fields[len(base.state(base_options).fields) :]
    nothing = (np.zeros(sizes.shape(" ".join(f.axes.split()[1:])), np.int32 if f.counter else float) for f in own)
    return (*base.first(sizes, base_options), *nothing)


def adopt(xp: Any, given: Any, sizes: Sizes, options: Options) -> tuple[Array, ...]:
    """A state of the base alone begins a sequence."""
    layout = layout_of(options)
    if isinstance(given, MemoryCachingState):
        assert layout.flatten is not None
        return layout.flatten(given)
    base, base_options = base_of(options["base"])
    if isinstance(given, (tuple, list)) and (base.adopt is None or len(given) == len(layout.fields)):
        return tuple(given)
    inner = (given,) if base.adopt is None else base.adopt(xp, given, sizes, base_options)
    if len(inner) != len(base.state(base_options).fields):
        return tuple(inner)  # the caller of this function says what was expected
    beside = inner[0]
    kept = (
        xp.zeros(sizes.shape(f.axes), dtype=xp.int32 if f.counter else beside.dtype, **device_of(beside))
        for f in layout.fields[len(inner) :]
    )
    return (*inner, *kept)


def step(
    xp: Any, options: Options, token: Mapping[str, Array], state: tuple[Array, ...]
) -> tuple[Array, tuple[Array, ...]]:
    """One token of the base, a read of all memories, and at a segment's end one more memory."""
    base, base_options = base_of(options["base"])
    memory, inner = _memory(base), len(base.state(base_options).fields)
    held = len(memory.fields)
    kept, (pooled, key_sum, tokens, segments) = state[inner : inner + held], state[inner + held :]

    y, base_state = base.step(xp, base_options, token, state[:inner])
    key_sum, tokens = key_sum + token["k"], tokens + 1
    mean = pool(options, key_sum, tokens)
    room = pooled.shape[1]
    row = xp.arange(room, **device_of(pooled))[None, :]
    finished = row < segments[:, None]

    online = memory.of(xp, base_options, token, base_state)
    y = _read(xp, options, memory, base_options, token, y, online, kept, pooled, mean, finished)

    ends = token["ends"] if options["segment"] == "log" else tokens == options["segment"]
    here = (row == segments[:, None]) & ends[:, None]
    kept = tuple(_put(xp, here, old, new) for old, new in zip(kept, online, strict=True))
    if options["init"] == "independent":
        base_state = restarted(xp, options, ends, base_state, token["k"].shape, token["v"].shape)
    return y, (
        *base_state,
        *kept,
        _put(xp, here, pooled, mean),
        xp.where(ends[:, None, None], xp.zeros_like(key_sum), key_sum),
        xp.where(ends, xp.zeros_like(tokens), tokens),
        segments + xp.astype(ends, segments.dtype),
    )


def pool(options: Options, key_sum: Array, tokens: Array) -> Array:
    """The mean or sum of keys, ``[N,H,K]``."""
    return key_sum if options["pool"] == "sum" else key_sum / tokens[:, None, None]


def _read(
    xp: Any,
    options: Options,
    memory: Memory,
    base_options: Options,
    token: Mapping[str, Array],
    y: Array,
    online: tuple[Array, ...],
    kept: tuple[Array, ...],
    pooled: Array,
    mean: Array,
    finished: Array,
) -> Array:
    """The output of a token, given that of the base alone."""
    aggregate, room = options["aggregate"], pooled.shape[1]
    wide = {**token, "q": token["q"][:, None]}
    if aggregate == "residual":
        if not room:
            return y
        return y + xp.sum(_masked(xp, memory.recall(xp, base_options, wide, kept), finished), axis=1)

    query = token["memory_query"]
    scores = xp.concat([xp.sum(query[:, None] * pooled, axis=-1), xp.sum(query * mean, axis=-1)[:, None]], axis=1)
    scores = xp.permute_dims(scores, (0, 2, 1))  # [N,H,S+1]
    seen = xp.broadcast_to(finished[:, None, :], scores[..., :room].shape)
    if aggregate == "sparse" and room:
        seen = largest(xp, scores[..., :room], seen, options["top_k"])
    seen = xp.concat([seen, xp.ones_like(scores[..., :1]) == 1], axis=-1)
    weights = xp.permute_dims(softmax(xp, scores, seen), (0, 2, 1))[..., None]  # [N,S+1,H,1]

    if aggregate == "soup" and not memory.linear:
        mixed = tuple(_mixture(xp, weights, old, new) for old, new in zip(kept, online, strict=True))
        return memory.recall(xp, base_options, token, mixed)
    y = weights[:, room] * y
    if not room:
        return y
    reads = _masked(xp, memory.recall(xp, base_options, wide, kept), finished)
    return y + xp.sum(weights[:, :room] * reads, axis=1)


def _masked(xp: Any, reads: Array, finished: Array) -> Array:
    """Reads ``[N,S,H,V]`` of finished segments; a row that holds nothing yet may read as anything."""
    return xp.where(finished[:, :, None, None], reads, xp.zeros_like(reads))


def largest(xp: Any, scores: Array, seen: Array, top: int) -> Array:
    """Which of the seen scores are among the ``top`` largest along the last axis; the earlier wins a tie."""
    room = scores.shape[-1]
    scores = stop(scores)
    low = xp.where(seen, scores, xp.full_like(scores, -np.inf))
    at = xp.arange(room, **device_of(scores))
    ahead = (low[..., None, :] > low[..., :, None]) | (
        (low[..., None, :] == low[..., :, None]) & (at[None, :] < at[:, None])
    )
    return seen & (xp.sum(xp.astype(ahead, xp.int32), axis=-1) < top)


def _mixture(xp: Any, weights: Array, kept: Array, online: Array) -> Array:
    """Memories weighted, ``[N,S,H,...]`` and ``[N,H,...]`` to ``[N,H,...]``."""
    weights = xp.reshape(weights, (*weights.shape[:3], *(1,) * (online.ndim - 2)))
    return xp.sum(weights[:, :-1] * kept, axis=1) + weights[:, -1] * online


def _put(xp: Any, here: Array, old: Array, new: Array) -> Array:
    """``new [N,...]`` in the row of ``old [N,S,...]`` that is ``here [N,S]``."""
    at = xp.reshape(here, (*here.shape, *(1,) * (new.ndim - 1)))
    return xp.where(at, new[:, None], old)


def restarted(
    xp: Any, options: Options, ends: Array, state: tuple[Array, ...], keys: tuple[int, ...], values: tuple[int, ...]
) -> tuple[Array, ...]:
    """The base's first state where a segment ends; a graph may hold zeros, which are not copied from the host."""
    base, base_options = base_of(options["base"])
    rows, heads, width = keys
    sizes = Sizes(B=rows, T=1, G=heads, H=values[1], K=width, V=values[2], N=rows, C=base.chunk(base_options))
    fresh = base.first(sizes, base_options)
    return tuple(
        xp.where(xp.reshape(ends, (-1, *(1,) * (a.ndim - 1))), like(xp, f, a) if f.any() else xp.zeros_like(a), a)
        for f, a in zip(fresh, state, strict=True)
    )


def boundaries(tokens: int, segment: int | str, before: int = 0) -> list[int]:
    """Where segments end in a sequence of ``tokens``, of whose first segment ``before`` tokens have passed already."""
    if segment != "log":
        return list(range(int(segment) - before, tokens + 1, int(segment)))
    ends = np.cumsum([1 << bit for bit in reversed(range(tokens.bit_length())) if tokens >> bit & 1])
    return [int(n) for n in ends]


def _timed(xp: Any, tokens: int, beside: Array) -> dict[str, Array]:
    """Where the segments of ``segment="log"`` end: the binary expansion of the length, largest first."""
    ends = np.zeros((1, tokens), bool)
    for at in boundaries(tokens, "log"):
        ends[:, at - 1] = True
    return {"ends": xp.asarray(ends, **device_of(beside))}


def _reserve(options: Options) -> Any:
    """Room for every segment that may end within some tokens."""
    cut = len(layout_of(options).fields) - len(OWN)
    base, base_options = base_of(options["base"])
    inner = len(base.state(base_options).fields)

    def reserve(xp: Any, state: tuple[Array, ...], tokens: int) -> tuple[Array, ...]:
        segment = options["segment"]
        more = tokens.bit_length() if segment == "log" else (segment - 1 + tokens) // segment
        return tuple(more_rows(xp, a, more) if inner <= i <= cut else a for i, a in enumerate(state))

    return reserve


def settle(call: Any, out: dict[str, Array]) -> dict[str, Array]:
    """Rows of memories that are filled, and no more, where their number can be known."""
    for prefix in ("final", "checkpoint"):
        counts = out.get(f"{prefix}.segments")
        if counts is None:
            continue
        if call.sizes.T == 1 and out[f"{prefix}.pooled"].shape[-3] == call.sizes.S:
            continue  # nothing grew
        most = call.library.largest(counts)
        if most is None:
            return out
        for name in list(out):
            if name.startswith(f"{prefix}.kept_") or name == f"{prefix}.pooled":
                out[name] = out[name][:, :most] if prefix == "final" else out[name][:, :, :most]
    return out


def refuse(call: Any, token: bool) -> None:
    """``segment="log"`` cannot stream."""
    options = call.options
    if options["segment"] == "log" and (token or isinstance(call.given, MemoryCachingState)):
        raise ValueError(
            "memory_caching: segment='log' cuts a sequence by the binary expansion of its length, which streaming does "
            "not know; take a whole number for segment, or pass the whole sequence at once"
        )


@functools.lru_cache(maxsize=256)
def _specialised(key: str) -> MixerSpec:
    options = json.loads(key)
    base, base_options = base_of(options["base"])
    from mixers.cached import compose

    by_token = options["aggregate"] == "soup" and not _memory(base).linear

    return MixerSpec(
        name="memory_caching",
        summary=memory_caching.summary,
        equations=memory_caching.equations,
        source=memory_caching.source,
        inputs=(*base.inputs, QUERY if options["aggregate"] != "residual" else UNUSED_QUERY),
        parameters=base.parameters,
        options=memory_caching.options,
        state=layout_of,
        first=first_state,
        step=step,
        flops=_flops,
        adopt=adopt,
        exact_in_chunks=base.exact_in_chunks,
        reserve=_reserve(options),
        learned=base.learned,
        kept=lambda options: (),
        picks=_picks,
        specialise=specialise,
        chunk=lambda options: base.chunk(base_options),
        timed=_timed if options["segment"] == "log" else None,
        refuse=refuse,
        settle=settle,
        compose=compose,
        traced=lambda call: not by_token and _begins(call),
        parts=lambda options: (base_of(options["base"]),),
        tolerance=base.tolerance,
    )


def _begins(call: Any) -> bool:
    """Whether it is known at which token of a segment a call begins: at the first."""
    return all(a is None for name, a in call.x.items() if name == "offsets" or name.startswith("initial."))


def specialise(options: Options) -> MixerSpec:
    """The specification with the inputs, parameters and state of a base."""
    return _specialised(json.dumps(dict(options), sort_keys=True))


def _flops(sizes: Sizes, options: Options) -> float:
    base, base_options = base_of(options["base"])
    segment = options["segment"]
    segments = sizes.T.bit_length() if segment == "log" else sizes.T / segment / 2
    if options["aggregate"] == "sparse":
        segments = min(segments, options["top_k"])
    return base.flops(sizes, base_options) + 2.0 * sizes.K * sizes.V * segments


def _picks(options: Options) -> bool:
    return bool(options["aggregate"] == "sparse")


def _is_segment(value: Any) -> bool:
    return value == "log" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1)


_DEFAULT = delta.gated_delta_rule

memory_caching = MixerSpec(
    name="memory_caching",
    summary="a recurrence that keeps its states at the ends of segments and reads them later",
    equations=(
        "residual: y = online_t + Σ_{i<s} C_i(q_t)\n"
        "gated:    y = γ_s online_t + Σ_{i<s} γ_i C_i(q_t),   γ = softmax_{i≤s} ⟨u_t, m_i⟩\n"
        "soup:     (γ_s S_t + Σ_{i<s} γ_i C_i)(q_t)\n"
        "sparse:   gated over the online memory and the top_k finished segments\n"
        "m_i: mean or sum of the keys of segment i"
    ),
    source="arXiv 2602.24281; the mean as default and the causal mean of the unfinished segment are ours",
    inputs=(*_DEFAULT.inputs, QUERY),
    options=(
        Option(
            "base",
            _DEFAULT.name,
            "the mixer that is wrapped, as its name or as a mixer with its options",
            _is_base,
            "the name of a mixer, its spec, or mixers.get(...) of one",
            normal=base_name,
        ),
        Option(
            "segment", 256, "tokens of a segment, or 'log'", _is_segment, "a whole number from 1 up, or 'log'", (4,)
        ),
        choice("aggregate", ("gated", "residual", "soup", "sparse"), "how memories are read together"),
        count("top_k", 4, "finished segments that sparse reads", (2,)),
        choice("init", ("checkpoint", "independent"), "what a segment starts from"),
        choice("pool", ("mean", "sum"), "how the keys of a segment are pooled"),
    ),
    state=layout_of,
    first=first_state,
    step=step,
    flops=_flops,
    adopt=adopt,
    reserve=lambda xp, state, tokens: state,
    kept=lambda options: (),
    specialise=specialise,
)

SPECS = (memory_caching,)
