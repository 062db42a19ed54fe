"""Mixed-chunk attention of FLASH: kexue.fm post 8934; arXiv 2202.10447, section 3.2."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from supy.reference._masks import check_lengths, clear, padding, wide


def mixed_chunk_attention(
    q_quad, k_quad, q_lin, k_lin, v, u, lengths, chunk_size, causal, normalizer
):
    """O_g = u_g * (A_g v_g + q_lin_g M_g) for each chunk g, with A_g from `_scores` and M_g from `_memories`.

    q_quad, k_quad, q_lin, k_lin `[B, T, S]`, v, u `[B, T, E]`, u may be None. Half precision has its scores and all
    sums in float32; A and M enter their products in the dtype of v.
    """
    T, dtype = v.shape[1], v.dtype
    check_lengths("mixed_chunk_attention", lengths, T)
    padded = padding(lengths, T)
    k_quad, k_lin, v = (clear(x, padded) for x in (k_quad, k_lin, v))
    q_quad, k_quad, q_lin, k_lin, v = (_split(x, chunk_size) for x in (q_quad, k_quad, q_lin, k_lin, v))
    weight = weights(v, T, lengths, chunk_size, causal, normalizer)[..., None, None]
    A, _ = _scores(q_quad, k_quad, chunk_size, causal)
    M = _memories(wide(k_lin).mT @ wide(v), causal).mul_(weight)
    out = _join(A.to(dtype) @ v + q_lin @ M.to(dtype), T)
    if u is not None:
        out.mul_(u)
    return clear(out, padded)


def mixed_chunk_attention_backward(
    grad, q_quad, k_quad, q_lin, k_lin, v, u, lengths, chunk_size, causal, normalizer
):
    """Gradients for q_quad, k_quad, q_lin, k_lin, v and u (an empty tensor without u), chunk by chunk:

        g = u * grad,  du = grad * (A v + q_lin M)
        dS = (g v^T) * 2 relu(S) / c,  dq_quad = dS k_quad / sqrt(S),  dk_quad = dS^T q_quad / sqrt(S)
        dM_h = sum of w_g q_lin_g^T g_g over the chunks g that see h: all, or, causal, the later ones
        dq_lin = g M^T,  dk_lin = v dM^T,  dv = A^T g + k_lin dM
    """
    T, dtype = v.shape[1], v.dtype
    padded = padding(lengths, T)
    tensors = (clear(x, padded) for x in (q_quad, k_quad, q_lin, k_lin, v))
    q_quad, k_quad, q_lin, k_lin, v = (_split(x, chunk_size) for x in tensors)
    weight = weights(v, T, lengths, chunk_size, causal, normalizer)[..., None, None]
    A, slope = _scores(q_quad, k_quad, chunk_size, causal)
    A = A.to(dtype)
    M = _memories(wide(k_lin).mT @ wide(v), causal).mul_(weight).to(dtype)
    grad, du = clear(grad, padded), v.new_empty(0)
    if u is not None:
        du = clear(_join(A @ v + q_lin @ M, T).mul_(grad), padded)
        grad = clear(grad * u, padded)
    g = _split(grad, chunk_size)
    dM = _memories((wide(q_lin).mT @ wide(g)).mul_(weight), causal, reverse=True).to(dtype)
    dS = wide(g @ v.mT).mul_(slope)
    grads = dS @ wide(k_quad), dS.mT @ wide(q_quad), g @ M.mT, v @ dM.mT, A.mT @ g + k_lin @ dM
    return *(_join(x, T).to(dtype) for x in grads), du


def _scores(q, k, chunk_size, causal):
    """A = relu(q k^T / sqrt(S))^2 / c `[B, G, c, c]`, the last chunk too, and its derivative by q k^T."""
    scale = max(q.shape[-1], 1) ** -0.5
    S = (wide(q) @ wide(k).mT).mul_(scale)
    if causal:
        # Filled, not multiplied by 0: what is hidden may be infinite.
        S.masked_fill_(torch.ones(S.shape[-2:], dtype=torch.bool, device=S.device).triu_(1), 0)
    S.relu_()
    return S.square() / chunk_size, S * (2 * scale / chunk_size)


def _memories(sums, causal, reverse=False):
    """Of each chunk's k^T v `[B, G, S, E]`: the sum over all chunks, or, causal, over those before (after) each."""
    if not causal:
        return sums.sum(1, keepdim=True)
    zero = sums.new_zeros(sums[:, :1].shape)
    if reverse:
        return torch.cat((sums[:, 1:].flip(1).cumsum(1).flip(1), zero), 1)
    return torch.cat((zero, sums[:, :-1].cumsum(1)), 1)


def weights(like, T, lengths, chunk_size, causal, normalizer):
    """What the linear part of each chunk is multiplied by: `[B or 1, G or 1]`, on the device of ``like``."""
    n = torch.tensor([T], device=like.device) if lengths is None else lengths.long()
    chunk = torch.arange(-(-T // chunk_size), device=like.device).clamp(min=1)  # the first has nothing before it
    if not causal:
        divisor = n[:, None].clamp(min=1)
    elif normalizer == "tokens":
        divisor = chunk[None] * chunk_size
    elif normalizer == "chunk_size":
        divisor = torch.full_like(chunk, chunk_size)[None]
    else:  # "chunks": 1 / ((g - 1) n / c), with n / c the sample's number of chunks
        divisor = chunk * (-(-n // chunk_size)).clamp(min=1)[:, None]
    return 1 / divisor.to(wide(like).dtype)


def _split(x, chunk_size):
    """`[B, T, n]` as `[B, G, c, n]`, the last chunk filled up with zeros; a chunk larger than T has T tokens."""
    size = max(min(chunk_size, x.shape[1]), 1)
    return F.pad(x, (0, 0, 0, -x.shape[1] % size)).unflatten(1, (-1, size))


def _join(x, T):
    return x.flatten(1, 2)[:, :T].contiguous()
