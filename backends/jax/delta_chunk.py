"""The linear and delta families a chunk of tokens at a time: products of matrices, and a thin chain between them.

Rows are the tokens of a chunk, S_0 the state before it; ``pre_t``, ``post_j`` and ``D_tj`` are products of the decays
of tokens 1…t, j+1…C and j+1…t.

    M_tj = ⟨k_t, D_tj k_j⟩ for j < t     P_tj = ⟨q_t, D_tj k_j⟩ for j ≤ t     A = (I + diag(beta) M)⁻¹
    U_0 = A diag(beta) V                 W = A diag(beta) (K∘pre)             L = K∘post
    S_C = pre_C ∘ S_0 + Lᵀ(U_0 − W S_0)                                       the chain, see ``chain``
    U = U_0 − W S_0                      Y = scale · ((Q∘pre) S_0 + P U)

The linear family has U = V. All but the chain is computed for all chunks at once. The backward computes it again and
keeps the states before chunks.

    q, k [J,B,H,C,K]   v, y [J,B,H,C,V]   beta [J,B,H,C]   log_decay [J,B,H,C] or [J,B,H,C,K]   S [J,B,H,K,V]
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mixers.backend import Config, Support
from mixers.delta import l2_normalise
from mixers.linear import read_scale
from mixers.problem import Arrays, Problem
from mixers.spec import Array

from . import gpu
from .chain import Link, chain, chain_back, follow
from .kernel import floating, precision
from .pieced import PieceKernel, Prepared, dy_of, put_states, state_flows
from .pieces import Pieces
from .triangle import before, behind, between, logs, unit_inverse
from .walk import Piece


class Inside(NamedTuple):
    """What a chunk computes without its state; names as above."""

    queries: Array
    products: Array
    values: Array
    erase: Array | None
    keys: Array
    decay: Array | None


def inside(tokens: Arrays, scale: float, exact: lax.Precision) -> Inside:
    """All chunks at once."""
    q, k, v = tokens["q"] * scale, tokens["k"], tokens["v"]
    beta, g = tokens.get("beta"), tokens.get("log_decay")
    size, turned = k.shape[-2], jnp.swapaxes(k, -1, -2)
    queries, erasers, keys, decay = q, k, k, None
    lower = np.tril(np.ones((size, size), bool))
    if g is None:
        reads = jnp.where(lower, jnp.matmul(q, turned, precision=exact), 0)
        meets = None if beta is None else jnp.matmul(k, turned, precision=exact)
    else:
        channel = g.ndim == k.ndim
        g = logs(g if channel else g[..., None])
        grown, spans = jnp.exp(before(g)), between(g)
        queries, erasers, keys, decay = q * grown, k * grown, k * jnp.exp(behind(g)), grown[..., -1, :]
        if channel:
            faded = spans * k[..., None, :, :]
            reads = jnp.sum(faded * q[..., :, None, :], -1)
            meets = None if beta is None else jnp.sum(faded * k[..., :, None, :], -1)
        else:
            reads = jnp.matmul(q, turned, precision=exact) * spans[..., 0]
            meets = None if beta is None else jnp.matmul(k, turned, precision=exact) * spans[..., 0]
    if beta is None:
        return Inside(queries, reads, v, None, keys, decay)
    strength = beta[..., None]
    inverse = unit_inverse(jnp.where(np.tril(lower, -1), meets * strength, 0), exact)
    values = jnp.matmul(inverse, v * strength, precision=exact)
    return Inside(queries, reads, values, jnp.matmul(inverse, erasers * strength, precision=exact), keys, decay)


def link(part: Inside, exact: lax.Precision) -> Link:
    """What the chain needs of a chunk."""
    add = jnp.matmul(jnp.swapaxes(part.keys, -1, -2), part.values, precision=exact)
    return Link(add, part.decay, None if part.erase is None else part.keys, part.erase)


def outputs(part: Inside, state: Array, exact: lax.Precision) -> Array:
    """Y, from the state before each chunk."""
    written = part.values
    if part.erase is not None:
        written = written - jnp.matmul(part.erase, state, precision=exact)
    past = jnp.matmul(part.queries, state, precision=exact)
    return past + jnp.matmul(part.products, written, precision=exact)


def fused(problem: Problem) -> bool:
    """Whether the chain is one kernel of a GPU: there, in float32, where a state fits the registers."""
    _, _, keys, values = problem.widths
    return problem.device == "cuda" and problem.dtype != "float64" and max(keys, values) <= gpu.WIDEST


class DeltaChunk(PieceKernel):
    """Chunks of 32 tokens on a CPU, of 64 elsewhere, or of 16 where every key channel has a decay of its own."""

    name = "delta.chunk"
    form = "chunk"
    mixers = frozenset({"linear_attention", "ssd", "gla", "delta_rule", "gated_delta_rule", "kda"})
    aligned = False

    def takes(self, problem: Problem) -> Support:
        """Everything."""
        return Support.yes()

    def suits(self, problem: Problem) -> bool:
        """A token alone needs no chunk."""
        return not problem.single

    def configs(self, problem: Problem) -> tuple[Config, ...]:
        """Tokens of a chunk: the products of decays of a channel grow with its square, a long chain waits on a GPU."""
        sizes = (32, 64, 16) if problem.device == "cpu" else (64, 32, 128)
        if problem.layout("log_decay") == "B T H K":
            sizes = (16, 8, 32)
        return tuple({"block_t": size} for size in sizes)

    def room(self, problem: Problem, config: Config) -> int:
        """No more than there are."""
        return max(1, min(config["block_t"], problem.sizes.T))

    def piece(self, problem: Problem, pieces: Pieces) -> Piece:
        """Chunks of this family do not follow one another but for the chain."""
        raise NotImplementedError

    def prepare(self, problem: Problem, x: Arrays) -> Prepared:
        """Keys and queries of norm 1 where that is asked for."""
        constants, initial, tokens = super().prepare(problem, x)
        if problem.option.get("qk_l2norm", False):
            tokens |= {name: l2_normalise(jnp, tokens[name]) for name in ("q", "k")}
        return constants, initial, tokens

    def forward(self, problem: Problem, config: Config, x: Arrays, out: Arrays) -> None:
        """See ``Kernel``."""
        pieces, exact = self.cut(problem, config, x), precision(problem)
        _, initial, tokens = self.prepare(problem, floating(x))
        part = inside(
            {n: pieces.split(a) for n, a in tokens.items()}, read_scale(problem.option, problem.sizes.K), exact
        )
        states, final, checkpoints = chain(pieces, link(part, exact), initial, exact, fused(problem))
        out["y"] = pieces.join(outputs(part, states, exact))
        put_states(problem, pieces, out, final, checkpoints)
        if problem.flags.grad:
            out["kept.states"] = states

    def backward(self, problem: Problem, config: Config, x: Arrays, out: Arrays, dout: Arrays, dx: Arrays) -> None:
        """See ``Kernel``."""
        pieces, exact, states = self.cut(problem, config, x), precision(problem), out["kept.states"]
        (constants, initial, tokens), pull = jax.vjp(lambda given: self.prepare(problem, given), floating(x))
        scale = read_scale(problem.option, problem.sizes.K)
        parts = {name: pieces.split(a) for name, a in tokens.items()}
        part, pull_part = jax.vjp(lambda tokens: inside(tokens, scale, exact), parts)
        _, pull_y = jax.vjp(lambda part, states: outputs(part, states, exact), part, states)
        dpart, flow = pull_y(pieces.split(dy_of(problem, dout)))
        links, pull_link = jax.vjp(lambda part: link(part, exact), part)
        flows = state_flows(problem, pieces, initial, dout)
        dbehind, dinitial = chain_back(pieces, links, initial, flow, *flows, exact, fused(problem))
        (dlinks,) = jax.vjp(lambda links: follow(states, links, exact), links)[1](dbehind)
        dpart = jax.tree.map(jnp.add, dpart, pull_link(dlinks)[0])
        (dparts,) = pull_part(dpart)
        (found,) = pull((constants, dinitial, {name: pieces.join(a) for name, a in dparts.items()}))
        dx |= found


KERNELS = (DeltaChunk(),)
