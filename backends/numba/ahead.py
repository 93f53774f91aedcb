"""Compile what is called, into the cache on disk, and run nothing.

A tuner does this in several processes at once, since compiling takes seconds and measuring milliseconds.
"""

from typing import Any

from . import threads
from .compile import Kernel, notes


class _Compiling:
    """A tape on which a call is its compilation."""

    def call(self, kernel: Kernel, work: float, items: int, args: tuple[Any, ...]) -> None:
        """Both of the ways in which the kernel may run."""
        dtype = args[0].dtype
        kernel.compiled(dtype)
        if threads.parallel():
            kernel.launcher(dtype)


def compile_only() -> None:
    """From now on this thread compiles what it calls."""
    notes.tape = _Compiling()
