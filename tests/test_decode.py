"""``Mixer.decode``: states of a pool, written in place."""

import dataclasses
import importlib.util

import numpy as np
import pytest

import mixers
from mixers.cases import Setting, draw

SPECS = [mixers.get_spec(name) for name in mixers.names()]
FIXED = [
    (spec, chunk)
    for spec in SPECS
    if spec.reserve is None
    for chunk in ((1, 4) if "chunk_size" in spec.resolve({}) else (None,))
]
LIBRARIES = [name for name in ("numpy", "torch") if name == "numpy" or importlib.util.find_spec(name)]
SLOTS, H, G, K = 7, 2, 1, 6


@dataclasses.dataclass
class Served:
    """A mixer, its pool, and a library's way with arrays."""

    mix: mixers.Mixer
    pool: list
    library: str
    width: int

    def array(self, a) -> object:
        if self.library == "numpy":
            return np.asarray(a)
        import torch

        return torch.from_numpy(np.array(a))

    def tokens(self, batch: int, tokens: int, seed: int) -> dict:
        spec = self.mix.spec
        arrays = tuple((a.name, " ".join(a.layouts[0])) for a in spec.inputs if not a.optional)
        setting = Setting(spec, (), arrays, G, H, K, self.width, (tokens,) * batch, seed=seed)
        return {n: self.array(a.astype(np.float64)) for n, a in draw(setting, "float64").items()}

    def given(self) -> object:
        return self.pool[0] if len(self.pool) == 1 else tuple(self.pool)

    def states(self) -> list[np.ndarray]:
        return [np.asarray(p).copy() for p in self.pool]

    def run(self, x: dict, states: list[np.ndarray], rows: list[int]) -> tuple[np.ndarray, list[np.ndarray]]:
        """The plain call on states of some slots."""
        parts = [self.array(s[rows]) for s in states]
        y, end = self.mix(**x, initial_state=parts[0] if len(parts) == 1 else tuple(parts))
        return np.asarray(y), [np.asarray(s) for s in (end if isinstance(end, tuple) else (end,))]


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=FIXED, ids=lambda item: f"{item[0].name}-{item[1]}")
def served(request: pytest.FixtureRequest, library: str) -> Served:
    """A pool of states that some tokens have passed through."""
    spec, chunk = request.param
    mix = mixers.get(spec, **({} if chunk is None else {"chunk_size": chunk}))
    width = 5 if spec.arg("v").layouts[0][-1] == "V" else K
    found = Served(mix, [], library, width)
    x = found.tokens(SLOTS, 5, seed=1)
    state = mix(**x).state
    found.pool = [
        s.copy() if library == "numpy" else s.clone() for s in (state if isinstance(state, tuple) else (state,))
    ]
    return found


def same(a: list[np.ndarray], b: list[np.ndarray]) -> None:
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_decode_is_a_call_on_the_slots_states(served: Served, tokens: int) -> None:
    x, slots, before = served.tokens(3, tokens, seed=2), [4, 0, 6], served.states()
    wanted, end = served.run(x, before, slots)
    y = served.mix.decode(**x, pool=served.given(), slots=served.array(np.array(slots, np.int32)))
    np.testing.assert_allclose(np.asarray(y), wanted, rtol=0, atol=1e-12)
    after = served.states()
    for i, field in enumerate(after):
        np.testing.assert_allclose(field[slots], end[i], rtol=0, atol=1e-12)
        others = [s for s in range(SLOTS) if s not in slots]
        np.testing.assert_array_equal(field[others], before[i][others])


def test_padding_reads_zero_and_writes_nothing(served: Served) -> None:
    x, before = served.tokens(4, 2, seed=3), served.states()
    y = np.asarray(served.mix.decode(**x, pool=served.given(), slots=served.array(np.array([-1, 2, -1, -1], np.int32))))
    wanted, end = served.run({n: a[1:2] for n, a in x.items()}, before, [2])
    np.testing.assert_allclose(y[1:2], wanted, rtol=0, atol=1e-12)
    assert (y[[0, 2, 3]] == 0).all()
    after = served.states()
    for i, field in enumerate(after):
        np.testing.assert_allclose(field[2:3], end[i], rtol=0, atol=1e-12)
        np.testing.assert_array_equal(np.delete(field, 2, 0), np.delete(before[i], 2, 0))


def test_padding_stays_silent_whatever_its_tokens_are(served: Served) -> None:
    x, before = served.tokens(2, 1, seed=4), served.states()
    for n in x:
        x[n][1] = float("nan")
    y = np.asarray(served.mix.decode(**x, pool=served.given(), slots=served.array(np.array([3, -1], np.int32))))
    assert np.isfinite(y).all()
    assert (y[1] == 0).all()
    for field, old in zip(served.states(), before, strict=True):
        assert np.isfinite(field).all()
        np.testing.assert_array_equal(np.delete(field, 3, 0), np.delete(old, 3, 0))


def test_fresh_sequences_ignore_what_their_slot_holds(served: Served) -> None:
    x, slots, before = served.tokens(3, 2, seed=5), [1, 2, 5], served.states()
    for p in served.pool:
        if "int" not in str(p.dtype):
            p[2] = float("nan")
    fresh = served.array(np.array([False, True, False]))
    y = np.asarray(served.mix.decode(**x, pool=served.given(), slots=served.array(np.array(slots)), fresh=fresh))
    wanted, end = served.run(x, before, slots)
    np.testing.assert_allclose(y[[0, 2]], wanted[[0, 2]], rtol=0, atol=1e-12)
    alone, first_end = served.mix(x["q"][1:2], x["k"][1:2], x["v"][1:2], **_gates(x, 1))
    np.testing.assert_allclose(y[1:2], np.asarray(alone), rtol=0, atol=1e-12)
    first_end = first_end if isinstance(first_end, tuple) else (first_end,)
    for i, field in enumerate(served.states()):
        np.testing.assert_allclose(field[[1, 5]], end[i][[0, 2]], rtol=0, atol=1e-12)
        np.testing.assert_allclose(field[2], np.asarray(first_end[i])[0], rtol=0, atol=1e-12)


def _gates(x: dict, row: int) -> dict:
    return {n: a[row : row + 1] for n, a in x.items() if n not in ("q", "k", "v")}


def test_out_slots_leave_what_was_read_as_it_is(served: Served) -> None:
    x, before = served.tokens(2, 3, seed=6), served.states()
    slots, out = served.array(np.array([0, 1])), served.array(np.array([5, -1]))
    y = np.asarray(served.mix.decode(**x, pool=served.given(), slots=slots, out_slots=out))
    wanted, end = served.run(x, before, [0, 1])
    np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-12)
    for i, field in enumerate(served.states()):
        np.testing.assert_allclose(field[5], end[i][0], rtol=0, atol=1e-12)
        np.testing.assert_array_equal(np.delete(field, 5, 0), np.delete(before[i], 5, 0))


def test_a_pool_kept_the_other_way_round(served: Served) -> None:
    """Values before keys in memory: the pool is passed as its transpose and written through it."""
    x, slots, before = served.tokens(2, 2, seed=7), [3, 1], served.states()
    turned, views = [], []
    for p in served.pool:
        if p.ndim < 2:
            turned.append(p)
            views.append(p)
            continue
        flipped = np.ascontiguousarray(np.asarray(p).swapaxes(-1, -2))
        own = flipped if served.library == "numpy" else served.array(flipped)
        turned.append(own)
        views.append(own.swapaxes(-1, -2))
    given = views[0] if len(views) == 1 else tuple(views)
    y = served.mix.decode(**x, pool=given, slots=served.array(np.array(slots)))
    wanted, end = served.run(x, before, slots)
    np.testing.assert_allclose(np.asarray(y), wanted, rtol=0, atol=1e-12)
    for own, field in zip(turned, end, strict=True):
        got = np.asarray(own)
        np.testing.assert_allclose(
            got[slots] if own.ndim < 2 else got[slots].swapaxes(-1, -2), field, rtol=0, atol=1e-12
        )


def test_a_pool_in_half_precision(served: Served) -> None:
    """Storage only: what is written is what a call would return, rounded."""
    mix = mixers.get(
        served.mix.spec, state_dtype="float16", **{n: v for n, v in served.mix.options.items() if n == "chunk_size"}
    )
    x, slots = served.tokens(2, 2, seed=8), [2, 4]
    half = [p if "int" in str(p.dtype) else served.array(np.asarray(p).astype(np.float16)) for p in served.pool]
    before = [np.asarray(p).copy() for p in half]
    mix.decode(**x, pool=half[0] if len(half) == 1 else tuple(half), slots=served.array(np.array(slots)))
    parts = [served.array(s[slots]) for s in before]
    end = mix(**x, initial_state=parts[0] if len(parts) == 1 else tuple(parts)).state
    for p, e in zip(half, end if isinstance(end, tuple) else (end,), strict=True):
        np.testing.assert_array_equal(np.asarray(p)[slots], np.asarray(e))


def test_refusals(library: str) -> None:
    spec = mixers.get_spec("delta_rule")
    served = Served(mixers.get(spec), [], library, 5)
    pool = served.array(np.zeros((SLOTS, H, K, 5)))
    x = served.tokens(2, 1, seed=1)
    number = lambda *n: served.array(np.array(n))  # noqa: E731

    def refused(error: type[Exception], message: str, **change: object) -> None:
        with pytest.raises(error, match=message):
            served.mix.decode(**{**x, "pool": pool, "slots": number(0, 1), **change})

    refused(ValueError, "reach from 0 to 7; the pool has slots 0 to 6", slots=number(0, 7))
    refused(ValueError, "reach from -2", slots=number(0, -2))
    refused(ValueError, "out_slots reach", out_slots=number(0, 9))
    refused(ValueError, r"slots has shape \(3,\), expected \[B\] = \(2,\)", slots=number(0, 1, 2))
    refused(TypeError, "slots has dtype float64; expected int32", slots=number(0.0, 1.0))
    refused(ValueError, "T ≤ 16, got", **served.tokens(2, 17, seed=1))
    refused(ValueError, "shape", pool=served.array(np.zeros((SLOTS, H, K, 4))))
    refused(TypeError, "is a builtins.list", slots=[0, 1])
    refused(ValueError, r"expected \[slots,H,K,V\] = \(2, 2, 6, 5\)", pool=pool[0])
    refused(TypeError, "the pool's state has dtype int64", pool=served.array(np.zeros((SLOTS, H, K, 5), np.int64)))
    refused(ValueError, r"fresh has shape \(3,\), expected \[B\] = \(2,\)", fresh=number(True, False, True))
    attention = mixers.get("attention")
    with pytest.raises(ValueError, match="grows with every token"):
        attention.decode(x["q"], x["q"], x["q"], pool=pool, slots=number(0, 1))
