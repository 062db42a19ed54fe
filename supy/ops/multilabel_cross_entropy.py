"""Multi-label cross-entropy with dense targets."""

from __future__ import annotations

import torch

from supy._checks import Shapes, require
from supy._library import Gradient, define
from supy.reference import multilabel_cross_entropy as reference
from supy.reference._masks import wide


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx, grad_negative, grad_positive):
    saved = ctx.saved_tensors
    return _multilabel_cross_entropy_backward(grad_negative, grad_positive, *saved), None


def _fake(scores, targets):
    half = wide(scores).new_empty(scores.shape[:-1])
    return half, torch.empty_like(half)


_multilabel_cross_entropy = define(
    "multilabel_cross_entropy(Tensor scores, Tensor targets) -> (Tensor, Tensor)",
    reference.multilabel_cross_entropy,
    fake=_fake,
    gradient=Gradient(_save, _backward),
)
_multilabel_cross_entropy_backward = define(
    "multilabel_cross_entropy_backward(Tensor grad_negative, Tensor grad_positive, Tensor scores, "
    "Tensor targets, Tensor negative, Tensor positive) -> Tensor",
    reference.multilabel_cross_entropy_backward,
    fake=lambda grad_negative, grad_positive, scores, *_: scores.new_empty(scores.shape),
)


def multilabel_cross_entropy(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Multi-label cross-entropy over the last axis, hard or soft labels (posts 7359 and 9064).

        log(1 + sum (1 - t) e^s) + log(1 + sum t e^-s)

    Classes with s > 0 are the prediction, whatever the number of classes and of positives. With
    soft labels the minimum is at t = sigmoid(2 s).

    Args:
        scores: `[..., K]`, any floating-point dtype, no activation. A class whose score is -inf
            contributes nothing.
        targets: the shape of ``scores``, any dtype, 0 to 1. Not differentiated.

    Returns:
        `[...]`, float64 for float64 scores and float32 otherwise. Differentiable once in
        ``scores``.

    Raises:
        ValueError: the shapes differ, a target is outside 0 to 1, or ``targets`` asks for a
            gradient.
        TypeError: an argument is not a tensor of the right dtype.

    >>> import torch, supy
    >>> scores, targets = torch.zeros(4), torch.tensor([1, 0, 0, 0])
    >>> supy.ops.multilabel_cross_entropy(scores, targets).exp()  # (1 + 3) (1 + 1)
    tensor(8.)
    """
    op = "multilabel_cross_entropy"
    shapes = Shapes(op)
    shapes.floating("scores", scores)
    shapes.tensor("targets", targets)
    shape = list(scores.shape)
    require(scores.ndim >= 1, op, f"scores has shape {shape}, expected [..., K]")
    agrees = targets.shape == scores.shape
    require(agrees, op, f"targets has shape {list(targets.shape)}, expected {shape} (from scores)")
    shapes.same_device("targets", targets, "scores", scores)
    require(
        not targets.requires_grad,
        op,
        "targets requires a gradient, which is not implemented: pass targets.detach()",
    )
    negative, positive = _multilabel_cross_entropy(scores, targets)
    return negative + positive
