"""One layer for every mixer: streaming, packs, padding, dtypes, gradients, construction."""

import copy
import io
import pickle

import pytest
import torch
from layers_under_test import D_MODEL, LAYERS, assert_same_state, layer, tokens

import mixers
from mixers.nn import LayerState, MixerLayer, SoftplusDecay

close = torch.testing.assert_close
every_layer = pytest.mark.parametrize("name", LAYERS)


@every_layer
def test_output_and_state(name):
    made = layer(name)
    result = made(tokens(2, 7))
    assert type(result) is tuple
    y, state = result
    assert y.shape == (2, 7, D_MODEL) and y.dtype == torch.float64
    assert isinstance(state, LayerState)
    assert made(tokens(2, 7), return_state=False)[1] is None
    close(made(tokens(2, 7), return_state=False)[0], y)


@every_layer
@pytest.mark.parametrize("cut", [1, 2, 5])
def test_cut_anywhere(name, cut):
    made, x = layer(name), tokens(2, 7)
    y, end = made(x)
    first, state = made(x[:, :cut])
    second, state = made(x[:, cut:], state)
    close(torch.cat([first, second], 1), y)
    assert_same_state(state, end)


@every_layer
def test_step_by_step(name):
    made, x = layer(name), tokens(2, 7)
    y, end = made(x)
    state, steps = None, []
    for t in range(x.shape[1]):
        y_t, state = made.step(x[:, t], state)
        steps.append(y_t)
    close(torch.stack(steps, 1), y)
    assert_same_state(state, end)


@every_layer
def test_packed_documents_do_not_leak(name):
    made, lengths = layer(name), [3, 1, 0, 6]
    x = tokens(1, sum(lengths))
    pack = mixers.pack(lengths)
    y, state = made(x, cu_seqlens=pack)
    assert torch.equal(made(x, cu_seqlens=torch.from_numpy(pack.offsets))[0], y)
    separate = [made(part) for part in x.split(lengths, 1)]
    close(y, torch.cat([part for part, _ in separate], 1))
    for n, (_, end) in enumerate(separate):
        assert_same_state(sequence(state, n), end)

    # And each goes on from its own state.
    more = tokens(1, 2 * len(lengths))
    y, _ = made(more, state, cu_seqlens=mixers.pack([2] * len(lengths)))
    for n, (_, end) in enumerate(separate):
        close(y[:, 2 * n : 2 * n + 2], made(more[:, 2 * n : 2 * n + 2], end)[0])


def sequence(state, n):
    """The state of one sequence."""
    if state is None or isinstance(state, torch.Tensor):
        return None if state is None else state[n : n + 1]
    return type(state)(*(sequence(part, n) for part in state))


# By side: which tokens are real, and how many came before them.
MASKS = {
    "right": ([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]], 0),
    "left": ([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]], 0),
    "both, resumed": ([[0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0]], 5),
    "right, batch of 1": ([[1, 1, 1, 1, 1, 0]], 0),
    "left, batch of 1, resumed": ([[0, 0, 1, 1, 1]], 2),
}


@every_layer
@pytest.mark.parametrize("side", MASKS)
def test_padding_gives_what_the_unpadded_sequence_gives(name, side):
    made, (mask, seen) = layer(name), MASKS[side]
    mask = torch.tensor(mask, dtype=torch.bool)
    x = tokens(*mask.shape)
    x[~mask] = torch.nan
    before = made(tokens(len(mask), seen))[1] if seen else None
    y, state = made(x, before, mask=mask)
    assert not y[~mask].any()
    for n in range(len(mask)):
        alone, end = made(x[n : n + 1, mask[n]], sequence(before, n))
        close(y[n, mask[n]], alone[0])
        assert_same_state(sequence(state, n), end)
        more = tokens(1, 2)
        close(made(more, sequence(state, n))[0], made(more, end)[0])


@pytest.mark.parametrize("name", ["lattice", "lattice, chunk of 4", "attention", "ssd"])
def test_padding_has_no_gradient(name):
    made, mask = layer(name), torch.tensor(MASKS["right"][0], dtype=torch.bool)
    x = tokens(*mask.shape).requires_grad_()
    made(x, mask=mask)[0].square().sum().backward()
    assert not x.grad[~mask].any() and x.grad[mask].abs().sum(-1).min() > 0


@every_layer
def test_every_parameter_has_a_gradient(name):
    made = layer(name)
    y, _ = made(tokens(2, 9))
    (y * tokens(2, 9)).sum().backward()
    without = {n for n, p in made.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
    assert not without


@pytest.mark.parametrize("name", ["lattice, chunk of 4", "ttt_linear, batch of 4", "gla"])
def test_gradients_are_right(name):
    made = layer(name)
    assert torch.autograd.gradcheck(lambda x: made(x)[0], tokens(1, 5).requires_grad_())


@every_layer
def test_half_precision_model_keeps_gates_in_float32(name):
    made = layer(name).float()
    wide, _ = made(tokens(2, 9).float())
    made.to(torch.bfloat16)
    kept = [p for part in (made.gates, made.learned) for p in part.parameters()]
    assert all(p.dtype == torch.float32 for p in kept)
    assert made.project.weight.dtype == torch.bfloat16
    seen = {}
    for gate_name, gate in made.gates.items():
        gate.register_forward_hook(lambda _, __, out, gate_name=gate_name: seen.update({gate_name: out.dtype}))
    y, _ = made(tokens(2, 9).bfloat16())
    assert y.dtype == torch.bfloat16
    assert set(seen.values()) <= {torch.float32} and len(seen) == len(made.gates)
    close(y.float(), wide, rtol=0.1, atol=0.1 * wide.abs().max().item())
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())


@every_layer
def test_autocast(name):
    made = layer(name).float()
    x = tokens(2, 9).float()
    wide, _ = made(x)
    seen = []
    for gate in made.gates.values():
        gate.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = made(x)
    assert y.dtype == torch.bfloat16
    assert seen == [torch.float32] * len(made.gates)
    close(y.float(), wide, rtol=0.1, atol=0.1 * wide.abs().max().item())
    y.float().sum().backward()
    assert made.project.weight.grad.dtype == torch.float32


@every_layer
def test_made_on_the_meta_device(name):
    with torch.device("meta"):
        made = MixerLayer(**{"d_model": D_MODEL, "heads": 2, "backend": "reference", **LAYERS[name]})
    assert all(p.is_meta for p in made.parameters())
    made.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(torch.nan)
    torch.manual_seed(7)
    made.reset_parameters()
    torch.manual_seed(7)
    plain = MixerLayer(**{"d_model": D_MODEL, "heads": 2, "backend": "reference", **LAYERS[name]})
    for (key, a), (_, b) in zip(made.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(a, b), key


@every_layer
def test_state_dict_copy_and_pickle(name):
    made, x = layer(name), tokens(2, 5)
    y, _ = made(x)
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    other = layer(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(torch.load(file, weights_only=True))
    for again in (other, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(again(x)[0], y)


def test_first_state_is_learned_where_the_spec_says_so():
    learned = {name for name in LAYERS if len(layer(name).learned.first)}
    assert {LAYERS[name]["mixer"] for name in learned} == {"lattice", "ttt_linear", "ttt_mlp"}
    slots = MixerLayer("lattice", d_model=16, heads=2, key_dim=6).learned
    assert slots.first[0].shape == (2, 6, 8)
    close(slots.state().norm(dim=-1), torch.ones(2, 6))
    with torch.no_grad():
        slots.first[0].mul_(3).add_(0.1)
    close(slots.state().norm(dim=-1), torch.ones(2, 6))
    weight, bias = MixerLayer("ttt_linear", d_model=16, heads=2).learned.state()
    assert weight.shape == (2, 8, 8) and bias.shape == (2, 8)


def test_ttt_starts_with_the_parameters_of_its_page():
    made = MixerLayer("ttt_linear", d_model=16, heads=2, chunk_size=4)
    named = made.learned.named
    close(named["norm_weight"].detach(), torch.ones(2, 8))
    close(named["norm_bias"].detach(), torch.zeros(2, 8))
    close(named["token_scale"].detach(), torch.tensor([1, 1 / 2, 1 / 3, 1 / 4]))
    assert made.gates["beta"](torch.randn(1, 50, 16)).max() < 1 / 8


def test_attention_sees_positions():
    made = layer("attention, no convolution")
    x = tokens(1, 1).repeat(1, 6, 1)
    x[:, 2] = -x[:, 2]
    y, _ = made(x)
    moved, _ = made(x[:, [0, 2, 1, 3, 4, 5]])
    assert not torch.allclose(y[:, -1], moved[:, -1], rtol=1e-4)


def test_negative_eigenvalues_need_a_beta_beyond_one():
    beta = MixerLayer("delta_rule", d_model=8, heads=2, beta_max=2.0).gates["beta"](torch.randn(1, 500, 8))
    assert 1 < beta.max() < 2 and beta.min() > 0


def test_shapes_of_gates_follow_the_spec():
    x = torch.randn(2, 3, 8)
    shapes = {
        "lattice": {"beta": (2, 3, 2)},
        "kda": {"beta": (2, 3, 2), "log_decay": (2, 3, 2, 4)},
        "ssd": {"log_decay": (2, 3, 2)},
        "gla": {"log_decay": (2, 3, 2, 4)},
        "attention": {},
    }
    for name, expected in shapes.items():
        made = MixerLayer(name, d_model=8, heads=2)
        assert {key: gate(x).shape for key, gate in made.gates.items()} == expected
    slots = MixerLayer("lattice", d_model=8, heads=2, key_dim=5, slot_beta=True, decay="softplus")
    assert slots.gates["beta"](x).shape == (2, 3, 2, 5)
    assert isinstance(slots.gates["log_decay"], SoftplusDecay)


def test_a_mixer_of_ones_own_makes_a_layer():
    import dataclasses

    spec = dataclasses.replace(mixers.get_spec("gated_delta_rule"), name="my_rule")
    made = MixerLayer(spec, d_model=8, heads=2, backend="reference")
    assert made(torch.randn(1, 3, 8))[0].shape == (1, 3, 8)


BAD = {
    "unknown mixer": (lambda: MixerLayer("latice", d_model=8, heads=2), "did you mean 'lattice'"),
    "unknown option": (lambda: MixerLayer("lattice", d_model=8, heads=2, chunksize=4), "did you mean 'chunk_size'"),
    "unknown decay": (lambda: MixerLayer("gla", d_model=8, heads=2, decay="softmax"), "did you mean 'softplus'"),
    "needless decay": (lambda: MixerLayer("delta_rule", d_model=8, heads=2, decay="softplus"), "takes no log_decay"),
    "needless beta": (lambda: MixerLayer("ssd", d_model=8, heads=2, beta_max=2.0), "takes no beta"),
    "needless slots": (lambda: MixerLayer("delta_rule", d_model=8, heads=2, slot_beta=True), "one a head"),
    "no beta at all": (lambda: MixerLayer("ssd", d_model=8, heads=2, slot_beta=True), "no beta per slot"),
    "heads": (lambda: MixerLayer("lattice", d_model=10, heads=4), "no multiple of heads=4"),
    "groups": (lambda: MixerLayer("lattice", d_model=8, heads=2, key_heads=4), "whole multiple of key_heads"),
    "widths": (lambda: MixerLayer("ttt_linear", d_model=8, heads=2, value_dim=3), "as wide as its keys"),
    "odd keys": (lambda: MixerLayer("attention", d_model=8, heads=2, key_dim=3), "even number"),
    "width of x": (lambda: layer("lattice")(torch.randn(1, 3, 5)), r"expected \[B,T,D\] with D = 12"),
    "shape of mask": (lambda: layer("lattice")(tokens(1, 3), mask=torch.ones(1, 4, dtype=bool)), r"\[B,T\] = \(1, 3\)"),
    "kind of mask": (lambda: layer("lattice")(tokens(1, 3), mask=torch.ones(1, 3)), "expected torch.bool"),
    "mask in a pack": (
        lambda: layer("lattice")(tokens(1, 3), cu_seqlens=[0, 3], mask=torch.ones(1, 3, dtype=bool)),
        "leave the mask out",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_in_words(what):
    call, message = BAD[what]
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_the_cases_cover_every_mixer():
    assert {arguments["mixer"] for arguments in LAYERS.values()} == set(mixers.names())
