"""Causal softmax attention through torch's fused kernels.

    y_t = Σ_{j≤t} softmax_j(attn_scale · ⟨q_t, k_j⟩) v_j

    q, y [B,T,H,K|V]     k, v [B,T,G,K|V]     cache: keys, values [N,M,G,K|V], length [N]

Without a cache and without a pack this is torch's causal attention and nothing else. With one, the old keys stand
before the new ones, M of every sequence, and a mask says what a query sees: of its own sequence the first ``length``
old ones and the new ones up to itself. The mask has a byte for every pair, and torch's kernels visit them all.

Nothing is kept but the inputs and y, neither of which torch's backward can start from: it runs its forward again.
"""

from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from mixers.backend import Config, Support
from mixers.problem import Arrays, Problem
from mixers.spec import Array

from .kernel import TritonKernel


class _Places(NamedTuple):
    """Where new tokens go, each ``[B,T]``.

    Attributes:
        sequence: the sequence that a token belongs to.
        position: its place in that sequence's cache.
    """

    sequence: Array
    position: Array


def _places(problem: Problem, x: Arrays) -> _Places:
    """The place of every new token."""
    s, offsets, length = problem.sizes, x["offsets"], x["initial.length"].long()
    token = torch.arange(s.T, device=length.device)
    if offsets is None:
        sequence = torch.arange(s.B, device=length.device)[:, None].expand(s.B, s.T)
        return _Places(sequence, length[:, None] + token)
    sequence = torch.searchsorted(offsets, token, right=True) - 1
    return _Places(sequence[None], (length[sequence] + token - offsets[sequence])[None])


def _mask(problem: Problem, x: Arrays, places: _Places) -> Array:
    """Which keys, the old ones of all sequences in the row before the new ones, a query sees: ``[B,1,T,·]``."""
    s, length = problem.sizes, x["initial.length"].long()
    device, rows = length.device, places.sequence.shape[0]
    owner = torch.arange(s.N, device=device).view(rows, s.N // rows, 1).expand(-1, -1, s.M).flatten(1)
    slot = torch.arange(s.M, device=device).repeat(s.N // rows)
    mine = places.sequence[:, :, None]
    old = (mine == owner[:, None]) & (slot < length[owner])[:, None]
    token = torch.arange(s.T, device=device)
    new = (mine == places.sequence[:, None]) & (token[None, :] <= token[:, None])
    return torch.cat([old, new], dim=2)[:, None]


def _attend(problem: Problem, x: Arrays, q: Array, k: Array, v: Array, keys: Array, values: Array) -> Array:
    """y, by operations that torch can differentiate."""
    s = problem.sizes
    mask = None
    if problem.packed or s.M:
        mask = _mask(problem, x, _places(problem, x))
        rows = q.shape[0]
        k = torch.cat([keys.to(k.dtype).reshape(rows, -1, *k.shape[2:]), k], dim=1)
        v = torch.cat([values.to(v.dtype).reshape(rows, -1, *v.shape[2:]), v], dim=1)
    y = scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=problem.option["attn_scale"],
        enable_gqa=s.G != s.H,
    )
    return y.transpose(1, 2)


def _differentiate(problem: Problem, x: Arrays, dy: Array, names: tuple[str, ...]) -> tuple[Array, ...]:
    """The gradients of some inputs from that of y.

    Inside an operator torch keeps no record; it is told to do so here, as outside.
    """
    keys = torch._C.DispatchKeySet
    autograd = keys(torch._C.DispatchKey.AutogradFunctionality)
    excluded = torch._C._dispatch_tls_local_exclude_set() - autograd
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        given = {name: x[name].detach().requires_grad_(name in names) for name in _DIFFERENTIABLE}
        y = _attend(problem, x, *given.values())
        return torch.autograd.grad(y, [given[name] for name in names], dy)


_DIFFERENTIABLE = ("q", "k", "v", "initial.keys", "initial.values")


def _append(old: Array, new: Array, places: _Places, cache: Array) -> None:
    """The old cache, the new tokens written at its length, zeros behind."""
    cache[:, : old.shape[1]] = old
    cache[:, old.shape[1] :] = 0
    cache[places] = new


def _split(problem: Problem, x: Arrays, places: _Places, dcache: Array, dold: Array | None) -> Array:
    """The adjoint of ``_append``: returns what flows into the new tokens and fills ``dold``."""
    if dold is not None:
        length, offsets = x["initial.length"].long()[:, None], x["offsets"]
        tokens = problem.sizes.T if offsets is None else torch.diff(offsets)[:, None]
        slot = torch.arange(dold.shape[1], device=dold.device)
        written = (slot >= length) & (slot < length + tokens)
        dold.copy_(dcache[:, : dold.shape[1]]).masked_fill_(written[:, :, None, None], 0)
    return dcache[places]


class AttentionFused(TritonKernel):
    """torch's own attention."""

    name = "attention.fused"
    form = "chunk"
    mixers = frozenset({"attention"})
    batch_invariant = False

    def takes(self, problem: Problem) -> Support:
        """Everything but checkpoints."""
        if problem.flags.checkpoint_every:
            return Support.no("every earlier cache is the first rows of the last one: cut it, without checkpoint_every")
        return Support.yes()

    def configs(self, problem: Problem) -> tuple[Config, ...]:
        """Nothing to choose: torch does."""
        return ({},)

    def forward(self, problem: Problem, config: Config, x: Arrays, out: Arrays) -> None:
        """Fill ``y`` and the grown cache."""
        if problem.sizes.T:
            out["y"].copy_(_attend(problem, x, *(x[name] for name in _DIFFERENTIABLE)))
        if "final.keys" in out:
            places = _places(problem, x)
            _append(x["initial.keys"], x["k"], places, out["final.keys"])
            _append(x["initial.values"], x["v"], places, out["final.values"])
            tokens = problem.sizes.T if x["offsets"] is None else torch.diff(x["offsets"])
            out["final.length"].copy_(x["initial.length"] + tokens)

    def backward(self, problem: Problem, config: Config, x: Arrays, out: Arrays, dout: Arrays, dx: Arrays) -> None:
        """Fill the gradients of inputs and cache."""
        dy, names = dout.get("y"), tuple(name for name in _DIFFERENTIABLE if name in dx)
        for name in names:
            dx[name].zero_()
        if dy is not None and problem.sizes.T:
            reached = tuple(name for name in names if problem.sizes.M or not name.startswith("initial."))
            for name, gradient in zip(reached, _differentiate(problem, x, dy, reached), strict=True):
                dx[name].copy_(gradient)
        places = _places(problem, x)
        for name, new in (("keys", "k"), ("values", "v")):
            dcache, dold = dout.get(f"final.{name}"), dx.get(f"initial.{name}")
            if dcache is not None:
                part = None if dold is None else torch.empty_like(dold)
                dx[new] += _split(problem, x, places, dcache, part)
                if dold is not None:
                    dold += part


KERNELS = (AttentionFused(),)
