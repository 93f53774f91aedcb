"""The JAX layer is the torch layer: weights move by name, outputs agree."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("flax")

import jax  # noqa: E402
from flax import nnx  # noqa: E402

from mixers import nnx as ours  # noqa: E402
from mixers.nn import MixerLayer  # noqa: E402

LAYERS = {
    "lattice": {"slot_beta": True, "decay": "bounded", "chunk_size": 4},
    "kda": {"beta_max": 2.0},
    "ttt_linear": {},
    "attention": {"key_heads": 1},
}


@pytest.mark.parametrize("mixer", list(LAYERS))
def test_weights_move_by_name(mixer: str) -> None:
    """Both ways, and a sequence that is cut in two."""
    made = {"d_model": 16, "heads": 2, "backend": "reference", **LAYERS[mixer]}
    theirs = MixerLayer(mixer, **made)
    layer = ours.MixerLayer(mixer, **made, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((2, 7, 16)).astype(np.float32)

    theirs.load_state_dict({name: torch.from_numpy(np.array(a)) for name, a in ours.named(layer).items()})
    wanted = theirs(torch.from_numpy(x))[0].detach().numpy()
    np.testing.assert_allclose(layer(jax.numpy.asarray(x))[0], wanted, rtol=0, atol=2e-5)

    again = MixerLayer(mixer, **made)
    ours.load(layer, {name: a.detach().numpy() for name, a in again.state_dict().items()})
    wanted = again(torch.from_numpy(x))[0].detach().numpy()
    first, state = layer(jax.numpy.asarray(x[:, :4]))
    second, _ = layer(jax.numpy.asarray(x[:, 4:]), state)
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), wanted, rtol=0, atol=2e-5)


def test_layers_train_under_jit() -> None:
    layer = ours.MixerLayer("delta_rule", d_model=16, heads=2, backend="jax", rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 6, 16))
    gradient = nnx.jit(nnx.grad(lambda layer, x: (layer(x)[0] ** 2).sum()))(layer, x)
    sizes = [float(abs(g[...]).max()) for _, g in nnx.to_flat_state(gradient)]
    assert all(np.isfinite(sizes))
    assert max(sizes) > 0


def test_names_that_differ_are_refused() -> None:
    layer = ours.MixerLayer("delta_rule", d_model=16, heads=2, rngs=nnx.Rngs(0))
    arrays = ours.named(layer)
    with pytest.raises(ValueError, match=r"the names differ: missing \['out.weight'\]"):
        ours.load(layer, {name: a for name, a in arrays.items() if name != "out.weight"})
    with pytest.raises(ValueError, match=r"norm\.weight has shape"):
        ours.load(layer, arrays | {"norm.weight": np.ones(3)})
