"""Compile for a GPU that this process cannot see: what is launched here becomes PTX on disk, and is not run.

A tuner does this in many processes at once, since compiling takes seconds and measuring milliseconds; the driver then
assembles the PTX where it is measured.
"""

from typing import Any

from mixers.spec import Array

from .program import Constants, Program


def compile_only(capability: int) -> None:
    """From now on this process compiles what it launches, for a compute capability as 90, and runs nothing."""
    wanted = divmod(capability, 10)

    def compile_it(self: Program, like: Array, constants: Constants, *launch: Any, **limits: Any) -> None:
        self.text(constants, wanted)

    Program.__call__ = compile_it  # type: ignore[method-assign]
