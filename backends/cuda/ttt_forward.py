"""TTT-linear, token by token: the device code of the forward; notation of ``mixers.ttt``.

    z = kW + c      x = (z − mean)/std      h = w∘(w∘x + w_b − (v − k))      G = (h − mean h − x mean(h∘x))/std
    P += k (beta G)ᵀ      p += beta G      Z̄ = qW + c − rate (qP + p)      y = q + w∘x̄ + w_b,  x̄ = (Z̄ − mean)/std̄
    end of a mini-batch:  W −= last P,  c −= last p,  P = p = 0

A block has one head: W and P lie in registers as the slots of Lattice do (``lattice_forward``), rows over warps and
``M`` neighbouring lanes, columns over ``L`` lanes; c, p and the rows of a token over the columns of every thread. What
is summed over rows (kW, qW and qP, all before the token's own write, which adds ⟨q,k⟩ beta G) meets in shared memory;
sums over columns are sums over lanes.

A phase belongs to all heads of a sequence, whose blocks read it at any time: it is written beside, never in a pool.

For a backward it leaves W and c where every mini-batch begins, and x, x̄, beta G and qP + p of every token.
"""

import math

import numpy as np

from .agreed import shares
from .device import WARP, load, store, sum_lanes
from .folds import fold, unfold, write_four
from .place import marks_before, seat, span
from .source import cuda

EPS = 1e-6


def build(
    *, rows, columns, lanes, warps, tile, real, kind, beta, weight, shift, rate, first, source, target, marks, slots,
    out_slots, fresh, keeps, reads,
):  # fmt: skip
    """The kernel; all but the layout, ``keeps`` and ``reads`` are dtypes of arrays."""
    R, C, L, W, M = rows, columns, lanes, warps, WARP // lanes
    BITS, ALL_BITS = M.bit_length() - 1, WARP.bit_length() - 1
    KP, VP, THREADS, CELLS, DEEP = R * M * W, C * L, W * WARP, R * C, -(-R * M * W // WARP)
    OWN, seated = shares(C, 0, BITS)[0], seat(rows, columns, lanes)
    SOME, SOME_V = -(-tile * KP // THREADS), -(-tile * VP // THREADS)
    ALL_ROWS, ALL_COLUMNS, ALL_PARTS = tile * KP, tile * VP, 3 * W * VP
    KEEPS, READS = keeps, reads
    number = np.dtype(real).type
    zero, one, eps = number(0), number(1), number(EPS)
    along, all_lanes = sum_lanes(BITS, ALL_BITS), sum_lanes(0, ALL_BITS)
    across, back = fold(C, 0, BITS), unfold(C, 0, BITS)
    read, write, read_beta, read_first, read_source = load(kind), store(kind), load(beta), load(first), load(source)
    read_weight, read_shift, read_rate, read_count = load(weight), load(shift), load(rate), load("int32")
    write_target, write_mark, write_count, write_real = store(target), store(marks), store("int32"), store(real)
    read_slot, read_out_slot, read_fresh = load(slots), load(out_slots), load(fresh)
    write_kept = write_four(real)

    def kernel(
        q, q_b, q_t, q_h, q_d, k, k_b, k_t, k_h, k_d, v, v_b, v_t, v_h, v_d, beta, beta_b, beta_t, beta_h,
        weight, weight_h, weight_d, shift, shift_h, shift_d, rate, rate_d,
        first_w, w_n, w_h, w_k, w_v, first_c, c_n, c_h, c_v, first_p, p_n, p_h, p_k, p_v, first_s, s_n, s_h, s_v,
        first_phase, phase_n,
        from_w, from_w_n, from_w_h, from_w_k, from_w_v, from_c, from_c_n, from_c_h, from_c_v,
        from_p, from_p_n, from_p_h, from_p_k, from_p_v, from_s, from_s_n, from_s_h, from_s_v, from_phase, from_phase_n,
        to_w, to_w_n, to_w_h, to_w_k, to_w_v, to_c, to_c_n, to_c_h, to_c_v,
        to_p, to_p_n, to_p_h, to_p_k, to_p_v, to_s, to_s_n, to_s_h, to_s_v, to_phase,
        mark_w, mark_c, mark_p, mark_s, mark_phase, slots, slots_n, out_slots, out_slots_n, fresh, fresh_n,
        y, offsets, kept, measured, K, tokens, every, heads, group, batch_size,
    ):  # fmt: skip
        keys = cuda.shared.array(ALL_ROWS, number)
        queries = cuda.shared.array(ALL_ROWS, number)
        values = cuda.shared.array(ALL_COLUMNS, number)
        parts = cuda.shared.array(ALL_PARTS, number)
        thread = np.int32(cuda.threadIdx.x)
        warp, lane, m, band, row0, column0, mine = seated(thread)

        item = np.int64(cuda.blockIdx.x)
        n = np.int64(np.int32(item) // np.int32(heads))
        head = item - n * heads
        batch, start, length = span(offsets, n, tokens)
        q_at = batch * q_b + start * q_t + head // group * q_h
        k_at = batch * k_b + start * k_t + head // group * k_h
        v_at = batch * v_b + start * v_t + head * v_h
        beta_at = batch * beta_b + start * beta_t + head * beta_h
        row_at = batch * tokens + start
        keep = (row_at // batch_size + 2 * n) * heads + head
        mark = np.int64(0)
        if mark_w != 0:
            mark = marks_before(offsets, n, tokens, every)

        # Where weights come from, and where they go.
        came, goes = n, n
        if slots != 0:
            came, goes = read_slot(slots, n * slots_n), read_out_slot(out_slots, n * out_slots_n)
        real_slot = came >= 0
        begins = False
        if fresh != 0:
            begins = read_fresh(fresh, n * fresh_n) != 0

        w = cuda.local.array(CELLS, number)
        p = cuda.local.array(CELLS, number)
        c = cuda.local.array(C, number)
        s = cuda.local.array(C, number)
        gain = cuda.local.array(C, number)
        bias = cuda.local.array(C, number)
        inside = cuda.local.array(C, number)
        phase = np.int64(0)
        for e in range(CELLS):
            w[e], p[e] = zero, zero
        for j in range(C):
            column = j // 4 * 4 * L + column0 + j % 4
            c[j], s[j], gain[j], bias[j], inside[j] = zero, zero, zero, zero, zero
            if column < K:
                inside[j] = one
                gain[j] = number(read_weight(weight, head * weight_h + column * weight_d)) if weight != 0 else one
                bias[j] = number(read_shift(shift, head * shift_h + column * shift_d)) if shift != 0 else zero
        if begins:
            phase = read_count(first_phase, n * phase_n)
            for j in range(C):
                column = j // 4 * 4 * L + column0 + j % 4
                if column < K:
                    c[j] = number(read_first(first_c, n * c_n + head * c_h + column * c_v))
                    s[j] = number(read_first(first_s, n * s_n + head * s_h + column * s_v))
            for i in range(R):
                for j in range(C):
                    row, column = row0 + i, j // 4 * 4 * L + column0 + j % 4
                    if row < K and column < K:
                        w[i * C + j] = number(read_first(first_w, n * w_n + head * w_h + row * w_k + column * w_v))
                        p[i * C + j] = number(read_first(first_p, n * p_n + head * p_h + row * p_k + column * p_v))
        elif real_slot:
            phase = read_count(from_phase, came * from_phase_n)
            at_w, at_p = came * from_w_n + head * from_w_h, came * from_p_n + head * from_p_h
            for j in range(C):
                column = j // 4 * 4 * L + column0 + j % 4
                if column < K:
                    c[j] = number(read_source(from_c, came * from_c_n + head * from_c_h + column * from_c_v))
                    s[j] = number(read_source(from_s, came * from_s_n + head * from_s_h + column * from_s_v))
            for i in range(R):
                for j in range(C):
                    row, column = row0 + i, j // 4 * 4 * L + column0 + j % 4
                    if row < K and column < K:
                        w[i * C + j] = number(read_source(from_w, at_w + row * from_w_k + column * from_w_v))
                        p[i * C + j] = number(read_source(from_p, at_p + row * from_p_k + column * from_p_v))
        last = number(read_rate(rate, (batch_size - 1) * rate_d)) if rate != 0 else one / number(batch_size)
        over = one / number(K)

        z = cuda.local.array(C, number)
        seen = cuda.local.array(C, number)
        sums = cuda.local.array(C, number)
        kk = cuda.local.array(R, number)
        qq = cuda.local.array(R, number)
        x = cuda.local.array(C, number)
        for t in range(length):
            u = np.int32(t % tile)
            if u == 0:
                cuda.syncthreads()
                for i in range(SOME):
                    at = np.int32(i * THREADS) + thread
                    token, row = t + at // np.int32(KP), at % np.int32(KP)
                    if at < tile * KP:
                        here = token < length and row < K
                        keys[at] = number(read(k, k_at + token * k_t + row * k_d)) if here else zero
                        queries[at] = number(read(q, q_at + token * q_t + row * q_d)) if here else zero
                for i in range(SOME_V):
                    at = np.int32(i * THREADS) + thread
                    token, column = t + at // np.int32(VP), at % np.int32(VP)
                    if at < tile * VP:
                        here = token < length and column < K
                        values[at] = number(read(v, v_at + token * v_t + column * v_d)) if here else zero
                cuda.syncthreads()
            if KEEPS and (t == 0 or phase == 0):
                for e in range(CELLS // 4):
                    at = keep * (CELLS + C) * THREADS + (e * THREADS + thread) * 4
                    write_kept(kept, at, w[4 * e], w[4 * e + 1], w[4 * e + 2], w[4 * e + 3])
                for e in range(C // 4):
                    at = keep * (CELLS + C) * THREADS + CELLS * THREADS + (e * THREADS + thread) * 4
                    write_kept(kept, at, c[4 * e], c[4 * e + 1], c[4 * e + 2], c[4 * e + 3])
                keep += heads
            strength = number(read_beta(beta, beta_at + t * beta_t))
            share = number(read_rate(rate, phase * rate_d)) if rate != 0 else one / number(phase + 1)

            met = zero
            for i in range(DEEP):
                row = np.int32(i * WARP) + lane
                if row < KP:
                    met += keys[u * np.int32(KP) + row] * queries[u * np.int32(KP) + row]
            met = all_lanes(met)
            for i in range(R):
                kk[i], qq[i] = keys[u * np.int32(KP) + row0 + i], queries[u * np.int32(KP) + row0 + i]
            cuda.syncthreads()
            for which in range(3):
                for j in range(C):
                    sums[j] = zero
                for i in range(R):
                    for j in range(C):
                        cell = p[i * C + j] if which == 2 else w[i * C + j]
                        sums[j] += (kk[i] if which == 0 else qq[i]) * cell
                across(sums)
                at = np.int32(which * W * VP) + warp * np.int32(VP) + mine
                for j in range(OWN):
                    parts[at + j // 4 * 4 * L + j % 4] = sums[j]
            cuda.syncthreads()
            for which in range(3):
                at = np.int32(which * W * VP) + mine
                for j in range(OWN):
                    total = zero
                    for one_warp in range(W):
                        total += parts[at + one_warp * VP + j // 4 * 4 * L + j % 4]
                    sums[j] = total
                back(sums)
                for j in range(C):
                    if which == 0:
                        z[j] = sums[j] + c[j]
                    elif which == 1:
                        seen[j] = sums[j] + c[j]
                    else:
                        x[j] = sums[j] + s[j]

            # The gradient of this token; x: what it reads of the sums.
            mean = zero
            for j in range(C):
                mean += z[j] * inside[j]
            mean = along(mean) * over
            square = zero
            for j in range(C):
                z[j] = (z[j] - mean) * inside[j]
                square += z[j] * z[j]
            std = number(math.sqrt(along(square) * over + eps))
            mean_h, mean_hx = zero, zero
            for j in range(C):
                column = j // 4 * 4 * L + column0 + j % 4
                z[j] /= std
                key = keys[u * np.int32(KP) + column] if column < KP else zero
                sums[j] = gain[j] * (gain[j] * z[j] + bias[j] - values[u * np.int32(VP) + column] + key)
                mean_h += sums[j]
                mean_hx += sums[j] * z[j]
            mean_h, mean_hx = along(mean_h) * over, along(mean_hx) * over
            factor = strength / std
            for j in range(C):
                sums[j] = factor * (sums[j] - mean_h - z[j] * mean_hx) * inside[j]
                s[j] += sums[j]
                x[j] += (met + one) * sums[j]
            for i in range(R):
                for j in range(C):
                    p[i * C + j] += kk[i] * sums[j]

            # Its read.
            mean = zero
            for j in range(C):
                seen[j] -= share * x[j]
                mean += seen[j] * inside[j]
            mean = along(mean) * over
            square = zero
            for j in range(C):
                seen[j] = (seen[j] - mean) * inside[j]
                square += seen[j] * seen[j]
            std_read = number(math.sqrt(along(square) * over + eps))
            for j in range(C):
                column = j // 4 * 4 * L + column0 + j % 4
                seen[j] /= std_read
                if READS and m == 0 and warp == 0 and column < K:
                    value = queries[u * np.int32(KP) + column] + gain[j] * seen[j] + bias[j]
                    write(y, ((row_at + t) * heads + head) * K + column, value if real_slot else zero)
            if KEEPS and m == 0 and warp == 0:
                at = ((row_at + t) * heads + head) * (4 * K + 2)
                for j in range(C):
                    column = j // 4 * 4 * L + column0 + j % 4
                    if column < K:
                        write_real(measured, at + column, z[j])
                        write_real(measured, at + K + column, seen[j])
                        write_real(measured, at + 2 * K + column, sums[j])
                        write_real(measured, at + 3 * K + column, x[j])
                if band == 0:
                    write_real(measured, at + 4 * K, std)
                    write_real(measured, at + 4 * K + 1, std_read)

            phase += 1
            if phase >= batch_size:
                phase = np.int64(0)
                for e in range(CELLS):
                    w[e] -= last * p[e]
                    p[e] = zero
                for j in range(C):
                    c[j] -= last * s[j]
                    s[j] = zero
            if mark_w != 0 and (t + 1) % every == 0:
                to = mark * heads + head
                for i in range(R):
                    for j in range(C):
                        row, column = row0 + i, j // 4 * 4 * L + column0 + j % 4
                        if row < K and column < K:
                            write_mark(mark_w, (to * K + row) * K + column, w[i * C + j])
                            write_mark(mark_p, (to * K + row) * K + column, p[i * C + j])
                if warp == 0 and m == 0:
                    for j in range(C):
                        column = j // 4 * 4 * L + column0 + j % 4
                        if column < K:
                            write_mark(mark_c, to * K + column, c[j])
                            write_mark(mark_s, to * K + column, s[j])
                if thread == 0 and head == 0:
                    write_count(mark_phase, mark, phase)
                mark += 1

        if to_w != 0 and real_slot and goes >= 0:
            at_w, at_p = goes * to_w_n + head * to_w_h, goes * to_p_n + head * to_p_h
            for i in range(R):
                for j in range(C):
                    row, column = row0 + i, j // 4 * 4 * L + column0 + j % 4
                    if row < K and column < K:
                        write_target(to_w, at_w + row * to_w_k + column * to_w_v, w[i * C + j])
                        write_target(to_p, at_p + row * to_p_k + column * to_p_v, p[i * C + j])
            if warp == 0 and m == 0:
                for j in range(C):
                    column = j // 4 * 4 * L + column0 + j % 4
                    if column < K:
                        write_target(to_c, goes * to_c_n + head * to_c_h + column * to_c_v, c[j])
                        write_target(to_s, goes * to_s_n + head * to_s_h + column * to_s_v, s[j])
        if to_phase != 0 and thread == 0 and head == 0:
            write_count(to_phase, n, phase)

    return kernel
