"""TTT-linear token by token: sequences, packs, single tokens, and states in a pool; see ``ttt_forward``.

    q, k [B,T,G,K]   v, y [B,T,H,K]   beta [B,T,H]   norm_weight, norm_bias [H,K]   token_scale [chunk_size]

A configuration is one of ``lattice``: ``warps`` share a head's rows out, a lane holds ``rows`` by ``columns`` of them.
"""

from typing import Any

from mixers.backend import Config, Pool, Support
from mixers.problem import Arrays, Problem
from mixers.spec import Array

from . import WARP
from .agreed import PHASE_THREADS
from .arrays import empty, kind, place
from .delta import GATHER, gather
from .kernel import CudaKernel, blank_unused, clear
from .lattice import crowded, layouts
from .program import Program, constants

FORWARD = Program("ttt_forward")
BACKWARD = Program("ttt_backward")
PHASE = Program("ttt_phase")

FIELDS = ("weight", "bias", "weight_sum", "bias_sum", "phase")

# Two matrices of a head lie in registers, four in the backward.
MOST_CELLS = 32


class TTTRecurrent(CudaKernel):
    """Token by token, weights and their sums in registers."""

    name = "ttt.recurrent"
    form = "recurrent"
    mixers = frozenset({"ttt_linear"})
    in_place = True

    def takes(self, problem: Problem) -> Support:
        """Heads that fit in the registers of a block."""
        if not fitting(problem):
            width, double = problem.widths[2], problem.compute_dtype == "float64"
            most = 64 if double else 128
            return Support.no(
                f"holds a head in the registers of one block, up to {most} channels of {problem.compute_dtype}, "
                f"and K = {width}; backend='triton' or 'reference' takes more"
            )
        return Support.yes()

    def suits(self, problem: Problem) -> bool:
        """Not before others: mini-batches are products of matrices, which tensor cores do faster."""
        return False

    def configs(self, problem: Problem) -> tuple[Config, ...]:
        """The likeliest first."""
        return tuple(fitting(problem))

    def forward(self, problem: Problem, config: Config, x: Arrays, out: Arrays) -> None:
        """Fill ``y`` and states."""
        blank_unused(problem, out)
        run_forward(problem, config, x, out)

    def decode(self, problem: Problem, config: Config, x: Arrays, pool: Pool, y: Array) -> None:
        """Fill ``y``, and the pool in place: its phases last, which the blocks of every head read."""
        phases = empty((problem.sizes.N,), "int32", x["q"])
        weights = {f"final.{f}": a for f, a in zip(FIELDS[:4], pool.arrays[:4], strict=True)}
        run_forward(problem, config, x, {"y": y, **weights, "final.phase": phases}, pool=pool)
        chosen = constants({"slots": kind(pool.slots), "out_slots": kind(pool.out_slots)})
        numbers = (
            *place(phases, 0), *place(pool.arrays[4], 1), *place(pool.slots, 1), *place(pool.out_slots, 1),
            problem.sizes.N,
        )  # fmt: skip
        PHASE(x["q"], chosen, -(-problem.sizes.N // PHASE_THREADS), PHASE_THREADS, numbers)

    def backward(self, problem: Problem, config: Config, x: Arrays, out: Arrays, dout: Arrays, dx: Arrays) -> None:
        """Fill the gradients: the forward again, which leaves weights and sums, then its adjoint, token by token."""
        run_backward(problem, x, dout, dx)


def fitting(problem: Problem) -> list[dict[str, int]]:
    """Configurations with few numbers a thread, then those with more, as far as they go."""
    few = MOST_CELLS // (4 if problem.compute_dtype == "float64" else 2)
    ordered = sorted(layouts(problem), key=lambda config: _cost(problem, config))
    found = [(c["rows"] * c["columns"], c) for c in ordered]
    kept = [(cells, c) for cells, c in found if WARP < 32 or cells <= 2 * few]
    return [c for cells, c in sorted(kept, key=lambda pair: pair[0] > few)]


def _cost(problem: Problem, config: Config) -> float:
    """Roughly the cycles of a token: work on the rows, exchanges between lanes, sums over warps."""
    rows, columns, lanes, warps = (config[name] for name in ("rows", "columns", "lanes", "warps"))
    along, across = lanes.bit_length() - 1, (WARP // lanes).bit_length() - 1
    work = 7 * rows * columns + 25 * rows + 2 * (2 * rows + 1) * along + 10 * columns + 2 * columns * warps
    return work * warps if crowded(problem) else work * max(1, warps / 4) + 30 * (along + across)


def shape_of(problem: Problem, config: Config, x: Arrays) -> dict[str, Any]:
    """The constants that a forward and a backward share."""
    real = problem.compute_dtype
    return {
        **config,
        "real": real,
        "kind": problem.dtype,
        "beta": kind(x["beta"]),
        "weight": kind(x.get("norm_weight")) or real,
        "shift": kind(x.get("norm_bias")) or real,
        "rate": kind(x.get("token_scale")) or real,
        "first": _kind_of({f: x[f"initial.{f}"] for f in FIELDS[:4]}),
    }


def inputs_of(x: Arrays) -> tuple[int, ...]:
    """The inputs as numbers, for a forward and a backward."""
    return (
        *place(x["q"], 4), *place(x["k"], 4), *place(x["v"], 4), *place(x["beta"], 3),
        *place(x.get("norm_weight"), 2), *place(x.get("norm_bias"), 2), *place(x.get("token_scale"), 1),
        *(n for f in FIELDS for n in place(x[f"initial.{f}"], _axes(f))),
    )  # fmt: skip


def run_forward(
    problem: Problem,
    config: Config,
    x: Arrays,
    out: Arrays,
    kept: Array | None = None,
    measured: Array | None = None,
    pool: Pool | None = None,
) -> None:
    """Queue the forward, which fills what is in ``out``, or leaves for a backward what that asks for."""
    s, real = problem.sizes, problem.compute_dtype
    origin = pool.arrays if pool else tuple(x[f"initial.{f}"] for f in FIELDS)
    source = dict(zip(FIELDS, origin, strict=True))
    target = {f: out.get(f"final.{f}") for f in FIELDS}
    slots, out_slots, fresh = (pool.slots, pool.out_slots, pool.fresh) if pool else (None, None, None)
    chosen = constants(
        shape_of(problem, config, x)
        | {
            "tile": 4,
            "source": _kind_of({f: source[f] for f in FIELDS[:4]}),
            "target": _kind_of({f: target[f] for f in FIELDS[:4]}) or real,
            "marks": kind(out.get("checkpoint.weight")) or real,
            "slots": kind(slots) or "int32",
            "out_slots": kind(out_slots) or "int32",
            "fresh": kind(fresh) or "bool",
            "keeps": kept is not None,
            "reads": "y" in out,
        }
    )
    numbers = (
        *inputs_of(x), *(n for f in FIELDS for n in place(source[f], _axes(f))),
        *(n for f in FIELDS for n in place(target[f], 0 if f == "phase" else _axes(f))),
        *(n for f in FIELDS for n in place(out.get(f"checkpoint.{f}"), 0)), *place(slots, 1), *place(out_slots, 1),
        *place(fresh, 1), *place(out.get("y"), 0), *place(x["offsets"], 0), *place(kept, 0), *place(measured, 0), s.K,
        s.T, problem.flags.checkpoint_every, s.H, s.H // s.G, problem.option["chunk_size"],
    )  # fmt: skip
    FORWARD(x["q"], chosen, s.N * s.H, config["warps"] * WARP, numbers)


def run_backward(problem: Problem, x: Arrays, dout: Arrays, dx: Arrays) -> None:
    """Queue the backward."""
    s, real, q, chunk = problem.sizes, problem.compute_dtype, x["q"], problem.option["chunk_size"]
    config = fitting(problem)[0]
    threads, heads, tokens = config["warps"] * WARP, s.N * s.H, s.B * s.T
    cells = threads * config["columns"] * (config["rows"] + 1)
    kept = empty(((tokens // chunk + 2 * s.N) * s.H * cells,), real, q)
    measured = empty((tokens * s.H * (4 * s.K + 2),), real, q)
    run_forward(problem, config, x, {}, kept, measured)

    rows = {name: dx[name] if s.G == s.H else empty((1, tokens, s.H, s.K), real, q) for name in ("q", "k")}
    shared = {name: dx[name] for name in ("norm_weight", "norm_bias", "token_scale") if dx.get(name) is not None}
    parts = {name: empty((heads, chunk if name == "token_scale" else s.K), real, q) for name in shared}
    if "token_scale" in parts:
        clear(parts["token_scale"])
    first = {f: dx.get(f"initial.{f}") for f in FIELDS[:4]}
    if first["weight"] is not None:
        first = {
            f: empty((s.N, s.H, s.K, s.K)[: 4 if f.startswith("weight") else 3], real, q) if a is None else a
            for f, a in first.items()
        }
    final = {f: dout.get(f"final.{f}") for f in FIELDS[:4]}
    marks = {f: dout.get(f"checkpoint.{f}") for f in FIELDS[:4]}
    dy = dout.get("y")
    chosen = constants(
        shape_of(problem, config, x)
        | {
            "dy": kind(dy) or kind(q), "dfinal": _kind_of(final) or real, "dmarks": _kind_of(marks) or real,
            "dinitial": _kind_of(first) or real, "dq": kind(rows["q"]), "dk": kind(rows["k"]),
            "dbeta": kind(dx["beta"]),
        }
    )  # fmt: skip
    numbers = (
        *inputs_of(x), *place(dy, 4), *(n for f, a in final.items() for n in place(a, _axes(f))),
        *(n for f, a in marks.items() for n in place(a, _axes(f) + 1)), *place(rows["q"], 0), *place(rows["k"], 0),
        *place(dx["v"], 0), *place(dx["beta"], 0),
        *(n for f in ("norm_weight", "norm_bias", "token_scale") for n in place(parts.get(f), 0)),
        *(n for a in first.values() for n in place(a, 0)), *place(x["offsets"], 0), *place(kept, 0),
        *place(measured, 0), s.K, s.T, problem.flags.checkpoint_every, s.H, s.H // s.G, chunk,
    )  # fmt: skip
    BACKWARD(q, chosen, heads, threads, numbers)
    for name in ("q", "k") if s.G != s.H else ():
        gather(problem, rows[name], dx[name], 1, x[name], (s.G, s.H // s.G, s.K), 0)
    for name, target in shared.items():
        add_up(parts[name], target, *((heads, 1, chunk) if name == "token_scale" else (s.N, s.H, s.K)))


def _axes(field: str) -> int:
    """How many axes a field of the state has."""
    return {"weight": 4, "weight_sum": 4, "bias": 3, "bias_sum": 3, "phase": 1}[field]


def _kind_of(arrays: dict[str, Array | None]) -> str:
    """The dtype of those that are there.

    Raises:
        TypeError: they differ.
    """
    found = {kind(a): f for f, a in arrays.items() if a is not None}
    if len(found) > 1:
        told = ", ".join(f"{f} {dtype}" for dtype, f in found.items())
        raise TypeError(f"ttt_linear: the arrays of a state are of several dtypes ({told}); give them one")
    return next(iter(found), "")


def add_up(parts: Array, target: Array, count: int, rows: int, width: int) -> None:
    """Queue the sum of ``count`` parts ``[rows, width]`` into ``target``."""
    warps = 4 if WARP == 32 else 1
    chosen = constants(
        {"wide": -(-width // WARP), "warps": warps, "real": kind(parts), "kind": kind(parts), "target": kind(target)}
    )
    numbers = (*place(parts, 0), count, rows * width, *place(None, 4), *place(target, 0), rows, 1, 1, 1, width, 0)
    GATHER(target, chosen, -(-rows // warps), warps * WARP, numbers)


KERNELS = (TTTRecurrent(),)
