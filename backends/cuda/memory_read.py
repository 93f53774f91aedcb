"""Memory caching, what follows the base of a single token: weights, the read of kept states, and the caches.

    a_i = ⟨u, m_i⟩      w = softmax over what is read      y = w_own online + scale Σ_i w_i C_iᵀ q

A block has ``32 columns`` columns of the states of one head; blocks that share a head work out the same weights. Scores
are a warp's each, in shared memory; with ``top`` a segment is read if fewer are ahead of it. Then warps share the rows
of each state, ``together`` of a warp under way at a time, and what they found is added up at the end. A state is copied
to the cache that follows as it is read; what is not read is not loaded, unless it is copied.

    q, k [N,G,K]   online, y [N,H,V]   u [N,H,K]   S [N,H,K,V]   C [N,M,H,K,V]   m [N,M,H,K]   r [N,H,K]
    scores, weights [M + 1] each, own last of those that are filled
"""

import math

import numpy as np

from .device import WARP, load, other_lane, store, sum_lanes
from .place import for_device
from .source import cuda
from .unroll import each, unrolled


def build(*, keys, columns, together, warps, residual, top, mean, appends, real, kind, query):
    """The kernel.

    ``keys``: numbers of a key that a lane has. ``residual``: everything is read in full; ``top``: no more than so many
    are read; ``mean``: how keys are pooled; ``appends``: caches that follow are written. ``query``: the dtype of u.
    """
    A, C, R, W = keys, columns, together, warps
    RESIDUAL, TOP, MEAN, APPENDS = residual, top, mean, appends
    STEP, THREADS, BLOCK, KEYS, ALL = W * R, W * WARP, C * WARP, keys * WARP, W * C * WARP
    number, element = np.dtype(real).type, np.dtype(real)
    zero, one = number(0), number(1)
    across = sum_lanes(0, WARP.bit_length() - 1)
    swaps = [other_lane(1 << bit) for bit in range(WARP.bit_length() - 1)]
    SWAPS, CELLS = len(swaps), R * C
    read, write, read_query, read_real, write_real = load(kind), store(kind), load(query), load(real), store(real)
    read_count, write_count = load("int32"), store("int32")

    @for_device
    def ahead(scores, score, i, count):
        """How many segments come before the i-th, by score and then by age."""
        found = 0
        for other in range(count):
            if scores[other] > score or (scores[other] == score and other < i):
                found += 1
        return found

    def kernel(
        q, q_n, q_h, q_d, k, k_n, k_h, k_d, y, y_n, y_h, y_d, u, u_n, u_h, u_d,
        online, online_n, online_h, online_k, online_v, kept, kept_n, kept_s, kept_h, kept_k, kept_v,
        pooled, pooled_n, pooled_s, pooled_h, pooled_k, sums, sums_n, sums_h, sums_k, tokens, tokens_n,
        segments, segments_n, out, new_kept, new_pooled, new_sums, new_tokens, new_segments,
        K, V, heads, group, room, segment, scale: float,
    ):  # fmt: skip
        thread = np.int64(cuda.threadIdx.x)
        warp, lane = thread // WARP, thread % WARP
        blocks = (V + BLOCK - 1) // BLOCK
        n, block = np.int64(cuda.blockIdx.x), np.int64(cuda.blockIdx.y)
        head, part = block // blocks, block % blocks
        key_head = head // group
        passed = np.int64(read_count(tokens, n * tokens_n)) + 1
        count = min(np.int64(read_count(segments, n * segments_n)), room)
        ends = passed == segment

        asked = cuda.shared.array(KEYS, number)
        for place in range(thread, KEYS, THREADS):
            value = number(read(q, n * q_n + key_head * q_h + min(place, K - 1) * q_d))
            asked[place] = number(scale) * value if place < K else zero

        # The keys of this segment so far: every warp has them, and the first block of a head leaves them.
        own = cuda.local.array(A, number)
        match = cuda.local.array(A, number)
        share = number(passed) if MEAN else one
        for c in each(A):
            d = lane + c * WARP
            near = min(d, K - 1)
            total = read_real(sums, n * sums_n + head * sums_h + near * sums_k)
            total += number(read(k, n * k_n + key_head * k_h + near * k_d))
            own[c] = total / share
            match[c] = zero if RESIDUAL or d >= K else number(read_query(u, n * u_n + head * u_h + near * u_d))
            if part == 0 and warp == 0 and d < K:
                write_real(new_sums, (n * heads + head) * K + d, zero if ends else total)

        # Weights.
        scores = cuda.shared.array(0, element)
        weights = room + 1
        mine, over = one, one
        if not RESIDUAL:
            for i in range(warp, count + 1, W):
                dot = zero
                for c in each(A):
                    near = min(lane + c * WARP, K - 1)
                    pool = own[c]
                    if i < count:
                        pool = read_real(pooled, n * pooled_n + i * pooled_s + head * pooled_h + near * pooled_k)
                    dot += match[c] * pool
                dot = across(dot)
                if lane == 0:
                    scores[i] = dot
            cuda.syncthreads()
            best = scores[count]
            for i in range(lane, count, WARP):
                best = max(best, scores[i])
            for i in each(SWAPS):
                best = max(best, swaps[i](best))
            for i in range(thread, count, THREADS):
                weight = number(math.exp(scores[i] - best))
                if TOP > 0 and ahead(scores, scores[i], i, count) >= TOP:
                    weight = zero
                scores[weights + i] = weight
            mine = number(math.exp(scores[count] - best))
        cuda.syncthreads()
        if not RESIDUAL:
            over = zero
            for i in range(lane, count, WARP):
                over += scores[weights + i]
            over = across(over) + mine

        # The reads.
        acc = cuda.local.array(C, number)
        some = cuda.local.array(CELLS, number)
        for c in each(C):
            acc[c] = zero
        for i in range(np.int64(room + 1 if APPENDS else count)):
            weight = zero
            if i < count:
                weight = one if RESIDUAL else scores[weights + i] / over
            fresh = ends and i == count
            if APPENDS or weight != zero:
                base, at = kept, n * kept_n + i * kept_s + head * kept_h
                step_k, step_v = kept_k, kept_v
                if fresh:
                    base, at, step_k, step_v = online, n * online_n + head * online_h, online_k, online_v
                there = i < room or fresh
                target = ((n * (room + 1) + i) * heads + head) * K
                for first in range(warp * R, K, STEP):
                    for j in each(R):
                        row = min(first + j, K - 1)
                        for c in each(C):
                            column = min(part * BLOCK + c * WARP + lane, V - 1)
                            some[j * C + c] = zero
                            if there:
                                some[j * C + c] = read_real(base, at + row * step_k + column * step_v)
                    for j in each(R):
                        row = first + j
                        factor = weight * asked[row]
                        for c in each(C):
                            column = part * BLOCK + c * WARP + lane
                            if weight != zero:
                                acc[c] += factor * some[j * C + c]
                            if APPENDS and row < K and column < V:
                                write_real(new_kept, (target + row) * V + column, some[j * C + c])

        shared = cuda.shared.array(ALL, number)
        for c in each(C):
            shared[(warp * C + c) * WARP + lane] = acc[c]
        cuda.syncthreads()
        for place in range(thread, BLOCK, THREADS):
            column = part * BLOCK + place
            total = zero
            for w in range(W):
                total += shared[w * BLOCK + place]
            if column < V:
                total += mine / over * number(read(y, n * y_n + head * y_h + column * y_d))
                write(out, (n * heads + head) * V + column, total)

        if APPENDS and part == 0:
            for i in range(warp, room + 1, W):
                for c in each(A):
                    d = lane + c * WARP
                    pool = zero
                    if ends and i == count:
                        pool = own[c]
                    elif i < room and d < K:
                        pool = read_real(pooled, n * pooled_n + i * pooled_s + head * pooled_h + d * pooled_k)
                    if d < K:
                        write_real(new_pooled, ((n * (room + 1) + i) * heads + head) * K + d, pool)
        if head == 0 and part == 0 and thread == 0:
            write_count(new_tokens, n, 0 if ends else passed)
            write_count(new_segments, n, read_count(segments, n * segments_n) + (1 if ends else 0))

    return unrolled(kernel)
