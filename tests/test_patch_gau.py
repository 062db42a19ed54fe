"""Gated attention over patches, against the whole network computed once more in NumPy."""

import math

import numpy as np
import pytest
import torch

from supy import ops
from supy.models import PatchGAU, PatchGAUConfig, UNet
from supy.nn import GatedAttentionUnit

PATCH, DIM, VALUE, KEY, LAYERS = 2, 12, 20, 8, 2
TINY = PatchGAUConfig(
    channels=3,
    out_channels=6,
    steps=7,
    classes=2,
    patch=PATCH,
    hidden_size=DIM,
    intermediate_size=VALUE,
    attention_key_size=KEY,
    num_hidden_layers=LAYERS,
    rotary_base=30.0,
)


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 3, 6, 10, dtype=dtype, generator=generator)
    return x, torch.tensor([0, 3, 6]), torch.tensor([1, 2, 0])


def numbered(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return model.eval()


def rotate(x, row, column):
    """Pairs of the first half turn with the row, of the second with the column."""
    out, half = np.empty_like(x), KEY // 2
    for start, place in ((0, row), (half, column)):
        for i in range(0, half, 2):
            angle = place * 30.0 ** (-i / half)
            a, b = x[start + i], x[start + i + 1]
            out[start + i] = a * math.cos(angle) - b * math.sin(angle)
            out[start + i + 1] = b * math.cos(angle) + a * math.sin(angle)
    return out


def numpy_model(model, picture, t, label):
    p = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}

    def rms(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-7) * p[name]

    _, H, W = picture.shape
    places = [(i, j) for i in range(H // PATCH) for j in range(W // PATCH)]
    tokens = []
    for i, j in places:
        pixels = [picture[:, PATCH * i + a, PATCH * j + b] for a in range(PATCH) for b in range(PATCH)]
        tokens.append(np.concatenate(pixels) @ p["first.weight"].T + p["time.weight"][t] + p["labels.weight"][label])
    x = np.stack(tokens)
    for layer in range(LAYERS):
        unit = f"units.{layer}.unit."
        h = rms(x, f"units.{layer}.norm.weight") @ p[unit + "project_in.weight"].T
        u, v, z = np.split(h / (1 + np.exp(-h)), (VALUE, 2 * VALUE), -1)
        turned = []
        for scale, offset in zip(p[unit + "scale"], p[unit + "offset"]):
            turned.append(np.stack([rotate(row, *place) for row, place in zip(z * scale + offset, places)]))
        q, k = turned
        a = np.exp(q @ k.T / math.sqrt(KEY))
        a /= a.sum(-1, keepdims=True)
        x = x + (u * (a @ v)) @ p[unit + "project_out.weight"].T
    y = rms(x, "norm.weight") @ p["last.weight"].T
    out = np.empty((6, H, W))
    for token, (i, j) in zip(y, places):
        for a in range(PATCH):
            for b in range(PATCH):
                out[:, PATCH * i + a, PATCH * j + b] = token[6 * (PATCH * a + b) :][:6]
    return out


@torch.no_grad()
def test_is_the_formula():
    model = numbered(PatchGAU(TINY)).double()
    x, t, labels = inputs()
    got, without = model(x, t, labels), model(x, t)
    for b in range(3):
        for values, label in ((got, labels[b]), (without, 2)):
            expected = numpy_model(model, x[b].numpy(), t[b].item(), label)
            # float64 on both sides; what is left is the order of sums, 1e-16 times the depth of the network.
            np.testing.assert_allclose(values[b].numpy(), expected, rtol=1e-9, atol=1e-9)


def test_parameters_at_full_size():
    with torch.device("meta"):
        model = PatchGAU(PatchGAUConfig.full())
    unit = 768 + (2 * 1536 + 128) * 768 + 1536 * 768 + 2 * 2 * 128
    expected = 1000 * 768 + 192 * 768 + 24 * unit + 768 + 768 * 192
    assert sum(parameter.numel() for parameter in model.parameters()) == expected == 88_388_352


@pytest.mark.parametrize("side", [8, 32, 64])
def test_sizes(side):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "attention_key_size": 4, "num_hidden_layers": 1}
    model = PatchGAU(PatchGAUConfig.small(side, channels=1, out_channels=2, **sizes))
    assert model(torch.zeros(1, 1, side, side), torch.tensor([999])).shape == (1, 2, side, side)
    assert model(torch.zeros(0, 1, side, side), torch.tensor([], dtype=torch.int64)).shape == (0, 2, side, side)


def test_gradients_reach_every_parameter():
    model = PatchGAU(TINY)
    x = torch.randn(1, 3, 4, 4).expand(7, -1, -1, -1)
    model(x, torch.arange(7), torch.arange(7) % 3).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_checkpointing_changes_nothing():
    model = numbered(PatchGAU(TINY)).train()
    x, t, labels = inputs(torch.float32)
    gradients = []
    for model.checkpointing in (False, True):
        model.zero_grad()
        model(x, t, labels).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@torch.no_grad()
def test_bfloat16_and_compiled():
    model = numbered(PatchGAU(TINY))
    x, t, labels = inputs(torch.float32)
    plain = model(x, t, labels)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x, t, labels)
    # About 15 operations in a row round to 2^-9 of a value; independent errors grow with the root of their number.
    assert (half - plain).norm() < 2 * 15**0.5 * 2**-9 * plain.norm()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, t, labels), plain)


def test_errors_and_files(tmp_path):
    model = numbered(PatchGAU(TINY))
    x, t, labels = inputs(torch.float32)
    with pytest.raises(ValueError, match="x is 5 x 10, expected sides that are multiples of 2, such as 6 x 10"):
        model(x[:, :, :5], t)
    with pytest.raises(ValueError, match="attention_key_size is 6, expected a multiple of 4"):
        PatchGAUConfig(attention_key_size=6)
    model.save_pretrained(tmp_path)
    again = PatchGAU.from_pretrained(tmp_path)
    assert again.config == TINY and torch.equal(again(x, t, labels), model(x, t, labels))
    with pytest.raises(ValueError, match="model_type 'supy_patch_gau', expected 'supy_unet'"):
        UNet.from_pretrained(tmp_path)


# The rotation of the unit. ------------------------------------------------------------------------------------------


def test_given_rotation_is_used():
    torch.manual_seed(0)
    unit = GatedAttentionUnit(16, key_size=8, kernel="softmax")
    x = torch.randn(2, 9, 16)
    angle = torch.arange(9)[:, None] * 10000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    rotation = angle.cos().float(), angle.sin().float()
    assert torch.equal(unit(x, rotation=rotation), unit(x))

    # Tokens in another order, with their angles: the same attention, values and gradients in that order.
    order = torch.randperm(9)
    results = []
    for x, tables in ((x, rotation), (x[:, order], [table[order] for table in rotation])):
        unit.zero_grad()
        x = x.requires_grad_() if x.is_leaf else x.detach().requires_grad_()
        y = unit(x, rotation=tables)
        y.square().sum().backward()
        results.append((y, x.grad, unit.project_in.weight.grad.clone(), unit.scale.grad.clone()))
    (y, dx, *weights), (y2, dx2, *weights2) = results
    # float32 sums over the tokens in another order.
    torch.testing.assert_close(y2, y[:, order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dx2, dx[:, order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights2, weights, rtol=1e-4, atol=1e-4)


def test_rotation_that_does_not_fit():
    x, w_in, w_out = torch.ones(1, 3, 4), torch.ones(12, 4), torch.ones(4, 4)
    table = torch.ones(3, 2)

    def error(rotation):
        with pytest.raises((ValueError, TypeError)) as caught:
            ops.gated_attention_unit(x, w_in, w_out, torch.ones(2, 4), torch.zeros(2, 4), rotation=rotation)
        return str(caught.value)

    assert "rotation is a Tensor, expected two tensors, cosine and sine" in error(table)
    assert "rotation[1] has shape [2, 2], expected [T, S/2] with T=3, S/2=2" in error((table, table[:2]))
    assert "rotation[0] has dtype torch.int64, expected a floating-point dtype" in error((table.long(), table))
