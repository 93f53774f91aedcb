"""The adjoint of exact Lattice, from the last token to the first: the device code; notation of ``lattice_forward``.

With G = dL/ds' (the carry and scale q dyᵀ), λ = ⟨G,s'⟩, D = dL/ds̃ = (G − λ s')/n, x = h − a s:

    dbeta = z ⟨D,x⟩      dz = beta ⟨D,x⟩      da = −c ⟨D,s⟩ (− dz if encoding)      dμ = Σ ⟨D,s⟩      dq = scale S'dy
    dh = Σ_i (c_i D_i + da_i s_i)      dS = w∘D + da hᵀ      decoding: dS −= k dhᵀ,  dk = dz − S dh      dv = dh

All of them are sums of a few dot products of a slot, ⟨G,s⟩, ⟨G,h⟩, ⟨s,dy⟩, ⟨s,s⟩, times numbers that the forward has
left (a, 1/n and h of every token), so that D and s' are never formed: one exchange over lanes, one sum over slots, one
barrier a token. Where a decay leaves little of a slot, n is small and x may be much smaller than h: then s̃ is taken as
μ s + c x and products with x are summed themselves, for ⟨G,h⟩ − a ⟨G,s⟩ would cancel. The slots of a segment are turned
again from the kept ones, which asks for no sum at all, and wait in shared memory, or in scratch where they do not fit,
every thread's own.

    kept [N·segments, H, K, V']: slots, V' a multiple of four     measured [B·T, H, 2K + V]: a, 1/n, h
    scratch: slots as threads hold them                           layout of ``lattice_forward``, own slots too
"""

import math

import numpy as np

from .agreed import DECODING, ENCODING, shares
from .device import WARP, load, store, sum_lanes, warp_barrier
from .folds import fma, fold, get, later, onward, put, put_four, read_four, shared_place, write_four
from .lattice_slots import direction
from .place import aligned, marks_before, own_rows, seat, span
from .source import cuda


def build(
    *, rows, columns, lanes, warps, segment, near, objective, read_norm, real, kind, beta, per_slot, gated, decay,
    first, dy, dfinal, dmarks, dinitial, dq, dk, dbeta, dg,
):  # fmt: skip
    """The kernel. ``near``: slots wait in shared memory, not in scratch; ``dy`` and what follows are dtypes."""
    R, C, L, W, M, S = rows, columns, lanes, warps, WARP // lanes, segment
    BITS, ALL_BITS = M.bit_length() - 1, WARP.bit_length() - 1
    KP, VP, THREADS, CELLS = R * M * W, C * L, W * WARP, R * C
    OWN, seated = shares(C, 0, BITS)[0], seat(rows, columns, lanes)
    OWN_ROWS, owned = own_rows(rows, lanes)
    QUADS, WIDE, ROW = R // 4, C // 4, math.gcd(R, 4)
    DECODES, ENCODES, GATED, PER_SLOT = objective == DECODING, objective == ENCODING, gated, per_slot
    READ_NORM = read_norm
    BP = KP if per_slot else 1
    QUERIES, ALONG, OVER = S * KP, 2 * S * KP, 3 * S * KP
    HS = 4 * S * KP
    DYS, PARTS = HS + S * VP, HS + 2 * S * VP
    MULTIPLES = PARTS + 2 * W * VP
    OF_BETA, OF_MU = MULTIPLES + 8 * KP, MULTIPLES + 10 * KP
    BETAS = OF_BETA + 4 * KP
    FADES = BETAS + S * BP
    STATES = -(-(FADES + S) // 4) * 4
    NEAR = near
    STAGE_K, STAGE_V, STAGE_B = -(-S * KP // THREADS), -(-S * VP // THREADS), -(-S * BP // THREADS)
    STAGE_G, FULL_K, FULL_V = -(-S // THREADS), S * KP % THREADS == 0, S * VP % THREADS == 0
    element = np.dtype(real)
    number = element.type
    zero, one = number(0), number(1)
    along, down, along_all = sum_lanes(BITS, ALL_BITS), sum_lanes(0, ALL_BITS), fold(R, BITS, ALL_BITS)
    across, over_slots, on = fold(C, 0, BITS), sum_lanes(0, BITS), onward(real)
    # Lanes that have the same columns share out what warps have left of them, where that comes out even.
    SHARE = W // M if W % M == 0 else W
    take_rows, take, take_four = get(real, ROW), get(real, 1), get(real, 4)
    leave, leave_four = put(real), put_four(real)
    read, widen, bits = later(kind, real)
    read_beta, widen_beta, beta_bits = later(beta, real)
    read_dy, widen_dy, dy_bits = later(dy, real)
    no_bits, no_beta, no_dy = bits(0), beta_bits(0), dy_bits(0)
    read_decay, read_first, read_real = load(decay), load(first), load(real)
    read_final, read_mark = load(dfinal), load(dmarks)
    read_kept, write_kept = read_four(real), write_four(real)
    write_q, write_k, write_v, write_beta = store(dq), store(dk), store(kind), store(dbeta)
    write_g, write_initial = store(dg), store(dinitial)

    def kernel(
        q, q_b, q_t, q_h, q_d, k, k_b, k_t, k_h, k_d, v, v_b, v_t, v_h, v_d, beta, beta_b, beta_t, beta_h, beta_d,
        g, g_b, g_t, g_h, initial, initial_n, initial_h, initial_k, initial_v,
        dy, dy_b, dy_t, dy_h, dy_d, dfinal, dfinal_n, dfinal_h, dfinal_k, dfinal_v,
        dmarks, dmarks_b, dmarks_p, dmarks_h, dmarks_k, dmarks_v, dq, dk, dv, dbeta, dg, dinitial,
        offsets, kept, measured, scratch, K, V, tokens, every, heads, group, scale: float,
    ):  # fmt: skip
        held = shared_place(cuda.shared.array(0, element))
        thread = np.int32(cuda.threadIdx.x)
        warp, lane, m, _, row0, column0, mine = seated(thread)
        own, leads = owned(lane)
        at_rows, at_own, at_columns = on(held, row0), on(held, row0 + own), on(held, column0)
        at_part = on(held, warp * np.int32(VP) + mine)
        at_parts = on(held, column0 + (m * np.int32(SHARE * VP) if SHARE < W else np.int32(0)))

        item = np.int64(cuda.blockIdx.x)
        n = np.int64(np.int32(item) // np.int32(heads))
        head = item - n * heads
        batch, start, length = span(offsets, n, tokens)
        q_at = batch * q_b + start * q_t + head // group * q_h
        k_at = batch * k_b + start * k_t + head // group * k_h
        beta_at = batch * beta_b + start * beta_t + head * beta_h
        g_at = batch * g_b + start * g_t + head * g_h
        dy_at = batch * dy_b + start * dy_t + head * dy_h
        row_at = batch * tokens + start
        keep = (row_at // S + n) * heads + head
        aside = (item * S * (CELLS // 4) * THREADS + thread) * 4
        gain = number(scale)
        mark, mark_row = np.int64(0), np.int64(0)
        if dmarks != 0:
            mark = length // every
            if offsets != 0:
                mark_row = marks_before(offsets, n, tokens, every)

        some_k = cuda.local.array(STAGE_K, bits)
        some_q = cuda.local.array(STAGE_K, bits)
        some_along = cuda.local.array(STAGE_K, number)
        some_over = cuda.local.array(STAGE_K, number)
        some_h = cuda.local.array(STAGE_V, number)
        some_dy = cuda.local.array(STAGE_V, dy_bits)
        some_b = cuda.local.array(STAGE_B, beta_bits)
        s = cuda.local.array(CELLS, number)
        carry = cuda.local.array(CELLS, number)
        rho = cuda.local.array(R, number)
        alpha = cuda.local.array(R, number)
        over = cuda.local.array(R, number)
        a = cuda.local.array(R, number)
        kk = cuda.local.array(R, number)
        of_q = cuda.local.array(R, number)
        own_k = cuda.local.array(OWN_ROWS, number)
        with_s = cuda.local.array(R, number)
        with_h = cuda.local.array(R, number)
        read_s = cuda.local.array(R, number)
        sizes = cuda.local.array(R, number)
        meets = cuda.local.array(R, number)
        square = cuda.local.array(R, number)
        stand_in = cuda.local.array(R, number)
        h = cuda.local.array(C, number)
        up = cuda.local.array(C, number)
        sums = cuda.local.array(C, number)
        for e in range(CELLS):
            carry[e] = zero
        if dfinal != 0:
            at = n * dfinal_n + head * dfinal_h
            for i in range(R):
                for j in range(C):
                    row, column = row0 + i, j // 4 * 4 * L + column0 + j % 4
                    if row < K and column < V:
                        carry[i * C + j] = number(read_final(dfinal, at + row * dfinal_k + column * dfinal_v))

        segments = (length + S - 1) // S
        for back in range(segments):
            part = segments - 1 - back
            begin = part * S
            count = np.int32(min(np.int64(S), length - begin))

            # A segment's tokens and its first slots, all on their way before the first is waited for.
            for i in range(STAGE_K):
                at = np.int32(i * THREADS) + thread
                token, row = begin + at // np.int32(KP), at % np.int32(KP)
                inside = token < length and row < K and (FULL_K or at < S * KP)
                left = ((row_at + token) * heads + head) * (2 * K + V) + row
                some_k[i] = read(k, k_at + token * k_t + row * k_d) if inside else no_bits
                some_q[i] = read(q, q_at + token * q_t + row * q_d) if inside else no_bits
                some_along[i] = read_real(measured, left) if inside else zero
                some_over[i] = read_real(measured, left + K) if inside else zero
            for i in range(STAGE_V):
                at = np.int32(i * THREADS) + thread
                token, column = begin + at // np.int32(VP), at % np.int32(VP)
                inside = token < length and column < V and (FULL_V or at < S * VP)
                left = ((row_at + token) * heads + head) * (2 * K + V) + 2 * K + column
                some_h[i] = read_real(measured, left) if inside else zero
                inside = inside and dy != 0
                some_dy[i] = read_dy(dy, dy_at + token * dy_t + column * dy_d) if inside else no_dy
            for i in range(STAGE_B):
                at = np.int32(i * THREADS) + thread
                token, row = begin + at // np.int32(BP), at % np.int32(BP)
                inside = token < length and row < K and at < S * BP
                some_b[i] = read_beta(beta, beta_at + token * beta_t + row * beta_d) if inside else no_beta
            for i in range(R):
                for j in range(C):
                    s[i * C + j] = one if row0 + i >= K and column0 + j == 0 else zero
                for x in range(WIDE):
                    row, column = row0 + i, 4 * L * x + column0
                    if row < K and column < V:
                        four = read_kept(kept, ((keep + part * heads) * K + row) * aligned(V) + column)
                        for j in range(4):
                            s[i * C + 4 * x + j] = four[j]
            cuda.syncthreads()
            for i in range(STAGE_K):
                at = np.int32(i * THREADS) + thread
                if FULL_K or at < S * KP:
                    leave(held, at, number(widen(some_k[i])))
                    leave(held, QUERIES + at, number(widen(some_q[i])))
                    leave(held, ALONG + at, some_along[i])
                    leave(held, OVER + at, some_over[i])
            for i in range(STAGE_V):
                at = np.int32(i * THREADS) + thread
                if FULL_V or at < S * VP:
                    leave(held, HS + at, some_h[i])
                    leave(held, DYS + at, number(widen_dy(some_dy[i])))
            for i in range(STAGE_B):
                at = np.int32(i * THREADS) + thread
                if at < S * BP:
                    leave(held, BETAS + at, number(widen_beta(some_b[i])))
            if GATED:
                for i in range(STAGE_G):
                    at = np.int32(i * THREADS) + thread
                    if at < S:
                        fade = one
                        if begin + at < length:
                            fade = number(math.exp(number(read_decay(g, g_at + (begin + at) * g_t))))
                        leave(held, FADES + at, fade)
            cuda.syncthreads()

            # Its slots, turned again.
            for early in range(count):
                for e in range(CELLS // 4):
                    if NEAR:
                        at = STATES + ((early * np.int32(CELLS // 4) + e) * np.int32(THREADS) + thread) * np.int32(4)
                        leave_four(held, at, s[4 * e], s[4 * e + 1], s[4 * e + 2], s[4 * e + 3])
                    else:
                        at = aside + (np.int64(early) * (CELLS // 4) + e) * THREADS * 4
                        write_kept(scratch, at, s[4 * e], s[4 * e + 1], s[4 * e + 2], s[4 * e + 3])
                at_k = np.int32(early) * np.int32(KP) + row0
                at_v = np.int32(early) * np.int32(VP) + column0
                mu = take(held, FADES + early)[0] if GATED else one
                for x in range(WIDE):
                    four = take_four(held, HS + at_v + 4 * L * x)
                    for i in range(4):
                        h[4 * x + i] = four[i]
                for x in range(QUADS):
                    keys, norms = take_four(held, at_k + 4 * x), take_four(held, OVER + at_k + 4 * x)
                    sums_of = take_four(held, ALONG + at_k + 4 * x)
                    for i in range(4):
                        kk[4 * x + i], a[4 * x + i], over[4 * x + i] = keys[i], sums_of[i], norms[i]
                for i in range(4 * QUADS, R):
                    kk[i], a[i], over[i] = (
                        take(held, at_k + i)[0],
                        take(held, ALONG + at_k + i)[0],
                        take(held, OVER + at_k + i)[0],
                    )
                for i in range(R):
                    strength = take(held, BETAS + at_k + i)[0] if PER_SLOT else take(held, BETAS + early)[0]
                    c = strength * (kk[i] - a[i] if ENCODES else kk[i])
                    rho[i], alpha[i] = fma(-c, a[i], mu) * over[i], c * over[i]
                for i in range(R):
                    for j in range(C):
                        s[i * C + j] = fma(rho[i], s[i * C + j], alpha[i] * h[j])
                if GATED:
                    for i in range(R):
                        if over[i] == zero:
                            for j in range(C):
                                s[i * C + j] = number(direction(row0 + i, j // 4 * 4 * L + column0 + j % 4, K, V))

            for reverse in range(count):
                u = np.int32(count - 1 - reverse)
                token = begin + u
                for e in range(CELLS // 4):
                    if NEAR:
                        at = STATES + ((u * np.int32(CELLS // 4) + e) * np.int32(THREADS) + thread) * np.int32(4)
                        four = take_four(held, at)
                    else:
                        four = read_kept(scratch, aside + (np.int64(u) * (CELLS // 4) + e) * THREADS * 4)
                    for i in range(4):
                        s[4 * e + i] = four[i]
                if dmarks != 0 and (token + 1) % every == 0:
                    mark -= 1
                    at = n * dmarks_b + mark * dmarks_p + head * dmarks_h
                    if offsets != 0:
                        at = (mark_row + mark) * dmarks_p + head * dmarks_h
                    for i in range(R):
                        for j in range(C):
                            row, column = row0 + i, j // 4 * 4 * L + column0 + j % 4
                            if row < K and column < V:
                                carry[i * C + j] += number(read_mark(dmarks, at + row * dmarks_k + column * dmarks_v))
                here_k, here_v = np.int32(u) * np.int32(KP), np.int32(u) * np.int32(VP)
                mu = take(held, FADES + u)[0] if GATED else one
                hh, pull = zero, zero
                for x in range(WIDE):
                    four = take_four(at_columns, HS + here_v + 4 * L * x)
                    given = take_four(at_columns, DYS + here_v + 4 * L * x)
                    for i in range(4):
                        h[4 * x + i], up[4 * x + i] = four[i], given[i]
                for j in range(C):
                    hh += h[j] * h[j]
                    pull += h[j] * up[j]
                    sums[j] = zero
                hh, pull = along(hh), along(pull)

                # Products of every slot, and then what they come to for a lane's own ones.
                for x in range(R // ROW):
                    queries = take_rows(at_rows, QUERIES + here_k + ROW * x)
                    for i in range(ROW):
                        of_q[ROW * x + i] = gain * queries[i]
                    if GATED:
                        sums_of = take_rows(at_rows, ALONG + here_k + ROW * x)
                        norms = take_rows(at_rows, OVER + here_k + ROW * x)
                        for i in range(ROW):
                            a[ROW * x + i], over[ROW * x + i] = sums_of[i], norms[i]
                for i in range(R):
                    with_s[i], with_h[i], read_s[i], sizes[i] = zero, zero, zero, zero
                    meets[i], square[i], stand_in[i] = zero, zero, zero
                    for j in range(C):
                        if READ_NORM:
                            carry[i * C + j] += of_q[i] * up[j]
                        with_s[i] += carry[i * C + j] * s[i * C + j]
                        read_s[i] += up[j] * s[i * C + j]
                        sizes[i] += s[i * C + j] * s[i * C + j]
                        if GATED:
                            x_j = h[j] - a[i] * s[i * C + j]
                            with_h[i] += carry[i * C + j] * x_j
                            meets[i] += s[i * C + j] * x_j
                            square[i] += x_j * x_j
                        else:
                            with_h[i] += carry[i * C + j] * h[j]
                    if GATED and READ_NORM and over[i] == zero:
                        for j in range(C):
                            column = j // 4 * 4 * L + column0 + j % 4
                            stand_in[i] += up[j] * number(direction(row0 + i, column, K, V))
                along_all(with_s)
                along_all(with_h)
                along_all(read_s)
                along_all(sizes)
                if GATED:
                    along_all(meets)
                    along_all(square)
                    along_all(stand_in)
                warp_barrier()
                side = np.int32(u) & np.int32(1)
                at_row = ((row_at + token) * heads + head) * K + row0 + own
                for i in range(OWN_ROWS):
                    key, along_h = take(at_own, here_k + i)[0], take(at_own, ALONG + here_k + i)[0]
                    inverse, query = take(at_own, OVER + here_k + i)[0], gain * take(at_own, QUERIES + here_k + i)[0]
                    strength = take(at_own, BETAS + here_k + i)[0] if PER_SLOT else take(held, BETAS + u)[0]
                    z = key - along_h if ENCODES else key
                    c = strength * z
                    w = fma(-c, along_h, mu)
                    turned, pulled, of_up = w * inverse, c * inverse, zero
                    h_s, h_h, stays = along_h, hh, turned
                    if GATED:
                        h_s, h_h, stays = meets[i], square[i], mu * inverse
                    turn = inverse * (stays * with_s[i] + pulled * with_h[i])
                    of_s = inverse * with_s[i] - turn * (stays * sizes[i] + pulled * h_s)
                    of_h = inverse * with_h[i] - turn * (stays * h_s + pulled * h_h)
                    if READ_NORM:
                        found = turned * read_s[i] + pulled * pull + stand_in[i]
                    else:
                        found, of_up = w * read_s[i] + c * pull, query
                        of_s += query * read_s[i]
                        of_h += query * (pull - along_h * read_s[i] if GATED else pull)
                    of_x = of_h if GATED else of_h - along_h * of_s
                    own_k[i] = strength * of_x
                    of_a = -c * of_s - (own_k[i] if ENCODES else zero)
                    if leads and own + i + row0 < K:
                        write_q(dq, at_row + i, gain * found)
                        if PER_SLOT:
                            write_beta(dbeta, at_row + i, z * of_x)
                    if not PER_SLOT:
                        leave(at_own, OF_BETA + side * np.int32(KP) + i, z * of_x)
                    if GATED:
                        leave(at_own, OF_MU + side * np.int32(KP) + i, of_s)
                    # dh and dS as multiples of G, s, h and dy.
                    at = MULTIPLES + 8 * (row0 + own + i)
                    leave_four(held, at, pulled, of_a - c * turn * turned, -c * turn * pulled, c * of_up)
                    leave_four(held, at + 4, turned, -w * turn * turned, of_a - w * turn * pulled, w * of_up)
                warp_barrier()
                all_h, all_up = zero, zero
                for i in range(R):
                    on_g, on_s, on_h, on_up = take_four(held, MULTIPLES + 8 * (row0 + i))
                    all_h += on_h
                    all_up += on_up
                    for j in range(C):
                        sums[j] += on_g * carry[i * C + j] + on_s * s[i * C + j]
                for j in range(C):
                    sums[j] += all_h * h[j]
                    if not READ_NORM:
                        sums[j] += all_up * up[j]
                across(sums)
                at = PARTS + side * np.int32(W * VP)
                for j in range(OWN):
                    leave(at_part, at + j // 4 * 4 * L + j % 4, sums[j])
                cuda.syncthreads()

                for j in range(C):
                    sums[j] = zero
                for x in range(WIDE * SHARE):
                    four = take_four(at_parts, at + x // WIDE * VP + 4 * L * (x % WIDE))
                    for i in range(4):
                        sums[4 * (x % WIDE) + i] += four[i]
                for j in range(C if SHARE < W else 0):
                    sums[j] = over_slots(sums[j])
                for x in range(-(-VP // THREADS)):
                    column = np.int32(x * THREADS) + thread
                    if column < V:
                        total = zero
                        for i in range(W):
                            total += take(held, at + column + i * VP)[0]
                        write_v(dv, ((row_at + token) * heads + head) * V + column, total)
                if warp == W - 1 and (GATED or not PER_SLOT):
                    of_mu, of_beta = zero, zero
                    for x in range(-(-KP // WARP)):
                        at = side * np.int32(KP) + np.int32(x * WARP) + lane
                        if KP % WARP == 0 or x * WARP + lane < KP:
                            of_beta += zero if PER_SLOT else take(held, OF_BETA + at)[0]
                            of_mu += take(held, OF_MU + at)[0] if GATED else zero
                    if not PER_SLOT:
                        of_beta = down(of_beta)
                    if GATED:
                        of_mu = down(of_mu)
                    if lane == 0:
                        if not PER_SLOT:
                            write_beta(dbeta, (row_at + token) * heads + head, of_beta)
                        if GATED:
                            write_g(dg, (row_at + token) * heads + head, mu * of_mu if mu > zero else zero)
                if DECODES:
                    for i in range(R):
                        with_s[i] = zero
                        for j in range(C):
                            with_s[i] += s[i * C + j] * sums[j]
                    along_all(with_s)
                for i in range(OWN_ROWS):
                    if leads and own + i + row0 < K:
                        write_k(dk, at_row + i, own_k[i] - with_s[i] if DECODES else own_k[i])
                for i in range(R):
                    key = take(at_rows, here_k + i)[0]
                    on_g, on_s, on_h, on_up = take_four(held, MULTIPLES + 8 * (row0 + i) + 4)
                    for j in range(C):
                        cell = on_g * carry[i * C + j] + on_s * s[i * C + j] + on_h * h[j]
                        if not READ_NORM:
                            cell += on_up * up[j]
                        if DECODES:
                            cell -= key * sums[j]
                        carry[i * C + j] = cell

        if dinitial != 0:
            from_first = n * initial_n + head * initial_h
            for i in range(R):
                size = zero
                for j in range(C):
                    row, column = row0 + i, j // 4 * 4 * L + column0 + j % 4
                    if row < K and column < V:
                        size += abs(number(read_first(initial, from_first + row * initial_k + column * initial_v)))
                # No gradient reaches a slot of zeros, for which another stood in.
                cut = along(size) == zero and length > 0
                for j in range(C):
                    row, column = row0 + i, j // 4 * 4 * L + column0 + j % 4
                    if row < K and column < V:
                        at = ((n * heads + head) * K + row) * V + column
                        write_initial(dinitial, at, zero if cut else carry[i * C + j])

    return kernel
