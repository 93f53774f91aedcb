"""Every peer computes the mixer that it is compared with: outputs and gradients against a float64 loop of ``step``."""

import numpy as np
import pytest

import mixers
from benchmarks import inputs, peers
from benchmarks.case import FORWARD, STEP, TRAIN, Case

torch = pytest.importorskip("torch")

import array_api_compat.torch as xp  # noqa: E402

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
SIZES = {"batch": 2, "length": 128, "heads": 2, "key_dim": 32, "value_dim": 32}
OPTIONS = {
    "lattice": [
        (),
        (("objective", "encoding"),),
        (("chunk_size", 16),),
        (("objective", "similarity"), ("chunk_size", 4), ("read_norm", False)),
    ],
}


def _cases() -> list[Case]:
    found = []
    for device in DEVICES:
        for mixer in mixers.names():
            for options in OPTIONS.get(mixer, [()]):
                optionals = [(), ("log_decay",)] if mixer == "lattice" else [()]
                found += [
                    Case(mixer, **SIZES, kind=kind, options=options, device=device, optional=optional, dtype=dtype)
                    for kind in (FORWARD, TRAIN, STEP)
                    for optional in optionals
                    for dtype in (("float32",) if device == "cpu" else ("float32", "bfloat16"))
                ]
    return found


# Chunks of every size share their code: one size is enough.
PAIRS = [
    (case, peer)
    for case in _cases()
    for peer in peers.fitting(case)
    if not peer.name[-1].isdigit() or peer.name.endswith("chunk 32")
]


def _name(case: Case) -> str:
    return f"{case.device}-{case.dtype}-{case.mixer}-{case.label}{''.join(case.optional)}-{case.kind}"


def truth(case: Case, arrays: inputs.Arrays) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The output and every gradient, token by token in float64."""
    x = {name: torch.from_numpy(a).double().requires_grad_() for name, a in arrays.items() if name != "dy"}
    state = tuple(torch.from_numpy(a) for a in inputs.first_state(case.spec, case.sizes, case.option, "float64"))
    if case.spec.reserve is not None:
        state = case.spec.reserve(xp, state, case.length)
    outputs = []
    for t in range(1 if case.kind == STEP else case.length):
        y, state = case.spec.step(xp, case.option, {name: a[:, t] for name, a in x.items()}, state)
        outputs.append(y)
    y = outputs[0] if case.kind == STEP else torch.stack(outputs, 1)
    if case.kind != TRAIN:
        return y.detach().numpy(), {}
    grads = torch.autograd.grad(y, list(x.values()), torch.from_numpy(arrays["dy"]).double())
    return y.detach().numpy(), {name: g.numpy() for name, g in zip(x, grads, strict=True)}


def _numpy(array: object) -> np.ndarray:
    return array.detach().double().cpu().numpy() if isinstance(array, torch.Tensor) else np.asarray(array, np.float64)


def _assert_close(got: object, expected: np.ndarray, tolerance: float, name: str) -> None:
    scale = np.abs(expected).max()
    error = np.abs(_numpy(got) - expected).max() / scale
    assert error < tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize(("case", "peer"), PAIRS, ids=lambda x: getattr(x, "name", None) or _name(x))
def test_peer_equals_the_specification(case: Case, peer: peers.Peer) -> None:
    arrays = inputs.draw(case.spec, case.sizes, optional=case.optional)
    try:
        result = peer.build(case, arrays)()
    except RuntimeError as error:
        if peer.name != "fla" or "produces incorrect results" not in str(error):
            raise
        pytest.skip(f"fla refuses: {error}")  # its gated backward, under some versions of Triton
    y, grads = truth(case, arrays)
    tolerance = 2e-4 if case.dtype == "float32" else 3e-2
    _assert_close(result[0], y, tolerance, "y")
    for name, grad in grads.items():
        _assert_close(result[1][name], grad, 10 * tolerance, name)
