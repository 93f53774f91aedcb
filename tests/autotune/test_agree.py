"""Ranks run what rank 0 runs, and a plan outlives what became known between a forward and its backward."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mixers.autotune.profile import Profile

import mixers
from mixers import autotune
from mixers.plan import Plan

RANK = """
import datetime, os, sys
from pathlib import Path
os.environ["MIXERS_PROFILE"] = sys.argv[3] + sys.argv[1] + ".toml"
import numpy as np, torch, torch.distributed as dist
import mixers
from mixers.autotune.profile import save
sys.path.insert(0, sys.argv[4])
from test_tuner import entry_of
rank = int(sys.argv[1])
x = np.ones((1, 9, 2, 8), np.float32)
mix = mixers.get("linear_attention")
problem = mix.validated(x, x, x).problem()
save(Path(os.environ["MIXERS_PROFILE"]), [entry_of(problem, ("numba/delta.chunk", "numba/delta.recurrent")[rank])])
store = dist.FileStore(sys.argv[2], 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
t = torch.ones(1, 9, 2, 8)
print("chosen", mix.explain(x, x, x).chosen.name)
dist.barrier()
"""


def test_all_ranks_run_what_rank_0_knows(tmp_path: Path) -> None:
    """Each rank has a profile of its own, which say the opposite."""
    pytest.importorskip("torch")
    (tmp_path / "rank.py").write_text(RANK)
    here = str(Path(__file__).parent)
    command = [sys.executable, str(tmp_path / "rank.py")]
    rest = [str(tmp_path / "store"), str(tmp_path / "profile"), here]
    ranks = [
        subprocess.Popen([*command, str(r), *rest], stdout=subprocess.PIPE, text=True, env=dict(os.environ))
        for r in (0, 1)
    ]
    found = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert all("chosen numba/delta.chunk" in text for text in found), found


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_forward_keeps_its_plan(monkeypatch: pytest.MonkeyPatch, reentrant: bool) -> None:
    """Activation checkpointing runs the forward again in the backward, after the profile that chose has gone."""
    torch = pytest.importorskip("torch")
    from test_tuner import entry_of
    from torch.utils.checkpoint import checkpoint

    ran: list[str] = []
    forward, backward = Plan.forward, Plan.backward

    def spy(self: Plan, *arguments: Any) -> None:
        assert self.kernel is not None
        ran.append(self.kernel.name)
        (forward if len(arguments) == 3 else backward)(self, *arguments)

    mix = mixers.get("linear_attention")
    drawn = np.random.default_rng(0).standard_normal((3, 1, 40, 2, 8), dtype=np.float32)
    x = [torch.from_numpy(a).requires_grad_() for a in drawn]
    mix(*x).y.sum().backward()  # a plan for gradients is known
    entry = entry_of(mix.validated(*drawn).problem(), "numba/delta.chunk")
    monkeypatch.setattr(Plan, "forward", spy)
    monkeypatch.setattr(Plan, "backward", spy)
    with autotune.using(Profile.of([entry])):
        y = checkpoint(lambda *q: mix(*q).y, *x, use_reentrant=reentrant)
    assert ran == ["delta.chunk"]
    y.sum().backward()
    assert ran == ["delta.chunk"] * 3  # computed again, and taken back
    with torch.no_grad():
        mix(*x)
    assert ran[-1] == "delta.recurrent"
