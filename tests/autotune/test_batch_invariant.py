"""``batch_invariant=True``: a sequence has the same bits alone, in a batch and in a pack."""

from typing import Any

import numpy as np
import pytest

import mixers
from mixers.backend import installed
from mixers.cases import Setting, draw

LENGTHS = (70, 70, 70)


def runs(name: str) -> list[tuple[str, str, dict[str, Any]]]:
    """The kernels that promise it, each for a call that it runs."""
    chunked = any(option.name == "chunk_size" for option in mixers.get_spec(name).options)
    kernels = (k for k in installed()["numba"].kernels() if name in k.mixers and k.batch_invariant)
    return [(name, k.name, {"chunk_size": 1 if k.form == "recurrent" else 16} if chunked else {}) for k in kernels]


def gradients(mix: mixers.Mixer, x: dict[str, np.ndarray], dy: np.ndarray, **rest: Any) -> dict[str, np.ndarray]:
    """The output and the gradients of everything that has an axis of time."""
    result, pullback = mix.vjp(**x, **rest)
    timed = {arg.name for arg in mix.spec.inputs}
    return {"y": result.y} | {name: g for name, g in pullback(dy).items() if name in timed}


@pytest.mark.parametrize(("name", "kernel", "options"), [run for name in mixers.names() for run in runs(name)])
def test_bits_alone_in_a_batch_and_packed(name: str, kernel: str, options: dict[str, Any]) -> None:
    mix = mixers.get(name, backend="numba", kernel=kernel, batch_invariant=True, **options)
    spec = mix.spec
    arrays = tuple((a.name, " ".join(a.layouts[0])) for a in (*spec.inputs, *spec.parameters) if not a.optional)
    width = 48 if spec.arg("v").layouts[0][-1] == "V" else 24
    drawn = draw(Setting(spec, tuple(options.items()), arrays, 1, 2, 24, width, LENGTHS), "float32")
    x = {n: a.astype(np.float32) for n, a in drawn.items()}
    if "beta" in x and "token_scale" in {a.name for a in spec.parameters}:
        x["beta"] /= 24
    dy = np.random.default_rng(0).standard_normal(mix(**x).y.shape, dtype=np.float32)
    timed = {arg.name for arg in spec.inputs}

    def part(arrays: dict[str, np.ndarray], cut: Any) -> dict[str, np.ndarray]:
        return {n: np.ascontiguousarray(cut(a)) if n in timed or n == "y" else a for n, a in arrays.items()}

    batch = gradients(mix, x, dy)
    many = gradients(
        mix, {n: np.concatenate([a] * 5) if n in timed else a for n, a in x.items()}, np.concatenate([dy] * 5)
    )
    row = {n: a.reshape(1, -1, *a.shape[2:]) if n in timed else a for n, a in x.items()}
    pack = gradients(mix, row, dy.reshape(1, -1, *dy.shape[2:]), cu_seqlens=mixers.pack(LENGTHS))
    alone = gradients(mix, part(x, lambda a: a[1:2]), dy[1:2])
    for array, bits in alone.items():
        np.testing.assert_array_equal(batch[array][1:2], bits, err_msg=f"{array} in a batch")
        np.testing.assert_array_equal(many[array][13:14], bits, err_msg=f"{array} in a large batch")
        np.testing.assert_array_equal(pack[array][:, 70:140], bits, err_msg=f"{array} in a pack")


def test_one_kernel_and_configuration_for_all_calls() -> None:
    mix = mixers.get("delta_rule", batch_invariant=True)
    x = dict(zip("qkv", np.random.default_rng(0).standard_normal((3, 4, 40, 8, 16), dtype=np.float32), strict=True))
    x["beta"] = np.full((4, 40, 8), 0.5, np.float32)
    chosen = set()
    for batch, tokens in ((1, 40), (4, 40), (4, 2), (1, 1)):
        candidate = mix.explain(**{n: a[:batch, :tokens] for n, a in x.items()}).chosen
        chosen.add((candidate.name, tuple((candidate.config or {}).items())))
    assert len(chosen) == 1


def test_whoever_does_not_promise_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in installed()["numba"].kernels():
        monkeypatch.setattr(type(kernel), "batch_invariant", False)
    q = np.ones((1, 4, 1, 8), np.float32)
    with pytest.raises(ValueError, match="may depend on the batch"):
        mixers.get("linear_attention", batch_invariant=True)(q, q, q)
