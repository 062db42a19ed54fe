"""The layer of FLASH as one operator."""

from __future__ import annotations

import functools

import torch

from supy import _extension
from supy._checks import Shapes
from supy._library import Gradient, Kernel, define
from supy.ops._arguments import NATIVE, TRITON, check_lengths, check_unit, unit_kernel, unit_stride, wants_gradient
from supy.ops.mixed_chunk_attention import OPTIONS, check_options, chunk_weights, segment_of
from supy.ops.rotary import arange_table
from supy.reference import mixed_chunk_layer as reference

_TENSORS = "Tensor x, Tensor w_in, Tensor w_out, Tensor gamma, Tensor beta, Tensor cosine, Tensor sine"
_KEPT = 1 << 30  # bytes of x w_in^T that are kept, on the CPU, causal, of each sample's first tokens


def _save(ctx, inputs, output):
    *tensors, lengths, chunk_size, causal, normalizer, segment, keep = inputs
    ctx.options = chunk_size, causal, normalizer, segment, keep
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:], lengths)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 13
    return *_layer_backward(grad, *ctx.saved_tensors, *ctx.options), *(None,) * 8


def _fake(x, w_in, w_out, gamma, beta, cosine, sine, lengths, chunk_size, causal, normalizer, segment, keep):
    B, T, _ = x.shape
    count = -(-T // segment) if segment else 0
    precise = torch.float64 if x.dtype == torch.float64 else torch.float32
    sums = x.new_empty((count, B, gamma.shape[1], w_out.shape[1]) if segment else 0, dtype=precise)
    h = x.new_empty((B, keep, w_in.shape[0]) if keep else 0)
    return x.new_empty(x.shape), sums, h


def _fake_backward(grad, x, w_in, w_out, gamma, beta, *_):
    return tuple(t.new_empty(t.shape) for t in (x, w_in, w_out, gamma, beta))


def _kept_tokens(x, w_in, segment):
    """T; where there is no room for it, on CUDA none and, causal on the CPU, as many segments as fit."""
    B, T, _ = x.shape
    room = _KEPT // max(B * w_in.shape[0] * x.element_size(), 1)
    if room >= T or (x.device.type == "cpu" and not segment):
        return T
    return room // segment * segment if segment else 0


def _dense(*tensors):
    return (t.float().contiguous() for t in tensors)


def _cpp(x, w_in, w_out, gamma, beta, cosine, sine, lengths, *given):
    tensors = x, w_in, w_out, gamma, beta, cosine, sine
    if min(t.numel() for t in tensors[:4]) == 0:
        return reference.mixed_chunk_layer(*tensors, lengths, *given)
    out, sums, h = _fake(*tensors, lengths, *given)
    chunk_size, causal = given[:2]
    options = lengths, chunk_weights(x, lengths, *given[:3]), chunk_size, segment_of(chunk_size), causal
    weights = w_in.contiguous(), w_out.contiguous(), *_dense(gamma, beta, cosine, sine)
    _extension.C.mixed_chunk_layer([unit_stride(x), *weights], None, sums, h, *options, [out])
    return out, sums, h


def _cpp_backward(grad, x, w_in, w_out, gamma, beta, cosine, sine, sums, h, lengths, *given):
    tensors = x, w_in, w_out, gamma, beta, cosine, sine
    if min(t.numel() for t in tensors[:4]) == 0:
        return reference.mixed_chunk_layer_backward(grad, *tensors, sums, h, lengths, *given)
    chunk_size, causal = given[:2]
    options = lengths, chunk_weights(x, lengths, *given[:3]), chunk_size, segment_of(chunk_size), causal
    weights = w_in.contiguous(), w_out.contiguous(), *_dense(gamma, beta, cosine, sine)
    padded = [x.new_empty([-(-n // 32) * 32 for n in w.shape], dtype=torch.float32) for w in (w_in, w_out)]
    affine = [torch.empty(gamma.shape) for _ in range(2)]
    dx = x.new_empty(x.shape)
    grads = [dx, *padded, *affine]
    _extension.C.mixed_chunk_layer([unit_stride(x), *weights], unit_stride(grad), sums, h, *options, grads)
    dw = (d[: w.shape[0], : w.shape[1]].to(w.dtype).contiguous() for d, w in zip(padded, (w_in, w_out)))
    return dx, *dw, *(d.to(t.dtype) for d, t in zip(affine, (gamma, beta)))


_attention = torch.ops.supy.mixed_chunk_attention.default
# Rows that cannot be read 16 bytes at a time go through supy's operator for the attention alone.
_cuda = unit_kernel(
    "mixed_chunk_attention",
    "mixed_chunk_layer",
    functools.partial(reference.mixed_chunk_layer, attention=_attention),
)
_cuda_backward = unit_kernel(
    "mixed_chunk_attention",
    "mixed_chunk_layer_backward",
    functools.partial(
        reference.mixed_chunk_layer_backward,
        attention=_attention,
        attention_backward=torch.ops.supy.mixed_chunk_attention_backward.default,
    ),
)

_layer = define(
    f"mixed_chunk_layer({_TENSORS}, Tensor? lengths, {OPTIONS}, int segment, SymInt keep) -> (Tensor, Tensor, Tensor)",
    reference.mixed_chunk_layer,
    fake=_fake,
    gradient=Gradient(_save, _backward),
    kernels=(Kernel("CPU", "cpp", _cpp, NATIVE), _cuda),
)
_layer_backward = define(
    f"mixed_chunk_layer_backward(Tensor grad, {_TENSORS}, Tensor sums, Tensor h, Tensor? lengths, {OPTIONS}, "
    "int segment, SymInt keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.mixed_chunk_layer_backward,
    fake=_fake_backward,
    kernels=(Kernel("CPU", "cpp", _cpp_backward, NATIVE), _cuda_backward),
)


def mixed_chunk_layer(
    x: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    *,
    chunk_size: int = 256,
    causal: bool = False,
    lengths: torch.Tensor | None = None,
    normalizer: str = "tokens",
) -> torch.Tensor:
    """The whole layer of FLASH (post 8934; arXiv 2202.10447), which :class:`supy.nn.MixedChunkAttention` runs.

        (u, v, z) = swish(x w_in^T),  q_quad, k_quad, q_lin, k_lin = rotary(gamma_i z + beta_i)
        y = (u * (quadratic + linear)) w_out^T    with both parts as in :func:`supy.ops.mixed_chunk_attention`

    On the CPU some hundred tokens are worked on at a time, forward and backward, and what is kept for the gradient is
    x w_in^T; under ``causal`` no more than 1 GB of it, and the gradient computes the rest again. On CUDA up to 1 GB is
    kept, else none. Gradients of the weights add up in float32.

    Args:
        x: `[B, T, D]`, any floating-point dtype.
        w_in, w_out: `[2 E + S, D]` (rows for u, v and z) and `[D, E]`, in the dtype of x; S even.
        gamma, beta: `[4, S]`, floating-point.
        chunk_size, causal, lengths, normalizer: as in :func:`supy.ops.mixed_chunk_attention`.

    Returns:
        `[B, T, D]` in the dtype of x; 0 at and beyond a sample's length. Differentiable once in x, w_in, w_out, gamma
        and beta.

    Raises:
        ValueError, TypeError: a shape, dtype or option is not as above.

    >>> import torch, supy
    >>> x, w_in, w_out = torch.ones(1, 3, 4), torch.ones(2 * 5 + 2, 4), torch.ones(4, 5)
    >>> supy.ops.mixed_chunk_layer(x, w_in, w_out, torch.zeros(4, 2), torch.ones(4, 2), chunk_size=1, causal=True).shape
    torch.Size([1, 3, 4])
    """
    op = "mixed_chunk_layer"
    shapes = Shapes(op)
    check_unit(shapes, x, w_in, w_out, gamma, beta, "4")
    check_lengths(shapes, lengths, x)
    check_options(op, chunk_size, normalizer)
    tensors = x, w_in, w_out, gamma, beta
    saves = wants_gradient(*tensors)
    segment = segment_of(chunk_size) if saves and causal and x.device.type == "cpu" else 0
    keep = _kept_tokens(x, w_in, segment) if saves else 0
    table = arange_table(x, shapes["T"], shapes["S"] // 2)
    return _layer(*tensors, *table, lengths, chunk_size, causal, normalizer, segment, keep)[0]
