"""Short ways of a call that was seen before: the same results, the same refusals."""

import dataclasses
import importlib
import logging
from typing import Any

import numpy as np
import pytest
from mixers.autotune import knowledge

import mixers
from mixers import autotune


def arguments(tokens: int = 20) -> dict[str, np.ndarray]:
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, tokens, 2, 8), dtype=np.float32)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    return {"q": q, "k": k, "v": v / 3, "beta": np.full((2, tokens, 2), 0.5, np.float32)}


@pytest.mark.parametrize("options", [{}, {"chunk_size": 4}])
def test_a_bound_call_is_the_call(options: dict[str, Any]) -> None:
    mix, x = mixers.get("lattice", **options), arguments()
    bound = mix.bind(**x)
    for scale in (1, 0.5):
        mine, its = {**x, "q": scale * x["q"]}, bound(**{**x, "q": scale * x["q"]})
        wanted = mix(**mine)
        np.testing.assert_array_equal(its.y, wanted.y)
        assert type(its.state) is type(wanted.state)
    half = {n: a.astype(np.float16) if n in "qkv" else a for n, a in x.items()}
    np.testing.assert_array_equal(mix.bind(**half)(**half).y, mix(**half).y)


def test_a_bound_call_refuses_what_it_was_not_bound_to() -> None:
    x = arguments()
    bound = mixers.get("lattice").bind(**x)
    with pytest.raises(ValueError, match="bind again"):
        bound(**arguments(21))
    with pytest.raises(ValueError, match="bind again"):
        bound(**{n: a.astype(np.float64) for n, a in x.items()})
    with pytest.raises(ValueError, match="bound to"):
        bound(**{n: a for n, a in x.items() if n != "beta"})
    with pytest.raises(ValueError, match="cannot be bound"):
        mixers.get("lattice", backend="reference").bind(**x)


def test_a_call_is_bound_to_numpy_arrays_alone() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match="NumPy"):
        mixers.get("lattice").bind(**{n: torch.from_numpy(a) for n, a in arguments().items()})


def test_a_new_length_or_batch_compiles_and_logs_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mix = mixers.get("delta_rule")

    def train(batch: int, tokens: int) -> None:
        result, pullback = mix.vjp(**{n: np.resize(a, (batch, tokens, *a.shape[2:])) for n, a in arguments().items()})
        pullback(np.ones_like(result.y))

    train(2, 20)
    train(64, 190)  # the first with work for several threads
    decisions, kernels = list(autotune.log), importlib.import_module("mixers.backends.numba.cache")
    monkeypatch.setattr(kernels.DiskCache, "load_overload", lambda *rest: pytest.fail("one is compiled"))
    with caplog.at_level(logging.DEBUG, "mixers"):
        for batch, tokens in ((1, 20), (2, 21), (2, 190), (7, 5), (64, 30)):
            train(batch, tokens)
    assert not caplog.records
    assert list(autotune.log) == decisions


def test_a_second_torch_call_goes_the_short_way_and_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    mix = mixers.get("lattice", chunk_size=4)
    x = {n: torch.from_numpy(a).requires_grad_() for n, a in arguments().items()}
    long = mix(**x, initial_state=mix.init_state(2, 2, 8, like=x["q"]))  # a state goes the long way
    wanted = torch.autograd.grad(long.y.square().sum() + long.state.now.sum(), list(x.values()))
    first = mix(**x)
    calls: list[int] = []
    monkeypatch.setattr(type(mix), "_call", lambda *rest: calls.append(1))
    again = mix(**x)
    assert not calls
    for found in (first, again):
        torch.testing.assert_close(found.y, long.y)
        assert not found.state.phase.requires_grad
        got = torch.autograd.grad(found.y.square().sum() + found.state.now.sum(), list(x.values()), create_graph=True)
        for mine, its in zip(got, wanted, strict=True):
            torch.testing.assert_close(mine, its)
    with pytest.raises(RuntimeError, match="first derivative only"):
        got[0].sum().backward()
    with torch.no_grad():
        monkeypatch.undo()
        mix(**x)
        monkeypatch.setattr(type(mix), "_call", lambda *rest: calls.append(1))
        torch.testing.assert_close(mix(**x).y, long.y)
    assert not calls


def test_what_became_known_changes_the_next_call() -> None:
    torch = pytest.importorskip("torch")
    mix = mixers.get("lattice")
    x = {n: torch.from_numpy(a) for n, a in arguments().items()}
    mix(**x)
    assert mix.shortcuts()
    knowledge.forget()
    assert not mix.shortcuts()
    with pytest.raises(ValueError, match="beta"):
        mix(**{n: a for n, a in x.items() if n != "beta"})
    with pytest.raises(ValueError, match="expected"):
        mix(**{**x, "beta": x["beta"][:, :3]})


def test_where_nothing_can_run_asking_for_the_choice_says_why() -> None:
    explained = mixers.get("lattice", backend="numba", chunk_size=4).explain(**arguments())
    nothing = dataclasses.replace(explained, choices=())
    with pytest.raises(LookupError, match=r"(?s)nothing that was asked for.*lattice.recurrent"):
        _ = nothing.chosen
