"""What a call returns: a pair that unpacks, with further arrays as attributes."""

from typing import Any

from mixers.spec import Array


class Result(tuple[Array, Any]):
    """``(y, state)``, and ``checkpoints`` where they were asked for.

    Attributes:
        y: the output.
        state: the last state; None with ``return_state=False``.
        checkpoints: states after every ``checkpoint_every`` tokens, an axis ``P`` behind the batch; None without.
    """

    checkpoints: Any

    def __new__(cls, y: Array, state: Any, checkpoints: Any = None) -> "Result":
        """A pair with attributes."""
        self = super().__new__(cls, (y, state))
        self.checkpoints = checkpoints
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
        return Result, (self[0], self[1], self.checkpoints)
