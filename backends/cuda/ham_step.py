"""HAM, a single token of every sequence in two launches; see ``mixers.ham_step``.

delta_step       the recurrence, and what its prediction misses, in parts
ham_attention    the decision, the caches that follow, the attention, and the sum of both
"""

import functools

from mixers.backend import Config
from mixers.ham_step import CACHES, COUNTERS, TOKEN, Rules
from mixers.spec import Array, Sizes

from . import SIMULATED, WARP
from .agreed import SUMS_OF
from .arrays import empty, kind, place, token
from .delta import queue_step, step_blocks, step_shapes
from .primitive import TokenKernel
from .program import Constants, Program, constants

ATTENTION = Program("ham_attention")

WARPS = 2 if SIMULATED else 8

# Numbers of keys and values that a thread has under way.
LOADED = 8 if SIMULATED else 32


class HAMStep(TokenKernel):
    """See ``mixers.ham_step``."""

    def forward(self, x: tuple[Array, ...], fixed: tuple[Array, ...], factor: float, how: str) -> tuple[Array, ...]:
        """Every result, in two launches."""
        rules = Rules.of(how)
        given = dict(zip((*TOKEN, "recurrence", *CACHES, *COUNTERS), (*x, *fixed), strict=True))
        q, v, old = given["q"], given["v"], given["recurrence"]
        (rows, _, groups, width), (heads, values) = q.shape, v.shape[2:]
        real = "float64" if kind(q) == "float64" else "float32"
        online, recurrence = empty((rows, heads, values), real, q), empty(tuple(old.shape), real, q)
        sizes = Sizes(B=rows, T=1, G=groups, H=heads, K=width, V=values, N=rows)
        router = "" if rules.router == "given" else rules.router
        config = _config(width, values, kind(q), 1 << (rows * heads - 1).bit_length())
        parts = step_blocks(config, values) * config["warps"]
        measured = empty((rows, heads, parts, SUMS_OF[router]), real, q) if router else None
        queue_step(
            config, sizes, given | {"initial.state": old}, old, recurrence, online,
            scale=rules.scale, router=router, measured=measured,
        )  # fmt: skip

        count = given["count"]
        decided = (rows, 1, *count.shape[1:])
        y, kept, told = empty(tuple(v.shape), kind(v), q), empty(decided, "bool", q), empty(decided, real, q)
        caches = [empty(tuple(given[name].shape), kind(given[name]), q) for name in CACHES]
        counters = [empty(tuple(given[name].shape), "int32", q) for name in COUNTERS]
        asks, key, value, cache = (given[name] for name in ("attn_q", "attn_k", "attn_v", "keys"))
        numbers = (
            *token(asks, 4), *token(key, 4), *token(value, 4), *place(online, 0), *place(measured, 0),
            *token(given["beta"], 3), *token(given["score"], 3), *token(given["kept"], 3),
            *place(given["threshold"], 0), *token(given["gate_rnn"], 3), *token(given["gate_kv"], 3),
            *(n for name in CACHES for n in place(given[name], 4)), *place(count, 2), *place(given["window_marks"], 3),
            *(n for a in (y, kept, told, *caches, *counters) for n in place(a, 0)),
            asks.shape[3], values, heads, asks.shape[2], key.shape[2], value.shape[2], cache.shape[2],
            given["values"].shape[2], cache.shape[1], given["window_keys"].shape[1], parts,
        )  # fmt: skip
        chosen = _constants(
            rules[:4], asks.shape[3], values, real, kind(asks), kind(y),
            *(kind(given[name]) for name in ("beta", "score", "kept", "threshold", "gate_rnn", "gate_kv")),
        )  # fmt: skip
        ATTENTION(q, chosen, (rows, heads), WARPS * WARP, numbers, (factor, rules.threshold))
        return y, kept, told, recurrence, *caches, *counters


@functools.lru_cache(maxsize=256)
def _config(width: int, values: int, dtype: str, parallel: int) -> Config:
    return step_shapes(width, values, dtype, parallel)[0]


@functools.lru_cache(maxsize=4096)
def _constants(
    rules: tuple[str, str, bool, bool], width: int, values: int, real: str, kind: str, out: str, beta: str, score: str,
    forced: str, threshold: str, gate_rnn: str, gate_kv: str,
) -> Constants:  # fmt: skip
    """The constants of the attention, from the first of the rules and the dtypes of its arrays."""
    router, decide, ring, always = rules
    keys, shown = -(-width // WARP), -(-values // WARP)
    return constants(
        {
            "keys": keys, "values": shown, "together": max(1, min(8, LOADED // (keys + shown))), "warps": WARPS,
            "alone": decide == "head", "ring": ring, "always": always, "router": router, "real": real, "kind": kind,
            "online": real, "out": out, "beta": beta, "score": score or real, "forced": forced or "bool",
            "threshold": threshold or real, "gate_rnn": gate_rnn or real, "gate_kv": gate_kv or real,
        }
    )  # fmt: skip


PRIMITIVE = HAMStep()
