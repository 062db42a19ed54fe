"""Multi-label cross-entropy ("ZLPR"): kexue.fm posts 7359 (hard labels) and 9064 (soft labels)."""

from __future__ import annotations

import torch

from supy._checks import require
from supy.reference._masks import log_one_plus, wide


def multilabel_cross_entropy(scores, targets):
    """The two halves of the loss over the last axis; -inf scores are left out of both.

    negative = log(1 + sum (1 - t) e^s),  positive = log(1 + sum t e^-s)
    """
    check_targets("multilabel_cross_entropy", targets)
    negative, positive = _terms(scores, targets)
    return log_one_plus(negative.logsumexp(-1)), log_one_plus(positive.logsumexp(-1))


def multilabel_cross_entropy_backward(
    scores, targets, negative, positive, grad_negative, grad_positive
):
    """ds = (1 - t) e^(s - negative) grad_negative - t e^(-s - positive) grad_positive."""
    above, below = _terms(scores, targets)
    above.sub_(negative[..., None]).exp_().mul_(grad_negative[..., None])
    below.sub_(positive[..., None]).exp_().mul_(grad_positive[..., None])
    return above.sub_(below).to(scores.dtype)


def check_targets(op, targets):
    """Raises ValueError at the first target that is outside 0 to 1 and no NaN."""
    inside = ((targets >= 0) & (targets <= 1)) | (targets != targets)
    if not inside.all():
        at = (~inside).nonzero()[0].tolist()
        require(False, op, f"targets{at} is {targets[tuple(at)].item()}, expected 0 to 1")


def _terms(scores, targets):
    """s + log(1 - t) and -s + log t; both -inf where s is, and t = 0 or 1 meets no infinite s."""
    s, t = wide(scores), targets.to(wide(scores).dtype)
    masked = s == -torch.inf
    negative = (s + torch.log1p(-t)).masked_fill_(masked | (t == 1), -torch.inf)
    positive = (t.log() - s).masked_fill_(masked | (t == 0), -torch.inf)
    return negative, positive
