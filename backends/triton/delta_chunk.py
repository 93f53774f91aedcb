"""The linear and delta families in chunks, on tensor cores: which kernels run, in what order, on what scratch.

The mathematics is in ``delta_chunk_forward`` and ``delta_chunk_backward``, that of decays a channel in ``decays``. The
number of tokens that a chunk has, ``block_t``, is this kernel's business: these mixers are exact in chunks.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import triton

from mixers.backend import Config, Support
from mixers.linear import read_scale
from mixers.problem import Arrays, Problem
from mixers.spec import Array

from . import decays, steep_decays
from . import delta_chunk_backward as adjoint
from . import delta_chunk_forward as forwards
from .delta_pieces import ENOUGH, Pieces, enough, in_one_row
from .kernel import (
    INTERPRETED,
    TritonKernel,
    at_most,
    blank_unused,
    block,
    dense,
    first_marks,
    gather,
    place,
    precision,
    spread,
)
from .l2norm import normalise, normalise_backward

# How many programs look through all chunks for those with steep decays.
LOOKING = 1024

MIXERS = frozenset({"linear_attention", "ssd", "gla", "delta_rule", "gated_delta_rule", "kda"})


def widened(tensor: Array) -> Array:
    """float16 as float32, whose products may then round to tf32, as precise: a decay of e^{−50} needs its exponents."""
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def decay_axes(problem: Problem) -> int:
    """0 without a decay, 1 for one a head, 2 for one a channel."""
    layout = problem.layout("log_decay")
    return 0 if layout is None else 2 if layout.endswith("K") else 1


@dataclass
class Cut:
    """A call cut into chunks, with the arrays that its kernels share.

    Attributes:
        q, k: as the state meets them: normalised where that is asked for, with decays where those are a channel's.
        v, beta, g: as given.
        plain: q and k before their decays.
        keys_in: k with the decays since the chunk's start, where those are a channel's; k otherwise.
        inward, outward, total, fade: decays; see ``delta_chunk_forward``.
        gentle: of decays a channel, whether chunks may take ``decays``.
    """

    problem: Problem
    x: Arrays
    block_t: int

    def __post_init__(self) -> None:
        problem, x = self.problem, self.x
        s, self.every = problem.sizes, problem.flags.checkpoint_every
        q, k, self.v = (widened(dense(x[name])) for name in ("q", "k", "v"))
        if problem.option.get("qk_l2norm", False):
            q, k = normalise(q), normalise(k)
        self.plain = self.q, self.k = q, k
        self.keys_in = k
        self.beta, g = x.get("beta"), x.get("log_decay")
        self.decay = decay_axes(problem)
        self.g = dense(g) if self.decay == 2 else g
        self.delta = self.beta is not None
        self.per = _chunks(s.T, self.every, self.block_t)
        self.rows = self.per + s.N if problem.packed else self.per * s.N
        self.scale = read_scale(problem.option, s.K)
        self.marks = first_marks(problem, x["offsets"])
        self.precision = precision(problem) if problem.dtype == "float32" else "tf32"
        # In last bits of float32 it shows. What float16 becomes, tf32, has been compared in the interpreter alone.
        self.gentle = k.element_size() == 2 or (INTERPRETED and self.precision == "tf32")
        self.warps = 4 if q.element_size() == 2 else 8
        self.pairs: Any = None
        self.p: Any = None
        self.a: Any = None
        self.w: Any = None
        # Blocks of kernels that run chunks side by side. Never narrower than 64 where wgmma multiplies: on blocks of 16
        # channels Triton 3.6 reads beyond its shared memory.
        self.wide = (64, 64) if q.element_size() == 2 else (min(32, block(s.K)), min(32, block(s.V)))
        self.inward, self.outward, self.total = (self.scalars() if self.decay == 1 else None for _ in range(3))
        fades = (self.rows, s.H, s.K)
        self.fade: Any = torch.empty(fades, dtype=torch.float32, device=k.device) if self.decay else None
        if self.decay == 1:
            self._running()

    def _running(self) -> None:
        """What one decay a head leaves of a state from token to token of a chunk."""
        heads = self.problem.sizes.H
        block_h = min(16, triton.next_power_of_2(heads))
        forwards.running[(self.rows * triton.cdiv(heads, block_h),)](
            *place(self.g, 0, 1, 2), self.inward, self.outward, self.total, self.fade, self.offsets, *self.lengths(),
            **self.constants(block(self.problem.sizes.K)), BH=block_h, num_warps=4,
        )  # fmt: skip

    @property
    def offsets(self) -> Array | None:
        """Of a pack."""
        return self.x["offsets"]

    def scratch(self, width: int, dtype: Any = None) -> Array:
        """An array ``[B,T,H,width]``, in the dtype of k by default."""
        s = self.problem.sizes
        return torch.empty((s.B, s.T, s.H, width), dtype=dtype or self.k.dtype, device=self.k.device)

    def scalars(self) -> Array:
        """A float32 array ``[B,T,H]``."""
        return self.scratch(1, torch.float32).squeeze(-1)

    def states(self) -> Array:
        """A state a chunk, ``[R,H,K,V]``."""
        s = self.problem.sizes
        return torch.empty((self.rows, s.H, s.K, s.V), dtype=self.k.dtype, device=self.k.device)

    def lengths(self) -> tuple[int, ...]:
        """The arguments of kernels that run chunks side by side, from ``tokens`` to ``group``."""
        s = self.problem.sizes
        return s.T, s.N, self.per, self.every, s.H, s.H // s.G

    def constants(self, block_k: int = 0, block_v: int = 0) -> dict[str, Any]:
        """What is known when a kernel is compiled."""
        s = self.problem.sizes
        found: dict[str, Any] = {"K": s.K, "BT": self.block_t, "BK": block_k or max(self.wide[0], block(s.K))}
        if block_v:
            found |= {"V": s.V, "BV": block_v}
        return found | {"PACKED": self.problem.packed, "CHECKPOINTS": self.every > 0}

    def prepare(self) -> None:
        """A and P of every chunk."""
        grid = (self.rows * self.problem.sizes.H,)
        self.p = self.scratch(self.block_t)
        self.pairs = self.scratch(self.block_t, torch.float32) if self.delta else None
        if self.decay == 2:
            self._fold(grid)
        else:
            forwards.scores[grid](
                *place(self.q, 0, 1, 2), *place(self.k, 0, 1, 2), *place(self.g, 0, 1, 2),
                self.p, self.pairs, self.total, self.offsets, *self.lengths(), self.scale,
                **self.constants(self.wide[0]), DELTA=self.delta, DECAY=self.decay, PRECISION=self.precision,
                num_warps=4, num_stages=1,
            )  # fmt: skip
        if self.delta:
            self.a = self.scratch(self.block_t)
            forwards.solve[grid](
                *place(self.beta, 0, 1, 2), self.pairs, self.a, self.offsets, *self.lengths(), BT=self.block_t,
                PACKED=self.problem.packed, CHECKPOINTS=self.every > 0, PRECISION=self.precision, num_warps=1,
                num_stages=1,
            )  # fmt: skip
            if self.decay < 2:
                self.pairs = None  # as large as q, k and v: later scratch takes its place

    def _fold(self, grid: tuple[int]) -> None:
        """Decays a channel, folded into q and k, and the pairs inside of chunks.

        Kernels of both kinds are launched, as which chunks are steep only the device knows.
        """
        s, (q, k) = self.problem.sizes, self.plain
        self.q, self.k = self.scratch(s.K), self.scratch(s.K)
        self.keys_in = self.scratch(s.K) if self.delta else self.k
        arrays = (
            *place(q, 0, 1, 2), *place(k, 0, 1, 2), *place(self.g, 0, 1, 2),
            self.q, self.keys_in, self.k, self.fade, self.p, self.pairs, self.offsets, *self.lengths(), self.scale,
        )  # fmt: skip
        how = {"DELTA": self.delta, "PRECISION": self.precision, "num_stages": 1}
        if self.gentle:
            decays.fold[grid](*arrays, **self.constants(64 if self.delta else 32), **how, num_warps=4)
        steep_decays.fold[(min(grid[0], LOOKING),)](
            *arrays, grid[0], **self.constants(block(s.K)), **how, ALL=not self.gentle,
            num_warps=max(1, block(s.K) // 32), **(at_most(168) if k.element_size() == 2 else {}),
        )  # fmt: skip

    def spell_out(self, exact: bool) -> None:
        """W and U of every chunk, for a thin chain; see ``chain`` for ``exact``."""
        s, kind = self.problem.sizes, torch.float32 if exact else None
        self.w, self.u = (self.scratch(s.K), self.scratch(s.V, kind)) if self.delta else (None, self.v)
        if self.delta:
            forwards.prepare[(self.rows * s.H,)](
                *place(self.keys_in, 0, 1, 2), *place(self.v, 0, 1, 2), *place(self.beta, 0, 1, 2),
                self.a, self.inward, self.w, self.u, self.offsets, *self._lengths_of(self.keys_in),
                **self.constants(*self.wide), DECAY=self.decay, PRECISION=self.precision, num_warps=4, num_stages=1,
            )  # fmt: skip

    def _lengths_of(self, keys: Array) -> tuple[int, ...]:
        """``lengths`` for kernels that read these keys: folded ones have a head for every value head."""
        *most, group = self.lengths()
        return (*most, 1 if keys.shape[2] == self.problem.sizes.H else group)

    def chain(
        self,
        config: Config,
        fused: bool,
        out: Arrays,
        y: Array | None,
        exact: bool = False,
        keeps: bool = True,
    ) -> tuple[Array | None, Array | None]:
        """From chunk to chunk: outputs where it is fused, otherwise first states and writes of every chunk.

        Where y comes of the writes they stay in float32, ``exact``: of alike keys U − W S is small, and rounding U is
        not. What ``keeps`` no states finds the last one alone.
        """
        s, block_v = self.problem.sizes, config["block_v"]
        if not fused:
            self.spell_out(exact)
        w, u = (self.keys_in if self.decay == 2 else None, self.v) if fused else (self.w, self.u)
        states = self.states() if keeps and not fused else None
        written = self.scratch(s.V, torch.float32 if exact else None) if self.delta and not fused else None
        checkpoints, last = out.get("checkpoint.state"), out.get("final.state")
        _, _, per, every, heads, group = self._lengths_of(self.k)
        forwards.chain[(s.N * s.H * triton.cdiv(s.V, block_v),)](
            *place(self.q, 0, 1, 2), *place(self.k, 0, 1, 2), *place(u, 0, 1, 2), *place(w, 0, 1, 2),
            *place(self.beta, 0, 1, 2), self.a, self.p, self.inward, self.outward, self.total, self.fade,
            *place(self.x["initial.state"], 0, 1, 2, 3), last, checkpoints, y, states, written, self.offsets,
            self.marks, s.T, per, every, heads, group, self.scale,
            **self.constants(0, block_v), DELTA=self.delta, DECAY=self.decay, FUSED=fused,
            MARKED=checkpoints is not None, STORE=last is not None, PRECISION=self.precision,
            num_warps=config["num_warps"], num_stages=config["num_stages"],
        )  # fmt: skip
        return states, written if self.delta else self.v

    def outputs(self, states: Array, written: Array, y: Array) -> None:
        """Outputs of all chunks from their first states."""
        s, (block_k, block_v) = self.problem.sizes, self.wide
        forwards.outputs[(self.rows * s.H * triton.cdiv(s.V, block_v),)](
            *place(self.q, 0, 1, 2), *place(self.k, 0, 1, 2), *place(written, 0, 1, 2), self.p, self.inward,
            self.total, states, y, self.offsets, *self._lengths_of(self.k), self.scale,
            **self.constants(block_k, block_v), DECAY=self.decay, PRECISION=self.precision, num_warps=4,
            num_stages=1,
        )  # fmt: skip


def _whole(problem: Problem, config: Config, x: Arrays, out: Arrays) -> None:
    """A forward from the first token to the last."""
    cut = Cut(problem, x, config["block_t"])
    if not _computes_reads(problem, config):
        cut.prepare()
    if config["fused"]:
        cut.chain(config, True, out, out["y"])
    else:
        states, written = cut.chain(config, False, out, None, exact=True)
        cut.outputs(states, written, out["y"])


def _by_pieces(pieces: Pieces, config: Config, x: Arrays, out: Arrays) -> None:
    """A forward whose sequences are cut, with chains as wide as can be."""
    problem = pieces.problem
    wide = {**config, "block_v": _blocks(problem)[0], "fused": 1}
    cut = Cut(problem, pieces.arrays(x), config["block_t"])
    if not _computes_reads(problem, wide):
        cut.prepare()
    first = cut.x["initial.state"]
    ends = torch.empty(first.shape, dtype=torch.float32, device=first.device)
    cut.chain(wide, False, {"final.state": ends}, None, keeps=False)
    firsts = pieces.carry(cut, ends, x["initial.state"], out.get("final.state"))
    cut.x = cut.x | {"initial.state": firsts}
    cut.chain(wide, True, {}, in_one_row(out["y"]))


def _chunks(tokens: int, every: int, block_t: int) -> int:
    """How many chunks so many tokens are; see ``blocks.chunks``."""
    if every:
        return (tokens // every) * -(-every // block_t) + -(-(tokens % every) // block_t)
    return -(-tokens // block_t)


def _as_compiled(problem: Problem, x: Arrays) -> tuple[Problem, Arrays]:
    """The delta rule as a gated one without decay where heads are wider than 128, in bfloat16.

    There a forward without decays ended in an illegal access on an H200 under Triton 3.6 (docs/gpu.md); those with
    decays ran.
    """
    delta = problem.layout("beta") is not None and decay_axes(problem) == 0
    if not delta or problem.dtype != "bfloat16" or block(problem.widths[2]) <= 128:
        return problem, x
    s, layouts = problem.sizes, (*problem.layouts, ("log_decay", "B T H"))
    zero = torch.zeros((), dtype=torch.float32, device=x["q"].device).expand(s.B, s.T, s.H)
    return dataclasses.replace(problem, layouts=layouts), x | {"log_decay": zero}


def backward(problem: Problem, config: Config, x: Arrays, dout: Arrays, dx: Arrays) -> None:
    """Fill the gradients of a call, whichever form ran its forward."""
    s = problem.sizes
    if not s.N * s.H:
        return
    problem, x = _as_compiled(problem, x)
    decay = x.get("log_decay")
    if decay is not None and "log_decay" not in dx:  # nobody asked for it, and it has to go somewhere
        dx = dx | {"log_decay": torch.empty(decay.shape, dtype=torch.float32, device=decay.device)}
    cut = Cut(problem, x, config["block_t"])
    cut.prepare()
    states, written = cut.chain(config, False, {}, None)
    dy = dout.get("y")
    dy = (
        torch.zeros((), dtype=cut.v.dtype, device=cut.v.device).expand(cut.v.shape)
        if dy is None
        else widened(dense(dy))
    )
    dstates, dwritten = cut.states(), cut.scratch(s.V) if cut.delta else dx["v"]
    dlast, dmarks = dout.get("final.state"), dout.get("checkpoint.state")
    dfirst = dx.get("initial.state")
    dmarks = None if dmarks is None else dmarks.contiguous()
    block_v, stages = config["block_v"], config["num_stages"]
    if block(s.K) > 128 and (cut.delta or cut.decay != 1):
        stages = 1  # it holds more of a chunk than the forward's chain does; two were tried for ssd alone
    _, _, per, every, heads, group = cut._lengths_of(cut.k)
    adjoint.chain_back[(s.N * s.H * triton.cdiv(s.V, block_v),)](
        *place(cut.q, 0, 1, 2), *place(cut.k, 0, 1, 2), *place(dy, 0, 1, 2), cut.w, cut.p, cut.inward, cut.outward,
        cut.fade, *place(dlast, 0, 1, 2, 3), dmarks, dstates, dwritten, dfirst, cut.offsets, cut.marks,
        s.T, per, every, heads, group, cut.scale,
        **cut.constants(0, block_v), DELTA=cut.delta, DECAY=cut.decay, ARRIVES=dlast is not None,
        MARKED=dmarks is not None, STORE=dfirst is not None, PRECISION=cut.precision,
        num_warps=config["num_warps"], num_stages=stages,
    )  # fmt: skip
    _side_by_side(cut, written, states, dstates, dwritten, dy, dx)


def _side_by_side(
    cut: Cut, written: Array, states: Array, dstates: Array, dwritten: Array, dy: Array, dx: Arrays
) -> None:
    """The part of the backward that runs all chunks at once."""
    problem, s = cut.problem, cut.problem.sizes
    folded = cut.decay == 2
    cut.p = cut.w = cut.u = None  # what comes next takes their place
    dq, dk = (spread(problem, dx, name) for name in ("q", "k"))
    # What decays are still to meet stays in float32: it is summed before it is rounded.
    dq_met, dk_met = (cut.scratch(s.K, torch.float32) if folded else d for d in (dq, dk))
    dkeys_in = cut.scratch(s.K, torch.float32) if folded and cut.delta else None
    apart = cut.delta or cut.decay == 1
    dp, dn = (cut.scratch(cut.block_t) if wanted else None for wanted in (apart or folded, cut.delta))
    dfade = torch.empty_like(cut.fade) if folded else None
    own = cut.scalars() if apart and not folded else None
    dstrength, dlog = cut.scalars() if cut.delta else None, cut.scalars() if cut.decay == 1 else None
    dg = dx.get("log_decay")
    q, k, beta = place(cut.q, 0, 1, 2), place(cut.keys_in, 0, 1, 2), place(cut.beta, 0, 1, 2)
    u, arriving = place(written, 0, 1, 2), place(dy, 0, 1, 2)
    lengths = (cut.offsets, *cut._lengths_of(cut.keys_in), cut.scale)
    constants = cut.constants(*cut.wide) | {"DELTA": cut.delta, "DECAY": cut.decay, "PRECISION": cut.precision}
    if apart:
        adjoint.pairs_back[(cut.rows * s.H,)](
            *q, *k, *place(cut.v, 0, 1, 2), *beta, *place(cut.g, 0, 1, 2), *u, *arriving, cut.pairs, cut.a, cut.total,
            dwritten, dx["v"], dp, dn, own, dstrength, dlog, *lengths, **constants, num_warps=cut.warps, num_stages=2,
        )  # fmt: skip
    adjoint.chunks_back[(cut.rows * s.H,)](
        *q, *k, *beta, *u, *arriving, dwritten, dp, dn, own, dstrength, dlog, states, dstates, cut.inward,
        cut.outward, cut.fade, dq_met, dk_met, dkeys_in, dx.get("beta"), dg, dfade, *lengths, **constants,
        num_warps=cut.warps, num_stages=2,
    )  # fmt: skip
    if folded:
        _unfold(cut, dp, dn, dq_met, dkeys_in, dk_met, dfade, dq, dk, dg)
    _finish(cut, dx, "q", dq)
    _finish(cut, dx, "k", dk)


def _unfold(
    cut: Cut,
    dp: Array,
    dn: Array,
    dqueries: Array,
    dkeys_in: Array,
    dkeys_out: Array,
    dfade: Array,
    dq: Array,
    dk: Array,
    dg: Array,
) -> None:
    """From gradients of folded q and k, and of pairs, to those of q, k and the decays."""
    s, (q, k) = cut.problem.sizes, cut.plain
    given = (*place(q, 0, 1, 2), *place(k, 0, 1, 2), *place(cut.g, 0, 1, 2))
    dmet, ends, chunks = (dqueries, dkeys_in, dkeys_out), (cut.offsets, *cut.lengths()), cut.rows * s.H
    how, products = {"DELTA": cut.delta, "num_stages": 1}, {"PRECISION": cut.precision}
    block_k = min(32, block(s.K))
    steep_decays.unfold[(min(chunks * triton.cdiv(s.K, block_k), LOOKING),)](
        *given, cut.k, cut.fade, dp, dn, *dmet, dfade, dq, dk, dg, *ends, chunks,
        **cut.constants(block_k), **how, **products, ALL=not cut.gentle, num_warps=block_k // 16,
    )  # fmt: skip
    if not cut.gentle:
        return
    decays.unfold_pairs[(chunks,)](
        cut.q, cut.keys_in, cut.k, cut.fade, dp, dn, *dmet, dfade, dg, *ends,
        **cut.constants(64), **how, **products, num_warps=4,
    )  # fmt: skip
    decays.unfold[(chunks * triton.cdiv(s.K, 32),)](
        *given, cut.fade, dp, *dmet, dq, dk, *ends, **cut.constants(32), **how, num_warps=4
    )


def _finish(cut: Cut, dx: Arrays, name: str, d: Array) -> None:
    """Sum the heads of a group and undo the normalisation of q or k."""
    if not cut.problem.option.get("qk_l2norm", False):
        gather(cut.problem, dx, name, d)
        return
    normal = {name: d.clone() if d is dx[name] else torch.empty_like(dx[name])}
    gather(cut.problem, normal, name, d)
    normalise_backward(cut.x[name], normal[name], dx[name])


def _stages(delta: bool, decay: int, half: bool, channels: int, block_v: int) -> int:
    """How many chunks a chain holds in shared memory: W, A, P, q, k and values of each, or P, q, k and values.

    Of two, the second is asked for at the end of the first's products, and waited for.
    """
    if not half or channels > 128:
        return 3 if half and not delta and not decay else 1
    if delta and decay == 2 and channels > 64 and block_v > 32:
        return 2
    return 4 if not delta and (not decay or channels > 64) else 3


def _computes_reads(problem: Problem, config: Config) -> bool:
    """Whether a forward has nothing to prepare: no system to solve, and products of more than 16 columns.

    Those are compiled wrongly where one takes the other's result; see ``configs``. Decays between tokens are cheap
    enough in bfloat16 alone, and in a chain where its state leaves room for them.
    """
    decay, fused = decay_axes(problem), config["fused"]
    if problem.layout("beta") is not None or (fused and config["block_v"] < 32):
        return False
    room = not fused or block(problem.widths[2]) <= 64
    return decay == 0 or (decay == 1 and problem.dtype == "bfloat16" and room)


def _blocks(problem: Problem) -> list[int]:
    """How many values a program of a chain may have, the most first."""
    _, _, key_dim, value_dim = problem.widths
    widest = min(block(value_dim), 64 if block(key_dim) <= 128 else 32)
    if problem.dtype != "bfloat16":
        widest = min(widest, 4096 // block(key_dim))
    elif problem.layout("beta") is not None:
        widest = max(widest, 32)
    elif block(key_dim) <= 64:
        widest = min(widest, 32)
    return [b for b in (64, 32, 16) if b <= widest]


class DeltaChunk(TritonKernel):
    """Chunks on tensor cores; the chain fused with the reads where heads fill the card, thin where they do not."""

    name = "delta.chunk"
    form = "chunk"
    mixers = MIXERS

    def __init__(self) -> None:
        self._met: set[tuple[Problem, tuple[tuple[str, int], ...]]] = set()

    def takes(self, problem: Problem) -> Support:
        """Everything."""
        return Support.yes()

    def suits(self, problem: Problem) -> bool:
        """More than one token a sequence."""
        return not problem.single

    def configs(self, problem: Problem) -> tuple[Config, ...]:
        """The default first: blocks of values as wide as leave a program to every multiprocessor.

        Where no block does, ``pieces`` of a sequence run side by side, if there is no system to solve and if it is long
        enough. What a chunk loads is asked for two or three chunks ahead, as far as shared memory goes: nothing gains
        more. Heads wider than 128 have blocks of 64 values too, by 8 warps: faster for ssd. In bfloat16 a fused
        chain with a system to solve has blocks of 32 values at least: with 16 columns Triton 3.6 compiles products
        wrongly whose result the next product takes.
        """
        _, _, key_dim, value_dim = problem.widths
        delta, half = problem.layout("beta") is not None, problem.dtype == "bfloat16"
        sizes, least = _blocks(problem), 32 if half and delta else 16
        busy = [b for b in sizes if problem.parallel * -(-value_dim // b) >= ENOUGH]
        block_v = busy[0] if busy else sizes[-1]
        fused = int(block_v >= min(32, sizes[0]))

        def config(block_v: int, fused: int, fewer: int, pieces: int = 1) -> Config:
            stages = _stages(delta, decay_axes(problem), half, block(key_dim), block_v)
            return {
                "block_t": 64 if half else 32,
                "block_v": block_v,
                "fused": fused,
                "num_warps": 4 if half else 8,
                "num_stages": max(1, stages - fewer),
                **({} if delta else {"pieces": pieces}),
            }

        pieces = 1 if delta else enough(problem, sizes[0])
        # With decays a channel, which are folded beforehand, narrow blocks cost little.
        narrow = block_v < sizes[0] and decay_axes(problem) < 2
        first = config(block_v, fused, 0, pieces if narrow or not (busy and fused) else 1)
        others = [config(sizes[-1], 0, 0, pieces)] if pieces > 1 else []
        if half and block(key_dim) > 128 and value_dim > 32:
            stages = 1 if delta and decay_axes(problem) == 2 else 2  # more does not fit
            eight: Config = {**config(64, 1, 0), "num_warps": 8, "num_stages": stages}
            if decay_axes(problem) == 1 and not delta and problem.parallel * -(-value_dim // 64) >= ENOUGH:
                first, eight = eight, first
            others.append(eight)
        others += [config(b, f, fewer) for b in sizes for f in (1, 0) if b >= least or not f for fewer in (0, 1)]
        return tuple({tuple(c.items()): c for c in (first, *others)}.values())

    def forward(self, problem: Problem, config: Config, x: Arrays, out: Arrays) -> None:
        """Fill ``y`` and states."""
        s = problem.sizes
        if not s.N * s.H:
            return
        blank_unused(problem, out)
        problem, x = _as_compiled(problem, x)
        most = config.get("pieces", 1)
        pieces = Pieces.of(problem, most, config["block_t"])
        kind = problem, tuple(config.items())
        if most > 1 and x["q"].device.type != "meta" and kind not in self._met:
            # The first call of a kind goes the other way before its own, so that no length compiles anything later.
            self._met.add(kind)
            if pieces:
                _whole(problem, config, x, out)
            else:
                _by_pieces(Pieces(problem, 1, s.T), config, x, out)
        if pieces:
            _by_pieces(pieces, config, x, out)
        else:
            _whole(problem, config, x, out)

    def backward(self, problem: Problem, config: Config, x: Arrays, out: Arrays, dout: Arrays, dx: Arrays) -> None:
        """Fill the gradients."""
        backward(problem, config, x, dout, dx)


KERNELS = (DeltaChunk(),)
