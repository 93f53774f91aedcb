"""TTT-MLP, a single token of many sequences: the device code; notation of ``mixers.ttt_mlp``, sums P with primes.

    z = kW1 + c1     x = gelu(z)     G2 of xW2 + c2     G1 = (G2 W2ᵀ) ∘ gelu'(z)     both times beta from here on
    z̄ = qW1 + c1 − rate (qP1 + p1 + (⟨q,k⟩ + 1) G1)              x̄ = gelu(z̄)
    x̄W2 + c2 − rate (x̄P2 + p2 + (⟨x̄,x⟩ + 1) G2), whose norm and q are y

A block has one head of one sequence. Nothing of a matrix stays on chip: W1 and P1 are read once for all that is read of
them and once where they are written, W2 three times. In the first layer a thread has columns of its own; in the second
warps share rows, ``together`` of a warp under way at a time, and a lane has columns lane, lane + 32, …; sums over rows
meet in shared memory. Norms are worked out by every warp, so that none waits for another.

    q, k, v [N,·,K]   W1, P1 [N,H,K,F]   W2, P2 [N,H,F,K]   F = 4K
"""

import math

import numpy as np

from .device import WARP, load, store, sum_lanes
from .place import for_device
from .source import cuda
from .unroll import each, unrolled

EPS = 1e-6
ROOT, CUBE = math.sqrt(2.0 / math.pi), 0.044715


def build(*, keys, together, warps, real, kind, beta):
    """The kernel.

    ``keys``: numbers of a row that a lane has; ``together`` divides F. ``kind`` and ``beta``: dtypes of arrays; the
    others are ``real``.
    """
    A, R, W = keys, together, warps
    THREADS, KEYS, INNER, PARTS, STEP, CELLS = W * WARP, A * WARP, 4 * A * WARP, W * A * WARP, W * R, R * A
    number = np.dtype(real).type
    zero, one, half, root, cube, eps = (number(x) for x in (0, 1, 0.5, ROOT, CUBE, EPS))
    three = number(3)
    across = sum_lanes(0, WARP.bit_length() - 1)
    read, write, read_beta, get, put = load(kind), store(kind), load(beta), load(real), store(real)
    read_count, write_count = load("int32"), store("int32")

    @for_device
    def bend(z):
        """tanh of gelu."""
        return number(math.tanh(root * (z + cube * z * z * z)))

    def kernel(
        q, q_n, q_h, q_d, k, k_n, k_h, k_d, v, v_n, v_h, v_d, beta, beta_n, beta_h,
        gain, gain_h, gain_d, shift, shift_h, shift_d, scale, scale_d,
        w1, w1_n, w1_h, w1_k, w1_f, c1, c1_n, c1_h, c1_f, w2, w2_n, w2_h, w2_f, w2_k, c2, c2_n, c2_h, c2_k,
        p1, p1_n, p1_h, p1_k, p1_f, s1, s1_n, s1_h, s1_f, p2, p2_n, p2_h, p2_f, p2_k, s2, s2_n, s2_h, s2_k,
        phase, phase_n, y, new_w1, new_c1, new_w2, new_c2, new_p1, new_s1, new_p2, new_s2, new_phase,
        K, F, heads, group, chunk,
    ):  # fmt: skip
        thread = np.int64(cuda.threadIdx.x)
        warp, lane = thread // WARP, thread % WARP
        n, head = np.int64(cuda.blockIdx.x), np.int64(cuda.blockIdx.y)
        own, key_head = n * heads + head, head // group
        before = np.int64(read_count(phase, n * phase_n))
        done = before + 1 >= chunk
        rate = get(scale, min(before, chunk - 1) * scale_d) if scale != 0 else one / number(before + 1)
        strength = number(read_beta(beta, n * beta_n + head * beta_h))
        # By how much weights move at the end, and what is left of sums.
        moves, stays = rate if done else zero, zero if done else one

        key = cuda.local.array(A, number)
        asked = cuda.shared.array(KEYS, number)
        given = cuda.shared.array(KEYS, number)
        error2 = cuda.shared.array(KEYS, number)
        row = cuda.shared.array(KEYS, number)
        parts = cuda.shared.array(PARTS, number)
        inner = cuda.shared.array(INNER, number)
        slope = cuda.shared.array(INNER, number)
        seen = cuda.shared.array(INNER, number)
        summed = cuda.shared.array(INNER, number)
        error1 = cuda.shared.array(INNER, number)
        bent = cuda.shared.array(INNER, number)
        for place in range(thread, KEYS, THREADS):
            near = min(place, K - 1)
            a = number(read(q, n * q_n + key_head * q_h + near * q_d))
            b = number(read(k, n * k_n + key_head * k_h + near * k_d))
            asked[place], given[place] = a if place < K else zero, b if place < K else zero
        cuda.syncthreads()

        # The first layer, forward, and what q reads of it.
        at_w1, at_p1 = n * w1_n + head * w1_h, n * p1_n + head * p1_h
        at_w2, at_p2 = n * w2_n + head * w2_h, n * p2_n + head * p2_h
        for f in range(thread, F, THREADS):
            z = get(c1, n * c1_n + head * c1_h + f * c1_f)
            a, b = z, get(s1, n * s1_n + head * s1_h + f * s1_f)
            for first in range(0, K, R):
                for j in each(R):
                    i = min(first + j, K - 1)
                    weight, total = get(w1, at_w1 + i * w1_k + f * w1_f), get(p1, at_p1 + i * p1_k + f * p1_f)
                    z += given[first + j] * weight
                    a += asked[first + j] * weight
                    b += asked[first + j] * total
            t = bend(z)
            inner[f] = half * z * (one + t)
            slope[f] = half * (one + t) + half * z * (one - t * t) * root * (one + three * cube * z * z)
            seen[f], summed[f] = a, b
        cuda.syncthreads()

        # The second layer, forward.
        acc = cuda.local.array(A, number)
        some, more = cuda.local.array(CELLS, number), cuda.local.array(CELLS, number)
        for c in each(A):
            acc[c] = zero
        for first in range(warp * R, F, STEP):
            for j in each(R):
                for c in each(A):
                    some[j * A + c] = get(w2, at_w2 + (first + j) * w2_f + min(lane + c * WARP, K - 1) * w2_k)
            for j in each(R):
                for c in each(A):
                    acc[c] += inner[first + j] * some[j * A + c]
        for c in each(A):
            parts[warp * KEYS + c * WARP + lane] = acc[c]
        cuda.syncthreads()
        for place in range(thread, K, THREADS):
            total = get(c2, n * c2_n + head * c2_h + place * c2_k)
            for other in range(W):
                total += parts[other * KEYS + place]
            row[place] = total
        cuda.syncthreads()

        # The error of its norm.
        width = number(K)
        total, meets = zero, zero
        for c in each(A):
            d = lane + c * WARP
            acc[c] = row[d] if d < K else zero
            total += acc[c]
            key[c] = given[d]
            meets += asked[d] * given[d]
        mean, meets = across(total) / width, across(meets)
        total = zero
        for c in each(A):
            if lane + c * WARP < K:
                total += (acc[c] - mean) * (acc[c] - mean)
        std = number(math.sqrt(across(total) / width + eps))
        missed = cuda.local.array(A, number)
        total, met = zero, zero
        for c in each(A):
            d = min(lane + c * WARP, K - 1)
            x = (acc[c] - mean) / std
            times = get(gain, head * gain_h + d * gain_d) if gain != 0 else one
            plus = get(shift, head * shift_h + d * shift_d) if shift != 0 else zero
            wanted = number(read(v, n * v_n + head * v_h + d * v_d)) - key[c]
            acc[c], missed[c] = x, times * (times * x + plus - wanted)
            if lane + c * WARP < K:
                total += missed[c]
                met += missed[c] * x
        total, met = across(total), across(met)
        for c in each(A):
            d = lane + c * WARP
            missed[c] = strength * (width * missed[c] - total - acc[c] * met) / (width * std) if d < K else zero
            if warp == 0:
                error2[d] = missed[c]

        # Back through the first layer, and q through what that becomes.
        for first in range(warp * R, F, STEP):
            for j in each(R):
                for c in each(A):
                    some[j * A + c] = get(w2, at_w2 + (first + j) * w2_f + min(lane + c * WARP, K - 1) * w2_k)
            for j in each(R):
                total = zero
                for c in each(A):
                    total += missed[c] * some[j * A + c]
                total = across(total)
                if lane == 0:
                    f = first + j
                    found = total * slope[f]
                    error1[f] = found
                    z = seen[f] - rate * (summed[f] + (meets + one) * found)
                    bent[f] = half * z * (one + bend(z))
        cuda.syncthreads()

        # The second layer again, whose sums grow as they are read.
        met = zero
        for f in range(lane, F, WARP):
            met += bent[f] * inner[f]
        met = across(met)
        for c in each(A):
            acc[c] = zero
        for first in range(warp * R, F, STEP):
            for j in each(R):
                for c in each(A):
                    d = min(lane + c * WARP, K - 1)
                    some[j * A + c] = get(w2, at_w2 + (first + j) * w2_f + d * w2_k)
                    more[j * A + c] = get(p2, at_p2 + (first + j) * p2_f + d * p2_k)
            for j in each(R):
                f = first + j
                for c in each(A):
                    d = lane + c * WARP
                    weight, total = some[j * A + c], more[j * A + c]
                    acc[c] += bent[f] * (weight - rate * total)
                    total += inner[f] * missed[c]
                    if d < K:
                        put(new_w2, (own * F + f) * K + d, weight - moves * total)
                        put(new_p2, (own * F + f) * K + d, stays * total)
        for c in each(A):
            parts[warp * KEYS + c * WARP + lane] = acc[c]
        cuda.syncthreads()
        for place in range(thread, K, THREADS):
            bias, total = get(c2, n * c2_n + head * c2_h + place * c2_k), get(s2, n * s2_n + head * s2_h + place * s2_k)
            z = bias - rate * (total + (met + one) * error2[place])
            for other in range(W):
                z += parts[other * KEYS + place]
            row[place] = z
            total += error2[place]
            put(new_c2, own * K + place, bias - moves * total)
            put(new_s2, own * K + place, stays * total)
        cuda.syncthreads()

        # The output.
        total = zero
        for c in each(A):
            d = lane + c * WARP
            acc[c] = row[d] if d < K else zero
            total += acc[c]
        mean = across(total) / width
        total = zero
        for c in each(A):
            if lane + c * WARP < K:
                total += (acc[c] - mean) * (acc[c] - mean)
        std = number(math.sqrt(across(total) / width + eps))
        for c in each(A):
            d = lane + c * WARP
            if warp == 0 and d < K:
                times = get(gain, head * gain_h + d * gain_d) if gain != 0 else one
                plus = get(shift, head * shift_h + d * shift_d) if shift != 0 else zero
                write(y, own * K + d, asked[d] + times * (acc[c] - mean) / std + plus)

        # The first layer's sums and weights.
        for f in range(thread, F, THREADS):
            bias, total = get(c1, n * c1_n + head * c1_h + f * c1_f), get(s1, n * s1_n + head * s1_h + f * s1_f)
            total += error1[f]
            put(new_c1, own * F + f, bias - moves * total)
            put(new_s1, own * F + f, stays * total)
            for first in range(0, K, R):
                for j in each(R):
                    i = min(first + j, K - 1)
                    some[j], more[j] = get(w1, at_w1 + i * w1_k + f * w1_f), get(p1, at_p1 + i * p1_k + f * p1_f)
                for j in each(R):
                    i = first + j
                    total = more[j] + given[i] * error1[f]
                    if i < K:
                        put(new_w1, (own * K + i) * F + f, some[j] - moves * total)
                        put(new_p1, (own * K + i) * F + f, stays * total)
        if head == 0 and thread == 0:
            write_count(new_phase, n, 0 if done else before + 1)

    return unrolled(kernel)
