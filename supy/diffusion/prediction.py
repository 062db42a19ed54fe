"""What a network predicts: the noise ("eps"), the picture ("x0") or the velocity ("v"), and one from the other.

With x_t = alpha_bar x_0 + beta_bar eps, the velocity is v = alpha_bar eps - beta_bar x_0 (arXiv 2202.00512), so that
x_0 = alpha_bar x_t - beta_bar v and eps = alpha_bar v + beta_bar x_t, without any division.
"""

from __future__ import annotations

import torch

from supy._checks import require

PREDICTIONS = ("eps", "x0", "v")

Coefficient = float | torch.Tensor


def training_target(
    prediction: str, x0: torch.Tensor, noise: torch.Tensor, alpha_bar: Coefficient, beta_bar: Coefficient
) -> torch.Tensor:
    """What the network should return for x_t = alpha_bar x0 + beta_bar noise.

    Args:
        prediction: ``"eps"``, ``"x0"`` or ``"v"``.
        x0, noise: `[B, ...]`. alpha_bar, beta_bar: floats, or tensors `[B]`.

    >>> import torch, supy
    >>> supy.diffusion.training_target("v", torch.tensor([1.0]), torch.tensor([10.0]), 0.8, 0.6)
    tensor([7.4000])
    """
    check_prediction("training_target", prediction)
    if prediction == "eps":
        return noise
    if prediction == "x0":
        return x0
    return _like(alpha_bar, x0) * noise - _like(beta_bar, x0) * x0


def predicted_x0(
    prediction: str, output: torch.Tensor, x: torch.Tensor, alpha_bar: Coefficient, beta_bar: Coefficient
) -> torch.Tensor:
    """The picture that the network's output means. From eps it is divided by alpha_bar, so that its error grows with t.

    >>> import torch, supy
    >>> x = 0.8 * torch.tensor([1.0]) + 0.6 * torch.tensor([10.0])
    >>> supy.diffusion.predicted_x0("v", torch.tensor([7.4]), x, 0.8, 0.6)
    tensor([1.])
    """
    check_prediction("predicted_x0", prediction)
    if prediction == "x0":
        return output
    alpha_bar, beta_bar = _like(alpha_bar, x), _like(beta_bar, x)
    return (x - beta_bar * output) / alpha_bar if prediction == "eps" else alpha_bar * x - beta_bar * output


def predicted_eps(
    prediction: str, output: torch.Tensor, x: torch.Tensor, alpha_bar: Coefficient, beta_bar: Coefficient
) -> torch.Tensor:
    """The noise that the network's output means. From x0 it is divided by beta_bar: its error grows towards t = 1.

    >>> import torch, supy
    >>> x = 0.8 * torch.tensor([1.0]) + 0.6 * torch.tensor([10.0])
    >>> supy.diffusion.predicted_eps("x0", torch.tensor([1.0]), x, 0.8, 0.6)
    tensor([10.])
    """
    check_prediction("predicted_eps", prediction)
    if prediction == "eps":
        return output
    alpha_bar, beta_bar = _like(alpha_bar, x), _like(beta_bar, x)
    return (x - alpha_bar * output) / beta_bar if prediction == "x0" else alpha_bar * output + beta_bar * x


def check_prediction(op: str, prediction: str) -> None:
    require(prediction in PREDICTIONS, op, f"prediction is {prediction!r}, expected 'eps', 'x0' or 'v'")


def _like(coefficient: Coefficient, x: torch.Tensor) -> Coefficient:
    """A coefficient that broadcasts over the samples of `x`, and does not widen its dtype."""
    if not isinstance(coefficient, torch.Tensor):
        return coefficient
    return coefficient.to(x).view(-1, *[1] * (x.ndim - 1))
