"""Every mixer × backend × kernel × dtype × array library that can run here, made into tests.

A test that takes ``case`` gets the cases of the laws named in its module's ``LAWS``; one that takes ``subject`` gets
every kernel with every mixer that it runs, and the reference; ``kernel_subject`` leaves the reference out; ``form`` is
a mixer with options on a backend of GPUs. None of them names a mixer or a kernel: a new one has its tests at once.
"""

import importlib.util
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

import mixers
from mixers import check
from mixers.backend import Kernel, installed
from mixers.cases import Setting, settings
from mixers.check import Case
from mixers.mixer import Mixer
from mixers.spec import MixerSpec

# How many of a kernel's cases are also tried on arrays that it takes from another library, and of which dtypes.
OTHER_LIBRARIES = {"torch": (6, ("float64", "float32", "bfloat16", "float16")), "jax": (48, ("float64",))}


@dataclass(frozen=True)
class Subject:
    """A kernel and one of its mixers; the reference where there is no kernel."""

    backend: str
    kernel: Kernel | None
    spec: MixerSpec

    @property
    def device(self) -> str:
        """Where its kernel runs."""
        if self.kernel is None:
            return "cpu"
        found = (self.case("truth", setting, "float32") for setting in settings(self.spec))
        return next((case.device for case in found if case), "cpu")

    def __str__(self) -> str:
        run = self.kernel.name if self.kernel else "loop" if self.backend == "reference" else "composed"
        return f"{self.backend}-{run}-{self.spec.name}"

    def case(self, law: str, setting: Setting, dtype: str) -> Case | None:
        """A case of this kernel, None where it refuses the setting."""
        return check.fitted(
            Case(law, setting, self.backend, self.kernel, dtype, check.own_library(self.kernel, self.backend))
        )


@dataclass(frozen=True)
class Form:
    """A mixer with options on a backend whose kernels run on a GPU, there or in its simulator."""

    backend: str
    mixer: str
    options: tuple[tuple[str, int], ...]
    device: str

    def get(self, **more: str) -> Mixer:
        """The mixer."""
        return mixers.get(self.mixer, backend=self.backend, **dict(self.options), **more)

    def __str__(self) -> str:
        return "-".join([self.backend, self.mixer, *(str(value) for _, value in self.options)])


def forms(config: pytest.Config) -> list[Form]:
    """Every mixer without a cache, with its default options and in chunks, on every backend of GPUs."""
    if importlib.util.find_spec("torch") is None:
        return []
    on_gpus = [b for b in backends(config) if b != "reference" and "cuda" in installed()[b].place.devices]
    specs = [mixers.get_spec(name) for name in mixers.names()]
    found = []
    for backend, spec in itertools.product(on_gpus, specs):
        for options in ((), (("chunk_size", 4),)):
            if spec.reserve is None and {name for name, _ in options} <= {o.name for o in spec.options}:
                found += [Form(backend, spec.name, options, device) for device in _where(backend, spec, options)]
    return found


def _where(backend: str, spec: MixerSpec, options: tuple[tuple[str, int], ...]) -> list[str]:
    """The device that a backend's kernels of a mixer run on here; none where there are no such kernels."""
    arrays = tuple((a.name, " ".join(a.layouts[0])) for a in spec.inputs if not a.optional)
    setting = Setting(spec, options, arrays, 1, 1, 8, 8, (4,))
    kernels = [k for k in check.kernels(backend, spec.name) if k]
    runs = (d for d in check.DEVICES for k in kernels if check.supported(setting, k, "float32", "torch", d))
    return list(itertools.islice(runs, 1))


def backends(config: pytest.Config) -> list[str]:
    """The backends that this run is about.

    Raises:
        pytest.UsageError: one that was asked for does not work here.
    """
    status = mixers.backend_status()
    asked = config.getoption("--backend")
    for name in asked:
        if not status.get(name):
            raise pytest.UsageError(f"--backend {name}: {status[name].reason if name in status else 'not installed'}")
    return asked or [name for name, works in status.items() if works]


def subjects(config: pytest.Config) -> list[Subject]:
    """Every kernel with every mixer that it runs."""
    return [
        Subject(backend, kernel, mixers.get_spec(name))
        for backend in backends(config)
        for name in mixers.names()
        for kernel in check.kernels(backend, name)
    ]


def cases(config: pytest.Config, laws: tuple[str, ...]) -> list[Case]:
    """Every case of some laws, on the arrays that a kernel takes and, for a part of them, on the others'."""
    found = []
    for backend in backends(config):
        found += [case for case in check.cases(backend) if case.law in laws]
        for library, (every, dtypes) in OTHER_LIBRARIES.items():
            if importlib.util.find_spec(library) is None or "truth" not in laws:
                continue
            chosen = (case for case in check.cases(backend, dtypes=dtypes, library=library) if other(case, library))
            by_kernel = itertools.groupby(chosen, key=lambda case: (case.mixer, case.kernel, case.dtype))
            for _, group in by_kernel:
                found += list(group)[::every]
    most = config.getoption("--most")
    return share([case for case in found if not most or size(case.setting) <= most], config.getoption("--share"))


def other(case: Case, library: str) -> bool:
    """A case of the first law that is not among a kernel's own, on its own arrays."""
    own = library == check.own_library(case.kernel, case.backend)
    own = own and case.backend != "reference" and case.dtype in check.own_dtypes(case.kernel, case.backend)
    return case.law == "truth" and not own


def size(setting: Setting) -> int:
    """Tokens × heads × widths, as a simulator feels them: narrow ones are filled up to blocks of 16."""
    s = setting.sizes()
    return s.B * s.T * s.H * max(s.K, 16) * max(s.V, 16)


def share(cases: list[Case], every: int) -> list[Case]:
    """Every n-th case of each group that differs in its setting alone; no group starts where its neighbour does."""
    groups: dict[tuple[object, ...], list[Case]] = {}
    for case in cases:
        # What is composed is slow outside of NumPy, and its parts have their own laws there: all laws in one group.
        composed = case.kernel is None and case.backend != "reference" and case.library != "numpy"
        law = "" if composed else case.law
        groups.setdefault((law, case.mixer, case.kernel, case.dtype, case.library), []).append(case)
    return [
        case for start, group in enumerate(groups.values()) for case in group[start % min(every, len(group)) :: every]
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Fill in ``case``, ``subject``, ``kernel_subject`` and ``form``."""
    config = metafunc.config
    if "case" in metafunc.fixturenames:
        _parametrize(metafunc, "case", cases(config, metafunc.module.LAWS))
    if "subject" in metafunc.fixturenames:
        whole = metafunc.module.__name__.endswith("test_refusals")
        _parametrize(metafunc, "subject", [s for s in subjects(config) if whole or s.spec.specialise is None])
    if "kernel_subject" in metafunc.fixturenames:
        _parametrize(metafunc, "kernel_subject", [s for s in subjects(config) if s.kernel])
    if "form" in metafunc.fixturenames:
        on_gpu = {"cuda": [pytest.mark.gpu]}
        found = [pytest.param(form, id=str(form), marks=on_gpu.get(form.device, [])) for form in forms(config)]
        metafunc.parametrize("form", found)


def _parametrize(metafunc: pytest.Metafunc, name: str, values: Sequence[Case | Subject]) -> None:
    """With ``--dist loadgroup`` one process has all tests of a kernel, so that no other compiles it as well."""

    def marks(value: Case | Subject) -> list[pytest.MarkDecorator]:
        spec = value.spec if isinstance(value, Subject) else value.setting.spec
        group = pytest.mark.xdist_group(value.kernel.name if value.kernel else spec.name)
        compiles = value.backend != "reference"
        return [*([group] if compiles else []), *([pytest.mark.gpu] if value.device == "cuda" else [])]

    marked = [pytest.param(v, id=str(v), marks=marks(v)) for v in values]
    metafunc.parametrize(name, marked)


def pytest_sessionstart(session: pytest.Session) -> None:
    """A backend that is asked for and lists no kernel must not pass for want of tests."""
    for backend in backends(session.config):
        if backend != "reference" and not installed()[backend].kernels():
            raise pytest.UsageError(f"backend {backend} lists no kernel")
