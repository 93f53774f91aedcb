"""The linear and delta families token by token: sequences, packs, single tokens, and states in a pool.

    S' = decay ∘ S      u = beta (v − S'ᵀ k) or v      S = S' + k uᵀ      y = scale · Sᵀ q

    q, k [B,T,G,K]   v, y [B,T,H,V]   beta [B,T,H]   log_decay [B,T,H] or [B,T,H,K]   S [N,H,K,V]

A configuration lays one head's state over threads: ``lanes`` share a column, each with ``rows`` of it; a group of lanes
has ``columns`` columns, a block ``warps`` warps; ``tile`` tokens at a time come through shared memory. One with
``groups`` is of the kernel for a single token (``delta_step``).
"""

import functools
from collections.abc import Mapping
from typing import Any

from mixers.backend import Config, Pool, Support
from mixers.linear import read_scale
from mixers.problem import Arrays, Problem
from mixers.spec import Array, Sizes

from . import SIMULATED, WARP
from .arrays import SIZES, address, empty, kind, place, strides, token
from .kernel import PROCESSORS, CudaKernel, blank_unused
from .program import Constants, Program, constants

MIXERS = frozenset({"linear_attention", "ssd", "gla", "delta_rule", "gated_delta_rule", "kda"})

# Rows of a column, and the largest tile of state that a thread holds in registers.
WIDEST, MOST_CELLS = 256, 32

# Widths are rounded up to so many channels, so that few kernels serve all of them.
GRANULE = WARP

# Registers of states between two that are kept, and tokens and bytes of shared memory of a segment of the backward.
MOST_HELD, SEGMENTS, MOST_SHARED = 64, (8, 4) if SIMULATED else (32, 16, 8, 4), 200 * 1024

# Bytes of shared memory that a block has without asking.
STATIC_SHARED = 48 * 1024

# Rows that a thread of the step loads at once, four columns of each: at most, and where there are few heads.
MOST_ROWS, FEW_ROWS = 16, 8

FORWARD, BACKWARD, GATHER = Program("delta_forward"), Program("delta_backward"), Program("delta_gather")
STEP = Program("delta_step")


def decay_axes(problem: Problem) -> int:
    """0 without a decay, 1 for one a head, 2 for one a channel."""
    layout = problem.layout("log_decay")
    return 0 if layout is None else 2 if layout.endswith("K") else 1


def norm(problem: Problem) -> int:
    """1 where q and k are divided by their length first."""
    return int(problem.option.get("qk_l2norm", False))


def layout(problem: Problem, lanes: int, columns: int, warps: int) -> dict[str, int] | None:
    """A configuration with these lanes, None where a thread would hold more than it can, or nothing."""
    _, _, key_dim, value_dim = problem.widths
    granule = max(GRANULE, 4 * lanes)
    rows = -(-key_dim // granule) * granule // lanes
    if rows * columns > most_cells(problem) or (lanes > 1 and rows == 4 and 2 * lanes >= key_dim):
        return None
    warps = min(warps, 1 << (-(-value_dim // (WARP // lanes * columns)) - 1).bit_length())
    shape = {"lanes": lanes, "rows": rows, "columns": columns, "warps": warps}
    return shape | {"tile": 1 if problem.single else tile(problem, shape)}


def most_cells(problem: Problem) -> int:
    """How much of a state a thread holds in registers; a simulated one has as many as it likes."""
    if SIMULATED:
        return WIDEST
    return MOST_CELLS // 2 if problem.dtype == "float64" else MOST_CELLS


def tile(problem: Problem, shape: Mapping[str, int]) -> int:
    """Tokens that come to shared memory at a time: as many as fit it three times over, 16 at most."""
    block = shape["warps"] * WARP // shape["lanes"] * shape["columns"]
    rows = (3 if decay_axes(problem) == 2 else 2) * shape["lanes"] * shape["rows"]
    fit = STATIC_SHARED // (3 * (rows + block + 2) * SIZES[problem.compute_dtype])
    return max(1, min(fit, 16, shape["warps"] * WARP))


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

    def suits(self, problem: Problem) -> bool:
        """No: chunks on tensor cores, and Triton's single token, were measured faster where they can run."""
        return False

    def configs(self, problem: Problem) -> tuple[Config, ...]:
        """Few lanes a column where there are sequences enough to fill a GPU, more of them where there are not."""
        return (*step_layouts(problem), *self._sequences(problem))

    def _sequences(self, problem: Problem) -> tuple[Config, ...]:
        lanes, columns = ((1, 2, 4, 8, 16, 32), (1, 2)) if not SIMULATED else ((2, 1, 4), (1,))
        found = [layout(problem, some, few, 4 if not SIMULATED else 1) for some in lanes for few in columns]
        fits = [c for c in found if c]
        return tuple(sorted(fits, key=lambda c: cost(problem, c)) if not SIMULATED else fits)

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
        """Fill the gradients: the forward again, which leaves states and errors, then its adjoint, token by token."""
        run_backward(problem, backward_layout(problem), x, dout, dx)


def step_layouts(problem: Problem) -> list[dict[str, int]]:
    """Configurations of the kernel for a single token, the likeliest first; none where there are more, or packs."""
    if not problem.single or problem.packed or problem.flags.checkpoint_every:
        return []
    return step_shapes(*problem.widths[2:], problem.dtype, problem.parallel)


def step_shapes(key_dim: int, value_dim: int, dtype: str, parallel: int) -> list[dict[str, int]]:
    """The same for a number of heads of all sequences, ``parallel``."""
    most = WIDEST if SIMULATED else MOST_ROWS // (2 if dtype == "float64" else 1)
    found = []
    for groups in (4, 8, 16, 32) if not SIMULATED else (2,):
        rows = 4 * -(-key_dim // (4 * groups))
        if rows <= most:
            warps = min(4, -(-value_dim // (4 * WARP // groups)))
            found.append({"groups": groups, "rows": rows, "warps": warps})
    if parallel > PROCESSORS:
        return found
    return sorted(found, key=lambda config: abs(config["rows"] - FEW_ROWS))


def cost(problem: Problem, config: Config) -> float:
    """About how long a token takes: the chain of one warp, or the work of all of them, whichever is longer."""
    cells, steps = config["rows"] * config["columns"], config["lanes"].bit_length()
    work = 3 * cells + config["rows"] + 10 * config["columns"] * steps + 20
    warps = problem.parallel * problem.widths[3] * config["lanes"] / (WARP * config["columns"])
    return max(1.5 * work + 30 * steps, work * warps / (4 * PROCESSORS))


# A decoded token asks for the same kernel again and again.
@functools.lru_cache(maxsize=4096)
def forward_constants(
    config: tuple[tuple[str, int], ...],
    real: str,
    kind: str,
    decay: int,
    beta: str,
    log_decay: str,
    first: str,
    source: str,
    target: str,
    marks: str,
    slots: str,
    out_slots: str,
    fresh: str,
    reads: bool,
    keeps: bool,
) -> Constants:
    """The constants of a forward, from the dtypes of its arrays; what is not there is called what would be usual."""
    return constants(
        layout_of(dict(config))
        | {"real": real, "kind": kind, "beta": beta, "decay": decay, "decay_kind": log_decay or real}
        | {"first": first, "source": source, "target": target or real, "marks": marks or real}
        | {"slots": slots or "int32", "out_slots": out_slots or "int32", "fresh": fresh or "bool"}
        | {"reads": reads, "keeps": keeps}
    )


def layout_of(config: Config) -> dict[str, Any]:
    """What of a configuration a kernel is built from."""
    return {name: number for name, number in config.items() if name != "registers"}


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
    s, real = problem.sizes, problem.compute_dtype
    slots, out_slots, fresh = (pool.slots, pool.out_slots, pool.fresh) if pool else (None, None, None)
    if "groups" in config:
        run_step(problem, config, x, origin, final, y, pool)
        return
    chosen = forward_constants(
        tuple(config.items()),
        real,
        problem.dtype,
        decay_axes(problem),
        kind(x.get("beta")),
        kind(x.get("log_decay")),
        kind(x["initial.state"]),
        kind(origin),
        kind(final),
        kind(checkpoints),
        kind(slots),
        kind(out_slots),
        kind(fresh),
        y is not None,
        kept is not None,
    )
    numbers = (
        *place(x["q"], 4), *place(x["k"], 4), *place(x["v"], 4), *place(x.get("beta"), 3),
        *place(x.get("log_decay"), 4),
        *place(x["initial.state"], 4), *place(origin, 4), *place(final, 4), *place(y, 0), *place(checkpoints, 0),
        *place(slots, 1), *place(out_slots, 1), *place(fresh, 1), *place(x["offsets"], 0), *place(kept, 0),
        *place(errors, 0), s.K, s.V, s.T, problem.flags.checkpoint_every, spacing, s.H, s.H // s.G,
        s.H * s.V, norm(problem),
    )  # fmt: skip
    blocks = s.N, s.H * parts(problem, config)
    reals = (read_scale(problem.option, s.K),)
    threads = config["warps"] * WARP
    FORWARD(x["q"], chosen, blocks, threads, numbers, reals, registers=config.get("registers", 0))


def in_vectors(state: Array, real: str) -> bool:
    """Whether four neighbouring columns are one aligned vector, and 32 bits tell the rows of a head apart."""
    steps = strides(state)
    near = steps[3] == 1 and steps[2] * state.shape[2] < 1 << 31 and state.shape[3] % 4 == 0
    return kind(state) == real and near and not any(n % 4 for n in steps[:3]) and address(state) % 16 == 0


@functools.lru_cache(maxsize=4096)
def step_constants(
    config: tuple[tuple[str, int], ...],
    full: bool,
    vectors: bool,
    real: str,
    kind: str,
    out: str,
    decay: int,
    beta: str,
    log_decay: str,
    first: str,
    source: str,
    target: str,
    slots: str,
    out_slots: str,
    fresh: str,
    router: str,
) -> Constants:
    """The constants of a step, from the dtypes of its arrays."""
    return constants(
        layout_of(dict(config))
        | {"full": full, "vectors": vectors, "real": real, "kind": kind, "out": out, "beta": beta, "decay": decay}
        | {"decay_kind": log_decay or real, "first": first, "source": source, "target": target or real}
        | {"slots": slots or "int32", "out_slots": out_slots or "int32", "fresh": fresh or "bool", "router": router}
    )


def run_step(
    problem: Problem, config: Config, x: Arrays, origin: Array, final: Array | None, y: Array | None, pool: Pool | None
) -> None:
    """Queue one token of every sequence."""
    queue_step(
        config, problem.sizes, x, origin, final, y, pool, scale=read_scale(problem.option, problem.sizes.K),
        norm=norm(problem),
    )  # fmt: skip


def queue_step(
    config: Config,
    sizes: Sizes,
    x: Arrays,
    origin: Array,
    final: Array | None,
    y: Array | None,
    pool: Pool | None = None,
    *,
    scale: float,
    norm: int = 0,
    router: str = "",
    measured: Array | None = None,
) -> None:
    """Queue one token of every sequence, and with a ``router`` what errors are made of."""
    s, first, q = sizes, x["initial.state"], x["q"]
    slots, out_slots, fresh = (pool.slots, pool.out_slots, pool.fresh) if pool else (None, None, None)
    beta, decay = x.get("beta"), x.get("log_decay")
    real = "float64" if kind(q) == "float64" else "float32"
    vectors = in_vectors(origin, real) and (final is None or in_vectors(final, real))
    chosen = step_constants(
        tuple(config.items()), config["groups"] * config["rows"] == s.K, vectors, real, kind(q), kind(y) or kind(q),
        0 if decay is None else len(decay.shape) - 2, kind(beta), kind(decay), kind(first), kind(origin), kind(final),
        kind(slots), kind(out_slots), kind(fresh), router,
    )  # fmt: skip
    numbers = (
        *token(q, 4), *token(x["k"], 4), *token(x["v"], 4), *token(beta, 3), *token(decay, 4),
        *place(first, 4), *place(origin, 4), *place(final, 4), *place(y, 0), *place(slots, 1),
        *place(out_slots, 1), *place(fresh, 1), *place(measured, 0), s.K, s.V, s.H, s.H // s.G, norm,
    )  # fmt: skip
    blocks = s.N, s.H * step_blocks(config, s.V)
    STEP(q, chosen, blocks, config["warps"] * WARP, numbers, (scale,), registers=config.get("registers", 0))


def step_blocks(config: Config, value_dim: int) -> int:
    """Blocks that share a head of a step."""
    return -(-value_dim // (config["warps"] * 4 * WARP // config["groups"]))


def backward_layout(problem: Problem) -> dict[str, int]:
    """How the backward lays out a head: few numbers a thread, for it holds several states; few blocks a head."""
    _, _, key_dim, value_dim = problem.widths
    widest = 8 if not SIMULATED else 4
    padded = max(GRANULE, 1 << (key_dim - 1).bit_length())
    lanes = min(WARP, max(WARP // 8, padded // widest))
    rows = max(4, padded // lanes)
    bytes_each = 8 if problem.compute_dtype == "float64" else 4
    columns = 2 if not SIMULATED and rows * 2 <= 16 * 4 // bytes_each and value_dim > 1 else 1
    hold = max(1, min(4, MOST_HELD * 4 // bytes_each // (rows * columns)))
    wide = WARP // lanes * columns
    most = min(8 if not SIMULATED else 1, 1 << (-(-value_dim // wide) - 1).bit_length())
    decay = decay_axes(problem)
    for spacing in SEGMENTS:
        for warps in (most, min(most, 4)):
            shape = {"lanes": lanes, "rows": rows, "columns": columns, "warps": warps}
            numbers = shared_numbers(**shape, spacing=spacing, hold=hold, decay=decay)
            if numbers * bytes_each <= MOST_SHARED:
                return shape | {"hold": hold, "spacing": spacing}
    raise ValueError(f"no layout of the backward fits K = {key_dim} in {problem.dtype}")


def shared_numbers(*, lanes: int, rows: int, columns: int, warps: int, spacing: int, hold: int, decay: int) -> int:
    """How many numbers of shared memory a block of the backward takes: a segment's tokens, and sums over warps."""
    padded, block = lanes * rows, warps * WARP // lanes * columns
    rows_each = 3 if decay == 2 else 2
    return spacing * (rows_each * padded + 2 * block + 2) + warps * hold * (rows_each * padded + 2)


def run_backward(problem: Problem, shape: dict[str, int], x: Arrays, dout: Arrays, dx: Arrays) -> None:
    """Queue the backward."""
    s, real, q = problem.sizes, problem.compute_dtype, x["q"]
    delta, decay = x.get("beta") is not None, decay_axes(problem)
    hold, spacing = shape["hold"], shape["spacing"]
    shape = {n: shape[n] for n in ("lanes", "rows", "columns", "warps")}
    blocks, threads = parts(problem, shape), shape["warps"] * WARP
    cells = threads * shape["rows"] * shape["columns"]
    all_tokens = s.B * s.T
    kept = empty(((all_tokens // spacing + s.N) * s.H * blocks * cells,), real, q)
    errors = empty((all_tokens, s.H, s.V) if delta else (0,), real, q)
    scratch = empty((s.N * s.H * blocks * (spacing // hold) * cells,), real, q)
    run_forward(
        problem,
        shape | {"tile": tile(problem, shape)},
        x,
        x["initial.state"],
        None,
        kept=kept,
        errors=errors,
        spacing=spacing,
    )

    # A gradient that no other block has a part of is written where it goes; others are added up.
    alone = blocks == 1 and s.G == s.H and not norm(problem)
    rows = {name: dx[name] if alone else empty((blocks, all_tokens, s.H, s.K), real, q) for name in ("q", "k")}
    gates = {"beta": "B T H", "log_decay": problem.layout("log_decay") or ""}
    for name in gates:
        if x.get(name) is not None:
            width = (s.K,) if gates[name].endswith("K") else ()
            rows[name] = dx[name] if blocks == 1 else empty((blocks, all_tokens, s.H, *width), real, q)
    first, dy, final, marks = (
        dx.get("initial.state"), dout.get("y"), dout.get("final.state"), dout.get("checkpoint.state")
    )  # fmt: skip
    chosen = constants(
        shape
        | {
            "real": real, "kind": problem.dtype, "beta": kind(x.get("beta")), "decay": decay,
            "decay_kind": kind(x.get("log_decay")) or real,
            "hold": hold, "spacing": spacing, "dy": kind(dy) or kind(q), "dfinal": kind(final) or real,
            "dmarks": kind(marks) or real, "dinitial": kind(first) or real, "dq_kind": kind(rows["q"]),
            "dk_kind": kind(rows["k"]), "dg_kind": kind(rows.get("log_decay")) or real,
            "dbeta_kind": kind(rows.get("beta")) or real,
        }
    )  # fmt: skip
    numbers = (
        *place(q, 4), *place(x["k"], 4), *place(x["v"], 4), *place(x.get("beta"), 3), *place(x.get("log_decay"), 4),
        *place(dy, 4), *place(final, 4), *place(marks, 5), *place(rows["q"], 0), *place(rows["k"], 0),
        *place(dx["v"], 0), *place(rows.get("beta"), 0), *place(rows.get("log_decay"), 0), *place(first, 0),
        *place(x["offsets"], 0), *place(kept, 0), *place(errors, 0), *place(scratch, 0),
        s.K, s.V, s.T, problem.flags.checkpoint_every, s.H, s.H // s.G, s.H * s.V, all_tokens, norm(problem),
    )  # fmt: skip
    shared = shared_numbers(**shape, spacing=spacing, hold=hold, decay=decay) * SIZES[real]
    BACKWARD(q, chosen, s.N * s.H * blocks, threads, numbers, (read_scale(problem.option, s.K),), shared)

    for name in ("q", "k") if not alone else ():
        gather(problem, rows[name], dx[name], blocks, x[name], (s.G, s.H // s.G, s.K), norm(problem))
    for name in gates if blocks > 1 else ():
        if name in rows:
            axes = (s.H, 1, s.K) if gates[name].endswith("K") else (1, 1, s.H)
            gather(problem, rows[name], dx[name], blocks, x[name], axes, 0)


def gather(
    problem: Problem, found: Array, dx: Array, count: int, x: Array, axes: tuple[int, int, int], norm: int
) -> None:
    """Queue the sum of ``count`` parts ``[B T, heads, group, width]`` over parts and group; ``axes`` are the last 3."""
    s, warps = problem.sizes, 4 if not SIMULATED else 1
    heads, group, width = axes
    rows = s.B * s.T * heads
    wide = -(-width // WARP)
    chosen = constants({"wide": wide, "warps": warps, "real": kind(found), "kind": kind(x), "target": kind(dx)})
    numbers = (
        *place(found, 0), count, rows * group * width, *place(x, 4), *place(dx, 0), rows, s.T, heads, group, width,
        norm,
    )  # fmt: skip
    GATHER(dx, chosen, -(-rows // warps), warps * WARP, numbers)


def parts(problem: Problem, config: Config) -> int:
    """Blocks that share a head."""
    return -(-problem.sizes.V // (config["warps"] * WARP // config["lanes"] * config["columns"]))


KERNELS = (DeltaRecurrent(),)
