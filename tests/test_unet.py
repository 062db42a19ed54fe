"""The U-Nets, against Keras-DDPM's computed in NumPy as Keras has them: channels last, channel c in group c mod G."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from supy.models import PostNormUNet, UNet, UNetConfig

TINY = UNetConfig(channels=3, out_channels=6, steps=7, classes=2, base=8, multipliers=(1, 2, 2), blocks=2, groups=4)
NETWORKS = pytest.mark.parametrize("network", [PostNormUNet, UNet])


def numbered(model, seed=0):
    """The model in float64 with random values, also where it begins with ones, zeros and 1e-10."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    for parameter in model.parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator) * scale
    return model


def inputs(size, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 3, *size, dtype=dtype, generator=generator)
    return x, torch.tensor([0, 3, 6]), torch.tensor([1, 2, 0])


# Keras-DDPM in NumPy. -----------------------------------------------------------------------------------------------


def keras(model):
    """A model's arrays as Keras has them: kernels [3, 3, in, out] or [in, out], channels in the order of c mod G."""
    groups, arrays = model.config.groups, {}
    pictures = {"first.weight": 1, "last.weight": 0}  # axis of the picture's own channels
    for name, parameter in model.named_parameters():
        array = parameter.detach().numpy()
        hidden = range(min(array.ndim, 2))
        if name.startswith(("time", "labels")):
            hidden = ()
        elif "shift" in name:
            hidden = (0,)
        for axis in hidden:
            if pictures.get(name) != axis:
                C = array.shape[axis]
                array = array.take([c % groups * (C // groups) + c // groups for c in range(C)], axis)
        if array.ndim > 1 and not isinstance(model.get_submodule(name.rpartition(".")[0]), torch.nn.Embedding):
            array = np.moveaxis(array, (0, 1), (-1, -2))
        arrays[name] = array.squeeze((0, 1)) if array.shape[:2] == (1, 1) else array
    return arrays


def swish(x):
    return x / (1 + np.exp(-x))


def conv(x, kernel):
    H, W, _ = x.shape
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    return sum(padded[i : i + H, j : j + W] @ kernel[i, j] for i in range(3) for j in range(3))


def group_norm(x, weight, bias, groups):
    split = x.reshape(*x.shape[:2], -1, groups)
    mean = split.mean((0, 1, 2), keepdims=True)
    variance = ((split - mean) ** 2).mean((0, 1, 2), keepdims=True)
    return ((split - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape) * weight + bias


def pool(x):
    return (x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]) / 4


def double(x):
    return x.repeat(2, 0).repeat(2, 1)


def post_norm_unet(p, x, t, label, groups, levels, blocks):
    def block(x, name):
        shortcut = x @ p[f"{name}.shortcut.weight"] if f"{name}.shortcut.weight" in p else x
        y = swish(conv(x + t @ p[f"{name}.shift.weight"], p[f"{name}.conv1.weight"]))
        y = swish(conv(y, p[f"{name}.conv2.weight"])) + shortcut
        return group_norm(y, p[f"{name}.norm.weight"], p[f"{name}.norm.bias"], groups)

    t = p["time.weight"][t] + p["labels.weight"][label]
    x = conv(x, p["first.weight"])
    made, pooled = [x], {}
    for k in range(levels * blocks):
        x = block(x, f"down.{k // blocks}.{k % blocks}")
        made.append(x)
        if (k + 1) % blocks == 0 and min(x.shape[:2]) > 4:
            x = pooled[k + 1] = pool(x)
    x = block(x, "middle")
    for up, k in enumerate(range(levels * blocks, -1, -1)):
        if up:
            x = block(x, f"up.{(up - 1) // blocks}.{(up - 1) % blocks}") + pooled.get(k, made[k])
        if k in pooled:
            x = double(x) + made[k]
    return conv(group_norm(x, p["norm.weight"], p["norm.bias"], groups), p["last.weight"])


def unet(p, x, t, label, groups, levels, blocks):
    def active(x, name):
        return swish(group_norm(x, p[f"{name}.weight"], p[f"{name}.bias"], groups))

    def block(x, name):
        shortcut = x @ p[f"{name}.shortcut.weight"] if f"{name}.shortcut.weight" in p else x
        y = conv(active(x, f"{name}.norm1"), p[f"{name}.conv1.weight"]) + t @ p[f"{name}.shift.weight"]
        return conv(active(y, f"{name}.norm2"), p[f"{name}.conv2.weight"]) + shortcut

    base = p["time.0.weight"].shape[0]
    angles = t * 10000.0 ** (-np.arange(0, base, 2) / base)
    t = np.stack((np.sin(angles), np.cos(angles)), 1).reshape(base)
    t = swish(swish(t @ p["time.0.weight"]) @ p["time.2.weight"]) + p["labels.weight"][label]
    x = conv(x, p["first.weight"])
    made = [x]
    for level in range(levels):
        for i in range(blocks):
            x = block(x, f"down.{level}.{i}")
            made.append(x)
        if level + 1 < levels:
            x = pool(x)
            made.append(x)
    x = block(x, "middle")
    for level in range(levels):
        x = double(x) if level else x
        for i in range(blocks + 1):
            x = block(np.concatenate((x, made[-1 - level * (blocks + 1) - i]), -1), f"up.{level}.{i}")
    return conv(swish(group_norm(x, p["norm.weight"], p["norm.bias"], groups)), p["last.weight"])


@pytest.mark.parametrize(
    "network, keras_model, size",
    [
        (PostNormUNet, post_norm_unet, (16, 16)),  # averaged twice: the last level is as large as the one before
        (PostNormUNet, post_norm_unet, (4, 6)),  # never
        (PostNormUNet, post_norm_unet, (32, 40)),  # after the last level too
        (UNet, unet, (8, 12)),
    ],
)
@torch.no_grad()
def test_is_keras_ddpm(network, keras_model, size):
    model = numbered(network(TINY))
    x, t, labels = inputs(size)
    got = model(x, t, labels).numpy()
    without = model(x, t).numpy()
    p = keras(model)
    for b in range(3):
        picture, sizes = x[b].numpy().transpose(1, 2, 0), (4, 3, 2)
        for values, label in ((got, labels[b]), (without, 2)):
            expected = keras_model(p, picture, t[b].item(), label, *sizes).transpose(2, 0, 1)
            # float64 on both sides: the order of sums, 1e-16 times the depth of the network.
            np.testing.assert_allclose(values[b], expected, rtol=1e-9, atol=1e-9)


def test_groups_are_those_of_keras():
    x = np.random.default_rng(0).normal(size=(5, 3, 128))  # [H, W, C]; 32 groups of 4 channels, 32 apart
    expected = group_norm(x, 1, 0, 32)
    order = [c % 32 * 4 + c // 32 for c in range(128)]  # where Keras's channel c stands
    ours = np.empty_like(x)
    ours[..., order] = x
    norm = PostNormUNet(UNetConfig(base=128, multipliers=(1,), blocks=1)).double().norm
    assert norm.num_groups == 32
    got = norm(torch.from_numpy(ours).permute(2, 0, 1)[None])[0].permute(1, 2, 0).detach().numpy()
    np.testing.assert_allclose(got[..., order], expected, rtol=1e-12, atol=1e-12)


# Sizes. -------------------------------------------------------------------------------------------------------------


def count(network, config=UNetConfig()):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in network(config).parameters())


def test_parameters_at_full_size():
    def post_norm_block(inputs, outputs):
        shortcut = (inputs != outputs) * inputs * outputs
        return 128 * inputs + 9 * inputs * outputs + 9 * outputs**2 + shortcut + 2 * outputs

    pairs = [(128, 128)] * 8 + [(128, 256)] + [(256, 256)] * 6 + [(256, 512)] + [(512, 512)] * 7
    pairs += [(512, 256), (256, 128)]
    edges = 9 * 3 * 128 + 2 * 128 + 9 * 128 * 3
    assert count(PostNormUNet) == 1000 * 128 + edges + sum(post_norm_block(*pair) for pair in pairs) == 50_514_176

    def block(inputs, outputs):
        shortcut = (inputs != outputs) * inputs * outputs
        return 2 * inputs + 9 * inputs * outputs + 512 * outputs + 2 * outputs + 9 * outputs**2 + shortcut

    pairs = [(128, 128)] * 4 + [(128, 256)] + [(256, 256)] * 3 + [(256, 512)] + [(512, 512)] * 4  # down, middle
    pairs += [(1024, 512)] * 5 + [(768, 512)] + [(768, 256)] + [(512, 256)] * 4 + [(384, 256)]
    pairs += [(384, 128)] + [(256, 128)] * 5
    assert count(UNet) == 128 * 512 + 512**2 + edges + sum(block(*pair) for pair in pairs) == 92_460_800


@NETWORKS
@pytest.mark.parametrize("side", [8, 32, 64, 128])
def test_sizes(network, side):
    """One model serves every size; the products are those of the levels that it has."""
    if network is PostNormUNet or side >= 32:
        with torch.device("meta"):
            model, x = network(), torch.zeros(2, 3, side, side)
            assert model(x, torch.zeros(2, dtype=torch.int64)).shape == (2, 3, side, side)
    model = network(UNetConfig.small(side, channels=1, base=8, out_channels=2))
    assert model(torch.zeros(1, 1, side, side), torch.tensor([999])).shape == (1, 2, side, side)


def test_groups_follow_base():
    for base, groups in ((2, 1), (6, 1), (12, 3), (32, 8), (64, 16), (128, 32), (192, 32), (256, 32)):
        assert UNetConfig(base=base).groups == groups
    assert UNetConfig(base=64, groups=32).groups == 32


# Training. ----------------------------------------------------------------------------------------------------------


@NETWORKS
def test_gradients_reach_every_parameter(network):
    model = network(TINY)
    x, t, _ = inputs((8, 8), dtype=torch.float32)
    t, labels = torch.arange(7), torch.arange(7) % 3
    model(x[:1].expand(7, -1, -1, -1), t, labels).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name
    assert model.labels.weight.grad.any(1).all()


@NETWORKS
def test_checkpointing_keeps_less_and_changes_nothing(network):
    model = network(TINY)
    x, t, labels = inputs((16, 16), dtype=torch.float32)

    def run(checkpointing):
        model.checkpointing = checkpointing
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y.numel()) or y, lambda y: y):
            y = model(x, t, labels)
        model.zero_grad()
        y.square().sum().backward()
        return sum(kept), [y, *(p.grad.clone() for p in model.parameters())]

    (more, plain), (less, again) = run(False), run(True)
    assert less < more / 2
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@NETWORKS
@torch.no_grad()
def test_bfloat16_and_memory_formats(network):
    model = network(UNetConfig.small(8, base=32))
    x, t, _ = inputs((8, 8), dtype=torch.float32)
    plain = model(x, t)
    last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), t)
    torch.testing.assert_close(last, plain, rtol=1e-4, atol=1e-4)  # other kernels, other orders of float32 sums
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x, t)
    # Each of about 40 operations in a row rounds to 2^-9 of a value; independent errors grow with the root of that.
    assert (half - plain).norm() < 40**0.5 * 2**-9 * plain.norm() * 2


@NETWORKS
def test_compiles(network):
    model = network(replace(TINY, multipliers=(1, 2), blocks=1)).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, t, labels = inputs((8, 8), dtype=torch.float32)
    torch.testing.assert_close(compiled(x, t, labels), model(x, t, labels))


def test_new_unet_passes_its_input_on():
    model = UNet(UNetConfig.small(8))
    x = torch.randn(1, 64, 8, 8)
    block = model.down[0][0]
    assert (block(x, torch.zeros(1, 256)) - x).abs().max() < 1e-3


def test_initial_values():
    model = PostNormUNet(UNetConfig(base=64, multipliers=(1, 2, 2), blocks=1))
    weight = model.up[0][0].conv1.weight  # 128 to 128 channels; 7 levels both ways
    assert weight.abs().max().item() == pytest.approx((6 * 7**-0.5 / (2 * 9 * 128)) ** 0.5, rel=1e-3)
    assert model.last.weight.abs().max().item() == pytest.approx((6 / (9 * (64 + 3))) ** 0.5, rel=1e-2)


# Bad input. ---------------------------------------------------------------------------------------------------------


def test_errors():
    model = PostNormUNet(TINY)
    x, t, labels = inputs((8, 8), dtype=torch.float32)

    def error(kind, *arguments, model=model):
        with pytest.raises(kind) as caught:
            model(*arguments)
        return str(caught.value).removeprefix(f"supy.{type(model).__name__}: ")

    assert error(ValueError, x[0], t) == "x has shape [3, 8, 8], expected [B, C, H, W]"
    assert error(ValueError, x[:, :2], t) == "x has shape [3, 2, 8, 8], expected [B, C, H, W] with C=3"
    assert error(TypeError, x.long(), t) == "x has dtype torch.int64, expected a floating-point dtype"
    assert error(ValueError, x, t[:2]) == "t has shape [2], expected [B] with B=3 (from x)"
    assert error(TypeError, x, t.float()) == "t has dtype torch.float32, expected torch.int64"
    assert error(ValueError, x, t + 1) == "t has values from 1 to 7, expected 0 to 6"
    assert error(ValueError, x, t, labels + 1) == "labels has values from 1 to 3, expected 0 to 2"
    plain = PostNormUNet(UNetConfig.small(8))
    assert "classes 0: expected labels None" in error(ValueError, x, t, labels, model=plain)

    def size(H, W, model):
        return error(ValueError, torch.zeros(1, 3, H, W), t[:1], model=model)

    full = PostNormUNet(UNetConfig(base=4))
    assert size(28, 28, full) == "x is 28 x 28, expected sides that are multiples of 8, such as 32 x 32"
    assert size(33, 50, full) == "x is 33 x 50, expected sides that are multiples of 8, such as 48 x 64"
    assert "multiples of 32, such as 32 x 64" in size(8, 40, UNet(UNetConfig(base=4)))
    assert "such as 4 x 4" in size(0, 4, UNet(TINY))
    assert full(torch.zeros(1, 3, 48, 64), t[:1]).shape == (1, 3, 48, 64)
    assert full(torch.zeros(0, 3, 8, 8), t[:0]).shape == (0, 3, 8, 8)


def test_config_errors():
    for values, message in (
        ({"multipliers": ()}, "multipliers is (), expected one or more integers"),
        ({"multipliers": 2}, "multipliers is 2, expected one or more integers"),
        ({"multipliers": [1, 2.5]}, "multipliers is (1, 2.5), expected tuple[int, ...]"),
        ({"multipliers": [1, 0]}, "multipliers is (1, 0), expected 1 to 64"),
        ({"multipliers": [1] * 17}, "multipliers has 17 levels, expected 16 at most"),
        ({"base": 9}, "base is 9, expected an even number"),
        ({"base": 12, "groups": 5}, "groups is 5, expected a divisor of base, which is 12"),
        ({"classes": -1}, "classes is -1, expected 0 to 1048576"),
    ):
        with pytest.raises(ValueError) as caught:
            UNetConfig(**values)
        assert str(caught.value) == f"supy.UNetConfig: {message}"


@NETWORKS
def test_saved_folder_is_read_again(network, tmp_path):
    model = numbered(network(TINY)).float()
    model.save_pretrained(tmp_path)
    again = network.from_pretrained(tmp_path)
    assert again.config == TINY and not again.training
    arguments = inputs((8, 8), dtype=torch.float32)
    assert torch.equal(again(*arguments), model(*arguments))
    other = UNet if network is PostNormUNet else PostNormUNet
    message = f"config.json has model_type '{network.model_type}', expected '{other.model_type}'"
    with pytest.raises(ValueError, match=message):
        other.from_pretrained(tmp_path)


def test_files_of_two_models_are_never_mixed(tmp_path, monkeypatch):
    small, large = PostNormUNet(TINY), PostNormUNet(UNetConfig.small(8))
    small.save_pretrained(tmp_path)
    rename = os.replace

    def killed(source, target):
        if target.name == "config.json":
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        small.save_pretrained(tmp_path)  # the config stays as it is: the folder stays whole
    PostNormUNet.from_pretrained(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        large.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no config.json"):
        PostNormUNet.from_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
