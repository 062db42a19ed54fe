"""DeepNorm's constants, the initial weights of a user's own module, and the encoders with every kind of residual."""

import math

import pytest
import torch
from torch import nn

from supy import models
from supy.nn import (
    DeepEncoder,
    DeepNormEncoder,
    GatedAttentionUnit,
    MixedChunkAttention,
    deepnorm_constants,
    deepnorm_init_,
)
from supy.nn.deep_encoder import RESIDUALS

KINDS = [(residual, block) for residual in RESIDUALS for block in ("transformer", "gau")]


# Four digits, as published: arXiv 2203.00555, worked out for these depths.
@pytest.mark.parametrize(
    "layers, alpha, beta",
    [(12, 2.2134, 0.3195), (24, 2.632, 0.2686), (96, 3.722, 0.1900), (500, 5.623, 0.1257), (1000, 6.687, 0.1057)],
)
@pytest.mark.parametrize("kind", ["encoder", "decoder", "encoder-only", "decoder_only"])
def test_constants_of_one_stack(kind, layers, alpha, beta):
    name = kind.partition("-")[0].partition("_")[0]
    constants = deepnorm_constants(kind, **{f"{name}_layers": layers})
    assert constants == pytest.approx((alpha, beta), abs=6e-4)  # half a unit of the third digit, where three are given


def test_constants_of_an_encoder_and_a_decoder():
    encoder, decoder = deepnorm_constants("encoder-decoder", 18, 18)
    assert (*encoder, *decoder) == pytest.approx((1.9987, 0.3526, 2.7108, 0.2608), abs=5e-5)
    encoder, decoder = deepnorm_constants("encoder-decoder", 6, 12)
    assert encoder == pytest.approx((0.81 * (6**4 * 12) ** (1 / 16), 0.87 * (6**4 * 12) ** (-1 / 16)))
    assert decoder == pytest.approx((36**0.25, 144**-0.25))


# What each row is for: lambda / alpha = (2N)^-1/2, lambda / alpha = 1 / 2N, lambda^2 / alpha = 1 / 2N.
@pytest.mark.parametrize("optimizer, left, right", [("sgd", (1, 1), 0.5), ("adam", (1, 1), 1), ("lamb", (2, 1), 1)])
def test_constants_of_an_optimizer(optimizer, left, right):
    alpha, beta = deepnorm_constants("encoder", 50, optimizer=optimizer)
    assert beta ** left[0] / alpha ** left[1] == pytest.approx(100**-right)
    assert alpha == 1 if optimizer == "lamb" else alpha * beta == pytest.approx(1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("both", 3), "kind is 'both', expected one of encoder, decoder, encoder-decoder"),
        (("encoder", 0), "encoder_layers is 0, expected a whole number of at least 1"),
        (("decoder", None), "decoder_layers is None, expected a whole number"),
        (("encoder", 4, 4), "decoder_layers is 4, expected none for kind 'encoder'"),
        (("encoder-decoder", 4), "decoder_layers is None"),
        (("encoder", 2.5), "encoder_layers is 2.5"),
    ],
)
def test_constants_refuse(arguments, message):
    with pytest.raises(ValueError, match="supy.deepnorm_constants: ") as error:
        deepnorm_constants(*arguments)
    assert message in str(error.value)


def test_init_of_torchs_own_layers():
    torch.manual_seed(0)
    network = nn.Transformer(16, 2, 2, 1, 24)
    before = {name: value.clone() for name, value in network.named_parameters()}
    scaled = deepnorm_init_(network, 0.3)
    assert len(scaled) == 2 * 4 + 6  # a decoder layer has attention twice
    for name, value in network.named_parameters():
        old = before[name]
        if name.endswith("in_proj_weight"):
            assert torch.equal(value[:32], old[:32]) and torch.equal(value[32:], old[32:] * 0.3)
        elif name.endswith(("out_proj.weight", "linear1.weight", "linear2.weight")):
            assert torch.equal(value, old * 0.3)
        else:
            assert torch.equal(value, old)


def test_init_of_attention_with_projections_of_its_own():
    attention = nn.MultiheadAttention(16, 2, kdim=8, vdim=12)
    before = {name: value.clone() for name, value in attention.named_parameters()}
    assert deepnorm_init_(attention, 2.0) == ["v_proj_weight", "out_proj.weight"]
    for name, value in attention.named_parameters():
        assert torch.equal(value, before[name] * (2 if name in ("v_proj_weight", "out_proj.weight") else 1))


@pytest.mark.parametrize("kind", [GatedAttentionUnit, MixedChunkAttention])
def test_init_of_gated_units(kind):
    unit = kind(8, value_size=12, key_size=4)
    before = {name: value.clone() for name, value in unit.named_parameters()}
    deepnorm_init_(nn.Sequential(unit), 0.5)
    assert torch.equal(unit.project_in.weight[:24], before["project_in.weight"][:24] / 2)
    assert torch.equal(unit.project_in.weight[24:], before["project_in.weight"][24:])
    assert torch.equal(unit.project_out.weight, before["project_out.weight"] / 2)
    assert torch.equal(unit.scale, before["scale"])


def test_init_by_the_usual_names():
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=9)
    expected = ["attention.self.value", "attention.output.dense", "intermediate.dense", "output.dense"]
    assert deepnorm_init_(BertModel(config), 0.5) == [
        f"encoder.layer.{layer}.{name}.weight" for layer in range(2) for name in expected
    ]
    gau_alpha = models.GAUAlpha(models.GAUAlphaConfig(vocab_size=9, hidden_size=8, intermediate_size=16,
                                                      attention_key_size=4, num_hidden_layers=2))  # fmt: skip
    assert len(deepnorm_init_(gau_alpha, 0.5)) == 4


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.mix = nn.Linear(4, 12), nn.Linear(4, 4)
        self.tied = self.mix


def test_init_by_pattern():
    module = Packed()
    before = module.mix.weight.clone()
    assert deepnorm_init_(module, 0.5, patterns=["mix"]) == ["mix.weight"]
    assert torch.equal(module.mix.weight, before / 2)


@pytest.mark.parametrize(
    "module, options, message",
    [
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), {}, "no value, output or feed-forward weight was found in"),
        (Packed(), {}, "qkv of Packed packs queries, keys and values, in an unknown order"),
        (Packed(), {"patterns": ["mlp"]}, "no weight of Packed has a name with 'mlp' in it"),
        (Packed(), {"patterns": []}, "patterns is empty"),
        (nn.MultiheadAttention(4, 1), {"beta": 0.0}, "beta is 0.0, expected a number above 0"),
    ],
)
def test_init_refuses_and_changes_nothing(module, options, message):
    before = [value.clone() for value in module.parameters()]
    with pytest.raises(ValueError, match="supy.deepnorm_init_: ") as error:
        deepnorm_init_(module, **{"beta": 0.5, **options})
    assert message in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters()))


@pytest.mark.parametrize("residual, block", KINDS)
def test_encoder_sees_no_padding_and_segments_change_nothing(residual, block):
    torch.manual_seed(0)
    encoder = DeepEncoder(3, 8, heads=2, residual=residual, block=block).double()
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    lengths = torch.tensor([6, 2, 0])
    if residual == "admin":
        encoder.profile_(x, lengths=lengths)
    if residual == "rezero":  # else x itself comes out
        nn.init.constant_(encoder.layers[0].parts[0].gain, 1.0)
    y = encoder(x, lengths=lengths)
    assert y.isfinite().all()
    torch.testing.assert_close(encoder(x[1:2, :2])[0], y[1, :2])
    changed = x.clone()
    changed[1, 2:] += 1
    assert torch.equal(encoder(changed, lengths=lengths)[1, :2], y[1, :2])

    gradients = torch.autograd.grad(y.square().sum(), list(encoder.parameters()), allow_unused=True)
    encoder.segment = 2
    again = encoder(x, lengths=lengths)
    assert torch.equal(again, y)
    for a, b in zip(gradients, torch.autograd.grad(again.square().sum(), list(encoder.parameters()))):
        assert torch.equal(a, b)


@pytest.mark.parametrize("block", ["transformer", "gau"])
def test_a_causal_encoder_does_not_look_ahead(block):
    encoder = DeepNormEncoder(2, 8, heads=2, block=block, causal=True).double()
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    later = x.clone()
    later[:, 4:] += 1
    for lengths in (None, torch.tensor([6, 5])):
        a, b = encoder(x, lengths=lengths), encoder(later, lengths=lengths)
        torch.testing.assert_close(a[:, :4], b[:, :4])
        assert not torch.allclose(a[:, 4], b[:, 4])


def test_a_layer_is_its_formula():
    """Post-norm against torch's own layer with the same weights, and DeepNorm against the formula."""
    encoder = DeepEncoder(1, 8, heads=2, residual="post").double()
    attention, feed = encoder.layers[0].parts
    layer = nn.TransformerEncoderLayer(8, 2, 32, 0.0, batch_first=True, layer_norm_eps=1e-6, dtype=torch.float64)
    with torch.no_grad():
        layer.self_attn.in_proj_weight.copy_(attention.branch.in_proj.weight)
        layer.self_attn.out_proj.weight.copy_(attention.branch.out_proj.weight)
        layer.linear1.weight.copy_(feed.branch.fc1.weight)
        layer.linear2.weight.copy_(feed.branch.fc2.weight)
        for linear in (layer.linear1, layer.linear2):
            linear.bias.zero_()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(encoder(x), layer(x))

    deep = DeepEncoder(1, 8, heads=2, residual="deepnorm", alpha=2.0, beta=1.0, affine=False).double()
    attention, feed = deep.layers[0].parts
    norm = lambda y: nn.functional.layer_norm(y, (8,), eps=1e-6)  # noqa: E731  the formula, in place
    y = norm(2 * x + attention.branch(x, None))
    torch.testing.assert_close(deep(x), norm(2 * y + feed.branch(y)))


def test_deepnorm_begins_with_the_papers_weights():
    torch.manual_seed(0)
    alpha, beta = deepnorm_constants("encoder", 50)
    encoder = DeepNormEncoder(50, 64)
    assert encoder.layers[0].parts[0].norm.alpha == alpha
    parts = [layer.parts for layer in encoder.layers]
    packed = torch.stack([attention.branch.in_proj.weight for attention, _ in parts])
    xavier = (1 / 64) ** 0.5  # sqrt(2 / (64 + 64))
    for rows, gain in ((packed[:, :128], 1), (packed[:, 128:], beta)):
        assert rows.std().item() == pytest.approx(gain * xavier, rel=0.01)  # 200,000 numbers or more: 0.2 % by chance
    fc1 = torch.stack([feed.branch.fc1.weight for _, feed in parts])
    assert fc1.std().item() == pytest.approx(beta * (2 / 320) ** 0.5, rel=0.01)


def test_admin_profiles_the_variances():
    """omega_i^2 is the variance of everything that came before: about 1 + the branches', as each x_i has variance 1."""
    torch.manual_seed(0)
    encoder = DeepEncoder(6, 64, residual="admin").double()
    x = torch.randn(4, 10, 64, dtype=torch.float64)
    branches = []
    for layer in encoder.layers:
        for part in layer.parts:
            part.branch.register_forward_hook(lambda module, inputs, output: branches.append(output.var().item()))
    encoder.profile_(x)
    omegas = [part.omega[0].item() for layer in encoder.layers for part in layer.parts]
    expected = [math.sqrt(1 + sum(branches[:i])) for i in range(12)]
    assert omegas == pytest.approx(expected, rel=0.02)  # the first x has variance 1 only nearly, 2,560 numbers
    with pytest.raises(ValueError, match="only admin is profiled"):
        DeepNormEncoder(1, 8).profile_(x)


def test_encoder_refuses():
    for options, message in (
        ({"layers": 0}, "layers is 0, expected at least 1"),
        ({"residual": "both"}, "residual is 'both', expected one of deepnorm, post"),
        ({"block": "lstm"}, "block is 'lstm'"),
        ({"heads": 3}, "width is 8, expected a multiple of heads=3"),
        ({"segment": 0}, "segment is 0"),
    ):
        with pytest.raises(ValueError, match="supy.DeepEncoder: ") as error:
            DeepEncoder(**{"layers": 1, "width": 8, **options})
        assert message in str(error.value)
    with pytest.raises(ValueError, match=r"x has shape \[2, 3, 4\], expected \[B, T, 8\]"):
        DeepEncoder(1, 8)(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"lengths has shape \[3\], expected \[B\] with B=2"):
        DeepEncoder(1, 8)(torch.zeros(2, 3, 8), lengths=torch.tensor([1, 2, 3]))
