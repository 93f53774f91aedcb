"""A GPU's arrays that are neither torch's nor JAX's: CuPy's, Numba's, any with ``__cuda_array_interface__`` or DLPack.

There is one ``Library`` for each of these, named after its package: arrays of two are not mixed. Kernels are given
where the memory lies (``View``), on the stream that the arrays name; results are the package's own arrays. None of
these packages has gradients, and the reference does not run on them.
"""

import contextlib
import functools
import importlib
from typing import Any

import numpy as np

from mixers.arrays import gpu
from mixers.arrays.numpy import first_state_of
from mixers.arrays.numpy import library as host
from mixers.arrays.view import ON_CUDA, View, by_dlpack, by_interface, dtype_name, number_of
from mixers.backend import Pool
from mixers.call import Call
from mixers.mixer import Mixer
from mixers.packing import Pack, check_offsets
from mixers.problem import Arrays, Problem
from mixers.result import Result
from mixers.spec import Array


def is_cuda_array(array: Any) -> bool:
    """Whether its memory on a GPU can be had without a copy."""
    if hasattr(array, "__cuda_array_interface__"):
        return True
    return hasattr(array, "__dlpack_device__") and array.__dlpack_device__()[0] == ON_CUDA


def package_of(array: Any) -> str:
    """Whose array it is."""
    return type(array).__module__.partition(".")[0]


class CudaArrays:
    """See ``mixers.arrays.Library``; what only the reference asks for is not here."""

    def __init__(self, package: str) -> None:
        """The library of one package's arrays."""
        self.name = package

    @property
    def namespace(self) -> Any:
        """CuPy's array-API namespace, or the package itself.

        Raises:
            TypeError: the package has no array functions.
        """
        if self.name == "numba":
            raise TypeError("Numba's device arrays have no array functions; pass CuPy's, or every array in full")
        return importlib.import_module("array_api_compat.cupy" if self.name == "cupy" else self.name)

    def dtype(self, array: Array) -> str:
        """The name of an array's dtype."""
        return dtype_name(array)

    def device(self, array: Array) -> str:
        """Always a GPU of CUDA's."""
        return "cuda"

    def same_device(self, a: Array, b: Array) -> bool:
        """Whether two arrays lie on one GPU."""
        return number_of(a) == number_of(b)

    def expand(self, array: Array, shape: tuple[int, ...]) -> Array:
        """A view with stride 0."""
        return self.namespace.broadcast_to(array, shape)

    def offsets(self, given: Any, like: Array) -> tuple[Pack | None, Array, int]:
        """Offsets beside ``like``: a pack, whole numbers on the host, or an array of this package."""
        if isinstance(given, Pack) or not is_cuda_array(given):
            pack, offsets, count = host.offsets(given, like)
            return pack, self.from_numpy(offsets, "int64", like), count
        if len(given.shape) != 1 or given.shape[0] < 2 or dtype_name(given) not in ("int64", "int32"):
            raise ValueError(
                f"cu_seqlens has shape {tuple(given.shape)} and dtype {given.dtype}; expected whole numbers [N+1], "
                "or mixers.pack(lengths)"
            )
        if library_for(package_of(given)) is not self or number_of(given) != number_of(like):
            raise TypeError(
                f"cu_seqlens is on GPU {number_of(given)} ({package_of(given)}) and q on GPU {number_of(like)} "
                f"({self.name}); move them together"
            )
        return None, given if dtype_name(given) == "int64" else given.astype("int64"), given.shape[0] - 1

    def from_numpy(self, values: np.ndarray, dtype: str, like: Array) -> Array:
        """An array beside ``like``."""
        values = np.ascontiguousarray(values, numpy_dtype(dtype))
        if self.name == "numba":
            return importlib.import_module("numba.cuda").to_device(values)
        with _current(like):
            return self.namespace.asarray(values)

    def empty(self, shape: tuple[int, ...], dtype: str, like: Array) -> Array:
        """An array beside ``like``, to be filled."""
        if self.name == "numba":
            return importlib.import_module("numba.cuda").device_array(shape, numpy_dtype(dtype))
        with _current(like):
            return self.namespace.empty(shape, dtype=numpy_dtype(dtype))

    def view(self, array: Array | None) -> View | None:
        """Where an array lies."""
        if array is None:
            return None
        make = functools.partial(self._make, array)
        return by_interface(array, make) if hasattr(array, "__cuda_array_interface__") else by_dlpack(array, make)

    def _make(self, like: Array, shape: tuple[int, ...], dtype: str) -> View:
        view = self.view(self.empty(shape, dtype, like))
        assert view is not None
        return view

    def scatter(self, pools: tuple[Array, ...], state: tuple[Array, ...], where: Array, target: Array) -> None:
        """Write states into their slots."""
        for pool, values in zip(pools, state, strict=True):
            pool[target[where]] = values[where].astype(pool.dtype)

    def decode(self, mixer: Mixer, call: Call, pool: Pool) -> Array | None:
        """One launch on the pool itself, where a kernel takes arrays so."""
        problem, q = call.problem(), call.x["q"]
        plan = mixer.plan_in_place(problem)
        if plan is None:
            return None
        shape, dtype = problem.outputs()["y"]
        y, x = self.empty(shape, dtype, q), self._views(call.x)
        there = Pool(
            tuple(self.view(a) for a in pool.arrays), *(self.view(a) for a in (pool.slots, pool.out_slots, pool.fresh))
        )
        self._gather_streams(x["q"], [*x.values(), *there.arrays, there.slots, there.out_slots, there.fresh])
        plan.decode(problem, self._with_first_state(problem, x, q), there, self.view(y))
        return y

    def warmup(self, mixer: Mixer, call: Call, grad: bool) -> None:
        """Run once; there are no gradients."""
        self.run(mixer, call)

    def prepare(self, mixer: Mixer) -> None:
        """Nothing to define."""

    def again(self, mixer: Mixer, x: Arrays, state: bool, checkpoint_every: int | None) -> Result | None:
        """The long way, always."""
        return None

    def untraced(self, function: Any) -> Any:
        """The function itself."""
        return function

    def given(self, call: Call) -> Arrays:
        """Nothing: what is composed of several mixers takes array functions that kernels do not have.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{call.spec.name} is composed of others, and these parts do not run on {self.name} arrays; hand them to "
            "torch or JAX by DLPack"
        )

    def run(self, mixer: Mixer, call: Call) -> Arrays:
        """A kernel that takes arrays as they lie.

        Raises:
            ValueError: there is none, or offsets on the host do not cut the tokens.
        """
        problem, q = call.problem(), call.x["q"]
        plan = mixer.plan(problem)
        if plan.kernel is None or plan.kernel.arrays != "any":
            raise ValueError(
                f"{problem.spec.name}: no kernel takes these {self.name} arrays, and {plan.backend} does not run on "
                "them (mix.explain(...) gives the reasons); hand them to torch or JAX by DLPack"
            )
        if call.pack is not None:
            check_offsets(call.pack.offsets, call.sizes.T)
        out = {n: self.empty(s, d, q) for n, (s, d) in problem.outputs().items() if not n.startswith("kept.")}
        x = self._views(call.x)
        self._gather_streams(x["q"], list(x.values()))
        plan.forward(problem, self._with_first_state(problem, x, q), {n: self.view(a) for n, a in out.items()})
        return out

    def _views(self, arrays: Arrays) -> dict[str, View | None]:
        return {name: self.view(a) for name, a in arrays.items()}

    def _gather_streams(self, q: View | None, views: list[View | None]) -> None:
        """Let the stream of ``q`` wait for the streams of the others."""
        assert q is not None
        for stream in {v.stream for v in views if v is not None} - {q.stream}:
            gpu.follow(q.stream, stream, q.device)

    def _with_first_state(self, problem: Problem, x: dict[str, View | None], like: Array) -> Arrays:
        """The arrays, with the spec's first state wherever the caller gave none."""
        fields = problem.spec.state(problem.option).fields
        if x.get(f"initial.{fields[0].name}") is not None:
            return dict(x)
        about = problem.spec, problem.options, problem.widths, problem.compute_dtype
        q = x["q"]
        assert q is not None
        key = self.name, q.device, q.stream, *about
        if key not in _first_states:  # an upload a call would be slow, and no graph could hold it
            if len(_first_states) >= _MOST_FIRST_STATES:
                _first_states.clear()
            _first_states[key] = tuple(self.from_numpy(a, str(a.dtype), like) for a in first_state_of(*about))
        first = _first_states[key]
        views = zip(fields, (self.view(a) for a in first), strict=True)
        return dict(x) | {f"initial.{f.name}": v.spread(problem.sizes.N) for f, v in views if v is not None}


_first_states: dict[Any, tuple[Array, ...]] = {}
_MOST_FIRST_STATES = 64


def numpy_dtype(name: str) -> np.dtype[Any]:
    """NumPy's dtype of a name; of halves that NumPy does not know, that of ``ml_dtypes``.

    Raises:
        ValueError: ``ml_dtypes`` would be needed.
    """
    if name != "bfloat16":
        return np.dtype(name)
    try:
        half: np.dtype[Any] = np.dtype(importlib.import_module("ml_dtypes").bfloat16)
    except ImportError as error:
        raise ValueError("bfloat16 outside of torch and JAX needs ml_dtypes: pip install ml_dtypes") from error
    return half


def _current(array: Array) -> Any:
    """The array's GPU as its package's current one, where the package has such contexts."""
    device = getattr(array, "device", None)
    return device if hasattr(device, "__enter__") else contextlib.nullcontext()


@functools.cache
def library_for(package: str) -> CudaArrays:
    """The library of a package's arrays."""
    return CudaArrays(package)
