"""Laws 1 and 2 at sizes, gates and options that nobody chose."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixers.cases import HARD, Setting
from mixers.spec import MixerSpec


@st.composite
def any_setting(draw: st.DrawFn, spec: MixerSpec) -> Setting:
    """Any way to call a mixer."""
    options = [(o.name, draw(st.sampled_from(o.trials), label=o.name)) for o in spec.options if o.trials]
    arrays = []
    for arg in (*spec.inputs, *spec.parameters):
        layouts = [" ".join(layout) for layout in arg.layouts]
        axes = draw(st.sampled_from(layouts + [""] * arg.optional), label=arg.name)
        if axes:
            arrays.append((arg.name, axes))
    groups = draw(st.integers(1, 3))
    key_dim = draw(st.integers(1, 40))
    packed = draw(st.booleans())
    count = draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(0, 60), min_size=count, max_size=count))
    kinds = {spec.arg(name).draw for name, _ in arrays}
    return Setting(
        spec,
        tuple(options),
        tuple(arrays),
        groups,
        groups * draw(st.integers(1, 3)),
        key_dim,
        key_dim if spec.arg("v").layouts[0][-1] == "K" else draw(st.integers(1, 40)),
        tuple(lengths) if packed else (lengths[0],) * count,
        packed,
        draw(st.sampled_from(["none", "given", "shared"])),
        draw(st.integers(0, 9)),
        draw(st.sampled_from(["y", "all"])),
        draw(st.sampled_from(["", *(name for name, hard in HARD.items() if hard.draws & kinds)])),
        draw(st.integers(0, 99)),
    )


@pytest.mark.parametrize("law", ["truth", "cuts"])
@given(data=st.data())
def test_any_sizes(subject, law: str, data: st.DataObject) -> None:
    setting = data.draw(any_setting(subject.spec))
    if law == "cuts" and setting.packed:
        setting = dataclasses.replace(setting, packed=False, lengths=(max(setting.lengths),) * 2)
    case = subject.case(law, setting, data.draw(st.sampled_from(["float64", "float32"])))
    if case is not None:
        verdict = case.run()
        assert verdict, f"{case}\n{verdict.reason}"


def test_examples_reach_every_kernel(subject) -> None:
    """A kernel that refused every setting would pass for want of tests."""
    from mixers.cases import settings

    ran = sum(subject.case("truth", setting, "float32") is not None for setting in settings(subject.spec))
    assert ran >= 8, f"{subject} takes {ran} settings only"
    assert np.isfinite(ran)
