"""torch tensors: one pair of ``torch.library`` operators per mixer, so that ``torch.compile`` sees a single node.

The operator's schema comes from the spec: its inputs, parameters and first state as optional tensors, the offsets of a
pack, and one string that names the mixer and its flags. What is traced is shape checks and the operator; the problem,
the choice of a kernel and everything that depends on a length live inside it, at run time.

The reference takes another way: plain torch operations, differentiable any number of times.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import array_api_compat.torch as xp
import numpy as np
import torch

from mixers import reference
from mixers.arrays import torch_primitive
from mixers.arrays.numpy import fill_first_state as fill_host
from mixers.arrays.numpy import run_backward, run_forward
from mixers.backend import Pool
from mixers.call import Call
from mixers.mixer import Mixer, Plan, from_key
from mixers.packing import Pack, check_offsets
from mixers.primitive import Primitive
from mixers.problem import Arrays, Flags, Problem, outputs
from mixers.result import Result
from mixers.spec import Array, MixerSpec, Sizes

_NO_SECOND = (
    "{name}: its kernels have a first derivative only; take backend='reference' where gradients of gradients are needed"
)
_NO_FUNC = (
    "{name}: torch.func cannot differentiate its kernels; take backend='reference', or torch.autograd.grad, which can"
)


class Torch:
    """See ``mixers.arrays.Library``."""

    name = "torch"
    namespace = xp

    def dtype(self, array: Array) -> str:
        """The name of an array's dtype."""
        return _DTYPE_NAMES.get(array.dtype) or str(array.dtype).removeprefix("torch.")

    def device(self, array: Array) -> str:
        """The type of a tensor's device."""
        kind: str = array.device.type
        return kind

    def same_device(self, a: Array, b: Array) -> bool:
        """Type and index."""
        return bool(a.device == b.device)

    def expand(self, array: Array, shape: tuple[int, ...]) -> Array:
        """A view with stride 0; its gradient is summed."""
        return array.expand(shape)

    def cast(self, array: Array, dtype: str) -> Array:
        """The tensor itself where it has the dtype already."""
        return array.to(getattr(torch, dtype))

    def scan(self, step: Any, state: tuple[Array, ...], tokens: dict[str, Array]) -> tuple[Array, tuple[Array, ...]]:
        """A loop."""
        names, rows = list(tokens), zip(*(a.unbind(1) for a in tokens.values()), strict=True)
        outputs = []
        for row in rows:
            y, state = step(dict(zip(names, row, strict=True)), state)
            outputs.append(y)
        if isinstance(outputs[0], tuple):
            return tuple(torch.stack(column, dim=1) for column in zip(*outputs, strict=True)), state
        return torch.stack(outputs, dim=1), state

    def largest(self, counts: Array) -> int | None:
        """A Python number: on a GPU this waits for the device; unknown while traced or captured."""
        if _unknown(counts):
            return None
        return int(counts.max()) if counts.numel() else 0

    def first_nan(self, array: Array) -> tuple[int, ...] | None:
        """A position; never asked of a device that would have to be waited for, nor of what is traced."""
        if array.device.type != "cpu" or _unknown(array):
            return None
        where = torch.isnan(array.detach()).nonzero()
        return tuple(where[0].tolist()) if len(where) else None

    def host(self, counts: Array) -> np.ndarray | None:
        """The numbers: on a GPU this waits for the device; unknown while traced or captured."""
        if _unknown(counts):
            return None
        found: np.ndarray = counts.detach().cpu().numpy()
        return found

    def given(self, call: Call) -> Arrays:
        """The tensors, with the spec's first state wherever the caller gave none."""
        x = dict(call.x)
        if x["offsets"] is not None and x["offsets"].device.type == "cpu":
            check_offsets(x["offsets"].numpy(), call.sizes.T)
        fill_first_state(call.spec, call.options, call.sizes, x)
        return x

    def call(self, mixer: Mixer, **arguments: Any) -> Result:
        """A call."""
        return mixer(**arguments)

    def primitive(
        self, primitive: Primitive, of: Any, x: tuple[Array, ...], fixed: tuple[Array, ...], factor: float, how: str
    ) -> tuple[Array, ...] | None:
        """An operator of its own."""
        return torch_primitive.call(primitive, of, x, fixed, factor, how)

    def untraced(self, function: Any) -> Any:
        """The function as a break of the graph: how much is kept decides shapes."""
        return torch.compiler.disable(function)  # type: ignore[no-untyped-call]

    def bounds(self, offsets: Array) -> list[int]:
        """Python numbers: on a GPU this waits for the device."""
        numbers: list[int] = offsets.tolist()
        return numbers

    def offsets(self, given: Any, like: Array) -> tuple[Pack | None, Array, int]:
        """A pack, a tensor, or whole numbers on the host."""
        if isinstance(given, Pack):
            tensor = torch.from_numpy(given.offsets) if given.tensor is None else given.tensor
            if tensor.device != like.device:
                raise TypeError(
                    f"the pack is on {tensor.device} and q on {like.device}; make it with pack(…, device=q.device)"
                )
            return given, tensor, len(given)
        tensor = given if isinstance(given, torch.Tensor) else torch.as_tensor(given, device=like.device)
        if tensor.ndim != 1 or tensor.shape[0] < 2 or tensor.is_floating_point() or tensor.is_complex():
            raise ValueError(
                f"cu_seqlens has shape {tuple(tensor.shape)} and dtype {tensor.dtype}; expected whole numbers [N+1], "
                "or mixers.pack(lengths)"
            )
        if tensor.device != like.device:
            raise TypeError(f"cu_seqlens is on {tensor.device} and q on {like.device}; move them together")
        return None, tensor.to(torch.int64), tensor.shape[0] - 1

    def from_numpy(self, values: np.ndarray, dtype: str, like: Array) -> Array:
        """A tensor beside ``like``."""
        return torch.from_numpy(np.ascontiguousarray(values)).to(dtype=getattr(torch, dtype), device=like.device)

    def scatter(self, pools: tuple[Array, ...], state: tuple[Array, ...], where: Array, target: Array) -> None:
        """Write states into their slots."""
        for pool, values in zip(pools, state, strict=True):
            pool[target[where].long()] = values[where].to(pool.dtype)

    def decode(self, mixer: Mixer, call: Call, pool: Pool) -> Array | None:
        """One launch on the pool itself, where a kernel takes tensors so."""
        problem = call.problem()
        plan = mixer.plan_in_place(problem)
        if plan is None:
            return None
        q, (shape, dtype) = call.x["q"], problem.outputs()["y"]
        y = torch.empty(shape, dtype=getattr(torch, dtype), device=q.device)
        with torch.no_grad(), _device(q):
            plan.decode(problem, _with_first_state(problem, call.x), pool, y)
        return y

    def warmup(self, mixer: Mixer, call: Call, grad: bool) -> None:
        """Run once on detached inputs, backward too with ``grad``."""
        x = {name: None if a is None else a.detach() for name, a in call.x.items()}
        if grad:
            x = {n: a.requires_grad_() if a is not None and a.is_floating_point() else a for n, a in x.items()}
        out = self.run(mixer, dataclasses.replace(call, x=x))
        if grad:
            out["y"].sum().backward()

    def prepare(self, mixer: Mixer) -> None:
        """Define the mixer's operators; a composition has those of its parts."""
        if mixer.spec.compose is None:
            define_operators(mixer.spec, mixer.options)
        for arg in (*mixer.spec.inputs, *mixer.spec.parameters):
            arg.layouts  # noqa: B018  read once: a tracer does not follow a lock
        for primitive in mixer.spec.primitives:
            torch_primitive.define(primitive)

    def again(self, mixer: Mixer, x: Arrays, state: bool, checkpoint_every: int | None) -> Result | None:
        """A call in eager mode: its checks, problem and plan are those of the last one like it."""
        if torch.compiler.is_compiling() or _looks_on() is not None or _modes() or _functions() or _in_backward() != -1:
            return None  # a transformation, a mode, or a backward that computes a forward again
        tensors = [*x.values()]
        try:
            key = (
                state,
                checkpoint_every,
                torch.is_grad_enabled(),
                *x,
                *map(type, tensors),
                *[t.shape for t in tensors],
                *[t.dtype for t in tensors],
                *[t.device for t in tensors],
                *[t.requires_grad for t in tensors],
            )
        except AttributeError:  # something was left out, or is no tensor
            given = {name: t for name, t in x.items() if t is not None}
            return self.again(mixer, given, state, checkpoint_every) if len(given) < len(x) else None
        known = mixer.shortcuts()
        shortcut: Shortcut | None = known.get(key, _UNSEEN)
        if shortcut is _UNSEEN:
            shortcut = Shortcut.of(mixer, x, state, checkpoint_every)
            known = mixer.shortcuts()  # measuring makes everything new
            if len(known) >= 4096:
                known.clear()
            known[key] = shortcut
        return None if shortcut is None else shortcut(tensors)

    def run(self, mixer: Mixer, call: Call) -> Arrays:
        """The reference in plain torch, or the mixer's operator."""
        if runs_on_reference(mixer, call):
            return _run_reference(self, call)
        tensors = _tensors(call.spec, call.options, call.x)
        grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        if grad and not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
            raise RuntimeError(_NO_FUNC.format(name=call.spec.name))
        flags = call.flags
        # Host kernels keep states; those of a GPU never do.
        kept = _RECOMPUTE if mixer.recomputes or call.x["q"].device.type != "cpu" else _KEEP
        key = f"{kept if grad else 0}|{int(flags.state)}|{flags.checkpoint_every}|{mixer.key}"
        name = operator_name(call.spec, call.options)
        if name not in _operators:  # the mixer is older than the first import of torch
            define_operators(call.spec, call.options)
        results = _operators[name](*tensors, key)
        return dict(zip(_result_names(call.spec, call.options), results, strict=True))


def _unknown(array: Array) -> bool:
    """Whether there are no numbers yet: an array is traced, or its work captured in a graph."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return bool(array.device.type == "cuda" and torch.cuda.is_current_stream_capturing())


_DTYPE_NAMES = {
    getattr(torch, name): name for name in ("float64", "float32", "bfloat16", "float16", "int32", "int64", "bool")
}


# Whether a backward follows, in an operator's key: the forward keeps what it needs, or it computes that again.
_KEEP, _RECOMPUTE = 1, 2


def runs_on_reference(mixer: Mixer, call: Call) -> bool:
    """Whether no kernel serves tensors like these; decided from widths, dtype and device alone."""
    if mixer.backend != "auto":
        return mixer.backend == "reference"
    q, v, s = call.x["q"], call.x["v"], call.sizes
    return not _has_kernel(mixer.key, str(q.dtype), q.device.type, s.K, v.shape[-1], call.flags.checkpoint_every)


def _has_kernel(key: str, dtype: str, device: str, key_dim: int, value_dim: int, checkpoint_every: int) -> bool:
    return _find_kernel(key, dtype, device, key_dim, value_dim, checkpoint_every)


# As ``torch.compiler.assume_constant_result`` does, which imports the compiler: two seconds before a first call.
_has_kernel._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=4096)
def _find_kernel(key: str, dtype: str, device: str, key_dim: int, value_dim: int, checkpoint_every: int) -> bool:
    """Ask the backends about a small call of these widths."""
    mixer = from_key(key)
    spec, options = mixer.spec, mixer.options
    problem = Problem.of(
        spec,
        options,
        Sizes(B=1, T=2, G=1, H=1, K=key_dim, V=value_dim, N=1, C=options.get("chunk_size", 1)),
        Flags(checkpoint_every=checkpoint_every),
        layouts=tuple((a.name, " ".join(a.layouts[0])) for a in (*spec.inputs[3:], *spec.parameters)),
        dtype=dtype.removeprefix("torch."),
        library="torch",
        device=device,
    )
    return mixer.plan(problem).kernel is not None


def _run_reference(library: Torch, call: Call) -> Arrays:
    x = dict(call.x)
    if x["offsets"] is not None and x["offsets"].device.type == "cpu":
        check_offsets(x["offsets"].numpy(), call.sizes.T)
    fill_first_state(call.spec, call.options, call.sizes, x)
    return reference.forward(library, call.spec, call.options, call.sizes, call.flags, x)


def fill_first_state(spec: MixerSpec, options: Any, sizes: Sizes, x: Arrays) -> None:
    """Name the spec's first state wherever the caller gave none."""
    fields = spec.state(options).fields
    if x.get(f"initial.{fields[0].name}") is not None:
        return
    q = x["q"]
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    for f, first in zip(fields, spec.first(sizes, options), strict=True):
        tensor = torch.as_tensor(np.array(first), dtype=torch.int32 if f.counter else compute, device=q.device)
        x[f"initial.{f.name}"] = tensor.expand(sizes.N, *tensor.shape)


# Whoever looks on while tensors are computed with.
_looks_on = torch._C._functorch.peek_interpreter_stack
_modes, _functions = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_in_backward = torch._C._current_graph_task_id
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_UNSEEN: Any = object()


class Shortcut:
    """An eager call whose checks are done: the kernel itself, or one node of autograd around it.

    Operators cost as much again as the rest of a small call; they are for what is traced.
    """

    def __init__(self, names: list[str], problem: Problem, plan: Plan, key: str) -> None:
        self.names, self.problem, self.plan, self.key = names, problem, plan, key
        self.layout = problem.spec.state(problem.option)
        shapes = problem.outputs()
        self.kept = [n for n in shapes if n.startswith("kept.")]
        self.results = [n for n in shapes if not n.startswith("kept.")]
        counters = {f.name for f in self.layout.fields if f.counter}
        self.fixed = [i for i, n in enumerate(self.results) if n.partition(".")[2] in counters]
        self.grad = problem.flags.grad
        self.last = [f"final.{f.name}" for f in self.layout.fields] if problem.flags.state else []
        self.marks = [f"checkpoint.{f.name}" for f in self.layout.fields] if problem.flags.checkpoint_every else []
        self.here = _takes_tensors(plan)
        self.working = getattr(torch, problem.compute_dtype)
        # Arrays that are stored as they are computed.
        self.plain = not self.here and all(d in ("int32", problem.compute_dtype) for _, d in shapes.values())
        self.blank = [(n, s, np.dtype(d)) for n, (s, d) in shapes.items()] if self.plain else []
        self.rest: Arrays = {"offsets": None}
        if self.plain:
            fill_host(problem.spec, problem.option, problem.sizes, self.rest, problem.compute_dtype)

    @classmethod
    def of(cls, mixer: Mixer, x: Arrays, state: bool, checkpoint_every: int | None) -> "Shortcut | None":
        """For a call; None where the reference runs it, or a tensor is of a kind of its own.

        Raises:
            ValueError, TypeError: as in any call.
        """
        if not all(type(tensor) in _PLAIN for tensor in x.values()):
            return None
        call = mixer.validated(**x, return_state=state, checkpoint_every=checkpoint_every)
        if runs_on_reference(mixer, call):
            return None
        grad = torch.is_grad_enabled() and any(t.requires_grad for t in x.values())
        kept = _RECOMPUTE if mixer.recomputes or x["q"].device.type != "cpu" else _KEEP
        key = f"{kept if grad else 0}|{int(call.flags.state)}|{call.flags.checkpoint_every}|{mixer.key}"
        problem = dataclasses.replace(call, flags=_decode_key(key)[1]).problem()
        plan = mixer.plan(problem)
        return None if plan.kernel is None else cls(list(x), problem, plan, key)

    def __call__(self, tensors: list[Array]) -> Result:
        """Run it."""
        found = dict(zip(self.results, _apply(self, *tensors), strict=True)) if self.grad else self.forward(tensors)
        pack = self.layout.pack
        state = pack(tuple([found[name] for name in self.last])) if self.last else None
        checkpoints = pack(tuple([found[name] for name in self.marks])) if self.marks else None
        return Result(found["y"], state, checkpoints)

    def forward(self, tensors: Sequence[Array]) -> Arrays:
        """Outputs, and what is kept."""
        if not self.plain:
            x = dict(zip(self.names, tensors, strict=True)) | self.rest
            return _forward_here(self.plan, self.problem, x) if self.here else _forward_on_host(
                self.plan, self.problem, x
            )  # fmt: skip
        host: Arrays = self.rest.copy()
        for name, tensor in zip(self.names, tensors, strict=True):
            plain = tensor.detach() if tensor.requires_grad else tensor
            host[name] = (plain if plain.dtype is self.working else plain.to(self.working)).numpy()
        out = {name: np.empty(shape, dtype) for name, shape, dtype in self.blank}
        self.plan.forward(self.problem, host, out)
        return {name: torch.from_numpy(array) for name, array in out.items()}


class _Node(torch.autograd.Function):
    """A shortcut in the graph of autograd."""

    @staticmethod
    def forward(ctx: Any, shortcut: Shortcut, *tensors: Array) -> tuple[Array, ...]:
        """The kernel's forward."""
        out = shortcut.forward(tensors)
        results = tuple([out[n] for n in shortcut.results])
        ctx.shortcut = shortcut
        ctx.set_materialize_grads(False)
        if shortcut.fixed:
            ctx.mark_non_differentiable(*[results[i] for i in shortcut.fixed])
        y = (results[0],) if shortcut.problem.spec.keeps_output else ()
        ctx.save_for_backward(*tensors, *[out[n] for n in shortcut.kept], *y)
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Array) -> tuple[Array, ...]:
        """The kernel's backward; where a graph of it is wanted, as the operator, which refuses to be derived."""
        shortcut: Shortcut = ctx.shortcut
        problem, names = shortcut.problem, shortcut.names
        count = len(names)
        spec, options = problem.spec, problem.option
        saved = ctx.saved_tensors
        x = dict(zip(names, saved[:count], strict=True)) | {"offsets": None}
        out: Arrays = dict(zip(shortcut.kept, saved[count : count + len(shortcut.kept)], strict=True))
        out["y"] = saved[-1] if spec.keeps_output else None
        dout: Arrays = dict(zip(shortcut.results, gradients, strict=True))
        dout = {n: t for i, (n, t) in enumerate(dout.items()) if i not in shortcut.fixed}
        if torch.is_grad_enabled():
            results = [n for n in _result_names(spec, options) if not n.startswith("kept.")]
            kept = [n for n in _result_names(spec, options) if n.startswith("kept.")]
            empty = saved[0].new_empty(0, dtype=torch.float32)
            found = _operators[operator_name(spec, options) + "_backward"](
                *(x.get(n) for n in _argument_names(spec, options)),
                *(out.get(n, empty) for n in kept),
                out["y"],
                *(dout.get(n) for n in results),
                shortcut.key,
            )
            dx = dict(zip(_gradient_names(spec, options), found, strict=True))
        else:
            take = {n: x.get(n) for n in _argument_names(spec, options)}
            backward = _backward_here if shortcut.here else _backward_on_host
            dx = backward(shortcut.plan, problem, take, out, dout)
        needed = ctx.needs_input_grad[1:]
        return (None, *(dx.get(n) if needed[i] else None for i, n in enumerate(names)))


# Past what ``Function.apply`` looks for: ``Torch.again`` has looked for it.
_apply: Any = super(torch.autograd.Function, _Node).apply


# The operators. Their arguments, in order: inputs, parameters, first state, offsets, key.


def _argument_names(spec: MixerSpec, options: Any) -> list[str]:
    fields = spec.state(options).fields
    return [*(a.name for a in (*spec.inputs, *spec.parameters)), *(f"initial.{f.name}" for f in fields), "offsets"]


def _result_names(spec: MixerSpec, options: Any) -> list[str]:
    fields = spec.state(options).fields
    kept = (f"kept.{f.name}" for f in spec.kept(options))
    return ["y", *(f"final.{f.name}" for f in fields), *(f"checkpoint.{f.name}" for f in fields), *kept]


def _gradient_names(spec: MixerSpec, options: Any) -> list[str]:
    """Inputs that have a gradient."""
    counters = {f"initial.{f.name}" for f in spec.state(options).fields if f.counter}
    return [name for name in _argument_names(spec, options)[:-1] if name not in counters]


def _tensors(spec: MixerSpec, options: Any, x: Arrays) -> list[Array]:
    return [x.get(name) for name in _argument_names(spec, options)]


@functools.lru_cache(maxsize=4096)
def _decode_key(key: str) -> tuple[Mixer, Flags]:
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
        C=options.get("chunk_size", 1),
        M=bound.get("M", 0),
    )


def _names(spec: MixerSpec, options: Any, arguments: Sequence[Any]) -> Arrays:
    return dict(zip(_argument_names(spec, options), arguments, strict=True))


def _parts(arguments: Sequence[Any]) -> tuple[Mixer, Flags, Arrays, Sizes]:
    """What an operator's arguments mean."""
    *tensors, key = arguments
    mixer, flags = _decode_key(key)
    x = _names(mixer.spec, mixer.options, tensors)
    return mixer, flags, x, _sizes(mixer.spec, mixer.options, x)


def _forward(*arguments: Any) -> tuple[Array, ...]:
    """Run a kernel: what the forward operator does on real tensors."""
    mixer, flags, x, sizes = _parts(arguments)
    problem, plan = _chosen(mixer, flags, x, sizes)
    out = _forward_here(plan, problem, x) if _takes_tensors(plan) else _forward_on_host(plan, problem, x)
    names = _result_names(mixer.spec, mixer.options)
    return tuple(out[n] if n in out else x["q"].new_empty(0, dtype=torch.float32) for n in names)


def _chosen(mixer: Mixer, flags: Flags, x: Arrays, sizes: Sizes) -> tuple[Problem, Plan]:
    """The problem of real tensors, and its plan; offsets are checked where they are on the host."""
    if x["offsets"] is not None and x["offsets"].device.type == "cpu":
        check_offsets(x["offsets"].numpy(), sizes.T)
    problem = Call(mixer.spec, mixer.options, library, x, sizes, flags).problem()
    return problem, mixer.plan(problem, again=torch._C._current_graph_task_id() != -1)


def _takes_tensors(plan: Plan) -> bool:
    return plan.kernel is not None and plan.kernel.arrays in (library.name, "any")


def _device(tensor: Array) -> Any:
    """The tensor's GPU as the current one, which is where kernels are launched."""
    return torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]


def _forward_here(plan: Plan, problem: Problem, x: Arrays) -> Arrays:
    """A kernel that takes tensors, where they are."""
    device = x["q"].device
    out = {n: torch.empty(s, dtype=getattr(torch, d), device=device) for n, (s, d) in problem.outputs().items()}
    with _device(x["q"]):
        plan.forward(problem, _with_first_state(problem, x), out)
    return out


def _backward_here(plan: Plan, problem: Problem, x: Arrays, out: Arrays, dout: Arrays) -> Arrays:
    """Gradients of every floating tensor that was given, in its own dtype."""
    given = {n: t for n, t in x.items() if t is not None and t.is_floating_point()}
    dx = {n: torch.empty_like(t, memory_format=torch.contiguous_format) for n, t in given.items()}
    with _device(x["q"]):
        plan.backward(problem, _with_first_state(problem, x), out, dout, dx)
    return dx


def _with_first_state(problem: Problem, x: Arrays) -> Arrays:
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
    groups, heads, key_dim, value_dim = widths
    chosen = dict(options)
    sizes = Sizes(B=1, T=0, G=groups, H=heads, K=key_dim, V=value_dim, N=1, C=chosen.get("chunk_size", 1))
    fields = spec.state(chosen).fields
    with torch.inference_mode(False):
        return tuple(
            torch.as_tensor(np.array(first), dtype=torch.int32 if f.counter else getattr(torch, dtype), device=device)
            for f, first in zip(fields, spec.first(sizes, chosen), strict=True)
        )


def _forward_on_host(plan: Plan, problem: Problem, x: Arrays) -> Arrays:
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
    fill_host(problem.spec, problem.option, problem.sizes, host, problem.compute_dtype)
    return host


def _as_host(tensor: Array, working: torch.dtype) -> np.ndarray:
    """A tensor as a NumPy array, in the working dtype unless it counts something."""
    array: np.ndarray = (tensor.to(working) if tensor.is_floating_point() else tensor).detach().numpy()
    return array


def _fake(*arguments: Any) -> tuple[Array, ...]:
    """Shapes of the forward operator's results."""
    mixer, flags, x, sizes = _parts(arguments)
    spec, options, q = mixer.spec, mixer.options, x["q"]
    shapes = outputs(spec, options, sizes, flags, _DTYPE_NAMES[q.dtype])
    results = []
    for name in _result_names(spec, options):
        shape, dtype = shapes.get(name, ((0,), "float32"))
        results.append(q.new_empty(shape, dtype=getattr(torch, dtype)))
    return tuple(results)


def _save(ctx: Any, inputs: Sequence[Any], output: Sequence[Array]) -> None:
    """Keep the inputs, what the forward kept, and the output where the backward reads it."""
    *tensors, key = inputs
    mixer, _ = _decode_key(key)
    names = _result_names(mixer.spec, mixer.options)
    kept = [t for name, t in zip(names, output, strict=True) if name.startswith("kept.")]
    ctx.key = key
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *kept, output[0] if mixer.spec.keeps_output else None)


def _autograd(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
    """Call the backward operator with what was kept and the gradients that arrived."""
    mixer, _ = _decode_key(ctx.key)
    spec, options = mixer.spec, mixer.options
    names = _result_names(spec, options)
    wanted = [g for name, g in zip(names, gradients, strict=True) if not name.startswith("kept.")]
    results = _operators[operator_name(spec, options) + "_backward"](*ctx.saved_tensors, *wanted, ctx.key)
    by_name = dict(zip(_gradient_names(spec, options), results, strict=True))
    arguments = _argument_names(spec, options)
    needed = ctx.needs_input_grad
    return (*(by_name.get(name) if needed[i] else None for i, name in enumerate(arguments)), None)


def _backward_parts(arguments: Sequence[Any]) -> tuple[Mixer, Flags, Arrays, Arrays, Arrays, Sizes]:
    *tensors, key = arguments
    mixer, flags = _decode_key(key)
    spec, options = mixer.spec, mixer.options
    take = iter(tensors)
    x = {name: next(take) for name in _argument_names(spec, options)}
    results = _result_names(spec, options)
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
    backward = _backward_here if _takes_tensors(plan) else _backward_on_host
    dx, names = backward(plan, problem, x, out, dout), _gradient_names(mixer.spec, mixer.options)
    return tuple(dx[n] if n in dx else x["q"].new_empty(0) for n in names)


def _backward_on_host(plan: Plan, problem: Problem, x: Arrays, out: Arrays, dout: Arrays) -> Arrays:
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
    names = _gradient_names(mixer.spec, mixer.options)
    return tuple(
        x["q"].new_empty(0) if x[n] is None else torch.empty_like(x[n], memory_format=torch.contiguous_format)
        for n in names
    )


# A state's fields depend on options (Lattice's chunks carry more than its exact form), so each layout of a state has an
# operator of its own. They are defined when a mixer is made: never while something is traced.
_operators: dict[str, Any] = {}


def operator_name(spec: MixerSpec, options: Any) -> str:
    """The name of a mixer's forward operator, in the namespace ``mixers``."""
    return f"{spec.name}_{len(spec.state(options).fields)}"


def define_operators(spec: MixerSpec, options: Any) -> None:
    """Define a mixer's forward and backward operators, once."""
    name = operator_name(spec, options)
    if name in _operators:
        return
    inputs, results = _schema(spec, options), _result_names(spec, options)
    forward = _define(name, _forward, inputs, len(results), _fake)
    forward.register_autograd(_autograd, setup_context=_save)

    kept = [n for n in results if n.startswith("kept.")]
    extra = [*kept, "y", *("d" + n for n in results if not n.startswith("kept."))]
    inputs += "".join(f", Tensor? {_identifier(n)}" for n in extra)
    backward = _define(f"{name}_backward", _backward, inputs, len(_gradient_names(spec, options)), _backward_fake)
    backward.register_autograd(functools.partial(_refuse_second, spec.name))


def _define(name: str, function: Any, inputs: str, results: int, fake: Any) -> Any:
    schema = f"({inputs}, str key) -> ({', '.join(['Tensor'] * results)})"
    op = torch.library.custom_op(f"mixers::{name}", function, mutates_args=(), schema=schema)
    op.register_fake(fake)
    _operators[name] = op._opoverload
    return op


def _refuse_second(name: str, ctx: Any, *gradients: Any) -> None:
    raise RuntimeError(_NO_SECOND.format(name=name))


def _schema(spec: MixerSpec, options: Any) -> str:
    return ", ".join(
        f"Tensor{'' if name in ('q', 'k', 'v') else '?'} {_identifier(name)}" for name in _argument_names(spec, options)
    )


def _identifier(name: str) -> str:
    return name.replace(".", "_")


def _flatten(result: Result) -> tuple[list[Any], None]:
    return [result[0], result[1], result.checkpoints, result.kept, result.score], None


torch.utils._pytree.register_pytree_node(
    Result, _flatten, lambda parts, _: Result(*parts), serialized_type_name="mixers.Result"
)

library = Torch()
