"""The command ``mixers``: what there is, what this machine offers, which kernel a call gets, whether kernels are right.

mixers list
mixers info
mixers explain lattice --shape 1,1024,8,64,64 --library torch -o chunk_size=16
mixers check
mixers tune lattice --shape 1,1024,8,64,64
mixers profile show
"""

import ast
import os
import platform
import shutil
import subprocess
from importlib import import_module, metadata
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import mixers
from mixers.arrays import library_of
from mixers.backend import backend_status, installed
from mixers.call import FLOATING
from mixers.spec import MixerSpec, Sizes, unknown

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Sequence mixers: described once, run fast, checked."
)

_LIBRARIES = ("numpy", "numba", "llvmlite", "torch", "triton", "jax", "jaxlib", "numba-cuda")


@app.command("list")
def list_() -> None:
    """Every mixer: what it is, what it takes beside q, k and v, and what a chunk is to it."""
    table = Table(box=None)
    for column in ("mixer", "takes", "chunks", "summary"):
        table.add_column(column, no_wrap=column != "summary")
    for name in mixers.names():
        spec = mixers.get_spec(name)
        takes = (a.name + ("?" if a.optional else "") for a in (*spec.inputs[3:], *spec.parameters))
        table.add_row(name, "\n".join(takes), "exact" if spec.exact_in_chunks else "in the model", spec.summary)
    Console(markup=False).print(table)
    typer.echo("An input with ? may be left out. A mixer's page: print(mixers.get_spec(name))")


@app.command()
def info() -> None:
    """This machine: devices, versions, and every backend, available or why not."""
    machine = Table("", "", show_header=False, box=None)
    machine.add_row("sequence-mixers", f"{mixers.__version__} in {Path(mixers.__file__).parent}")
    machine.add_row("Python", f"{platform.python_version()} on {platform.platform()}")
    machine.add_row("CPU", f"{_processor()}, {_cores()} cores")
    machine.add_row("GPU", "\n".join(_gpus()) or "none found")
    versions = Table("library", "version")
    for library in _LIBRARIES:
        versions.add_row(library, _version(library))
    backends = Table("backend", "status", "runs on")
    summaries = {name: backend.summary for name, backend in installed().items()}
    for name, status in backend_status().items():
        backends.add_row(name, status.reason or "available", summaries.get(name, "any device, token by token"))
    Console(markup=False).print(machine, versions, backends)


@app.command()
def explain(
    name: Annotated[str, typer.Argument(metavar="NAME", help="a mixer, as in `mixers list`")],
    shape: Annotated[str, typer.Option(help="B,T,H,K,V: batch, tokens, heads, key width (slots), value width")],
    dtype: Annotated[str, typer.Option(help="of q, k and v")] = "float32",
    library: Annotated[str, typer.Option(help="numpy, torch or jax, on its own default device")] = "numpy",
    device: Annotated[str, typer.Option(help="of torch's tensors, as cuda")] = "cpu",
    option: Annotated[list[str] | None, typer.Option("-o", "--option", help="a mixer's option, name=value")] = None,
    grad: Annotated[bool, typer.Option(help="its backward too")] = False,
) -> None:
    """Every way to run a call of this shape: the one that is chosen, and why the others are not."""
    try:
        mix = mixers.get(name, **dict(_option(text) for text in option or ()))
        sizes = _sizes(shape, mix.spec, mix.spec.chunk(mix.options))
        like = _like(library, dtype, device)
        to = library_of(like, "q").from_numpy
        x = {
            arg.name: to(np.zeros(sizes.shape(" ".join(arg.layouts[0]))), dtype, like)
            for arg in (*mix.spec.inputs, *mix.spec.parameters)
            if not arg.optional
        }
        explanation = mix.explain(**x, grad=grad)
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(str(explanation))


@app.command()
def check(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="mixers; all by default")] = None,
) -> None:
    """Compare every kernel of every available backend with the reference in float64; exit code 1 where one is wrong."""
    from mixers.check import Case, cases
    from mixers.check.verdict import Verdict

    for name in names or ():
        if name not in mixers.names():
            raise typer.BadParameter(unknown("mixer", name, mixers.names()))
    results: dict[tuple[str, str], list[tuple[Case, Verdict]]] = {}
    for backend, status in backend_status().items():
        if not status:
            typer.echo(f"{backend} is not available: {status.reason}")
            continue
        todo = list(cases(backend, mixers=tuple(names or ())))
        for case in track(todo, description=backend, console=Console(stderr=True, markup=False), transient=True):
            runs = f"{backend}/{case.kernel.name}" if case.kernel else backend
            results.setdefault((case.mixer, runs), []).append((case, case.run()))
    table = Table(box=None)
    for column in ("mixer", "runs on", "cases", "error/allowed", "verdict"):
        table.add_column(column, no_wrap=True)
    for (mixer, runs), found in sorted(results.items()):
        wrong = sum(not verdict for _, verdict in found)
        worst = max(verdict.ratio for _, verdict in found)
        table.add_row(mixer, runs, str(len(found)), f"{worst:.3g}", f"{wrong} FAIL" if wrong else "pass")
    Console(markup=False).print(table)
    failures = [(case, verdict) for found in results.values() for case, verdict in found if not verdict]
    for case, verdict in failures:
        typer.echo(f"{case}\n    {verdict.reason}")
    if failures:
        raise typer.Exit(1)


def _option(text: str) -> tuple[str, Any]:
    """``"chunk_size=16"`` as a name and a Python value; a word that is no literal stays a word."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"option {text!r}; expected name=value, as in -o chunk_size=16")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _sizes(shape: str, spec: MixerSpec, chunk: int) -> Sizes:
    numbers = shape.split(",")
    if len(numbers) != 5 or not all(n.strip().isdecimal() for n in numbers):
        raise ValueError(f"shape {shape!r}; expected B,T,H,K,V, as in --shape 1,1024,8,64,64")
    b, t, h, k, v = map(int, numbers)
    if k != v and spec.arg("v").layouts[0][-1] == "K":
        raise ValueError(f"{spec.name} has one width for keys and values; got K={k} and V={v}")
    return Sizes(B=b, T=t, G=h, H=h, K=k, V=v, N=b, C=chunk)


def _like(library: str, dtype: str, device: str) -> Any:
    """An empty array of a library that has a dtype, on a device."""
    if dtype not in FLOATING:
        raise ValueError(f"dtype {dtype!r}; expected one of {', '.join(FLOATING)}")
    if library == "numpy":
        if dtype == "bfloat16":
            raise ValueError("NumPy has no bfloat16; --library torch has it")
        return np.empty(0)
    if library not in ("torch", "jax"):
        raise ValueError(f"library {library!r}; expected numpy, torch or jax")
    try:
        if library == "jax":
            return import_module("jax.numpy").empty(0)
        return import_module("torch").empty(0, device=device)
    except ImportError:
        raise ValueError(f"{library} is not installed: pip install {library}") from None
    except (RuntimeError, AssertionError) as error:  # torch knows no such device, or was built for none
        raise ValueError(str(error).splitlines()[0]) from None


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """The CPU's own name where the system tells it."""
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> list[str]:
    """NVIDIA's GPUs, as their driver names them."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    return found.stdout.strip().splitlines() if found.returncode == 0 else []


# By its name: the core knows of the tuner in ``mixers.mixer`` alone.
import_module("mixers.autotune.commands").add(app, _option)
