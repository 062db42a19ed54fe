"""Multi-label cross-entropy with dense targets."""

from __future__ import annotations

import torch

from supy import _extension
from supy._checks import Shapes
from supy._library import Gradient, Kernel, define
from supy.ops._arguments import NATIVE, TRITON, check_targets
from supy.reference import multilabel_cross_entropy as reference

OP = "multilabel_cross_entropy"


def rows(x: torch.Tensor) -> torch.Tensor:
    """All axes but the last in one, the last of unit stride: copied only where no view is like that."""
    x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def flat(x: torch.Tensor) -> torch.Tensor:
    """One value a row, contiguous."""
    return x.reshape(-1).contiguous()


def empty_losses(scores: torch.Tensor, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
    """Of the dtype that losses have."""
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    return scores.new_empty(shape, dtype=dtype)


def empty_halves(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_losses(scores, scores.shape[:-1]), empty_losses(scores, scores.shape[:-1])


def readable(op: str, targets: torch.Tensor) -> torch.Tensor:
    """Targets of a dtype that the kernels read. What is converted is checked before it is rounded."""
    if targets.dtype in (torch.float32, torch.bfloat16, torch.bool, torch.uint8):
        return targets
    reference.check_targets(op, targets)
    return targets.float()


def _cpp(scores, targets):
    halves = empty_halves(scores)
    parts = (half.view(-1) for half in halves)
    if _extension.C.multilabel_cross_entropy(rows(scores), rows(readable(OP, targets)), 0, *parts) >= 0:
        reference.check_targets(OP, targets)
    return halves


def _cpp_backward(scores, targets, *halves):
    ds = scores.new_empty(scores.shape)
    _extension.C.multilabel_cross_entropy_backward(
        rows(scores), rows(readable(OP, targets)), 0, *map(flat, halves), rows(ds)
    )
    return ds


def _triton(scores, targets):
    from supy.kernels.multilabel_cross_entropy import multilabel_cross_entropy as kernel

    *halves, outside = kernel(scores, readable(OP, targets))
    if outside:
        reference.check_targets(OP, targets)
    return tuple(halves)


def _triton_backward(scores, targets, *halves):
    from supy.kernels.multilabel_cross_entropy import multilabel_cross_entropy_backward as kernel

    return kernel(scores, readable(OP, targets), *halves)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx, *grads):
    return _multilabel_cross_entropy_backward(*ctx.saved_tensors, *grads), None


_multilabel_cross_entropy = define(
    "multilabel_cross_entropy(Tensor scores, Tensor targets) -> (Tensor, Tensor)",
    reference.multilabel_cross_entropy,
    fake=lambda scores, _: empty_halves(scores),
    gradient=Gradient(_save, _backward),
    kernels=(
        Kernel("CPU", "cpp", _cpp, NATIVE),
        Kernel("CUDA", "triton", _triton, TRITON),
    ),
)
_multilabel_cross_entropy_backward = define(
    "multilabel_cross_entropy_backward(Tensor scores, Tensor targets, Tensor negative, "
    "Tensor positive, Tensor grad_negative, Tensor grad_positive) -> Tensor",
    reference.multilabel_cross_entropy_backward,
    fake=lambda scores, *_: scores.new_empty(scores.shape),
    kernels=(
        Kernel("CPU", "cpp", _cpp_backward, NATIVE),
        Kernel("CUDA", "triton", _triton_backward, TRITON),
    ),
)


def multilabel_cross_entropy(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Multi-label cross-entropy over the last axis, hard or soft labels (posts 7359 and 9064).

        log(1 + sum (1 - t) e^s) + log(1 + sum t e^-s)

    Classes with s > 0 are the prediction, whatever the number of classes and of positives. Where
    probabilities are wanted, read them as sigmoid(2 s), not sigmoid(s): there soft labels have
    their minimum, t = sigmoid(2 s) (post 9064).

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
    check_targets(Shapes(OP), scores, targets, "K")
    negative, positive = _multilabel_cross_entropy(scores, targets)
    return negative + positive
