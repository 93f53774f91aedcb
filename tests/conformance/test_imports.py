"""Law 8, and who may import whom: backends → mixers, autotune → mixers, mixers.mixer → autotune, nothing else."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mixers
from mixers.backend import installed

PACKAGE = Path(mixers.__file__).parent
HEAVY = {"torch", "jax", "triton", "numba"}


def modules() -> list[tuple[str, Path]]:
    """Every module of the core, by its name."""
    return [
        (".".join(("mixers", *file.relative_to(PACKAGE).with_suffix("").parts)), file)
        for file in sorted(PACKAGE.rglob("*.py"))
        if file.relative_to(PACKAGE).parts[0] not in ("backends", "autotune")
    ]


def imports(file: Path, always: bool) -> set[str]:
    """What a file imports: everything, or only what it imports whenever it is imported itself."""
    found = set()
    tree = ast.parse(file.read_text())
    nodes = [n for top in tree.body if not isinstance(top, ast.If) for n in ([top] if always else ast.walk(top))]
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize(("name", "file"), modules(), ids=[name for name, _ in modules()])
def test_the_core_knows_no_backend(name: str, file: Path) -> None:
    for other in imports(file, always=False):
        assert not other.startswith("mixers.backends"), f"{name} imports {other}"
        if other.startswith("mixers.autotune"):
            assert name == "mixers.mixer", f"{name} imports {other}: the choice is made in mixers.mixer alone"


@pytest.mark.parametrize(("name", "file"), modules(), ids=[name for name, _ in modules()])
def test_only_arrays_and_layers_import_a_framework(name: str, file: Path) -> None:
    if name.startswith(("mixers.arrays.", "mixers.nn")):
        return
    heavy = {other for other in imports(file, always=True) if other.split(".")[0] in HEAVY}
    assert not heavy, f"{name} imports {sorted(heavy)}"


def test_backends_do_not_import_one_another() -> None:
    for name, backend in installed().items():
        home = Path(sys.modules[type(backend).__module__].__file__ or "").parent
        for file in home.rglob("*.py"):
            others = {o for o in imports(file, always=False) if o.startswith(("mixers.backends", "mixers.autotune"))}
            assert not others, f"{file.name} of {name} imports {sorted(others)}"


def test_import_is_light_and_quick() -> None:
    """None of the frameworks comes with it, and the quickest of three takes well under a second."""
    program = (
        "import sys, time; start = time.process_time(); import mixers\n"
        "took = time.process_time() - start\n"
        "heavy = [m for m in ('torch', 'jax', 'triton', 'numba', 'numba.cuda') if m in sys.modules]\n"
        "print(took, *heavy)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True) for _ in range(3)
    ]
    found = [run.stdout.split() for run in runs]
    assert all(len(run) == 1 for run in found), found
    assert min(float(run[0]) for run in found) < 0.5


def test_backends_are_light_until_a_plan_is_made() -> None:
    """Asking what is installed, and whether it works, compiles and imports nothing."""
    program = (
        "import sys, mixers; mixers.backend_status(); mixers.names(); mixers.get('lattice')\n"
        "print(*[m for m in ('torch', 'jax', 'triton', 'numba') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
