"""No candidate wins before its outputs and gradients were compared: with the float64 reference on a small problem, and
with the default kernel on the whole one.

The small problem has the widths, options, layouts and dtype of the whole one, two sequences that start from given
states, gradients from every output, and tokens for two chunks and a bit.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from mixers import mixer as mixer_module
from mixers.backend import Config, Kernel
from mixers.cases import Setting, draw, seeds
from mixers.check import Case
from mixers.check.pinned import Pinned
from mixers.check.truth import truth
from mixers.check.verdict import EPSILON, Verdict, compare, worse
from mixers.plan import Plan
from mixers.problem import Arrays, Problem

# More than two chunks of 32 and more than one of 64, and no multiple of either.
TOKENS = 67

Chosen = tuple[Kernel, Config]


class Paired(Pinned):
    """A mixer that runs one kernel forward and one, maybe another, backward."""

    def __init__(self, problem: Problem, forward: Chosen, backward: Chosen) -> None:
        """See ``paired``."""
        super().__init__(problem.spec, "auto", forward[0], problem.option, forward[1])
        self.adjoint = backward
        self.batch_invariant, self.allow_tf32 = problem.flags.batch_invariant, problem.flags.allow_tf32
        self.recomputes = problem.flags.recompute
        self.key = json.dumps([self.key, id(forward[0]), id(backward[0]), backward[0].name, dict(backward[1])])
        mixer_module._from_key[self.key] = self

    def plan(self, problem: Problem, again: bool = False) -> Plan:
        """The two kernels.

        Raises:
            ValueError: the forward's does not run this problem.
        """
        plan = super().plan(problem)
        return dataclasses.replace(plan, adjoint=self.adjoint[0], adjoint_config=self.adjoint[1])


def paired(problem: Problem, forward: Chosen, backward: Chosen) -> Paired:
    """A mixer for a problem that runs these kernels, whatever would be chosen."""
    return Paired(problem, forward, backward)


@dataclass(frozen=True)
class Guarded(Case):
    """The first law, for kernels with given configurations.

    Attributes:
        subject_: the mixer.
        gradients: whether it is asked for gradients.
    """

    subject_: Any = None
    gradients: bool = True

    def subject(self) -> Any:
        """The kernels under test."""
        return self.subject_

    def has_gradients(self) -> bool:
        """Where the problem has a backward."""
        return self.gradients


def small(problem: Problem) -> Setting:
    """The reduced problem."""
    groups, heads, key_dim, value_dim = problem.widths
    share = max(1, heads // max(groups, 1))
    chunk = problem.spec.chunk(problem.option)
    tokens = 1 if problem.single else max(TOKENS, 2 * chunk + 3 if chunk <= 128 else chunk + 3)
    lengths = (tokens, 1) if problem.packed and not problem.single else (tokens, tokens)
    axes = {"q": "B T G K", "k": "B T G K", "v": "B T H V"}
    axes = {n: " ".join(problem.spec.arg(n).layouts[0]) for n in axes} | dict(problem.layouts)
    return Setting(
        problem.spec,
        tuple(problem.options),
        tuple(axes.items()),
        1,
        min(share, 2),
        key_dim,
        value_dim,
        lengths,
        problem.packed,
        "given",
        problem.flags.checkpoint_every and 6,
        "all",
    )


def small_problem(problem: Problem) -> Problem:
    """The reduced problem as the kernels meet it."""
    setting = small(problem)
    flags = dataclasses.replace(
        problem.flags, grad=True, recompute=problem.device != "cpu", checkpoint_every=setting.checkpoint_every
    )
    return Problem.of(
        problem.spec,
        problem.option,
        setting.sizes(),
        flags,
        layouts=problem.layouts,
        dtype=problem.dtype,
        library=problem.library,
        device=problem.device,
        packed=problem.packed,
    )


def against_reference(problem: Problem, forward: Chosen, backward: Chosen | None) -> Verdict:
    """Outputs, and gradients where there is a backward, on the small problem; raises nothing."""
    mix = paired(problem, forward, backward or forward)
    setting, gradients = small(problem), backward is not None
    case = Guarded("truth", setting, "auto", forward[0], problem.dtype, problem.library, problem.device, mix, gradients)
    return _rounded(case) if rounds(problem) else case.run()


def rounds(problem: Problem) -> bool:
    """Whether products may round to tf32, so that float32's own reference is no measure."""
    return problem.flags.allow_tf32 and problem.dtype == "float32"


def _rounded(case: Guarded) -> Verdict:
    """As precise as half precision is asked to be."""

    def allowed(name: str, largest: float, overall: float) -> float:
        return case.setting.spec.tolerance["float16"] * overall

    try:
        x = draw(case.setting, case.dtype)
        outputs, gradients = case.evaluate(x, seeds(case.setting, case.dtype, x))
        wanted, back = truth(case.setting, case.dtype, "float64")
        verdict = compare(outputs, wanted, allowed)
        return worse(verdict, compare(gradients, back, allowed)) if gradients and back else verdict
    except Exception as error:
        return Verdict(float("inf"), f"{type(error).__name__}: {error}")


def against_default(problem: Problem, found: Arrays, default: Arrays) -> Verdict:
    """Two kernels on the whole problem: both may err by the tolerance."""
    if type(next(iter(found.values()))) is not type(next(iter(default.values()))):  # of other rigs
        found, default = _on_host(found), _on_host(default)
    tolerance = problem.spec.tolerance["float16" if rounds(problem) else problem.dtype]
    unit = EPSILON[problem.dtype]
    verdict = compare(found, default, lambda _, largest, overall: 2 * tolerance * largest + 4 * unit * overall)
    return dataclasses.replace(verdict, reason="from the default kernel: " + verdict.reason)


def _on_host(arrays: Arrays) -> Arrays:
    return {name: a if isinstance(a, np.ndarray) else a.cpu().numpy() for name, a in arrays.items()}
