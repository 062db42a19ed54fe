"""The gated attention unit as a whole: kexue.fm post 8934; arXiv 2202.10447."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from supy.reference import gau_attention as reference
from supy.reference._masks import clear, padding, wide
from supy.reference.rotary import rotary


def gated_attention_unit(
    x, w_in, w_out, gamma, beta, cosine, sine, lengths, *options, attention=reference.gau_attention
):
    """y = (u * A v) w_out^T with (u, v, z) = swish(h), h = x w_in^T, q and k = rotated (gamma z + beta).

    x `[B, T, D]`, w_in `[2 E + S, D]`, w_out `[D, E]`, gamma, beta `[2, S]`, cosine, sine `[T, S/2]`; ``options`` are those
    of ``attention``, the last of which, ``save``, also returns h, A v and the log-sum-exp of each row.
    """
    padded = padding(lengths, x.shape[1])
    h = clear(x, padded) @ w_in.mT
    u, v, z = _split(F.silu(h), w_out)
    out, attended, stats = attention(*_rotated(z, gamma, beta, cosine, sine), v, u, lengths, *options)
    return out @ w_out.mT, h if options[-1] else h.new_empty(0), attended, stats


def gated_attention_unit_backward(
    grad, x, w_in, w_out, gamma, beta, cosine, sine, h, attended, stats, lengths, *options,
    attention_backward=reference.gau_attention_backward,
):  # fmt: skip
    """Gradients for x, w_in, w_out, gamma and beta; everything but h, A v and the row statistics is computed again."""
    padded = padding(lengths, x.shape[1])
    x, grad = clear(x, padded), clear(grad, padded)
    u, v, z = _split(F.silu(h), w_out)
    q, k = _rotated(z, gamma, beta, cosine, sine)
    dout = grad @ w_out
    dw_out = grad.flatten(0, 1).mT @ (u * attended).flatten(0, 1)
    dq, dk, dv, du = attention_backward(dout, q, k, v, u, attended, stats, lengths, *options)
    turned_back = torch.stack([rotary(d, cosine, sine, True, True) for d in (dq, dk)])
    dz = (turned_back * gamma.to(z.dtype)[:, None, None]).sum(0)
    dgamma = (wide(turned_back) * wide(z)).sum((1, 2))
    dh = torch.cat((du, dv, dz), -1)
    slope = torch.sigmoid(wide(h))
    dh = (wide(dh) * (slope + wide(h) * slope * (1 - slope))).to(h.dtype)
    dw_in = dh.flatten(0, 1).mT @ x.flatten(0, 1)
    return dh @ w_in, dw_in, dw_out, dgamma.to(gamma.dtype), wide(turned_back).sum((1, 2)).to(beta.dtype)


def _split(activated, w_out):
    E = w_out.shape[1]
    return activated.split((E, E, activated.shape[-1] - 2 * E), -1)


def _rotated(z, gamma, beta, cosine, sine):
    return (rotary(z * g + b, cosine, sine, True, False) for g, b in zip(gamma.to(z.dtype), beta.to(z.dtype)))
