"""Multi-label cross-entropy from the indices of the positive classes."""

from __future__ import annotations

import torch

from supy import _extension
from supy._checks import Shapes, require
from supy._library import Gradient, Kernel, define
from supy.ops._arguments import NATIVE, TRITON
from supy.ops.multilabel_cross_entropy import empty_halves, flat, rows
from supy.reference import sparse_multilabel_cross_entropy as reference


def _cpp(scores, indices, ignore_index):
    halves = empty_halves(scores)
    parts = (half.view(-1) for half in halves)
    # The kernel is that of the dense loss: it marks a few thousand classes at a time.
    if _extension.C.multilabel_cross_entropy(rows(scores), rows(indices), ignore_index, *parts) >= 0:
        reference.check_indices(indices, scores.shape[-1], ignore_index)
    return halves


def _cpp_backward(scores, indices, negative, positive, grad_negative, grad_positive, ignore_index):
    halves = map(flat, (negative, positive, grad_negative, grad_positive))
    ds = scores.new_empty(scores.shape)
    _extension.C.multilabel_cross_entropy_backward(
        rows(scores), rows(indices), ignore_index, *halves, rows(ds)
    )
    return ds


def _triton(scores, indices, ignore_index):
    from supy.kernels.multilabel_cross_entropy import sparse_multilabel_cross_entropy as kernel

    *halves, outside = kernel(scores, indices, ignore_index)
    if outside:
        reference.check_indices(indices, scores.shape[-1], ignore_index)
    return tuple(halves)


def _triton_backward(*args):
    from supy.kernels.multilabel_cross_entropy import (
        sparse_multilabel_cross_entropy_backward as kernel,
    )

    return kernel(*args)


def _save(ctx, inputs, output):
    scores, indices, ctx.ignore_index = inputs
    ctx.save_for_backward(scores, indices, *output)


def _backward(ctx, *grads):
    saved = ctx.saved_tensors
    return _sparse_multilabel_cross_entropy_backward(*saved, *grads, ctx.ignore_index), None, None


_sparse_multilabel_cross_entropy = define(
    "sparse_multilabel_cross_entropy(Tensor scores, Tensor indices, int ignore_index) "
    "-> (Tensor, Tensor)",
    reference.sparse_multilabel_cross_entropy,
    fake=lambda scores, *_: empty_halves(scores),
    gradient=Gradient(_save, _backward),
    kernels=(
        Kernel("CPU", "cpp", _cpp, NATIVE),
        Kernel("CUDA", "triton", _triton, TRITON),
    ),
)
_sparse_multilabel_cross_entropy_backward = define(
    "sparse_multilabel_cross_entropy_backward(Tensor scores, Tensor indices, Tensor negative, "
    "Tensor positive, Tensor grad_negative, Tensor grad_positive, int ignore_index) -> Tensor",
    reference.sparse_multilabel_cross_entropy_backward,
    fake=lambda scores, *_: scores.new_empty(scores.shape),
    kernels=(
        Kernel("CPU", "cpp", _cpp_backward, NATIVE),
        Kernel("CUDA", "triton", _triton_backward, TRITON),
    ),
)


def sparse_multilabel_cross_entropy(
    scores: torch.Tensor,
    indices: torch.Tensor,
    *,
    ignore_index: int = -1,
    form: str = "exact",
    mask_zero: bool = False,
) -> torch.Tensor:
    """Multi-label cross-entropy over the last axis from the positive classes alone (post 8888).

        log(1 + sum over classes not in P of e^s) + log(1 + sum over classes in P of e^-s)

    It equals :func:`multilabel_cross_entropy` of the same labels to rounding, for any scores: P is
    left out of the first sum, never subtracted from it.

    ``form="published"`` is for comparing with models trained by bert4keras' code. It computes the
    first half as a + log(max(1 - e^(b - a), 1e-7)), a = log(1 + sum over all e^s) and b = log of the
    sum over ``indices`` of e^s, which cancels: with two positives among 1000 negatives near -8,
    where the exact loss is 0.44, it is -0.4 with the positives at 15, 4.6 at 20 and 14.6 at 30, and
    its gradient pushes them down. Duplicates count twice, which gives -5 to -10 at lower scores. It
    runs in plain PyTorch, in several passes.

    Args:
        scores: `[..., K]`, K >= 1, any floating-point dtype. A class whose score is -inf
            contributes nothing.
        indices: int64 `[..., P]`, the set P of each row in any order; duplicates count once.
        ignore_index: entries of ``indices`` with this value are no label.
        form: ``"exact"`` or ``"published"``.
        mask_zero: with ``"published"`` only: index 0 is padding, and class 0 left out of all sums.

    Returns:
        `[...]`, float64 for float64 scores and float32 otherwise. Differentiable once in
        ``scores``, the published form any number of times.

    Raises:
        ValueError: the shapes disagree, an index is neither ``ignore_index`` nor 0 to K - 1, or
            ``form`` is unknown or ``mask_zero`` given with ``"exact"``.
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
    require(form in ("exact", "published"), op, f"form is {form!r}, expected 'exact' or 'published'")
    published = form == "published"
    require(published or not mask_zero, op, "mask_zero=True is a part of form='published' only")
    if published:
        if not torch.compiler.is_compiling():  # it reads the data
            reference.check_indices(indices, scores.shape[-1], ignore_index)
        return reference.published(scores, indices, ignore_index, mask_zero)
    negative, positive = _sparse_multilabel_cross_entropy(scores, indices, ignore_index)
    return negative + positive
