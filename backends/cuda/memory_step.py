"""Memory caching, a single token of every sequence behind its base's, in one launch; see ``mixers.memory_step``."""

import functools

from mixers.memory_step import Rules
from mixers.spec import Array

from . import SIMULATED, WARP
from .arrays import SIZES, empty, kind, place, token
from .kernel import PROCESSORS
from .primitive import TokenKernel
from .program import Constants, Program, constants

READ = Program("memory_read")

WARPS = 2 if SIMULATED else 8

# Numbers of a state that a thread has under way.
LOADED = 2 if SIMULATED else 16


class MemoryStep(TokenKernel):
    """See ``mixers.memory_step``."""

    def forward(self, x: tuple[Array, ...], fixed: tuple[Array, ...], factor: float, how: str) -> tuple[Array, ...]:
        """Every result."""
        (q, k, y, query, online, kept, pooled, key_sum), (tokens, segments) = x, fixed
        (rows, _, heads, values), width, room = y.shape, q.shape[3], kept.shape[1]
        rules, real = Rules.of(how), kind(key_sum)
        more = room + 1 if rules.appends else 0
        out = empty(tuple(y.shape), kind(y), q)
        new_kept, new_pooled = (empty((rows, more, *a.shape[2:]), real, q) for a in (kept, pooled))
        new_sum, *counters = (empty(tuple(a.shape), kind(a), q) for a in (key_sum, tokens, segments))

        columns = _columns(rows * heads, values)
        blocks = rows, heads * -(-values // (columns * WARP))
        chosen = _constants(rules, -(-width // WARP), columns, real, kind(q), kind(query) or real)
        numbers = (
            *token(q, 4), *token(k, 4), *token(y, 4), *token(query, 4), *place(online, 4), *place(kept, 5),
            *place(pooled, 4), *place(key_sum, 3), *place(tokens, 1), *place(segments, 1),
            *(n for a in (out, new_kept, new_pooled, new_sum, *counters) for n in place(a, 0)),
            width, values, heads, heads // q.shape[2], room, rules.segment,
        )  # fmt: skip
        READ(q, chosen, blocks, WARPS * WARP, numbers, (factor,), shared_numbers(room) * SIZES[real])
        return out, new_kept, new_pooled, new_sum, *counters


def _columns(heads: int, values: int) -> int:
    """Columns of a lane: few where there are few heads, so that every multiprocessor has a block."""
    for columns in (4, 2):
        if values > columns // 2 * WARP and heads * -(-values // (columns * WARP)) >= PROCESSORS:
            return columns
    return 1


def shared_numbers(room: int) -> int:
    """Numbers of scores and weights of a block: twice a power of two, so that a row more rarely asks for more."""
    return 2 << room.bit_length()


@functools.lru_cache(maxsize=4096)
def _constants(rules: Rules, keys: int, columns: int, real: str, kind: str, query: str) -> Constants:
    return constants(
        {
            "keys": keys, "columns": columns, "together": min(LOADED // columns, keys * WARP // WARPS), "warps": WARPS,
            "residual": rules.aggregate == "residual", "top": rules.top_k if rules.aggregate == "sparse" else 0,
            "mean": rules.pool == "mean", "appends": rules.appends, "real": real, "kind": kind,
            "query": query,
        }
    )  # fmt: skip


PRIMITIVE = MemoryStep()
