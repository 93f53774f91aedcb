"""Runs every Python block of the README and of this site: ``python -m pytest -p docs.blocks README.md docs``.

A page is one program: its blocks share names, and what it registers is gone on the next page. Where a line is
``print(…)  # (…`` that must be what it printed. A comment in front of a block marks what it needs:

    <!-- skip: next if(missing("flax"), reason="needs flax") -->
"""

import contextlib
import importlib.util
import io
import os
import re
from pathlib import Path
from typing import Any

from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, SkipParser

from mixers import registry
from mixers.backend import installed

# XLA then shows a CPU as two devices, for blocks that spread an array over several.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")

PRINTED = re.compile(r"^print\(.*?\)\s+# (\(.*)$", flags=re.MULTILINE)
_known: dict[str, dict[str, Any]] = {}


def run(example: Example) -> None:
    """Run a block and compare what it printed with what it says that it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        PythonEvaluator()(example)
    for line in PRINTED.findall(example.parsed):
        assert line in out.getvalue(), f"printed {out.getvalue()!r}, and the page says {line!r}"


def begin(namespace: dict[str, Any]) -> None:
    """What a page may ask, and what is registered before it."""
    namespace["missing"] = lambda package: importlib.util.find_spec(package) is None
    _known.update(mixers=dict(registry._SPECS), backends=dict(installed()))


def end(namespace: dict[str, Any]) -> None:
    """Forget what the page has registered."""
    for table, before in ((registry._SPECS, _known["mixers"]), (installed(), _known["backends"])):
        table.clear()
        table.update(before)


pytest_collect_file = Sybil(
    parsers=[CodeBlockParser(language="python", evaluator=run), SkipParser()],
    patterns=["README.md", "docs/*.md", "docs/made/mixers/*.md"],
    path=str(Path(__file__).parents[1]),
    setup=begin,
    teardown=end,
).pytest()
