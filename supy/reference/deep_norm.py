"""The sum of a residual branch, normalised: DeepNorm (post 8978; arXiv 2203.00555), with the mask of its dropout."""

from __future__ import annotations

import torch

from supy.reference.philox_normal import MASK, philox


def kept(x: torch.Tensor, seed: int, offset: int, dropout: float) -> torch.Tensor:
    """Which elements of the shape of ``x`` stay: those whose words are at least ``dropout`` * 2^32.

    The words of stream ``seed`` from number ``offset`` on, in row-major order; see philox_normal for its blocks.
    """
    first = offset // 4
    block = torch.arange(first, (offset + x.numel() + 3) // 4, device=x.device)
    zero = torch.zeros_like(block)
    words = philox([block & MASK, block >> 32, zero, zero], (seed & MASK, seed >> 32 & MASK))
    stream = torch.stack(words, -1).flatten()[offset - 4 * first :][: x.numel()]
    return (stream >= int(dropout * 2**32)).view(x.shape)


def _normalised(x, branch, alpha, seed, offset, dropout, eps, rms):
    """z = alpha x + branch * factor as (z - mean(z)) / sqrt(var(z) + eps) or z / sqrt(mean(z^2) + eps); 1 / sqrt, factor."""
    precise = torch.float64 if x.dtype == torch.float64 else torch.float32
    factor = torch.ones((), dtype=precise, device=x.device)
    if seed is not None:
        factor = kept(x, int(seed), offset, dropout).to(precise) / (1 - dropout)
    z = float(alpha) * x.to(precise) + branch.to(precise) * factor
    if not rms:
        z = z - z.mean(-1, keepdim=True)
    rstd = (z.square().mean(-1, keepdim=True) + eps).rsqrt()
    return z * rstd, rstd, factor


def deep_norm(x, branch, alpha, weight, bias, seed, offset, dropout, eps, rms):
    out = _normalised(x, branch, alpha, seed, offset, dropout, eps, rms)[0]
    if weight is not None:
        out = out * weight.to(out.dtype)
    return (out if bias is None else out + bias.to(out.dtype)).to(x.dtype)


def deep_norm_backward(grad, x, branch, alpha, weight, bias, seed, offset, dropout, eps, rms):
    """Gradients for x, branch, weight and bias; the last two also where there is none."""
    normalised, rstd, factor = _normalised(x, branch, alpha, seed, offset, dropout, eps, rms)
    grad = grad.to(normalised.dtype)
    rows = tuple(range(x.ndim - 1))
    dbias = grad.sum(rows) if rows else grad
    dweight = (grad * normalised).sum(rows) if rows else grad * normalised
    if weight is not None:
        grad = grad * weight.to(grad.dtype)
    dz = grad - normalised * (grad * normalised).mean(-1, keepdim=True)
    if not rms:
        dz = dz - grad.mean(-1, keepdim=True)
    dz = dz * rstd
    return (float(alpha) * dz).to(x.dtype), (dz * factor).to(x.dtype), dweight, dbias
