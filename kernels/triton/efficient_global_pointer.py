"""Efficient GlobalPointer in Triton: post 8877; one inner product for all heads, whose tiles are never stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from supy.kernels.global_pointer import (
    _PRECISE,
    BLOCK,
    LAUNCH,
    _negatives,
    _others,
    _products,
    _visible,
    at_once,
    features_at_once,
    lengths_of,
    offsets_of,
    tiles_of,
)
from supy.reference import efficient_global_pointer as reference
from supy.reference._masks import (
    add_rows,
    check_lengths,
    check_spans,
    clear,
    grouped_logsumexp,
    log_one_plus,
    padding,
    visible_cells,
)

HEADS = 64  # heads at a time


@triton.jit
def efficient_global_pointer_scores_kernel(
    q, k, x, y, lengths, out, T, H, blocks, parts, scale,
    q0, q1, q2, k0, k1, k2, x0, x1, x2, y0, y1, y2,
    TRIL: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    part = pid % parts
    column = pid // parts % blocks
    row = pid // parts // blocks % blocks
    sample = (pid // parts // blocks // blocks).to(tl.int64)
    n = tl.load(lengths + sample)
    i = row * BLOCK + tl.arange(0, BLOCK)
    j = column * BLOCK + tl.arange(0, BLOCK)
    a = tl.zeros([BLOCK, BLOCK], tl.float32)
    visible = _visible(i[:, None], j[None, :], n, TRIL)
    seen = tl.maximum(row, column) * BLOCK < n
    if TRIL:
        seen &= row <= column
    if seen:
        a = _products(q + sample * q0, k + sample * k0, i, j, n, q1, q2, k1, k2, BLOCK, D, DEPTH) * scale
    x += sample * x0 + i.to(tl.int64) * x1
    y += sample * y0 + j.to(tl.int64) * y1
    out += sample * H * T * T + i.to(tl.int64)[:, None] * T + j[None, :]
    inside = (i < T)[:, None] & (j < T)[None, :]
    for head in range(part * PART, tl.minimum(part * PART + PART, H)):
        start = tl.load(x + head * x2, mask=i < n, other=0.0).to(tl.float32)
        end = tl.load(y + head * y2, mask=j < n, other=0.0).to(tl.float32)
        s = tl.where(visible, a + start[:, None] + end[None, :], float("-inf"))
        tl.store(out + tl.cast(head, tl.int64) * T * T, s.to(out.dtype.element_ty), mask=inside)


@triton.jit
def efficient_global_pointer_rows_kernel(
    q, k, ey, top_y, lengths, tiles, cells, peak, sums, T, H, blocks, parts, scale,
    q0, q1, q2, k0, k1, k2,
    TRIL: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """peak[i] = max of a_ij and sums[i, h] = sum of e^(a_ij - peak[i]) ey[j, h] over the j of negative cells (i, j)."""
    pid = tl.program_id(0)
    part = pid % parts
    row = pid // parts % blocks
    sample = (pid // parts // blocks).to(tl.int64)
    n = tl.load(lengths + sample)
    q += sample * q0
    k += sample * k0
    i = row * BLOCK + tl.arange(0, BLOCK)
    h = part * HEADS + tl.arange(0, HEADS)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK, HEADS], tl.float32)
    first, last = _others(row, n, BLOCK, TRIL, False)
    for column in range(first, last):
        j = column * BLOCK + tl.arange(0, BLOCK)
        a = _products(q, k, i, j, n, q1, q2, k1, k2, BLOCK, D, DEPTH) * scale
        a = _negatives(a, i[:, None], j[None, :], n, tiles, cells, (sample * blocks + row) * blocks + column, TRIL)
        best_end = tl.load(top_y + sample * T + j, mask=j < n, other=0.0)
        a = tl.where(best_end[None, :] == float("-inf"), float("-inf"), a)
        new = tl.maximum(top, tl.max(a, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        at = ey + (sample * T + j)[:, None] * H + h[None, :]
        weights = tl.load(at, mask=(j < n)[:, None] & (h < H)[None, :], other=0.0)
        total *= tl.exp(top - shift)[:, None]
        total = tl.dot(tl.exp(a - shift[:, None]), weights, total, input_precision=_PRECISE)
        top = new
    inside = (i < T)[:, None] & (h < H)[None, :]
    tl.store(sums + (sample * T + i)[:, None] * H + h[None, :], total, mask=inside)
    if part == 0:
        tl.store(peak + sample * T + i, top, mask=i < T)


@triton.jit
def _exponentials(
    own, other, t, u, peak, top_y, sample, n, tiles, cells, T, block, other_block, blocks, scale,
    own_t, own_d, other_t, other_d,
    COLUMNS: tl.constexpr, TRIL: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """P[t, u] = e^(a_tu - peak[t]), or with ``COLUMNS`` e^(a_ut - peak[u]), 0 where the cell is not negative."""
    a = _products(own, other, t, u, n, own_t, own_d, other_t, other_d, BLOCK, D, DEPTH) * scale
    if COLUMNS:
        start, end = u, t
        tile = (sample * blocks + other_block) * blocks + block
    else:
        start, end = t, u
        tile = (sample * blocks + block) * blocks + other_block
    shift = tl.load(peak + sample * T + start, mask=start < n, other=0.0)
    best_end = tl.load(top_y + sample * T + end, mask=end < n, other=0.0)
    if COLUMNS:
        start, end, shift, best_end = start[None, :], end[:, None], shift[None, :], best_end[:, None]
    else:
        start, end, shift, best_end = start[:, None], end[None, :], shift[:, None], best_end[None, :]
    a = _negatives(a - shift, start, end, n, tiles, cells, tile, TRIL)
    return tl.exp(tl.where(best_end == float("-inf"), float("-inf"), a))


@triton.jit
def efficient_global_pointer_columns_kernel(
    q, k, ex, peak, top_y, lengths, tiles, cells, sums, T, H, blocks, parts, scale,
    q0, q1, q2, k0, k1, k2,
    TRIL: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """sums[j, h] = sum over i of P[i, j] ex[i, h]."""
    pid = tl.program_id(0)
    part = pid % parts
    column = pid // parts % blocks
    sample = (pid // parts // blocks).to(tl.int64)
    n = tl.load(lengths + sample)
    q += sample * q0
    k += sample * k0
    j = column * BLOCK + tl.arange(0, BLOCK)
    h = part * HEADS + tl.arange(0, HEADS)
    total = tl.zeros([BLOCK, HEADS], tl.float32)
    first, last = _others(column, n, BLOCK, TRIL, True)
    for row in range(first, last):
        i = row * BLOCK + tl.arange(0, BLOCK)
        P = _exponentials(
            k, q, j, i, peak, top_y, sample, n, tiles, cells, T, column, row, blocks, scale,
            k1, k2, q1, q2, True, TRIL, BLOCK, D, DEPTH,
        )  # fmt: skip
        at = ex + (sample * T + i)[:, None] * H + h[None, :]
        weights = tl.load(at, mask=(i < n)[:, None] & (h < H)[None, :], other=0.0)
        total = tl.dot(P, weights, total, input_precision=_PRECISE)
    inside = (j < T)[:, None] & (h < H)[None, :]
    tl.store(sums + (sample * T + j)[:, None] * H + h[None, :], total, mask=inside)


@triton.jit
def efficient_global_pointer_gradient_kernel(
    own, other, own_weights, other_weights, peak, top_y, lengths, tiles, cells, out, T, H, blocks, parts, scale,
    own0, own1, own2, other0, other1, other2,
    COLUMNS: tl.constexpr, TRIL: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr,
    HEADS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over u of da[t, u] other[u], where da = P * (own_weights @ other_weights^T).

    ``own`` is q and its weights are ex, or k and ey with ``COLUMNS``; ``out`` `[B, T, D]`.
    """
    pid = tl.program_id(0)
    part = pid % parts
    block = pid // parts % blocks
    sample = (pid // parts // blocks).to(tl.int64)
    n = tl.load(lengths + sample)
    own += sample * own0
    other += sample * other0
    t = block * BLOCK + tl.arange(0, BLOCK)
    d = part * PART + tl.arange(0, PART).to(tl.int64)
    gradient = tl.zeros([BLOCK, PART], tl.float32)
    first, last = _others(block, n, BLOCK, TRIL, COLUMNS)
    for other_block in range(first, last):
        u = other_block * BLOCK + tl.arange(0, BLOCK)
        weights = tl.zeros([BLOCK, BLOCK], tl.float32)
        for head in range(0, H, HEADS):
            h = head + tl.arange(0, HEADS)
            at = own_weights + (sample * T + t)[:, None] * H + h[None, :]
            w = tl.load(at, mask=(t < n)[:, None] & (h < H)[None, :], other=0.0)
            at = other_weights + (sample * T + u)[None, :] * H + h[:, None]
            v = tl.load(at, mask=(u < n)[None, :] & (h < H)[:, None], other=0.0)
            weights = tl.dot(w, v, weights, input_precision=_PRECISE)
        P = _exponentials(
            own, other, t, u, peak, top_y, sample, n, tiles, cells, T, block, other_block, blocks, scale,
            own1, own2, other1, other2, COLUMNS, TRIL, BLOCK, D, DEPTH,
        )  # fmt: skip
        at = other + u.to(tl.int64)[:, None] * other1 + d[None, :] * other2
        features = tl.load(at, mask=(u < n)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        gradient = tl.dot(P * weights, features, gradient, input_precision=_PRECISE)
    at = out + (sample * T + t)[:, None] * D + d[None, :]
    tl.store(at, gradient, mask=(t < T)[:, None] & (d < D)[None, :])


# Not specialised on ``write``: both passes must be one binary, so that they find the same cells.
@triton.jit(do_not_specialize=["write"])
def efficient_global_pointer_candidates_kernel(
    q, k, top_x, top_y, lengths, counts, offsets, ends, products, like, write, threshold, T, blocks, scale,
    q0, q1, q2, k0, k1, k2,
    TRIL: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The cells whose bound a_ij + top_x[i] + top_y[j], rounded as ``like``, is not at or under the threshold.

    Counts them in each row `[B, T]` or, with ``write``, writes j and a_ij from ``offsets``.
    """
    pid = tl.program_id(0)
    row = pid % blocks
    sample = (pid // blocks).to(tl.int64)
    n = tl.load(lengths + sample)
    q += sample * q0
    k += sample * k0
    i = row * BLOCK + tl.arange(0, BLOCK)
    counts += sample * T + i
    best_start = tl.load(top_x + sample * T + i, mask=i < n, other=0.0)
    found = tl.zeros([BLOCK], tl.int32)
    place = tl.zeros([BLOCK], tl.int64)
    first, last = _others(row, n, BLOCK, TRIL, False)
    if write != 0:
        place = tl.load(offsets + sample * T + i, mask=i < T, other=0)
        if tl.sum(tl.load(counts, mask=i < T, other=0)) == 0:
            last = first
    for column in range(first, last):
        j = column * BLOCK + tl.arange(0, BLOCK)
        a = _products(q, k, i, j, n, q1, q2, k1, k2, BLOCK, D, DEPTH) * scale
        best_end = tl.load(top_y + sample * T + j, mask=j < n, other=0.0)
        bound = (a + best_start[:, None] + best_end[None, :]).to(like.dtype.element_ty).to(tl.float32)
        # Not "above": a head that is NaN hides no other.
        one = (_visible(i[:, None], j[None, :], n, TRIL) & ((bound <= threshold) == 0)).to(tl.int32)
        if write != 0:
            at = (place + found)[:, None] + tl.cumsum(one, 1) - one
            tl.store(ends + at, tl.broadcast_to(j[None, :], [BLOCK, BLOCK]), mask=one != 0)
            tl.store(products + at, a, mask=one != 0)
        found += tl.sum(one, 1)
    if write == 0:
        tl.store(counts, found, mask=i < T)


@triton.jit(do_not_specialize=["write"])
def efficient_global_pointer_spans_kernel(
    x, y, candidates, ends, products, counts, offsets, spans, scores, write, threshold, T, H, parts,
    HEADS: tl.constexpr,
):  # fmt: skip
    """Of one start's candidates, counts those above the threshold `[B, H, T]` or, with ``write``, writes them."""
    pid = tl.program_id(0)
    part = pid % parts
    token = (pid // parts).to(tl.int64)
    sample = token // T
    i = token % T
    h = part * HEADS + tl.arange(0, HEADS)
    start = tl.load(x + token * H + h, mask=h < H, other=0.0)
    row = (sample * H + h) * T + i
    found = tl.zeros([HEADS], tl.int32)
    place = tl.zeros([HEADS], tl.int64)
    if write != 0:
        place = tl.load(offsets + row, mask=h < H, other=0)
    for c in range(tl.load(candidates + token), tl.load(candidates + token + 1)):
        j = tl.load(ends + c).to(tl.int64)
        end = tl.load(y + (sample * T + j) * H + h, mask=h < H, other=0.0)
        s = (tl.load(products + c) + start + end).to(scores.dtype.element_ty)
        above = (s.to(tl.float32) > threshold) & (h < H)
        if write != 0:
            at = place + found
            tl.store(scores + at, s, mask=above)
            tl.store(spans + 4 * at, sample, mask=above)
            tl.store(spans + 4 * at + 1, h.to(tl.int64), mask=above)
            tl.store(spans + 4 * at + 2, i, mask=above)
            tl.store(spans + 4 * at + 3, j, mask=above)
        found += above.to(tl.int32)
    if write == 0:
        tl.store(counts + row, found, mask=h < H)


def efficient_global_pointer_scores(q, k, start_bias, end_bias, lengths, tril, scale, block=BLOCK):
    check_lengths("efficient_global_pointer_scores", lengths, q.shape[1])
    B, T, H = start_bias.shape
    D = q.shape[2]
    out = q.new_empty(B, H, T, T)
    if out.numel():
        blocks, part = triton.cdiv(T, block), 16
        parts = triton.cdiv(H, part)
        efficient_global_pointer_scores_kernel[(B * blocks * blocks * parts,)](
            q, k, start_bias, end_bias, lengths_of(lengths, q), out, T, H, blocks, parts, scale,
            *q.stride(), *k.stride(), *start_bias.stride(), *end_bias.stride(),
            TRIL=tril, BLOCK=block, D=D, DEPTH=features_at_once(D, q.dtype), PART=part, **LAUNCH,
        )  # fmt: skip
    return out


def efficient_global_pointer_loss(
    q, k, start_bias, end_bias, spans, lengths, tril, scale, gradients, block=BLOCK
):
    """(loss, dq, dk, dstart_bias, dend_bias), float32, by the reference's factorised sum.

    P is never stored, and shifted by the maximum of its row, which a program finds on the way.
    """
    B, T, H = start_bias.shape
    D = q.shape[2]
    op = "efficient_global_pointer_loss"
    check_lengths(op, lengths, T)
    check_spans(op, spans, (B, H, T), lengths, tril)
    loss = q.new_zeros((), dtype=torch.float32)
    tensors = q, k, start_bias, end_bias
    if B * T * H == 0:
        return loss, *(z.new_zeros(z.shape if gradients else 0, dtype=torch.float32) for z in tensors)
    padded = padding(lengths, T)
    x, y = (clear(z.float(), padded, -torch.inf).contiguous() for z in (start_bias, end_bias))
    batch, head, start, end = spans.unbind(1)
    key, cell_of_span = ((batch * T + start) * T + end).unique(return_inverse=True)
    positive = torch.zeros(len(key), H, dtype=torch.bool, device=q.device)
    positive[cell_of_span, head] = True  # a repeated span sets the same bit again
    batch, start, end = key // (T * T), key // T % T, key % T
    tiles, cells = tiles_of(batch, start, end, B, T, block)
    blocks, heads = triton.cdiv(T, block), at_once(H, HEADS)
    parts = triton.cdiv(H, heads)
    constants = {"TRIL": tril, "BLOCK": block, "D": D, "DEPTH": features_at_once(D, q.dtype), "HEADS": heads} | LAUNCH
    sizes = T, H, blocks, parts, scale
    known = lengths_of(lengths, q), tiles, cells

    top_y, peak_y = y.amax(2), reference._peak(y, 1)
    ey = (y - peak_y).exp_()
    peak, sums = x.new_empty(B, T, 1), torch.empty_like(x)
    efficient_global_pointer_rows_kernel[(B * blocks * parts,)](
        q, k, ey, top_y, *known, peak, sums, *sizes, *q.stride(), *k.stride(), **constants
    )
    ex = x + peak
    peak_x = reference._peak(ex, 1)
    possible = (ex.amax(1) > -torch.inf) & (y.amax(1) > -torch.inf)
    ex.sub_(peak_x).exp_()
    dx = sums.mul_(ex)
    Z = dx.sum(1)
    shift = (peak_x + peak_y)[:, 0]
    # Products below the smallest normal number are lost, as in the reference.
    limits = torch.finfo(torch.float32)
    small = Z < T * T * limits.tiny / limits.eps
    log_Z = Z.log().add_(shift).masked_fill_(small, -torch.inf)
    faint = q, k, x, y, key, padded, tril, scale, small & possible
    for b, some, s, _, _ in _faint(*faint):
        log_Z[b, some] = s.flatten(1).logsumexp(1)

    q_at, k_at = q[batch, start].float(), k[batch, end].float()
    at = (q_at * k_at).sum(1, keepdim=True) * scale + x[batch, start] + y[batch, end]
    negatives = at.masked_fill(positive, -torch.inf)
    minus = (-at).masked_fill_(~positive | (at == -torch.inf), -torch.inf)
    log_neg = log_one_plus(torch.logaddexp(log_Z, grouped_logsumexp(negatives, batch, B)))
    log_pos = log_one_plus(grouped_logsumexp(minus, batch, B))
    loss += (log_neg.sum() + log_pos.sum()) / B
    if not gradients:
        return loss, *(z.new_zeros(0, dtype=torch.float32) for z in tensors)

    w = (shift - log_neg).exp_().masked_fill_(small, 0)[:, None]
    ex.mul_(w)
    dx.mul_(w)
    dy = torch.empty_like(y)
    efficient_global_pointer_columns_kernel[(B * blocks * parts,)](
        q, k, ex, peak, top_y, *known, dy, *sizes, *q.stride(), *k.stride(), **constants
    )
    dy.mul_(ey)
    dq, dk = (x.new_empty(B, T, D) for _ in "qk")
    part = at_once(D)
    parts = triton.cdiv(D, part)
    sizes = T, H, blocks, parts, scale
    for columns, own, other, weights, out in ((False, q, k, (ex, ey), dq), (True, k, q, (ey, ex), dk)):
        if D:
            efficient_global_pointer_gradient_kernel[(B * blocks * parts,)](
                own, other, *weights, peak, top_y, *known, out, *sizes, *own.stride(), *other.stride(),
                COLUMNS=columns, PART=part, **constants | {"HEADS": min(heads, 32)},
            )  # fmt: skip
    for b, some, s, q_b, k_b in _faint(*faint):
        s = s.sub_(log_neg[b, some, None, None]).exp_()
        da = s.sum(0)
        dq[b] += da @ k_b
        dk[b] += da.T @ q_b
        dx[b, :, some] += s.sum(2).T
        dy[b, :, some] += s.sum(1).T
    ds = (negatives - log_neg[batch]).exp_() - (minus - log_pos[batch]).exp_()
    da = ds.sum(1, keepdim=True)
    starts, ends = batch * T + start, batch * T + end
    for out, index, rows in ((dq, starts, da * k_at), (dk, ends, da * q_at), (dx, starts, ds), (dy, ends, ds)):
        add_rows(out.view(B * T, -1), index, rows)
    return loss, dq.mul_(scale / B), dk.mul_(scale / B), dx.div_(B), dy.div_(B)


def _faint(q, k, x, y, key, padded, tril, scale, faint):
    """(sample, heads, their scores, q, k) by the reference's direct computation, for the heads marked `[B, H]`."""
    if not faint.any():
        return
    T = q.shape[1]
    for b in faint.any(1).nonzero().flatten().tolist():
        one = slice(b, b + 1)
        q_b, k_b = (clear(z[one].float(), None if padded is None else padded[one]) for z in (q, k))
        dead_x, dead_y = ((z[one].amax(2) == -torch.inf) for z in (x, y))
        hidden = ~visible_cells(T, None, tril, q.device) | dead_x[:, :, None] | dead_y[:, None]
        cells = key[key // (T * T) == b] - b * T * T
        for _, heads, s in reference._faint(q_b, k_b, x[one], y[one], hidden, cells, scale, faint[one]):
            yield b, heads, s, q_b[0], k_b[0]


def efficient_global_pointer_spans(
    q, k, start_bias, end_bias, lengths, tril, scale, threshold, block=BLOCK
):
    """Only cells that some head's start and some head's end could lift above the threshold are looked at by head.

    Two kernels of two passes each, one to count and one to write: candidates `[B, T]` in order of j, then spans.
    """
    check_lengths("efficient_global_pointer_spans", lengths, q.shape[1])
    threshold = torch.tensor(threshold, dtype=q.dtype).item()  # as torch compares
    B, T, H = start_bias.shape
    D = q.shape[2]
    spans, scores = q.new_empty(0, 4, dtype=torch.int64), q.new_empty(0)
    if B * T * H == 0:
        return spans, scores
    x, y = (z.float().contiguous() for z in (start_bias, end_bias))
    top_x, top_y = x.amax(2), y.amax(2)
    lengths = lengths_of(lengths, q)
    blocks, heads = triton.cdiv(T, block), at_once(H, HEADS)
    parts = triton.cdiv(H, heads)
    ends, products = q.new_empty(0, dtype=torch.int32), x.new_empty(0)

    def find(counts, offsets, write):
        efficient_global_pointer_candidates_kernel[(B * blocks,)](
            q, k, top_x, top_y, lengths, counts, offsets, ends, products, scores, write, threshold, T, blocks, scale,
            *q.stride(), *k.stride(),
            TRIL=tril, BLOCK=block, D=D, DEPTH=features_at_once(D, q.dtype), **LAUNCH,
        )  # fmt: skip

    def look(counts, offsets, write):
        efficient_global_pointer_spans_kernel[(B * T * parts,)](
            x, y, candidates, ends, products, counts, offsets, spans, scores, write, threshold, T, H, parts,
            HEADS=heads, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip

    counts = q.new_empty(B * T, dtype=torch.int32)
    find(counts, spans, 0)
    candidates, count = offsets_of(counts)
    if count == 0:
        return spans, scores
    ends, products = ends.new_empty(count), products.new_empty(count)
    find(counts, candidates, 1)
    counts = q.new_empty(B * H * T, dtype=torch.int32)
    look(counts, spans, 0)
    offsets, count = offsets_of(counts)
    spans, scores = spans.new_empty(count, 4), scores.new_empty(count)
    if count:
        look(counts, offsets, 1)
    return spans, scores
