"""Law 9: bad input is refused before any kernel runs, in words: what was got, what was expected, what to do."""

import importlib.util
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import mixers
from mixers import check
from mixers.backend import Backend, Kernel, Place, Support, installed
from mixers.cases import Setting, draw
from mixers.spec import MixerSpec

LIBRARIES = [name for name in ("numpy", "torch") if name == "numpy" or importlib.util.find_spec(name)]
B, T, G, H, K, V = 2, 6, 2, 4, 5, 3

Arguments = dict[str, Any]


def convert(library: str, array: np.ndarray) -> Any:
    if library == "numpy":
        return array
    import torch

    return torch.from_numpy(np.array(array))


def arguments(spec: MixerSpec, library: str, batch: int = B) -> Arguments:
    """A good call."""
    width = V if spec.arg("v").layouts[0][-1] == "V" else K
    arrays = tuple((a.name, " ".join(a.layouts[0])) for a in (*spec.inputs, *spec.parameters) if not a.optional)
    x = draw(Setting(spec, (), arrays, G, H, K, width, (T,) * batch), "float32")
    return {name: convert(library, a.astype(np.float32)) for name, a in x.items()}


def swapped(array: Any) -> Any:
    """Axes 1 and 2 exchanged: a head-first layout."""
    return array.swapaxes(1, 2) if isinstance(array, np.ndarray) else array.transpose(1, 2)


def cast(array: Any, dtype: str) -> Any:
    if isinstance(array, np.ndarray):
        return array.astype(dtype)
    import torch

    return array.to(getattr(torch, dtype))


def shape_words(array: Any) -> str:
    return re.escape(str(tuple(array.shape)))


Refusal = tuple[str, Arguments, type[Exception], tuple[str, ...]]


def refusals(spec: MixerSpec, library: str) -> Iterator[Refusal]:
    """Bad calls: a name, arguments, the exception, and patterns of its message."""
    good = arguments(spec, library)
    everything = ", ".join(a.name for a in spec.inputs[:3])

    for arg in spec.inputs[3:]:
        if not arg.optional:
            rest = {n: a for n, a in good.items() if n != arg.name}
            yield f"missing {arg.name}", rest, ValueError, (f"{arg.name} is missing", everything)
    yield "extra gate", good | {"gaet": good["v"]}, TypeError, ("gaet", "known: ")
    if spec.inputs[3:]:
        name = spec.inputs[3].name
        wrong = dict(good) | {name + "s": good[name]}
        yield "misspelt gate", wrong, TypeError, (f"{name}s", f"did you mean '{name}'")

    for name in good:
        axes = spec.arg(name).layouts[0]
        if len(axes) < 3:
            continue
        fewer = good[name][0]
        yield f"rank of {name}", good | {name: fewer}, ValueError, (name, shape_words(fewer), "expected")
        if name != "q":
            longer = good[name][:, :-1]
            yield f"tokens of {name}", good | {name: longer}, ValueError, (name, shape_words(longer), f", {T}")
    first = {n: swapped(a) if n in ("k", "v") else a for n, a in good.items()}
    yield "head-first", first, ValueError, ("k has shape", "head-first", "swap axes 1 and 2")
    yield "narrow k", good | {"k": good["k"][..., :-1]}, ValueError, ("k has shape", f"{K - 1}\\)", f", {K}\\)")

    odd = {n: _with_heads(a, spec.arg(n).layouts[0], {"H": 3, "G": 2}) for n, a in good.items()}
    yield "heads no multiple", odd, ValueError, ("2 heads", "has 3;", "multiple")
    reversed_ = {n: _with_heads(a, spec.arg(n).layouts[0], {"H": 1, "G": 2}) for n, a in good.items()}
    yield "more key heads than value heads", reversed_, ValueError, ("2 heads", "has 1;", "never the other way round")

    yield (
        "mixed dtypes",
        good | {"v": cast(good["v"], "float64")},
        TypeError,
        ("v has dtype float64", "q float32", "share"),
    )
    for name in ("q", *(a.name for a in spec.inputs[3:4])):
        yield f"whole numbers in {name}", good | {name: cast(good[name], "int64")}, TypeError, ("int64", "float32")
    yield "a list", good | {"q": [[1.0]]}, TypeError, ("q is a builtins.list", "NumPy, torch or JAX")

    layout = spec.state(spec.resolve({}))
    mix = mixers.get(spec, backend="reference")
    state = mix.init_state(B, H, K, good["v"].shape[-1], key_heads=G, like=good["q"])
    parts = list(layout.unpack(state))
    bad = layout.pack((parts[0][..., :-1], *parts[1:]))
    yield (
        "state's shape",
        good | {"initial_state": bad},
        ValueError,
        ("state", shape_words(parts[0][..., :-1]), "expected"),
    )
    whole = layout.pack((cast(parts[0], "int64"), *parts[1:]))
    yield "state of whole numbers", good | {"initial_state": whole}, TypeError, ("state", "int64", "float32")
    if len(parts) > 2:
        yield (
            "state's arrays",
            good | {"initial_state": tuple(parts[:-1])},
            ValueError,
            (f"has {len(parts) - 1}", f"{len(parts)}"),
        )
        at = max(i for i, f in enumerate(layout.fields) if f.counter)
        floating = layout.pack((*parts[:at], cast(parts[at], "float32"), *parts[at + 1 :]))
        yield "state's counter", good | {"initial_state": floating}, TypeError, (layout.fields[at].name, "int32")

    one = arguments(spec, library, batch=1)
    number = lambda *n: convert(library, np.array(n))  # noqa: E731
    yield "pack and batch", good | {"cu_seqlens": number(0, T)}, ValueError, (f"batch is {B}", "cu_seqlens")
    yield "pack starts late", one | {"cu_seqlens": number(1, T)}, ValueError, ("starts at 1", "expected 0")
    yield "pack ends early", one | {"cu_seqlens": number(0, T - 1)}, ValueError, (f"ends at {T - 1}", f"{T} tokens")
    yield "pack ends late", one | {"cu_seqlens": number(0, T + 2)}, ValueError, (f"ends at {T + 2}", f"{T} tokens")
    yield "pack falls", one | {"cu_seqlens": number(0, 4, 2, T)}, ValueError, ("falls from 4 to 2",)
    yield "pack of one offset", one | {"cu_seqlens": number(0)}, ValueError, ("cu_seqlens", r"\(1,\)", "N\\+1")
    yield (
        "pack of fractions",
        one | {"cu_seqlens": number(0.0, 6.0)},
        ValueError,
        ("cu_seqlens", "float64", "whole numbers"),
    )
    yield "negative checkpoints", good | {"checkpoint_every": -1}, ValueError, ("checkpoint_every=-1", "from 1 up")

    if library == "torch":
        import torch

        elsewhere = good | {"v": torch.empty(good["v"].shape, device="meta")}
        yield "mixed devices", elsewhere, TypeError, ("v is on meta", "q on cpu", "move")
        yield (
            "mixed libraries",
            good | {"v": good["v"].numpy()},
            TypeError,
            ("v is a numpy array", "q a torch array", "convert"),
        )
        host = state.numpy() if len(parts) == 1 else None
        if host is not None:
            yield "state of another library", good | {"initial_state": host}, TypeError, ("state", "numpy", "torch")


def _with_heads(array: Any, axes: tuple[str, ...], heads: dict[str, int]) -> Any:
    """The array with other numbers of heads."""
    for axis, count in heads.items():
        if axis in axes:
            at = axes.index(axis)
            array = array[(slice(None),) * at + ([i % array.shape[at] for i in range(count)],)]
    return array


@pytest.fixture
def no_kernel_runs(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    """Any kernel that starts, and any reference, fails the test."""

    def ran(*_: Any, **__: Any) -> None:
        pytest.fail("a kernel ran on bad input")

    for backend in installed().values():
        if backend.status():
            for kernel in backend.kernels():
                monkeypatch.setattr(type(kernel), "forward", ran)
    from mixers import reference

    monkeypatch.setattr(reference, "_run", ran)


@pytest.mark.parametrize("library", LIBRARIES)
def test_bad_calls(subject, library: str, no_kernel_runs: None) -> None:
    mix = mixers.get(subject.spec, backend=subject.backend)
    for name, bad, error, patterns in refusals(subject.spec, library):
        with pytest.raises(error) as caught:
            mix(**bad)
        for pattern in patterns:
            assert re.search(pattern, str(caught.value)), f"{name}: {caught.value!s} lacks {pattern!r}"


def served_by(subject) -> tuple[str, ...]:
    """The libraries that a backend serves; in a simulator, of the CPU's those that its kernels take."""
    place = installed()[subject.backend].place
    if subject.device in place.devices or subject.kernel.arrays == "torch":
        return place.libraries
    return ("numpy", *place.libraries)


def served(subject, library: str) -> Arguments:
    """A good call, with its arrays where the kernel runs; of a library that it does not serve it is refused."""
    good = arguments(subject.spec, library)
    if subject.backend != "reference" and library not in served_by(subject):
        with pytest.raises(ValueError, match=f"takes arrays of .*not of {library}"):
            mixers.get(subject.spec, backend=subject.backend)(**good)
        pytest.skip(f"{subject.backend} refuses arrays of {library}")
    return good if library == "numpy" else {name: a.to(subject.device) for name, a in good.items()}


def host(array: Any) -> np.ndarray:
    """As a NumPy array, the same memory where that is the host's."""
    return np.asarray(array if isinstance(array, np.ndarray) else array.cpu())


@pytest.mark.parametrize("library", LIBRARIES)
def test_good_calls_run(subject, library: str) -> None:
    """What the bad calls were made from is good."""
    result = mixers.get(subject.spec, backend=subject.backend)(**served(subject, library))
    assert tuple(result.y.shape)[:3] == (B, T, H)
    assert np.isfinite(host(result.y)).all()


@pytest.mark.parametrize("library", LIBRARIES)
def test_no_token_returns_a_copy_of_the_state(subject, library: str) -> None:
    good = served(subject, library)
    timed = {a.name for a in subject.spec.inputs}
    empty = {n: a[:, :0] if n in timed else a for n, a in good.items()}
    mix = mixers.get(subject.spec, backend=subject.backend)
    state = mix(**good).state
    y, end = mix(**empty, initial_state=state)
    assert tuple(y.shape)[:3] == (B, 0, H)
    before, after = ([*s] if isinstance(s, tuple) else [s] for s in (state, end))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(host(a), host(b))
        assert a is not b and (subject.device != "cpu" or not np.shares_memory(host(a), host(b)))


def test_wrong_token_in_step(subject, no_kernel_runs: None) -> None:
    """A step takes tokens without their axis T, and says so."""
    good = arguments(subject.spec, "numpy")
    with pytest.raises(ValueError, match=r"q has shape .*expected \[B,[GH],K\]"):
        mixers.get(subject.spec, backend=subject.backend).step(**good)


# What is refused before there is a call.


@pytest.mark.parametrize(
    ("make", "patterns"),
    [
        (lambda: mixers.get("latice"), ("'latice'", "did you mean 'lattice'", "known: ")),
        (lambda: mixers.get_spec("delta"), ("'delta'", "known: ")),
        (lambda: mixers.get("lattice", backend="referense"), ("'referense'", "did you mean 'reference'")),
        (lambda: mixers.get("lattice", chunksize=4), ("'chunksize'", "did you mean 'chunk_size'")),
        (lambda: mixers.get("lattice", chunk_size=0), ("chunk_size=0", "whole number from 1 up")),
        (lambda: mixers.get("lattice", chunk_size=True), ("chunk_size=True", "whole number from 1 up")),
        (lambda: mixers.get("lattice", objective="decode"), ("'decode'", "'decoding'")),
        (lambda: mixers.get("lattice", read_norm=1), ("read_norm=1", "True or False")),
        (lambda: mixers.get("lattice", scale=float("nan")), ("scale=nan", "finite number")),
        (lambda: mixers.get("lattice", state_dtype="int8"), ("state_dtype='int8'", "float32")),
        (lambda: mixers.pack([3, -1]), ("-1", "from 0 up")),
        (lambda: mixers.pack([]), (r"\[\]", "whole numbers")),
        (lambda: mixers.pack([1.5]), ("1.5", "whole numbers")),
    ],
)
def test_bad_names_and_values(make: Callable[[], Any], patterns: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    for pattern in patterns:
        assert re.search(pattern, str(caught.value)), f"{caught.value!s} lacks {pattern!r}"


class Picky(Kernel):
    """A kernel that refuses everything."""

    name, form, mixers, arrays = "picky.recurrent", "recurrent", frozenset({"lattice"}), "numpy"

    def supports(self, problem: Any) -> Support:
        return Support.no(f"K = {problem.sizes.K} is not to its taste")

    def configs(self, problem: Any) -> tuple[dict[str, int], ...]:
        raise AssertionError

    forward = backward = configs  # type: ignore[assignment]


class PickyBackend:
    """A backend with one kernel that refuses, or that is not available at all."""

    name, summary, preference, recomputes = "picky", "nowhere", 99, False
    place = Place(("numpy", "torch", "jax"), ("cpu",))

    def __init__(self, works: bool) -> None:
        self.works = works

    def status(self) -> Support:
        return Support.yes() if self.works else Support.no("its driver is missing: install it")

    def kernels(self) -> tuple[Kernel, ...]:
        return (Picky(),)


def offer(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> None:
    everything = {**installed(), backend.name: backend}
    monkeypatch.setattr("mixers.autotune.policy.installed", lambda: everything)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("works", "reason"), [(True, "K = 5 is not to its taste"), (False, "its driver is missing")])
def test_an_explicit_backend_never_falls_back(
    monkeypatch: pytest.MonkeyPatch, works: bool, reason: str, library: str
) -> None:
    offer(monkeypatch, PickyBackend(works))
    good = arguments(mixers.get_spec("lattice"), library)
    with pytest.raises(ValueError, match=reason) as caught:
        mixers.get("lattice", backend="picky")(**good)
    assert "backend='auto'" in str(caught.value)


def test_an_explicit_backend_without_a_kernel_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, PickyBackend(True))
    with pytest.raises(ValueError, match="no kernel for ssd"):
        mixers.get("ssd", backend="picky")(**arguments(mixers.get_spec("ssd"), "numpy"))


def test_auto_goes_on_to_what_can_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, PickyBackend(True))
    explained = mixers.get("lattice").explain(**arguments(mixers.get_spec("lattice"), "numpy"))
    assert explained.chosen.backend != "picky"
    assert "K = 5 is not to its taste" in str(explained)


def test_a_refusal_needs_a_reason() -> None:
    with pytest.raises(ValueError, match="reason"):
        Support.no("")


def test_refusing_kernels_give_reasons(kernel_subject) -> None:
    """Whatever a kernel refuses, it says why."""
    from mixers.cases import settings

    for setting in settings(kernel_subject.spec):
        for device in ("cpu", "cuda", "tpu"):
            support = check.supported(setting, kernel_subject.kernel, "float32", device=device)
            assert bool(support) != bool(support.reason)
            assert support or len(support.reason) > 10
