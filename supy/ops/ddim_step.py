"""The step of DDIM."""

from __future__ import annotations

import torch

from supy._checks import require
from supy.ops._steps import Coefficient, Step
from supy.reference.ddim_step import weights


def _check(name, values, clipped):
    now, previous, eta = values
    require(bool(((now > 0) & (now <= 1)).all()), name, f"alpha_bar is {now.tolist()}, expected above 0 to 1")
    inside = bool(((previous >= 0) & (previous <= 1)).all())
    require(inside, name, f"alpha_bar_prev is {previous.tolist()}, expected 0 to 1")
    require(bool((eta >= 0).all()), name, f"eta is {eta.tolist()}, expected at least 0")
    forward = bool(((eta == 0) | (previous >= now)).all())
    require(forward, name, "alpha_bar_prev is less than alpha_bar where eta is not 0")
    if clipped:
        known = bool(((now < 1) | (previous == 1)).all())
        require(known, name, "alpha_bar is 1 where alpha_bar_prev is not: x0 is x there and clipping leaves no eps")


_step = Step("ddim_step", ("alpha_bar", "alpha_bar_prev", "eta"), weights, _check)


def ddim_step(
    x: torch.Tensor,
    eps: torch.Tensor,
    alpha_bar: Coefficient,
    alpha_bar_prev: Coefficient,
    *,
    eta: Coefficient = 0.0,
    noise: torch.Tensor | None = None,
    seed: int | None = None,
    offset: int = 0,
    clip: float | None = None,
    threshold: float | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """One step of DDIM, from alpha_bar to alpha_bar_prev, in one pass over memory (post 9181; arXiv 2010.02502).

        (x - (beta_bar - alpha * sqrt(beta_bar_prev^2 - sigma^2)) * eps) / alpha + sigma * noise

    with alpha = alpha_bar / alpha_bar_prev, beta^2 = 1 - alpha^2, beta_bar^2 = 1 - alpha_bar^2 (and so for prev), and
    sigma = eta * beta_bar_prev * beta / beta_bar. eta = 0 is deterministic, and goes the other way, from data to
    noise, where alpha_bar_prev is the smaller one; eta = 1 is the ancestral step. With ``clip`` or ``threshold`` the
    data that eps predicts is x0 = (x - beta_bar eps) / alpha_bar; it is clipped, and eps follows it:
    (x - alpha_bar x0) / beta_bar.

    Args:
        x: `[B, ...]`, any floating-point dtype. Half precision computes in float32.
        eps: like x, the noise that a network saw in x.
        alpha_bar, alpha_bar_prev, eta: numbers, or floating-point tensors `[]` or `[B]`, best in float64. Not
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
    >>> x0 = supy.ops.ddim_step(x, eps, alpha_bar=0.6, alpha_bar_prev=1.0)
    >>> x0.allclose((x - 0.8 * eps) / 0.6)
    True
    """
    return _step(x, eps, (alpha_bar, alpha_bar_prev, eta), noise, seed, offset, clip, threshold, out)
