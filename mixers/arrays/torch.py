"""torch tensors: by a shortcut where a call was seen before, by an operator elsewhere.

The reference takes another way: plain torch operations, differentiable any number of times.
"""

import dataclasses
import functools
from typing import Any

import array_api_compat.torch as xp
import numpy as np
import torch

from mixers import reference
from mixers.arrays import shortcut, torch_primitive
from mixers.arrays.numpy import first_state
from mixers.arrays.operators import (
    DTYPE_NAMES,
    current_device,
    define_operators,
    operator_key,
    operator_name,
    operators,
    result_names,
    runs_on_reference,
    tensors_of,
    with_first_state,
)
from mixers.backend import Pool
from mixers.call import Call
from mixers.mixer import Mixer
from mixers.packing import Pack, check_offsets
from mixers.primitive import Primitive
from mixers.problem import Arrays
from mixers.result import Result
from mixers.spec import Array, MixerSpec, Options, Sizes

_NO_FUNC = (
    "{name}: torch.func cannot differentiate its kernels; take backend='reference', or torch.autograd.grad, which can"
)


class Torch:
    """See ``mixers.arrays.Library``."""

    name = "torch"
    namespace = xp

    def dtype(self, array: Array) -> str:
        """The name of an array's dtype."""
        return DTYPE_NAMES.get(array.dtype) or str(array.dtype).removeprefix("torch.")

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
        fields = call.spec.state(call.options).fields
        if x.get(f"initial.{fields[0].name}") is None:
            # A first state is kept where heads and widths alone make its shape; tracers do not follow that.
            if torch.compiler.is_compiling() or any(set(f.axes.split()) - set("NHKVF") for f in fields):
                return x | _first_state(call)
            return with_first_state(call.problem(), x)
        return x

    def call(self, mixer: Mixer, **arguments: Any) -> Result:
        """A call."""
        return mixer(**arguments)

    def serves(self, primitive: Primitive, of: Any, x: tuple[Array, ...]) -> bool:
        """Gradients are asked of what requires them."""
        return torch_primitive.serves(primitive, of, x)

    def primitive(
        self, primitive: Primitive, of: Any, x: tuple[Array, ...], fixed: tuple[Array, ...], factor: float, how: str
    ) -> tuple[Array, ...]:
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
        """Write states into their slots, without asking which: what goes nowhere writes what another writes.

        Where all go nowhere, they write what there is in the first slot.
        """
        if not target.shape[0]:
            return
        first, some = where.to(torch.int32).argmax(0, keepdim=True), where.any()
        source = torch.where(where, torch.arange(target.shape[0], device=target.device), first)
        slot = torch.where(some, target.index_select(0, source), 0).long()
        for pool, values in zip(pools, state, strict=True):
            rows = values.index_select(0, source).to(pool.dtype)
            pool[slot] = torch.where(some, rows, pool[slot])

    def decode(self, mixer: Mixer, call: Call, pool: Pool) -> Array | None:
        """One launch on the pool itself, where a kernel takes tensors so."""
        problem = call.problem()
        plan = mixer.plan_in_place(problem)
        if plan is None:
            return None
        q, (shape, dtype) = call.x["q"], problem.outputs()["y"]
        y = torch.empty(shape, dtype=getattr(torch, dtype), device=q.device)
        with torch.no_grad(), current_device(q):
            plan.decode(problem, with_first_state(problem, call.x), pool, y)
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
        return shortcut.again(mixer, x, state, checkpoint_every)

    def run(self, mixer: Mixer, call: Call) -> Arrays:
        """The reference in plain torch, or the mixer's operator."""
        if runs_on_reference(mixer, call):
            return reference.forward(self, call.spec, call.options, call.sizes, call.flags, self.given(call))
        tensors = tensors_of(call.spec, call.options, call.x)
        grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        if grad and not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
            raise RuntimeError(_NO_FUNC.format(name=call.spec.name))
        name = operator_name(call.spec, call.options)
        if name not in operators:  # the mixer is older than the first import of torch
            define_operators(call.spec, call.options)
        results = operators[name](*tensors, operator_key(mixer, call, grad))
        return dict(zip(result_names(call.spec, call.options), results, strict=True))


def _unknown(array: Array) -> bool:
    """Whether there are no numbers yet: a compiler or ``torch.func`` looks on, or a graph captures the work."""
    traced = torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None
    return traced or bool(array.device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _first_state(call: Call) -> Arrays:
    """The spec's, for every sequence."""
    q, fields = call.x["q"], call.spec.state(call.options).fields
    compute = "float64" if q.dtype == torch.float64 else "float32"
    traced = torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None
    if traced or torch._C._len_torch_dispatch_stack():
        first = _copied(call.spec, call.options, call.sizes, compute, q)
    else:
        sizes = dataclasses.replace(call.sizes, B=1, T=0, N=1)
        first = _held(call.spec, tuple(sorted(call.options.items())), sizes, compute, q.dtype, q.device)
    return {f"initial.{f.name}": t.expand(call.sizes.N, *t.shape) for f, t in zip(fields, first, strict=True)}


def _copied(spec: MixerSpec, options: Options, sizes: Sizes, dtype: str, beside: Array) -> tuple[Array, ...]:
    """The first state of one sequence, where a tensor lies; a cache has its dtype."""
    arrays = zip(spec.state(options).fields, first_state(spec, options, sizes, dtype), strict=True)
    return tuple(torch.from_numpy(a).to(beside if f.verbatim else beside.device) for f, a in arrays)


@functools.lru_cache(maxsize=64)
def _held(
    spec: MixerSpec, options: tuple[tuple[str, Any], ...], sizes: Sizes, dtype: str, cache: Any, device: Any
) -> tuple[Array, ...]:
    """The same, copied once: a call that copies from the host could be captured in no graph."""
    with torch.inference_mode(False):
        return _copied(spec, dict(options), sizes, dtype, torch.empty(0, dtype=cache, device=device))


def _flatten(result: Result) -> tuple[list[Any], None]:
    return [result[0], result[1], result.checkpoints, result.kept, result.score], None


torch.utils._pytree.register_pytree_node(
    Result, _flatten, lambda parts, _: Result(*parts), serialized_type_name="mixers.Result"
)

library = Torch()
