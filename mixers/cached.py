"""Memory caching by its parts: the base by a backend's kernels, the states that it leaves at segment ends, and reads.

    base      one call with ``checkpoint_every=segment``, or one on a batch of segments (init="independent")
    weights   softmax over ⟨u_t, m_i⟩ of finished segments and the causal pool of the unfinished one
    read      of a segment's tokens X = [γ_1 ∘ q', γ_2 ∘ q', …] and the memories C = [C_1; C_2; …] below each other: X C

Where the read is not linear, memories are read one after another. What mixes them before a read that is not linear
(``soup`` over TTT) runs token by token, as the reference does, and so does a state that is traced. A single token has a
kernel of its own behind the base's (``mixers.memory_step``) where a backend has that and memories are not too many.
"""

from typing import Any

import numpy as np

from mixers import memory_step, reference
from mixers.algebra import joined, like
from mixers.call import Call
from mixers.chosen_reads import chosen_reads, spread_out
from mixers.ham import spread
from mixers.memory_caching import boundaries, restarted
from mixers.mixer import Mixer
from mixers.problem import Arrays
from mixers.segment_weights import Cuts, pools, segment_weights
from mixers.spec import Array, Memory, MixerSpec, Options, Sizes
from mixers.state_reads import state_reads

State = tuple[Array, ...]


def compose(library: Any, mixer: Mixer, call: Call, x: Arrays) -> Arrays:
    """See the module; named as in ``mixers.problem``."""
    (inner,) = mixer.parts
    alone = call.sizes.T == 1 and call.x.get("offsets") is None and call.options["segment"] != "log"
    run = _Run(library, call, mixer.options, inner, alone)
    return reference.forward(library, call.spec, call.options, call.sizes, call.flags, x, run, reserves=not alone)


class _Run:
    """One call: the base as a mixer, and what the wrapper's options say.

    ``alone`` of a single token, whose state is not yet given the room it may need.
    """

    def __init__(self, library: Any, call: Call, options: Options, part: Mixer, alone: bool) -> None:
        self.library, self.xp, self.options, self.part = library, library.namespace, options, part
        self.call, self.base, self.alone = call, part.spec, alone
        assert self.base.memory is not None
        self.memory: Memory = self.base.memory
        self.inner = len(self.base.state(part.options).fields)
        self.held = len(self.memory.fields)

    def __call__(self, inputs: dict[str, Array], constants: dict[str, Array], state: State, passed: int) -> Any:
        """Sequences of one length; ``passed`` tokens of this call went before."""
        if self.alone:
            found = self._token(inputs, constants, state)
            if found is not None:
                return found
            assert self.call.spec.reserve is not None
            state = self.call.spec.reserve(self.xp, state, 1)
        tokens, segments = self._before(state, passed if self.call.begins else None)
        soup = self.options["aggregate"] == "soup" and not self.memory.linear
        if tokens is None or segments is None or soup:
            return self._by_token(inputs, constants, state)
        if self.call.begins or len(set(zip(tokens, segments, strict=True))) <= 1:
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

    def _token(self, inputs: dict[str, Array], constants: dict[str, Array], state: State) -> Any:
        """A single token by a kernel of its own behind the base's; None where there is none."""
        library, options, backend = self.library, self.options, self.part.backend
        first = (inputs[name] for name in ("q", "k", "v"))
        others = *inputs.values(), *constants.values(), *state
        *_, pooled, _, tokens, segments = state
        if not self.memory.linear or not memory_step.serves(library, backend, pooled, *first, *others):
            return None
        counts = library.host(self.xp.stack([tokens, segments]))
        ends = None if counts is None else counts[0] + 1 == options["segment"]
        rows = _Rows(self, inputs, constants, state)
        most = None if counts is None else int((counts[1] + ends).max(initial=0))
        return rows.token(ends is None or bool(ends.any()), most)

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
        xp, options = self.xp, self.options
        ends = self._ends(before)
        cuts = Cuts(self.tokens, ends, before, 0 if options["segment"] == "log" else options["segment"], finished)
        y, state, memories = self._base(cuts)
        kept = tuple(
            joined(xp, [old[:, :finished], *(m[i] for m in memories)], axis=1) for i, old in enumerate(self.kept)
        )
        old = self.pooled[:, :finished]
        if options["aggregate"] == "residual":
            _, new, key_sum = pools(xp, self._spread("k"), self.key_sum, cuts, options["pool"])
            y = self._residual(y, kept, cuts)
        else:
            count = kept[0].shape[1]
            top = options["top_k"] if options["aggregate"] == "sparse" and options["top_k"] < count else 0
            weights, index, new, key_sum = segment_weights(
                self.library, self.part.backend, self.inputs["k"], old, self.key_sum, self.asked, cuts,
                options["pool"], top,
            )  # fmt: skip
            y = self._weighted(y, kept, weights, index, cuts)
        room = self.pooled.shape[1]
        caches = (
            self._filled(before, after, room)
            for before, after in zip((*self.kept, self.pooled), (*kept, joined(xp, [old, new], axis=1)), strict=True)
        )
        count = xp.zeros_like(self.count) + (self.tokens - ends[-1] if ends else before + self.tokens)
        return self.library.cast(y, self.dtype), (*state, *caches, key_sum, count, self.segments + len(ends))

    def token(self, appends: bool, most: int | None) -> tuple[Array, State]:
        """A single one: output and state, whose caches have a row more where a segment may end, ``most`` if known."""
        y, state, _ = self._call(0, 1, self.state)
        q, scale = self._query()
        online = self.memory.of(self.xp, self.part.options, self.constants, state)
        asked = None if self.options["aggregate"] == "residual" else self.asked
        x = (q, self.inputs["k"], y, asked, *online, *self.kept, self.pooled, self.key_sum)
        y, kept, pooled, key_sum, tokens, segments = memory_step.memory_step(
            self.library, self.part.backend, self.options, appends, x, (self.count, self.segments), scale
        )
        if not appends:
            kept, pooled = *self.kept, self.pooled
        if most is not None:  # no more rows than a call with gradients would leave
            kept, pooled = kept[:, :most], pooled[:, :most]
        if appends and self.options["init"] == "independent":
            keys = (q.shape[0], self.heads, q.shape[3])
            state = restarted(self.xp, self.options, tokens == 0, state, keys, self.inputs["v"][:, 0].shape)
        return y, (*state, kept, pooled, key_sum, tokens, segments)

    def _ends(self, before: int) -> list[int]:
        if self.options["segment"] != "log":
            return boundaries(self.tokens, self.options["segment"], before)
        marks = self.library.host(self.ends)
        if marks is None:
            return boundaries(self.tokens, "log")
        return [int(at) + 1 for at in np.nonzero(marks[0])[0]]

    def _spread(self, name: str) -> Array:
        """Queries or keys, a head for each of the values', as wide as arithmetic."""
        return spread(self.xp, self.library.cast(self.inputs[name], self.wide), self.heads)

    def _filled(self, old: Array, new: Array, room: int) -> Array:
        """Rows that hold nothing yet stay as they were."""
        return joined(self.xp, [self.library.cast(new, self.library.dtype(old)), old[:, new.shape[1] : room]], axis=1)

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

    def _base(self, cuts: Cuts) -> tuple[Array, State, list[tuple[Array, ...]]]:
        """Outputs of the base, its last state, and the memories at the ends of segments, in groups."""
        xp, ends = self.xp, cuts.ends
        independent = self.options["init"] == "independent"
        state, at, outputs, memories = self.state, 0, [], []
        # Pieces that are run alone: all of them, or the rest of a segment that has begun.
        for end in ends[: cuts.alone]:
            y, state, _ = self._call(at, end, state)
            memories.append(self._memories(tuple(a[:, None] for a in state)))
            state = self._fresh(state) if independent else state
            outputs.append(y)
            at = end
        left = len(ends) - cuts.alone
        if left and independent:
            y, found = self._side_by_side(at, ends[-1], left, state)
            outputs.append(y)
            memories.append(found)
            at, state = ends[-1], self._fresh(state)
        elif left:
            y, state, found = self._call(at, self.tokens, state, cuts.segment)
            return joined(xp, [*outputs, y], axis=1), state, [*memories, found]
        if at < self.tokens:
            y, state, _ = self._call(at, self.tokens, state)
            outputs.append(y)
        return joined(xp, outputs, axis=1), state, memories

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

    def _weighted(self, y: Array, kept: State, weights: Array, index: Array | None, cuts: Cuts) -> Array:
        """The outputs, given those of the base alone and what each token reads of every memory, or of those chosen."""
        library, backend = self.library, self.part.backend
        if self.memory.linear:
            q, scale = self._query()
            if index is None:
                return state_reads(library, backend, y, q, kept[0], weights, cuts, scale)
            return chosen_reads(library, backend, y, q, kept[0], weights, index, cuts, scale)
        if index is not None:
            weights = spread_out(self.xp, weights, index, kept[0].shape[1])
        shares = self.xp.permute_dims(weights, (2, 0, 3, 1))[..., None]  # [S+1,N,T,H,1]
        return self._one_by_one(self.library.cast(y, self.wide) * shares[-1], kept, shares, cuts)

    def _residual(self, y: Array, kept: State, cuts: Cuts) -> Array:
        """The same where everything is read in full."""
        xp, y = self.xp, self.library.cast(y, self.wide)
        if not self.memory.linear or not kept[0].shape[1]:
            return self._one_by_one(y, kept, None, cuts)
        q, scale = self._query()
        q = spread(xp, self.library.cast(q, self.wide), self.heads)
        rows, _, heads, width = q.shape
        sums, at, reads = xp.cumulative_sum(kept[0], axis=1), cuts.finished, []
        sums = xp.concat([xp.zeros_like(sums[:, :1]), sums], axis=1)
        for first, last, count in cuts.runs():
            piece = xp.reshape(q[:, first:last], (rows, count, (last - first) // count, heads, width))
            piece = xp.permute_dims(piece, (0, 1, 3, 2, 4))  # [N,count,H,L,K]
            read = xp.permute_dims(xp.matmul(piece, sums[:, at : at + count]), (0, 1, 3, 2, 4))
            reads.append(xp.reshape(read, y[:, first:last].shape))
            at += count
        return y + scale * joined(xp, reads, axis=1)

    def _query(self) -> tuple[Array, float]:
        """What rows of memories are weighted with, in the dtype of q, and the factor on what that gives."""
        q, options = self.inputs["q"], self.part.options
        assert self.memory.query is not None
        asked = self.memory.query(self.xp, options, q)
        if asked is not q:  # it was computed with
            asked = self.library.cast(self.memory.query(self.xp, options, self.library.cast(q, self.wide)), self.dtype)
        return asked, self.memory.scale(options, q.shape[3])

    def _one_by_one(self, y: Array, kept: State, shares: Array | None, cuts: Cuts) -> Array:
        """Memories whose read is not linear, one after another, by the tokens that see them."""
        xp, q = self.xp, self._spread("q")
        for i in range(kept[0].shape[1]):
            at = 0 if i < cuts.finished else cuts.ends[i - cuts.finished]
            memory = tuple(a[:, None, i] for a in kept)
            read = self.memory.recall(xp, self.part.options, {**self.constants, "q": q[:, at:]}, memory)
            read = read if shares is None else shares[i, :, at:] * read
            y = xp.concat([y[:, :at], y[:, at:] + read], axis=1)
        return y
