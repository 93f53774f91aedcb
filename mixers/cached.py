"""Memory caching by its parts: the base by a backend's kernels, the states that it leaves at segment ends, and reads.

    base      one call with ``checkpoint_every=segment``, or one on a batch of segments (init="independent")
    weights   softmax over ⟨u_t, m_i⟩ of finished segments and the causal pool of the unfinished one
    read      of a segment's tokens X = [γ_1 ∘ q', γ_2 ∘ q', …] and the memories C = [C_1; C_2; …] below each other: X C

Where the read is not linear, memories are read one after another. What mixes them before a read that is not linear
(``soup`` over TTT) runs token by token, as the reference does, and so does a state that is traced.
"""

from typing import Any

import numpy as np

from mixers import reference
from mixers.algebra import like, softmax
from mixers.call import Call
from mixers.ham import spread
from mixers.memory_caching import boundaries, largest
from mixers.mixer import Mixer
from mixers.problem import Arrays
from mixers.spec import Array, Memory, MixerSpec, Options, Sizes

State = tuple[Array, ...]


def compose(library: Any, mixer: Mixer, call: Call, x: Arrays) -> Arrays:
    """See the module; named as in ``mixers.problem``."""
    (inner,) = mixer.parts
    fresh = not any(call.x.get(f"initial.{f.name}") is not None for f in call.spec.state(call.options).fields)
    run = _Run(library, call, mixer.options, inner, fresh)
    return reference.forward(library, call.spec, call.options, call.sizes, call.flags, x, run)


class _Run:
    """One call: the base as a mixer, and what the wrapper's options say; ``fresh`` from the first token on."""

    def __init__(self, library: Any, call: Call, options: Options, part: Mixer, fresh: bool) -> None:
        self.fresh = fresh
        self.library, self.xp, self.options, self.part = library, library.namespace, options, part
        self.call, self.base = call, part.spec
        assert self.base.memory is not None
        self.memory: Memory = self.base.memory
        self.inner = len(self.base.state(part.options).fields)
        self.held = len(self.memory.fields)

    def __call__(self, inputs: dict[str, Array], constants: dict[str, Array], state: State, passed: int) -> Any:
        """Sequences of one length; ``passed`` tokens of this call went before."""
        tokens, segments = self._before(state, passed if self.fresh else None)
        soup = self.options["aggregate"] == "soup" and not self.memory.linear
        if tokens is None or segments is None or soup:
            return self._by_token(inputs, constants, state)
        if self.fresh or len(set(zip(tokens, segments, strict=True))) <= 1:
            return _Rows(self, inputs, constants, state).run(int(tokens[0]), int(segments[0]))
        xp = self.xp  # sequences that are not at the same place of a segment
        found = []
        for n in range(len(tokens)):
            alone = {name: a if name == "ends" else a[n : n + 1] for name, a in inputs.items()}
            rows = _Rows(self, alone, constants, tuple(a[n : n + 1] for a in state))
            found.append(rows.run(int(tokens[n]), int(segments[n])))
        outputs, states = zip(*found, strict=True)
        return xp.concat(list(outputs), axis=0), tuple(xp.concat(list(c), axis=0) for c in zip(*states, strict=True))

    def _before(self, state: State, passed: int | None) -> tuple[Any, Any]:
        """Tokens of the segment so far and finished segments, of every sequence."""
        if passed is None:
            return self.library.host(state[-2]), self.library.host(state[-1])
        if self.options["segment"] == "log":
            ends = boundaries(self._length(), "log")
            done = [at for at in ends if at <= passed]
            return (passed - (done[-1] if done else 0),), (len(done),)
        return (passed % self.options["segment"],), (passed // self.options["segment"],)

    def _length(self) -> int:
        """Tokens of the whole call, which is one sequence a row wherever ``segment="log"`` runs by pieces."""
        return int(self.call.sizes.T)

    def _by_token(self, inputs: dict[str, Array], constants: dict[str, Array], state: State) -> Any:
        """The reference's own step."""
        library, spec, dtype = self.library, self.call.spec, self.library.dtype(inputs["v"])
        wide = "float64" if dtype == "float64" else "float32"
        heads = inputs["v"].shape[2]
        held = {
            n: a if n == "ends" else library.cast(spread(self.xp, a, heads) if n in ("q", "k") else a, wide)
            for n, a in inputs.items()
        }

        def step(token: dict[str, Array], state: State) -> Any:
            return spec.step(self.xp, self.call.options, {**constants, **token}, state)

        y, state = library.scan(step, state, held)
        return library.cast(y, dtype), state


class _Rows:
    """Sequences of one length that are all at the same place of a segment."""

    def __init__(self, run: _Run, inputs: dict[str, Array], constants: dict[str, Array], state: State) -> None:
        self.run_, self.library, self.xp, self.options = run, run.library, run.xp, run.options
        self.part, self.memory, self.constants = run.part, run.memory, constants
        self.inputs = {name: a for name, a in inputs.items() if name not in ("memory_query", "ends")}
        self.ends = inputs.get("ends")
        self.asked: Any = inputs.get("memory_query")
        self.tokens, self.heads = inputs["q"].shape[1], inputs["v"].shape[2]
        self.state = state[: run.inner]
        self.kept, (self.pooled, self.key_sum, self.count, self.segments) = (
            state[run.inner : run.inner + run.held],
            state[run.inner + run.held :],
        )
        self.dtype = self.library.dtype(inputs["v"])
        self.wide = "float64" if self.dtype == "float64" else "float32"

    def run(self, before: int, finished: int) -> tuple[Array, State]:
        """Output and state; ``before`` tokens of the segment have passed, ``finished`` segments are kept."""
        xp, cast = self.xp, self.library.cast
        ends = self._ends(before)
        cuts = [0, *ends, self.tokens]
        y, state, memories = self._base(cuts, ends, before)
        kept = tuple(
            xp.concat([old[:, :finished], *(m[i] for m in memories)], axis=1) for i, old in enumerate(self.kept)
        )
        k = spread(xp, cast(self.inputs["k"], self.wide), self.heads)
        pooled = [self.pooled[:, :finished]]
        key_sum, passed, parts = self.key_sum, before, []
        for s in range(len(cuts) - 1):
            first, last = cuts[s], cuts[s + 1]
            if first == last:
                continue
            running = xp.cumulative_sum(k[:, first:last], axis=1) + key_sum[:, None]
            number = like(xp, np.arange(passed + 1, passed + 1 + last - first), running)[None, :, None]
            means = self._pool(running, number)
            old = xp.concat(pooled, axis=1)
            parts.append(self._read(y, first, last, means, old, tuple(a[:, : finished + s] for a in kept)))
            key_sum, passed = running[:, -1], passed + last - first
            if s < len(ends):
                pooled.append(means[:, -1:])
                key_sum, passed = xp.zeros_like(key_sum), 0
        out = cast(xp.concat(parts, axis=1), self.dtype)
        room = self.pooled.shape[1]
        caches = (
            self._filled(old, new, room)
            for old, new in zip((*self.kept, self.pooled), (*kept, xp.concat(pooled, axis=1)), strict=True)
        )
        count = xp.zeros_like(self.count) + passed
        return out, (*state, *caches, key_sum, count, self.segments + len(ends))

    def _ends(self, before: int) -> list[int]:
        if self.options["segment"] != "log":
            return boundaries(self.tokens, self.options["segment"], before)
        marks = self.library.host(self.ends)
        if marks is None:
            return boundaries(self.tokens, "log")
        return [int(at) + 1 for at in np.nonzero(marks[0])[0]]

    def _pool(self, sums: Array, number: Array) -> Array:
        return sums if self.options["pool"] == "sum" else sums / number[..., None]

    def _filled(self, old: Array, new: Array, room: int) -> Array:
        """Rows that hold nothing yet stay as they were."""
        return self.xp.concat([self.library.cast(new, self.library.dtype(old)), old[:, new.shape[1] : room]], axis=1)

    # The base.

    def _call(self, first: int, last: int, state: State, every: int = 0) -> tuple[Array, State, tuple[Array, ...]]:
        """The base on some tokens: output, state, and the memories of the states after every so many."""
        layout = self.part.spec.state(self.part.options)
        result = self.library.call(
            self.part,
            **{name: a[:, first:last] for name, a in self.inputs.items()},
            **self.constants,
            initial_state=layout.pack(state),
            checkpoint_every=every or None,
        )
        memories = self._memories(layout.unpack(result.checkpoints)) if every else ()
        return result.y, layout.unpack(result.state), memories

    def _memories(self, states: State) -> tuple[Array, ...]:
        """Memories ``[N,P,...]`` of states ``[N,P,...]``."""
        xp = self.xp
        rows, count = states[0].shape[:2]
        flat = tuple(xp.reshape(a, (rows * count, *a.shape[2:])) for a in states)
        found = self.memory.of(xp, self.part.options, self.constants, flat)
        return tuple(xp.reshape(a, (rows, count, *a.shape[1:])) for a in found)

    def _base(self, cuts: list[int], ends: list[int], before: int) -> tuple[Array, State, list[tuple[Array, ...]]]:
        """Outputs of the base, its last state, and the memories at the ends of segments, in groups."""
        xp, segment = self.xp, self.options["segment"]
        independent = self.options["init"] == "independent"
        state, at, outputs, memories = self.state, 0, [], []
        # Pieces that are run alone: all of them, or the rest of a segment that has begun.
        whole = len(ends) if segment == "log" else int(bool(before and ends))
        for end in ends[:whole]:
            y, state, _ = self._call(at, end, state)
            memories.append(self._memories(tuple(a[:, None] for a in state)))
            state = self._fresh(state) if independent else state
            outputs.append(y)
            at = end
        left = len(ends) - whole
        if left and independent:
            y, found = self._side_by_side(at, ends[-1], left, state)
            outputs.append(y)
            memories.append(found)
            at, state = ends[-1], self._fresh(state)
        elif left:
            y, state, found = self._call(at, self.tokens, state, segment)
            return self._joined(outputs, y), state, [*memories, found]
        if at < self.tokens:
            y, state, _ = self._call(at, self.tokens, state)
            outputs.append(y)
        return xp.concat(outputs, axis=1), state, memories

    def _joined(self, outputs: list[Array], y: Array) -> Array:
        return self.xp.concat([*outputs, y], axis=1) if outputs else y

    def _fresh(self, beside: State, times: int = 1) -> State:
        """The base's first state for every sequence, ``times`` of each."""
        xp, v = self.xp, self.inputs["v"]
        rows = v.shape[0] * times
        base: MixerSpec = self.part.spec
        sizes = Sizes(
            B=rows, T=1, G=self.heads, H=self.heads, K=self.inputs["k"].shape[3], V=v.shape[3], N=rows,
            C=base.chunk(self.part.options),
        )  # fmt: skip
        first = base.first(sizes, self.part.options)
        return tuple(xp.broadcast_to(like(xp, f, a), (rows, *f.shape)) for f, a in zip(first, beside, strict=True))

    def _side_by_side(self, at: int, end: int, count: int, state: State) -> tuple[Array, tuple[Array, ...]]:
        """Independent segments as a batch; the first of them starts from the state that there is."""
        xp = self.xp
        rows, length = self.inputs["q"].shape[0], (end - at) // count
        fresh = self._fresh(state, count)
        begin = tuple(
            xp.reshape(
                xp.concat([a[:, None], xp.reshape(f, (rows, count, *f.shape[1:]))[:, 1:]], axis=1), tuple(f.shape)
            )
            for a, f in zip(state, fresh, strict=True)
        )
        cut = {name: xp.reshape(a[:, at:end], (rows * count, length, *a.shape[2:])) for name, a in self.inputs.items()}
        layout = self.part.spec.state(self.part.options)
        result = self.library.call(self.part, **cut, **self.constants, initial_state=layout.pack(begin))
        last = tuple(xp.reshape(a, (rows, count, *a.shape[1:])) for a in layout.unpack(result.state))
        return xp.reshape(result.y, (rows, end - at, *result.y.shape[2:])), self._memories(last)

    # Reads.

    def _read(self, y: Array, first: int, last: int, means: Array, pooled: Array, kept: tuple[Array, ...]) -> Array:
        """The outputs of a segment's tokens, given those of the base alone and the memories before it."""
        xp, cast = self.xp, self.library.cast
        y = cast(y[:, first:last], self.wide)
        count = pooled.shape[1]
        if not count:
            return y
        weights = None
        if self.options["aggregate"] != "residual":
            asked = xp.permute_dims(cast(self.asked[:, first:last], self.wide), (0, 2, 1, 3))  # [N,H,L,K]
            old = xp.matmul(asked, xp.permute_dims(pooled, (0, 2, 3, 1)))  # [N,H,L,S]
            own = xp.sum(asked * xp.permute_dims(means, (0, 2, 1, 3)), axis=-1)[..., None]
            seen = xp.ones_like(old) == 1
            if self.options["aggregate"] == "sparse" and self.options["top_k"] < count:
                seen = largest(xp, old, seen, self.options["top_k"])
            weights = softmax(xp, xp.concat([old, own], axis=-1), xp.concat([seen, own == own], axis=-1))
            y = y * xp.permute_dims(weights[..., -1:], (0, 2, 1, 3))
            weights = weights[..., :-1]
        q = spread(xp, cast(self.inputs["q"][:, first:last], self.wide), self.heads)
        if self.memory.query is not None:
            return y + self._linear(
                xp.permute_dims(self.memory.query(xp, self.part.options, q), (0, 2, 1, 3)), weights, kept[0]
            )
        for i in range(count):
            memory = tuple(a[:, None, i] for a in kept)
            read = self.memory.recall(xp, self.part.options, {**self.constants, "q": q}, memory)
            share = 1.0 if weights is None else xp.permute_dims(weights[..., i], (0, 2, 1))[..., None]
            y = y + share * read
        return y

    def _linear(self, q: Array, weights: Array | None, kept: Array) -> Array:
        """``Σ_i γ_i C_iᵀ q`` for ``q [N,H,L,K]``, ``weights [N,H,L,S]``, ``kept [N,S,H,K,V]``; ``[N,L,H,V]``."""
        xp = self.xp
        rows, heads, length, width = q.shape
        count, values = kept.shape[1], kept.shape[4]
        if weights is None:
            read = xp.matmul(q, xp.sum(kept, axis=1))
        else:
            spread_q = xp.reshape(weights[..., None] * q[..., None, :], (rows, heads, length, count * width))
            below = xp.reshape(xp.permute_dims(kept, (0, 2, 1, 3, 4)), (rows, heads, count * width, values))
            read = xp.matmul(spread_q, below)
        return xp.permute_dims(read, (0, 2, 1, 3))
