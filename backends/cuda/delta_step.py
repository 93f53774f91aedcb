"""The linear and delta families, a single token for many sequences: the device code.

    g = Sᵀ(d∘k)      u = beta (v − g) or v      S' = d∘S + k uᵀ      y = scale · (Sᵀ(d∘q) + ⟨q,k⟩ u)

A token is over when its states have been read and written, so nothing else may cost time: no shared memory, no barrier.
A warp has all rows of ``4 L`` neighbouring columns: ``groups`` of ``L`` lanes with ``rows`` rows each, a lane four
columns, which it loads as one vector; all loads are under way before the first is needed. What is summed over rows,
g, the read and ⟨q,k⟩, is summed at once.

    row of i     rows group + i      column of c     4 L (warps part + warp) + 4 band + c

``vectors`` asks for states that are real numbers and lie so, aligned; without it they may lie in any way and be of any
dtype, and the same numbers come out, more slowly.

With a ``router`` (and no decay a row) each warp also leaves what its columns add to the error of p = S_{t-1}ᵀ k, the
prediction: Σpv, Σp² and Σv² for ``cosine``, Σ(p − v)² for ``l2``, Σ(e^g p − v)² for ``beta_l2``.

    measured [N,H,blocks of a head × warps,3 or 1]
"""

import math

import numpy as np

from .agreed import SUMS_OF
from .device import WARP, fetch, held, load, store, sum_lanes, widen
from .folds import read_four, write_four
from .source import cuda


def build(
    *, groups, rows, warps, full, vectors, real, kind, out, beta, decay, decay_kind, first, source, target, slots,
    out_slots, fresh, router,
):  # fmt: skip
    """The kernel.

    ``full``: there are as many rows as lanes hold. ``beta`` and what follows are dtypes of arrays, but ``decay``: 0, 1
    for one a head, 2 for one a row.
    """
    R, W, L = rows, warps, WARP // groups
    CELLS, BLOCK = 4 * R, 4 * L * W
    DELTA, DECAY, FULL, VECTORS = beta != "", decay, full, vectors
    MEASURES, COSINE, FADED, SUMS = router != "", router == "cosine", router == "beta_l2", SUMS_OF.get(router, 0)
    number = np.dtype(real).type
    zero, one, eps = number(0), number(1), number(1e-6)
    down, along = sum_lanes(L.bit_length() - 1, WARP.bit_length() - 1), sum_lanes(0, L.bit_length() - 1)
    read, wide, bits, write, write_real = fetch(kind), widen(kind), held(kind), store(out), store(real)
    read_gate, wide_gate, gate_bits = fetch(decay_kind), widen(decay_kind), held(decay_kind)
    read_beta, read_decay, read_first = load(beta or real), load(decay_kind), load(first)
    read_vector, write_vector, read_state, write_state = read_four(real), write_four(real), load(source), store(target)
    read_slot, read_out_slot, read_fresh = load(slots), load(out_slots), load(fresh)

    def kernel(
        q, q_n, q_h, q_d, k, k_n, k_h, k_d, v, v_n, v_h, v_d, beta, beta_n, beta_h, g, g_n, g_h, g_d,
        initial, initial_n, initial_h, initial_k, initial_v, origin, origin_n, origin_h, origin_k, origin_v,
        final, final_n, final_h, final_k, final_v, y, slots, slots_n, out_slots, out_slots_n, fresh, fresh_n,
        measured, K, V, heads, group, norm, scale: float,
    ):  # fmt: skip
        thread = np.int32(cuda.threadIdx.x)
        warp, lane = thread // np.int32(WARP), thread & np.int32(WARP - 1)
        share, band = lane // np.int32(L), lane & np.int32(L - 1)
        blocks = (V + BLOCK - 1) // BLOCK
        n, head, part = np.int64(cuda.blockIdx.x), np.int64(cuda.blockIdx.y), np.int64(0)
        if blocks > 1:
            part, head = head % blocks, head // blocks
        key_head = head // group if group > 1 else head
        column = part * BLOCK + np.int64(warp * np.int32(4 * L) + np.int32(4) * band)
        row0 = share * np.int32(R)
        last, right = np.int32(K - 1), V - 1

        came, goes = n, n
        if slots != 0:
            came, goes = read_slot(slots, n * slots_n), read_out_slot(out_slots, n * out_slots_n)
        real_slot = came >= 0
        begins = False
        if fresh != 0:
            begins = read_fresh(fresh, n * fresh_n) != 0

        # Rows of a head are near each other: 32 bits tell them apart, and leave registers for what is loaded.
        from_k, to_k = np.int32(origin_k), np.int32(final_k)
        # Whoever is outside loads what its neighbour does: loads do not wait, branches would.
        s = cuda.local.array(CELLS, number)
        some_q = cuda.local.array(R, bits)
        some_k = cuda.local.array(R, bits)
        some_d = cuda.local.array(R, gate_bits)
        if begins:
            at = n * initial_n + head * initial_h
            for i in range(R):
                for c in range(4):
                    row = row0 + np.int32(i) if FULL else min(row0 + np.int32(i), last)
                    s[4 * i + c] = number(
                        read_first(initial, at + row * initial_k + min(column + c, right) * initial_v)
                    )
        elif VECTORS:
            at = max(came, 0) * origin_n + head * origin_h + min(column, V - 4)
            for i in range(R):
                row = row0 + np.int32(i) if FULL else min(row0 + np.int32(i), last)
                four = read_vector(origin, at + row * from_k)
                for c in range(4):
                    s[4 * i + c] = four[c]
        else:
            at = max(came, 0) * origin_n + head * origin_h
            for i in range(R):
                far = np.int64(row0 + np.int32(i) if FULL else min(row0 + np.int32(i), last))
                for c in range(4):
                    s[4 * i + c] = number(read_state(origin, at + far * origin_k + min(column + c, right) * origin_v))
        q_at, k_at, g_at = n * q_n + key_head * q_h, n * k_n + key_head * k_h, n * g_n + head * g_h
        for i in range(R):
            row = row0 + np.int32(i) if FULL else min(row0 + np.int32(i), last)
            some_k[i] = read(k, k_at + row * k_d)
            some_q[i] = read(q, q_at + row * q_d)
            if DECAY == 2:
                some_d[i] = read_gate(g, g_at + row * g_d)
        some_v = cuda.local.array(4, bits)
        for c in range(4):
            some_v[c] = read(v, n * v_n + head * v_h + min(column + c, right) * v_d)
        strength = number(read_beta(beta, n * beta_n + head * beta_h)) if DELTA else one
        fade = number(math.exp(number(read_decay(g, g_at)))) if DECAY == 1 else one

        guess = cuda.local.array(4, number)
        seen = cuda.local.array(4, number)
        kk = cuda.local.array(R, number)
        for c in range(4):
            guess[c], seen[c] = zero, zero
        with_k, size_q, size_k = zero, zero, zero
        for i in range(R):
            inside = FULL or row0 + np.int32(i) <= last
            kk[i] = number(wide(some_k[i])) if inside else zero
            qq = number(wide(some_q[i])) if inside else zero
            with_k += qq * kk[i]
            size_q += qq * qq
            size_k += kk[i] * kk[i]
            row_fade = number(math.exp(number(wide_gate(some_d[i])))) if DECAY == 2 else fade
            for c in range(4):
                before = s[4 * i + c]
                old = row_fade * before if DECAY else before
                if DELTA:
                    guess[c] += (before if MEASURES else old) * kk[i]
                seen[c] += old * qq
                s[4 * i + c] = old
        with_k = down(with_k)
        for c in range(4):
            seen[c] = down(seen[c])
            if DELTA:
                guess[c] = down(guess[c])
        if MEASURES:
            met, size, wanted = zero, zero, zero
            for c in range(4):
                value, faded = number(wide(some_v[c])), fade * guess[c]
                predicted = faded if FADED else guess[c]
                if column + c < V:
                    met += predicted * value if COSINE else (predicted - value) * (predicted - value)
                    size += predicted * predicted
                    wanted += value * value
                guess[c] = faded
            met, size, wanted = along(met), along(size), along(wanted)
            if lane == 0:
                at = (((n * heads + head) * blocks + part) * W + warp) * SUMS
                write_real(measured, at, met)
                if COSINE:
                    write_real(measured, at + 1, size)
                    write_real(measured, at + 2, wanted)
        over_q, over_k = number(scale), one
        if norm != 0:
            over_q /= number(math.sqrt(down(size_q) + eps))
            over_k /= number(math.sqrt(down(size_k) + eps))

        y_at = (n * heads + head) * V + column
        for c in range(4):
            u = number(wide(some_v[c]))
            if DELTA:
                u = strength * (u - over_k * guess[c])
            guess[c] = over_k * u
            seen[c] = over_q * (seen[c] + with_k * guess[c])
        if share == 0:
            for c in range(4):
                if column + c < V:
                    write(y, y_at + c, seen[c] if real_slot else zero)
        if VECTORS and final != 0 and column < V and real_slot and goes >= 0:
            at = goes * final_n + head * final_h + column
            for i in range(R):
                row = row0 + np.int32(i)
                if FULL or row <= last:
                    a, b, c, d = s[4 * i], s[4 * i + 1], s[4 * i + 2], s[4 * i + 3]
                    key = kk[i]
                    write_vector(
                        final, at + row * to_k, a + key * guess[0], b + key * guess[1], c + key * guess[2],
                        d + key * guess[3],
                    )  # fmt: skip
        elif not VECTORS and final != 0 and real_slot and goes >= 0:
            at = goes * final_n + head * final_h
            for i in range(R):
                far = np.int64(row0 + np.int32(i))
                for c in range(4):
                    if far < K and column + c < V:
                        value = s[4 * i + c] + kk[i] * guess[c]
                        write_state(final, at + far * final_k + (column + c) * final_v, value)

    return kernel
