"""A pass of one of our mixers, on the arrays that its kernels take."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mixers
from benchmarks.case import FORWARD, STEP, Case
from benchmarks.inputs import Arrays, convert
from benchmarks.peers import Run
from mixers.backend import installed
from mixers.mixer import Mixer, Plan
from mixers.problem import Problem

REFERENCE = "reference"
# The reference is the truth, not a kernel: timed on few tokens, so that its distance shows.
REFERENCE_TOKENS = 2048


@dataclass(frozen=True)
class Way:
    """One way to run a mixer: a backend, the form of its kernel, and the library of the arrays."""

    backend: str
    form: str
    library: str

    @property
    def name(self) -> str:
        """As the report prints it."""
        return f"{self.backend} {self.form} on {self.library}"


class Forced(Mixer):
    """A mixer that takes a kernel of one form only."""

    form: str

    def plan(self, problem: Problem) -> Plan:
        """The backend's first kernel of the form that can.

        Raises:
            ValueError: none can; the message lists every reason.
        """
        if problem in self._plans:
            return self._plans[problem]
        refused = []
        for kernel in installed()[self.backend].kernels():
            if problem.spec.name in kernel.mixers and kernel.form == self.form:
                support = kernel.supports(problem)
                if support:
                    plan = self._plans[problem] = Plan(self.backend, kernel, kernel.configs(problem)[0])
                    return plan
                refused.append(f"{kernel.name}: {support.reason}")
        raise ValueError("; ".join(refused) or f"{self.backend} has no {self.form} kernel of {problem.spec.name}")


def ways(mixer: str, backends: list[str] | None = None) -> Iterator[Way]:
    """Every backend and form that claims a mixer on this machine."""
    for name, backend in installed().items():
        if (backends is None or name in backends) and backend.status():
            kernels = [kernel for kernel in backend.kernels() if mixer in kernel.mixers]
            for form, library in dict.fromkeys((kernel.form, kernel.arrays) for kernel in kernels):
                yield Way(name, form, library)
    if backends is not None and REFERENCE in backends:
        yield Way(REFERENCE, "loop", "numpy")


def refuses(case: Case, way: Way) -> str:
    """Why a case is not run in some way; empty where it is."""
    if way.backend == REFERENCE:
        if case.kind not in (FORWARD, STEP):
            return "the reference has no gradients on NumPy arrays"
        return f"the reference is timed up to {REFERENCE_TOKENS} tokens" if case.length > REFERENCE_TOKENS else ""
    return ""


def build(case: Case, arrays: Arrays, way: Way) -> Run:
    """What gets timed: arrays handed over, the plan made, code compiled.

    Raises:
        ValueError: the way cannot serve, with its reasons.
    """
    mix = mixers.get(case.mixer, backend=way.backend, **dict(case.options))
    if way.library == "numpy" and way.backend != REFERENCE:
        forced = Forced(mix.spec, way.backend, dict(case.options))
        forced.form = way.form
        mix = forced
    x = convert(arrays, way.library, case.dtype, case.device)
    dy = x.pop("dy")
    if case.kind == STEP:
        token = {name: a[:, 0] for name, a in x.items()}
        state = mix.step(**token).state
        return _step(mix, token, state)
    if case.kind == FORWARD:
        return lambda: mix(**x)
    return {"numpy": _train_numpy, "torch": _train_torch, "jax": _train_jax}[way.library](mix, x, dy)


def _step(mix: Mixer, token: dict[str, Any], state: Any) -> Run:
    return lambda: mix.step(**token, state=state)


def _train_numpy(mix: Mixer, x: dict[str, Any], dy: Any) -> Run:
    def train() -> Any:
        result, pullback = mix.vjp(**x)
        return result.y, pullback(dy)

    return train


def _train_torch(mix: Mixer, x: dict[str, Any], dy: Any) -> Run:
    import torch

    leaves = {name: a.requires_grad_() for name, a in x.items()}

    def train() -> Any:
        y = mix(**leaves).y
        return y, dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))

    return train


def _train_jax(mix: Mixer, x: dict[str, Any], dy: Any) -> Run:
    import jax

    @jax.jit
    def train(x: dict[str, Any], dy: Any) -> Any:
        y, pull = jax.vjp(lambda x: mix(**x).y, x)
        return y, pull(dy)[0]

    return lambda: train(x, dy)
