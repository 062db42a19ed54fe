"""What the steps of a diffusion share: each is one weighted sum of tensors, with a few weights a sample."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Weights(NamedTuple):
    """out = x * ``x`` + eps * ``eps`` + x0 * ``x0`` + noise * ``noise``

    with x0 = clip(x * ``x_to_x0`` + eps * ``eps_to_x0``).

    Each is a float64 tensor `[B]` or `[1]`. A step that does not clip has no use for x0: its weight is 0.
    """

    x: torch.Tensor
    eps: torch.Tensor
    x0: torch.Tensor
    noise: torch.Tensor
    x_to_x0: torch.Tensor
    eps_to_x0: torch.Tensor


def ratio(a: torch.Tensor, b: torch.Tensor, where_zero: float) -> torch.Tensor:
    """a / b, and its limit where b is 0."""
    return torch.where(b == 0, where_zero, a / b)


def complement(a: torch.Tensor) -> torch.Tensor:
    """sqrt(1 - a^2), precise near a = 1."""
    return ((1 - a) * (1 + a)).sqrt()


def predicted_x0(x, eps, weights: Weights) -> torch.Tensor:
    return _along(weights.x_to_x0, x) * x.double() + _along(weights.eps_to_x0, x) * eps.double()


def step(x, eps, noise, weights: Weights, limits, clip: float | None) -> torch.Tensor:
    """In float64, rounded to the dtype of ``x``; noise counts only where its weight is not 0.

    x0 is clipped to +-``clip``, or, where there are ``limits`` `[B]`, to +-limits and then scaled by clip / limits.
    """
    out = _along(weights.x, x) * x.double()
    if clip is None:
        if eps is not None:
            out = out + _along(weights.eps, x) * eps.double()
    else:
        limit, scale = _limit(limits, clip, x)
        out = out + _along(weights.x0, x) * scale * predicted_x0(x, eps, weights).clamp(-limit, limit)
    if noise is not None:
        weight = _along(weights.noise, x)
        out = torch.where(weight == 0, out, out + weight * noise.double())
    return out.to(x.dtype)


def step_backward(grad, x, eps, weights: Weights, limits, clip: float | None) -> tuple[torch.Tensor, ...]:
    """Gradients for x, eps and noise. The limits count as constants; where x0 is clipped, nothing passes through it."""
    grad = grad.double()
    dx, deps = _along(weights.x, x) * grad, _along(weights.eps, x) * grad
    if clip is not None:
        limit, scale = _limit(limits, clip, x)
        x0 = predicted_x0(x, eps, weights)
        through = torch.where((x0 > limit) | (x0 < -limit), 0.0, _along(weights.x0, x) * scale * grad)
        dx = dx + _along(weights.x_to_x0, x) * through
        deps = _along(weights.eps_to_x0, x) * through
    return tuple(d.to(x.dtype) for d in (dx, deps, _along(weights.noise, x) * grad))


def quantile_limits(x, eps, weights: Weights, quantile: float, clip: float) -> torch.Tensor:
    """`[B]`: that quantile of |x0| over a sample, interpolated as torch.quantile does, and ``clip`` at the least."""
    size = x[0].numel() if len(x) else 0
    if size == 0:
        return x.new_full((len(x),), clip, dtype=torch.float64)
    magnitude = predicted_x0(x, eps, weights).abs().flatten(1)
    rank = quantile * (size - 1)
    ordered = magnitude.sort(1).values
    low, high = ordered[:, int(rank)], ordered[:, min(int(rank) + 1, size - 1)]
    found = low + (high - low) * (rank - int(rank))
    return torch.where(magnitude.isnan().any(1), torch.nan, found.clamp(min=clip))


def _limit(limits, clip: float, x):
    limit = torch.full((1,), clip, dtype=torch.float64, device=x.device) if limits is None else limits.double()
    return _along(limit, x), _along(clip / limit, x)


def _along(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`[B]` or `[1]` as a factor of the first axis of x."""
    return weight.view(-1, *(1,) * (x.ndim - 1)) if x.ndim else weight.view(())
