"""The process in which candidates run: what crashes, hangs or poisons a GPU does so here.

    python -m mixers.autotune.worker LIBRARY      one JSON object a line in, one a line out

    {"do": "open", "problem": …, "part": …, "forward": [name, config]}     make the arrays; what ran before a backward
    {"do": "try", "name": …, "config": …}       run once, then look for what is not written, not finite, or leaks
    {"do": "time", …, "seconds": s}             seconds of a call
    {"do": "guard", …, "default": [name, config]}    compare with the reference and with the default kernel

What a kernel raises comes back as ``{"failed": …}``. What a kernel prints goes to the standard error stream.
"""

import gc
import importlib
import json
import os
import sys
import threading
import time
from dataclasses import replace
from typing import Any, TextIO

from mixers.autotune.guard import against_default, against_reference
from mixers.autotune.key import BACKWARD, FORWARD, from_json
from mixers.autotune.rig import Rig, rig_of

from mixers.backend import Config, Kernel, installed
from mixers.check.truth import autodiff
from mixers.problem import Arrays, Problem

# Bytes a call that are no noise of an allocator.
LEAK = 1 << 20
LEAK_CALLS = 8

Candidate = tuple[str, Config]


class Bench:
    """One pass of one problem, and the candidates that ran it."""

    def __init__(self, problem: Problem, part: str, forward: Candidate | None, rigs: dict[type[Rig], Rig]) -> None:
        self.problem, self.part, self.forward, self.rigs = problem, part, forward, rigs
        self._kernels: dict[str, Kernel] = {}
        self._filled: set[type[Rig]] = set()
        self._ready: dict[tuple[str, tuple[tuple[str, int], ...]], Any] = {}
        self._default: Arrays | None = None

    def kernel(self, name: str) -> Kernel:
        """A kernel by ``backend/name``."""
        if name not in self._kernels:
            backend, _, kernel = name.partition("/")
            self._kernels[name] = next(k for k in installed()[backend].kernels() if k.name == kernel)
        return self._kernels[name]

    def rig(self, kernel: Kernel) -> Rig:
        """The arrays that a kernel runs on; those of a backward have a forward's outputs in them."""
        kind = rig_of(self.problem, kernel)
        if kind not in self.rigs:
            self.rigs[kind] = kind(self.problem)
        rig = self.rigs[kind]
        if kind not in self._filled and self.part == BACKWARD and self.forward is not None:
            name, config = self.forward
            rig.run(FORWARD, self.kernel(name), config)()
            rig.wait()
            self._filled.add(kind)
        return rig

    def once(self, name: str, config: Config) -> tuple[Rig, Any]:
        """A rig and what runs the candidate on it."""
        kernel = self.kernel(name)
        rig = self.rig(kernel)
        return rig, rig.run(self.part, kernel, config)

    def written(self, name: str, config: Config) -> Rig:
        """The rig on which the candidate has written where NaN stood before."""
        rig, run = self.once(name, config)
        rig.poison()
        if self.part == BACKWARD and self.forward is not None:
            rig.run(FORWARD, self.kernel(self.forward[0]), self.forward[1])()
        run()
        rig.wait()
        return rig

    def attempt(self, name: str, config: Config) -> dict[str, Any]:
        """Run once and look at what became of it."""
        start = time.perf_counter()
        found = self.written(name, config).unwritten(self.part)
        first = time.perf_counter() - start
        for array, wrong in found.items():
            if wrong:
                return {"failed": f"{array} holds {wrong} numbers that are not finite"}
        rig, run = self.once(name, config)
        again = rig.clock(run, 1)
        calls = max(1, min(LEAK_CALLS, int(0.5 / max(again, 1e-9))))
        grown = []
        for _ in range(2):
            before = rig.memory()
            for _ in range(calls):
                run()
            rig.wait()
            grown.append((rig.memory() - before) / calls)
        if calls > 1 and min(grown) > LEAK:
            return {"failed": f"leaks {min(grown) / 2**20:.1f} MiB a call"}
        return {"first": first, "seconds": again}

    def seconds(self, name: str, config: Config, most: float) -> dict[str, Any]:
        """Seconds of a call: the best of three bursts that take ``most`` seconds together."""
        key = name, tuple(sorted(config.items()))
        rig = self.rig(self.kernel(name))
        if key not in self._ready:
            run = rig.run(self.part, self.kernel(name), config)
            run()
            rig.wait()
            self._ready[key] = rig.prepared(run)
        run = self._ready[key]
        once = rig.clock(run, 1)
        calls = max(1, min(200, int(most / 3 / max(once, 1e-9))))
        return {"seconds": min(rig.clock(run, calls) for _ in range(3))}

    def guard(self, name: str, config: Config, default: Candidate) -> dict[str, Any]:
        """The worst error over what is allowed."""
        mine = self.kernel(name), config
        forward = mine if self.part == FORWARD else None
        if self.part == BACKWARD and self.forward is not None:
            forward = self.kernel(self.forward[0]), self.forward[1]
        assert forward is not None
        # A forward that was chosen serves training too: its gradients count wherever it has some.
        training = replace(self.problem, flags=replace(self.problem.flags, grad=True))
        backward = mine if mine[0].supports(training) else None
        verdict = against_reference(self.problem, forward, backward)
        if verdict and (name, dict(config)) != (default[0], dict(default[1])):
            if self._default is None:
                self._default = self.written(*default).results(self.part)
            other = against_default(self.problem, self.written(name, config).results(self.part), self._default)
            verdict = other if not other else verdict
        return {"error": verdict.ratio if verdict else -1.0, "reason": "" if verdict else verdict.reason}


class Worker:
    """Answers one request after another."""

    def __init__(self) -> None:
        self.bench: Bench | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what is asked."""
        do = request["do"]
        if do == "open":
            installed()  # a backend may register mixers of its own
            importlib.import_module(request["problem"]["library"])  # and have kernels for its arrays
            forward = request["forward"]
            problem, rigs = from_json(request["problem"]), {}
            if self.bench is not None and (self.bench.problem, self.bench.problem.sizes) == (problem, problem.sizes):
                rigs = self.bench.rigs  # the same arrays serve both passes
            gc.freeze()  # what is there stays: looking for leaks then takes no time
            self.bench = Bench(problem, request["part"], (forward[0], forward[1]) if forward else None, rigs)
            return {}
        assert self.bench is not None
        name, config = request["name"], request["config"]
        if do == "try":
            return self.bench.attempt(name, config)
        if do == "time":
            return self.bench.seconds(name, config, request["seconds"])
        return self.bench.guard(name, config, (request["default"][0], request["default"][1]))

    def serve(self, requests: TextIO, answers: TextIO) -> None:
        """Until there are no more requests."""
        for line in requests:
            try:
                found = self.answer(json.loads(line))
            except Exception as error:
                found = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"}
                found["fatal"] = not _alive()
            answers.write(json.dumps(found) + "\n")
            answers.flush()
            if found.get("fatal"):
                os._exit(1)


def _alive() -> bool:
    """Whether the GPU, where torch has used one, still answers: an illegal access ends its context."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except Exception:
        return False
    return True


def _watch(parent: int) -> None:
    """End with the tuner, even in the middle of a candidate that hangs."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    """Keep the standard output for answers, whatever kernels print."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()
    for library in filter(None, (sys.argv[1], autodiff())):  # while candidates are still being compiled
        importlib.import_module(library)
    Worker().serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
