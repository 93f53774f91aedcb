"""Models that learn side by side.

A step (forward, backward, clipping, AdamW, the learning rate's plan) is one CUDA graph on a stream of its own, and the
batches lie on the device beforehand: so a step costs one launch, and several small models share a GPU that none of
them fills. On a CPU, and where a step cannot be captured, the same step runs as it stands.

    rate(s) = peak · min((s+1)/(S/10), (S−s)/(S − S/10))        s = 0 … S−1
    the float32 model runs under bfloat16 autocast on a GPU, in float32 on a CPU
"""

import math
import time
import traceback
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mixers.nn import KeepBudget, LanguageModel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"
WARMUP = 0.1
EAGER = 3  # steps that compile the kernels, before one is captured

Loss = Callable[..., Tensor]


def half() -> torch.autocast:
    """bfloat16 on a GPU."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU, cache_enabled=False)


class Training:
    """One model's training.

    Args:
        model: float32, on the device.
        loss: of the model and one batch, a number.
        batches: tensors ``[S,…]``, a row a step: what ``loss`` takes.
        rate: the highest learning rate.

    Attributes:
        losses: ``[S]``, of each step's batch before that step.
        kept: ``[S]``, the share of tokens that a ``KeepBudget`` in the model counted; zeros without one.
        captured: whether a step is one CUDA graph.
    """

    def __init__(self, model: LanguageModel, loss: Loss, batches: Sequence[Tensor], rate: float) -> None:
        """See the class."""
        self.model, self.loss, self.batches = model, loss, batches
        self.steps = len(batches[0])
        self.losses, self.kept = torch.zeros(2, self.steps, device=DEVICE)
        self.at = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        self.plan = torch.tensor([rate * self._share(s) for s in range(self.steps)], device=DEVICE)
        self.rate = self.plan[:1].clone()
        self.budgets = {id(m): m for m in model.modules() if isinstance(m, KeepBudget)}.values()
        self.optimiser = self._optimiser()
        self.stream = torch.cuda.Stream() if GPU else None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.captured, self.done, self.why = False, 0, ""

    def _share(self, step: int) -> float:
        rise = max(1, round(WARMUP * self.steps))
        return min((step + 1) / rise, (self.steps - step) / max(1, self.steps - rise))

    def _optimiser(self) -> torch.optim.Optimizer:
        """Matrices decay; gains, gates, filters, embeddings and first states do not."""
        linear = {id(m.weight) for m in self.model.modules() if isinstance(m, nn.Linear)}
        groups = [
            {"params": [p for p in self.model.parameters() if (id(p) in linear) is decays], "weight_decay": decay}
            for decays, decay in ((True, 0.1), (False, 0.0))
        ]
        return torch.optim.AdamW(groups, lr=self.rate[0], betas=(0.9, 0.95), fused=GPU, capturable=GPU)

    def step(self) -> None:
        """One step; on a GPU it is under way when this returns."""
        if self.stream is None:
            self._update()
        else:
            with torch.cuda.stream(self.stream):
                if self.done == EAGER:
                    self._capture()
                if self.graph is None:
                    self._update()
                else:
                    self.graph.replay()
        self.done += 1

    def _capture(self) -> None:
        """The step as a graph; why not, where it cannot be."""
        self.stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self._update()
        except RuntimeError:
            self.why = traceback.format_exc()[-1500:]
            return
        self.graph, self.captured = graph, True

    def _update(self) -> None:
        batch = [rows.index_select(0, self.at)[0] for rows in self.batches]
        self.rate.copy_(self.plan.index_select(0, self.at))
        with half():
            loss = self.loss(self.model, *batch)
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if not GPU:
            for group in self.optimiser.param_groups:
                group["lr"] = self.rate.item()
        self.optimiser.step()
        self.losses.index_copy_(0, self.at, loss.detach().float()[None])
        for budget in self.budgets:
            share = budget.seen[0] / budget.seen[1].clamp(min=1)
            self.kept.index_copy_(0, self.at, share.float()[None])
            budget.step()
        self.at += 1


def train(trainings: Sequence[Training]) -> float:
    """All of them to their ends, side by side; seconds behind the steps that compile."""
    start = 0.0
    wait()
    for step in range(max(t.steps for t in trainings)):
        if step == EAGER + 1:
            wait()
            start = time.perf_counter()
        for training in trainings:
            if step < training.steps:
                training.step()
    wait()
    return time.perf_counter() - start


def wait() -> None:
    """Until the device is through."""
    if GPU:
        torch.cuda.synchronize()


def model_of(seed: int, **config: object) -> LanguageModel:
    """A model whose first weights follow from the seed, on any device."""
    torch.manual_seed(seed)
    return LanguageModel(**config).to(DEVICE)


def curve(losses: Tensor, points: int = 40) -> list[float]:
    """Means of equal parts; not-a-numbers as None would hide them, so they are left as infinite."""
    parts = losses.double().cpu().tensor_split(min(points, len(losses)))
    return [round(v, 5) if math.isfinite(v := float(part.mean())) else 1e9 for part in parts]
