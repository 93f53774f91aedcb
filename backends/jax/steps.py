"""Any mixer token by token: its specification's ``step`` under ``lax.scan``.

    state_t, y_t = step(token_t, state_{t-1})

Pieces of 32 tokens; the backward keeps the states before pieces, computes those inside again, and differentiates the
step itself. So a mixer that has no kernel of its own has gradients in little memory all the same.

    tokens [C,B,H,·] of a piece   state as the specification has it
"""

import jax.numpy as jnp
from jax import lax

from mixers.backend import Config, Support
from mixers.lattice import given_slots
from mixers.problem import Arrays, Problem
from mixers.registry import get_spec, names
from mixers.spec import Array

from . import gpu
from .kernel import fields, floating
from .pieced import PieceKernel
from .pieces import Pieces
from .walk import Piece, State

ROOM = 32


class Steps(PieceKernel):
    """The reference's loop, with a backward that keeps little."""

    name = "steps"
    form = "recurrent"
    mixers = frozenset(name for name in names() if get_spec(name).reserve is None)
    aligned = False

    def takes(self, problem: Problem) -> Support:
        """Every mixer of the library whose state is of one size."""
        return Support.yes()

    def configs(self, problem: Problem) -> tuple[Config, ...]:
        """Tokens between kept states."""
        return ({"block_t": ROOM}, {"block_t": 16}, {"block_t": 64})

    def room(self, problem: Problem, config: Config) -> int:
        """No more than there are."""
        return max(1, min(config["block_t"], problem.sizes.T))

    def piece(self, problem: Problem, pieces: Pieces) -> Piece:
        """An inner scan over the tokens of a piece; empty places leave the state alone."""
        spec, option = problem.spec, problem.option
        names, every = fields(problem), spec.state(option).fields

        def step(constants: Arrays, state: State, token: Arrays, phase: Array | None) -> tuple[State, Array]:
            held = dict(zip(names, state, strict=True)) | {"phase": phase}
            y, after = spec.step(jnp, option, {**constants, **token}, tuple(held[f.name] for f in every))
            return tuple(a for a, f in zip(after, every, strict=True) if not f.counter), y

        def piece(constants: Arrays, state: State, tokens: Arrays, known: Arrays) -> tuple[State, Array]:
            batch = tokens["q"].shape[0]

            def body(state: State, now: tuple[Arrays, Array, Array | None]) -> tuple[State, Array]:
                token, place, valid = now
                phase = None
                if "phase" in known:
                    phase = jnp.broadcast_to((known["phase"] + place) % option["chunk_size"], (batch,))
                after, y = step(constants, state, token, phase)
                if valid is not None:
                    after = tuple(
                        jnp.where(valid.reshape(-1, *(1,) * (a.ndim - 1)), a, s)
                        for a, s in zip(after, state, strict=True)
                    )
                return after, y

            # A token of a piece has no axis C; heads lie before it.
            rows = {name: jnp.moveaxis(a, 2, 0) for name, a in tokens.items()}
            places = jnp.arange(tokens["q"].shape[2], dtype=jnp.int32)
            valid = known["valid"].T if "valid" in known else None
            state, y = lax.scan(body, state, (rows, places, valid))
            return state, jnp.moveaxis(y, 0, 2)

        return piece


class LatticeOnGPU(Steps):
    """Exact Lattice in one kernel, the slots in registers; the backward walks as that of any mixer."""

    name = "lattice.pallas"
    mixers = frozenset({"lattice"})

    def takes(self, problem: Problem) -> Support:
        """The exact recurrence on a GPU, on a batch."""
        if problem.device != "cuda":
            return Support.no(f"runs on cuda, and the arrays are on {problem.device}")
        if problem.option["chunk_size"] != 1:
            return Support.no(f"runs chunk_size=1, and chunk_size is {problem.option['chunk_size']}")
        if problem.packed or problem.flags.checkpoint_every:
            return Support.no("takes neither packs nor checkpoints")
        if problem.dtype == "float64" or max(problem.widths[2:]) > gpu.WIDEST:
            return Support.no(f"takes float32 and halves, and widths up to {gpu.WIDEST}")
        return Support.yes()

    def forward(self, problem: Problem, config: Config, x: Arrays, out: Arrays) -> None:
        """See ``Kernel``."""
        _, (first,), tokens = self.prepare(problem, floating(x))
        option, every = problem.option, self.room(problem, config)
        options = option["objective"], option["read_norm"], option["scale"], every
        y, last, starts = gpu.lattice(tokens, given_slots(jnp, first), *options)
        out |= {"y": y, "final.state": last}
        if problem.flags.grad:
            out["kept.state"] = jnp.moveaxis(starts, 2, 0)


KERNELS = (LatticeOnGPU(), Steps())
