"""What a call returns: a pair that unpacks, with further arrays as attributes."""

from typing import Any

from mixers.spec import Array


class Result(tuple[Array, Any]):
    """``(y, state)``, and ``checkpoints`` where they were asked for; ``kept`` and ``score`` where a mixer decides.

    Attributes:
        y: the output.
        state: the last state; None with ``return_state=False``.
        checkpoints: states after every ``checkpoint_every`` tokens, an axis ``P`` behind the batch; None without.
        kept: the tokens that were kept, ``[B,T]`` booleans; None for a mixer that keeps all or none.
        score: what was compared with the threshold, ``[B,T]``.
    """

    checkpoints: Any = None
    kept: Array = None
    score: Array = None

    def __new__(
        cls, y: Array, state: Any, checkpoints: Any = None, kept: Array = None, score: Array = None
    ) -> "Result":
        """A pair with attributes."""
        self = super().__new__(cls, (y, state))
        # A small call takes about as long as a dictionary of attributes would: most results have none.
        if checkpoints is not None:
            self.checkpoints = checkpoints
        if kept is not None or score is not None:
            self.kept, self.score = kept, score
        return self

    @property
    def y(self) -> Array:
        """The output."""
        return self[0]

    @property
    def state(self) -> Any:
        """The last state."""
        return self[1]

    def __reduce__(self) -> tuple[Any, ...]:
        return Result, (self[0], self[1], self.checkpoints, self.kept, self.score)
