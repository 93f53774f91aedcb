"""What every kernel of this backend has in common: where it runs, how tensors and their strides are handed over.

Kernels take tensors as the caller gave them: any strides, gates and states in any floating dtype. They keep nothing for
the backward, which computes the states again: memory is what a GPU is short of.
"""

import functools
from abc import abstractmethod
from typing import Any

import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

from mixers.backend import Kernel, Place, Support
from mixers.problem import Arrays, Problem
from mixers.spec import Array

WIDEST = 256
OLDEST = (3, 2)

# Multiprocessors that heuristics reckon with: those of an H100 or H200.
PROCESSORS = 132


@triton.jit
def _probe() -> None:
    """Never launched: its type tells whether ``@jit`` decorates for the interpreter."""


INTERPRETED = isinstance(_probe, InterpretedFunction)


class TritonKernel(Kernel):
    """A kernel on torch tensors of a GPU."""

    arrays = "torch"
    batch_invariant = True

    def supports(self, problem: Problem) -> Support:
        """Whether the tensors are where Triton runs, in a dtype and of a width that it takes."""
        place = _place(problem)
        if not place:
            return place
        if problem.dtype == "float64":
            return Support.no("has no float64; takes float32, bfloat16 and float16")
        if INTERPRETED and problem.dtype == "bfloat16":
            return Support.no("Triton's interpreter multiplies bfloat16 matrices wrongly; take float32 or float16")
        _, _, key_dim, value_dim = problem.widths
        if not (1 <= key_dim <= WIDEST and 1 <= value_dim <= WIDEST):
            return Support.no(f"takes widths from 1 to {WIDEST}, and K = {key_dim}, V = {value_dim}")
        if problem.flags.batch_invariant and not INTERPRETED:
            uneven = _uneven(problem)
            if uneven:
                return uneven
        return self.takes(problem)

    @abstractmethod
    def takes(self, problem: Problem) -> Support:
        """Whether the kernel runs this problem, once its tensors, dtype and widths are right."""


def _place(problem: Problem) -> Support:
    """Whether the tensors are where Triton runs, or where its interpreter does."""
    if INTERPRETED:
        return Place(("torch",), ("cpu",)).holds(problem)
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST:
        return Support.no(f"needs Triton {'.'.join(map(str, OLDEST))} or newer, and this is {triton.__version__}")
    return Place(("torch",), ("cuda",)).holds(problem)


def _uneven(problem: Problem) -> Support:
    """Whether rows begin where Triton reads whole vectors, whatever came before them.

    Where they do not, or where gates of several tokens are neighbours, the length of a sequence decides how threads
    share a row or a chunk, and with that the order of sums.
    """
    _, heads, key_dim, value_dim = problem.widths
    if key_dim % 16 or value_dim % 16:
        return Support.no(f"batch_invariant=True takes multiples of 16 here, and K = {key_dim}, V = {value_dim}")
    if heads == 1:
        return Support.no("batch_invariant=True takes 2 heads or more here: how one head's gates are read varies")
    return Support.yes()


def runs_here(dtype: str, device: str) -> bool:
    """Whether a primitive's kernel runs on tensors of a dtype and device."""
    if INTERPRETED:
        return device == "cpu" and dtype in ("float32", "float16")
    return device == "cuda" and dtype in ("float32", "float16", "bfloat16")


def precision(problem: Problem) -> str:
    """How a dot of float32 operands is computed: true float32 unless the caller allows tf32."""
    return "tf32" if problem.flags.allow_tf32 else "ieee"


def at_most(registers: int) -> dict[str, int]:
    """How a launch keeps a thread to so many registers, which lets more programs share a multiprocessor.

    AMD's compiler knows no such option.
    """
    return {} if torch.version.hip else {"maxnreg": registers}


def block(width: int) -> int:
    """The power of two, from 16 up, that holds a width: what ``tl.dot`` takes."""
    return max(16, 1 << (width - 1).bit_length())


def dense(tensor: Array) -> Array:
    """The tensor, copied only where its last axis is not contiguous: rows are read as vectors."""
    return tensor if tensor is None or tensor.shape[-1] == 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def blank_unused(problem: Problem, out: Arrays) -> None:
    """Zeros for checkpoints of a pack, whose rows behind the last one nobody fills."""
    for name, array in out.items():
        if problem.packed and name.startswith("checkpoint."):
            array.zero_()


def first_marks(problem: Problem, offsets: Array) -> Array:
    """The checkpoint row where each sequence of a pack starts, int64 ``[N]``; ``offsets`` where nobody asks."""
    every = problem.flags.checkpoint_every
    if offsets is None or not every:
        return offsets
    counts = torch.diff(offsets) // every
    return torch.cumsum(counts, 0) - counts


def spread(problem: Problem, dx: Arrays, name: str) -> Array:
    """Where the gradient of q or k goes, a value head each: the gradient itself, or float32 parts of a group."""
    s = problem.sizes
    if s.G == s.H:
        return dx[name]
    return torch.empty((s.B, s.T, s.H, s.K), dtype=torch.float32, device=dx[name].device)


def wanted(dx: Arrays, x: Arrays, name: str) -> Array:
    """Where the gradient of a first state goes: a place of its own where the caller gave none."""
    found = dx.get(name)
    return torch.empty(x[name].shape, dtype=torch.float32, device=x[name].device) if found is None else found


def gather(problem: Problem, dx: Arrays, name: str, parts: Array) -> None:
    """Sum the parts of a group of value heads."""
    s = problem.sizes
    if s.G != s.H:
        of_heads = parts.view(s.B, s.T, s.G, s.H // s.G, s.K)
        # The order of torch's own sum may depend on how many there are.
        in_order = problem.flags.batch_invariant
        dx[name].copy_(functools.reduce(torch.add, of_heads.unbind(3)) if in_order else of_heads.sum(3))


def place(tensor: Array, *axes: int) -> tuple[Any, ...]:
    """A tensor and its strides along some axes, as a kernel's arguments; zeros where there is none."""
    return (tensor, *((0,) * len(axes) if tensor is None else (tensor.stride(axis) for axis in axes)))
