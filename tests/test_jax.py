"""JAX arrays: the reference as a ``lax.scan``, under ``jit``, ``grad`` and ``vmap``."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

import mixers  # noqa: E402
from mixers.cases import Setting, draw  # noqa: E402

NAMES = mixers.names()


def inputs(name: str, tokens: int = 6, batch: int = 2, seed: int = 0) -> dict[str, jax.Array]:
    """Arguments of a call in float32."""
    spec = mixers.get_spec(name)
    width = 4 if spec.arg("v").layouts[0][-1] == "V" else 3
    arrays = tuple((a.name, " ".join(a.layouts[0])) for a in spec.inputs)
    x = draw(Setting(spec, (), arrays, 1, 2, 3, width, (tokens,) * batch, seed=seed), "float32")
    return {n: jnp.asarray(a, jnp.float32) for n, a in x.items()}


@pytest.mark.parametrize("name", NAMES)
def test_jit_grad_and_vmap_agree_with_numpy(name: str) -> None:
    mix, x = mixers.get(name, backend="reference"), inputs(name)
    wanted = mix(**{n: np.asarray(a) for n, a in x.items()}).y
    got = jax.jit(lambda x: mix(**x))(x)
    assert type(got) is mixers.Result
    np.testing.assert_allclose(got.y, wanted, rtol=0, atol=1e-5)

    # Every sequence of the batch alone, mapped over.
    alone = jax.vmap(lambda x: mix(**{n: a[None] for n, a in x.items()}).y[0])(x)
    np.testing.assert_allclose(alone, wanted, rtol=0, atol=1e-5)

    # A step along the gradient, so that jit of grad is what runs, changes a sum by the gradient's square.
    gradient = jax.jit(jax.grad(lambda x: mix(**x).y.sum()))(x)
    assert set(gradient) == set(x)
    square = sum(float(jnp.sum(g * g)) for g in gradient.values())
    step = 1e-2 / square**0.5
    moved = {n: np.asarray(a, np.float64) + step * np.asarray(gradient[n]) for n, a in x.items()}
    back = {n: np.asarray(a, np.float64) - step * np.asarray(gradient[n]) for n, a in x.items()}
    rise = mix(**moved).y.sum() - mix(**back).y.sum()
    np.testing.assert_allclose(rise / (2 * step), square, rtol=2e-3)


def test_the_loop_is_a_scan() -> None:
    """One compiled body, however long the sequence is."""
    mix = mixers.get("delta_rule", backend="reference")
    sizes = [len(str(jax.make_jaxpr(lambda x: mix(**x).y)(inputs("delta_rule", tokens=t)))) for t in (8, 256)]
    text = str(jax.make_jaxpr(lambda x: mix(**x).y)(inputs("delta_rule", tokens=256)))
    assert "scan" in text
    assert sizes[1] < 1.1 * sizes[0]


def test_steps_stream() -> None:
    mix, x = mixers.get("lattice", backend="reference", chunk_size=4), inputs("lattice")
    wanted = mix(**x)
    step = jax.jit(lambda token, state: mix.step(**token, state=state))
    state = mix.init_state(2, 2, 3, 4, like=x["q"])
    for t in range(6):
        y, state = step({n: a[:, t] for n, a in x.items()}, state)
        np.testing.assert_allclose(y, wanted.y[:, t], rtol=0, atol=1e-6)
    assert isinstance(state, mixers.LatticeState)
    np.testing.assert_allclose(state.now, wanted.state.now, rtol=0, atol=1e-6)


def test_packs_inside_jit() -> None:
    mix, x = mixers.get("gla", backend="reference"), inputs("gla", batch=1, tokens=7)
    pack = mixers.pack([4, 0, 3])
    got = jax.jit(lambda x: mix(**x, cu_seqlens=pack))(x)
    wanted = mix(**{n: np.asarray(a) for n, a in x.items()}, cu_seqlens=pack)
    np.testing.assert_allclose(got.y, wanted.y, rtol=0, atol=1e-6)
    np.testing.assert_allclose(got.state, wanted.state, rtol=0, atol=1e-6)


def test_results_are_pytrees() -> None:
    result = mixers.get("delta_rule", backend="reference")(**inputs("delta_rule"), checkpoint_every=2)
    leaves, tree = jax.tree_util.tree_flatten(result)
    assert len(leaves) == 3
    again = jax.tree_util.tree_unflatten(tree, leaves)
    assert type(again) is mixers.Result
    assert again.checkpoints.shape[:2] == (2, 3)


def test_half_precision_with_float32_gates() -> None:
    x = inputs("gated_delta_rule")
    half = {n: a.astype(jnp.bfloat16) if n in "qkv" else a for n, a in x.items()}
    y, state = mixers.get("gated_delta_rule", backend="reference")(**half)
    assert y.dtype == jnp.bfloat16
    assert state.dtype == jnp.float32


@pytest.mark.parametrize("name", NAMES)
def test_auto_finds_what_takes_jax_arrays(name: str) -> None:
    """Whatever else is installed: no backend for other arrays may be chosen."""
    x = inputs(name)
    assert type(mixers.get(name)(**x).y) is type(x["q"])


# What is refused in words.


def test_traced_offsets_are_refused() -> None:
    mix, x = mixers.get("gla", backend="reference"), inputs("gla", batch=1)
    with pytest.raises(TypeError, match=r"cu_seqlens is traced; pass a mixers\.pack"):
        jax.jit(lambda x, o: mix(**x, cu_seqlens=o).y)(x, jnp.asarray([0, 2, 6]))


def test_a_backend_for_other_arrays_says_so() -> None:
    for backend in mixers.backend_status():
        if backend in ("reference", "jax"):
            continue
        with pytest.raises(
            ValueError, match=f"backend='{backend}' cannot run delta_rule on jax arrays.*backend='auto'"
        ):
            mixers.get("delta_rule", backend=backend)(**inputs("delta_rule"))


def test_pools_cannot_be_written() -> None:
    x = inputs("delta_rule", tokens=1)
    with pytest.raises(TypeError, match="JAX arrays cannot"):
        mixers.get("delta_rule", backend="reference").decode(
            **x, pool=jnp.zeros((3, 2, 3, 4)), slots=jnp.asarray([0, 1])
        )


def test_mixed_libraries_are_refused() -> None:
    x = inputs("delta_rule")
    with pytest.raises(TypeError, match="v is a numpy array and q a jax array"):
        mixers.get("delta_rule", backend="reference")(**x | {"v": np.asarray(x["v"])})


def test_vjp_is_for_numpy() -> None:
    with pytest.raises(TypeError, match="differentiate jax arrays with jax"):
        mixers.get("delta_rule", backend="reference").vjp(**inputs("delta_rule"))


def test_float64_where_it_is_enabled() -> None:
    """JAX rounds to float32 unless told otherwise."""
    with jax.enable_x64(True):
        x = {n: a.astype(jnp.float64) for n, a in inputs("delta_rule").items()}
        y, state = mixers.get("delta_rule", backend="reference")(**x)
    assert y.dtype == state.dtype == jnp.float64
    wanted = mixers.get("delta_rule", backend="reference")(**{n: np.asarray(a) for n, a in x.items()}).y
    np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-12)
