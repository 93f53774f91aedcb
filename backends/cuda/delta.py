"""The linear and delta families token by token: sequences, packs, single tokens, and states in a pool.

    S' = decay ∘ S      u = beta (v − S'ᵀ k) or v      S = S' + k uᵀ      y = scale · Sᵀ q

    q, k [B,T,G,K]   v, y [B,T,H,V]   beta [B,T,H]   log_decay [B,T,H] or [B,T,H,K]   S [N,H,K,V]

A configuration lays one head's state over threads: ``lanes`` share a column, each with ``rows`` of it; a group of lanes
has ``columns`` columns, a block ``warps`` warps; ``tile`` tokens at a time come through shared memory.
"""

from typing import Any

from mixers.backend import Config, Pool, Support
from mixers.linear import read_scale
from mixers.problem import Arrays, Problem
from mixers.spec import Array

from .arrays import kind, place
from .device import WARP
from .kernel import PROCESSORS, CudaKernel, blank_unused
from .program import Constants, Program, constants

MIXERS = frozenset({"linear_attention", "ssd", "gla", "delta_rule", "gated_delta_rule", "kda"})

# Rows of a column, and the largest tile of state that a thread holds in registers.
WIDEST, MOST_CELLS = 256, 64

FORWARD = Program("delta_forward")


def decay_axes(problem: Problem) -> int:
    """0 without a decay, 1 for one a head, 2 for one a channel."""
    layout = problem.layout("log_decay")
    return 0 if layout is None else 2 if layout.endswith("K") else 1


def layout(key_dim: int, value_dim: int, lanes: int, columns: int, warps: int, tile: int) -> dict[str, int] | None:
    """A configuration with these lanes, None where a thread would hold more than it can."""
    rows = 4 * -(-key_dim // (4 * lanes))
    if rows * columns > MOST_CELLS or (lanes > 1 and rows * (lanes // 2) >= key_dim):
        return None
    wide = WARP // lanes * columns
    warps = min(warps, -(-value_dim // wide))
    return {"lanes": lanes, "rows": rows, "columns": columns, "warps": warps, "tile": tile}


class DeltaRecurrent(CudaKernel):
    """Token by token, the state in registers."""

    name = "delta.recurrent"
    form = "recurrent"
    mixers = MIXERS
    in_place = True

    def takes(self, problem: Problem) -> Support:
        """Columns of up to 256 rows; any number of columns, which are spread over blocks."""
        key_dim = problem.widths[2]
        if key_dim > WIDEST:
            return Support.no(
                f"takes keys of up to {WIDEST} channels, and K = {key_dim}; backend='reference' takes any"
            )
        return Support.yes()

    def configs(self, problem: Problem) -> tuple[Config, ...]:
        """Few lanes a column where there are sequences enough to fill a GPU, more of them where there are not."""
        _, _, key_dim, value_dim = problem.widths
        tile = 1 if problem.single else 8
        if WARP < 32:
            found = [layout(key_dim, value_dim, lanes, 1, 1, min(tile, 4)) for lanes in (2, 1, 4)]
            return tuple(c for c in found if c) or (
                {"lanes": 4, "rows": 4 * -(-key_dim // 16), "columns": 1, "warps": 1, "tile": min(tile, 4)},
            )
        found = [
            layout(key_dim, value_dim, lanes, columns, 4, tile) for lanes in (1, 2, 4, 8, 16, 32) for columns in (1, 2)
        ]
        fits = [c for c in found if c and (problem.dtype != "float64" or c["rows"] * c["columns"] <= MOST_CELLS // 2)]
        columns = problem.parallel * value_dim

        def rate(c: dict[str, int]) -> float:
            """Time of a token: the chain of one warp, or the work of all, whichever is longer."""
            cells = c["rows"] * c["columns"]
            work = 3 * cells + c["rows"] + 10 * c["columns"] * c["lanes"].bit_length() + 20
            warps = columns * c["lanes"] / (WARP * c["columns"])
            return max(work * 1.5 + 30 * c["lanes"].bit_length(), work * warps / (4 * PROCESSORS))

        return tuple(sorted(fits, key=rate))

    def forward(self, problem: Problem, config: Config, x: Arrays, out: Arrays) -> None:
        """Fill ``y`` and states."""
        blank_unused(problem, out)
        run_forward(
            problem,
            config,
            x,
            x["initial.state"],
            out.get("final.state"),
            y=out["y"],
            checkpoints=out.get("checkpoint.state"),
        )

    def decode(self, problem: Problem, config: Config, x: Arrays, pool: Pool, y: Array) -> None:
        """Fill ``y``, and the pool in place."""
        run_forward(problem, config, x, pool.arrays[0], pool.arrays[0], y=y, pool=pool)

    def backward(self, problem: Problem, config: Config, x: Arrays, out: Arrays, dout: Arrays, dx: Arrays) -> None:
        """Fill the gradients."""
        raise NotImplementedError


def shape_of(problem: Problem, config: Config, x: Arrays) -> dict[str, Any]:
    """The constants that a forward and a backward share."""
    s = problem.sizes
    return {
        "K": s.K,
        "V": s.V,
        **config,
        "real": problem.compute_dtype,
        "kind": problem.dtype,
        "beta": kind(x.get("beta")),
        "decay": decay_axes(problem),
        "decay_kind": kind(x.get("log_decay")),
        "norm": problem.option.get("qk_l2norm", False),
        "packed": problem.packed,
    }


def run_forward(
    problem: Problem,
    config: Config,
    x: Arrays,
    origin: Array,
    final: Array | None,
    *,
    y: Array | None = None,
    checkpoints: Array | None = None,
    pool: Pool | None = None,
    kept: Array | None = None,
    errors: Array | None = None,
    spacing: int = 0,
) -> None:
    """Queue the forward: from the states ``origin`` to ``final``, filling what else is given."""
    s = problem.sizes
    slots, out_slots, fresh = (pool.slots, pool.out_slots, pool.fresh) if pool else (None, None, None)
    chosen: Constants = constants(
        shape_of(problem, config, x)
        | {
            "first": kind(x["initial.state"]),
            "source": kind(origin),
            "target": kind(final),
            "marks": kind(checkpoints),
            "slots": kind(slots),
            "out_slots": kind(out_slots),
            "fresh": kind(fresh),
            "reads": y is not None,
            "keeps": kept is not None,
        }
    )
    numbers = (
        *place(x["q"], 4), *place(x["k"], 4), *place(x["v"], 4), *place(x.get("beta"), 3),
        *place(x.get("log_decay"), 4),
        *place(x["initial.state"], 4), *place(origin, 4), *place(final, 4), *place(y, 0), *place(checkpoints, 0),
        *place(slots, 1), *place(out_slots, 1), *place(fresh, 1), *place(x["offsets"], 0), *place(kept, 0),
        *place(errors, 0), s.T, problem.flags.checkpoint_every, spacing, s.H, s.H // s.G,
    )  # fmt: skip
    blocks = s.N * s.H * parts(problem, config)
    reals = (read_scale(problem.option, s.K),)
    FORWARD(x["q"], chosen, blocks, config["warps"] * WARP, numbers, reals)


def parts(problem: Problem, config: Config) -> int:
    """Blocks that share a head."""
    return -(-problem.sizes.V // (config["warps"] * WARP // config["lanes"] * config["columns"]))


KERNELS = (DeltaRecurrent(),)
