"""TTT-MLP by mini-batches: its dual form, a chain of matrix products over any array library.

    rows are tokens of a mini-batch     M = [j ≤ i]     s_i = token_scale_i     Σ: sums so far, 0 at its start
    Z̄1 = qW1 + c1 − s ∘ (q ΣW1 + Σc1 + (M ∘ (q kᵀ + 1)) G1)
    Z̄2 = X̄2 W2 + c2 − s ∘ (X̄2 ΣW2 + Σc2 + (M ∘ (X̄2 X2ᵀ + 1)) G2)             G1, G2 already times beta

    q, k, v [N,H,L,K]   W1 [N,H,K,F]   W2 [N,H,F,K]   X2, G1 [N,H,L,F]   G2 [N,H,L,K]

Only the chain over mini-batches is sequential. A mini-batch that was begun before, or that does not end, is shorter. A
single token has a kernel of its own (``mixers.ttt_mlp_step``) where a backend has that.
"""

import functools
from typing import Any

import numpy as np

from mixers import reference
from mixers.algebra import device_of
from mixers.call import Call
from mixers.primitive import run
from mixers.problem import Arrays
from mixers.spec import Array
from mixers.ttt import default_scale, residual_norm
from mixers.ttt_mlp import BATCHES, errors, gelu, gelu_slope
from mixers.ttt_mlp_step import ttt_mlp_step

State = tuple[Array, ...]


# A kernel runs so many mini-batches at a time: its backward keeps the weights before each, and learns them again.
AT_ONCE = 32
LONGEST = 64


def compose(library: Any, mixer: Any, call: Call, x: Arrays) -> Arrays:
    """See the module; named as in ``mixers.problem``."""

    def whole(inputs: dict[str, Array], constants: dict[str, Array], state: State, passed: int) -> tuple[Array, State]:
        return _whole(library, mixer.backend, call, inputs, constants, state, passed if call.begins else None)

    return reference.forward(library, call.spec, call.options, call.sizes, call.flags, x, whole)


def _whole(
    library: Any,
    backend: str,
    call: Call,
    inputs: dict[str, Array],
    constants: dict[str, Array],
    state: State,
    passed: int | None,
) -> tuple[Array, State]:
    """Sequences of one length, side by side."""
    xp, chunk, rows = library.namespace, call.options["chunk_size"], inputs["q"].shape[0]
    if inputs["q"].shape[1] == 1:
        streamed = ttt_mlp_step(library, backend, chunk, {**constants, **inputs}, state)
        if streamed is not None:
            return streamed
    phases = library.host(state[-1]) if passed is None else np.full(rows, passed % chunk)
    if phases is None:
        return _by_token(library, call, inputs, constants, state)
    if len(set(phases.tolist())) > 1:  # sequences that are not at the same place of a mini-batch
        found = []
        for n in range(rows):
            one = {name: a[n : n + 1] for name, a in inputs.items()}
            alone = tuple(a[n : n + 1] for a in state)
            found.append(_Batches(library, backend, chunk, one, constants).run(alone, int(phases[n]), True))
        outputs, states = zip(*found, strict=True)
        return xp.concat(list(outputs), axis=0), tuple(xp.concat(list(c), axis=0) for c in zip(*states, strict=True))
    return _Batches(library, backend, chunk, inputs, constants).run(state, int(phases[0]), passed is None)


def _by_token(
    library: Any, call: Call, inputs: dict[str, Array], constants: dict[str, Array], state: State
) -> tuple[Array, State]:
    """The reference's own step, where the phase is traced."""
    dtype, wide = library.dtype(inputs["v"]), _wide(library, inputs["v"])
    held = {name: library.cast(a, wide) for name, a in inputs.items()}
    held = reference.spread(library.namespace, call.spec, call.spec.state(call.options).fields, held, call.sizes)

    def step(token: dict[str, Array], state: State) -> Any:
        return call.spec.step(library.namespace, call.options, {**constants, **token}, state)

    y, state = library.scan(step, state, held)
    return library.cast(y, dtype), state


def _wide(library: Any, array: Array) -> str:
    return "float64" if library.dtype(array) == "float64" else "float32"


class _Batches:
    """The tokens of sequences of one length, in mini-batches."""

    def __init__(
        self, library: Any, backend: str, chunk: int, inputs: dict[str, Array], constants: dict[str, Array]
    ) -> None:
        xp = self.xp = library.namespace
        self.library, self.backend, self.chunk, self.dtype = library, backend, chunk, library.dtype(inputs["v"])
        self.inputs, self.constants = inputs, constants
        scale, one = constants.get("token_scale"), library.cast(inputs["v"][:1, :1], _wide(library, inputs["v"]))
        self.scale = default_scale(xp, chunk, one) if scale is None else scale
        self.norm = {n: constants[n][:, None] for n in ("norm_weight", "norm_bias") if constants.get(n) is not None}

    @functools.cached_property
    def tokens(self) -> dict[str, Array]:
        """The inputs as the arithmetic wants them, a head of q and k for each of v."""
        wide, heads = _wide(self.library, self.inputs["v"]), self.inputs["v"].shape[2]
        found = {name: self.library.cast(a, wide) for name, a in self.inputs.items()}
        for name in ("q", "k"):
            a = found[name]
            found[name] = a if a.shape[2] == heads else self.xp.repeat(a, heads // a.shape[2], axis=2)
        return found

    def run(self, state: State, phase: int, resumed: bool) -> tuple[Array, State]:
        """Output and state, from a mini-batch of which ``phase`` tokens have passed; with sums that are not 0 if so."""
        xp, chunk = self.xp, self.chunk
        weights, sums, count = state[:4], state[4:8], self.inputs["q"].shape[1]
        outputs, at = [], 0
        if phase or resumed:
            at = min(chunk - phase, count)
            y, weights, sums = self._piece(0, at, phase, weights, sums)
            outputs.append(y)
        whole = (count - at) // chunk
        if whole:
            y, weights = self._whole(at, whole, weights)
            outputs.append(y)
            at += whole * chunk
        if at < count:
            y, weights, sums = self._piece(at, count, 0, weights, sums if resumed and not at else None)
            outputs.append(y)
        y = xp.concat(outputs, axis=1) if len(outputs) > 1 else outputs[0]
        left = xp.zeros_like(state[8]) + (phase + count) % chunk
        return self.library.cast(y, self.dtype), (*weights, *sums, left)

    def _piece(
        self, first: int, last: int, phase: int, weights: State, sums: State | None
    ) -> tuple[Array, State, State]:
        """Part of a mini-batch, from what was summed up before."""
        token = {name: a[:, first:last] for name, a in self.tokens.items()}
        y, added = self._read(token, weights, sums, phase)
        sums = added if sums is None else tuple(a + b for a, b in zip(sums, added, strict=True))
        if phase + last - first < self.chunk:
            return y, weights, sums
        return y, self._moved(weights, sums), tuple(self.xp.zeros_like(a) for a in sums)

    def _whole(self, at: int, count: int, weights: State) -> tuple[Array, State]:
        """So many mini-batches from token ``at`` on."""
        found = self._by_kernel(at, count, weights)
        if found is not None:
            return found
        xp, end = self.xp, at + count * self.chunk
        cut = {
            name: xp.reshape(a[:, at:end], (a.shape[0], count, self.chunk, *a.shape[2:]))
            for name, a in self.tokens.items()
        }

        def step(token: dict[str, Array], weights: State) -> tuple[Array, State]:
            y, added = self._read(token, weights, None, 0)
            return y, self._moved(weights, added)

        y, weights = self.library.scan(step, weights, cut)
        return xp.reshape(y, (y.shape[0], end - at, *y.shape[3:])), weights

    def _by_kernel(self, at: int, count: int, weights: State) -> tuple[Array, State] | None:
        """The same by a backend's kernel, some mini-batches at a time; None where there is none."""
        if self.chunk > LONGEST:
            return None
        constants = (self.constants.get(name) for name in ("norm_weight", "norm_bias", "token_scale"))
        parameters, parts = tuple(constants), []
        for first in range(at, at + count * self.chunk, AT_ONCE * self.chunk):
            piece = slice(first, min(first + AT_ONCE * self.chunk, at + count * self.chunk))
            tokens = (self.inputs[name][:, piece] for name in ("q", "k", "v", "beta"))
            found = run(self.library, BATCHES, self.backend, (*tokens, *weights, *parameters), how=str(self.chunk))
            if found is None:
                return None
            y, *last = found
            parts.append(y)
            weights = tuple(last)
        y = self.xp.concat(parts, axis=1) if len(parts) > 1 else parts[0]
        return self.library.cast(y, self.dtype), weights

    def _moved(self, weights: State, sums: State) -> State:
        return tuple(a - self.scale[-1] * b for a, b in zip(weights, sums, strict=True))

    def _read(self, token: dict[str, Array], weights: State, sums: State | None, phase: int) -> tuple[Array, State]:
        """Outputs ``[N,L,H,K]`` of some tokens of a mini-batch, and what they add to its sums."""
        xp = self.xp
        q, k, v = (xp.permute_dims(token[name], (0, 2, 1, 3)) for name in ("q", "k", "v"))
        beta = xp.permute_dims(token["beta"], (0, 2, 1))[..., None]
        length = q.shape[2]
        weight1, bias1, weight2, bias2 = weights
        z1 = xp.matmul(k, weight1) + bias1[:, :, None]
        x2 = gelu(xp, z1)
        z2 = xp.matmul(x2, weight2) + bias2[:, :, None]
        g2 = beta * errors(xp, {"k": k, "v": v, **self.norm}, z2)
        g1 = xp.matmul(g2, _transposed(xp, weight2)) * gelu_slope(xp, z1)

        at = xp.arange(length, **device_of(q))
        causal = xp.astype(at[:, None] >= at[None, :], q.dtype)
        rate = self.scale[phase : phase + length][:, None]
        part1 = xp.matmul(causal * (xp.matmul(q, _transposed(xp, k)) + 1.0), g1)
        if sums is not None:
            part1 = part1 + xp.matmul(q, sums[0]) + sums[1][:, :, None]
        inner = gelu(xp, xp.matmul(q, weight1) + bias1[:, :, None] - rate * part1)
        part2 = xp.matmul(causal * (xp.matmul(inner, _transposed(xp, x2)) + 1.0), g2)
        if sums is not None:
            part2 = part2 + xp.matmul(inner, sums[2]) + sums[3][:, :, None]
        seen = xp.matmul(inner, weight2) + bias2[:, :, None] - rate * part2
        y = residual_norm(xp, {"q": q, **self.norm}, seen)
        added = (
            xp.matmul(_transposed(xp, k), g1),
            xp.sum(g1, axis=2),
            xp.matmul(_transposed(xp, x2), g2),
            xp.sum(g2, axis=2),
        )
        return xp.permute_dims(y, (0, 2, 1, 3)), added


def _transposed(xp: Any, a: Array) -> Array:
    return xp.permute_dims(a, (0, 1, 3, 2))
