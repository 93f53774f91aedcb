"""The short convolution against its sum, streamed and packed."""

import pytest
import torch

import mixers.nn
from mixers.nn import ShortConv, short_conv

close = torch.testing.assert_close


def slow(x, weight, state):
    """The sum of the module's docstring."""
    past = weight.shape[1] - 1
    row = torch.cat([state, x], 1)
    return sum(weight[:, w] * row[:, w : w + x.shape[1]] for w in range(past + 1))


@pytest.fixture
def drawn():
    """Tokens, a filter, and what came before."""
    torch.manual_seed(0)
    x, weight, state = torch.randn(3, 9, 5), torch.randn(5, 4), torch.randn(3, 3, 5)
    return x.double(), weight.double(), state.double()


def test_is_the_sum(drawn):
    x, weight, state = drawn
    close(short_conv(x, weight)[0], slow(x, weight, torch.zeros_like(state)))
    y, after = short_conv(x, weight, state)
    close(y, slow(x, weight, state))
    assert torch.equal(after, x[:, -3:])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_streams(drawn, size):
    x, weight, _ = drawn
    weight = weight[:, :size]
    y, end = short_conv(x, weight)
    for pieces in ([1] * 9, [2, 0, 6, 1], [9, 0]):
        state, parts = None, []
        for piece in x.split(pieces, 1):
            part, state = short_conv(piece, weight, state)
            parts.append(part)
        close(torch.cat(parts, 1), y)
        assert torch.equal(state, end)


@pytest.mark.parametrize("lengths", [[4, 1, 0, 2, 20], [0, 27], [27], [1] * 27])
@pytest.mark.parametrize("resumed", [True, False])
def test_sequences_of_a_pack_do_not_see_each_other(drawn, lengths, resumed):
    x, weight, _ = drawn
    x = x.reshape(1, 27, 5)
    state = torch.randn(len(lengths), 3, 5).double() if resumed else None
    y, end = short_conv(x, weight, state, torch.tensor([0, *lengths]).cumsum(0))
    for n, part in enumerate(x.split(lengths, 1)):
        alone, after = short_conv(part, weight, None if state is None else state[n : n + 1])
        close(y.split(lengths, 1)[n], alone)
        assert torch.equal(end[n : n + 1], after)


def test_state_behind_padding(drawn):
    x, weight, state = drawn
    lengths = torch.tensor([9, 0, 2])
    y, end = short_conv(x, weight, state, lengths=lengths)
    for n, length in enumerate(lengths.tolist()):
        alone, after = short_conv(x[n : n + 1, :length], weight, state[n : n + 1])
        close(y[n : n + 1, :length], alone)
        assert torch.equal(end[n : n + 1], after)


def test_gradients(drawn):
    x, weight, state = (a[:2] if a.shape[0] == 3 else a for a in drawn)
    inputs = tuple(a.requires_grad_() for a in (x[:, :4].clone(), weight.clone(), state.clone()))
    assert torch.autograd.gradcheck(short_conv, inputs)
    offsets = torch.tensor([0, 1, 4])
    row = (x[:1, :4].detach().clone().requires_grad_(), *inputs[1:])
    assert torch.autograd.gradcheck(lambda x, w, s: short_conv(x, w, s, offsets), row)


def test_module_runs_in_the_dtype_of_its_input():
    conv = ShortConv(6, 3)
    y, state = conv(torch.randn(2, 4, 6).bfloat16())
    assert y.dtype == state.dtype == torch.bfloat16
    assert mixers.nn.short_conv is short_conv


def test_bad_input_is_refused_in_words(drawn):
    x, weight, state = drawn
    with pytest.raises(ValueError, match=r"expected \[B,T,C\]"):
        short_conv(x[0], weight)
    with pytest.raises(ValueError, match=r"expected \[C,W\] with C = 5"):
        short_conv(x, weight[:4])
    with pytest.raises(ValueError, match=r"expected \[N,W−1,C\] = \(3, 3, 5\)"):
        short_conv(x, weight, state[:, :2])
    with pytest.raises(ValueError, match="the batch is 3"):
        short_conv(x, weight, cu_seqlens=torch.tensor([0, 9]))
