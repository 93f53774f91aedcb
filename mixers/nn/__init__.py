"""torch layers built from a mixer's spec.

layer = MixerLayer("lattice", d_model=256, heads=4)
y, state = layer(x)
"""

from mixers.nn.block import Block, SwiGLU
from mixers.nn.budget import KeepBudget
from mixers.nn.convolution import ShortConv, short_conv
from mixers.nn.gates import BoundedDecay, Gate, SigmoidGate, SoftplusDecay
from mixers.nn.hybrid import HybridLayer, MemoryCachingLayer
from mixers.nn.language_model import LanguageModel
from mixers.nn.layer import LayerState, MixerLayer

__all__ = [
    "Block",
    "BoundedDecay",
    "Gate",
    "HybridLayer",
    "KeepBudget",
    "LanguageModel",
    "LayerState",
    "MemoryCachingLayer",
    "MixerLayer",
    "ShortConv",
    "SigmoidGate",
    "SoftplusDecay",
    "SwiGLU",
    "short_conv",
]
