"""The README's table is what specifications and kernels declare. docs/blocks.py runs the code."""

import contextlib
import functools
import re
import tomllib
from pathlib import Path

import mixers
from mixers.backend import installed
from mixers.check import forms

README = Path(__file__).parents[1] / "README.md"


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
        ways = [forms(kernels, name) for kernels in backends.values()]
        rows.append([f"`{name}`", ", ".join(takes), chunk, "yes", *(", ".join(form) or "no" for form in ways)])
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
