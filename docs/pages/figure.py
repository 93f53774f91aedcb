"""Pictures as SVG: the same picture from the same numbers."""

from pathlib import Path
from typing import Any


def figure(rows: int = 1, columns: int = 1, **how: Any) -> Any:
    """A drawing and its axes, an array where there are several."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "mixers"
    from matplotlib import pyplot

    size = (8, 4.8) if rows == columns == 1 else (4.8 * columns, 3.8 * rows)
    return pyplot.subplots(rows, columns, figsize=size, layout="constrained", **how)


def save(drawing: Any, path: Path) -> None:
    """Write it and let it go."""
    from matplotlib import pyplot

    drawing.savefig(path, metadata={"Date": None})
    pyplot.close(drawing)
