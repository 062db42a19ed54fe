"""The gated attention unit: attention and feed-forward network in one layer, with one head."""

from __future__ import annotations

import torch
from torch import nn

from supy import ops


def gau_normal_(weight: torch.Tensor, inputs: int, layers: int) -> torch.Tensor:
    """Fills ``weight`` with normal numbers cut off at two sigma, of standard deviation 1 / sqrt(inputs) / layers^(1/3).

    The initial values of GAU-alpha (post 9052): three matrices follow each other in a unit, so that the branches of all
    units together begin as large as one.

    >>> weight = gau_normal_(torch.empty(2000, 768), 768, layers=24)
    >>> round(weight.std().item(), 4)
    0.0125
    """
    std = 1.13684723 * inputs**-0.5 * layers ** (-1 / 3)  # a normal number cut off at two sigma has std / 1.13684723
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


class GatedAttentionUnit(nn.Module):
    """O = (U * (A V)) W_o with A = attention of rotated, scaled copies of Z (arXiv 2202.10447; post 8934).

    U, V `[B, T, value_size]` and Z `[B, T, key_size]` are swish(x W). q and k are Z times a learned vector plus a learned
    offset each, then rotated by position. No residual, norm or dropout: those belong to the network around it.

    Args:
        dim: size of the input and output.
        value_size: size of U and V; default 2 dim, with which two units match one attention and one feed-forward layer.
        key_size: size of q and k, even.
        kernel, causal: as in :func:`supy.ops.gau_attention`.
        offset: False for none, as in GAU-alpha; it is then 0, and no parameter.
        layers: of units in the whole network, for initial projections as in GAU-alpha (:func:`gau_normal_`); None: normal
            with a standard deviation of 1 / sqrt(inputs).

    >>> unit = GatedAttentionUnit(32)
    >>> unit(torch.zeros(2, 5, 32), lengths=torch.tensor([5, 3])).shape
    torch.Size([2, 5, 32])
    """

    def __init__(
        self,
        dim: int,
        *,
        value_size: int | None = None,
        key_size: int = 128,
        kernel: str = "softmax_plus",
        causal: bool = False,
        offset: bool = True,
        layers: int | None = None,
    ):
        super().__init__()
        self.sizes = (value_size or 2 * dim, value_size or 2 * dim, key_size)
        self.kernel = kernel
        self.causal = causal
        self.project_in = nn.Linear(dim, sum(self.sizes), bias=False)
        self.project_out = nn.Linear(self.sizes[0], dim, bias=False)
        self.scale = nn.Parameter(torch.ones(2, key_size))
        if offset:
            self.offset = nn.Parameter(torch.zeros(2, key_size))
        else:
            self.register_buffer("offset", torch.zeros(2, key_size), persistent=False)
        for projection in (self.project_in, self.project_out):
            if layers is None:
                nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
            else:
                gau_normal_(projection.weight, projection.in_features, layers)

    def forward(
        self,
        x: torch.Tensor,
        *,
        lengths: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """x `[B, T, dim]`; lengths int `[B]` or cu_seqlens int `[N + 1]` or neither: `[B, T, dim]`.

        rotation: cosines and sines `[T, key_size / 2]` of each token's angles, for other positions than 0 to T - 1.
        """
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        return ops.gated_attention_unit(
            x.to(dtype),
            self.project_in.weight.to(dtype),
            self.project_out.weight.to(dtype),
            self.scale,
            self.offset,
            kernel=self.kernel,
            causal=self.causal,
            lengths=lengths,
            cu_seqlens=cu_seqlens,
            rotation=rotation,
        )
