"""What compositions are made of, by its definition in float64: as array operations, and by each backend's kernels."""

import itertools
from typing import Any

import array_api_compat.numpy as xp
import numpy as np
import pytest

import mixers
from mixers.arrays.numpy import library as on_numpy
from mixers.chosen_reads import chosen_reads
from mixers.kept_rows import kept_rows
from mixers.memory_caching import boundaries
from mixers.segment_weights import Cuts, segment_weights
from mixers.state_reads import state_reads

torch = pytest.importorskip("torch")

from mixers.arrays.torch import library as on_torch  # noqa: E402

TRITON = mixers.backend_status()["triton"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = [
    pytest.param(
        dtype,
        marks=[
            pytest.mark.skipif(not TRITON, reason=TRITON.reason),
            *([pytest.mark.gpu] if DEVICE == "cuda" else []),
            *([pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")] if dtype == "bfloat16" else []),
        ],
    )
    for dtype in ("float32", "bfloat16")
]
ALLOWED = {"float32": 2e-6, "bfloat16": 2e-2}

SETTINGS = [  # rows, tokens, key heads, heads, K, V, segment, tokens before, segments before, top, pool
    (2, 41, 2, 4, 20, 33, 8, 5, 2, 0, "mean"),
    (1, 40, 2, 2, 16, 9, 8, 0, 0, 2, "sum"),
    (1, 75, 1, 2, 33, 20, "log", 0, 0, 3, "mean"),
]


def normal(seed: str, *shape: int) -> np.ndarray:
    return np.random.default_rng([ord(c) for c in seed]).standard_normal(shape)


def cuts_of(tokens: int, segment: Any, before: int, finished: int) -> Cuts:
    return Cuts(tokens, boundaries(tokens, segment, before), before, 0 if segment == "log" else segment, finished)


def close(got: Any, wanted: np.ndarray, dtype: str = "float64") -> None:
    got = np.asarray(got.detach().cpu().double() if hasattr(got, "detach") else got)
    size = np.linalg.norm(wanted)
    assert np.linalg.norm(got - wanted) <= ALLOWED.get(dtype, 1e-12) * max(size, 1e-30)


def segments_by_definition(k, pooled, key_sum, u, cuts: Cuts, pool: str, top: int) -> tuple[np.ndarray, ...]:
    """Weights of all segments, zeros where unseen, and what is pooled: a loop over tokens."""
    (rows, tokens, heads, _), finished = u.shape, pooled.shape[1]
    k = np.repeat(k, heads // k.shape[2], axis=2)
    pools = [pooled[:, i] for i in range(finished)]
    total = finished + len(cuts.ends)
    weights = np.zeros((rows, heads, total + 1, tokens))
    running, number = key_sum.copy(), cuts.before
    for t in range(tokens):
        running, number = running + k[:, t], number + 1
        mine = running / number if pool == "mean" else running
        scores = np.stack([np.sum(u[:, t] * m, -1) for m in [*pools, mine]], axis=2)  # [N,H,s+1]
        for n, h in itertools.product(range(rows), range(heads)):
            old = list(range(len(pools)))
            if top:
                old = sorted(old, key=lambda i: (-scores[n, h, i], i))[:top]
            picked = [*old, len(pools)]
            share = np.exp(scores[n, h, picked] - scores[n, h, picked].max())
            weights[n, h, [*old, total], t] = share / share.sum()
        if t + 1 in cuts.ends:
            pools.append(mine)
            running, number = np.zeros_like(running), 0
    return weights, np.stack(pools[finished:], axis=1), running


def drawn(setting: tuple[Any, ...]) -> tuple[dict[str, np.ndarray], Cuts, str, int]:
    rows, tokens, groups, heads, width, values, segment, before, finished, top, pool = setting
    cuts = cuts_of(tokens, segment, before, finished)
    states = finished + len(cuts.ends)
    x = {
        "k": normal("k", rows, tokens, groups, width),
        "pooled": normal("m", rows, finished, heads, width),
        "key_sum": normal("r", rows, heads, width) * bool(before),
        "u": normal("u", rows, tokens, heads, width),
        "y": normal("y", rows, tokens, heads, values),
        "q": normal("q", rows, tokens, groups, width),
        "kept": normal("c", rows, states, heads, width, values),
    }
    return x, cuts, pool, top


@pytest.mark.parametrize("setting", SETTINGS, ids=["grouped", "sparse", "log"])
def test_segments_and_reads_by_array_operations(setting: tuple[Any, ...]) -> None:
    x, cuts, pool, top = drawn(setting)
    asked = (x["k"], x["pooled"], x["key_sum"], x["u"])
    weights, pooled, key_sum = segments_by_definition(*asked, cuts, pool, top)
    found = segment_weights(on_numpy, "reference", *asked, cuts, pool, top)
    close(found.pooled, pooled)
    close(found.key_sum, key_sum)

    q = np.repeat(x["q"], x["y"].shape[2] // x["q"].shape[2], axis=2)
    reads = np.einsum("nhst,nthk,nshkv->nthv", weights[:, :, :-1], q, x["kept"])
    wanted = 0.3 * reads + x["y"] * weights[:, :, -1].transpose(0, 2, 1)[..., None]
    read = (on_numpy, "reference", x["y"], x["q"], x["kept"], found.weights)
    if top:
        close(chosen_reads(*read, found.chosen, cuts, 0.3), wanted)
    else:
        close(found.weights, weights)
        close(state_reads(*read, cuts, 0.3), wanted)


@pytest.mark.parametrize("setting", SETTINGS, ids=["grouped", "sparse", "log"])
@pytest.mark.parametrize("dtype", KERNELS)
def test_segments_and_reads_by_kernels(setting: tuple[Any, ...], dtype: str) -> None:
    """Results and gradients are those of the array operations in float64, on the same numbers."""
    x, cuts, pool, top = drawn(setting)
    half = {"k", "u", "y", "q"}

    def ran(backend: str, single: bool) -> tuple[list[Any], list[Any]]:
        leaves = {}
        for name, a in x.items():
            a = torch.from_numpy(a).to(DEVICE).to(getattr(torch, dtype) if name in half else torch.float32)
            leaves[name] = (a if single else a.double()).requires_grad_()
        k, pooled, key_sum, u, y, q, kept = leaves.values()
        found = segment_weights(on_torch, backend, k, pooled, key_sum, u, cuts, pool, top)
        read = (on_torch, backend, y, q, kept, found.weights)
        out = chosen_reads(*read, found.chosen, cuts, 0.3) if top else state_reads(*read, cuts, 0.3)
        over = cuts.ends[-1] == cuts.tokens  # then no key is left
        results = [out, found.pooled, *([] if over else [found.key_sum])]
        seeds = [torch.from_numpy(normal(f"d{i}", *r.shape)).to(r) for i, r in enumerate(results)]
        return results, list(torch.autograd.grad(results, list(leaves.values()), seeds, allow_unused=True))

    (got, back), (wanted, wanted_back) = ran("triton", True), ran("reference", False)
    for a, b in zip([*got, *back], [*wanted, *wanted_back], strict=True):
        if b is not None:
            close(a, b.detach().cpu().numpy(), dtype)


@pytest.mark.parametrize("alone", [False, True], ids=["all heads", "a head each"])
@pytest.mark.parametrize("dtype", ["arrays", *KERNELS])
def test_rows_are_gathered_where_they_go(alone: bool, dtype: str) -> None:
    """Half of the old rows and of the new ones, in an order of their own; what goes nowhere has no gradient."""
    rows, held, tokens, heads = 2, 5, 9, 3
    shape = (rows, held + tokens, heads) if alone else (rows, held + tokens)
    rank = np.argsort(np.argsort(normal("p", *shape), axis=1), axis=1)
    place = np.where(rank < 6, rank, -1).astype(np.int32)
    order = np.argsort(np.where(place < 0, 99, place), axis=1, kind="stable")[:, :6]
    kernel, backend = dtype != "arrays", "triton" if dtype != "arrays" else "reference"
    kind, device = getattr(torch, dtype) if kernel else torch.float64, DEVICE if kernel else "cpu"
    x = [
        normal(f"x{i}", rows, n, heads, w) for i, (n, w) in enumerate([(tokens, 7), (tokens, 4), (held, 7), (held, 4)])
    ]
    x = [torch.from_numpy(a).to(device, kind).requires_grad_() for a in x]
    index = [torch.from_numpy(a).to(device) for a in (order, place)]
    at = index[0][..., None] if alone else index[0][..., None, None]
    every = [torch.cat([old, new], dim=1) for new, old in zip(x[:2], x[2:], strict=True)]
    wanted = [a.gather(1, at.expand(*at.shape[:2], *a.shape[2:])) for a in every]
    got = kept_rows(on_torch, backend, tuple(x[:2]), tuple(x[2:]), *index)
    seeds = [torch.from_numpy(normal("d", *a.shape)).to(a) for a in wanted]
    slopes, expected = (torch.autograd.grad(results, x, seeds) for results in (got, wanted))
    for a, b in zip([*got, *slopes], [*wanted, *expected], strict=True):
        assert torch.equal(a, b)


# Decisions.


@pytest.mark.parametrize("heads", [(), (3,)])
@pytest.mark.parametrize("of", ["numpy", "torch"])
def test_tokens_are_selected_by_each_rule(heads: tuple[int, ...], of: str) -> None:
    """A sequence of a pack is what it is alone; of equal scores the earlier is kept."""
    score = np.round(normal("s", 1, 30, *heads), 1)
    bounds = [0, 7, 7, 8, 30]
    given = score if of == "numpy" else torch.from_numpy(score)
    for rule, amount in (("threshold", 0.3), ("quantile", 0.25), ("top", 4), ("recent", 5)):
        got = np.asarray(mixers.select(given, **{rule: amount}, cu_seqlens=np.asarray(bounds)))
        assert got.shape == score.shape
        for first, last in itertools.pairwise(bounds):
            length = last - first
            for h in itertools.product(*(range(n) for n in heads)):
                own = score[0, first:last][(slice(None), *h)]
                best = sorted(range(length), key=lambda t: (-own[t], t))
                kept = {
                    "threshold": [t for t in range(length) if np.float32(own[t]) >= np.float32(0.3)],
                    "quantile": best[: int(np.ceil(0.25 * length))],
                    "top": best[:4],
                    "recent": list(range(length))[-5:],
                }[rule]
                assert np.flatnonzero(got[0, first:last][(slice(None), *h)]).tolist() == sorted(kept)
    assert not np.asarray(mixers.select(given, top=0)).any()
    assert np.asarray(mixers.select(given, quantile=1.0)).all()


def test_a_selection_says_what_it_takes() -> None:
    score = xp.zeros((1, 3))
    for wrong, reason in (
        ({}, "got none"),
        ({"top": 1, "recent": 1}, "got top, recent"),
        ({"quantile": 1.5}, "a share"),
    ):
        with pytest.raises(ValueError, match=reason):
            mixers.select(score, **wrong)
    with pytest.raises(ValueError, match="top=-1"):
        mixers.select(score, top=-1)
