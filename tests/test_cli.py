"""The command ``mixers``."""

import sys
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

import mixers
from mixers import check
from mixers.backend import backend_status
from mixers.cases import settings
from mixers.check import Case
from mixers.check.verdict import Verdict
from mixers.cli import app
from mixers.registry import get_spec

SHAPE = "1,1024,8,64,64"


def run(*arguments: str) -> tuple[int, str]:
    """The exit code and everything that is printed, line breaks taken out of boxes."""
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_list_names_every_mixer_with_its_inputs() -> None:
    code, text = run("list")
    assert code == 0
    for name in mixers.names():
        assert f" {name} " in text
    for line in ("log_decay?", "token_scale?"):
        assert line in text


def test_info_tells_versions_and_every_backend() -> None:
    code, text = run("info")
    assert code == 0
    assert mixers.__version__ in text
    assert sys.version.split()[0] in text
    for name in backend_status():
        assert name in text


def test_info_says_why_a_backend_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, text = run("info")
    assert code == 0
    assert "numba is not installed: pip install numba" in text
    assert "'sequence-mixers[jax]'" in text  # no style of the terminal's


@pytest.mark.parametrize("name", mixers.names())
def test_explain_marks_one_choice_and_lists_the_reference(name: str) -> None:
    code, text = run("explain", name, "--shape", SHAPE, "--dtype", "float64")
    assert code == 0
    assert f"{name} (B=1, T=1024, H=8, K=64, V=64), float64 numpy arrays on cpu" in text
    assert text.count("→") == 1
    assert "reference" in text


def test_explain_takes_options_and_torch() -> None:
    pytest.importorskip("torch")
    arguments = ("--shape", SHAPE, "--dtype", "bfloat16", "--library", "torch")
    code, text = run("explain", "lattice", *arguments, "-o", "chunk_size=16", "-o", "objective=encoding")
    assert code == 0
    assert "bfloat16 torch arrays on cpu" in text


def test_explain_takes_jax() -> None:
    pytest.importorskip("jax")
    code, text = run("explain", "lattice", "--shape", SHAPE, "--library", "jax")
    assert code == 0
    assert "float32 jax arrays on" in text


def test_explain_refuses_a_device_that_is_not_there() -> None:
    pytest.importorskip("torch")
    code, text = run("explain", "lattice", "--shape", SHAPE, "--library", "torch", "--device", "nowhere")
    assert code == 2
    assert "nowhere" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("latice", "--shape", SHAPE), "did you mean 'lattice'?"),
        (("lattice", "--shape", "1,1024,8,64"), "expected B,T,H,K,V"),
        (("lattice", "--shape", SHAPE, "-o", "chunk=4"), "did you mean 'chunk_size'?"),
        (("lattice", "--shape", SHAPE, "-o", "chunk_size"), "expected name=value"),
        (("lattice", "--shape", SHAPE, "-o", "chunk_size=0"), "expected a whole number from 1 up"),
        (("lattice", "--shape", SHAPE, "--dtype", "int8"), "expected one of float64"),
        (("lattice", "--shape", SHAPE, "--dtype", "bfloat16"), "NumPy has no bfloat16"),
        (("lattice", "--shape", SHAPE, "--library", "cupy"), "expected numpy, torch or jax"),
        (("ttt_linear", "--shape", "1,16,2,8,4"), "one width for keys and values"),
    ],
)
def test_explain_refuses_in_words(arguments: tuple[str, ...], message: str) -> None:
    code, text = run("explain", *arguments)
    assert code == 2
    assert message in text


def test_check_passes_and_says_how_near_the_limit_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    def few(backend: str, *, mixers: tuple[str, ...]) -> Iterator[Case]:
        spec = get_spec(mixers[0])
        for kernel in check.kernels(backend, spec.name):
            yield Case("truth", settings(spec)[0], backend, kernel, "float64", check.own_library(kernel))

    monkeypatch.setattr(check, "cases", few)
    code, text = run("check", "linear_attention")
    assert code == 0, text
    rows = [line.split() for line in text.splitlines() if line.strip().startswith("linear_attention")]
    assert {row[1].split("/")[0] for row in rows} == {name for name, works in backend_status().items() if works}
    for _, _, cases, ratio, verdict in rows:
        assert (cases, verdict) == ("1", "pass")
        assert 0 <= float(ratio) <= 1


def test_check_fails_loudly_where_a_kernel_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("truth", settings(mixers.get_spec("gla"))[0], "reference", None, "float64")
    monkeypatch.setattr(check, "cases", lambda backend, *, mixers: [case] if backend == "reference" else [])
    monkeypatch.setattr(Case, "run", lambda self: Verdict(3.0, "y: error 3, allowed 1"))
    code, text = run("check")
    assert code == 1
    assert "1 FAIL" in text
    assert "y: error 3, allowed 1" in text
    assert "truth: gla on reference" in text


def test_check_refuses_an_unknown_mixer() -> None:
    code, text = run("check", "gal")
    assert code == 2
    assert "did you mean 'gla'?" in text
