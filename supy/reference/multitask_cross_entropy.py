"""Cross-entropy of n tasks of m classes, logarithm outside the sum over tasks: kexue.fm post 9158."""

from __future__ import annotations

import torch

from supy.reference._masks import log_one_plus, wide
from supy.reference.multilabel_cross_entropy import check_targets


def multitask_cross_entropy(scores, targets, hard):
    """The loss of each class, `[..., m]`, for scores and targets `[..., n, m]`.

        hard: c_j = log(1 + sum_i t_ij sum over k != j of e^(s_ik - s_ij))
        soft: c_j = log(1 + sum_i t_ij e^(mean_k s_ik - s_ij))

    Classes of score -inf are left out of their task, as if it had so many fewer.
    """
    check_targets("multitask_cross_entropy", targets)
    return log_one_plus(_terms(scores, targets, hard)[0].logsumexp(-2))


def multitask_cross_entropy_backward(scores, targets, losses, grad, hard):
    """With w_ij = grad_j t_ij e^(exponent of the term - c_j), the derivative of the terms' sum:

    hard: ds_ij = -w_ij + sum over k != j of grad_k t_ik e^(s_ij - s_ik - c_k)
    soft: ds_ij = -w_ij + mean_k w_ik
    """
    terms, masked = _terms(scores, targets, hard)
    s, t = wide(scores), targets.to(wide(scores).dtype)
    losses, grad = losses[..., None, :], grad[..., None, :]
    own = (terms - losses).exp() * grad
    if hard:
        # Both signs of grad: sums of positive terms for each.
        weight = (t.log() - s - losses).masked_fill(masked | (t == 0), -torch.inf)
        others = sum(
            sign * (s + _others(weight + (sign * grad).clamp(min=0).log())).exp()
            for sign in (1, -1)
        )
    else:
        others = own.sum(-1, keepdim=True) / (~masked).sum(-1, keepdim=True).clamp(min=1)
    return (others - own).masked_fill(masked, 0).to(scores.dtype)


def _terms(scores, targets, hard):
    """The logarithm of each term of the sums over tasks, and which classes are left out."""
    s, t = wide(scores), targets.to(wide(scores).dtype)
    masked = s == -torch.inf
    if hard:
        level = _others(s)
    else:
        count = (~masked).sum(-1, keepdim=True).clamp(min=1)
        level = (s.masked_fill(masked, 0) / count).sum(-1, keepdim=True)
    return (t.log() + level - s).masked_fill(masked | (t == 0), -torch.inf), masked


def _others(x):
    """Log-sum-exp over the last axis without the element itself: of those before and those behind."""
    edge = x.new_full((*x.shape[:-1], 1), -torch.inf)
    before = torch.cat([edge, x[..., :-1]], -1).logcumsumexp(-1)
    behind = torch.cat([x[..., 1:], edge], -1).flip(-1).logcumsumexp(-1).flip(-1)
    return torch.logaddexp(before, behind)
