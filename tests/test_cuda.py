"""The CUDA backend's own: whom it refuses, pools written in place, its simulator, and on a GPU laws 6 and 7."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import mixers  # noqa: E402
from mixers.backend import installed  # noqa: E402
from mixers.cases import Setting, draw  # noqa: E402
from mixers.problem import Flags, Problem  # noqa: E402
from mixers.spec import Sizes  # noqa: E402

STATUS = mixers.backend_status()["cuda"]
if not STATUS:
    pytest.skip(STATUS.reason, allow_module_level=True)

import mixers.backends.cuda as home  # noqa: E402

DEVICE = "cpu" if home.SIMULATED else "cuda"
NAMES = [n for n in mixers.names() if any(n in kernel.mixers for kernel in installed()["cuda"].kernels())]
IN_PLACE = [n for n in NAMES if any(n in k.mixers and k.in_place for k in installed()["cuda"].kernels())]
each_mixer = pytest.mark.parametrize("name", NAMES)


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """A test that only a GPU can run."""
    return pytest.mark.gpu(pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")(test))


def inputs(
    name: str, batch: int, tokens: int, *, width: int = 8, heads: int = 2, dtype: str = "float32"
) -> dict[str, Any]:
    """Random tensors of a call."""
    spec = mixers.get_spec(name)
    arrays = tuple((a.name, " ".join(a.layouts[0])) for a in spec.inputs if not a.optional)
    setting = Setting(spec, (), arrays, heads, heads, width, width, (tokens,) * batch, seed=tokens)
    x = {n: torch.from_numpy(a).to(DEVICE, torch.float32) for n, a in draw(setting, "float32").items()}
    return {n: a.to(getattr(torch, dtype)) if n in ("q", "k", "v") else a for n, a in x.items()}


def problem(**changes: Any) -> Problem:
    """A small call of the delta rule."""
    spec = mixers.get_spec("delta_rule")
    given: dict[str, Any] = {"dtype": "float32", "library": "torch", "device": DEVICE, "K": 8, "V": 8} | changes
    sizes = Sizes(B=1, T=4, G=1, H=1, K=given.pop("K"), V=given.pop("V"), N=1)
    return Problem.of(spec, spec.resolve({}), sizes, Flags(), layouts=(("beta", "B T H"),), **given)


def states(state: Any) -> tuple[Any, ...]:
    """A state as a tuple of arrays."""
    return state if isinstance(state, tuple) else (state,)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"library": "jax"}, "not of jax"),
        ({"K": 300}, "up to 256 channels, and K = 300"),
        ({"V": 0}, "V = 0"),
        ({"device": "cpu" if DEVICE == "cuda" else "cuda"}, "the arrays are on"),
    ],
)
def test_refusals_have_reasons(changes: dict[str, Any], reason: str) -> None:
    for kernel in installed()["cuda"].kernels():
        if "delta_rule" in kernel.mixers:
            support = kernel.supports(problem(**changes))
            assert not support and reason in support.reason


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


@pytest.mark.skipif(DEVICE == "cuda", reason="about machines without a GPU")
def test_auto_leaves_the_simulator_alone() -> None:
    explained = mixers.get("delta_rule").explain(**inputs("delta_rule", 1, 4))
    assert explained.chosen.backend != "cuda"
    assert "runs on cuda" in str(explained)


def test_a_failing_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    mix = mixers.get("delta_rule", backend="cuda")
    kernel = next(k for k in installed()["cuda"].kernels() if k.name == "delta.recurrent")

    def fail(*_: Any) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(type(kernel), "forward", fail)
    with pytest.raises(RuntimeError, match="out of luck") as caught:
        mix(**inputs("delta_rule", 1, 4))
    assert "cuda/delta.recurrent" in "".join(caught.value.__notes__) and "T=4" in "".join(caught.value.__notes__)


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_decode_is_a_call_on_the_pool(name: str, storage: str) -> None:
    """Padding writes nothing, fresh sequences start from the first state, a slot may be read and another written."""
    mix = mixers.get(name, backend="cuda", state_dtype="" if storage == "float32" else storage)
    begun = mix(**inputs(name, 5, 3)).state
    pool = tuple(s.clone() for s in states(begun))
    assert all(p.dtype == getattr(torch, storage) for p in pool)
    before = [p.clone() for p in pool]
    x = inputs(name, 3, 2)
    slots, to = (torch.tensor(s, dtype=torch.int32, device=DEVICE) for s in ([3, -1, 0], [1, 2, 0]))
    fresh = torch.tensor([False, False, True], device=DEVICE)
    y = mix.decode(**x, pool=pool if len(pool) > 1 else pool[0], slots=slots, out_slots=to, fresh=fresh)

    def alone(row: int, state: Any) -> Any:
        return mix(**{n: a[row : row + 1] for n, a in x.items()}, initial_state=state)

    given = tuple(b[3:4] for b in before)
    ran = {1: (0, alone(0, given if len(given) > 1 else given[0])), 0: (2, alone(2, None))}
    for slot, (row, result) in ran.items():
        torch.testing.assert_close(y[row : row + 1], result.y)
        for part, expected in zip(pool, states(result.state), strict=True):
            torch.testing.assert_close(part[slot : slot + 1], expected)
    assert not y[1].any()
    for part, old in zip(pool, before, strict=True):
        torch.testing.assert_close(part[2:], old[2:], rtol=0, atol=0)


def test_a_pool_may_be_kept_the_other_way_round() -> None:
    mix, x = mixers.get("delta_rule", backend="cuda"), inputs("delta_rule", 2, 1)
    pool = torch.randn(3, 2, 8, 8, device=DEVICE)
    turned = pool.transpose(2, 3).contiguous()
    slots = torch.tensor([2, 0], device=DEVICE)
    ys = [mix.decode(**x, pool=p, slots=slots) for p in (pool, turned.transpose(2, 3))]
    torch.testing.assert_close(*ys, rtol=0, atol=0)
    torch.testing.assert_close(pool, turned.transpose(2, 3), rtol=0, atol=0)


@each_mixer
def test_every_element_is_written(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What the library allocates is full of NaN first; none is left in outputs and gradients."""
    mix = mixers.get(name, backend="cuda")
    x = {n: a.requires_grad_() for n, a in inputs(name, 1, 5, width=6).items()}
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(make: Callable[..., Any]) -> Callable[..., Any]:
        def allocate(*args: Any, **rest: Any) -> Any:
            made = make(*args, **rest)
            return made.fill_(float("nan")) if made.is_floating_point() else made.fill_(-123456789)

        return allocate

    monkeypatch.setattr(torch, "empty", poisoned(empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(empty_like))
    y, state = mix(**x)
    gradients = torch.autograd.grad(y.float().sum(), list(x.values()))
    monkeypatch.undo()
    for found in (y, *states(state), *gradients):
        assert (torch.isfinite(found) if found.is_floating_point() else found > -1).all()


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


def variants() -> int:
    """How many kernels have been loaded in this process."""
    return sum(len(program.functions) for program in programs())


def losses(mix: Any, x: dict[str, Any]) -> Any:
    """Output and gradients."""
    leaves = {n: a.detach().requires_grad_() for n, a in x.items()}
    y = mix(**leaves, return_state=False).y
    return y, *torch.autograd.grad(y.float().square().sum(), list(leaves.values()))


@on_gpu
@each_mixer
def test_no_synchronisation_and_no_second_compilation(name: str) -> None:
    mix = mixers.get(name, backend="cuda")
    for batch, tokens in ((2, 70), (4, 131), (1, 1)):
        losses(mix, inputs(name, batch, tokens, width=64, dtype="bfloat16"))
    compiled = variants()
    sizes = ((2, 77), (4, 300), (1, 2))
    prepared = [inputs(name, batch, tokens, width=64, dtype="bfloat16") for batch, tokens in sizes]
    losses(mix, prepared[-1])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x in prepared:
            losses(mix, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert variants() <= compiled + 3  # one of another layout: few sequences are spread over more lanes


@on_gpu
@each_mixer
def test_packs_do_not_synchronise(name: str) -> None:
    mix = mixers.get(name, backend="cuda")
    pack = mixers.pack([5, 0, 90, 1], device="cuda")
    x = inputs(name, 1, 96, width=64, dtype="bfloat16")
    mix(**x, cu_seqlens=pack)
    torch.cuda.set_sync_debug_mode("error")
    try:
        mix(**x, cu_seqlens=pack)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
@each_mixer
def test_graphs_replay_forward_backward_and_step(name: str) -> None:
    mix = mixers.get(name, backend="cuda")
    x = inputs(name, 2, 70, width=64, dtype="bfloat16")
    token = {n: a[:, 0].contiguous() for n, a in x.items()}
    state = mix(**x).state
    for run in (lambda: losses(mix, x), lambda: mix.step(**token, state=state)[0]):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            held = run()
        for a in x.values():
            a.copy_(a.roll(1, 0))
        for n, a in token.items():
            a.copy_(x[n][:, 1])
        graph.replay()
        wanted = run()
        for got, expected in zip(*((r if isinstance(r, tuple) else (r,)) for r in (held, wanted)), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


@on_gpu
@each_mixer
def test_registers_hold_the_state(name: str) -> None:
    """In local memory, which is slow, there is no tile of a state, in any kernel that a call loads."""
    for dtype in ("bfloat16", "float32"):
        losses(mixers.get(name, backend="cuda"), inputs(name, 2, 70, width=64, dtype=dtype))
    for program in programs():
        for (_, chosen, *_), function in program.functions.items():
            constants, usage = dict(chosen), function.usage(0)
            tile = 4 * constants.get("rows", 1) * constants.get("columns", 1)
            assert usage.local_bytes < tile and usage.registers <= 255, (program.module, chosen, usage)


@on_gpu
@pytest.mark.parametrize("name", ["delta_rule", "gla"])
def test_offsets_beyond_32_bits(name: str) -> None:
    """The last rows of an array of more than 2³¹ elements are what they are alone."""
    mix, heads, width, tokens = mixers.get(name, backend="cuda"), 16, 64, 2048
    batch = 2**31 // (heads * width * tokens) + 3
    few = inputs(name, 3, tokens, width=width, heads=heads, dtype="bfloat16")
    many = {n: torch.zeros((batch, *a.shape[1:]), dtype=a.dtype, device="cuda") for n, a in few.items() if n in "qkv"}
    many |= {n: a[:1].expand(batch, *a.shape[1:]) for n, a in few.items() if n not in "qkv"}
    last = {n: a[-3:] for n, a in many.items()}
    for n in "qkv":
        last[n].copy_(few[n])
    with torch.no_grad():
        y = mix(**many, return_state=False).y[-3:]
        alone = mix(**{n: a.contiguous() for n, a in last.items()}, return_state=False).y
    torch.testing.assert_close(y, alone, rtol=2e-2, atol=2e-2)


FIRST_CALL = """
import json, sys, time
import torch, mixers
x = {n: torch.ones(1, 4, 2, 64, device="cuda", dtype=torch.bfloat16) for n in "qkv"}
torch.cuda.synchronize()
begun = time.perf_counter()
y = mixers.get("delta_rule", backend="cuda")(**x, beta=torch.ones(1, 4, 2, device="cuda")).y
torch.cuda.synchronize()
print(json.dumps([time.perf_counter() - begun, "numba.cuda" in sys.modules]))
"""


@on_gpu
def test_a_compiled_kernel_starts_without_numba() -> None:
    found = [subprocess.run([sys.executable, "-c", FIRST_CALL], capture_output=True, text=True) for _ in range(2)]
    assert found[1].returncode == 0, found[1].stderr
    seconds, imported = json.loads(found[1].stdout.splitlines()[-1])
    assert not imported and seconds < 1
