"""What a mixer's result should be, and how far off a sound kernel may be.

The truth is the float64 reference. Its gradients are torch's where torch is installed; where it is not, gradients are
compared along random directions with central differences of the reference on NumPy. An error may be as large as the
spec's tolerance (relative to the largest number of its array), and no larger than twice the error of the same dtype's
reference plus 4 units in the last place. Where sums cancel, neither tells much: there a result may be off by twice what
it moves by when its inputs move in their last bit, as a backward stable algorithm's may.
"""

import functools
import importlib.util
from collections.abc import Mapping
from typing import Any

import numpy as np

from mixers import reference
from mixers.arrays.evaluate import evaluate, fitted
from mixers.arrays.numpy import NumPy, fill_first_state
from mixers.cases import Named, Setting, draw, generator, seeds
from mixers.mixer import Mixer
from mixers.problem import Flags

from .verdict import EPSILON, Allowed, Verdict, errors, worse

# Central differences of four points in float64 see about this much, relative to the gradient's norm.
DIFFERENCE_TOLERANCE = 1e-6
STEPS = tuple(3e-4 / 10**k for k in range(7))  # relative to the array's largest number


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

    Differences of four points at shorter and shorter steps, until two differ by no more than rounding explains: a long
    step may cross a kink (a slot that turns round) or pass over what is narrow (a layer norm of numbers that are nearly
    alike), a short one drowns in rounding. The two that agree best decide; what is between them is the doubt.
    """
    reference = Mixer(setting.spec, "reference", dict(setting.options))
    size = max(1e-3, float(np.max(np.abs(np.where(np.isfinite(x[name]), x[name], 0.0)), initial=0.0)))

    def terms(change: float) -> list[np.ndarray]:
        moved = x | {name: x[name] + change * direction}
        out = evaluate(reference, moved, "float64", checkpoint_every=setting.checkpoint_every)[0]
        return [fitted(dout[n], out[n].shape) * out[n] for n in dout]

    def value(change: float) -> float:
        return sum(float(np.sum(term)) for term in terms(change))

    def slope(step: float) -> float:
        return (8 * (value(step) - value(-step)) - (value(2 * step) - value(-2 * step))) / (12 * step)

    # A slope weighs 18 values, and each is off by half a unit in the last place of its terms.
    wrong = 18 * EPSILON["float64"] / 2 * sum(float(np.sum(np.abs(term))) for term in terms(0.0)) / 12
    found, doubt, before = float("nan"), float("nan"), slope(STEPS[0] * size)
    for step in STEPS[1:]:
        now, rounding = slope(step * size), wrong / (step * size)
        apart = abs(now - before) + rounding
        if not apart >= doubt:
            found, doubt = now, apart
        if apart <= 10 * rounding:
            break
        before = now
    return found, doubt


def along_directions(setting: Setting, dtype: str, x: Named, dout: Named, gradients: Named) -> Verdict:
    """Compare gradients along one random direction an array.

    A gradient that is nothing but cancellation is judged by the size of the others. Where float32 misses the tolerance
    it may err twice as much as the float32 reference and 4 units in the last place of the largest number.
    """
    worst = Verdict(0.0, "")
    overall = max((float(np.max(np.abs(g))) for g in gradients.values() if g.size), default=0.0)
    tolerance = max(setting.spec.tolerance[dtype], DIFFERENCE_TOLERANCE)
    floor = max((float(np.linalg.norm(g)) for g in gradients.values()), default=0.0) * (1 if setting.hard else 1e-3)
    for name, gradient in gradients.items():
        direction = generator(setting.seed, "along " + name).standard_normal(gradient.shape)
        expected, doubt = directional(setting, x, dout, name, direction)
        got, norm = float(np.sum(gradient * direction)), float(np.linalg.norm(gradient))
        limit = tolerance * max(norm, abs(expected), floor, 1e-30) + doubt
        if abs(got - expected) > limit and dtype != "float64":
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
    return sum(float(np.sum(fitted(dout[n], out[n].shape) * out[n].imag)) for n in dout) / h


def _peer_error(setting: Setting, x: Named, dout: Named, name: str, direction: np.ndarray, expected: float) -> float:
    """How far the float32 reference is from the true derivative: the worst of several draws, as in ``peer_errors``."""
    moved = (
        {n: _moved(a, EPSILON["float32"], generator(jitter, n)) if jitter else a for n, a in x.items()}
        for jitter in range(17)
    )
    return max(abs(peer_slope(setting, m, dout, name, direction) - expected) for m in moved)


@functools.lru_cache(maxsize=512)
def peer_errors(setting: Setting, dtype: str, jitters: int) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Errors of the same dtype's reference, forward and gradients; float32's for float64, which is the truth itself.

    The largest of the reference on torch, on NumPy, which adds in another order, and on inputs that differ in their
    last bit.
    """
    drawn = drawn_for(dtype)
    dtype = "float32" if dtype == "float64" else dtype
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


def allowance(setting: Setting, dtype: str, peer: Mapping[str, float]) -> Allowed:
    """The spec's tolerance, and no more than twice the same dtype's reference plus 4 units in the last place.

    Where the reference itself misses the tolerance, the input is badly conditioned, and only the second binds.
    """

    def allowed(name: str, largest: float, overall: float) -> float:
        limit = setting.spec.tolerance[dtype] * largest
        if name not in peer:
            return limit
        if dtype == "float64":  # the truth itself: how much rounding counts here, float32's reference shows
            return max(limit, 8 * peer[name] * EPSILON["float64"] / EPSILON["float32"])
        by_peer = 2 * peer[name] + 4 * EPSILON[dtype] * overall
        return min(limit, by_peer) if peer[name] <= limit else by_peer

    return allowed
