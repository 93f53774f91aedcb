"""The linear and delta families on a CPU, token by token: one kernel for all six mixers.

    S'_t = D_t S_{t-1}                    D_t = diag(e^{g_t}), e^{g_t} or 1
    u_t  = beta_t (v_t − S'_tᵀ k_t)       delta family; u_t = v_t in the linear one
    S_t  = S'_t + k_t u_tᵀ
    y_t  = scale · S_tᵀ q_t

    q, k [B,T,G,K]   v, y [B,T,H,V]   beta [B,T,H]   g [B,T,H,K] or [B,T,H,1]   S [N,H,K,V]

Columns of S never meet, so a work item owns a few of them, which stay in the first-level cache for a whole sequence.

Forward. One pass over the columns a token: write, read ``y_t``, and predict the next token's ``S'_{t+1}ᵀ k_{t+1}``,
whose coefficients are ``k_{t+1} ∘ D_{t+1}``. The tile lies as S does, so that all three are sums down the columns.

Sums over grouped heads and over parts of the values are written apart and added in a fixed order.
"""

import numba
import numpy as np

from mixers.backend import Config, Support
from mixers.linear import read_scale
from mixers.problem import Arrays, Problem

from .compile import Flag, In, Index, Int, Out, Real, device, kernel
from .delta_backward import backward
from .delta_rows import SEGMENT, Head, ask, correct, give, places, store_tile, take, take_keys, take_queries
from .kernel import NumbaKernel, Partial, given, heads_at_once
from .layout import checkpoint_row, kept_row, padded, span, zeroed
from .simd import NARROW, PAIR, fma, lanes, load, mul, splat, splat_at, store, zeros

# Bytes of a tile: with what streams past it, it stays in a first-level cache of 32 KiB. The backward pass has two.
FORWARD_TILE = 20 * 1024
BACKWARD_TILE = 8 * 1024

# The backward pass splits the values of a head until it has this many items. A constant, because it decides the order
# of sums, and results must not depend on the number of threads.
BACKWARD_ITEMS = 8


def _forward_panel(width, fade, predict):
    """Write, read and predict in the columns of one vector of ``width`` bytes."""

    @device
    def panel(m, s, ld, rows, q, k, decay, faded, u, y, p, scale):
        write = load(m, u, width)
        read = zeros(m, width)
        guess = zeros(m, width)
        for i in range(rows):
            x = load(m, s, width)
            if fade:
                x = fma(splat_at(m, decay + i, width), x, mul(splat_at(m, k + i, width), write))
            else:
                x = fma(splat_at(m, k + i, width), write, x)
            store(m, s, x)
            read = fma(splat_at(m, q + i, width), x, read)
            if predict:
                guess = fma(splat_at(m, faded + i, width), x, guess)
            s += ld
        store(m, y, mul(splat(m, scale, width), read))
        if predict:
            store(m, p, guess)

    return panel


def _forward_pass(fade, predict):
    """``_forward_panel`` over all columns, two vectors at a time."""
    half, narrow = (_forward_panel(width, fade, predict) for width in (PAIR, NARROW))

    @device
    def columns(m, s, ld, rows, q, k, decay, faded, u, y, p, scale):
        j = 0
        while j + lanes(m, PAIR) <= ld:
            half(m, s + j, ld, rows, q, k, decay, faded, u + j, y + j, p + j, scale)
            j += lanes(m, PAIR)
        if j < ld:
            narrow(m, s + j, ld, rows, q, k, decay, faded, u + j, y + j, p + j, scale)

    return columns


_write = _forward_pass(False, False)
_write_predict = _forward_pass(False, True)
_fade_write = _forward_pass(True, False)
_fade_write_predict = _forward_pass(True, True)


@device
def predict_first(m, s, ld, rows, faded, p):
    """``p = S'ᵀ k`` of a sequence's first token."""
    for j in range(0, ld, lanes(m, NARROW)):
        acc = zeros(m, NARROW)
        for i in range(rows):
            acc = fma(splat_at(m, faded + i, NARROW), load(m, s + i * ld + j, NARROW), acc)
        store(m, p + j, acc)


@device
def forward_tokens(m, at, head, y, first, start, stop, s, ld, rows, ldk, fade, delta, v, p, scale):
    """The tokens ``start … stop − 1``, of the segment from ``first`` on, which is in scratch; y takes the place of v.

    Rows of one head lie far apart, so no hardware prefetcher sees them coming: the next segment's are asked for here.
    """
    for token in range(start, stop):
        ask(head.q, token + SEGMENT)
        ask(head.k, token + SEGMENT)
        ask(head.v, token + SEGMENT)
        ask(y, token)
        if fade:
            ask(head.decay, token + SEGMENT)
        t = token - first
        key = t * ldk
        q, k, decay, faded = at.q + key, at.k + key, at.decay + key, at.faded + key + ldk
        row, factor = v + t * ld, scale * m[at.q_factor + t]
        if delta:
            correct(m, row, p, row, row, m[at.beta + t], ld)
            if fade:
                _fade_write_predict(m, s, ld, rows, q, k, decay, faded, row, row, p, factor)
            else:
                _write_predict(m, s, ld, rows, q, k, decay, faded, row, row, p, factor)
        elif fade:
            _fade_write(m, s, ld, rows, q, k, decay, faded, row, row, p, factor)
        else:
            _write(m, s, ld, rows, q, k, decay, faded, row, row, p, factor)


@device
def forward_columns(head, initial, scale, normed, spacing, every, block, y, final, kept, checkpoint):
    """One head, some columns: kept [R,K,·] and checkpoint [P,K,·] are this sequence's own, empty if not wanted.

    Columns are taken a block at a time, so that the keys of a segment are made ready once for all of them.
    """
    tokens, rows = head.q.shape
    columns = y.shape[1]
    step = SEGMENT  # a divisor of the spacing
    while spacing % step:
        step -= 1
    ldv, ldk, line = padded(block, y), padded(rows, y), padded(step + 1, y)
    delta, fade = head.beta.shape[0] > 0, head.decay.shape[1] > 0
    at, v = places(step + 1, ldk, line, fade)
    guesses = v + step * ldv
    tiles = guesses + padded(columns, y)
    m = zeroed(tiles + padded(columns, y) * rows, y)
    for j in range(0, columns, block):
        part = initial[:, j : j + block]
        for i in range(rows):
            take(part, i, m, tiles + j * rows + i * padded(part.shape[1], y))
    for first in range(0, tokens, step):
        size = min(step, tokens - first)
        take_queries(head, first, size, ldk, normed, m, at)
        take_keys(head, first, min(size + 1, tokens - first), ldk, normed, m, at)
        for j in range(0, columns, block):
            stop = min(j + block, columns)
            ld, s, p = padded(stop - j, y), tiles + j * rows, guesses + j
            own = Head(head.q, head.k, head.v[:, j:stop], head.beta, head.decay)
            read = y[:, j:stop]
            for t in range(size):
                take(own.v, first + t, m, v + t * ld)
            for t in range(size if stop - j < ld else 0):  # a wider block, or y, was there
                m[v + t * ld + stop - j : v + t * ld + ld] = 0
            if delta and first == 0:
                predict_first(m, s, ld, rows, at.faded, p)
            if kept.shape[0] > 0 and first % spacing == 0:
                store_tile(m, s, ld, kept[first // spacing, :, j:stop])
            token = first
            while token < first + size:
                end = first + size
                if every > 0:
                    end = min(end, (token // every + 1) * every)
                forward_tokens(m, at, own, read, first, token, end, s, ld, rows, ldk, fade, delta, v, p, scale)
                token = end
                if every > 0 and token % every == 0:
                    store_tile(m, s, ld, checkpoint[token // every - 1, :, j:stop])
            for t in range(size):
                give(m, v + t * ld, read, first + t)
    if final.shape[0] > 0:
        for j in range(0, columns, block):
            stop = min(j + block, columns)
            store_tile(m, tiles + j * rows, padded(stop - j, y), final[0, :, j:stop])


@kernel
def forward(
    begin: Int,
    end: Int,
    q: In[4],
    k: In[4],
    v: In[4],
    beta: In[3],
    decay: In[4],
    initial: In[4],
    offsets: Index[1],
    scale: Real,
    normed: Flag,
    spacing: Int,
    every: Int,
    block: Int,
    parts: Int,
    y: Out[4],
    final: Out[4],
    kept: Out[4],
    checkpoint: Out[5],
):
    tokens, heads, columns = v.shape[1], v.shape[2], v.shape[3]
    blocks = (columns + block - 1) // block
    size = (blocks + parts - 1) // parts * block
    for item in range(begin, end):
        n, h, part = item // parts // heads, item // parts % heads, item % parts
        start, stop = min(part * size, columns), min(part * size + size, columns)
        row, first, last = span(n, tokens, offsets)
        g = h // (heads // q.shape[2])
        head = Head(
            q[row, first:last, g],
            k[row, first:last, g],
            v[row, first:last, h, start:stop],
            beta[row, first:last, h],
            decay[row, first:last, h],
        )
        keep = kept_row(n, first, tokens, spacing, offsets)
        mark = checkpoint_row(n, tokens, every, offsets) - row * checkpoint.shape[1] if every > 0 else 0
        forward_columns(
            head,
            initial[n, h, :, start:stop],
            scale,
            normed,
            spacing,
            every,
            block,
            y[row, first:last, h, start:stop],
            final[n : n + 1, h, :, start:stop],
            kept[keep:, h, :, start:stop],
            checkpoint[row, mark:, h, :, start:stop],
        )


FAMILY = frozenset({"linear_attention", "ssd", "gla", "delta_rule", "gated_delta_rule", "kda"})


def silence(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Zeros without memory, in place of a gradient that does not flow."""
    return np.broadcast_to(np.zeros((), dtype), shape)


class Operands:
    """What forward and backward share: inputs as the kernels want them, and the options."""

    def __init__(self, problem: Problem, x: Arrays) -> None:
        self.dtype = problem.compute_dtype
        sizes, options = problem.sizes, problem.option
        beta, decay = x.get("beta"), x.get("log_decay")
        self.beta = given(beta, 3, self.dtype)
        self.decay = given(decay if decay is None or decay.ndim == 4 else decay[..., None], 4, self.dtype)
        self.offsets = np.empty(0, np.int64) if x.get("offsets") is None else np.asarray(x["offsets"], np.int64)
        self.scale = np.dtype(self.dtype).type(read_scale(options, sizes.K))
        self.normed = bool(options.get("qk_l2norm", False))
        self.spacing = problem.spec.spacing(options)
        self.every = problem.flags.checkpoint_every
        self.initial = x["initial.state"]

    def inputs(self, x: Arrays) -> tuple[np.ndarray, ...]:
        """q, k, v, beta and decay."""
        return x["q"], x["k"], x["v"], self.beta, self.decay


def vectors(problem: Problem) -> tuple[int, int]:
    """Numbers in a hardware vector, and bytes of a number."""
    size = np.dtype(problem.compute_dtype).itemsize
    return NARROW // size, size


def forward_block(problem: Problem) -> int:
    """Columns whose tile fits the cache: as many whole vectors, by powers of two."""
    step, size = vectors(problem)
    fits = FORWARD_TILE // (max(problem.sizes.K, 1) * size)
    block = step
    while 2 * block <= fits and block < problem.sizes.V:
        block *= 2
    return block


def backward_block(problem: Problem) -> int:
    """Values whose tile fits the cache: a multiple of four, by powers of two."""
    step, size = vectors(problem)
    row = -(-max(problem.sizes.K, 1) // step) * step * size
    block = 4
    while 2 * block * row <= BACKWARD_TILE and block < problem.sizes.V:
        block *= 2
    return block


class DeltaRecurrent(NumbaKernel):
    """All six mixers token by token."""

    name = "delta.recurrent"
    form = "recurrent"
    mixers = FAMILY

    def takes(self, problem: Problem) -> Support:
        """Every problem of the two families."""
        return Support.yes()

    def configs(self, problem: Problem) -> tuple[Config, ...]:
        """``block``: columns that a work item of the forward pass owns."""
        block, (step, _) = forward_block(problem), vectors(problem)
        return tuple({"block": b} for b in (block, 2 * block, block // 2) if b >= step)

    def forward(self, problem: Problem, config: Config, x: Arrays, out: Arrays) -> None:
        """See ``mixers.backend.Kernel``."""
        o, sizes = Operands(problem, x), problem.sizes
        step, _ = vectors(problem)
        block, heads = config["block"], heads_at_once(problem)
        # Columns are independent: how they are shared out changes no bit of the result.
        threads = numba.get_num_threads()
        while block > step and heads * -(-sizes.V // block) < threads:
            block //= 2
        parts = max(1, min(-(-sizes.V // block), -(-threads // heads)))
        checkpoint = out.get("checkpoint.state")
        if checkpoint is not None and x.get("offsets") is not None:
            checkpoint[0, int((np.diff(o.offsets) // o.every).sum()) :] = 0
        forward(
            problem.work() / 2,
            sizes.N * sizes.H * parts,
            *o.inputs(x),
            o.initial,
            o.offsets,
            o.scale,
            o.normed,
            o.spacing,
            0 if checkpoint is None else o.every,
            block,
            parts,
            out["y"],
            given(out.get("final.state"), 4, o.dtype),
            given(out.get("kept.state"), 4, o.dtype),
            given(checkpoint, 5, o.dtype),
        )

    def backward(self, problem: Problem, config: Config, x: Arrays, out: Arrays, dout: Arrays, dx: Arrays) -> None:
        """See ``mixers.backend.Kernel``."""
        o, sizes = Operands(problem, x), problem.sizes
        block = backward_block(problem)
        parts = max(1, min(-(-sizes.V // block), BACKWARD_ITEMS // heads_at_once(problem)))
        share = sizes.H // max(sizes.G, 1) * parts
        dq, dk = (Partial(dx[name], share) for name in ("q", "k"))
        dbeta = Partial(dx.get("beta"), parts)
        ddecay = Partial(dx.get("log_decay"), parts)
        dy, dfinal, dcheckpoint = (dout.get(name) for name in ("y", "final.state", "checkpoint.state"))
        dinitial = dx.get("initial.state")
        backward(
            problem.work() * 2,
            sizes.N * sizes.H * parts,
            *o.inputs(x),
            out["kept.state"],
            o.offsets,
            o.scale,
            o.normed,
            o.spacing,
            0 if dcheckpoint is None else o.every,
            block,
            parts,
            silence(out["y"].shape, o.dtype) if dy is None else dy,
            silence(o.initial.shape, o.dtype) if dfinal is None else dfinal,
            given(dcheckpoint, 5, o.dtype),
            dq.array,
            dk.array,
            dx["v"],
            given(dbeta.array, 4, o.dtype),
            given(None if ddecay.array is None else ddecay.array.reshape(parts, *o.decay.shape), 5, o.dtype),
            np.empty(o.initial.shape, o.dtype) if dinitial is None else dinitial,
        )
        for gradient in (dq, dk, dbeta, ddecay):
            gradient.add_up()


KERNELS = (DeltaRecurrent(),)
