"""The linear and delta families, token by token: the device code of the backward.

With the adjoint D of the state, from the last token to the first (u = beta e, or v; S' = decay ∘ S₀; S = S' + k uᵀ):

    D += scale · q dyᵀ      dq = scale · S dy      du = Dᵀ k      dk = D u − S' dv      dv = beta du, or du
    D' = D − k dvᵀ          dbeta = ⟨du, e⟩        dg = rowsum(D' ∘ S')                  D = decay ∘ D'

The adjoint of a decay is taken where it acts, never as the difference of what flows in and out.

The forward was run again and left ``e`` and the states before every ``spacing``-th token. A segment of so many tokens
is brought to shared memory at once; its states are computed again, from e, without a sum; those before every
``hold``-th token go to scratch memory that stays in the cache, and the ones between to registers, when they are needed.

Sums over a row's columns, dq, dk and dg, are first taken in a warp, where every step halves what a lane still holds,
then over warps through shared memory, then over blocks of a head and heads of a group by ``delta_gather``.
"""

import math

import numpy as np

from .device import WARP, cell, fetch, held, load, other_lane, quad, store, sum_lanes, widen
from .place import marks_before, span
from .source import cuda
from .unroll import each, unrolled


def build(
    *, lanes, rows, columns, warps, hold, spacing, real, kind, beta, decay, decay_kind, dy, dfinal, dmarks, dinitial,
    dq_kind, dk_kind, dg_kind, dbeta_kind,
):  # fmt: skip
    """The kernel; constants as in ``delta_forward``, and the dtypes of gradients."""
    L, R, C, W, G = lanes, rows, columns, warps, WARP // lanes
    KP, BLOCK, THREADS = L * R, warps * G * columns, warps * WARP
    QUADS, CELLS, HOLD, SPACING = R // 4, R * C, hold, spacing
    STATES, GROUPS = HOLD * CELLS, spacing // hold
    DELTA, DECAY = beta != "", decay
    GROUP_BITS, LANE_BITS = G.bit_length() - 1, WARP.bit_length() - 1
    WIDE, DEEP = -(-KP // WARP), -(-spacing * BLOCK // THREADS)
    ROUNDS = -(-spacing // W)
    BATCH = min(2, ROUNDS)
    BATCHES, PIECES = -(-ROUNDS // BATCH), BATCH * WIDE
    element = np.dtype(real)
    number = element.type
    zero, one, eps = number(0), number(1), number(1e-6)
    along, across, over = sum_lanes(GROUP_BITS, LANE_BITS), sum_lanes(0, LANE_BITS), sum_lanes(0, GROUP_BITS)
    # Halving sums: in step i a lane gives away half of its rows; where one is left, both add it.
    HALVES = [R >> (i + 1) for i in range(GROUP_BITS)]
    LEFT = max(1, R >> GROUP_BITS)
    flips = [other_lane(G >> (i + 1)) for i in range(GROUP_BITS)]
    STEPS = GROUP_BITS
    read_q, widen_q, read_real, write, write_real = fetch(kind), widen(kind), load(real), store(kind), store(real)
    read_gate, widen_gate, bits, gate_bits = fetch(decay_kind), widen(decay_kind), held(kind), held(decay_kind)
    read_dy, widen_dy, seed_bits = fetch(dy), widen(dy), held(dy)
    read_beta, read_decay = load(beta or real), load(decay_kind)
    read_dfinal, read_dmark = load(dfinal), load(dmarks)
    write_dq, write_dk, write_dg = store(dq_kind), store(dk_kind), store(dg_kind)
    write_dbeta, write_dinitial = store(dbeta_kind), store(dinitial)
    # Where things lie in shared memory.
    KEYS, FADES = SPACING * KP, 2 * SPACING * KP
    WRITES = FADES + (SPACING * KP if decay == 2 else 0)
    SEEDS = WRITES + SPACING * BLOCK
    BETAS = SEEDS + SPACING * BLOCK
    DECAYS = BETAS + SPACING
    SUMS = DECAYS + SPACING
    KINDS = 3 if decay == 2 else 2
    ROW_SUMS = W * HOLD * KP
    SCALARS = SUMS + KINDS * ROW_SUMS

    def kernel(
        q, q_b, q_t, q_h, q_d, k, k_b, k_t, k_h, k_d, v, v_b, v_t, v_h, v_d, beta, beta_b, beta_t, beta_h,
        g, g_b, g_t, g_h, g_d, dy, dy_b, dy_t, dy_h, dy_d, dfinal, dfinal_n, dfinal_h, dfinal_k, dfinal_v,
        dmarks, dmarks_n, dmarks_p, dmarks_h, dmarks_k, dmarks_v, dq, dk, dv, dbeta, dg, dinitial,
        offsets, kept, errors, scratch, K, V, tokens, every, heads, group, apart, all_tokens, norm, scale: float,
    ):  # fmt: skip
        memory = cuda.shared.array(0, element)
        thread = cuda.threadIdx.x
        warp, lane = thread // WARP, thread % WARP
        share, own = lane // G, lane % G
        c0 = warp * G * C + own
        blocks = (V + BLOCK - 1) // BLOCK
        item = np.int64(cuda.blockIdx.x)
        part = item % blocks
        head = (item // blocks) % heads
        n = item // (blocks * heads)
        begin = part * BLOCK
        batch, start, length = span(offsets, n, tokens)
        q_at = batch * q_b + start * q_t + head // group * q_h
        k_at = batch * k_b + start * k_t + head // group * k_h
        v_at = batch * v_b + start * v_t + head * v_h + begin * v_d
        beta_at = batch * beta_b + start * beta_t + head * beta_h
        g_at = batch * g_b + start * g_t + head * g_h
        dy_at = batch * dy_b + start * dy_t + head * dy_h + begin * dy_d
        row_at = batch * tokens + start
        part_at = part * all_tokens + row_at
        keep = row_at // SPACING + n
        mark_row, mark_at = n, np.int64(0)
        if dmarks != 0 and offsets != 0:
            mark_row, mark_at = np.int64(0), marks_before(offsets, n, tokens, every)
        gain = number(scale)

        s = cuda.local.array(CELLS, number)
        ds = cuda.local.array(CELLS, number)
        states = cuda.local.array(STATES, number)
        kk = cuda.local.array(R, number)
        qq = cuda.local.array(R, number)
        dd = cuda.local.array(R, number)
        dqs = cuda.local.array(R, number)
        dks = cuda.local.array(R, number)
        dgs = cuda.local.array(R, number)
        us = cuda.local.array(C, number)
        raw_q = cuda.local.array(PIECES, bits)
        raw_k = cuda.local.array(PIECES, bits)
        raw_d = cuda.local.array(PIECES, gate_bits)
        raw_v = cuda.local.array(DEEP, bits)
        raw_dy = cuda.local.array(DEEP, seed_bits)
        some_e = cuda.local.array(DEEP, number)
        some_q = cuda.local.array(WIDE, number)
        some_k = cuda.local.array(WIDE, number)
        for i in range(DEEP):
            raw_dy[i] = 0
        seeds = cuda.local.array(C, number)
        dus = cuda.local.array(C, number)
        for e in range(STATES):
            states[e] = zero
        for r in range(R):
            dd[r] = one
            row = r // 4 * 4 * L + 4 * share + r % 4
            for c in range(C):
                column = begin + c0 + c * G
                ds[r * C + c] = zero
                if dfinal != 0:
                    at = n * dfinal_n + head * dfinal_h + min(row, K - 1) * dfinal_k + min(column, V - 1) * dfinal_v
                    found = number(read_dfinal(dfinal, at))
                    ds[r * C + c] = found if row < K and column < V else zero

        # Which rows a lane has the sums of.
        mine = 0
        for i in each(STEPS):
            if (own >> (STEPS - 1 - i)) & 1:
                mine += HALVES[i]

        segments = (length + SPACING - 1) // SPACING
        for back in range(segments):
            segment = segments - 1 - back
            base = segment * SPACING
            count = min(np.int64(SPACING), length - base)
            write_at = (row_at + base) * apart + head * V + begin
            cuda.syncthreads()
            for batch_of in range(BATCHES):
                for m in range(BATCH):
                    t = min(base + (batch_of * BATCH + m) * W + warp, length - 1)
                    for i in range(WIDE):
                        row = min(np.int64(i * WARP + lane), K - 1)
                        raw_q[m * WIDE + i] = read_q(q, q_at + t * q_t + row * q_d)
                        raw_k[m * WIDE + i] = read_q(k, k_at + t * k_t + row * k_d)
                        if DECAY == 2:
                            raw_d[m * WIDE + i] = read_gate(g, g_at + t * g_t + row * g_d)
                for m in range(BATCH):
                    t = (batch_of * BATCH + m) * W + warp
                    norm_q, norm_k = zero, zero
                    for i in range(WIDE):
                        inside = t < count and i * WARP + lane < K
                        some_q[i] = number(widen_q(raw_q[m * WIDE + i])) if inside else zero
                        some_k[i] = number(widen_q(raw_k[m * WIDE + i])) if inside else zero
                        norm_q += some_q[i] * some_q[i]
                        norm_k += some_k[i] * some_k[i]
                    if norm != 0:
                        norm_q = one / number(math.sqrt(across(norm_q) + eps))
                        norm_k = one / number(math.sqrt(across(norm_k) + eps))
                        for i in range(WIDE):
                            some_q[i] *= norm_q
                            some_k[i] *= norm_k
                    for i in range(WIDE):
                        row = i * WARP + lane
                        if row < KP and t < SPACING:
                            memory[t * KP + row] = gain * some_q[i]
                            memory[KEYS + t * KP + row] = some_k[i]
                            if DECAY == 2:
                                fade = number(math.exp(number(widen_gate(raw_d[m * WIDE + i]))))
                                memory[FADES + t * KP + row] = fade if t < count and row < K else zero
            for i in range(DEEP):
                at = i * THREADS + thread
                t = min(base + at // BLOCK, length - 1)
                column = min(begin + at % BLOCK, V - 1) - begin
                if DELTA:
                    some_e[i] = read_real(errors, ((row_at + t) * heads + head) * V + begin + column)
                else:
                    raw_v[i] = read_q(v, v_at + t * v_t + column * v_d)
                if dy != 0:
                    raw_dy[i] = read_dy(dy, dy_at + t * dy_t + column * dy_d)
            for i in range(DEEP):
                at = i * THREADS + thread
                inside = at // BLOCK < count and begin + at % BLOCK < V
                some = some_e[i] if DELTA else number(widen_q(raw_v[i]))
                seed = number(widen_dy(raw_dy[i])) if dy != 0 else zero
                if at < SPACING * BLOCK:
                    memory[WRITES + at] = some if inside else zero
                    memory[SEEDS + at] = seed if inside else zero
            for at in range(thread, SPACING, THREADS):
                t = min(base + at, length - 1)
                some, fade = one, one
                if DELTA:
                    some = number(read_beta(beta, beta_at + t * beta_t))
                if DECAY == 1:
                    fade = number(math.exp(number(read_decay(g, g_at + t * g_t))))
                memory[BETAS + at] = some
                memory[DECAYS + at] = fade
            for e in range(CELLS):
                at = ((((keep + segment) * heads + head) * blocks + part) * CELLS + e) * THREADS + thread
                s[e] = read_real(kept, at)
            cuda.syncthreads()

            # The states before every group of tokens.
            groups = (count + HOLD - 1) // HOLD
            for a in range(groups):
                for e in range(CELLS):
                    write_real(scratch, ((item * GROUPS + a) * CELLS + e) * THREADS + thread, s[e])
                if a + 1 < groups:
                    for m in range(HOLD):
                        t = a * HOLD + m
                        strength, fade = cell(memory, BETAS + t), cell(memory, DECAYS + t)
                        for c in range(C):
                            us[c] = strength * cell(memory, WRITES + t * BLOCK + c0 + c * G)
                        for x in range(QUADS):
                            at = t * KP + 4 * (x * L + share)
                            four = quad(memory, KEYS + at)
                            for i in range(4):
                                kk[4 * x + i] = four[i]
                            if DECAY == 2:
                                four = quad(memory, FADES + at)
                                for i in range(4):
                                    dd[4 * x + i] = four[i]
                        for r in range(R):
                            for c in range(C):
                                old = s[r * C + c]
                                if DECAY == 1:
                                    old = fade * old
                                if DECAY == 2:
                                    old = dd[r] * old
                                s[r * C + c] = old + kk[r] * us[c]

            # From the last group to the first.
            for b in range(groups):
                a = groups - 1 - b
                for e in range(CELLS):
                    s[e] = read_real(scratch, ((item * GROUPS + a) * CELLS + e) * THREADS + thread)
                for m in range(HOLD):
                    # A queue: after HOLD tokens, the state before each of them.
                    for e in range(STATES - CELLS):
                        states[e] = states[e + CELLS]
                    for e in range(CELLS):
                        states[STATES - CELLS + e] = s[e]
                    t = a * HOLD + m
                    strength, fade = cell(memory, BETAS + t), cell(memory, DECAYS + t)
                    for c in range(C):
                        us[c] = strength * cell(memory, WRITES + t * BLOCK + c0 + c * G)
                    for x in range(QUADS):
                        at = t * KP + 4 * (x * L + share)
                        four = quad(memory, KEYS + at)
                        for i in range(4):
                            kk[4 * x + i] = four[i]
                        if DECAY == 2:
                            four = quad(memory, FADES + at)
                            for i in range(4):
                                dd[4 * x + i] = four[i]
                    for r in range(R):
                        for c in range(C):
                            old = s[r * C + c]
                            if DECAY == 1:
                                old = fade * old
                            if DECAY == 2:
                                old = dd[r] * old
                            s[r * C + c] = old + kk[r] * us[c]
                for ahead in range(HOLD):
                    m = HOLD - 1 - ahead
                    t = a * HOLD + m
                    for e in range(CELLS):
                        s[e] = states[STATES - CELLS + e]
                    for e in range(STATES - CELLS):
                        states[STATES - 1 - e] = states[STATES - CELLS - 1 - e]
                    if t < count:
                        token = base + t
                        strength, fade = cell(memory, BETAS + t), cell(memory, DECAYS + t)
                        if dmarks != 0 and (token + 1) % every == 0:
                            mark = mark_at + (token + 1) // every - 1
                            for r in range(R):
                                row = r // 4 * 4 * L + 4 * share + r % 4
                                for c in range(C):
                                    column = begin + c0 + c * G
                                    if row < K and column < V:
                                        at = mark_row * dmarks_n + mark * dmarks_p + head * dmarks_h
                                        at += row * dmarks_k + column * dmarks_v
                                        ds[r * C + c] += number(read_dmark(dmarks, at))
                        for x in range(QUADS):
                            at = t * KP + 4 * (x * L + share)
                            four = quad(memory, KEYS + at)
                            for i in range(4):
                                kk[4 * x + i] = four[i]
                            four = quad(memory, at)
                            for i in range(4):
                                qq[4 * x + i] = four[i]
                            if DECAY == 2:
                                four = quad(memory, FADES + at)
                                for i in range(4):
                                    dd[4 * x + i] = four[i]
                        dstrength, dfade = zero, zero
                        for c in range(C):
                            us[c] = strength * cell(memory, WRITES + t * BLOCK + c0 + c * G)
                            seeds[c] = cell(memory, SEEDS + t * BLOCK + c0 + c * G)
                            dus[c] = zero
                        for r in range(R):
                            dqs[r] = zero
                            dks[r] = zero
                            dgs[r] = zero
                            for c in range(C):
                                old = s[r * C + c]
                                if DECAY == 1:
                                    old = fade * old
                                if DECAY == 2:
                                    old = dd[r] * old
                                s[r * C + c] = old
                                adjoint = ds[r * C + c] + qq[r] * seeds[c]
                                ds[r * C + c] = adjoint
                                dus[c] += adjoint * kk[r]
                                dqs[r] += (old + kk[r] * us[c]) * seeds[c]
                                dks[r] += adjoint * us[c]
                        for c in range(C):
                            dus[c] = along(dus[c])
                            if DELTA:
                                dstrength += dus[c] * cell(memory, WRITES + t * BLOCK + c0 + c * G)
                                dus[c] = strength * dus[c]
                            if share == c % L and begin + c0 + c * G < V:
                                write(dv, write_at + t * apart + c0 + c * G, dus[c])
                        for r in range(R):
                            for c in range(C):
                                old, adjoint = s[r * C + c], ds[r * C + c]
                                if DELTA:
                                    adjoint -= kk[r] * dus[c]
                                    dks[r] -= old * dus[c]
                                if DECAY == 1:
                                    dfade += adjoint * old
                                    adjoint = fade * adjoint
                                if DECAY == 2:
                                    dgs[r] += adjoint * old
                                    adjoint = dd[r] * adjoint
                                ds[r * C + c] = adjoint
                        for i in each(STEPS):
                            upper = (own >> (STEPS - 1 - i)) & 1
                            if HALVES[i] > 0:
                                for r in range(HALVES[i]):
                                    give = dqs[r] if upper else dqs[HALVES[i] + r]
                                    take = dqs[HALVES[i] + r] if upper else dqs[r]
                                    dqs[r] = take + flips[i](give)
                                    give = dks[r] if upper else dks[HALVES[i] + r]
                                    take = dks[HALVES[i] + r] if upper else dks[r]
                                    dks[r] = take + flips[i](give)
                                    if DECAY == 2:
                                        give = dgs[r] if upper else dgs[HALVES[i] + r]
                                        take = dgs[HALVES[i] + r] if upper else dgs[r]
                                        dgs[r] = take + flips[i](give)
                            else:
                                dqs[0] += flips[i](dqs[0])
                                dks[0] += flips[i](dks[0])
                                if DECAY == 2:
                                    dgs[0] += flips[i](dgs[0])
                        for i in range(LEFT):
                            r = mine + i
                            at = (warp * HOLD + m) * KP + r // 4 * 4 * L + 4 * share + r % 4
                            memory[SUMS + at] = dqs[i]
                            memory[SUMS + ROW_SUMS + at] = dks[i]
                            if DECAY == 2:
                                memory[SUMS + 2 * ROW_SUMS + at] = dgs[i]
                        if DELTA:
                            dstrength = over(dstrength)
                            if lane == 0:
                                memory[SCALARS + warp * HOLD + m] = dstrength
                        if DECAY == 1:
                            dfade = across(dfade)
                            if lane == 0:
                                memory[SCALARS + W * HOLD + warp * HOLD + m] = dfade

                # Over warps, and out.
                cuda.syncthreads()
                here = min(np.int64(HOLD), count - a * HOLD)
                for at in range(thread, here * KP, THREADS):
                    m, row = at // KP, at % KP
                    if row < K:
                        to = ((part_at + base + a * HOLD + m) * heads + head) * K + row
                        total, other, third = zero, zero, zero
                        for w in range(W):
                            total += cell(memory, SUMS + w * HOLD * KP + at)
                            other += cell(memory, SUMS + ROW_SUMS + w * HOLD * KP + at)
                            if DECAY == 2:
                                third += cell(memory, SUMS + 2 * ROW_SUMS + w * HOLD * KP + at)
                        write_dq(dq, to, gain * total)
                        write_dk(dk, to, other)
                        if DECAY == 2:
                            write_dg(dg, to, third)
                if thread < here:
                    to = (part_at + base + a * HOLD + thread) * heads + head
                    total, other = zero, zero
                    for w in range(W):
                        if DELTA:
                            total += cell(memory, SCALARS + w * HOLD + thread)
                        if DECAY == 1:
                            other += cell(memory, SCALARS + W * HOLD + w * HOLD + thread)
                    if DELTA:
                        write_dbeta(dbeta, to, total)
                    if DECAY == 1:
                        write_dg(dg, to, other)
                cuda.syncthreads()

        if dinitial != 0:
            for r in range(R):
                row = r // 4 * 4 * L + 4 * share + r % 4
                for c in range(C):
                    column = begin + c0 + c * G
                    if row < K and column < V:
                        write_dinitial(dinitial, ((n * heads + head) * K + row) * V + column, ds[r * C + c])

    return unrolled(kernel)
