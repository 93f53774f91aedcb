"""What a launch and its kernel must agree on, told without Numba: a kernel that is on disk starts without it."""

from . import WARP

OBJECTIVES = {"decoding": 0, "encoding": 1, "similarity": 2}
DECODING, ENCODING, SIMILARITY = OBJECTIVES.values()

# Sequences a block of the kernel that writes phases to their pool.
PHASE_THREADS = 4 * WARP


# How many numbers a router's error is made of.
SUMS_OF = {"cosine": 3, "l2": 1, "beta_l2": 1}


def shares(count, first, last):
    """How many numbers a lane keeps of a fold, and the bits that choose them: ``((bit, offset), …)``."""
    kept, chosen = count, []
    for bit in range(first, last):
        if kept % 2 == 0:
            kept //= 2
            chosen.append((bit, kept))
    return kept, tuple(chosen)


def forward_numbers(*, rows, columns, lanes, warps, carriers, tile, per_slot):
    """How many numbers of shared memory a block takes: two tiles of tokens and of their reads, sums, what a turn is."""
    keys, values = rows * (WARP // lanes) * warps, columns * lanes
    tokens = 2 * keys + values + (keys if per_slot else 1) + 1
    return 2 * tile * (tokens + warps * values) + 2 * warps * values + 3 * keys


def backward_numbers(*, rows, columns, lanes, warps, segment, per_slot, near):
    """How many numbers of shared memory a block takes: a segment's tokens, and sums over warps."""
    keys, values = rows * (WARP // lanes) * warps, columns * lanes
    states = segment * rows * columns * warps * WARP if near else 0
    tokens = 4 * keys + 2 * values + (keys if per_slot else 1) + 1
    return states + segment * tokens + 2 * warps * values + 12 * keys + 4
