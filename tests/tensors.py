"""torch tensors for tests of backends on a GPU, or in what stands in for one."""

import os
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import mixers  # noqa: E402
from mixers.backend import installed  # noqa: E402
from mixers.cases import Setting, draw  # noqa: E402
from mixers.problem import Flags, Problem  # noqa: E402
from mixers.spec import Sizes  # noqa: E402

SIMULATED = any(os.environ.get(name, "0") != "0" for name in ("NUMBA_ENABLE_CUDASIM", "TRITON_INTERPRET"))


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """A test that only a GPU can run."""
    without = pytest.mark.skipif(SIMULATED or not torch.cuda.is_available(), reason="needs a GPU")
    return pytest.mark.gpu(without(test))


def drawn(
    name: str, device: str, batch: int, tokens: int, *, width: int = 8, heads: int = 2, dtype: str = "float32"
) -> dict[str, Any]:
    """What a call of a mixer must be given, at random: q, k and v in ``dtype``, gates in float32."""
    spec = mixers.get_spec(name)
    arrays = tuple((a.name, " ".join(a.layouts[0])) for a in spec.inputs if not a.optional)
    setting = Setting(spec, (), arrays, heads, heads, width, width, (tokens,) * batch, seed=tokens)
    x = {n: torch.from_numpy(a).to(device, torch.float32) for n, a in draw(setting, "float32").items()}
    return {n: a.to(getattr(torch, dtype)) if n in ("q", "k", "v") else a for n, a in x.items()}


def losses(mix: Any, x: dict[str, Any]) -> tuple[Any, ...]:
    """Output and gradients."""
    leaves = {n: a.detach().requires_grad_() for n, a in x.items()}
    y = mix(**leaves, return_state=False).y
    return y, *torch.autograd.grad(y.float().square().sum(), list(leaves.values()))


def refused(backend: str, device: str, changes: dict[str, Any], reason: str) -> bool:
    """Whether every kernel of a backend for the delta rule refuses a small call that differs so, for this reason."""
    spec = mixers.get_spec("delta_rule")
    given: dict[str, Any] = {"dtype": "float32", "library": "torch", "device": device, "K": 8, "V": 8} | changes
    sizes = Sizes(B=1, T=4, G=1, H=1, K=given.pop("K"), V=given.pop("V"), N=1)
    problem = Problem.of(spec, spec.resolve({}), sizes, Flags(), layouts=(("beta", "B T H"),), **given)
    kernels = [k for k in installed()[backend].kernels() if "delta_rule" in k.mixers]
    answers = [kernel.supports(problem) for kernel in kernels]
    return bool(answers) and all(not answer and reason in answer.reason for answer in answers)
