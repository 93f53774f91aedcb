"""The adjoint of TTT-linear, from the last token to the first: the device code; notation of ``ttt_forward``.

Carried: dW, dc, dP, dp. With ū = w∘dy and centre(u, x) = u − mean u − x mean(u∘x), a projection:

    end of a mini-batch    dP = −last dW    dp = −last dc    dlast = −⟨dW,P⟩ − ⟨dc,p⟩
    the read               e = centre(ū, x̄)/std̄     dW += q eᵀ   dc += e   dP −= rate q eᵀ   dp −= rate e
                           dq = dy + W e − rate P e    drate = −⟨e, qP + p⟩
    the write              f = dPᵀk + dp    dk = dP (beta G)    dbeta = ⟨f, G⟩    u = beta f/std
    its gradient           g = centre(u, x)  (dh)    dv = −w∘g    dk += w∘g
                           dx = w²∘g − u mean(h∘x) − h mean(u∘x)    dstd = −beta ⟨f,G⟩/std
                           o = centre(dx, x)/std + x dstd/K    dW += k oᵀ   dc += o   dk += W o
    parameters             dw += dy∘x̄ + g∘(2w∘x + w_b − v + k)    dw_b += dy + w∘g

W is that of the mini-batch; P after a token is the one before plus k (beta G)ᵀ, so it is added up over the mini-batch
and taken back token by token. Sums over rows (f, and ⟨dW,P⟩) meet in shared memory; so does what belongs to columns
and is wanted by rows.

    dweight, dshift parts [N,H,K]   drate parts [N,H,chunk_size], zero where it starts
"""

import numpy as np

from .agreed import shares
from .device import WARP, load, store, sum_lanes
from .folds import fold, read_four, unfold
from .place import marks_before, seat, span
from .source import cuda


def build(
    *, rows, columns, lanes, warps, real, kind, beta, weight, shift, rate, first, dy, dfinal, dmarks, dinitial,
    dq, dk, dbeta,
):  # fmt: skip
    """The kernel; all but the layout are dtypes of arrays."""
    R, C, L, W, M = rows, columns, lanes, warps, WARP // lanes
    BITS, ALL_BITS = M.bit_length() - 1, WARP.bit_length() - 1
    VP, THREADS, CELLS = C * L, W * WARP, R * C
    OWN, seated = shares(C, 0, BITS)[0], seat(rows, columns, lanes)
    ALL_PARTS, ALL_COLUMNS = W * VP, max(VP, R * M * W)
    number = np.dtype(real).type
    zero, one = number(0), number(1)
    along, all_lanes = sum_lanes(BITS, ALL_BITS), sum_lanes(0, ALL_BITS)
    across, back = fold(C, 0, BITS), unfold(C, 0, BITS)
    read, read_beta, read_first, read_count = load(kind), load(beta), load(first), load("int32")
    read_weight, read_shift, read_rate, read_real = load(weight), load(shift), load(rate), load(real)
    read_dy, read_final, read_mark = load(dy), load(dfinal), load(dmarks)
    read_kept = read_four(real)
    write_q, write_k, write_v, write_beta = store(dq), store(dk), store(kind), store(dbeta)
    write_initial, write_real = store(dinitial), store(real)

    def kernel(
        q, q_b, q_t, q_h, q_d, k, k_b, k_t, k_h, k_d, v, v_b, v_t, v_h, v_d, beta, beta_b, beta_t, beta_h,
        weight, weight_h, weight_d, shift, shift_h, shift_d, rate, rate_d,
        first_w, w_n, w_h, w_k, w_v, first_c, c_n, c_h, c_v, first_p, p_n, p_h, p_k, p_v, first_s, s_n, s_h, s_v,
        phases, phases_n, dy, dy_b, dy_t, dy_h, dy_d,
        final_w, fw_n, fw_h, fw_k, fw_v, final_c, fc_n, fc_h, fc_v, final_p, fp_n, fp_h, fp_k, fp_v,
        final_s, fs_n, fs_h, fs_v, mark_w, mw_b, mw_p, mw_h, mw_k, mw_v, mark_c, mc_b, mc_p, mc_h, mc_v,
        mark_p, mp_b, mp_p, mp_h, mp_k, mp_v, mark_s, ms_b, ms_p, ms_h, ms_v,
        dq, dk, dv, dbeta, dweight, dshift, drate, dw, dc, dp, ds, offsets, kept, measured,
        K, tokens, every, heads, group, batch_size,
    ):  # fmt: skip
        parts = cuda.shared.array(ALL_PARTS, number)
        by_column = cuda.shared.array(ALL_COLUMNS, number)
        totals = cuda.shared.array(W, number)
        thread = np.int32(cuda.threadIdx.x)
        warp, lane, m, band, row0, column0, mine = seated(thread)
        alone = warp == 0 and m == 0

        item = np.int64(cuda.blockIdx.x)
        n = np.int64(np.int32(item) // np.int32(heads))
        head = item - n * heads
        batch, start, length = span(offsets, n, tokens)
        q_at = batch * q_b + start * q_t + head // group * q_h
        k_at = batch * k_b + start * k_t + head // group * k_h
        v_at = batch * v_b + start * v_t + head * v_h
        beta_at = batch * beta_b + start * beta_t + head * beta_h
        dy_at = batch * dy_b + start * dy_t + head * dy_h
        row_at = batch * tokens + start
        keep = row_at // batch_size + 2 * n
        mark, mark_row = np.int64(0), np.int64(0)
        marked = mark_w != 0 or mark_c != 0 or mark_p != 0 or mark_s != 0
        if marked:
            mark = length // every
            if offsets != 0:
                mark_row = marks_before(offsets, n, tokens, every)

        w = cuda.local.array(CELLS, number)
        p = cuda.local.array(CELLS, number)
        to_w = cuda.local.array(CELLS, number)
        to_p = cuda.local.array(CELLS, number)
        s = cuda.local.array(C, number)
        to_c = cuda.local.array(C, number)
        to_s = cuda.local.array(C, number)
        gain = cuda.local.array(C, number)
        bias = cuda.local.array(C, number)
        of_gain = cuda.local.array(C, number)
        of_bias = cuda.local.array(C, number)
        x = cuda.local.array(C, number)
        e = cuda.local.array(C, number)
        f = cuda.local.array(C, number)
        hs = cuda.local.array(C, number)
        kk = cuda.local.array(R, number)
        qq = cuda.local.array(R, number)
        of_k = cuda.local.array(R, number)
        for i in range(R):
            for j in range(C):
                to_w[i * C + j], to_p[i * C + j] = zero, zero
        for j in range(C):
            column = j // 4 * 4 * L + column0 + j % 4
            to_c[j], to_s[j], of_gain[j], of_bias[j], gain[j], bias[j] = zero, zero, zero, zero, zero, zero
            if column < K:
                gain[j] = number(read_weight(weight, head * weight_h + column * weight_d)) if weight != 0 else one
                bias[j] = number(read_shift(shift, head * shift_h + column * shift_d)) if shift != 0 else zero
        if final_w != 0:
            for i in range(R):
                for j in range(C):
                    row, column = row0 + i, j // 4 * 4 * L + column0 + j % 4
                    if row < K and column < K:
                        at = n * fw_n + head * fw_h + row * fw_k + column * fw_v
                        to_w[i * C + j] = number(read_final(final_w, at))
        if final_p != 0:
            for i in range(R):
                for j in range(C):
                    row, column = row0 + i, j // 4 * 4 * L + column0 + j % 4
                    if row < K and column < K:
                        at = n * fp_n + head * fp_h + row * fp_k + column * fp_v
                        to_p[i * C + j] = number(read_final(final_p, at))
        for j in range(C):
            column = j // 4 * 4 * L + column0 + j % 4
            if column < K:
                if final_c != 0:
                    to_c[j] = number(read_final(final_c, n * fc_n + head * fc_h + column * fc_v))
                if final_s != 0:
                    to_s[j] = number(read_final(final_s, n * fs_n + head * fs_h + column * fs_v))
        begun = read_count(phases, n * phases_n)
        last = number(read_rate(rate, (batch_size - 1) * rate_d)) if rate != 0 else one / number(batch_size)
        over = one / number(K)

        pieces = (begun + length + batch_size - 1) // batch_size if length > 0 else np.int64(0)
        for reverse in range(pieces):
            piece = pieces - 1 - reverse
            begin = max(np.int64(0), piece * batch_size - begun)
            end = min(length, (piece + 1) * batch_size - begun)
            # The mini-batch's weights, and the sums at its end.
            at = (((keep + piece) * heads + head) * (CELLS + C)) * THREADS
            for x4 in range(CELLS // 4):
                four = read_kept(kept, at + (x4 * THREADS + thread) * 4)
                for i in range(4):
                    w[4 * x4 + i] = four[i]
            for i in range(R):
                for j in range(C):
                    row, column = row0 + i, j // 4 * 4 * L + column0 + j % 4
                    p[i * C + j] = zero
                    if piece == 0 and row < K and column < K:
                        p[i * C + j] = number(read_first(first_p, n * p_n + head * p_h + row * p_k + column * p_v))
            for j in range(C):
                column = j // 4 * 4 * L + column0 + j % 4
                s[j] = zero
                if piece == 0 and column < K:
                    s[j] = number(read_first(first_s, n * s_n + head * s_h + column * s_v))
            for t in range(begin, end):
                at = ((row_at + t) * heads + head) * (4 * K + 2) + 2 * K
                for j in range(C):
                    column = j // 4 * 4 * L + column0 + j % 4
                    e[j] = read_real(measured, at + column) if column < K else zero
                    s[j] += e[j]
                for i in range(R):
                    row = row0 + i
                    kk[i] = number(read(k, k_at + t * k_t + row * k_d)) if row < K else zero
                    for j in range(C):
                        p[i * C + j] += kk[i] * e[j]

            for back_token in range(end - begin):
                t = end - 1 - back_token
                phase = begun + t - piece * batch_size
                if marked and (t + 1) % every == 0:
                    mark -= 1
                    b = np.int64(0) if offsets != 0 else n
                    at_mark = mark_row + mark
                    for i in range(R):
                        for j in range(C):
                            row, column = row0 + i, j // 4 * 4 * L + column0 + j % 4
                            if row < K and column < K:
                                if mark_w != 0:
                                    at = b * mw_b + at_mark * mw_p + head * mw_h + row * mw_k + column * mw_v
                                    to_w[i * C + j] += number(read_mark(mark_w, at))
                                if mark_p != 0:
                                    at = b * mp_b + at_mark * mp_p + head * mp_h + row * mp_k + column * mp_v
                                    to_p[i * C + j] += number(read_mark(mark_p, at))
                    for j in range(C):
                        column = j // 4 * 4 * L + column0 + j % 4
                        if column < K:
                            if mark_c != 0:
                                at = b * mc_b + at_mark * mc_p + head * mc_h + column * mc_v
                                to_c[j] += number(read_mark(mark_c, at))
                            if mark_s != 0:
                                at = b * ms_b + at_mark * ms_p + head * ms_h + column * ms_v
                                to_s[j] += number(read_mark(mark_s, at))
                of_last = zero
                if phase == batch_size - 1:
                    for i in range(CELLS):
                        of_last -= to_w[i] * p[i]
                        to_p[i] = -last * to_w[i]
                    for j in range(C):
                        if alone:
                            of_last -= to_c[j] * s[j]
                        to_s[j] = -last * to_c[j]
                of_last = all_lanes(of_last)

                # The read.
                at = ((row_at + t) * heads + head) * (4 * K + 2)
                std, std_read = read_real(measured, at + 4 * K), read_real(measured, at + 4 * K + 1)
                strength = number(read_beta(beta, beta_at + t * beta_t))
                share = number(read_rate(rate, phase * rate_d)) if rate != 0 else one / number(phase + 1)
                mean, mean_x = zero, zero
                for j in range(C):
                    column = j // 4 * 4 * L + column0 + j % 4
                    up, seen = zero, zero
                    if column < K:
                        seen = read_real(measured, at + K + column)
                        if dy != 0:
                            up = number(read_dy(dy, dy_at + t * dy_t + column * dy_d))
                    of_gain[j] += up * seen
                    of_bias[j] += up
                    e[j], hs[j] = gain[j] * up, seen
                    mean += e[j]
                    mean_x += e[j] * seen
                mean, mean_x = along(mean) * over, along(mean_x) * over
                of_share = zero
                for j in range(C):
                    column = j // 4 * 4 * L + column0 + j % 4
                    e[j] = (e[j] - mean - hs[j] * mean_x) / std_read if column < K else zero
                    if column < K:
                        of_share -= e[j] * read_real(measured, at + 3 * K + column)
                    to_c[j] += e[j]
                    to_s[j] -= share * e[j]
                of_share = along(of_share)
                for i in range(R):
                    row = row0 + i
                    kk[i] = number(read(k, k_at + t * k_t + row * k_d)) if row < K else zero
                    qq[i] = number(read(q, q_at + t * q_t + row * q_d)) if row < K else zero
                    by_weight, by_sum = zero, zero
                    for j in range(C):
                        by_weight += w[i * C + j] * e[j]
                        by_sum += p[i * C + j] * e[j]
                        to_w[i * C + j] += qq[i] * e[j]
                        to_p[i * C + j] -= share * qq[i] * e[j]
                    by_weight = along(by_weight - share * by_sum)
                    if band == 0 and row < K:
                        up = number(read_dy(dy, dy_at + t * dy_t + row * dy_d)) if dy != 0 else zero
                        write_q(dq, ((row_at + t) * heads + head) * K + row, up + by_weight)

                # The write.
                for j in range(C):
                    f[j] = zero
                for i in range(R):
                    for j in range(C):
                        f[j] += kk[i] * to_p[i * C + j]
                across(f)
                for j in range(OWN):
                    parts[warp * np.int32(VP) + mine + j // 4 * 4 * L + j % 4] = f[j]
                if lane == 0:
                    totals[warp] = of_last
                cuda.syncthreads()
                for j in range(OWN):
                    total = zero
                    for one_warp in range(W):
                        total += parts[mine + one_warp * VP + j // 4 * 4 * L + j % 4]
                    f[j] = total
                back(f)
                if drate != 0 and thread == 0:
                    own = item * batch_size
                    write_real(drate, own + phase, read_real(drate, own + phase) + of_share)
                    if phase == batch_size - 1:
                        total = read_real(drate, own + phase)
                        for one_warp in range(W):
                            total += totals[one_warp]
                        write_real(drate, own + phase, total)
                mean_h, mean_hx, mean, mean_x, of_beta = zero, zero, zero, zero, zero
                for j in range(C):
                    column = j // 4 * 4 * L + column0 + j % 4
                    x[j], e[j], hs[j] = zero, zero, zero
                    if column < K:
                        x[j] = read_real(measured, at + column)
                        e[j] = read_real(measured, at + 2 * K + column)
                        target = number(read(v, v_at + t * v_t + column * v_d))
                        target -= number(read(k, k_at + t * k_t + column * k_d))
                        f[j] += to_s[j]
                        hs[j] = gain[j] * x[j] + bias[j] - target
                    else:
                        f[j] = zero
                    mean_h += gain[j] * hs[j]
                    mean_hx += gain[j] * hs[j] * x[j]
                    mean += f[j]
                    mean_x += f[j] * x[j]
                mean_h, mean_hx = along(mean_h) * over, along(mean_hx) * over
                scale = strength / std
                mean, mean_x = along(mean) * over * scale, along(mean_x) * over * scale
                for j in range(C):
                    of_beta += f[j] * (gain[j] * hs[j] - mean_h - x[j] * mean_hx)
                of_beta = along(of_beta) / std
                of_std = -strength * of_beta / std
                # of_k of columns is put where rows find it.
                for i in range(R):
                    by_sum = zero
                    for j in range(C):
                        by_sum += to_p[i * C + j] * e[j]
                        p[i * C + j] -= kk[i] * e[j]
                    of_k[i] = by_sum
                mean_o, mean_ox = zero, zero
                for j in range(C):
                    column = j // 4 * 4 * L + column0 + j % 4
                    s[j] -= e[j]
                    u = scale * f[j]
                    g = u - mean - x[j] * mean_x if column < K else zero
                    of_gain[j] += g * (gain[j] * x[j] + hs[j])
                    of_bias[j] += gain[j] * g
                    f[j] = gain[j] * gain[j] * g - u * mean_hx - gain[j] * hs[j] * mean_x
                    mean_o += f[j]
                    mean_ox += f[j] * x[j]
                    if alone and column < K:
                        write_v(dv, ((row_at + t) * heads + head) * K + column, -gain[j] * g)
                    if alone:
                        by_column[column] = gain[j] * g
                mean_o, mean_ox = along(mean_o) * over, along(mean_ox) * over
                for j in range(C):
                    column = j // 4 * 4 * L + column0 + j % 4
                    f[j] = (f[j] - mean_o - x[j] * mean_ox) / std + x[j] * of_std * over if column < K else zero
                    to_c[j] += f[j]
                cuda.syncthreads()
                for i in range(R):
                    row = row0 + i
                    for j in range(C):
                        of_k[i] += w[i * C + j] * f[j]
                        to_w[i * C + j] += kk[i] * f[j]
                    of_k[i] = along(of_k[i])
                    if band == 0 and row < K:
                        write_k(dk, ((row_at + t) * heads + head) * K + row, of_k[i] + by_column[row])
                if thread == 0:
                    write_beta(dbeta, (row_at + t) * heads + head, of_beta)

        if alone:
            for j in range(C):
                column = j // 4 * 4 * L + column0 + j % 4
                if column < K:
                    if dweight != 0:
                        write_real(dweight, item * K + column, of_gain[j])
                    if dshift != 0:
                        write_real(dshift, item * K + column, of_bias[j])
                    if dw != 0:
                        write_initial(dc, item * K + column, to_c[j])
                        write_initial(ds, item * K + column, to_s[j])
        if dw != 0:
            for i in range(R):
                for j in range(C):
                    row, column = row0 + i, j // 4 * 4 * L + column0 + j % 4
                    if row < K and column < K:
                        write_initial(dw, (item * K + row) * K + column, to_w[i * C + j])
                        write_initial(dp, (item * K + row) * K + column, to_p[i * C + j])

    return kernel
