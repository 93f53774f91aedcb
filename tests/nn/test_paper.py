"""What the paper says of Lattice, seen from outside: updates are orthogonal, and the memory recalls."""

import array_api_compat.numpy as xp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mixers import get, get_spec
from mixers.lattice import unit_rows, update
from mixers.nn import MixerLayer

OBJECTIVES = ("decoding", "encoding", "similarity")


@pytest.mark.parametrize("size", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_every_update_of_every_slot_is_orthogonal_to_the_slot(objective, chunk, size):
    """⟨Δ_i, s_i⟩ = 0 at the slots where the update is taken: the current ones, or those of the chunk's first token."""
    rng = np.random.default_rng(0)
    tokens, heads, slots, width = 40, 2, 7, 5
    mix = get("lattice", backend="reference", objective=objective, chunk_size=chunk)
    q, k = (rng.standard_normal((1, tokens, heads, slots)) for _ in range(2))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = size * rng.standard_normal((1, tokens, heads, width))
    beta = rng.random((1, tokens, heads))

    state, turned = mix.init_state(1, heads, slots, width, like=q), 0.0
    for t in range(tokens):
        base = state if chunk == 1 else state.start
        np.testing.assert_allclose(np.linalg.norm(base, axis=-1), 1, rtol=1e-12)
        delta = update(xp, mix.options, base, k[:, t], v[:, t])
        along = np.sum(delta * base, axis=-1)
        assert np.abs(along).max() <= 1e-14 * max(1.0, size) * 10
        before = base if chunk == 1 else state.now
        _, state = mix.step(q[:, t], k[:, t], v[:, t], beta=beta[:, t], state=state)
        after = state if chunk == 1 else state.now
        whole = before + beta[:, t][..., None, None] * delta
        turned = max(turned, np.abs(delta).max())
        if chunk == 1 or state.phase[0] == 0:
            whole = unit_rows(xp, whole)
        np.testing.assert_allclose(after, whole, rtol=1e-12, atol=1e-14)
    assert turned > 0.05 * size  # the updates did something


def recall(batch, pairs, keys, generator):
    """Keys with their values, then every key again in another order, ``k v k v … k k``; and the values asked for."""
    order = torch.stack([torch.randperm(keys, generator=generator)[:pairs] for _ in range(batch)])
    values = torch.randint(keys, (batch, pairs), generator=generator)
    shown = torch.stack([order, keys + values], dim=2).flatten(1)
    asked = torch.stack([torch.randperm(pairs, generator=generator) for _ in range(batch)])
    return torch.cat([shown, order.gather(1, asked)], 1), values.gather(1, asked)


class Recaller(nn.Module):
    """An embedding, one layer, a classifier."""

    def __init__(self, keys, **options):
        super().__init__()
        self.embed = nn.Embedding(2 * keys, 32)
        self.layer = MixerLayer("lattice", d_model=32, heads=2, **options)
        self.classify = nn.Linear(32, keys)

    def forward(self, tokens, asked):
        x = self.embed(tokens)
        return self.classify(x + self.layer(x, return_state=False)[0])[:, -asked:]


@pytest.mark.parametrize("options", [{}, {"objective": "encoding"}, {"objective": "similarity"}, {"chunk_size": 4}])
def test_one_layer_overfits_multi_query_recall(options):
    torch.manual_seed(0)
    tokens, answers = recall(16, 4, 8, torch.Generator().manual_seed(0))
    made = Recaller(8, **options)
    optimizer = torch.optim.Adam(made.parameters(), lr=1e-2)
    for _ in range(60):
        loss = F.cross_entropy(made(tokens, answers.shape[1]).flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01


def test_the_layer_declares_what_the_spec_declares():
    spec = get_spec("lattice")
    assert set(MixerLayer("lattice", d_model=8, heads=2, decay="softplus").gates) == {a.name for a in spec.inputs[3:]}
