"""What a pass must compute and move, by the specification, and about how long a kernel takes for it.

    seconds ≈ max(flops / rate, bytes / bandwidth, T · latency) · (1 + rank / 16)

The model prunes and explains; it decides nothing that is then measured. Rates are a device's nominal ones. ``rank`` is
a configuration's place in its kernel's own list, likeliest first: each kernel knows its own layouts best.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mixers.autotune.device import Device
from mixers.autotune.key import BACKWARD, FORWARD

from mixers.backend import Kernel
from mixers.problem import Problem
from mixers.spec import MixerSpec, Options, Sizes

# A backward costs two products for each of the forward's, as in the usual count for training.
WORK = {FORWARD: 1.0, BACKWARD: 2.0}
ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def traffic(spec: MixerSpec, sizes: Sizes, options: Options, dtype: str, given: Mapping[str, str]) -> dict[str, float]:
    """Bytes that must move in each pass, when every input is read once and every output written once.

    The forward reads its inputs and the first state and writes the output and the last state. The backward reads the
    inputs and the output's gradient and writes a gradient for each input.

    Args:
        spec: the mixer.
        sizes: the length of every axis.
        options: its options, resolved.
        dtype: of q, k and v.
        given: the axes of every input that is passed.
    """
    item = ITEM_BYTES[dtype]
    wide = max(item, 4)
    inputs = float(
        sum(
            math.prod(sizes.shape(given[arg.name])) * (item if arg.name in ("q", "k", "v") else wide)
            for arg in spec.inputs
            if arg.name in given
        )
    )
    width = sizes.V if spec.arg("v").layouts[0][-1] == "V" else sizes.K
    output = float(sizes.B * sizes.T * sizes.H * width * item)
    state = 0.0
    if spec.reserve is None:
        state = 2.0 * wide * sum(math.prod(sizes.shape(f.axes)) for f in spec.state(options).fields)
    return {FORWARD: inputs + output + state, BACKWARD: 2 * inputs + output}


@dataclass(frozen=True)
class Rates:
    """Nominal speed of a device.

    Attributes:
        copy: bytes a second.
        matmul: floating-point operations a second where products are matrices.
        vector: floating-point operations a second where they are not.
        token: seconds that one token of a chain takes at least.
    """

    copy: float
    matmul: float
    vector: float
    token: float


def rates(device: Device, dtype: str) -> Rates:
    """What a device of this kind can do."""
    item = ITEM_BYTES[dtype]
    if device.kind == "cpu":
        flags = " ".join(device.detail)
        width = 64 if "avx512f" in flags else 32 if "avx2" in flags else 16
        peak = device.processors * 2 * 2 * (width / max(item, 4)) * 2.5e9
        return Rates(13e9 * device.processors, 0.7 * peak, 0.35 * peak, 2e-8)
    tensor = 3e12 * (2 / item) if item <= 4 else 2.5e11
    return Rates(3e10 * device.processors, device.processors * tensor, device.processors * 1.5e11, 6e-7)


def predict(problem: Problem, kernel: Kernel, rank: int, part: str, device: Device) -> float:
    """About how many seconds a pass takes."""
    sizes, speed = problem.sizes, rates(device, problem.dtype)
    given = {"q": "B T G K", "k": "B T G K", "v": "B T H V"} | dict(problem.layouts)
    moved = traffic(problem.spec, sizes, problem.option, problem.dtype, given)[part] / speed.copy
    chunked = kernel.form == "chunk"
    busy = min(1.0, max(problem.parallel, 1) / device.processors)
    computed = problem.work() * WORK[part] / ((speed.matmul if chunked else speed.vector) * busy)
    longest = sizes.T / max(sizes.N, 1) if problem.packed else sizes.T
    chain = longest * speed.token * WORK[part] / (8 if chunked else 1)
    return max(moved, computed, chain) * (1 + rank / 16)
