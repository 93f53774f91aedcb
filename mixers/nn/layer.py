"""One layer for every mixer, built from its spec.

q, k, v, g = W x                 x [B,T,D]   q, k, v each as the spec's axes say
q, k, v = conv(q, k, v)          short, causal, depthwise; optional
gates = f(x)                     beta, log_decay: whatever the spec takes
y, state = mixer(q, k, v, gates, state)
out = W' (sigmoid(g) ∘ rmsnorm(y))       the norm is per head

heads H, each key_dim K × value_dim V; key_heads G ≤ H share them
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixers
from mixers.nn.convention import convention
from mixers.nn.convolution import ShortConv
from mixers.nn.gates import BoundedDecay, Gate, Projection, SigmoidGate, SoftplusDecay
from mixers.nn.learned import Learned
from mixers.nn.norm import EPS, RMSNorm
from mixers.nn.padding import Padding, each
from mixers.nn.plan import GatePlan, gate_plans, layer_sizes
from mixers.nn.rotary import positions, rotate
from mixers.packing import Pack
from mixers.result import Result
from mixers.spec import MixerSpec

_PLAIN = {"projection": Projection, "softplus": SoftplusDecay, "bounded": BoundedDecay}


class LayerState(NamedTuple):
    """What a layer remembers between calls.

    Attributes:
        conv: ``[N,W−1,C]``, the convolution's last inputs; None without a convolution.
        mixer: the mixer's own state.
        seen: ``[N]``, tokens seen, where a layer needs them beside the mixer's state.
    """

    conv: Tensor | None
    mixer: Any
    seen: Any = None


class MixerLayer(nn.Module):
    """A sequence mixer with its projections, convolution, gates, norm and learned first state.

    Args:
        mixer: one of ``mixers.names()``, or a ``MixerSpec``.
        d_model: width of a token.
        heads: heads of the state; for attention, heads of the queries.
        key_heads: heads of ``q`` and ``k`` (for attention of ``k`` and ``v``) where several heads share one; ``heads``
            by default.
        key_dim: width of a head's keys, or its slots; ``d_model // heads`` by default.
        value_dim: width of a head's values; ``d_model // heads`` by default.
        conv_size: tokens that the convolution sees; 0 for none.
        beta_max: upper end of the range of beta: 1, or 2 for negative eigenvalues. TTT's is divided by ``key_dim``.
        slot_beta: one beta a slot instead of one a head, where the mixer takes that.
        decay: ``softplus`` (Mamba's) or ``bounded``; by default ``softplus`` where the mixer needs a decay, and none
            where it may go without.
        backend: as in ``mixers.get``.
        options: the mixer's options, as ``chunk_size=16``. ``qk_l2norm`` is on unless turned off.

    Raises:
        ValueError: a name, size or option is unknown or does not fit the mixer.
    """

    def __init__(
        self,
        mixer: str | MixerSpec = "lattice",
        *,
        d_model: int,
        heads: int,
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
        super().__init__()
        spec = mixers.get_spec(mixer) if isinstance(mixer, str) else mixer
        self._normalised_inside = any(option.name == "qk_l2norm" for option in spec.options)
        if self._normalised_inside:
            options.setdefault("qk_l2norm", True)
        self.mix = mixers.get(spec, backend, **options)
        spec = self.mix.spec
        self.custom = convention(spec, self.mix.options)
        self.d_model = d_model
        sizes = layer_sizes(spec, self.mix.options, d_model, heads, key_heads, key_dim, value_dim)
        self.shapes = [sizes.shape(" ".join(arg.layouts[0][2:])) for arg in spec.inputs[:3]]
        self.widths = [heads * width for heads, width in self.shapes]
        if self.custom.rotary and sizes.K % 2:
            raise ValueError(f"{spec.name}: key_dim is {sizes.K}; rotary positions turn pairs, so take an even number")

        inner = sizes.H * (self.shapes[2][1])
        self.project = nn.Linear(d_model, sum(self.widths) + inner, bias=False)
        self.conv = ShortConv(sum(self.widths), conv_size) if conv_size else None
        plans = gate_plans(spec, self.mix.options, sizes, beta_max, slot_beta, decay)
        self.gates = nn.ModuleDict(_gates(plans, d_model))
        self.learned = Learned(self.mix, sizes)
        self.norm = RMSNorm(self.shapes[2][1])
        self.out = nn.Linear(inner, d_model, bias=False)

    def reset_parameters(self) -> None:
        """Give every parameter its first value, as after ``to_empty`` of a layer made on the meta device."""
        reset_parts(self)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        cu_seqlens: Tensor | Pack | None = None,
        mask: Tensor | None = None,
        return_state: bool = True,
    ) -> tuple[Tensor, LayerState | None]:
        """Mix whole sequences.

        Args:
            x: ``[B,T,D]``.
            state: what an earlier call returned; None for the layer's first.
            cu_seqlens: ``[N+1]`` offsets or a ``mixers.pack``: sequences packed into a batch of 1.
            mask: ``[B,T]`` bool, false at padding, on either side: every row gives what its real tokens alone give, and
                zeros at padding.
            return_state: False saves the write of the last state.

        Returns:
            ``(y [B,T,D], state)``; the state is None with ``return_state=False``.

        Raises:
            ValueError: a shape does not fit, or a mask and a pack were both given.
            TypeError: the mask is not boolean.
        """
        self._check(x, cu_seqlens, mask)
        state = LayerState(None, None) if state is None else state
        if mask is not None:
            return self._padded(x, state, mask, return_state)
        return self._mixed(x, state, cu_seqlens, None, return_state)

    def step(self, x: Tensor, state: LayerState | None = None) -> tuple[Tensor, LayerState]:
        """Mix one token.

        Args:
            x: ``[B,D]``.
            state: what the last step or call returned; None for the layer's first.

        Returns:
            ``(y [B,D], state)``.
        """
        y, after = self(x[:, None], state)
        return y[:, 0], after

    def _mixed(
        self,
        x: Tensor,
        state: LayerState,
        cu_seqlens: Tensor | Pack | None,
        lengths: Tensor | None,
        return_state: bool,
        real: Tensor | None = None,
    ) -> tuple[Tensor, LayerState | None]:
        """See the module. ``lengths`` are the real tokens of each row, the rest is padding behind them."""
        offsets = _offsets(cu_seqlens, x.device)
        rows, gate = torch.split(self.project(x), [sum(self.widths), self.out.in_features], dim=-1)
        past = None
        if self.conv is not None:
            rows, past = self.conv(rows, state.conv, offsets, lengths)
        if self.custom.activation:
            rows = F.silu(rows)
        parts = torch.split(rows, self.widths, dim=-1)
        q, k, v = (a.reshape(*a.shape[:2], *shape) for a, shape in zip(parts, self.shapes, strict=True))
        q, k = self._scaled(q), self._scaled(k)
        if self.custom.rotary:
            seen = None if state.mixer is None else state.mixer.length
            places = positions(x.shape[1], seen, offsets, x.device)
            q, k = rotate(q, places), rotate(k, places)

        gates = {name: make(x) for name, make in self.gates.items()}
        more: dict[str, Any] = self._more(x, q, k, state, offsets)
        result = self.mix(
            q,
            k,
            v,
            initial_state=self.learned.state() if state.mixer is None else state.mixer,
            cu_seqlens=cu_seqlens,
            return_state=return_state,
            **gates,
            **self.learned.named,
            **more,
        )
        self._ran(result, real)
        y = self.out(self.norm(result.y).flatten(-2) * torch.sigmoid(gate))
        seen = self._seen(x, state, offsets) if return_state else None
        return y, LayerState(past, result.state, seen) if return_state else None

    def _more(self, x: Tensor, q: Tensor, k: Tensor, state: LayerState, offsets: Tensor | None) -> dict[str, Tensor]:
        """Further inputs of the mixer."""
        return {}

    def _ran(self, result: Result, real: Tensor | None) -> None:
        """What to take from a call; ``real [B,T]`` is false at padding."""

    def _seen(self, x: Tensor, state: LayerState, offsets: Tensor | None) -> Tensor | None:
        """Tokens seen by each sequence, where the layer counts them."""
        return None

    def _scaled(self, rows: Tensor) -> Tensor:
        """Rows of norm 1, or √K; as they are where the mixer does that itself."""
        if self._normalised_inside:
            return rows
        wide = rows if rows.dtype == torch.float64 else rows.float()
        square = wide.square()
        size = square.sum(-1, keepdim=True) if self.custom.unit_rows else square.mean(-1, keepdim=True)
        return (wide * torch.rsqrt(size + EPS)).to(rows.dtype)

    def _padded(
        self, x: Tensor, state: LayerState, mask: Tensor, return_state: bool
    ) -> tuple[Tensor, LayerState | None]:
        """Rows with padding: see ``mixers.nn.padding``."""
        padding = Padding.of(mask)
        x = padding.sort(x)
        if self.mix.spec.reserve is None or self.mix.spec.compose is not None:
            twice = LayerState(*(each(part, lambda a: a.repeat_interleave(2, 0)) for part in state))
            place = torch.arange(mask.shape[1], device=mask.device)
            real = (place < padding.lengths[:, None]).reshape(1, -1)
            y, after = self._mixed(x.flatten(0, 1)[None], twice, padding.offsets, None, return_state, real)
            y = y.reshape(*mask.shape, -1)
            after = None if after is None else LayerState(*(each(part, lambda a: a[0::2]) for part in after))
        else:
            # A cache never looks at what comes behind a token: the padding there only has to be uncounted.
            y, after = self._mixed(x, state, None, padding.lengths, return_state)
            if after is not None:
                missing = (mask.shape[1] - padding.lengths).to(torch.int32)
                after = after._replace(mixer=self._uncounted(after.mixer, missing))
        return padding.restore(y), after

    def _uncounted(self, state: Any, missing: Tensor) -> Any:
        fields = self.mix.spec.state(self.mix.options).fields
        return type(state)(*(a - missing if f.counter else a for f, a in zip(fields, state, strict=True)))

    def _check(self, x: Tensor, cu_seqlens: Any, mask: Tensor | None) -> None:
        if x.ndim != 3 or x.shape[-1] != self.d_model:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected [B,T,D] with D = {self.d_model}")
        if mask is None:
            return
        if cu_seqlens is not None:
            raise ValueError("got both cu_seqlens and mask; a pack has no padding, so leave the mask out")
        if mask.dtype != torch.bool:
            raise TypeError(f"mask has dtype {mask.dtype}; expected torch.bool, true at real tokens")
        if tuple(mask.shape) != tuple(x.shape[:2]):
            raise ValueError(f"mask has shape {tuple(mask.shape)}, expected [B,T] = {tuple(x.shape[:2])}")

    def extra_repr(self) -> str:
        """The mixer."""
        return repr(self.mix)


def reset_parts(module: nn.Module) -> None:
    """Reset every part of a module that has parameters of its own."""
    for part in module.modules():
        reset = getattr(part, "reset_parameters", None)
        if reset is not None and part is not module and not isinstance(part, MixerLayer):
            reset()


def _gates(plans: dict[str, GatePlan], d_model: int) -> dict[str, Gate]:
    """The modules of planned gates."""
    return {
        name: SigmoidGate(d_model, *plan.shape, high=plan.high)
        if plan.kind == "sigmoid"
        else _PLAIN[plan.kind](d_model, *plan.shape)
        for name, plan in plans.items()
    }


def _offsets(cu_seqlens: Tensor | Pack | None, device: torch.device) -> Tensor | None:
    """The offsets of a pack as a tensor."""
    if isinstance(cu_seqlens, Pack):
        cu_seqlens = torch.from_numpy(cu_seqlens.offsets) if cu_seqlens.tensor is None else cu_seqlens.tensor
    return None if cu_seqlens is None else torch.as_tensor(cu_seqlens, device=device)
