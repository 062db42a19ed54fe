"""Noising in one jump."""

from __future__ import annotations

import torch

from supy._checks import Shapes, require
from supy.ops._steps import Coefficient, Step
from supy.ops.philox_normal import philox_normal
from supy.reference.ddpm_add_noise import weights


def _check(name, values, clipped):
    for coefficient, value in zip(("alpha_bar", "beta_bar"), values):
        require(bool(value.isfinite().all()), name, f"{coefficient} is {value.tolist()}, expected finite numbers")


OP = "ddpm_add_noise"
_step = Step(OP, ("alpha_bar", "beta_bar"), weights, _check)


def ddpm_add_noise(
    x0: torch.Tensor,
    alpha_bar: Coefficient,
    beta_bar: Coefficient,
    *,
    noise: torch.Tensor | None = None,
    seed: int | None = None,
    offset: int = 0,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``alpha_bar * x0 + beta_bar * noise``, and the noise (post 9119; arXiv 2006.11239, equation 4).

    Args:
        x0: `[B, ...]`, any floating-point dtype. Half precision computes in float32.
        alpha_bar, beta_bar: numbers, or floating-point tensors `[]` or `[B]`, best in float64; usually
            alpha_bar^2 + beta_bar^2 = 1. Not differentiated.
        noise: a tensor like x0, or None for that of ``seed``.
        seed, offset: the noise is ``philox_normal(x0.shape, seed, offset=offset, dtype=x0.dtype)``, made on the way.
        out: where to write x_t, which may be ``x0`` itself; it records no gradient then.

    Returns:
        x_t, like x0, and the noise. Differentiable once with respect to ``x0`` and ``noise``.

    Raises:
        ValueError, TypeError: tensors disagree, both or none of noise and seed are given, or a coefficient asks for a
            gradient.

    >>> import torch, supy
    >>> x_t, noise = supy.ops.ddpm_add_noise(torch.ones(2), 0.6, 0.8, seed=0)
    >>> x_t.allclose(0.6 + 0.8 * noise)
    True
    """
    require((noise is None) != (seed is None), OP, "expected exactly one of noise and seed")
    coefficients = alpha_bar, beta_bar
    if noise is not None:
        return _step(x0, None, coefficients, noise, None, 0, None, None, out), noise
    Shapes(OP).floating("x0", x0)
    if torch.is_grad_enabled() and x0.requires_grad:
        noise = philox_normal(x0.shape, seed, offset=offset, dtype=x0.dtype, device=x0.device)
        return _step(x0, None, coefficients, noise, None, 0, None, None, out), noise
    noise = x0.new_empty(x0.shape)
    return _step(x0, None, coefficients, None, seed, offset, None, None, out, noise), noise
