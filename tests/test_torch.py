"""torch tensors: one operator a mixer, gradients, ``torch.compile``, and what is refused in words."""

import copy
import dataclasses
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import mixers  # noqa: E402
from mixers.backend import Kernel, Place, Support, installed  # noqa: E402
from mixers.cases import Setting, draw  # noqa: E402
from mixers.problem import Arrays, Problem  # noqa: E402

# Every mixer, in each layout of its state that has an operator of its own.
MIXERS = [
    (name, options)
    for name in mixers.names()
    if mixers.get_spec(name).specialise is None
    and mixers.get_spec(name).compose is None  # a composition has the operators of its parts
    for options in ({}, {"chunk_size": 4})
    if set(options) <= {o.name for o in mixers.get_spec(name).options}
]
IDS = ["-".join([name, *map(str, options.values())]) for name, options in MIXERS]
each_mixer = pytest.mark.parametrize(("name", "options"), MIXERS, ids=IDS)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A token's operations are small: more threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Kernels of our own: what is tested here is the bridge, with kernels that need no compiler.


class Loop(Kernel):
    """Any mixer: the reference, differentiated by torch."""

    name, form, arrays = "loop", "recurrent", "numpy"
    mixers = frozenset(mixers.names())

    def supports(self, problem: Problem) -> Support:
        return Support.yes()

    def configs(self, problem: Problem) -> tuple[dict[str, int], ...]:
        return ({},)

    def forward(self, problem: Problem, config: Any, x: Arrays, out: Arrays) -> None:
        found = self.run(problem, {n: None if a is None else torch.from_numpy(np.array(a)) for n, a in x.items()})
        for name, a in out.items():
            a[...] = 0 if name.startswith("kept.") else found[name]

    def backward(self, problem: Problem, config: Any, x: Arrays, out: Arrays, dout: Arrays, dx: Arrays) -> None:
        """In a thread of its own: torch records nothing inside of an operator."""
        with ThreadPoolExecutor(1) as pool:
            gradients = pool.submit(self.differentiate, problem, x, list(dx), dout).result()
        for name, gradient in zip(dx, gradients, strict=True):
            dx[name][...] = 0 if gradient is None else gradient

    def differentiate(self, problem: Problem, x: Arrays, wanted: list[str], dout: Arrays) -> Any:
        leaves = {n: torch.from_numpy(np.array(x[n])).requires_grad_() for n in wanted}
        rest = {n: None if a is None else torch.from_numpy(np.array(a)) for n, a in x.items() if n not in wanted}
        found = self.run(problem, leaves | rest)
        given = {n: torch.from_numpy(np.array(g)) for n, g in dout.items() if g is not None and found[n].requires_grad}
        return torch.autograd.grad(
            [found[n] for n in given], list(leaves.values()), list(given.values()), allow_unused=True
        )

    def run(self, problem: Problem, x: Arrays) -> Arrays:
        from mixers import reference
        from mixers.arrays.torch import library

        found = reference.forward(library, problem.spec, problem.option, problem.sizes, problem.flags, x)
        return {n: a for n, a in found.items() if n in problem.outputs()}


class Spy(Loop):
    """Copies v to y and remembers its arrays."""

    mixers = frozenset({"delta_rule"})

    def __init__(self) -> None:
        self.forwards: list[Arrays] = []
        self.outputs: list[Arrays] = []
        self.backwards: list[tuple[Arrays, Arrays]] = []

    def forward(self, problem: Problem, config: Any, x: Arrays, out: Arrays) -> None:
        self.forwards.append(x)
        self.outputs.append(out)
        for name, a in out.items():
            a[...] = x["v"] if name == "y" else 0

    def backward(self, problem: Problem, config: Any, x: Arrays, out: Arrays, dout: Arrays, dx: Arrays) -> None:
        self.backwards.append((x, dout))
        for name, a in dx.items():
            a[...] = dout["y"] if name == "v" else 0


class OneKernel:
    """A backend with one kernel."""

    summary, preference, recomputes = "for these tests", -1, False
    place = Place(("torch",), ("cpu",))

    def __init__(self, name: str, kernel: Kernel) -> None:
        self.name, self.kernel = name, kernel

    def status(self) -> Support:
        return Support.yes()

    def kernels(self) -> tuple[Kernel, ...]:
        return (self.kernel,)


@pytest.fixture(autouse=True)
def spy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spy]:
    """Kernels behind ``backend="loop"`` and ``backend="spy"``; the latter is returned."""
    from mixers import mixer as module
    from mixers.arrays import torch as bridge

    kernel = Spy()
    everything = installed() | {"loop": OneKernel("loop", Loop()), "spy": OneKernel("spy", kernel)}
    monkeypatch.setattr("mixers.autotune.policy.installed", lambda: everything)
    yield kernel
    for key in [key for key, mix in module._from_key.items() if mix.backend in ("loop", "spy")]:
        del module._from_key[key]
    bridge._decode_key.cache_clear()


def inputs(
    name: str, options: Any = None, batch: int = 2, tokens: int = 7, dtype: str = "float64", **sizes: int
) -> Any:
    """Arguments of a call: leaves that want gradients."""
    spec = mixers.get_spec(name)
    width = 4 if spec.arg("v").layouts[0][-1] == "V" else 3
    arrays = tuple((a.name, " ".join(a.layouts[0])) for a in spec.inputs)
    setting = Setting(spec, tuple((options or {}).items()), arrays, 1, 2, 3, width, (tokens,) * batch)
    setting = dataclasses.replace(setting, **sizes)
    wide = "float64" if dtype == "float64" else "float32"
    return {
        n: torch.from_numpy(a).to(getattr(torch, dtype if n in ("q", "k", "v") else wide)).requires_grad_()
        for n, a in draw(setting, dtype).items()
    }


def flat(result: mixers.Result) -> tuple[torch.Tensor, ...]:
    """The floating outputs."""
    state = result.state if isinstance(result.state, tuple) else (result.state,)
    return tuple(a for a in (result.y, *state) if a.is_floating_point())


@each_mixer
def test_gradcheck(name: str, options: dict[str, Any]) -> None:
    mix, x = mixers.get(name, backend="loop", **options), inputs(name, options, batch=1)
    names = list(x)

    def run(*arrays: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return flat(mix(**dict(zip(names, arrays, strict=True))))

    assert torch.autograd.gradcheck(run, tuple(x.values()), atol=1e-6, rtol=1e-4, fast_mode=True)


@each_mixer
def test_opcheck(name: str, options: dict[str, Any]) -> None:
    """torch's own checks of an operator: schema, fakes, autograd, tracing with symbolic sizes."""
    from mixers.arrays import torch as bridge

    mix, x = mixers.get(name, backend="loop", **options), inputs(name, options)
    layout = mix.spec.state(mix.options)
    state = mix.init_state(2, 2, 3, x["v"].shape[-1], key_heads=1, like=x["q"])
    parts = state if isinstance(state, tuple) else (state,)
    named = x | {f"initial.{f.name}": a for f, a in zip(layout.fields, parts, strict=True)}
    arguments = [named.get(n) for n in bridge._argument_names(mix.spec, mix.options)]
    op = bridge._operators[bridge.operator_name(mix.spec, mix.options)]
    torch.library.opcheck(op, (*arguments, f"1|1|0|{mix.key}"))


@each_mixer
def test_compile_without_a_graph_break_or_a_second_compilation(name: str, options: dict[str, Any]) -> None:
    """A new length from 2 up and a new batch run what was compiled for others."""
    mix = mixers.get(name, backend="loop", **options)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()

    def loss(x: dict[str, torch.Tensor]) -> torch.Tensor:
        y, _ = mix(**x)
        return (y * y).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    # The first sizes differ from all others: torch takes equal numbers for the same size.
    for batch, tokens in ((6, 7), (3, 5), (2, 2), (5, 11)):
        x = inputs(name, options, batch, tokens)
        compiled(x).backward()
        found = {n: a.grad.clone() for n, a in x.items()}
        again = {n: a.detach().requires_grad_() for n, a in x.items()}
        loss(again).backward()
        for n in x:
            torch.testing.assert_close(found[n], again[n].grad)
    assert counters["stats"]["unique_graphs"] == 1, dict(counters["recompiles"])
    assert not counters["graph_break"]


def test_compile_automatic_dynamic_shapes() -> None:
    """As most people call it: one compilation for the first sizes, one for all others."""
    mix = mixers.get("delta_rule", backend="loop")
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = torch.compile(lambda x: mix(**x)[0].sum(), fullgraph=True, backend="aot_eager")
    for batch, tokens in ((2, 7), (3, 5), (2, 9), (4, 33), (6, 3)):
        compiled(inputs("delta_rule", batch=batch, tokens=tokens)).backward()
    assert counters["stats"]["unique_graphs"] <= 3
    assert not counters["graph_break"]


def test_compiled_step_and_packs() -> None:
    mix = mixers.get("gated_delta_rule", backend="loop")
    x = {n: a.detach() for n, a in inputs("gated_delta_rule", batch=1, tokens=9).items()}
    pack = mixers.pack([4, 0, 5])
    wanted = mix(**x, cu_seqlens=pack)
    run = torch.compile(
        lambda x: tuple(mix(**x, cu_seqlens=torch.tensor([0, 4, 4, 9]))), fullgraph=True, backend="aot_eager"
    )
    for a, b in zip(run(x), wanted, strict=True):
        torch.testing.assert_close(a, b)
    token = {n: a[:, 0] for n, a in x.items()}
    step = torch.compile(lambda x, s: tuple(mix.step(**x, state=s)), fullgraph=True, backend="aot_eager")
    state = mix.init_state(1, 2, 3, 4, like=x["q"])
    for a, b in zip(step(token, state), mix.step(**token, state=state), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@each_mixer
def test_half_precision_with_float32_gates(name: str, options: dict[str, Any], dtype: str) -> None:
    """The normal call of a trained model."""
    mix, x = mixers.get(name, backend="loop", **options), inputs(name, options, dtype=dtype)
    result = mix(**x)
    assert result.y.dtype == getattr(torch, dtype)
    fields = mix.spec.state(mix.options).fields
    for f, a in zip(fields, result.state if isinstance(result.state, tuple) else (result.state,), strict=True):
        wanted = torch.int32 if f.counter else getattr(torch, dtype) if f.verbatim else torch.float32
        assert a.dtype == wanted, f.name
    result.y.float().sum().backward()
    for n, a in x.items():
        assert a.grad.dtype == a.dtype
        assert torch.isfinite(a.grad).all(), n


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nothing_is_copied_on_the_way_to_a_kernel(spy: Spy, dtype: str) -> None:
    mix, x = mixers.get("delta_rule", backend="spy"), inputs("delta_rule", dtype=dtype)
    state = torch.zeros(2, 2, 3, 4, dtype=getattr(torch, dtype))
    y, _ = mix(**x, initial_state=state)
    dy = torch.randn_like(y)
    y.backward(dy)
    for seen in (spy.forwards[0], spy.backwards[0][0]):
        for n, a in x.items():
            assert np.shares_memory(seen[n], a.detach().numpy()), n
        assert np.shares_memory(seen["initial.state"], state.numpy())
    assert np.shares_memory(spy.backwards[0][1]["y"], dy.numpy())


def test_strided_tensors_are_not_copied_either(spy: Spy) -> None:
    x = {n: a.detach() for n, a in inputs("delta_rule", tokens=8).items()}
    head_first = {n: a.transpose(1, 2).contiguous().transpose(1, 2) for n, a in x.items()}
    mixers.get("delta_rule", backend="spy")(**head_first)
    for n, a in head_first.items():
        assert np.shares_memory(spy.forwards[0][n], a.numpy()), n
        assert not spy.forwards[0][n].flags.c_contiguous or min(a.shape) == 1


def test_a_kernel_computes_in_float32_where_inputs_are_half(spy: Spy) -> None:
    mix = mixers.get("delta_rule", backend="spy")
    mix(**inputs("delta_rule", dtype="bfloat16")).y.sum().backward()
    x, dout = spy.backwards[0]
    assert {str(a.dtype) for n, a in x.items() if a is not None} == {"float32"}
    assert dout["y"].dtype == np.float32


def test_nothing_is_kept_where_no_gradient_will_be_asked_for(spy: Spy) -> None:
    mix, x = mixers.get("delta_rule", backend="spy"), inputs("delta_rule")
    with torch.no_grad():
        assert mix(**x).y.grad_fn is None
    assert mix(**{n: a.detach() for n, a in x.items()}).y.grad_fn is None
    assert mix(**x).y.grad_fn is not None
    assert ["kept.state" in out for out in spy.outputs] == [False, False, True]


def test_outputs_that_nothing_flows_back_to_are_none(spy: Spy) -> None:
    mix, x = mixers.get("delta_rule", backend="spy"), inputs("delta_rule")
    mix(**x).y.sum().backward()
    assert spy.backwards[0][1]["final.state"] is None


# What is refused in words.


def test_torch_func_is_refused(spy: Spy) -> None:
    mix, x = mixers.get("delta_rule", backend="spy"), inputs("delta_rule")
    rest = {n: a.detach() for n, a in x.items() if n != "q"}
    with pytest.raises(RuntimeError, match=r"delta_rule: torch\.func .*backend='reference'.*torch\.autograd\.grad"):
        torch.func.grad(lambda q: mix(q, **rest).y.sum())(x["q"].detach())


def test_the_reference_has_torch_func() -> None:
    mix, x = mixers.get("delta_rule", backend="reference"), inputs("delta_rule")
    rest = {n: a.detach() for n, a in x.items() if n != "q"}
    got = torch.func.grad(lambda q: mix(q, **rest).y.sum())(x["q"].detach())
    mix(**x).y.sum().backward()
    torch.testing.assert_close(got, x["q"].grad)


@each_mixer
def test_kernels_refuse_a_second_derivative_and_the_reference_has_it(name: str, options: dict[str, Any]) -> None:
    x = inputs(name, options, batch=1, tokens=3)
    names = list(x)
    reference = mixers.get(name, backend="reference", **options)

    def run(*arrays: torch.Tensor) -> torch.Tensor:
        return reference(**dict(zip(names, arrays, strict=True)))[0]

    assert torch.autograd.gradgradcheck(run, tuple(x.values()), atol=1e-5, rtol=1e-3, fast_mode=True)

    kernel = mixers.get(name, backend="loop", **options)
    (first,) = torch.autograd.grad((kernel(**x).y ** 2).sum(), x["v"], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name}: .*first derivative only.*backend='reference'"):
        first.sum().backward()


def test_vjp_is_for_numpy() -> None:
    with pytest.raises(TypeError, match="vjp is for NumPy arrays; differentiate torch arrays with torch"):
        mixers.get("delta_rule").vjp(**inputs("delta_rule"))


# Results and mixers as values.


def test_results_are_pytrees_that_pickle_and_copy() -> None:
    from torch.utils import _pytree

    mix, x = mixers.get("lattice", backend="loop", chunk_size=4), inputs("lattice", {"chunk_size": 4})
    result = mix(**{n: a.detach() for n, a in x.items()}, checkpoint_every=3)
    leaves, spec = _pytree.tree_flatten(result)
    assert sum(leaf is not None for leaf in leaves) == 7
    again = _pytree.tree_unflatten(leaves, spec)
    for other in (again, pickle.loads(pickle.dumps(result)), copy.deepcopy(result), copy.copy(result)):
        assert type(other) is mixers.Result
        torch.testing.assert_close(other.y, result.y)
        torch.testing.assert_close(other.checkpoints.start, result.checkpoints.start)


def test_mixers_in_modules_pickle_and_copy(tmp_path: Any) -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = mixers.get("lattice", chunk_size=4)

    layer = Layer()
    assert copy.deepcopy(layer).mix == layer.mix
    assert pickle.loads(pickle.dumps(layer.mix)) == layer.mix


def test_checkpoints_have_gradients() -> None:
    mix, x = mixers.get("gla", backend="loop"), inputs("gla", tokens=9)
    result = mix(**x, checkpoint_every=4)
    assert result.checkpoints.shape[:2] == (2, 2)
    (got,) = torch.autograd.grad(result.checkpoints[:, 1].sum(), x["k"])
    short = {n: a.detach()[:, :8].requires_grad_() for n, a in x.items()}
    (wanted,) = torch.autograd.grad(mix(**short).state.sum(), short["k"])
    torch.testing.assert_close(got[:, :8], wanted)
    assert not got[:, 8:].any()


def test_a_shared_state_collects_the_gradients_of_all_sequences() -> None:
    mix, x = mixers.get("delta_rule", backend="loop"), inputs("delta_rule", batch=3)
    one = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    many = one.detach().expand(3, 2, 3, 4).clone().requires_grad_()
    (a,) = torch.autograd.grad(mix(**x, initial_state=one).y.sum(), one)
    (b,) = torch.autograd.grad(mix(**x, initial_state=many).y.sum(), many)
    torch.testing.assert_close(a, b.sum(0))


def test_activation_checkpointing_recomputes_the_same() -> None:
    from torch.utils.checkpoint import checkpoint

    mix, x = mixers.get("delta_rule", backend="loop"), inputs("delta_rule")
    checkpoint(lambda **x: mix(**x).y.sum(), use_reentrant=False, **x).backward()
    once = {n: a.grad.clone() for n, a in x.items()}
    for a in x.values():
        a.grad = None
    mix(**x).y.sum().backward()
    for n, a in x.items():
        torch.testing.assert_close(once[n], a.grad, rtol=0, atol=0)


@each_mixer
def test_numpy_and_torch_say_the_same(name: str, options: dict[str, Any]) -> None:
    """Arrays in decide arrays out."""
    x = {n: a.detach() for n, a in inputs(name, options).items()}
    mix = mixers.get(name, backend="reference", **options)
    on_torch, on_numpy = mix(**x), mix(**{n: a.numpy() for n, a in x.items()})
    assert type(on_torch.y) is torch.Tensor
    assert type(on_numpy.y) is np.ndarray
    np.testing.assert_allclose(on_torch.y.numpy(), on_numpy.y, rtol=0, atol=1e-10)


def test_calls_do_not_import_the_compiler() -> None:
    """``torch._dynamo`` takes two seconds, which nobody who does not compile should wait for."""
    program = (
        "import sys, torch, mixers\n"
        "x = {n: torch.ones(1, 4, 2, 8, requires_grad=True) for n in 'qkv'}\n"
        "mix = mixers.get('delta_rule', backend='reference')\n"
        "mix(**x, beta=torch.ones(1, 4, 2)).y.sum().backward()\n"
        "print('torch._dynamo' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False"]
