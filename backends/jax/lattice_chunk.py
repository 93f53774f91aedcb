"""Lattice in chunks (``chunk_size=C > 1``) in closed form: gradients at the chunk's first slots Φ.

A piece is a chunk, or what of it lies before a checkpoint or in the call; S are the running slots before it. With b, W
counted from its first token:

    W_tj = [j≤t] e^{g_{j+1} + … + g_t}     b_t = e^{g_1 + … + g_t}
    Hm = V − KΦ (decoding) or V            A = Hm Φᵀ            E = beta ∘ (K − A) (encoding) or beta ∘ K
    S̃_t,i = b_t s_i − α_ti φ_i + Σ_j W_tj E_ji h_j              α = W(A∘E)
    ρ² = b² + N − α²   where S = Φ         N = W²(2E∘X + diag(G)∘E∘E)    X = (strictlower(W)∘G) E    G = Hm Hmᵀ
    ρ² = b²‖s‖² + 2b(W(E∘P) − α⟨φ,s⟩) + N + α²(‖φ‖² − 2)     P = Hm Sᵀ     elsewhere
    Y = scale · ((b∘Q')S − (α∘Q')Φ + (W∘(Q'Eᵀ))Hm)           Q' = Q/ρ, or Q without ``read_norm``

At the chunk's end ``Φ ← rownorm(S̃)``, measured. ``ρ²`` stays above the square of what is left of φ in S̃, for N and α²
cancel where a value points along a slot. A row that a reset empties is read as its first direction; the token that
follows it in the same chunk sees zeros there, where the specification sees that direction.

    q, k [B,H,C,K]   v, y [B,H,C,V]   beta [B,H,C] or [B,H,C,K]   log_decay [B,H,C]   Φ, S [B,H,K,V]
"""

import jax.numpy as jnp
import numpy as np
from jax import lax

from mixers.algebra import like, unit_directions
from mixers.backend import Config, Support
from mixers.lattice import given_slots, unit_rows
from mixers.problem import Arrays, Problem
from mixers.spec import Array

from .kernel import precision
from .pieced import PieceKernel
from .pieces import Pieces
from .triangle import before, between, logs
from .walk import Piece, State


class LatticeChunk(PieceKernel):
    """One chunk after another, each in closed form."""

    name = "lattice.chunk"
    form = "chunk"
    mixers = frozenset({"lattice"})

    def takes(self, problem: Problem) -> Support:
        """Only chunks."""
        if problem.option["chunk_size"] == 1:
            return Support.no("runs chunk_size > 1, and chunk_size is 1")
        return Support.yes()

    def suits(self, problem: Problem) -> bool:
        """A token alone needs no chunk."""
        return not problem.single

    def configs(self, problem: Problem) -> tuple[Config, ...]:
        """Nothing to choose: the chunk is the model's."""
        return ({},)

    def room(self, problem: Problem, config: Config) -> int:
        """The model's chunk."""
        chunk: int = problem.option["chunk_size"]
        return chunk

    def enter(self, problem: Problem, pieces: Pieces, initial: State) -> State:
        """Slots at the chunk's start and running ones, which are the same wherever all pieces are whole chunks."""
        slots = tuple(given_slots(jnp, a) for a in initial)
        return slots[:1] if pieces.closed else slots

    def leave(self, problem: Problem, pieces: Pieces, state: State) -> State:
        """Both again."""
        return state * 2 if pieces.closed else state

    def piece(self, problem: Problem, pieces: Pieces) -> Piece:
        """See above."""
        option, exact, whole = problem.option, precision(problem), pieces.whole

        def product(a: Array, b: Array) -> Array:
            return jnp.matmul(a, b, precision=exact)

        def piece(constants: Arrays, state: State, tokens: Arrays, known: Arrays) -> tuple[State, Array]:
            q, k, v, beta = (tokens[name] for name in ("q", "k", "v", "beta"))
            g = tokens.get("log_decay")
            size = k.shape[-2]
            # Only a decay empties a slot that was not empty.
            phi, *running = state if g is None else (given_slots(jnp, a) for a in state)
            now = phi if whole else running[0]
            phi_t = _turned(phi)
            beta = beta if beta.ndim == k.ndim else beta[..., None]
            h = v - product(k, phi) if option["objective"] == "decoding" else v
            along = product(h, phi_t)
            e = beta * (k - along if option["objective"] == "encoding" else k)
            if g is None:
                weights, since = jnp.asarray(np.tril(np.ones((size, size))), v.dtype), jnp.ones((size, 1), v.dtype)
            else:
                g = logs(g[..., None])
                weights, since = between(g)[..., 0], jnp.exp(before(g))
            alpha = product(weights, along * e)
            query = q
            if option["read_norm"]:
                gram = product(h, _turned(h))
                cross = product(jnp.where(np.tril(np.ones((size, size), bool), -1), weights * gram, 0), e)
                square = jnp.sum(h * h, -1)[..., None]
                norm = product(weights * weights, e * (2 * cross + square * e))
                if whole:
                    norm, least = since**2 + norm - alpha**2, since**2
                else:
                    ss, pp, ps = (jnp.sum(a * b, -1)[..., None, :] for a, b in ((now, now), (phi, phi), (phi, now)))
                    met = product(weights, e * product(h, _turned(now)))
                    norm = norm + since**2 * ss + 2 * since * (met - alpha * ps) + alpha**2 * (pp - 2)
                    least = (since * ps) ** 2
                norm = jnp.maximum(norm, least)
                if g is None:
                    query = q * lax.rsqrt(norm)
                else:
                    empty = norm == 0
                    query = jnp.where(empty, 0, q / jnp.sqrt(jnp.where(empty, 1, norm)))
            past = (
                product((since - alpha) * query, phi)
                if whole
                else (product(since * query, now) - product(alpha * query, phi))
            )
            y = past + product(weights * product(query, _turned(e)), h)
            if option["read_norm"] and g is not None:
                y = y + product(jnp.where(empty, q, 0), like(jnp, unit_directions(*phi.shape[-2:]), y))
            ends = since[..., -1, :, None] * now - alpha[..., -1, :, None] * phi
            ends = ends + product(_turned(weights[..., -1, :, None] * e), h)
            squares = jnp.sum(ends * ends, -1, keepdims=True)
            slots = ends * lax.rsqrt(squares) if g is None else unit_rows(jnp, ends)
            if pieces.closed:
                return (slots,), option["scale"] * y
            done = known["ends"].reshape(-1, 1, 1, 1)
            return (jnp.where(done, slots, phi), jnp.where(done, slots, ends)), option["scale"] * y

        return piece


def _turned(array: Array) -> Array:
    return jnp.swapaxes(array, -1, -2)


KERNELS = (LatticeChunk(),)
