"""The ancestral step: kexue.fm posts 9119 and 9152; arXiv 2006.11239, algorithm 2."""

from __future__ import annotations

import torch

from supy.reference._steps import Weights, complement, ratio


def weights(
    alpha: torch.Tensor, beta: torch.Tensor, beta_bar: torch.Tensor, sigma: torch.Tensor, clipped: bool
) -> Weights:
    """(x - beta^2 / beta_bar eps) / alpha + sigma noise

    Clipped: with alpha_bar = sqrt(1 - beta_bar^2), first

        x0 = clip((x - beta_bar eps) / alpha_bar),   eps = (x - alpha_bar x0) / beta_bar.

    Where beta_bar is 0, so is beta, and beta / beta_bar is taken as 1, its value at the first step of every schedule.
    """
    none = torch.zeros_like(alpha)
    share = ratio(beta, beta_bar, 1.0)
    if not clipped:
        return Weights(1 / alpha, -share * beta / alpha, none, sigma, none, none)
    alpha_bar = complement(beta_bar)
    rest = (1 - share) * (1 + share) / alpha
    return Weights(rest, none, share**2 * alpha_bar / alpha, sigma, 1 / alpha_bar, -beta_bar / alpha_bar)
