"""Does every kernel compute what its mixer's specification says? The laws, as cases that can run anywhere.

    for case in cases("numba"):
        verdict = case.run()    # true where the law holds; verdict.reason says by how much

The truth is the float64 reference. Its gradients are torch's where torch is installed; where it is not, gradients are
compared along random directions with central differences of the reference on NumPy. An error may be as large as the
spec's tolerance (relative to the largest number of its array), and no larger than twice the error of the same dtype's
reference plus 4 units in the last place. Where sums cancel, neither tells much: there a result may be off by twice what
it moves by when its inputs move in their last bit, as a backward stable algorithm's may.
"""

import dataclasses
import functools
import importlib.util
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mixers import mixer as mixer_module
from mixers import reference
from mixers.arrays import library_of
from mixers.arrays.evaluate import dtypes, evaluate
from mixers.arrays.numpy import NumPy, fill_first_state
from mixers.backend import Config, Kernel, Support, installed
from mixers.call import Call
from mixers.cases import Named, Setting, draw, generator, hard_settings, seeds, sequences, settings
from mixers.mixer import Mixer, Plan
from mixers.problem import Flags, Problem
from mixers.registry import get_spec, names
from mixers.spec import MixerSpec

EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}

DEVICES = ("cpu", "cuda")

# Central differences of four points in float64 see about this much, relative to the gradient's norm.
DIFFERENCE_TOLERANCE = 1e-6


class Pinned(Mixer):
    """A mixer that runs one kernel, whatever would be chosen."""

    def __init__(
        self, spec: MixerSpec, backend: str, kernel: Kernel, options: dict[str, Any], config: Config | None = None
    ):
        """``config`` defaults to the kernel's own default for each problem."""
        super().__init__(spec, backend, options)
        self.kernel, self.config = kernel, config
        self.key = json.dumps([self.key, kernel.name, dict(config or {})])
        # Operators find a mixer by its key.
        mixer_module._from_key[self.key] = self

    def plan(self, problem: Problem, again: bool = False) -> Plan:
        """The one kernel.

        Raises:
            ValueError: it does not run this problem.
        """
        support = self.kernel.supports(problem)
        if not support:
            raise ValueError(f"{self.kernel.name}: {support.reason}")
        return Plan(self.backend, self.kernel, self.config or self.kernel.configs(problem)[0])


@dataclass(frozen=True)
class Verdict:
    """What a case found.

    Attributes:
        ratio: the worst error over what is allowed; at most 1 where the law holds.
        reason: which array, its error and what is allowed.
    """

    ratio: float
    reason: str

    def __bool__(self) -> bool:
        return self.ratio <= 1


@dataclass(frozen=True)
class Case:
    """One law for one kernel in one setting.

    Attributes:
        law: one of ``LAWS``.
        setting: how the mixer is called.
        backend: the backend's name, or ``reference``.
        kernel: the kernel; None for the reference, and for whatever the backend chooses.
        dtype: of q, k and v.
        library: whose arrays are passed.
        device: where they are.
    """

    law: str
    setting: Setting
    backend: str
    kernel: Kernel | None
    dtype: str
    library: str = "numpy"
    device: str = "cpu"

    @property
    def mixer(self) -> str:
        """The mixer's name."""
        return self.setting.spec.name

    @property
    def form(self) -> str:
        """``recurrent`` or ``chunk``; empty where no kernel is named."""
        return self.kernel.form if self.kernel else ""

    def __str__(self) -> str:
        kernel = f"/{self.kernel.name}" if self.kernel else ""
        return f"{self.law}: {self.mixer} on {self.backend}{kernel}, {self.dtype} {self.library}: {self.setting}"

    def run(self) -> Verdict:
        """Check the law.

        Raises nothing: an exception of a kernel is a verdict too.
        """
        try:
            return LAWS[self.law](self)
        except Exception as error:
            return Verdict(float("inf"), f"{type(error).__name__}: {error}")

    def subject(self) -> Mixer:
        """The mixer under test."""
        if self.kernel is None:
            return Mixer(self.setting.spec, self.backend, dict(self.setting.options))
        return Pinned(self.setting.spec, self.backend, self.kernel, dict(self.setting.options))

    def has_gradients(self) -> bool:
        """The reference has gradients where its library has."""
        return not (self.backend == "reference" and self.library == "numpy")

    def evaluate(self, x: Named, dout: Named | None, step: bool = False) -> tuple[Named, Named]:
        """Outputs and gradients of the mixer under test."""
        return evaluate(
            self.subject(),
            x,
            self.dtype,
            dout if self.has_gradients() else None,
            library=self.library,
            device=self.device,
            checkpoint_every=self.setting.checkpoint_every,
            step=step,
        )

    def tolerance(self) -> float:
        """What the spec allows, relative to an array's largest number."""
        return self.setting.spec.tolerance[self.dtype]


# Comparing.


Allowed = Callable[[str, float, float], float]


def compare(got: Named, wanted: Named, allowed: Allowed) -> Verdict:
    """The worst of all arrays; ``allowed(name, largest, overall)`` is the error that one may have: ``largest`` is the
    array's largest number, ``overall`` that of all arrays.

    An element that is not finite, where the wanted one is, is an infinite error.
    """
    worst = Verdict(0.0, "")
    overall = max((float(np.max(np.abs(a))) for a in wanted.values() if a.size and a.dtype.kind == "f"), default=0.0)
    for name, truth in wanted.items():
        if name not in got:
            return Verdict(float("inf"), f"{name} is missing")
        if got[name].shape != truth.shape:
            return Verdict(float("inf"), f"{name} has shape {got[name].shape}, expected {truth.shape}")
        if truth.size == 0:
            continue
        if truth.dtype.kind in "iu":
            error, limit, largest = float(np.max(np.abs(got[name] - truth))), 0.0, 1.0
        else:
            distance = np.abs(got[name].astype(np.float64) - truth)
            error, largest = float(np.max(distance)), float(np.max(np.abs(truth)))
            if not np.isfinite(distance).all():
                return Verdict(
                    float("inf"), f"{name} holds {int((~np.isfinite(distance)).sum())} numbers that are not finite"
                )
            limit = allowed(name, largest, overall)
        ratio = error / limit if limit > 0 else (0.0 if error == 0 else float("inf"))
        if ratio > worst.ratio or not worst.reason:
            worst = Verdict(ratio, f"{name}: error {error:.2g}, allowed {limit:.2g}, largest number {largest:.2g}")
    return worst


def worse(*verdicts: Verdict) -> Verdict:
    """The worst of several."""
    return max(verdicts, key=lambda v: v.ratio)


def errors(got: Named, truth: Named) -> dict[str, float]:
    """The largest absolute error of every array."""
    return {name: float(np.max(np.abs(got[name] - a))) if a.size else 0.0 for name, a in truth.items()}


# The truth.


def autodiff() -> str:
    """The library whose gradients of the reference are the truth; empty where central differences are."""
    return "torch" if importlib.util.find_spec("torch") else ""


@functools.lru_cache(maxsize=512)
def truth(setting: Setting, drawn: str, dtype: str, jitter: int = 0) -> tuple[Named, Named | None]:
    """The reference in ``dtype`` on arrays drawn for ``drawn``: outputs, and gradients where a library has them.

    ``jitter`` above 0 moves every number by up to half a unit in the last place of the dtype that a kernel multiplies
    it in, each time otherwise: ``dtype`` for what meets the state and for the state, float32 for gates.
    """
    reference = Mixer(setting.spec, "reference", dict(setting.options))
    x, every, library = draw(setting, drawn), setting.checkpoint_every, autodiff()
    if jitter:
        half = max(EPSILON[dtype], EPSILON["float32"])
        units = {n: half if n in ("q", "k", "v") or n.startswith("initial.") else EPSILON["float32"] for n in x}
        x = {name: _moved(a, units[name], generator(jitter, name)) for name, a in x.items()}
        dtype = "float32"
    if library:
        return evaluate(reference, x, dtype, seeds(setting, drawn, x), library=library, checkpoint_every=every)
    if dtype == "bfloat16":
        return {}, None
    return evaluate(reference, x, dtype, checkpoint_every=every)[0], None


def _moved(array: np.ndarray, unit: float, rng: np.random.Generator) -> np.ndarray:
    return array if array.dtype.kind != "f" else array * (1 + unit * rng.uniform(-0.5, 0.5, array.shape))


def drawn_for(dtype: str) -> str:
    """float32 and float64 are tried on the same numbers, so that they share a truth."""
    return "float32" if dtype == "float64" else dtype


def directional(setting: Setting, x: Named, dout: Named, name: str, direction: np.ndarray) -> tuple[float, float]:
    """The derivative of ``Σ dout · output`` along a change of one array, and how far it can be trusted.

    Differences of four points at three steps; the two that agree best decide, and their disagreement is the doubt: a
    long step may cross a kink (a slot that turns round), a short one drowns in rounding.
    """
    reference = Mixer(setting.spec, "reference", dict(setting.options))
    size = max(1e-3, float(np.max(np.abs(np.where(np.isfinite(x[name]), x[name], 0.0)), initial=0.0)))

    def value(change: float) -> float:
        moved = x | {name: x[name] + change * direction}
        out = evaluate(reference, moved, "float64", checkpoint_every=setting.checkpoint_every)[0]
        return sum(float(np.sum(dout[n] * out[n])) for n in dout)

    def slope(step: float) -> float:
        return (8 * (value(step) - value(-step)) - (value(2 * step) - value(-2 * step))) / (12 * step)

    long, middle, short = (slope(step * size) for step in (3e-4, 2e-5, 2e-6))
    return middle, min(abs(long - middle), abs(middle - short))


def along_directions(case: Case, x: Named, dout: Named, gradients: Named) -> Verdict:
    """Compare gradients along one random direction an array.

    A gradient that is nothing but cancellation is judged by the size of the others. Where float32 misses the tolerance
    it may err twice as much as the float32 reference and 4 units in the last place of the largest number.
    """
    setting, worst = case.setting, Verdict(0.0, "")
    overall = max((float(np.max(np.abs(g))) for g in gradients.values() if g.size), default=0.0)
    tolerance = max(case.tolerance(), DIFFERENCE_TOLERANCE)
    floor = max((float(np.linalg.norm(g)) for g in gradients.values()), default=0.0) * (1 if setting.hard else 1e-3)
    for name, gradient in gradients.items():
        direction = generator(setting.seed, "along " + name).standard_normal(gradient.shape)
        expected, doubt = directional(setting, x, dout, name, direction)
        got, norm = float(np.sum(gradient * direction)), float(np.linalg.norm(gradient))
        limit = tolerance * max(norm, abs(expected), floor, 1e-30) + doubt
        if abs(got - expected) > limit and case.dtype != "float64":
            by_peer = 2 * _peer_error(setting, x, dout, name, direction, expected)
            limit = max(limit, by_peer + 4 * EPSILON["float32"] * overall * float(np.linalg.norm(direction)) + doubt)
        ratio = abs(got - expected) / limit if np.isfinite(got) else float("inf")
        reason = f"gradient of {name} along a direction: {got:.8g}, expected {expected:.8g}, allowed {limit:.2g}"
        worst = worse(worst, Verdict(ratio, reason))
    return worst


class _Complex(NumPy):
    """NumPy at float32's precision, with room for a derivative in every number."""

    def cast(self, array: Any, dtype: str) -> Any:
        """Floating arrays become complex; counters stay."""
        return array if array.dtype.kind in "iu" else array.astype(np.complex64)


def peer_slope(setting: Setting, x: Named, dout: Named, name: str, direction: np.ndarray) -> float:
    """The derivative of ``directional`` by the float32 reference, with float32's rounding.

    NumPy has no autodiff, but ``Im f(x + i h d) / h`` is the derivative, for an h so small that it meets nothing else.
    """
    spec, options, h = setting.spec, setting.resolved, 2.0**-60
    call: dict[str, Any] = {"offsets": None} | {
        n: a.astype(np.complex64) if a.dtype.kind == "f" else a for n, a in x.items()
    }
    call[name] = (x[name] + 1j * h * direction).astype(np.complex64)
    fill_first_state(spec, options, setting.sizes(), call, "complex64")
    for f in spec.state(options).fields:
        state = call[f"initial.{f.name}"]
        if state.ndim < len(f.axes.split()):  # one for every sequence
            call[f"initial.{f.name}"] = np.broadcast_to(state, (setting.sizes().N, *state.shape))
    flags = Flags(checkpoint_every=setting.checkpoint_every)
    out = reference.forward(_Complex(), spec, options, setting.sizes(), flags, call)
    return sum(float(np.sum(dout[n] * out[n].imag)) for n in dout) / h


def _peer_error(setting: Setting, x: Named, dout: Named, name: str, direction: np.ndarray, expected: float) -> float:
    """How far the float32 reference is from the true derivative: the worst of several draws, as in ``peer_errors``."""
    moved = (
        {n: _moved(a, EPSILON["float32"], generator(jitter, n)) if jitter else a for n, a in x.items()}
        for jitter in range(17)
    )
    return max(abs(peer_slope(setting, m, dout, name, direction) - expected) for m in moved)


# The laws.


def equals_truth(case: Case) -> Verdict:
    """Law 1: the float64 reference, forward and every gradient."""
    setting, drawn = case.setting, drawn_for(case.dtype)
    x = draw(setting, drawn)
    dout = seeds(setting, drawn, x)
    outputs, gradients = case.evaluate(x, dout)
    wanted, wanted_gradients = truth(setting, drawn, "float64")

    def judge(jitters: int) -> Verdict:
        peer, peer_gradients = peer_errors(case, jitters)
        forward = compare(outputs, wanted, _allowed(case, peer))
        if not gradients or wanted_gradients is None:
            return forward
        backward = compare(gradients, wanted_gradients, _allowed(case, peer_gradients))
        return worse(forward, dataclasses.replace(backward, reason="gradient of " + backward.reason))

    # The reference's own error is a draw of luck; where a kernel seems worse, the worst of several draws decides.
    verdict = judge(0) or judge(16)
    if gradients and wanted_gradients is None:
        verdict = worse(verdict, along_directions(case, x, dout, gradients))
    return verdict


@functools.lru_cache(maxsize=512)
def peer_errors(case: Case, jitters: int) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Errors of the same dtype's reference, forward and gradients; float32's for float64, which is the truth itself.

    The largest of the reference on torch, on NumPy, which adds in another order, and on inputs that differ in their
    last bit.
    """
    setting, drawn = case.setting, drawn_for(case.dtype)
    dtype = "float32" if case.dtype == "float64" else case.dtype
    wanted, wanted_gradients = truth(setting, drawn, "float64")
    outputs, gradients = [], []
    for jitter in range(jitters + 1):
        peer, back = truth(setting, drawn, dtype, jitter)
        outputs.append(errors(peer, wanted) if peer else {})
        gradients.append(errors(back, wanted_gradients) if back and wanted_gradients else {})
    if dtype != "bfloat16" and autodiff():
        reference = Mixer(setting.spec, "reference", dict(setting.options))
        on_numpy = evaluate(reference, draw(setting, drawn), dtype, checkpoint_every=setting.checkpoint_every)[0]
        outputs.append(errors(on_numpy, wanted))
    return _largest(outputs), _largest(gradients)


def _largest(many: list[dict[str, float]]) -> dict[str, float]:
    """The worst of several errors, array by array."""
    return {name: max(found[name] for found in many) for name in many[0]}


def _allowed(case: Case, peer: Mapping[str, float]) -> Allowed:
    """The spec's tolerance, and no more than twice the same dtype's reference plus 4 units in the last place.

    Where the reference itself misses the tolerance, the input is badly conditioned, and only the second binds.
    """

    def allowed(name: str, largest: float, overall: float) -> float:
        limit = case.tolerance() * largest
        if name not in peer:
            return limit
        if case.dtype == "float64":  # the truth itself: how much rounding counts here, float32's reference shows
            return max(limit, 8 * peer[name] * EPSILON["float64"] / EPSILON["float32"])
        by_peer = 2 * peer[name] + 4 * EPSILON[case.dtype] * overall
        return min(limit, by_peer) if peer[name] <= limit else by_peer

    return allowed


def agree(case: Case, got: Named, wanted: Named, gradients: bool = False) -> Verdict:
    """Whether two ways to compute the same do: what laws 2 and 3 ask.

    They may differ by the spec's tolerance, or 4 units in the last place of the largest number: sums that cancel are no
    better. Where they differ by more, both may err by what law 1 allows each.
    """

    def near(name: str, largest: float, overall: float) -> float:
        return max(case.tolerance() * largest, 4 * EPSILON[case.dtype] * overall)

    def judge(jitters: int) -> Verdict:
        peer = peer_errors(case, jitters)[gradients]
        allowed = _allowed(case, peer)
        return compare(got, wanted, lambda *named: max(near(*named), 2 * allowed(*named)))

    return compare(got, wanted, near) or judge(0) or judge(16)


def cuts(case: Case) -> Verdict:
    """Law 2: cut anywhere, carry the state on and gradients back: nothing changes."""
    setting = dataclasses.replace(case.setting, checkpoint_every=0)
    case, tokens = dataclasses.replace(case, setting=setting), setting.sizes().T
    x, timed = draw(setting, drawn_for(case.dtype)), {arg.name for arg in setting.spec.inputs}
    dout = seeds(setting, drawn_for(case.dtype), x)
    whole, whole_gradients = case.evaluate(x, dout)

    at = int(generator(setting.seed, "cut").integers(0, tokens + 1))
    first = {n: a[:, :at] if n in timed else a for n, a in x.items()}
    state = case.evaluate(first, None)[0]
    carried = {n.replace("final.", "initial."): a for n, a in state.items() if n != "y"}
    second = {n: a[:, at:] if n in timed else a for n, a in x.items() if not n.startswith("initial.")} | carried
    end, back = case.evaluate(second, dout | {"y": dout["y"][:, at:]})
    outputs = end | {"y": np.concatenate([state["y"], end["y"]], axis=1)}
    verdict = agree(case, outputs, whole)
    if not back:
        return verdict
    arriving = {n.replace("initial.", "final."): a for n, a in back.items() if n.startswith("initial.")}
    front = case.evaluate(first, arriving | {"y": dout["y"][:, :at]})[1]
    gradients = {
        n: np.concatenate([g, back[n]], axis=1) if n in timed else g if n.startswith("initial.") else g + back[n]
        for n, g in front.items()
    }
    return worse(verdict, agree(case, gradients, whole_gradients, gradients=True))


def steps(case: Case) -> Verdict:
    """Law 2: token by token, through ``Mixer.step``, is the same mixer."""
    setting = dataclasses.replace(case.setting, checkpoint_every=0)
    case = dataclasses.replace(case, setting=setting)
    x, timed = draw(setting, drawn_for(case.dtype)), {arg.name for arg in setting.spec.inputs}
    whole = case.evaluate(x, None)[0]
    state, outputs = {n: a for n, a in x.items() if n.startswith("initial.")}, []
    for t in range(setting.sizes().T):
        token = {n: a[:, t : t + 1] if n in timed else a for n, a in x.items() if not n.startswith("initial.")}
        out = case.evaluate(token | state, None, step=True)[0]
        outputs.append(out.pop("y"))
        state = {n.replace("final.", "initial."): a for n, a in out.items()}
    got = {n.replace("initial.", "final."): a for n, a in state.items()} | {"y": np.concatenate(outputs, axis=1)}
    return agree(case, got, whole)


def packs(case: Case) -> Verdict:
    """Law 3: sequences in one row are what they are alone, forward and backward."""
    setting = case.setting
    x = draw(setting, drawn_for(case.dtype))
    dout = seeds(setting, drawn_for(case.dtype), x)
    outputs, gradients = case.evaluate(x, dout)
    every, row = setting.checkpoint_every, 0
    worst, sums = Verdict(0.0, ""), {n: np.zeros_like(g) for n, g in gradients.items()}
    for n, (alone, piece) in enumerate(sequences(setting, x)):
        first, last = x["offsets"][n : n + 2]
        rows = slice(row, row + (alone.lengths[0] // every if every else 0))
        row = rows.stop

        def part(name: str, a: np.ndarray) -> np.ndarray:
            """What belongs to this sequence."""
            if name.startswith("checkpoint."):
                return a[:, rows]  # noqa: B023
            return a[:, first:last] if name == "y" else a[n : n + 1]  # noqa: B023

        case_alone = dataclasses.replace(case, setting=alone)
        shapes = case_alone.evaluate(piece, None)[0]
        flowing = {name: _crop(part(name, a), shapes[name].shape) for name, a in dout.items()}
        wanted, back = case_alone.evaluate(piece, flowing)
        got = {name: _crop(part(name, a), wanted[name].shape) for name, a in outputs.items()}
        worst = worse(worst, agree(case_alone, got, wanted))
        for name, g in back.items():
            at = _place(setting, name, n, first, last)
            sums[name][at] += g
    if every:
        behind = {name: a[:, row:] for name, a in outputs.items() if name.startswith("checkpoint.")}
        worst = worse(worst, compare(behind, {name: np.zeros_like(a) for name, a in behind.items()}, lambda *_: 0.0))
    return worse(worst, agree(case, gradients, sums, gradients=True))


def _crop(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A cache of a pack has room for its longest sequence; what a shorter one fills is its beginning."""
    return array[tuple(slice(n) for n in shape)]


def _place(setting: Setting, name: str, n: int, first: int, last: int) -> Any:
    """Where the gradients of sequence n lie in those of its pack."""
    if name in {arg.name for arg in setting.spec.inputs}:
        return slice(None), slice(first, last)
    return slice(n, n + 1) if name.startswith("initial.") and setting.initial == "given" else slice(None)


def strides(case: Case) -> Verdict:
    """Law 3: transposed, strided and read-only arrays are what contiguous ones are."""
    setting = case.setting
    x = draw(setting, drawn_for(case.dtype))
    dout = seeds(setting, drawn_for(case.dtype), x)
    outputs, gradients = case.evaluate(x, dout)
    held = dtypes(setting.spec, setting.resolved, case.dtype)
    # NumPy has no bfloat16; ``evaluate`` rounds.
    exact = {name: "float32" if dtype == "bfloat16" else dtype for name, dtype in held.items()}
    odd = {
        name: a if name == "offsets" else scattered(a.astype(exact[name]), i) for i, (name, a) in enumerate(x.items())
    }
    flowing = {name: scattered(a.astype(outputs[name].dtype), i) for i, (name, a) in enumerate(dout.items())}
    odd_outputs, odd_gradients = case.evaluate(odd, flowing)
    # A kernel reads every layout in the same order; the reference leaves that to its library.
    slack = case.tolerance() if case.kernel is None else 4 * EPSILON[case.dtype]
    allowed = lambda name, largest, overall: slack * largest  # noqa: E731
    return worse(compare(odd_outputs, outputs, allowed), compare(odd_gradients, gradients, allowed))


def scattered(array: np.ndarray, kind: int) -> np.ndarray:
    """The same numbers in other places: axes swapped, every other element, a row repeated; read-only."""
    if array.ndim >= 3 and kind % 2 == 0:
        array = np.ascontiguousarray(array.swapaxes(1, 2)).swapaxes(1, 2)
    elif array.ndim:
        wide = np.full((*array.shape[:-1], 2 * array.shape[-1] + 1), -1, array.dtype)
        wide[..., 1::2] = array
        array = wide[..., 1::2]
    array.flags.writeable = False
    return array


LAWS: Mapping[str, Callable[[Case], Verdict]] = {
    "truth": equals_truth,
    "cuts": cuts,
    "steps": steps,
    "packs": packs,
    "strides": strides,
    "hard": equals_truth,
}


# What there is to check.


def kernels(backend: str, mixer: str) -> tuple[Kernel | None, ...]:
    """A backend's kernels of a mixer; the reference is None."""
    if backend == "reference":
        return (None,)
    found = installed()[backend]
    return tuple(k for k in found.kernels() if mixer in k.mixers) if found.status() else ()


def supported(
    setting: Setting, kernel: Kernel | None, dtype: str, library: str = "numpy", device: str = "cpu"
) -> Support:
    """Whether a kernel runs a call of a setting, with gradients."""
    if kernel is None:
        return Support.yes()
    sizes, spec = setting.sizes(), setting.spec
    held = dtypes(spec, setting.resolved, "float32")
    x: dict[str, Any] = {name: np.zeros(sizes.shape(axes), held[name]) for name, axes in setting.arrays}
    x["offsets"] = np.zeros(len(setting.lengths) + 1, np.int64) if setting.packed else None
    flags = Flags(grad=True, checkpoint_every=setting.checkpoint_every)
    call = Call(spec, setting.resolved, library_of(x["q"], "q"), x, sizes, flags)
    return kernel.supports(dataclasses.replace(call.problem(), dtype=dtype, library=library, device=device))


def own_library(kernel: Kernel | None) -> str:
    """The library whose arrays a kernel is tried on; torch's where it takes any, for they have gradients."""
    if kernel is None:
        return "numpy"
    if kernel.arrays == "any":
        return autodiff() or "numpy"
    return kernel.arrays


def own_dtypes(kernel: Kernel | None) -> tuple[str, ...]:
    """The dtypes in which a kernel computes: those of tensors have no float64, and multiply halves as they are."""
    if own_library(kernel) == "numpy":
        return ("float64", "float32")
    return ("float32", "bfloat16", *(["float64"] if kernel and kernel.arrays == "any" else []))


def cases(
    backend: str, *, dtypes: tuple[str, ...] = (), mixers: tuple[str, ...] = (), library: str = ""
) -> Iterator[Case]:
    """Every law for every mixer and kernel of a backend.

    Args:
        backend: ``reference`` or the name of an installed one.
        dtypes: of q, k and v; by default those in which a kernel computes.
        mixers: their names; all by default.
        library: whose arrays are passed; by default those that a kernel takes.
    """
    for name in mixers or names():
        for kernel in kernels(backend, name):
            for law in LAWS:
                for setting in _settings_of(law, get_spec(name)):
                    for dtype in dtypes or own_dtypes(kernel):
                        arrays = library or own_library(kernel)
                        case = fitted(Case(law, setting, backend, kernel, dtype, arrays))
                        if case is not None:
                            yield case


def fitted(case: Case) -> Case | None:
    """The case where its kernel runs, without checkpoints if it refuses them; None where it refuses all the same."""
    plain = dataclasses.replace(case.setting, checkpoint_every=0)
    for setting, device in itertools.product((case.setting, plain), DEVICES):
        calls = [setting]
        if case.law == "steps":
            calls.append(dataclasses.replace(plain, lengths=(1,) * len(plain.lengths)))
        if all(supported(call, case.kernel, case.dtype, case.library, device) for call in calls):
            return dataclasses.replace(case, setting=setting, device=device)
    return None


@functools.cache
def _settings_of(law: str, spec: MixerSpec) -> tuple[Setting, ...]:
    """Where a law is checked: the first on all settings, the others on a few each."""
    every = settings(spec)
    if law == "truth":
        return every
    if law == "hard":
        return hard_settings(spec)
    if law == "packs":
        return tuple(s for s in every if s.packed)[::2]
    if law == "steps":
        return tuple(s for s in every if not s.packed and 1 < s.lengths[0] < 40)[::2]
    if law == "cuts":
        return tuple(s for s in every if not s.packed and s.lengths[0] > 1)[::2]
    return every[::4]
