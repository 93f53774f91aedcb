"""Every CUDA kernel in every dtype is compiled to PTX for two generations of GPUs, on a machine that has none."""

import dataclasses
import importlib.util
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("needs numba-cuda", allow_module_level=True)

from mixers.backends import cuda as home  # noqa: E402

import mixers  # noqa: E402
from mixers.check.pinned import Pinned  # noqa: E402

if home.SIMULATED:
    pytest.skip("the simulator compiles nothing", allow_module_level=True)

GENERATIONS = {"sm_80": (8, 0), "sm_90": (9, 0)}
DTYPES = ("float32", "bfloat16", "float16", "float64")


def widest(kernel: Any) -> str:
    """The mixer of a kernel with the most inputs: it reaches every line."""
    return max(sorted(kernel.mixers), key=lambda name: len(mixers.get_spec(name).inputs))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, generation: str) -> dict[Any, str]:
    """What a launch would need, as PTX; nothing is launched."""
    from mixers.backends.cuda import program

    found: dict[Any, str] = {}

    def compile_only(self: Any, like: Any, chosen: Any, *rest: Any, **limits: Any) -> None:
        key = self.module, chosen
        if key not in found:
            found[key] = self.ptx(chosen, GENERATIONS[generation])

    monkeypatch.setattr(program.Program, "__call__", compile_only)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", home.backend.kernels(), ids=lambda kernel: kernel.name)
def test_ptx_without_a_gpu(kernel: Any, dtype: str, generation: str, compiled: dict[Any, str]) -> None:
    name = widest(kernel)
    mix = Pinned(mixers.get_spec(name), "cuda", kernel, {})
    x = {}
    for arg in mix.spec.inputs:
        shape = [{"B": 1, "T": 4, "K": 64, "V": 64}.get(axis, 2) for axis in arg.layouts[0]]
        x[arg.name] = torch.zeros(shape, dtype=getattr(torch, dtype if arg.name in ("q", "k", "v") else "float32"))
    call = mix.validated(**x)
    problem = dataclasses.replace(call.problem(), device="cuda")
    support = kernel.supports(problem)
    if not support:
        pytest.skip(support.reason)
    from mixers.arrays.torch import _with_first_state

    given = _with_first_state(problem, call.x)
    out = {n: torch.empty(s, dtype=getattr(torch, d)) for n, (s, d) in problem.outputs().items()}
    gradients = {n: torch.empty_like(a) for n, a in x.items()}
    config = kernel.configs(problem)[0]
    kernel.forward(problem, config, given, out)
    kernel.backward(problem, config, given, out, dict(out), gradients)
    assert compiled
    for (module, chosen), text in compiled.items():
        assert f".target {generation}" in text and ".visible .entry mixers_kernel" in text
        if dtype != "float64":
            assert "__local_depot" not in text, f"{module} keeps an array in local memory: {dict(chosen)}"
