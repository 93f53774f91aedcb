"""Every mixer as a layer, with the options that change how a layer is built."""

from typing import Any

import torch

import mixers
from mixers import AttentionState, HAMState, MemoryCachingState
from mixers.nn import LayerState, MixerLayer

D_MODEL = 12

# By name: the arguments of a layer. Every mixer stands here, those of other people who registered theirs too.
LAYERS: dict[str, dict[str, Any]] = {name: {"mixer": name} for name in mixers.names()} | {
    "lattice, chunk of 4": {"mixer": "lattice", "chunk_size": 4},
    "lattice, beta a slot": {"mixer": "lattice", "slot_beta": True, "objective": "encoding"},
    "lattice, decay": {"mixer": "lattice", "decay": "softplus", "objective": "similarity", "chunk_size": 3},
    "memory_caching": {"mixer": "memory_caching", "segment": 3},
    "ttt_linear, batch of 4": {"mixer": "ttt_linear", "chunk_size": 4},
    "delta_rule, beta to 2": {"mixer": "delta_rule", "beta_max": 2.0},
    "delta_rule, no convolution": {"mixer": "delta_rule", "conv_size": 0},
    "gla, bounded": {"mixer": "gla", "decay": "bounded"},
    "attention, no convolution": {"mixer": "attention", "conv_size": 0},
}


def layer(name: str, **changes: Any) -> MixerLayer:
    """A float64 layer on the reference, parameters drawn so that none is at a neutral value."""
    torch.manual_seed(0)
    width = {"key_dim": 4, "value_dim": 4 if LAYERS[name]["mixer"] in ("ttt_linear", "ttt_mlp") else 6}
    arguments = {"d_model": D_MODEL, "heads": 4, "key_heads": 2, **width, "backend": "reference", **LAYERS[name]}
    made = MixerLayer(**{**arguments, **changes}).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def tokens(*shape: int) -> torch.Tensor:
    """Random float64 tokens ``[..., D]``."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, D_MODEL, dtype=torch.float64, generator=generator)


def leaves(state: Any) -> list[torch.Tensor]:
    """The arrays of a state."""
    if state is None or isinstance(state, torch.Tensor):
        return [] if state is None else [state]
    return [leaf for part in state for leaf in leaves(part)]


def assert_same_state(got: LayerState, expected: LayerState) -> None:
    """Equal to rounding; caches as far as they are filled."""
    made_of = got.mixer
    got, expected = leaves(got), leaves(expected)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        if a.shape != b.shape:  # a cache with room behind what it holds
            assert a.shape[1] > b.shape[1] and isinstance(made_of, (AttentionState, HAMState, MemoryCachingState))
            a = a[:, : b.shape[1]]
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
