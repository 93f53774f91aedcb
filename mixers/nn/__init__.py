"""torch layers built from a mixer's spec; ``mixers.nnx`` has the same for JAX.

layer = MixerLayer("lattice", d_model=256, heads=4)
y, state = layer(x)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixers.nn.block import Block as Block
    from mixers.nn.block import SwiGLU as SwiGLU
    from mixers.nn.budget import KeepBudget as KeepBudget
    from mixers.nn.convolution import ShortConv as ShortConv
    from mixers.nn.convolution import short_conv as short_conv
    from mixers.nn.gates import BoundedDecay as BoundedDecay
    from mixers.nn.gates import Gate as Gate
    from mixers.nn.gates import SigmoidGate as SigmoidGate
    from mixers.nn.gates import SoftplusDecay as SoftplusDecay
    from mixers.nn.hybrid import HybridLayer as HybridLayer
    from mixers.nn.hybrid import MemoryCachingLayer as MemoryCachingLayer
    from mixers.nn.language_model import LanguageModel as LanguageModel
    from mixers.nn.layer import LayerState as LayerState
    from mixers.nn.layer import MixerLayer as MixerLayer

# Imported when first asked for: layers of another framework share the plan of a layer, and want no torch.
_HOMES = {
    "Block": "block",
    "BoundedDecay": "gates",
    "Gate": "gates",
    "HybridLayer": "hybrid",
    "KeepBudget": "budget",
    "LanguageModel": "language_model",
    "LayerState": "layer",
    "MemoryCachingLayer": "hybrid",
    "MixerLayer": "layer",
    "ShortConv": "convolution",
    "SigmoidGate": "gates",
    "SoftplusDecay": "gates",
    "SwiGLU": "block",
    "short_conv": "convolution",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mixers.nn' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"mixers.nn.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
