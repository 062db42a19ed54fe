"""GlobalPointer: span scores, loss and decoding."""

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
from supy.reference import global_pointer as reference
from supy.reference._masks import clear, padding, visible_cells, wide

_MASKS = "Tensor? lengths, bool tril, float scale"


def _save_scores(ctx, inputs, output):
    q, k, lengths, ctx.tril, ctx.scale = inputs
    ctx.save_for_backward(q, k, lengths)


def _scores_backward(ctx, grad):
    # In plain PyTorch, so it has every derivative.
    q, k, lengths = ctx.saved_tensors
    padded = padding(lengths, q.shape[1])
    padded = None if padded is None else padded[..., None]
    q_wide, k_wide = (clear(wide(x), padded).transpose(1, 2) for x in (q, k))
    visible = visible_cells(q.shape[1], lengths, ctx.tril, q.device)[:, None]
    ds = wide(grad).masked_fill(~visible, 0) * ctx.scale
    dq, dk = (ds @ k_wide).transpose(1, 2), (ds.mT @ q_wide).transpose(1, 2)
    return dq.to(q.dtype), dk.to(k.dtype), None, None, None


def _fake_loss(q, k, spans, lengths, tril, scale, gradients):
    loss = wide(q).new_empty(())
    return loss, *(loss.new_empty(x.shape if gradients else 0) for x in (q, k))


def _cpp_scores(q, k, lengths, tril, scale):
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[1])
    _extension.C.global_pointer_scores(q, k, lengths, tril, scale, out)
    return out


def _cpp_loss(q, k, spans, lengths, tril, scale, gradients):
    out = [x.new_empty(x.shape if gradients else 0, dtype=torch.float32) for x in (q, k)]
    loss = _extension.C.global_pointer_loss(q, k, spans, lengths, tril, scale, out if gradients else [])
    return torch.tensor(loss, dtype=torch.float32), *out


def _cpp_spans(q, k, lengths, tril, scale, threshold):
    spans, scores = _extension.C.global_pointer_spans(q, k, lengths, tril, scale, threshold)
    return spans.view(-1, 4), scores.to(q.dtype)


_scores = define(
    f"global_pointer_scores(Tensor q, Tensor k, {_MASKS}) -> Tensor",
    reference.global_pointer_scores,
    fake=lambda q, *_: q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[1]),
    gradient=Gradient(_save_scores, _scores_backward),
    kernels=(
        Kernel("CPU", "cpp", _cpp_scores, NATIVE),
        triton_kernel("global_pointer", "global_pointer_scores"),
    ),
)
_loss = define_loss(
    "global_pointer_loss",
    ("q", "k"),
    f"Tensor spans, {_MASKS}",
    reference.global_pointer_loss,
    _fake_loss,
    kernels=(
        Kernel("CPU", "cpp", _cpp_loss, NATIVE),
        triton_kernel("global_pointer", "global_pointer_loss"),
    ),
)
_spans = define(
    f"global_pointer_spans(Tensor q, Tensor k, {_MASKS}, float threshold) -> (Tensor, Tensor)",
    reference.global_pointer_spans,
    fake=fake_spans,
    kernels=(
        Kernel("CPU", "cpp", _cpp_spans, NATIVE),
        triton_kernel("global_pointer", "global_pointer_spans"),
    ),
)


def global_pointer_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    lengths: torch.Tensor | None = None,
    tril: bool = True,
    scale: float | None = None,
) -> torch.Tensor:
    """The score of every span for every head (post 8373).

        s[b, h, i, j] = scale * q[b, i, h] . k[b, j, h]

    Args:
        q, k: `[B, T, H, D]`, positions already applied, one floating-point dtype. Half precision
            computes in float32.
        lengths: int32 or int64 `[B]`, 0 to T; cells at and beyond a sample's length are -inf.
        tril: keeps start <= end and sets the other cells to -inf.
        scale: default 1 / sqrt(D).

    Returns:
        `[B, H, T, T]` (start, end) in the dtype of q. Differentiable any number of times.

    Raises:
        ValueError: a shape or a length is not as above.
        TypeError: an argument is not a tensor of the right dtype.

    >>> import torch, supy
    >>> q = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
    >>> supy.ops.global_pointer_scores(q, q)
    tensor([[[[1., 2.],
              [-inf, 4.]]]])
    """
    shapes = _check("global_pointer_scores", q, k, lengths)
    return _scores(q, k, lengths, tril, default_scale(scale, shapes["D"]))


def global_pointer_loss(
    q: torch.Tensor,
    k: torch.Tensor,
    spans: torch.Tensor,
    *,
    lengths: torch.Tensor | None = None,
    tril: bool = True,
    scale: float | None = None,
) -> torch.Tensor:
    """Multi-label cross-entropy of the span scores, a few at a time (posts 8373, 7359, 8888).

        mean over b of the sum over h of
            log(1 + sum over other visible cells of e^s) + log(1 + sum over spans of e^-s)

    Args:
        q, k, lengths, tril, scale: as in :func:`global_pointer_scores`.
        spans: the positive cells, int64 `[N, 4]` rows (batch, head, start, end) in any order;
            duplicates count once.

    Returns:
        A scalar, float64 for float64 inputs and float32 otherwise; 0 for an empty batch.
        Differentiable once in q and k; a second derivative raises RuntimeError. A cell whose score
        is -inf contributes nothing.

    Raises:
        ValueError: a shape or a length is not as above, or a row of ``spans`` names a cell that is
            out of range or masked.
        TypeError: an argument is not a tensor of the right dtype.

    >>> import torch, supy
    >>> q = torch.zeros(1, 2, 1, 4)
    >>> loss = supy.ops.global_pointer_loss(q, q, torch.tensor([[0, 0, 0, 1]]))
    >>> round(loss.exp().item(), 4)  # 1 + 2 negative cells, times 1 + 1 positive cell
    6.0
    """
    shapes = _check("global_pointer_loss", q, k, lengths)
    check_spans(shapes, spans, q)
    scale = default_scale(scale, shapes["D"])
    return _loss(q, k, spans, lengths, tril, scale, wants_gradient(q, k))[0]


def global_pointer_spans(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    threshold: float = 0.0,
    lengths: torch.Tensor | None = None,
    tril: bool = True,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The spans whose score is strictly greater than ``threshold`` (post 8373).

    Holds the scores of a few heads at a time.

    Args:
        q, k, lengths, tril, scale: as in :func:`global_pointer_scores`.

    Returns:
        ``spans`` int64 `[N, 4]`, rows (batch, head, start, end) in lexicographic order, and their
        scores `[N]` in the dtype of q. Not differentiable.

    Raises:
        ValueError: a shape or a length is not as above.
        TypeError: an argument is not a tensor of the right dtype.

    >>> import torch, supy
    >>> q = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
    >>> supy.ops.global_pointer_spans(q, q, threshold=1.5)
    (tensor([[0, 0, 0, 1],
            [0, 0, 1, 1]]), tensor([2., 4.]))
    """
    shapes = _check("global_pointer_spans", q, k, lengths)
    scale = default_scale(scale, shapes["D"])
    return _spans(q.detach(), k.detach(), lengths, tril, scale, float(threshold))


def _check(op, q, k, lengths):
    shapes = Shapes(op)
    shapes.floating("q", q)
    shapes.match("q", q, "B T H D")
    check_like(shapes, "k", k, "B T H D", q)
    check_lengths(shapes, lengths, q)
    return shapes
