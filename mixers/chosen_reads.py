"""Reading a few states of many, each token its own.

out_t = w_t,own y_t + scale Σ_r w_tr C_{i_tr}ᵀ q_t

y, out [N,T,H,V]   q [N,T,G,K]   C [N,S,H,K,V]   w [N,H,R+1,T], own last   index i [N,H,R,T], −1 for none
"""

from typing import Any

from mixers.algebra import device_of
from mixers.primitive import Primitive, Shapes, run
from mixers.segment_weights import Cuts
from mixers.spec import Array
from mixers.state_reads import state_reads


def _shapes(x: tuple[Array, ...], fixed: tuple[Array, ...], dtype: str, how: str) -> Shapes:
    return ((tuple(x[0].shape), dtype),)


PRIMITIVE = Primitive("chosen_reads", ("y", "q", "kept", "weights"), ("index", "first"), ("out",), _shapes, ("out",))
"""``first``: the first token that sees each state; ``factor``: the scale; widths: of q and of a state's rows."""


def chosen_reads(
    library: Any, backend: str, y: Array, q: Array, kept: Array, weights: Array, index: Array, cuts: Cuts, scale: float
) -> Array:
    """``out`` by a backend's kernel where one serves these arrays, elsewhere as a read of all states."""
    xp = library.namespace
    found = run(library, PRIMITIVE, backend, (y, q, kept, weights), (index, cuts.first(xp, q)), scale)
    if found is not None:
        return found[0]
    return state_reads(library, backend, y, q, kept, spread_out(xp, weights, index, kept.shape[1]), cuts, scale)


def spread_out(xp: Any, weights: Array, index: Array, count: int) -> Array:
    """Weights ``[N,H,S+1,T]`` of all ``count`` states from those of the chosen ones."""
    row = xp.arange(count, dtype=index.dtype, **device_of(index))[:, None]
    parts = (
        xp.where(index[:, :, j, None] == row, weights[:, :, j, None], xp.zeros_like(weights[:, :, j, None]))
        for j in range(index.shape[2])
    )
    return xp.concat([sum(parts), weights[:, :, -1:]], axis=2)
