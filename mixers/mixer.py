"""A mixer with its options set: what ``mixers.get`` returns.

y, state = mix(q, k, v, beta=b)                    a sequence, a batch of them, or a pack
y_t, state = mix.step(q_t, k_t, v_t, beta=b_t, state=state)
y = mix.decode(q, k, v, beta=b, pool=pool, slots=slots)
"""

import dataclasses
import functools
import json
import logging
import math
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from mixers import compose
from mixers.arrays import library_of, prepare
from mixers.autotune import knowledge
from mixers.autotune.explanation import Explanation
from mixers.autotune.journal import Decision
from mixers.autotune.journal import log as decisions
from mixers.autotune.key import BACKWARD, FORWARD, key_of
from mixers.autotune.policy import (
    REFERENCE,
    Asked,
    Choice,
    candidates,
    check_backend,
    check_kernel,
    choose,
    choose_backward,
    choose_in_place,
    whatever_the_batch,
)
from mixers.backend import Config, installed
from mixers.bound import Bound
from mixers.call import Call, validate
from mixers.plan import Plan
from mixers.problem import Arrays, Flags, Problem
from mixers.registry import get_spec
from mixers.result import Result
from mixers.spec import Array, MixerSpec, Sizes

log = logging.getLogger("mixers")

_STATE_DTYPES = ("", "float32", "float64", "bfloat16", "float16")
_announced: set[tuple[str, str, str]] = set()

# The latest plans of forwards and what was known then, by the key of their mixer: operators have mixers of their own.
_latest: dict[str, dict[Problem, tuple[int, Plan]]] = {}


@dataclass(frozen=True)
class TensorSpec:
    """Shape, dtype and bytes of one array of a state."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * {"float64": 8, "bfloat16": 2, "float16": 2}.get(self.dtype, 4)


class Mixer:
    """A mixer with its options set. Calling it never changes it; it pickles, copies and compares by value.

    Attributes:
        spec: the mathematics.
        options: every option, resolved.
        backend: as given to ``mixers.get``.
        state_dtype: storage dtype of returned states; empty for float32 (float64 where q is).
        allow_tf32: float32 products may round their operands to tf32.
        batch_invariant: the bits of a sequence do not depend on the batch that it is in.
        tune: measure candidates when a problem is new.
        asked: the backend, kernel and configuration that were asked for by name.
        recomputes: the kernels of an explicit backend compute their states again in the backward.
        parts: of a composition, in the order of ``spec.parts``.
    """

    def __init__(
        self,
        spec: MixerSpec,
        backend: str,
        options: dict[str, Any],
        state_dtype: str = "",
        allow_tf32: bool = False,
        *,
        kernel: str = "",
        config: Config | None = None,
        batch_invariant: bool = False,
        tune: bool = False,
    ) -> None:
        """See ``mixers.get``."""
        check_backend(backend)
        if state_dtype not in _STATE_DTYPES:
            raise ValueError(f"state_dtype={state_dtype!r}; expected one of {', '.join(map(repr, _STATE_DTYPES[1:]))}")
        self.options = spec.resolve(options)
        self.spec = spec if spec.specialise is None else spec.specialise(self.options)
        self.backend = backend
        self.state_dtype = state_dtype
        self.allow_tf32 = bool(allow_tf32)
        self.batch_invariant, self.tune = bool(batch_invariant), bool(tune)
        self.asked = Asked(backend, kernel, None if config is None else tuple(sorted(config.items())))
        check_kernel(spec, self.asked)
        if self.batch_invariant and spec.compose is not None:
            raise ValueError(f"{spec.name}: kernels promise batch_invariant=True, and this is composed of several")
        self.recomputes = backend in installed() and installed()[backend].recomputes
        found = self.spec.parts(self.options) if self.spec.compose is not None and backend != REFERENCE else ()
        self.parts = tuple(part(of, backend, self.allow_tf32, tuple(o.items())) for of, o in found)
        self._plans: dict[Problem, Plan] = {}
        self._plans_in_place: dict[Problem, Plan | None] = {}
        self._shortcuts: dict[Any, Any] = {}
        self._told: dict[str, tuple[str, Config | None]] = {}
        self._generation = knowledge.generation()
        rest = {"kernel": kernel, "config": config, "batch_invariant": self.batch_invariant, "tune": self.tune}
        self.key = json.dumps(
            [spec.name, backend, self.options, state_dtype, self.allow_tf32, {n: v for n, v in rest.items() if v}]
        )
        self._latest = _latest.setdefault(self.key, {})
        prepare(self)

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"mixers.get({self.spec.name!r}, backend={self.backend!r}{options})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mixer) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __reduce__(self) -> tuple[Any, ...]:
        return from_key, (self.key,)

    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        initial_state: Any = None,
        cu_seqlens: Any = None,
        return_state: bool = True,
        checkpoint_every: int | None = None,
        **gates: Array | None,
    ) -> Result:
        """Mix whole sequences.

        Args:
            q: ``[B,T,G,K]``; see the mixer's page for the axes of every input.
            k: ``[B,T,G,K]``.
            v: ``[B,T,H,V]``, ``H`` a multiple of ``G``.
            initial_state: the first state ``[N,...]``, or one without the batch axis for every sequence; None for the
                mixer's own.
            cu_seqlens: ``[N+1]`` offsets or a ``mixers.pack``: sequences packed into a batch of 1.
            return_state: False saves the write of the last state.
            checkpoint_every: also return the states after every so many tokens, as ``result.checkpoints`` with an axis
                ``P`` behind the batch; the sequences of a pack follow each other on it, zeros behind the last.
            gates: the mixer's other inputs, as ``beta=``, ``log_decay=``.

        Returns:
            ``(y, state)``, with ``y [B,T,H,V]`` in the dtype of ``v``.

        Raises:
            ValueError: an input is missing or misshapen, or an explicit backend cannot serve.
            TypeError: an input is unknown, no array, or of another library, dtype or device.
        """
        if initial_state is None and cu_seqlens is None and self.spec.settle is None:
            found = library_of(q, "q").again(self, {"q": q, "k": k, "v": v, **gates}, return_state, checkpoint_every)
            if found is not None:
                return found
        call = self._call(q, k, v, gates, initial_state, cu_seqlens, return_state, checkpoint_every)
        return self._result(call, self._run(call))

    def _run(self, call: Call) -> Arrays:
        """The outputs of a call by name: by its kernel, by the parts of a composition, or by the reference."""
        composed = self.spec.compose is not None and self.backend != REFERENCE
        out = compose.run(self, call) if composed else call.library.run(self, call)
        return out if self.spec.settle is None else self.spec.settle(call, out)

    def step(self, q: Array, k: Array, v: Array, *, state: Any = None, **gates: Array | None) -> Result:
        """Mix one token.

        Args:
            q: ``[B,G,K]``: every input without its axis ``T``.
            k: ``[B,G,K]``.
            v: ``[B,H,V]``.
            state: what the last step or call returned; None for the mixer's first.
            gates: as in a call, without ``T``.

        Returns:
            ``(y, state)``, with ``y [B,H,V]``.

        Raises:
            ValueError, TypeError: as in a call.
        """
        call = self._call(q, k, v, gates, state, None, True, None, token=True)
        out = self._run(call)
        out |= {name: out[name][:, 0] for name in ("y", *self.spec.results)}
        return self._result(call, out)

    def decode(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        pool: Any,
        slots: Array,
        out_slots: Array | None = None,
        fresh: Array | None = None,
        **gates: Array | None,
    ) -> Array:
        """Mix a few tokens for sequences whose states live in a pool; the pool is written in place.

        Args:
            q: ``[B,T,G,K]`` with ``T ≤ 16``.
            k: ``[B,T,G,K]``.
            v: ``[B,T,H,V]``.
            pool: the states, ``[slots,H,K,V]`` of any strides (a tuple of arrays where the state is one).
            slots: ``[B]`` whole numbers, the slot of each sequence; −1 is padding: its output is 0, nothing is written.
            out_slots: ``[B]``, where to write instead of ``slots``.
            fresh: ``[B]`` booleans: start from the mixer's first state, whatever the slot holds.
            gates: as in a call.

        Returns:
            ``y [B,T,H,V]``.

        Raises:
            ValueError: more than 16 tokens, misshapen slots, a slot outside of the pool, or a state that grows.
            TypeError: as in a call; slots are no whole numbers.
        """
        from mixers.decode import decode

        return decode(self, q, k, v, gates, pool, slots, out_slots, fresh)

    def vjp(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        initial_state: Any = None,
        cu_seqlens: Any = None,
        return_state: bool = True,
        checkpoint_every: int | None = None,
        **gates: Array | None,
    ) -> tuple[Result, Any]:
        """A call on NumPy arrays and the function that takes gradients back through it.

        Args: as in a call.

        Returns:
            ``(result, pullback)``. ``pullback(dy, dstate=None, dcheckpoints=None)`` takes gradients of the outputs,
            None for zero, and returns a dictionary of gradients by input name, ``initial_state`` among them.

        Raises:
            TypeError: the arrays are torch's or JAX's, which have gradients of their own.
            ValueError: as in a call; the reference has no gradients on NumPy.
        """
        call = self._call(q, k, v, gates, initial_state, cu_seqlens, return_state, checkpoint_every, grad=True)
        if call.library.name != "numpy":
            raise TypeError(
                f"vjp is for NumPy arrays; differentiate {call.library.name} arrays with {call.library.name}"
            )
        from mixers.arrays.numpy import library
        from mixers.vjp import pullback

        composed = self.spec.compose is not None and self.backend != REFERENCE
        out, back = compose.vjp(self, call) if composed else library.vjp(self, call)
        return self._result(call, out), pullback(call, out, back)

    def init_state(
        self,
        batch: int,
        heads: int,
        key_dim: int,
        value_dim: int | None = None,
        *,
        key_heads: int | None = None,
        like: Array = None,
    ) -> Any:
        """The mixer's first state for a batch.

        Args:
            batch: sequences.
            heads: value heads.
            key_dim: key width, or slots.
            value_dim: value width; ``key_dim`` by default.
            key_heads: key heads, for a grouped cache; ``heads`` by default.
            like: an array whose library and device the state takes; float64 where it is. NumPy by default.
        """
        from mixers.arrays.numpy import first_state

        like = np.empty(0, np.float32) if like is None else like
        library = library_of(like, "like")
        compute = "float64" if library.dtype(like) == "float64" else "float32"
        sizes = _sizes(self, batch, heads, key_dim, value_dim, key_heads)
        layout = self.spec.state(self.options)
        arrays = []
        for f, first in zip(layout.fields, first_state(self.spec, self.options, sizes, compute), strict=True):
            values = np.array(np.broadcast_to(first, (batch, *first.shape)), order="C")
            dtype = "int32" if f.counter else self.state_dtype or (library.dtype(like) if f.verbatim else compute)
            arrays.append(library.from_numpy(values, dtype, like))
        return layout.pack(tuple(arrays))

    def state_spec(
        self, heads: int, key_dim: int, value_dim: int | None = None, *, batch: int = 1, key_heads: int | None = None
    ) -> tuple[TensorSpec, ...]:
        """Name, shape, dtype and bytes of every array of a state, for whoever manages the memory.

        Args: as in ``init_state``. Axes of length 0 grow with the tokens.
        """
        sizes = _sizes(self, batch, heads, key_dim, value_dim, key_heads)
        fields = self.spec.state(self.options).fields
        return tuple(
            TensorSpec(f.name, sizes.shape(f.axes), "int32" if f.counter else self.state_dtype or "float32")
            for f in fields
        )

    def bind(self, q: Array, k: Array, v: Array, **gates: Array) -> Bound:
        """The call for NumPy arrays of these shapes and dtypes, with its kernel: for many small ones in a loop.

        Returns:
            A function of the same arguments that checks shapes and dtypes, and nothing else, before its kernel runs.

        Raises:
            TypeError: the arrays are not NumPy's.
            ValueError: as in a call, or no kernel runs it.
        """
        call = self._call(q, k, v, gates, None, None, True, None)
        if call.library.name != "numpy":
            raise TypeError(f"bind is for NumPy arrays; a second call on {call.library.name} arrays is quick as it is")
        return Bound(self, call)

    def explain(self, q: Array, k: Array, v: Array, *, grad: bool = False, **rest: Any) -> Explanation:
        """Every candidate for a call, chosen or refused, with reason, times, error, and where that is known from.

        Takes what a call takes, and ``grad=True`` for its backward too; runs nothing.
        """
        state, pack = rest.pop("initial_state", None), rest.pop("cu_seqlens", None)
        call = self._call(q, k, v, rest, state, pack, True, None, grad=grad)
        problem, note = call.problem(), "" if self.spec.remark is None else self.spec.remark(self, call)
        found = tuple(candidates(whatever_the_batch(problem), self.asked))
        if not any(c.support for c in found):
            return Explanation(problem, found, note=note)
        forward = choose(problem, self.asked)
        choices = [(FORWARD, forward)]
        if grad and forward.candidate.kernel is not None:
            choices.append((BACKWARD, choose_backward(problem, self.asked, forward.candidate)))
        return Explanation(problem, found, tuple(choices), note)

    def warmup(self, q: Array, k: Array, v: Array, *, grad: bool = False, **rest: Any) -> None:
        """Compile now what a call like this one will run, its backward too with ``grad=True``."""
        state, pack = rest.pop("initial_state", None), rest.pop("cu_seqlens", None)
        call = self._call(q, k, v, rest, state, pack, True, None)
        if self.spec.compose is not None and self.backend != REFERENCE:
            compose.warmup(self, call, grad)
        else:
            call.library.warmup(self, call, grad)

    def flags(self, grad: bool, state: bool, checkpoint_every: int) -> Flags:
        """What is asked for in a call, and by the mixer's own keywords."""
        return Flags(
            grad=grad,
            state=state,
            checkpoint_every=checkpoint_every,
            state_dtype=self.state_dtype,
            allow_tf32=self.allow_tf32,
            batch_invariant=self.batch_invariant,
        )

    def validated(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        return_state: bool = True,
        checkpoint_every: int | None = None,
        **gates: Array | None,
    ) -> Call:
        """A plain call on whole sequences, checked."""
        return self._call(q, k, v, gates, None, None, return_state, checkpoint_every)

    def plan(self, problem: Problem, again: bool = False) -> Plan:
        """The kernel for a problem, chosen once for all that is known.

        Args:
            problem: the call.
            again: it is computed again in a backward: its forward's plan stays, whatever has become known since.

        Raises:
            ValueError: an explicit backend cannot serve; the message lists its reasons.
        """
        self._refresh()
        if again and (kept := self._kept(problem)) is not None:
            return kept
        plan = self._plans.get(problem)
        if plan is None:
            if self.tune:
                from mixers.autotune.tuner import tune_new

                tune_new(problem, self.asked)
                self._refresh()
            plan = self._plans[problem] = self._choose(problem)
            self._latest[problem] = knowledge.generation(), plan
        return plan

    def _refresh(self) -> None:
        """Forget plans that were made before what is known now."""
        now = knowledge.generation()
        if self._generation != now:
            self._plans.clear()
            self._shortcuts.clear()
            self._told.clear()
            self._generation = now

    def _kept(self, problem: Problem) -> Plan | None:
        """The plan of the forward that a backward belongs to: the latest, whether gradients were on or not."""
        alone = dataclasses.replace(problem, flags=dataclasses.replace(problem.flags, grad=False, recompute=False))
        found = [made for p in (problem, alone) if (made := self._latest.get(p)) is not None]
        if not found:
            return None
        plan = max(found, key=lambda made: made[0])[1]
        return plan if plan.kernel is None or plan.kernel.supports(problem) else None

    def _choose(self, problem: Problem) -> Plan:
        forward = choose(problem, self.asked)
        chosen = forward.candidate
        self._announce(problem, FORWARD, forward)
        if chosen.kernel is None or not problem.flags.grad:
            return Plan(chosen.backend, chosen.kernel, chosen.config or {})
        backward = choose_backward(problem, self.asked, chosen)
        self._announce(problem, BACKWARD, backward)
        adjoint = backward.candidate
        return Plan(chosen.backend, chosen.kernel, chosen.config or {}, adjoint.kernel, adjoint.config or {})

    def plan_in_place(self, problem: Problem) -> Plan | None:
        """The kernel that decodes a problem on a pool itself, None where there is none."""
        if problem not in self._plans_in_place:
            chosen = choose_in_place(problem, self.asked)
            plan = None if chosen is None else Plan(chosen.backend, chosen.kernel, chosen.config or {})
            self._plans_in_place[problem] = plan
        return self._plans_in_place[problem]

    def _announce(self, problem: Problem, part: str, choice: Choice) -> None:
        """Say what was chosen, once: another length or batch is no news while the choice is the same."""
        chosen, key = choice.candidate, key_of(problem, part)
        if self._told.get(key) == (chosen.name, chosen.config):
            return
        self._told[key] = chosen.name, chosen.config
        source = choice.source or "the first candidate that can"
        decisions.append(Decision(str(problem), part, chosen.name, chosen.config or {}, source))
        if self.asked.backend == "auto" and (self.spec.name, part, chosen.name) not in _announced:
            _announced.add((self.spec.name, part, chosen.name))
            what = self.spec.name if part == FORWARD else f"the backward of {self.spec.name}"
            log.info("%s runs on %s: %s (mix.explain(...) lists all)", what, chosen.name, source)

    def shortcuts(self) -> dict[Any, Any]:
        """What a library remembers of calls that it has seen, for as long as nothing new is known."""
        if self._generation != knowledge.generation():
            self._refresh()
        return self._shortcuts

    def _call(
        self,
        q: Array,
        k: Array,
        v: Array,
        gates: dict[str, Any],
        state: Any,
        cu_seqlens: Any,
        return_state: bool,
        checkpoint_every: int | None,
        grad: bool = False,
        token: bool = False,
    ) -> Call:
        for name, given in (("checkpoint_every", checkpoint_every), ("return_state", return_state)):
            if given is not None and not isinstance(given, (int, np.integer, np.bool_)):
                raise TypeError(f"{name} is a {type(given).__name__}; expected a plain value, known before any tracing")
        every = checkpoint_every or 0
        if every < 0:
            raise ValueError(f"checkpoint_every={every}; expected a whole number from 1 up, or None")
        flags = self.flags(grad, bool(return_state), every)
        inputs = {"q": q, "k": k, "v": v, **gates}
        return validate(self.spec, self.options, inputs, state, cu_seqlens, flags, token)

    def _result(self, call: Call, out: Arrays) -> Result:
        layout = self.spec.state(self.options)
        state = layout.pack(tuple(out[f"final.{f.name}"] for f in layout.fields)) if call.flags.state else None
        checkpoints = None
        if call.flags.checkpoint_every:
            checkpoints = layout.pack(tuple(out[f"checkpoint.{f.name}"] for f in layout.fields))
        return Result(out["y"], state, checkpoints, **{name: out[name] for name in self.spec.results})


def _sizes(mixer: Mixer, batch: int, heads: int, key_dim: int, value_dim: int | None, key_heads: int | None) -> Sizes:
    value_dim = key_dim if value_dim is None else value_dim
    groups, chunk = key_heads or heads, mixer.spec.chunk(mixer.options)
    return Sizes(
        B=batch,
        T=0,
        G=groups,
        H=heads,
        K=key_dim,
        V=value_dim,
        N=batch,
        C=chunk,
        W=max(0, mixer.options.get("window", 0) - 1),
        J=groups,
        A=groups,
        D=heads,
        E=key_dim,
    )


def get(
    name: str | MixerSpec,
    backend: str = "auto",
    *,
    state_dtype: str = "",
    allow_tf32: bool = False,
    kernel: str = "",
    config: Config | None = None,
    batch_invariant: bool = False,
    tune: bool = False,
    drift: float | None = None,
    **options: Any,
) -> Mixer:
    """A mixer, ready to call.

    Args:
        name: one of ``mixers.names()``.
        backend: ``auto`` takes the fastest that can and logs its choice once; ``reference`` is the float64-capable
            truth; any other name is explicit and never falls back.
        state_dtype: storage dtype of returned states (``bfloat16``, ``float16``); the arithmetic stays float32.
        allow_tf32: let kernels on a GPU round the operands of float32 products to tf32: faster, errors near 1e-3.
        kernel: run this kernel and no other, as ``"delta.chunk"``; ``mix.explain(...)`` lists them.
        config: its configuration, as ``{"block": 16}``; nothing that was measured overrides it.
        batch_invariant: one kernel, configuration and order of sums whatever the batch, the length or the packing, so
            that the bits of a sequence do not depend on what it is computed with.
        tune: measure candidates, in another process, when a call's problem is new to the profile: seconds, once.
        drift: with ``chunk_size="auto"``, how far outputs may be from the exact recurrence's, relative to their norm:
            the fastest chunk within it is found on the first call's inputs.
        options: the mixer's options, as ``chunk_size=16``; see ``mixers.get_spec(name)``.

    Raises:
        ValueError: the mixer, backend or option is unknown (the nearest name is offered), or a value is not allowed.
    """
    spec = name if isinstance(name, MixerSpec) else get_spec(name)
    rest: dict[str, Any] = {"kernel": kernel, "config": config, "batch_invariant": batch_invariant, "tune": tune}
    if options.get("chunk_size") == "auto":
        from mixers.autotune.drift import AutoChunk

        del options["chunk_size"]
        plain = {"backend": backend, "state_dtype": state_dtype, "allow_tf32": allow_tf32}
        return cast("Mixer", AutoChunk(spec, drift, plain | rest | options))
    if drift is not None:
        raise ValueError(f'drift={drift!r} goes with chunk_size="auto"')
    return Mixer(spec, backend, options, state_dtype, allow_tf32, **rest)


@functools.lru_cache(maxsize=256)
def part(name: str | MixerSpec, backend: str, allow_tf32: bool, options: tuple[tuple[str, Any], ...]) -> Mixer:
    """A mixer as a part of a composition: made once, so that its plans are."""
    return get(name, backend, allow_tf32=allow_tf32, **dict(options))


_from_key: dict[str, Mixer] = {}


def from_key(key: str) -> Mixer:
    """The mixer that a ``Mixer.key`` describes."""
    if key not in _from_key:
        name, backend, options, state_dtype, allow_tf32, rest = json.loads(key)
        _from_key[key] = get(name, backend, state_dtype=state_dtype, allow_tf32=allow_tf32, **rest, **options)
    return _from_key[key]
