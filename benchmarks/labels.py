"""The multi-label losses as they are written elsewhere, and what a loss is timed by."""

from __future__ import annotations

import torch


def value_and_gradient(loss):
    def run(scores, labels):
        leaf = scores.detach().requires_grad_()
        value = loss(leaf, labels)
        return value.detach(), *torch.autograd.grad(value.sum(), leaf)

    return run


def same(result, expected):
    return all((a.double() - b).abs().max() <= 1e-4 * b.abs().max() for a, b in zip(result, expected, strict=True))


def hard(scores, targets):
    """Hard labels as post 7359 has it: signs of positives flipped, the other side pushed far down, a 0 appended."""
    targets = targets.to(scores.dtype)
    flipped = (1 - 2 * targets) * scores
    zero = torch.zeros_like(scores[..., :1])
    sides = flipped - targets * 1e12, flipped - (1 - targets) * 1e12
    return sum(torch.cat([side, zero], -1).logsumexp(-1) for side in sides)


def soft(scores, targets):
    """Soft labels as bert4keras has it: logarithms of the targets added to the scores, a 0 appended."""
    zero = torch.zeros_like(scores[..., :1])
    sides = scores + torch.log1p(-targets), targets.log() - scores
    return sum(torch.cat([side, zero], -1).logsumexp(-1) for side in sides)


def tasks_hard(scores, targets):
    """Each pair of classes of a task, which needs m times the memory."""
    others = scores[..., None, :].expand(*scores.shape, scores.shape[-1])
    own = torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
    terms = targets.log() + others.masked_fill(own, -torch.inf).logsumexp(-1) - scores
    return torch.nn.functional.softplus(terms.logsumexp(-2)).sum(-1)


def tasks_soft(scores, targets):
    terms = targets.log() + scores.mean(-1, keepdim=True) - scores
    return torch.nn.functional.softplus(terms.logsumexp(-2)).sum(-1)
