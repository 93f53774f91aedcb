"""Eager calls of torch that look like one before: their checks, problem and plan are settled.

    known[what a call looks like] -> Shortcut      and that is the kernel itself, or one node of autograd around it

Operators cost as much again as the rest of a small call; they are for what is traced.
"""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mixers.arrays.numpy import fill_first_state
from mixers.arrays.operators import (
    argument_names,
    backward_here,
    backward_on_host,
    blank_outputs,
    decode_key,
    fill_here,
    forward_on_host,
    gradient_names,
    operator_key,
    operator_name,
    operators,
    result_names,
    runs_on_reference,
    takes_tensors,
    with_first_state,
)
from mixers.mixer import Mixer
from mixers.plan import Plan
from mixers.problem import Arrays, Problem
from mixers.result import Result
from mixers.spec import Array

# Whoever looks on while tensors are computed with.
_looks_on = torch._C._functorch.peek_interpreter_stack
_modes, _functions = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_in_backward = torch._C._current_graph_task_id
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_UNSEEN: Any = object()

# What of a tensor decides about a call.
_looks = operator.attrgetter("shape", "dtype", "device", "requires_grad")


def again(mixer: Mixer, x: Arrays, state: bool, checkpoint_every: int | None) -> Result | None:
    """A call in eager mode: its checks, problem and plan are those of the last one like it."""
    if torch.compiler.is_compiling() or _looks_on() is not None or _modes() or _functions() or _in_backward() != -1:
        return None  # a transformation, a mode, or a backward that computes a forward again
    tensors = [*x.values()]
    try:
        key = (state, checkpoint_every, torch.is_grad_enabled(), *x, *map(type, tensors), *map(_looks, tensors))
    except AttributeError:  # something was left out, or is no tensor
        given = {name: t for name, t in x.items() if t is not None}
        return again(mixer, given, state, checkpoint_every) if len(given) < len(x) else None
    known = mixer.shortcuts()
    shortcut: Shortcut | None = known.get(key, _UNSEEN)
    if shortcut is _UNSEEN:
        shortcut = Shortcut.of(mixer, x, state, checkpoint_every)
        known = mixer.shortcuts()  # measuring makes everything new
        if len(known) >= 4096:
            known.clear()
        known[key] = shortcut
    return None if shortcut is None else shortcut(tensors)


class Shortcut:
    """An eager call whose checks are done: the kernel itself, or one node of autograd around it.

    Operators cost as much again as the rest of a small call; they are for what is traced.
    """

    def __init__(self, x: Arrays, problem: Problem, plan: Plan, key: str) -> None:
        self.names, self.problem, self.plan, self.key = list(x), problem, plan, key
        self.layout = problem.spec.state(problem.option)
        shapes = problem.outputs()
        self.kept = [n for n in shapes if n.startswith("kept.")]
        self.results = [n for n in shapes if not n.startswith("kept.")]
        counters = {f.name for f in self.layout.fields if f.counter}
        self.fixed = [i for i, n in enumerate(self.results) if n.partition(".")[2] in counters]
        self.grad = problem.flags.grad
        self.last = [f"final.{f.name}" for f in self.layout.fields] if problem.flags.state else []
        self.marks = [f"checkpoint.{f.name}" for f in self.layout.fields] if problem.flags.checkpoint_every else []
        alone = self.layout.type is None and self.last and not self.marks
        self.pair = self.last[0] if alone else ""
        self.here = takes_tensors(plan)
        working = getattr(torch, problem.compute_dtype)
        self.cast = None if all(t.dtype is working for t in x.values()) else working
        # Arrays that are stored as they are computed.
        self.plain = not self.here and all(d in ("int32", problem.compute_dtype) for _, d in shapes.values())
        self.blank: list[tuple[str, tuple[int, ...], Any]] = []
        self.rest: Arrays = {"offsets": None}
        if self.here:
            self.blank = blank_outputs(problem)
            full = with_first_state(problem, {"q": x["q"], "offsets": None})
            self.rest = {name: array for name, array in full.items() if name != "q"}
        elif self.plain:
            self.blank = [(n, s, np.dtype(d)) for n, (s, d) in shapes.items()]
            fill_first_state(problem.spec, problem.option, problem.sizes, self.rest, problem.compute_dtype)

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
        key = operator_key(mixer, call, grad)
        problem = dataclasses.replace(call, flags=decode_key(key)[1]).problem()
        plan = mixer.plan(problem)
        return None if plan.kernel is None else cls(x, problem, plan, key)

    def __call__(self, tensors: list[Array]) -> Result:
        """Run it."""
        found = dict(zip(self.results, _apply(self, *tensors), strict=True)) if self.grad else self.forward(tensors)
        if self.pair:
            return tuple.__new__(Result, (found["y"], found[self.pair]))  # without attributes of its own
        pack = self.layout.pack
        state = pack(tuple([found[name] for name in self.last])) if self.last else None
        checkpoints = pack(tuple([found[name] for name in self.marks])) if self.marks else None
        return Result(found["y"], state, checkpoints)

    def forward(self, tensors: Sequence[Array]) -> Arrays:
        """Outputs, and what is kept."""
        if not self.plain:
            x = dict(zip(self.names, tensors, strict=True)) | self.rest
            if self.here:
                return fill_here(self.plan, self.problem, x, self.blank)
            return forward_on_host(self.plan, self.problem, x)
        if self.cast is not None:
            tensors = [tensor.to(self.cast) for tensor in tensors]
        host = self.rest | dict(zip(self.names, [tensor.numpy(force=True) for tensor in tensors], strict=True))
        out: Arrays = {name: np.empty(shape, dtype) for name, shape, dtype in self.blank}
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
            results = [n for n in result_names(spec, options) if not n.startswith("kept.")]
            kept = [n for n in result_names(spec, options) if n.startswith("kept.")]
            empty = saved[0].new_empty(0, dtype=torch.float32)
            found = operators[operator_name(spec, options) + "_backward"](
                *(x.get(n) for n in argument_names(spec, options)),
                *(out.get(n, empty) for n in kept),
                out["y"],
                *(dout.get(n) for n in results),
                shortcut.key,
            )
            dx = dict(zip(gradient_names(spec, options), found, strict=True))
        else:
            take = {n: x.get(n) for n in argument_names(spec, options)}
            backward = backward_here if shortcut.here else backward_on_host
            dx = backward(shortcut.plan, problem, take, out, dout)
        needed = ctx.needs_input_grad[1:]
        return (None, *(dx.get(n) if needed[i] else None for i, n in enumerate(names)))


# Past what ``Function.apply`` looks for: ``Torch.again`` has looked for it.
_apply: Any = super(torch.autograd.Function, _Node).apply
