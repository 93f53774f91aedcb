"""The experiments' own machinery: the recall task, training in steps, and results that survive an interruption."""

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
sys.path.append(str(Path(__file__).parents[1]))  # benchmarks are not installed; behind all else, so that what is wins

from benchmarks.evidence.associations import associations  # noqa: E402
from benchmarks.evidence.store import Store  # noqa: E402
from benchmarks.evidence.training import DEVICE, Training, model_of, train  # noqa: E402


def test_every_question_was_told_and_is_asked_once() -> None:
    make = torch.Generator().manual_seed(0)
    tokens, places, answers = associations(64, 40, [2, 5, 10], 64, make)
    counts = set()
    for words, at, wanted in zip(tokens.tolist(), places.tolist(), answers.tolist(), strict=True):
        asked = [(p, a) for p, a in zip(at, wanted, strict=True) if a != -100]
        pairs = len(asked)
        told = dict(zip(words[: 2 * pairs : 2], words[1 : 2 * pairs : 2], strict=True))
        assert len(told) == pairs and all(p >= 2 * pairs for p, _ in asked)
        assert {words[p] for p, _ in asked} == set(told)
        assert all(told[words[p]] == a >= 32 for p, a in asked)
        counts.add(pairs)
    assert counts == {2, 5, 10}


def test_what_was_found_is_kept_and_not_done_again(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    Store(path, {"sizes": (1, 2)}).add({"mixer": "lattice", "seed": 0, "loss": 1.5})
    again = Store(path, {"sizes": (1, 2)})
    assert again.has({"mixer": "lattice", "seed": 0}) and not again.has({"mixer": "lattice", "seed": 1})
    again.add({"mixer": "lattice", "seed": 1, "loss": 1.25})
    assert [row["on"] for row in Store(path, {"sizes": (1, 2)}).rows] == [0, 1]
    with pytest.raises(ValueError, match="other settings"):
        Store(path, {"sizes": (1, 3)})


def test_models_that_learn_side_by_side_learn_as_alone() -> None:
    rows = torch.randint(7, (1, 4, 9), generator=torch.Generator().manual_seed(0)).repeat(12, 1, 1)

    def loss(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        logits, _ = model(batch[:, :-1], return_state=False)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def start(seed: int) -> Training:
        sizes = {"vocab": 7, "d_model": 16, "layers": 1, "heads": 1}
        return Training(model_of(seed, mixer="delta_rule", backend="reference", **sizes), loss, [rows.to(DEVICE)], 0.05)

    pair, alone = [start(0), start(1)], start(1)
    train(pair)
    train([alone])
    assert torch.equal(pair[1].losses, alone.losses) and not torch.equal(pair[0].losses, alone.losses)
    assert alone.losses[-3:].mean() < 0.9 * alone.losses[:3].mean()
