"""Attention of the gated attention unit."""

from __future__ import annotations

import torch

from supy import _extension
from supy._checks import Shapes, require
from supy._library import Gradient, Kernel, define
from supy.ops._arguments import (
    NATIVE,
    check_integer,
    check_lengths,
    check_like,
    default_scale,
    triton_kernel,
    unit_stride,
    wants_gradient,
)
from supy.reference import gau_attention as reference
from supy.reference._masks import stats_dtype

KERNELS = ("relu2", "softmax", "softmax_plus")
OPTIONS = (
    "Tensor? lengths, Tensor? cu_seqlens, str kernel, bool causal, float scale, float? relu2_length"
)


def _save(ctx, inputs, output):
    q, k, v, u, lengths, cu_seqlens, *ctx.options, _ = inputs
    _, attended, stats = output
    ctx.mark_non_differentiable(attended, stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, u, output[0] if u is None else attended, stats, lengths, cu_seqlens)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 11
    u = ctx.saved_tensors[3]
    dq, dk, dv, du = _gau_attention_backward(grad, *ctx.saved_tensors, *ctx.options)
    return dq, dk, dv, None if u is None else du, *(None,) * 7


def _fake(q, k, v, u, lengths, cu_seqlens, kernel, causal, scale, relu2_length, save):
    attended = v.new_empty(v.shape if save and u is not None else 0)
    return v.new_empty(v.shape), attended, stats_like(q, kernel, save)


def stats_like(x: torch.Tensor, kernel: str, save: bool) -> torch.Tensor:
    """Room for the log-sum-exp of each row of x `[B, T, n]`, empty where there is none to keep."""
    return x.new_empty(x.shape[:2] if save and kernel != "relu2" else 0, dtype=stats_dtype(x.dtype))


def check_options(shapes: Shapes, x: torch.Tensor, name: str, kernel, lengths, cu_seqlens, relu2_length) -> float | None:
    """Checks what all forms of this attention take besides tensors, on the device of ``x``; returns the divisor."""
    op = shapes.op
    require(kernel in KERNELS, op, f"kernel is {kernel!r}, expected one of {', '.join(KERNELS)}")
    check_lengths(shapes, lengths, x)
    if cu_seqlens is not None:
        shapes.match("cu_seqlens", cu_seqlens, "N+1")
        check_integer(shapes, "cu_seqlens", cu_seqlens)
        shapes.same_device("cu_seqlens", cu_seqlens, name, x)
        require(lengths is None, op, "lengths and cu_seqlens exclude each other")
        require(shapes["B"] == 1, op, f"{name} has batch size {shapes['B']}, expected 1 with cu_seqlens")
    if relu2_length is None:
        return None
    require(relu2_length > 0, op, f"relu2_length is {relu2_length}, expected more than 0")
    return float(relu2_length)


def _fake_backward(grad, q, k, v, u, *_):
    return *(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)), (
        q.new_empty(0 if u is None else u.shape)
    )


def _cpp(q, k, v, u, *options):
    out, attended, stats = _fake(q, k, v, u, *options)
    tensors = [unit_stride(x) for x in (q, k, v, u)]
    _extension.C.gau_attention(*tensors, *options[:-1], out, attended, stats)
    return out, attended, stats


def _cpp_backward(grad, q, k, v, u, attended, *rest):
    gradients = _fake_backward(grad, q, k, v, u)
    tensors = [unit_stride(x) for x in (grad, q, k, v, u, attended)]
    _extension.C.gau_attention_backward(*tensors, *rest, *gradients)
    return gradients


# With `save`, what the gradient needs besides the inputs: A v where there is a gate, and each row's log-sum-exp of S where
# there is a softmax. Otherwise both are empty.
_gau_attention = define(
    f"gau_attention(Tensor q, Tensor k, Tensor v, Tensor? u, {OPTIONS}, bool save) -> (Tensor, Tensor, Tensor)",
    reference.gau_attention,
    fake=_fake,
    gradient=Gradient(_save, _backward),
    kernels=(Kernel("CPU", "cpp", _cpp, NATIVE), triton_kernel("gau_attention", "gau_attention")),
)
_gau_attention_backward = define(
    "gau_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? u, Tensor attended, Tensor stats, "
    f"{OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.gau_attention_backward,
    fake=_fake_backward,
    kernels=(Kernel("CPU", "cpp", _cpp_backward, NATIVE), triton_kernel("gau_attention", "gau_attention_backward")),
)


def gau_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    u: torch.Tensor | None = None,
    *,
    kernel: str = "softmax_plus",
    causal: bool = False,
    lengths: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    scale: float | None = None,
    relu2_length: float | None = None,
) -> torch.Tensor:
    """Attention with one head and a gate: u * (A v) (posts 8934 and 9019; arXiv 2202.10447).

    With S = scale * q k^T and l the number of keys that the row sees (under ``causal``, its own
    position and before):

        "relu2"          A = relu(S)^2 / l
        "softmax"        A = softmax(S)
        "softmax_plus"   A = softmax(S * log(max(l, 16)) / log 512), natural logarithms (post 8823)

    Args:
        q, k: `[B, T, S]`, positions already applied.
        v: `[B, T, E]`. All of q, k, v and u have one floating-point dtype; half precision computes
            in float32.
        u: the gate, `[B, T, E]`, or None for 1.
        lengths: int32 or int64 `[B]`, 0 to T. Tokens at and beyond a sample's length are no keys,
            their own rows are 0, and so are all their gradients: nothing that stands in the
            padding, NaN included, has any effect.
        cu_seqlens: int32 or int64 `[N + 1]`, 0 = first <= ... <= last = T: N sequences packed one
            after another into one row (B = 1), each of which sees itself only. Excludes
            ``lengths``.
        scale: default 1 / sqrt(S).
        relu2_length: what "relu2" divides by in place of l, such as 512, at which GAU-alpha was
            trained.

    Returns:
        `[B, T, E]` in the dtype of v. A row that sees no key is 0. Differentiable once in q, k, v
        and u.

    Raises:
        ValueError: a shape, ``kernel``, a length or ``cu_seqlens`` is not as above.
        TypeError: an argument is not a tensor of the right dtype.

    >>> import torch, supy
    >>> q = k = torch.zeros(1, 4, 8)
    >>> v = torch.arange(4.0).view(1, 4, 1)
    >>> supy.ops.gau_attention(q, k, v, causal=True).flatten()
    tensor([0.0000, 0.5000, 1.0000, 1.5000])
    >>> supy.ops.gau_attention(q, k, v, lengths=torch.tensor([2])).flatten()
    tensor([0.5000, 0.5000, 0.0000, 0.0000])
    """
    op = "gau_attention"
    shapes = Shapes(op)
    shapes.floating("q", q)
    shapes.match("q", q, "B T S")
    check_like(shapes, "k", k, "B T S", q)
    check_like(shapes, "v", v, "B T E", q)
    if u is not None:
        check_like(shapes, "u", u, "B T E", q)
    relu2_length = check_options(shapes, q, "q", kernel, lengths, cu_seqlens, relu2_length)
    scale = default_scale(scale, shapes["S"])
    save = wants_gradient(*(x for x in (q, k, v, u) if x is not None))
    return _gau_attention(q, k, v, u, lengths, cu_seqlens, kernel, causal, scale, relu2_length, save)[0]
