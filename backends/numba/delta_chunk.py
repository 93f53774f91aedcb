"""The linear and delta families on a CPU, a chunk of tokens at a time: matrix products in place of rank-one updates.

Notation of ``delta``; a chunk's tokens are rows of matrices, S_0 is the state before it. With products of decays

    pre_t = D_first … D_t      post_j = D_{j+1} … D_last      D_tj = D_{j+1} … D_t

    M_tj = ⟨k_t, D_tj k_j⟩ for j < t          P_tj = ⟨q_t, D_tj k_j⟩ for j ≤ t
    R = V − (K∘pre) S_0                       u_t = beta_t (R_t − Σ_{j<t} M_tj u_j), by substitution
    Y = scale · ((Q∘pre) S_0 + P U)           S_C = pre_last ∘ S_0 + (K∘post)ᵀ U

(linear family: U = V). Decays are only ever multiplied together, numbers in [0, 1]: nothing overflows, and a hard reset
is a plain zero. A chunk is two halves. Inside a half M and P are built by letting every k_j fade, token by token; the
half below the diagonal is a matrix product, ``D_tj = pb_t ∘ sb_j`` with products counted from the border between them.
"""

import numba
import numpy as np

from mixers.backend import Config, Support
from mixers.problem import Arrays, Problem

from .compile import Flag, In, Index, Int, Out, Real, device, kernel
from .delta import BACKWARD_ITEMS, FAMILY, Operands, silence
from .delta_chunk_backward import backward
from .delta_chunk_rows import CHUNK, HALF, fade_rows, key_places, predict, take_chunk, triangles
from .delta_rows import Head, ask, give, store_tile, take
from .kernel import NumbaKernel, Partial, given, heads_at_once
from .layout import kept_row, padded, span, zeroed
from .matmul import matmul, matmul_ta


@device
def forward_item(head, initial, scale, normed, y, final, kept):
    """One head, some columns; kept [R,K,·] is this sequence's own, empty if not wanted."""
    tokens, keys = head.q.shape
    ldk, ldv, ldc = padded(keys, y), padded(y.shape[1], y), padded(CHUNK, y)
    delta, fade = head.beta.shape[0] > 0, head.decay.shape[1] > 0
    at, w = key_places(ldk, ldc, fade)
    u = w + 4 * ldk
    rest = u + CHUNK * ldv
    read = rest + CHUNK * ldv
    s = read + CHUNK * ldv
    m = zeroed(s + keys * ldv, y)
    for i in range(keys):
        take(initial, i, m, s + i * ldv)
    for first in range(0, tokens, CHUNK):
        n = min(CHUNK, tokens - first)
        if kept.shape[0] > 0:
            store_tile(m, s, ldv, kept[first // CHUNK])
        take_chunk(head, first, n, ldk, normed, m, at)
        for t in range(n):
            take(head.v, first + t, m, u + t * ldv)
            ask(head.q, first + CHUNK + t)
            ask(head.k, first + CHUNK + t)
            ask(head.v, first + CHUNK + t)
        triangles(m, at, n, ldk, ldc, fade, w)
        if delta:
            predict(m, at, n, keys, ldk, ldc, ldv, s, u, rest)
        matmul(m[read:], ldv, m[at.qd :], ldk, m[s:], ldv, n, ldv, keys, scale, 0.0)
        top = min(n, HALF)
        matmul(m[read:], ldv, m[at.p :], ldc, m[u:], ldv, top, ldv, top, scale, 1.0)
        if n > HALF:
            bottom = m[read + HALF * ldv :]
            matmul(bottom, ldv, m[at.p + HALF * ldc :], ldc, m[u:], ldv, n - HALF, ldv, n, scale, 1.0)
        if fade:
            fade_rows(m, s, at.pre + (n - 1) * ldk, keys, ldv)
        matmul_ta(m[s:], ldv, m[at.ke :], ldk, m[u:], ldv, keys, ldv, n, 1.0, 1.0)
        for t in range(n):
            give(m, read + t * ldv, y, first + t)
    if final.shape[0] > 0:
        store_tile(m, s, ldv, final[0])


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
    parts: Int,
    y: Out[4],
    final: Out[4],
    kept: Out[4],
):
    tokens, heads, columns = v.shape[1], v.shape[2], v.shape[3]
    size = (columns + parts - 1) // parts
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
        forward_item(
            head,
            initial[n, h, :, start:stop],
            scale,
            normed,
            y[row, first:last, h, start:stop],
            final[n : n + 1, h, :, start:stop],
            kept[kept_row(n, first, tokens, CHUNK, offsets) :, h, :, start:stop],
        )


class DeltaChunk(NumbaKernel):
    """All six mixers a chunk at a time."""

    name = "delta.chunk"
    form = "chunk"
    mixers = FAMILY

    def takes(self, problem: Problem) -> Support:
        """Any problem but one whose checkpoints may fall inside of a chunk."""
        if problem.flags.checkpoint_every:
            return Support.no("checkpoints may fall inside of a chunk; delta.recurrent writes them")
        if problem.spec.spacing(problem.option) != CHUNK:
            return Support.no(f"the states kept for the backward pass are not {CHUNK} tokens apart")
        return Support.yes()

    def configs(self, problem: Problem) -> tuple[Config, ...]:
        """``block_t``: tokens in a chunk, fixed by the states that the forward pass keeps."""
        return ({"block_t": CHUNK},)

    def forward(self, problem: Problem, config: Config, x: Arrays, out: Arrays) -> None:
        """See ``mixers.backend.Kernel``."""
        o, sizes = Operands(problem, x), problem.sizes
        # Columns are independent: how they are shared out changes no bit of the result.
        parts = max(1, min(sizes.V // 16, -(-numba.get_num_threads() // heads_at_once(problem))))
        forward(
            problem.work() / 2,
            sizes.N * sizes.H * parts,
            *o.inputs(x),
            o.initial,
            o.offsets,
            o.scale,
            o.normed,
            parts,
            out["y"],
            given(out.get("final.state"), 4, o.dtype),
            given(out.get("kept.state"), 4, o.dtype),
        )

    def backward(self, problem: Problem, config: Config, x: Arrays, out: Arrays, dout: Arrays, dx: Arrays) -> None:
        """See ``mixers.backend.Kernel``."""
        o, sizes = Operands(problem, x), problem.sizes
        parts = max(1, min(sizes.V // 32, BACKWARD_ITEMS // heads_at_once(problem)))
        share = sizes.H // max(sizes.G, 1) * parts
        dq, dk = (Partial(dx[name], share) for name in ("q", "k"))
        dbeta, ddecay = (Partial(dx.get(name), parts) for name in ("beta", "log_decay"))
        dy, dfinal, dinitial = dout.get("y"), dout.get("final.state"), dx.get("initial.state")
        backward(
            problem.work() * 2,
            sizes.N * sizes.H * parts,
            *o.inputs(x),
            out["kept.state"],
            o.offsets,
            o.scale,
            o.normed,
            parts,
            silence(out["y"].shape, o.dtype) if dy is None else dy,
            silence(o.initial.shape, o.dtype) if dfinal is None else dfinal,
            dq.array,
            dk.array,
            dx["v"],
            given(dbeta.array, 4, o.dtype),
            given(None if ddecay.array is None else ddecay.array.reshape(parts, *o.decay.shape), 5, o.dtype),
            np.empty(o.initial.shape, o.dtype) if dinitial is None else dinitial,
        )
        for gradient in (dq, dk, dbeta, ddecay):
            gradient.add_up()


KERNELS = (DeltaChunk(),)
