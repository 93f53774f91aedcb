"""The layer of ``mixers.nn`` for JAX, as a ``flax.nnx`` module: the same parameters under the same names.

    layer = MixerLayer("lattice", d_model=256, heads=4, rngs=nnx.Rngs(0))
    y, state = layer(x)                                     x, y [B,T,D]
    load(layer, {n: a.numpy() for n, a in torch_layer.state_dict().items()})

q, k, v, g = W x;  q, k, v = silu(conv(q, k, v));  gates = f(x);  out = W' (sigmoid(g) ∘ rmsnorm(mixer(q, k, v, gates)))

See ``mixers.nn.layer`` for what each part does. A weight is ``[out, in]``, as torch has it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import mixers
from mixers.nn.convention import convention
from mixers.nn.plan import GatePlan, gate_plans, layer_sizes
from mixers.spec import Array, MixerSpec

EPS = 1e-6
BASE = 10000.0
RATE = (1.0, 16.0)
DT = (1e-3, 1e-1)
LOWER_BOUND = -5.0


class LayerState(NamedTuple):
    """What a layer remembers between calls.

    Attributes:
        conv: ``[B,W−1,C]``, the convolution's last inputs; None without a convolution.
        mixer: the mixer's own state.
    """

    conv: Array | None
    mixer: Any


def _uniform(rngs: nnx.Rngs, shape: tuple[int, ...], fan: int) -> nnx.Param[Array]:
    """As torch initialises its linear layers and convolutions."""
    bound = fan**-0.5
    return nnx.Param(jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound))


class Weight(nnx.Module):
    """One weight, ``[out, in]``.

    Args:
        rows: out.
        columns: in.
        rngs: random numbers for its first values.
    """

    def __init__(self, rows: int, columns: int, rngs: nnx.Rngs) -> None:
        """See the class."""
        self.weight = _uniform(rngs, (rows, columns), columns)

    def __call__(self, x: Array) -> Array:
        """``[...,in]`` to ``[...,out]``."""
        return x @ self.weight[...].T.astype(x.dtype)


class Gain(nnx.Module):
    """Root-mean-square normalisation; ``weight [D]``."""

    def __init__(self, width: int) -> None:
        """See the class."""
        self.weight = nnx.Param(jnp.ones(width))

    def __call__(self, x: Array) -> Array:
        """``[...,D]`` to ``[...,D]``."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        unit = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + EPS)
        return (unit * self.weight[...]).astype(x.dtype)


class Gate(nnx.Module):
    """A gate of ``mixers.nn.gates``.

    Args:
        plan: which.
        d_model: width of a token.
        rngs: random numbers for its first values.
    """

    def __init__(self, plan: GatePlan, d_model: int, rngs: nnx.Rngs) -> None:
        """See the class."""
        self.plan = plan
        heads, *channels = plan.shape
        if channels:
            self.down = _uniform(rngs, (channels[0], d_model), d_model)
        narrow = channels[0] if channels else d_model
        self.weight = _uniform(rngs, (math.prod(plan.shape), narrow), narrow)
        if plan.kind == "sigmoid":
            self.bias = nnx.Param(jnp.zeros(plan.shape))
            return
        rate = jax.random.uniform(rngs.params(), (heads,), jnp.float32, *RATE)
        dt = jnp.exp(jax.random.uniform(rngs.params(), plan.shape, jnp.float32, *map(math.log, DT)))
        if plan.kind == "softplus":
            self.A_log = nnx.Param(jnp.log(rate))
            self.dt_bias = nnx.Param(dt + jnp.log(-jnp.expm1(-dt)))
        else:
            share = jnp.minimum(self._over_channels(rate) * dt / -LOWER_BOUND, 0.9)
            self.A_log = nnx.Param(jnp.zeros(heads))
            self.dt_bias = nnx.Param(jnp.log(share / (1 - share)))

    def __call__(self, x: Array) -> Array:
        """``[B,T,D]`` to ``[B,T,H]`` or ``[B,T,H,K]``, float32."""
        a = x.astype(self.weight[...].dtype)
        if len(self.plan.shape) == 2:
            a = a @ self.down[...].T
        a = (a @ self.weight[...].T).reshape(*a.shape[:-1], *self.plan.shape)
        if self.plan.kind == "sigmoid":
            return self.plan.high * jax.nn.sigmoid(a + self.bias[...])
        rate = self._over_channels(jnp.exp(self.A_log[...]))
        if self.plan.kind == "softplus":
            return -rate * jax.nn.softplus(a + self.dt_bias[...])
        return LOWER_BOUND * jax.nn.sigmoid(rate * (a + self.dt_bias[...]))

    def _over_channels(self, per_head: Array) -> Array:
        return per_head[:, None] if len(self.plan.shape) == 2 else per_head


class Learned(nnx.Module):
    """The mixer's learned first state and parameters, under ``first`` and ``named``."""

    def __init__(self, mix: mixers.Mixer, sizes: Any) -> None:
        """See the class."""
        values = mix.spec.first(sizes, mix.options)[: len(mix.spec.learned)]
        self.first = nnx.List([nnx.Param(jnp.asarray(np.array(value), jnp.float32)) for value in values])
        starts: dict[str, Callable[..., Any]] = {
            "norm_weight": np.ones,
            "token_scale": lambda shape: 1.0 / np.arange(1, shape[0] + 1),
        }
        self.named = nnx.Dict(
            {
                arg.name: nnx.Param(jnp.asarray(starts.get(arg.name, np.zeros)(sizes.shape(arg.axes)), jnp.float32))
                for arg in mix.spec.parameters
            }
        )


class MixerLayer(nnx.Module):
    """A sequence mixer with its projections, convolution, gates, norm and learned first state.

    Args:
        mixer, d_model, heads, key_heads, key_dim, value_dim, conv_size, beta_max, slot_beta, decay, backend, options:
            as in ``mixers.nn.MixerLayer``.
        rngs: random numbers for the first values of parameters.

    Raises:
        ValueError: a name, size or option is unknown or does not fit the mixer.
    """

    def __init__(
        self,
        mixer: str | MixerSpec = "lattice",
        *,
        d_model: int,
        heads: int,
        rngs: nnx.Rngs,
        key_heads: int | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        conv_size: int = 4,
        beta_max: float = 1.0,
        slot_beta: bool = False,
        decay: str | None = None,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        """See the class."""
        spec = mixers.get_spec(mixer) if isinstance(mixer, str) else mixer
        self.normalised_inside = any(option.name == "qk_l2norm" for option in spec.options)
        if self.normalised_inside:
            options.setdefault("qk_l2norm", True)
        self.mix = mixers.get(spec, backend, **options)
        self.custom = convention(spec, self.mix.options)
        self.d_model = d_model
        sizes = layer_sizes(spec, self.mix.options, d_model, heads, key_heads, key_dim, value_dim)
        self.shapes = tuple(sizes.shape(" ".join(arg.layouts[0][2:])) for arg in spec.inputs[:3])
        self.widths = tuple(heads * width for heads, width in self.shapes)
        if self.custom.rotary and sizes.K % 2:
            raise ValueError(f"{spec.name}: key_dim is {sizes.K}; rotary positions turn pairs, so take an even number")
        inner = sizes.H * self.shapes[2][1]
        self.project = Weight(sum(self.widths) + inner, d_model, rngs)
        self.conv_size = conv_size
        if conv_size:
            self.conv = Weight(sum(self.widths), conv_size, rngs)
        plans = gate_plans(spec, self.mix.options, sizes, beta_max, slot_beta, decay)
        if unknown := [name for name, plan in plans.items() if plan.kind == "projection"]:
            raise ValueError(f"{spec.name}: this layer makes no {unknown[0]}; mixers.nn.MixerLayer does")
        self.gates = nnx.Dict({name: Gate(plan, d_model, rngs) for name, plan in plans.items()})
        self.learned = Learned(self.mix, sizes)
        self.norm = Gain(self.shapes[2][1])
        self.out = Weight(d_model, inner, rngs)

    def __call__(self, x: Array, state: LayerState | None = None) -> tuple[Array, LayerState]:
        """Mix whole sequences.

        Args:
            x: ``[B,T,D]``.
            state: what an earlier call returned; None for the layer's first.

        Returns:
            ``(y [B,T,D], state)``.

        Raises:
            ValueError: a shape does not fit.
        """
        if x.ndim != 3 or x.shape[-1] != self.d_model:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected [B,T,D] with D = {self.d_model}")
        state = LayerState(None, None) if state is None else state
        rows, gate = jnp.split(self.project(x), [sum(self.widths)], axis=-1)
        past = None
        if self.conv_size:
            rows, past = self._convolved(rows, state.conv)
        if self.custom.activation:
            rows = jax.nn.silu(rows)
        parts = jnp.split(rows, np.cumsum(self.widths)[:-1].tolist(), axis=-1)
        q, k, v = (a.reshape(*a.shape[:2], *shape) for a, shape in zip(parts, self.shapes, strict=True))
        q, k = self._scaled(q), self._scaled(k)
        if self.custom.rotary:
            places = jnp.arange(x.shape[1])[None]
            places = places if state.mixer is None else places + state.mixer.length[:, None]
            q, k = _rotate(q, places), _rotate(k, places)
        y, after = self.mix(
            q,
            k,
            v,
            initial_state=self._first() if state.mixer is None else state.mixer,
            **{name: make(x) for name, make in self.gates.items()},
            **{name: parameter[...] for name, parameter in self.learned.named.items()},
        )
        y = self.norm(y).reshape(*x.shape[:2], -1) * jax.nn.sigmoid(gate)
        return self.out(y), LayerState(past, after)

    def _first(self) -> Any:
        """The first state, without a batch axis; None where the mixer's own is nothing."""
        pairs = zip(self.mix.spec.learned, self.learned.first, strict=True)
        arrays = tuple(valid(jnp, parameter[...]) for valid, parameter in pairs)
        return (arrays[0] if len(arrays) == 1 else arrays) if arrays else None

    def _convolved(self, x: Array, state: Array | None) -> tuple[Array, Array]:
        """A short causal depthwise convolution, and its last inputs."""
        past = self.conv_size - 1
        before = jnp.zeros((x.shape[0], past, x.shape[2]), x.dtype) if state is None else state.astype(x.dtype)
        row, weight = jnp.concatenate([before, x], axis=1), self.conv.weight[...].astype(x.dtype)
        y = sum(row[:, w : w + x.shape[1]] * weight[:, w] for w in range(self.conv_size))
        return jnp.asarray(y), row[:, x.shape[1] :]

    def _scaled(self, rows: Array) -> Array:
        """Rows of norm 1, or √K; as they are where the mixer does that itself."""
        if self.normalised_inside:
            return rows
        wide = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
        total = jnp.sum if self.custom.unit_rows else jnp.mean
        return (wide * jax.lax.rsqrt(total(wide * wide, -1, keepdims=True) + EPS)).astype(rows.dtype)


def _rotate(x: Array, places: Array) -> Array:
    """Turn ``[B,T,H,K]`` by its positions ``[B or 1, T]``; see ``mixers.nn.rotary``."""
    half = x.shape[-1] // 2
    angle = places[..., None, None] * BASE ** -(jnp.arange(half, dtype=jnp.float32) / half)
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def named(module: nnx.Module) -> dict[str, np.ndarray]:
    """Every parameter by its name in torch, as ``gates.beta.weight``."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(map(str, path)): np.asarray(parameter[...]) for path, parameter in flat}


def load(module: nnx.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Replace every parameter by the array of its name.

    Raises:
        ValueError: a name is missing, unknown, or of another shape.
    """
    state = nnx.state(module, nnx.Param)
    flat = {".".join(map(str, path)): parameter for path, parameter in nnx.to_flat_state(state)}
    if set(flat) != set(arrays):
        missing, more = sorted(set(flat) - set(arrays)), sorted(set(arrays) - set(flat))
        raise ValueError(f"the names differ: missing {missing}, unknown {more}")
    for name, parameter in flat.items():
        if tuple(parameter[...].shape) != tuple(arrays[name].shape):
            raise ValueError(f"{name} has shape {arrays[name].shape}, expected {parameter[...].shape}")
        parameter[...] = jnp.asarray(arrays[name], parameter[...].dtype)
    nnx.update(module, state)
