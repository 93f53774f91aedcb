"""HAM, what follows the recurrence of a single token: the decision, the caches, the attention, and the sum of both.

    e of a head from what ``delta_step`` measured      m = [min over heads of e ≥ threshold], or as forced
    rows: the cache with this token in its slot, the window, the token itself
    y = gate_rnn ∘ online + gate_kv ∘ softmax over the rows that are seen of scale ⟨q, k_row⟩, of v_row

A block has one head of one sequence. Every warp decides for itself, so none waits; it takes every ``warps``-th group of
``together`` rows, whose numbers are all under way before the first is needed, and keeps a running softmax; those of the
warps are merged at the end. A row is copied to the cache that follows as it is read, by the first head of those that
share it. What a head has of a row: numbers lane, lane + 32, …

    q [N,J,E]   k [N,A,E]   v [N,D,V]   caches [N,M,·,·], windows [N,W,·,·]   count [N] or [N,H]
"""

import math

import numpy as np

from .agreed import SUMS_OF
from .device import WARP, fetch, held, load, other_lane, store, sum_lanes, widen
from .place import for_device
from .source import cuda
from .unroll import each, unrolled


def build(
    *, keys, values, together, warps, alone, ring, always, router, real, kind, online, out, beta, score, forced,
    threshold, gate_rnn, gate_kv,
):  # fmt: skip
    """The kernel.

    ``keys``, ``values``: numbers of a row that a lane has. ``alone``: heads decide each for itself; ``ring``: the cache
    has a cap; ``always``: a token sees itself. ``real`` and what follows are dtypes.
    """
    A, B, G, W = keys, values, together, warps
    ALONE, RING, ALWAYS, GIVEN = alone, ring, always, router == "given"
    COSINE, STRENGTH, SUMS = router == "cosine", router == "beta_l2", SUMS_OF.get(router, 0)
    STEP, THREADS, WIDE, ALL, CELLS_K, CELLS_V = W * G, W * WARP, B * WARP, W * B * WARP, G * A, G * B
    number = np.dtype(real).type
    zero, one, low, floor = number(0), number(1), number(-math.inf), number(1e-6)
    across = sum_lanes(0, WARP.bit_length() - 1)
    swaps = [other_lane(1 << bit) for bit in range(WARP.bit_length() - 1)]
    SWAPS = len(swaps)
    read, wide, bits, write = load(kind), widen(kind), held(kind), store(kind)
    peek, read_real, read_count = fetch(kind), load(real), load("int32")
    read_online, read_beta, read_score, read_forced = load(online), load(beta), load(score), load(forced)
    read_threshold, read_rnn, read_kv = load(threshold), load(gate_rnn), load(gate_kv)
    write_out, write_real, write_count, write_flag = store(out), store(real), store("int32"), store("uint8")

    @for_device
    def error(measured, at, parts, strength):
        """That of a head, from the sums of its parts."""
        met, size, wanted = zero, zero, zero
        for part in range(parts):
            met += read_real(measured, (at * parts + part) * SUMS)
            if COSINE:
                size += read_real(measured, (at * parts + part) * SUMS + 1)
                wanted += read_real(measured, (at * parts + part) * SUMS + 2)
        if COSINE:
            return one - met / max(number(math.sqrt(size)) * number(math.sqrt(wanted)), floor)
        return strength * number(math.sqrt(met))

    @for_device
    def lesser(a, b):
        """The smaller one, or what is no number."""
        return b if b < a or b != b else a

    def kernel(
        q, q_n, q_h, q_d, k, k_n, k_h, k_d, v, v_n, v_h, v_d, online, measured, beta, beta_n, beta_h,
        score, score_n, score_h, forced, forced_n, forced_h, threshold, rnn, rnn_n, rnn_h, kv, kv_n, kv_h,
        old_k, old_k_n, old_k_t, old_k_h, old_k_d, old_v, old_v_n, old_v_t, old_v_h, old_v_d,
        near_k, near_k_n, near_k_t, near_k_h, near_k_d, near_v, near_v_n, near_v_t, near_v_h, near_v_d,
        count, count_n, count_h, marks, marks_n, marks_t, marks_h,
        y, kept, told, new_k, new_v, next_k, next_v, new_count, next_marks,
        E, V, heads, asking, key_heads, value_heads, cached_keys, cached_values, room, window, parts,
        scale: float, limit: float,
    ):  # fmt: skip
        thread = np.int64(cuda.threadIdx.x)
        warp, lane = thread // WARP, thread % WARP
        n, head = np.int64(cuda.blockIdx.x), np.int64(cuda.blockIdx.y)
        own = n * heads + head if ALONE else n

        # The decision.
        found = number(math.inf)
        if GIVEN:
            found = number(read_score(score, n * score_n + head * score_h))
        elif ALONE:
            strength = number(read_beta(beta, n * beta_n + head * beta_h)) if STRENGTH else one
            found = error(measured, own, parts, strength)
        else:
            for other in range(lane, heads, WARP):
                strength = number(read_beta(beta, n * beta_n + other * beta_h)) if STRENGTH else one
                found = lesser(found, error(measured, n * heads + other, parts, strength))
            for i in each(SWAPS):
                found = lesser(found, swaps[i](found))
        bar = np.float32(read_threshold(threshold, 0)) if threshold != 0 else np.float32(limit)
        keep = np.float32(found) >= bar
        if forced != 0:
            keep = read_forced(forced, n * forced_n + head * forced_h) != 0
        before = np.int64(read_count(count, n * count_n + head * count_h))
        after = before + 1 if keep else before
        slot = before % room if RING else before
        cached = min(after, room)

        # Which heads of the caches this one reads, and whether it copies them.
        share_k, share_v = heads // cached_keys, heads // cached_values
        from_k, from_v = head // share_k, head // share_v
        copies_k, copies_v = head % share_k == 0, head % share_v == 0
        token_k, token_v = n * k_n + head // (heads // key_heads) * k_h, n * v_n + head // (heads // value_heads) * v_h

        query = cuda.local.array(A, number)
        for c in each(A):
            d = lane + c * WARP
            asked = number(read(q, n * q_n + head // (heads // asking) * q_h + min(d, E - 1) * q_d))
            query[c] = number(scale) * asked if d < E else zero
        some_k, some_v = cuda.local.array(CELLS_K, bits), cuda.local.array(CELLS_V, bits)
        sums, logits = cuda.local.array(B, number), cuda.local.array(G, number)
        best, total = low, zero
        for c in each(B):
            sums[c] = zero
        items = room + window + 1
        for first in range(warp * G, items, STEP):
            if copies_k or copies_v or first < cached or first + G > room:
                for j in each(G):
                    i = min(first + j, items - 1)
                    near = i - room
                    if (keep and i == slot) or near == window:
                        base_k, at_k, d_k, base_v, at_v, d_v = k, token_k, k_d, v, token_v, v_d
                    elif near >= 0:
                        base_k, at_k, d_k = near_k, n * near_k_n + near * near_k_t + from_k * near_k_h, near_k_d
                        base_v, at_v, d_v = near_v, n * near_v_n + near * near_v_t + from_v * near_v_h, near_v_d
                    else:
                        base_k, at_k, d_k = old_k, n * old_k_n + i * old_k_t + from_k * old_k_h, old_k_d
                        base_v, at_v, d_v = old_v, n * old_v_n + i * old_v_t + from_v * old_v_h, old_v_d
                    for c in each(A):
                        some_k[j * A + c] = peek(base_k, at_k + min(lane + c * WARP, E - 1) * d_k)
                    for c in each(B):
                        some_v[j * B + c] = peek(base_v, at_v + min(lane + c * WARP, V - 1) * d_v)
                top = best
                for j in each(G):
                    i = first + j
                    near = i - room
                    seen = i < cached
                    if near == window:
                        seen = ALWAYS and not keep
                    elif near >= 0 and near < window:
                        mark = read_count(marks, n * marks_n + near * marks_t + head * marks_h)
                        seen = mark == 0 or (RING and mark > 0 and mark <= after - room)
                    dot = zero
                    for c in each(A):
                        dot += query[c] * number(wide(some_k[j * A + c]))
                    dot = across(dot)
                    logits[j] = dot if seen else low
                    top = max(top, logits[j])

                    # Of the window every row moves one up; the token is its last.
                    copied, moves = i < items and near != 0, near > 0
                    row = n * window + near - 1 if moves else n * room + i
                    if copies_k and copied:
                        target, at = next_k if moves else new_k, (row * cached_keys + from_k) * E
                        for c in each(A):
                            if lane + c * WARP < E:
                                write(target, at + lane + c * WARP, wide(some_k[j * A + c]))
                    if copies_v and copied:
                        target, at = next_v if moves else new_v, (row * cached_values + from_v) * V
                        for c in each(B):
                            if lane + c * WARP < V:
                                write(target, at + lane + c * WARP, wide(some_v[j * B + c]))
                if top > low:
                    fade = number(math.exp(best - top))
                    total *= fade
                    for c in each(B):
                        sums[c] *= fade
                    for j in each(G):
                        weight = number(math.exp(logits[j] - top))
                        total += weight
                        for c in each(B):
                            sums[c] += weight * number(wide(some_v[j * B + c]))
                    best = top

        tops = cuda.shared.array(W, number)
        totals = cuda.shared.array(W, number)
        shared = cuda.shared.array(ALL, number)
        if lane == 0:
            tops[warp], totals[warp] = best, total
        for c in each(B):
            shared[warp * WIDE + c * WARP + lane] = sums[c]
        cuda.syncthreads()
        for column in range(thread, V, THREADS):
            top, over, attended = low, zero, zero
            for w in range(W):
                top = max(top, tops[w])
            if top > low:
                for w in range(W):
                    weight = number(math.exp(tops[w] - top))
                    over += weight * totals[w]
                    attended += weight * shared[w * WIDE + column]
                attended /= over
            at = (n * heads + head) * V + column
            result = number(read_online(online, at))
            if rnn != 0:
                result *= number(read_rnn(rnn, n * rnn_n + head * rnn_h))
            if kv != 0:
                attended *= number(read_kv(kv, n * kv_n + head * kv_h))
            write_out(y, at, result + attended)

        if ALONE or head == 0:
            if thread == 0:
                write_flag(kept, own, 1 if keep else 0)
                write_real(told, own, found)
                write_count(new_count, own, after)
            deep = heads if ALONE else np.int64(1)
            mine = head if ALONE else np.int64(0)
            for i in range(thread, window, THREADS):
                mark = after if keep else np.int64(0)
                if i + 1 < window:
                    mark = np.int64(read_count(marks, n * marks_n + (i + 1) * marks_t + head * marks_h))
                write_count(next_marks, (n * window + i) * deep + mine, mark)

    return unrolled(kernel)
