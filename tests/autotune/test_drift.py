"""``chunk_size="auto"``: the fastest chunk within a budget of drift, measured because it was asked for."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from mixers.autotune import drift
from mixers.autotune.profile import load

import mixers
from mixers import autotune


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer sizes, for time."""
    monkeypatch.setattr(drift, "SIZES", (1, 4, 16))


def arguments(beta: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 96, 2, 16), dtype=np.float32)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    return {"q": q, "k": k, "v": v / 4, "beta": np.full((1, 96, 2), beta, np.float32)}


def distance(x: dict[str, np.ndarray], size: int) -> float:
    exact = mixers.get("lattice")(**x).y
    return float(np.linalg.norm(mixers.get("lattice", chunk_size=size)(**x).y - exact) / np.linalg.norm(exact))


def test_the_budget_holds_and_the_choice_is_explained(profile: Path) -> None:
    x = arguments(0.02)
    budget = (distance(x, 4) + distance(x, 16)) / 2
    assert distance(x, 4) < budget < distance(x, 16)
    mix = mixers.get("lattice", chunk_size="auto", drift=budget)
    y, _ = mix(**x)
    size = mix.options["chunk_size"]
    assert size in (1, 4)
    np.testing.assert_array_equal(y, mixers.get("lattice", chunk_size=size)(**x).y)
    assert mix.entry.drift == pytest.approx(distance(x, size), abs=1e-6)
    text = str(mix.explain(**x))
    assert f"→ chunk_size={size} " in text
    assert f"and {budget:g} is allowed" in text
    (entry,) = load(profile).entries.values()
    assert entry.config == {"chunk_size": size}
    assert entry.seconds > 0
    assert [d.part for d in autotune.log].count("chunk_size") == 1
    mix(**arguments(0.9))  # found once: other inputs do not change it
    assert mix.options["chunk_size"] == size
    assert pickle.loads(pickle.dumps(mix)).options["chunk_size"] == size
    _, state = mix(**x)
    assert type(state) is type(mixers.get("lattice", chunk_size=size)(**x).state)


def test_a_narrow_budget_leaves_the_exact_recurrence_and_a_wide_one_the_fastest() -> None:
    x = arguments(0.5)
    assert mixers.get("lattice", chunk_size="auto", drift=1e-9).settle(**x).options["chunk_size"] == 1
    wide = mixers.get("lattice", chunk_size="auto", drift=1e9)
    wide.settle(**x)
    assert wide.entry.seconds == min(t.seconds for t in wide.entry.trials)
    assert wide.settle_on((1, 40, 2, 16, 16)).spec.name == "lattice"


def test_what_cannot_be_chosen_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="exact in chunks"):
        mixers.get("delta_rule", chunk_size="auto", drift=0.02)
    with pytest.raises(ValueError, match="drift=None"):
        mixers.get("lattice", chunk_size="auto")
    with pytest.raises(ValueError, match="goes with chunk_size"):
        mixers.get("lattice", drift=0.02)
    with pytest.raises(AttributeError, match="not found yet"):
        mixers.get("lattice", chunk_size="auto", drift=0.02).init_state(1, 2, 16)
    monkeypatch.setenv("MIXERS_TUNE", "off")
    assert mixers.get("lattice", chunk_size="auto", drift=1e9).settle(**arguments(0.5)).options["chunk_size"] == 1
