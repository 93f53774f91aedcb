"""Train, compare, save, load, go on, and speak: see the package."""

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.demo import text as texts
from benchmarks.demo.report import console, draw_curves, progress, table
from benchmarks.demo.training import BATCH, LENGTH, SIZES, Run, bits_on, optimizer_of, train, update
from mixers.nn import LanguageModel

MIXERS = ("lattice", "delta_rule", "attention")
PROMPT = b"def "
SAMPLE = 400


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument("--seconds", type=float, default=38.0, help="training time of each model")
    parser.add_argument("--steps", type=int, default=0, help="steps of each model, however long they take")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for the checkpoint and the curves")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    start = time.perf_counter()
    demo(arguments)
    console.print(f"{time.perf_counter() - start:.0f} s in all")


def demo(chosen: argparse.Namespace) -> None:
    """Everything."""
    out, device = chosen.out, chosen.device
    out.mkdir(parents=True, exist_ok=True)
    text = texts.standard_library()
    held_out = text.held_out_bytes
    bigram, lzma = texts.bigram_entropy(held_out), texts.lzma_bits(held_out)
    console.print(
        f"{len(text.train):,} bytes of the standard library's source to learn from, "
        f"{len(held_out):,} in {len(text.held_out)} files held out; "
        f"models of {SIZES['layers']} layers, width {SIZES['d_model']}, {SIZES['heads']} heads; "
        f"{torch.cuda.get_device_name() if device == 'cuda' else f'{torch.get_num_threads()} threads'}"
    )

    runs: list[Run] = []
    with progress() as bars:
        for mixer in MIXERS:
            bar = bars.add_task(mixer, total=chosen.steps or chosen.seconds, loss=8.0, rate=0.0)

            def report(run: Run, bar: Any = bar) -> None:
                show(bars, bar, run, len(run.losses) if chosen.steps else run.seconds[-1])

            model, optimizer, run = train(mixer, text, chosen.seconds, chosen.steps, device, report)
            run.bits = bits_on(model, text)
            runs.append(run)
            if mixer == MIXERS[0]:
                first = model
                model.save(out / f"{mixer}.pt", optimizer=optimizer.state_dict(), bits=run.bits)

    console.print(table(runs, bigram, lzma))
    for run in runs:
        console.print(run.kernels + f"\n  compiled and ran once in {run.warmup:.1f} s", style="dim")
    draw_curves(out / "curves.png", runs, bigram, lzma)
    record = {"bigram": bigram, "lzma": lzma, "runs": [vars(run) for run in runs]}
    (out / "runs.json").write_text(json.dumps(record, indent=1))
    console.print(f"\ncurves in {out / 'curves.png'}")
    resume(out / f"{MIXERS[0]}.pt", text, device)
    speak(first)


def show(bars: Any, bar: Any, run: Run, completed: float) -> None:
    """Move a bar."""
    recent = run.losses[-20:]
    bars.update(bar, completed=completed, loss=sum(recent) / len(recent), rate=run.tokens_per_second)


def resume(path: Path, text: texts.Text, device: str) -> None:
    """Load the checkpoint, see that it says the same, and learn on."""
    model, saved = LanguageModel.load(path, device)
    bits = bits_on(model, text)
    if abs(bits - saved["bits"]) > 1e-3:
        raise RuntimeError(f"the checkpoint says {bits:.4f} bits/byte, the model that wrote it {saved['bits']:.4f}")
    optimizer = optimizer_of(model)
    optimizer.load_state_dict(saved["optimizer"])
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        update(model, optimizer, text.draw(LENGTH, BATCH, generator), 5e-4)
    console.print(
        f"checkpoint {path}: loaded, {bits:.4f} bits/byte (saved with {saved['bits']:.4f}); "
        f"20 steps on: {bits_on(model, text):.4f}\n"
    )


def speak(model: LanguageModel) -> None:
    """Stream a sample: one state, one byte at a time."""
    device = model.embed.weight.device
    prompt = torch.tensor([[0, *PROMPT]], device=device)
    generator = torch.Generator(device).manual_seed(0)
    console.out(PROMPT.decode(), end="")
    start = time.perf_counter()
    for byte in model.stream(prompt, SAMPLE, temperature=0.7, generator=generator):
        console.out(chr(int(byte)), end="")
    console.print(f"\n\n{SAMPLE / (time.perf_counter() - start):,.0f} bytes/s streamed")


if __name__ == "__main__":
    main()
