"""The gated attention unit as one operator."""

from __future__ import annotations

import functools

import torch

from supy import _extension
from supy._checks import Shapes, require
from supy._library import Gradient, Kernel, define
from supy.ops._arguments import NATIVE, TRITON, check_unit, default_scale, unit_kernel, unit_stride, wants_gradient
from supy.ops.gau_attention import OPTIONS, check_options, stats_like
from supy.ops.rotary import arange_table
from supy.reference import gated_attention_unit as reference

_TENSORS = "Tensor x, Tensor w_in, Tensor w_out, Tensor gamma, Tensor beta, Tensor cosine, Tensor sine"


def _save(ctx, inputs, output):
    *tensors, lengths, cu_seqlens, kernel, causal, scale, relu2_length, _ = inputs
    ctx.options = kernel, causal, scale, relu2_length
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:], lengths, cu_seqlens)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 14
    return *_unit_backward(grad, *ctx.saved_tensors, *ctx.options), *(None,) * 9


def _fake(x, w_in, w_out, gamma, beta, cosine, sine, lengths, cu_seqlens, kernel, causal, scale, relu2_length, save):
    B, T, _ = x.shape
    h = x.new_empty((B, T, w_in.shape[0]) if save else 0)
    attended = x.new_empty((B, T, w_out.shape[1]) if save else 0)
    return x.new_empty(x.shape), h, attended, stats_like(x, kernel, save)


def _fake_backward(grad, x, w_in, w_out, gamma, beta, *_):
    return tuple(t.new_empty(t.shape) for t in (x, w_in, w_out, gamma, beta))


def _dense(*tensors):
    return (t.float().contiguous() for t in tensors)


def _cpp(x, w_in, w_out, gamma, beta, cosine, sine, *options):
    results = _fake(x, w_in, w_out, gamma, beta, cosine, sine, *options)
    weights = w_in.contiguous(), w_out.contiguous(), *_dense(gamma, beta, cosine, sine)
    _extension.C.gated_attention_unit(unit_stride(x), *weights, *options[:-1], *results)
    return results


def _cpp_backward(grad, x, w_in, w_out, gamma, beta, cosine, sine, *rest):
    dx, dw_in, dw_out, dgamma, dbeta = _fake_backward(grad, x, w_in, w_out, *_dense(gamma, beta))
    weights = w_in.contiguous(), w_out.contiguous(), *_dense(gamma, beta, cosine, sine)
    _extension.C.gated_attention_unit_backward(
        unit_stride(grad), unit_stride(x), *weights, *rest, dx, dw_in, dw_out, dgamma, dbeta
    )
    return dx, dw_in, dw_out, dgamma.to(gamma.dtype), dbeta.to(beta.dtype)


# Rows that cannot be read 16 bytes at a time go through supy's operator for the attention alone, torch around it.
_around = functools.partial(reference.gated_attention_unit, attention=torch.ops.supy.gau_attention.default)
_around_backward = functools.partial(
    reference.gated_attention_unit_backward, attention_backward=torch.ops.supy.gau_attention_backward.default
)
_cuda = unit_kernel("gated_attention_unit", "gated_attention_unit", _around)
_cuda_backward = unit_kernel("gated_attention_unit", "gated_attention_unit_backward", _around_backward)

_unit = define(
    f"gated_attention_unit({_TENSORS}, {OPTIONS}, bool save) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.gated_attention_unit,
    fake=_fake,
    gradient=Gradient(_save, _backward),
    kernels=(Kernel("CPU", "cpp", _cpp, NATIVE), _cuda),
)
_unit_backward = define(
    f"gated_attention_unit_backward(Tensor grad, {_TENSORS}, Tensor h, Tensor attended, Tensor stats, {OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.gated_attention_unit_backward,
    fake=_fake_backward,
    kernels=(Kernel("CPU", "cpp", _cpp_backward, NATIVE), _cuda_backward),
)


def gated_attention_unit(
    x: torch.Tensor,
    w_in: torch.Tensor,
    w_out: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    *,
    kernel: str = "softmax_plus",
    causal: bool = False,
    lengths: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    scale: float | None = None,
    relu2_length: float | None = None,
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The whole gated attention unit (post 8934; arXiv 2202.10447), which :class:`supy.nn.GatedAttentionUnit` runs.

        (u, v, z) = swish(x w_in^T),  q, k = rotary(gamma_i * z + beta_i),  y = (u * A v) w_out^T

    with A as in :func:`supy.ops.gau_attention`. For its gradient it keeps x w_in^T and A v, and nothing else of their size:
    activations, gate, rotation and masks happen while the operands of the matrix products are read or their results written.

    Args:
        x: `[B, T, D]`, float32, bfloat16 or another floating-point dtype.
        w_in, w_out: `[2 E + S, D]` (rows for u, v and z) and `[D, E]`, in the dtype of x; S even.
        gamma, beta: `[2, S]`, for q and k.
        kernel, causal, lengths, cu_seqlens, scale, relu2_length: as in :func:`supy.ops.gau_attention`.
        rotation: cosine and sine, `[T, S / 2]` each, of the angles by which the pairs of q and k turn; default those of
            :func:`supy.ops.rotary` for positions 0 to T - 1. Not differentiated.

    Returns:
        `[B, T, D]` in the dtype of x; 0 at and beyond a sample's length. Differentiable once in x, w_in, w_out, gamma and
        beta.

    Raises:
        ValueError, TypeError: a shape, dtype or option is not as above.

    >>> import torch, supy
    >>> x, w_in, w_out = torch.ones(1, 3, 4), torch.ones(2 * 5 + 2, 4), torch.ones(4, 5)
    >>> supy.ops.gated_attention_unit(x, w_in, w_out, torch.ones(2, 2), torch.zeros(2, 2))[0, 0]
    tensor([77.1481, 77.1481, 77.1481, 77.1481])
    """
    op = "gated_attention_unit"
    shapes = Shapes(op)
    check_unit(shapes, x, w_in, w_out, gamma, beta, "2")
    relu2_length = check_options(shapes, x, "x", kernel, lengths, cu_seqlens, relu2_length)
    if rotation is None:
        rotation = arange_table(x, shapes["T"], shapes["S"] // 2)
    else:
        _check_rotation(shapes, x, rotation)
    tensors = x, w_in, w_out, gamma, beta
    scale = default_scale(scale, shapes["S"])
    save = wants_gradient(*tensors)
    return _unit(*tensors, *rotation, lengths, cu_seqlens, kernel, causal, scale, relu2_length, save)[0]


def _check_rotation(shapes, x, rotation):
    pair = isinstance(rotation, (tuple, list)) and len(rotation) == 2
    require(pair, shapes.op, f"rotation is a {type(rotation).__name__}, expected two tensors, cosine and sine")
    shapes.sizes["S/2"], shapes.origin["S/2"] = shapes["S"] // 2, shapes.origin["S"]
    for name, part in zip(("rotation[0]", "rotation[1]"), rotation):
        shapes.floating(name, part)
        shapes.match(name, part, "T S/2")
        shapes.same_device(name, part, "x", x)
