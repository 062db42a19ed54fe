"""supy.depth and supy depth: the measured sizes are right, they show what the papers say, and bad input is one line."""

import json
import math

import pytest
import torch
from torch import nn

from supy.cli import main
from supy.depth import FAMILIES, find_layers, gau_scale, probe, residual_gain, sentences
from supy.nn import DeepNormEncoder, deepnorm_constants

SMALL = {"seeds": 2, "shape": (4, 8, 32)}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_first_step_of_sgd_grows_for_post_norm_and_not_for_deepnorm():
    rates = {"sgd": 1e-4}
    deep = probe("deepnorm", [6, 200], rates=rates, **SMALL)
    sizes = [p.steps["sgd"].update_matrices for p in deep.probes]
    assert max(sizes) < 2 * min(sizes)  # what the paper promises, of the matrices that it speaks of
    assert deep.exponent("sgd") > 0.5  # norms and biases are outside its analysis
    assert "what grows is the part of norms and biases" in " ".join(sentences(deep))
    post = probe("post", [6, 25], rates=rates, **SMALL)
    sizes = [p.steps["sgd"].update_matrices for p in post.probes]
    assert sizes[1] > 3 * sizes[0]
    assert "deeper networks change more in the same step" in " ".join(sentences(post))


def test_each_optimizer_has_constants_of_its_own():
    """With Adam's the step of Adam does not grow; with those of SGD it does, by N^1/2 (post 8978)."""
    own, other = (probe(name, [6, 48], rates={"adam": 1e-6}, **SMALL) for name in ("deepnorm-adam", "deepnorm-sgd"))
    assert own.exponent("adam", "update_matrices") == pytest.approx(0, abs=0.15)
    assert other.exponent("adam", "update_matrices") == pytest.approx(0.5, abs=0.15)


def test_lambs_constants_want_values_in_a_tensor_of_their_own():
    """LAMB's step is as long as its tensor; packed with queries and keys, which have no beta, that of values is not."""

    def update(depth, parts):
        torch.manual_seed(0)
        model, x, _ = FAMILIES["deepnorm-lamb"](SMALL["shape"], depth)
        before, readout = model(x), torch.randn(32, dtype=torch.float64)
        (before @ readout).tanh().sum().backward()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim == 2:
                    count = parts if "in_proj" in name else 1
                    for w, g in zip(weight.chunk(count), weight.grad.chunk(count)):
                        w -= 1e-5 * w.square().mean().sqrt() * g.sign()
            return (model(x) - before).square().mean().sqrt()

    assert 0.5 < update(96, 3) / update(6, 3) < 1.25
    assert update(96, 1) / update(6, 1) > 1.5


@pytest.mark.parametrize("power, grows", [(0.0, 0.56), (0.5, -0.17), (1.0, -0.64)])
def test_gated_units_share_beta(power, grows):
    """The root of beta keeps the update of three matrices in a row; 1 and beta do not."""

    def units(depth):
        beta = deepnorm_constants("encoder", depth).beta ** power
        return DeepNormEncoder(depth, 32, block="gau", hidden=64, beta=beta).double()

    study = probe(units, [6, 48], rates={"sgd": 1e-4}, **SMALL)
    # Measured with 96 layers too; two depths and two seeds leave a few tenths of the exponent to chance.
    assert study.exponent("sgd", "update_matrices") == pytest.approx(grows, abs=0.25)


class Lists(nn.Module):
    """y = W_depth ... W_1 x with orthogonal W_i, all times 3, and a bias that is 0."""

    def __init__(self, depth):
        super().__init__()
        self.stack = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))
        for layer in self.stack:
            nn.init.orthogonal_(layer.weight, 3.0)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        for layer in self.stack:
            x = layer(x)
        return {"logits": x}


def linear(depth):
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Lists(depth).double(), {"x": x}, lambda output: output["logits"].square().sum() / 2


def test_numbers_of_a_linear_network():
    torch.manual_seed(0)  # as the probe does for its first seed
    model, batch, _ = linear(1)
    x, weight = batch["x"].flatten(0, 1), model.stack[0].weight.detach()
    (found,) = probe(linear, [1], rates={"sgd": 1e-3, "adam": 1e-3, "lamb": 1e-2}, seeds=1).probes
    y = x @ weight.T
    assert found.parameters == 20 and found.loss == pytest.approx((y.square().sum() / 2).item())
    gradient, bias = y.T @ x, y.sum(0)
    rms = lambda z: z.square().mean().sqrt().item()  # noqa: E731  the formula, in place
    step = -1e-3 * x @ gradient.T
    assert found.steps["sgd"].update_matrices == pytest.approx(rms(step))
    assert found.steps["sgd"].update == pytest.approx(rms(step - 1e-3 * bias))
    after = (y + step - 1e-3 * bias).square().sum() / 2 - found.loss
    assert found.steps["sgd"].loss_change == pytest.approx(after.item())
    assert found.steps["sgd"].promised == pytest.approx(-1e-3 * (gradient.square().sum() + bias.square().sum()).item())
    # Adam's eps is 1e-8 and LAMB's 1e-6, beside gradients of about 10.
    assert found.steps["adam"].update_matrices == pytest.approx(rms(1e-3 * x @ gradient.sign().T), rel=1e-5)
    length = weight.norm() / 4
    assert found.steps["lamb"].update_matrices == pytest.approx(rms(1e-2 * length * x @ gradient.sign().T), rel=1e-4)
    (layer,) = found.layers
    assert layer.probe == pytest.approx((gradient * weight / 3).sum().item())
    assert layer.gradient == pytest.approx(math.hypot(gradient.norm(), bias.norm()))
    assert (layer.input, layer.output) == pytest.approx((rms(x), 3 * rms(x)))
    assert layer.change == pytest.approx(((y - x).norm() / x.norm()).item())
    tokens = y.unflatten(0, (2, 5))
    assert layer.spread == pytest.approx(((tokens - tokens.mean(1, keepdim=True)).norm() / y.norm()).item())


def test_depth_three_scales_and_leaves_the_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    (found,) = probe(linear, [3], rates={"sgd": 1e-6}, seeds=2).probes
    assert torch.equal(torch.randn(3), expected)
    ratios = [layer.output / layer.input for layer in found.layers]
    assert ratios == pytest.approx([3.0] * 3)
    assert "the forward pass changes the scale a lot" in " ".join(sentences(probe(linear, [3], seeds=1)))


def test_layers_are_found():
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    both = nn.Transformer(8, 2, 3, 3, 8, batch_first=True)
    assert [*find_layers(both, 3)] == [*both.encoder.layers, *both.decoder.layers]
    assert len(find_layers(nn.Sequential(nn.TransformerEncoder(layer, 4), nn.Linear(8, 8)), 4)) == 4
    assert len(find_layers(both, 7, "decoder.layers")) == 3
    for name in FAMILIES:
        (found,) = probe(name, [2], rates={"sgd": 1e-3}, seeds=1, shape=(2, 3, 8)).probes
        assert len(found.layers) == 2 and found.finite(), name


MODELS = '''
import torch
from torch import nn

class Growing(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))
    def forward(self, x):
        for layer in self.layers:
            x = layer(x) ** 31 * 1e6
        return x

def growing(depth):
    return Growing(depth), torch.ones(2, 3, 4), lambda y: y.square().mean()

def encoder(depth):
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), depth)

def raises(depth):
    raise KeyError("width")

def bare(depth):
    return nn.Linear(8, 8)

def wrong(depth):
    return nn.Linear(8, 8), torch.ones(2, 8)

def sums(depth):
    return encoder(depth), torch.ones(2, 3, 8), lambda y: y.sum(-1)

def detached(depth):
    return encoder(depth), torch.ones(2, 3, 8), lambda y: y.detach().sum()

def unequal(depth):
    return encoder(depth), torch.ones(2, 3, 8), lambda y: (y - torch.ones(5)).sum()

number = 3
'''


@pytest.fixture
def models(tmp_path, monkeypatch):
    (tmp_path / "deep_models.py").write_text(MODELS)
    (tmp_path / "deep_broken.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *argv):
    code = main(["depth", *map(str, argv)])
    return code, *capsys.readouterr()


def test_command_with_a_model_of_the_users(models, capsys):
    options = ("--depths", "4,2", "--seeds", 1, "--width", 8, "--batch", 2, "--tokens", 3)
    files = ("--json", "out/numbers.json", "--picture", "out/picture.png")
    code, out, _ = run(capsys, "probe", "--model", "deep_models:encoder,deepnorm", *options, *files)
    assert code == 0 and "deep_models:encoder" in out and "sgd, 2 to 4 layers: the output moves by" in out
    content = json.loads((models / "out/numbers.json").read_text())
    assert [model["model"] for model in content["models"]] == ["deep_models:encoder", "deepnorm"]
    first = content["models"][0]
    assert [(p["depth"], len(p["layers"])) for p in first["probes"]] == [(2, 2), (4, 4)]
    assert first["exponents"].keys() == first["probes"][0]["steps"].keys() == {"sgd", "adam", "lamb"}
    assert (models / "out/picture.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (models / "out").iterdir()) == ["numbers.json", "picture.png"]


def test_losses_that_are_no_numbers_are_results(models, capsys):
    options = ("--depths", "1,3", "--seeds", 1, "--json", "n.json", "--picture", "p.png")
    code, out, _ = run(capsys, "probe", "--model", "deep_models:growing", *options)
    assert code == 0 and "The loss or a step is NaN or infinite at 1, 3 layers" in out
    assert " inf " in out or " nan " in out
    text = (models / "n.json").read_text()
    last = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["models"][0]["probes"][1]
    assert last["loss"] in ("inf", "nan") and last["steps"]["sgd"]["loss_change"] == "nan"
    assert (models / "p.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "options, message",
    [
        (("--model", "deep_nowhere:encoder"), "cannot import deep_nowhere:encoder: ModuleNotFoundError"),
        (("--model", "deep_broken:encoder"), "cannot import deep_broken:encoder: ZeroDivisionError"),
        (("--model", "deep_models:nothing"), "cannot import deep_models:nothing: AttributeError"),
        (("--model", "deep_models:number"), "is a int, expected a function of the depth"),
        (("--model", "sideways"), "model is 'sideways', expected package.module:function, or one of deepnorm, post"),
        (("--model", "deep_models:raises"), "deep_models:raises(2) fails: KeyError: 'width'"),
        (("--model", "deep_models:bare", "--width", 8), "Linear has no list of 2 layers: there is no list of layers"),
        (("--model", "deep_models:wrong"), "returned Linear, Tensor, expected a module or (module, batch, loss)"),
        (("--model", "deep_models:sums"), "the loss of deep_models:sums(2) is not one number that depends on"),
        (("--model", "deep_models:detached"), "the loss of deep_models:detached(2) is not one number"),
        (("--model", "deep_models:encoder", "--width", 7), "cannot be called: "),
        (("--model", "deep_models:unequal"), "the loss of deep_models:unequal(2) fails: RuntimeError: The size of"),
        (("--token-axis", 5), "deepnorm(2) cannot be called: IndexError: Dimension out of range"),
        (("--device", "nowhere"), "device is 'nowhere': RuntimeError: "),
        (("--depths", "0,2"), "depth is 0, expected a whole number of at least 1"),
        (("--depths", "2,x"), "--depths has 'x', expected whole numbers"),
        (("--layers", "stack"), "DeepEncoder has no module 'stack'"),
        (("--rates", "lion=0.1"), "optimizer is 'lion', expected one of sgd, adam, lamb"),
        (("--rates", "sgd=0"), "the learning rate of sgd is 0.0, expected a number above 0"),
        (("--rates", "sgd"), "--rates has 'sgd', expected NAME=RATE"),
    ],
)
def test_bad_input_is_one_line(models, capsys, options, message):
    common = () if "--depths" in options else ("--depths", "2")
    code, out, err = run(capsys, "probe", *common, *options, "--json", "n.json", "--seeds", 1)
    (line,) = err.splitlines()
    assert code == 2 and line.startswith("supy: error: ") and message in line
    assert not (models / "n.json").exists()


def test_help(capsys):
    for argv in (["depth"], ["depth", "probe"], ["depth", "residual"], ["depth", "gau"]):
        with pytest.raises(SystemExit) as exit:
            main([*argv, "--help"])
        assert exit.value.code == 0 and "usage: supy depth" in capsys.readouterr().out


def test_wide_residuals_grow_by_the_square():
    gain = residual_gain((1, 256), (0.1, 0.2, 0.4), layers=25, samples=256)
    # Root mean squares of 2 e c + e^2, c normal at width 1 and nearly 0 at width 256; of 256 samples, so a tenth apart.
    exact = [math.sqrt(4 * e**2 + 3 * e**4) for e in (0.1, 0.2, 0.4)]
    assert gain.one[1] == pytest.approx(exact, rel=0.3)
    assert gain.one[256] == pytest.approx([math.hypot(e**2, 2 * e / 16) for e in (0.1, 0.2, 0.4)], rel=0.15)
    assert gain.cosines[1] == 1.0 and gain.cosines[256] == pytest.approx(1 / 16, rel=0.15)
    # epsilon = 1 / sqrt(layers) = 0.2: a factor of about sqrt(e), whatever the layers.
    assert gain.many[256][1] == pytest.approx(math.e**0.5, rel=0.15)
    for name, ratio in (("512 to 2048", 4), ("2048 to 512", 0.25)):
        forward, backward = gain.plain[name]
        assert (forward, backward) == pytest.approx((1, ratio), rel=0.05)


def test_gau_scale_is_its_definition():
    """The mean and square by sums over random numbers, and a score for itself against another's, written out."""
    scale = gau_scale(64, 128, 32, 64)
    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    swish = x * x.sigmoid()
    assert (scale.mean, scale.square) == pytest.approx((swish.mean().item(), swish.square().mean().item()), rel=0.01)
    assert 0.25 < scale.ratio / scale.expected_ratio < 1  # the estimate leaves out how much scores of others vary
    assert 0.001 < scale.output["relu2"] < scale.output["softmax"] < 0.5
    assert all(3 < power < 12 for powers in scale.exponents.values() for power in powers)


def test_commands_of_the_analyses(models, capsys, monkeypatch):
    from supy.depth import commands

    monkeypatch.setattr(commands, "residual_gain", lambda: residual_gain((1, 16), (0.1, 0.2), layers=3, samples=8))
    monkeypatch.setattr(commands, "gau_scale", lambda: gau_scale(16, 32, 8, 16))
    code, out, _ = run(capsys, "residual", "--json", "r.json", "--picture", "r.png")
    assert code == 0 and "epsilon 0.1" in out and "nearly orthogonal" in out
    assert json.loads((models / "r.json").read_text())["cosines"].keys() == {"1", "16"}
    assert (models / "r.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = run(capsys, "gau", "--json", "g.json")
    assert code == 0 and "times that for another" in out
    assert "exponents" in json.loads((models / "g.json").read_text())
