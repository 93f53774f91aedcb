"""Options of the test run: which backends, and how hard hypothesis looks."""

import os

import pytest

# JAX takes three quarters of a GPU that it finds unless told otherwise; here many processes share one.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def pytest_configure() -> None:
    """The same examples every time, few of them; HYPOTHESIS_PROFILE=thorough looks further.

    ``pytest-benchmark compare`` reads this file too, where hypothesis need not be.
    """
    import hypothesis

    hypothesis.settings.register_profile(
        "ci", max_examples=8, deadline=None, derandomize=True, database=None, print_blob=True
    )
    hypothesis.settings.register_profile("thorough", max_examples=200, deadline=None)
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--backend numba`` checks one backend; by default all that are installed, and the reference."""
    parser.addoption(
        "--backend", action="append", default=[], help="a backend to check, 'reference' among them; may be repeated"
    )
    parser.addoption(
        "--share",
        type=int,
        default=1,
        help="take every n-th case of each law, mixer, kernel, dtype and library, each from another start",
    )
    parser.addoption(
        "--most",
        type=int,
        default=0,
        help="leave out cases of laws with more tokens × heads × widths (16 at least) than this; 0 for no limit",
    )
