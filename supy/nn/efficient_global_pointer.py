"""Efficient GlobalPointer: scores of all spans for many heads from one query and key."""

from __future__ import annotations

import torch
from torch import nn

from supy import ops


class EfficientGlobalPointer(nn.Module):
    """score[b, h, i, j] = q_i . k_j / sqrt(D) + start_bias[i, h] + end_bias[j, h] (kexue.fm post 8877).

    q, k and the biases are linear in the input: one query and key for all heads say which spans are spans at all, the
    biases of each head say of which kind. A head costs 4 D parameters. Everything is computed in the dtype of the
    parameters, under autocast too.

    Args:
        dim: size of the input.
        heads: number of kinds of spans.
        head_size: D, even with ``rotary``.
        rotary: rotate q and k by position; without, scores do not know how far apart i and j are.
        tril: keep only spans with start <= end.
        bias: the linear layers have one.

    :func:`supy.nn.load_bert4keras_` and :func:`supy.nn.load_bert4torch_` load published weights.

    >>> pointer = EfficientGlobalPointer(32, heads=3)
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
        self.rotary, self.tril = rotary, tril
        self.query_key = nn.Linear(dim, 2 * head_size, bias=bias)  # q, then k
        self.biases = nn.Linear(2 * head_size, 2 * heads, bias=bias)  # of the starts, then of the ends
        for linear, gain in ((self.query_key, 1.0), (self.biases, 0.5)):
            nn.init.normal_(linear.weight, std=gain * linear.in_features**-0.5)
            if bias:
                nn.init.zeros_(linear.bias)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """hidden `[B, T, dim]`: q, k `[B, T, D]` with positions applied, start_bias, end_bias `[B, T, heads]`."""
        with torch.autocast(hidden.device.type, enabled=False):
            query_key = self.query_key(hidden.to(self.query_key.weight.dtype))
            start_bias, end_bias = self.biases(query_key).chunk(2, -1)
            q, k = query_key.chunk(2, -1)
            if self.rotary:
                q, k = ops.rotary(q), ops.rotary(k)
        return q, k, start_bias, end_bias

    def scores(self, hidden: torch.Tensor, *, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """All scores, `[B, heads, T, T]`; see :func:`supy.ops.efficient_global_pointer_scores`."""
        return ops.efficient_global_pointer_scores(*self(hidden), lengths=lengths, tril=self.tril)

    def loss(
        self,
        hidden: torch.Tensor,
        spans: torch.Tensor,
        *,
        lengths: torch.Tensor | None = None,
        among: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss against `spans`, int64 rows (batch, head, start, end); see
        :func:`supy.ops.efficient_global_pointer_loss`.

        among: bool `[B, T]`; only cells whose start and end are both marked count.
        """
        return ops.efficient_global_pointer_loss(
            *self._among(hidden, among), spans, lengths=lengths, tril=self.tril
        )

    def spans(
        self,
        hidden: torch.Tensor,
        *,
        threshold: float = 0.0,
        lengths: torch.Tensor | None = None,
        among: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The spans that score above the threshold, `among` as in `loss`; see
        :func:`supy.ops.efficient_global_pointer_spans`."""
        return ops.efficient_global_pointer_spans(
            *self._among(hidden, among), threshold=threshold, lengths=lengths, tril=self.tril
        )

    def _among(self, hidden: torch.Tensor, among: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        q, k, *biases = self(hidden)
        if among is not None:
            biases = (bias.masked_fill(~among[..., None], -torch.inf) for bias in biases)
        return q, k, *biases
