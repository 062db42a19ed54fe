"""Multi-label cross-entropy from the indices of the positive classes: kexue.fm post 8888."""

from __future__ import annotations

import torch

from supy._checks import require
from supy.reference._masks import log_one_plus, wide


def sparse_multilabel_cross_entropy(scores, indices, ignore_index):
    """The two halves of the loss over the last axis; -inf scores are left out of both.

        negative = log(1 + sum over classes not in P of e^s)
        positive = log(1 + sum over distinct classes in P of e^-s)

    P is left out while the negatives are summed. The published a + log(1 - e^(b - a)) cancels:
    from positive scores near 15 on it is negative or NaN in float32.
    """
    check_indices(indices, scores.shape[-1], ignore_index)
    s = wide(scores)
    at, used = _distinct(indices, ignore_index)
    negative = s.masked_fill(_mask(at, used, s.shape[-1]), -torch.inf).logsumexp(-1)
    return log_one_plus(negative), log_one_plus(_positives(s, at, used).logsumexp(-1))


def sparse_multilabel_cross_entropy_backward(
    scores, indices, negative, positive, grad_negative, grad_positive, ignore_index
):
    """ds = e^(s - negative) grad_negative outside P, -e^(-s - positive) grad_positive in P."""
    s = wide(scores)
    at, used = _distinct(indices, ignore_index)
    above = (s - negative[..., None]).exp_().mul_(grad_negative[..., None])
    above.masked_fill_(_mask(at, used, s.shape[-1]), 0)
    below = (_positives(s, at, used) - positive[..., None]).exp_().mul_(grad_positive[..., None])
    # Unused entries add 0, so the order in which equal indices are added does not show.
    return above.scatter_add_(-1, at, -below).to(scores.dtype)


def published(scores, indices, ignore_index, mask_zero):
    """The loss of post 8888 as bert4keras computes it, with its clip at 1e-7, for comparison.

    a = log(1 + sum of all e^s),  b = log of the sum over ``indices`` of e^s, duplicates twice
    loss = a + log(max(1 - e^(b - a), 1e-7)) + log(1 + sum over ``indices`` of e^-s)
    """
    s = wide(scores)
    unused = indices == ignore_index
    if mask_zero:
        s = torch.cat([torch.full_like(s[..., :1], -torch.inf), s[..., 1:]], -1)
        unused = unused | (indices == 0)
    # What is unused looks up class 0, which exists.
    own = s.gather(-1, indices.masked_fill(unused, 0))
    zero = torch.zeros_like(s[..., :1])
    up, down = own.masked_fill(unused, -torch.inf), (-own).masked_fill(unused, -torch.inf)
    total = torch.cat([s, zero], -1).logsumexp(-1)
    part = torch.cat([up, torch.full_like(zero, -torch.inf)], -1).logsumexp(-1)
    rest = (1 - (part - total).exp()).clamp(1e-7, 1)
    return total + rest.log() + torch.cat([down, zero], -1).logsumexp(-1)


def check_indices(indices, classes, ignore_index):
    outside = ((indices < 0) | (indices >= classes)) & (indices != ignore_index)
    if outside.any():
        at = outside.nonzero()[0].tolist()
        require(
            False,
            "sparse_multilabel_cross_entropy",
            f"indices{at} is {indices[tuple(at)].item()}, expected 0 to {classes - 1} or "
            f"ignore_index={ignore_index}",
        )


def _distinct(indices, ignore_index):
    """The indices in ascending order, and which to use: the first of equal ones, none ignored.

    Ignored ones become 0, so that every index can be looked up.
    """
    at = indices.sort(-1).values
    used = at != ignore_index
    used[..., 1:] &= at[..., 1:] != at[..., :-1]
    return at.masked_fill(at == ignore_index, 0), used


def _mask(at, used, classes):
    """True on the positive classes."""
    count = torch.zeros(*at.shape[:-1], classes, dtype=torch.uint8, device=at.device)
    return count.scatter_reduce_(-1, at, used.to(torch.uint8), "amax").bool()


def _positives(s, at, used):
    """-s of the positive classes, -inf where an entry is unused or s is -inf."""
    minus = -s.gather(-1, at)
    return minus.masked_fill_(~used | (minus == torch.inf), -torch.inf)
