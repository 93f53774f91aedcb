"""Tables and links of Markdown."""

import re
import textwrap
from collections.abc import Iterable, Sequence


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; a bar inside of a cell stays in its cell."""
    lines = [list(headers), ["---"] * len(headers), *map(list, rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def code(text: object) -> str:
    """Set as code."""
    return f"`{text}`"


def link_papers(text: str) -> str:
    """Every ``arXiv 2504.05646`` as a link."""
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def docstring(text: str) -> str:
    """A docstring: what is indented stays as it is set, the rest is prose."""
    found: list[str] = []
    for block in text.split("\n\n"):
        if not all(line.startswith("    ") for line in block.splitlines()):
            found.append(link_papers(block.replace("``", "`").replace("*", "\\*")))
        elif found and found[-1].endswith("\n```"):
            found[-1] = found[-1].removesuffix("\n```") + f"\n\n{textwrap.dedent(block)}\n```"
        else:
            found.append(f"```text\n{textwrap.dedent(block)}\n```")
    return "\n\n".join(found)


def duration(seconds: float) -> str:
    """Seconds in the unit that reads best, on one line."""
    if seconds >= 1:
        return f"{seconds:.3g}\N{NO-BREAK SPACE}s"
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.3g}\N{NO-BREAK SPACE}ms"
    return f"{seconds * 1e6:.3g}\N{NO-BREAK SPACE}µs"


def quantity(number: float) -> str:
    """A whole number with its thousands apart."""
    return f"{number:,.0f}".replace(",", "\N{NO-BREAK SPACE}")
