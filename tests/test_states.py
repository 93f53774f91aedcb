"""States: what a mixer returns, what it takes back, and in which forms."""

import pickle
from copy import copy, deepcopy

import numpy as np
import pytest

import mixers
from mixers.cases import draw, settings
from mixers.check.verdict import EPSILON, compare

NAMES = mixers.names()
FIXED = [name for name in NAMES if mixers.get_spec(name).reserve is None]


def call(name: str, batch: int = 2, tokens: int = 9, dtype: str = "float64", **options):
    """A mixer and arguments of a call."""
    spec = mixers.get_spec(name)
    setting = next(s for s in settings(spec) if not s.packed and s.initial == "none")
    arrays = {n: axes for n, axes in setting.arrays if not spec.arg(n).optional}
    mix = mixers.get(name, backend="reference", **options)
    from dataclasses import replace

    width = 5 if spec.arg("v").layouts[0][-1] == "V" else 6
    chosen = replace(
        setting,
        options=tuple(options.items()),
        arrays=tuple(arrays.items()),
        groups=2,
        heads=4,
        key_dim=6,
        value_dim=width,
        lengths=(tokens,) * batch,
    )
    return mix, {n: a.astype(dtype) for n, a in draw(chosen, dtype).items()}


def parts(state) -> tuple[np.ndarray, ...]:
    return state if isinstance(state, tuple) else (state,)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("like", [np.zeros(0), np.zeros(0, np.float32), None], ids=["float64", "float32", "default"])
def test_first_state_is_what_a_call_without_one_starts_from(name: str, like: np.ndarray | None) -> None:
    dtype = "float32" if like is None else str(like.dtype)
    mix, x = call(name, dtype=dtype)
    state = mix.init_state(2, 4, 6, x["v"].shape[-1], key_heads=2, like=like)
    y, end = mix(**x)
    again, same = mix(**x, initial_state=state)
    # NumPy's products round by layout, and a first state that nobody gave has stride 0.
    near = lambda name, largest, overall: 4 * EPSILON[dtype] * largest  # noqa: E731
    got, wanted = (dict(enumerate((out, *parts(state)))) for out, state in ((y, end), (again, same)))
    verdict = compare(got, wanted, near)
    assert verdict, verdict.reason
    for a, b in zip(parts(end), parts(same), strict=True):
        assert a.dtype == b.dtype == (np.int32 if a.dtype.kind == "i" else np.dtype(dtype))


@pytest.mark.parametrize("name", NAMES)
def test_first_state_is_the_callers_own(name: str) -> None:
    """Writing to it changes no other."""
    mix = mixers.get(name)
    first = mix.init_state(1, 1, 4, 4, like=np.zeros(0))
    kept = [a.copy() for a in parts(first)]
    for a in parts(first):
        assert a.flags.writeable
        a += 1
    for a, b in zip(kept, parts(mix.init_state(1, 1, 4, 4, like=np.zeros(0))), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", FIXED)
def test_state_spec_is_what_a_state_is(name: str) -> None:
    mix = mixers.get(name, state_dtype="float16")
    state = mix.init_state(3, 2, 5, 5, like=np.zeros(0, np.float32))
    for spec, array in zip(mix.state_spec(2, 5, 5, batch=3), parts(state), strict=True):
        assert (spec.shape, spec.dtype, spec.nbytes) == (array.shape, str(array.dtype), array.nbytes)


@pytest.mark.parametrize("name", FIXED)
def test_state_dtype_is_storage_only(name: str) -> None:
    mix, x = call(name, dtype="float32")
    half = mixers.get(name, backend="reference", state_dtype="float16")
    y, state = half(**x)
    exact, full = mix(**x)
    np.testing.assert_array_equal(y, exact)
    for a, b in zip(parts(state), parts(full), strict=True):
        np.testing.assert_array_equal(a, b if b.dtype.kind == "i" else b.astype(np.float16))
    half(**x, initial_state=state)


def test_lattice_takes_bare_slots_as_the_first_of_a_chunk() -> None:
    mix, x = call("lattice", chunk_size=4)
    slots = mix.init_state(2, 4, 6, 5, like=np.zeros(0)).start
    slots = slots[:, :, ::-1].copy()
    bare = mix(**x, initial_state=slots)
    whole = mix(**x, initial_state=mixers.LatticeState(slots, slots, np.zeros(2, np.int32)))
    np.testing.assert_array_equal(bare.y, whole.y)
    shared = mix(**x, initial_state=slots[0])
    np.testing.assert_array_equal(shared.y[0], bare.y[0])
    assert isinstance(bare.state, mixers.LatticeState)
    assert bare.state.phase.tolist() == [1, 1]
    assert bare.state.phase.dtype == np.int32


def test_ttt_takes_its_weights_alone() -> None:
    mix, x = call("ttt_linear", chunk_size=4)
    first = mix.init_state(2, 4, 6, like=np.zeros(0))
    near = {"rtol": 1e-12, "atol": 1e-13}
    np.testing.assert_allclose(mix(**x).y, mix(**x, initial_state=(first.weight, first.bias)).y, **near)
    np.testing.assert_allclose(mix(**x).y, mix(**x, initial_state=(first.weight[0], first.bias[0])).y, **near)


@pytest.mark.parametrize("name", NAMES)
def test_return_state_false(name: str) -> None:
    mix, x = call(name)
    result = mix(**x, return_state=False)
    assert result.state is None
    np.testing.assert_array_equal(result.y, mix(**x).y)


@pytest.mark.parametrize("name", FIXED)
def test_checkpoints_are_the_states_on_the_way(name: str) -> None:
    mix, x = call(name, tokens=11)
    result = mix(**x, checkpoint_every=4)
    timed = {a.name for a in mix.spec.inputs}
    for p, at in enumerate((4, 8)):
        _, state = mix(**{n: a[:, :at] if n in timed else a for n, a in x.items()})
        for kept, wanted in zip(parts(result.checkpoints), parts(state), strict=True):
            assert kept.shape[:2] == (2, 2)
            np.testing.assert_array_equal(kept[:, p], wanted)


@pytest.mark.parametrize("name", NAMES)
def test_mixers_pickle_copy_and_compare(name: str) -> None:
    mix = mixers.get(name, backend="reference")
    for other in (pickle.loads(pickle.dumps(mix)), copy(mix), deepcopy(mix), mixers.get(name, backend="reference")):
        assert other == mix
        assert hash(other) == hash(mix)
        assert repr(other) == repr(mix)
    assert mix != mixers.get(name, backend="auto")
    assert mixers.get("lattice", chunk_size=4) != mixers.get("lattice", chunk_size=8)


@pytest.mark.parametrize("name", ["delta_rule", "ttt_linear"])
def test_results_unpack_pickle_and_copy(name: str) -> None:
    mix, x = call(name)
    result = mix(**x, checkpoint_every=4)
    y, state = result
    assert len(result) == 2
    assert y is result.y
    assert state is result.state
    for other in (pickle.loads(pickle.dumps(result)), copy(result), deepcopy(result)):
        assert type(other) is mixers.Result
        np.testing.assert_array_equal(other.y, y)
        for a, b in zip(parts(other.checkpoints), parts(result.checkpoints), strict=True):
            np.testing.assert_array_equal(a, b)


def test_packs_of_any_form_say_the_same() -> None:
    mix, x = call("gla", batch=1, tokens=9)
    given = [mixers.pack([4, 0, 5]), np.array([0, 4, 4, 9]), np.array([0, 4, 4, 9], np.int32), [0, 4, 4, 9]]
    wanted = mix(**x, cu_seqlens=given[0])
    assert wanted.state.shape[0] == 3
    for offsets in given[1:]:
        np.testing.assert_array_equal(mix(**x, cu_seqlens=offsets).y, wanted.y)


def test_a_mixer_of_ones_own_runs_at_once() -> None:
    """A spec is all that it takes."""
    from dataclasses import replace

    spec = replace(mixers.get_spec("ssd"), name="my_ssd")
    x = call("ssd")[1]
    np.testing.assert_array_equal(mixers.get(spec, backend="reference")(**x).y, call("ssd")[0](**x).y)
