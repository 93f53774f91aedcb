"""Make the profile that is shipped for this machine's device: every mixer, forward and backward.

    python -m benchmarks.ship autotune/profiles/h200.toml --device cuda --seconds 110
    python -m benchmarks.ship autotune/profiles/x86_64.toml

Every problem is tuned into a profile of its own, which is then written for the device's family, without the candidates
that lost. What is there already stays where nothing newer was measured.
"""

import argparse
import dataclasses
import os
import tempfile
import time
from pathlib import Path

from mixers.autotune.device import device_of_kind
from mixers.autotune.profile import Entry, Profile, config_text
from mixers.autotune.tuner import problem_of, tune_problems

import mixers
from mixers.problem import Problem

# (B, T, H, K, V): as many heads as multiprocessors or more, and few.
SHAPES = {"cuda": ((8, 2048, 16, 64, 64), (2, 4096, 16, 128, 128)), "cpu": ((1, 1024, 8, 64, 64),)}
DTYPES = {"cuda": "bfloat16", "cpu": "float32"}
CHUNKS = (1, 16)


def problems(device: str, names: list[str], dtype: str, shapes: tuple[tuple[int, ...], ...]) -> list[Problem]:
    """What is tuned, what matters most first: for each shape every mixer as it is by default, and as layers use it.

    Where chunks belong to the model, each of them is a problem; a composition's parts run as they do alone.
    """
    library, found = "torch" if device == "cuda" else "numpy", list[Problem]()
    for shape in shapes:
        for extra in ({}, {"qk_l2norm": True}):
            for spec in map(mixers.get_spec, names or mixers.names()):
                known = {option.name for option in spec.options}
                if spec.compose is None and spec.specialise is None and extra.keys() <= known:
                    for chunk in ({"chunk_size": c} for c in CHUNKS) if "chunk_size" in known else ({},):
                        options = spec.resolve(extra | chunk)
                        b, t, h, k, v = shape
                        found.append(problem_of(spec, (b, t, h, k, v), dtype, library, device, True, (), options))
    return found


def main() -> None:
    """Tune and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="")
    parser.add_argument("--seconds", type=float, default=600.0, help="stop before the first problem that begins later")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds a problem")
    parser.add_argument("--shape", action="append", default=[], help="B,T,H,K,V; may be repeated")
    parser.add_argument("--mixer", action="append", default=[], help="all by default; may be repeated")
    given = parser.parse_args()
    shapes = tuple(tuple(map(int, text.split(","))) for text in given.shape) or SHAPES[given.device]
    todo = problems(given.device, given.mixer, given.dtype or DTYPES[given.device], shapes)
    start, entries = time.monotonic(), list[Entry]()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MIXERS_PROFILE"] = str(Path(folder) / "profile.toml")

        def write(found: list[Entry]) -> None:
            family = device_of_kind(given.device).family
            shipped = [dataclasses.replace(e, device=family, stamp="", trials=()) for e in found]
            before = Profile.parse(given.path.read_text()) if given.path.exists() else Profile()
            given.path.parent.mkdir(parents=True, exist_ok=True)
            given.path.write_text(before.merged(shipped).text())

        def told(found: list[Entry]) -> bool:
            for e in found:
                entries.append(e)
                gain = e.default_seconds / e.seconds
                chosen = f"{e.kernel} {config_text(e.config)} {e.seconds * 1e3:.3f} ms, {gain:.2f}x"
                print(f"{time.monotonic() - start:5.0f}s {e.key} x{e.heads}: {chosen}")
            write(entries)
            return time.monotonic() - start < given.seconds

        tune_problems(todo, budget=given.budget, done=told)
    print(f"{len(entries)} entries in {given.path}, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
