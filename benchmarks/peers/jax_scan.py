"""What one writes in JAX: ``lax.scan`` over tokens, or over chunks of matrix products; jitted, gradients included.

Shapes are ``[B,T,H,·]`` outside; a scan runs over the leading axis of ``[T,B,H,·]`` or ``[chunks,B,H,C,·]``.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.case import FORWARD, STEP, TRAIN, Case
from benchmarks.inputs import Arrays, convert, first_state
from benchmarks.peers import Peer, Run, kept_states

Array = Any
Inputs = dict[str, Array]
State = tuple[Array, ...]
Function = Callable[[Inputs, State, dict[str, Any]], tuple[Array, State]]

CHUNKS = (16, 32, 64)
SUB_CHUNK = 16
EPS = 1e-6


# One token: inputs [B,H,·].


def read(state: Array, query: Array) -> Array:
    """``Sᵀ q``."""
    return jnp.einsum("bhkv,bhk->bhv", state, query)


def fade(state: Array, log_decay: Array | None) -> Array:
    """The state times its decay, per head or per key channel."""
    if log_decay is None:
        return state
    decay = jnp.exp(log_decay)
    return state * (decay[..., None, None] if decay.ndim == 2 else decay[..., None])


def linear_token(x: Inputs, state: State, option: dict[str, Any]) -> tuple[Array, State]:
    """Linear attention, ``ssd`` and ``gla``."""
    memory = fade(state[0], x.get("log_decay")) + x["k"][..., :, None] * x["v"][..., None, :]
    return option["scale"] * read(memory, x["q"]), (memory,)


def delta_token(x: Inputs, state: State, option: dict[str, Any]) -> tuple[Array, State]:
    """The delta rule and its gated forms."""
    memory = fade(state[0], x.get("log_decay"))
    write = x["beta"][..., None] * (x["v"] - read(memory, x["k"]))
    memory = memory + x["k"][..., :, None] * write[..., None, :]
    return option["scale"] * read(memory, x["q"]), (memory,)


def lattice_token(x: Inputs, state: State, option: dict[str, Any]) -> tuple[Array, State]:
    """The exact recurrence of Lattice."""
    slots, k, v, beta = state[0], x["k"], x["v"], x["beta"]
    h = v - read(slots, k) if option["objective"] == "decoding" else v
    along = jnp.einsum("bhkv,bhv->bhk", slots, h)
    z = (beta if beta.ndim == 3 else beta[..., None]) * (k - along if option["objective"] == "encoding" else k)
    slots = fade(slots, x.get("log_decay")) + z[..., :, None] * (h[..., None, :] - slots * along[..., :, None])
    slots = slots * lax.rsqrt(jnp.sum(slots * slots, -1, keepdims=True))
    return option["scale"] * read(slots, x["q"]), (slots,)


def over_tokens(token: Function) -> Function:
    """A ``lax.scan`` over the tokens of a sequence."""

    def run(x: Inputs, state: State, option: dict[str, Any]) -> tuple[Array, State]:
        def body(state: State, now: Inputs) -> tuple[State, Array]:
            y, state = token(now, state, option)
            return state, y

        state, y = lax.scan(body, state, {name: jnp.moveaxis(a, 1, 0) for name, a in x.items()})
        return jnp.moveaxis(y, 0, 1), state

    return run


# Chunks: inputs [n,B,H,C,·].


def split(x: Array, chunk: int) -> Array:
    """``[B,T,H,…]`` as ``[n,B,H,C,…]``."""
    batch, length, *rest = x.shape
    x = x.reshape(batch, length // chunk, chunk, *rest)
    return jnp.transpose(x, (1, 0, 3, 2, *range(4, x.ndim)))


def join(y: Array) -> Array:
    """The way back."""
    chunks, batch, heads, chunk, width = y.shape
    return jnp.transpose(y, (1, 0, 3, 2, 4)).reshape(batch, chunks * chunk, heads, width)


def transposed(x: Array) -> Array:
    """The last two axes swapped."""
    return jnp.swapaxes(x, -1, -2)


def running_decay(log_decay: Array | None, chunk: int) -> Array | None:
    """The sum of ``log_decay`` since the chunk began: ``[n,B,H,C,1]`` per head, ``[n,B,H,C,K]`` per key channel."""
    if log_decay is None:
        return None
    total = jnp.cumsum(split(log_decay, chunk), 3)
    return total[..., None] if log_decay.ndim == 3 else total


def decayed_products(q: Array, k: Array, total: Array | None) -> Array:
    """``Σ_c q_ic k_jc e^{total_ic − total_jc}`` for ``i ≥ j``, zero elsewhere; only falling exponents are taken."""
    if total is None:
        return jnp.tril(q @ transposed(k))
    if total.shape[-1] == 1:
        return jnp.tril(q @ transposed(k) * jnp.exp(jnp.tril(total - transposed(total))))
    size = q.shape[-2]
    sub = min(SUB_CHUNK, size)
    causal = jnp.tril(jnp.ones((sub, sub), bool))[..., None]
    rows = []
    for first in range(0, size, sub):
        here = slice(first, first + sub)
        gap = jnp.where(causal, total[..., here, None, :] - total[..., None, here, :], -jnp.inf)
        block = jnp.sum(jnp.exp(gap) * k[..., None, here, :] * q[..., here, None, :], -1)
        if first:
            base = total[..., first - 1 : first, :]
            before = k[..., :first, :] * jnp.exp(base - total[..., :first, :])
            left = (q[..., here, :] * jnp.exp(total[..., here, :] - base)) @ transposed(before)
            block = jnp.concatenate([left, block], -1)
        rows.append(jnp.pad(block, [(0, 0)] * (block.ndim - 1) + [(0, size - first - sub)]))
    return jnp.concatenate(rows, -2)


def unit_inverse(lower: Array) -> Array:
    """The inverse of ``I`` plus the strictly lower triangle of ``lower``, by merging diagonal blocks of twice the size.

    Not ``jax.scipy.linalg.solve_triangular``: on a machine of two cores its gradient, beside a scan, never returned
    (jaxlib 0.10.2).
    """
    size = lower.shape[-1]
    index = jnp.arange(size)
    inverse = jnp.eye(size, dtype=lower.dtype)
    block = 1
    while block < size:
        row, column = index[:, None] // block, index[None, :] // block
        corner = jnp.where((row == column + 1) & (row % 2 == 1), lower, 0)
        inverse = inverse - inverse @ corner @ inverse
        block *= 2
    return inverse


def chunked(chunk: int, delta: bool) -> Function:
    """The linear family (``delta=False``) or the delta family in chunks."""

    def run(x: Inputs, state: State, option: dict[str, Any]) -> tuple[Array, State]:
        q, k, v = (split(x[name], chunk) for name in ("q", "k", "v"))
        total = running_decay(x.get("log_decay"), chunk)
        grown = 1.0 if total is None else jnp.exp(total)
        q = q * option["scale"]
        inside = decayed_products(q, k, total)
        write, erase, last = v, None, None
        if delta:
            beta = split(x["beta"], chunk)[..., None]
            weighted = k * beta
            right = jnp.concatenate([v * beta, weighted * grown], -1)
            lower = decayed_products(weighted, k, total)
            write, erase = jnp.split(unit_inverse(lower) @ right, [v.shape[-1]], -1)
        if total is not None:
            q, k, last = q * grown, k * jnp.exp(total[..., -1:, :] - total), transposed(grown[..., -1:, :])

        def body(memory: Array, now: Any) -> tuple[Array, Array]:
            q, k, inside, write, erase, last = now
            new = write if erase is None else write - erase @ memory
            y = q @ memory + inside @ new
            return (memory if last is None else memory * last) + transposed(k) @ new, y

        memory, y = lax.scan(body, state[0], (q, k, inside, write, erase, last))
        return join(y), (memory,)

    return run


def lattice_chunked(x: Inputs, state: State, option: dict[str, Any]) -> tuple[Array, State]:
    """Lattice with gradients at each chunk's first slots, in closed form."""
    chunk, objective = option["chunk_size"], option["objective"]
    q, k, v, beta = (split(x[name], chunk) for name in ("q", "k", "v", "beta"))
    beta = beta if beta.ndim == 5 else beta[..., None]
    decay = running_decay(x.get("log_decay"), chunk)

    def body(slots: Array, now: Any) -> tuple[Array, Array]:
        q, k, v, beta, total = now
        if total is None:
            weight, since = jnp.tril(jnp.ones((chunk, chunk), v.dtype)), jnp.ones((chunk, 1), v.dtype)
        else:
            weight, since = jnp.tril(jnp.exp(jnp.tril(total - transposed(total)))), jnp.exp(total)
        h = v - k @ slots if objective == "decoding" else v
        along = h @ transposed(slots)
        z = beta * (k - along if objective == "encoding" else k)
        alpha = weight @ (along * z)
        gram = h @ transposed(h)
        cross = (jnp.tril(weight, -1) * gram) @ z
        square = jnp.diagonal(gram, axis1=-2, axis2=-1)[..., None]
        norm = since**2 + (weight * weight) @ (2 * z * cross + square * z * z) - alpha * alpha
        query = q * lax.rsqrt(jnp.maximum(norm, since**2)) if option["read_norm"] else q
        y = ((since - alpha) * query) @ slots + (weight * (query @ transposed(z))) @ h
        slots = transposed((since - alpha)[..., -1:, :]) * slots + transposed(transposed(weight[..., -1:, :]) * z) @ h
        return slots * lax.rsqrt(jnp.sum(slots * slots, -1, keepdims=True)), y

    slots, y = lax.scan(body, state[0], (q, k, v, beta, decay))
    return option["scale"] * join(y), (slots, slots)


def standardise(z: Array) -> tuple[Array, Array]:
    """``(z − mean)/std`` and ``std``."""
    centred = z - jnp.mean(z, -1, keepdims=True)
    std = jnp.sqrt(jnp.mean(centred * centred, -1, keepdims=True) + EPS)
    return centred / std, std


def ttt_chunked(x: Inputs, state: State, option: dict[str, Any]) -> tuple[Array, State]:
    """TTT-linear's dual form, a mini-batch at a time, with the inner layer norm's default gain and shift."""
    chunk = option["chunk_size"]
    q, k, v, beta = (split(x[name], chunk) for name in ("q", "k", "v", "beta"))
    rate = 1 / jnp.arange(1, chunk + 1, dtype=q.dtype)
    width = q.shape[-1]

    def body(state: State, now: Any) -> tuple[State, Array]:
        (weight, bias), (q, k, v, beta) = state, now
        eta = jnp.tril(rate[:, None] * beta[..., None, :])
        unit, std = standardise(k @ weight + bias[:, :, None])
        h = unit - (v - k)
        grad = (width * h - jnp.sum(h, -1, keepdims=True) - unit * jnp.sum(h * unit, -1, keepdims=True)) / (width * std)
        seen = q @ weight + bias[:, :, None] - (eta * (q @ transposed(k) + 1)) @ grad
        last = transposed(eta[..., -1:, :])
        state = weight - transposed(last * k) @ grad, bias - jnp.sum(last * grad, -2)
        return state, q + standardise(seen)[0]

    state, y = lax.scan(body, state[:2], (q, k, v, beta))
    return join(y), state


def ttt_mlp_chunked(x: Inputs, state: State, option: dict[str, Any]) -> tuple[Array, State]:
    """TTT-MLP's dual form, a mini-batch at a time, in the dtype of its weights; layer norm as in ``ttt_chunked``."""
    chunk = option["chunk_size"]
    q, k, v, beta = (split(x[name].astype(state[0].dtype), chunk) for name in ("q", "k", "v", "beta"))
    rate = 1 / jnp.arange(1, chunk + 1, dtype=q.dtype)
    width = q.shape[-1]

    def body(state: State, now: Any) -> tuple[State, Array]:
        (weight1, bias1, weight2, bias2), (q, k, v, beta) = state, now
        eta = jnp.tril(rate[:, None] * beta[..., None, :])
        inner, pull = jax.vjp(jax.nn.gelu, k @ weight1 + bias1[:, :, None])
        unit, std = standardise(inner @ weight2 + bias2[:, :, None])
        h = unit - (v - k)
        grad2 = (width * h - jnp.sum(h, -1, keepdims=True) - unit * jnp.sum(h * unit, -1, keepdims=True)) / (
            width * std
        )
        (grad1,) = pull(grad2 @ transposed(weight2))
        read = jax.nn.gelu(q @ weight1 + bias1[:, :, None] - (eta * (q @ transposed(k) + 1)) @ grad1)
        seen = read @ weight2 + bias2[:, :, None] - (eta * (read @ transposed(inner) + 1)) @ grad2
        last = transposed(eta[..., -1:, :])
        moved = weight1 - transposed(last * k) @ grad1, bias1 - jnp.sum(last * grad1, -2)
        moved += weight2 - transposed(last * inner) @ grad2, bias2 - jnp.sum(last * grad2, -2)
        return moved, q + standardise(seen)[0]

    state, y = lax.scan(body, state[:4], (q, k, v, beta))
    return join(y), state


def attention(x: Inputs, state: State, option: dict[str, Any]) -> tuple[Array, State]:
    """JAX's own attention; its state is the keys and values."""
    y = jax.nn.dot_product_attention(x["q"], x["k"], x["v"], is_causal=True, scale=option["attn_scale"])
    return y, (x["k"], x["v"])


# Peers.


def build(function: Function, token: Function | None = None) -> Callable[[Case, Arrays], Run]:
    """A builder: hands arrays over and compiles the pass."""

    def bind(case: Case, arrays: Arrays) -> Run:
        with jax.default_matmul_precision("highest"):  # a GPU would round float32 to tf32
            return compiled(case, arrays)

    def compiled(case: Case, arrays: Arrays) -> Run:
        option = case.option | {"scale": case.scale}
        wide = "float64" if case.dtype == "float64" else "float32"
        x = convert(arrays, "jax", case.dtype, case.device)
        dy = x.pop("dy")
        named = {str(i): a for i, a in enumerate(first_state(case.spec, case.sizes, case.option, wide))}
        state = tuple(convert(named, "jax", wide, case.device).values())
        if case.kind == STEP:
            first = {name: a[:, 0] for name, a in x.items()}
            step = jax.jit(lambda x, state: token(x, state, option)).lower(first, state).compile()
            return lambda: step(first, state)
        if case.kind == FORWARD:
            forward = jax.jit(lambda x, state: function(x, state, option)).lower(x, state).compile()
            return lambda: forward(x, state)

        @jax.jit
        def train(x: Inputs, dy: Array) -> Any:
            y, pull = jax.vjp(lambda x: function(x, state, option)[0], x)
            return y, pull(dy)[0]

        gradient = train.lower(x, dy).compile()
        return lambda: gradient(x, dy)

    return bind


def _divides(chunk: int) -> Callable[[Case], str]:
    def refuses(case: Case) -> str:
        return f"{case.length} tokens are no multiple of {chunk}" if case.length % chunk else ""

    return refuses


def _scan_refuses(case: Case) -> str:
    if case.option.get("chunk_size", 1) != 1 or not case.option.get("read_norm", True):
        return "the scan over tokens is written for the exact recurrence"
    return "its gradient keeps several states a token" if case.kind == TRAIN and kept_states(case) > 1e9 else ""


def _model_chunk_refuses(case: Case) -> str:
    chunk = case.option["chunk_size"]
    if chunk == 1:
        return "the chunked form is another model than chunk_size=1"
    return _divides(chunk)(case)


def _attention_refuses(case: Case) -> str:
    scores = 4.0 * case.batch * case.heads * case.length**2
    return "it forms all scores at once" if scores > 2e9 else ""


def _plain(inner: Callable[[Case], str]) -> Callable[[Case], str]:
    """Written plainly, these compute in the inputs' dtype; float64 is off in JAX unless asked for."""

    def refuses(case: Case) -> str:
        return inner(case) if case.dtype == "float32" else "written for float32"

    return refuses


def peers(device: str) -> list[Peer]:
    """Every peer written in JAX."""
    if device == "cuda" and jax.default_backend() != "gpu":
        return []
    tokens = dict.fromkeys(("linear_attention", "ssd", "gla"), linear_token)
    tokens |= dict.fromkeys(("delta_rule", "gated_delta_rule", "kda"), delta_token) | {"lattice": lattice_token}
    every, passes = (FORWARD, TRAIN, STEP), (FORWARD, TRAIN)

    def peer(name: str, mixer: str, allowed: tuple[str, ...], make: Any, refuses: Any) -> Peer:
        return Peer(f"jax {name}", jax.__version__, mixer, allowed, make, _plain(refuses))

    found = [peer("scan", m, every, build(over_tokens(token), token), _scan_refuses) for m, token in tokens.items()]
    for mixer, token in tokens.items():
        if mixer != "lattice":
            delta = token is delta_token
            found += [peer(f"chunk {c}", mixer, passes, build(chunked(c, delta)), _divides(c)) for c in CHUNKS]
    for mixer, function in {
        "lattice": lattice_chunked,
        "ttt_linear": ttt_chunked,
        "ttt_mlp": ttt_mlp_chunked,
    }.items():
        found.append(peer("chunk", mixer, passes, build(function), _model_chunk_refuses))
    return [*found, peer("attention", "attention", passes, build(attention), _attention_refuses)]
