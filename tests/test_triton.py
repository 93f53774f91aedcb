"""Triton's own: whom it refuses, and tf32. Pools and laws 5 to 7: ``conformance/test_device.py``."""

import dataclasses
import importlib.util
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

from tensors import refused  # noqa: E402

import mixers  # noqa: E402

STATUS = mixers.backend_status()["triton"]
if not STATUS:
    pytest.skip(STATUS.reason, allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPUS = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU's bfloat16")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"library": "numpy"}, "arrays of torch"),
        ({"dtype": "float64"}, "no float64"),
        ({"K": 300}, "K = 300"),
        ({"V": 0}, "V = 0"),
        ({"device": "cpu" if DEVICE == "cuda" else "cuda"}, "the arrays are on"),
    ],
)
def test_refusals_have_reasons(changes: dict[str, Any], reason: str) -> None:
    assert refused("triton", DEVICE, changes, reason)


def test_old_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton
    from mixers.backends.triton import kernel as module

    monkeypatch.setattr(module, "INTERPRETED", False)
    monkeypatch.setattr(triton, "__version__", "2.1.0")
    assert refused("triton", "cuda", {}, "needs Triton 3.2")


def test_tf32_is_an_option() -> None:
    mix = mixers.get("delta_rule", backend="triton", allow_tf32=True)
    assert mix.flags(False, True, 0).allow_tf32
    assert not mixers.get("delta_rule", backend="triton").flags(False, True, 0).allow_tf32
    assert mix != mixers.get("delta_rule", backend="triton")


@pytest.mark.parametrize(
    ("sizes", "cap", "share"),
    [((2, 45, 4, 2, 33, 20, 40, 1), 0, 0.5), ((1, 40, 2, 2, 8, 40, 20, 2), 7, 0.6), ((1, 9, 2, 1, 5, 3, 4, 1), 0, 0.0)],
    ids=["grouped", "capped, a head each", "nothing kept"],
)
def test_packed_attention(sizes: tuple[int, ...], cap: int, share: float) -> None:
    """Outputs, lse and gradients of both against float64 by array operations, and the same bits twice."""
    from mixers.backends.triton.packed_attention import PRIMITIVE

    from mixers.arrays.torch import library
    from mixers.packed import by_arrays

    batch, tokens, heads, groups, width, depth, rows, bounds = sizes
    make = torch.Generator().manual_seed(0)
    shapes = ((batch, tokens, heads, width), (batch, rows, groups, width), (batch, rows, groups, depth))
    leaves = [torch.randn(s, generator=make).double().requires_grad_() for s in shapes]
    kept = torch.rand(batch, tokens, bounds, generator=make) < share
    high = kept.cumsum(1).clamp(max=rows).int()
    low = (high - cap).clamp(min=0) if cap else torch.zeros_like(high)
    y, lse = by_arrays(library, *leaves, low, high, 0.3)
    seen = torch.isfinite(lse)
    dy, dlse = torch.randn(y.shape, generator=make), torch.randn(lse.shape, generator=make).where(seen, 0)
    flowing = (y * dy).sum() + torch.where(seen, lse * dlse, 0).sum()
    wanted = torch.autograd.grad(flowing, leaves, allow_unused=True) if share else [torch.zeros_like(a) for a in leaves]

    x = [a.detach().float().to(DEVICE) for a in leaves]
    call = tuple(x), (low.to(DEVICE), high.to(DEVICE)), 0.3, ""
    assert PRIMITIVE.serves("float32", DEVICE, (width, depth))
    got = PRIMITIVE.forward(*call)
    torch.testing.assert_close(got[0].cpu().double(), y.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1].cpu().double(), lse.detach(), rtol=1e-5, atol=1e-5)
    found = PRIMITIVE.backward(*call, got, (dy.to(DEVICE), dlse.to(DEVICE)))
    again = PRIMITIVE.backward(*call, got, (dy.to(DEVICE), dlse.to(DEVICE)))
    for a, b, c in zip(found, wanted, again, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-4, atol=1e-5)
        assert torch.equal(a, c)


@pytest.mark.parametrize(
    ("dtype", "slack"),
    [
        ("float32", 2e-5),
        pytest.param("bfloat16", 2e-2, marks=ON_GPUS),
    ],
)
def test_ttt_mlp(dtype: str, slack: float) -> None:
    """Whole mini-batches by the kernel, the rest by array operations, against float64; the same bits twice."""
    from mixers.backends.triton.ttt_mlp import PRIMITIVE

    make = torch.Generator().manual_seed(0)
    tokens, heads, width, kind = 11, 2, 6, getattr(torch, dtype)

    def normal(*shape: int, scale: float = 1.0, to: Any = kind) -> Any:
        return (scale * torch.randn(shape, generator=make)).to(to)

    x = {name: normal(1, tokens, 1, width) for name in ("q", "k")} | {"v": normal(1, tokens, heads, width)}
    x["beta"] = torch.rand(1, tokens, heads, generator=make) / width
    x |= {"norm_weight": 1 + normal(heads, width, scale=0.1, to=torch.float32)}
    x |= {"norm_bias": normal(heads, width, to=torch.float32), "token_scale": torch.rand(4, generator=make)}
    dy = normal(1, tokens, heads, width)
    assert PRIMITIVE.serves(dtype, DEVICE, (width, width))

    def run(backend: str, **cast: Any) -> tuple[Any, ...]:
        leaves = {name: a.to(**cast).requires_grad_() for name, a in x.items()}
        y, state = mixers.get("ttt_mlp", backend=backend, chunk_size=4)(**leaves)
        return y, *state[:4], *torch.autograd.grad(y, list(leaves.values()), dy.to(y))

    wanted, found, again = (
        run("reference", dtype=torch.float64),
        run("triton", device=DEVICE),
        run("triton", device=DEVICE),
    )
    for a, b, c in zip(found, wanted, again, strict=True):
        assert (a.cpu().double() - b).abs().max() <= slack * b.abs().max()
        assert torch.equal(a, c)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=ON_GPUS)])
@pytest.mark.parametrize("mixer", ["linear_attention", "ssd", "gla"])
def test_pieces_of_a_sequence(mixer: str, dtype: str) -> None:
    """Sequences longer than those of the laws, of few heads; no length of a piece divides theirs."""
    from mixers.backends.triton.delta_chunk import KERNELS

    from mixers.cases import long_setting
    from mixers.check import Case, fitted

    setting = dataclasses.replace(long_setting(mixers.get_spec(mixer), {}, 0), lengths=(701, 701), initial="given")
    case = fitted(Case("truth", setting, "triton", KERNELS[0], dtype, "torch"))
    assert case is not None
    verdict = case.run()
    assert verdict, verdict.reason
