"""The tuner: what fails is data with a reason, what is right and fastest wins."""

import dataclasses
import functools
import pickle
from pathlib import Path

import numpy as np
import pytest
from mixers.autotune import ahead, knowledge, tuner
from mixers.autotune.device import device_of_kind, stamp_of
from mixers.autotune.key import BACKWARD, FORWARD, key_of
from mixers.autotune.policy import Asked, candidates
from mixers.autotune.profile import Entry, Profile, save

import mixers
from mixers import autotune
from mixers.backend import installed
from mixers.problem import Problem
from mixers.registry import get_spec

SHAPE = (1, 90, 2, 8, 8)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them may run, and hanging shows soon."""
    monkeypatch.setattr(tuner, "MOST", 16)
    monkeypatch.setattr(tuner, "Patience", functools.partial(tuner.Patience, first=2.0))
    monkeypatch.setattr(ahead, "PATIENCE", 0.1)
    monkeypatch.setattr(ahead, "SETTLED", 0.1)


def arguments() -> dict[str, np.ndarray]:
    shape = (SHAPE[0], SHAPE[1], SHAPE[2], SHAPE[3])
    return dict(zip("qkv", np.random.default_rng(0).standard_normal((3, *shape), dtype=np.float32), strict=True))


REASONS = {
    "crash": "it crashed: SIGSEGV",
    "raise": "MemoryError: out of shared memory",
    "forgetful": "y holds 1 numbers that are not finite",
    "leak": "leaks 4.0 MiB a call",
    "wrong": "wrong: y: error",
    "wrong-gradient": "wrong: gradient of k",
    "wrong-where-large": "wrong: from the default kernel: y: error",
    "hang": "it hung: no answer within 2 s",
    "honest": "",
    "fast": "",
}

# Those that are right in a backward may win it.
BACKWARD_REASONS = {
    **REASONS,
    "forgetful": "v holds 1 numbers that are not finite",
    "wrong": "",
    "wrong-where-large": "",
}


@pytest.mark.usefixtures("faulty", "impatient")
def test_every_fault_is_caught_and_named_and_the_fastest_right_kernel_wins(profile: Path) -> None:
    entry, backward = autotune.tune("linear_attention", SHAPE, backend="faulty", budget=240)
    assert entry.kernel == "faulty/fast"
    assert entry.default == "faulty/honest"
    assert entry.runner_up == "faulty/honest"
    assert entry.seconds < entry.default_seconds
    assert 0 < entry.error <= 1
    assert entry.candidates == len(REASONS)
    for one, reasons in ((entry, REASONS), (backward, BACKWARD_REASONS)):
        found = {t.name.partition("/")[2]: t.reason for t in one.trials}
        assert found.pop("reference", "") in ("", "takes other arrays than the forward leaves")
        assert found.keys() == reasons.keys()
        for name, reason in reasons.items():
            assert found[name].startswith(reason), (name, found[name])
            assert bool(found[name]) == bool(reason)
    assert not BACKWARD_REASONS[backward.kernel.removeprefix("faulty/")]
    assert backward.default == entry.kernel

    # What was found is on disk, and a plan follows it.
    assert Profile.parse(profile.read_text()).entries[entry.id].kernel == "faulty/fast"
    mix, x = mixers.get("linear_attention", backend="faulty"), arguments()
    explained = mix.explain(**x)
    assert explained.chosen.name == "faulty/fast"
    text = str(explained)
    for reason in filter(None, REASONS.values()):
        assert reason in text
    assert "the user's profile" in text
    reference, _ = mixers.get("linear_attention", backend="reference")(**x)
    np.testing.assert_allclose(mix(**x).y, reference, atol=1e-4)
    last = autotune.log[-1]
    assert (last.chosen, last.part, last.measured) == ("faulty/fast", "forward", False)


def test_nothing_is_measured_unless_asked_and_never_where_it_is_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(tuner, "Workshop", lambda: asked.append(1) or (_ for _ in ()).throw(RuntimeError("asked")))
    x = arguments()
    mixers.get("linear_attention")(**x)
    monkeypatch.setenv("MIXERS_TUNE", "off")
    mixers.get("linear_attention", tune=True)(**x)
    with pytest.raises(RuntimeError, match="MIXERS_TUNE=off"):
        autotune.tune("linear_attention", SHAPE)
    assert not asked
    monkeypatch.delenv("MIXERS_TUNE")
    with pytest.raises(RuntimeError, match="asked"):
        mixers.get("linear_attention", tune=True)(**x)
    assert asked


@pytest.mark.usefixtures("faulty")
def test_a_new_problem_is_measured_once_whatever_its_length_and_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def measured(problem: Problem, asked: Asked) -> list[Entry]:
        calls.append(str(problem))
        found = [entry_of(problem, "faulty/fast")]
        knowledge.learn(found)
        return found

    monkeypatch.setattr(tuner, "tune_problem", measured)
    mix, x = mixers.get("linear_attention", backend="faulty", tune=True), arguments()
    mix(**x)
    assert len(calls) == 1
    logged = len(autotune.log)
    for batch, tokens in ((1, 7), (2, 90), (1, 90)):
        mix(**{name: np.repeat(a[:, :tokens], batch, axis=0) for name, a in x.items()})
    assert len(calls) == 1
    assert {d.chosen for d in autotune.log} == {"faulty/fast"}
    assert len(autotune.log) == logged
    again = mixers.get("linear_attention", backend="faulty", tune=True)
    again(**{name: np.repeat(a, 64, axis=0) for name, a in x.items()})
    assert len(calls) == 1  # too far from what was measured to be believed, and yet nothing new
    assert autotune.log[-1].chosen == "faulty/honest"


def entry_of(problem: Problem, kernel: str, part: str = "forward") -> Entry:
    """What a measurement would have left."""
    backend, _, name = kernel.partition("/")
    stamp = stamp_of(installed()[backend])
    config = next(k for k in installed()[backend].kernels() if k.name == name).configs(problem)[0]
    return Entry(
        key=key_of(problem, part),
        heads=problem.parallel,
        device=device_of_kind("cpu").id,
        stamp=stamp.id,
        backend="auto",
        kernel=kernel,
        config=dict(config),
        candidates=2,
        shape="any",
        seconds=1e-3,
        runner_up="",
        runner_up_seconds=0.0,
        default="",
        default_seconds=2e-3,
        error=0.5,
        date="2026-01-01T00:00:00Z",
        versions=dict(stamp.versions),
    )


def problem_of_arguments(**flags: bool) -> Problem:
    call = mixers.get("linear_attention").validated(**arguments())
    problem = call.problem()
    return dataclasses.replace(problem, flags=dataclasses.replace(problem.flags, **flags))


@pytest.mark.usefixtures("faulty")
def test_the_order_of_knowledge(profile: Path, shipped: Path) -> None:
    """Explicit > using > user > shipped > heuristic; what is out of date or of another device is not believed."""
    problem, x = problem_of_arguments(), arguments()
    mine, theirs = entry_of(problem, "faulty/fast"), entry_of(problem, "faulty/honest")
    mix = mixers.get("linear_attention")
    heuristic = mix.explain(**x).chosen.name
    assert heuristic.startswith("numba/")

    def chosen(mix: mixers.Mixer) -> str:
        mix(**x)
        explained = mix.explain(**x).chosen.name
        plan = mix.plan(problem)
        assert plan.kernel is not None
        assert f"{plan.backend}/{plan.kernel.name}" == explained
        return explained

    assert chosen(mix) == heuristic
    ship(shipped, dataclasses.replace(theirs, kernel="numba/delta.chunk", config={"block_t": 32}))
    knowledge.forget()
    assert chosen(mix) == "numba/delta.chunk"
    assert f"the shipped profile of {device_of_kind('cpu').family}" in str(mix.explain(**x))
    save(profile, [dataclasses.replace(mine, device="a CPU of somebody else's, 64 cores")])
    knowledge.forget()
    assert chosen(mix) == "numba/delta.chunk"
    save(profile, [mine])
    knowledge.forget()
    assert chosen(mix) == "faulty/fast"
    with autotune.using(Profile.of([theirs])):
        assert chosen(mix) == "faulty/honest"
        assert chosen(mixers.get("linear_attention", kernel="delta.recurrent")) == "numba/delta.recurrent"
    assert chosen(mix) == "faulty/fast"
    assert chosen(mixers.get("linear_attention", backend="numba")) == "numba/delta.chunk"

    shipped.joinpath("this.toml").unlink()
    knowledge._shipped.cache_clear()
    profile.write_text(Profile.of([dataclasses.replace(mine, stamp="x", versions={"faulty": "0.9"})]).text())
    knowledge.forget()
    assert chosen(mix) == heuristic
    assert "not believed: faulty/fast" in str(mix.explain(**x))
    assert "measured with faulty 0.9, and this is 1.0" in str(mix.explain(**x))


def ship(folder: Path, *entries: Entry) -> None:
    """As ``benchmarks.ship`` writes it: for the family of this device."""
    family = device_of_kind("cpu").family
    (folder / "this.toml").write_text(
        Profile.of([dataclasses.replace(e, device=family, stamp="", trials=()) for e in entries]).text()
    )
    knowledge._shipped.cache_clear()


def test_a_first_training_step_with_a_shipped_profile_measures_nothing(
    shipped: Path, profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(tuner, "Workshop", lambda: pytest.fail("something was to be measured"))
    x = {n: torch.from_numpy(a).requires_grad_() for n, a in arguments().items()}
    problem = problem_of_arguments(grad=True)
    ship(shipped, *(entry_of(problem, "numba/delta.chunk", part) for part in (FORWARD, BACKWARD)))
    for tune in (False, True):
        mixers.get("linear_attention", tune=tune)(**x).y.sum().backward()
        assert {d.chosen for d in autotune.log if d.part == BACKWARD} == {"numba/delta.chunk"}
    assert not any(d.measured for d in autotune.log)
    assert not profile.exists()


def test_a_profile_that_is_deleted_while_a_process_tunes_is_written_again(
    profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [entry_of(problem_of_arguments(), "numba/delta.chunk", part) for part in (FORWARD, BACKWARD)]
    once = iter(found)
    monkeypatch.setattr(tuner, "_contests", lambda *rest: [])
    monkeypatch.setattr(tuner, "_run", lambda *rest: [next(once)])
    tuner.tune_problem(problem_of_arguments())
    assert Profile.parse(profile.read_text()) == Profile.of(found[:1])
    profile.unlink()
    assert mixers.get("linear_attention").explain(**arguments()).chosen.name == "numba/delta.chunk"
    tuner.tune_problem(problem_of_arguments())
    assert Profile.parse(profile.read_text()) == Profile.of(found)


def test_lattice_runs_on_another_kernel_for_other_arrays_and_says_why() -> None:
    jnp = pytest.importorskip("jax.numpy")
    x = arguments() | {"beta": np.full(SHAPE[:3], 0.1, np.float32)}
    mix = mixers.get("lattice", backend="auto")
    host, traced = mix.explain(**x), mix.explain(**{n: jnp.asarray(a) for n, a in x.items()})
    assert host.chosen.name == "numba/lattice.recurrent"
    assert traced.chosen.name == "numba/lattice.recurrent.xla"
    for explained in (host, traced):
        assert f"→ {explained.chosen.name} " in str(explained)
        assert "chosen: the first that can, nothing was measured" in str(explained)
    assert "takes arrays of jax, not of numpy" in str(host)
    assert "takes NumPy arrays; kernels named .xla take JAX's" in str(traced)


def test_of_a_composition_the_parts_are_tuned() -> None:
    for name, parts in (("ham", "gated_delta_rule, delta_rule"), ("ttt_mlp", "array operations")):
        with pytest.raises(ValueError, match=f"{name} is composed of {parts}; tune those"):
            autotune.tune(name, SHAPE)
    problem = tuner.problem_of(get_spec("ttt_mlp"), SHAPE, "float32", "numpy", "cpu", False, (), {"chunk_size": 1})
    ways = {c.name: c.support for c in candidates(problem, Asked())}
    assert ways["numba"]
    assert all(ways[name] == backend.status() for name, backend in installed().items() if not backend.status())


def test_an_explicit_configuration_is_kept_or_refused() -> None:
    x = arguments()
    mix = mixers.get("linear_attention", backend="numba", kernel="delta.recurrent", config={"block": 16})
    assert mix.explain(**x).chosen.config == {"block": 16}
    assert "asked for by name" in str(mix.explain(**x))
    assert pickle.loads(pickle.dumps(mix)) == mix
    np.testing.assert_allclose(mix(**x).y, mixers.get("linear_attention")(**x).y, atol=1e-5)
    with pytest.raises(ValueError, match=r"did you mean 'delta\.recurrent'"):
        mixers.get("linear_attention", kernel="delta.recurent")
    with pytest.raises(ValueError, match="belongs to a kernel"):
        mixers.get("linear_attention", config={"block": 16})
    with pytest.raises(ValueError, match="its configuration is block"):
        mixers.get("linear_attention", kernel="delta.recurrent", config={"blocks": 16})(**x)
