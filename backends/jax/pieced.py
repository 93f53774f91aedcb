"""Kernels that walk over pieces: what they share beside the mathematics of a piece.

``prepare`` turns arrays as the caller passed them into constants, first states and tokens; it is differentiable (casts,
repeated heads, normalised keys), so its gradient is JAX's.
"""

from abc import abstractmethod

import jax
import jax.numpy as jnp

from mixers.arrays.jax import vary
from mixers.backend import Config
from mixers.problem import Arrays, Problem
from mixers.spec import Array

from .kernel import JaxKernel, fields, floating, flowing, spread, wide
from .pieces import Pieces, cut
from .walk import Piece, State, back, walk

Prepared = tuple[Arrays, State, Arrays]


class PieceKernel(JaxKernel):
    """A kernel whose pieces follow each other, each from the state that the one before left."""

    aligned = True

    @abstractmethod
    def piece(self, problem: Problem, pieces: Pieces) -> Piece:
        """One piece, as a function of constants, state, tokens and what is known of it."""

    def enter(self, problem: Problem, pieces: Pieces, initial: State) -> State:
        """What the walk carries, from first states."""
        return initial

    def leave(self, problem: Problem, pieces: Pieces, state: State) -> State:
        """States, from what the walk carries."""
        return state

    def room(self, problem: Problem, config: Config) -> int:
        """Tokens of a piece."""
        return config["block_t"]

    def cut(self, problem: Problem, config: Config, x: Arrays) -> Pieces:
        """The pieces of a call."""
        return cut(problem, self.room(problem, config), x.get("offsets"), x.get("initial.phase"), aligned=self.aligned)

    def prepare(self, problem: Problem, x: Arrays) -> Prepared:
        """Constants, first states ``[N,…]``, tokens ``[B,T,H,…]``, all in the dtype of arithmetic."""
        spec = problem.spec
        constants = {a.name: wide(problem, x[a.name]) for a in spec.parameters if a.name in x}
        initial = tuple(wide(problem, x[f"initial.{name}"]) for name in fields(problem))
        tokens = {}
        for arg in spec.inputs:
            if arg.name in x:
                array = wide(problem, x[arg.name])
                tokens[arg.name] = spread(problem, array) if "G" in arg.axes.split() else array
        return constants, initial, tokens

    def forward(self, problem: Problem, config: Config, x: Arrays, out: Arrays) -> None:
        """See ``Kernel``."""
        pieces = self.cut(problem, config, x)
        constants, initial, tokens = self.prepare(problem, floating(x))
        parts = {name: pieces.split(a) for name, a in tokens.items()}
        carried, piece = self.enter(problem, pieces, initial), self.piece(problem, pieces)
        done = walk(pieces, piece, constants, carried, parts, problem.flags.grad)
        out["y"] = pieces.join(done.y)
        final, checkpoints = (self.leave(problem, pieces, state) for state in (done.final, done.checkpoints))
        put_states(problem, pieces, out, final, checkpoints)
        out |= {f"kept.{name}": a for name, a in zip(fields(problem), done.starts, strict=False)}

    def backward(self, problem: Problem, config: Config, x: Arrays, out: Arrays, dout: Arrays, dx: Arrays) -> None:
        """See ``Kernel``."""
        pieces = self.cut(problem, config, x)
        (constants, initial, tokens), pull = jax.vjp(lambda given: self.prepare(problem, given), floating(x))
        parts = {name: pieces.split(a) for name, a in tokens.items()}
        carried, pull_enter = jax.vjp(lambda initial: self.enter(problem, pieces, initial), initial)
        starts = tuple(out[f"kept.{name}"] for name, _ in zip(fields(problem), carried, strict=False))
        dy = pieces.split(dy_of(problem, dout))
        flows = (self._pull_leave(problem, pieces, d) for d in state_flows(problem, pieces, initial, dout))
        piece = self.piece(problem, pieces)
        dconstants, dcarried, dparts = back(pieces, piece, constants, carried, parts, starts, dy, *flows)
        (dinitial,) = pull_enter(dcarried)
        (found,) = pull((dconstants, dinitial, {name: pieces.join(a) for name, a in dparts.items()}))
        dx |= found

    def _pull_leave(self, problem: Problem, pieces: Pieces, flow: State | None) -> State | None:
        """Gradients of ``leave``, which is linear."""
        if flow is None:
            return None
        carried = jax.eval_shape(lambda state: self.enter(problem, pieces, state), flow)
        (found,) = jax.linear_transpose(lambda state: self.leave(problem, pieces, state), carried)(flow)
        result: State = found
        return result


def dy_of(problem: Problem, dout: Arrays) -> Array:
    """The gradient of y, zeros where nothing flows back."""
    shape, _ = problem.outputs()["y"]
    return wide(problem, dout["y"]) if "y" in dout else vary(jnp.zeros(shape, problem.compute_dtype), dout)


def put_states(problem: Problem, pieces: Pieces, out: Arrays, final: State, checkpoints: State) -> None:
    """Name final states and checkpoints, counters among them."""
    out |= {f"final.{name}": a for name, a in zip(fields(problem), final, strict=True)}
    out |= {f"checkpoint.{name}": a for name, a in zip(fields(problem), checkpoints, strict=False)}
    if pieces.last_phase is not None and "phase" in (f.name for f in problem.spec.state(problem.option).fields):
        out["final.phase"] = jnp.broadcast_to(jnp.asarray(pieces.last_phase), (problem.sizes.N,))
        if pieces.mark_phase is not None:
            shape = (problem.sizes.B, pieces.mark_phase.shape[1])
            out["checkpoint.phase"] = jnp.broadcast_to(jnp.asarray(pieces.mark_phase), shape)


def state_flows(problem: Problem, pieces: Pieces, initial: State, dout: Arrays) -> tuple[State | None, State | None]:
    """Gradients of final states and of checkpoints; None where nothing flows back."""
    dfinal = flowing(problem, dout, "final", [a.shape for a in initial])
    if pieces.marks is None:
        return dfinal, None
    marks = problem.sizes.T // problem.flags.checkpoint_every
    shapes = [(problem.sizes.B, marks, *a.shape[1:]) for a in initial]
    return dfinal, flowing(problem, dout, "checkpoint", shapes)
