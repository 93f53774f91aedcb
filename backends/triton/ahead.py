"""Compile for a GPU that this process cannot see: what is launched here is compiled into Triton's cache, and not run.

A tuner does this in many processes at once, since compiling takes seconds and measuring milliseconds.
"""

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class _Absent:
    """Stands where Triton expects a driver."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cuda


def compile_only(capability: int) -> None:
    """From now on this process compiles what it launches, for a compute capability as 90, and runs nothing."""
    driver.set_active(_Absent(capability))
    launch = JITFunction.run

    def compile_it(self: Any, *arguments: Any, **keywords: Any) -> Any:
        return launch(self, *arguments, **(keywords | {"warmup": True}))

    JITFunction.run = compile_it
