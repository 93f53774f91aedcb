"""Lattice, exact (``chunk_size=1``): sequences, packs, single tokens, and states in a pool; see ``lattice_forward``.

    q, k [B,T,G,K]   v, y [B,T,H,V]   beta [B,T,H] or [B,T,H,K]   log_decay [B,T,H]   S [N,H,K,V]

A configuration lays one head's slots over a block: ``warps`` share the slots out, a lane holds ``rows`` slots by
``columns`` values, ``lanes`` of them lie along the values; ``carriers`` are more warps, which bring ``tile`` tokens at
a time to shared memory.
"""

import math
from typing import Any

from mixers.backend import Config, Pool, Support
from mixers.problem import Arrays, Problem
from mixers.spec import Array

from . import WARP
from .agreed import OBJECTIVES, backward_numbers, forward_numbers, shares
from .arrays import SIZES, empty, kind, place
from .delta import gather
from .kernel import PROCESSORS, CudaKernel, blank_unused
from .program import Program, constants

FORWARD = Program("lattice_forward")
BACKWARD = Program("lattice_backward")

# Cells of a state that a thread holds in registers, by the number of warps in a block.
MOST_CELLS = {2: 64, 4: 64, 8: 64, 16: 32} if WARP == 32 else {1: 1 << 20}
LANES = (8, 4, 16, 2) if WARP == 32 else (2,)

# Warps that bring tokens and take reads away, beside those that hold slots.
MOST_CARRIERS = 4 if WARP == 32 else 1

# Cells that a thread of the backward holds, which has every slot twice: the first that there is a layout for, of so few
# warps that a thread may have all the registers that there are for one.
FEW_CELLS, FEW_WARPS = (16, 32, 64), 8

# Registers of a multiprocessor, and the blocks that are to share them where there are many heads, none too large.
REGISTERS, CROWD, MOST_OF_A_CROWD = 65536, 4, 4096

# Tokens whose slots a backward computes again at a time, whether these wait in shared memory, and how much there is.
SEGMENTS = ((12, True), (8, True), (8, False), (4, False))
MOST_SHARED = 224 * 1024


def layouts(problem: Problem) -> list[dict[str, int]]:
    """Every way to hold a head in a block's registers."""
    _, _, key_dim, value_dim = problem.widths
    double = problem.compute_dtype == "float64"
    found = []
    for warps, most in MOST_CELLS.items():
        for lanes in LANES:
            rows = -(-key_dim // (WARP // lanes * warps))
            columns = aligned(4 * -(-value_dim // (4 * lanes)), lanes)
            if rows * columns <= most // (2 if double else 1):
                found.append({"rows": rows, "columns": columns, "lanes": lanes, "warps": warps})
    return found


def configs(problem: Problem) -> list[dict[str, int]]:
    """Every configuration of the forward, the likeliest first."""
    found = []
    for layout in layouts(problem):
        config = layout | {"carriers": MOST_CARRIERS if layout["warps"] > 2 else 1, "tile": 4}
        if shared(problem, config) <= MOST_SHARED:
            found.append(config)
    return sorted(found, key=lambda config: _cost(problem, config))


def aligned(columns: int, lanes: int) -> int:
    """So many columns, or a few more, that a lane's share of them lies in one piece, or in pieces of four."""
    while (own := shares(columns, 0, (WARP // lanes).bit_length() - 1)[0]) not in (1, 2) and own % 4:
        columns += 4
    return columns


def crowded(problem: Problem) -> bool:
    """Whether there are more heads than multiprocessors hold two by two: work counts then, not the time of a token."""
    return problem.parallel > 2 * PROCESSORS


def _cost(problem: Problem, config: Config) -> float:
    """Roughly the instructions of a token, of every warp, or of those that one scheduler has: a head has them in turns.

    Six a number of a slot; sums over warps, and over lanes, which fold; what a lane works out for its own slots.
    """
    rows, columns, lanes, warps = (config[name] for name in ("rows", "columns", "lanes", "warps"))
    slots = WARP // lanes
    folds = 8 * columns * (1 - 1 / slots) + 8 * rows * (1 - 1 / min(rows, lanes)) + 4 * math.log2(max(1, lanes / rows))
    work = 6 * rows * columns + 1.25 * columns * warps + folds + rows + 70
    return work * warps if crowded(problem) else work * max(1, warps / 4)


def shared(problem: Problem, config: Config) -> int:
    """Bytes of shared memory that a block of the forward takes."""
    per_slot = problem.layout("beta") == "B T H K"
    return forward_numbers(**config, per_slot=per_slot) * SIZES[problem.compute_dtype]


class LatticeRecurrent(CudaKernel):
    """The exact recurrence, token by token, the slots in registers."""

    name = "lattice.recurrent"
    form = "recurrent"
    mixers = frozenset({"lattice"})
    in_place = True

    def takes(self, problem: Problem) -> Support:
        """The exact recurrence, of slots that fit in the registers of a block."""
        if problem.option["chunk_size"] != 1:
            return Support.no(f"runs chunk_size=1, and chunk_size is {problem.option['chunk_size']}")
        if not configs(problem):
            _, _, key_dim, value_dim = problem.widths
            most = 64 if problem.compute_dtype == "float64" else 128
            return Support.no(
                f"holds a head in the registers of one block, up to {most} slots of {most} {problem.compute_dtype} "
                f"numbers, and K = {key_dim}, V = {value_dim}; backend='triton' or 'reference' takes wider ones"
            )
        return Support.yes()

    def suits(self, problem: Problem) -> bool:
        """Sequences; a single token is over before its state has been brought to registers."""
        return not problem.single

    def configs(self, problem: Problem) -> tuple[Config, ...]:
        """The likeliest first."""
        return tuple(configs(problem))

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
        """Fill the gradients: the forward again, which leaves slots and sums, then its adjoint, token by token."""
        run_backward(problem, x, dout, dx)


def shape_of(problem: Problem, config: Config, x: Arrays) -> dict[str, Any]:
    """The constants that a forward and a backward share."""
    option = problem.option
    return {
        **config,
        "objective": OBJECTIVES[option["objective"]],
        "read_norm": option["read_norm"],
        "real": problem.compute_dtype,
        "kind": problem.dtype,
        "beta": kind(x["beta"]),
        "per_slot": problem.layout("beta") == "B T H K",
        "gated": x.get("log_decay") is not None,
        "decay": kind(x.get("log_decay")) or problem.compute_dtype,
        "first": kind(x["initial.state"]),
    }


def inputs_of(x: Arrays) -> tuple[int, ...]:
    """The inputs as numbers, for a forward and a backward."""
    return (
        *place(x["q"], 4), *place(x["k"], 4), *place(x["v"], 4), *place(x["beta"], 4), *place(x.get("log_decay"), 3),
        *place(x["initial.state"], 4),
    )  # fmt: skip


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
    measured: Array | None = None,
    spacing: int = 0,
) -> None:
    """Queue the forward: from the slots ``origin`` to ``final``, filling what else is given."""
    s, real = problem.sizes, problem.compute_dtype
    slots, out_slots, fresh = (pool.slots, pool.out_slots, pool.fresh) if pool else (None, None, None)
    chosen = constants(
        shape_of(problem, config, x)
        | {
            "source": kind(origin),
            "target": kind(final) or real,
            "marked": checkpoints is not None,
            "marks": kind(checkpoints) or real,
            "slots": kind(slots) or "int32",
            "out_slots": kind(out_slots) or "int32",
            "fresh": kind(fresh) or "bool",
            "reads": y is not None,
            "keeps": kept is not None,
        }
    )
    numbers = (
        *inputs_of(x), *place(origin, 4), *place(final, 4), *place(y, 0), *place(checkpoints, 0),
        *place(slots, 1), *place(out_slots, 1), *place(fresh, 1), *place(x["offsets"], 0), *place(kept, 0),
        *place(measured, 0), s.K, s.V, s.T, problem.flags.checkpoint_every, spacing, s.H, s.H // s.G,
    )  # fmt: skip
    threads = (config["warps"] + config["carriers"]) * WARP
    few = config["rows"] * config["columns"] * config["warps"] * WARP <= MOST_OF_A_CROWD and real == "float32"
    registers = REGISTERS // (CROWD * threads) if few and crowded(problem) else 0
    held = shared(problem, config)
    FORWARD(x["q"], chosen, s.N * s.H, threads, numbers, (problem.option["scale"],), held, registers)


def backward_layout(problem: Problem) -> tuple[dict[str, int], int, bool]:
    """How the backward lays out a head, which it holds twice, the tokens of a segment, and whether they wait near."""
    double = problem.compute_dtype == "float64"
    found = layouts(problem)
    some = [(c["rows"] * c["columns"] * (2 if double else 1), c) for c in found if c["warps"] <= FEW_WARPS]
    fits = [[c for cells, c in some if cells <= most] for most in FEW_CELLS]
    shape = next((min(few, key=lambda c: abs(c["lanes"] - 8)) for few in fits if few), found[0])
    per_slot = problem.layout("beta") == "B T H K"
    size = 8 if double else 4
    for segment, near in SEGMENTS:
        if backward_numbers(**shape, segment=segment, per_slot=per_slot, near=near) * size <= MOST_SHARED:
            break
    return shape, segment, near


def run_backward(problem: Problem, x: Arrays, dout: Arrays, dx: Arrays) -> None:
    """Queue the backward."""
    s, real, q = problem.sizes, problem.compute_dtype, x["q"]
    shape, segment, near = backward_layout(problem)
    threads, heads, tokens = shape["warps"] * WARP, s.N * s.H, s.B * s.T
    cells = threads * shape["rows"] * shape["columns"]
    kept = empty(((tokens // segment + s.N) * s.H * s.K * (-(-s.V // 4) * 4),), real, q)
    measured = empty((tokens * s.H * (2 * s.K + s.V),), real, q)
    scratch = empty((0 if near else heads * segment * cells,), real, q)
    config = configs(problem)[0]
    run_forward(problem, config, x, x["initial.state"], None, kept=kept, measured=measured, spacing=segment)

    # Heads that share a key leave their parts of its gradient, to be added up.
    rows = {name: dx[name] if s.G == s.H else empty((1, tokens, s.H, s.K), real, q) for name in ("q", "k")}
    dy, final, marks = (dout.get(name) for name in ("y", "final.state", "checkpoint.state"))
    first, decay = dx.get("initial.state"), dx.get("log_decay")
    constant = shape_of(problem, shape, x) | {
        "segment": segment, "near": near, "dy": kind(dy) or kind(q), "dfinal": kind(final) or real,
        "dmarks": kind(marks) or real,
        "dinitial": kind(first) or real, "dq": kind(rows["q"]), "dk": kind(rows["k"]), "dbeta": kind(dx["beta"]),
        "dg": kind(decay) or real,
    }  # fmt: skip
    numbers = (
        *inputs_of(x), *place(dy, 4), *place(final, 4), *place(marks, 5), *place(rows["q"], 0), *place(rows["k"], 0),
        *place(dx["v"], 0), *place(dx["beta"], 0), *place(decay, 0), *place(first, 0), *place(x["offsets"], 0),
        *place(kept, 0), *place(measured, 0), *place(scratch, 0), s.K, s.V, s.T, problem.flags.checkpoint_every, s.H,
        s.H // s.G,
    )  # fmt: skip
    held = backward_numbers(**shape, segment=segment, per_slot=constant["per_slot"], near=near) * SIZES[real]
    BACKWARD(q, constants(constant), heads, threads, numbers, (problem.option["scale"],), held)
    for name in ("q", "k") if s.G != s.H else ():
        gather(problem, rows[name], dx[name], 1, x[name], (s.G, s.H // s.G, s.K), 0)


KERNELS = (LatticeRecurrent(),)
