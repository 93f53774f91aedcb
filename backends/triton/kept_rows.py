"""Rows of a cache and of new tokens in a given order; see ``mixers.kept_rows``."""

import torch
import triton
import triton.language as tl

from mixers.spec import Array

from .kernel import block, dense, place, runs_here

ROWS = 32


@triton.jit(do_not_specialize=["held", "rows"])
def take(
    old, old_n, old_t, old_h, new, new_n, new_t, new_h, order, order_n, order_t, order_h, out, held, rows, heads,
    V: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Some rows of one head: from ``old`` where an index is below ``held``, from ``new`` behind, 0 where it is −1."""
    pid = tl.program_id(0)
    head, n = pid % heads, (pid // (heads * tl.cdiv(rows, ROWS))).to(tl.int64)
    r, c = pid // heads % tl.cdiv(rows, ROWS) * ROWS + tl.arange(0, ROWS), tl.arange(0, BV)[None, :]
    inside = (r < rows)[:, None] & (c < V)
    at = tl.load(order + n * order_n + r * order_t + head * order_h, mask=r < rows, other=-1).to(tl.int64)
    fresh = inside & (at >= held)[:, None]
    where = n * new_n + (at - held) * new_t + head * new_h
    found = tl.load(new + where[:, None] + c, mask=fresh, other=0.0)
    if old is not None:
        where = n * old_n + at * old_t + head * old_h
        kept = inside & ((at >= 0) & (at < held))[:, None]
        found = tl.where(kept, tl.load(old + where[:, None] + c, mask=kept, other=0.0), found)
    where = ((n * rows + r) * heads + head) * V
    tl.store(out + where[:, None] + c, found, mask=inside)


def taken(old: Array | None, new: Array, order: Array) -> Array:
    """Rows ``[N,R,A,E]`` of those that there were, and of those that came."""
    new = dense(new)
    count, _, heads, width = new.shape
    rows = order.shape[1]
    out = torch.empty((count, rows, heads, width), dtype=new.dtype, device=new.device)
    held = 0 if old is None else old.shape[1]
    strides = (*order.stride(), 0)[:3]
    if out.numel():
        take[(count * triton.cdiv(rows, ROWS) * heads,)](
            *place(dense(old) if held else None, 0, 1, 2), *place(new, 0, 1, 2), order, *strides, out, held, rows,
            heads, V=width, BV=block(width), ROWS=ROWS,
        )  # fmt: skip
    return out


class KeptRows:
    """See ``mixers.kept_rows``."""

    arrays = ("torch",)

    def serves(self, dtype: str, device: str, widths: tuple[int, int]) -> bool:
        """Whatever Triton's kernels take."""
        return runs_here(dtype, device)

    def forward(self, x: tuple[Array, ...], fixed: tuple[Array, ...], factor: float, how: str) -> tuple[Array, Array]:
        """Keys and values."""
        (k, v, old_k, old_v), (order, _) = x, fixed
        return taken(old_k, k, order), taken(old_v, v, order)

    def backward(
        self,
        x: tuple[Array, ...],
        fixed: tuple[Array, ...],
        factor: float,
        how: str,
        out: tuple[Array, ...],
        dout: tuple[Array, ...],
    ) -> tuple[Array, ...]:
        """Gradients of what came, and of what there was."""
        held, (_, where) = x[2].shape[1], fixed
        return (*(taken(None, d, where[:, held:]) for d in dout), *(taken(None, d, where[:, :held]) for d in dout))


PRIMITIVE = KeptRows()
