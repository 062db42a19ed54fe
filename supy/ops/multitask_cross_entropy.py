"""Cross-entropy of n tasks of m classes each, balanced over the tasks."""

from __future__ import annotations

import torch

from supy import _extension
from supy._checks import Shapes, require
from supy._library import Gradient, Kernel, define
from supy.ops._arguments import NATIVE, TRITON, check_targets
from supy.ops.multilabel_cross_entropy import empty_losses, readable
from supy.reference import multitask_cross_entropy as reference
from supy.reference.multilabel_cross_entropy import check_targets as check_values

OP = "multitask_cross_entropy"
MOST_CLASSES = 8192  # of the Triton kernels, which hold all classes of a task in registers


def _three_axes(x):
    return x.reshape(x.shape[:-2].numel(), *x.shape[-2:])


def _empty(scores):
    return empty_losses(scores, (*scores.shape[:-2], scores.shape[-1]))


def _cpp(scores, targets, hard):
    losses = _empty(scores)
    if scores.numel() == 0:
        return losses.zero_()
    x, t = _three_axes(scores), _three_axes(readable(OP, targets))
    if _extension.C.multitask_cross_entropy(x, t, losses.view(len(x), -1), hard):
        check_values(OP, targets)
    return losses


def _cpp_backward(scores, targets, losses, grad, hard):
    ds = scores.new_empty(scores.shape)
    if scores.numel():
        x, t = _three_axes(scores), _three_axes(readable(OP, targets))
        losses, grad = (y.reshape(len(x), -1).contiguous() for y in (losses, grad))
        _extension.C.multitask_cross_entropy_backward(x, t, losses, grad, _three_axes(ds), hard)
    return ds


def _triton(scores, targets, hard):
    from supy.kernels.multitask_cross_entropy import multitask_cross_entropy as kernel

    if scores.shape[-1] > MOST_CLASSES:
        return reference.multitask_cross_entropy(scores, targets, hard)
    losses, outside = kernel(scores, readable(OP, targets), hard)
    if outside:
        check_values(OP, targets)
    return losses


def _triton_backward(scores, targets, losses, grad, hard):
    from supy.kernels.multitask_cross_entropy import multitask_cross_entropy_backward as kernel

    if scores.shape[-1] > MOST_CLASSES:
        return reference.multitask_cross_entropy_backward(scores, targets, losses, grad, hard)
    return kernel(scores, readable(OP, targets), losses, grad, hard)


def _save(ctx, inputs, output):
    scores, targets, ctx.hard = inputs
    ctx.save_for_backward(scores, targets, output)


def _backward(ctx, grad):
    return _multitask_cross_entropy_backward(*ctx.saved_tensors, grad, ctx.hard), None, None


_multitask_cross_entropy = define(
    "multitask_cross_entropy(Tensor scores, Tensor targets, bool hard) -> Tensor",
    reference.multitask_cross_entropy,
    fake=lambda scores, *_: _empty(scores),
    gradient=Gradient(_save, _backward),
    kernels=(
        Kernel("CPU", "cpp", _cpp, NATIVE),
        Kernel("CUDA", "triton", _triton, TRITON),
    ),
)
_multitask_cross_entropy_backward = define(
    "multitask_cross_entropy_backward(Tensor scores, Tensor targets, Tensor losses, Tensor grad, "
    "bool hard) -> Tensor",
    reference.multitask_cross_entropy_backward,
    fake=lambda scores, *_: scores.new_empty(scores.shape),
    kernels=(
        Kernel("CPU", "cpp", _cpp_backward, NATIVE),
        Kernel("CUDA", "triton", _triton_backward, TRITON),
    ),
)


def multitask_cross_entropy(
    scores: torch.Tensor, targets: torch.Tensor, *, form: str = "hard"
) -> torch.Tensor:
    """Cross-entropy of n tasks of m classes that balances rare and frequent classes (post 9158).

        "hard": sum_j log(1 + sum_i sum over k != j of t_ij e^(s_ik - s_ij))
        "soft": sum_j log(1 + sum_i t_ij e^(mean_k s_ik - s_ij))

    The sum over the tasks i stands inside the logarithm, so a class weighs as the logarithm of how
    often it occurs. Both generalise :func:`multilabel_cross_entropy`: with m = 2, "hard" is that of
    s_1 - s_2 and "soft" that of (s_1 - s_2) / 2. "soft" has its minimum at t = softmax(s); the post
    found it poor in practice where labels are nearly hard, since it is already small where a score
    is far above the mean, and gives no closed form of the minimum of "hard" for soft labels.

    Args:
        scores: `[..., n, m]`, any floating-point dtype. A class whose score is -inf is left out of
            its task, as if it were not there; the loss is never NaN for finite or -inf scores.
        targets: the shape of ``scores``, any dtype, 0 to 1; usually a task's sum to 1, which is not
            required. Not differentiated.
        form: ``"hard"`` or ``"soft"``.

    Returns:
        `[...]`, float64 for float64 scores and float32 otherwise. Differentiable once in
        ``scores``.

    Raises:
        ValueError: the shapes differ, a target is outside 0 to 1, ``targets`` asks for a gradient,
            or ``form`` is neither.
        TypeError: an argument is not a tensor of the right dtype.

    >>> import torch, supy
    >>> scores, targets = torch.zeros(1, 3), torch.tensor([[0, 1, 0]])
    >>> supy.ops.multitask_cross_entropy(scores, targets).exp()  # 1 + 2
    tensor(3.)
    """
    check_targets(Shapes(OP), scores, targets, "n m")
    require(form in ("hard", "soft"), OP, f"form is {form!r}, expected 'hard' or 'soft'")
    return _multitask_cross_entropy(scores, targets, form == "hard").sum(-1)
