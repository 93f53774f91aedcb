"""The commands ``mixers tune`` and ``mixers profile``.

mixers tune lattice delta_rule --shape 1,1024,8,64,64
mixers tune lattice --shape 8,2048,16,64,64 --library torch --device cuda --dtype bfloat16 -o chunk_size=16
mixers profile show
mixers profile merge other.toml
mixers profile export mine.toml
"""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from mixers.autotune import knowledge
from mixers.autotune.device import device_of_kind
from mixers.autotune.key import BACKWARD, FORWARD
from mixers.autotune.profile import Entry, Profile, config_text, save, user_path
from mixers.autotune.tuner import BUDGET, tune
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mixers.registry import names as known_names
from mixers.spec import unknown

profile_app = typer.Typer(no_args_is_help=True, help="What was measured: show it, merge it, export it.")


def add(app: typer.Typer, read_option: Callable[[str], tuple[str, Any]]) -> None:
    """Add the commands to the program; ``read_option`` reads ``name=value``."""
    app.add_typer(profile_app, name="profile")

    @app.command("tune")
    def tune_(
        names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="mixers; all by default")] = None,
        shape: Annotated[str, typer.Option(help="B,T,H,K,V; what is found serves every T")] = "1,1024,8,64,64",
        dtype: Annotated[str, typer.Option(help="of q, k and v")] = "float32",
        library: Annotated[str, typer.Option(help="numpy, torch or jax")] = "numpy",
        device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
        backend: Annotated[str, typer.Option(help="auto, or one to keep to")] = "auto",
        part: Annotated[list[str] | None, typer.Option(help="forward or backward; both by default")] = None,
        given: Annotated[list[str] | None, typer.Option("--with", help="an optional input that is passed too")] = None,
        budget: Annotated[float, typer.Option(help="seconds a mixer, about")] = BUDGET,
        option: Annotated[list[str] | None, typer.Option("-o", "--option", help="a mixer's, name=value")] = None,
    ) -> None:
        """Measure every kernel of a call like this one, and remember the fastest that is right."""
        entries: list[Entry] = []
        for name in names or ():
            if name not in known_names():
                raise typer.BadParameter(unknown("mixer", name, known_names()))
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True, markup=False), transient=True) as progress:
            for name in names or known_names():
                task = progress.add_task(name)

                def report(what: str, done: int, total: int, task: Any = task, name: str = name) -> None:
                    progress.update(task, description=f"{name}, {what}", completed=done, total=total)

                try:
                    entries += tune(
                        name,
                        _shape(shape),
                        dtype=dtype,
                        library=library,
                        device=device,
                        backend=backend,
                        parts=part or (FORWARD, BACKWARD),
                        given=given or (),
                        budget=budget,
                        report=report,
                        **dict(read_option(text) for text in option or ()),
                    )
                except (ValueError, TypeError, RuntimeError, ImportError) as error:
                    if names:
                        raise typer.BadParameter(str(error)) from error
                    progress.console.print(f"{name}: {error}")
                progress.remove_task(task)
        _print(entries)
        typer.echo(f"remembered in {user_path()}")


@profile_app.command("show")
def show(path: Annotated[Path | None, typer.Argument(help="a profile; the user's by default")] = None) -> None:
    """What a profile holds, as a table."""
    where = path or user_path()
    entries = _read(where).entries.values() if path or where.exists() else []
    _print(entries)
    typer.echo(f"{len(entries)} entries in {where}")


@profile_app.command("merge")
def merge(paths: Annotated[list[Path], typer.Argument(help="profiles to take entries from")]) -> None:
    """Take the entries of other profiles into the user's; of two about the same the newer stays."""
    entries = [entry for path in paths for entry in _read(path).entries.values()]
    if not save(user_path(), entries):
        raise typer.Exit(1)
    knowledge.forget()
    typer.echo(f"{len(entries)} entries merged into {user_path()}")


@profile_app.command("export")
def export(
    path: Annotated[Path, typer.Argument(help="the file to write")],
    device: Annotated[str, typer.Option(help="cpu or cuda: only what was measured on this machine's; all else")] = "",
    ship: Annotated[bool, typer.Option(help="for the whole family of the device, without losing candidates")] = False,
) -> None:
    """Write the user's profile, or a part of it, to another file."""
    entries = list(_read(user_path()).entries.values())
    if device:
        entries = [e for e in entries if e.device == device_of_kind(device).id]
    if ship:
        family = device_of_kind(device or "cpu").family
        entries = [dataclasses.replace(e, device=family, stamp="", trials=()) for e in entries]
    path.write_text(Profile.of(entries).text(), encoding="utf-8")
    typer.echo(f"{len(entries)} entries written to {path}")


def _read(path: Path) -> Profile:
    try:
        return Profile.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{path}: {error}") from error


def _shape(text: str) -> tuple[int, int, int, int, int]:
    numbers = text.split(",")
    if len(numbers) != 5 or not all(n.strip().isdecimal() for n in numbers):
        raise typer.BadParameter(f"shape {text!r}; expected B,T,H,K,V, as in --shape 1,1024,8,64,64")
    b, t, h, k, v = map(int, numbers)
    return b, t, h, k, v


def _print(entries: Iterable[Entry]) -> None:
    table = Table(box=None)
    for column in ("problem", "chosen", "of", "ms", "runner-up", "ms", "default ms", "error/allowed", "measured"):
        table.add_column(column)
    for e in entries:
        table.add_row(
            f"{e.key} ×{e.heads}",
            f"{e.kernel} {config_text(e.config)}".strip(),
            str(e.candidates),
            f"{e.seconds * 1e3:.3g}",
            e.runner_up,
            f"{e.runner_up_seconds * 1e3:.3g}" if e.runner_up_seconds else "",
            f"{e.default_seconds * 1e3:.3g}" if e.default_seconds else "failed",
            f"{e.error:.2g}",
            e.date[:10],
        )
    Console(markup=False).print(table)
