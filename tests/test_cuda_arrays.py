"""Arrays of other libraries on the CUDA backend: JAX's and a stand-in for CuPy's in the simulator, all on a GPU."""

import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import mixers

STATUS = mixers.backend_status()["cuda"]
if not STATUS:
    pytest.skip(STATUS.reason, allow_module_level=True)

import mixers.backends.cuda as home  # noqa: E402
from mixers.backends.cuda import kernel  # noqa: E402

from mixers.arrays import cuda, gpu  # noqa: E402
from mixers.backend import Place  # noqa: E402

NAMES = ("delta_rule", "lattice", "ttt_linear")
each_mixer = pytest.mark.parametrize("name", NAMES)
simulated = pytest.mark.skipif(not home.SIMULATED, reason="is about the simulator")


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """A test that only a GPU can run."""
    return pytest.mark.gpu(pytest.mark.skipif(home.SIMULATED, reason="needs a GPU")(test))


def inputs(tokens: int = 3, batch: int = 2, width: int = 6) -> dict[str, np.ndarray]:
    """A call on NumPy arrays."""
    rng = np.random.default_rng(tokens)
    x = {n: rng.standard_normal((batch, tokens, 2, width), np.float32) for n in "qkv"}
    return x | {"beta": rng.uniform(0, 0.1, (batch, tokens, 2)).astype(np.float32)}


def wanted(name: str, x: dict[str, np.ndarray], **rest: Any) -> mixers.Result:
    """The reference's answer."""
    return mixers.get(name, backend="reference")(**{n: a.astype(np.float64) for n, a in x.items()}, **rest)


def same(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-4, atol=1e-5)


def leaves(state: Any) -> tuple[Any, ...]:
    return state if isinstance(state, tuple) else (state,)


# An array library of no GPU, that says it were of one.


class Shown:
    """An array with ``__cuda_array_interface__``, whose memory is the host's."""

    def __init__(self, array: np.ndarray, device: int = 0, stream: int | None = None) -> None:
        self.array, self.device, self._stream = array, SimpleNamespace(id=device), stream
        self.shape, self.dtype, self.ndim = array.shape, array.dtype, array.ndim

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {**self.array.__array_interface__, "stream": self._stream}

    def __getitem__(self, key: Any) -> "Shown":
        return Shown(self.array[key])


Shown.__module__ = "shown.arrays"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """What makes arrays of such a library of NumPy's; the simulator takes them."""
    package = ModuleType("shown")
    package.empty = lambda shape, dtype: Shown(np.full(shape, 123, dtype))
    package.asarray = lambda array: Shown(np.array(array))
    package.broadcast_to = lambda a, shape: Shown(np.broadcast_to(a.array, shape))
    monkeypatch.setitem(sys.modules, "shown", package)
    monkeypatch.setattr(kernel, "_SIMULATOR", Place(("cuda",), ("cuda",)))
    monkeypatch.setattr(cuda, "_first_states", {})
    yield lambda x, **rest: {n: Shown(a, **rest) for n, a in x.items()}


@simulated
@each_mixer
def test_an_array_that_shows_its_memory_is_served(name: str, shown: Callable[..., Any]) -> None:
    x = inputs()
    turned = {n: np.ascontiguousarray(a.swapaxes(1, 2)).swapaxes(1, 2) for n, a in x.items()}
    mix = mixers.get(name, backend="cuda")
    result, expected = mix(**shown(turned)), wanted(name, x)
    assert isinstance(result.y, Shown)
    same(result.y.array, expected.y)
    for part, right in zip(leaves(result.state), leaves(expected.state), strict=True):
        same(part.array, right)
    packed = mix(**shown({n: a[:1] for n, a in x.items()}), cu_seqlens=mixers.pack([1, 2]))
    same(packed.y.array, wanted(name, {n: a[:1] for n, a in x.items()}, cu_seqlens=mixers.pack([1, 2])).y)
    token = mix.step(**shown({n: a[:, 0] for n, a in x.items()}))
    same(token.y.array, expected.y[:, 0])


@simulated
def test_a_pool_that_shows_its_memory_is_written_in_place(shown: Callable[..., Any]) -> None:
    x = inputs(tokens=1)
    mix = mixers.get("delta_rule", backend="cuda")
    pool = np.random.default_rng(0).standard_normal((4, 2, 6, 6), np.float32)
    expected = wanted("delta_rule", x, initial_state=pool[[2, 0]].astype(np.float64))
    (given,) = shown({"pool": pool}).values()
    y = mix.decode(**shown(x), pool=given, slots=Shown(np.array([2, 0], np.int32)))
    same(y.array, expected.y)
    same(pool[[2, 0]], expected.state)


@simulated
def test_streams_wait_for_each_other(shown: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []
    monkeypatch.setattr(gpu, "follow", lambda *streams: waits.append(streams))
    x = shown(inputs(), stream=7)
    mix = mixers.get("delta_rule", backend="cuda")
    mix(**x)
    assert not waits
    mix(**x | {"beta": Shown(inputs()["beta"], stream=9)})
    assert waits == [(7, 9, 0)]


@simulated
def test_other_devices_and_libraries_are_refused(shown: Callable[..., Any]) -> None:
    mix, x = mixers.get("delta_rule", backend="cuda"), inputs()
    with pytest.raises(TypeError, match=r"v is on .*id=1.* and q on .*id=0"):
        mix(**shown(x) | {"v": Shown(x["v"], device=1)})
    with pytest.raises(TypeError, match="k is a numpy array and q a shown array"):
        mix(**shown(x) | {"k": x["k"]})
    with pytest.raises(ValueError, match="no kernel takes these shown arrays"):
        mixers.get("delta_rule", backend="reference")(**shown(x))
    with pytest.raises(ValueError, match="is composed of others"):
        mixers.get("ham")(**shown(x))
    with pytest.raises(TypeError, match="with __cuda_array_interface__"):
        mix(**x | {"q": object()})


@simulated
def test_jax_arrays_and_their_gradients() -> None:
    jax = pytest.importorskip("jax")
    jax_arrays("lattice", jax)
    x = {n: jax.numpy.asarray(a) for n, a in inputs().items()}
    with pytest.raises(TypeError, match="are traced, and this kernel runs outside of jit"):
        jax.jit(mixers.get("lattice", backend="cuda"))(*(x[n] for n in "qkv"), beta=x["beta"])


def jax_arrays(name: str, jax: Any) -> None:
    """A call, a pack and a gradient along one direction, as the reference has them."""
    host = inputs()
    x = {n: jax.numpy.asarray(a) for n, a in host.items()}
    mix, expected = mixers.get(name, backend="cuda"), wanted(name, host)
    result = mix(**x)
    same(result.y, expected.y)
    for part, right in zip(leaves(result.state), leaves(expected.state), strict=True):
        same(part, right)
    pack = mixers.pack([1, 0, 2])
    one = {n: a[:1] for n, a in host.items()}
    same(mix(**{n: a[:1] for n, a in x.items()}, cu_seqlens=pack).y, wanted(name, one, cu_seqlens=pack).y)

    def loss(result: Any) -> Any:
        return (result.y**2).sum() + leaves(result.state)[0].sum()

    found = jax.grad(lambda x: loss(mix(**x)))(x)
    rng, step = np.random.default_rng(1), 1e-5
    way = {n: rng.standard_normal(a.shape) for n, a in host.items()}
    more, less = (loss(wanted(name, {n: a + s * way[n] for n, a in host.items()})) for s in (step, -step))
    slope = sum(float((np.asarray(found[n], np.float64) * way[n]).sum()) for n in host)
    assert slope == pytest.approx((more - less) / (2 * step), rel=1e-3)


# On a GPU.


@on_gpu
@each_mixer
def test_jax_arrays_of_a_gpu(name: str) -> None:
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("JAX has no GPU here")
    jax_arrays(name, jax)
    # Memory that is made and dropped while kernels still run.
    rng = np.random.default_rng(0)
    mix = mixers.get(name, backend="cuda")
    big = {n: jax.numpy.asarray(rng.standard_normal((4, 512, 2, 64), np.float32)) for n in "qkv"}
    beta = jax.numpy.asarray(rng.uniform(0, 0.1, (4, 512, 2)).astype(np.float32))
    first = mix(**big, beta=beta).y
    for _ in range(20):
        doubled = {n: a * 1 for n, a in big.items()}
        last = mix(**doubled, beta=beta * 1).y + 0
        del doubled
    np.testing.assert_array_equal(np.asarray(first), np.asarray(last))


@on_gpu
@each_mixer
def test_cupy_arrays(name: str) -> None:
    cupy = pytest.importorskip("cupy")
    expected, mix = wanted(name, inputs()), mixers.get(name)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        x = {n: cupy.asarray(a) for n, a in inputs().items()}
        result = mixers.get(name, backend="cuda")(**x)
        assert mix.explain(**x).chosen.backend == "cuda"
        y, state = cupy.asnumpy(result.y), [cupy.asnumpy(s) for s in leaves(result.state)]
        one = {n: a[:1] for n, a in x.items()}
        packed = cupy.asnumpy(mix(**one, cu_seqlens=cupy.asarray([0, 1, 3])).y)
        token = cupy.asnumpy(mix.step(**{n: a[:, 0] for n, a in x.items()}).y)
        half = mix(**{n: a.astype(cupy.float16) if n in "qkv" else a for n, a in x.items()}).y
        stream.synchronize()
    assert isinstance(result.y, cupy.ndarray) and half.dtype == cupy.float16
    same(y, expected.y)
    for part, right in zip(state, leaves(expected.state), strict=True):
        same(part, right)
    same(packed, wanted(name, {n: a[:1] for n, a in inputs().items()}, cu_seqlens=np.array([0, 1, 3])).y)
    same(token, expected.y[:, 0])
    with pytest.raises(TypeError, match="k is a numpy array and q a cupy array"):
        mix(**x | {"k": inputs()["k"]})


@on_gpu
def test_a_cupy_pool_is_written_in_place() -> None:
    cupy = pytest.importorskip("cupy")
    x, pool = inputs(tokens=1), np.random.default_rng(0).standard_normal((4, 2, 6, 6), np.float32)
    expected = wanted("delta_rule", x, initial_state=pool[[2, 0]].astype(np.float64))
    held = cupy.asarray(pool)
    slots = cupy.asarray([2, 0], cupy.int32)
    y = mixers.get("delta_rule").decode(**{n: cupy.asarray(a) for n, a in x.items()}, pool=held, slots=slots)
    same(cupy.asnumpy(y), expected.y)
    same(cupy.asnumpy(held)[[2, 0]], expected.state)


@on_gpu
def test_numba_arrays() -> None:
    from mixers.backends.cuda.source import cuda as numba_cuda

    x = {n: numba_cuda.to_device(a) for n, a in inputs().items()}
    result, expected = mixers.get("delta_rule")(**x), wanted("delta_rule", inputs())
    same(result.y.copy_to_host(), expected.y)
    same(result.state.copy_to_host(), expected.state)
    token = {n: numba_cuda.to_device(np.ascontiguousarray(a[:, 0])) for n, a in inputs().items()}
    same(mixers.get("delta_rule").step(**token).y.copy_to_host(), expected.y[:, 0])
