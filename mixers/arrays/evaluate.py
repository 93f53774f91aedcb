"""A call and its gradients on any array library, NumPy in and NumPy out: what checks compare.

    x         arrays by name, as in ``mixers.problem``: inputs, parameters, ``initial.<field>``, ``offsets``
    seeds     gradients of ``y``, ``final.<field>``, ``checkpoint.<field>``; absent where nothing flows back
    result    outputs by name, and gradients by the names of ``x``

``q``, ``k``, ``v`` and a cache take the dtype that is asked for; gates, parameters and states stay float32, or float64
where it is, as in a normal call.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mixers.mixer import Mixer
from mixers.result import Result
from mixers.spec import Array, MixerSpec, Options

Named = dict[str, np.ndarray]


def evaluate(
    mixer: Mixer,
    x: Mapping[str, np.ndarray],
    dtype: str,
    seeds: Mapping[str, np.ndarray] | None = None,
    *,
    library: str = "numpy",
    device: str = "cpu",
    checkpoint_every: int = 0,
    step: bool = False,
) -> tuple[Named, Named]:
    """Run a mixer and take gradients back through it.

    Args:
        mixer: the mixer; on NumPy arrays it needs a backend with kernels where ``seeds`` are given.
        x: the arrays of the call.
        dtype: of q, k and v.
        seeds: gradients of outputs; None runs forward only.
        library: ``numpy``, ``torch`` or ``jax``.
        device: of the arrays.
        checkpoint_every: as in a call.
        step: the one token of ``x`` goes through ``Mixer.step``, forward only.

    Returns:
        ``(outputs, gradients)``; the gradients are empty without ``seeds``. Half precision comes back as float32.
    """
    wanted = dtypes(mixer.spec, mixer.options, dtype)
    cast = {name: (a, wanted[name]) for name, a in x.items() if name != "offsets"}
    call = _Call(mixer, x.get("offsets"), checkpoint_every, step)
    return _RUN[library](call, cast, seeds, device)


def dtypes(spec: MixerSpec, options: Options, dtype: str) -> dict[str, str]:
    """The dtype of every array of a call, by name."""
    wide = "float64" if dtype == "float64" else "float32"
    found = {arg.name: dtype if arg.name in ("q", "k", "v") else wide for arg in (*spec.inputs, *spec.parameters)}
    for f in spec.state(options).fields:
        found[f"initial.{f.name}"] = "int32" if f.counter else dtype if f.verbatim else wide
    return found


class _Call:
    """A mixer and what is no array of the call."""

    def __init__(self, mixer: Mixer, offsets: Any, checkpoint_every: int, step: bool) -> None:
        self.mixer, self.offsets, self.checkpoint_every, self.step = mixer, offsets, checkpoint_every, step
        self.fields = mixer.spec.state(mixer.options).fields
        self.floating = tuple(f for f in self.fields if not f.counter)

    def arguments(self, arrays: Mapping[str, Array]) -> dict[str, Any]:
        """Arrays by name as keywords of a call."""
        state = tuple(arrays[f"initial.{f.name}"] for f in self.fields if f"initial.{f.name}" in arrays)
        layout = self.mixer.spec.state(self.mixer.options)
        return {
            **{name: a for name, a in arrays.items() if not name.startswith("initial.")},
            "initial_state": layout.pack(state) if state else None,
            "cu_seqlens": self.offsets,
            "checkpoint_every": self.checkpoint_every or None,
        }

    def run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name."""
        if not self.step:
            return self.named(self.mixer(**self.arguments(arrays)))
        timed = {arg.name for arg in self.mixer.spec.inputs}
        arguments = self.arguments({n: a[:, 0] if n in timed else a for n, a in arrays.items()})
        state = arguments.pop("initial_state")
        arguments = {n: a for n, a in arguments.items() if n not in ("cu_seqlens", "checkpoint_every")}
        found = self.named(self.mixer.step(**arguments, state=state))
        return found | {name: found[name][:, None] for name in ("y", *self.mixer.spec.results)}

    def named(self, result: Result) -> dict[str, Array]:
        """A result by name."""
        found = {name: getattr(result, name) for name in ("y", *self.mixer.spec.results)}
        for prefix, state in (("final", result.state), ("checkpoint", result.checkpoints)):
            if state is not None:
                parts = state if isinstance(state, tuple) else (state,)
                found |= {f"{prefix}.{f.name}": a for f, a in zip(self.fields, parts, strict=True)}
        return found


def fitted(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """As much of an array as a cache has room for, with zeros behind it."""
    if array.shape == shape:
        return array
    found = np.zeros(shape, array.dtype)
    both = tuple(slice(min(a, b)) for a, b in zip(array.shape, shape, strict=True))
    found[both] = array[both]
    return found


def _host(array: Array) -> np.ndarray:
    found: np.ndarray = np.asarray(array)
    plain = found.dtype.kind in "iu" or found.dtype in (np.float32, np.float64)
    return found if plain else found.astype(np.float32)


_Cast = Mapping[str, tuple[np.ndarray, str]]
_Seeds = Mapping[str, np.ndarray] | None


def _run_numpy(call: _Call, cast: _Cast, seeds: _Seeds, device: str) -> tuple[Named, Named]:
    arrays = {name: a.astype(d, copy=False) for name, (a, d) in cast.items()}
    if seeds is None:
        return {name: _host(a) for name, a in call.run(arrays).items()}, {}
    result, pullback = call.mixer.vjp(**call.arguments(arrays))
    outputs = call.named(result)
    given = {name: fitted(seed, outputs[name].shape).astype(outputs[name].dtype) for name, seed in seeds.items()}

    def part(prefix: str) -> Any:
        parts = tuple(given.get(f"{prefix}.{f.name}") for f in call.floating)
        return None if all(p is None for p in parts) else parts

    gradients = pullback(given.get("y"), part("final"), part("checkpoint"))
    state = gradients.pop("initial_state", None)
    named = {name: _host(a) for name, a in gradients.items()}
    if state is not None:
        parts = state if isinstance(state, tuple) else (state,)
        by_field = zip(call.fields, parts, strict=True)
        named |= {f"initial.{f.name}": _host(a) for f, a in by_field if not f.counter}
    return {name: _host(a) for name, a in outputs.items()}, named


def _run_torch(call: _Call, cast: _Cast, seeds: _Seeds, device: str) -> tuple[Named, Named]:
    import torch

    def alike(array: np.ndarray, dtype: Any) -> Any:
        """A tensor with the array's numbers and strides."""
        strides = [stride // array.itemsize for stride in array.strides]
        tensor = torch.empty_strided(array.shape, strides, dtype=dtype, device=device)
        return tensor.copy_(torch.from_numpy(np.array(array)))

    def leaf(array: np.ndarray, dtype: str) -> Any:
        tensor = alike(array, getattr(torch, dtype))
        return tensor.requires_grad_(seeds is not None and tensor.is_floating_point())

    def host(tensor: Any) -> np.ndarray:
        tensor = tensor.detach().cpu().contiguous()  # a first state that nothing changed is one row for all sequences
        return _host((tensor if tensor.dtype in (torch.float64, torch.int32) else tensor.float()).numpy())

    arrays = {name: leaf(a, d) for name, (a, d) in cast.items()}
    # One thread: a token's operations are small, and waking a second one costs more than they do.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        outputs = call.run(arrays)
        gradients = {}
        if seeds is not None:
            flowing = {n: s for n, s in seeds.items() if outputs[n].requires_grad}  # no token, no gradient
            given = [alike(fitted(s, outputs[n].shape), outputs[n].dtype) for n, s in flowing.items()]
            leaves = {name: a for name, a in arrays.items() if a.is_floating_point()}
            found: tuple[Any, ...] = (None,) * len(leaves)
            if flowing:
                found = torch.autograd.grad(
                    [outputs[n] for n in flowing], list(leaves.values()), given, allow_unused=True
                )
            for (name, a), g in zip(leaves.items(), found, strict=True):
                gradients[name] = host(torch.zeros_like(a) if g is None else g)
    finally:
        torch.set_num_threads(threads)
    return {name: host(a) for name, a in outputs.items()}, gradients


def _run_jax(call: _Call, cast: _Cast, seeds: _Seeds, device: str) -> tuple[Named, Named]:
    import jax
    import jax.numpy as jnp

    with jax.enable_x64(cast["q"][1] == "float64"):
        place = jax.devices(device)[0]
        fixed: dict[str, Array] = {}
        leaves: dict[str, Array] = {}
        for name, (a, dtype) in cast.items():
            array = jax.device_put(jnp.asarray(a, dtype=dtype), place)
            (fixed if dtype == "int32" else leaves)[name] = array

        def run(leaves: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
            outputs = call.run({**fixed, **leaves})
            return {name: outputs[name] for name in seeds or ()}, outputs

        if seeds is None:
            return {name: _host(a) for name, a in run(leaves)[1].items()}, {}
        flows, pullback, outputs = jax.vjp(run, leaves, has_aux=True)
        (found,) = pullback(
            {n: jnp.asarray(fitted(seed, flows[n].shape), dtype=flows[n].dtype) for n, seed in seeds.items()}
        )
        return {n: _host(a) for n, a in outputs.items()}, {n: _host(g) for n, g in found.items()}


_RUN = {"numpy": _run_numpy, "torch": _run_torch, "jax": _run_jax}
