"""TTT-linear, a mini-batch at a time: its dual form.

All gradients at the mini-batch's first W, c; Σ stands for what its earlier tokens have written already.

    x̂, std = standardised KW + c     h = w∘(w∘x̂ + w_b − (V − K))     G = beta∘(D·h − Σh − x̂ Σ(h∘x̂)) / (D·std)
    Z̄_i = q_i W + c − r_i (q_i ΣW + Σc + Σ_{j≤i} (⟨q_i,k_j⟩ + 1) G_j)          Y = Q + LN(Z̄)
    ΣW ← ΣW + KᵀG,  Σc ← Σc + ΣG     end: W ← W − r_b ΣW,  c ← c − r_b Σc,  both sums to zero

    q, k, v, y [B,H,C,K]   beta [B,H,C]   W, ΣW [B,H,K,K]   c, Σc [B,H,K]   r [C]   w, w_b [H,K]
"""

import jax.numpy as jnp
import numpy as np

from mixers.backend import Config, Support
from mixers.problem import Arrays, Problem
from mixers.spec import Array
from mixers.ttt import standardise

from .kernel import precision
from .pieced import PieceKernel
from .pieces import Pieces
from .walk import Piece, State


class TTTChunk(PieceKernel):
    """One mini-batch after another."""

    name = "ttt.chunk"
    form = "chunk"
    mixers = frozenset({"ttt_linear"})

    def takes(self, problem: Problem) -> Support:
        """Everything."""
        return Support.yes()

    def suits(self, problem: Problem) -> bool:
        """A token alone needs no mini-batch."""
        return not problem.single

    def configs(self, problem: Problem) -> tuple[Config, ...]:
        """Nothing to choose: the mini-batch is the model's."""
        return ({},)

    def room(self, problem: Problem, config: Config) -> int:
        """The model's mini-batch."""
        chunk: int = problem.option["chunk_size"]
        return chunk

    def piece(self, problem: Problem, pieces: Pieces) -> Piece:
        """See above."""
        chunk, exact = problem.option["chunk_size"], precision(problem)

        def product(a: Array, b: Array) -> Array:
            return jnp.matmul(a, b, precision=exact)

        def piece(constants: Arrays, state: State, tokens: Arrays, known: Arrays) -> tuple[State, Array]:
            weight, bias, weight_sum, bias_sum = state
            q, k, v, beta = (tokens[name] for name in ("q", "k", "v", "beta"))
            width, size = q.shape[-1], q.shape[-2]
            gain = constants["norm_weight"][:, None] if "norm_weight" in constants else jnp.ones((), q.dtype)
            shift = constants["norm_bias"][:, None] if "norm_bias" in constants else jnp.zeros((), q.dtype)
            rates = constants.get("token_scale", jnp.asarray(1 / np.arange(1, chunk + 1), q.dtype))
            places = jnp.minimum(known["phase"][:, None] + jnp.arange(size), chunk - 1)
            rate = rates[places][:, None, :, None]

            x, std = standardise(jnp, product(k, weight) + bias[..., None, :])
            h = gain * (gain * x + shift - (v - k))
            inner = width * h - jnp.sum(h, -1, keepdims=True) - x * jnp.sum(h * x, -1, keepdims=True)
            write = beta[..., None] * inner / (width * std)
            met = jnp.where(np.tril(np.ones((size, size), bool)), product(q, jnp.swapaxes(k, -1, -2)) + 1, 0)
            learned = product(met, write)
            if not pieces.whole:
                learned = learned + product(q, weight_sum) + bias_sum[..., None, :]
            seen = product(q, weight) + bias[..., None, :] - rate * learned
            y = q + gain * standardise(jnp, seen)[0] + shift

            weight_sum = weight_sum + product(jnp.swapaxes(k, -1, -2), write)
            bias_sum = bias_sum + jnp.sum(write, -2)
            done = known["ends"].reshape(-1, 1, 1)
            matrix = done[..., None]
            return (
                jnp.where(matrix, weight - rates[-1] * weight_sum, weight),
                jnp.where(done, bias - rates[-1] * bias_sum, bias),
                jnp.where(matrix, 0, weight_sum),
                jnp.where(done, 0, bias_sum),
            ), y

        return piece


KERNELS = (TTTChunk(),)
