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

    kept, scratch: slots as threads hold them     measured [B·T, H, 2K + V]: a, 1/n, h     layout of ``lattice_forward``
"""

import math

import numpy as np

from .agreed import DECODING, ENCODING, shares
from .device import WARP, load, store, sum_lanes
from .folds import fma, fold, get, later, put, put_four, read_four, shared_place, write_four
from .lattice_slots import direction
from .place import marks_before, seat, span
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
    QUADS, WIDE = R // 4, C // 4
    DECODES, ENCODES, GATED, PER_SLOT = objective == DECODING, objective == ENCODING, gated, per_slot
    READ_NORM = read_norm
    BP = KP if per_slot else 1
    QUERIES, ALONG, OVER = S * KP, 2 * S * KP, 3 * S * KP
    HS = 4 * S * KP
    DYS, PARTS = HS + S * VP, HS + 2 * S * VP
    TOTALS = PARTS + 2 * W * VP
    BETAS = TOTALS + 4 * W
    FADES = BETAS + S * BP
    STATES = -(-(FADES + S) // 4) * 4
    NEAR = near
    STAGE_K, STAGE_V, STAGE_B = -(-S * KP // THREADS), -(-S * VP // THREADS), -(-S * BP // THREADS)
    STAGE_G, FULL_K, FULL_V = -(-S // THREADS), S * KP % THREADS == 0, S * VP % THREADS == 0
    element = np.dtype(real)
    number = element.type
    zero, one = number(0), number(1)
    along, down, across = sum_lanes(BITS, ALL_BITS), sum_lanes(0, BITS), fold(C, 0, BITS)
    take, take_four, leave, leave_four = get(real, 1), get(real, 4), put(real), put_four(real)
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
        warp, lane, m, band, row0, column0, mine = seated(thread)

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
        own = (item * S * (CELLS // 4) * THREADS + thread) * 4
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
        of_k = cuda.local.array(R, number)
        on_g = cuda.local.array(R, number)
        on_s = cuda.local.array(R, number)
        on_h = cuda.local.array(R, number)
        on_up = cuda.local.array(R, number)
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
            for e in range(CELLS // 4):
                four = read_kept(kept, (((keep + part * heads) * (CELLS // 4) + e) * THREADS + thread) * 4)
                for i in range(4):
                    s[4 * e + i] = four[i]
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
                        at = own + (np.int64(early) * (CELLS // 4) + e) * THREADS * 4
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
                        four = read_kept(scratch, own + (np.int64(u) * (CELLS // 4) + e) * THREADS * 4)
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
                at_k = np.int32(u) * np.int32(KP) + row0
                at_v = np.int32(u) * np.int32(VP) + column0
                mu = take(held, FADES + u)[0] if GATED else one
                hh, pull = zero, zero
                for x in range(WIDE):
                    four, given = take_four(held, HS + at_v + 4 * L * x), take_four(held, DYS + at_v + 4 * L * x)
                    for i in range(4):
                        h[4 * x + i], up[4 * x + i] = four[i], given[i]
                for x in range(QUADS):
                    keys, norms = take_four(held, at_k + 4 * x), take_four(held, OVER + at_k + 4 * x)
                    sums_of = take_four(held, ALONG + at_k + 4 * x)
                    for i in range(4):
                        kk[4 * x + i], a[4 * x + i], over[4 * x + i] = keys[i], sums_of[i], norms[i]
                    four = take_four(held, QUERIES + at_k + 4 * x)
                    for i in range(4):
                        of_q[4 * x + i] = four[i]
                for i in range(4 * QUADS, R):
                    kk[i], a[i], over[i] = (
                        take(held, at_k + i)[0],
                        take(held, ALONG + at_k + i)[0],
                        take(held, OVER + at_k + i)[0],
                    )
                    of_q[i] = take(held, QUERIES + at_k + i)[0]
                for j in range(C):
                    hh += h[j] * h[j]
                    pull += h[j] * up[j]
                    sums[j] = zero
                hh, pull = along(hh), along(pull)
                of_mu, of_beta, all_h, all_up = zero, zero, zero, zero
                at_row = ((row_at + token) * heads + head) * K + row0
                for i in range(R):
                    strength = take(held, BETAS + at_k + i)[0] if PER_SLOT else take(held, BETAS + u)[0]
                    inverse, query = over[i], gain * of_q[i]
                    z = kk[i] - a[i] if ENCODES else kk[i]
                    c = strength * z
                    w = fma(-c, a[i], mu)
                    turned, pulled = w * inverse, c * inverse
                    with_s, with_h, read_s, size, meets, square = zero, zero, zero, zero, zero, zero
                    for j in range(C):
                        if READ_NORM:
                            carry[i * C + j] += query * up[j]
                        with_s += carry[i * C + j] * s[i * C + j]
                        read_s += up[j] * s[i * C + j]
                        size += s[i * C + j] * s[i * C + j]
                        if GATED:
                            x_j = h[j] - a[i] * s[i * C + j]
                            with_h += carry[i * C + j] * x_j
                            meets += s[i * C + j] * x_j
                            square += x_j * x_j
                        else:
                            with_h += carry[i * C + j] * h[j]
                    with_s, with_h, read_s, size = along(with_s), along(with_h), along(read_s), along(size)
                    if GATED:
                        meets, square, stays = along(meets), along(square), mu * inverse
                    else:
                        meets, square, stays = a[i], hh, turned
                    turn = inverse * (stays * with_s + pulled * with_h)
                    of_s = inverse * with_s - turn * (stays * size + pulled * meets)
                    of_h = inverse * with_h - turn * (stays * meets + pulled * square)
                    if READ_NORM:
                        of_q[i] = turned * read_s + pulled * pull
                        if GATED:
                            stand_in = zero
                            if inverse == zero:
                                for j in range(C):
                                    column = j // 4 * 4 * L + column0 + j % 4
                                    stand_in += up[j] * number(direction(row0 + i, column, K, V))
                            of_q[i] += along(stand_in)
                    else:
                        of_q[i] = w * read_s + c * pull
                        of_s += query * read_s
                        of_h += query * (pull - a[i] * read_s if GATED else pull)
                    of_x = of_h if GATED else of_h - a[i] * of_s
                    of_mu += of_s
                    of_beta += z * of_x
                    if PER_SLOT and band == 0 and row0 + i < K:
                        write_beta(dbeta, at_row + i, z * of_x)
                    of_k[i] = strength * of_x
                    of_a = -c * of_s - (of_k[i] if ENCODES else zero)
                    # dh and dS as multiples of G, s, h and dy.
                    for j in range(C):
                        sums[j] += pulled * carry[i * C + j] + (of_a - c * turn * turned) * s[i * C + j]
                    all_h -= c * turn * pulled
                    all_up += c * query
                    on_g[i], on_s[i], on_h[i], on_up[i] = (
                        turned,
                        -w * turn * turned,
                        of_a - w * turn * pulled,
                        w * query,
                    )
                for j in range(C):
                    sums[j] += all_h * h[j]
                    if not READ_NORM:
                        sums[j] += all_up * up[j]
                across(sums)
                side = np.int32(u) & np.int32(1)
                at = PARTS + side * np.int32(W * VP) + warp * np.int32(VP) + mine
                for j in range(OWN):
                    leave(held, at + j // 4 * 4 * L + j % 4, sums[j])
                of_mu, of_beta = down(of_mu), down(of_beta)
                if lane == 0:
                    leave(held, TOTALS + (side * np.int32(W) + warp) * 2, of_mu)
                    leave(held, TOTALS + (side * np.int32(W) + warp) * 2 + 1, of_beta)
                cuda.syncthreads()

                for j in range(C):
                    sums[j] = zero
                at = PARTS + side * np.int32(W * VP) + column0
                for x in range(WIDE * W):
                    four = take_four(held, at + x // WIDE * VP + 4 * L * (x % WIDE))
                    for i in range(4):
                        sums[4 * (x % WIDE) + i] += four[i]
                if warp == 0 and m == 0:
                    for j in range(C):
                        column = j // 4 * 4 * L + column0 + j % 4
                        if column < V:
                            write_v(dv, ((row_at + token) * heads + head) * V + column, sums[j])
                if thread == 0:
                    of_mu, of_beta = zero, zero
                    for x in range(W):
                        of_mu += take(held, TOTALS + (side * np.int32(W) + x) * 2)[0]
                        of_beta += take(held, TOTALS + (side * np.int32(W) + x) * 2 + 1)[0]
                    if not PER_SLOT:
                        write_beta(dbeta, (row_at + token) * heads + head, of_beta)
                    if GATED:
                        write_g(dg, (row_at + token) * heads + head, mu * of_mu if mu > zero else zero)
                for i in range(R):
                    with_s = zero
                    for j in range(C):
                        with_s += s[i * C + j] * sums[j]
                    if DECODES:
                        of_k[i] -= along(with_s)
                    if band == 0 and row0 + i < K:
                        write_q(dq, at_row + i, gain * of_q[i])
                        write_k(dk, at_row + i, of_k[i])
                    for j in range(C):
                        cell = on_g[i] * carry[i * C + j] + on_s[i] * s[i * C + j] + on_h[i] * h[j]
                        if not READ_NORM:
                            cell += on_up[i] * up[j]
                        if DECODES:
                            cell -= kk[i] * sums[j]
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
