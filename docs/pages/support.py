"""What runs where: asked of every kernel, as a call would ask it.

A kernel answers for a problem without running it and without its device, so this needs no GPU.
"""

import functools
import importlib
import itertools
from dataclasses import dataclass
from typing import Any

import mixers
from mixers.backend import Backend, Kernel, installed
from mixers.check import forms
from mixers.problem import Flags, Problem
from mixers.spec import MixerSpec, Sizes
from pages.markdown import code, table

DTYPES = ("bfloat16", "float16", "float32", "float64")
WIDTHS = (8, 16, 32, 64, 128, 256, 512, 1024)
ARRAYS = {"numpy": "numpy, torch", "any": "torch, jax, any of a GPU", "torch": "torch", "jax": "jax"}
OURS = ("numba", "triton", "cuda", "jax")


@dataclass(frozen=True)
class Question:
    """A call that a kernel is asked about."""

    dtype: str = "float32"
    width: int = 64
    grad: bool = False
    packed: bool = False
    checkpoint_every: int = 0
    device: str = ""


@functools.cache
def backends() -> dict[str, Backend]:
    """This library's backends, in the order of the site."""
    importlib.import_module("jax")  # Numba's kernels of JAX arrays are there where JAX is
    vars(importlib.import_module("mixers.backends.jax.kernel"))["_present"] = bool  # as if every device were here
    return {name: installed()[name] for name in OURS}


def kernels(mixer: str) -> list[tuple[str, Backend, Kernel]]:
    """Every kernel of a mixer."""
    return [(n, b, k) for n, b in backends().items() for k in b.kernels() if mixer in k.mixers]


def variants(spec: MixerSpec) -> tuple[dict[str, Any], ...]:
    """The defaults, and a chunk of 16 where the default is the exact recurrence."""
    defaults = spec.resolve({})
    return (defaults, defaults | {"chunk_size": 16}) if defaults.get("chunk_size") == 1 else (defaults,)


def ask(spec: MixerSpec, options: dict[str, Any], backend: Backend, kernel: Kernel, question: Question) -> str:
    """Why a kernel refuses; empty where it serves."""
    width, batch = question.width, 1 if question.packed else 2
    sizes = Sizes(B=batch, T=256, G=2, H=2, K=width, V=width, N=2, C=spec.chunk(options))
    present = [a for a in (*spec.inputs[3:], *spec.parameters) if not a.optional]
    reasons = []
    library = "torch" if kernel.arrays == "any" else kernel.arrays
    for device in [question.device] if question.device else backend.place.devices:
        problem = Problem.of(
            spec,
            options,
            sizes,
            Flags(grad=question.grad, checkpoint_every=question.checkpoint_every),
            layouts=tuple((a.name, " ".join(a.layouts[0])) for a in present),
            dtype=question.dtype,
            library=library,
            device=device,
            packed=question.packed,
        )
        reason = kernel.supports(problem).reason
        if not reason:
            return ""
        reasons.append(reason)
    return reasons[-1]


def widest(spec: MixerSpec, options: dict[str, Any], backend: Backend, kernel: Kernel, dtype: str, grad: bool) -> int:
    """The widest K = V of those tried that is served; 0 for none."""
    served = [w for w in WIDTHS if not ask(spec, options, backend, kernel, Question(dtype, w, grad))]
    return max(served, default=0)


def widths(spec: MixerSpec, options: dict[str, Any], backend: Backend, kernel: Kernel) -> str:
    """The widest K = V by dtype, with gradients behind a stroke where it differs."""
    found: dict[str, list[str]] = {}
    for dtype in DTYPES:
        plain, trained = (widest(spec, options, backend, kernel, dtype, grad) for grad in (False, True))
        if plain:
            text = _width(plain) + ("" if plain == trained else f" ({_width(trained)} with gradients)")
            found.setdefault(text, []).append(dtype)
    return "; ".join(f"{', '.join(dtypes)}: {text}" for text, dtypes in found.items())


def _width(number: int) -> str:
    return "any" if number == WIDTHS[-1] else f"up to {number}" if number else "none"


def rows(spec: MixerSpec) -> list[list[str]]:
    """One line a kernel and variant that it serves."""
    found = []
    for name, backend, kernel in kernels(spec.name):
        for options in variants(spec):
            served = widths(spec, options, backend, kernel)
            if not served:
                continue

            def yes(backend: Backend = backend, kernel: Kernel = kernel, options: Any = options, **how: Any) -> str:
                return "no" if ask(spec, options, backend, kernel, Question(**how)) else "yes"

            devices = [d for d in backend.place.devices if yes(device=d) == "yes"]
            found.append(
                [
                    code(f"{name}/{kernel.name}"),
                    "" if len(variants(spec)) == 1 else "1" if options["chunk_size"] == 1 else "over 1",
                    kernel.form,
                    f"{ARRAYS[kernel.arrays]} on {', '.join(devices)}",
                    served,
                    yes(packed=True),
                    yes(checkpoint_every=32),
                    "no" if kernel.arrays == "jax" else "in place" if kernel.in_place else "by gathering",
                    "yes" if kernel.batch_invariant else "no",
                ]
            )
    return found


HEADERS = (
    *("kernel", "`chunk_size`", "form", "arrays", "widths K = V", "packs"),
    *("checkpoints", "`decode`", "`batch_invariant`"),
)


def of_mixer(spec: MixerSpec) -> str:
    """The matrix of one mixer, and what its kernels say when they refuse."""
    lines = rows(spec)
    if not lines:
        return ""
    shown = [i for i in range(len(HEADERS)) if any(line[i] for line in lines)]
    text = table([HEADERS[i] for i in shown], [[line[i] for i in shown] for line in lines])
    refusals = list(dict.fromkeys(refused(spec)))
    if refusals:
        text += "\n\nRefused, in the kernels' own words, among the calls that were asked about:\n\n"
        text += "\n".join(f"- {line}" for line in refusals)
    return text


def refused(spec: MixerSpec) -> list[str]:
    """Reasons of kernels that serve some calls of a mixer and refuse others: one a kernel and dtype."""
    found = []
    for name, backend, kernel in kernels(spec.name):
        for options in variants(spec):
            if not widths(spec, options, backend, kernel):
                continue
            for dtype, grad in itertools.product(DTYPES, (False, True)):
                reasons = (ask(spec, options, backend, kernel, Question(dtype, w, grad)) for w in WIDTHS)
                reason = next(filter(None, reasons), "")
                if reason:
                    found.append(f"{code(f'{name}/{kernel.name}')} {reason}")
    return found


def overview() -> str:
    """Mixers × backends."""
    names = backends()
    lines = []
    for name in mixers.names():
        chunks = "exact" if mixers.get_spec(name).exact_in_chunks else "part of the model"
        cells = (", ".join(forms(backend.kernels(), name)) or "no" for backend in names.values())
        lines.append([f"[`{name}`](mixers/{name}.md)", chunks, *cells])
    return table(["mixer", "chunks", *map(code, names)], lines) + "\n"
