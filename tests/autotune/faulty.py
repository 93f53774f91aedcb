"""A backend whose kernels fail in every way that a tuner must survive. Two of them are right: one slowly, one fast."""

import os
import signal
import time
from typing import Any

import numpy as np

from mixers.backend import Config, Kernel, Place, Support
from mixers.problem import Arrays, Problem

_kept: list[np.ndarray] = []


class Honest(Kernel):
    """Linear attention token by token; sleeps, so that others are faster."""

    form = "recurrent"
    mixers = frozenset({"linear_attention"})
    arrays = "numpy"
    pause = 0.008

    def __init__(self, name: str) -> None:
        self.name = name

    def supports(self, problem: Problem) -> Support:
        """Plain batches."""
        refused = problem.packed or problem.flags.checkpoint_every or problem.widths[0] != problem.widths[1]
        return Support.no("takes plain batches") if refused else Support.yes()

    def configs(self, problem: Problem) -> tuple[Config, ...]:
        """Nothing to choose."""
        return ({},)

    def before(self) -> None:
        """What happens first."""
        time.sleep(self.pause)

    def forward(self, problem: Problem, config: Config, x: Arrays, out: Arrays) -> None:
        """See ``Kernel``."""
        self.before()
        state = np.array(x["initial.state"])
        for t in range(x["q"].shape[1]):
            state += x["k"][:, t, :, :, None] * x["v"][:, t, :, None, :]
            out["y"][:, t] = _scale(problem) * np.einsum("nhk,nhkv->nhv", x["q"][:, t], state)
        if "final.state" in out:
            out["final.state"][...] = state
        if "kept.state" in out:
            out["kept.state"][...] = 0

    def backward(self, problem: Problem, config: Config, x: Arrays, out: Arrays, dout: Arrays, dx: Arrays) -> None:
        """See ``Kernel``."""
        self.before()
        scale, dy = _scale(problem), dout["y"]
        state = np.array(x["initial.state"])
        for t in range(x["q"].shape[1]):
            state += x["k"][:, t, :, :, None] * x["v"][:, t, :, None, :]
            dx["q"][:, t] = scale * np.einsum("nhv,nhkv->nhk", dy[:, t], state)
        dstate = np.zeros_like(state) if dout.get("final.state") is None else np.array(dout["final.state"])
        for t in reversed(range(x["q"].shape[1])):
            dstate += scale * x["q"][:, t, :, :, None] * dy[:, t, :, None, :]
            dx["k"][:, t] = np.einsum("nhv,nhkv->nhk", x["v"][:, t], dstate)
            dx["v"][:, t] = np.einsum("nhk,nhkv->nhv", x["k"][:, t], dstate)
        if "initial.state" in dx:
            dx["initial.state"][...] = dstate


def _scale(problem: Problem) -> float:
    scale = problem.option.get("scale")
    return problem.sizes.K**-0.5 if scale is None else scale


class Fast(Honest):
    """As right, and faster."""

    pause = 0.002


class Wrong(Fast):
    """Off by a thousandth."""

    def forward(self, problem: Problem, config: Config, x: Arrays, out: Arrays) -> None:
        """See ``Kernel``."""
        super().forward(problem, config, x, out)
        out["y"] *= 1.001


class WrongGradient(Fast):
    """Right forward, off by a thousandth backward, and the fastest of all."""

    pause = 0.0

    def backward(self, problem: Problem, config: Config, x: Arrays, out: Arrays, dout: Arrays, dx: Arrays) -> None:
        """See ``Kernel``."""
        super().backward(problem, config, x, out, dout, dx)
        dx["k"] *= 1.001


class WrongWhereLarge(Fast):
    """Right on small problems only."""

    def forward(self, problem: Problem, config: Config, x: Arrays, out: Arrays) -> None:
        """See ``Kernel``."""
        super().forward(problem, config, x, out)
        out["y"][:, 70:] *= 1.001


class Crash(Fast):
    """Dies as of an illegal memory access."""

    def before(self) -> None:
        """Dies."""
        os.kill(os.getpid(), signal.SIGSEGV)


class Hang(Fast):
    """Never comes back."""

    def before(self) -> None:
        """Hangs."""
        while True:
            time.sleep(1)


class Leak(Fast):
    """Keeps memory."""

    def before(self) -> None:
        """Leaks."""
        _kept.append(np.ones(1 << 19))


class Forgetful(Fast):
    """Writes all but one element, in both passes."""

    def forward(self, problem: Problem, config: Config, x: Arrays, out: Arrays) -> None:
        """See ``Kernel``."""
        last = out["y"][0, -1, 0, 0].copy()
        super().forward(problem, config, x, out)
        out["y"][0, -1, 0, 0] = last

    def backward(self, problem: Problem, config: Config, x: Arrays, out: Arrays, dout: Arrays, dx: Arrays) -> None:
        """See ``Kernel``."""
        last = dx["v"][0, -1, 0, 0].copy()
        super().backward(problem, config, x, out, dout, dx)
        dx["v"][0, -1, 0, 0] = last


class Raise(Fast):
    """Raises, and prints where answers go."""

    def before(self) -> None:
        """Raises."""
        print("not an answer", flush=True)
        raise MemoryError("out of shared memory")


KERNELS = (
    Honest("honest"),
    Crash("crash"),
    Raise("raise"),
    Forgetful("forgetful"),
    Leak("leak"),
    Wrong("wrong"),
    WrongGradient("wrong-gradient"),
    WrongWhereLarge("wrong-where-large"),
    Hang("hang"),
    Fast("fast"),
)


class Faulty:
    """See ``mixers.backend.Backend``."""

    name = "faulty"
    summary = "NumPy arrays, for tests"
    preference = 1
    recomputes = False
    place = Place(("numpy", "torch"), ("cpu",))

    def status(self) -> Support:
        """Always."""
        return Support.yes()

    def compile_only(self, capability: int) -> None:
        """Compiles nothing: who crashes or hangs when it runs does so ahead, too."""

    def kernels(self) -> tuple[Kernel, ...]:
        """Right and wrong ones."""
        return KERNELS


backend: Any = Faulty()
