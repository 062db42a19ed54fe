"""deep_norm beside eager PyTorch, a fused addition and Liger-Kernel, all with the same numbers."""

from __future__ import annotations

import torch
from torch.nn import functional as F

import supy

ALPHA, EPS = 2.2, 1e-6


def inputs(rows, width, dtype):
    """x, branch, weight, bias and the gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, width),) * 3 + ((width,),) * 2
    x, branch, grad, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    leaves = (t.to(dtype).requires_grad_() for t in (x, branch, 1 + weight / 8, bias / 8))
    return *leaves, grad.to(dtype)


def ours(x, branch, weight, bias):
    return supy.ops.deep_norm(x, branch, ALPHA, weight, bias, eps=EPS)


def triton(x, branch, weight, bias):
    if not x.is_cuda:
        raise ImportError("Triton needs a CUDA device")
    with supy.use_backend("triton"):
        return ours(x, branch, weight, bias)


def eager(x, branch, weight, bias):
    return F.layer_norm(ALPHA * x + branch, x.shape[-1:], weight, bias, EPS)


def fused(x, branch, weight, bias):
    return F.layer_norm(torch.add(branch, x, alpha=ALPHA), x.shape[-1:], weight, bias, EPS)


def liger(x, branch, weight, bias):
    """It has no sum of two tensors in its layer norm, so PyTorch makes that."""
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return LigerLayerNormFunction.apply(torch.add(branch, x, alpha=ALPHA), weight, bias, EPS)


def forward(function):
    def run(*tensors):
        with torch.no_grad():
            return (function(*tensors[:4]),)

    return run


def with_gradients(function):
    def run(*tensors):
        *leaves, grad = tensors
        out = function(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    return run


def same(results, expected):
    """To a few roundings of sums that are rounded to the dtype themselves, as some peers' are."""
    tolerance = {torch.float32: 2e-4, torch.bfloat16: 3e-2}
    return all(
        (a.double() - b).abs().max() <= tolerance[a.dtype] * b.abs().max()
        for a, b in zip(results, expected, strict=True)
    )
