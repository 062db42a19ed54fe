"""Sampling with an exact network: the moments are those that theory gives each method.

Where the data is normal, N(m, s^2), the best eps is linear in x, so that x_k stays normal and its mean and variance
follow a recursion in closed form. Mixtures of normals have no such form, but a step of DDIM is then a function of one
number, and a noisy step a kernel: both are computed on a fine grid instead of being drawn.

Samples differ from theory by chance alone. Of n values, the mean has a standard error of sqrt(variance / n) and the
variance of about variance sqrt((kurtosis - 1) / n), that is variance sqrt(2 / n) for a normal distribution. Five of
them are allowed; seeds are fixed, so a test that passes keeps passing.
"""

import numpy as np
import pytest
import torch
from _analytic import Mixture, coefficients, with_analytic

from supy.diffusion import Sampler, Schedule

SCHEDULE = Schedule.su()


@pytest.fixture(autouse=True)
def one_thread():
    """A thousand steps on small tensors: threads that wait for each other would cost more than they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


MEAN, DEVIATION = 0.4, 0.3
METHODS = {
    "posterior": {"sigma": "posterior"},
    "beta": {"sigma": "beta"},
    "zero": {"sigma": "zero"},
    "ddim": {"method": "ddim"},
    "ddim half": {"method": "ddim", "eta": 0.5},
    "analytic": {"analytic": True},
    "analytic ddim": {"method": "ddim", "analytic": True},
}


def normal(prediction="eps"):
    return Mixture(SCHEDULE, [1.0], [MEAN], [DEVIATION], prediction)


def alpha_bar(steps):
    """alpha_bar_0 to alpha_bar_K of every (1000 / steps)-th step, from post 9119's formula."""
    full = np.cumprod(np.sqrt(1 - 0.02 * np.arange(1, 1001) / 1000))
    return np.array([1.0, *full[1000 // steps - 1 :: 1000 // steps]])


def exact_factor(signal):
    """1 - E eps^2 of N(MEAN, DEVIATION^2)."""
    return signal**2 * DEVIATION**2 / (signal**2 * DEVIATION**2 + 1 - signal**2)


def theory(steps, options):
    """The final mean and variance for normal data."""
    signals, mean, variance = alpha_bar(steps), 0.0, 1.0
    for k in range(steps, 0, -1):
        signal = signals[k]
        a, c, sigma = coefficients(
            signals, k, options.get("method", "ddpm"), options.get("sigma", "posterior"), options.get("eta", 0.0)
        )
        if options.get("analytic"):
            sigma = with_analytic(signals, k, c, sigma, exact_factor(signal))
        spread = signal**2 * DEVIATION**2 + 1 - signal**2  # eps = beta_bar (x - alpha_bar m) / spread
        slope = np.sqrt(1 - signal**2) / spread
        mean, variance = (a - c * slope) * mean + c * slope * signal * MEAN, (a - c * slope) ** 2 * variance + sigma**2
    return mean, variance


def draw(model, steps, options, size):
    options = dict(options)
    if options.get("analytic") is True:
        options["analytic"] = {t: exact_factor(SCHEDULE.alpha_bar[t + 1].item()) for t in range(1000)}
    sampler = Sampler(SCHEDULE, model.prediction)
    return sampler.sample(model, (size // 64, 1, 8, 8), steps=steps, seed=steps, progress=False, **options)


def check_moments(values, mean, variance, kurtosis=3.0):
    values, n = values.double(), values.numel()
    assert abs(values.mean().item() - mean) < 5 * (variance / n) ** 0.5 + 1e-6
    assert abs(values.var().item() - variance) < 5 * variance * ((kurtosis - 1) / n) ** 0.5 + 1e-6


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("steps, size", [(1, 2**16), (10, 2**16), (50, 2**15), (1000, 2**12)])
def test_normal_data(name, steps, size):
    """Standard errors of the variance: 0.6 % at 2^16 values, 0.8 % at 2^15, 2.2 % at 2^12."""
    model = normal()
    mean, variance = theory(steps, METHODS[name])
    check_moments(draw(model, steps, METHODS[name], size), mean, variance)
    assert model.calls == [1000 * k // steps - 1 for k in range(steps, 0, -1)]


def test_theory_tells_the_methods_apart():
    """What the recursion says, so that the test above would notice one method in place of another."""
    at10 = {name: theory(10, options)[1] / DEVIATION**2 for name, options in METHODS.items()}
    assert at10["zero"] < at10["posterior"] < 0.99 and at10["beta"] > 1.2 and at10["ddim"] < 0.99
    assert abs(at10["analytic"] - 1) < 1e-3 and abs(at10["analytic ddim"] - 1) < 1e-3
    at1000 = {name: theory(1000, options)[1] / DEVIATION**2 for name, options in METHODS.items()}
    assert all(abs(at1000[name] - 1) < 0.03 for name in METHODS if name != "zero")
    assert at1000["zero"] < 0.01  # greedy: all end at the mean


@pytest.mark.parametrize("steps", [1, 2, 10, 50, 1000])
@pytest.mark.parametrize("name", ["analytic", "analytic ddim"])
def test_analytic_variance_is_right_at_any_number_of_steps(name, steps):
    """What is left: sampling begins with N(0, 1), not with N(alpha_bar_T m, alpha_bar_T^2 s^2 + beta_bar_T^2)."""
    mean, variance = theory(steps, METHODS[name])
    assert abs(variance / DEVIATION**2 - 1) < 1e-4 and abs(mean - MEAN) < 0.01 * MEAN


@pytest.mark.parametrize("name", ["analytic", "analytic ddim"])
def test_estimated_variance(name):
    """Estimated from 2^15 values, 1 - E eps^2 has a standard error of at most sqrt(2 / n) = 0.8 %."""
    model, sampler = normal(), Sampler(SCHEDULE)
    batches = [model.draw((128, 1, 8, 8), seed) for seed in range(4)]
    found = sampler.estimate_variance(model, batches, steps=10, progress=False)
    assert list(found) == [100 * k - 1 for k in range(1, 11)]
    for t, factor in found.items():
        assert abs(factor - exact_factor(SCHEDULE.alpha_bar[t + 1].item())) < 5 * (2 / 2**15) ** 0.5
    values = draw(model, 10, {**METHODS[name], "analytic": found}, 2**16).double()
    wrong = abs(theory(10, {"method": METHODS[name].get("method", "ddpm")})[1] - DEVIATION**2)
    assert abs(values.var().item() - DEVIATION**2) < wrong / 4  # the error of its own method without it


@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("name", ["posterior", "ddim half", "analytic"])
def test_predictions_agree(prediction, name):
    """The same noise: the results differ by rounding only, which 20 steps of eps / alpha_bar magnify to 1e-4."""
    expected = draw(normal(), 20, METHODS[name], 2**10)
    torch.testing.assert_close(draw(normal(prediction), 20, METHODS[name], 2**10), expected, rtol=0, atol=1e-4)


MIXTURE = [0.3, 0.7], [-0.6, 0.4], [0.1, 0.2]
GRID = np.linspace(-5, 5, 1501)


def grid_moments(density, values):
    mean = (density * values).sum()
    variance = (density * (values - mean) ** 2).sum()
    return mean, variance, (density * (values - mean) ** 4).sum() / variance**2


@pytest.mark.parametrize("steps, size", [(10, 2**16), (50, 2**16), (1000, 2**12)])
def test_mixture_with_ddim(steps, size):
    """DDIM is a function of x_T, here of each point of a grid, in float64."""
    model, x = Mixture(SCHEDULE, *MIXTURE), torch.from_numpy(GRID)
    signals = alpha_bar(steps)
    for k in range(steps, 0, -1):
        a, c, _ = coefficients(signals, k, "ddim", "posterior", 0.0)
        noise = np.sqrt(1 - signals[k] ** 2)
        x = a * x - c * (x - signals[k] * model.x0(x, signals[k], noise)) / noise
    density = np.exp(-(GRID**2) / 2)
    mean, variance, kurtosis = grid_moments(density / density.sum(), x.numpy())
    check_moments(draw(model, steps, {"method": "ddim"}, size), mean, variance, kurtosis)
    if steps == 1000:  # theory: it converges to the data
        assert abs(mean - model.mean) < 0.01 and abs(variance / model.variance - 1) < 0.01


@pytest.mark.parametrize("sigma", ["posterior", "beta"])
def test_mixture_with_noise(sigma):
    """Ten noisy steps: the density of x_k on the grid, from that of x_{k+1} and the step's normal kernel."""
    model, signals = Mixture(SCHEDULE, *MIXTURE), alpha_bar(10)
    density = np.exp(-(GRID**2) / 2)
    density /= density.sum()
    for k in range(10, 0, -1):
        a, c, deviation = coefficients(signals, k, "ddpm", sigma, 0.0)
        noise = np.sqrt(1 - signals[k] ** 2)
        eps = (GRID - signals[k] * model.x0(torch.from_numpy(GRID), signals[k], noise).numpy()) / noise
        centre = a * GRID - c * eps
        if deviation == 0:  # the last step
            mean, variance, kurtosis = grid_moments(density, centre)
        else:
            kernel = np.exp(-(((GRID[:, None] - centre) / deviation) ** 2) / 2)
            density = (kernel / kernel.sum(0)) @ density
            mean, variance, kurtosis = grid_moments(density, GRID)
    check_moments(draw(model, 10, {"sigma": sigma}, 2**16), mean, variance, kurtosis)


@pytest.mark.parametrize("name", ["posterior", "beta", "analytic"])
def test_mixture_at_a_thousand_steps(name):
    """Ancestral sampling converges to the data: mean, variance, and the share of each part, of 2^12 values."""
    model, options = Mixture(SCHEDULE, *MIXTURE), dict(METHODS[name])
    if name == "analytic":
        batch = model.draw((64, 1, 8, 8))
        options["analytic"] = Sampler(SCHEDULE).estimate_variance(model, [batch], progress=False)
    values, n = draw(model, 1000, options, 2**12), 2**12
    data = model.draw((2**12, 1, 8, 8)).double()
    kurtosis = ((data - model.mean) ** 4).mean().item() / model.variance**2
    check_moments(values, model.mean, model.variance, kurtosis)
    # At -0.2, between the parts, both have less than 2e-3 of their own: the share below it is the first part's.
    assert abs((values < -0.2).float().mean().item() - 0.3) < 5 * (0.3 * 0.7 / n) ** 0.5 + 2e-3


def test_analytic_variance_helps_a_mixture_at_ten_steps():
    model = Mixture(SCHEDULE, *MIXTURE)
    found = Sampler(SCHEDULE).estimate_variance(model, [model.draw((512, 1, 8, 8))], steps=10, progress=False)
    errors = [
        abs(draw(model, 10, {"analytic": analytic}, 2**16).double().var().item() / model.variance - 1)
        for analytic in (found, None)
    ]
    assert errors[0] < errors[1] / 3
