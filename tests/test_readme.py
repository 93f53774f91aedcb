"""What the README prints is true: its code runs as printed, its table is what specifications and kernels declare."""

import contextlib
import functools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import mixers
from mixers.backend import Kernel, installed

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(), flags=re.MULTILINE | re.DOTALL)
ADD = next(i for i, block in enumerate(BLOCKS) if "mixers.register(" in block)

# The kernel's page continues the mixer's.
PROGRAMS = [*BLOCKS[:ADD], "\n".join(BLOCKS[ADD:])]


def _title(program: str) -> str:
    return "extend" if "mixers.register(" in program else re.findall(r'mixers\.get\("(\w+)"', program)[0]


@pytest.mark.parametrize("program", PROGRAMS, ids=[f"{i}-{_title(p)}" for i, p in enumerate(PROGRAMS)])
def test_examples_run_as_printed(program: str, tmp_path: Path) -> None:
    for library in ("torch", "jax"):
        if f"import {library}\n" in program:
            pytest.importorskip(library)
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for printed in re.findall(r"^print\(.*?\)\s+# (\(.*)$", program, flags=re.MULTILINE):
        assert printed in done.stdout


def test_there_are_examples_for_torch_numpy_streaming_jax_and_extending() -> None:
    assert len(PROGRAMS) == 5
    assert ["import torch" in program for program in PROGRAMS] == [True, False, False, False, False]
    assert "mix.step(" in PROGRAMS[2]
    assert "import jax" in PROGRAMS[3]


@functools.cache
def loadable() -> tuple[str, ...]:
    """Backends whose kernels can be imported here."""
    found = []
    for name, backend in installed().items():
        with contextlib.suppress(ImportError):
            backend.kernels()
            found.append(name)
    return tuple(found)


def without(table: str, columns: set[str]) -> str:
    """The table without some backends."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    kept = [i for i, title in enumerate(rows[0]) if title.strip("`") not in columns]
    return "\n".join("| " + " | ".join(row[i] for i in kept) + " |" for row in rows)


def forms_of(name: str, kernels: tuple[Kernel, ...]) -> list[str]:
    """How a backend runs a mixer: the forms of its kernels, or composed of the kernels of its parts."""
    own = list(dict.fromkeys(k.form for k in kernels if name in k.mixers))
    spec, options = mixers.get(name).spec, mixers.get(name).options
    parts = spec.compose is not None and all(any(p.name in k.mixers for k in kernels) for p, _ in spec.parts(options))
    return own + ["composed"] * bool(parts)


def declared_table() -> str:
    """Mixers × backends as the README prints it."""
    ours = tomllib.loads((README.parent / "pyproject.toml").read_text())["project"]["entry-points"]["mixers.backends"]
    backends = {name: installed()[name].kernels() for name in ours if name in loadable()}
    rows = [
        ["mixer", "takes beside `q, k, v`", "chunks", "`reference`", *(f"`{name}`" for name in backends)],
        ["---"] * (4 + len(backends)),
    ]
    for name in mixers.names():
        spec = mixers.get_spec(name)
        takes = [f"`{a.name}`" + (" (optional)" if a.optional else "") for a in (*spec.inputs[3:], *spec.parameters)]
        chunk = "exact" if spec.exact_in_chunks else "part of the model"
        forms = [forms_of(name, kernels) for kernels in backends.values()]
        rows.append([f"`{name}`", ", ".join(takes), chunk, "yes", *(", ".join(form) or "no" for form in forms)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def test_the_table_is_what_specifications_and_kernels_declare() -> None:
    printed = README.read_text().split("this table with the declarations -->\n")[1].split("\n<!-- end of table -->")[0]
    printed = without(printed, set(installed()) - set(loadable()))
    wanted = without(declared_table(), set())
    assert printed == wanted, f"the README's table should be\n{wanted}"


def test_every_file_that_the_readme_shows_exists() -> None:
    shown = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    assert shown
    for path in shown:
        assert (README.parent / path).is_file(), path
