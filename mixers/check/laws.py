"""The laws that every kernel keeps, and a case of one: a kernel, a setting, a dtype and an array library.

truth         law 1: the float64 reference, forward and every gradient
hard, wide    the same on inputs that break careless kernels, and with the widest heads
cuts, steps   law 2: cut anywhere or taken token by token, a sequence is the same
packs         law 3: sequences in one row are what they are alone
strides       law 3: so are arrays of any layout
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mixers.arrays.evaluate import dtypes, evaluate
from mixers.backend import Kernel
from mixers.cases import Named, Setting, draw, generator, seeds, sequences
from mixers.mixer import Mixer

from .pinned import Pinned
from .truth import allowance, along_directions, drawn_for, peer_errors, truth
from .verdict import EPSILON, Verdict, compare, worse


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
        composed = "" if self.backend == "reference" else "/composed"
        kernel = f"/{self.kernel.name}" if self.kernel else composed
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
        outputs, gradients = evaluate(
            self.subject(),
            x,
            self.dtype,
            dout if self.has_gradients() else None,
            library=self.library,
            device=self.device,
            checkpoint_every=self.setting.checkpoint_every,
            step=step,
        )
        return self.held(outputs), self.held(gradients)

    def held(self, arrays: Named) -> Named:
        """Arrays within the range of their dtype: what lies beyond 65504 is rightly infinite in float16."""
        if self.dtype != "float16":
            return arrays
        most = float(np.finfo(np.float16).max)
        return {n: np.clip(a, -most, most) if n in ("q", "k", "v", "y") else a for n, a in arrays.items()}

    def tolerance(self) -> float:
        """What the spec allows, relative to an array's largest number."""
        return self.setting.spec.tolerance[self.dtype]


def equals_truth(case: Case) -> Verdict:
    """Law 1: the float64 reference, forward and every gradient."""
    setting, drawn = case.setting, drawn_for(case.dtype)
    x = draw(setting, drawn)
    dout = seeds(setting, drawn, x)
    outputs, gradients = case.evaluate(x, dout)
    wanted, wanted_gradients = truth(setting, drawn, "float64")
    wanted = case.held(wanted)
    wanted_gradients = None if wanted_gradients is None else case.held(wanted_gradients)

    def judge(jitters: int) -> Verdict:
        peer, peer_gradients = peer_errors(setting, case.dtype, jitters)
        forward = compare(outputs, wanted, allowance(setting, case.dtype, peer))
        if not gradients or wanted_gradients is None:
            return forward
        backward = compare(gradients, wanted_gradients, allowance(setting, case.dtype, peer_gradients))
        return worse(forward, dataclasses.replace(backward, reason="gradient of " + backward.reason))

    # The reference's own error is a draw of luck; where a kernel seems worse, the worst of several draws decides.
    verdict = judge(0) or judge(16)
    if gradients and wanted_gradients is None and not setting.spec.lends(setting.resolved):
        verdict = worse(verdict, along_directions(setting, case.dtype, x, dout, gradients))
    return verdict


def agree(case: Case, got: Named, wanted: Named, gradients: bool = False) -> Verdict:
    """Whether two ways to compute the same do: what laws 2 and 3 ask.

    They may differ by the spec's tolerance, or 4 units in the last place of the largest number: sums that cancel are no
    better. Where they differ by more, both may err by what law 1 allows each.
    """

    def near(name: str, largest: float, overall: float) -> float:
        return max(case.tolerance() * largest, 4 * EPSILON[case.dtype] * overall)

    def judge(jitters: int) -> Verdict:
        peer = peer_errors(case.setting, case.dtype, jitters)[gradients]
        allowed = allowance(case.setting, case.dtype, peer)
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
    carried = {n.replace("final.", "initial."): a for n, a in state.items() if n.startswith("final.")}
    second = {n: a[:, at:] if n in timed else a for n, a in x.items() if not n.startswith("initial.")} | carried
    end, back = case.evaluate(second, dout | {"y": dout["y"][:, at:]})
    outputs = end | {n: np.concatenate([state[n], end[n]], axis=1) for n in ("y", *setting.spec.results)}
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
        outputs.append(out)
        state = {n.replace("final.", "initial."): a for n, a in out.items() if n.startswith("final.")}
    got = {n.replace("initial.", "final."): a for n, a in state.items()}
    got |= {n: np.concatenate([out[n] for out in outputs], axis=1) for n in ("y", *setting.spec.results)}
    return agree(case, got, whole)


def packs(case: Case) -> Verdict:
    """Law 3: sequences in one row are what they are alone, forward and backward."""
    setting = case.setting
    x = draw(setting, drawn_for(case.dtype))
    dout = seeds(setting, drawn_for(case.dtype), x)
    every, row = setting.checkpoint_every, 0
    alone: list[tuple[Case, Callable[[str, np.ndarray], np.ndarray], Any, Named, Named]] = []
    flowing = {name: np.zeros_like(a) for name, a in dout.items()}
    for n, (one, piece) in enumerate(sequences(setting, x)):
        first, last = (int(at) for at in x["offsets"][n : n + 2])
        rows = slice(row, row + (one.lengths[0] // every if every else 0))
        row = rows.stop
        part = functools.partial(_part, setting, n, slice(first, last), rows)
        single = dataclasses.replace(case, setting=one)
        shapes = single.evaluate(piece, None)[0]
        own = {name: _crop(part(name, a), shapes[name].shape) for name, a in dout.items()}
        for name, a in own.items():  # of a cache no more than this sequence fills
            _crop(part(name, flowing[name]), a.shape)[...] = a
        wanted, back = single.evaluate(piece, own)
        alone.append((single, part, functools.partial(_place, setting, n=n, first=first, last=last), wanted, back))

    outputs, gradients = case.evaluate(x, flowing)
    worst, sums = Verdict(0.0, ""), {n: np.zeros_like(g) for n, g in gradients.items()}
    for single, own_part, place, wanted, back in alone:
        got = {name: _crop(own_part(name, a), wanted[name].shape) for name, a in outputs.items()}
        worst = worse(worst, agree(single, got, wanted))
        for name, g in back.items():
            sums[name][place(name)] += g
    if every:
        behind = {name: a[:, row:] for name, a in outputs.items() if name.startswith("checkpoint.")}
        worst = worse(worst, compare(behind, {name: np.zeros_like(a) for name, a in behind.items()}, lambda *_: 0.0))
    return worse(worst, agree(case, gradients, sums, gradients=True))


def _part(setting: Setting, n: int, tokens: slice, rows: slice, name: str, a: np.ndarray) -> np.ndarray:
    """What belongs to a sequence of a pack."""
    if name.startswith("checkpoint."):
        return a[:, rows]
    return a[:, tokens] if name in ("y", *setting.spec.results) else a[n : n + 1]


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
    "wide": equals_truth,
}
