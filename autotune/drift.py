"""``chunk_size="auto"``: the fastest chunk whose outputs stay within a budget of the exact recurrence.

    drift(C) = ‖y_C − y_1‖ / ‖y_1‖

Where a chunk is part of the model, its size changes the result, so nobody chooses it behind a caller's back. Who asks
for ``chunk_size="auto", drift=0.02`` has it measured on the inputs of the first call, or on numbers drawn as the
specification says, once for the life of the mixer: another model's inputs, or other weights, may drift otherwise.
"""

import collections
import dataclasses
import datetime
import logging
import sys
import time
from typing import Any

import numpy as np
from mixers.autotune import agree, knowledge
from mixers.autotune.device import device_of_kind, stamp_of
from mixers.autotune.explanation import Explanation
from mixers.autotune.journal import Decision, log
from mixers.autotune.key import key_of
from mixers.autotune.profile import Entry, Profile, Trial, save, user_path
from mixers.autotune.rig import draw
from mixers.autotune.tuner import allowed, problem_of

from mixers.arrays import library_of
from mixers.backend import installed
from mixers.mixer import Mixer, get
from mixers.result import Result
from mixers.spec import Array, MixerSpec

logger = logging.getLogger("mixers")

SIZES = (1, 2, 4, 8, 16, 32, 64)
ROUNDS = 3

_settled: collections.Counter[str] = collections.Counter()


class AutoChunk:
    """A mixer whose ``chunk_size`` is found on its first call; from then on it is that mixer in everything.

    Attributes:
        mixer: the mixer, once it is found.
        entry: what was measured, as the profile holds it.
    """

    def __init__(self, spec: MixerSpec, drift: float | None, keywords: dict[str, Any]) -> None:
        """See ``mixers.get``.

        Raises:
            ValueError: the budget is no positive number, or a chunk is no part of the mixer's model.
        """
        if spec.exact_in_chunks:
            raise ValueError(f"{spec.name} is exact in chunks and has no chunk_size: kernels choose their own block_t")
        if not isinstance(drift, (int, float)) or isinstance(drift, bool) or not 0 < drift < float("inf"):
            raise ValueError(f'drift={drift!r}; chunk_size="auto" needs a positive budget, as drift=0.02')
        self.spec, self.drift, self._keywords = spec, float(drift), keywords
        self.mixer: Mixer | None = None
        self.entry: Entry | None = None
        self._of_size(1)  # refuses now what it would refuse later

    def __repr__(self) -> str:
        found = f" → {self.mixer!r}" if self.mixer else ""
        return f"mixers.get({self.spec.name!r}, chunk_size='auto', drift={self.drift:g}){found}"

    def __reduce__(self) -> tuple[Any, ...]:
        if self.mixer is not None:
            return self.mixer.__reduce__()
        return AutoChunk, (self.spec, self.drift, self._keywords)

    def __call__(self, q: Array, k: Array, v: Array, **rest: Any) -> Result:
        """Mix; the first call measures on its own inputs."""
        return self._of(q, k, v, rest)(q, k, v, **rest)

    def vjp(self, q: Array, k: Array, v: Array, **rest: Any) -> tuple[Result, Any]:
        """Mix, with a pullback; the first call measures on its own inputs."""
        return self._of(q, k, v, rest).vjp(q, k, v, **rest)

    def explain(self, q: Array, k: Array, v: Array, **rest: Any) -> Explanation:
        """Why it runs as it does, the chunk's size included, which is found now if it was not."""
        mixer = self._of(q, k, v, rest)
        return dataclasses.replace(mixer.explain(q, k, v, **rest), note=self.note())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if self.mixer is None:
            raise AttributeError(f"{name!r}: chunk_size is not found yet; call the mixer, or mix.settle(q, k, v, …)")
        return getattr(self.mixer, name)

    def note(self) -> str:
        """The choice, its drift and its speed, and those of the others."""
        if self.entry is None:
            return "chunk_size=1, the exact recurrence: nothing was measured"
        entry, lines = self.entry, []
        for t in entry.trials:
            chosen = t.config == entry.config
            drift = f"drift {t.error * self.drift:.3g}"
            why = "chosen: the fastest within the budget" if chosen else t.reason or "slower"
            lines.append(f"  {'→' if chosen else ' '} chunk_size={t.config['chunk_size']:<3} {drift}, "
                         f"{t.seconds * 1e3:.3g} ms: {why}")  # fmt: skip
        return "\n".join([f"chunk_size: the fastest that drifts from the exact recurrence by {self.drift:g}", *lines])

    def settle(self, q: Array, k: Array, v: Array, **gates: Any) -> Mixer:
        """Find the size on these inputs, and return the mixer."""
        self.mixer = self._measure({"q": q, "k": k, "v": v, **gates})
        return self.mixer

    def settle_on(self, shape: tuple[int, int, int, int, int], dtype: str = "float32") -> Mixer:
        """Find the size on NumPy arrays ``(B, T, H, K, V)`` drawn as the specification says."""
        options = self._of_size(1).options
        x = draw(problem_of(self.spec, shape, dtype, "numpy", "cpu", False, (), options))
        return self.settle(**{n: a.astype(dtype) for n, a in x.items() if not n.startswith("initial.")})

    def _of(self, q: Array, k: Array, v: Array, rest: dict[str, Any]) -> Mixer:
        if self.mixer is None:
            known = {"cu_seqlens", *(arg.name for arg in (*self.spec.inputs, *self.spec.parameters))}
            self.settle(q, k, v, **{n: a for n, a in rest.items() if n in known})
        assert self.mixer is not None
        return self.mixer

    def _of_size(self, size: int) -> Mixer:
        return get(self.spec, chunk_size=size, **self._keywords)

    def _measure(self, x: dict[str, Any]) -> Mixer:
        by_chunk = {arg.name for arg in (*self.spec.inputs, *self.spec.parameters) if "C" in arg.axes.split()}
        for name in sorted(by_chunk & {n for n, a in x.items() if a is not None}):
            raise ValueError(f'{name} is as long as a chunk, so that chunk_size="auto" has nothing to choose')
        x = {name: a.detach() if hasattr(a, "detach") else a for name, a in x.items()}
        exact = self._of_size(1)
        problem = exact.validated(**{n: a for n, a in x.items() if n != "cu_seqlens"}).problem()
        if not allowed():
            logger.warning("MIXERS_TUNE=off: %s runs with chunk_size=1", self.spec.name)
            return exact
        part = f"chunk_size drift={self.drift:g}"
        key = key_of(problem, part)
        _settled[key] += 1
        entry = None
        if agree.first():
            trials = self._trials(x)
            within = [t for t in trials if t.error <= 1]
            best = min(within, key=lambda t: t.seconds)
            entry = self._entry(problem, key, best, trials)
        found = Profile.of([entry] if entry else [])
        found = agree.shared(found, f"{key} {_settled[key]}")
        self.entry = next(iter(found.entries.values()))
        save(user_path(), [self.entry])
        knowledge.learn([self.entry])
        log.append(Decision(str(problem), "chunk_size", self.entry.kernel, self.entry.config, "measured now", True,
                            self.entry.trials))  # fmt: skip
        chosen = self.entry.config["chunk_size"]
        logger.info(
            "%s runs with chunk_size=%d: drift %.3g of %g", self.spec.name, chosen, self.entry.drift, self.drift
        )
        return self._of_size(chosen)

    def _trials(self, x: dict[str, Any]) -> tuple[Trial, ...]:
        """Every size: its drift over the budget, and its time."""
        mixers, truth, trials = {size: self._of_size(size) for size in SIZES}, None, []
        outputs = {size: _host(mix(**x).y) for size, mix in mixers.items()}
        truth = outputs[1]
        scale = float(np.linalg.norm(truth)) or 1.0
        times: dict[int, list[float]] = {size: [] for size in SIZES}
        for _ in range(ROUNDS):
            for size, mix in mixers.items():
                start = time.perf_counter()
                _wait(mix(**x).y)
                times[size].append(time.perf_counter() - start)
        for size in SIZES:
            drift = float(np.linalg.norm(outputs[size] - truth)) / scale
            reason = f"drifts by {drift:.3g}, and {self.drift:g} is allowed" if not drift <= self.drift else ""
            problem = mixers[size].validated(**{n: a for n, a in x.items() if n != "cu_seqlens"}).problem()
            plan = mixers[size].plan(problem)
            name = f"{plan.backend}/{plan.kernel.name}" if plan.kernel else plan.backend
            error = drift / self.drift if np.isfinite(drift) else float("inf")
            trials.append(Trial(name, {"chunk_size": size}, 0.0, min(times[size]), error, reason))
        return tuple(trials)

    def _entry(self, problem: Any, key: str, best: Trial, trials: tuple[Trial, ...]) -> Entry:
        backend = installed().get(best.name.partition("/")[0])
        stamp, s = stamp_of(backend) if backend else None, problem.sizes
        others = sorted((t for t in trials if t is not best and not t.reason), key=lambda t: t.seconds)
        return Entry(
            key=key,
            heads=problem.parallel,
            device=device_of_kind(problem.device).id,
            stamp=stamp.id if stamp else "",
            backend=str(self._keywords.get("backend", "auto")),
            kernel=best.name,
            config=dict(best.config),
            candidates=len(trials),
            shape=f"B={s.B} T={s.T} H={s.H} K={s.K} V={s.V}",
            seconds=best.seconds,
            runner_up=f"chunk_size={others[0].config['chunk_size']}" if others else "",
            runner_up_seconds=others[0].seconds if others else 0.0,
            default="chunk_size=1",
            default_seconds=trials[0].seconds,
            error=best.error,
            date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            versions=dict(stamp.versions) if stamp else {},
            drift=best.error * self.drift,
            trials=trials,
        )


def _wait(array: Array) -> None:
    """Until an array is computed."""
    if hasattr(array, "block_until_ready"):
        array.block_until_ready()
    elif library_of(array, "y").device(array) == "cuda":
        sys.modules["torch"].cuda.synchronize()


def _host(array: Array) -> np.ndarray:
    if library_of(array, "y").name == "torch":
        array = array.double().cpu().numpy()
    return np.asarray(array).astype(np.float64)
