"""What this site takes from declarations and from committed measurements, written before Sphinx reads its sources.

    specification  →  made/mixers/<name>.md        a page a mixer
    kernels        →  made/support.part.md         what runs where
    results/*.json →  made/performance/*.part.md   tables, and pictures beside them
    …/evidence/*.json → made/evidence/*.part.md    the same, of experiments

A new mixer, kernel, option or result changes the site and needs no edit here.
"""

from pathlib import Path
from typing import Any

from pages import evidence, measured, mixer, performance, support
from pages.mathml import register

MADE = Path(__file__).parents[1] / "made"


def write(folder: Path = MADE) -> list[Path]:
    """Write every page that is made, and say which."""
    results = measured.load()
    pages = mixer.pages(results) | {"support.part.md": support.overview()} | performance.parts(results, folder)
    pages |= evidence.parts(folder)
    written = []
    for name, text in pages.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # Sphinx reads again what is newer than what it built.
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        written.append(path)
    return written


def setup(app: Any) -> dict[str, Any]:
    """Sphinx calls this."""
    app.connect("builder-inited", lambda app: write())
    register(app)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
