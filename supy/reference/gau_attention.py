"""Attention of the gated attention unit: kexue.fm posts 8934, 9019, 8823; arXiv 2202.10447."""

from __future__ import annotations

import math

import torch

from supy._checks import require
from supy.reference._masks import check_lengths, clear, padding, visible_cells, wide


def gau_attention(q, k, v, u, lengths, cu_seqlens, kernel, causal, scale, relu2_length, save):
    """O = u * (A v), with A from `_attention`.

    q, k `[B, T, S]`, v, u `[B, T, E]`, u may be None. Post 8934: O = (U . A V) W_o. Half precision has its scores and their
    sums in float32, and A in its own dtype for the product with v, which adds up in float32. With ``save`` also returns A v
    and the row's log-sum-exp, each empty where the gradient does not need it.
    """
    _check("gau_attention", lengths, cu_seqlens, q.shape[1])
    padded = padding(lengths, q.shape[1])
    A, _, _, stats = _attention(wide(q), wide(k), lengths, cu_seqlens, kernel, causal, scale, relu2_length)
    attended = clear(A.to(v.dtype) @ clear(v, padded), padded)
    nothing = stats.new_empty(0)
    stats = stats if save and kernel != "relu2" else nothing
    if u is None:
        return attended, v.new_empty(0), stats
    return clear(attended * u, padded), attended if save else v.new_empty(0), stats


def gau_attention_backward(
    grad, q, k, v, u, attended, stats, lengths, cu_seqlens, kernel, causal, scale, relu2_length
):
    """Gradients for q, k, v and u (an empty tensor without u); the scores are computed again.

        g = u * grad,  du = grad * (A v),  dv = A^T g,  dA = g v^T
        softmax: dS = A * (dA - rowsum(A * dA));  relu2: dS = dA * 2 relu(S) / l
        dq = (dS * factor) k,  dk = (dS * factor)^T q,  with S = factor * q k^T
    """
    padded = padding(lengths, q.shape[1])
    dtype = q.dtype
    q, k, v = clear(wide(q), padded), clear(wide(k), padded), clear(v, padded)
    A, slope, factor, _ = _attention(q, k, lengths, cu_seqlens, kernel, causal, scale, relu2_length)
    grad = clear(grad, padded)
    du = q.new_empty(0, dtype=dtype)
    if u is not None:
        du = grad * attended
        grad = clear(grad * u, padded)
    dv = A.to(dtype).mT @ grad
    dA = wide(grad @ v.mT)
    if kernel == "relu2":
        dS = dA.mul_(slope)
    else:
        dS = A * dA.sub_((A * dA).sum(-1, keepdim=True))
    dS = dS.mul_(factor)
    return (dS @ k).to(dtype), (dS.mT @ q).to(dtype), dv, du


def _attention(q, k, lengths, cu_seqlens, kernel, causal, scale, relu2_length):
    """A `[B, T, T]`; its slope dA/dS for relu2, else None; the factor in S = factor * q k^T; log-sum-exp of S.

        relu2: A = relu(S)^2 / l    softmax: A = exp(S) / sum over visible keys of exp(S)
        softmax_plus: softmax with S * log(max(l, 16)) / log 512 (post 8823; floor as bert4keras)

    l is the number of keys that the row sees, or ``relu2_length``. Invisible cells, and so rows
    that see no key, are 0.
    """
    T = q.shape[1]
    # visible_cells has start <= end; attention has the key not after the query.
    visible = visible_cells(T, lengths, causal, q.device).mT
    if cu_seqlens is not None:
        token = torch.arange(T, device=q.device)
        sequence = torch.searchsorted(cu_seqlens.long(), token, right=True)
        visible = visible & (sequence[:, None] == sequence)
    count = visible.sum(-1, keepdim=True)
    factor = scale
    if kernel == "softmax_plus":
        factor = scale * count.clamp(min=16).to(q.dtype).log() / math.log(512)
    S = (q @ k.mT).mul_(factor)
    if kernel == "relu2":
        S = S.masked_fill_(~visible, 0).relu_()
        divisor = count.clamp(min=1) if relu2_length is None else relu2_length
        return S.square() / divisor, 2 * S / divisor, factor, S.new_empty(0)
    S = S.masked_fill_(~visible, -torch.inf)
    return S.softmax(-1).masked_fill_(count == 0, 0), None, factor, S.logsumexp(-1)


def _check(op, lengths, cu_seqlens, T):
    check_lengths(op, lengths, T)
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        ordered = bool(ends) and ends[0] == 0 and ends[-1] == T and ends == sorted(ends)
        require(
            ordered, op, f"cu_seqlens must ascend from 0 to T={T}, got {ends[:3]} to {ends[-3:]}"
        )
