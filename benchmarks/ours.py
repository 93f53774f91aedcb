"""A pass of one of our mixers, on the arrays that its kernels take."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mixers
from benchmarks.case import FORWARD, STEP, TRAIN, Case
from benchmarks.inputs import Arrays, convert
from benchmarks.peers import Run
from mixers.backend import Kernel, installed
from mixers.check import own_library
from mixers.check.pinned import Pinned
from mixers.mixer import Mixer
from mixers.problem import Flags, Problem

REFERENCE = "reference"
# The reference is the truth, not a kernel: timed on few tokens, so that its distance shows.
REFERENCE_TOKENS = 2048


@dataclass(frozen=True)
class Way:
    """One way to run a mixer: one kernel, or whatever a backend chooses."""

    backend: str
    kernel: Kernel | None = None
    arrays: str = ""

    @property
    def library(self) -> str:
        """Whose arrays it is timed on."""
        return self.arrays or own_library(self.kernel)

    @property
    def name(self) -> str:
        """As the report prints it."""
        return f"{self.backend} {self.kernel.form}" if self.kernel else self.backend

    def mixer(self, case: Case) -> Mixer:
        """The mixer that goes this way."""
        if self.kernel is None:
            return mixers.get(case.mixer, backend=self.backend, **dict(case.options))
        return Pinned(case.spec, self.backend, self.kernel, dict(case.options))


def chosen(case: Case, backends: list[str] | None = None) -> Iterator[Way]:
    """What a user gets on this device from ``backend="auto"``, or from each backend that is named."""
    for name in backends or ["auto"]:
        if name == REFERENCE and (case.kind == TRAIN or case.length > REFERENCE_TOKENS):
            continue
        library = "jax" if name == "jax" else "numpy" if case.device == "cpu" else "torch"
        yield Way(name, arrays=library)


def runs(case: Case, arrays: Arrays, way: Way) -> str:
    """The kernel that a way comes to, as ``numba/lattice.recurrent``."""
    if way.kernel is not None or case.spec.compose is not None:
        return way.name
    x = {n: a for n, a in convert(arrays, way.library, case.dtype, case.device).items() if n != "dy"}
    return way.mixer(case).explain(**x, grad=case.kind == TRAIN).chosen.name


def ways(case: Case, backends: list[str] | None = None) -> Iterator[Way]:
    """Every kernel on this machine that takes a case, and the reference where it is named and has what is asked."""
    for name, backend in installed().items():
        if (backends is None or name in backends) and backend.status():
            for kernel in backend.kernels():
                if case.mixer in kernel.mixers and kernel.supports(_problem(case, kernel)):
                    yield Way(name, kernel)
    if REFERENCE in (backends or []) and case.kind != TRAIN and case.length <= REFERENCE_TOKENS:
        yield Way(REFERENCE)


def _problem(case: Case, kernel: Kernel) -> Problem:
    present = [a for a in (*case.spec.inputs[3:], *case.spec.parameters) if not a.optional or a.name in case.optional]
    return Problem.of(
        case.spec,
        case.option,
        case.sizes,
        Flags(grad=case.kind == TRAIN),
        layouts=tuple((arg.name, " ".join(arg.layouts[0])) for arg in present),
        dtype=case.dtype,
        library=own_library(kernel),
        device=case.device,
    )


def build(case: Case, arrays: Arrays, way: Way) -> Run:
    """What gets timed: arrays handed over, the plan made, code compiled."""
    mix = way.mixer(case)
    x = convert(arrays, way.library, case.dtype, case.device)
    dy = x.pop("dy")
    if case.kind == STEP:
        timed = {a.name for a in case.spec.inputs}
        token = {name: a[:, -1] if name in timed else a for name, a in x.items()}
        state = mix(**x).state if case.length > 1 else mix.step(**token).state
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
