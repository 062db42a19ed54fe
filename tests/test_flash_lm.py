"""FlashLM against the whole model computed once more in NumPy, and its generation against that model run anew."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from _rotate import rotate
from supy.models import FlashLM, FlashLMConfig
from supy.models.flash_lm import _choose

VOCAB, DIM, VALUE, KEY, LAYERS, CHUNK = 11, 6, 10, 4, 2, 5


def config(**changes):
    return FlashLMConfig(**{**dict(zip(SIZES, (VOCAB, DIM, VALUE, KEY, LAYERS, CHUNK))), **changes})


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "attention_key_size", "num_hidden_layers", "chunk_size")


def model(**changes):
    """In float64, with values so large that every part of a layer matters."""
    torch.manual_seed(0)
    model = FlashLM(config(**changes)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.8)
    return model


def numpy_model(model, ids):
    """Scores of one sequence `[T]`: a loop over pairs of tokens."""
    p = {name: value.numpy() for name, value in model.state_dict().items()}
    causal, T = model.config.causal, len(ids)
    x = p["tokens.weight"][ids]

    def norm(x, i):
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-5) * p[f"norms.{i}.scale"]

    for i in range(LAYERS):
        y = norm(x, i)
        if model.config.token_shift:
            y = np.concatenate((np.vstack((np.zeros(DIM), y[:-1]))[:, : DIM // 2], y[:, DIM // 2 :]), 1)
        y = y @ p[f"layers.{i}.project_in.weight"].T
        y = y / (1 + np.exp(-y))
        u, v, z = y[:, :VALUE], y[:, VALUE : 2 * VALUE], y[:, 2 * VALUE :]
        heads = zip(p[f"layers.{i}.scale"], p[f"layers.{i}.offset"], strict=True)
        q, k, q_lin, k_lin = (rotate(z * scale + offset) for scale, offset in heads)
        out = np.zeros_like(v)
        for t in range(T):
            for s in range(T):
                here, there = t // CHUNK, s // CHUNK
                if here == there and not (causal and s > t):
                    out[t] += max(q[t] @ k[s] / math.sqrt(KEY), 0) ** 2 / CHUNK * v[s]
                if not causal:
                    out[t] += q_lin[t] @ k_lin[s] / T * v[s]
                elif there < here:
                    out[t] += q_lin[t] @ k_lin[s] / (here * CHUNK) * v[s]
        x = x + (u * out) @ p[f"layers.{i}.project_out.weight"].T
    return norm(x, LAYERS) @ p["tokens.weight"].T


IDS = torch.tensor(np.random.default_rng(1).integers(0, VOCAB, (3, 13)))


@pytest.mark.parametrize("causal, token_shift", [(True, True), (True, False), (False, True)])
def test_it_is_its_formula(causal, token_shift):
    flash = model(causal=causal, token_shift=token_shift)
    lengths = torch.tensor([13, 10, 1])
    padded = flash(IDS, lengths=lengths).detach().numpy()
    for b, length in enumerate(lengths.tolist()):
        expected = numpy_model(flash, IDS[b, :length].numpy())
        # float64 on both sides; what is left is the order of sums, 1e-16 times the depth of the network.
        np.testing.assert_allclose(padded[b, :length], expected, rtol=1e-9, atol=1e-9)


def test_head_is_the_embedding():
    sizes = VOCAB * DIM, (2 * VALUE + KEY) * DIM + VALUE * DIM + 2 * 4 * KEY, 1
    expected = sizes[0] + LAYERS * sizes[1] + (LAYERS + 1) * sizes[2]
    assert sum(p.numel() for p in FlashLM(config()).parameters()) == expected


# Prompts below, at and above a chunk, and at two.
@pytest.mark.parametrize("length, token_shift", [(1, True), (4, True), (5, True), (6, False), (10, True), (11, True)])
def test_prompt_and_steps_are_the_model(length, token_shift):
    flash = model(token_shift=token_shift)
    expected = flash(IDS)
    scores, state = flash.prefill(IDS[:, :length])
    for t in range(length, 13):
        torch.testing.assert_close(scores, expected[:, t - 1])
        scores = flash.step(IDS[:, t], state)
    torch.testing.assert_close(scores, expected[:, -1])


def test_likeliest_tokens_are_those_of_the_model():
    flash = model()
    lengths = torch.tensor([7, 5, 1])  # of different prompts, each goes on from its own end
    got = torch.stack(list(flash.generate(IDS[:, :7], lengths=lengths, count=12, temperature=0)), 1)
    for b, length in enumerate(lengths.tolist()):
        ids = IDS[b, :length]
        for _ in range(12):
            ids = torch.cat([ids, flash(ids[None])[0, -1].argmax(keepdim=True)])
        assert got[b].tolist() == ids[length:].tolist()


def test_generation_streams_and_a_seed_repeats():
    flash = model(hidden_dropout_prob=0.9).train()  # which generation does not use

    def first(count, **options):
        endless = flash.generate(IDS[:1, :3], **options)
        return [token.item() for token in itertools.islice(endless, count)]

    assert first(30, generator=1) == first(30, generator=1) != first(30, generator=2)
    assert first(20, generator=1) == first(30, generator=torch.Generator().manual_seed(1))[:20]
    assert first(9, temperature=0) == first(9, top_k=1) == first(9, top_p=1e-9) == first(9, temperature=1e-6)
    assert list(flash.generate(IDS[:1], count=0)) == []
    assert flash.training


def test_it_stops():
    flash = model()
    rows = torch.stack(list(flash.generate(IDS, generator=0, stop=4)), 1)
    for row in rows.tolist():
        end = row.index(4)
        assert set(row[end:]) == {4}
    assert (rows[:, -2] != 4).any()  # no longer than needed


def test_tokens_are_drawn_by_their_probabilities():
    torch.manual_seed(0)
    scores = torch.log(torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2]))
    n = 200_000

    def frequencies(temperature=1.0, top_k=None, top_p=None):
        drawn = _choose(scores.expand(n, 5), temperature, top_k, top_p, None)
        return torch.bincount(drawn, minlength=5) / n

    def assert_near(got, weights):
        expected = torch.tensor(weights) / sum(weights)
        assert ((got == 0) == (expected == 0)).all()
        assert (got - expected).abs().max() < 5 * 0.5 / n**0.5  # five sigma

    assert_near(frequencies(), [0.05, 0.4, 0.1, 0.25, 0.2])
    assert_near(frequencies(temperature=0.5), [0.05**2, 0.4**2, 0.1**2, 0.25**2, 0.2**2])
    assert_near(frequencies(top_k=2), [0, 0.4, 0, 0.25, 0])
    assert_near(frequencies(top_p=0.3), [0, 1.0, 0, 0, 0])
    assert_near(frequencies(top_p=0.7), [0, 0.4, 0, 0.25, 0.2])
    assert_near(frequencies(top_p=0.9, top_k=3), [0, 0.4, 0, 0.25, 0.2])
    assert_near(frequencies(temperature=0.5, top_p=0.6), [0, 0.4**2, 0, 0.25**2, 0])


def test_folder_is_read_again(tmp_path):
    for causal in (True, False):
        flash = FlashLM(config(causal=causal)).eval()
        flash.save_pretrained(tmp_path)
        again = FlashLM.from_pretrained(tmp_path)
        assert again.config == flash.config and not again.training
        assert torch.equal(again(IDS), flash(IDS))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]

    values = json.loads((tmp_path / "config.json").read_text())
    for name, value, message in (
        ("num_hidden_layers", 3, "the checkpoint lacks variables layers.2.offset, layers.2.project_in.wei"),
        ("num_hidden_layers", 1, "has unknown variables layers.1.offset, layers.1.project_in.weight"),
        ("vocab_size", 12, r"variable tokens.weight has shape \[11, 6\], expected \[12, 6\]"),
        ("causal", 1, "supy.FlashLMConfig: causal is 1, expected bool"),
        ("model_type", "gau_alpha", "has model_type 'gau_alpha', expected 'supy_flash'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(values | {name: value}))
        with pytest.raises(ValueError, match=message):
            FlashLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({name: values[name] for name in values if name != "vocab_size"}))
    with pytest.raises(ValueError, match="config.json has no vocab_size"):
        FlashLM.from_pretrained(tmp_path)


def test_killed_while_saving_keeps_what_was_there(tmp_path, monkeypatch):
    flash = FlashLM(config())
    flash.save_pretrained(tmp_path)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        model().float().save_pretrained(tmp_path)
    monkeypatch.undo()
    assert torch.equal(FlashLM.from_pretrained(tmp_path)(IDS), flash(IDS))
    assert len(list(tmp_path.iterdir())) == 2


def test_bad_arguments_are_refused_by_the_call():
    flash = model()
    prompt = IDS[:1]
    for arguments, message in (
        ({"count": -1}, "count is -1, expected 0 or more"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0, expected 1 or more"),
        ({"top_p": 0.0}, "top_p is 0.0, expected more than 0"),
        ({"lengths": torch.tensor([0])}, "lengths has an empty prompt"),
        ({"lengths": torch.tensor([1, 1])}, r"lengths has shape \[2\], expected \[B\] with B=1"),
        ({"prompt": prompt[:, :0]}, r"prompt has shape \[1, 0\]"),
        ({"prompt": prompt[0]}, r"prompt has shape \[13\], expected \[B, T\]"),
        ({"prompt": prompt + VOCAB}, "prompt has tokens outside 0 to 10"),
    ):
        with pytest.raises(ValueError, match=f"^supy.FlashLM.generate: {message}"):
            flash.generate(**{"prompt": prompt, **arguments})
    with pytest.raises(TypeError, match="prompt has dtype torch.int32"):
        flash.generate(prompt.int())
    with pytest.raises(ValueError, match="the model's config has causal False, expected True"):
        model(causal=False).generate(prompt)
    with pytest.raises(ValueError, match="attention_key_size is 7, expected an even number"):
        config(attention_key_size=7)


def test_state_does_not_grow():
    flash = model()

    def size(state):
        tensors = [x for layer in state.layers for x in vars(layer).values() if isinstance(x, torch.Tensor)]
        return sum(x.numel() for x in tensors + state.previous)

    _, state = flash.prefill(IDS[:, :1])
    before = size(state)
    for t in range(40):
        flash.step(IDS[:, t % 13], state)
    assert size(state) == before == size(flash.prefill(IDS.repeat(1, 9))[1])


@pytest.mark.parametrize("causal", [True, False])
def test_it_trains_and_compiles(causal):
    torch.manual_seed(0)
    flash = FlashLM(config(causal=causal, hidden_size=32, intermediate_size=64, attention_key_size=16))
    optimizer = torch.optim.AdamW(flash.parameters(), lr=1e-2)
    # The next token is the sum of the last two; a masked one, too, follows from those around it.
    ids = torch.randint(1, VOCAB, (64, 14))
    for t in range(2, 14):
        ids[:, t] = (ids[:, t - 1] + ids[:, t - 2]) % (VOCAB - 1) + 1
    inputs, targets = ids[:, :-1], ids[:, 1:]
    if not causal:
        hidden = torch.zeros(64, 14, dtype=torch.bool)
        hidden[:, 3::4] = True
        inputs, targets = ids.masked_fill(hidden, 0), ids.masked_fill(~hidden, -100)
    for _ in range(15):
        loss = F.cross_entropy(flash(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1.0  # log(10) = 2.3 to begin with
    flash.eval()
    compiled = torch.compile(flash, fullgraph=True, backend="aot_eager")
    for part in (inputs, inputs[:, :9]):
        torch.testing.assert_close(compiled(part), flash(part))
