"""Both GlobalPointers beside the ways in which they are written elsewhere: from q, k and biases to a loss with gradients, and
to spans. The layers of bert4torch 0.6.2 are retraced here step by step, without its projections."""

from __future__ import annotations

import numpy as np
import torch

import supy

SIZE = 64  # of a head


def _random_spans(B, T, H, count, generator):
    limits = ((0, B), (0, H), (1, T), (1, T))  # token 0 is for [CLS]
    rows = torch.stack([torch.randint(*limit, (count * B,), generator=generator) for limit in limits], 1)
    rows[:, 2:] = rows[:, 2:].sort(1).values
    return rows.unique(dim=0)


def efficient_inputs(B, T, H):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(B, T, SIZE, generator=generator) for _ in range(2))
    x, y = (torch.randn(B, T, H, generator=generator) for _ in range(2))
    x[:, 0] -= 20
    return q, k, x, y, _random_spans(B, T, H, 8, generator)


def full_inputs(B, T, H):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(B, T, H, SIZE, generator=generator) for _ in range(2))
    return q, k, _random_spans(B, T, H, 8, generator)


def trained_efficient(B, T, H):
    """As a trained model scores: everything far below 0, but for some 26 spans a sample."""
    q, k, x, y, _ = efficient_inputs(B, T, H)
    spans = _random_spans(B, T, H, 26, torch.Generator().manual_seed(1))
    q, k, x, y = q * 0.3, k * 0.3, x * 0.3 - 4, y * 0.3 - 4
    x[spans[:, 0], spans[:, 2], spans[:, 1]] = 3
    y[spans[:, 0], spans[:, 3], spans[:, 1]] = 3
    return q, k, x, y


def trained_full(B, T, H):
    q, k, _ = full_inputs(B, T, H)
    b, h, i, j = _random_spans(B, T, H, 26, torch.Generator().manual_seed(1)).unbind(1)
    q, k = q * 0.3, k * 0.3
    q[..., 0], k[..., 0] = -6, 6  # all scores near -4.5
    q[b, i, h], k[b, j, h] = 0, 0
    q[b, i, h, 1], k[b, j, h, 1] = 5, 5
    return q, k


def with_gradients(loss):
    def run(*inputs):
        *tensors, spans = inputs
        leaves = [t.detach().requires_grad_() for t in tensors]
        value = loss(*leaves, spans)
        return value, *torch.autograd.grad(value, leaves)

    return run


def on_reference(function):
    def run(*inputs):
        with supy.use_backend("reference"):
            return function(*inputs)

    return run


def efficient_scores(q, k, x, y):
    return (q @ k.mT)[:, None] / SIZE**0.5 + x.mT[..., None] + y.mT[:, :, None]


def full_scores(q, k):
    return torch.einsum("bihd,bjhd->bhij", q, k) / SIZE**0.5


def dense(scores):
    """Mask and multi-label cross-entropy over all cells, as the method is usually written."""

    def loss(*inputs):
        *tensors, spans = inputs
        s = scores(*tensors)
        hidden = torch.ones_like(s[0, 0], dtype=torch.bool).tril(-1)
        target = torch.zeros_like(s, dtype=torch.bool)
        target[tuple(spans.unbind(1))] = True
        low = torch.finfo(s.dtype).min
        negative = s.masked_fill(hidden | target, low).flatten(2)
        positive = (-s).masked_fill(~target, low).flatten(2)
        zero = torch.zeros_like(s[:, :, 0, :1])
        sums = [torch.cat([part, zero], -1).logsumexp(-1) for part in (negative, positive)]
        return (sums[0] + sums[1]).sum(1).mean()

    return loss


def _below_diagonal(s):
    return s - torch.tril(torch.ones_like(s), -1) * 1e12


def bert4torch_efficient(q, k, x, y):
    a = torch.einsum("bmd,bnd->bmn", q, k) / SIZE**0.5
    bias = torch.stack((x, y), -1).transpose(1, 2)
    return _below_diagonal(a[:, None] + bias[..., :1] + bias[..., 1:].transpose(2, 3))


def bert4torch_full(q, k):
    return _below_diagonal(torch.einsum("bmhd,bnhd->bhmn", q, k)) / SIZE**0.5


def bert4torch_sparse(scores):
    """Its sparse loss, a + log(1 - e^(b - a)), with positives padded by cell (0, 0), which it leaves out."""

    def loss(*inputs):
        *tensors, spans = inputs
        s = scores(*tensors).flatten(2)
        zero = torch.zeros_like(s[..., :1])
        s = torch.cat([s, zero], -1)
        at = padded_positives(spans, s.shape[:2], tensors[0].shape[1])
        with_top = torch.cat([zero + torch.inf, s[..., 1:]], -1)
        positive = torch.cat([with_top.gather(-1, at), zero], -1)
        s = torch.cat([zero - torch.inf, s[..., 1:]], -1)
        of_all = s.logsumexp(-1)
        share = s.gather(-1, at).logsumexp(-1) - of_all
        negative = of_all + (1 - share.exp()).clamp(1e-7, 1).log()
        return ((-positive).logsumexp(-1) + negative).sum(1).mean()

    return loss


def padded_positives(spans, shape, T):
    """int64 [B, H, P] of cell numbers, 0 where a head has fewer than P."""
    group, cell = spans[:, 0] * shape[1] + spans[:, 1], spans[:, 2] * T + spans[:, 3]
    place = torch.arange(len(spans), device=spans.device) - torch.searchsorted(group, group)  # rows are sorted by (batch, head)
    at = torch.zeros(shape[0] * shape[1], int(place.max()) + 1, dtype=torch.int64, device=spans.device)
    at[group, place] = cell
    return at.view(*shape, -1)


def same_gradients(result, expected):
    """But for token 0: bert4torch's sparse loss leaves out cell (0, 0), one of the 8,256 that are summed."""
    loss, *gradients = (a.double() for a in result)
    return abs(loss - expected[0]) <= 1e-3 * expected[0] and all(
        (a - b)[:, 1:].abs().max() <= 1e-3 * b.abs().max() for a, b in zip(gradients, expected[1:], strict=True)
    )


def visible(scores):
    """Scores with the lower triangle below every threshold."""

    def run(*tensors):
        s = scores(*tensors)
        return s.masked_fill(torch.ones_like(s[0, 0], dtype=torch.bool).tril(-1), -torch.inf)

    return run


def by_nonzero(scores):
    return lambda *tensors: (scores(*tensors) > 0).nonzero()


def by_where(scores):
    return lambda *tensors: torch.from_numpy(np.stack(np.where((scores(*tensors) > 0).cpu().numpy()), 1))


def same_spans(result, expected):
    result = result[0] if isinstance(result, tuple) else result
    return torch.equal(result.to(expected.device), expected)
