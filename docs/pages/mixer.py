"""A page a mixer, written from its specification, its kernels' answers and committed measurements."""

import inspect
import sys
from collections.abc import Iterator

import mixers
from mixers import registry
from mixers.check import forms
from mixers.spec import Arg, MixerSpec, Sizes
from pages import measured, support
from pages.markdown import code, docstring, duration, link_papers, quantity, table

EXAMPLE = {"T": 256, "H": 4, "K": 32, "V": 32}


def pages(results: measured.Results) -> dict[str, str]:
    """Every mixer's page by path, and their index."""
    found = {f"mixers/{name}.md": page(mixers.get_spec(name), results) for name in mixers.names()}
    return found | {"mixers/index.md": index()}


def index() -> str:
    """All mixers, a line each."""
    lines = [
        [f"[`{spec.name}`]({spec.name}.md)", spec.summary, "exact" if spec.exact_in_chunks else "part of the model"]
        for spec in map(mixers.get_spec, mixers.names())
    ]
    return (
        "# The mixers\n\n"
        "A page each, written from the mixer's specification and from what kernels declare and measure; the formulas "
        "of all of them, side by side, are in [mathematics](../../mathematics.md).\n\n"
        + table(["mixer", "what it is", "chunks"], lines)
        + "\n\n```{toctree}\n:hidden:\n\n"
        + "\n".join(mixers.names())
        + "\n```\n"
    )


def page(spec: MixerSpec, results: measured.Results) -> str:
    """The page of one mixer; sections without content are left out."""
    sections = {
        "Equations": f"```text\n{spec.equations}\n```\n\n{_family(spec)}",
        "A call": example(spec),
        "Inputs": table(["name", "axes", "meaning"], map(_argument, (*spec.inputs, *spec.parameters))) + "\n\n" + AXES,
        "Options": options(spec),
        "State": state(spec),
        "Exact or approximate": chunks(spec),
        "The paper's and ours": link_papers(spec.source) + ".",
        "Cost": cost(spec),
        "Where it runs": where(spec),
        "Measured": speed(spec, results),
    }
    text = [f"# {spec.name}", f"{spec.summary[0].upper()}{spec.summary[1:]}."]
    for title, content in sections.items():
        if content:
            text += [f"## {title}", content]
    return "\n\n".join(text) + "\n"


AXES = (
    "`B` batch, `T` tokens, `H` heads of values, `G` heads of keys (`H` is a multiple of it), `K` width of keys or "
    "number of slots, `V` width of values, `N` sequences. `q`, `k` and `v` share a dtype; gates may be of any floating "
    "dtype."
)


def _family(spec: MixerSpec) -> str:
    """What the source says at the head of the family's file."""
    module = next(family for family in registry._FAMILIES if spec in family.SPECS)
    text = inspect.cleandoc(sys.modules[module.__name__].__doc__ or "")
    name = module.__name__.replace(".", "/")
    return f"In the words of `{name}.py`, which defines it:\n\n{docstring(text)}"


def _argument(arg: Arg) -> list[str]:
    layouts = " or ".join(f"`[{','.join(layout)}]`" for layout in arg.layouts)
    return [code(arg.name), layouts, arg.doc + (" (optional)" if arg.optional else "")]


def example(spec: MixerSpec) -> str:
    """A call that runs as it stands."""
    sizes = Sizes(B=1, G=EXAMPLE["H"], N=1, C=spec.chunk(spec.resolve({})), **EXAMPLE)
    q, k, v = (sizes.shape(" ".join(arg.layouts[0])) for arg in spec.inputs[:3])
    assert q == k == v, spec.name
    given = [a for a in spec.inputs[3:] if not a.optional]
    scaled = any(p.name == "token_scale" for p in spec.parameters)
    lines = [
        *("import numpy as np", "import mixers", "", f'mix = mixers.get("{spec.name}")'),
        "rng = np.random.default_rng(0)",
        f"q, k, v = rng.standard_normal({(3, *q)}, dtype=np.float32)",
        "k /= np.linalg.norm(k, axis=-1, keepdims=True)",
    ]
    for arg in given:
        shape = sizes.shape(" ".join(arg.layouts[0]))
        if arg.draw in ("gate", "log_decay"):
            level = {"gate": f"0.5 / {EXAMPLE['K']}" if scaled else "0.5", "log_decay": "-0.05"}[arg.draw]
            lines.append(f"{arg.name} = np.full({shape}, {level}, np.float32)")
        else:
            lines.append(f"{arg.name} = rng.standard_normal({shape}, dtype=np.float32)")
    keywords = "".join(f", {arg.name}={arg.name}" for arg in given)
    lines += ["", f"y, state = mix(q, k, v{keywords})", f"assert y.shape == {v}"]
    return "```python\n" + "\n".join(lines) + "\n```"


def options(spec: MixerSpec) -> str:
    """The keywords of ``mixers.get`` that belong to the mixer."""
    if not spec.options:
        return "None of its own."
    rows = ([code(o.name), code(repr(o.default)), o.doc, o.expected] for o in spec.options)
    return f'Keywords of `mixers.get("{spec.name}", …)`:\n\n' + table(["option", "default", "meaning", "takes"], rows)


def state(spec: MixerSpec) -> str:
    """Fields, and bytes at one size."""
    text = []
    for chosen in support.variants(spec):
        fields = spec.state(chosen).fields
        rows = ([code(f.name), f"`[{','.join(f.axes.split())}]`", f.doc] for f in fields)
        if len(support.variants(spec)) > 1:
            text.append("Exact:" if chosen["chunk_size"] == 1 else "With `chunk_size` over 1:")
        text.append(table(["array", "axes", "what it holds"], rows))
    if spec.reserve is None:
        size = sum(s.nbytes for s in mixers.get(spec.name).state_spec(1, 64, 64))
        text.append(f"{quantity(size)} bytes a head at K = V = 64, in float32, whatever the length.")
    else:
        text.append("It grows with the tokens.")
    return "\n\n".join(text)


def chunks(spec: MixerSpec) -> str:
    """What a chunk means."""
    if spec.exact_in_chunks:
        return (
            "Exact: a kernel takes as many tokens at a time as it likes, and only rounding differs. "
            "Every kernel is compared with a float64 loop over the equations above."
        )
    default = next(o for o in spec.options if o.name == "chunk_size").default
    text = (
        "A chunk is part of the model: `chunk_size` is an option, it changes the result, and no tuner touches it "
        f"unasked. The default is {default}"
    )
    if default == 1:
        return (
            f"{text}, the exact recurrence. With more, the gradients of a whole chunk are taken at its first state: an "
            "approximation, further from the exact outputs the larger `chunk_size` and `beta` are. "
            "[The tuner](../../tuning.md) can choose a chunk within a distance that you allow."
        )
    return f"{text}. Kernels compute the equations above with that chunk, and only rounding differs."


def cost(spec: MixerSpec) -> str:
    """Operations of the specification at a few sizes."""
    chosen, rows = spec.resolve({}), []
    for width in (64, 128):
        lengths = (1024, 16384) if _grows(spec) else (1024,)
        for length in lengths:
            sizes = Sizes(B=1, T=length, G=1, H=1, K=width, V=width, N=1, C=spec.chunk(chosen))
            flops = quantity(spec.flops(sizes, chosen))
            rows.append([str(width), *([quantity(length)] if _grows(spec) else []), flops])
    headers = ["K = V", *(["T"] if _grows(spec) else []), "floating-point operations a token and head, forward"]
    whole = "They grow with the length." if _grows(spec) else "The same at any length."
    return f"{table(headers, rows)}\n\n{whole} A backward is counted as twice a forward."


def _grows(spec: MixerSpec) -> bool:
    chosen = spec.resolve({})
    of = (Sizes(B=1, T=t, G=1, H=1, K=64, V=64, N=1, C=spec.chunk(chosen)) for t in (1024, 16384))
    return len({spec.flops(sizes, chosen) for sizes in of}) > 1


def where(spec: MixerSpec) -> str:
    """Kernels, and what is composed of others'."""
    text = "\n\n".join(_where(spec))
    return text + "\n\n`reference` runs it everywhere, token by token, in NumPy, torch and JAX: the truth, and slow."


def _where(spec: MixerSpec) -> Iterator[str]:
    own = support.of_mixer(spec)
    if own:
        yield own
    composed = [code(n) for n, b in support.backends().items() if "composed" in forms(b.kernels(), spec.name)]
    if composed:
        parts = [part.name for part, _ in mixers.get(spec.name).spec.parts(mixers.get(spec.name).options)]
        made = " and ".join(f"[`{part}`]({part}.md)" for part in parts)
        of = f"kernels of {made} and of array operations" if parts else "array operations"
        yield (
            f"On {', '.join(composed)} it is composed of {of}, whose widths and dtypes are those of the call: "
            "[HAM, memory caching and TTT-MLP](../../hybrid.md)."
        )


def speed(spec: MixerSpec, results: measured.Results) -> str:
    """Times that were measured and committed."""
    found = measured.rows(results, spec.name)
    if not found:
        return "Nothing is committed for it yet; `nox -s bench -- --mixers " + spec.name + "` measures it here."
    rows = [
        [
            *(r.where, r.shape, r.what, code(r.kernel), duration(r.seconds)),
            "" if r.floor is None else f"{r.floor:.0%}",
            r.peer,
            ("" if not r.peer else "refuses") if r.theirs is None else duration(r.theirs),
            "" if r.theirs is None else f"{r.theirs / r.seconds:.2f}×",
        ]
        for r in found
    ]
    headers = ["on", "(B,T,H,K,V)", "pass", "kernel", "time", "of the floor", "beside", "its time", "ratio"]
    shown = [i for i in range(len(headers)) if any(row[i] for row in rows)]
    text = table([headers[i] for i in shown], [[row[i] for i in shown] for row in rows])
    return f"{text}\n\nHow, and with which versions: [performance](../../performance.md)."
