"""What one writes in PyTorch: a loop over tokens, or batched matrix products over chunks.

Shapes are ``[B,T,H,·]`` outside and ``[B,H,chunks,C,·]`` inside; row ``i`` of a state ``[B,H,K,V]`` is slot ``i``.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import FORWARD, STEP, TRAIN, Case
from benchmarks.inputs import Arrays, convert, first_state
from benchmarks.peers import Peer, Run, kept_states

Inputs = dict[str, Tensor]
State = tuple[Tensor, ...]
Function = Callable[[Inputs, State, dict[str, Any]], tuple[Tensor, State]]

CHUNKS = (32, 64, 128)
SUB_CHUNK = 16
EPS = 1e-6


# One token: inputs [B,H,·].


def read(state: Tensor, query: Tensor) -> Tensor:
    """``Sᵀ q``."""
    return (query[..., None, :] @ state)[..., 0, :]


def fade(state: Tensor, log_decay: Tensor | None) -> Tensor:
    """The state times its decay, per head or per key channel."""
    if log_decay is None:
        return state
    decay = log_decay.exp()
    return state * (decay[..., None, None] if decay.ndim == 2 else decay[..., None])


def linear_token(x: Inputs, state: State, option: dict[str, Any]) -> tuple[Tensor, State]:
    """Linear attention, ``ssd`` and ``gla``."""
    memory = fade(state[0], x.get("log_decay")) + x["k"][..., :, None] * x["v"][..., None, :]
    return option["scale"] * read(memory, x["q"]), (memory,)


def delta_token(x: Inputs, state: State, option: dict[str, Any]) -> tuple[Tensor, State]:
    """The delta rule and its gated forms."""
    memory, k = fade(state[0], x.get("log_decay")), x["k"]
    write = x["beta"][..., None] * (x["v"] - read(memory, k))
    memory = memory + k[..., :, None] * write[..., None, :]
    return option["scale"] * read(memory, x["q"]), (memory,)


def lattice_token(x: Inputs, state: State, option: dict[str, Any]) -> tuple[Tensor, State]:
    """The exact recurrence of Lattice."""
    slots, k, v, beta = state[0], x["k"], x["v"], x["beta"]
    h = v - read(slots, k) if option["objective"] == "decoding" else v
    along = (slots @ h[..., :, None])[..., 0]
    z = beta[..., None] * (k - along if option["objective"] == "encoding" else k)
    slots = fade(slots, x.get("log_decay")) + z[..., :, None] * (h[..., None, :] - slots * along[..., :, None])
    slots = slots / slots.norm(dim=-1, keepdim=True)
    return option["scale"] * read(slots, x["q"]), (slots,)


def over_tokens(token: Function) -> Function:
    """A Python loop over the tokens of a sequence."""

    def run(x: Inputs, state: State, option: dict[str, Any]) -> tuple[Tensor, State]:
        columns = {name: a.unbind(1) for name, a in x.items()}
        outputs = []
        for t in range(len(columns["q"])):
            y, state = token({name: column[t] for name, column in columns.items()}, state, option)
            outputs.append(y)
        return torch.stack(outputs, 1), state

    return run


# Chunks: inputs [B,H,n,C,·].


def split(x: Tensor, chunk: int) -> Tensor:
    """``[B,T,H,…]`` as ``[B,H,n,C,…]``."""
    return x.unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, *range(4, x.ndim + 1)).contiguous()


def join(y: Tensor) -> Tensor:
    """The way back."""
    return y.permute(0, 2, 3, 1, 4).flatten(1, 2)


def running_decay(log_decay: Tensor | None, chunk: int) -> Tensor | None:
    """The sum of ``log_decay`` since the chunk began: ``[B,H,n,C,1]`` per head, ``[B,H,n,C,K]`` per key channel."""
    if log_decay is None:
        return None
    total = split(log_decay, chunk).cumsum(3)
    return total[..., None] if log_decay.ndim == 3 else total


def decayed_products(q: Tensor, k: Tensor, total: Tensor | None) -> Tensor:
    """``Σ_c q_ic k_jc e^{total_ic − total_jc}`` for ``i ≥ j``, zero elsewhere; only falling exponents are taken."""
    if total is None:
        return (q @ k.mT).tril()
    if total.shape[-1] == 1:
        return (q @ k.mT * (total - total.mT).tril().exp()).tril()
    size = q.shape[-2]
    sub = min(SUB_CHUNK, size)
    future = torch.ones(sub, sub, dtype=torch.bool, device=q.device).triu(1)[..., None]
    rows = []
    for first in range(0, size, sub):
        here = slice(first, first + sub)
        gap = total[..., here, None, :] - total[..., None, here, :]
        weighted = gap.masked_fill(future, -torch.inf).exp() * k[..., None, here, :]
        block = (weighted @ q[..., here, :, None])[..., 0]
        if first:
            base = total[..., first - 1 : first, :]
            before = k[..., :first, :] * (base - total[..., :first, :]).exp()
            block = torch.cat([(q[..., here, :] * (total[..., here, :] - base).exp()) @ before.mT, block], -1)
        rows.append(F.pad(block, (0, size - first - sub)))
    return torch.cat(rows, -2)


def chunked(chunk: int, delta: bool) -> Function:
    """The linear family (``delta=False``) or the delta family in chunks."""

    def run(x: Inputs, state: State, option: dict[str, Any]) -> tuple[Tensor, State]:
        q, k, v = (split(x[name], chunk) for name in ("q", "k", "v"))
        total = running_decay(x.get("log_decay"), chunk)
        grown = 1.0 if total is None else total.exp()
        q = q * option["scale"]
        inside = decayed_products(q, k, total)
        write, erase = v, None
        if delta:
            beta = split(x["beta"], chunk)[..., None]
            weighted = k * beta
            right = torch.cat([v * beta, weighted * grown], -1)
            lower = decayed_products(weighted, k, total)
            solved = torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)
            write, erase = solved.split([v.shape[-1], k.shape[-1]], -1)
        if total is not None:
            q, k, last = q * grown, k * (total[..., -1:, :] - total).exp(), grown[..., -1:, :].mT
        memory, outputs = state[0], []
        for n in range(q.shape[2]):
            new = write[:, :, n] if erase is None else write[:, :, n] - erase[:, :, n] @ memory
            outputs.append(q[:, :, n] @ memory + inside[:, :, n] @ new)
            memory = (memory if total is None else memory * last[:, :, n]) + k[:, :, n].mT @ new
        return join(torch.stack(outputs, 2)), (memory,)

    return run


def lattice_chunked(x: Inputs, state: State, option: dict[str, Any]) -> tuple[Tensor, State]:
    """Lattice with gradients at each chunk's first slots, in closed form."""
    chunk, objective = option["chunk_size"], option["objective"]
    q, k, v, beta = (split(x[name], chunk) for name in ("q", "k", "v", "beta"))
    beta = beta if beta.ndim == 5 else beta[..., None]
    total = split(x["log_decay"], chunk).cumsum(3) if "log_decay" in x else torch.zeros_like(v[..., 0])
    since = total.exp()[..., None]
    weight = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
    earlier = weight.tril(-1)
    slots, outputs = state[0], []
    for n in range(q.shape[2]):
        kn, vn, wn, b = k[:, :, n], v[:, :, n], weight[:, :, n], since[:, :, n]
        h = vn - kn @ slots if objective == "decoding" else vn
        along = h @ slots.mT
        z = beta[:, :, n] * (kn - along if objective == "encoding" else kn)
        alpha = wn @ (along * z)
        gram = h @ h.mT
        cross = (earlier[:, :, n] * gram) @ z
        grown_norm = (wn * wn) @ (2 * z * cross + gram.diagonal(dim1=-2, dim2=-1)[..., None] * z * z)
        norm = torch.sqrt(torch.maximum(b * b + grown_norm - alpha * alpha, b * b))
        query = q[:, :, n] / norm if option["read_norm"] else q[:, :, n]
        outputs.append(((b - alpha) * query) @ slots + (wn * (query @ z.mT)) @ h)
        slots = (b - alpha)[:, :, -1, :, None] * slots + (wn[:, :, -1, :, None] * z).mT @ h
        slots = slots / slots.norm(dim=-1, keepdim=True)
    return option["scale"] * join(torch.stack(outputs, 2)), (slots, slots)


def standardise(z: Tensor) -> tuple[Tensor, Tensor]:
    """``(z − mean)/std`` and ``std``."""
    centred = z - z.mean(-1, keepdim=True)
    std = torch.sqrt((centred * centred).mean(-1, keepdim=True) + EPS)
    return centred / std, std


def ttt_chunked(x: Inputs, state: State, option: dict[str, Any]) -> tuple[Tensor, State]:
    """TTT-linear's dual form, a mini-batch at a time, with the inner layer norm's default gain and shift."""
    chunk = option["chunk_size"]
    q, k, v, beta = (split(x[name], chunk) for name in ("q", "k", "v", "beta"))
    rate = 1 / torch.arange(1, chunk + 1, dtype=q.dtype, device=q.device)
    eta = (rate[:, None] * beta[..., None, :]).tril()
    products = eta * (q @ k.mT + 1)
    weight, bias, outputs, width = state[0], state[1], [], q.shape[-1]
    for n in range(q.shape[2]):
        unit, std = standardise(k[:, :, n] @ weight + bias[:, :, None])
        h = unit - (v[:, :, n] - k[:, :, n])
        grad = (width * h - h.sum(-1, keepdim=True) - unit * (h * unit).sum(-1, keepdim=True)) / (width * std)
        outputs.append(q[:, :, n] @ weight + bias[:, :, None] - products[:, :, n] @ grad)
        last = eta[:, :, n, -1, :, None]
        weight = weight - (last * k[:, :, n]).mT @ grad
        bias = bias - (last * grad).sum(-2)
    return join(q + standardise(torch.stack(outputs, 2))[0]), (weight, bias)


def attention(x: Inputs, state: State, option: dict[str, Any]) -> tuple[Tensor, State]:
    """PyTorch's own fused attention; its state is the keys and values."""
    q, k, v = (x[name].transpose(1, 2) for name in ("q", "k", "v"))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=option["attn_scale"])
    return y.transpose(1, 2), (x["k"], x["v"])


# Peers.


def build(function: Function, token: Function | None = None) -> Callable[[Case, Arrays], Run]:
    """A builder: hands arrays over and binds the pass."""

    def bind(case: Case, arrays: Arrays) -> Run:
        option = case.option | {"scale": case.scale}
        x = convert(arrays, "torch", case.dtype, case.device)
        dy = x.pop("dy")
        named = {str(i): a for i, a in enumerate(first_state(case.spec, case.sizes, case.option, _wide(case)))}
        state = tuple(convert(named, "torch", _wide(case), case.device).values())
        if case.kind == STEP:
            first = {name: a[:, 0].contiguous() for name, a in x.items()}
            return _without_gradients(token, first, state, option)
        if case.kind == FORWARD:
            return _without_gradients(function, x, state, option)
        leaves = {name: a.requires_grad_() for name, a in x.items()}

        def run() -> Any:
            y, _ = function(leaves, state, option)
            return y, dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))

        return run

    return bind


def _wide(case: Case) -> str:
    return "float64" if case.dtype == "float64" else "float32"


def _without_gradients(function: Any, x: Inputs, state: State, option: dict[str, Any]) -> Run:
    @torch.no_grad()
    def run() -> Any:
        return function(x, state, option)

    return run


def _divides(chunk: int) -> Callable[[Case], str]:
    def refuses(case: Case) -> str:
        return f"{case.length} tokens are no multiple of {chunk}" if case.length % chunk else ""

    return refuses


def _loop_refuses(case: Case) -> str:
    if case.option.get("chunk_size", 1) != 1 or not case.option.get("read_norm", True):
        return "the loop is written for the exact recurrence"
    if case.kind == TRAIN and kept_states(case) > 1e9:
        return "a differentiated loop keeps several states a token"
    return "a loop over more than 8192 tokens takes minutes" if case.length > 8192 else ""


def _model_chunk_refuses(case: Case) -> str:
    chunk = case.option["chunk_size"]
    if chunk == 1:
        return "the chunked form is another model than chunk_size=1"
    return _divides(chunk)(case)


def _half_refuses(inner: Callable[[Case], str]) -> Callable[[Case], str]:
    """Written in plain PyTorch, these compute in the inputs' dtype: float32 or wider."""

    def refuses(case: Case) -> str:
        return inner(case) if case.dtype in ("float32", "float64") else "written for float32 and float64"

    return refuses


def peers(device: str) -> list[Peer]:
    """Every peer written in PyTorch."""
    if device == "cuda" and not torch.cuda.is_available():
        return []
    tokens = dict.fromkeys(("linear_attention", "ssd", "gla"), linear_token)
    tokens |= dict.fromkeys(("delta_rule", "gated_delta_rule", "kda"), delta_token) | {"lattice": lattice_token}
    every, passes = (FORWARD, TRAIN, STEP), (FORWARD, TRAIN)

    def peer(name: str, mixer: str, allowed: tuple[str, ...], make: Any, refuses: Any) -> Peer:
        return Peer(f"torch {name}", torch.__version__, mixer, allowed, make, _half_refuses(refuses))

    found = [peer("loop", m, every, build(over_tokens(token), token), _loop_refuses) for m, token in tokens.items()]
    for mixer, token in tokens.items():
        if mixer != "lattice":
            delta = token is delta_token
            found += [peer(f"chunk {c}", mixer, passes, build(chunked(c, delta)), _divides(c)) for c in CHUNKS]
    for mixer, function in {"lattice": lattice_chunked, "ttt_linear": ttt_chunked}.items():
        found.append(peer("chunk", mixer, passes, build(function), _model_chunk_refuses))
    fused = build(attention)
    return [*found, Peer("torch SDPA", torch.__version__, "attention", passes, fused, lambda case: "")]
