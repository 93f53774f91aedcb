"""Kernels where threads are dangerous: forked processes, and Numba's workqueue layer under concurrent threads."""

import os
import subprocess
import sys

import pytest

# Enough work for the parallel form of a kernel, and its answer by the reference.
START = """
import os, sys
import numpy as np
import mixers
from mixers.backends.numba import threads

rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((2, 128, 4, 32), dtype=np.float32) for _ in range(3))
k /= np.linalg.norm(k, axis=-1, keepdims=True)
beta = rng.random((2, 128, 4), dtype=np.float32)
mix = mixers.get("delta_rule", backend="numba")
wanted = mixers.get("delta_rule", backend="reference")(q, k, v, beta=beta).y


def right():
    return bool(np.abs(mix(q, k, v, beta=beta).y - wanted).max() < 1e-4)

"""

FORK = """
assert right(), "the parent before it forks"
assert threads.parallel() == (os.environ["NUMBA_NUM_THREADS"] != "1" and threads.layer() != "workqueue")
child = os.fork()
if child == 0:
    os._exit(0 if not threads.parallel() and right() else 3)
_, status = os.waitpid(child, 0)
assert right(), "the parent after it forked"
sys.exit(os.waitstatus_to_exitcode(status))
"""

WORKER = """
import torch


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        assert not threads.parallel()
        return right()


if __name__ == "__main__":
    assert right(), "the parent"
    loader = torch.utils.data.DataLoader(Rows(), num_workers=2, multiprocessing_context="fork")
    assert all(bool(row) for row in loader)
"""

CONCURRENT = """
from concurrent.futures import ThreadPoolExecutor

assert threads.layer() == os.environ.get("NUMBA_THREADING_LAYER", threads.layer())
with ThreadPoolExecutor(4) as pool:
    assert all(pool.map(lambda _: right(), range(12)))
"""


def run(program: str, **environment: str) -> None:
    """Run it in a process of its own, which may die or hang."""
    done = subprocess.run(
        [sys.executable, "-c", START + program],
        env={**os.environ, "NUMBA_NUM_THREADS": "2", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr[-2000:]}"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_computes_on_one_thread() -> None:
    run(FORK)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_data_loaders_worker_computes() -> None:
    pytest.importorskip("torch")
    run(WORKER)


def test_concurrent_threads_on_workqueue() -> None:
    """Two threads that enter workqueue's parallel region at once abort the process."""
    run(CONCURRENT, NUMBA_THREADING_LAYER="workqueue")


def test_concurrent_threads_on_the_default_layer() -> None:
    run(CONCURRENT)


def test_one_thread_runs_the_serial_form() -> None:
    run("assert not threads.parallel() and right()", NUMBA_NUM_THREADS="1")
