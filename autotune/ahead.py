"""Candidates compiled ahead of their measurement, in several processes at once that see no GPU.

    python -m mixers.autotune.ahead CAPABILITY      one JSON object a line in, one line out; 0 for the CPU

A backend that can do so has ``compile_only(capability)``; what it launches is then compiled into its own cache.
"""

import contextlib
import itertools
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterable
from typing import Any

from mixers.autotune.device import Device, cores
from mixers.autotune.guard import small_problem
from mixers.autotune.key import BACKWARD, FORWARD, from_json, to_json
from mixers.autotune.rig import HostRig

from mixers.backend import Config, installed
from mixers.problem import Problem

# Seconds that one candidate may take to compile, and all of them on cores that are wanted for timing.
PATIENCE = 120.0
SETTLED = 600.0
PROCESSES = 16

# What is waited for now comes before what will be.
NOW, LATER = 0, 1


class Ahead:
    """Processes that compile, while the block lasts; none where no backend of the device compiles ahead."""

    def __init__(self, device: Device) -> None:
        self._kind = device.kind
        self._capability = next((word[3:] for word in device.detail if word.startswith("sm_")), "0")
        able = {n for n, b in installed().items() if hasattr(b, "compile_only") and device.kind in b.place.devices}
        self._able = able if device.kind == "cpu" or self._capability != "0" else set()
        self._queue: queue.PriorityQueue[tuple[int, int, str, threading.Event]] = queue.PriorityQueue()
        self._number = itertools.count()
        self._jobs: dict[tuple[Any, ...], threading.Event] = {}
        self._threads: list[threading.Thread] = []
        self._processes: list[subprocess.Popen[str]] = []
        self._closed = False

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        for _thread in self._threads:
            self._queue.put((-1, next(self._number), "", threading.Event()))
        for process in self._processes:
            process.kill()
        for thread in self._threads:
            thread.join()
        for process in self._processes:  # one may have begun meanwhile
            process.kill()
            process.wait()

    def start(self, problem: Problem, part: str, candidates: Iterable[tuple[str, Config]]) -> None:
        """Let candidates be compiled, and on a CPU, before anything is timed there, what the guard will run."""
        todo = list(candidates)
        self._submit(LATER, problem, part, todo)
        if self._kind == "cpu":
            self.compare(problem, part, todo)

    def compare(self, problem: Problem, part: str, candidates: Iterable[tuple[str, Config]]) -> None:
        """Let be compiled what the guard will run of candidates: other code where lengths decide about it."""
        todo = list(candidates)
        for way in _guarded(part):
            self._submit(NOW, small_problem(problem), way, todo)

    def _submit(self, urgency: int, problem: Problem, part: str, candidates: Iterable[tuple[str, Config]]) -> None:
        for name, config in candidates:
            job = _job(problem, part, name, config)
            if job in self._jobs or name.partition("/")[0] not in self._able:
                continue
            words = {"problem": to_json(problem), "part": part, "name": name, "config": dict(config)}
            self._jobs[job] = threading.Event()
            self._queue.put((urgency, next(self._number), json.dumps(words), self._jobs[job]))
            if len(self._threads) < min(PROCESSES, cores()):
                self._threads.append(threading.Thread(target=self._serve, daemon=True))
                self._threads[-1].start()

    def wait(self, problem: Problem, part: str, name: str, config: Config) -> None:
        """Until a candidate is compiled; where that failed, its measurement will tell why."""
        job = self._jobs.get(_job(problem, part, name, config))
        if job is not None:
            job.wait(PATIENCE)

    def wait_to_compare(self, problem: Problem, part: str, name: str, config: Config) -> None:
        """Until that is compiled which the guard will run of a candidate."""
        for way in _guarded(part):
            self.wait(small_problem(problem), way, name, config)

    def settle(self) -> None:
        """Until nothing is compiled on the cores that candidates are to be timed on."""
        if self._kind == "cpu":
            for job in self._jobs.values():
                job.wait(SETTLED)

    def _serve(self) -> None:
        """Give one process after another something to do: whoever dies of a candidate is followed by a new one."""
        process = self._process()
        while not self._closed:
            _, _, words, done = self._queue.get()
            answer = ""
            with contextlib.suppress(OSError, ValueError):  # it has died
                process.stdin.write(words + "\n")  # type: ignore[union-attr]
                process.stdin.flush()  # type: ignore[union-attr]
                answer = process.stdout.readline()  # type: ignore[union-attr]
            done.set()
            if not answer and not self._closed:
                process = self._process()

    def _process(self) -> "subprocess.Popen[str]":
        path = os.pathsep.join([p or os.getcwd() for p in sys.path])
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "mixers.autotune.ahead", self._capability],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        )
        self._processes.append(process)
        return process


def _guarded(part: str) -> tuple[str, ...]:
    """The passes that the guard runs: a forward that is chosen serves training too."""
    return (FORWARD, BACKWARD) if part == FORWARD else (BACKWARD,)


def _job(problem: Problem, part: str, name: str, config: Config) -> tuple[Any, ...]:
    """What makes one compilation another: for a CPU neither a length, nor a width, nor a configuration."""
    if problem.device == "cpu":
        return part, name, problem.compute_dtype
    return problem, problem.sizes, part, name, tuple(sorted(config.items()))


def compile_candidate(job: dict[str, Any]) -> None:
    """Launch a pass on arrays that hold nothing, in a process where launching is compiling."""
    problem: Problem = from_json(job["problem"])
    backend, _, name = job["name"].partition("/")
    kernel = next(k for k in installed()[backend].kernels() if k.name == name)
    if problem.device == "cpu":
        if kernel.arrays == "numpy":  # others are compiled by whoever traces them
            HostRig(problem).run(job["part"], kernel, job["config"])()
        return
    import torch

    spec, sizes = problem.spec, problem.sizes
    wide = "float64" if problem.dtype == "float64" else "float32"

    def empty(shape: tuple[int, ...], dtype: str) -> Any:
        return torch.empty(shape, dtype=getattr(torch, dtype))

    axes = {n: " ".join(spec.arg(n).layouts[0]) for n in ("q", "k", "v")} | dict(problem.layouts)
    x: dict[str, Any] = {n: empty(sizes.shape(a), problem.dtype if n in "qkv" else wide) for n, a in axes.items()}
    x |= {f"initial.{f.name}": empty((sizes.N, *first.shape), "int32" if f.counter else wide)
          for f, first in zip(spec.state(problem.option).fields, spec.first(sizes, problem.option), strict=True)
          }  # fmt: skip
    x["offsets"] = torch.linspace(0, sizes.T, sizes.N + 1).long() if problem.packed else None
    out = {n: empty(s, d) for n, (s, d) in problem.outputs().items() if not n.startswith("kept.")}
    if job["part"] != BACKWARD:
        kernel.forward(problem, job["config"], x, out)
        return
    dx = {n: torch.empty_like(t) for n, t in x.items() if t is not None and t.is_floating_point()}
    dout = {n: t if t.is_floating_point() else None for n, t in out.items()}
    kernel.backward(problem, job["config"], x, out, dout, dx)


def main() -> None:
    """Compile one job after another; what goes wrong shows when it is measured."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    capability, ready = int(sys.argv[1]), set[str]()
    for line in sys.stdin:
        try:
            job = json.loads(line)
            backend = job["name"].partition("/")[0]
            if backend not in ready:
                installed()[backend].compile_only(capability)  # type: ignore[attr-defined]
                ready.add(backend)
            compile_candidate(job)
            answers.write("compiled\n")
        except Exception as error:
            answers.write(f"{type(error).__name__}\n")
        answers.flush()


if __name__ == "__main__":
    main()
