"""The ancestral step of DDPM."""

from __future__ import annotations

import torch

from supy._checks import require
from supy.ops._steps import Coefficient, Step
from supy.reference.ddpm_step import weights


def _check(name, values, clipped):
    alpha, beta, beta_bar, sigma = values
    require(bool((alpha > 0).all()), name, f"alpha is {alpha.tolist()}, expected more than 0")
    require(bool((beta >= 0).all()), name, f"beta is {beta.tolist()}, expected at least 0")
    require(bool((sigma >= 0).all()), name, f"sigma is {sigma.tolist()}, expected at least 0")
    require(bool((beta_bar >= 0).all()), name, f"beta_bar is {beta_bar.tolist()}, expected at least 0")
    require(bool(((beta_bar > 0) | (beta == 0)).all()), name, "beta_bar is 0 where beta is not")
    if clipped:
        known = bool((beta_bar < 1).all())
        require(known, name, f"beta_bar is {beta_bar.tolist()}, expected less than 1 to predict x0")


_step = Step("ddpm_step", ("alpha", "beta", "beta_bar", "sigma"), weights, _check)


def ddpm_step(
    x: torch.Tensor,
    eps: torch.Tensor,
    alpha: Coefficient,
    beta: Coefficient,
    beta_bar: Coefficient,
    sigma: Coefficient,
    *,
    noise: torch.Tensor | None = None,
    seed: int | None = None,
    offset: int = 0,
    clip: float | None = None,
    threshold: float | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """One ancestral step, x_t to x_{t-1}, in one pass over memory (posts 9119, 9152; arXiv 2006.11239, algorithm 2).

        (x - beta^2 / beta_bar * eps) / alpha + sigma * noise

    in the notation alpha^2 + beta^2 = 1, beta_bar^2 = 1 - alpha_bar^2. With ``clip`` or ``threshold`` the data that eps
    predicts is x0 = (x - beta_bar eps) / alpha_bar; it is clipped, and eps = (x - alpha_bar x0) / beta_bar follows it.

    Args:
        x: `[B, ...]`, any floating-point dtype. Half precision computes in float32.
        eps: like x, the noise that a network saw in x.
        alpha, beta, beta_bar, sigma: numbers, or floating-point tensors `[]` or `[B]`, best in float64. Not
            differentiated. On a GPU the values in tensors are not looked at: where a formula divides by 0 there, the
            result is not finite.
        noise: a tensor like x. Needed, it or a seed, where sigma is not 0, and not looked at where it is 0.
        seed, offset: the noise is ``philox_normal(x.shape, seed, offset=offset, dtype=x.dtype)``, made on the way.
        clip: clip x0 to -clip ... clip.
        threshold: dynamic thresholding (arXiv 2205.11487, section 2.3): with q this quantile of |x0| over the sample,
            clip to +-max(q, clip) and scale back to +-clip; without ``clip`` that is 1. Finding q takes 33 looks at x
            and eps before the step, and no memory.
        out: where to write, which may be ``x`` or ``eps`` itself; it records no gradient then.

    Returns:
        A tensor like x. Differentiable once with respect to x, eps and noise. No gradient passes through an x0 that is
        clipped; the quantile of ``threshold`` counts as a constant.

    Raises:
        ValueError, TypeError: tensors disagree; a coefficient is out of its range or asks for a gradient; both noise
            and seed are given, or none where sigma is not 0.

    >>> import torch, supy
    >>> x, eps = torch.ones(2), torch.full((2,), 0.5)
    >>> supy.ops.ddpm_step(x, eps, alpha=0.8, beta=0.6, beta_bar=0.9, sigma=0.0)
    tensor([1., 1.])
    """
    return _step(x, eps, (alpha, beta, beta_bar, sigma), noise, seed, offset, clip, threshold, out)
