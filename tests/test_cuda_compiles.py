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
from mixers.backend import Pool  # noqa: E402
from mixers.check.pinned import Pinned  # noqa: E402

if home.SIMULATED:
    pytest.skip("the simulator compiles nothing", allow_module_level=True)

GENERATIONS = {"sm_80": (8, 0), "sm_90": (9, 0)}
DTYPES = ("float32", "bfloat16", "float16", "float64")


def widest(kernel: Any) -> str:
    """The mixer of a kernel with the most inputs: it reaches every line."""
    return max(sorted(kernel.mixers), key=lambda name: len(mixers.get_spec(name).inputs))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> dict[Any, dict[str, str]]:
    """What a launch would need, as PTX for every generation; nothing is launched.

    Numba's front end takes nearly all of the time, and asks for no capability above 7.5: one run of it serves them all.
    """
    from mixers.backends.cuda import program
    from mixers.backends.cuda.source import cuda

    found: dict[Any, dict[str, str]] = {}
    library: list[Any] = []
    front_end = cuda.compiler._compile_pyfunc_with_fixup

    def once(*function: Any, **options: Any) -> Any:
        if not library:
            library.append(front_end(*function, **options))
        return library[0]

    def compile_only(self: Any, like: Any, chosen: Any, *rest: Any, **limits: Any) -> None:
        key = self.module, chosen
        if key not in found:
            library.clear()
            found[key] = {name: self.ptx(chosen, capability) for name, capability in GENERATIONS.items()}

    monkeypatch.setattr(cuda.compiler, "_compile_pyfunc_with_fixup", once)
    monkeypatch.setattr(program.Program, "__call__", compile_only)
    return found


def prepared(kernel: Any, dtype: str, tokens: int) -> tuple[Any, dict[str, Any], dict[str, Any], dict[str, Any]]:
    """A problem as on a GPU, its inputs, the first state beside them, and outputs."""
    from mixers.arrays.operators import with_first_state

    mix, x = Pinned(mixers.get_spec(widest(kernel)), "cuda", kernel, {}), {}
    for arg in mix.spec.inputs:
        shape = [{"B": 1, "T": tokens, "K": 64, "V": 64}.get(axis, 2) for axis in arg.layouts[0]]
        x[arg.name] = torch.zeros(shape, dtype=getattr(torch, dtype if arg.name in ("q", "k", "v") else "float32"))
    call = mix.validated(**x)
    problem = dataclasses.replace(call.problem(), device="cuda")
    out = {n: torch.empty(s, dtype=getattr(torch, d)) for n, (s, d) in problem.outputs().items()}
    return problem, x, with_first_state(problem, call.x), out


def check(compiled: dict[Any, dict[str, str]], dtype: str) -> None:
    """What was compiled is for its generation, and keeps nothing in local memory."""
    assert compiled
    for (module, chosen), texts in compiled.items():
        for generation, text in texts.items():
            assert f".target {generation}" in text and ".visible .entry mixers_kernel" in text
            if dtype != "float64":
                assert "__local_depot" not in text, f"{module} keeps an array in local memory: {dict(chosen)}"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", home.backend.kernels(), ids=lambda kernel: kernel.name)
def test_ptx_without_a_gpu(kernel: Any, dtype: str, compiled: dict[Any, dict[str, str]]) -> None:
    problem, x, given, out = prepared(kernel, dtype, tokens=4)
    support = kernel.supports(problem)
    assert support, support.reason
    gradients = {n: torch.empty_like(a) for n, a in x.items()}
    config = kernel.configs(problem)[0]
    kernel.forward(problem, config, given, out)
    kernel.backward(problem, config, given, out, dict(out), gradients)
    if kernel.in_place:
        fields = problem.spec.state(problem.option).fields
        slots = torch.zeros(1, dtype=torch.int32)
        pool = Pool(tuple(given[f"initial.{f.name}"] for f in fields), slots, slots, None)
        kernel.decode(problem, config, given, pool, out["y"])
    check(compiled, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_ptx_of_a_single_token(dtype: str, compiled: dict[Any, dict[str, str]]) -> None:
    kernel = next(k for k in home.backend.kernels() if "kda" in k.mixers)
    problem, _, given, out = prepared(kernel, dtype, tokens=1)
    kernel.forward(problem, kernel.configs(problem)[0], given, out)
    turned = given["initial.state"].transpose(2, 3).contiguous().transpose(2, 3)
    kernel.forward(problem, kernel.configs(problem)[0], given | {"initial.state": turned}, out)
    assert {module for module, _ in compiled} == {"delta_step"} and len(compiled) == 2
    check(compiled, dtype)


# What each kernel of a primitive is given, by axes: what it must have, what it may have, and how it is asked.
TOKEN = {"q": "NTGK", "k": "NTGK", "v": "NTHV", "beta": "NTH"}
GIVEN: dict[str, tuple[dict[str, str], dict[str, str], tuple[str, ...]]] = {
    "ham_step": (
        TOKEN
        | {"attn_q": "NTGK", "attn_k": "NTGK", "attn_v": "NTHV", "recurrence": "NHKV", "keys": "NMGK"}
        | {"values": "NMHV", "count": "N", "window_keys": "NMGK", "window_values": "NMHV", "window_marks": "NM"},
        {"log_decay": "NTH", "gate_rnn": "NTH", "gate_kv": "NTH", "score": "NT", "kept": "NT", "threshold": ""},
        ("cosine all 1 1 0.5 1.0", "beta_l2 head 0 0 0.5 1.0", "given all 1 1 0.5 1.0"),
    ),
    "memory_step": (
        {"q": "NTGK", "k": "NTGK", "y": "NTHV", "online": "NHKV", "kept": "NSHKV", "pooled": "NSHK", "key_sum": "NHK"}
        | {"tokens": "N", "segments": "N"},
        {"memory_query": "NTHK"},
        ("gated mean 4 4 1", "sparse sum 4 2 0", "residual mean 4 4 0"),
    ),
    "ttt_mlp_step": (
        {"q": "NTGK", "k": "NTGK", "v": "NTHK", "beta": "NTH", "weight1": "NHKF", "bias1": "NHF", "weight2": "NHFK"}
        | {"bias2": "NHK", "weight1_sum": "NHKF", "bias1_sum": "NHF", "weight2_sum": "NHFK", "bias2_sum": "NHK"}
        | {"phase": "N"},
        {"norm_weight": "HK", "norm_bias": "HK", "token_scale": "C"},
        ("16",),
    ),
}
HALF = ("q", "k", "v", "attn_q", "attn_k", "attn_v", "keys", "values", "window_keys", "window_values", "y")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GIVEN)
def test_ptx_of_primitives(name: str, dtype: str, compiled: dict[Any, dict[str, str]]) -> None:
    """A token by the kernels that compositions call: in every way in bfloat16, for time in one way in other dtypes."""
    from importlib import import_module

    primitive, kernel = import_module(f"mixers.{name}").PRIMITIVE, home.backend.primitives()[name]
    sizes = {"N": 2, "T": 1, "G": 2, "H": 4, "K": 64, "V": 64, "M": 4, "S": 3, "F": 256, "C": 16}
    least, more, settings = GIVEN[name]

    def array(argument: str, axes: dict[str, str]) -> Any:
        if argument not in axes:
            return None
        counter, wide = argument in primitive.fixed, dtype if argument in HALF or dtype == "float64" else "float32"
        kind = "int32" if counter else "bool" if argument == "kept" else wide
        return torch.zeros([sizes[axis] for axis in axes[argument]], dtype=getattr(torch, kind))

    whole = dtype == "bfloat16"
    for how in settings if whole else settings[:1]:
        bare = whole and not how.startswith(("given", "gated", "sparse"))
        for axes in (least, least | more) if bare else (least | more,):
            x, fixed = ([array(n, axes) for n in names] for names in (primitive.takes, primitive.fixed))
            kernel.forward(tuple(x), tuple(fixed), 1.0, how)
    check(compiled, dtype)
