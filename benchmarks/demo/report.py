"""What the demo shows: a progress bar, a table, and curves."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.demo.training import BYTES_PER_STEP, Run

console = Console(highlight=False, markup=False)  # [torch] is a name here, not a style


def progress() -> Progress:
    """A bar a model: time left, bits a byte, bytes a second."""
    return Progress(
        TextColumn("{task.description:<12}"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]:.2f} bits/byte  {task.fields[rate]:>7,.0f} bytes/s"),
        console=console,
    )


def smoothed(losses: Sequence[float]) -> np.ndarray:
    """A running mean over the last twentieth of the steps."""
    width = max(1, len(losses) // 20)
    padded = np.concatenate([np.full(width - 1, losses[0]), losses])
    return np.convolve(padded, np.full(width, 1 / width), mode="valid")


def table(runs: Sequence[Run], bigram: float, lzma: float) -> Table:
    """The models beside what they are measured against."""
    result = Table("", "bits/byte", "steps", "bytes/s", title="held-out files", title_justify="left")
    for run in runs:
        result.add_row(run.mixer, f"{run.bits:.3f}", f"{len(run.losses):,}", f"{run.tokens_per_second:,.0f}")
    result.add_section()
    result.add_row("byte-bigram entropy", f"{bigram:.3f}", "", "")
    result.add_row("lzma, which sees the files themselves", f"{lzma:.3f}", "", "")
    return result


def draw_curves(path: Path, runs: Sequence[Run], bigram: float, lzma: float) -> None:
    """Training loss against time and against bytes, as a PNG."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for run in runs:
        losses = smoothed(run.losses)
        label = f"{run.mixer}: {run.bits:.2f} held out"
        axes[0].plot(run.seconds, losses, label=label)
        axes[1].plot(np.arange(1, len(losses) + 1) * BYTES_PER_STEP, losses)
    for axis, name in zip(axes, ("seconds of training", "bytes seen"), strict=True):
        axis.axhline(bigram, color="gray", linestyle="--", linewidth=1)
        axis.axhline(lzma, color="gray", linestyle=":", linewidth=1)
        axis.set_xlabel(name)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].annotate("byte-bigram entropy", (0, bigram), (4, 3), textcoords="offset points", color="gray")
    axes[0].annotate("lzma", (0, lzma), (4, 3), textcoords="offset points", color="gray")
    axes[0].set_ylabel("bits a byte")
    axes[0].set_ylim(min(lzma, *(run.bits for run in runs)) - 0.2, 6)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)
