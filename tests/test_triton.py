"""Triton's own: whom it refuses, and tf32. Pools and laws 5 to 7: ``conformance/test_device.py``."""

import importlib.util
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

import mixers  # noqa: E402
from mixers.backend import installed  # noqa: E402
from mixers.problem import Flags, Problem  # noqa: E402
from mixers.spec import Sizes  # noqa: E402

STATUS = mixers.backend_status()["triton"]
if not STATUS:
    pytest.skip(STATUS.reason, allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(**changes: Any) -> Problem:
    """A small call of the delta rule."""
    spec = mixers.get_spec("delta_rule")
    given: dict[str, Any] = {"dtype": "float32", "library": "torch", "device": DEVICE, "K": 8, "V": 8} | changes
    sizes = Sizes(B=1, T=4, G=1, H=1, K=given.pop("K"), V=given.pop("V"), N=1)
    return Problem.of(spec, spec.resolve({}), sizes, Flags(), layouts=(("beta", "B T H"),), **given)


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
    for kernel in installed()["triton"].kernels():
        if "delta_rule" in kernel.mixers:
            support = kernel.supports(problem(**changes))
            assert not support and reason in support.reason


def test_old_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton
    from mixers.backends.triton import kernel as module

    monkeypatch.setattr(module, "INTERPRETED", False)
    monkeypatch.setattr(triton, "__version__", "2.1.0")
    found = [k.supports(problem(device="cuda")) for k in installed()["triton"].kernels() if "delta_rule" in k.mixers]
    assert all("needs Triton 3.2" in support.reason for support in found)


def test_tf32_is_an_option() -> None:
    mix = mixers.get("delta_rule", backend="triton", allow_tf32=True)
    assert mix.flags(False, True, 0).allow_tf32
    assert not mixers.get("delta_rule", backend="triton").flags(False, True, 0).allow_tf32
    assert mix != mixers.get("delta_rule", backend="triton")
