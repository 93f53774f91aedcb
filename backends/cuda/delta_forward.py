"""The linear and delta families, token by token: the device code of the forward.

    S' = decay ∘ S      e = v − S'ᵀ k      u = beta e or v      S = S' + k uᵀ      y = scale · Sᵀ q

A block has some columns of one head's state. A warp is ``L`` lanes by ``G`` groups: a group has ``C`` columns, a lane
``R`` rows of each, in registers from the first token to the last. What a token needs of the state, its read and the
next token's prediction, is one pass over it and one sum over lanes; no warp waits for another.

Tokens come through shared memory in tiles, as real numbers: while tile j − 1 is worked on, tile j lies ready and tile
j + 1 is on its way in registers; so there is one barrier a tile, and three buffers.

    row of r      4 L (r // 4) + 4 share + r % 4       four neighbours a read, no two lanes on one bank
    column of c   C G w + G c + g                   neighbouring lanes have neighbouring columns
"""

import math

import numpy as np

from .device import WARP, cell, fetch, held, load, quad, store, sum_lanes, widen
from .place import marks_before, span
from .source import cuda

BUFFERS = 3


def build(
    *, lanes, rows, columns, warps, tile, real, kind, beta, decay, decay_kind, first, source, target, marks, slots,
    out_slots, fresh, reads, keeps,
):  # fmt: skip
    """The kernel.

    ``beta``, ``decay_kind``, ``first``, ``source``, ``target``, ``marks``, ``slots``, ``out_slots`` and ``fresh`` are
    the dtypes of those arrays; ``beta`` is empty where there is none, and a null pointer says so of the others, so that
    they never need another kernel. ``decay`` is 0, 1 for one a head, 2 for one a row. ``reads``: fill ``y``. ``keeps``:
    leave states before every ``spacing``-th token, and ``e``, for a backward.
    """
    L, R, C, W, G = lanes, rows, columns, warps, WARP // lanes
    KP, BLOCK, THREADS = L * R, warps * G * columns, warps * WARP
    QUADS, CELLS = R // 4, R * C
    CHAINS = min(4, QUADS)
    PARTIAL = CHAINS * C
    ROUNDS, WIDE, DEEP = -(-tile // W), -(-KP // WARP), -(-tile * BLOCK // THREADS)
    DELTA, DECAY, READS, KEEPS = beta != "", decay, reads, keeps
    ROWS, PIECES = tile * KP, ROUNDS * WIDE
    ALL_ROWS, ALL_VALUES, ALL_TOKENS = BUFFERS * ROWS, BUFFERS * tile * BLOCK, BUFFERS * tile
    ALL_FADES = ALL_ROWS if decay == 2 else 4
    number = np.dtype(real).type
    zero, one, eps = number(0), number(1), number(1e-6)
    along = sum_lanes(G.bit_length() - 1, WARP.bit_length() - 1)
    across = sum_lanes(0, WARP.bit_length() - 1)
    read_q, widen_q, write, write_real = fetch(kind), widen(kind), store(kind), store(real)
    read_gate, widen_gate = fetch(decay_kind), widen(decay_kind)
    bits, gate_bits = held(kind), held(decay_kind)
    read_beta, read_decay = load(beta or real), load(decay_kind)
    read_first, read_source = load(first), load(source)
    write_target, write_mark = store(target), store(marks)
    read_slot, read_out_slot, read_fresh = load(slots), load(out_slots), load(fresh)

    def kernel(
        q, q_b, q_t, q_h, q_d, k, k_b, k_t, k_h, k_d, v, v_b, v_t, v_h, v_d, beta, beta_b, beta_t, beta_h,
        g, g_b, g_t, g_h, g_d, initial, initial_n, initial_h, initial_k, initial_v,
        origin, origin_n, origin_h, origin_k, origin_v, final, final_n, final_h, final_k, final_v,
        y, checkpoints, slots, slots_n, out_slots, out_slots_n, fresh, fresh_n, offsets, kept, errors,
        K, V, tokens, every, spacing, heads, group, apart, norm, scale: float,
    ):  # fmt: skip
        queries = cuda.shared.array(ALL_ROWS, number)
        keys = cuda.shared.array(ALL_ROWS, number)
        fades = cuda.shared.array(ALL_FADES, number)
        values = cuda.shared.array(ALL_VALUES, number)
        betas = cuda.shared.array(ALL_TOKENS, number)
        decays = cuda.shared.array(ALL_TOKENS, number)
        thread = cuda.threadIdx.x
        warp, lane = thread // WARP, thread % WARP
        share, c0 = lane // G, warp * G * C + lane % G
        blocks = (V + BLOCK - 1) // BLOCK
        # A division takes as long as a read of memory: there is one only where there is something to divide.
        n, head, part = np.int64(cuda.blockIdx.x), np.int64(cuda.blockIdx.y), np.int64(0)
        if blocks > 1:
            part, head = head % blocks, head // blocks
        key_head = head
        if group > 1:
            key_head = head // group
        begin = part * BLOCK

        batch, start, length = span(offsets, n, tokens)

        # Where the state is. Nothing below is loaded under a condition of its own: loads do not wait, branches would.
        source, target = n, n
        if slots != 0:
            source, target = read_slot(slots, n * slots_n), read_out_slot(out_slots, n * out_slots_n)
        real_slot = source >= 0
        begins = False
        if fresh != 0:
            begins = read_fresh(fresh, n * fresh_n) != 0
        s = cuda.local.array(CELLS, number)
        for e in range(CELLS):
            s[e] = zero
        # Whoever is outside has what its neighbour has, until it is needed.
        if begins:
            at = n * initial_n + head * initial_h
            for r in range(R):
                row = min(r // 4 * 4 * L + 4 * share + r % 4, K - 1)
                for c in range(C):
                    column = min(begin + c0 + c * G, V - 1)
                    s[r * C + c] = number(read_first(initial, at + row * initial_k + column * initial_v))
        elif real_slot:
            at = source * origin_n + head * origin_h
            for r in range(R):
                row = min(r // 4 * 4 * L + 4 * share + r % 4, K - 1)
                for c in range(C):
                    column = min(begin + c0 + c * G, V - 1)
                    s[r * C + c] = number(read_source(origin, at + row * origin_k + column * origin_v))

        q_at = batch * q_b + start * q_t + key_head * q_h
        k_at = batch * k_b + start * k_t + key_head * k_h
        v_at = batch * v_b + start * v_t + head * v_h + begin * v_d
        beta_at = batch * beta_b + start * beta_t + head * beta_h
        g_at = batch * g_b + start * g_t + head * g_h
        row_at = batch * tokens + start
        y_at = (row_at * heads + head) * V + begin
        mark = np.int64(0)
        if checkpoints != 0:
            mark = marks_before(offsets, n, tokens, every)
        until_mark, until_keep = every, np.int64(0)
        keep = (row_at // spacing + n if KEEPS else row_at) * heads + head
        gain = number(scale)
        valid = length if real_slot else np.int64(0)

        raw_q = cuda.local.array(PIECES, bits)
        raw_k = cuda.local.array(PIECES, bits)
        raw_d = cuda.local.array(PIECES, gate_bits)
        raw_v = cuda.local.array(DEEP, bits)
        some_q = cuda.local.array(WIDE, number)
        some_k = cuda.local.array(WIDE, number)
        some_beta, some_decay = zero, zero
        for i in range(PIECES):
            raw_q[i] = 0
            raw_k[i] = 0
            raw_d[i] = 0
        for i in range(DEEP):
            raw_v[i] = 0
        kk = cuda.local.array(R, number)
        dd = cuda.local.array(R, number)
        guess = cuda.local.array(C, number)
        out = cuda.local.array(PARTIAL, number)
        ahead_sums = cuda.local.array(PARTIAL, number)
        us = cuda.local.array(C, number)
        next_values = cuda.local.array(C, number)
        next_strength, next_fade = zero, one
        for c in range(C):
            guess[c] = zero
        for r in range(R):
            kk[r] = zero
            dd[r] = one

        tiles = (length + tile - 1) // tile
        for j in range(-1, tiles + 1):
            if 0 <= j < tiles:
                # Tile j: from registers to shared memory.
                buffer = j % BUFFERS
                for m in range(ROUNDS):
                    t = m * W + warp
                    norm_q, norm_k = zero, zero
                    for i in range(WIDE):
                        inside = j * tile + t < valid and i * WARP + lane < K
                        some_q[i] = number(widen_q(raw_q[m * WIDE + i])) if READS and inside else zero
                        some_k[i] = number(widen_q(raw_k[m * WIDE + i])) if inside else zero
                        norm_q += some_q[i] * some_q[i]
                        norm_k += some_k[i] * some_k[i]
                    if norm != 0:
                        norm_q = one / number(math.sqrt(across(norm_q) + eps))
                        norm_k = one / number(math.sqrt(across(norm_k) + eps))
                        for i in range(WIDE):
                            some_q[i] *= norm_q
                            some_k[i] *= norm_k
                    if t < tile:
                        to = buffer * ROWS + t * KP
                        for i in range(WIDE):
                            row = i * WARP + lane
                            if row < KP:
                                queries[to + row] = gain * some_q[i]
                                keys[to + row] = some_k[i]
                                if DECAY == 2:
                                    fade = number(math.exp(number(widen_gate(raw_d[m * WIDE + i]))))
                                    fades[to + row] = fade if j * tile + t < length and row < K else zero
                for i in range(DEEP):
                    at = i * THREADS + thread
                    if at < tile * BLOCK:
                        inside = j * tile + at // BLOCK < valid and begin + at % BLOCK < V
                        values[buffer * tile * BLOCK + at] = number(widen_q(raw_v[i])) if inside else zero
                if thread < tile:
                    betas[buffer * tile + thread] = some_beta
                    if DECAY == 1:
                        decays[buffer * tile + thread] = number(math.exp(some_decay))
                cuda.syncthreads()

            # Tile j + 1: from memory to registers, as it lies there; whoever is outside loads what its neighbour does.
            first_token = (j + 1) * tile
            if first_token < length:
                for m in range(ROUNDS):
                    t = min(first_token + m * W + warp, length - 1)
                    for i in range(WIDE):
                        row = min(np.int64(i * WARP + lane), K - 1)
                        if READS:
                            raw_q[m * WIDE + i] = read_q(q, q_at + t * q_t + row * q_d)
                        raw_k[m * WIDE + i] = read_q(k, k_at + t * k_t + row * k_d)
                        if DECAY == 2:
                            raw_d[m * WIDE + i] = read_gate(g, g_at + t * g_t + row * g_d)
                for i in range(DEEP):
                    at = i * THREADS + thread
                    t = min(first_token + at // BLOCK, length - 1)
                    column = min(begin + at % BLOCK, V - 1) - begin
                    raw_v[i] = read_q(v, v_at + t * v_t + column * v_d)
                if thread < tile:
                    t = min(first_token + thread, length - 1)
                    if DELTA:
                        some_beta = number(read_beta(beta, beta_at + t * beta_t))
                    if DECAY == 1:
                        some_decay = number(read_decay(g, g_at + t * g_t))

            # Tile j − 1: what its tokens do to the state.
            if j == 1:
                for r in range(R):
                    row = r // 4 * 4 * L + 4 * share + r % 4
                    for c in range(C):
                        s[r * C + c] = s[r * C + c] if row < K and begin + c0 + c * G < V else zero
                next_strength = cell(betas, 0)
                if DECAY == 1:
                    next_fade = cell(decays, 0)
                for c in range(C):
                    next_values[c] = cell(values, c0 + c * G)
            if j == 1 and DELTA:
                for x in range(QUADS):
                    four = quad(keys, 4 * (x * L + share))
                    for i in range(4):
                        kk[4 * x + i] = four[i]
                if DECAY == 2:
                    for x in range(QUADS):
                        four = quad(fades, 4 * (x * L + share))
                        for i in range(4):
                            dd[4 * x + i] = four[i]
                for r in range(R):
                    for c in range(C):
                        guess[c] += s[r * C + c] * (kk[r] * dd[r] if DECAY == 2 else kk[r])
                for c in range(C):
                    guess[c] = along(guess[c])
            if j >= 1:
                here = (j - 1) % BUFFERS
                tokens_here = min(np.int64(tile), length - (j - 1) * tile)
                for t in range(tokens_here):
                    if KEEPS:
                        if until_keep == 0:
                            for e in range(CELLS):
                                at = ((keep * blocks + part) * CELLS + e) * THREADS + thread
                                write_real(kept, at, s[e])
                            keep += heads
                            until_keep = spacing
                        until_keep -= 1
                    at = (here * tile + t) * KP
                    if not DELTA:
                        for x in range(QUADS):
                            four = quad(keys, at + 4 * (x * L + share))
                            for i in range(4):
                                kk[4 * x + i] = four[i]
                        if DECAY == 2:
                            for x in range(QUADS):
                                four = quad(fades, at + 4 * (x * L + share))
                                for i in range(4):
                                    dd[4 * x + i] = four[i]
                    strength, fade = next_strength, next_fade
                    for c in range(C):
                        value = next_values[c]
                        if DELTA:
                            value = value - (fade * guess[c] if DECAY == 1 else guess[c])
                            if KEEPS and share == c % L and begin + c0 + c * G < V:
                                write_real(errors, y_at + c0 + c * G, value)
                            value = strength * value
                        us[c] = value
                    for r in range(R):
                        for c in range(C):
                            old = s[r * C + c]
                            if DECAY == 1:
                                old = fade * old
                            if DECAY == 2:
                                old = dd[r] * old
                            s[r * C + c] = old + kk[r] * us[c]

                    for e in range(PARTIAL):
                        out[e] = zero
                        ahead_sums[e] = zero
                    # One pass: the read of this token, and what the next one's key predicts.
                    follower = here * tile + t + 1 if t + 1 < tile else j % BUFFERS * tile
                    ahead = follower * KP
                    next_strength = cell(betas, follower)
                    if DECAY == 1:
                        next_fade = cell(decays, follower)
                    for c in range(C):
                        next_values[c] = cell(values, follower * BLOCK + c0 + c * G)
                    for x in range(QUADS):
                        if READS:
                            four = quad(queries, at + 4 * (x * L + share))
                            for i in range(4):
                                for c in range(C):
                                    out[x % CHAINS * C + c] += s[(4 * x + i) * C + c] * four[i]
                        if DELTA:
                            four = quad(keys, ahead + 4 * (x * L + share))
                            for i in range(4):
                                kk[4 * x + i] = four[i]
                            if DECAY == 2:
                                four = quad(fades, ahead + 4 * (x * L + share))
                                for i in range(4):
                                    dd[4 * x + i] = four[i]
                            for i in range(4):
                                r = 4 * x + i
                                for c in range(C):
                                    ahead_sums[x % CHAINS * C + c] += s[r * C + c] * (
                                        kk[r] * dd[r] if DECAY == 2 else kk[r]
                                    )
                    for c in range(C):
                        for e in range(1, CHAINS):
                            out[c] += out[e * C + c]
                            ahead_sums[c] += ahead_sums[e * C + c]
                        if READS:
                            out[c] = along(out[c])
                        if DELTA:
                            guess[c] = along(ahead_sums[c])
                    if READS:
                        for c in range(C):
                            if share == c % L and begin + c0 + c * G < V:
                                write(y, y_at + c0 + c * G, out[c])
                    y_at += apart
                    if checkpoints != 0:
                        until_mark -= 1
                        if until_mark == 0:
                            until_mark = every
                            for r in range(R):
                                row = r // 4 * 4 * L + 4 * share + r % 4
                                for c in range(C):
                                    column = begin + c0 + c * G
                                    if row < K and column < V:
                                        at = ((mark * heads + head) * K + row) * V + column
                                        write_mark(checkpoints, at, s[r * C + c])
                            mark += 1

        if final != 0 and real_slot and target >= 0:
            for r in range(R):
                row = r // 4 * 4 * L + 4 * share + r % 4
                for c in range(C):
                    column = begin + c0 + c * G
                    if row < K and column < V:
                        at = target * final_n + head * final_h + row * final_k + column * final_v
                        write_target(final, at, s[r * C + c])

    return kernel
