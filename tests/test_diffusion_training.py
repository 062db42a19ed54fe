"""Training, sampling and their command line; what a kill, a damaged folder and bad input do."""

import json
import logging
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from _killed import whole_and_killed
from PIL import Image
from safetensors.torch import load_file, save_file

import supy.diffusion.training as training
from supy.cli import main
from supy.diffusion import (
    DiffusionModel,
    Images,
    ModelError,
    Schedule,
    TrainingOptions,
    nearest,
    new_model,
    read_images,
    train,
)
from supy.models import PostNormUNet, UNetConfig
from supy.ops import philox_normal

DIGITS = read_images("digits")
QUICK = TrainingOptions(steps=6, batch_size=4, pictures=1, bf16=False)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These networks are so small that a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def four_samples(monkeypatch):
    monkeypatch.setattr(training, "SAMPLES", 4)


def tiny(T=20, **options):
    return new_model(DIGITS, width=8, schedule=Schedule.cosine(T), **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    train(tiny(), DIGITS, QUICK, progress=False).save(path)
    return path


def weights(model):
    return model.network.state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns_two_pictures_by_heart():
    """Every sample is close to stripes along or to stripes across, and both come."""
    pixels = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    pixels[0, :, ::2], pixels[1, :, :, ::2] = 255, 255
    images = Images(pixels)
    options = TrainingOptions(steps=150, batch_size=8, learning_rate=3e-2, bf16=False)
    model = new_model(images, width=8, schedule=Schedule.cosine(50), prediction="x0")
    samples = train(model, images, options, progress=False).sample(16, progress=False)
    found, distance = nearest(samples, pixels)
    assert distance.median() < 60, f"the samples are {distance} of 255 away"  # black, white or noise: above 127
    assert len(found.unique(dim=0)) == 2


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("learned", [False, True])
def test_the_loss_is_a_sum_over_pixels(prediction, learned):
    model = tiny(prediction=prediction, learned_variance=learned)
    x0, t, labels = DIGITS.batch(torch.arange(16)), torch.arange(16), DIGITS.labels[:16]
    loss = model.loss(x0, t, labels, seed=3, offset=100)
    # By hand, with the definitions of x_t and of each prediction.
    noise = torch.stack([philox_normal((1, 8, 8), 3, offset=100 + 64 * b) for b in range(16)])
    signal, spread = (v[t + 1].float().view(-1, 1, 1, 1) for v in (model.schedule.alpha_bar, model.schedule.beta_bar))
    output = model.network(signal * x0 + spread * noise, t, labels)[:, :1]
    target = {"eps": noise, "x0": x0, "v": signal * noise - spread * x0}[prediction]
    by_hand = (output - target).square().sum((1, 2, 3)).mean()
    if learned:
        assert loss > by_hand  # and the bound, which is never negative
    else:
        assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.network.parameters())


def test_other_networks_learn():
    """A U-Net with Adam and the patch model halve the loss that they begin with."""
    images = Images(DIGITS.pixels[:4])
    for network, width, optimizer in (("unet", 8, "adam"), ("patch-gau", 32, "lamb")):
        model = new_model(images, network, width=width, schedule=Schedule.cosine(20), prediction="x0")
        batch, t = images.batch(torch.arange(4)), torch.full((4,), 10)
        before = model.loss(batch, t, seed=0).item()
        options = TrainingOptions(steps=30, batch_size=8, optimizer=optimizer, learning_rate=1e-2, bf16=False)
        assert train(model, images, options, progress=False).loss(batch, t, seed=0).item() < before / 2, network


def test_accumulated_gradients_equal_those_of_the_whole_batch():
    one, four = (
        weights(train(tiny(), DIGITS, TrainingOptions(steps=2, batch_size=8, accumulate=n, bf16=False), progress=False))
        for n in (1, 4)
    )
    for name in one:
        assert torch.allclose(one[name], four[name], rtol=1e-4, atol=1e-6), name  # float32 sums in another order, then a step
    with pytest.raises(ValueError, match="accumulate is 3, expected a divisor of batch_size"):
        TrainingOptions(batch_size=8, accumulate=3)


def test_a_model_comes_back_from_its_folder(folder):
    model = DiffusionModel.load(folder, device="cpu")
    assert model.schedule == Schedule.cosine(20) and model.classes == 10 and not model.network.training
    model.save(folder)
    again = DiffusionModel.load(folder, device="cpu")
    assert same(weights(model), weights(again))
    samples = model.sample(6, progress=False, seed=5)
    assert samples.dtype == torch.uint8 and samples.shape == (6, 1, 8, 8)
    assert torch.equal(samples, again.sample(6, progress=False, seed=5, batch_size=3))  # one batch or two
    assert not torch.equal(samples, model.sample(6, progress=False, seed=6))
    assert {file.name for file in folder.iterdir()} == {"config.json", "diffusion.json", "model.safetensors"}


KILLED = """
import sys, torch
from supy.diffusion import Schedule, TrainingOptions, new_model, read_images, train, training
torch.set_num_threads(1)
training.SAVE_EVERY, training.SAMPLES = 0.0, 4
images = read_images("digits")
options = TrainingOptions(steps=16, batch_size=4, pictures=1, flips=True)
model = new_model(images, width=8, schedule=Schedule.cosine(20), learned_variance=True)
train(model, images, options, folder=sys.argv[1], progress=False)
"""


def test_a_killed_run_ends_with_the_same_weights(tmp_path):
    whole, killed = whole_and_killed(KILLED, tmp_path)
    # A picture that the kill cut off is left as a hidden file.
    assert {file.name for file in killed.iterdir() if file.name[0] != "."} == {file.name for file in whole.iterdir()}
    for name in ("model.safetensors", "samples-000016.png", "loss.png"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name


def test_a_checkpoint_of_another_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(training.Checkpoint, "remove", lambda self: None)
    train(tiny(), DIGITS, QUICK, folder=tmp_path, progress=False)
    other = Images(DIGITS.pixels[1:], DIGITS.labels[1:])
    for model, images, options, what in (
        (tiny(), other, QUICK, "training data was '1797 images"),
        (tiny(prediction="v"), DIGITS, QUICK, "model was"),
        (new_model(DIGITS, width=16, schedule=Schedule.cosine(20)), DIGITS, QUICK, "network was"),
        (tiny(), DIGITS, TrainingOptions(steps=7), "training options was"),
    ):
        with pytest.raises(ModelError, match=f"is of another run: {what}"):
            train(model, images, options, folder=tmp_path, progress=False)


def test_a_loss_that_is_not_finite_names_the_step():
    model = tiny()
    calls = []

    def poison(module, arguments, output):
        calls.append(0)
        return output * (torch.nan if len(calls) == 3 else 1)

    model.network.register_forward_hook(poison)
    with pytest.raises(FloatingPointError, match="the loss is nan in step 3; try a learning rate below 0.02"):
        train(model, DIGITS, QUICK, progress=False)


def test_images_must_fit_the_model():
    with pytest.raises(ValueError, match=r"images have shape \[1, 16, 16\], the model is for \[1, 8, 8\]"):
        train(tiny(), read_images("digits", size=16), QUICK, progress=False)
    with pytest.raises(ValueError, match="images have 0 classes, the model 10"):
        train(tiny(), Images(DIGITS.pixels), QUICK, progress=False)
    with pytest.raises(ValueError, match="the schedule has 5 steps, the network's config 20"):
        DiffusionModel(tiny().network, Schedule.su(5))


def test_without_matplotlib_there_is_one_line(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    train(tiny(), DIGITS, QUICK, folder=tmp_path, progress=False)
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [
        "supy.diffusion: the loss curve needs matplotlib: pip install supy[diffusion]"
    ]
    assert (tmp_path / "samples-000006.png").exists() and not (tmp_path / "loss.png").exists()


def test_nothing_optional_is_imported_early():
    names = "('PIL', 'matplotlib', 'sklearn', 'scipy', 'diffusers')"
    code = f"import sys, supy.cli; print([name for name in {names} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def run(capsys, *argv):
    code = main(["diffusion", *map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, err


TINY = ("--width", 8, "--schedule", "cosine", "--timesteps", 20, "--steps", 4, "--batch-size", 4)


def test_train_then_sample(tmp_path, capsys):
    rng = np.random.default_rng(0)
    images, model = tmp_path / "images", tmp_path / "model"
    images.mkdir()
    for number in range(9):
        Image.fromarray(rng.integers(0, 256, (20, 20, 4), dtype=np.uint8)).save(images / f"{number}.png")
    (images / "broken.png").write_bytes(b"\x89PNG")
    code, out, err = run(capsys, "train", "--data", images, "--out", model, "--flips", *TINY)
    assert code == 0 and "9 images of 16 x 16 x 3" in out and f"model written to {model}" in out
    names = {"config.json", "diffusion.json", "model.safetensors", "loss.png"}
    assert {file.name for file in model.iterdir()} == names | {f"samples-{step:06d}.png" for step in range(1, 5)}

    grid = tmp_path / "new" / "grid.png"
    sample = ("sample", "--model", model, "--out", grid, "--steps", 3)
    code, out, err = run(capsys, *sample, "--count", 9, "--compare", images)
    assert code == 0 and Image.open(grid).size == (3 * 34 + 2, 3 * 34 + 2)
    assert (tmp_path / "new" / "grid-nearest.png").exists()
    assert re.search(r"Frechet distance of pixels' principal components: \d+\.\d\d; of as many held-out", out)
    for options in (("--method", "ddim"), ("--sigma", "zero"), ("--method", "ddim", "--eta", 1)):
        assert run(capsys, *sample, "--count", 1, *options)[0] == 0
    assert "the model has no classes" in run(capsys, *sample, "--label", 0)[2].splitlines()[-1]


def test_a_single_step_of_noise(tmp_path, capsys, caplog):
    options = ("--width", 8, "--timesteps", 1, "--steps", 2, "--batch-size", 4, "--learned-variance")
    assert run(capsys, "train", "--out", tmp_path / "model", *options)[0] == 0
    assert "after 1 steps of noise, 99 % of a picture is still there" in caplog.text
    assert run(capsys, "sample", "--model", tmp_path / "model", "--out", tmp_path / "grid.png", "--label", 3)[0] == 0


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def other_weights(folder):
    PostNormUNet(UNetConfig.small(8, channels=1, base=16)).save_pretrained(folder)


def edit(name, value):
    def damage(folder):
        path = folder / "diffusion.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))

    return damage


def only_weights_of_another(folder):
    save_file({"x": torch.zeros(3)}, folder / "model.safetensors")


def with_nan(folder):
    model = DiffusionModel.load(folder, device="cpu")
    with torch.no_grad():
        model.network.last.weight[0, 0, 0, 0] = torch.nan
    model.save(folder)


DAMAGE = {
    "another pipeline's": (lambda folder: (folder / "diffusion.json").unlink(), "expected a diffusion model, found"),
    "truncated": (truncate, "not a whole safetensors file"),
    "another network's": (other_weights, "the schedule has 20 steps, the network's config 1000"),
    "another network's weights": (only_weights_of_another, "the checkpoint lacks variables"),
    "kind": (edit("network", "unknown"), "not a diffusion model of this supy"),
    "format": (edit("format", 9), "format 9, this supy reads 1"),
    "schedule": (edit("schedule", {"alpha": [2.0], "timesteps": [0]}), "alpha has 2.0 at step 1"),
    "size": (edit("size", -8), "size is -8"),
    "NaN": (with_nan, "the network returned NaN or infinity at step 1 of 20"),
}


@pytest.mark.parametrize("damage, expected", DAMAGE.values(), ids=DAMAGE)
def test_damaged_models(tmp_path, folder, capsys, damage, expected):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path)
    capsys.readouterr()
    code, out, err = run(capsys, "sample", "--model", tmp_path, "--out", tmp_path / "grid.png")
    assert code == 2 and not (tmp_path / "grid.png").exists()
    line = err.splitlines()[-1]
    assert line.startswith("supy: error: ") and expected in line
    assert "Traceback" not in err


def test_bad_input(tmp_path, folder, capsys):
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    broken.mkdir()
    (broken / "a.png").write_bytes(b"no")
    sample = ("sample", "--model", folder, "--out", tmp_path / "grid.png")
    for argv, expected in (
        (("train", "--data", empty), "holds no image"),
        (("train", "--data", broken), "none of 1 images can be read: a.png"),
        (("train", "--data", tmp_path / "none"), "expected a folder or a file of images, found none"),
        (("train", "--learning-rate", "-1"), "learning_rate is -1.0, expected above 0"),
        (("train", "--seed", "-1"), "seed is -1"),
        (("train", "--background", "nothing", "--data", empty.parent), "background is 'nothing'"),
        ((*sample, "--steps", 21), "steps is 21, expected 1 to 20"),
        ((*sample, "--label", 10), "expected 64 of 0 to 9"),
        ((*sample, "--sigma", "learned"), "expected 2 with a learned variance"),
        ((*sample, "--eta", "0.5"), "eta is 0.5, expected 0 with 'ddpm'"),
        ((*sample, "--compare", empty), "holds no image"),
    ):
        options = ("--out", tmp_path / "model", *TINY) if argv[0] == "train" else ()
        code, out, err = run(capsys, *argv, *options)
        assert code == 2 and expected in err.splitlines()[-1], (argv, err)
        assert not (tmp_path / "model").exists() and not (tmp_path / "grid.png").exists()


def test_help(capsys):
    for argv in ([], ["train"], ["sample"]):
        with pytest.raises(SystemExit) as exit:
            main(["diffusion", *argv, "--help"])
        assert exit.value.code == 0 and "usage: supy diffusion" in capsys.readouterr().out
