"""The layer of FLASH as a whole: kexue.fm post 8934; arXiv 2202.10447."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from supy.reference import mixed_chunk_attention as reference
from supy.reference._masks import clear, padding, wide
from supy.reference.rotary import rotary


def mixed_chunk_layer(
    x, w_in, w_out, gamma, beta, cosine, sine, lengths, *options, attention=reference.mixed_chunk_attention
):
    """y = (u * (quadratic + linear part of v)) w_out^T with (u, v, z) = swish(x w_in^T).

    x `[B, T, D]`, w_in `[2 E + S, D]`, w_out `[D, E]`, gamma, beta `[4, S]`, cosine, sine `[T, S/2]`; queries and keys
    are rotated (gamma_i z + beta_i). ``options`` are those of ``attention``, then ``segment`` and ``keep``. Also
    returns, where segment is not 0, the sums of k_lin^T v over the tokens before each ``segment`` tokens, in float32 or
    float64 `[segments, B, S, E]`, and x w_in^T of the first ``keep`` tokens.
    """
    *options, segment, keep = options
    padded = padding(lengths, x.shape[1])
    h = clear(x, padded) @ w_in.mT
    u, v, z = split(F.silu(h), w_out)
    heads = rotated(z, gamma, beta, cosine, sine)
    out = attention(*heads, v, u, lengths, *options)
    sums = _sums(clear(heads[3], padded), clear(v, padded), segment)
    return out @ w_out.mT, sums, h[:, :keep].clone() if keep else h.new_empty(0)


def mixed_chunk_layer_backward(
    grad, x, w_in, w_out, gamma, beta, cosine, sine, sums, h, lengths, *options,
    attention=reference.mixed_chunk_attention, attention_backward=reference.mixed_chunk_attention_backward,
):  # fmt: skip
    """Gradients for x, w_in, w_out, gamma and beta; h is computed again where not all of it was kept."""
    *options, _, keep = options
    padded = padding(lengths, x.shape[1])
    x, grad = clear(x, padded), clear(grad, padded)
    h = h if 0 < keep == x.shape[1] else x @ w_in.mT
    u, v, z = split(F.silu(h), w_out)
    heads = rotated(z, gamma, beta, cosine, sine)
    out = attention(*heads, v, u, lengths, *options)
    *dheads, dv, du = attention_backward(grad @ w_out, *heads, v, u, lengths, *options)
    dz, dgamma, dbeta = rotated_backward(torch.stack(dheads, 1), z, gamma, cosine, sine)
    slope = torch.sigmoid(wide(h))
    dh = wide(torch.cat((du, dv, dz), -1)) * (slope + wide(h) * slope * (1 - slope))
    dh = dh.to(h.dtype)
    dw_in, dw_out = (a.flatten(0, 1).mT @ b.flatten(0, 1) for a, b in ((dh, x), (grad, out)))
    return dh @ w_in, dw_in, dw_out, dgamma.to(gamma.dtype), dbeta.to(beta.dtype)


def split(activated, w_out):
    """u, v and z."""
    E = w_out.shape[1]
    return activated.split((E, E, activated.shape[-1] - 2 * E), -1)


def rotated(z, gamma, beta, cosine, sine, rotary=rotary):
    """q and k of the quadratic part, then of the linear one."""
    heads = z[:, None] * gamma.to(z.dtype)[:, None] + beta.to(z.dtype)[:, None]
    return rotary(heads, cosine, sine, True, False).unbind(1)


def rotated_backward(dheads, z, gamma, cosine, sine, rotary=rotary):
    """Gradients for z, gamma and beta from that of the heads `[B, 4, T, S]`."""
    turned_back = wide(rotary(dheads, cosine, sine, True, True))
    dz = (turned_back * gamma.to(turned_back.dtype)[:, None]).sum(1)
    dgamma = (turned_back * wide(z)[:, None]).sum((0, 2))
    return dz.to(z.dtype), dgamma, turned_back.sum((0, 2))


def _sums(k, v, segment):
    if segment == 0:
        return wide(v).new_empty(0)
    pieces = zip(k.split(segment, 1), v.split(segment, 1), strict=True)
    sums = torch.stack([wide(k).mT @ wide(v) for k, v in pieces])
    return sums.cumsum(0) - sums
