"""flash-linear-attention, where it is installed and a GPU is there: the field's Triton kernels.

https://github.com/fla-org/flash-linear-attention
"""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import FORWARD, TRAIN, Case
from benchmarks.inputs import Arrays, convert
from benchmarks.peers import Peer, Run

Call = Callable[[Any, dict[str, Tensor], float], tuple[Tensor, Any]]


def _delta(ops: Any, x: dict[str, Tensor], scale: float) -> Any:
    return ops.chunk_delta_rule(x["q"], x["k"], x["v"], x["beta"], scale, output_final_state=True)


def _gated_delta(ops: Any, x: dict[str, Tensor], scale: float) -> Any:
    g, beta = x["log_decay"], x["beta"]
    return ops.chunk_gated_delta_rule(x["q"], x["k"], x["v"], g, beta, scale=scale, output_final_state=True)


def _kda(ops: Any, x: dict[str, Tensor], scale: float) -> Any:
    g, beta = x["log_decay"], x["beta"]
    return ops.chunk_kda(x["q"], x["k"], x["v"], g, beta, scale=scale, output_final_state=True)


def _gla(ops: Any, x: dict[str, Tensor], scale: float) -> Any:
    return ops.chunk_gla(x["q"], x["k"], x["v"], x["log_decay"], scale=scale, output_final_state=True)


def _ssd(ops: Any, x: dict[str, Tensor], scale: float) -> Any:
    return ops.chunk_simple_gla(x["q"], x["k"], x["v"], x["log_decay"], scale=scale, output_final_state=True)


def _linear(ops: Any, x: dict[str, Tensor], scale: float) -> Any:
    return ops.chunk_linear_attn(x["q"], x["k"], x["v"], scale=scale, output_final_state=True, normalize=False)


# fla's ``chunk_ttt_linear`` is another model than ours (its rate belongs to the row, its residual to the inner output),
# so it is no peer here.
CALLS: dict[str, Call] = {
    "linear_attention": _linear,
    "ssd": _ssd,
    "gla": _gla,
    "delta_rule": _delta,
    "gated_delta_rule": _gated_delta,
    "kda": _kda,
}


def build(call: Call) -> Callable[[Case, Arrays], Run]:
    """A builder: hands arrays over and binds the pass."""

    def bind(case: Case, arrays: Arrays) -> Run:
        import fla.ops

        x = convert(arrays, "torch", case.dtype, case.device)
        dy = x.pop("dy")
        if case.kind == FORWARD:

            @torch.no_grad()
            def forward() -> Any:
                return call(fla.ops, x, case.scale)

            return forward
        leaves = {name: a.requires_grad_() for name, a in x.items()}

        def train() -> Any:
            y, _ = call(fla.ops, leaves, case.scale)
            return y, dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))

        return train

    return bind


def peers(device: str) -> list[Peer]:
    """Every function of fla that computes one of our mixers."""
    if device != "cuda" or not torch.cuda.is_available():
        return []
    try:
        number = version("flash-linear-attention")
    except PackageNotFoundError:
        number = version("fla-core")
    return [
        Peer("fla", number, mixer, (FORWARD, TRAIN), build(call), _refuses, ("cuda",)) for mixer, call in CALLS.items()
    ]


def _refuses(case: Case) -> str:
    return "its kernels round float32 to tf32" if case.dtype in ("float32", "float64") else ""
