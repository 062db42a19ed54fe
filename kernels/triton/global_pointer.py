"""GlobalPointer in Triton: scores, loss and decoding, tile by tile; no `[B, H, T, T]` but the scores themselves."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from supy.kernels._fetch import fetch
from supy.kernels._spans import (
    _add_exponentials,
    _at_cells,
    _log_one_plus,
    _place,
    _positive,
    prepare,
    refuse,
    workspace,
)
from supy.reference._masks import check_lengths

# float32 is multiplied as three products in tf32, which are off by 1e-7, no more than float32's own sums. One in
# bfloat16 is off by 1e-3, and float16 has no room for the exponentials of a long text.
_PRECISE: tl.constexpr = tl.constexpr("tf32x3")

BLOCK = 64  # starts and ends of a tile
DEPTH = 64  # features that a product takes at a time
# Without fusion a score is rounded as in the reference, product by product.
LAUNCH = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": False}
WIDE = LAUNCH | {"num_warps": 8}  # where four warps have too few registers


@triton.jit
def _rows(x, tokens, n, x_t, x_d, first, D: tl.constexpr, DEPTH: tl.constexpr):
    """Features from ``first`` of tokens below n, `[tokens, DEPTH]`; what stands at the others is not read."""
    d = first + tl.arange(0, DEPTH).to(tl.int64)
    at = x + tokens.to(tl.int64)[:, None] * x_t + d[None, :] * x_d
    return tl.load(at, mask=(tokens < n)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _products(
    kept, x, y, rows, columns, n, x_t, x_d, y_t, y_d,
    BLOCK: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """x[rows] . y[columns], `[BLOCK, BLOCK]`; ``kept``: the first features of x[rows], read once for all tiles."""
    total = tl.dot(kept, tl.trans(_rows(y, columns, n, y_t, y_d, 0, D, DEPTH)), input_precision=_PRECISE)
    for first in range(DEPTH, D, DEPTH):
        a = _rows(x, rows, n, x_t, x_d, first, D, DEPTH)
        b = _rows(y, columns, n, y_t, y_d, first, D, DEPTH)
        total = tl.dot(a, tl.trans(b), total, input_precision=_PRECISE)
    return total


@triton.jit
def _visible(start, end, n, TRIL: tl.constexpr):
    visible = (start < n) & (end < n)
    if TRIL:
        visible &= start <= end
    return visible


@triton.jit
def _others(own, n, BLOCK: tl.constexpr, TRIL: tl.constexpr, COLUMNS: tl.constexpr):
    """First and last + 1 of the blocks that block ``own`` of starts (``COLUMNS``: of ends) sees."""
    first = 0
    last = tl.cdiv(n, BLOCK)
    if TRIL:
        if COLUMNS:
            last = tl.minimum(last, own + 1)
        else:
            first = own
    # A block of nothing but padding sees none.
    return first, tl.where(own * BLOCK < n, last, first)


@triton.jit
def global_pointer_scores_kernel(
    q, k, lengths, out, T, H, blocks, scale,
    q0, q1, q2, q3, k0, k1, k2, k3,
    TRIL: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    column = pid % blocks
    row = pid // blocks % blocks
    group = (pid // blocks // blocks).to(tl.int64)
    sample = group // H
    head = group % H
    n = tl.load(lengths + sample)
    i = row * BLOCK + tl.arange(0, BLOCK)
    j = column * BLOCK + tl.arange(0, BLOCK)
    s = tl.full([BLOCK, BLOCK], float("-inf"), tl.float32)
    seen = tl.maximum(row, column) * BLOCK < n
    if TRIL:
        seen &= row <= column
    if seen:
        q += sample * q0 + head * q2
        k += sample * k0 + head * k2
        kept = _rows(q, i, n, q1, q3, 0, D, DEPTH)
        s = _products(kept, q, k, i, j, n, q1, q3, k1, k3, BLOCK, D, DEPTH) * scale
        s = tl.where(_visible(i[:, None], j[None, :], n, TRIL), s, float("-inf"))
    out += group * T * T + i.to(tl.int64)[:, None] * T + j[None, :]
    tl.store(out, s.to(out.dtype.element_ty), mask=(i < T)[:, None] & (j < T)[None, :])


@triton.jit
def global_pointer_rows_kernel(
    q, k, lengths, tiles, keys, tops, sums, T, H, blocks, scale,
    q0, q1, q2, q3, k0, k1, k2, k3,
    TRIL: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Of the negative scores of each block of starts: their maximum, and the sum of exponentials relative to it."""
    pid = tl.program_id(0)
    row = pid % blocks
    group = (pid // blocks).to(tl.int64)
    sample = group // H
    head = group % H
    n = tl.load(lengths + sample)
    q += sample * q0 + head * q2
    k += sample * k0 + head * k2
    i = row * BLOCK + tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    first, last = _others(row, n, BLOCK, TRIL, False)
    kept = _rows(q, i, n, q1, q3, 0, D, DEPTH)
    for column in range(first, last):
        j = column * BLOCK + tl.arange(0, BLOCK)
        s = _products(kept, q, k, i, j, n, q1, q3, k1, k3, BLOCK, D, DEPTH) * scale
        hidden = _visible(i[:, None], j[None, :], n, TRIL) == 0
        positive = _positive(tiles, keys, (group * blocks + row) * blocks + column, i[:, None], j[None, :], 1, BLOCK)
        s = tl.where(hidden | positive, float("-inf"), s)
        new = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(s - shift[:, None]), 1)
        top = new
    highest = tl.max(top, 0)
    tl.store(tops + pid, highest)
    tl.store(sums + pid, tl.sum(total * tl.exp(top - tl.where(highest == float("-inf"), 0.0, highest)), 0))


@triton.jit
def global_pointer_combine_kernel(
    q, k, tiles, keys, tops, sums, log_negative, log_positive, loss, H, blocks, scale, share,
    q0, q1, q2, q3, k0, k1, k2, k3,
    BLOCK: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """Of a head of a sample: log(1 + sum over negatives of e^s), log(1 + sum over positives of e^-s), their share."""
    group = tl.program_id(0).to(tl.int64)
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    for first in range(0, blocks, CELLS):
        row = first + tl.arange(0, CELLS)
        tops_here = tl.load(tops + group * blocks + row, mask=row < blocks, other=float("-inf"))
        new = tl.maximum(top, tl.max(tops_here, 0))
        shift = tl.where(new == float("-inf"), 0.0, new)
        part = tl.load(sums + group * blocks + row, mask=row < blocks, other=0.0) * tl.exp(tops_here - shift)
        total = total * tl.exp(top - shift) + tl.sum(part, 0)
        top = new
    negative = _log_one_plus(top, total)
    q += group // H * q0 + group % H * q2
    k += group // H * k0 + group % H * k2
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    begin = tl.load(tiles + group * blocks * blocks)
    end = tl.load(tiles + (group + 1) * blocks * blocks)
    for first in range(begin, end, CELLS):
        c = first + tl.arange(0, CELLS)
        key = tl.load(keys + c, mask=c < end, other=0)
        once = (c < end) & (tl.load(keys + c - 1, mask=(c < end) & (c > begin), other=-1) != key)
        i, j = _place(key, blocks, BLOCK)
        s = _at_cells(q, k, i, j, once, q1, q3, k1, k3, scale, D, DEPTH)
        top, total = _add_exponentials(top, total, tl.where(once & (s != float("-inf")), -s, float("-inf")))
    positive = _log_one_plus(top, total)
    tl.store(log_negative + group, negative)
    tl.store(log_positive + group, positive)
    tl.store(loss + group, (negative + positive) * share)


@triton.jit
def _gradient(
    own, other, lengths, tiles, keys, log_negative, log_positive, out, pid, T, H, blocks, parts, scale, share,
    own0, own1, own2, own3, other0, other1, other2, other3,
    COLUMNS: tl.constexpr, TRIL: tl.constexpr,
    BLOCK: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """out[t] = share * sum of ds_tu other[u] over the visible cells (t, u); ``COLUMNS``: (u, t)."""
    part = pid % parts
    block = pid // parts % blocks
    group = (pid // parts // blocks).to(tl.int64)
    sample = group // H
    head = group % H
    n = tl.load(lengths + sample)
    negative = tl.load(log_negative + group)
    all_positive = tl.load(log_positive + group)
    own += sample * own0 + head * own2
    other += sample * other0 + head * other2
    t = block * BLOCK + tl.arange(0, BLOCK)
    d = part * PART + tl.arange(0, PART).to(tl.int64)
    gradient = tl.zeros([BLOCK, PART], tl.float32)
    first, last = _others(block, n, BLOCK, TRIL, COLUMNS)
    kept = _rows(own, t, n, own1, own3, 0, D, DEPTH)
    for other_block in range(first, last):
        u = other_block * BLOCK + tl.arange(0, BLOCK)
        s = _products(kept, own, other, t, u, n, own1, own3, other1, other3, BLOCK, D, DEPTH) * scale
        if COLUMNS:
            start, end = u[None, :], t[:, None]
            tile = (group * blocks + other_block) * blocks + block
        else:
            start, end = t[:, None], u[None, :]
            tile = (group * blocks + block) * blocks + other_block
        s = tl.where(_visible(start, end, n, TRIL), s, float("-inf"))
        positive = _positive(tiles, keys, tile, start, end, 1, BLOCK)
        ds = tl.exp(tl.where(positive, float("-inf"), s - negative))
        down = tl.where(positive & (s != float("-inf")), -s - all_positive, float("-inf"))
        ds -= tl.exp(down)
        at = other + u.to(tl.int64)[:, None] * other1 + d[None, :] * other3
        features = tl.load(at, mask=(u < n)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        gradient = tl.dot(ds, features, gradient, input_precision=_PRECISE)
    at = out + ((sample * T + t)[:, None] * H + head) * D + d[None, :]
    tl.store(at, gradient * share, mask=(t < T)[:, None] & (d < D)[None, :])


@triton.jit
def global_pointer_gradient_kernel(
    q, k, lengths, tiles, keys, log_negative, log_positive, dq, dk, T, H, blocks, parts, programs, scale, share,
    q0, q1, q2, q3, k0, k1, k2, k3,
    TRIL: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """dq by the first half of the programs, dk by the second; `[B, T, H, D]`, of which one writes ``PART`` features."""
    pid = tl.program_id(0)
    if pid < programs:
        _gradient(
            q, k, lengths, tiles, keys, log_negative, log_positive, dq, pid, T, H, blocks, parts, scale, share,
            q0, q1, q2, q3, k0, k1, k2, k3, False, TRIL, BLOCK, D, DEPTH, PART,
        )  # fmt: skip
    else:
        _gradient(
            k, q, lengths, tiles, keys, log_negative, log_positive, dk, pid - programs, T, H, blocks, parts, scale,
            share, k0, k1, k2, k3, q0, q1, q2, q3, True, TRIL, BLOCK, D, DEPTH, PART,
        )  # fmt: skip


# Not specialised on ``write``: both passes must be one binary, so that they find the same cells.
@triton.jit(do_not_specialize=["write"])
def global_pointer_spans_kernel(
    q, k, lengths, counts, ends, spans, scores, write, threshold, T, H, blocks, scale,
    q0, q1, q2, q3, k0, k1, k2, k3,
    TRIL: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Counts the cells above the threshold in each row `[B, H, T]` or, with ``write``, writes them up to ``ends``."""
    pid = tl.program_id(0)
    row = pid % blocks
    group = (pid // blocks).to(tl.int64)
    sample = group // H
    head = group % H
    n = tl.load(lengths + sample)
    q += sample * q0 + head * q2
    k += sample * k0 + head * k2
    i = row * BLOCK + tl.arange(0, BLOCK)
    counts += group * T + i
    found = tl.zeros([BLOCK], tl.int64)
    place = tl.zeros([BLOCK], tl.int64)
    first, last = _others(row, n, BLOCK, TRIL, False)
    if write != 0:
        count = tl.load(counts, mask=i < T, other=0)
        place = tl.load(ends + group * T + i, mask=i < T, other=0) - count
        if tl.sum(count, 0) == 0:
            last = first
    kept = _rows(q, i, n, q1, q3, 0, D, DEPTH)
    for column in range(first, last):
        j = column * BLOCK + tl.arange(0, BLOCK)
        s = _products(kept, q, k, i, j, n, q1, q3, k1, k3, BLOCK, D, DEPTH) * scale
        s = s.to(scores.dtype.element_ty)
        above = _visible(i[:, None], j[None, :], n, TRIL) & (s.to(tl.float32) > threshold)
        one = above.to(tl.int32)
        if write != 0:
            at = (place + found)[:, None] + tl.cumsum(one, 1) - one
            tl.store(scores + at, s, mask=above)
            tl.store(spans + 4 * at, sample, mask=above)
            tl.store(spans + 4 * at + 1, head, mask=above)
            tl.store(spans + 4 * at + 2, tl.broadcast_to(i[:, None], [BLOCK, BLOCK]).to(tl.int64), mask=above)
            tl.store(spans + 4 * at + 3, tl.broadcast_to(j[None, :], [BLOCK, BLOCK]).to(tl.int64), mask=above)
        found += tl.sum(one, 1)
    if write == 0:
        tl.store(counts, found, mask=i < T)


def lengths_of(lengths, q):
    """int32 `[B]` in any case."""
    B, T = q.shape[:2]
    return torch.full((B,), T, dtype=torch.int32, device=q.device) if lengths is None else lengths.int().contiguous()


def at_once(size, limit=64):
    """How many a program takes at a time: a power of two, from 16, the least of a product, to the limit."""
    return min(limit, max(16, triton.next_power_of_2(size)))


def global_pointer_scores(q, k, lengths, tril, scale, block=BLOCK):
    check_lengths("global_pointer_scores", lengths, q.shape[1])
    B, T, H, D = q.shape
    out = q.new_empty(B, H, T, T)
    if out.numel():
        blocks = triton.cdiv(T, block)
        global_pointer_scores_kernel[(B * H * blocks * blocks,)](
            q, k, lengths_of(lengths, q), out, T, H, blocks, scale, *q.stride(), *k.stride(),
            TRIL=tril, BLOCK=block, D=D, DEPTH=at_once(D, DEPTH), **LAUNCH,
        )  # fmt: skip
    return out


def global_pointer_loss(q, k, spans, lengths, tril, scale, gradients, block=BLOCK):
    """(loss, dq, dk), float32; what the positive cells add is found on the way over the tiles."""
    B, T, H, D = q.shape
    dq, dk = (q.new_empty((B, T, H, D) if gradients else 0, dtype=torch.float32) for _ in "qk")
    arguments = "global_pointer_loss", spans, lengths, (B, H, T), tril
    if B * H * T == 0:
        refuse(*arguments)
        return q.new_zeros((), dtype=torch.float32), dq, dk
    known, tiles, keys = prepare(*arguments[1:], True, block)
    first_key = fetch(keys[:1])
    groups, blocks = B * H, triton.cdiv(T, block)
    tops, sums, negative, positive = workspace(q.device, groups * blocks, groups * blocks, groups, groups)
    loss = torch.empty(groups, dtype=torch.float32, device=q.device)
    strides = *q.stride(), *k.stride()
    depth = at_once(D, DEPTH)
    global_pointer_rows_kernel[(groups * blocks,)](
        q, k, known, tiles, keys, tops, sums, T, H, blocks, scale, *strides,
        TRIL=tril, BLOCK=block, D=D, DEPTH=depth, **LAUNCH,
    )  # fmt: skip
    global_pointer_combine_kernel[(groups,)](
        q, k, tiles, keys, tops, sums, negative, positive, loss, H, blocks, scale, 1 / B, *strides,
        BLOCK=block, D=D, DEPTH=at_once(D), CELLS=16, num_warps=1,
    )  # fmt: skip
    if gradients and D:
        part = at_once(D)
        parts = triton.cdiv(D, part)
        programs = groups * blocks * parts
        global_pointer_gradient_kernel[(2 * programs,)](
            q, k, known, tiles, keys, negative, positive, dq, dk, T, H, blocks, parts, programs, scale, scale / B,
            *strides, TRIL=tril, BLOCK=block, D=D, DEPTH=depth, PART=part, **LAUNCH,
        )  # fmt: skip
    loss = loss.sum()
    if first_key()[0] < 0:
        refuse(*arguments)
    return loss, dq, dk


def ends_of(counts):
    """Where each row of ``counts`` ends, and how many there are in all."""
    ends = counts.cumsum(0)
    return ends, int(ends[-1])


def global_pointer_spans(q, k, lengths, tril, scale, threshold, block=BLOCK):
    """Two passes, one to count and one to write: the rows come out in order, without a sort."""
    check_lengths("global_pointer_spans", lengths, q.shape[1])
    threshold = torch.tensor(threshold, dtype=q.dtype).item()  # as torch compares
    B, T, H, D = q.shape
    spans, scores = q.new_empty(0, 4, dtype=torch.int64), q.new_empty(0)
    if B * T * H == 0:
        return spans, scores
    lengths = lengths_of(lengths, q)
    counts = q.new_empty(B * H * T, dtype=torch.int64)
    blocks = triton.cdiv(T, block)

    def run(ends, write):
        global_pointer_spans_kernel[(B * H * blocks,)](
            q, k, lengths, counts, ends, spans, scores, write, threshold, T, H, blocks, scale,
            *q.stride(), *k.stride(),
            TRIL=tril, BLOCK=block, D=D, DEPTH=at_once(D, DEPTH), **WIDE,
        )  # fmt: skip

    run(spans, 0)
    ends, count = ends_of(counts)
    if count:
        spans, scores = spans.new_empty(count, 4), scores.new_empty(count)
        run(ends, 1)
    return spans, scores
