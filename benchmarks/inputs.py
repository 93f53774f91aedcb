"""Random inputs of any mixer, drawn as its specification says.

NumPy first, so that every library gets the same numbers; ``convert`` hands them over.
"""

import math
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mixers.cases import DRAWS
from mixers.spec import MixerSpec, Sizes

Arrays = dict[str, np.ndarray]


def draw(
    spec: MixerSpec,
    sizes: Sizes,
    *,
    dtype: str = "float32",
    optional: Iterable[str] = (),
    layouts: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Arrays:
    """The inputs and parameters of a call, and ``dy``, a gradient of the output; keys and values have norm 1 or so.

    Args:
        spec: the mixer.
        sizes: the length of every axis.
        dtype: ``"float32"`` or ``"float64"``.
        optional: optional arrays to draw too.
        layouts: axes of inputs that accept several; the first otherwise.
        seed: every array depends on it and on its own name alone.
    """
    chosen = dict(layouts or {})
    wanted = set(optional)
    arrays = {}
    for arg in (*spec.inputs, *spec.parameters):
        if not arg.optional or arg.name in wanted:
            shape = sizes.shape(chosen.get(arg.name, " ".join(arg.layouts[0])))
            arrays[arg.name] = DRAWS[arg.draw](_standard(arg.name, shape, dtype, seed))
    width = arrays["v"].shape[-1]
    arrays["v"] /= math.sqrt(width)
    arrays["dy"] = _standard("dy", (sizes.B, sizes.T, sizes.H, width), dtype, seed)
    if "token_scale" in {arg.name for arg in spec.parameters}:
        arrays["beta"] /= width  # an inner learning rate, which comes divided by the width
    return arrays


def first_state(
    spec: MixerSpec, sizes: Sizes, options: Mapping[str, Any], dtype: str = "float32"
) -> tuple[np.ndarray, ...]:
    """The default first state, one array a field, ``[N, ...]``."""
    return tuple(
        np.broadcast_to(x, (sizes.N, *x.shape)).astype(np.int32 if f.counter else dtype)
        for f, x in zip(spec.state(options).fields, spec.first(sizes, options), strict=True)
    )


def convert(
    arrays: Mapping[str, np.ndarray], library: str, dtype: str = "float32", device: str = "cpu"
) -> dict[str, Any]:
    """The same arrays in ``"numpy"``, ``"torch"`` or ``"jax"``.

    ``q``, ``k``, ``v`` and ``dy`` take ``dtype``; gates and parameters stay float32, or float64 where ``dtype`` is.
    """
    wide = "float64" if dtype == "float64" else "float32"
    return {
        name: _convert(x, library, dtype if name in ("q", "k", "v", "dy") else wide, device)
        for name, x in arrays.items()
    }


def _convert(array: np.ndarray, library: str, dtype: str, device: str) -> Any:
    if library == "torch":
        import torch

        return torch.from_numpy(array).to(device=device, dtype=getattr(torch, dtype))
    if library == "jax":
        import jax
        import jax.numpy as jnp

        return jax.device_put(jnp.asarray(array, dtype=dtype), jax.devices(None if device == "cuda" else device)[0])
    return array.astype(dtype, copy=False)


def _standard(name: str, shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return generator.standard_normal(shape, dtype=np.dtype(dtype))
