"""What was chosen for a problem: a kernel and its configuration for each pass, ready to be called."""

from dataclasses import dataclass, field

from mixers.backend import Config, Kernel, Pool
from mixers.problem import Arrays, Problem
from mixers.spec import Array


@dataclass(frozen=True)
class Plan:
    """The kernel and configuration that were chosen; without a kernel, the reference runs.

    Attributes:
        backend: its name.
        kernel: runs the forward, and the backward where no other does.
        config: its configuration.
        adjoint: runs the backward.
        adjoint_config: its configuration.
    """

    backend: str
    kernel: Kernel | None
    config: Config
    adjoint: Kernel | None = None
    adjoint_config: Config = field(default_factory=dict)

    def forward(self, problem: Problem, x: Arrays, out: Arrays) -> None:
        """Fill ``out``."""
        assert self.kernel is not None
        try:
            self.kernel.forward(problem, self.config, x, out)
        except Exception as error:
            self._name(error, problem, self.kernel, self.config)
            raise

    def backward(self, problem: Problem, x: Arrays, out: Arrays, dout: Arrays, dx: Arrays) -> None:
        """Fill ``dx``."""
        kernel, config = (self.adjoint, self.adjoint_config) if self.adjoint else (self.kernel, self.config)
        assert kernel is not None
        try:
            kernel.backward(problem, config, x, out, dout, dx)
        except Exception as error:
            self._name(error, problem, kernel, config)
            raise

    def decode(self, problem: Problem, x: Arrays, pool: Pool, y: Array) -> None:
        """Fill ``y`` and the pool's slots."""
        assert self.kernel is not None
        try:
            self.kernel.decode(problem, self.config, x, pool, y)
        except Exception as error:
            self._name(error, problem, self.kernel, self.config)
            raise

    def _name(self, error: Exception, problem: Problem, kernel: Kernel, config: Config) -> None:
        """What fails in a kernel says which one, with which configuration, on what."""
        choices = ", ".join(f"{name}={value}" for name, value in config.items()) or "no choices"
        error.add_note(f"in {self.backend}/{kernel.name} ({choices}), running {problem}")
