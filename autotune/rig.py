"""A kernel and everything that it needs to run again and again: inputs, outputs, gradients, a clock.

Arrays are drawn as the specification says and handed over as a call does, but outputs are allocated once and can be
filled with NaN, so that an element that nobody writes shows. On a GPU a pass is a CUDA graph where it can be captured,
timed by events, after its level-2 cache was filled with something else.
"""

import gc
import math
import os
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mixers.autotune.key import FORWARD

from mixers.arrays.numpy import fill_first_state
from mixers.backend import Config, Kernel
from mixers.cases import DRAWS, generator
from mixers.problem import Arrays, Problem

# The level-2 cache of a large GPU, several times.
FLUSH = 256 << 20

Named = dict[str, np.ndarray]


def draw(problem: Problem) -> Named:
    """Inputs of a problem by name, in float32 or wider; keys and values of norm 1 or so."""
    spec, sizes = problem.spec, problem.sizes
    axes = {"q": "B T G K", "k": "B T G K", "v": " ".join(spec.arg("v").layouts[0])} | dict(problem.layouts)
    axes = {name: " ".join(spec.arg(name).layouts[0]) if name in "qkv" else a for name, a in axes.items()}
    x = {name: DRAWS[spec.arg(name).draw](_standard(name, sizes.shape(a))) for name, a in axes.items()}
    width = x["v"].shape[-1]
    x["v"] /= math.sqrt(max(width, 1))
    if any(arg.name == "token_scale" for arg in spec.parameters):
        x["beta"] /= max(width, 1)  # an inner learning rate, which comes divided by the width
    if problem.packed:
        cuts = np.linspace(0, sizes.T, sizes.N + 1).astype(np.int64)
        x["offsets"] = cuts
    wide = "float64" if problem.dtype == "float64" else "float32"
    fill_first_state(spec, problem.option, sizes, x, wide)
    return x


def _standard(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return generator(0, name).standard_normal(shape, dtype=np.float32)


class Rig(ABC):
    """A problem's arrays, and passes over them.

    Attributes:
        problem: what is run.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        shapes = problem.outputs()
        counters = {f.name for f in problem.spec.state(problem.option).fields if f.counter}
        self.asked = [n for n in shapes if not n.startswith("kept.") and n.partition(".")[2] not in counters]
        self.shapes = shapes
        self.build(draw(problem))

    @abstractmethod
    def build(self, x: Named) -> None:
        """Make the arrays of the call, its outputs, and the gradients that flow into it."""

    @abstractmethod
    def run(self, part: str, kernel: Kernel, config: Config) -> Callable[[], None]:
        """What runs one pass of a kernel."""

    @abstractmethod
    def poison(self) -> None:
        """Fill outputs and gradients with NaN."""

    @abstractmethod
    def results(self, part: str) -> Arrays:
        """Copies of what a pass has written, but for what is kept, in float64 and where the arrays are."""

    def unwritten(self, part: str) -> dict[str, int]:
        """How many numbers of each array are not finite after a pass."""
        found = self.results(part)
        return {name: math.prod(a.shape) - int((abs(a) < math.inf).sum()) for name, a in found.items()}

    @abstractmethod
    def memory(self) -> int:
        """Bytes that this process holds."""

    def clock(self, run: Callable[[], None], calls: int) -> float:
        """Seconds of one of ``calls`` calls."""
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls

    def prepared(self, run: Callable[[], None]) -> Callable[[], None]:
        """The same pass, ready to be timed."""
        return run

    def wait(self) -> None:
        """Until everything that was asked for is done."""
        return


class HostRig(Rig):
    """Kernels of NumPy arrays in the working dtype, whoever the arrays belong to."""

    def build(self, x: Named) -> None:
        """Working arrays."""
        compute = self.problem.compute_dtype
        self.x: Arrays = {n: a.astype(compute) if a.dtype.kind == "f" else a for n, a in x.items()}
        self.x.setdefault("offsets", None)
        self.out = {n: np.empty(s, "int32" if d == "int32" else compute) for n, (s, d) in self.shapes.items()}
        flowing = {
            n: generator(1, n).standard_normal(self.out[n].shape, np.float32).astype(compute) for n in self.asked
        }
        self.dout: Arrays = {n: flowing.get(n) for n in self.shapes if not n.startswith("kept.")}
        given = {n: a for n, a in self.x.items() if a is not None and a.dtype.kind == "f"}
        self.dx = {n: np.empty(a.shape, a.dtype) for n, a in given.items()}

    def run(self, part: str, kernel: Kernel, config: Config) -> Callable[[], None]:
        """One call of the kernel."""
        if part == FORWARD:
            return lambda: kernel.forward(self.problem, config, self.x, self.out)
        return lambda: kernel.backward(self.problem, config, self.x, self.out, self.dout, self.dx)

    def poison(self) -> None:
        """NaN; counters become −1."""
        for array in (*self.out.values(), *self.dx.values()):
            array.fill(-1 if array.dtype.kind == "i" else np.nan)

    def results(self, part: str) -> Arrays:
        """Copies."""
        found = {n: a for n, a in self.out.items() if not n.startswith("kept.")} if part == FORWARD else self.dx
        return {name: a.astype(np.float64) for name, a in found.items()}

    def memory(self) -> int:
        """Resident pages."""
        gc.collect()
        try:
            return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            return 0


class OwnHostRig(HostRig):
    """Kernels that take NumPy arrays as the caller has them."""

    def build(self, x: Named) -> None:
        """Arrays in their final dtypes."""
        problem = self.problem
        wide = "float64" if problem.dtype == "float64" else "float32"
        self.x = {n: a.astype(problem.dtype if n in ("q", "k", "v") else wide) if a.dtype.kind == "f" else a
                  for n, a in x.items()}  # fmt: skip
        self.x.setdefault("offsets", None)
        self.out = {n: np.empty(s, d) for n, (s, d) in self.shapes.items() if not n.startswith("kept.")}
        flowing = {n: generator(1, n).standard_normal(self.out[n].shape).astype(self.out[n].dtype) for n in self.asked}
        self.dout = {n: flowing.get(n) for n in self.out}
        given = {n: a for n, a in self.x.items() if a is not None and a.dtype.kind == "f"}
        self.dx = {n: np.empty(a.shape, a.dtype) for n, a in given.items()}


class TorchRig(Rig):
    """Kernels of torch tensors, on a GPU or in a simulator of one."""

    def build(self, x: Named) -> None:
        """Tensors where the problem has them."""
        import torch

        problem, device = self.problem, self.problem.device
        wide = "float64" if problem.dtype == "float64" else "float32"

        def tensor(name: str, array: np.ndarray) -> Any:
            dtype = (
                (problem.dtype if name in ("q", "k", "v") else wide) if array.dtype.kind == "f" else array.dtype.name
            )
            return torch.from_numpy(np.ascontiguousarray(array)).to(device=device, dtype=getattr(torch, dtype))

        self.torch = torch
        self.x: Arrays = {n: tensor(n, a) for n, a in x.items()}
        self.x.setdefault("offsets", None)
        self.out = {
            n: torch.empty(s, dtype=getattr(torch, d), device=device)
            for n, (s, d) in self.shapes.items()
            if not n.startswith("kept.")
        }
        flowing = {n: torch.randn_like(self.out[n], dtype=torch.float32).to(self.out[n].dtype) for n in self.asked}
        self.dout: Arrays = {n: flowing.get(n) for n in self.out}
        given = {n: t for n, t in self.x.items() if t is not None and t.is_floating_point()}
        self.dx = {n: torch.empty_like(t, memory_format=torch.contiguous_format) for n, t in given.items()}
        self.noise = torch.empty(FLUSH // 4, device=device) if device == "cuda" else None

    def run(self, part: str, kernel: Kernel, config: Config) -> Callable[[], None]:
        """One call of the kernel."""

        def call() -> None:
            with self.torch.no_grad():
                if part == FORWARD:
                    kernel.forward(self.problem, config, self.x, self.out)
                else:
                    kernel.backward(self.problem, config, self.x, self.out, self.dout, self.dx)

        return call

    def poison(self) -> None:
        """NaN; counters become −1."""
        for tensor in (*self.out.values(), *self.dx.values()):
            tensor.fill_(float("nan") if tensor.is_floating_point() else -1)

    def results(self, part: str) -> Arrays:
        """Copies, on the device."""
        found = self.out if part == FORWARD else self.dx
        return {name: t.detach().to(self.torch.float64, copy=True) for name, t in found.items()}

    def memory(self) -> int:
        """What is allocated on the device, by torch and by anybody else; pages of the host elsewhere."""
        gc.collect()
        cuda = self.torch.cuda
        if self.problem.device != "cuda":
            return HostRig.memory(self)  # type: ignore[arg-type]
        free, total = cuda.mem_get_info()
        return int(cuda.memory_allocated() + total - free - cuda.memory_reserved())

    def prepared(self, run: Callable[[], None]) -> Callable[[], None]:
        """As a CUDA graph, where the pass can be captured."""
        cuda = self.torch.cuda
        if self.problem.device != "cuda":
            return run
        captured = cuda.CUDAGraph()
        try:
            with cuda.graph(captured):
                run()
        except Exception:  # what cannot be captured is timed as it is
            cuda.synchronize()
            return run
        return lambda: captured.replay()

    def clock(self, run: Callable[[], None], calls: int) -> float:
        """The middle of single calls, each on a cold cache, by events."""
        if self.noise is None:
            return super().clock(run, calls)
        cuda = self.torch.cuda
        events = [(cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)) for _ in range(calls)]
        for start, end in events:
            self.noise.zero_()
            start.record()
            run()
            end.record()
        cuda.synchronize()
        return float(statistics.median(start.elapsed_time(end) for start, end in events)) / 1e3

    def wait(self) -> None:
        """Synchronise."""
        if self.noise is not None:
            self.torch.cuda.synchronize()


class JaxRig(Rig):
    """Kernels of JAX arrays: a whole jitted call, for a part of one cannot be run alone."""

    def build(self, x: Named) -> None:
        """Arrays on the device."""
        import jax
        import jax.numpy as jnp

        problem = self.problem
        self.jax = jax
        wide = "float64" if problem.dtype == "float64" else "float32"
        place = jax.devices("cuda" if problem.device == "cuda" else problem.device)[0]
        fields = problem.spec.state(problem.option).fields
        state = {f"initial.{f.name}" for f in fields}
        self.offsets = x.pop("offsets", None)
        self.x = {
            n: jax.device_put(jnp.asarray(a, dtype=problem.dtype if n in ("q", "k", "v") else wide), place)
            for n, a in x.items()
            if n not in state
        }
        self.dy = jnp.asarray(generator(1, "y").standard_normal(self.shapes["y"][0]), dtype=problem.dtype)
        self.out: Named = {}
        self.dx: Named = {}

    def run(self, part: str, kernel: Kernel, config: Config) -> Callable[[], None]:
        """A jitted call, or a jitted call with its pullback."""
        from mixers.autotune.guard import paired

        problem = self.problem
        mix = paired(problem, (kernel, config), (kernel, config))
        every = problem.flags.checkpoint_every or None

        def call(x: dict[str, Any]) -> Any:
            return mix(**x, cu_seqlens=self.offsets, checkpoint_every=every).y

        def both(x: dict[str, Any]) -> Any:
            y, pullback = self.jax.vjp(call, x)
            return pullback(self.dy.astype(y.dtype))[0]

        compiled = self.jax.jit(call if part == FORWARD else both)

        def run() -> None:
            found = self.jax.block_until_ready(compiled(self.x))
            if part == FORWARD:
                self.out = {"y": found}
            else:
                self.dx = found

        return run

    def poison(self) -> None:
        """Nothing of the last pass is left."""
        self.out, self.dx = {}, {}

    def results(self, part: str) -> Arrays:
        """Copies on the host."""
        found: Mapping[str, Any] = self.out if part == FORWARD else self.dx
        return {name: np.asarray(a).astype(np.float64) for name, a in found.items()}

    def memory(self) -> int:
        """What JAX holds on its device; pages of the host elsewhere."""
        gc.collect()
        stats = next(iter(self.x["q"].devices())).memory_stats()
        return int(stats["bytes_in_use"]) if stats else HostRig.memory(self)  # type: ignore[arg-type]


def rig_of(problem: Problem, kernel: Kernel) -> type[Rig]:
    """The kind of rig that a kernel runs on."""
    if problem.library == "jax":
        return JaxRig
    if kernel.arrays == "numpy":
        return HostRig
    return TorchRig if problem.library == "torch" else OwnHostRig
