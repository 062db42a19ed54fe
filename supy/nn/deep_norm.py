"""The norm at the end of a residual block of a very deep network."""

from __future__ import annotations

import torch
from torch import nn

from supy import ops


class DeepNorm(nn.Module):
    """Norm(alpha * x + dropout(branch)), where branch is what a block computes from x (post 8978; arXiv 2203.00555).

    It takes the place of ``norm(x + dropout(branch))``; :func:`supy.nn.deepnorm_constants` knows alpha.

    Args:
        dim: D, the size of the last axis.
        alpha: weight of x. The attribute is a number that may be changed at any time, in a compiled model too.
        eps: added to the variance, or to the mean square.
        kind: ``"layer"`` or ``"rms"``.
        affine: learn a weight, which begins at 1, ...
        bias: ... and a bias, which begins at 0. Default: for ``"layer"`` only.
        dropout: share of the branch that is set to 0 in training. The seed of a mask comes from torch's generator of
            the device, so that ``torch.manual_seed`` and activation checkpointing do what they do for ``nn.Dropout``.

    >>> norm = DeepNorm(4, alpha=2.0)
    >>> x = torch.randn(2, 3, 4)
    >>> norm(x, x.tanh()).shape
    torch.Size([2, 3, 4])
    """

    def __init__(
        self,
        dim: int,
        alpha: float = 1.0,
        *,
        eps: float = 1e-6,
        kind: str = "layer",
        affine: bool = True,
        bias: bool | None = None,
        dropout: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.dim, self.alpha, self.eps, self.kind, self.dropout = dim, alpha, eps, kind, dropout
        bias = affine and (kind == "layer" if bias is None else bias)
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype)) if bias else None

    def forward(self, x: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        """x and branch `[..., dim]`: a tensor like x."""
        dropout = self.dropout if self.training else 0.0
        seed = torch.randint(2**63 - 1, (1,), device=x.device) if dropout else None
        return ops.deep_norm(
            x, branch, self.alpha, self.weight, self.bias, eps=self.eps, kind=self.kind, dropout=dropout, seed=seed
        )

    def extra_repr(self) -> str:
        text = f"{self.dim}, alpha={self.alpha}, eps={self.eps}, kind={self.kind!r}"
        return text + (f", dropout={self.dropout}" if self.dropout else "")
