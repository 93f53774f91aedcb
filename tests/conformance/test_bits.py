"""Law 5: the same bits every time, and every element written."""

import dataclasses
import math

import numba
import numpy as np
import pytest

from mixers.arrays.evaluate import dtypes
from mixers.arrays.numpy import prepare, run_backward, run_forward
from mixers.call import validate
from mixers.cases import Setting, draw, seeds, settings
from mixers.check import Case
from mixers.check.pinned import Pinned
from mixers.problem import Flags


def taken(subject, packed: bool) -> list[Case]:
    """A few settings with all outputs and all gradients that a kernel takes."""
    found = []
    for setting in settings(subject.spec):
        if setting.packed == packed and setting.flow == "all" and setting.sizes().T > 1:
            for dtype in ("float32", "float64"):
                case = subject.case("truth", setting, dtype)
                if case is not None:
                    found.append(case)
    return found[:4]


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "pack"])
def test_same_bits_twice(subject, packed: bool) -> None:
    for case in taken(subject, packed):
        x = draw(case.setting, "float32")
        dout = seeds(case.setting, "float32", x)
        first, second = case.evaluate(x, dout), case.evaluate(x, dout)
        for once, again in zip(first, second, strict=True):
            for name in once:
                np.testing.assert_array_equal(once[name], again[name], err_msg=f"{case}: {name}")


def test_same_bits_on_any_number_of_threads(kernel_subject) -> None:
    """Enough work for the parallel form of a kernel: more threads change when a sum is made, never its order."""
    subject = kernel_subject
    setting = large(subject)
    case = subject.case("truth", setting, "float32")
    assert case is not None
    x = draw(case.setting, "float32")
    dout = seeds(case.setting, "float32", x)
    found = []
    before = numba.get_num_threads()
    try:
        for threads in {1, before}:
            numba.set_num_threads(threads)
            found.append(case.evaluate(x, dout))
    finally:
        numba.set_num_threads(before)
    for once, again in zip(found[0], found[-1], strict=True):
        for name in once:
            np.testing.assert_array_equal(once[name], again[name], err_msg=f"{case}: {name}")


def large(subject) -> Setting:
    """The first setting that a kernel takes, grown until work is worth several threads."""
    case = next(
        subject.case("truth", s, "float32") for s in settings(subject.spec) if subject.case("truth", s, "float32")
    )
    width = 48
    return dataclasses.replace(
        case.setting,
        groups=2,
        heads=4,
        key_dim=width,
        value_dim=width,
        lengths=(96, 96),
        packed=False,
        initial="none",
        checkpoint_every=0,
        flow="y",
    )


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "pack"])
def test_every_element_is_written(kernel_subject, packed: bool) -> None:
    """Outputs hold NaN before a kernel runs, counters a number that no count can be; none of them is left."""
    subject = kernel_subject
    if subject.kernel.arrays != "numpy":
        pytest.skip("about kernels that fill NumPy arrays")
    for case in taken(subject, packed):
        setting, options = case.setting, case.setting.resolved
        x = draw(setting, "float32")
        held = dtypes(subject.spec, options, case.dtype)
        arrays = {n: a if n == "offsets" else a.astype(held[n]) for n, a in x.items()}
        offsets = arrays.pop("offsets", None)
        state = tuple(arrays.pop(n) for n in list(arrays) if n.startswith("initial."))
        given = subject.spec.state(options).pack(state) if state else None
        flags = Flags(grad=True, checkpoint_every=setting.checkpoint_every)
        call = validate(subject.spec, options, dict(arrays), given, offsets, flags)
        problem, host = prepare(call)
        plan = Pinned(subject.spec, subject.backend, subject.kernel, dict(setting.options)).plan(problem)

        # What the library allocates, it allocates with np.empty: here, full of what must not stay. Once before without:
        # a kernel that compiles meanwhile would take the poisoned function for NumPy's.
        first = run_forward(plan, problem, host)
        run_backward(
            plan, problem, host, first, {n: a.astype(first[n].dtype) for n, a in seeds(setting, "float32", x).items()}
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(np, "empty", poisoned)
            out = run_forward(plan, problem, host)
            dout = {n: a.astype(out[n].dtype) for n, a in seeds(setting, "float32", x).items()}
            dx = run_backward(plan, problem, host, out, dout)
        for name, array in {**out, **{f"gradient of {n}": a for n, a in dx.items()}}.items():
            if not name.startswith("kept."):  # rows of kept states that nobody reads may stay as they are
                assert np.isfinite(array).all(), f"{case}: {name}"
                assert array.dtype.kind == "f" or (array != POISON).all(), f"{case}: {name}"


POISON = -123456789


def poisoned(shape: object, dtype: object = np.float64, **rest: object) -> np.ndarray:
    """``np.empty``, full of NaN."""
    array = np.zeros(shape, dtype, **rest)
    array.fill(math.nan if array.dtype.kind == "f" else POISON)
    return array
