"""JAX arrays: kernels and the reference under JAX's transformations."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

import mixers  # noqa: E402
from mixers.backend import installed  # noqa: E402
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

    # A step along the gradient changes a sum by the gradient's square.
    gradient = jax.grad(lambda x: mix(**x).y.sum())(x)
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


def test_learned_weights_begin_a_mini_batch_while_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights alone say where a sequence is; a traced phase would not, and tokens would go one by one."""
    from mixers import ttt_chunks

    mix, x = mixers.get("ttt_mlp", chunk_size=4), inputs("ttt_mlp")
    wanted = mix(**x).y
    weights = tuple(jnp.asarray(a) for a in mix.init_state(2, 2, 3, like=x["q"])[:4])

    def one_by_one(*_: object) -> None:
        raise AssertionError("token by token")

    monkeypatch.setattr(ttt_chunks, "_by_token", one_by_one)
    got = jax.jit(lambda x, weights: mix(**x, initial_state=weights).y)(x, weights)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)


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


# Kernels. Each of these costs XLA seconds, so a mixer or two stand for all: the laws have the rest.

KERNELS = [
    *[("jax", "lattice"), ("jax", "delta_rule"), ("numba", "lattice")],
    *(pytest.param("triton", name, marks=pytest.mark.gpu) for name in ("lattice", "delta_rule")),
]


@pytest.mark.parametrize(("backend", "name"), KERNELS)
def test_kernels_under_transformations(backend: str, name: str) -> None:
    """``jit``, ``grad``, ``vmap``, ``checkpoint``, ``eval_shape``; other numbers of the same shape trace nothing."""
    status = mixers.backend_status()[backend]
    if not status:
        pytest.skip(status.reason)
    mix, reference, x = mixers.get(name, backend=backend), mixers.get(name, backend="reference"), inputs(name)
    traces = []

    def loss(x: dict[str, jax.Array]) -> jax.Array:
        traces.append(1)
        return jnp.sum(mix(**x, return_state=False).y ** 2)

    gradient = jax.jit(jax.grad(jax.checkpoint(loss)))
    got = gradient(x)
    wanted = jax.grad(lambda x: jnp.sum(reference(**x).y ** 2))(x)
    for name_, g in wanted.items():
        np.testing.assert_allclose(got[name_], g, rtol=0, atol=2e-5)
    before = len(traces)
    gradient({n: 2 * a if n == "q" else a for n, a in x.items()})
    assert len(traces) == before

    alone = jax.vmap(lambda x: mix(**{n: a[None] for n, a in x.items()}).y[0])(x)
    np.testing.assert_allclose(alone, reference(**x).y, rtol=0, atol=2e-5)
    mesh, heads = jax.sharding.Mesh(jax.devices()[:1], ("h",)), jax.sharding.PartitionSpec(None, None, "h")
    whole = {n: jnp.repeat(a, 2, axis=2) if n in ("q", "k") else a for n, a in x.items()}
    run = jax.shard_map(lambda x: mix(**x).y, mesh=mesh, in_specs=(dict.fromkeys(x, heads),), out_specs=heads)
    np.testing.assert_allclose(jax.jit(run)(whole), reference(**x).y, rtol=0, atol=2e-5)
    shapes = jax.eval_shape(lambda x: mix(**x), x)
    assert (shapes.y.shape, shapes.state.shape) == (x["v"].shape, (2, 2, 3, 4))


@pytest.mark.parametrize("name", ["delta_rule", "lattice", "ttt_linear"])
def test_what_is_compiled_does_not_grow_with_length(name: str) -> None:
    """Forward and backward of a kernel are one body, however many chunks there are."""
    mix, sizes = mixers.get(name, backend="jax"), []
    for tokens in (256, 4096):
        x = {n: jax.ShapeDtypeStruct((1, tokens, *a.shape[2:]), a.dtype) for n, a in inputs(name).items()}
        sizes.append(len(str(jax.make_jaxpr(jax.grad(lambda x: jnp.sum(mix(**x).y)))(x))))
    assert sizes[1] < 1.1 * sizes[0]


def test_kernels_take_traced_offsets() -> None:
    """Their number is static, their values are not."""
    mix, x = mixers.get("gla", backend="jax"), inputs("gla", batch=1, tokens=7)
    run = jax.jit(lambda x, offsets: mix(**x, cu_seqlens=offsets))
    for offsets in ([0, 4, 4, 7], [0, 1, 6, 7]):
        got = run(x, jnp.asarray(offsets))
        wanted = mixers.get("gla", backend="reference")(**x, cu_seqlens=np.asarray(offsets))
        np.testing.assert_allclose(got.y, wanted.y, rtol=0, atol=1e-5)
        np.testing.assert_allclose(got.state, wanted.state, rtol=0, atol=1e-5)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, mixers
from jax.sharding import Mesh, PartitionSpec as P
from mixers.backends.jax.ring import ring
from tests.test_jax import inputs

x = inputs("gated_delta_rule", tokens=32)
x |= {n: jnp.repeat(x[n], 2, axis=2) for n in "qk"}
split = lambda axes: {n: P(*axes) for n in x}
for backend in ("jax", "numba"):
    if not mixers.backend_status()[backend]:
        continue
    mix = mixers.get("gated_delta_rule", backend=backend)
    whole, devices = mix(**x), np.array(jax.devices())
    axes = ("b", None, "h")
    mesh = Mesh(devices.reshape(2, 2), ("b", "h"))
    run = jax.shard_map(lambda x: mix(**x).y, mesh=mesh, in_specs=(split(axes),), out_specs=P(*axes))
    np.testing.assert_allclose(jax.jit(run)(x), whole.y, rtol=0, atol=1e-5)
    run = jax.shard_map(
        lambda x: tuple(ring(mix, "t", **x)), mesh=Mesh(devices, ("t",)),
        in_specs=(split((None, "t")),), out_specs=(P(None, "t"), P()),
    )
    loss = lambda run: lambda x: sum(jnp.sum(a**2) for a in run(x))
    value, got = jax.jit(jax.value_and_grad(loss(run)))(x)
    wanted = jax.grad(loss(lambda x: tuple(mix(**x))))(x)
    np.testing.assert_allclose(value, sum(jnp.sum(a**2) for a in whole), rtol=1e-5)
    for n in x:
        np.testing.assert_allclose(got[n], wanted[n], rtol=0, atol=1e-4)
"""


def test_shard_map_and_the_ring_equal_one_device() -> None:
    """Four simulated devices: over batch and heads, and over the tokens of one sequence."""
    run_alone(SHARDED, {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"})


INTERPRETED = """
import ctypes, jax, jax.numpy as jnp, numba, numpy as np, mixers
from mixers.arrays import ffi
from mixers.backends.triton import xla
from tests.test_jax import inputs

def agree(name, x, **given):
    mix, reference = (mixers.get(name, backend=b, **option) for b in ("triton", "reference"))
    wanted = reference(**x, **given)
    got = jax.jit(lambda x: mix(**x, **given))(x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)
    square = lambda mix: lambda x: jnp.sum(mix(**x, **given).y ** 2)
    got, wanted = (jax.grad(square(m))(x) for m in (mix, reference))
    for n in x:
        np.testing.assert_allclose(got[n], wanted[n], rtol=0, atol=2e-4)

option = {}
agree("delta_rule", inputs("delta_rule"))
agree("ssd", inputs("ssd", batch=1, tokens=259))  # in two pieces
option = {"chunk_size": 2}
agree("lattice", inputs("lattice", batch=1, tokens=7), cu_seqlens=np.asarray([0, 4, 4, 7]))

# The handler, with C functions in the driver's place: zeros into one array, then twice the other.
calls = []

@numba.njit
def stream_of(frame):
    return 7

def start(kernel, x, y, z, threads, one, two, shared, stream, pointers, none):
    places = (ctypes.c_int64 * 3).from_address(pointers)
    source, target, number = (ctypes.c_int64.from_address(place).value for place in places)
    calls.append((kernel, x, y, z, threads, shared, stream, number))
    ctypes.c_float.from_address(target + 4).value = 2 * ctypes.c_float.from_address(source).value
    return 0

def fill(target, value, size, stream):
    ctypes.memset(target, value, size)
    return 0

functions = xla._Start(start), xla._Fill(fill)
handler = xla.handler(*functions, stream_of)
ffi.register("played", handler, "cpu")
xla._kernels[99] = 99, 1234
x = jnp.asarray([1.0, 3.0, 5.0])

def run(kernel):
    launches = [2, 0, 1, 0, 12, 1, kernel, 5, 1, 1, 128, 64, 3, 0, 4, 1, 0, -1, -6]
    return jax.ffi.ffi_call("played", jax.typeof(x))(x, launches=np.asarray(launches))

np.testing.assert_array_equal(jax.jit(run, static_argnums=0)(99), [0, 6, 0])
assert calls == [(1234, 5, 1, 1, 128, 64, 7, -6)]
try:
    run(98).block_until_ready()
except jax.errors.JaxRuntimeError as error:
    assert "a Triton kernel did not start" in str(error)
else:
    raise AssertionError("an unknown kernel started")
"""


def test_triton_kernels_inside_of_xla_programs() -> None:
    """Traced as for a GPU, and run by Triton's interpreter; the handler, with a driver that is played."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "triton")):
        pytest.skip("needs torch and Triton")
    run_alone(INTERPRETED, {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"})


def run_alone(program: str, environment: dict[str, str]) -> None:
    """Run Python in a process of its own."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | environment | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# What is refused in words.


@pytest.mark.parametrize(("name", "backend"), [("gla", "reference"), ("ham", "auto")])
def test_traced_offsets_are_refused(name: str, backend: str) -> None:
    mix, x = mixers.get(name, backend=backend), inputs(name, batch=1)
    with pytest.raises(TypeError, match=r"cu_seqlens is traced; pass a mixers\.pack"):
        jax.jit(lambda x, o: mix(**x, cu_seqlens=o).y)(x, jnp.asarray([0, 2, 6]))


def test_a_backend_for_other_arrays_says_so() -> None:
    for backend in mixers.backend_status():
        if backend == "reference" or "jax" in installed()[backend].place.libraries:
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


def test_float64_that_is_not_enabled_is_named() -> None:
    with pytest.raises(ValueError, match="x64 mode, which is off"):
        mixers.get("delta_rule", backend="jax", state_dtype="float64")(**inputs("delta_rule"))


def test_tracers_in_place_of_static_values_are_named() -> None:
    x = inputs("lattice")
    mix = mixers.get("lattice", backend="jax")
    with pytest.raises(TypeError, match=r"checkpoint_every is a .*Tracer; expected a plain value"):
        jax.jit(lambda x, n: mix(**x, checkpoint_every=n).y)(x, 2)
    with pytest.raises(TypeError, match=r"return_state is a .*Tracer; expected a plain value"):
        jax.jit(lambda x, n: mix(**x, return_state=n).y)(x, True)
    with pytest.raises(ValueError, match=r"option chunk_size=.* expected a whole number"):
        jax.jit(lambda x, n: mixers.get("lattice", chunk_size=n)(**x).y)(x, 2)


def test_the_ring_is_for_states_that_compose() -> None:
    from mixers.backends.jax.ring import ring

    with pytest.raises(ValueError, match="states of lattice do not compose; expected one of"):
        ring(mixers.get("lattice", backend="jax"), "t", **inputs("lattice"))
