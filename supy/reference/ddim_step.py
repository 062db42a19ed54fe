"""The step of DDIM: kexue.fm post 9181; arXiv 2010.02502, equation 12."""

from __future__ import annotations

import torch

from supy.reference._steps import Weights, complement, ratio


def weights(alpha_bar: torch.Tensor, alpha_bar_prev: torch.Tensor, eta: torch.Tensor, clipped: bool) -> Weights:
    """(x - (beta_bar - alpha sqrt(beta_bar_prev^2 - sigma^2)) eps) / alpha + sigma noise

    with alpha = alpha_bar / alpha_bar_prev, beta = sqrt(1 - alpha^2), each beta_bar = sqrt(1 - alpha_bar^2) and
    sigma = eta beta_bar_prev beta / beta_bar. In terms of x0 = (x - beta_bar eps) / alpha_bar that is

        alpha_bar_prev x0 + sqrt(beta_bar_prev^2 - sigma^2) eps + sigma noise;

    clipped: x0 = clip(x0) and eps = (x - alpha_bar x0) / beta_bar in it. At alpha_bar = 1 there is no noise: sigma is
    0, and with clipping, which asks for alpha_bar_prev = 1 there, so is eps.
    """
    none = torch.zeros_like(alpha_bar)
    beta_bar, beta_bar_prev = complement(alpha_bar), complement(alpha_bar_prev)
    inverse = alpha_bar_prev / alpha_bar  # 1 / alpha
    # beta / beta_bar = sqrt((alpha_bar_prev^2 - alpha_bar^2) / (alpha_bar_prev^2 beta_bar^2)); unused where eta is 0.
    beta = ((alpha_bar_prev - alpha_bar) * (alpha_bar_prev + alpha_bar)).sqrt() / alpha_bar_prev
    sigma = torch.where((eta == 0) | (beta_bar_prev == 0), 0.0, eta * beta_bar_prev * ratio(beta, beta_bar, 0.0))
    direction = ((beta_bar_prev - sigma) * (beta_bar_prev + sigma)).sqrt()
    if not clipped:
        return Weights(inverse, direction - beta_bar * inverse, none, sigma, none, none)
    share = ratio(direction, beta_bar, 0.0)
    return Weights(share, none, alpha_bar_prev - share * alpha_bar, sigma, 1 / alpha_bar, -beta_bar / alpha_bar)
