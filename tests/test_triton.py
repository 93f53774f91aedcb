"""Triton's own: whom it refuses, pools written in place, and on a GPU laws 6 and 7."""

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

import mixers  # noqa: E402
from mixers.backend import installed  # noqa: E402
from mixers.cases import Setting, draw  # noqa: E402
from mixers.problem import Flags, Problem  # noqa: E402
from mixers.spec import Sizes  # noqa: E402

STATUS = mixers.backend_status()["triton"]
if not STATUS:
    pytest.skip(STATUS.reason, allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = [name for name in mixers.names() if mixers.get_spec(name).reserve is None]
FORMS = [
    (name, options)
    for name in NAMES
    for options in ({}, {"chunk_size": 4})
    if set(options) <= {o.name for o in mixers.get_spec(name).options}
]
IDS = ["-".join([name, *map(str, options.values())]) for name, options in FORMS]
each_form = pytest.mark.parametrize(("name", "options"), FORMS, ids=IDS)


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """A test that only a GPU can run."""
    return pytest.mark.gpu(pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")(test))


def inputs(
    name: str, batch: int, tokens: int, *, width: int = 16, heads: int = 2, dtype: str = "float32"
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


@pytest.mark.skipif(DEVICE == "cuda", reason="about machines without a GPU")
def test_auto_leaves_the_interpreter_alone() -> None:
    explained = mixers.get("delta_rule").explain(**inputs("delta_rule", 1, 4))
    assert explained.chosen.backend != "triton"
    assert "runs on cuda" in str(explained)


def test_a_failing_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    mix = mixers.get("delta_rule", backend="triton")
    kernel = next(k for k in installed()["triton"].kernels() if k.name == "delta.chunk")

    def fail(*_: Any) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(type(kernel), "forward", fail)
    with pytest.raises(RuntimeError, match="out of luck") as caught:
        mix(**inputs("delta_rule", 1, 4))
    assert "triton/delta.chunk" in "".join(caught.value.__notes__) and "T=4" in "".join(caught.value.__notes__)


@each_form
def test_decode_is_a_call_on_the_pool(name: str, options: dict[str, Any]) -> None:
    """In place or not: padding writes nothing, fresh sequences start from the first state."""
    mix = mixers.get(name, backend="triton", **options)
    begun = mix(**inputs(name, 5, 3)).state
    pool = tuple(s.clone() for s in (begun if isinstance(begun, tuple) else (begun,)))
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
        ended = result.state if isinstance(result.state, tuple) else (result.state,)
        for part, expected in zip(pool, ended, strict=True):
            torch.testing.assert_close(part[slot : slot + 1], expected)
    assert not y[1].any()
    for part, old in zip(pool, before, strict=True):
        torch.testing.assert_close(part[2:], old[2:], rtol=0, atol=0)


@pytest.mark.parametrize(("name", "options"), FORMS[:1])
def test_a_pool_of_other_widths_is_refused(name: str, options: dict[str, Any]) -> None:
    """A kernel that works in place would read and write beyond it."""
    mix = mixers.get(name, backend="triton", **options)
    slots = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    for shape in ((5, 2, 16, 8), (5, 1, 16, 16), (2, 16, 16)):
        with pytest.raises(ValueError, match="the pool's state has shape"):
            mix.decode(**inputs(name, 1, 2), pool=torch.zeros(shape, device=DEVICE), slots=slots)


@each_form
def test_every_element_is_written(monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any]) -> None:
    """What the library allocates is full of NaN first; none is left in outputs and gradients."""
    mix = mixers.get(name, backend="triton", **options)
    x = {n: a.requires_grad_() for n, a in inputs(name, 2, 21, width=20).items()}
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(make: Callable[..., Any]) -> Callable[..., Any]:
        def allocate(*args: Any, **rest: Any) -> Any:
            made = make(*args, **rest)
            return made.fill_(float("nan")) if made.is_floating_point() else made.fill_(-123456789)

        return allocate

    monkeypatch.setattr(torch, "empty", poisoned(empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(empty_like))
    y, state = mix(**x)
    leaves = list(x.values())
    gradients = torch.autograd.grad(y.float().sum(), leaves)
    monkeypatch.undo()
    for found in (y, *(state if isinstance(state, tuple) else (state,)), *gradients):
        assert (torch.isfinite(found) if found.is_floating_point() else found > -1).all()


def test_tf32_is_an_option() -> None:
    mix = mixers.get("delta_rule", backend="triton", allow_tf32=True)
    assert mix.flags(False, True, 0).allow_tf32
    assert not mixers.get("delta_rule", backend="triton").flags(False, True, 0).allow_tf32
    assert mix != mixers.get("delta_rule", backend="triton")


# On a GPU.


def variants() -> int:
    """How many kernels Triton has compiled in this process."""
    import mixers.backends.triton as home
    from triton.runtime.jit import JITFunction

    count = 0
    for module in [m for n, m in sys.modules.items() if n.startswith(home.__name__)]:
        for value in vars(module).values():
            if isinstance(value, JITFunction):
                count += sum(len(cache[0]) for cache in value.device_caches.values())
    return count


def losses(mix: Any, x: dict[str, Any]) -> Any:
    """Output and gradients."""
    leaves = {n: a.detach().requires_grad_() for n, a in x.items()}
    y = mix(**leaves, return_state=False).y
    return y, *torch.autograd.grad(y.float().square().sum(), list(leaves.values()))


@on_gpu
@each_form
def test_no_synchronisation_and_no_second_compilation(name: str, options: dict[str, Any]) -> None:
    mix = mixers.get(name, backend="triton", **options)
    for batch, tokens in ((2, 70), (3, 131), (1, 64)):
        losses(mix, inputs(name, batch, tokens, width=64, dtype="bfloat16"))
    compiled = variants()
    sizes = ((2, 77), (5, 300), (4, 2))
    prepared = [inputs(name, batch, tokens, width=64, dtype="bfloat16") for batch, tokens in sizes]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x in prepared:
            losses(mix, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert variants() == compiled


@on_gpu
@each_form
def test_packs_do_not_synchronise(name: str, options: dict[str, Any]) -> None:
    mix = mixers.get(name, backend="triton", **options)
    pack = mixers.pack([5, 0, 90, 1], device="cuda")
    x = inputs(name, 1, 96, width=64, dtype="bfloat16")
    mix(**x, cu_seqlens=pack)
    torch.cuda.set_sync_debug_mode("error")
    try:
        mix(**x, cu_seqlens=pack)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
@each_form
def test_graphs_replay_forward_backward_and_step(name: str, options: dict[str, Any]) -> None:
    mix = mixers.get(name, backend="triton", **options)
    x = inputs(name, 2, 70, width=64, dtype="bfloat16")
    token = {n: a[:, 0].contiguous() for n, a in x.items()}
    state = mix(**x).state
    runs = (lambda: losses(mix, x), lambda: mix.step(**token, state=state)[0])
    for run in runs:
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
@pytest.mark.parametrize("name", ["delta_rule", "gla", "lattice", "ttt_linear"])
def test_offsets_beyond_32_bits(name: str) -> None:
    """The last rows of an array of more than 2³¹ elements are what they are alone."""
    mix, heads, width, tokens = mixers.get(name, backend="triton"), 16, 64, 2048
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


@on_gpu
@each_form
def test_torch_compile_in_one_piece(name: str, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    mix = mixers.get(name, backend="triton", **options)

    def loss(x: dict[str, Any]) -> Any:
        return mix(**x, return_state=False).y.float().square().sum()

    compiled = torch.compile(loss, fullgraph=True)
    for batch, tokens in ((2, 33), (3, 65), (4, 40)):
        x = {n: a.requires_grad_() for n, a in inputs(name, batch, tokens, width=64, dtype="bfloat16").items()}
        got = torch.autograd.grad(compiled(x), list(x.values()))
        wanted = torch.autograd.grad(loss(x), list(x.values()))
        for g, w in zip(got, wanted, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-2, atol=1e-3)
