"""One pair of ``torch.library`` operators per mixer, so that ``torch.compile`` sees a single node.

    mixers::<name>_<fields>(inputs, parameters, first state, offsets, key) -> results

The schema comes from the spec; the key is a string that names the mixer and its flags. What is traced is shape checks
and the operator; the problem, the choice of a kernel and everything that depends on a length live inside it, at run
time. How a plan runs on tensors, where they are or on the host, is here too.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from mixers.arrays import library_of
from mixers.arrays.numpy import fill_first_state, first_state_of, run_backward, run_forward
from mixers.call import Call
from mixers.mixer import Mixer, from_key
from mixers.packing import check_offsets
from mixers.plan import Plan
from mixers.problem import Arrays, Flags, Problem, outputs
from mixers.spec import Array, MixerSpec, Sizes

_NO_SECOND = (
    "{name}: its kernels have a first derivative only; take backend='reference' where gradients of gradients are needed"
)

DTYPE_NAMES = {
    getattr(torch, name): name for name in ("float64", "float32", "bfloat16", "float16", "int32", "int64", "bool")
}

Function = TypeVar("Function", bound=Callable[..., Any])

# Whether a backward follows, in an operator's key: the forward keeps what it needs, or it computes that again.
_KEEP, _RECOMPUTE = 1, 2


def operator_key(mixer: Mixer, call: Call, grad: bool) -> str:
    """What an operator is told beside its tensors."""
    # Host kernels keep states; those of a GPU never do.
    kept = _RECOMPUTE if mixer.recomputes or call.x["q"].device.type != "cpu" else _KEEP
    return f"{kept if grad else 0}|{int(call.flags.state)}|{call.flags.checkpoint_every}|{mixer.key}"


def constant(function: Function) -> Function:
    """As ``torch.compiler.assume_constant_result``, which imports the compiler: two seconds before a first call."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def runs_on_reference(mixer: Mixer, call: Call) -> bool:
    """Whether no kernel serves tensors like these; decided from widths, dtype and device alone."""
    if mixer.backend != "auto":
        return mixer.backend == "reference"
    q, v, s = call.x["q"], call.x["v"], call.sizes
    return not _has_kernel(mixer.key, str(q.dtype), q.device.type, s.K, v.shape[-1], call.flags.checkpoint_every)


@constant
def _has_kernel(key: str, dtype: str, device: str, key_dim: int, value_dim: int, checkpoint_every: int) -> bool:
    return _find_kernel(key, dtype, device, key_dim, value_dim, checkpoint_every)


@functools.lru_cache(maxsize=4096)
def _find_kernel(key: str, dtype: str, device: str, key_dim: int, value_dim: int, checkpoint_every: int) -> bool:
    """Ask the backends about a small call of these widths."""
    mixer = from_key(key)
    spec, options = mixer.spec, mixer.options
    problem = Problem.of(
        spec,
        options,
        Sizes(B=1, T=2, G=1, H=1, K=key_dim, V=value_dim, N=1, C=spec.chunk(options)),
        Flags(checkpoint_every=checkpoint_every),
        layouts=tuple((a.name, " ".join(a.layouts[0])) for a in (*spec.inputs[3:], *spec.parameters)),
        dtype=dtype.removeprefix("torch."),
        library="torch",
        device=device,
    )
    return mixer.plan(problem).kernel is not None


def argument_names(spec: MixerSpec, options: Any) -> list[str]:
    fields = spec.state(options).fields
    return [*(a.name for a in (*spec.inputs, *spec.parameters)), *(f"initial.{f.name}" for f in fields), "offsets"]


def result_names(spec: MixerSpec, options: Any) -> list[str]:
    fields = spec.state(options).fields
    kept = (f"kept.{f.name}" for f in spec.kept(options))
    return ["y", *(f"final.{f.name}" for f in fields), *(f"checkpoint.{f.name}" for f in fields), *kept]


def gradient_names(spec: MixerSpec, options: Any) -> list[str]:
    """Inputs that have a gradient."""
    counters = {f"initial.{f.name}" for f in spec.state(options).fields if f.counter}
    return [name for name in argument_names(spec, options)[:-1] if name not in counters]


def tensors_of(spec: MixerSpec, options: Any, x: Arrays) -> list[Array]:
    return [x.get(name) for name in argument_names(spec, options)]


@functools.lru_cache(maxsize=4096)
def decode_key(key: str) -> tuple[Mixer, Flags]:
    grad, state, every, mixer_key = key.split("|", 3)
    mixer = from_key(mixer_key)
    flags = mixer.flags(grad != "0", state == "1", int(every))
    return mixer, dataclasses.replace(flags, recompute=int(grad) == _RECOMPUTE)


def _sizes(spec: MixerSpec, options: Any, x: Arrays) -> Sizes:
    """Sizes of validated tensors; they may be symbolic."""
    bound: dict[str, Any] = {}
    for arg in spec.inputs:
        tensor = x[arg.name]
        if tensor is not None:
            layout = next(layout for layout in arg.layouts if len(layout) == tensor.ndim)
            bound.update(zip(layout, tensor.shape, strict=True))
    for f in spec.state(options).fields:
        tensor = x[f"initial.{f.name}"]
        if tensor is not None and "M" in f.axes.split():
            bound["M"] = tensor.shape[f.axes.split().index("M")]
    offsets = x["offsets"]
    return Sizes(
        B=bound["B"],
        T=bound["T"],
        G=bound["G"] if "G" in bound else bound["H"],
        H=bound["H"] if "H" in bound else bound["G"],
        K=bound["K"],
        V=bound.get("V", bound["K"]),
        N=bound["B"] if offsets is None else offsets.shape[0] - 1,
        C=spec.chunk(options),
        M=bound.get("M", 0),
    )


def _names(spec: MixerSpec, options: Any, arguments: Sequence[Any]) -> Arrays:
    return dict(zip(argument_names(spec, options), arguments, strict=True))


def _parts(arguments: Sequence[Any]) -> tuple[Mixer, Flags, Arrays, Sizes]:
    """What an operator's arguments mean."""
    *tensors, key = arguments
    mixer, flags = decode_key(key)
    x = _names(mixer.spec, mixer.options, tensors)
    return mixer, flags, x, _sizes(mixer.spec, mixer.options, x)


def _forward(*arguments: Any) -> tuple[Array, ...]:
    """Run a kernel: what the forward operator does on real tensors."""
    mixer, flags, x, sizes = _parts(arguments)
    problem, plan = _chosen(mixer, flags, x, sizes)
    out = forward_here(plan, problem, x) if takes_tensors(plan) else forward_on_host(plan, problem, x)
    names = result_names(mixer.spec, mixer.options)
    return tuple(out[n] if n in out else x["q"].new_empty(0, dtype=torch.float32) for n in names)


def _chosen(mixer: Mixer, flags: Flags, x: Arrays, sizes: Sizes) -> tuple[Problem, Plan]:
    """The problem of real tensors, and its plan; offsets are checked where they are on the host."""
    if x["offsets"] is not None and x["offsets"].device.type == "cpu":
        check_offsets(x["offsets"].numpy(), sizes.T)
    problem = Call(mixer.spec, mixer.options, library_of(x["q"], "q"), x, sizes, flags).problem()
    return problem, mixer.plan(problem, again=torch._C._current_graph_task_id() != -1)


def takes_tensors(plan: Plan) -> bool:
    return plan.kernel is not None and plan.kernel.arrays in ("torch", "any")


_AS_IT_IS = contextlib.nullcontext()


def current_device(tensor: Array) -> Any:
    """The tensor's GPU as the current one, which is where kernels are launched."""
    device = tensor.device
    if device.type != "cuda" or device.index == torch._C._cuda_getDevice():
        return _AS_IT_IS
    return torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]


Blank = list[tuple[str, tuple[int, ...], Any]]


def blank_outputs(problem: Problem) -> Blank:
    """Name, shape and dtype of every tensor that a forward fills."""
    return [(name, shape, getattr(torch, dtype)) for name, (shape, dtype) in problem.outputs().items()]


def forward_here(plan: Plan, problem: Problem, x: Arrays) -> Arrays:
    """A kernel that takes tensors, where they are."""
    return fill_here(plan, problem, with_first_state(problem, x), blank_outputs(problem))


def fill_here(plan: Plan, problem: Problem, x: Arrays, blank: Blank) -> Arrays:
    """The same for tensors among which is a first state."""
    device = x["q"].device
    out = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape, dtype in blank}
    with current_device(x["q"]):
        plan.forward(problem, x, out)
    return out


def backward_here(plan: Plan, problem: Problem, x: Arrays, out: Arrays, dout: Arrays) -> Arrays:
    """Gradients of every floating tensor that was given, in its own dtype."""
    given = {n: t for n, t in x.items() if t is not None and t.is_floating_point()}
    dx = {n: torch.empty_like(t, memory_format=torch.contiguous_format) for n, t in given.items()}
    with current_device(x["q"]):
        plan.backward(problem, with_first_state(problem, x), out, dout, dx)
    return dx


def with_first_state(problem: Problem, x: Arrays) -> Arrays:
    """The tensors, with the spec's first state wherever the caller gave none."""
    fields = problem.spec.state(problem.option).fields
    if x.get(f"initial.{fields[0].name}") is not None:
        return x
    first = _first_state(problem.spec, problem.options, problem.widths, problem.compute_dtype, x["q"].device)
    found = zip(fields, first, strict=True)
    return x | {f"initial.{f.name}": t.expand(problem.sizes.N, *t.shape) for f, t in found}


@functools.lru_cache(maxsize=64)
def _first_state(
    spec: MixerSpec, options: Any, widths: tuple[int, int, int, int], dtype: str, device: Any
) -> tuple[Array, ...]:
    """The first state of one sequence, copied to a device once: a call that does so could be captured in no graph."""
    with torch.inference_mode(False):
        return tuple(torch.from_numpy(a).to(device) for a in first_state_of(spec, options, widths, dtype))


def forward_on_host(plan: Plan, problem: Problem, x: Arrays) -> Arrays:
    """A kernel that takes NumPy arrays."""
    out, shapes, dtype = run_forward(plan, problem, _hand_over(problem, x)), problem.outputs(), x["q"].dtype
    tensors = {name: torch.from_numpy(a) for name, a in out.items()}
    return {name: t.to(dtype) if shapes[name][1] == "bfloat16" else t for name, t in tensors.items()}


def _hand_over(problem: Problem, x: Arrays) -> Arrays:
    """The tensors as NumPy arrays in the working dtype; no copy where none is needed."""
    working = getattr(torch, problem.compute_dtype)
    host = {
        name: None if t is None else (t.to(working) if t.is_floating_point() else t).detach().numpy()
        for name, t in x.items()
    }
    host = {name: a for name, a in host.items() if a is not None or not name.startswith("initial.")}
    fill_first_state(problem.spec, problem.option, problem.sizes, host, problem.compute_dtype)
    return host


def _as_host(tensor: Array, working: torch.dtype) -> np.ndarray:
    """A tensor as a NumPy array, in the working dtype unless it counts something."""
    array: np.ndarray = (tensor.to(working) if tensor.is_floating_point() else tensor).detach().numpy()
    return array


def _fake(*arguments: Any) -> tuple[Array, ...]:
    """Shapes of the forward operator's results."""
    mixer, flags, x, sizes = _parts(arguments)
    spec, options, q = mixer.spec, mixer.options, x["q"]
    shapes = outputs(spec, options, sizes, flags, DTYPE_NAMES[q.dtype])
    results = []
    for name in result_names(spec, options):
        shape, dtype = shapes.get(name, ((0,), "float32"))
        results.append(q.new_empty(shape, dtype=getattr(torch, dtype)))
    return tuple(results)


def _save(ctx: Any, inputs: Sequence[Any], output: Sequence[Array]) -> None:
    """Keep the inputs, what the forward kept, and the output where the backward reads it."""
    *tensors, key = inputs
    mixer, _ = decode_key(key)
    names = result_names(mixer.spec, mixer.options)
    kept = [t for name, t in zip(names, output, strict=True) if name.startswith("kept.")]
    ctx.key = key
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *kept, output[0] if mixer.spec.keeps_output else None)


def _autograd(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
    """Call the backward operator with what was kept and the gradients that arrived."""
    mixer, _ = decode_key(ctx.key)
    spec, options = mixer.spec, mixer.options
    names = result_names(spec, options)
    wanted = [g for name, g in zip(names, gradients, strict=True) if not name.startswith("kept.")]
    results = operators[operator_name(spec, options) + "_backward"](*ctx.saved_tensors, *wanted, ctx.key)
    by_name = dict(zip(gradient_names(spec, options), results, strict=True))
    arguments = argument_names(spec, options)
    needed = ctx.needs_input_grad
    return (*(by_name.get(name) if needed[i] else None for i, name in enumerate(arguments)), None)


def _backward_parts(arguments: Sequence[Any]) -> tuple[Mixer, Flags, Arrays, Arrays, Arrays, Sizes]:
    *tensors, key = arguments
    mixer, flags = decode_key(key)
    spec, options = mixer.spec, mixer.options
    take = iter(tensors)
    x = {name: next(take) for name in argument_names(spec, options)}
    results = result_names(spec, options)
    out = {name: next(take) for name in (*(n for n in results if n.startswith("kept.")), "y")}
    dout = {name: next(take) for name in results if not name.startswith("kept.")}
    return mixer, flags, x, out, dout, _sizes(spec, options, x)


def _backward(*arguments: Any) -> tuple[Array, ...]:
    """Run a kernel's backward: what the backward operator does on real tensors."""
    mixer, flags, x, out, dout, sizes = _backward_parts(arguments)
    problem, plan = _chosen(mixer, flags, x, sizes)
    # What was not asked for is empty, and so is the gradient that tracing makes up for it.
    asked = problem.outputs()
    dout = {name: t if name in asked else None for name, t in dout.items()}
    backward = backward_here if takes_tensors(plan) else backward_on_host
    dx, names = backward(plan, problem, x, out, dout), gradient_names(mixer.spec, mixer.options)
    return tuple(dx[n] if n in dx else x["q"].new_empty(0) for n in names)


def backward_on_host(plan: Plan, problem: Problem, x: Arrays, out: Arrays, dout: Arrays) -> Arrays:
    """Gradients by a kernel that takes NumPy arrays."""
    working = getattr(torch, problem.compute_dtype)
    dx = run_backward(
        plan,
        problem,
        _hand_over(problem, x),
        *({name: None if t is None else _as_host(t, working) for name, t in of.items()} for of in (out, dout)),
    )
    return {name: torch.from_numpy(g).to(x[name].dtype) for name, g in dx.items() if x[name] is not None}


def _backward_fake(*arguments: Any) -> tuple[Array, ...]:
    """Shapes of the backward operator's results: those of the inputs."""
    mixer, _, x, _, _, _ = _backward_parts(arguments)
    names = gradient_names(mixer.spec, mixer.options)
    return tuple(
        x["q"].new_empty(0) if x[n] is None else torch.empty_like(x[n], memory_format=torch.contiguous_format)
        for n in names
    )


# A state's fields depend on options (Lattice's chunks carry more than its exact form), so each layout of a state has an
# operator of its own. They are defined when a mixer is made: never while something is traced.
operators: dict[str, Any] = {}


def operator_name(spec: MixerSpec, options: Any) -> str:
    """The name of a mixer's forward operator, in the namespace ``mixers``."""
    return f"{spec.name}_{len(spec.state(options).fields)}"


def define_operators(spec: MixerSpec, options: Any) -> None:
    """Define a mixer's forward and backward operators, once."""
    name = operator_name(spec, options)
    if name in operators:
        return
    inputs, results = _schema(spec, options), result_names(spec, options)
    forward = _define(name, _forward, inputs, len(results), _fake)
    forward.register_autograd(_autograd, setup_context=_save)

    kept = [n for n in results if n.startswith("kept.")]
    extra = [*kept, "y", *("d" + n for n in results if not n.startswith("kept."))]
    inputs += "".join(f", Tensor? {_identifier(n)}" for n in extra)
    backward = _define(f"{name}_backward", _backward, inputs, len(gradient_names(spec, options)), _backward_fake)
    backward.register_autograd(functools.partial(_refuse_second, spec.name))


def _define(name: str, function: Any, inputs: str, results: int, fake: Any) -> Any:
    schema = f"({inputs}, str key) -> ({', '.join(['Tensor'] * results)})"
    op = torch.library.custom_op(f"mixers::{name}", function, mutates_args=(), schema=schema)
    op.register_fake(fake)
    operators[name] = op._opoverload
    return op


def _refuse_second(name: str, ctx: Any, *gradients: Any) -> None:
    raise RuntimeError(_NO_SECOND.format(name=name))


def _schema(spec: MixerSpec, options: Any) -> str:
    return ", ".join(
        f"Tensor{'' if name in ('q', 'k', 'v') else '?'} {_identifier(name)}" for name in argument_names(spec, options)
    )


def _identifier(name: str) -> str:
    return name.replace(".", "_")
