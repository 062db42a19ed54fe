"""Oracles and regimes that the tests of both GlobalPointers share."""

import math
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Regime(NamedTuple):
    sizes: tuple  # B, T, H, D
    spans: list | str  # rows, or "all" visible cells
    lengths: list | None = None
    tril: bool = True
    peaks: tuple = ()  # ((span row's index, score to reach), ...)
    spread: float = 1.0  # of the scores


_PEAKS = tuple(enumerate((15.0, 20.0, 40.0, 80.0)))
_FOUR = [[0, 0, 1, 4], [0, 1, 2, 2], [1, 2, 0, 7], [1, 0, 3, 5]]

REGIMES = {
    "one token, positive": Regime((1, 1, 2, 3), [[0, 0, 0, 0]]),
    "one token, negative": Regime((1, 1, 2, 3), []),
    "no positives": Regime((2, 8, 3, 4), []),
    "duplicates count once": Regime((2, 8, 3, 4), [*_FOUR, *_FOUR, _FOUR[0]]),
    "cells shared by heads, and their rows and columns": Regime(
        (1, 6, 3, 2), [[0, 0, 1, 4], [0, 1, 1, 4], [0, 2, 1, 5], [0, 2, 0, 4], [0, 0, 1, 1]]
    ),
    "every visible cell positive": Regime((2, 5, 2, 3), "all", [5, 3]),
    "every cell positive, both triangles": Regime((1, 4, 2, 3), "all", tril=False),
    "samples of length 0, 1 and T": Regime((3, 6, 2, 3), [[1, 1, 0, 0], [2, 0, 1, 5]], [0, 1, 6]),
    "every sample masked": Regime((2, 4, 2, 3), [], [0, 0]),
    "both triangles": Regime((2, 7, 3, 5), [[0, 0, 6, 1], [1, 2, 3, 3]], [7, 5], tril=False),
    "positives of 15 to 80 among ordinary scores": Regime((2, 8, 3, 4), _FOUR, peaks=_PEAKS),
    "scores of hundreds": Regime((2, 9, 3, 4), _FOUR, spread=200.0),
}


WRONG = {  # sizes (2, 20, 3): a row of spans, lengths, what is said
    "sample": ([2, 0, 0, 0], None, "batch < 2"),
    "head": ([0, 3, 0, 0], None, "head < 3"),
    "below 0": ([0, 0, -1, 3], None, "start and end < 20"),
    "order": ([1, 2, 4, 3], None, "start <= end"),
    "padding": ([1, 0, 4, 5], [20, 5], "below the sample's length"),
    "length": ([0, 0, 0, 0], [20, 21], r"lengths\[1\] is 21"),
}


def rows_of(regime):
    B, T, H, _ = regime.sizes
    if regime.spans != "all":
        return torch.tensor(regime.spans, dtype=torch.int64).view(-1, 4)
    n = regime.lengths or [T] * B
    cells = [
        (b, h, i, j)
        for b in range(B)
        for h in range(H)
        for i in range(n[b])
        for j in range(i if regime.tril else 0, n[b])
    ]
    return torch.tensor(cells)


def dense_scores(q, k, *biases, scale=None):
    """All scores `[B, H, T, T]`: of the full form from q, k `[B, T, H, D]`, of the efficient one with its two biases."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if not biases:
        return torch.einsum("bihd,bjhd->bhij", q, k) * scale
    x, y = (bias.transpose(1, 2) for bias in biases)
    return torch.einsum("bid,bjd->bij", q, k)[:, None] * scale + x[..., None] + y[:, :, None]


def with_gradients(loss, tensors, *arguments, **options):
    """The value, and its gradient by each of the tensors."""
    value = loss(*tensors, *arguments, **options)
    return [value.detach(), *torch.autograd.grad(value, tensors)]


def mask(scores, lengths, tril):
    """-inf on hidden cells, one by one."""
    hidden = torch.zeros(scores.shape, dtype=torch.bool)
    B, _, T, _ = scores.shape
    for b in range(B):
        n = T if lengths is None else int(lengths[b])
        for i in range(T):
            for j in range(T):
                hidden[b, :, i, j] = i >= n or j >= n or (tril and i > j)
    return scores.masked_fill(hidden, -math.inf)


def dense_loss(scores, spans):
    """The definition, from all scores `[B, H, T, T]`: a mean over samples of a sum over heads."""
    positive = torch.zeros(scores.shape, dtype=torch.bool)
    for row in spans.tolist():
        positive[tuple(row)] = True
    zero = scores.new_zeros(*scores.shape[:2], 1)
    negatives = scores.masked_fill(positive, -math.inf).flatten(2)
    positives = (-scores).masked_fill(~positive, -math.inf).flatten(2)
    halves = (torch.cat([x, zero], 2).logsumexp(2) for x in (negatives, positives))
    return sum(halves).sum(1).mean()


def dense_spans(scores, threshold):
    """Rows and scores above the threshold, cell by cell."""
    rows = (scores > threshold).nonzero()
    return rows, scores[tuple(rows.T)]


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any tensor made inside has."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor) and x.numel():
                # A view counts as what it holds in memory.
                elements = x.untyped_storage().nbytes() // x.element_size()
                self.elements = max(self.elements, min(elements, x.numel()))
        return result
