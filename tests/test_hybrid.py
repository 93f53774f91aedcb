"""HAM, memory caching and TTT-MLP: compositions against the reference, and laws that their definitions state."""

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mixers
from mixers import HAMState
from mixers.algebra import more_rows
from mixers.arrays import library_of
from mixers.ham import PAGE

B, T, G, H, K, V = 2, 13, 2, 4, 6, 5
ON_NUMBA = [
    "reference",
    pytest.param("numba", marks=pytest.mark.skipif(not mixers.backend_status().get("numba"), reason="needs Numba")),
]
PACK = (5, 0, 1, 7)

Named = dict[str, Any]


def normal(seed: str, *shape: int) -> np.ndarray:
    return np.random.default_rng([ord(c) for c in seed]).standard_normal(shape)


def gate(seed: str, *shape: int) -> np.ndarray:
    return 1 / (1 + np.exp(-normal(seed, *shape)))


def inputs(mix: mixers.Mixer, **more: np.ndarray) -> Named:
    """Random arrays for what a mixer must have."""
    sizes = {"B": B, "T": T, "G": G, "H": H, "K": K, "V": V}
    found = {}
    for arg in mix.spec.inputs:
        if not arg.optional or arg.name == "log_decay":
            shape = tuple(sizes[a] for a in arg.layouts[0])
            draw = {"gate": gate, "log_decay": lambda *a: -np.abs(normal(*a)) / 8}.get(arg.draw, normal)
            found[arg.name] = draw(arg.name, *shape)
    found["k"] /= np.linalg.norm(found["k"], axis=-1, keepdims=True)
    if "V" not in mix.spec.arg("v").layouts[0]:
        found["beta"] = found["beta"] / K
    return found | more


def flat(mix: mixers.Mixer, state: Any) -> tuple[np.ndarray, ...]:
    return mix.spec.state(mix.options).unpack(state)


def cut(x: Named, first: int | None, last: int | None) -> Named:
    return {name: a[:, first:last] for name, a in x.items()}


# The laws (conformance) cover options in pairs, forced decisions and the default base; here is what they leave out.
HAMS: list[tuple[Named, Named]] = [
    (
        {"max_kept": 2, "window": 4},
        {"attn_q": normal("c", B, T, 4, 8), "attn_k": normal("d", B, T, 1, 8), "attn_v": normal("e", B, T, 1, V)},
    ),
    ({"router": "beta_l2", "threshold": 0.5, "score_grad": True}, {}),
    ({"router": "given", "threshold": 0.6, "score_grad": True, "window": 3, "max_kept": 3}, {}),
    ({"threshold": 5.0}, {}),
]
CACHES = [
    {"base": base, "aggregate": aggregate, "init": init, "segment": segment, "top_k": 1, "pool": pool}
    for base, aggregate, init, segment, pool in (
        ("gated_delta_rule", "gated", "checkpoint", "log", "sum"),
        ("gated_delta_rule", "sparse", "independent", "log", "mean"),
        ("lattice", "gated", "checkpoint", 4, "mean"),
        ("lattice", "residual", "independent", "log", "sum"),
        ("ttt_linear", "gated", "independent", "log", "mean"),
        ("ttt_linear", "residual", "checkpoint", 4, "sum"),
        ("ttt_linear", "soup", "independent", 4, "mean"),
        ("ttt_linear", "sparse", "checkpoint", 4, "sum"),
    )
]


def ham(backend: str, **options: Any) -> mixers.Mixer:
    return mixers.get("ham", backend=backend, **{"threshold": 0.9, **options})


def cached(backend: str, base: Any = "gated_delta_rule", **options: Any) -> mixers.Mixer:
    base = base if isinstance(base, str) else mixers.get(base[0], **base[1])
    return mixers.get("memory_caching", backend=backend, base=base, **options)


def mlp(backend: str, **options: Any) -> mixers.Mixer:
    return mixers.get("ttt_mlp", backend=backend, **options)


CASES = (
    [(ham, options, more) for options, more in HAMS]
    + [(cached, options, {}) for options in CACHES]
    + [(mlp, {"chunk_size": 4}, {})]
)
IDS = [f"{make.__name__}-{'-'.join(map(str, options.values()))}" for make, options, _ in CASES]


@pytest.mark.parametrize(("make", "options", "more"), CASES, ids=IDS)
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "pack"])
def test_a_composition_is_the_reference_forward_and_backward(make, options: Named, more: Named, packed: bool) -> None:
    """On torch's gradients of the reference, and on the tape: outputs, states, decisions, every gradient."""
    torch = pytest.importorskip("torch")
    truth, mix = make("reference", **options), make("auto", **options)
    x, call = inputs(truth, **more), {}
    streams = options.get("segment") != "log"
    if packed:
        x = {name: a[:1] for name, a in x.items()}
        call["cu_seqlens"] = np.cumsum([0, *PACK])
    if streams:
        before = truth(**(x if packed else cut(x, 0, 6)), **call).state
        call["initial_state"] = before

    leaves = {name: torch.from_numpy(a.copy()).requires_grad_() for name, a in x.items()}
    given = {}
    layout = truth.spec.state(truth.options)
    if streams:
        parts = [torch.from_numpy(a.copy()) for a in flat(truth, before)]
        given = {f.name: p.requires_grad_() for f, p in zip(layout.fields, parts, strict=True) if p.is_floating_point()}
        leaves_call = {**call, "initial_state": layout.pack(tuple(parts))}
    else:
        leaves_call = call
    if packed:
        leaves_call = {**leaves_call, "cu_seqlens": torch.from_numpy(call["cu_seqlens"])}
    wanted = truth(**leaves, **leaves_call)
    ends = [a for a in flat(truth, wanted.state) if a.is_floating_point()]
    seeds = [normal(f"seed {i}", *a.shape) for i, a in enumerate([wanted.y, *ends])]
    flows = [(a, torch.from_numpy(s)) for a, s in zip([wanted.y, *ends], seeds, strict=True) if a.requires_grad]
    outs, ds = zip(*flows, strict=True)
    slopes = torch.autograd.grad(outs, [*leaves.values(), *given.values()], ds, allow_unused=True)

    got, pull = mix.vjp(**x, **call)
    np.testing.assert_allclose(got.y, wanted.y.detach(), rtol=1e-8, atol=1e-9)
    for name in truth.spec.results:
        np.testing.assert_allclose(getattr(got, name), getattr(wanted, name).detach(), rtol=1e-8, atol=1e-9)
    for a, b in zip(flat(mix, got.state), flat(truth, wanted.state), strict=True):
        np.testing.assert_allclose(a, b.detach(), rtol=1e-8, atol=1e-9)
    back = pull(seeds[0], tuple(seeds[1:]))
    state = flat(mix, back["initial_state"]) if streams else ()
    found = [back[name] for name in leaves] + [g for g in state if g is not None and g.dtype.kind == "f"]
    for name, a, b in zip([*leaves, *given], found, slopes, strict=True):
        np.testing.assert_allclose(a, 0 if b is None else b, rtol=1e-7, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("make", [ham, cached, mlp])
def test_jax_runs_compositions_under_jit(make) -> None:
    jax = pytest.importorskip("jax")
    options = {"segment": 4} if make is cached else {"max_kept": 2} if make is ham else {"chunk_size": 4}
    mix, truth = make("auto", **options), make("reference", **options)
    with jax.enable_x64(True):
        x = {name: jax.numpy.asarray(a) for name, a in inputs(mix).items()}
        first = jax.jit(lambda x: mix(**x))(cut(x, 0, 6))
        np.testing.assert_allclose(first.y, truth(**cut(inputs(mix), 0, 6)).y, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "options", "graphs"),
    [(ham, {"window": 2}, 2), (ham, {"max_kept": 3, "decide": "head"}, 2), (cached, {"segment": 4}, 2)],
    ids=["ham", "ham-capped", "memory_caching"],
)
def test_a_compiler_follows_compositions(make, options: Named, graphs: int) -> None:
    """Forward and backward in one graph; one serves every length, but the segments of memory caching are unrolled."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # kernels may change it, and a compiler looks at it
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    mix = make("auto", **options)

    def slopes(call, tokens: int) -> tuple[Any, ...]:
        leaves = {n: torch.from_numpy(a).requires_grad_() for n, a in cut(inputs(mix), 0, tokens).items()}
        y, state = call(leaves)
        return y.detach(), *torch.autograd.grad(y.square().sum() + state[0].sum(), list(leaves.values()))

    def plain(x: Named) -> tuple[Any, Any]:
        result = mix(**x)
        return result.y, flat(mix, result.state)

    compiled = torch.compile(lambda x: plain(x), fullgraph=True, backend="aot_eager")
    try:
        for tokens in (7, 12):
            for got, wanted in zip(slopes(compiled, tokens), slopes(plain, tokens), strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-9)
    finally:
        torch.set_num_threads(threads)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= graphs


# HAM.


def test_a_threshold_that_keeps_nothing_leaves_the_recurrence_alone() -> None:
    mix = mixers.get("ham", threshold=3.0)
    x = inputs(mix)
    result = mix(**x)
    assert not result.kept.any()
    assert result.state.keys.shape[1] == PAGE
    np.testing.assert_allclose(result.y, mixers.get("gated_delta_rule")(**x).y, rtol=1e-10)
    assert "attention part is zero" in str(mix.explain(**x))


def test_a_threshold_that_keeps_all_is_attention_beside_the_recurrence() -> None:
    mix = mixers.get("ham", threshold=-1.0)
    x = inputs(mix)
    q, k = (np.repeat(x[name], H // G, axis=2) for name in ("q", "k"))
    attention = mixers.get("attention")(q=q, k=k, v=x["v"]).y
    result = mix(**x)
    assert result.kept.all()
    np.testing.assert_allclose(result.y, mixers.get("gated_delta_rule")(**x).y + attention, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("backend", ON_NUMBA)
def test_decisions_may_be_forced_and_the_cache_holds_just_them(backend: str) -> None:
    mix = ham(backend)
    x = inputs(mix)
    kept = normal("kept", B, T) > 0.5
    result = mix(**x, kept=kept)
    np.testing.assert_array_equal(result.kept, kept)
    assert isinstance(result.state, HAMState)
    np.testing.assert_array_equal(result.state.count, kept.sum(axis=1))
    for n in range(B):
        np.testing.assert_array_equal(result.state.keys[n, : kept[n].sum()], x["k"][n, kept[n]])


STREAM = 3 * PAGE + 20


def streamed() -> tuple[Named, np.ndarray]:
    """A sequence, and decisions to keep all but five tokens at each of three places around the end of a page."""
    shapes = {"q": (G, K), "k": (G, K), "v": (H, V), "beta": (H,)}
    x = {name: normal(name, 1, STREAM, *shape) for name, shape in shapes.items()}
    x["k"] /= np.linalg.norm(x["k"], axis=-1, keepdims=True)
    x["beta"] = 1 / (1 + np.exp(-x["beta"]))
    kept = np.ones((1, STREAM), bool)
    for i, filled in enumerate((PAGE - 1, 2 * PAGE, 3 * PAGE + 1)):
        kept[:, filled + 5 * i : filled + 5 * i + 5] = False
    return x, kept


@pytest.mark.parametrize("decide", ["all", "head"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_a_stream_grows_by_pages_of_kept_tokens(library: str, decide: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are added where a page begins and at no other token; what is left is the state of the whole sequence."""
    mix, (x, kept) = mixers.get("ham", decide=decide), streamed()
    if library == "torch":
        torch = pytest.importorskip("torch")
        x, kept = {name: torch.from_numpy(a) for name, a in x.items()}, torch.from_numpy(kept)
    whole = mix(**x, kept=kept)
    grown: list[int] = []
    monkeypatch.setattr("mixers.ham.more_rows", lambda xp, a, *rows: grown.append(t) or more_rows(xp, a, *rows))
    state, counts = None, [0]
    for t in range(STREAM):
        state = mix.step(**{name: a[:, t] for name, a in x.items()}, kept=kept[:, t], state=state).state
        counts.append(int(state.count.max()))
        assert state.keys.shape[1] == state.values.shape[1] == (counts[-1] // PAGE + 1) * PAGE
    begun = [t for t in range(STREAM) if t == 0 or counts[t] // PAGE < counts[t + 1] // PAGE]
    assert len(begun) == 4
    assert grown == sorted(2 * begun)  # keys and values
    for got, wanted in zip(flat(mix, state), flat(mix, whole.state), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"score_grad": True, "window": 2}])
def test_gradients_reach_back_through_tokens_and_pages(options: Named) -> None:
    torch = pytest.importorskip("torch")
    mix, (x, kept) = mixers.get("ham", **options), streamed()
    decided = torch.from_numpy(kept)

    def slopes(pieces: list[slice]) -> Any:
        leaves, state, outputs = {n: torch.from_numpy(a).requires_grad_() for n, a in x.items()}, None, []
        for at in pieces:
            result = mix(**{n: a[:, at] for n, a in leaves.items()}, kept=decided[:, at], initial_state=state)
            state = result.state
            outputs.append(result.y)
        return torch.autograd.grad(torch.cat(outputs, 1).square().sum(), list(leaves.values()))

    tokens = [slice(t, t + 1) for t in range(STREAM)]
    for got, wanted in zip(slopes(tokens), slopes([slice(None)]), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("rows", [0, 5, PAGE, 2 * PAGE])
def test_a_token_finds_room_in_any_cache(rows: int) -> None:
    """In one that is full, as a compiled call leaves it, and in one that is longer than its pages."""
    mix, truth, (x, _) = mixers.get("ham"), mixers.get("ham", backend="reference"), streamed()
    kept, filled = np.ones((1, STREAM), bool), PAGE if rows == PAGE else min(rows, 5)
    before = truth(**cut(x, 0, filled), kept=kept[:, :filled]).state
    more = max(0, rows - before.keys.shape[1])
    room = {n: np.pad(getattr(before, n)[:, :rows], ((0, 0), (0, more), (0, 0), (0, 0))) for n in ("keys", "values")}
    token = {n: a[:, filled] for n, a in x.items()}
    wanted = truth.step(**token, kept=kept[:, 0], state=before)
    got = mix.step(**token, kept=kept[:, 0], state=before._replace(**room))
    for a, b in zip((got.y, *flat(mix, got.state)), (wanted.y, *flat(truth, wanted.state)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10)


def test_the_threshold_may_be_an_array() -> None:
    mix, x = ham("auto", threshold=0.0), inputs(ham("auto"))
    wanted = ham("auto", threshold=0.95)(**x)
    np.testing.assert_array_equal(mix(**x, threshold=np.array(0.95)).kept, wanted.kept)


def test_float32_streams_keep_the_tokens_of_the_whole(capsys: pytest.CaptureFixture[str]) -> None:
    """Decisions are taken in float32 on every path: flips are counted over a long sequence."""
    mix = ham("auto", threshold=0.97)
    heads, tokens = 2, 200
    x = {
        "q": normal("q", 1, tokens, heads, 16),
        "k": normal("k", 1, tokens, heads, 16),
        "v": normal("v", 1, tokens, heads, 16),
        "beta": gate("beta", 1, tokens, heads),
        "log_decay": -np.abs(normal("g", 1, tokens, heads)) / 8,
    }
    x["k"] /= np.linalg.norm(x["k"], axis=-1, keepdims=True)
    x = {name: a.astype(np.float32) for name, a in x.items()}
    whole = mix(**x).kept
    state, kept = None, []
    for t in range(tokens):
        result = mix.step(**{name: a[:, t] for name, a in x.items()}, state=state)
        state = result.state
        kept.append(result.kept)
    assert 0.1 < whole.mean() < 0.9
    assert int((np.stack(kept, axis=1) != whole).sum()) <= 1


BUDGET = """
import sys
import torch
from mixers.nn import KeepBudget

rank, path = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
budget = KeepBudget(0.25, threshold=0.5, rate=0.1)
budget.observe(torch.arange(8).reshape(1, 8) < (8 if rank else 0))
budget.step()
print(float(budget.threshold))
"""


def test_a_budget_counts_what_all_ranks_keep(tmp_path: Path) -> None:
    """One rank keeps everything and the other nothing: both move by rate · (1/2 − target)."""
    pytest.importorskip("torch")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", BUDGET, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    assert [float(rank.communicate(timeout=120)[0]) for rank in ranks] == pytest.approx([0.525] * 2)


def test_a_budget_moves_rests_and_is_saved() -> None:
    torch = pytest.importorskip("torch")
    from mixers.nn import KeepBudget

    budget = KeepBudget(0.5, threshold=0.3, rate=0.1, start_step=1, freeze_step=2)
    seen = []
    for _ in range(3):
        budget.observe(torch.ones(1, 4) > 0)
        budget.step()
        seen.append(float(budget.threshold))
    assert seen == pytest.approx([0.3, 0.35, 0.35])  # before its first step, at it, and frozen
    other = KeepBudget(0.5)
    other.load_state_dict(budget.state_dict())
    assert float(other.threshold) == pytest.approx(0.35)
    assert int(other.steps) == 3


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("decide", ["all", "head"])
def test_a_ring_lives_in_a_pool(decide: str, library: str) -> None:
    mix = ham("auto", max_kept=2, window=2, decide=decide)
    x = inputs(mix)
    first = flat(mix, mix.init_state(4, H, K, V, key_heads=G, like=x["q"]))
    if library == "torch":
        torch = pytest.importorskip("torch")
        x, first = {n: torch.from_numpy(a) for n, a in x.items()}, tuple(torch.from_numpy(a) for a in first)
    slots, state = np.array([3, 1], np.int32), None
    slots = slots if library == "numpy" else torch.from_numpy(slots)
    for t in range(T):
        wanted = mix(**cut(x, t, t + 1), initial_state=state)
        state = wanted.state
        y = mix.decode(**cut(x, t, t + 1), pool=first, slots=slots)
        np.testing.assert_allclose(y, wanted.y, rtol=0, atol=1e-12)
    for held, a in zip(first, flat(mix, state), strict=True):
        np.testing.assert_allclose(held[[3, 1]], a, rtol=0, atol=1e-12)


def test_ham_refuses() -> None:
    given = mixers.get("ham", router="given")
    x = inputs(given)
    with pytest.raises(ValueError, match=r"score has shape .*, expected \[B,T\]"):
        given(**(x | {"score": x["score"][:, :, None]}))
    x["score"][1, 3] = np.nan
    with pytest.raises(ValueError, match=r"NaN at \[1, 3\]"):
        given(**x)
    with pytest.raises(ValueError, match="score is missing"):
        given(**{name: a for name, a in x.items() if name != "score"})


# Memory caching.


@pytest.mark.parametrize("backend", ON_NUMBA)
@pytest.mark.parametrize("init", ["independent", "checkpoint"])
@pytest.mark.parametrize("aggregate", ["gated", "residual"])
def test_closed_forms_over_a_linear_base(backend: str, init: str, aggregate: str) -> None:
    segment = 4
    mix = mixers.get(
        "memory_caching", backend=backend, base="linear_attention", segment=segment, aggregate=aggregate, init=init
    )
    x = inputs(mix, memory_query=normal("u", B, T, H, K))
    q, k = (np.repeat(x[name], H // G, axis=2) for name in ("q", "k"))
    of = np.arange(T) // segment
    y = np.zeros((B, T, H, V))
    for b, t, h in itertools.product(range(B), range(T), range(H)):
        means = np.stack([k[b, : t + 1, h][of[: t + 1] == s].mean(axis=0) for s in range(of[t] + 1)])
        logits = means @ x["memory_query"][b, t, h]
        share = np.exp(logits - logits.max())
        share = share / share.sum() if aggregate == "gated" else np.ones_like(share)
        for j in range(t + 1):
            weight = share[of[j]] if init == "independent" else share[of[j] :].sum()
            y[b, t, h] += K**-0.5 * weight * (q[b, t, h] @ k[b, j, h]) * x["v"][b, j, h]
    np.testing.assert_allclose(mix(**x).y, y, rtol=1e-8, atol=1e-10)


def test_enough_segments_make_sparse_gated_and_soup_is_gated_for_matrices() -> None:
    x = inputs(cached("auto", segment=4))
    gated = cached("auto", segment=4)(**x).y
    np.testing.assert_allclose(cached("auto", segment=4, aggregate="sparse", top_k=3)(**x).y, gated, rtol=1e-10)
    np.testing.assert_allclose(cached("auto", segment=4, aggregate="soup")(**x).y, gated, rtol=1e-10)


def test_memory_grows_by_a_state_a_segment() -> None:
    mix = cached("auto", segment=4)
    x = inputs(mix)
    held = [mix(**cut(x, 0, tokens)).state for tokens in (3, 4, 11, 12)]
    assert [s.kept.shape[1] for s in held] == [0, 1, 2, 3]
    row = B * H * (K * V + K) * 8
    assert [(s.nbytes - held[0].nbytes) // row for s in held] == [0, 1, 2, 3]


def test_memory_caching_refuses() -> None:
    log = cached("auto", segment="log")
    x = inputs(log)
    with pytest.raises(ValueError, match="streaming does not know"):
        log.step(**{name: a[:, 0] for name, a in x.items()})
    with pytest.raises(ValueError, match="top_k=0"):
        cached("auto", top_k=0)
    for base in ("attention", "ham"):
        with pytest.raises(ValueError, match="no matrix state"):
            cached("auto", base)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (mlp, {"chunk_size": 4}),
        (cached, {"base": "lattice", "segment": 4}),
        (cached, {"base": "ttt_linear", "segment": 4}),
    ],
)
def test_what_a_layer_learns_begins_a_sequence_and_nobody_asks_where(
    make, options: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A learned first state has no counters; to read one waits for a GPU, and while a graph is captured nobody can."""
    mix = make("auto", **options)
    x, count = inputs(mix), len(mix.spec.learned)
    learned = flat(mix, mix(**x).state)[:count]
    given = learned if count > 1 else learned[0]
    begun = mix(**cut(x, 0, 0), initial_state=given).state
    wanted = mix(**x, initial_state=begun)

    def asked(*_: Any) -> None:
        raise AssertionError("a counter was read")

    monkeypatch.setattr(type(library_of(x["q"], "q")), "host", asked)
    found = mix(**x, initial_state=given)
    for got, expected in zip((found.y, *flat(mix, found.state)), (wanted.y, *flat(mix, wanted.state)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)
