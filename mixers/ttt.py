"""TTT-linear: the state is a small model, trained by gradient descent on the tokens that pass.

Rows are tokens of one mini-batch of ``b = chunk_size`` (part of the model), all gradients at its first ``W, c``:

    Z = kW + c          x̂ = (Z − mean)/std           h = w∘(w∘x̂ + w_b − (v − k))
    G = (D·h − Σh − x̂ Σ(h∘x̂)) / (D·std)              η_ij = token_scale_i · beta_j
    Z̄_i = q_i W + c − Σ_{j≤i} η_ij (⟨q_i,k_j⟩ + 1) G_j          y_i = q_i + LN(Z̄_i)
    end:  W ← W − token_scale_b Σ_j beta_j k_jᵀ G_j             c ← c − token_scale_b Σ_j beta_j G_j

    q, k [B,T,G,K]   v [B,T,H,K]   beta [B,T,H]   W [N,H,K,K]   c [N,H,K]   D = K
    norm_weight w, norm_bias w_b [H,K]   token_scale [b]   LN and x̂ use eps = 1e-6

Source: arXiv 2407.04620. Ours: the first weights, 0.02 times the orthonormal DCT-IV matrix (at zero weights the inner
layer norm has no variance and its gradient explodes).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mixers.algebra import device_of, directions, outer, read
from mixers.delta import BETA
from mixers.linear import KEY, QUERY
from mixers.spec import Arg, Array, Field, Memory, MixerSpec, Options, Sizes, StateLayout, count

NORM_EPS = 1e-6
FIRST_SCALE = 0.02


class TTTLinearState(NamedTuple):
    """The inner model and the half-finished mini-batch.

    Attributes:
        weight: ``[N,H,K,K]``, the mini-batch's first weights.
        bias: ``[N,H,K]``, its first bias.
        weight_sum: ``[N,H,K,K]``, ``Σ beta_j k_jᵀ G_j`` so far.
        bias_sum: ``[N,H,K]``, ``Σ beta_j G_j`` so far.
        phase: ``[N]`` int32, tokens of the mini-batch already seen.
    """

    weight: Array
    bias: Array
    weight_sum: Array
    bias_sum: Array
    phase: Array


LAYOUT = StateLayout(
    (
        Field("weight", "N H K K", "the mini-batch's first weights"),
        Field("bias", "N H K", "its first bias"),
        Field("weight_sum", "N H K K", "sum of beta k G"),
        Field("bias_sum", "N H K", "sum of beta G"),
        Field("phase", "N", "tokens of the mini-batch already seen", counter=True),
    ),
    TTTLinearState,
)


def first_state(sizes: Sizes, options: Options) -> tuple[np.ndarray, ...]:
    """Small DCT-IV weights, no bias, an empty mini-batch (ours)."""
    heads, width = sizes.H, sizes.K
    weight = np.broadcast_to(FIRST_SCALE * directions(width, width), (heads, width, width))
    nothing = np.zeros((heads, width))
    return weight, nothing, np.zeros((heads, width, width)), nothing, np.zeros((), np.int32)


def adopt(xp: Any, given: Any, sizes: Sizes, options: Options) -> tuple[Array, ...]:
    """``(weight, bias)`` alone starts a mini-batch."""
    if not isinstance(given, (tuple, list)):
        got = type(given).__name__
        raise TypeError(f"ttt_linear: the state is a {got}; expected (weight, bias) or a TTTLinearState")
    if len(given) != 2:
        return tuple(given)
    weight, bias = given
    phase = xp.zeros(sizes.N, dtype=xp.int32, **device_of(weight))
    return weight, bias, xp.zeros_like(weight), xp.zeros_like(bias), phase


def as_it_is(xp: Any, array: Array) -> Array:
    """Any weights are a model."""
    return array


def standardise(xp: Any, z: Array) -> tuple[Array, Array]:
    """``(z − mean)/std`` over the last axis, and ``std``."""
    centred = z - xp.mean(z, axis=-1, keepdims=True)
    std = xp.sqrt(xp.mean(centred * centred, axis=-1, keepdims=True) + NORM_EPS)
    return centred / std, std


def step(
    xp: Any, options: Options, token: Mapping[str, Array], state: tuple[Array, ...]
) -> tuple[Array, tuple[Array, ...]]:
    """One token: its gradient at the mini-batch's first weights, a read through the weights so far."""
    weight, bias, weight_sum, bias_sum, phase = state
    q, k, beta = token["q"], token["k"], token["beta"]
    width = q.shape[-1]
    gain, shift = token.get("norm_weight"), token.get("norm_bias")
    gain = xp.ones_like(q) if gain is None else gain
    shift = xp.zeros_like(q) if shift is None else shift

    x, std = standardise(xp, read(xp, weight, k) + bias)
    h = gain * (gain * x + shift - (token["v"] - k))
    inner = width * h - xp.sum(h, axis=-1, keepdims=True) - x * xp.sum(h * x, axis=-1, keepdims=True)
    write = beta[..., None] * inner / (width * std)
    weight_sum, bias_sum = weight_sum + outer(k, write), bias_sum + write

    phase = phase + 1
    rate, last_rate = rates(xp, options, token.get("token_scale"), phase, q)
    seen = read(xp, weight, q) + bias - rate * (read(xp, weight_sum, q) + bias_sum)
    y = q + gain * standardise(xp, seen)[0] + shift

    done = phase >= options["chunk_size"]
    row, matrix = done[:, None, None], done[:, None, None, None]
    return y, (
        xp.where(matrix, weight - last_rate * weight_sum, weight),
        xp.where(row, bias - last_rate * bias_sum, bias),
        xp.where(matrix, xp.zeros_like(weight_sum), weight_sum),
        xp.where(row, xp.zeros_like(bias_sum), bias_sum),
        xp.where(done, xp.zeros_like(phase), phase),
    )


def default_scale(xp: Any, chunk: int, beside: Array) -> Array:
    """``1/i`` for the tokens of a mini-batch, made where the arrays are: a graph takes no copy from the host."""
    return 1.0 / xp.astype(xp.arange(1, chunk + 1, **device_of(beside)), beside.dtype)


def rates(xp: Any, options: Options, token_scale: Array | None, phase: Array, q: Array) -> tuple[Array, Array]:
    """``token_scale`` of this token, ``[N,1,1]``, and of the mini-batch's last."""
    if token_scale is None:
        token_scale = default_scale(xp, options["chunk_size"], q)
    return xp.take(token_scale, phase - 1, axis=0)[:, None, None], token_scale[-1]


def weights_of(xp: Any, options: Options, token: Mapping[str, Array], state: tuple[Array, ...]) -> tuple[Array, ...]:
    """The weights that the state's last token read through."""
    weight, bias, weight_sum, bias_sum, phase = state
    rate = rate_so_far(xp, options, token, phase, weight)
    return weight - rate[..., None] * weight_sum, bias - rate * bias_sum


def rate_so_far(xp: Any, options: Options, token: Mapping[str, Array], phase: Array, beside: Array) -> Array:
    """``token_scale`` of the mini-batch's last token so far, ``[N,1,1]``; of its first where it has none."""
    first = xp.where(phase > 0, phase, xp.ones_like(phase))
    return rates(xp, options, token.get("token_scale"), first, beside)[0]


def recall(xp: Any, options: Options, token: Mapping[str, Array], memory: tuple[Array, ...]) -> Array:
    """``q + LN(qW + c)``."""
    weight, bias = memory
    return residual_norm(xp, token, read(xp, weight, token["q"]) + bias)


def residual_norm(xp: Any, token: Mapping[str, Array], seen: Array) -> Array:
    """``q + w∘(z − mean)/std + w_b``."""
    y = standardise(xp, seen)[0]
    if token.get("norm_weight") is not None:
        y = y * token["norm_weight"]
    if token.get("norm_bias") is not None:
        y = y + token["norm_bias"]
    return token["q"] + y


def _flops(sizes: Sizes, options: Options) -> float:
    return 8.0 * sizes.K * sizes.K


ttt_linear = MixerSpec(
    name="ttt_linear",
    summary="a linear model trained on the passing tokens, one gradient step a mini-batch",
    equations=(
        "Z = kW + c,   G = ∂/∂Z ½‖LN(Z) − (v − k)‖²  at the mini-batch's first W, c\n"
        "Z̄_i = q_i W + c − token_scale_i Σ_{j≤i} beta_j (⟨q_i,k_j⟩ + 1) G_j,   y_i = q_i + LN(Z̄_i)\n"
        "end of mini-batch:  W ← W − token_scale_b Σ_j beta_j k_jᵀ G_j,   c ← c − token_scale_b Σ_j beta_j G_j"
    ),
    source="arXiv 2407.04620; the first weights are ours",
    inputs=(
        QUERY,
        KEY,
        Arg("v", "B T H K", "values, as wide as the keys"),
        Arg(BETA.name, BETA.axes, "inner learning rate of the token", draw=BETA.draw),
    ),
    parameters=(
        Arg("norm_weight", "H K", "gain of the inner layer norm; default 1", optional=True),
        Arg("norm_bias", "H K", "shift of the inner layer norm; default 0", optional=True),
        Arg("token_scale", "C", "rate by position in the mini-batch; default 1/i", optional=True, draw="positive"),
    ),
    options=(count("chunk_size", 16, "tokens of a mini-batch, which share one base point", (1, 4, 16)),),
    state=lambda options: LAYOUT,
    first=first_state,
    step=step,
    flops=_flops,
    memory=Memory((Field("weight", "N H K K"), Field("bias", "N H K")), weights_of, recall),
    adopt=adopt,
    learned=(as_it_is, as_it_is),
    spacing=lambda options: options["chunk_size"] * -(-16 // options["chunk_size"]),
    kept=lambda options: (Field("weight", "R H K K"), Field("bias", "R H K")),
    exact_in_chunks=False,
)

SPECS = (ttt_linear,)
