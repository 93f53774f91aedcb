"""A mixer that runs one kernel, whatever would be chosen."""

import json
from typing import Any

from mixers import mixer as mixer_module
from mixers.backend import Config, Kernel
from mixers.mixer import Mixer
from mixers.plan import Plan
from mixers.problem import Problem
from mixers.spec import MixerSpec


class Pinned(Mixer):
    """A mixer that runs one kernel, whatever would be chosen."""

    def __init__(
        self, spec: MixerSpec, backend: str, kernel: Kernel, options: dict[str, Any], config: Config | None = None
    ):
        """``config`` defaults to the kernel's own default for each problem."""
        super().__init__(spec, backend, options)
        self.kernel, self.config = kernel, config
        self.key = json.dumps([self.key, kernel.name, dict(config or {})])
        # Operators find a mixer by its key.
        mixer_module._from_key[self.key] = self

    def plan(self, problem: Problem, again: bool = False) -> Plan:
        """The one kernel.

        Raises:
            ValueError: it does not run this problem.
        """
        support = self.kernel.supports(problem)
        if not support:
            raise ValueError(f"{self.kernel.name}: {support.reason}")
        return Plan(self.backend, self.kernel, self.config or self.kernel.configs(problem)[0])
