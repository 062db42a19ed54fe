"""Efficient GlobalPointer: kexue.fm post 8877."""

from __future__ import annotations

import torch

from supy.reference._masks import (
    add_rows,
    check_lengths,
    check_spans,
    clear,
    grouped_logsumexp,
    log_one_plus,
    padding,
    visible_cells,
    wide,
)

# Of one temporary: 4 MB of float32, so that a few samples stay in cache.
ELEMENTS_AT_ONCE = 1 << 20


def efficient_global_pointer_scores(q, k, start_bias, end_bias, lengths, tril, scale):
    """s[b, h, i, j] = scale * q[b, i] . k[b, j] + start_bias[b, i, h] + end_bias[b, j, h].

    q, k `[B, T, D]`, biases `[B, T, H]`, s `[B, H, T, T]` (post 8877); masked as the full form.
    """
    check_lengths("efficient_global_pointer_scores", lengths, q.shape[1])
    a = (wide(q) @ wide(k).mT).mul_(scale)
    scores = a.new_empty(a.shape[0], start_bias.shape[2], *a.shape[1:])
    torch.add(a[:, None], wide(start_bias).mT[..., None], out=scores)
    scores += wide(end_bias).mT[:, :, None]
    visible = visible_cells(q.shape[1], lengths, tril, q.device)
    return scores.masked_fill_(~visible[:, None], -torch.inf).to(q.dtype)


def efficient_global_pointer_loss(
    q, k, start_bias, end_bias, spans, lengths, tril, scale, gradients
):
    """(loss, dq, dk, dstart_bias, dend_bias); `[B, H, T, T]` never exists, see `_samples`.

        loss = mean over b of sum over h of log(1 + sum_neg e^s) + log(1 + sum_pos e^-s)

    The gradients are empty unless ``gradients``. Positives are the distinct rows of ``spans``.
    """
    B, T, H = start_bias.shape
    op = "efficient_global_pointer_loss"
    check_lengths(op, lengths, T)
    check_spans(op, spans, (B, H, T), lengths, tril)
    padded = padding(lengths, T)
    q, k = (clear(wide(x), padded) for x in (q, k))
    x, y = (clear(wide(bias), padded, -torch.inf) for bias in (start_bias, end_bias))
    loss = q.new_zeros(())
    out = [t.new_zeros(t.shape if gradients else 0) for t in (q, k, x, y)]
    if B * T * H == 0:
        return loss, *out
    below = ~visible_cells(T, None, tril, q.device)
    # Padding is -inf in x and y by now; so may be other tokens that the caller rules out.
    dead_x, dead_y = ((z.amax(2) == -torch.inf) for z in (x, y))
    batch, head, start, end = spans.unbind(1)
    cells, cell_of_span = ((batch * T + start) * T + end).unique(return_inverse=True)
    positive = torch.zeros(len(cells), H, dtype=torch.bool, device=q.device)
    positive[cell_of_span, head] = True  # a repeated span sets the same bit again
    step = max(1, ELEMENTS_AT_ONCE // (T * (T + H)))
    for b in range(0, B, step):
        part = slice(b, b + step)
        first, last = torch.searchsorted(cells, cells.new_tensor([b, b + step]) * T * T).tolist()
        value, *grads = _samples(
            q[part], k[part], x[part], y[part],
            cells[first:last] - b * T * T, positive[first:last],
            below | dead_x[part, :, None] | dead_y[part, None], scale, gradients,
        )  # fmt: skip
        loss += value / B
        for total, grad in zip(out, grads):
            torch.div(grad, B, out=total[part])
    return loss, *out


def _samples(q, k, x, y, cells, positive, hidden, scale, gradients):
    """Sum of the loss over samples and heads, and its gradients for q, k, x, y, by matrix products.

        sum over cells of e^s_hij = sum_i e^x_hi sum_j P_ij e^y_hj
        with s_hij = a_ij + x_hi + y_hj and P_ij = e^a_ij

    P is 0 on hidden cells and on ``cells`` `[C]`, those that are positive for any head;
    ``positive`` `[C, H]` says for which, and the other heads take these cells up one by one. Every
    exponential is shifted by its own maximum, so that only a sample and head whose every cell lies
    far below the sum of the maxima underflows; `_faint` computes these directly.
    """
    B, T, H = x.shape
    a, at = _products(q, k, hidden, cells, scale)
    batch, start, end = cells // (T * T), cells // T % T, cells % T
    at = at[:, None] + x[batch, start] + y[batch, end]
    peak_a, peak_x, peak_y = (_peak(z, dim) for z, dim in ((a, (1, 2)), (x, 1), (y, 1)))
    P = a.sub_(peak_a).exp_()
    ex, ey = (x - peak_x).exp_(), (y - peak_y).exp_()
    dx = (P @ ey).mul_(ex)
    Z = dx.sum(1)
    shift = (peak_a + peak_x + peak_y)[:, 0]
    # Products below the smallest normal number are lost: T * T of them must not show beside Z.
    limits = torch.finfo(Z.dtype)
    faint = Z < T * T * limits.tiny / limits.eps
    log_Z = (Z.log() + shift).masked_fill_(faint, -torch.inf)
    for b, heads, s in _faint(q, k, x, y, hidden, cells, scale, faint):
        log_Z[b, heads] = s.flatten(1).logsumexp(1)
    negatives = at.masked_fill(positive, -torch.inf)
    minus = (-at).masked_fill_(~positive | (at == -torch.inf), -torch.inf)
    log_neg = log_one_plus(torch.logaddexp(log_Z, grouped_logsumexp(negatives, batch, B)))
    log_pos = log_one_plus(grouped_logsumexp(minus, batch, B))
    loss = log_neg.sum() + log_pos.sum()
    if not gradients:
        return (loss,)
    w = (shift - log_neg).exp_().masked_fill_(faint, 0)[:, None]
    ex.mul_(w)
    dx.mul_(w)
    dy = (P.mT @ ex).mul_(ey)
    da = P.mul_(ex @ ey.mT)
    for b, heads, s in _faint(q, k, x, y, hidden, cells, scale, faint):
        s = s.sub_(log_neg[b, heads, None, None]).exp_()
        da[b] += s.sum(0)
        dx[b, :, heads] += s.sum(2).T
        dy[b, :, heads] += s.sum(1).T
    ds = (negatives - log_neg[batch]).exp_() - (minus - log_pos[batch]).exp_()
    da.view(-1)[cells] += ds.sum(1)
    add_rows(dx.view(-1, H), batch * T + start, ds)
    add_rows(dy.view(-1, H), batch * T + end, ds)
    da.mul_(scale)
    return loss, da @ k, da.mT @ q, dx, dy


def _products(q, k, hidden, cells, scale):
    """a `[B, T, T]` with -inf on hidden and positive cells, and what it had on the latter `[C]`."""
    a = (q @ k.mT).mul_(scale).masked_fill_(hidden, -torch.inf)
    at = a.view(-1)[cells]
    a.view(-1)[cells] = -torch.inf
    return a, at


def _peak(z, dim):
    """The maximum, to shift by; 0 where there is nothing but -inf."""
    peak = z.amax(dim, keepdim=True)
    return peak.masked_fill_(peak == -torch.inf, 0)


def _faint(q, k, x, y, hidden, cells, scale, faint):
    """For the heads marked `[B, H]`, some at a time: (sample, heads, their scores `[heads, T, T]`).

    Positive cells are -inf. Heads whose every score is -inf are left out.
    """
    if not faint.any():
        return
    a, _ = _products(q, k, hidden, cells, scale)
    some_cell, *some_bias = (z.amax(dim) > -torch.inf for z, dim in ((a, (1, 2)), (x, 1), (y, 1)))
    faint = faint & some_cell[:, None] & some_bias[0] & some_bias[1]
    for b in faint.any(1).nonzero().flatten().tolist():
        for heads in faint[b].nonzero().flatten().split(max(1, ELEMENTS_AT_ONCE // a[b].numel())):
            yield b, heads, _scores_of(a[b], x[b][:, heads], y[b][:, heads])


def _scores_of(a, x, y):
    """`[H, T, T]` from a `[T, T]` and the biases `[T, H]` of one sample."""
    return a + x.T[:, :, None] + y.T[:, None]


def efficient_global_pointer_spans(
    q, k, start_bias, end_bias, lengths, tril, scale, threshold
):
    """Rows (batch, head, start, end) with s > threshold, in this order, and their scores.

    Only cells with a_ij + max_h x_hi + max_h y_hj > threshold are looked at head by head. The
    bound is rounded in the same steps as a score, and rounding is monotone, so that no score lies
    above its bound.
    """
    check_lengths("efficient_global_pointer_spans", lengths, q.shape[1])
    B, T, H = start_bias.shape
    dtype = q.dtype
    keys, values = [torch.empty(0, dtype=torch.int64, device=q.device)], [q.new_empty(0)]
    if B * T * H:
        q, k, x, y = (wide(z) for z in (q, k, start_bias, end_bias))
        visible = visible_cells(T, lengths, tril, q.device).expand(B, T, T)
        top_x, top_y = x.amax(2)[:, :, None], y.amax(2)[:, None]
        step = max(1, ELEMENTS_AT_ONCE // (T * T))
        for b in range(0, B, step):
            part = slice(b, b + step)
            a = (q[part] @ k[part].mT).mul_(scale)
            bound = (a + top_x[part]).add_(top_y[part]).to(dtype)
            # Not "bound > threshold": a head that is NaN hides no other.
            cells = (~(bound <= threshold) & visible[part]).nonzero()
            for some in cells.split(max(1, ELEMENTS_AT_ONCE // H)):
                batch, start, end = some.unbind(1)
                s = a[batch, start, end][:, None] + x[batch + b, start]
                s = (s + y[batch + b, end]).to(dtype)
                row, head = (s > threshold).nonzero().unbind(1)
                keys.append((((batch + b)[row] * H + head) * T + start[row]) * T + end[row])
                values.append(s[row, head])
    key, order = torch.cat(keys).sort()
    T, H = max(T, 1), max(H, 1)
    spans = torch.stack((key // (T * T * H), key // (T * T) % H, key // T % T, key % T), 1)
    return spans, torch.cat(values)[order]
