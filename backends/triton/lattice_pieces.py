"""What kernels of chunked Lattice share: where pieces lie, and what one is made of (``lattice_chunk_forward``)."""

import triton
import triton.language as tl

from .blocks import dot, upper_bits
from .lattice_slots import DECODING, ENCODING, logs, squares


@triton.jit
def piece_row(t, phase, every, CHUNK: tl.constexpr, LONGEST: tl.constexpr, MARKED: tl.constexpr):
    """The piece of a sequence that token t lies in, counted along it with gaps."""
    position = phase + t
    row = position // CHUNK * ((CHUNK + LONGEST - 1) // LONGEST) + position % CHUNK // LONGEST
    return row + t // every if MARKED else row


@triton.jit
def first_row(
    n, first, tokens, every, CHUNK: tl.constexpr, LONGEST: tl.constexpr, MARKED: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """The row of scratch where the pieces of sequence n begin; one row is left behind the last piece."""
    each: tl.constexpr = (CHUNK + LONGEST - 1) // LONGEST
    if PACKED:
        row = (first // CHUNK + 2 * n) * each + n
        return row + first // every + n if MARKED else row
    count = (tokens // CHUNK + 2) * each + 1
    return n.to(tl.int64) * (count + tokens // every + 1 if MARKED else count)


@triton.jit
def piece_end(t, phase, every, length, CHUNK: tl.constexpr, LONGEST: tl.constexpr, MARKED: tl.constexpr):
    """The token after the piece that begins with t."""
    seen = (phase + t) % CHUNK
    end = t + tl.minimum(CHUNK - seen, LONGEST - seen % LONGEST)
    if MARKED:
        end = tl.minimum(end, (t // every + 1) * every)
    return tl.minimum(end, length)


@triton.jit
def piece_start(t, phase, every, CHUNK: tl.constexpr, LONGEST: tl.constexpr, MARKED: tl.constexpr):
    """The first token of the piece that ends before t."""
    begin = t - 1 - (phase + t - 1) % CHUNK % LONGEST
    if MARKED:
        begin = tl.maximum(begin, (t - 1) // every * every)
    return tl.maximum(begin, 0)


@triton.jit
def errors(key, value, phi, OBJECTIVE: tl.constexpr, PRECISION: tl.constexpr):
    """Hm of a piece."""
    if OBJECTIVE == DECODING:
        return (value.to(tl.float32) - dot(key, phi, PRECISION)).to(key.dtype)
    return value


@triton.jit
def writes(key, value, phi, beta, OBJECTIVE: tl.constexpr, PRECISION: tl.constexpr):
    """Eᵀ of a piece, or of some of its slots; never by transposing a product."""
    et = tl.trans(key).to(tl.float32)
    if OBJECTIVE == ENCODING:
        et -= dot(phi, tl.trans(value), PRECISION)
    return et * tl.trans(beta)


@triton.jit
def transposed(key, value, phi, OBJECTIVE: tl.constexpr, PRECISION: tl.constexpr):
    """Hmᵀ of a piece."""
    ht = tl.trans(value)
    if OBJECTIVE == DECODING:
        ht = (ht.to(tl.float32) - dot(tl.trans(phi), tl.trans(key), PRECISION)).to(key.dtype)
    return ht


@triton.jit
def to_end(g, rows, stride, size, GATED: tl.constexpr):
    """w of a piece, the last row of W, and the last number of b."""
    if GATED:
        rest = tl.exp(tl.cumsum(logs(g, rows + 1, stride, size), reverse=True))
        return rest, tl.exp(tl.sum(logs(g, rows, stride, size)))
    return tl.full(rows.shape, 1.0, tl.float32), tl.full((), 1.0, tl.float32)


@triton.jit
def decays(g, rows, stride, size, BT: tl.constexpr, GATED: tl.constexpr):
    """W and b of a piece."""
    below = rows[:, None] >= rows[None, :]
    if GATED:
        each = logs(g, rows, stride, size)
        exponents = tl.cumsum(tl.where(rows[:, None] > rows[None, :], each[:, None], 0.0), 0)
        return tl.where(below, tl.exp(exponents), 0.0), tl.exp(tl.cumsum(each))
    return tl.where(below, 1.0, 0.0), tl.full((BT,), 1.0, tl.float32)


@triton.jit
def emptied(key, value, beta, g, stride, size, OBJECTIVE: tl.constexpr):
    """Where a reset meets a write of zero before the piece's last token: the slot goes on as its first direction."""
    at = tl.arange(0, key.shape[0])
    gone = (tl.exp(logs(g, at, stride, size)) == 0) & (at < size - 1)
    void = gone[:, None] & (beta == 0) & (key == key)
    if OBJECTIVE != ENCODING:
        void |= gone[:, None] & (key == 0)
    if OBJECTIVE != DECODING:
        void |= (gone & (tl.max(tl.abs(value), 1) == 0))[:, None]
    return void


@triton.jit
def halves(x):
    """Two bfloat16 numbers whose sum is x, to 16 bits."""
    high = upper_bits(x, tl.bfloat16)
    return high.to(tl.bfloat16), (x - high).to(tl.bfloat16)


@triton.jit
def over(w, x, HALVES: tl.constexpr, PRECISION: tl.constexpr):
    """``W x`` for W, W² or their transposes; with HALVES nothing decays, and W is of zeros and ones."""
    if HALVES:
        ones = w.to(tl.bfloat16)
        high, low = halves(x)
        return dot(ones, high, PRECISION) + dot(ones, low, PRECISION)
    return dot(w, x, PRECISION)


@triton.jit
def among(m, x, HALVES: tl.constexpr, PRECISION: tl.constexpr):
    """``M x`` of a matrix between tokens; HALVES keeps 16 bits of M, and of x where it has them."""
    if HALVES:
        high, low = halves(m)
        if x.dtype == tl.bfloat16:
            found = dot(high, x, PRECISION) + dot(low, x, PRECISION)
        else:
            first, rest = halves(x)
            found = dot(high, first, PRECISION) + (dot(low, first, PRECISION) + dot(high, rest, PRECISION))
    else:
        found = dot(m, x, PRECISION)
    return found


@triton.jit
def pairs(gram, w, rows):
    """M of a piece: ``N = W²(E∘(M E))``."""
    return tl.where(rows[:, None] > rows[None, :], 2 * w * gram, tl.where(rows[:, None] == rows[None, :], gram, 0.0))


@triton.jit
def afresh(void, w, PRECISION: tl.constexpr):
    """f of every token: S̃ holds f∘τ, τ the first direction, since a slot was emptied."""
    at = tl.arange(0, void.shape[0])
    return dot(tl.where(at[:, None] > at[None, :], w, 0.0), void, PRECISION)


@triton.jit
def afresh_square(e, along, fresh, hm, w, phi, toward, PRECISION: tl.constexpr):
    """What f∘τ adds to ρ², Hm τᵀ, W(E∘Hm τᵀ) and ⟨φ,τ⟩."""
    wide = toward.to(tl.float32)
    p = dot(hm, tl.trans(toward), PRECISION)
    crossed = dot(w, e * p, PRECISION)
    met = tl.sum(phi.to(tl.float32) * wide, 1)[None, :]
    return fresh * (fresh * squares(wide)[None, :] + 2 * (crossed - along * met)), p, crossed, met
