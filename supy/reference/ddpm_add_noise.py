"""Noising in one jump: kexue.fm post 9119; arXiv 2006.11239, equation 4."""

from __future__ import annotations

import torch

from supy.reference._steps import Weights


def weights(alpha_bar: torch.Tensor, beta_bar: torch.Tensor, clipped: bool) -> Weights:
    """x_t = alpha_bar x0 + beta_bar noise; "x" of the weights is x0 here."""
    none = torch.zeros_like(alpha_bar)
    return Weights(alpha_bar, none, none, beta_bar, none, none)
