"""Primitives as ``torch.library`` operators: one node each for ``torch.compile``, the kernel found at run time.

Arguments, in order: what the primitive takes, what is fixed, the factor, how, the backend.
"""

from collections.abc import Sequence
from typing import Any

import torch

from mixers.arrays.operators import constant
from mixers.primitive import Primitive, find
from mixers.spec import Array

_operators: dict[str, Any] = {}


@constant
def _found(*of: Any) -> bool:
    return find(*of) is not None


def serves(primitive: Primitive, of: tuple[Any, ...], x: tuple[Array, ...]) -> bool:
    """See ``Library.serves``."""
    return (bool(primitive.flows) or not _asks_for_gradients(x)) and _found(*of)


def call(
    primitive: Primitive, of: tuple[Any, ...], x: tuple[Array, ...], fixed: tuple[Array, ...], factor: float, how: str
) -> tuple[Array, ...]:
    """See ``Library.primitive``."""
    define(primitive)
    return _several(_operators[primitive.name](*x, *fixed, factor, how, of[1]))


def _asks_for_gradients(x: tuple[Array, ...]) -> bool:
    return torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in x)


def define(primitive: Primitive) -> None:
    """Define the primitive's operators, once; never while something is traced."""
    name = primitive.name
    if name in _operators:
        return
    count, split = len(primitive.takes), len(primitive.takes) + len(primitive.fixed)
    flows = [i for i, result in enumerate(primitive.results) if result in primitive.flows]

    def kernel_of(x: Sequence[Array], backend: str) -> Any:
        dtype, device = str(x[0].dtype).removeprefix("torch."), x[0].device.type
        return find(name, backend, "torch", dtype, device, (x[1].shape[-1], x[2].shape[-1]))

    def forward(*arguments: Any) -> Any:
        *tensors, factor, how, backend = arguments
        x = tuple(None if t is None else t.detach() for t in tensors[:count])
        with torch.cuda.device_of(x[0]):  # type: ignore[no-untyped-call]
            return _returned(tuple(kernel_of(x, backend).forward(x, tuple(tensors[count:]), factor, how)))

    def shapes(*arguments: Any) -> Any:
        x, fixed = arguments[:count], arguments[count:split]
        found = primitive.shapes(x, fixed, str(x[0].dtype).removeprefix("torch."), arguments[-2])
        return _returned(tuple(x[0].new_empty(shape, dtype=getattr(torch, dtype)) for shape, dtype in found))

    def backward(*arguments: Any) -> tuple[Array, ...]:
        *tensors, factor, how, backend = arguments
        x, fixed, rest = tuple(tensors[:count]), tuple(tensors[count:split]), tensors[split:]
        out, arriving = tuple(rest[: len(primitive.results)]), rest[len(primitive.results) :]
        dout = tuple(torch.zeros_like(out[i]) if d is None else d for i, d in zip(flows, arriving, strict=True))
        with torch.cuda.device_of(x[0]):  # type: ignore[no-untyped-call]
            dx = kernel_of(x, backend).backward(x, fixed, factor, how, out, dout)
        return tuple(x[0].new_empty(0) if d is None else d for d in dx)

    def backward_shapes(*arguments: Any) -> tuple[Array, ...]:
        x = arguments[:count]
        return tuple(
            x[0].new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in x
        )

    def save(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        output = _several(output)
        *tensors, ctx.factor, ctx.how, ctx.backend = inputs
        ctx.mark_non_differentiable(*(output[i] for i in range(len(output)) if i not in flows))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output)

    def autograd(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        arriving = [gradients[i] for i in flows]
        saved = ctx.saved_tensors
        found = _operators[f"{name}_backward"](*saved, *arriving, ctx.factor, ctx.how, ctx.backend)
        none = (None,) * (len(primitive.fixed) + 3)
        needed = ctx.needs_input_grad
        return (*(d if needed[i] and saved[i] is not None else None for i, d in enumerate(found)), *none)

    def refuse(ctx: Any, *gradients: Any) -> None:
        raise RuntimeError(
            f"{name}: its kernels have a first derivative only; take backend='reference' where gradients of gradients "
            "are needed"
        )

    takes = ", ".join(f"Tensor{'' if i < 3 else '?'} {n}" for i, n in enumerate(primitive.takes))
    given = takes + "".join(f", Tensor {n}" for n in primitive.fixed)
    rest = ", float factor, str how, str backend"
    made = _define(name, forward, f"({given}{rest})", len(primitive.results), shapes)
    if not flows:
        return
    made.register_autograd(autograd, setup_context=save)
    more = "".join(f", Tensor out_{n}" for n in primitive.results)
    more += "".join(f", Tensor? d_{n}" for n in primitive.flows)
    back = _define(f"{name}_backward", backward, f"({given}{more}{rest})", count, backward_shapes)
    back.register_autograd(refuse)


def _several(results: Any) -> tuple[Array, ...]:
    """What an operator returned, which is no tuple where it is one tensor."""
    return (results,) if isinstance(results, torch.Tensor) else tuple(results)


def _returned(results: tuple[Array, ...]) -> Any:
    """What an operator returns."""
    return results[0] if len(results) == 1 else results


def _define(name: str, function: Any, arguments: str, results: int, fake: Any) -> Any:
    schema = f"{arguments} -> ({', '.join(['Tensor'] * results)})"
    op = torch.library.custom_op(f"mixers::{name}", function, mutates_args=(), schema=schema)
    op.register_fake(fake)
    _operators[name] = op._opoverload
    return op
