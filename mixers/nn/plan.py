"""What a layer consists of, before any framework: heads and widths, and a gate for every input beyond q, k and v."""

from dataclasses import dataclass
from typing import Any

from mixers.nn.convention import convention
from mixers.spec import Arg, MixerSpec, Sizes, unknown

DECAYS = ("softplus", "bounded")

# Inputs that a layer of their mixer's own makes, or that only a caller can.
OWN = ("attn_q", "attn_k", "attn_v", "score", "kept")


@dataclass(frozen=True)
class GatePlan:
    """A gate.

    Attributes:
        kind: ``sigmoid``, ``projection`` for a query of a second kind, or one of ``DECAYS``.
        shape: ``(H,)``, or ``(H, K)`` for a number a channel.
        high: upper end of a sigmoid's range.
    """

    kind: str
    shape: tuple[int, ...]
    high: float = 1.0


def layer_sizes(
    spec: MixerSpec,
    options: dict[str, Any],
    d_model: int,
    heads: int,
    key_heads: int | None,
    key_dim: int | None,
    value_dim: int | None,
) -> Sizes:
    """Heads and widths of a layer."""
    groups = heads if key_heads is None else key_heads
    if heads < 1 or groups < 1 or heads % groups:
        raise ValueError(f"heads={heads} and key_heads={groups}; expected heads to be a whole multiple of key_heads")
    if d_model % heads and (key_dim is None or value_dim is None):
        raise ValueError(f"d_model={d_model} is no multiple of heads={heads}; give key_dim and value_dim")
    keys = d_model // heads if key_dim is None else key_dim
    values = d_model // heads if value_dim is None else value_dim
    if "V" not in spec.inputs[2].layouts[0] and keys != values:
        raise ValueError(f"{spec.name}: key_dim={keys} and value_dim={values}; its values are as wide as its keys")
    return Sizes(B=1, T=0, G=groups, H=heads, K=keys, V=values, N=1, C=spec.chunk(options))


def gate_plans(
    spec: MixerSpec, options: dict[str, Any], sizes: Sizes, beta_max: float, slot_beta: bool, decay: str | None
) -> dict[str, GatePlan]:
    """A gate for every input that the spec declares beyond q, k and v.

    Raises:
        ValueError: an input has no known gate, or what was asked for does not fit the mixer.
    """
    plans: dict[str, GatePlan] = {}
    high = beta_max / sizes.K ** convention(spec, options).rate
    for arg in spec.inputs[3:]:
        if arg.name in OWN or (arg.name == "memory_query" and arg.optional):
            continue
        if arg.draw == "gate":
            shape = _gate_shape(spec, arg, sizes, slot_beta and arg.name == "beta")
            plans[arg.name] = GatePlan("sigmoid", shape, high if arg.name == "beta" else 1.0)
        elif arg.name == "memory_query":
            plans[arg.name] = GatePlan("projection", _gate_shape(spec, arg, sizes, False))
        elif arg.draw != "log_decay":
            raise ValueError(f"{spec.name}: a layer knows no gate for its input {arg.name}; call the mixer itself")
        elif decay is not None or not arg.optional:
            if (decay or "softplus") not in DECAYS:
                raise ValueError(unknown("decay", str(decay), DECAYS))
            plans[arg.name] = GatePlan(decay or "softplus", _gate_shape(spec, arg, sizes, False))
    if decay is not None and "log_decay" not in plans:
        raise ValueError(f"{spec.name}: decay={decay!r}, but it takes no log_decay; leave it out")
    if slot_beta and not any(len(plan.shape) == 2 for plan in plans.values() if plan.kind == "sigmoid"):
        raise ValueError(f"{spec.name}: slot_beta=True, but it takes no beta per slot; leave it out")
    if beta_max != 1 and "beta" not in plans:
        raise ValueError(f"{spec.name}: beta_max={beta_max}, but it takes no beta; leave it out")
    return plans


def _gate_shape(spec: MixerSpec, arg: Arg, sizes: Sizes, per_slot: bool) -> tuple[int, ...]:
    """``(H,)`` or ``(H, K)``: the first layout of an input, or the one with a number a slot."""
    layouts = [layout for layout in arg.layouts if len(layout) == 4] if per_slot else list(arg.layouts)
    if not layouts:
        raise ValueError(f"{spec.name}: slot_beta=True, but its {arg.name} is one a head; leave it out")
    return sizes.shape(" ".join(layouts[0][2:]))
