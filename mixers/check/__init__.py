"""Does every kernel compute what its mixer's specification says? The laws, as cases that can run anywhere.

for case in cases("numba"):
    verdict = case.run()    # true where the law holds; verdict.reason says by how much
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mixers.arrays import library_of
from mixers.arrays.evaluate import dtypes
from mixers.backend import Kernel, Support, installed
from mixers.call import Call
from mixers.cases import Setting, hard_settings, settings, wide_settings
from mixers.mixer import get
from mixers.problem import Flags
from mixers.registry import get_spec, names
from mixers.spec import MixerSpec

from .laws import LAWS, Case
from .truth import autodiff

__all__ = ["DEVICES", "LAWS", "Case", "cases", "fitted", "forms", "kernels", "own_dtypes", "own_library", "supported"]

DEVICES = ("cpu", "cuda")


def kernels(backend: str, mixer: str) -> tuple[Kernel | None, ...]:
    """A backend's kernels of a mixer; None for the reference, and for what is composed of parts that have kernels."""
    if backend == "reference":
        return (None,)
    found = installed()[backend]
    if not found.status():
        return ()
    every = found.kernels()
    own = tuple(k for k in every if mixer in k.mixers)
    return own or ((None,) if "composed" in forms(every, mixer) else ())


def forms(kernels: tuple[Kernel, ...], mixer: str) -> list[str]:
    """How kernels run a mixer: their forms, or composed where they run all that it is made of."""
    own = list(dict.fromkeys(k.form for k in kernels if mixer in k.mixers))
    made = get(mixer)
    parts = [part.name for part, _ in made.spec.parts(made.options)]
    whole = made.spec.compose is not None and all(any(part in k.mixers for k in kernels) for part in parts)
    return own + ["composed"] * whole


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


def own_library(kernel: Kernel | None, backend: str = "reference") -> str:
    """The library whose arrays a kernel is tried on; torch's where it takes any, for they have gradients."""
    if kernel is None:
        return "numpy" if backend == "reference" else installed()[backend].place.libraries[0]
    if kernel.arrays == "any":
        return autodiff() or "numpy"
    return kernel.arrays


def own_dtypes(kernel: Kernel | None, backend: str = "reference") -> tuple[str, ...]:
    """The dtypes in which a kernel computes: those of tensors have no float64, and multiply halves as they are."""
    if own_library(kernel, backend) == "numpy":
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
                    for dtype in dtypes or own_dtypes(kernel, backend):
                        arrays = library or own_library(kernel, backend)
                        case = fitted(Case(law, setting, backend, kernel, dtype, arrays))
                        if case is not None:
                            yield case


def fitted(case: Case) -> Case | None:
    """The case where its kernel runs, without checkpoints if it refuses them; None where it refuses all the same."""
    plain = dataclasses.replace(case.setting, checkpoint_every=0)
    for setting, device in itertools.product((case.setting, plain), devices(case.library)):
        calls = [setting]
        if case.law == "steps":
            calls.append(dataclasses.replace(plain, lengths=(1,) * len(plain.lengths)))
        if all(_runs(case, call, device) for call in calls):
            return dataclasses.replace(case, setting=setting, device=device)
    return None


def _runs(case: Case, setting: Setting, device: str) -> bool:
    """Whether a kernel runs a call of a setting; of what is composed, whether each of its parts has one that does."""
    if case.kernel or case.backend == "reference":
        return bool(supported(setting, case.kernel, case.dtype, case.library, device))
    every, parts = installed()[case.backend].kernels(), setting.spec.parts(setting.resolved)
    if not parts:
        return _reaches(case.backend, case.dtype, case.library, device)
    return all(
        any(spec.name in k.mixers and supported(part, k, case.dtype, case.library, device) for k in every)
        for spec, options in parts
        for part in [_part(setting, spec, options)]
    )


@functools.cache
def _reaches(backend: str, dtype: str, library: str, device: str) -> bool:
    """Whether any kernel of a backend runs on such arrays there: what has no parts stands on primitives of its own."""
    return any(
        supported(settings(get_spec(name))[0], kernel, dtype, library, device)
        for kernel in installed()[backend].kernels()
        for name in sorted(kernel.mixers)
    )


def _part(setting: Setting, spec: MixerSpec, options: Mapping[str, Any]) -> Setting:
    """How a composition calls one of its parts: a batch, with whatever arrays it has for it."""
    arrays = tuple((name, axes) for name, axes in setting.arrays if name in {a.name for a in spec.inputs})
    segment = setting.resolved.get("segment")  # states are wanted where segments end
    return dataclasses.replace(
        setting, spec=spec, options=tuple(options.items()), arrays=arrays, packed=False, initial="none",
        lengths=(setting.sizes().T,) * setting.sizes().B, checkpoint_every=segment if isinstance(segment, int) else 0,
    )  # fmt: skip


@functools.cache
def devices(library: str) -> tuple[str, ...]:
    """Where arrays may be, first where their library puts them: XLA's kernels run anywhere."""
    if library == "jax":
        import jax

        if jax.default_backend() == "gpu":
            return DEVICES[::-1]
    return DEVICES


@functools.cache
def _settings_of(law: str, spec: MixerSpec) -> tuple[Setting, ...]:
    """Where a law is checked: the first on all settings, the others on a few each."""
    every = settings(spec)
    if law == "truth":
        return every
    if law == "hard":
        return hard_settings(spec)
    if law == "wide":
        alone = spec.compose is None and spec.specialise is None  # what is composed is as wide as its parts
        return wide_settings(spec) if alone else ()
    if law == "packs":
        return tuple(s for s in every if s.packed)[::2]
    if law == "steps":
        return tuple(s for s in every if not s.packed and 1 < s.lengths[0] < 40)[::2]
    if law == "cuts":
        return tuple(s for s in every if not s.packed and s.lengths[0] > 1)[::2]
    return every[::4]
