"""The closed forms of docs' mathematics, written literally in float64, against the token-by-token reference.

So the truth that every kernel is compared with is itself compared with something that shares no line with it.

    rows are tokens of one head:   Q, K [T,K]   V [T,V]   b, g [T]   S [K,V]
"""

import math

import numpy as np
import pytest

import mixers

RNG = np.random.default_rng(7)
T, K, V = 23, 7, 5
SCALE = K**-0.5


def head(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def tokens(*arrays: np.ndarray) -> list[np.ndarray]:
    """Rows of one head as ``[B,T,H,...]``."""
    return [a[None, :, None] for a in arrays]


def run(name: str, q: np.ndarray, k: np.ndarray, v: np.ndarray, state: np.ndarray | None = None, **rest):
    """One head through the reference: ``(Y, S)``."""
    options = {n: rest.pop(n) for n in list(rest) if n in {o.name for o in mixers.get_spec(name).options}}
    gates = {n: a[None, :, None] for n, a in rest.items()}
    mix = mixers.get(name, backend="reference", **options)
    y, end = mix(*tokens(q, k, v), **gates, initial_state=None if state is None else state[None, None])
    return y[0, :, 0], end[0, 0] if not isinstance(end, tuple) else end


def close(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-12) -> None:
    np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, float(np.abs(b).max())), rtol=0)


Q, KEYS, VALUES = head(T, K), unit(head(T, K)), head(T, V)
BETA = 1 / (1 + np.exp(-head(T)))
G = -np.abs(head(T)) / 4
S0 = head(K, V)


def test_linear_attention_is_masked_attention_without_softmax() -> None:
    y, end = run("linear_attention", Q, KEYS, VALUES)
    close(y, SCALE * np.tril(Q @ KEYS.T) @ VALUES)
    close(end, KEYS.T @ VALUES)


def test_scalar_decay_is_a_mask_of_decays() -> None:
    total = np.cumsum(G)
    decay = np.tril(np.exp(np.minimum(total[:, None] - total[None, :], 0)))
    y, end = run("ssd", Q, KEYS, VALUES, S0, log_decay=G)
    close(y, np.exp(total)[:, None] * (Q @ S0) + ((Q @ KEYS.T) * decay) @ VALUES)
    close(end, np.exp(total[-1]) * S0 + (np.exp(total[-1] - total)[:, None] * KEYS).T @ VALUES)


def test_channel_decay_goes_to_both_sides() -> None:
    g = -np.abs(head(T, K)) / 4
    total = np.cumsum(g, axis=0)
    fast, slow = Q * np.exp(total), KEYS * np.exp(-total)
    y, end = run("gla", Q, KEYS, VALUES, S0, log_decay=g)
    close(y, SCALE * (fast @ S0 + np.tril(fast @ slow.T) @ VALUES))
    close(end, np.exp(total[-1])[:, None] * S0 + (np.exp(total[-1] - total) * KEYS).T @ VALUES)


@pytest.mark.parametrize("gated", [False, True])
def test_delta_chunk_form(gated: bool) -> None:
    g = G if gated else np.zeros(T)
    total = np.cumsum(g)
    decay = np.tril(np.exp(np.minimum(total[:, None] - total[None, :], 0)))
    b = np.diag(BETA)
    a = np.linalg.inv(np.eye(T) + np.tril(b @ ((KEYS @ KEYS.T) * decay), -1))
    u = a @ b @ VALUES
    w = a @ b @ np.diag(np.exp(total)) @ KEYS
    rest = u - w @ S0
    y, end = run(
        "gated_delta_rule" if gated else "delta_rule",
        Q,
        KEYS,
        VALUES,
        S0,
        beta=BETA,
        **({"log_decay": G} if gated else {}),
    )
    close(y, SCALE * (np.diag(np.exp(total)) @ Q @ S0 + (np.tril(Q @ KEYS.T) * decay) @ rest))
    close(end, np.exp(total[-1]) * S0 + (np.diag(np.exp(total[-1] - total)) @ KEYS).T @ rest)


def test_kda_chunk_form() -> None:
    g = -np.abs(head(T, K)) / 4
    total = np.cumsum(g, axis=0)
    fast, slow = KEYS * np.exp(total), KEYS * np.exp(-total)
    b = np.diag(BETA)
    a = np.linalg.inv(np.eye(T) + np.tril(b @ fast @ slow.T, -1))
    rest = a @ b @ (VALUES - fast @ S0)
    read = Q * np.exp(total)
    y, end = run("kda", Q, KEYS, VALUES, S0, beta=BETA, log_decay=g)
    close(y, SCALE * (read @ S0 + np.tril(read @ slow.T) @ rest))
    close(end, np.exp(total[-1])[:, None] * S0 + (np.exp(total[-1] - total) * KEYS).T @ rest)


def test_l2_norm_divides_before_anything_else() -> None:
    k = 3 * head(T, K)
    norm = lambda x: x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + 1e-6)  # noqa: E731
    close(
        run("delta_rule", Q, k, VALUES, beta=BETA, qk_l2norm=True)[0],
        run("delta_rule", norm(Q), norm(k), VALUES, beta=BETA)[0],
    )


@pytest.mark.parametrize("cosine", [0.5, 0.9, 1.0])
def test_merging_blocks_inverts_where_doubling_does_not(cosine: float) -> None:
    """Why kernels merge: 64 keys of one cosine, written in full, in float32."""
    size = 64
    common, own = np.zeros(size + 1), np.eye(size + 1)[1:]
    common[0] = 1
    keys = math.sqrt(cosine) * common + math.sqrt(1 - cosine) * own
    lower = np.tril(keys @ keys.T, -1).astype(np.float32)
    truth = np.linalg.inv(np.eye(size) + lower.astype(np.float64))

    merged, s = np.eye(size, dtype=np.float32), 1
    row, column = np.indices((size, size))
    while s < size:
        mask = (row // (2 * s) == column // (2 * s)) & (row % (2 * s) >= s) & (column % (2 * s) < s)
        merged = merged - merged @ (lower * mask) @ merged
        s *= 2
    doubled, power = np.eye(size, dtype=np.float32) - lower, lower
    for _ in range(5):
        power = power @ power
        doubled = doubled @ (np.eye(size, dtype=np.float32) + power)
    assert np.abs(merged - truth).max() < 2e-6
    assert np.abs(doubled - truth).max() > 1


# Lattice.

OBJECTIVES = ("decoding", "encoding", "similarity")


def write_of(objective: str, phi: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``z`` and ``h`` of one token."""
    return {
        "decoding": lambda: (k, v - phi.T @ k),
        "encoding": lambda: (k - phi @ v, v),
        "similarity": lambda: (k, v),
    }[objective]()


def loss_of(objective: str, slots: np.ndarray, k: np.ndarray, v: np.ndarray) -> float:
    """What a token's write descends, of slots that are normalised first."""
    phi = unit(slots)
    return {
        "decoding": lambda: 0.5 * np.sum((v - phi.T @ k) ** 2),
        "encoding": lambda: 0.5 * np.sum((k - phi @ v) ** 2),
        "similarity": lambda: -np.dot(phi.T @ k, v),
    }[objective]()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_write_is_the_negative_gradient_of_its_loss(objective: str) -> None:
    phi, k, v = unit(head(K, V)), head(K), head(V)
    norms = np.abs(head(K)) + 0.5
    z, h = write_of(objective, phi, k, v)
    expected = (z / norms)[:, None] * (h - phi * (phi @ h)[:, None])
    slots, got, step = norms[:, None] * phi, np.zeros((K, V)), 1e-5
    for i, j in np.ndindex(K, V):
        e = np.zeros((K, V))
        e[i, j] = step
        got[i, j] = (loss_of(objective, slots - e, k, v) - loss_of(objective, slots + e, k, v)) / (2 * step)
    close(got, expected, 1e-8)
    close(np.sum(expected * phi, axis=1), np.zeros(K))


@pytest.mark.parametrize("per_slot", [False, True])
@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_lattice_exact_recurrence(objective: str, decay: bool, per_slot: bool) -> None:
    beta = 1 / (1 + np.exp(-head(T, K))) if per_slot else np.repeat(BETA[:, None], K, axis=1)
    slots, expected, norms = unit(S0), [], []
    for t in range(T):
        mu = math.exp(G[t]) if decay else 1.0
        z, h = write_of(objective, slots, KEYS[t], VALUES[t])
        along = slots @ h
        turned = mu * slots + (beta[t] * z)[:, None] * (h - slots * along[:, None])
        # Orthogonality, as an identity on unit slots.
        norms.append(np.sum(turned**2, axis=1) - (mu**2 + (beta[t] * z) ** 2 * (h @ h - along**2)))
        slots = unit(turned)
        expected.append(slots.T @ Q[t])
    gates = {"beta": beta if per_slot else BETA} | ({"log_decay": G} if decay else {})
    y, end = run("lattice", Q, KEYS, VALUES, unit(S0), objective=objective, **gates)
    close(y, np.array(expected))
    close(end, slots)
    close(np.array(norms), np.zeros((T, K)), 1e-11)


def chunk_form(objective, phi, now, q, k, v, beta, mu, scale=1.0):
    """The closed form of a chunk that resumes from ``now``: ``(Y, S̃ at its end)``; ``now = phi`` at a chunk's start."""
    count = len(q)
    b = np.cumprod(mu)
    w = np.tril(beta[None, :] * b[:, None] / b[None, :])
    pairs = [write_of(objective, phi, k[j], v[j]) for j in range(count)]
    z, hm = np.array([z for z, _ in pairs]), np.array([h for _, h in pairs])
    a = hm @ phi.T
    alpha = w @ (a * z)
    gram = hm @ hm.T
    x = (np.tril(w, -1) * gram) @ z
    w2 = np.tril((b[:, None] / b[None, :]) ** 2)
    added = w2 @ (2 * beta[:, None] * z * x + beta[:, None] ** 2 * np.diag(gram)[:, None] * z * z)
    n0, c, p = np.sum(now**2, axis=1), np.sum(phi * now, axis=1), hm @ now.T
    square = (b**2)[:, None] * n0 + 2 * b[:, None] * (w @ (z * (p - a * c))) + added - alpha**2
    reads = q / np.sqrt(square)
    y = scale * ((b[:, None] * reads) @ now - (alpha * reads) @ phi + (w * (reads @ z.T)) @ hm)
    end = b[-1] * now - alpha[-1][:, None] * phi + (w[-1][:, None] * z).T @ hm
    return y, end


@pytest.mark.parametrize("chunk", [4, 16])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_lattice_chunk_closed_form(objective: str, chunk: int) -> None:
    mu, phi, expected = np.exp(G), unit(S0), []
    for first in range(0, T, chunk):
        at = slice(first, first + chunk)
        y, now = chunk_form(objective, phi, phi, Q[at], KEYS[at], VALUES[at], BETA[at], mu[at])
        expected.append(y)
        last, phi = phi, unit(now)
    y, end = run("lattice", Q, KEYS, VALUES, unit(S0), objective=objective, chunk_size=chunk, beta=BETA, log_decay=G)
    close(y, np.concatenate(expected), 1e-11)
    phase = T % chunk
    assert end.phase.tolist() == [phase]
    close(end.start[0, 0], last if phase else phi, 1e-11)
    close(end.now[0, 0], now if phase else phi, 1e-11)


@pytest.mark.parametrize("cut", [1, 5, 15])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_lattice_resumes_inside_a_chunk(objective: str, cut: int) -> None:
    """The rest of a chunk from ``now``, with decays counted from the first new token."""
    mu, phi, chunk = np.exp(G), unit(S0), 16
    _, now = chunk_form(objective, phi, phi, Q[:cut], KEYS[:cut], VALUES[:cut], BETA[:cut], mu[:cut])
    rest = slice(cut, chunk)
    y, end = chunk_form(objective, phi, now, Q[rest], KEYS[rest], VALUES[rest], BETA[rest], mu[rest])
    got, state = run(
        "lattice",
        Q[:chunk],
        KEYS[:chunk],
        VALUES[:chunk],
        unit(S0),
        objective=objective,
        chunk_size=chunk,
        beta=BETA[:chunk],
        log_decay=G[:chunk],
    )
    close(got[cut:], y, 1e-11)
    close(state.start[0, 0], unit(end), 1e-11)


def test_lattice_without_read_norm_reads_the_running_slots() -> None:
    phi, now, expected = unit(S0), unit(S0), []
    for t in range(8):
        z, h = write_of("decoding", phi, KEYS[t], VALUES[t])
        now = now + BETA[t] * z[:, None] * (h - phi * (phi @ h)[:, None])
        expected.append(now.T @ Q[t])
    y, _ = run("lattice", Q[:8], KEYS[:8], VALUES[:8], unit(S0), chunk_size=8, read_norm=False, beta=BETA[:8])
    close(y, np.array(expected))


@pytest.mark.parametrize(("rows", "columns"), [(3, 8), (8, 3), (5, 5)])
def test_lattice_starts_from_rows_of_dct_iv(rows: int, columns: int) -> None:
    size = max(rows, columns)
    i, j = np.indices((size, size))
    full = math.sqrt(2 / size) * np.cos(math.pi / size * (i + 0.5) * (j + 0.5))
    close(full @ full.T, np.eye(size))
    state = mixers.get("lattice").init_state(2, 3, rows, columns, like=np.zeros(0))
    close(state, np.broadcast_to(unit(full[:rows, :columns]), (2, 3, rows, columns)))


def test_slots_of_zeros_stand_for_their_first_directions() -> None:
    first = mixers.get("lattice").init_state(1, 1, K, V, like=np.zeros(0))[0, 0]
    close(
        run("lattice", Q, KEYS, VALUES, np.zeros((K, V)), beta=BETA)[0],
        run("lattice", Q, KEYS, VALUES, first, beta=BETA)[0],
    )


# TTT.


def standardise(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    std = np.sqrt(z.var(axis=-1, keepdims=True) + 1e-6)
    return (z - z.mean(axis=-1, keepdims=True)) / std, std


def ttt_gradient(z: np.ndarray, target: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """``G`` of a mini-batch."""
    width = z.shape[-1]
    x, std = standardise(z)
    h = weight * (weight * x + bias - target)
    return (width * h - h.sum(-1, keepdims=True) - x * (h * x).sum(-1, keepdims=True)) / (width * std)


def test_ttt_gradient_is_that_of_its_loss() -> None:
    z, target, weight, bias, step = head(1, K), head(1, K), head(K), head(K), 1e-5
    loss = lambda z: 0.5 * np.sum((weight * standardise(z)[0] + bias - target) ** 2)  # noqa: E731
    got = [(loss(z + step * e) - loss(z - step * e)) / (2 * step) for e in np.eye(K)[:, None]]
    close(np.array(got), ttt_gradient(z, target, weight, bias)[0], 1e-8)


@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_ttt_mini_batch_form(chunk: int) -> None:
    width = K
    v, beta = head(T, width), BETA / width
    weight, bias, scale = 1 + 0.1 * head(width), 0.1 * head(width), np.abs(head(chunk)) + 0.1
    w, c, expected = 0.3 * head(width, width), 0.1 * head(width), []
    first = (w.copy(), c.copy())
    for start in range(0, T, chunk):
        at = slice(start, start + chunk)
        q, k, rate = Q[at], KEYS[at], beta[at]
        g = ttt_gradient(k @ w + c, v[at] - k, weight, bias)
        eta = np.tril(scale[: len(q), None] * rate[None, :])
        z = q @ w + c - (eta * (q @ k.T + 1)) @ g
        expected.append(q + weight * standardise(z)[0] + bias)
        if len(q) == chunk:
            w = w - scale[-1] * (rate[:, None] * k).T @ g
            c = c - scale[-1] * (rate[:, None] * g).sum(0)
    mix = mixers.get("ttt_linear", backend="reference", chunk_size=chunk)
    y, state = mix(
        *tokens(Q, KEYS, v),
        beta=beta[None, :, None],
        norm_weight=weight[None],
        norm_bias=bias[None],
        token_scale=scale,
        initial_state=tuple(a[None, None] for a in first),
    )
    close(y[0, :, 0], np.concatenate(expected), 1e-11)
    close(state.weight[0, 0], w, 1e-11)
    close(state.bias[0, 0], c, 1e-11)
    assert state.phase.tolist() == [T % chunk]


def test_ttt_defaults() -> None:
    """Rates 1/i, gain 1, shift 0, and small DCT-IV weights."""
    beta = BETA[None, :, None] / K
    mix = mixers.get("ttt_linear", backend="reference", chunk_size=4)
    state = mix.init_state(1, 1, K, like=np.zeros(0))
    i, j = np.indices((K, K))
    close(state.weight[0, 0], 0.02 * math.sqrt(2 / K) * np.cos(math.pi / K * (i + 0.5) * (j + 0.5)))
    v = head(T, K)
    explicit = mix(
        *tokens(Q, KEYS, v),
        beta=beta,
        norm_weight=np.ones((1, K)),
        norm_bias=np.zeros((1, K)),
        token_scale=1 / np.arange(1, 5.0),
        initial_state=state,
    )
    close(mix(*tokens(Q, KEYS, v), beta=beta)[0], explicit[0])


def test_attention_is_softmax_over_what_came_before() -> None:
    scores = np.where(np.tri(T, dtype=bool), SCALE * Q @ KEYS.T, -np.inf)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    y, _ = run("attention", Q, KEYS, VALUES)
    close(y, weights / weights.sum(1, keepdims=True) @ VALUES)


def test_grouped_heads_share_keys_in_order() -> None:
    """Value head h uses key head h // m."""
    q, k = head(1, T, 2, K), unit(head(1, T, 2, K))
    v, beta = head(1, T, 6, V), 1 / (1 + np.exp(-head(1, T, 6)))
    mix = mixers.get("delta_rule", backend="reference")
    y, _ = mix(q, k, v, beta=beta)
    for h in range(6):
        alone, _ = mix(q[:, :, [h // 3]], k[:, :, [h // 3]], v[:, :, [h]], beta=beta[:, :, [h]])
        close(y[:, :, h], alone[:, :, 0])
