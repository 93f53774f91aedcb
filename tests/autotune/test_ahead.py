"""Compiling ahead: a process that does so runs nothing, and leaves what another one finds."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from mixers.autotune.ahead import Ahead, compile_candidate
from mixers.autotune.device import Device, device_of_kind
from mixers.autotune.key import BACKWARD, FORWARD, to_json
from mixers.autotune.rig import HostRig
from mixers.autotune.tuner import problem_of

from mixers.backend import installed
from mixers.problem import Problem
from mixers.registry import get_spec

CHUNK = "numba/delta.chunk"


def problem_here() -> Problem:
    spec = get_spec("delta_rule")
    return problem_of(spec, (1, 40, 2, 8, 8), "float32", "numpy", "cpu", True, (), spec.resolve({}))


def test_a_cpu_kernel_is_compiled_and_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from mixers.backends.numba import ahead, compile

    problem = problem_here()
    kernel = next(k for k in installed()["numba"].kernels() if f"numba/{k.name}" == CHUNK)
    config, rig = kernel.configs(problem)[0], HostRig(problem)
    asked: list[np.dtype] = []
    monkeypatch.setattr(compile.Kernel, "compiled", lambda self, dtype: asked.append(dtype))
    monkeypatch.setattr(compile.Kernel, "launcher", lambda self, dtype: asked.append(dtype))
    monkeypatch.setattr(compile.notes, "tape", None)
    ahead.compile_only()
    rig.poison()
    for part in (FORWARD, BACKWARD):
        asked.clear()
        rig.run(part, kernel, config)()
        assert set(asked) == {np.dtype("float32")}
        compile_candidate({"problem": to_json(problem), "part": part, "name": CHUNK, "config": dict(config)})
    assert np.isnan(rig.out["y"]).all()
    assert np.isnan(rig.dx["v"]).all()


def test_a_cuda_kernel_is_compiled_as_far_as_ptx_by_one_process_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mixers.backends.cuda import ahead, program

    made: list[tuple[int, int]] = []
    monkeypatch.setattr(program, "folder", lambda: tmp_path)
    monkeypatch.setattr(program.Program, "ptx", lambda self, constants, capability: made.append(capability) or "text")
    monkeypatch.setattr(program.Program, "__call__", program.Program.__call__)  # put back at the end
    ahead.compile_only(90)
    for _ in range(2):
        program.Program("delta_forward")(None, (("width", 64),), 1, 128, ())
        assert program.Program("delta_forward").text((("width", 64),), (9, 0)) == "text"
    assert made == [(9, 0)]
    assert [file.suffix for file in tmp_path.iterdir()] == [".ptx"]


def test_one_compilation_serves_all_that_need_it() -> None:
    """On a CPU neither widths nor configurations are compiled; on a GPU they are. Without a capability nothing is."""
    problem = problem_here()
    wide = dataclasses.replace(problem, widths=(2, 2, 8, 16))
    names = [(CHUNK, {"block_t": 16}), (CHUNK, {"block_t": 32}), ("triton/delta.chunk", {"block_t": 64})]
    with Ahead(Device("cuda", "a GPU of another kind", 1)) as ahead:
        ahead.start(problem, FORWARD, names)
        assert not ahead._jobs
    with Ahead(device_of_kind("cpu")) as ahead:
        ahead.start(problem, FORWARD, names)
        ahead.start(wide, FORWARD, names)
        assert len(ahead._jobs) == 2  # forward, and backward for the guard
