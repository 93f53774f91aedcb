"""A problem in words: what a choice is remembered under, and what is sent to another process.

The key has no length and no batch. Batch × heads, in buckets of powers of two, is remembered beside it: what was
measured serves buckets up to 4 times smaller or larger, and a new length or batch is no new problem. Host arrays of
NumPy and torch share their kernels, and so their keys.
"""

import dataclasses
from typing import Any

from mixers.problem import Flags, Problem
from mixers.registry import get_spec
from mixers.spec import Sizes

FORWARD, BACKWARD = "forward", "backward"


def key_of(problem: Problem, part: str) -> str:
    """The words for one pass of a problem; what a forward keeps for its backward does not count."""
    groups, heads, key_dim, value_dim = problem.widths
    defaults = {o.name: o.default for o in problem.spec.options}
    words = [
        problem.spec.name,
        *(f"{name}={value}" for name, value in problem.options if value != defaults[name]),
        "step" if problem.single and part == FORWARD else part,
        problem.dtype,
        "host" if problem.device == "cpu" and problem.library != "jax" else f"{problem.library} {problem.device}",
        f"K={key_dim} V={value_dim}",
        *([f"group={heads // max(groups, 1)}"] if groups != heads else []),
        *(f"{name}[{axes.replace(' ', '')}]" for name, axes in problem.layouts),
        *(["packed"] if problem.packed else []),
        *(["checkpoints"] if problem.flags.checkpoint_every else []),
        *(["tf32"] if problem.flags.allow_tf32 else []),
        *(["batch invariant"] if problem.flags.batch_invariant else []),
    ]
    return " ".join(words)


def to_json(problem: Problem) -> dict[str, Any]:
    """A problem as plain data."""
    return {
        "spec": problem.spec.name,
        "options": dict(problem.options),
        "layouts": [list(pair) for pair in problem.layouts],
        "dtype": problem.dtype,
        "library": problem.library,
        "device": problem.device,
        "packed": problem.packed,
        "flags": dataclasses.asdict(problem.flags),
        "sizes": dataclasses.asdict(problem.sizes),
    }


def from_json(data: dict[str, Any]) -> Problem:
    """The problem that ``to_json`` wrote.

    Raises:
        ValueError: this process knows no such mixer.
    """
    spec = get_spec(data["spec"])
    return Problem.of(
        spec,
        spec.resolve(data["options"]),
        Sizes(**data["sizes"]),
        Flags(**data["flags"]),
        layouts=tuple((name, axes) for name, axes in data["layouts"]),
        dtype=data["dtype"],
        library=data["library"],
        device=data["device"],
        packed=data["packed"],
    )
