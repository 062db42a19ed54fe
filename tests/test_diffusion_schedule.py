"""Schedules: their published figures, both notations, fewer steps, files, and what is refused."""

import json
import math

import numpy as np
import pytest
import torch

from supy.diffusion import Schedule


@pytest.mark.parametrize("schedule", [Schedule.su(), Schedule.linear(), Schedule.cosine(), Schedule([0.9, 0.5])])
def test_entries_fit_together(schedule):
    for name in ("alpha", "beta", "alpha_bar", "beta_bar"):
        table = getattr(schedule, name)
        assert table.dtype == torch.float64 and table.shape == (schedule.T + 1,), name
    assert [t[0].item() for t in (schedule.alpha, schedule.beta, schedule.alpha_bar, schedule.beta_bar)] == [1, 0, 1, 0]
    for signal, noise in ((schedule.alpha, schedule.beta), (schedule.alpha_bar, schedule.beta_bar)):
        torch.testing.assert_close(signal**2 + noise**2, torch.ones_like(signal), rtol=1e-14, atol=0)
    assert (schedule.alpha_bar.diff() < 0).all()
    assert schedule.timesteps.tolist() == list(range(schedule.T))


def test_published_figures():
    su = Schedule.su()
    assert su.alpha_bar[-1].item() == pytest.approx(0.006482, abs=5e-7)
    assert su.beta[[1, -1]].tolist() == pytest.approx([0.00447, 0.14142], abs=5e-6)
    assert su.alpha[[1, 500, 1000]].tolist() == pytest.approx([math.sqrt(1 - 0.02 * t) for t in (1e-3, 0.5, 1)])
    assert Schedule.linear().alpha_bar[-1].item() == pytest.approx(0.006353, abs=5e-7)
    assert Schedule.linear().betas[[0, -1]].tolist() == pytest.approx([1e-4, 0.02])


def test_cosine():
    schedule = Schedule.cosine(100)
    t = np.arange(101) / 100
    wanted = np.cos((t + 0.008) / 1.008 * np.pi / 2) / np.cos(0.008 / 1.008 * np.pi / 2)
    # A product of 100 rounded factors, 1e-16 each, and cosines that cancel near the end; the last step is capped.
    np.testing.assert_allclose(schedule.alpha_bar[:100], wanted[:100], rtol=1e-12)
    assert schedule.betas[-1].item() == pytest.approx(0.999) and schedule.betas.max() <= 0.999 + 1e-12
    assert Schedule.cosine(100, largest=0.5).betas.max().item() == pytest.approx(0.5)


def test_both_notations():
    betas = [1e-4, 0.01, 0.3, 0.999]
    schedule = Schedule.from_betas(betas)
    np.testing.assert_allclose(schedule.betas, betas, rtol=1e-11)  # 1 - beta rounds at 1e-16, which is 1e-12 of 1e-4
    # A thousand rounded factors at most, whose errors of 1e-16 add up.
    np.testing.assert_allclose(schedule.alpha_bar[1:] ** 2, np.cumprod(1 - np.array(betas)), rtol=1e-13)
    again = Schedule.from_alpha_bar(schedule.alpha_bar[1:])
    torch.testing.assert_close(again.alpha, schedule.alpha, rtol=1e-14, atol=0)
    assert Schedule(np.float32([0.5, 0.25])) == Schedule(torch.tensor([0.5, 0.25])) == Schedule([0.5, 0.25])


def test_posterior_sigma_is_the_deviation_of_the_posterior():
    """Bayes: 1 / b^2 = alpha^2 / beta^2 + 1 / beta_bar_{t-1}^2."""
    schedule = Schedule.su(20)
    assert schedule.posterior_sigma[:2].tolist() == [0, 0]
    precision = schedule.alpha[2:] ** 2 / schedule.beta[2:] ** 2 + 1 / schedule.beta_bar[1:-1] ** 2
    torch.testing.assert_close(schedule.posterior_sigma[2:], precision**-0.5, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "T, steps, start, spacing, kept",
    [
        (10, 5, None, "trailing", [2, 4, 6, 8, 10]),
        (10, 5, None, "leading", [1, 3, 5, 7, 9]),  # the code of post 9181
        (10, 4, None, "trailing", [2, 5, 7, 10]),  # T is not divisible by steps
        (10, 3, None, "leading", [1, 4, 7]),
        (10, 3, 6, "trailing", [2, 4, 6]),
        (10, 10, None, "trailing", list(range(1, 11))),
        (7, 1, None, "trailing", [7]),
        (1, 1, None, "trailing", [1]),
    ],
)
def test_stride(T, steps, start, spacing, kept):
    full = Schedule.su(T)
    schedule = full.stride(steps, start=start, spacing=spacing)
    assert schedule.timesteps.tolist() == [t - 1 for t in kept]
    torch.testing.assert_close(schedule.alpha_bar[1:], full.alpha_bar[kept], rtol=1e-14, atol=0)
    # alpha and beta are those of the jump: of all the steps between, in one.
    jumps = [full.alpha[a + 1 : b + 1].prod().item() for a, b in zip([0, *kept], kept)]
    # Quotients of products of up to a thousand factors; 1 - alpha^2 then cancels, by a thousand or more.
    np.testing.assert_allclose(schedule.alpha[1:], jumps, rtol=1e-13)
    np.testing.assert_allclose(schedule.beta[1:], np.sqrt(1 - np.array(jumps) ** 2), rtol=1e-9)


def test_stride_of_a_stride():
    assert Schedule.su(100).stride(20).stride(5).timesteps.tolist() == [19, 39, 59, 79, 99]


def test_json_round_trip():
    for schedule in (Schedule.su(50), Schedule.cosine(50).stride(7)):
        again = Schedule.from_dict(json.loads(json.dumps(schedule.to_dict())))
        assert again == schedule and torch.equal(again.beta_bar, schedule.beta_bar)
    assert Schedule.su(50) != Schedule.linear(50) and Schedule.su(50) != 3


@pytest.mark.parametrize("values", [None, [], {"alpha": [0.5]}, {"alpha": "x", "timesteps": [0]}])
def test_from_dict_refuses(values):
    with pytest.raises(ValueError, match="supy.Schedule"):
        Schedule.from_dict(values)


@pytest.mark.parametrize(
    "alpha, message",
    [
        ([], r"alpha has shape \[0\]"),
        ([[0.5]], r"alpha has shape \[1, 1\]"),
        ([0.5, 1.0], "alpha has 1.0 at step 2"),
        ([0.0], "alpha has 0.0 at step 1"),
        ([-0.5], "alpha has -0.5"),
        ([0.5, math.nan, 2], "alpha has nan at step 2"),
        ([1e-200] * 2, "product"),
        (["a"], "no array of numbers"),
        (None, "no array of numbers"),
    ],
)
def test_alphas_that_are_refused(alpha, message):
    with pytest.raises(ValueError, match=message):
        Schedule(alpha)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Schedule.su(0),
        lambda: Schedule.cosine(2.0),
        lambda: Schedule.from_betas([0.5, 1.0]),
        lambda: Schedule.from_alpha_bar([0.5, 0.5]),
        lambda: Schedule.from_alpha_bar([1.0]),
        lambda: Schedule([0.5, 0.5], timesteps=[1, 0]),
        lambda: Schedule([0.5, 0.5], timesteps=[0]),
        lambda: Schedule([0.5], timesteps=["a"]),
        lambda: Schedule.su(5).stride(0),
        lambda: Schedule.su(5).stride(6),
        lambda: Schedule.su(5).stride(3, start=2),
        lambda: Schedule.su(5).stride(3, start=6),
        lambda: Schedule.su(5).stride(3, spacing="log"),
    ],
)
def test_what_else_is_refused(make):
    with pytest.raises(ValueError, match="supy.Schedule.*expected|supy.Schedule: (betas|alpha_bar|timesteps)"):
        make()
