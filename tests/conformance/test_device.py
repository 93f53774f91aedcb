"""Laws 5 to 7 for every backend whose kernels run on a GPU: every element written, pools, 64-bit offsets, no waiting.

``form`` is a mixer with options on such a backend, on its GPU or in its simulator. What needs the GPU is marked so.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tensors import drawn, losses, on_gpu  # noqa: E402

import mixers  # noqa: E402
from mixers.backend import installed  # noqa: E402

# How much a simulator is asked to do: tokens × heads × widths of 16, unless ``--most`` says otherwise.
SIMULATED = 15000


def inputs(form, batch: int, tokens: int, **more: Any) -> dict[str, Any]:
    """Random tensors of a call."""
    return drawn(form.mixer, form.device, batch, tokens, **more)


def parts(state: Any) -> tuple[Any, ...]:
    """A state as a tuple of arrays."""
    return state if isinstance(state, tuple) else (state,)


def test_auto_leaves_simulators_alone(form) -> None:
    if form.device != "cpu":
        pytest.skip("about machines without a GPU")
    explained = mixers.get(form.mixer, **dict(form.options)).explain(**inputs(form, 1, 4))
    assert explained.chosen.backend != form.backend
    assert "runs on cuda" in str(explained)


def test_a_failing_kernel_is_named(form, monkeypatch: pytest.MonkeyPatch) -> None:
    mix, x = form.get(), inputs(form, 1, 4)
    chosen = mix.explain(**x).chosen

    def fail(*_: Any) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(type(chosen.kernel), "forward", fail)
    with pytest.raises(RuntimeError, match="out of luck") as caught:
        mix(**x)
    notes = "".join(caught.value.__notes__)
    assert f"{form.backend}/{chosen.kernel.name}" in notes and "T=4" in notes


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_decode_is_a_call_on_the_pool(form, storage: str) -> None:
    """In place or not: padding writes nothing, fresh sequences start from the first state."""
    mix = form.get(state_dtype="" if storage == "float32" else storage)
    begun = mix(**inputs(form, 5, 3)).state
    pool = tuple(s.clone() for s in parts(begun))
    before = [p.clone() for p in pool]
    x = inputs(form, 3, 2)
    slots, to = (torch.tensor(s, dtype=torch.int32, device=form.device) for s in ([3, -1, 0], [1, 2, 0]))
    fresh = torch.tensor([False, False, True], device=form.device)
    y = mix.decode(**x, pool=pool if len(pool) > 1 else pool[0], slots=slots, out_slots=to, fresh=fresh)

    def alone(row: int, state: Any) -> Any:
        return mix(**{n: a[row : row + 1] for n, a in x.items()}, initial_state=state)

    given = tuple(b[3:4] for b in before)
    ran = {1: (0, alone(0, given if len(given) > 1 else given[0])), 0: (2, alone(2, None))}
    for slot, (row, result) in ran.items():
        torch.testing.assert_close(y[row : row + 1], result.y)
        for part, expected in zip(pool, parts(result.state), strict=True):
            # Another kernel than the call's may serve a pool, and adds up in another order. Law 2 allows the two forms
            # 2e-5 of their largest number in float32; a twentieth of that is enough.
            slack = {
                "rtol": 1.6e-2 if storage == "bfloat16" else 1.3e-6,
                "atol": max(1e-5, 1e-6 * float(expected.abs().max())),
            }
            torch.testing.assert_close(part[slot : slot + 1], expected, **slack)
    assert not y[1].any()
    for part, old in zip(pool, before, strict=True):
        torch.testing.assert_close(part[2:], old[2:], rtol=0, atol=0)


def test_a_pool_of_other_widths_is_refused(form) -> None:
    """A kernel that works in place would read and write beyond it."""
    mix = form.get()
    slots = torch.zeros(1, dtype=torch.int32, device=form.device)
    begun = parts(mix(**inputs(form, 5, 2)).state)
    for cut in (lambda a: a[..., :-1], lambda a: a[:, :1], lambda a: a[:, 0]):
        pool = (cut(begun[0]), *begun[1:])
        with pytest.raises(ValueError, match=r"the pool's .* has shape"):
            mix.decode(**inputs(form, 1, 2), pool=pool if len(pool) > 1 else pool[0], slots=slots)


def test_every_element_is_written(form, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """What the library allocates is full of NaN first; none is left in outputs and gradients."""
    heads, width = 2, 6
    most = request.config.getoption("--most") or SIMULATED
    tokens = min(21, most // (heads * 16**2)) if form.device == "cpu" else 150
    mix, x = form.get(), {n: a.requires_grad_() for n, a in inputs(form, 1, tokens, width=width).items()}
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
    for found in (y, *parts(state), *gradients):
        assert (torch.isfinite(found) if found.is_floating_point() else found > -1).all()


# On a GPU.


@contextmanager
def no_waiting() -> Iterator[None]:
    """An error where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def compiled(backend: str) -> int:
    """How many kernels a backend has compiled or loaded in this process: Triton's functions and our programs count."""
    home, seen = type(installed()[backend]).__module__, {}
    for module in [m for n, m in sys.modules.items() if n.startswith(home)]:
        seen |= {id(value): value for value in vars(module).values()}
    count = 0
    for value in seen.values():
        caches, functions = getattr(value, "device_caches", None), getattr(value, "functions", None)
        count += sum(len(cache[0]) for cache in caches.values()) if caches else 0
        count += len(functions) if isinstance(functions, dict) else 0
    return count


@on_gpu
def test_no_synchronisation_and_no_second_compilation(form) -> None:
    mix = form.get()
    for batch, tokens in ((2, 70), (4, 131), (1, 64)):
        losses(mix, inputs(form, batch, tokens, width=64, dtype="bfloat16"))
    before = compiled(form.backend)
    assert before > 0
    prepared = [inputs(form, b, t, width=64, dtype="bfloat16") for b, t in ((2, 77), (3, 300), (1, 2))]
    with no_waiting():
        for x in prepared:
            losses(mix, x)
    assert compiled(form.backend) == before


@on_gpu
def test_packs_do_not_synchronise(form) -> None:
    mix, pack = form.get(), mixers.pack([5, 0, 90, 1], device="cuda")
    x = inputs(form, 1, 96, width=64, dtype="bfloat16")
    mix(**x, cu_seqlens=pack)
    with no_waiting():
        mix(**x, cu_seqlens=pack)


@on_gpu
def test_graphs_replay_forward_backward_and_step(form) -> None:
    mix, x = form.get(), inputs(form, 2, 70, width=64, dtype="bfloat16")
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
        for got, expected in zip(parts(held), parts(run()), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


@on_gpu
def test_offsets_beyond_32_bits(form) -> None:
    """The last rows of an array of more than 2³¹ elements are what they are alone."""
    if form.options:
        pytest.skip("the default options are enough")
    mix, heads, width, tokens = form.get(), 16, 64, 2048
    batch = 2**31 // (heads * width * tokens) + 3
    few = inputs(form, 3, tokens, width=width, heads=heads, dtype="bfloat16")
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
def test_torch_compile_in_one_piece(form) -> None:
    torch._dynamo.reset()
    mix = form.get()

    def loss(x: dict[str, Any]) -> Any:
        return mix(**x, return_state=False).y.float().square().sum()

    whole = torch.compile(loss, fullgraph=True)
    for batch, tokens in ((2, 33), (3, 65), (4, 40)):
        x = {n: a.requires_grad_() for n, a in inputs(form, batch, tokens, width=64, dtype="bfloat16").items()}
        got = torch.autograd.grad(whole(x), list(x.values()))
        wanted = torch.autograd.grad(loss(x), list(x.values()))
        for g, w in zip(got, wanted, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-2, atol=1e-3)
