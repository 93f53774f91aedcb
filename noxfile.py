"""Environments and what runs in them, with the versions of constraints.txt.

nox                   lint, types, every backend's tests, and with those of jax the site and its code blocks
nox -s demo           train a small Lattice model on this machine
nox -s bench -- ARGS  benchmarks; ARGS go to pytest
nox -s dist           wheel and source archive into dist/; the wheel is the same bytes from the same commit
nox -s docs           the site, and every code block of it and of the README; `-- serve` shows it
"""

import os
import tempfile
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["lint", "types", "tests"]
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "no" if "CI" in os.environ else "yes"

# Pinned; and bytecode is left to be written for what is imported, which is a small part of torch.
PINS = ("--no-compile", "-c", "constraints.txt")

# What each session installs, and no more, so that a stray import of another library fails; and what it checks. torch
# brings autodiff, so its session checks what gradients are compared with; what NumPy alone tells is left to the session
# without it. XLA compiles seconds for a case, so few are checked with it. Triton's kernels run in its interpreter and
# those of CUDA in Numba's simulator, where a case takes seconds. `--share n` takes every n-th case of the laws, another
# part for every kernel and dtype: `pytest tests` without it takes them all, which lasts an hour.
LAWS = ("tests/conformance/test_laws.py", "tests/conformance/test_device.py")
SHIPPED = "tests/autotune/test_shipped.py"
SIMULATED = (
    *(*LAWS, "tests/test_triton.py", "tests/test_primitives.py", "tests/test_readme.py", SHIPPED),
    *("--most", "16000"),
)
SIMULATED_CUDA = (
    *(*LAWS, "tests/test_cuda.py", "tests/test_cuda_arrays.py", "tests/test_steps.py"),
    *("--most", "16000"),
)
WITHOUT_TORCH = tuple(
    f"--ignore=tests/{file}.py"
    for file in (
        *("conformance/test_bits", "conformance/test_long", "autotune/test_batch_invariant", "autotune/test_profile"),
        *("test_numba_cache", "test_packaging", "test_threads"),
    )
)
CHOSEN_IN_XLA = (
    "test_jax or test_nnx or imports or jax_runs or takes_jax or other_arrays "
    "or float32 and not jax/steps and not jax/composed"
)
IN_XLA = (
    *(LAWS[0], "tests/conformance/test_imports.py", "tests/test_jax.py", "tests/test_nnx.py", "--backend", "jax"),
    *("tests/test_hybrid.py", "tests/test_cli.py", "tests/autotune/test_tuner.py"),  # for what needs JAX there
    *("--share", "1500", "--most", "20000", "-k", CHOSEN_IN_XLA),
)
SIMULATORS = {"triton": {"TRITON_INTERPRET": "1"}, "cuda": {"NUMBA_ENABLE_CUDASIM": "1"}}
# The site asks every backend's kernels and runs blocks of every library; it is built where most of these are at hand.
SITE = "[torch,triton,flax,docs]"
TESTS = {
    "numba": ("", ("tests", "--backend", "reference", "--backend", "numba", "--share", "128")),
    "torch": ("[torch]", ("tests", "--share", "1500", *WITHOUT_TORCH)),
    "jax": (SITE, IN_XLA),
    "triton": ("[triton]", (*SIMULATED, "--backend", "triton", "--share", "500")),
    "cuda": ("[torch,cuda]", (*SIMULATED_CUDA, "--backend", "cuda", "--share", "300")),
}

# What `nox` compiles of the GPUs' kernels: CUDA's in every dtype for two generations of GPUs, and for time a part of
# Triton's; `nox -s ptx` compiles them all. Shipped profiles are looked at beside CUDA's, as its simulator has
# configurations of its own.
COMPILED = {"cuda": (SHIPPED,), "triton": ("-k", "gated_delta_rule or lattice or ttt")}

# Two processes of tests share the cores: threads that wait must not spin, and torch needs no more than one a process.
SHARED_CORES = {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}


@nox.session
@nox.parametrize("backend", list(TESTS), ids=list(TESTS))
def tests(session: nox.Session, backend: str) -> None:
    """The test suite against one backend, with only its extra installed."""
    extra, options = TESTS[backend]
    session.install(*PINS, "-e", f".{extra}", "pytest", "pytest-xdist", "hypothesis")
    # Tests of a kernel stay together where it is compiled; a simulator compiles nothing, so there its cores share all.
    run = ("pytest", "-n", "2", "--dist", "worksteal" if backend in SIMULATORS else "loadgroup", *options)
    session.run(*run, *session.posargs, env=SHARED_CORES | SIMULATORS.get(backend, {}))
    if backend in COMPILED:
        compile_kernels(session, backend, *COMPILED[backend])
    if backend == "jax":
        build_site(session)
        run_blocks(session)


@nox.session
def ptx(session: nox.Session) -> None:
    """Every GPU kernel compiled on a machine that needs none."""
    session.install(*PINS, "-e", ".[torch,triton,cuda]", "pytest", "pytest-xdist", "hypothesis")
    for backend in COMPILED:
        compile_kernels(session, backend, *session.posargs)


def compile_kernels(session: nox.Session, backend: str, *options: str) -> None:
    """A backend's kernels as machine code or PTX, with checks of what is in it."""
    session.run("pytest", "-n", "2", f"tests/test_{backend}_compiles.py", *options, env=SHARED_CORES)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and layout of the source."""
    session.install(*PINS, "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Types of the package as a user gets it: the wheel, seen from outside of the checkout."""
    session.install(*PINS, "build", "mypy")
    settings = Path("pyproject.toml").resolve()
    with tempfile.TemporaryDirectory() as elsewhere:
        session.run("python", "-m", "build", "--outdir", elsewhere, silent=True)
        (wheel,) = Path(elsewhere).glob("*.whl")
        session.install(*PINS, f"{wheel}[torch,jax]")
        session.install("--force-reinstall", "--no-deps", str(wheel))  # of the same version, yet another one
        with session.chdir(elsewhere):
            session.run("mypy", "--strict", "-p", "mixers", "--config-file", str(settings))


@nox.session
def dist(session: nox.Session) -> None:
    """The wheel and the source archive of this commit, dated as it is."""
    session.install(*PINS, "build")
    date = session.run("git", "log", "-1", "--format=%ct", external=True, silent=True)
    session.run("python", "-m", "build", env={"SOURCE_DATE_EPOCH": str(date).strip()})


@nox.session
def demo(session: nox.Session) -> None:
    """Train byte-level language models on the standard library's source and compare them."""
    session.install(*PINS, "-e", ".[torch]", "matplotlib")
    session.run("python", "-m", "benchmarks.demo", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site, warnings being errors, and run its code blocks; or build it and ``serve`` or ``walk`` it."""
    session.install(*PINS, "-e", f".{SITE}")
    build_site(session)
    if "serve" in session.posargs:
        session.run("python", "-m", "http.server", "--directory", "docs/built", "--bind", "127.0.0.1", "8000")
    elif "walk" in session.posargs:
        session.install(*PINS, "selenium")
        session.run("python", "docs/walk.py")
    else:
        run_blocks(session)


def build_site(session: nox.Session) -> None:
    """The site in ``docs/built``; a warning is an error."""
    session.run("sphinx-build", "-W", "--keep-going", "-q", "docs", "docs/built")


def run_blocks(session: nox.Session) -> None:
    """Every Python block of the README and of the site."""
    blocks = ("-p", "docs.blocks", "README.md", "docs", "--ignore", "docs/built")
    session.run("python", "-m", "pytest", *blocks, env=SHARED_CORES)


@nox.session
def bench(session: nox.Session) -> None:
    """Benchmarks beside what a user would write instead."""
    session.install(*PINS, "-e", ".[torch,jax,bench]")
    session.run("pytest", "benchmarks/test_mixers.py", "--benchmark-autosave", *session.posargs)
