"""Causal softmax attention over the cache and the tokens of the call, a block of queries at a time.

    y_t = Σ_{j≤t} softmax_j(attn_scale · ⟨q_t, k_j⟩) v_j

Old and new keys stand in one array, the new ones where the sequence's cache ends, as in the cache that is returned. The
backward keeps nothing: it computes a block's scores again.

    q [B,T,H,K]   k [B,T,G,K]   v [B,T,G,V]   keys [N,M+T,G,K]   values [N,M+T,G,V]   length [N]
"""

import jax
import jax.numpy as jnp
from jax import lax

from mixers.backend import Config, Support
from mixers.problem import Arrays, Problem
from mixers.spec import Array

from .kernel import JaxKernel, floating, precision, wide

ROOM = 128


class Attention(JaxKernel):
    """Blocks of queries against the whole cache."""

    name = "attention"
    form = "chunk"
    mixers = frozenset({"attention"})

    def takes(self, problem: Problem) -> Support:
        """Everything but checkpoints."""
        if problem.flags.checkpoint_every:
            return Support.no("every earlier cache is the first rows of the last one: cut it, without checkpoint_every")
        return Support.yes()

    def configs(self, problem: Problem) -> tuple[Config, ...]:
        """Queries of a block."""
        return ({"block_q": ROOM}, {"block_q": 64}, {"block_q": 256})

    def forward(self, problem: Problem, config: Config, x: Arrays, out: Arrays) -> None:
        """See ``Kernel``."""
        y, keys, values = _attend(problem, config["block_q"], floating(x), _counts(x))
        out |= {"y": y, "final.keys": keys, "final.values": values, "final.length": _lengths(problem, x)[1]}

    def backward(self, problem: Problem, config: Config, x: Arrays, out: Arrays, dout: Arrays, dx: Arrays) -> None:
        """See ``Kernel``."""
        counts = _counts(x)
        found, pull = jax.vjp(lambda given: _attend(problem, config["block_q"], given, counts), floating(x))
        names = ("y", "final.keys", "final.values")
        flows = tuple(
            jnp.zeros_like(a) if n not in dout else dout[n].astype(a.dtype) for n, a in zip(names, found, strict=True)
        )
        (gradients,) = pull(flows)
        dx |= gradients


def _counts(x: Arrays) -> Arrays:
    return {name: x[name] for name in ("offsets", "initial.length") if name in x}


def _lengths(problem: Problem, x: Arrays) -> tuple[Array, Array]:
    """Filled rows of every cache ``[N]``, before and after the call."""
    s = problem.sizes
    filled = x.get("initial.length", jnp.zeros(s.N, jnp.int32))
    fresh = jnp.diff(x["offsets"]) if "offsets" in x else jnp.full(s.N, s.T)
    return filled, (filled + fresh).astype(jnp.int32)


def _attend(problem: Problem, room: int, x: Arrays, counts: Arrays) -> tuple[Array, Array, Array]:
    """y, and the grown cache."""
    s, packed = problem.sizes, "offsets" in counts
    filled, _ = _lengths(problem, counts)
    q, k, v, old_keys, old_values = (wide(problem, x[n]) for n in ("q", "k", "v", "initial.keys", "initial.values"))
    t = jnp.arange(s.T)
    if packed:
        sequence = jnp.sum(counts["offsets"][None, 1:] <= t[:, None], axis=1)
        position = (t - counts["offsets"][sequence])[None]
        sequence = sequence[None]
    else:
        sequence = jnp.broadcast_to(jnp.arange(s.B)[:, None], (s.B, s.T))
        position = jnp.broadcast_to(t, (s.B, s.T))
    places = filled[sequence] + position

    def grow(old: Array, new: Array) -> Array:
        cache = jnp.pad(old, [(0, 0), (0, s.T), (0, 0), (0, 0)])
        return cache.at[sequence, places].set(new)

    keys, values = grow(old_keys, k), grow(old_values, v)
    scale = problem.option["attn_scale"]
    scale, exact = s.K**-0.5 if scale is None else scale, precision(problem)
    rows = keys.shape[1]

    def one(q: Array, n: Array, place: Array) -> Array:
        """A block of queries of one row: q [C,H,K], n [C], its sequences, place [C]."""
        heads = q.reshape(q.shape[0], s.G, -1, s.K)
        if packed:
            scores = jnp.einsum("cgmk,njgk->cgmnj", heads, keys, precision=exact)
            seen = (n[:, None] == jnp.arange(s.N))[:, :, None] & (jnp.arange(rows) <= place[:, None])[:, None]
        else:
            scores = jnp.einsum("cgmk,jgk->cgmj", heads, keys[n[0]], precision=exact)
            seen = jnp.arange(rows) <= place[:, None]
        shape = scores.shape
        scores = jnp.where(seen[:, None, None], scale * scores, -jnp.inf).reshape(*shape[:3], -1)
        weights = jax.nn.softmax(scores, axis=-1).reshape(shape)
        if packed:
            return jnp.einsum("cgmnj,njgv->cgmv", weights, values, precision=exact).reshape(q.shape[0], q.shape[1], -1)
        return jnp.einsum("cgmj,jgv->cgmv", weights, values[n[0]], precision=exact).reshape(*q.shape[:2], -1)

    blocks = -(-s.T // room)
    pad = blocks * room - s.T

    def cut(a: Array, mode: str) -> Array:
        a = jnp.pad(a, [(0, 0), (0, pad)] + [(0, 0)] * (a.ndim - 2), mode=mode)
        return jnp.moveaxis(a.reshape(s.B, blocks, room, *a.shape[2:]), 1, 0)

    block = jax.checkpoint(jax.vmap(one))
    y = lax.map(lambda now: block(*now), (cut(q, "constant"), cut(sequence, "edge"), cut(places, "edge")))
    return jnp.moveaxis(y, 0, 1).reshape(s.B, blocks * room, *y.shape[3:])[:, : s.T], keys, values


KERNELS = (Attention(),)
