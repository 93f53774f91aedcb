"""Lattice, exact, token by token: the device code of the forward.

    a_i = ⟨s_i, h⟩   r_i = ‖s_i‖²     z = k or k − a     c = beta z     w = μ − c a      h = v − Sᵀk or v
    n_i² = w² r + 2 w c a + c² ‖h‖²   ρ = w/n   α = c/n      s'_i = ρ_i s_i + α_i h      y = scale · S'ᵀq or S̃ᵀq

The backward turns slots again from a, 1/n and h. Off by a bit of rounding they would run away from these, for what has
grown of a slot is not measured again: so both compute w, ρ, α and s' by the same operations, with ``fma`` in place of
what a compiler may or may not contract.

A block has one head. A warp has ``rows · M`` slots: a lane holds ``rows`` slots by ``columns`` values of them in
registers, ``M`` neighbouring lanes lie along the slots, ``L = lanes`` along the values. So a_i, r_i are sums over
lanes, without a barrier: they are folded, so that a lane is left with those of one slot or few, its own, works out
their ρ and α alone and leaves these in shared memory for its warp. What is summed over slots (the read, the prediction
Sᵀk) meets in shared memory.

The chain from token to token is a, then n, then the next token's prediction, taken from the slots as they were,

    S'ᵀk' = Σ_i (k'_i ρ_i) s_i + (Σ_i k'_i α_i) h

so that turning the slots, reading them and measuring r wait for nobody: they are done while the next token's sums are
on their way. r is measured anew at every token: that keeps norms right. Where the terms of n² cancel, ‖s̃‖² is measured
itself, and always so where a decay may leave little of a slot; then coefficients are first divided by
max(|w|, |c| ‖h‖), for μ² may underflow where μ does not. Slots and values that only fill a tile up are unit vectors
that no key reaches.

Other warps, the carriers, bring tokens to shared memory a tile at a time, while the tile before is worked on, and add
up and write what has been read: nothing of that stands between two tokens. There is one barrier a token.

    slot of row r      rows M w + rows m + r            value of column j      4 L (j // 4) + 4 band + j % 4

Of a sum over the slots a lane keeps its share of columns, an aligned piece of its own.
"""

import math

import numpy as np

from .agreed import DECODING, ENCODING, shares
from .arrays import SIZES
from .device import WARP, load, store, sum_lanes, warp_barrier
from .folds import any_lane, fma, fold, get, later, onward, put, rsqrt, shared_place, write_four
from .lattice_slots import direction
from .place import aligned, for_device, marks_before, own_rows, seat, span
from .source import cuda

# ‖s̃‖² is measured where the terms of its formula are so many times larger than it.
_CANCELS = 16.0


def build(
    *, rows, columns, lanes, warps, carriers, tile, objective, read_norm, real, kind, beta, per_slot, gated, decay,
    first, source, target, marked, marks, slots, out_slots, fresh, reads, keeps,
):  # fmt: skip
    """The kernel.

    ``beta``, ``decay``, ``first``, ``source``, ``target``, ``marks``, ``slots``, ``out_slots`` and ``fresh`` are dtypes
    of arrays. ``reads``: fill ``y``. ``marked``: there are checkpoints. ``keeps``: leave for a backward the slots
    before every ``spacing``-th token, and a, 1/n and h of every token.
    """
    R, C, L, W, M = rows, columns, lanes, warps, WARP // lanes
    BITS, ALL_BITS = M.bit_length() - 1, WARP.bit_length() - 1
    KP, VP, THREADS, CARRIERS, CELLS = R * M * W, C * L, W * WARP, carriers * WARP, R * C
    OWN, seated = shares(C, 0, BITS)[0], seat(rows, columns, lanes)
    OWN_ROWS, owned = own_rows(rows, lanes)
    WIDE, ROW = C // 4, math.gcd(R, 4)
    DECODES, ENCODES, GATED, PER_SLOT = objective == DECODING, objective == ENCODING, gated, per_slot
    READS, KEEPS, MARKS, READ_NORM = reads, keeps, marked, read_norm
    RING = 2 * tile
    BP = KP if per_slot else 1
    QUERIES, VALUES, PARTS = RING * KP, 2 * RING * KP, 2 * RING * KP + RING * VP
    TURNS = PARTS + 2 * W * VP
    PULLS, NORMS = TURNS + KP, TURNS + 2 * KP
    OUTS = NORMS + (0 if read_norm else KP)
    BETAS = OUTS + (RING * W * VP if reads else 0)
    FADES = BETAS + RING * BP
    PK, PV, PB = (1 << (n - 1).bit_length() for n in (KP, VP, BP))
    SOME_K, SOME_V, SOME_B = (-(-tile * n // CARRIERS) for n in (PK, PV, PB))
    BYTES, BYTES_B = SIZES[kind], SIZES[beta]
    element = np.dtype(real)
    number = element.type
    zero, one, two, many = number(0), number(1), number(2), number(_CANCELS)
    along, along_all, across = sum_lanes(BITS, ALL_BITS), fold(R, BITS, ALL_BITS), fold(C, 0, BITS)
    take_rows, take_four, take, leave, on = get(real, ROW), get(real, 4), get(real, 1), put(real), onward(real)
    read, widen, bits = later(kind, real)
    read_beta, widen_beta, beta_bits = later(beta, real)
    read_decay, widen_decay, decay_bits = later(decay, real)
    write, write_kept = store(kind), write_four(real)
    read_first, read_source = load(first), load(source)
    no_bits, no_beta, no_decay = bits(0), beta_bits(0), decay_bits(0)
    write_target, write_mark, write_real = store(target), store(marks), store(real)
    read_slot, read_out_slot, read_fresh = load(slots), load(out_slots), load(fresh)

    @for_device
    def publish(at_own, own_w, own_c, own_norm, inverse):
        """How far a lane's own slots turn, for the lanes that have these slots too."""
        for i in range(OWN_ROWS):
            leave(at_own, TURNS + i, own_w[i] * inverse[i])
            leave(at_own, PULLS + i, own_c[i] * inverse[i])
            if not READ_NORM:
                leave(at_own, NORMS + i, own_norm[i])
        warp_barrier()

    @for_device
    def measure(at_rows, at_own, s, h, sizes, own_w, own_c, own_norm, inverse):
        """‖s̃‖² itself, where it is not its formula."""
        publish(at_own, own_w, own_c, own_norm, inverse)
        for i in range(R):
            size, of_s, of_h = zero, take(at_rows, TURNS + i)[0], take(at_rows, PULLS + i)[0]
            for j in range(C):
                turned = of_s * s[i * C + j] + of_h * h[j]
                size += turned * turned
            sizes[i] = size
        along_all(sizes)
        warp_barrier()
        for i in range(OWN_ROWS):
            over = rsqrt(sizes[i]) if sizes[i] > zero else zero
            own_norm[i] *= sizes[i] * over
            inverse[i] *= over

    @for_device
    def predict(at_part, to, ahead, rho, alpha, s, h, sums):
        """What the slots, once turned, predict of the next token."""
        if GATED:
            for j in range(C):
                sums[j] = zero
            for i in range(R):
                for j in range(C):
                    sums[j] += ahead[i] * s[i * C + j]
        else:
            pull = zero
            for i in range(R):
                pull += ahead[i] * alpha[i]
            for j in range(C):
                sums[j] = pull * h[j]
            for i in range(R):
                weight = ahead[i] * rho[i]
                for j in range(C):
                    sums[j] += weight * s[i * C + j]
        across(sums)
        for j in range(OWN):
            leave(at_part, to + j // 4 * 4 * L + j % 4, sums[j])

    @for_device
    def learn(at_rows, rho, alpha, norm):
        """What ``publish`` has left, of a lane's slots."""
        for x in range(R // ROW):
            turns = take_rows(at_rows, TURNS + ROW * x)
            pulls = take_rows(at_rows, PULLS + ROW * x)
            for i in range(ROW):
                rho[ROW * x + i], alpha[ROW * x + i] = turns[i], pulls[i]
            if not READ_NORM:
                norms = take_rows(at_rows, NORMS + ROW * x)
                for i in range(ROW):
                    norm[ROW * x + i] = norms[i]

    def kernel(
        q, q_b, q_t, q_h, q_d, k, k_b, k_t, k_h, k_d, v, v_b, v_t, v_h, v_d, beta, beta_b, beta_t, beta_h, beta_d,
        g, g_b, g_t, g_h, initial, initial_n, initial_h, initial_k, initial_v,
        origin, origin_n, origin_h, origin_k, origin_v, final, final_n, final_h, final_k, final_v,
        y, checkpoints, slots, slots_n, out_slots, out_slots_n, fresh, fresh_n, offsets, kept, measured,
        K, V, tokens, every, spacing, heads, group, scale: float,
    ):  # fmt: skip
        held = shared_place(cuda.shared.array(0, element))
        thread = np.int32(cuda.threadIdx.x)
        item = np.int32(cuda.blockIdx.x)
        n = np.int64(item // np.int32(heads))
        head = np.int64(item) - n * heads
        batch, start, length = span(offsets, n, tokens)
        row_at = batch * tokens + start

        # Where slots come from, and where they go.
        came, goes = n, n
        if slots != 0:
            came, goes = read_slot(slots, n * slots_n), read_out_slot(out_slots, n * out_slots_n)
        real_slot = came >= 0

        if thread >= THREADS:
            # Carriers: a tile from memory to registers, and from these to shared memory a barrier before it is read.
            thread -= np.int32(THREADS)
            key_head = np.int64(np.int32(head) // np.int32(group))
            q_at = batch * q_b + start * q_t + key_head * q_h
            k_at = batch * k_b + start * k_t + key_head * k_h
            v_at = batch * v_b + start * v_t + head * v_h
            beta_at = batch * beta_b + start * beta_t + head * beta_h
            g_at = batch * g_b + start * g_t + head * g_h
            y_at = (row_at * heads + head) * V
            gain = number(scale)
            some_k = cuda.local.array(SOME_K, bits)
            some_q = cuda.local.array(SOME_K, bits)
            some_v = cuda.local.array(SOME_V, bits)
            some_b = cuda.local.array(SOME_B, beta_bits)
            some_g = no_decay

            # The first token and row of a carrier's numbers; from one to the next is as far for every carrier.
            token_k, row = thread // np.int32(PK), thread % np.int32(PK)
            token_v, column = thread // np.int32(PV), thread % np.int32(PV)
            token_b, row_b = thread // np.int32(PB), thread % np.int32(PB)
            from_k = k + BYTES * (k_at + token_k * k_t + row * k_d)
            from_q = q + BYTES * (q_at + token_k * q_t + row * q_d)
            from_v = v + BYTES * (v_at + token_v * v_t + column * v_d)
            from_b = beta + BYTES_B * (beta_at + token_b * beta_t + row_b * beta_d)
            step_k, step_q, step_v, step_b = BYTES * k_t, BYTES * q_t, BYTES * v_t, BYTES_B * beta_t
            to_y = y_at + token_v * heads * V + column
            to_k, to_v = on(held, token_k * np.int32(KP) + row), on(held, token_v * np.int32(VP) + column)
            to_b, of_y = on(held, token_b * np.int32(BP) + row_b), on(held, token_v * np.int32(W * VP) + column)

            for tick in range(-tile, length + 1):
                u = np.int32(tick) & np.int32(tile - 1)
                if tick >= 0:
                    cuda.syncthreads()
                ahead = tick + tile - u
                if u == 0:
                    left = np.int32(min(length - ahead, np.int64(tile)))
                    now_k, now_q = from_k + ahead * step_k, from_q + ahead * step_q
                    now_v, now_b = from_v + ahead * step_v, from_b + ahead * step_b
                    for i in range(SOME_K):
                        token, beyond = i * CARRIERS // PK, i * CARRIERS % PK
                        inside = token_k + token < left and row + beyond < K
                        some_k[i] = read(now_k + token * step_k, beyond * k_d) if inside else no_bits
                        if READS:
                            some_q[i] = read(now_q + token * step_q, beyond * q_d) if inside else no_bits
                    for i in range(SOME_V):
                        token, beyond = i * CARRIERS // PV, i * CARRIERS % PV
                        inside = token_v + token < left and column + beyond < V
                        some_v[i] = read(now_v + token * step_v, beyond * v_d) if inside else no_bits
                    for i in range(SOME_B):
                        token, beyond = i * CARRIERS // PB, i * CARRIERS % PB
                        inside = token_b + token < left and row_b + beyond < K
                        some_b[i] = read_beta(now_b + token * step_b, beyond * beta_d) if inside else no_beta
                    if GATED:
                        some_g = no_decay
                        if thread < left:
                            some_g = read_decay(g, g_at + (ahead + thread) * g_t)
                elif u == tile - 2:
                    to = np.int32(ahead) & np.int32(RING - 1)
                    for i in range(SOME_K):
                        token, beyond = i * CARRIERS // PK, i * CARRIERS % PK
                        if token_k + token < tile and row + beyond < KP:
                            leave(to_k, to * np.int32(KP) + token * KP + beyond, number(widen(some_k[i])))
                            if READS:
                                leave(to_k, QUERIES + to * np.int32(KP) + token * KP + beyond, number(widen(some_q[i])))
                    for i in range(SOME_V):
                        token, beyond = i * CARRIERS // PV, i * CARRIERS % PV
                        if token_v + token < tile and column + beyond < VP:
                            leave(to_v, VALUES + to * np.int32(VP) + token * VP + beyond, number(widen(some_v[i])))
                    for i in range(SOME_B):
                        token, beyond = i * CARRIERS // PB, i * CARRIERS % PB
                        if token_b + token < tile and row_b + beyond < BP:
                            leave(to_b, BETAS + to * np.int32(BP) + token * BP + beyond, number(widen_beta(some_b[i])))
                    if GATED and thread < tile:
                        leave(held, FADES + to + thread, number(math.exp(number(widen_decay(some_g)))))
                if tick == -1 or tick == length:
                    cuda.syncthreads()
                # Reads that every warp has left its part of: the tile before, and what is left at the end.
                if READS and tick > 0 and (u == 1 or tick == length):
                    for early in range(
                        tick - u - (tile if u < 2 else 0), tick - u + (1 if tick == length else 0), tile
                    ):
                        at = OUTS + (np.int32(early) & np.int32(RING - 1)) * np.int32(W * VP)
                        left = np.int32(min(length - early, np.int64(tile))) if early >= 0 else np.int32(0)
                        for i in range(SOME_V):
                            token, beyond = i * CARRIERS // PV, i * CARRIERS % PV
                            if token_v + token < left and column + beyond < V:
                                total = zero
                                for x in range(W):
                                    total += take(of_y, at + token * W * VP + beyond + x * VP)[0]
                                step = (early + token) * heads * V + beyond
                                write(y, to_y + step, gain * total if real_slot else zero)
            return

        warp, lane, m, _, row0, column0, mine = seated(thread)
        own, leads = owned(lane)
        own += row0
        # Where a lane's slots, its own ones, its columns and its part of a sum lie in an array of them.
        at_rows, at_own = on(held, row0), on(held, own)
        at_columns, at_part = on(held, column0), on(held, warp * np.int32(VP) + mine)
        begins = False
        if fresh != 0:
            begins = read_fresh(fresh, n * fresh_n) != 0
        mark = np.int64(0)
        if MARKS:
            mark = marks_before(offsets, n, tokens, every)
        until_mark, until_keep = every, np.int64(0)
        keep = (row_at // spacing + n if KEEPS else row_at) * heads + head
        s = cuda.local.array(CELLS, number)
        r = cuda.local.array(R, number)
        a = cuda.local.array(R, number)
        sizes = cuda.local.array(R, number)
        rho = cuda.local.array(R, number)
        alpha = cuda.local.array(R, number)
        norm = cuda.local.array(R, number)
        ahead = cuda.local.array(R, number)
        own_w = cuda.local.array(OWN_ROWS, number)
        own_c = cuda.local.array(OWN_ROWS, number)
        own_norm = cuda.local.array(OWN_ROWS, number)
        inverse = cuda.local.array(OWN_ROWS, number)
        h = cuda.local.array(C, number)
        fresh_h = cuda.local.array(C, number)
        sums = cuda.local.array(C, number)

        for i in range(R):
            rho[i], alpha[i], norm[i] = one, zero, one
        for j in range(C):
            h[j] = zero

        # Slots of zeros stand for their first directions once there is a token.
        for i in range(R):
            for j in range(C):
                s[i * C + j] = one if row0 + i >= K and column0 + j == 0 else zero
        if begins:
            from_first = n * initial_n + head * initial_h
            for i in range(R):
                for j in range(C):
                    row, column = row0 + i, j // 4 * 4 * L + column0 + j % 4
                    if row < K and column < V:
                        s[i * C + j] = number(read_first(initial, from_first + row * initial_k + column * initial_v))
        elif real_slot:
            from_origin = came * origin_n + head * origin_h
            for i in range(R):
                for j in range(C):
                    row, column = row0 + i, j // 4 * 4 * L + column0 + j % 4
                    if row < K and column < V:
                        s[i * C + j] = number(read_source(origin, from_origin + row * origin_k + column * origin_v))
        for i in range(R):
            size = zero
            for j in range(C):
                size += abs(s[i * C + j])
            if along(size) == zero and length > 0:
                for j in range(C):
                    s[i * C + j] = number(direction(row0 + i, j // 4 * 4 * L + column0 + j % 4, K, V))

        # What the slots predict of the first token, once there are tokens.
        cuda.syncthreads()
        if DECODES:
            for j in range(C):
                sums[j] = zero
            for i in range(R):
                key = take(at_rows, i)[0]
                for j in range(C):
                    sums[j] += key * s[i * C + j]
            across(sums)
            for j in range(OWN):
                leave(at_part, PARTS + j // 4 * 4 * L + j % 4, sums[j])

        # One token more than there are: it finds nothing, and what the last one left to be done is done.
        for time in range(np.int32(length) + np.int32(1)):
            t, last = np.int32(time), np.int32(RING - 1)
            here, then, gone = t & last, t + np.int32(1) & last, t - np.int32(1) & last
            side = t & np.int32(1)
            cuda.syncthreads()

            # The values of this token, and what is left of them where the slots predict.
            at = VALUES + here * np.int32(VP)
            for x in range(WIDE):
                some = take_four(at_columns, at + 4 * L * x)
                for i in range(4):
                    fresh_h[4 * x + i] = some[i]
            if DECODES:
                at = PARTS + side * np.int32(W * VP)
                for x in range(WIDE * W):
                    some = take_four(at_columns, at + x // WIDE * VP + 4 * L * (x % WIDE))
                    for i in range(4):
                        fresh_h[4 * (x % WIDE) + i] -= some[i]

            # What the last token left to be done: turn the slots, and measure them.
            if not GATED:
                for i in range(R):
                    for j in range(C):
                        s[i * C + j] = fma(rho[i], s[i * C + j], alpha[i] * h[j])
                for i in range(R):
                    size = zero
                    for j in range(C):
                        size += s[i * C + j] * s[i * C + j]
                    r[i] = size
                along_all(r)
            if MARKS and t > np.int32(0):
                until_mark -= 1
                if until_mark == 0:
                    until_mark = every
                    for i in range(R):
                        for j in range(C):
                            row, column = row0 + i, j // 4 * 4 * L + column0 + j % 4
                            if row < K and column < V:
                                write_mark(checkpoints, ((mark * heads + head) * K + row) * V + column, s[i * C + j])
                    mark += 1
            if KEEPS:
                if t == length:
                    break
                if until_keep == 0:
                    for i in range(R):
                        for j in range(0, C, 4):
                            row, column = row0 + i, j * L + column0
                            if row < K and column < V:
                                e = i * C + j
                                at = (keep * K + row) * aligned(V) + column
                                write_kept(kept, at, s[e], s[e + 1], s[e + 2], s[e + 3])
                    keep += heads
                    until_keep = spacing
                until_keep -= 1

            # What every slot has of h.
            hh = zero
            for j in range(C):
                h[j] = fresh_h[j]
                hh += h[j] * h[j]
            for i in range(R):
                total = zero
                for j in range(C):
                    total += s[i * C + j] * h[j]
                a[i] = total
            along_all(a)
            hh = along(hh)

            # A lane's own slots: how far they turn.
            mu = take(held, FADES + here)[0] if GATED else one
            strength = take(held, BETAS + here)[0] if not PER_SLOT else zero
            careful = GATED
            for i in range(OWN_ROWS):
                key = take(at_own, here * np.int32(KP) + i)[0]
                if PER_SLOT:
                    strength = take(at_own, BETAS + here * np.int32(KP) + i)[0]
                c = strength * (key - a[i] if ENCODES else key)
                w = fma(-c, a[i], mu)
                own_w[i], own_c[i] = w, c
                if GATED:
                    largest = max(abs(w), abs(c) * number(math.sqrt(hh)))
                    own_norm[i], inverse[i] = largest, one / largest if largest > zero else zero
                else:
                    turned, pulled = w * w * r[i], c * c * hh
                    square = turned + two * w * (c * a[i]) + pulled
                    careful = careful or turned + pulled > many * square
                    over = rsqrt(square)
                    own_norm[i], inverse[i] = square * over, over
            if GATED:
                measure(at_rows, at_own, s, h, sizes, own_w, own_c, own_norm, inverse)

            # Meanwhile: what the token before reads.
            if READS:
                to = OUTS + gone * np.int32(W * VP)
                for j in range(C):
                    sums[j] = zero
                for x in range(R // ROW):
                    some = take_rows(at_rows, QUERIES + gone * np.int32(KP) + ROW * x)
                    for i in range(ROW):
                        weight = some[i] if READ_NORM else some[i] * norm[ROW * x + i]
                        for j in range(C):
                            sums[j] += weight * s[(ROW * x + i) * C + j]
                across(sums)
                for j in range(OWN):
                    leave(at_part, to + j // 4 * 4 * L + j % 4, sums[j])

            publish(at_own, own_w, own_c, own_norm, inverse)
            learn(at_rows, rho, alpha, norm)
            for x in range(R // ROW):
                keys = take_rows(at_rows, then * np.int32(KP) + ROW * x)
                for i in range(ROW):
                    ahead[ROW * x + i] = keys[i]
            if GATED:
                if t == length:
                    break
                # Nothing may be left of a slot, and its first direction stands in.
                for i in range(R):
                    for j in range(C):
                        s[i * C + j] = fma(rho[i], s[i * C + j], alpha[i] * h[j])
                    if rho[i] == zero and alpha[i] == zero:
                        for j in range(C):
                            s[i * C + j] = number(direction(row0 + i, j // 4 * 4 * L + column0 + j % 4, K, V))

            to = PARTS + (np.int32(1) - side) * np.int32(W * VP)
            if DECODES:
                predict(at_part, to, ahead, rho, alpha, s, h, sums)
            if not GATED and any_lane(careful):
                warp_barrier()
                measure(at_rows, at_own, s, h, sizes, own_w, own_c, own_norm, inverse)
                publish(at_own, own_w, own_c, own_norm, inverse)
                learn(at_rows, rho, alpha, norm)
                if DECODES:
                    predict(at_part, to, ahead, rho, alpha, s, h, sums)
            if KEEPS:
                at = ((row_at + t) * heads + head) * (2 * K + V)
                for i in range(OWN_ROWS):
                    if leads and own + i < K:
                        write_real(measured, at + own + i, a[i])
                        write_real(measured, at + K + own + i, inverse[i])
                if warp == 0 and m == 0:
                    for j in range(C):
                        column = j // 4 * 4 * L + column0 + j % 4
                        if column < V:
                            write_real(measured, at + 2 * K + column, h[j])

        cuda.syncthreads()
        if final != 0 and real_slot and goes >= 0:
            for i in range(R):
                for j in range(C):
                    row, column = row0 + i, j // 4 * 4 * L + column0 + j % 4
                    if row < K and column < V:
                        at = goes * final_n + head * final_h + row * final_k + column * final_v
                        write_target(final, at, s[i * C + j])

    return kernel
