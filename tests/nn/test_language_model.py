"""The language model: streaming says what the parallel form says, and torch's own tools work on it."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import mixers
from mixers.nn import Block, LanguageModel

close = torch.testing.assert_close
MODELS = {
    "lattice": {"mixer": "lattice"},
    "lattice, chunk of 4": {"mixer": "lattice", "chunk_size": 4},
    "kda": {"mixer": "kda"},
    "ttt_linear": {"mixer": "ttt_linear", "chunk_size": 4},
    "attention": {"mixer": "attention"},
    "hybrid": {"layers": 3, "mixer": ["delta_rule", {"mixer": "lattice", "chunk_size": 4, "heads": 4}, "attention"]},
}
VOCAB = 23
every_model = pytest.mark.parametrize("name", MODELS)


def model(name, **changes):
    torch.manual_seed(0)
    return LanguageModel(**{"vocab": VOCAB, "d_model": 16, "layers": 2, "heads": 2, **MODELS[name], **changes})


def words(*shape):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(1))


def loss_of(made, tokens, **rest):
    logits, _ = made(tokens[:, :-1], **rest)
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def gradients(made, tokens, **rest):
    made.zero_grad()
    loss_of(made, tokens, **rest).backward()
    return {key: p.grad.clone() for key, p in made.named_parameters()}


@every_model
def test_starts_as_wide_as_the_vocabulary(name):
    made = model(name)
    logits, state = made(words(2, 9))
    assert logits.shape == (2, 9, VOCAB) and len(state) == len(made.blocks)
    assert loss_of(made, words(8, 33)).item() < math.log(VOCAB) + 1
    assert made(words(2, 9), return_state=False)[1] is None


@every_model
def test_generation_says_what_the_parallel_form_says(name):
    made = model(name)
    prompt = words(2, 5)
    text = made.generate(prompt, 12, temperature=0)
    assert text.shape == (2, 17) and torch.equal(text[:, :5], prompt)
    logits, _ = made(text)
    assert torch.equal(logits[:, 4:-1].argmax(-1), text[:, 5:])


def test_a_long_prompt_is_read_in_pieces(monkeypatch):
    made, prompt = model("hybrid"), words(1, 11)
    whole = made.generate(prompt, 4, temperature=0)
    monkeypatch.setattr("mixers.nn.language_model.PIECE", 3)
    assert torch.equal(made.generate(prompt, 4, temperature=0), whole)


def test_streams_at_constant_memory():
    made = model("lattice")
    sizes = []
    made.blocks[0].mixer.register_forward_hook(
        lambda _, __, out: sizes.append((out[1].conv.shape, out[1].mixer.shape, out[0].grad_fn))
    )
    tokens = list(made.stream(words(2, 1), 30))
    assert len(tokens) == 30 and all(t.shape == (2,) for t in tokens)
    assert len(sizes) == 30 and set(sizes) == {(torch.Size([2, 3, 48]), torch.Size([2, 2, 8, 8]), None)}


def test_drawing():
    made, prompt = model("lattice"), words(2, 4)
    with torch.no_grad():
        made.embed.weight.mul_(3)

    def draw(seed, **rest):
        return made.generate(prompt, 20, generator=torch.Generator().manual_seed(seed), **rest)

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert torch.equal(draw(0, top_k=1), made.generate(prompt, 20, temperature=0))
    assert torch.equal(draw(0, temperature=1e-4), made.generate(prompt, 20, temperature=0))
    text = draw(3, top_k=4)
    among = made(text)[0][:, 3:-1].topk(4).indices
    assert (among == text[:, 4:, None]).any(-1).all()
    with pytest.raises(ValueError, match="at least one token"):
        made.generate(prompt[:, :0], 3)


@every_model
def test_recomputation_changes_nothing(name):
    kept, recomputed = model(name), model(name, recompute=True)
    inside = []
    recomputed.blocks[1].mixer.project.register_forward_hook(lambda *_: inside.append(1))
    expected, got = gradients(kept, words(2, 10)), gradients(recomputed, words(2, 10))
    assert len(inside) == 2  # once forward, once again in the backward
    for key, gradient in expected.items():
        close(got[key], gradient, msg=key)


@every_model
def test_compiles_as_one_graph(name):
    made = model(name)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(made, fullgraph=True, backend=counter)
    for shape in ((2, 10), (3, 17), (4, 33), (5, 21)):
        expected, got = gradients(made, words(*shape)), gradients(compiled, words(*shape))
        for key, gradient in expected.items():
            close(got["_orig_mod." + key], gradient, msg=key)
    assert counter.frame_count <= 2  # one graph for the first sizes, one for any
    torch._dynamo.reset()


def test_compiles_with_recomputation_packs_and_padding():
    made = model("hybrid", recompute=True)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    tokens, mask = words(2, 10), torch.ones(2, 10, dtype=torch.bool)
    mask[0, :4] = False
    expected, got = gradients(made, tokens), gradients(compiled, tokens)
    for key, gradient in expected.items():
        close(got["_orig_mod." + key], gradient, msg=key)
    close(compiled(tokens, mask=mask)[0], made(tokens, mask=mask)[0])
    offsets = torch.tensor([0, 3, 10])
    close(compiled(tokens[:1], cu_seqlens=offsets)[0], made(tokens[:1], cu_seqlens=offsets)[0])
    state = made(tokens)[1]
    close(compiled(tokens, state)[0], made(tokens, state)[0])
    torch._dynamo.reset()


@every_model
def test_autocast(name):
    made, tokens = model(name), words(4, 33)
    expected = loss_of(made, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        got = loss_of(made, tokens)
    close(got.float(), expected, rtol=0.02, atol=0.02)
    got.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in made.parameters())


@every_model
def test_checkpoint_round_trip(name, tmp_path):
    made, tokens = model(name), words(2, 9)
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-3)
    loss_of(made, tokens).backward()
    optimizer.step()
    made.save(tmp_path / "model.pt", optimizer=optimizer.state_dict(), step=1)

    loaded, more = LanguageModel.load(tmp_path / "model.pt")
    assert loaded.config == made.config and more["step"] == 1
    assert torch.equal(loaded(tokens)[0], made(tokens)[0])
    other = torch.optim.AdamW(loaded.parameters(), lr=1e-3)
    other.load_state_dict(more["optimizer"])
    for one, its in ((made, optimizer), (loaded, other)):
        one.zero_grad()
        loss_of(one, tokens).backward()
        its.step()
    assert torch.equal(loaded(tokens)[0], made(tokens)[0])


@every_model
def test_made_on_the_meta_device(name):
    with torch.device("meta"):
        made = model(name)
    made.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(torch.nan)
    made.reset_parameters()
    assert loss_of(made, words(8, 33)).item() < math.log(VOCAB) + 1
    plain = model(name)
    for (key, a), (_, b) in zip(made.named_parameters(), plain.named_parameters(), strict=True):
        close(a.std(correction=0), b.std(correction=0), rtol=0.5, atol=0.5 * b.abs().max().item(), msg=key)


def test_packs_and_padding_say_what_separate_documents_say():
    made = model("hybrid")
    documents = [words(1, length) for length in (4, 1, 7)]
    alone = torch.cat([made(document)[0] for document in documents], 1)
    packed, _ = made(torch.cat(documents, 1), cu_seqlens=mixers.pack([4, 1, 7]))
    close(packed, alone)

    rows, mask = torch.zeros(3, 7, dtype=torch.long), torch.zeros(3, 7, dtype=torch.bool)
    for n, document in enumerate(documents):
        rows[n, 7 - document.shape[1] :] = document
        mask[n, 7 - document.shape[1] :] = True
    padded, _ = made(rows, mask=mask)
    close(padded[mask], alone[0])


def test_one_entry_a_block():
    made = model("hybrid")
    assert [block.mixer.mix.spec.name for block in made.blocks] == ["delta_rule", "lattice", "attention"]
    assert made.blocks[1].mixer.mix.options["chunk_size"] == 4
    with pytest.raises(ValueError, match="expected one entry a block"):
        LanguageModel(VOCAB, 16, 3, 2, ["lattice", "attention"])


def test_embedding_is_tied_and_block_is_residual():
    made = model("lattice")
    assert sum(p.numel() for p in made.parameters() if VOCAB in p.shape) == VOCAB * 16
    block = Block("lattice", d_model=16, heads=2)
    with torch.no_grad():
        block.mixer.out.weight.zero_()
        block.mlp.down.weight.zero_()
    x = torch.randn(1, 4, 16)
    assert torch.equal(block(x)[0], x)
