"""The sampler, step by step against the posts' formulas, and everything that steers it or is refused."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from _analytic import Mixture, coefficients

from supy.diffusion import (
    Sampler,
    Schedule,
    learned_log_variance,
    predicted_eps,
    predicted_x0,
    spherical_mix,
    training_target,
)
from supy.ops import ddim_step, philox_normal

SCHEDULE = Schedule.su()
SHAPE = 4, 2, 3, 5
SIZE = 30


def model(prediction="eps", schedule=SCHEDULE):
    return Mixture(schedule, [0.5, 0.5], [-0.5, 0.5], [0.1, 0.3], prediction)


def sample(network=None, shape=SHAPE, *, schedule=SCHEDULE, prediction="eps", clip=None, threshold=None, **options):
    network = model(prediction, schedule) if network is None else network
    sampler = Sampler(schedule, prediction, clip=clip, threshold=threshold)
    return sampler.sample(network, shape, **{"progress": False, **options})


def noise(k, shape=SHAPE, first=0, seed=0, dtype=torch.float32):
    """The numbers of step k, as the documentation of ``seed`` counts them."""
    return philox_normal(shape, seed, offset=k * 2**40 + first * math.prod(shape[1:]), dtype=dtype)


def by_hand(steps, method="ddpm", sigma="posterior", eta=0.0, clip=None):
    """The posts' formulas in float64, with the noise that the documentation promises."""
    schedule, network, x = SCHEDULE.stride(steps), model(), noise(0).double()
    signals = schedule.alpha_bar.numpy()
    for k in range(steps, 0, -1):
        eps = network(x, torch.full((len(x),), schedule.timesteps[k - 1].item()))
        signal, spread = signals[k], np.sqrt(1 - signals[k] ** 2)
        if clip is not None:
            eps = (x - signal * ((x - spread * eps) / signal).clamp(-clip, clip)) / spread
        a, c, deviation = coefficients(signals, k, method, sigma, eta)
        x = a * x - c * eps + deviation * noise(k).double()
    return x


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sigma": "beta"},
        {"sigma": "zero"},
        {"method": "ddim"},
        {"method": "ddim", "eta": 0.3},
        {"method": "ddim", "eta": 1.0},
        {"clip": 0.4},
        {"method": "ddim", "clip": 0.4},
    ],
)
@pytest.mark.parametrize("steps", [1, 3, 20])
def test_formulas(options, steps):
    """Float32 through 20 steps; the first divides by alpha_bar_T, up to 150 ulp with one step of eps."""
    expected = by_hand(steps, **options)
    torch.testing.assert_close(sample(steps=steps, **options).double(), expected, rtol=0, atol=2e-4)


def test_eta_one_is_ddpm():
    torch.testing.assert_close(sample(steps=20, method="ddim", eta=1.0), sample(steps=20), rtol=0, atol=1e-6)


def test_ddim_is_the_operator():
    x, schedule, network = noise(0), SCHEDULE.stride(5), model()
    for k in range(5, 0, -1):
        eps = network(x, schedule.timesteps[k - 1].expand(len(x)))
        x = ddim_step(x, eps, schedule.alpha_bar[k].item(), schedule.alpha_bar[k - 1].item())
    torch.testing.assert_close(sample(steps=5, method="ddim"), x, rtol=0, atol=2e-5)


def test_determinism():
    ddim = [sample(steps=5, method="ddim", x=noise(0), seed=seed) for seed in (1, 2)]
    assert torch.equal(*ddim)  # no noise but the first
    assert torch.equal(sample(steps=5, seed=1), sample(steps=5, seed=1))
    assert not torch.equal(sample(steps=5, seed=1), sample(steps=5, seed=2))
    given = noise(0)
    assert torch.equal(sample(steps=5, x=given), sample(steps=5)) and torch.equal(given, noise(0))


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_a_batch_equals_its_parts(prediction):
    options = {"steps": 4, "seed": 7, "prediction": prediction, "known": torch.zeros(1), "mask": torch.eye(3, 5) > 0}
    parts = [sample(shape=(n, *SHAPE[1:]), first=first, **options) for first, n in ((0, 1), (1, 3))]
    assert torch.equal(sample(**options), torch.cat(parts))


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("limit", [{"clip": 0.4}, {"clip": 0.4, "threshold": 0.7}, {"threshold": 0.9}])
def test_limits(prediction, limit):
    """All predictions clip the same picture; the picture after the last step is a clipped one."""
    x = sample(steps=10, prediction=prediction, **limit)
    bound = limit.get("clip", 1.0)
    assert x.abs().max() <= bound * (1 + 1e-6)
    torch.testing.assert_close(x, sample(steps=10, **limit), rtol=0, atol=1e-4)


def test_predictions_are_exact_at_the_ends():
    """Of a known picture, where alpha_bar or beta_bar is 1e-6: float32 would lose it in a division by either."""
    picture = philox_normal(SHAPE, 3).clamp(-1, 1)
    for signal in ([1e-6], [math.sqrt(1 - 1e-12)], [math.sqrt(1 - 1e-12), 1e-6]):
        schedule = Schedule.from_alpha_bar(signal)

        def v(x, t):
            alpha_bar, beta_bar = schedule.alpha_bar[t[0] + 1], schedule.beta_bar[t[0] + 1]
            return ((alpha_bar * x - picture) / beta_bar).float()

        for prediction, network in (("x0", lambda x, t: picture.clone()), ("v", v)):
            for method in ("ddpm", "ddim"):
                x = sample(network, schedule=schedule, prediction=prediction, method=method)
                # v itself is rounded: at beta_bar = 1e-6, x - picture has one digit, which beta_bar multiplies away.
                torch.testing.assert_close(x, picture, rtol=0, atol=5e-7)


def test_conversions_of_predictions():
    x0, eps = philox_normal(SHAPE, 1, dtype=torch.float64), philox_normal(SHAPE, 2, dtype=torch.float64)
    signal = torch.tensor([0.999, 0.8, 0.3, 0.01], dtype=torch.float64)
    spread = (1 - signal**2).sqrt()
    x = signal.view(-1, 1, 1, 1) * x0 + spread.view(-1, 1, 1, 1) * eps
    for prediction in ("eps", "x0", "v"):
        output = training_target(prediction, x0, eps, signal, spread)
        torch.testing.assert_close(predicted_x0(prediction, output, x, signal, spread), x0)
        torch.testing.assert_close(predicted_eps(prediction, output, x, signal, spread), eps)
    with pytest.raises(ValueError, match="prediction is 'noise', expected 'eps', 'x0' or 'v'"):
        training_target("noise", x0, eps, signal, spread)


class Labelled:
    """Predicts that every pixel is the label's value; 2 means none: 0."""

    config = SimpleNamespace(classes=2)

    def __init__(self):
        self.batches = []

    def __call__(self, x, t, labels):
        self.batches.append((len(x), labels.tolist()))
        signal, spread = SCHEDULE.alpha_bar[t[0] + 1].item(), SCHEDULE.beta_bar[t[0] + 1].item()
        picture = torch.tensor([-0.5, 0.5, 0.0])[labels].view(-1, 1, 1, 1)
        return (x - signal * picture) / spread


def test_guidance():
    labels, network = torch.tensor([0, 1, 1]), Labelled()
    shape = 3, 1, 2, 2

    def means(**options):
        return sample(network, shape, steps=3, method="ddim", labels=labels, **options).mean((1, 2, 3)).tolist()

    assert means() == pytest.approx([-0.5, 0.5, 0.5], abs=1e-4)
    assert network.batches == [(3, [0, 1, 1])] * 3  # no second half where nothing guides
    network.batches.clear()
    assert means(guidance=3.0) == pytest.approx([-1.5, 1.5, 1.5], abs=1e-4)
    assert network.batches == [(6, [0, 1, 1, 2, 2, 2])] * 3
    assert means(guidance=0.0) == pytest.approx([0, 0, 0], abs=1e-4)
    assert means(guidance=3.0, no_label=0) == pytest.approx([-0.5, 2.5, 2.5], abs=1e-4)


def test_spherical_mix():
    a, b = noise(0, (1000, 3, 4, 4)), noise(1, (1000, 3, 4, 4))
    assert torch.equal(spherical_mix(a, b, 0.0), a)
    torch.testing.assert_close(spherical_mix(a, b, 1.0), b)
    mixed = spherical_mix(a, b, 0.3)
    assert abs(mixed.var().item() - 1) < 5 * (2 / mixed.numel()) ** 0.5
    many = spherical_mix(a, b, torch.linspace(0, 1, 1000))
    torch.testing.assert_close(many[300], spherical_mix(a, b, 300 / 999)[300])
    with pytest.raises(ValueError, match="b has shape"):
        spherical_mix(a, b[1:], 0.5)


def test_begins_in_the_middle():
    """Pictures that are noised to step 500 and sampled from there: all steps up to 500, and then 5 of them."""
    network, pictures = model(), 0.5 * noise(9).sign()
    calls = {}
    for steps in (None, 5):
        network.calls.clear()
        sample(network, init=pictures, start=500, steps=steps, method="ddim")
        calls[steps] = list(network.calls)
    assert calls == {None: list(range(499, -1, -1)), 5: [499, 399, 299, 199, 99]}
    seen = []
    sample(lambda x, t: seen.append(x.clone()) or torch.zeros_like(x), init=pictures, start=500, steps=1)
    expected = SCHEDULE.alpha_bar[500].float() * pictures + SCHEDULE.beta_bar[500].float() * noise(0)
    torch.testing.assert_close(seen[0], expected)
    x = sample(init=pictures, start=100, method="ddim")  # a noise of 0.31 on pixels of +-0.5
    assert (x.sign() == pictures.sign()).float().mean() > 0.9


def test_inpainting():
    """The data is two pictures, all 0.8 or all -0.8: the unknown pixels follow the known ones."""
    seen = []

    def network(x, t):
        seen.append(x.clone())
        signal, spread = SCHEDULE.alpha_bar[t[0] + 1].item(), SCHEDULE.beta_bar[t[0] + 1].item()
        likelihood = signal * 0.8 * x.sum((1, 2, 3), keepdim=True) / spread**2
        return (x - signal * 0.8 * likelihood.tanh()) / spread

    known = torch.tensor([0.8, -0.8, 0.8, 0.8]).view(4, 1, 1, 1)
    mask = (torch.arange(5) < 3).expand(3, 5)
    x = sample(network, steps=50, known=known, mask=mask)
    assert torch.equal(x[..., :3], known.expand(4, 2, 3, 3))
    torch.testing.assert_close(x, known.expand(SHAPE), rtol=0, atol=0.02)
    for k, at_step in zip(range(50, 0, -1), seen):  # the known pixels have the noise of their step
        strided = SCHEDULE.stride(50)
        expected = strided.alpha_bar[k].item() * known + strided.beta_bar[k].item() * noise(2**22 + k)
        torch.testing.assert_close(at_step[..., :3], expected[..., :3])


def test_callback():
    got = []

    def callback(step, t, x, x0):
        got.append((step, t, x.clone(), x0))
        return step == 3

    x = sample(steps=4, callback=callback)
    assert [row[:2] for row in got] == [(1, 999), (2, 749), (3, 499)]
    assert torch.equal(x, got[-1][2])
    whole = []
    final = sample(steps=4, callback=lambda step, t, x, x0: whole.append(x0), sigma="posterior")
    torch.testing.assert_close(whole[-1], final)  # the last step ends at the picture that it predicts
    network = model()
    expected = network.x0(got[1][2], SCHEDULE.alpha_bar[500].item(), SCHEDULE.beta_bar[500].item())
    torch.testing.assert_close(got[2][3], expected, rtol=0, atol=1e-5)


def test_learned_variance():
    """-1 says the posterior's variance and 1 says beta's; the last step has no noise."""

    def network(raw):
        def both(x, t):
            return torch.cat([mean(x, t), torch.full_like(x, raw)], 1)

        mean = model()
        return both

    torch.testing.assert_close(sample(network(-1.0), steps=9, sigma="learned"), sample(steps=9), rtol=0, atol=1e-5)
    schedule, mean, x = SCHEDULE.stride(3), model(), noise(0).double()
    for k in (3, 2, 1):
        a, c, _ = coefficients(schedule.alpha_bar.numpy(), k, "ddpm", "zero", 0.0)
        x = a * x - c * mean(x, schedule.timesteps[k - 1].expand(len(x)))
        x = x + schedule.beta[k] * noise(k).double() * (k > 1)
    torch.testing.assert_close(sample(network(1.0), steps=3, sigma="learned").double(), x, rtol=0, atol=1e-4)
    assert torch.equal(sample(network(0.3), steps=3), sample(steps=3))  # another sigma does not look at it
    middle = learned_log_variance(schedule, torch.zeros(1), torch.tensor([2]))
    assert middle.item() == pytest.approx((schedule.beta[2] * schedule.posterior_sigma[2]).log().item())


@pytest.mark.parametrize(
    "options", [{}, {"sigma": "beta"}, {"sigma": "zero"}, {"method": "ddim"}, {"method": "ddim", "eta": 1.0}]
)
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_one_step(options, prediction):
    """T = 1: the result is the predicted picture, with noise only where sigma is beta."""
    schedule = Schedule([0.6])
    network = Mixture(schedule, [1.0], [0.25], [1e-6], prediction)
    x = sample(network, schedule=schedule, prediction=prediction, **options)
    expected = 0.25 + 0.8 * noise(1) if options.get("sigma") == "beta" else torch.full(SHAPE, 0.25)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 1, 1, 1)])
def test_small_shapes(shape):
    assert sample(lambda x, t: x, shape, steps=2).shape == shape


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite(value):
    def network(x, t):
        return torch.full_like(x, value if t[0] < 600 else 0.5)

    with pytest.raises(ValueError, match=r"returned NaN or infinity at step 3 of 5 \(t = 599\)"):
        sample(network, steps=5)
    assert not sample(network, steps=5, check=False).isfinite().any()
    with pytest.raises(ValueError, match="NaN or infinity"):
        Sampler(SCHEDULE).estimate_variance(network, [torch.zeros(SHAPE)], steps=3, progress=False)


def test_half_precision_networks():
    """x stays float32 and the network's output is widened."""
    seen = []
    x = sample(lambda x, t: seen.append(x.dtype) or model()(x, t).bfloat16(), steps=3)
    assert x.dtype == torch.float32 and set(seen) == {torch.float32}
    assert sample(x=noise(0).bfloat16(), steps=3).dtype == torch.float32


def test_gradients_are_not_recorded():
    weight = torch.ones(1, requires_grad=True)
    assert not sample(lambda x, t: weight * x, steps=2).requires_grad


def test_progress(capsys):
    sample(steps=2, progress=True)
    assert "2/2" in capsys.readouterr().err
    sample(steps=2, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": 1001}, "steps is 1001, expected 1 to 1000"),
        ({"steps": 0}, "steps is 0, expected 1 to 1000"),
        ({"steps": 6, "start": 5}, "steps is 6, expected 1 to 5"),
        ({"start": 1001}, "start is 1001, expected 1 to 1000"),
        ({"shape": (2, 3, 4)}, r"shape is \(2, 3, 4\), expected \(B, C, H, W\)"),
        ({"method": "euler"}, "method is 'euler'"),
        ({"sigma": "small"}, "sigma is 'small'"),
        ({"method": "ddim", "sigma": "beta"}, "sigma is 'beta', expected 'posterior' with 'ddim'"),
        ({"eta": 0.5}, "eta is 0.5, expected 0 with 'ddpm'"),
        ({"method": "ddim", "eta": 1.5}, "eta is 1.5, expected 0 to 1"),
        ({"analytic": {3: 0.5}}, r"analytic has no t = \[499\]"),
        ({"x": torch.zeros(1, 2, 3, 5)}, r"x has shape \[1, 2, 3, 5\], expected \[4, 2, 3, 5\]"),
        ({"x": torch.zeros(SHAPE), "init": torch.zeros(SHAPE)}, "x and init are both given"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels has shape \[3\], expected \[4\]"),
        ({"guidance": 2.0}, "guidance is 2.0, expected 1 without labels"),
        ({"guidance": 2.0, "labels": torch.zeros(4, dtype=torch.int64)}, "no_label is missing"),
        ({"known": torch.zeros(SHAPE)}, "one of known and mask is missing"),
        ({"known": torch.zeros(3, 3), "mask": torch.ones(1) > 0}, r"known has shape \[3, 3\]"),
        ({"sigma": "learned"}, "returned 2 channels, expected 4 with a learned variance"),
        ({"first": -1}, "first is -1"),
        ({"network": lambda x, t: x[:, :1]}, r"returned \[4, 1, 3, 5\], expected \[4, 2, 3, 5\]"),
        ({"network": lambda x, t: None}, "returned NoneType"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sample(**{"steps": 2, **options})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"x": torch.zeros(SHAPE, dtype=torch.int64)}, "x has dtype torch.int64"),
        ({"labels": torch.zeros(4)}, "labels has dtype torch.float32"),
        ({"known": torch.zeros(1), "mask": torch.ones(1)}, "mask has dtype torch.float32"),
        ({"schedule": [0.5]}, "schedule is a list, expected a Schedule"),
    ],
)
def test_types_that_are_refused(options, message):
    with pytest.raises(TypeError, match=message):
        sample(network=model(), **{"steps": 2, **options})


def test_estimate_variance_refuses():
    sampler = Sampler(SCHEDULE)
    for batches, message in (([], "batches has no pictures"), ([torch.zeros(3)], r"batch has shape \[3\]")):
        with pytest.raises(ValueError, match=message):
            sampler.estimate_variance(model(), batches, steps=2, progress=False)
    with pytest.raises(ValueError, match="prediction is 'noise'"):
        Sampler(SCHEDULE, "noise")
