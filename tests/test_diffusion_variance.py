"""The learned variance: its loss against torch.distributions, and what it trains."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from supy.diffusion import Schedule, learned_log_variance, learned_variance_loss, training_target, variational_bound
from supy.ops import philox_normal

SCHEDULE = Schedule.su(100)
SHAPE = 5, 2, 3, 4


def case(t, dtype=torch.float32):
    t = torch.tensor(t)
    x0 = (0.5 * philox_normal(SHAPE, 1)).clamp(-1, 1).to(dtype)
    noise, raw = philox_normal(SHAPE, 2).to(dtype), philox_normal(SHAPE, 3).to(dtype)
    signal, spread = (table[t + 1].to(dtype).view(-1, 1, 1, 1) for table in (SCHEDULE.alpha_bar, SCHEDULE.beta_bar))
    return t, x0, noise, signal * x0 + spread * noise, raw


def test_range_of_the_variance():
    for step in (2, 50, 100):
        low, high = learned_log_variance(SCHEDULE, torch.tensor([[-1.0, 1.0]]), torch.tensor([step]))[0].tolist()
        assert math.exp(low / 2) == pytest.approx(SCHEDULE.posterior_sigma[step].item(), rel=1e-5)
        assert math.exp(high / 2) == pytest.approx(SCHEDULE.beta[step].item(), rel=1e-5)
    first = learned_log_variance(SCHEDULE, torch.full((1,), -1.0), torch.tensor([1])).item()
    assert math.exp(first / 2) == pytest.approx(SCHEDULE.posterior_sigma[2].item(), rel=1e-5)
    alone = learned_log_variance(Schedule([0.6]), torch.tensor([-1.0, 1.0]), torch.tensor([1]))
    assert alone.exp().sqrt().tolist() == pytest.approx([0.8, 0.8])


def test_divergence_is_that_of_normal_distributions():
    """By Bayes: q(x_{t-1} | x_t, x_0) is the product of two normal densities, here combined by their precisions."""
    t, x0, noise, x, raw = case([1, 2, 10, 50, 99], torch.float64)
    guess = x0 + 0.1 * philox_normal(SHAPE, 4).double()
    bits = variational_bound(SCHEDULE, guess, raw, x0, x, t + 1)
    for b, step in enumerate((t + 1).tolist()):
        alpha, beta = SCHEDULE.alpha[step], SCHEDULE.beta[step]
        before, spread = SCHEDULE.alpha_bar[step - 1], SCHEDULE.beta_bar[step - 1]
        precision = alpha**2 / beta**2 + 1 / spread**2

        def posterior(picture):
            return (alpha / beta**2 * x[b] + before / spread**2 * picture) / precision

        v = (raw[b] + 1) / 2
        deviation = beta**v * precision ** (-(1 - v) / 2)
        expected = kl_divergence(Normal(posterior(x0[b]), precision**-0.5), Normal(posterior(guess[b]), deviation))
        assert bits[b].item() == pytest.approx(expected.mean().item() / math.log(2), rel=1e-8)


@pytest.mark.parametrize("guess", [-1.0, 0.0, 0.3, 5.0])
def test_likelihoods_of_the_256_values_sum_to_one(guess):
    values = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).view(256, 1, 1, 1)
    ones = torch.ones(256, 1, 1, 1, dtype=torch.float64)
    step = torch.ones(256, dtype=torch.int64)
    bits = variational_bound(SCHEDULE, guess * ones, -ones, values, 0 * ones, step)
    assert (2**-bits).sum().item() == pytest.approx(1, abs=1e-8)  # 256 cells of 1e-12 at the least
    if abs(guess) <= 1:
        assert values[bits.argmin()].item() == pytest.approx(guess, abs=1 / 127)


def test_likelihood_far_from_the_mean_is_finite():
    ones, values = torch.ones(3, 1, 1, 1), torch.tensor([-1.0, 0.1, 1.0]).view(3, 1, 1, 1)
    bits = variational_bound(SCHEDULE, 1e3 * ones, -ones, values, 0 * ones, torch.ones(3).long())
    assert bits.isfinite().all() and bits[2] == 0


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_loss_is_both_parts(prediction):
    t, x0, noise, x, raw = case([0, 1, 10, 50, 99])
    signal, spread = SCHEDULE.alpha_bar[t + 1], SCHEDULE.beta_bar[t + 1]
    # A prediction of the scale that belongs to it: 0.1 of the noise.
    eps = noise + 0.1 * philox_normal(SHAPE, 4)
    guess = (x - spread.float().view(-1, 1, 1, 1) * eps) / signal.float().view(-1, 1, 1, 1)
    output = training_target(prediction, guess, eps, signal, spread)
    target = training_target(prediction, x0, noise, signal, spread)
    loss = learned_variance_loss(SCHEDULE, torch.cat([output, raw], 1), x0, noise, t, prediction=prediction)
    simple = (output - target).square().mean((1, 2, 3))
    bound = variational_bound(SCHEDULE, guess, raw, x0, x, t + 1)
    assert loss.shape == (5,) and (bound > 0).all()
    torch.testing.assert_close(loss, simple + 0.001 * 100 * bound, rtol=1e-3, atol=1e-5)


def test_the_bound_trains_the_variance_alone():
    t, x0, noise, _, raw = case([0, 1, 10, 50, 99])
    output = torch.cat([noise + 0.1, raw], 1).requires_grad_()
    with_bound, without = (
        torch.autograd.grad(learned_variance_loss(SCHEDULE, output, x0, noise, t, weight=weight).sum(), output)[0]
        for weight in (0.001, 0.0)
    )
    assert torch.equal(with_bound[:, :2], without[:, :2]) and (without[:, 2:] == 0).all()
    assert (with_bound[:, 2:] != 0).all() and with_bound.isfinite().all()


def test_the_best_variance_is_the_analytic_one():
    """For white noise and the best prediction, the bound is least where sigma^2 = b^2 + data^2 Var(x_0 | x)."""
    step, deviation = 40, 0.3
    signal, spread = SCHEDULE.alpha_bar[step].item(), SCHEDULE.beta_bar[step].item()
    x0 = deviation * philox_normal((1, 1, 200, 200), 1)
    x = signal * x0 + spread * philox_normal(x0.shape, 2)
    uncertain = deviation**2 * spread**2 / (signal**2 * deviation**2 + spread**2)
    guess = deviation**2 * signal / (signal**2 * deviation**2 + spread**2) * x
    raws, t = torch.linspace(-1, 1, 41), torch.tensor([step])
    bits = torch.cat([variational_bound(SCHEDULE, guess, raw.expand_as(x), x0, x, t) for raw in raws])
    best = learned_log_variance(SCHEDULE, raws[bits.argmin()].view(1), t).exp().item()
    data = SCHEDULE.alpha_bar[step - 1].item() * SCHEDULE.beta[step].item() ** 2 / spread**2
    assert best == pytest.approx(SCHEDULE.posterior_sigma[step].item() ** 2 + data**2 * uncertain, rel=5e-3)


def test_one_step():
    """T = 1: the likelihood, with the one variance that there is."""
    schedule, x0 = Schedule([0.6]), torch.zeros(2, 1, 2, 2)
    output = torch.cat([philox_normal(x0.shape, 1), torch.zeros_like(x0)], 1)
    loss = learned_variance_loss(schedule, output, x0, philox_normal(x0.shape, 1), torch.zeros(2, dtype=torch.int64))
    cell = 2 * Normal(0.0, 0.8).cdf(torch.tensor(1 / 255)).item() - 1
    assert loss.tolist() == pytest.approx([-0.001 * math.log2(cell)] * 2, rel=1e-3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"output": torch.zeros(SHAPE)}, "output has 2 channels, expected 4"),
        ({"noise": torch.zeros(5, 2, 3, 3)}, r"noise has shape \[5, 2, 3, 3\]"),
        ({"t": torch.tensor([0, 1, 2, 3, 100])}, "t is out of range, expected 0 to 99"),
        ({"t": torch.tensor([0, 1])}, r"t has shape \[2\]"),
        ({"prediction": "noise"}, "prediction is 'noise'"),
    ],
)
def test_what_is_refused(change, message):
    t, x0, noise, _, raw = case([0, 1, 10, 50, 99])
    arguments = {"output": torch.cat([noise, raw], 1), "x0": x0, "noise": noise, "t": t, **change}
    with pytest.raises(ValueError, match=message):
        learned_variance_loss(SCHEDULE, **arguments)
