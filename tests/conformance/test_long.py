"""Law 4 on 16384 tokens, once a kernel: finite and right, forward and backward.

Where a kernel has float64, the reference needs no gradients for this: they are compared with its central differences
in float64, along one random direction that moves every array at once, and float32's element by element with float64's.
Where it has none it is held to law 1, whose truth are the reference's gradients.
"""

import dataclasses

import numpy as np
import pytest

from mixers.arrays.evaluate import evaluate
from mixers.cases import Named, Setting, draw, generator, long_setting, seeds
from mixers.check import Case, kernels
from mixers.check.truth import DIFFERENCE_TOLERANCE
from mixers.check.verdict import Verdict, compare
from mixers.mixer import Mixer
from mixers.spec import MixerSpec

TOKENS = 16384
TAIL = 48


def widest(subject) -> bool:
    """Whether this is the mixer of the kernel with the most inputs: one is enough."""
    import mixers

    def inputs(spec: MixerSpec) -> int:
        return len(spec.inputs)

    mine = [mixers.get_spec(name) for name in mixers.names() if subject.kernel in kernels(subject.backend, name)]
    return subject.spec is max(mine, key=inputs)


def long_case(subject, dtype: str) -> Case | None:
    """The first options that a kernel takes."""
    trials = next((o.trials for o in subject.spec.options if o.name == "chunk_size"), ())
    for chunk in trials[::-1] or (None,):
        setting = long_setting(subject.spec, {} if chunk is None else {"chunk_size": chunk}, TOKENS)
        case = subject.case("truth", setting, dtype)
        if case is not None:
            return case
    return None


def reference_of(case: Case, x: Named) -> Named:
    """The float64 reference: all tokens, or where a token costs as much as all before it, the last ones.

    There the cache of the tokens before is what the kernel left, which is compared with the inputs themselves.
    """
    reference = Mixer(case.setting.spec, "reference", dict(case.setting.options))
    if case.setting.spec.reserve is None:
        return evaluate(reference, x, "float64")[0]
    timed = {arg.name for arg in case.setting.spec.inputs}
    front = {n: a[:, :-TAIL] if n in timed else a for n, a in x.items()}
    state = {n.replace("final.", "initial."): a for n, a in case.evaluate(front, None)[0].items() if n != "y"}
    back = {n: a[:, -TAIL:] if n in timed else a for n, a in x.items()} | state
    return evaluate(reference, back, "float64")[0]


def tail(x: Named, truth: Named) -> Named:
    """The part of ``y`` that the reference has."""
    return x | {"y": x["y"][:, -truth["y"].shape[1] :]}


@pytest.mark.slow
def test_long(kernel_subject) -> None:
    subject = kernel_subject
    if not widest(subject):
        pytest.skip("another mixer of this kernel has more inputs")
    case = long_case(subject, "float64")
    if case is None:
        single = long_case(subject, "float32")
        assert single is not None
        verdict = single.run()
        assert verdict, verdict.reason
        return
    single = dataclasses.replace(case, dtype="float32")
    x = draw(case.setting, "float32")
    truth = reference_of(case, x)
    dout = seeds(case.setting, "float32", x)
    dout["y"][:, : -truth["y"].shape[1]] = 0

    outputs, gradients = case.evaluate(x, dout)
    rounded, rounded_gradients = single.evaluate(x, dout)
    tolerance = subject.spec.tolerance
    verdicts = [
        compare(tail(outputs, truth), truth, lambda name, largest, overall: tolerance["float64"] * largest),
        compare(tail(rounded, truth), truth, lambda name, largest, overall: tolerance["float32"] * largest),
        along_everything(case, x, dout, gradients),
        compare(rounded_gradients, gradients, lambda name, largest, overall: tolerance["float32"] * largest),
    ]
    assert all(verdicts), [v.reason for v in verdicts]


def along_everything(case: Case, x: Named, dout: Named, gradients: Named) -> Verdict:
    """Compare gradients along one direction that moves every array."""
    setting: Setting = case.setting
    directions = {n: generator(setting.seed, "along " + n).standard_normal(g.shape) for n, g in gradients.items()}
    # Logarithms of decays stay negative.
    for arg in setting.spec.inputs:
        if arg.draw == "log_decay" and arg.name in directions:
            directions[arg.name] *= -x[arg.name]
    step = 1e-4

    def value(times: float) -> float:
        out = reference_of(case, {n: a + times * step * directions[n] if n in directions else a for n, a in x.items()})
        part = tail(dout, out)
        return sum(float(np.sum(part[n] * out[n])) for n in part)

    expected = (8 * (value(1) - value(-1)) - (value(2) - value(-2))) / (12 * step)
    got = sum(float(np.sum(gradients[n] * directions[n])) for n in gradients)
    norm = float(np.sqrt(sum(np.sum((gradients[n] * directions[n]) ** 2) for n in gradients)))
    ratio = abs(got - expected) / (DIFFERENCE_TOLERANCE * norm) if np.isfinite(got) else float("inf")
    return Verdict(ratio, f"along a direction: {got:.10g}, expected {expected:.10g}, norm {norm:.3g}")
