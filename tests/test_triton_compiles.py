"""Every Triton kernel compiled for an H100's kind of GPU, which this machine need not have: the interpreter takes more
than the compiler does. A process of its own compiles, since there launching is compiling.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("triton")

from mixers.autotune.key import BACKWARD, FORWARD, to_json
from mixers.autotune.tuner import problem_of

import mixers
from mixers.backend import Kernel, installed
from mixers.spec import MixerSpec

CAPABILITY = "90"
LAUNCHED = [
    pytest.param(kernel, mixers.get_spec(name), part, id=f"{kernel.name}-{name}-{part}")
    for kernel in installed()["triton"].kernels()
    if kernel.arrays == "torch" and kernel.name != "attention.fused"  # which is torch's own
    for name in sorted(kernel.mixers)
    for part in (FORWARD, BACKWARD)
]


@pytest.fixture(scope="module")
def compiled() -> Iterator[Callable[..., str]]:
    """What the compiling process says of a pass."""
    environment = {n: value for n, value in os.environ.items() if n != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-m", "mixers.autotune.ahead", CAPABILITY]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment | {"CUDA_VISIBLE_DEVICES": ""}, **pipes) as process:

        def ask(**job: object) -> str:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            return process.stdout.readline().strip()

        yield ask
        process.kill()


@pytest.mark.parametrize(("kernel", "spec", "part"), LAUNCHED)
def test_kernels_compile(compiled: Callable[..., str], kernel: Kernel, spec: MixerSpec, part: str) -> None:
    chunks = {"chunk_size": 16} if kernel.name == "lattice.chunk" else {}
    wide = 33 if spec.arg("v").layouts[0][-1] == "K" else 20
    shape = (2, 70, 2, 33 if wide == 33 else 36, wide)
    problem = problem_of(spec, shape, "bfloat16", "torch", "cuda", True, (), spec.resolve(chunks))
    config = dict(kernel.configs(problem)[0])
    job = {"problem": to_json(problem), "part": part, "name": f"triton/{kernel.name}", "config": config}
    assert compiled(**job) == "compiled"
