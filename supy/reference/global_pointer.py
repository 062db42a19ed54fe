"""GlobalPointer span scores, loss and decoding: kexue.fm posts 8373 and 8888."""

from __future__ import annotations

import torch

from supy.reference._masks import (
    check_lengths,
    check_spans,
    clear,
    grouped_logsumexp,
    log_one_plus,
    padding,
    visible_cells,
    wide,
)

CELLS_AT_ONCE = 1 << 22  # cells that the loss and the decoding hold in memory: 16 MB of float32


def global_pointer_scores(q, k, lengths, tril, scale):
    """s[b, h, i, j] = scale * q[b, i, h] . k[b, j, h]; -inf in padding, with ``tril`` for i > j.

    q, k `[B, T, H, D]`, s `[B, H, T, T]` (post 8373; the scale and the masks are bert4keras').
    """
    check_lengths("global_pointer_scores", lengths, q.shape[1])
    scores = (wide(q).transpose(1, 2) @ wide(k).permute(0, 2, 3, 1)).mul_(scale)
    visible = visible_cells(q.shape[1], lengths, tril, q.device)
    return scores.masked_fill_(~visible[:, None], -torch.inf).to(q.dtype)


def global_pointer_loss(q, k, spans, lengths, tril, scale, gradients):
    """(loss, dq, dk).

        loss = mean over b of sum over h of log(1 + sum_neg e^s) + log(1 + sum_pos e^-s)

    The gradients are empty unless ``gradients``. Positives are the distinct rows of ``spans``.
    They are set to -inf before the negatives are summed, never subtracted (post 7359, section 1.3
    of 8888). Memory is that of a few heads.
    """
    B, T, H, D = q.shape
    op = "global_pointer_loss"
    check_lengths(op, lengths, T)
    check_spans(op, spans, (B, H, T), lengths, tril)
    padded = padding(lengths, T)
    # By head first, so that a few heads of all samples are one slice.
    heads_first = (2, 0, 1, 3)
    q, k = (clear(wide(x).permute(heads_first), padded) for x in (q, k))
    loss = q.new_zeros(())
    dq, dk = (q.new_zeros((B, T, H, D) if gradients else 0) for _ in "qk")
    if B * H * T == 0:
        return loss, dq, dk
    hidden = ~visible_cells(T, lengths, tril, q.device)
    batch, head, start, end = spans.unbind(1)
    cells = (((head * B + batch) * T + start) * T + end).unique()
    step = max(1, CELLS_AT_ONCE // (B * T * T))
    for h in range(0, H, step):
        part = slice(h, min(h + step, H))
        inside = (cells >= h * B * T * T) & (cells < part.stop * B * T * T)
        own = cells[inside] - h * B * T * T
        value, ds = _heads(q[part], k[part], own, hidden, scale, gradients)
        loss += value / B
        if gradients:
            ds.mul_(scale / B)
            dq.permute(heads_first)[part] = ds @ k[part]
            dk.permute(heads_first)[part] = ds.mT @ q[part]
    return loss, dq, dk


def _heads(q, k, cells, hidden, scale, gradients):
    """Sum of the loss over heads and samples, and its gradient for the scores `[H, B, T, T]`.

    ``cells`` are the positive ones, numbered in this shape.
    """
    s = (q @ k.mT).mul_(scale).masked_fill_(hidden, -torch.inf)
    group = cells // hidden[0].numel()
    minus = -s.view(-1)[cells]
    minus.masked_fill_(minus == torch.inf, -torch.inf)
    s.view(-1)[cells] = -torch.inf
    negative = log_one_plus(s.flatten(2).logsumexp(2))
    positive = log_one_plus(grouped_logsumexp(minus, group, negative.numel()))
    if gradients:
        s.sub_(negative[:, :, None, None]).exp_()
        s.view(-1)[cells] = -(minus - positive[group]).exp()
    return negative.sum() + positive.sum(), s


def global_pointer_spans(q, k, lengths, tril, scale, threshold):
    """Rows (batch, head, start, end) with s > threshold, in this order, and their scores."""
    check_lengths("global_pointer_spans", lengths, q.shape[1])
    B, T, H, D = q.shape
    dtype = q.dtype
    q, k = (wide(x).transpose(1, 2).reshape(B * H, T, D) for x in (q, k))
    visible = visible_cells(T, lengths, tril, q.device).expand(B, T, T)
    found = [(torch.empty(0, 4, dtype=torch.int64, device=q.device), q.new_empty(0, dtype=dtype))]
    step = max(1, CELLS_AT_ONCE // max(T * T, 1))
    for first in range(0, B * H, step):
        s = (q[first : first + step] @ k[first : first + step].mT).mul_(scale).to(dtype)
        sample = torch.arange(first, first + len(s), device=q.device) // H
        row, start, end = ((s > threshold) & visible[sample]).nonzero().unbind(1)
        spans = torch.stack(((row + first) // H, (row + first) % H, start, end), 1)
        found.append((spans, s[row, start, end]))
    spans, scores = zip(*found)
    return torch.cat(spans), torch.cat(scores)

