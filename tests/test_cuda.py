"""The CUDA backend's own: whom it refuses, its simulator, registers, a process that starts without Numba.

Pools and laws 5 to 7: ``conformance/test_device.py``.
"""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tensors import drawn, losses, on_gpu, refused  # noqa: E402

import mixers  # noqa: E402
from mixers.backend import installed  # noqa: E402

STATUS = mixers.backend_status()["cuda"]
if not STATUS:
    pytest.skip(STATUS.reason, allow_module_level=True)

import mixers.backends.cuda as home  # noqa: E402

DEVICE = "cpu" if home.SIMULATED else "cuda"
NAMES = [n for n in mixers.names() if any(n in kernel.mixers for kernel in installed()["cuda"].kernels())]
each_mixer = pytest.mark.parametrize("name", NAMES)


def inputs(name: str, batch: int, tokens: int, **more: Any) -> dict[str, Any]:
    """Random tensors of a call."""
    return drawn(name, DEVICE, batch, tokens, **more)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"library": "cupy" if DEVICE == "cpu" else "numpy"}, "not of "),
        ({"K": 300}, "up to 256 channels, and K = 300"),
        ({"V": 0}, "V = 0"),
        ({"device": "cpu" if DEVICE == "cuda" else "cuda"}, "the arrays are on"),
    ],
)
def test_refusals_have_reasons(changes: dict[str, Any], reason: str) -> None:
    assert refused("cuda", DEVICE, changes, reason)


def test_without_a_driver_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from mixers.backends.cuda import driver

    monkeypatch.setattr(home, "SIMULATED", False)
    monkeypatch.setattr(home.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(driver, "found", lambda: False)
    support = home.backend.status()
    assert not support and "no GPU driver" in support.reason and "NUMBA_ENABLE_CUDASIM" in support.reason


def test_without_numba_cuda_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home, "SIMULATED", False)
    monkeypatch.setattr(home.importlib.util, "find_spec", lambda name: None if name == "numba_cuda" else object())
    support = home.backend.status()
    assert not support and "sequence-mixers[cuda]" in support.reason


def test_a_pool_may_be_kept_the_other_way_round() -> None:
    mix, x = mixers.get("delta_rule", backend="cuda"), inputs("delta_rule", 2, 1)
    pool = torch.randn(3, 2, 8, 8, device=DEVICE)
    turned = pool.transpose(2, 3).contiguous()
    slots = torch.tensor([2, 0], device=DEVICE)
    ys = [mix.decode(**x, pool=p, slots=slots) for p in (pool, turned.transpose(2, 3))]
    torch.testing.assert_close(*ys, rtol=0, atol=0)
    torch.testing.assert_close(pool, turned.transpose(2, 3), rtol=0, atol=0)


def test_blocks_of_one_head_share_its_gradients() -> None:
    """A head whose values are spread over blocks: each has a part of the gradients of q, k and gates."""
    x = {n: a.double().requires_grad_() for n, a in inputs("kda", 1, 3, width=5, heads=1).items()}
    x["v"] = torch.randn(1, 3, 1, 70, dtype=torch.float64, device=DEVICE, requires_grad=True)
    found = []
    for backend in ("cuda", "reference"):
        y = mixers.get("kda", backend=backend, qk_l2norm=True)(**x).y
        found.append((y, *torch.autograd.grad(y.square().sum(), list(x.values()))))
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.skipif(DEVICE == "cuda", reason="NumPy arrays are the simulator's")
@each_mixer
def test_numpy_arrays_in_the_simulator(name: str) -> None:
    x = inputs(name, 1, 3, width=6)
    mix = mixers.get(name, backend="cuda")
    leaves = {n: a.requires_grad_() for n, a in x.items()}
    y = mix(**leaves).y
    gradients = torch.autograd.grad(y.sum(), list(leaves.values()))
    result, pull = mix.vjp(**{n: a.detach().numpy() for n, a in x.items()})
    np.testing.assert_array_equal(result.y, y.detach().numpy())
    back = pull(np.ones_like(result.y))
    for n, gradient in zip(leaves, gradients, strict=True):
        np.testing.assert_array_equal(back[n], gradient.numpy())


# On a GPU.


def programs() -> Iterator[Any]:
    """Every program of the backend that has been imported."""
    from mixers.backends.cuda.program import Program

    seen = {}
    for module in [m for n, m in sys.modules.items() if n.startswith(home.__name__)]:
        seen |= {id(value): value for value in vars(module).values() if isinstance(value, Program)}
    yield from seen.values()


# Bytes of local memory that a thread of a float64 kernel may spill: a register holds half a number.
MOST_SPILLED = 1024


@on_gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@each_mixer
def test_registers_hold_the_state(name: str, dtype: str) -> None:
    """In local memory, which is slow, there is no tile of a state, but for what float64 spills."""
    for program in programs():
        program.functions.clear()  # other tests' kernels have other widths
    losses(mixers.get(name, backend="cuda"), inputs(name, 2, 70, width=64, dtype=dtype))
    for program in programs():
        for (_, chosen, *_), function in program.functions.items():
            constants, usage = dict(chosen), function.usage(0)
            most = 4 * constants.get("rows", 1) * constants.get("columns", 1) if dtype != "float64" else MOST_SPILLED
            assert usage.local_bytes < most and usage.registers <= 255, (program.module, chosen, usage)


FIRST_CALL = """
import sys
import torch, mixers
x = {n: torch.ones(1, 4, 2, 64, device="cuda", dtype=torch.bfloat16) for n in "qkv"}
mixers.get("delta_rule", backend="cuda")(**x, beta=torch.ones(1, 4, 2, device="cuda"))
torch.cuda.synchronize()
print(*[name for name in ("numba.cuda", "torch._dynamo") if name in sys.modules])
"""


@on_gpu
def test_a_compiled_kernel_starts_without_compilers() -> None:
    """Neither Numba's nor torch's is imported: each takes seconds."""
    found = [subprocess.run([sys.executable, "-c", FIRST_CALL], capture_output=True, text=True) for _ in range(2)]
    assert found[1].returncode == 0, found[1].stderr
    assert found[1].stdout.split() == []
