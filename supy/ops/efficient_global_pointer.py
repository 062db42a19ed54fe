"""Efficient GlobalPointer: span scores, loss and decoding."""

from __future__ import annotations

import torch

from supy import _extension
from supy._checks import Shapes
from supy._library import Gradient, Kernel, define
from supy.ops._arguments import (
    NATIVE,
    check_lengths,
    check_like,
    check_spans,
    default_scale,
    define_loss,
    fake_spans,
    triton_kernel,
    wants_gradient,
)
from supy.reference import efficient_global_pointer as reference
from supy.reference._masks import clear, padding, visible_cells, wide

_TENSORS = "Tensor q, Tensor k, Tensor start_bias, Tensor end_bias"
_MASKS = "Tensor? lengths, bool tril, float scale"


def _save_scores(ctx, inputs, output):
    q, k, start_bias, _, lengths, ctx.tril, ctx.scale = inputs
    ctx.save_for_backward(q, k, lengths)


def _scores_backward(ctx, grad):
    # In plain PyTorch, so it has every derivative.
    q, k, lengths = ctx.saved_tensors
    padded = padding(lengths, q.shape[1])
    visible = visible_cells(q.shape[1], lengths, ctx.tril, q.device)[:, None]
    ds = wide(grad).masked_fill(~visible, 0)
    da = ds.sum(1) * ctx.scale
    dq, dk = da @ clear(wide(k), padded), da.mT @ clear(wide(q), padded)
    grads = dq, dk, ds.sum(3).mT, ds.sum(2).mT
    return *(x.to(q.dtype) for x in grads), None, None, None


def _fake_loss(q, k, start_bias, end_bias, spans, lengths, tril, scale, gradients):
    loss = wide(q).new_empty(())
    tensors = q, k, start_bias, end_bias
    return loss, *(loss.new_empty(x.shape if gradients else 0) for x in tensors)


def _cpp_scores(q, k, start_bias, end_bias, lengths, tril, scale):
    out = q.new_empty(q.shape[0], start_bias.shape[2], q.shape[1], q.shape[1])
    _extension.C.efficient_global_pointer_scores(q, k, start_bias, end_bias, lengths, tril, scale, out)
    return out


def _cpp_loss(q, k, start_bias, end_bias, spans, lengths, tril, scale, gradients):
    tensors = q, k, start_bias, end_bias
    out = [x.new_empty(x.shape if gradients else 0, dtype=torch.float32) for x in tensors]
    loss = _extension.C.efficient_global_pointer_loss(
        *tensors, spans, lengths, tril, scale, out if gradients else []
    )
    return torch.tensor(loss, dtype=torch.float32), *out


def _cpp_spans(q, k, start_bias, end_bias, lengths, tril, scale, threshold):
    spans, scores = _extension.C.efficient_global_pointer_spans(
        q, k, start_bias, end_bias, lengths, tril, scale, threshold
    )
    return spans.view(-1, 4), scores.to(q.dtype)


_scores = define(
    f"efficient_global_pointer_scores({_TENSORS}, {_MASKS}) -> Tensor",
    reference.efficient_global_pointer_scores,
    fake=lambda q, k, start_bias, *_: q.new_empty(
        q.shape[0], start_bias.shape[2], q.shape[1], q.shape[1]
    ),
    gradient=Gradient(_save_scores, _scores_backward),
    kernels=(
        Kernel("CPU", "cpp", _cpp_scores, NATIVE),
        triton_kernel("efficient_global_pointer", "efficient_global_pointer_scores"),
    ),
)
_loss = define_loss(
    "efficient_global_pointer_loss",
    ("q", "k", "start_bias", "end_bias"),
    f"Tensor spans, {_MASKS}",
    reference.efficient_global_pointer_loss,
    _fake_loss,
    kernels=(
        Kernel("CPU", "cpp", _cpp_loss, NATIVE),
        triton_kernel("efficient_global_pointer", "efficient_global_pointer_loss"),
    ),
)
_spans = define(
    f"efficient_global_pointer_spans({_TENSORS}, {_MASKS}, float threshold) -> (Tensor, Tensor)",
    reference.efficient_global_pointer_spans,
    fake=fake_spans,
    kernels=(
        Kernel("CPU", "cpp", _cpp_spans, NATIVE),
        triton_kernel("efficient_global_pointer_spans", "efficient_global_pointer_spans"),
    ),
)


def efficient_global_pointer_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    start_bias: torch.Tensor,
    end_bias: torch.Tensor,
    *,
    lengths: torch.Tensor | None = None,
    tril: bool = True,
    scale: float | None = None,
) -> torch.Tensor:
    """The score of every span for every head, with one inner product for all heads (post 8877).

        s[b, h, i, j] = scale * q[b, i] . k[b, j] + start_bias[b, i, h] + end_bias[b, j, h]

    Args:
        q, k: `[B, T, D]`, positions already applied.
        start_bias, end_bias: `[B, T, H]`. All four have one floating-point dtype; half precision
            computes in float32.
        lengths: int32 or int64 `[B]`, 0 to T; cells at and beyond a sample's length are -inf.
        tril: keeps start <= end and sets the other cells to -inf.
        scale: of the inner product; default 1 / sqrt(D).

    Returns:
        `[B, H, T, T]` (start, end) in the dtype of q. Differentiable any number of times.

    Raises:
        ValueError: a shape or a length is not as above.
        TypeError: an argument is not a tensor of the right dtype.

    >>> import torch, supy
    >>> q, bias = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[0.0], [0.5]]])
    >>> supy.ops.efficient_global_pointer_scores(q, q, bias, bias)
    tensor([[[[1.0000, 2.5000],
              [  -inf, 5.0000]]]])
    """
    shapes = _check("efficient_global_pointer_scores", q, k, start_bias, end_bias, lengths)
    scale = default_scale(scale, shapes["D"])
    return _scores(q, k, start_bias, end_bias, lengths, tril, scale)


def efficient_global_pointer_loss(
    q: torch.Tensor,
    k: torch.Tensor,
    start_bias: torch.Tensor,
    end_bias: torch.Tensor,
    spans: torch.Tensor,
    *,
    lengths: torch.Tensor | None = None,
    tril: bool = True,
    scale: float | None = None,
) -> torch.Tensor:
    """Multi-label cross-entropy of the span scores by matrix products (posts 8877, 7359, 8888).

        mean over b of the sum over h of
            log(1 + sum over other visible cells of e^s) + log(1 + sum over spans of e^-s)

    The sum over cells factorises into products of e^a, e^start_bias and e^end_bias, so nothing of
    size `[B, H, T, T]` exists; the result is exact, not an approximation.

    Args:
        q, k, start_bias, end_bias, lengths, tril, scale: as in
            :func:`efficient_global_pointer_scores`.
        spans: the positive cells, int64 `[N, 4]` rows (batch, head, start, end) in any order;
            duplicates count once.

    Returns:
        A scalar, float64 for float64 inputs and float32 otherwise; 0 for an empty batch.
        Differentiable once in q, k and the biases; a second derivative raises RuntimeError. A cell
        whose score is -inf contributes nothing.

    Raises:
        ValueError: a shape or a length is not as above, or a row of ``spans`` names a cell that is
            out of range or masked.
        TypeError: an argument is not a tensor of the right dtype.

    >>> import torch, supy
    >>> q, bias = torch.zeros(1, 2, 4), torch.zeros(1, 2, 1)
    >>> spans = torch.tensor([[0, 0, 0, 1]])
    >>> loss = supy.ops.efficient_global_pointer_loss(q, q, bias, bias, spans)
    >>> round(loss.exp().item(), 4)  # 1 + 2 negative cells, times 1 + 1 positive cell
    6.0
    """
    shapes = _check("efficient_global_pointer_loss", q, k, start_bias, end_bias, lengths)
    check_spans(shapes, spans, q)
    tensors = q, k, start_bias, end_bias
    scale = default_scale(scale, shapes["D"])
    return _loss(*tensors, spans, lengths, tril, scale, wants_gradient(*tensors))[0]


def efficient_global_pointer_spans(
    q: torch.Tensor,
    k: torch.Tensor,
    start_bias: torch.Tensor,
    end_bias: torch.Tensor,
    *,
    threshold: float = 0.0,
    lengths: torch.Tensor | None = None,
    tril: bool = True,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The spans whose score is strictly greater than ``threshold`` (post 8877).

    Only cells whose best start and best end together can pass are looked at head by head.

    Args:
        q, k, start_bias, end_bias, lengths, tril, scale: as in
            :func:`efficient_global_pointer_scores`.

    Returns:
        ``spans`` int64 `[N, 4]`, rows (batch, head, start, end) in lexicographic order, and their
        scores `[N]` in the dtype of q. Not differentiable.

    Raises:
        ValueError: a shape or a length is not as above.
        TypeError: an argument is not a tensor of the right dtype.

    >>> import torch, supy
    >>> q, bias = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[0.0], [0.5]]])
    >>> supy.ops.efficient_global_pointer_spans(q, q, bias, bias, threshold=2.0)
    (tensor([[0, 0, 0, 1],
            [0, 0, 1, 1]]), tensor([2.5000, 5.0000]))
    """
    shapes = _check("efficient_global_pointer_spans", q, k, start_bias, end_bias, lengths)
    tensors = (x.detach() for x in (q, k, start_bias, end_bias))
    scale = default_scale(scale, shapes["D"])
    return _spans(*tensors, lengths, tril, scale, float(threshold))


def _check(op, q, k, start_bias, end_bias, lengths):
    shapes = Shapes(op)
    shapes.floating("q", q)
    shapes.match("q", q, "B T D")
    check_like(shapes, "k", k, "B T D", q)
    check_like(shapes, "start_bias", start_bias, "B T H", q)
    check_like(shapes, "end_bias", end_bias, "B T H", q)
    check_lengths(shapes, lengths, q)
    return shapes
