"""What is worth trying of a mixer, read from its specification alone.

A ``Setting`` is one way to call a mixer: its options, which arrays are passed and with which axes, sizes, how sequences
lie, how they start, and where gradients come from. ``settings`` covers every pair of choices at least once,
``hard_settings`` every pair of an option and an input that breaks careless kernels, ``wide_settings`` the widest heads.
``draw`` makes the arrays.
"""

import dataclasses
import itertools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mixers import reference
from mixers.arrays.numpy import fill_first_state
from mixers.arrays.numpy import library as host
from mixers.problem import Flags, outputs
from mixers.spec import Arg, MixerSpec, Sizes

Named = dict[str, np.ndarray]


@dataclass(frozen=True)
class Setting:
    """One way to call a mixer, without its numbers.

    Attributes:
        spec: the mixer.
        options: the options that differ from their defaults.
        arrays: the axes of every input and parameter that is passed.
        groups: key heads.
        heads: value heads.
        key_dim: width of keys.
        value_dim: width of values.
        lengths: tokens of each sequence; all the same unless they are packed.
        packed: the sequences lie in one row.
        initial: ``none``, ``given`` (one a sequence) or ``shared``.
        checkpoint_every: as in a call; 0 for none.
        flow: gradients come from ``y`` alone, or from ``all`` outputs.
        hard: the name of one of ``HARD``, or empty.
        seed: of the random numbers.
    """

    spec: MixerSpec
    options: tuple[tuple[str, Any], ...] = ()
    arrays: tuple[tuple[str, str], ...] = ()
    groups: int = 2
    heads: int = 2
    key_dim: int = 7
    value_dim: int = 5
    lengths: tuple[int, ...] = (9, 9)
    packed: bool = False
    initial: str = "none"
    checkpoint_every: int = 0
    flow: str = "y"
    hard: str = ""
    seed: int = 0

    @property
    def resolved(self) -> dict[str, Any]:
        """Every option."""
        return self.spec.resolve(dict(self.options))

    def sizes(self) -> Sizes:
        """The length of every axis."""
        batch, tokens = (1, sum(self.lengths)) if self.packed else (len(self.lengths), self.lengths[0])
        return Sizes(
            B=batch,
            T=tokens,
            G=self.groups,
            H=self.heads,
            K=self.key_dim,
            V=self.value_dim,
            N=len(self.lengths),
            C=self.spec.chunk(self.resolved),
            W=max(0, self.resolved.get("window", 0) - 1),
            J=self.groups,
            A=self.groups,
            D=self.heads,
            E=self.key_dim,
        )

    def __str__(self) -> str:
        lengths = f"B={len(self.lengths)} T={self.lengths[0]}"
        parts = [
            *(f"{name}={value}" for name, value in self.options),
            *(
                f"{name}[{axes.replace(' ', '')}]"
                for name, axes in self.arrays
                if self.spec.arg(name).optional or len(self.spec.arg(name).layouts) > 1
            ),
            "pack=" + "+".join(map(str, self.lengths)) if self.packed else lengths,
            f"G={self.groups} H={self.heads} K={self.key_dim} V={self.value_dim}",
            *([] if self.initial == "none" else [f"{self.initial} state"]),
            *([f"checkpoints={self.checkpoint_every}"] if self.checkpoint_every else []),
            *([] if self.flow == "y" else ["all gradients"]),
            *([self.hard] if self.hard else []),
        ]
        return " ".join(parts)


# Sizes below 16, above 128, no power of two, K and V apart; a tile wide, and one more.
WIDTHS = ((7, 5), (1, 3), (16, 33), (36, 132), (131, 6))
WIDEST = ((256, 256), (160, 224), (256, 40))
LENGTHS = ((9, 9, 9), (1,), (37, 37), (131,), (0, 0))
PACKS = ((5, 0, 1, 23, 0), (0, 17, 2, 40))
HEADS = ((1, 1), (2, 2), (1, 3), (2, 4))


def settings(spec: MixerSpec) -> tuple[Setting, ...]:
    """Ways to call a mixer such that any two choices meet in one of them.

    Where a chunk is part of the model, so for the exact form and for the chunked ones apart: other kernels run them.
    """
    factors: dict[str, Sequence[Any]] = {
        "heads": HEADS,
        "widths": WIDTHS,
        "lengths": (*((False, lengths) for lengths in LENGTHS), *((True, lengths) for lengths in PACKS)),
        "initial": ("none", "given", "shared"),
        "checkpoint_every": (0, 1, 6),
        "flow": ("y", "all"),
    }
    rows = [row for model in _model_factors(spec) for row in cover(model | factors)]
    return tuple(_setting(spec, row, seed) for seed, row in enumerate(rows))


def hard_settings(spec: MixerSpec) -> tuple[Setting, ...]:
    """Every hard input that concerns the mixer, with its options covered in pairs."""
    names = [name for name, hard in HARD.items() if hard.draws & {arg.draw for arg in (*spec.inputs, *spec.parameters)}]
    factors: dict[str, Sequence[Any]] = {"hard": tuple(names), "initial": ("none", "given"), "flow": ("y", "all")}
    fixed = {"widths": (20, 17), "lengths": (False, (71,)), "heads": (1, 2)}
    found = []
    for seed, row in enumerate(row for model in _model_factors(spec) for row in cover(model | factors)):
        setting = _setting(spec, row | fixed, seed)
        hard = HARD[setting.hard]
        concerned = hard.draws & {spec.arg(name).draw for name, _ in setting.arrays}
        if concerned and not (hard.ties and setting.spec.picks(setting.resolved)):
            found.append(setting)
    return tuple(found)


def wide_settings(spec: MixerSpec) -> tuple[Setting, ...]:
    """Heads up to the widest that kernels promise: what has to be passed, exact and in chunks."""
    chunks = next((o.trials for o in spec.options if o.name == "chunk_size"), ())
    options = [{"chunk_size": c} for c in (*chunks[:1], *chunks[-1:])] or [{}]
    widths = dict.fromkeys(_widths(spec, pair) for pair in WIDEST)
    return tuple(
        dataclasses.replace(long_setting(spec, o, 70), key_dim=k, value_dim=v, initial="given", hard="", seed=seed)
        for seed, (o, (k, v)) in enumerate(itertools.product(options, widths))
    )


def long_setting(spec: MixerSpec, options: Mapping[str, Any], tokens: int = 16384) -> Setting:
    """Many tokens, few and small heads; the longest memory: nothing decays by much."""
    arrays = tuple((arg.name, " ".join(arg.layouts[0])) for arg in (*spec.inputs, *spec.parameters) if not arg.optional)
    widths = _widths(spec, (12, 9))
    return Setting(
        spec, tuple(options.items()), arrays, 1, 2, *widths, lengths=(tokens,), flow="all", hard="long", seed=1
    )


def _model_factors(spec: MixerSpec) -> list[dict[str, Sequence[Any]]]:
    """Options and layouts worth trying; the chunked forms apart from the exact one."""
    factors: dict[str, Sequence[Any]] = {f"option {o.name}": o.trials for o in spec.options if o.trials}
    for arg in (*spec.inputs, *spec.parameters):
        layouts = [" ".join(layout) for layout in arg.layouts]
        # Decisions are always forced: two kernels that differ in the last bits may decide otherwise.
        factors[f"array {arg.name}"] = tuple(layouts + [""] * (arg.optional and not arg.flag))
    chunks = factors.get("option chunk_size", ())
    exact, chunked = [c for c in chunks if c == 1], [c for c in chunks if c != 1]
    return [factors | {"option chunk_size": part} for part in (exact, chunked) if part] or [factors]


def _setting(spec: MixerSpec, row: Mapping[str, Any], seed: int) -> Setting:
    packed, lengths = row["lengths"]
    groups, heads = row["heads"]
    key_dim, value_dim = _widths(spec, row["widths"])
    options = tuple((key.split()[1], value) for key, value in row.items() if key.startswith("option "))
    return Setting(
        spec if spec.specialise is None else spec.specialise(spec.resolve(dict(options))),
        options,
        tuple((key.split()[1], axes) for key, axes in row.items() if key.startswith("array ") and axes),
        groups,
        heads,
        key_dim,
        value_dim,
        lengths,
        packed,
        row["initial"],
        row.get("checkpoint_every", 0),
        row["flow"],
        row.get("hard", ""),
        seed,
    )


def _widths(spec: MixerSpec, widths: tuple[int, int]) -> tuple[int, int]:
    """Key and value width; the wider of the two for both where a mixer wants them equal."""
    return widths if spec.arg("v").layouts[0][-1] == "V" else (max(widths), max(widths))


_Row = tuple[tuple[str, int], ...]
_Pair = tuple[tuple[str, int], tuple[str, int]]


def cover(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Rows that take one value of every factor, such that any two values of two factors share a row.

    Greedy: each row starts from a pair that is still missing and adds, factor by factor, the value that meets the most
    missing pairs. Ties go in turn to every value, so that no value is seen much more often than another.
    """
    names = list(factors)
    missing: set[_Pair] = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }
    uses = {(name, i): 0 for name in names for i in range(len(factors[name]))}
    rows = []
    while missing:
        first = min(missing, key=lambda pair: (names.index(pair[0][0]), names.index(pair[1][0]), pair))
        chosen = dict(first)
        for name in names:
            if name not in chosen:

                def worth(i: int, at: str = name, row: _Row = tuple(chosen.items())) -> tuple[int, int]:  # noqa: B008
                    return sum(_pair(names, (at, i), other) in missing for other in row), -uses[at, i]  # noqa: B023

                chosen[name] = max(range(len(factors[name])), key=worth)
        for item in chosen.items():
            uses[item] += 1
        missing -= {_pair(names, a, b) for a, b in itertools.combinations(chosen.items(), 2)}
        rows.append({name: factors[name][chosen[name]] for name in names})
    return rows or [{name: values[0] for name, values in factors.items()}]


def _pair(names: list[str], a: tuple[str, int], b: tuple[str, int]) -> tuple[tuple[str, int], tuple[str, int]]:
    return (a, b) if names.index(a[0]) < names.index(b[0]) else (b, a)


# Numbers.


def _normal(x: np.ndarray) -> np.ndarray:
    return x


def _unit(x: np.ndarray) -> np.ndarray:
    return np.asarray(x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-3))


def _gate(x: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-x)))


def _flag(x: np.ndarray) -> np.ndarray:
    return np.asarray((x > 0).astype(np.float64))


def _log_decay(x: np.ndarray) -> np.ndarray:
    return np.asarray(-np.log1p(np.exp(x)) / 4)


def _positive(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.exp(x / 2) / 2)


DRAWS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "normal": _normal,
    "unit": _unit,
    "gate": _gate,
    "log_decay": _log_decay,
    "positive": _positive,
    "flag": _flag,
}


@dataclass(frozen=True)
class Hard:
    """An input that breaks careless kernels.

    Attributes:
        draws: the kinds of arrays (``Arg.draw``) that it is about; a mixer without any of them is not concerned.
        change: changes the arrays of a call, given the mixer's arguments by kind.
        ties: keys are the same, and so is whatever a mixer that picks may pick among.
    """

    draws: frozenset[str]
    change: Callable[[Named, Mapping[str, list[Arg]], np.random.Generator], None]
    ties: bool = False


def _set(kind: str, value: float) -> Hard:
    """Every array of a kind holds one number."""

    def change(x: Named, args: Mapping[str, list[Arg]], rng: np.random.Generator) -> None:
        for arg in args[kind]:
            x[arg.name] = np.full_like(x[arg.name], value)

    return Hard(frozenset({kind}), change)


def _reset(x: Named, args: Mapping[str, list[Arg]], rng: np.random.Generator) -> None:
    """Now and then everything is forgotten."""
    for arg in args["log_decay"]:
        x[arg.name] = np.where(rng.random(x[arg.name].shape) < 0.1, -np.inf, x[arg.name])


def _steep_end(x: Named, args: Mapping[str, list[Arg]], rng: np.random.Generator) -> None:
    """Chunks in which much is kept, and behind them some in which half is forgotten at once, token by token."""
    for arg in args["log_decay"]:
        x[arg.name][:, 64:] = np.where(rng.random(x[arg.name][:, 64:].shape) < 0.5, -30.0, x[arg.name][:, 64:])


def _wide_gate(x: Named, args: Mapping[str, list[Arg]], rng: np.random.Generator) -> None:
    for arg in args["gate"]:
        x[arg.name] = rng.uniform(0, 2, x[arg.name].shape)


def _alike(cosine: float) -> Hard:
    """Keys of one pairwise cosine, written in full and never forgotten."""

    def change(x: Named, args: Mapping[str, list[Arg]], rng: np.random.Generator) -> None:
        for arg in args["unit"]:
            shape = x[arg.name].shape
            common = _unit(rng.standard_normal((shape[0], 1, *shape[2:])))
            own = rng.standard_normal(shape)
            own = _unit(own - common * np.sum(own * common, axis=-1, keepdims=True))
            x[arg.name] = math.sqrt(cosine) * common + math.sqrt(1 - cosine) * own
        for arg in args.get("gate", ()):
            x[arg.name] = np.ones_like(x[arg.name])
        for arg in args.get("log_decay", ()):
            x[arg.name] = np.zeros_like(x[arg.name])

    return Hard(frozenset({"unit"}), change, ties=cosine == 1)


def _norm(norm: float) -> Hard:
    def change(x: Named, args: Mapping[str, list[Arg]], rng: np.random.Generator) -> None:
        x["v"] = norm * _unit(x["v"])

    return Hard(frozenset({"normal"}), change)


def _known(x: Named, args: Mapping[str, list[Arg]], rng: np.random.Generator) -> None:
    """Two pairs come again and again, so what is left to learn goes to zero."""
    for name in ("k", "v"):
        x[name] = x[name][:, np.arange(x[name].shape[1]) % 2]
    for arg in args.get("log_decay", ()):
        x[arg.name] = np.zeros_like(x[arg.name])


def _long(x: Named, args: Mapping[str, list[Arg]], rng: np.random.Generator) -> None:
    for arg in args.get("log_decay", ()):
        x[arg.name] = x[arg.name] / 64


HARD: Mapping[str, Hard] = {
    "log_decay 0": _set("log_decay", 0.0),
    "log_decay -50": _set("log_decay", -50.0),
    "log_decay -inf": _set("log_decay", -math.inf),
    "resets": Hard(frozenset({"log_decay"}), _reset),
    "steep end": Hard(frozenset({"log_decay"}), _steep_end),
    "one key": _alike(1.0),
    "cosine 0.9": _alike(0.9),
    "cosine 0.5": _alike(0.5),
    "gate 2": _set("gate", 2.0),
    "gate 0": _set("gate", 0.0),
    "gate to 2": Hard(frozenset({"gate"}), _wide_gate),
    "values 0.1": _norm(0.1),
    "values 1": _norm(1.0),
    "values 10": _norm(10.0),
    "known pairs": Hard(frozenset({"unit"}), _known, ties=True),
}


def draw(setting: Setting, dtype: str) -> Named:
    """The arrays of a call in float64, rounded to what ``dtype`` and float32 can hold.

    They are named as in ``mixers.problem``: inputs, parameters, ``initial.<field>`` where a state is given, ``offsets``
    where sequences are packed.
    """
    spec, sizes = setting.spec, setting.sizes()
    x = {name: _numbers(setting, spec.arg(name), sizes.shape(axes)) for name, axes in setting.arrays}
    # Values of norm 1 or so, as keys are: what amplifies rounding is among the hard inputs.
    x["v"] = x["v"] / math.sqrt(x["v"].shape[-1])
    if setting.hard:
        args: dict[str, list[Arg]] = {}
        for name in x:
            args.setdefault(spec.arg(name).draw, []).append(spec.arg(name))
        change = _long if setting.hard == "long" else HARD[setting.hard].change
        change(x, args, generator(setting.seed, setting.hard))
    fields = spec.state(setting.resolved).fields
    if setting.initial != "none":
        state = _some_state(setting)
        if setting.initial == "shared":
            state = tuple(np.asarray(a[0]) for a in state)
        x |= {f"initial.{f.name}": a for f, a in zip(fields, state, strict=True)}
    verbatim = {f"initial.{f.name}" for f in fields if f.verbatim}
    rounded = {n: round_to(a, dtype if n in ("q", "k", "v") or n in verbatim else "float32") for n, a in x.items()}
    if setting.packed:
        rounded["offsets"] = np.concatenate([[0], np.cumsum(setting.lengths, dtype=np.int64)])
    return rounded


def seeds(setting: Setting, dtype: str, x: Mapping[str, np.ndarray]) -> Named:
    """Gradients of the outputs of a call that ``draw`` made, by name; of caches, as long as these may become."""
    spec, options = setting.spec, setting.resolved
    sizes = setting.sizes()
    sizes = dataclasses.replace(sizes, M=_rows(spec, options, x, "M"), S=_rows(spec, options, x, "S") + sizes.T)
    flags = Flags(state=setting.flow == "all", checkpoint_every=setting.checkpoint_every * (setting.flow == "all"))
    shapes = outputs(spec, options, sizes, flags, dtype)
    counters = {f.name for f in spec.state(options).fields if f.counter}
    return {
        name: round_to(generator(setting.seed, "d" + name).standard_normal(shape), dtype)
        for name, (shape, _) in shapes.items()
        if name.partition(".")[2] not in counters
    }


def _rows(spec: MixerSpec, options: Mapping[str, Any], x: Mapping[str, np.ndarray], axis: str) -> int:
    """How long an axis of a growing state is at the start of a call."""
    for field in spec.state(options).fields:
        axes = field.axes.split()
        if axis in axes and f"initial.{field.name}" in x:
            return int(x[f"initial.{field.name}"].shape[axes.index(axis) - len(axes)])
    return 0


def generator(seed: int, name: str) -> np.random.Generator:
    """Random numbers that depend on a seed and a name alone."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _numbers(setting: Setting, arg: Arg, shape: tuple[int, ...]) -> np.ndarray:
    return DRAWS[arg.draw](generator(setting.seed, arg.name).standard_normal(shape))


def _some_state(setting: Setting) -> tuple[np.ndarray, ...]:
    """States that a few tokens leave behind: full of numbers, in the middle of a chunk, of unequal age."""
    count = len(setting.lengths)
    ages = tuple(3 + n % 3 for n in range(count))
    before = dataclasses.replace(
        setting, lengths=ages, packed=True, initial="none", checkpoint_every=0, hard="", seed=setting.seed + 1000
    )
    sizes, options = before.sizes(), before.resolved
    x: dict[str, Any] = draw(before, "float64")
    fill_first_state(before.spec, options, sizes, x, "float64")
    out = reference.forward(host, before.spec, options, sizes, Flags(), x)
    return tuple(np.asarray(out[f"final.{f.name}"]) for f in before.spec.state(options).fields)


def round_to(array: np.ndarray, dtype: str) -> np.ndarray:
    """A float64 array rounded to numbers that float32, or half precision, can hold."""
    if array.dtype.kind != "f":
        return array
    if dtype == "bfloat16":
        # Round to nearest, ties to even, on the upper half of a float32's bits; infinities stay what they are.
        bits = array.astype(np.float32).view(np.uint32)
        bits = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
        return bits.view(np.float32).astype(np.float64)
    return array.astype(np.float16 if dtype == "float16" else np.float32).astype(np.float64)


def sequences(setting: Setting, x: Mapping[str, np.ndarray]) -> Iterator[tuple[Setting, Named]]:
    """The sequences of a pack, each as a call of its own."""
    timed = {arg.name for arg in setting.spec.inputs}
    bounds = x["offsets"]
    for n, length in enumerate(setting.lengths):
        alone = dataclasses.replace(setting, lengths=(length,), packed=False)
        piece = {name: a for name, a in x.items() if name != "offsets"}
        for name, a in piece.items():
            if name in timed:
                piece[name] = a[:, bounds[n] : bounds[n + 1]]
            elif name.startswith("initial.") and setting.initial == "given":
                piece[name] = a[n : n + 1]
        yield alone, piece
