"""``batch_invariant=True``: a sequence has the same bits alone, in a batch and in a pack."""

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import mixers
from mixers.backend import installed
from mixers.cases import Setting, draw

with contextlib.suppress(ImportError):
    importlib.import_module("jax")  # kernels for its arrays are there once it is


@dataclass(frozen=True)
class Run:
    """A kernel that promises it, and a call that it runs.

    Attributes:
        library: whose arrays it is given.
        tokens: of each sequence.
        many: how often the batch is repeated for a large one.
    """

    backend: str
    library: str
    device: str
    name: str
    kernel: str
    options: tuple[tuple[str, Any], ...]
    tokens: int = 70
    width: int = 24
    many: int = 5
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.backend}-{self.kernel}-{self.name}-{self.dtype}"

    def hand(self, array: np.ndarray, dtype: str = "float32") -> Any:
        """An array as the library has it."""
        if self.library == "numpy":
            return array
        if self.library == "jax":
            import jax.numpy as jnp

            return jnp.asarray(array, dtype)
        import torch

        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, getattr(torch, dtype))

    def gradients(self, x: dict[str, np.ndarray], dy: np.ndarray, **rest: Any) -> dict[str, np.ndarray]:
        """The output and the gradients of everything that has an axis of time."""
        mix = mixers.get(
            self.name, backend=self.backend, kernel=self.kernel, batch_invariant=True, **dict(self.options)
        )
        given = {n: self.hand(a, self.dtype if n in "qkv" else "float32") for n, a in x.items()}
        dy = self.hand(dy, self.dtype)
        timed = {arg.name for arg in mix.spec.inputs} & given.keys()
        if self.library == "numpy":
            result, pullback = mix.vjp(**given, **rest)
            return {"y": result.y} | {name: g for name, g in pullback(dy).items() if name in timed}
        if self.library == "jax":
            import jax

            y, back = jax.vjp(lambda x: mix(**x, **rest).y, given)
            found = {"y": y} | back(dy)[0]
            return {name: np.asarray(found[name], np.float32) for name in ("y", *timed)}
        import torch

        given = {n: a.requires_grad_() for n, a in given.items()}
        if "cu_seqlens" in rest:
            rest["cu_seqlens"] = mixers.pack(np.diff(rest["cu_seqlens"].offsets).tolist(), device=self.device)
        y = mix(**given, **rest).y
        found = dict(zip(sorted(timed), torch.autograd.grad(y, [given[n] for n in sorted(timed)], dy), strict=True))
        return {n: a.detach().float().cpu().numpy() for n, a in ({"y": y} | found).items()}


def _has_card() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def runs() -> Iterator[Any]:
    """The kernels that promise it, each on one of its mixers, Numba's on all of them."""
    status = mixers.backend_status()
    card = "cuda" if any(status.get(b) for b in ("triton", "cuda")) and _has_card() else "cpu"
    for backend in ("numba", "triton", "cuda"):
        seen: set[tuple[str, bool]] = set()
        for kernel in installed()[backend].kernels() if status.get(backend) else ():
            for name in sorted(kernel.mixers & set(mixers.names()), key=lambda n: (-len(mixers.get_spec(n).inputs), n)):
                needed = {a.name for a in mixers.get_spec(name).inputs if not a.optional}
                gated = "log_decay" in needed and card == "cuda"  # a simulator takes its time
                if not kernel.batch_invariant or ((kernel.name, gated) in seen and kernel.arrays != "numpy"):
                    continue
                seen.add((kernel.name, gated))
                chunked = any(option.name == "chunk_size" for option in mixers.get_spec(name).options)
                size = 1 if kernel.form == "recurrent" and name == "lattice" else 16
                options = (("chunk_size", size),) if chunked else ()
                library = "jax" if kernel.arrays == "jax" else "numpy" if backend == "numba" else "torch"
                if backend == "numba":
                    yield Run(backend, library, "cpu", name, kernel.name, options)
                elif card == "cuda":
                    for dtype in ("float32", "bfloat16"):
                        run = Run(backend, library, card, name, kernel.name, options, 150, 64, 60, dtype)
                        yield pytest.param(run, marks=pytest.mark.gpu)
                elif library == "torch":  # a simulator: little of everything
                    tokens = 5 if kernel.form == "recurrent" else 34 if kernel.name == "delta.chunk" else 18
                    yield Run(backend, "torch", card, name, kernel.name, options, tokens, 16, 1)


@pytest.mark.parametrize("run", list(runs()), ids=str)
def test_bits_alone_in_a_batch_and_packed(run: Run) -> None:
    spec, lengths = mixers.get_spec(run.name), (run.tokens,) * (3 if run.tokens > 40 else 2)
    arrays = tuple((a.name, " ".join(a.layouts[0])) for a in (*spec.inputs, *spec.parameters) if not a.optional)
    width = 2 * run.width if spec.arg("v").layouts[0][-1] == "V" and run.backend == "numba" else run.width
    drawn = draw(Setting(spec, run.options, arrays, 1, 2, run.width, width, lengths), "float32")
    x = {n: a.astype(np.float32) for n, a in drawn.items()}
    if "beta" in x and "token_scale" in {a.name for a in spec.parameters}:
        x["beta"] /= run.width
    heads = max(x["q"].shape[2], x["v"].shape[2])
    dy = np.random.default_rng(0).standard_normal((*x["v"].shape[:2], heads, x["v"].shape[3]), dtype=np.float32)
    timed, count, last = {arg.name for arg in spec.inputs}, len(lengths), run.tokens

    def part(arrays: dict[str, np.ndarray], cut: Any) -> dict[str, np.ndarray]:
        return {n: np.ascontiguousarray(cut(a)) if n in timed or n == "y" else a for n, a in arrays.items()}

    batch = run.gradients(x, dy)
    repeated = {n: np.concatenate([a] * run.many) if n in timed else a for n, a in x.items()}
    many = run.gradients(repeated, np.concatenate([dy] * run.many))
    row = {n: a.reshape(1, -1, *a.shape[2:]) if n in timed else a for n, a in x.items()}
    pack = run.gradients(row, dy.reshape(1, -1, *dy.shape[2:]), cu_seqlens=mixers.pack(lengths))
    alone = run.gradients(part(x, lambda a: a[1:2]), dy[1:2])
    at = count * (run.many - 1) + 1
    for array, bits in alone.items():
        np.testing.assert_array_equal(batch[array][1:2], bits, err_msg=f"{array} in a batch")
        np.testing.assert_array_equal(many[array][at : at + 1], bits, err_msg=f"{array} in a large batch")
        np.testing.assert_array_equal(pack[array][:, last : 2 * last], bits, err_msg=f"{array} in a pack")


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
