"""Multi-label cross-entropy from the indices of the positive classes."""

from __future__ import annotations

import torch

from supy._checks import Shapes, require
from supy._library import Gradient, define
from supy.reference import sparse_multilabel_cross_entropy as reference
from supy.reference._masks import wide


def _save(ctx, inputs, output):
    scores, indices, ctx.ignore_index = inputs
    ctx.save_for_backward(scores, indices, *output)


def _backward(ctx, grad_negative, grad_positive):
    grads = grad_negative, grad_positive
    ds = _sparse_multilabel_cross_entropy_backward(*grads, *ctx.saved_tensors, ctx.ignore_index)
    return ds, None, None


def _fake(scores, indices, ignore_index):
    half = wide(scores).new_empty(scores.shape[:-1])
    return half, torch.empty_like(half)


_sparse_multilabel_cross_entropy = define(
    "sparse_multilabel_cross_entropy(Tensor scores, Tensor indices, int ignore_index) "
    "-> (Tensor, Tensor)",
    reference.sparse_multilabel_cross_entropy,
    fake=_fake,
    gradient=Gradient(_save, _backward),
)
_sparse_multilabel_cross_entropy_backward = define(
    "sparse_multilabel_cross_entropy_backward(Tensor grad_negative, Tensor grad_positive, "
    "Tensor scores, Tensor indices, Tensor negative, Tensor positive, int ignore_index) -> Tensor",
    reference.sparse_multilabel_cross_entropy_backward,
    fake=lambda grad_negative, grad_positive, scores, *_: scores.new_empty(scores.shape),
)


def sparse_multilabel_cross_entropy(
    scores: torch.Tensor, indices: torch.Tensor, *, ignore_index: int = -1
) -> torch.Tensor:
    """Multi-label cross-entropy over the last axis from the positive classes alone (post 8888).

        log(1 + sum over classes not in P of e^s) + log(1 + sum over classes in P of e^-s)

    It equals :func:`multilabel_cross_entropy` of the same labels to rounding, for any scores: P is
    left out of the first sum, never subtracted from it as in the published form, which cancels
    from scores near 15 on.

    Args:
        scores: `[..., K]`, K >= 1, any floating-point dtype. A class whose score is -inf
            contributes nothing.
        indices: int64 `[..., P]`, the set P of each row in any order; duplicates count once.
        ignore_index: entries of ``indices`` with this value are no label.

    Returns:
        `[...]`, float64 for float64 scores and float32 otherwise. Differentiable once in
        ``scores``.

    Raises:
        ValueError: the shapes disagree, or an index is neither ``ignore_index`` nor 0 to K - 1.
        TypeError: an argument is not a tensor of the right dtype.

    >>> import torch, supy
    >>> supy.ops.sparse_multilabel_cross_entropy(torch.zeros(4), torch.tensor([2, 2, -1])).exp()
    tensor(8.)
    """
    op = "sparse_multilabel_cross_entropy"
    shapes = Shapes(op)
    shapes.floating("scores", scores)
    shapes.tensor("indices", indices)
    if indices.dtype != torch.int64:
        raise TypeError(f"supy.{op}: indices has dtype {indices.dtype}, expected torch.int64")
    require(
        scores.ndim >= 1 and scores.shape[-1] >= 1,
        op,
        f"scores has shape {list(scores.shape)}, expected [..., K] with K >= 1",
    )
    if indices.ndim != scores.ndim or indices.shape[:-1] != scores.shape[:-1]:
        expected = ", ".join([*map(str, scores.shape[:-1]), "P"])
        found = list(indices.shape)
        require(False, op, f"indices has shape {found}, expected [{expected}] (from scores)")
    shapes.same_device("indices", indices, "scores", scores)
    negative, positive = _sparse_multilabel_cross_entropy(scores, indices, ignore_index)
    return negative + positive
