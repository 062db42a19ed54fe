"""A variance that the network learns (Improved DDPM, arXiv 2102.09672), and the bound that trains it."""

from __future__ import annotations

import math

import torch

from supy._checks import Shapes, require
from supy.diffusion.prediction import predicted_x0, training_target
from supy.diffusion.schedule import Schedule


def learned_log_variance(schedule: Schedule, raw: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """log sigma^2 = v log beta_t^2 + (1 - v) log b_t^2, v = (raw + 1) / 2, b_t = beta_t beta_bar_{t-1} / beta_bar_t.

    b_1 would be 0: b_2 stands for it, as in the paper's code, or beta_1 where T = 1. ``raw``, the second half of what
    the network returns, is not limited: -1 is the smallest variance that can be right and 1 the largest.

    Args:
        raw: `[B, ...]`. step: int64 `[B]` or `[1]`, 1 to T.

    >>> import torch, supy
    >>> schedule = supy.diffusion.Schedule.su()
    >>> raw = torch.tensor([[-1.0, 0.0, 1.0]])
    >>> supy.diffusion.learned_log_variance(schedule, raw, torch.tensor([2])).exp().sqrt()
    tensor([[0.0037, 0.0048, 0.0063]])
    """
    smallest, largest = (_along(table, step, raw) for table in _log_variances(schedule))
    v = (raw + 1) / 2
    return v * largest + (1 - v) * smallest


def learned_variance_loss(
    schedule: Schedule,
    output: torch.Tensor,
    x0: torch.Tensor,
    noise: torch.Tensor,
    t: torch.Tensor,
    *,
    prediction: str = "eps",
    weight: float = 0.001,
) -> torch.Tensor:
    """The loss of a network that returns 2 C channels: squared error of the prediction + ``weight`` T times a bound.

    The bound is a sum over T steps, of which each sample has one, hence T. Its term is `variational_bound`, in which
    the prediction counts as a constant: it trains the variance alone (arXiv 2102.09672, section 3.1).

    Args:
        schedule: of all T steps.
        output: `[B, 2C, H, W]`, what the network returned for x_t = alpha_bar x0 + beta_bar noise.
        x0, noise: `[B, C, H, W]`.
        t: int64 `[B]`, what the network was told: 0 to T - 1.
        prediction: what the first C channels are.

    Returns:
        float32 `[B]`, each a mean over C, H and W. Times C H W it is the sum that post 9152 asks for.

    >>> import torch, supy
    >>> x0, noise = torch.full((2, 3, 4, 4), 0.25), supy.ops.philox_normal((2, 3, 4, 4), 1)
    >>> output = torch.cat([noise, torch.full_like(noise, -1.0)], 1)  # perfect, and sure of it
    >>> schedule = supy.diffusion.Schedule.su()
    >>> supy.diffusion.learned_variance_loss(schedule, output, x0, noise, torch.tensor([1, 999])).round(decimals=4)
    tensor([0., 0.])
    """
    op = "learned_variance_loss"
    shapes = Shapes(op)
    shapes.match("x0", x0, "B C H W")
    shapes.match("noise", noise, "B C H W")
    shapes.match("t", t, "B", torch.int64)
    shapes.match("output", output, "B 2C H W")
    got, wanted = output.shape[1], 2 * x0.shape[1]
    require(got == wanted, op, f"output has {got} channels, expected {wanted}")
    good = bool(((t >= 0) & (t < schedule.T)).all())
    require(good, op, f"t is out of range, expected 0 to {schedule.T - 1}")
    output, x0, noise, step = output.float(), x0.float(), noise.float(), t + 1
    signal, spread = (_along(table, step, x0) for table in (schedule.alpha_bar, schedule.beta_bar))
    x = signal * x0 + spread * noise
    predicted, raw = output.chunk(2, 1)
    target = training_target(prediction, x0, noise, signal.flatten(), spread.flatten())
    simple = (predicted - target).square().mean((1, 2, 3))
    guess = predicted_x0(prediction, predicted.detach(), x, signal.flatten(), spread.flatten())
    return simple + weight * schedule.T * variational_bound(schedule, guess, raw, x0, x, step)


def variational_bound(
    schedule: Schedule, guess: torch.Tensor, raw: torch.Tensor, x0: torch.Tensor, x: torch.Tensor, step: torch.Tensor
) -> torch.Tensor:
    """The term of one step in the bound on -log2 p(x0): bits a dimension, `[B]`.

    For step > 1 the Kullback-Leibler divergence of q(x_{step-1} | x, x0) and the model's normal distribution; else
    minus the logarithm of what that distribution gives to the pixel's value, one of 256 in [-1, 1] (arXiv 2006.11239,
    section 3.3).

    Args:
        guess: the x0 that the network predicts; raw: what it says about the variance; x0: the truth; x: x_step; all
        `[B, C, H, W]`. step: int64 `[B]`, 1 to T.
    """
    keep = _ratio(schedule.alpha * schedule.beta_bar.roll(1) ** 2, schedule.beta_bar**2)
    data = _ratio(schedule.alpha_bar.roll(1) * schedule.beta**2, schedule.beta_bar**2)
    keep, data = _along(keep, step, x), _along(data, step, x)
    mean, true_mean = keep * x + data * guess, keep * x + data * x0
    log_variance = learned_log_variance(schedule, raw, step)
    true_log_variance = _along(_log_variances(schedule)[0], step, x)
    divergence = 0.5 * (
        log_variance - true_log_variance - 1
        + (true_log_variance - log_variance).exp()
        + (true_mean - mean).square() * (-log_variance).exp()
    )
    first = _along(torch.arange(schedule.T + 1) == 1, step, x) > 0
    bits = torch.where(first, -_log_likelihood(x0, mean, log_variance), divergence) / math.log(2)
    return bits.mean((1, 2, 3))


def _log_likelihood(x0: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """The logarithm of a normal distribution's share of x0's cell, 2 / 255 wide; the outer cells reach to infinity."""
    inverse = (-0.5 * log_variance).exp()
    upper, lower = (x0 - mean + 1 / 255) * inverse, (x0 - mean - 1 / 255) * inverse
    # Both ends on the side where the distribution function is small: no two numbers close to 1 are subtracted.
    flip = upper + lower > 0
    upper, lower = torch.where(flip, -lower, upper), torch.where(flip, -upper, lower)
    inside = (torch.special.ndtr(upper) - torch.special.ndtr(lower)).clamp(min=1e-12).log()
    lowest = torch.special.log_ndtr((x0 - mean + 1 / 255) * inverse)
    highest = torch.special.log_ndtr(-(x0 - mean - 1 / 255) * inverse)
    return torch.where(x0 < -0.999, lowest, torch.where(x0 > 0.999, highest, inside))


def _log_variances(schedule: Schedule) -> tuple[torch.Tensor, torch.Tensor]:
    """log b_t^2, with b_2 for b_1, and log beta_t^2; entry 0 is that of step 1."""
    largest = schedule.beta.clone()
    smallest = schedule.posterior_sigma.clone()
    smallest[:2] = smallest[2] if schedule.T > 1 else largest[1]
    largest[0] = largest[1]
    return 2 * smallest.log(), 2 * largest.log()


def _ratio(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a / b of tables whose entry 0 means nothing."""
    return torch.cat([a[:1], a[1:] / b[1:]])


def _along(table: torch.Tensor, step: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The table's entries for each sample, as a factor of x."""
    return table.to(x.device)[step.to(x.device)].to(x.dtype).view(-1, *[1] * (x.ndim - 1))
