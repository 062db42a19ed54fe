"""GlobalPointer: scores of all spans, with a query and a key of its own for every head."""

from __future__ import annotations

import torch
from torch import nn

from supy import ops


class GlobalPointer(nn.Module):
    """score[b, h, i, j] = q_hi . k_hj / sqrt(D), q and k linear in the input (kexue.fm post 8373).

    A head costs 2 D dim parameters, and the scores of all heads H matrix products;
    :class:`supy.nn.EfficientGlobalPointer` has the same methods and costs 4 D and one. Everything is computed in the
    dtype of the parameters, under autocast too.

    Args:
        dim: size of the input.
        heads: number of kinds of spans.
        head_size: D, even with ``rotary``.
        rotary: rotate q and k by position; without, scores do not know how far apart i and j are.
        tril: keep only spans with start <= end.
        bias: the linear layer has one.

    :func:`supy.nn.load_bert4keras_` and :func:`supy.nn.load_bert4torch_` load published weights.

    >>> pointer = GlobalPointer(32, heads=3)
    >>> hidden = torch.randn(2, 5, 32)
    >>> pointer.scores(hidden).shape
    torch.Size([2, 3, 5, 5])
    >>> pointer.loss(hidden, torch.tensor([[0, 2, 1, 4]])).shape
    torch.Size([])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        head_size: int = 64,
        rotary: bool = True,
        tril: bool = True,
        bias: bool = True,
    ):
        super().__init__()
        self.heads, self.head_size, self.rotary, self.tril = heads, head_size, rotary, tril
        self.query_key = nn.Linear(dim, heads * 2 * head_size, bias=bias)  # q, then k, head by head
        nn.init.normal_(self.query_key.weight, std=dim**-0.5)
        if bias:
            nn.init.zeros_(self.query_key.bias)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden `[B, T, dim]`: q, k `[B, T, heads, D]` with positions applied."""
        with torch.autocast(hidden.device.type, enabled=False):
            query_key = self.query_key(hidden.to(self.query_key.weight.dtype))
            query_key = query_key.unflatten(-1, (2 * self.heads, self.head_size))
            if self.rotary:
                query_key = ops.rotary(query_key.transpose(1, 2)).transpose(1, 2)
        return query_key[:, :, ::2], query_key[:, :, 1::2]

    def scores(self, hidden: torch.Tensor, *, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """All scores, `[B, heads, T, T]`; see :func:`supy.ops.global_pointer_scores`."""
        return ops.global_pointer_scores(*self(hidden), lengths=lengths, tril=self.tril)

    def loss(
        self, hidden: torch.Tensor, spans: torch.Tensor, *, lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The loss against `spans`, int64 rows (batch, head, start, end); see :func:`supy.ops.global_pointer_loss`."""
        return ops.global_pointer_loss(*self(hidden), spans, lengths=lengths, tril=self.tril)

    def spans(
        self,
        hidden: torch.Tensor,
        *,
        threshold: float = 0.0,
        lengths: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The spans that score above the threshold; see :func:`supy.ops.global_pointer_spans`."""
        return ops.global_pointer_spans(
            *self(hidden), threshold=threshold, lengths=lengths, tril=self.tril
        )
