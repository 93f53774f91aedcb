"""Gates against their formulas, their ranges, their first values."""

import math

import pytest
import torch

from mixers.nn import BoundedDecay, SigmoidGate, SoftplusDecay

close = torch.testing.assert_close


def drawn(gate):
    """A gate with parameters away from their first values, in float64."""
    gate = gate.double()
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.normal_()
    return gate


def projection(gate, x):
    if gate.down is not None:
        x = x @ gate.down.T
    return (x @ gate.weight.T).reshape(*x.shape[:2], *gate.shape)


def column(tensor, channels):
    return tensor[:, None] if channels else tensor


@pytest.mark.parametrize("channels", [0, 2, 3])
def test_formulas(channels):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, dtype=torch.float64)

    gate = drawn(SigmoidGate(6, 2, channels, high=2.0))
    close(gate(x), 2 / (1 + torch.exp(-(projection(gate, x) + gate.bias))))

    gate = drawn(SoftplusDecay(6, 2, channels))
    a = projection(gate, x) + gate.dt_bias
    close(gate(x), -column(gate.A_log.exp(), channels) * torch.log1p(a.exp()))

    gate = drawn(BoundedDecay(6, 2, channels, lower_bound=-3.0))
    a = column(gate.A_log.exp(), channels) * (projection(gate, x) + gate.dt_bias)
    close(gate(x), -3 / (1 + torch.exp(-a)))


@pytest.mark.parametrize("channels", [0, 64])
@pytest.mark.parametrize("kind", [SoftplusDecay, BoundedDecay])
def test_decays_start_with_memories_of_many_lengths(kind, channels):
    torch.manual_seed(0)
    gate = kind(32, 64, channels)
    with torch.no_grad():
        gate.weight.zero_()
    log_decay = gate(torch.randn(1, 1, 32))
    assert (log_decay < 0).all()
    assert log_decay.min() < -0.3 and log_decay.max() > -0.02
    assert log_decay.min() > -5


def test_sigmoid_starts_in_the_middle():
    torch.manual_seed(0)
    for high in (1.0, 2.0):
        beta = SigmoidGate(32, 8, high=high)(torch.randn(4, 100, 32))
        assert beta.min() > 0 and beta.max() < high
        assert math.isclose(beta.mean().item(), high / 2, rel_tol=0.1)


@pytest.mark.parametrize("gate", [SigmoidGate(8, 2), SoftplusDecay(8, 2, 3), BoundedDecay(8, 2)])
def test_parameters_stay_float32(gate):
    x = torch.randn(2, 3, 8)
    expected = gate(x.bfloat16().float())
    for change in (gate.bfloat16, gate.half, lambda: gate.to("cpu", torch.bfloat16)):
        change()
        assert all(p.dtype == torch.float32 for p in gate.parameters())
        assert torch.equal(gate(x.bfloat16()), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gate(x.bfloat16()), expected)
    assert gate.to("meta").weight.is_meta


def test_bound_is_negative():
    with pytest.raises(ValueError, match="expected a negative number"):
        BoundedDecay(8, 2, lower_bound=5.0)
