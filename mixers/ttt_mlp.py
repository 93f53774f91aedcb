"""TTT-MLP: the state is a network of two layers, trained by gradient descent on the tokens that pass.

Rows are tokens of one mini-batch of ``b = chunk_size`` (part of the model), all gradients at its first weights:

    Z1 = kW1 + c1     X2 = gelu(Z1)     Z2 = X2 W2 + c2          gelu by its tanh form, the inner width F = 4K
    G2 = ∂/∂Z2 ½‖LN(Z2) − (v − k)‖²     G1 = (G2 W2ᵀ) ∘ gelu'(Z1)     η_ij = token_scale_i · beta_j
    Z̄1_i = q_i W1 + c1 − Σ_{j≤i} η_ij (⟨q_i,k_j⟩ + 1) G1_j
    Z̄2_i = X̄2_i W2 + c2 − Σ_{j≤i} η_ij (⟨X̄2_i,X2_j⟩ + 1) G2_j,   X̄2 = gelu(Z̄1)          y_i = q_i + LN(Z̄2_i)
    end:  W1 ← W1 − token_scale_b Σ_j beta_j k_jᵀ G1_j, and so the other three

    q, k [B,T,G,K]   v [B,T,H,K]   beta [B,T,H]   W1 [N,H,K,F]   c1 [N,H,F]   W2 [N,H,F,K]   c2 [N,H,K]
    norm_weight w, norm_bias w_b [H,K]   token_scale [b]   LN uses eps = 1e-6, as in ``mixers.ttt``

Source: arXiv 2407.04620. Ours: the first weights, 0.02 times the orthonormal DCT-IV matrix cut to size, biases 0.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mixers.algebra import device_of, directions, outer, read, rows_dot
from mixers.primitive import Primitive, Shapes
from mixers.spec import Array, Field, Memory, MixerSpec, Options, Sizes, StateLayout
from mixers.ttt import FIRST_SCALE, as_it_is, rate_so_far, rates, residual_norm, standardise, ttt_linear

_GELU = math.sqrt(2.0 / math.pi)
_CUBE = 0.044715


class TTTMLPState(NamedTuple):
    """The inner network and the half-finished mini-batch.

    Attributes:
        weight1: ``[N,H,K,F]``, the mini-batch's first weights of the first layer, ``F = 4K``.
        bias1: ``[N,H,F]``.
        weight2: ``[N,H,F,K]``, those of the second.
        bias2: ``[N,H,K]``.
        weight1_sum: ``[N,H,K,F]``, ``Σ beta_j k_jᵀ G1_j`` so far.
        bias1_sum: ``[N,H,F]``, ``Σ beta_j G1_j`` so far.
        weight2_sum: ``[N,H,F,K]``, ``Σ beta_j X2_jᵀ G2_j`` so far.
        bias2_sum: ``[N,H,K]``, ``Σ beta_j G2_j`` so far.
        phase: ``[N]`` int32, tokens of the mini-batch already seen.
    """

    weight1: Array
    bias1: Array
    weight2: Array
    bias2: Array
    weight1_sum: Array
    bias1_sum: Array
    weight2_sum: Array
    bias2_sum: Array
    phase: Array


WEIGHTS = (
    Field("weight1", "N H K F", "the mini-batch's first weights, first layer"),
    Field("bias1", "N H F", "its first bias, first layer"),
    Field("weight2", "N H F K", "its first weights, second layer"),
    Field("bias2", "N H K", "its first bias, second layer"),
)
LAYOUT = StateLayout(
    (
        *WEIGHTS,
        Field("weight1_sum", "N H K F", "sum of beta k G1"),
        Field("bias1_sum", "N H F", "sum of beta G1"),
        Field("weight2_sum", "N H F K", "sum of beta X2 G2"),
        Field("bias2_sum", "N H K", "sum of beta G2"),
        Field("phase", "N", "tokens of the mini-batch already seen", counter=True),
    ),
    TTTMLPState,
)


def first_state(sizes: Sizes, options: Options) -> tuple[np.ndarray, ...]:
    """Small DCT-IV weights, no biases, an empty mini-batch (ours)."""
    heads, width, inner = sizes.H, sizes.K, sizes.F
    up = np.broadcast_to(FIRST_SCALE * directions(width, inner), (heads, width, inner))
    down = np.broadcast_to(FIRST_SCALE * directions(inner, width), (heads, inner, width))
    weights = up, np.zeros((heads, inner)), down, np.zeros((heads, width))
    return *weights, *(np.zeros(a.shape) for a in weights), np.zeros((), np.int32)


def adopt(xp: Any, given: Any, sizes: Sizes, options: Options) -> tuple[Array, ...]:
    """``(W1, c1, W2, c2)`` alone starts a mini-batch."""
    if not isinstance(given, (tuple, list)):
        got = type(given).__name__
        raise TypeError(f"ttt_mlp: the state is a {got}; expected (W1, c1, W2, c2) or a TTTMLPState")
    if len(given) != 4:
        return tuple(given)
    phase = xp.zeros(sizes.N, dtype=xp.int32, **device_of(given[0]))
    return *given, *(xp.zeros_like(a) for a in given), phase


def gelu(xp: Any, z: Array) -> Array:
    """The tanh form."""
    return 0.5 * z * (1 + xp.tanh(_GELU * (z + _CUBE * z * z * z)))


def gelu_slope(xp: Any, z: Array) -> Array:
    """The derivative of ``gelu``."""
    t = xp.tanh(_GELU * (z + _CUBE * z * z * z))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * _GELU * (1 + 3 * _CUBE * z * z)


def errors(xp: Any, token: Mapping[str, Array], z2: Array) -> Array:
    """``G2``: the gradient of ``½‖LN(Z2) − (v − k)‖²``, for rows with axes ``[..., H, K]`` beside ``norm_weight``."""
    gain, shift = token.get("norm_weight"), token.get("norm_bias")
    width = z2.shape[-1]
    x, std = standardise(xp, z2)
    h = x if gain is None else gain * x
    h = h - (token["v"] - token["k"]) + (0.0 if shift is None else shift)
    h = h if gain is None else gain * h
    inner = width * h - xp.sum(h, axis=-1, keepdims=True) - x * xp.sum(h * x, axis=-1, keepdims=True)
    return inner / (width * std)


def step(
    xp: Any, options: Options, token: Mapping[str, Array], state: tuple[Array, ...]
) -> tuple[Array, tuple[Array, ...]]:
    """One token: its gradients at the mini-batch's first weights, a read through the weights so far."""
    weights, sums, phase = state[:4], state[4:8], state[8]
    weight1, bias1, weight2, bias2 = weights
    k, beta = token["k"], token["beta"][..., None]

    z1 = read(xp, weight1, k) + bias1
    x2 = gelu(xp, z1)
    g2 = errors(xp, token, read(xp, weight2, x2) + bias2)
    g1 = beta * rows_dot(xp, weight2, g2) * gelu_slope(xp, z1)
    g2 = beta * g2
    sums = tuple(a + b for a, b in zip(sums, (outer(k, g1), g1, outer(x2, g2), g2), strict=True))

    phase = phase + 1
    rate, last_rate = rates(xp, options, token.get("token_scale"), phase, token["q"])
    y = recall(xp, options, token, _moved(weights, sums, rate))

    done = phase >= options["chunk_size"]
    ends = (done[:, None, None, None], done[:, None, None]) * 2
    moved = _moved(weights, sums, last_rate)
    return y, (
        *(xp.where(at, b, a) for at, a, b in zip(ends, weights, moved, strict=True)),
        *(xp.where(at, xp.zeros_like(a), a) for at, a in zip(ends, sums, strict=True)),
        xp.where(done, xp.zeros_like(phase), phase),
    )


def _moved(weights: tuple[Array, ...], sums: tuple[Array, ...], rate: Array) -> tuple[Array, ...]:
    """Weights after a descent at ``rate``, ``[N,1,1]`` or a number."""
    wide = rate[..., None] if getattr(rate, "ndim", 0) else rate
    return tuple(a - r * b for a, b, r in zip(weights, sums, (wide, rate) * 2, strict=True))


def weights_of(xp: Any, options: Options, token: Mapping[str, Array], state: tuple[Array, ...]) -> tuple[Array, ...]:
    """The weights that the state's last token read through."""
    return _moved(state[:4], state[4:8], rate_so_far(xp, options, token, state[8], state[0]))


def recall(xp: Any, options: Options, token: Mapping[str, Array], memory: tuple[Array, ...]) -> Array:
    """``q + LN(gelu(qW1 + c1) W2 + c2)``."""
    weight1, bias1, weight2, bias2 = memory
    inner = gelu(xp, read(xp, weight1, token["q"]) + bias1)
    return residual_norm(xp, token, read(xp, weight2, inner) + bias2)


def _flops(sizes: Sizes, options: Options) -> float:
    return 48.0 * sizes.K * sizes.K


def _shapes(x: tuple[Array, ...], fixed: tuple[Array, ...], dtype: str, how: str) -> Shapes:
    wide = "float64" if dtype == "float64" else "float32"
    return (tuple(x[2].shape), dtype), *((tuple(a.shape), wide) for a in x[4:8])


BATCHES = Primitive(
    "ttt_mlp",
    ("q", "k", "v", "beta", *(field.name for field in WEIGHTS), "norm_weight", "norm_bias", "token_scale"),
    (),
    ("y", *(field.name for field in WEIGHTS)),
    _shapes,
    ("y", *(field.name for field in WEIGHTS)),
)
"""Whole mini-batches of as many tokens as ``how`` says: y ``[N,L,H,K]`` and the weights behind them."""


def compose(library: Any, mixer: Any, call: Any, x: dict[str, Array]) -> dict[str, Array]:
    """By mini-batches; see ``mixers.ttt_chunks``."""
    from mixers import ttt_chunks

    return ttt_chunks.compose(library, mixer, call, x)


ttt_mlp = MixerSpec(
    name="ttt_mlp",
    summary="a network of two layers trained on the passing tokens, one gradient step a mini-batch",
    equations=(
        "Z1 = kW1 + c1,   X2 = gelu(Z1),   Z2 = X2 W2 + c2\n"
        "G2 = ∂/∂Z2 ½‖LN(Z2) − (v − k)‖²,   G1 = (G2 W2ᵀ) ∘ gelu'(Z1)  at the mini-batch's first weights\n"
        "Z̄1_i = q_i W1 + c1 − token_scale_i Σ_{j≤i} beta_j (⟨q_i,k_j⟩ + 1) G1_j,   X̄2 = gelu(Z̄1)\n"
        "Z̄2_i = X̄2_i W2 + c2 − token_scale_i Σ_{j≤i} beta_j (⟨X̄2_i,X2_j⟩ + 1) G2_j,   y_i = q_i + LN(Z̄2_i)\n"
        "end of mini-batch:  W1 ← W1 − token_scale_b Σ_j beta_j k_jᵀ G1_j, and so c1, W2 and c2"
    ),
    source="arXiv 2407.04620; the first weights are ours",
    inputs=ttt_linear.inputs,
    parameters=ttt_linear.parameters,
    options=ttt_linear.options,
    state=lambda options: LAYOUT,
    first=first_state,
    step=step,
    flops=_flops,
    memory=Memory(WEIGHTS, weights_of, recall),
    adopt=adopt,
    learned=(as_it_is,) * 4,
    spacing=ttt_linear.spacing,
    kept=lambda options: tuple(Field(f.name, f.axes.replace("N", "R", 1)) for f in WEIGHTS),
    exact_in_chunks=False,
    compose=compose,
    primitives=(BATCHES,),
)

SPECS = (ttt_mlp,)
