"""The norm of FLASH; torch has the others."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class ScaleNorm(nn.Module):
    """g x / sqrt(mean(x^2) + eps) over the last axis, with one learned number g (arXiv 1910.05895; 2202.10447).

    Half precision computes the mean in float32.

    Args:
        dim: size of the last axis.
        eps: what FLASH adds, 1e-5.

    >>> ScaleNorm(2)(torch.tensor([3.0, 4.0])) * 12.5**0.5
    tensor([3.0000, 4.0000], grad_fn=<MulBackward0>)
    """

    def __init__(self, dim: int, *, eps: float = 1e-5):
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (self.dim,), eps=self.eps) * self.scale.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"
