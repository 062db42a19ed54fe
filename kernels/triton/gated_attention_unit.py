"""The gated attention unit in Triton: torch's products around kernels of `gau_attention`, which read h, write dh."""

from __future__ import annotations

import torch

from supy.kernels.gated_projection import activate, activate_backward
from supy.kernels.gau_attention import SWISH, _Bands
from supy.reference._masks import clear, padding
from supy.reference.gau_attention import _check


def gated_attention_unit(
    x, w_in, w_out, gamma, beta, cosine, sine, lengths, cu_seqlens, kernel, causal, scale, relu2_length, save,
    *, tiles=None, band=None,
):  # fmt: skip
    """y, h, A v and the rows' log-sum-exp, as the reference; what stands in padding of h is not read."""
    T, E = x.shape[1], w_out.shape[1]
    _check("gated_attention_unit", lengths, cu_seqlens, T)
    h = x @ w_in.mT
    run = _Bands(x, gamma.shape[1], lengths, cu_seqlens, kernel, causal, scale, relu2_length, tiles, band)
    v, q, k = activate(h, E, gamma, beta, cosine, sine, run.seen.lengths)
    out = torch.empty_like(v)
    attended = torch.empty_like(v) if save else None
    level = run.forward(q, k, v, out, h[..., :E], SWISH, attended)
    y = out @ w_out.mT
    if not save:
        return y, x.new_empty(0), x.new_empty(0), level.new_empty(0)
    return y, h, attended, level.new_empty(0) if run.relu2 else level[:, :T].contiguous()


def gated_attention_unit_backward(
    grad, x, w_in, w_out, gamma, beta, cosine, sine, h, attended, stats, lengths, cu_seqlens, kernel, causal, scale,
    relu2_length, *, tiles=None, band=None,
):  # fmt: skip
    """Gradients for x, w_in, w_out, gamma and beta."""
    E = w_out.shape[1]
    padded = padding(lengths, x.shape[1])
    x, grad = clear(x, padded), clear(grad, padded)
    g = grad @ w_out
    run = _Bands(x, gamma.shape[1], lengths, cu_seqlens, kernel, causal, scale, relu2_length, tiles, band)
    affine = gamma, beta, cosine, sine, run.seen.lengths
    v, q, k = activate(h, E, *affine)
    out, dh = torch.empty_like(v), torch.empty_like(h)
    mean = run.gate_gradient(g, h[..., :E], attended, g, dh[..., :E], out, SWISH)
    dheads = run.gradients(q, k, v, g, run.level(stats), mean, dh[..., E : 2 * E], h[..., E : 2 * E])
    dgamma, dbeta = activate_backward(dheads, len(dheads[1]), h, E, *affine, dh)
    dw_in = dh.flatten(0, 1).mT @ x.flatten(0, 1)
    dw_out = grad.flatten(0, 1).mT @ out.flatten(0, 1)
    return dh @ w_in, dw_in, dw_out, dgamma, dbeta
