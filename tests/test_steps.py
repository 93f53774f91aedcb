"""Compositions token by token on the CUDA backend: what its kernels of a single token give is what the reference gives.

In Numba's simulator at small sizes; on a GPU also at wide ones, without waiting for the device, and as CUDA graphs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tensors import on_gpu  # noqa: E402

import mixers  # noqa: E402
from mixers import HAMState  # noqa: E402
from mixers.ham import PAGE  # noqa: E402

STATUS = mixers.backend_status()["cuda"]
if not STATUS:
    pytest.skip(STATUS.reason, allow_module_level=True)

import mixers.backends.cuda as home  # noqa: E402

DEVICE = "cpu" if home.SIMULATED else "cuda"
pytestmark = [] if home.SIMULATED else [pytest.mark.gpu]

Named = dict[str, Any]
ROWS, TOKENS = 2, 7
HALF = ("q", "k", "v", "attn_q", "attn_k", "attn_v", "memory_query")
SMALL = {"B": ROWS, "T": TOKENS, "G": 2, "H": 4, "K": 6, "V": 5}
WIDE = {"B": 3, "T": 40, "G": 4, "H": 8, "K": 128, "V": 128}

# A name, options, inputs that may be left out and are not, axes that differ from the usual ones.
HAMS: dict[str, tuple[Named, tuple[str, ...], Named]] = {
    "pages": ({"threshold": 0.9}, ("log_decay",), {}),
    "ring": ({"threshold": 0.9, "max_kept": 2, "window": 3}, ("attn_q", "attn_k", "attn_v"), {"A": 1, "D": 2, "E": 8}),
    "heads": ({"threshold": 1.5, "router": "l2", "decide": "head"}, ("gate_rnn", "gate_kv"), {}),
    "heads of a ring": (
        {"threshold": 0.5, "router": "beta_l2", "decide": "head", "max_kept": 3, "window": 2},
        ("log_decay", "attn_q", "attn_k"),
        {"J": 1, "E": 9},
    ),
    "given": ({"threshold": 0.1, "router": "given", "include_self": True}, ("log_decay",), {}),
    "forced": ({"max_kept": 4}, ("log_decay", "kept"), {}),
    "nothing": ({"max_kept": 4, "threshold": 9.0}, (), {}),
}
CACHES: dict[str, tuple[Named, tuple[str, ...], Named]] = {
    "gated": ({"segment": 3}, ("log_decay",), {}),
    "sparse": ({"segment": 2, "aggregate": "sparse", "top_k": 1, "init": "independent", "pool": "sum"}, (), {}),
    "residual": ({"segment": 2, "aggregate": "residual", "base": "delta_rule"}, (), {}),
    "soup": ({"segment": 1, "aggregate": "soup", "base": "gla"}, (), {"G": 4}),
}
MLPS: dict[str, tuple[Named, tuple[str, ...], Named]] = {
    "plain": ({"chunk_size": 3}, (), {"G": 4}),
    "grouped": ({"chunk_size": 3}, ("norm_weight", "norm_bias", "token_scale"), {}),
}
CASES = [
    pytest.param(mixer, *case, id=f"{mixer} {name}")
    for mixer, cases in (("ham", HAMS), ("memory_caching", CACHES), ("ttt_mlp", MLPS))
    for name, case in cases.items()
]


def inputs(mix: mixers.Mixer, more: tuple[str, ...], sizes: Named, dtype: str) -> Named:
    """Random numbers for what a mixer must have, and for what else is named."""
    rng, found = np.random.default_rng(7), {}
    chunk = mix.options.get("chunk_size", 1)
    sizes = {"J": sizes["G"], "A": sizes["G"], "D": sizes["H"], "E": sizes["K"], "C": chunk, **sizes}
    for arg in (*mix.spec.inputs, *mix.spec.parameters):
        if arg.optional and arg.name not in more:
            continue
        a = rng.standard_normal([sizes[axis] for axis in arg.layouts[0]])
        if arg.name == "k":
            a /= np.linalg.norm(a, axis=-1, keepdims=True)
        elif arg.name == "log_decay":
            a = -np.abs(a) / 8
        elif arg.name in ("beta", "gate_rnn", "gate_kv"):
            a = 1 / (1 + np.exp(-a)) / (1 if "V" in mix.spec.arg("v").layouts[0] else sizes["K"])
        kind = (
            torch.bool if arg.flag else getattr(torch, dtype if arg.name in HALF or dtype == "float64" else "float32")
        )
        found[arg.name] = torch.from_numpy(a > 0 if arg.flag else a).to(DEVICE, kind)
    return found


def token(mix: mixers.Mixer, x: Named, t: int) -> Named:
    parameters = {arg.name for arg in mix.spec.parameters}
    return {name: a if name in parameters else a[:, t] for name, a in x.items()}


def exact(x: Named) -> Named:
    return {name: a.double() if a.is_floating_point() else a for name, a in x.items()}


def flat(mix: mixers.Mixer, state: Any) -> tuple[Any, ...]:
    return tuple(mix.spec.state(mix.options).unpack(state))


def close(got: Any, wanted: Any, allowed: float) -> None:
    assert got.shape == wanted.shape
    if not got.is_floating_point():
        assert torch.equal(got, wanted)
    else:
        size = wanted.double().norm().clamp_min(1e-3)
        assert (got.double() - wanted.double()).norm() <= allowed * size


@contextmanager
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The programs that are queued."""
    from mixers.backends.cuda.program import Program

    found: list[str] = []
    queue = Program.__call__

    def noted(self: Any, *given: Any, **limits: Any) -> None:
        found.append(self.module)
        queue(self, *given, **limits)

    with monkeypatch.context() as patch:
        patch.setattr(Program, "__call__", noted)
        yield found


def compared(name: str, options: Named, more: tuple[str, ...], sizes: Named, dtype: str) -> None:
    """A stream beside that of the reference in float64, on the same numbers: outputs, decisions, states."""
    mix, truth = (mixers.get(name, backend=backend, **options) for backend in ("cuda", "reference"))
    x, states = inputs(mix, more, sizes, dtype), [None, None]
    allowed = mix.spec.tolerance[dtype]
    for t in range(sizes["T"]):
        got, wanted = (
            mix.step(**token(mix, x, t), state=states[0]),
            truth.step(**exact(token(mix, x, t)), state=states[1]),
        )
        states = [got.state, wanted.state]
        close(got.y, wanted.y, allowed)
        if "kept" in mix.spec.results:
            assert torch.equal(got.kept, wanted.kept)
        for a, b in zip(flat(mix, got.state), flat(truth, wanted.state), strict=True):
            close(a, b, allowed)


@pytest.mark.parametrize(("name", "options", "more", "sizes"), CASES)
def test_a_stream_is_the_reference(name: str, options: Named, more: tuple[str, ...], sizes: Named) -> None:
    compared(name, options, more, SMALL | sizes, "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize(("name", "options", "more", "sizes"), CASES[1:2])
def test_in_every_dtype(name: str, options: Named, more: tuple[str, ...], sizes: Named, dtype: str) -> None:
    compared(name, options, more, SMALL | sizes | {"T": 4}, dtype)


@on_gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("name", "options", "more", "sizes"), CASES)
def test_wide_heads(name: str, options: Named, more: tuple[str, ...], sizes: Named, dtype: str) -> None:
    compared(name, options, more, WIDE | sizes, dtype)


@pytest.mark.parametrize("decide", ["all", "head"])
def test_a_cache_without_a_cap_grows_by_pages(decide: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From two tokens before the end of a page: the host asks once a token, and again where a row may be the last."""
    from mixers.arrays.torch import Torch

    mix, truth = (mixers.get("ham", backend=backend, decide=decide) for backend in ("cuda", "reference"))
    before = inputs(mix, (), SMALL | {"T": PAGE - 2}, "float32")
    held = truth(**exact(before), kept=torch.ones(ROWS, PAGE - 2, dtype=torch.bool, device=DEVICE)).state
    state = HAMState(*(a.float() if a.is_floating_point() else a for a in flat(truth, held)))
    x = inputs(mix, (), SMALL, "float32")
    asked: list[Any] = []
    largest = Torch.largest
    for t, (keep, rows, asks) in enumerate([(1, 1, 1), (0, 1, 2), (1, 2, 3), (0, 2, 1), (1, 2, 1)]):
        kept = torch.full((ROWS,), bool(keep), device=DEVICE)
        wanted = truth.step(**exact(token(mix, x, t)), kept=kept, state=held)
        asked.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Torch, "largest", lambda self, counts: asked.append(counts) or largest(self, counts))
            got = mix.step(**token(mix, x, t), kept=kept, state=state)
        state, held = got.state, wanted.state
        assert state.keys.shape[1] == rows * PAGE and len(asked) == asks
        for a, b in zip((got.y, *flat(mix, state)), (wanted.y, *flat(truth, held)), strict=True):
            close(a, b, mix.spec.tolerance["float32"])


LAUNCHES = [
    ("ham", {}, ["delta_step", "ham_attention"], {"max", "_local_scalar_dense"}),
    ("ham", {"max_kept": 4, "window": 2}, ["delta_step", "ham_attention"], set()),
    ("memory_caching", {"segment": 4}, ["delta_step", "memory_read"], {"stack", "_to_copy"}),
    ("ttt_mlp", {"chunk_size": 4}, ["ttt_mlp_token"], set()),
]


@pytest.mark.parametrize(("name", "options", "programs", "more"), LAUNCHES)
def test_a_step_takes_a_handful_of_launches(
    name: str, options: Named, programs: list[str], more: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And, but for what tells whether caches must grow, no operation of arrays beside them that is more than a view."""
    from torch.utils._python_dispatch import TorchDispatchMode

    operations: list[str] = []

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), named: Any = None) -> Any:
            operations.append(function.name().partition(".")[0].removeprefix("aten::"))
            return function(*given, **(named or {}))

    mix = mixers.get(name, backend="cuda", **options)
    x = inputs(mix, (), SMALL, "bfloat16")
    state = mix.step(**token(mix, x, 0)).state
    with launches(monkeypatch) as found, Noted():
        mix.step(**token(mix, x, 1), state=state)
    assert found == programs
    assert {o for o in operations if not o.startswith("mixers::")} - VIEWS <= more


VIEWS = {"unsqueeze", "select", "view", "slice", "detach", "alias", "expand", "unbind", "_reshape_alias"}


@pytest.mark.parametrize(
    ("name", "options"), [("ham", {"max_kept": 4}), ("memory_caching", {"segment": 1}), ("ttt_mlp", {"chunk_size": 3})]
)
def test_gradients_take_the_other_way(name: str, options: Named, monkeypatch: pytest.MonkeyPatch) -> None:
    mix, truth = (mixers.get(name, backend=backend, **options) for backend in ("cuda", "reference"))
    x = inputs(mix, (), SMALL, "float32")
    slopes = []
    for m in (mix, truth):
        leaves = {n: a.clone().requires_grad_() for n, a in token(mix, x, 0).items()}
        with launches(monkeypatch) as found:
            y, state = m.step(**leaves)
        assert not {"ham_attention", "memory_read", "ttt_mlp_token"} & set(found)
        loss = y.square().sum() + sum(a.square().sum() for a in flat(m, state) if a.is_floating_point())
        slopes.append(torch.autograd.grad(loss, list(leaves.values())))
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "options", "more", "sizes"), CASES[len(HAMS) : len(HAMS) + 2])
def test_where_the_host_knows_nothing_memories_have_room(
    name: str, options: Named, more: tuple[str, ...], sizes: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a graph that is captured: a row more, filled or not, which the next step may be given or spared."""
    from mixers.arrays.torch import Torch

    mix, truth = (mixers.get(name, backend=backend, **options) for backend in ("cuda", "reference"))
    x, state, held = inputs(mix, more, SMALL | sizes, "float32"), None, None
    for t in range(TOKENS):
        wanted = truth.step(**exact(token(mix, x, t)), state=held)
        held = wanted.state
        with monkeypatch.context() as patch:
            for method in ("host", "largest"):
                patch.setattr(Torch, method, lambda self, counts: None)
            got = mix.step(**token(mix, x, t), state=state)
        state = got.state
        close(got.y, wanted.y, mix.spec.tolerance["float32"])
        assert state.kept.shape[1] == t + 1 and torch.equal(state.segments, held.segments)
        filled = held.kept.shape[1]
        close(state.kept[:, :filled], held.kept, mix.spec.tolerance["float32"])
        close(state.pooled[:, :filled], held.pooled, mix.spec.tolerance["float32"])


@pytest.mark.parametrize("aggregate", ["gated", "sparse", "residual"])
def test_more_memories_than_a_block_holds_take_the_other_way(aggregate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixers.memory_step.MOST_ROWS", {"float32": 2})
    mix, truth = (
        mixers.get("memory_caching", backend=backend, segment=2, aggregate=aggregate, top_k=1)
        for backend in ("cuda", "reference")
    )
    x, state, held = inputs(mix, (), SMALL, "float32"), None, None
    for t in range(TOKENS):
        rows = 0 if state is None else state.kept.shape[1]
        with launches(monkeypatch) as found:
            got = mix.step(**token(mix, x, t), state=state)
        wanted = truth.step(**exact(token(mix, x, t)), state=held)
        state, held = got.state, wanted.state
        assert ("memory_read" in found) == (rows <= 2)
        for a, b in zip((got.y, *flat(mix, state)), (wanted.y, *flat(truth, held)), strict=True):
            close(a, b, mix.spec.tolerance["float32"])
    assert rows == 3


def test_blocks_hold_the_memories_that_are_served() -> None:
    from mixers.backends.cuda.arrays import SIZES
    from mixers.backends.cuda.memory_step import shared_numbers

    from mixers.memory_step import MOST_ROWS

    assert {shared_numbers(rows) * SIZES[dtype] for dtype, rows in MOST_ROWS.items()} == {64 * 1024}


# On a GPU.


@contextmanager
def no_waiting() -> Iterator[None]:
    """Waiting for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


FIXED = [
    ("ham", {"max_kept": 8, "window": 4, "threshold": 0.9}),
    ("ham", {"max_kept": 8, "decide": "head"}),
    ("ttt_mlp", {"chunk_size": 16}),
]


@on_gpu
@pytest.mark.parametrize(("name", "options"), FIXED)
def test_a_stream_of_fixed_size_waits_for_nobody(name: str, options: Named) -> None:
    mix = mixers.get(name, backend="cuda", **options)
    x = inputs(mix, ("log_decay",), WIDE, "bfloat16")
    state = mix.step(**token(mix, x, 0)).state
    with no_waiting():
        for t in range(1, WIDE["T"]):
            state = mix.step(**token(mix, x, t), state=state).state


GRAPHS = [
    *FIXED,
    ("memory_caching", {"segment": 4}),
    ("memory_caching", {"segment": 4, "aggregate": "sparse", "top_k": 2}),
    ("memory_caching", {"segment": 4, "aggregate": "residual", "init": "independent"}),
]
ROOM = 6


def with_room(mix: mixers.Mixer, state: Any) -> tuple[Any, ...]:
    """Copies of the arrays of a state, those of kept memories with rows to spare."""
    fields = mix.spec.state(mix.options).fields
    pads = (ROOM - a.shape[1] if "S" in f.axes.split() else 0 for f, a in zip(fields, flat(mix, state), strict=True))
    arrays = zip(flat(mix, state), pads, strict=True)
    return tuple(torch.cat([a, a.new_zeros(a.shape[0], n, *a.shape[2:])], 1) if n else a.clone() for a, n in arrays)


@on_gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("name", "options"), GRAPHS)
def test_a_graph_holds_a_stream(name: str, options: Named, dtype: str) -> None:
    """A step and the copy of its state back to where it came from, captured once and replayed for every token.

    Memories have rows to spare, since a captured step of memory caching returns one more than it was given; the one
    that is run before capturing returns those that are filled.
    """
    mix = mixers.get(name, backend="cuda", **options)
    x = inputs(mix, ("log_decay",), WIDE, dtype)
    now = {n: a.clone() for n, a in token(mix, x, 0).items()}
    first = mix.step(**now).state
    pack = mix.spec.state(mix.options).pack
    held = with_room(mix, first)

    def step() -> Any:
        result = mix.step(**now, state=pack(held))
        for a, b in zip(held, flat(mix, result.state), strict=True):
            if a.shape != b.shape:
                rows = min(a.shape[1], b.shape[1])
                a, b = a[:, :rows], b[:, :rows]
            a.copy_(b)
        return result.y

    graph, y = captured(step)
    for a, b in zip(held, with_room(mix, first), strict=True):
        a.copy_(b)
    state = first
    for t in range(1, 20):
        for n, a in token(mix, x, t).items():
            now[n].copy_(a)
        graph.replay()
        wanted = mix.step(**token(mix, x, t), state=state)
        state = wanted.state
        torch.testing.assert_close(y, wanted.y)
        for a, b in zip(held, flat(mix, state), strict=True):
            torch.testing.assert_close(a if a.shape == b.shape else a[:, : b.shape[1]], b)


@on_gpu
@pytest.mark.parametrize(("name", "options"), FIXED)
def test_a_graph_holds_a_pool(name: str, options: Named) -> None:
    """A token of three sequences, one of which is padding, with their states in a pool."""
    mix = mixers.get(name, backend="cuda", **options)
    x = inputs(mix, (), WIDE, "bfloat16")
    slots = torch.tensor([3, -1, 0], dtype=torch.int32, device=DEVICE)
    pool = mix.init_state(5, WIDE["H"], WIDE["K"], WIDE["V"], key_heads=WIDE["G"], like=x["q"])
    beside = tuple(a.clone() for a in flat(mix, pool))
    now = {n: a[:, :1].clone() for n, a in x.items()}

    graph, y = captured(lambda: mix.decode(**now, pool=flat(mix, pool), slots=slots))
    for a, b in zip(flat(mix, pool), beside, strict=True):
        a.copy_(b)
    for t in range(1, 20):
        for n, a in x.items():
            now[n].copy_(a[:, t : t + 1])
        graph.replay()
        with no_waiting():
            wanted = mix.decode(**now, pool=beside, slots=slots)
        torch.testing.assert_close(y, wanted, rtol=0, atol=0)
        for a, b in zip(flat(mix, pool), beside, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def captured(run: Callable[[], Any]) -> tuple[Any, Any]:
    """A graph of some work and what that returned, after a few runs on a stream beside."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = run()
    return graph, held
