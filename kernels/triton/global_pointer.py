"""GlobalPointer in Triton: scores, loss and decoding, tile by tile; no `[B, H, T, T]` but the scores themselves."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from supy.reference._masks import add_rows, check_lengths, check_spans, grouped_logsumexp, log_one_plus

# How exponentials are multiplied, for sums and gradients: as three products in tf32, which are off by 1e-7, no more
# than float32's own sums. One in bfloat16 is off by 1e-3, and float16 has no room for the exponentials of a long text.
# Scores stay "ieee": they are compared with a threshold, and their exponentials magnify what they are off by.
_PRECISE: tl.constexpr = tl.constexpr("tf32x3")

BLOCK = 64  # starts and ends of a tile
# Without fusion a score is rounded as in the reference, product by product.
LAUNCH = {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": False}


@triton.jit
def _add_products(total, x, y, x_d, y_d, rows_inside, columns_inside, first, D: tl.constexpr, DEPTH: tl.constexpr):
    d = first + tl.arange(0, DEPTH).to(tl.int64)
    a = tl.load(x + d[None, :] * x_d, mask=rows_inside[:, None] & (d < D)[None, :], other=0.0)
    b = tl.load(y + d[:, None] * y_d, mask=columns_inside[None, :] & (d < D)[:, None], other=0.0)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _products(
    x, y, rows, columns, n, x_t, x_d, y_t, y_d,
    BLOCK: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """x[rows] . y[columns], `[BLOCK, BLOCK]`, from rows of tokens below n; what stands at the others is not read."""
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    x += rows.to(tl.int64)[:, None] * x_t
    y += columns.to(tl.int64)[None, :] * y_t
    # The innermost loop is pipelined: over tiles where that fits into shared memory, else over features.
    if D <= 64:
        for first in tl.static_range(0, D, DEPTH):
            total = _add_products(total, x, y, x_d, y_d, rows < n, columns < n, first, D, DEPTH)
    else:
        for first in range(0, D, DEPTH):
            total = _add_products(total, x, y, x_d, y_d, rows < n, columns < n, first, D, DEPTH)
    return total


@triton.jit
def _visible(start, end, n, TRIL: tl.constexpr):
    visible = (start < n) & (end < n)
    if TRIL:
        visible &= start <= end
    return visible


@triton.jit
def _negatives(s, start, end, n, tiles, cells, tile, TRIL: tl.constexpr):
    """The scores of a tile with -inf on hidden and on positive cells: see `tiles_of`."""
    s = tl.where(_visible(start, end, n, TRIL), s, float("-inf"))
    cell = tl.load(tiles + tile)
    last = tl.load(tiles + tile + 1)
    if cell < last:  # a loop directly inside the loop over tiles would keep that from being pipelined
        for c in range(cell, last):
            positive = (start == tl.load(cells + 2 * c)) & (end == tl.load(cells + 2 * c + 1))
            s = tl.where(positive, float("-inf"), s)
    return s


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
        s = _products(q, k, i, j, n, q1, q3, k1, k3, BLOCK, D, DEPTH) * scale
        s = tl.where(_visible(i[:, None], j[None, :], n, TRIL), s, float("-inf"))
    out += group * T * T + i.to(tl.int64)[:, None] * T + j[None, :]
    tl.store(out, s.to(out.dtype.element_ty), mask=(i < T)[:, None] & (j < T)[None, :])


@triton.jit
def global_pointer_rows_kernel(
    q, k, lengths, tiles, cells, peak, total, T, H, blocks, scale,
    q0, q1, q2, q3, k0, k1, k2, k3,
    TRIL: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Of the negative scores of each start: their maximum, and the sum of their exponentials relative to it."""
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
    sums = tl.zeros([BLOCK], tl.float32)
    first, last = _others(row, n, BLOCK, TRIL, False)
    for column in range(first, last):
        j = column * BLOCK + tl.arange(0, BLOCK)
        s = _products(q, k, i, j, n, q1, q3, k1, k3, BLOCK, D, DEPTH) * scale
        s = _negatives(s, i[:, None], j[None, :], n, tiles, cells, (group * blocks + row) * blocks + column, TRIL)
        new = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        sums = sums * tl.exp(top - shift) + tl.sum(tl.exp(s - shift[:, None]), 1)
        top = new
    tl.store(peak + group * T + i, top, mask=i < T)
    tl.store(total + group * T + i, sums, mask=i < T)


@triton.jit
def global_pointer_gradient_kernel(
    own, other, lengths, tiles, cells, log_negative, out, T, H, blocks, parts, scale,
    own0, own1, own2, own3, other0, other1, other2, other3,
    COLUMNS: tl.constexpr, TRIL: tl.constexpr,
    BLOCK: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """out[t] = sum of e^(s - log_negative) other[u] over the negative cells (t, u); ``COLUMNS``: (u, t).

    ``own`` is q, or k with ``COLUMNS``; ``out`` `[B, T, H, D]`, of which a program writes ``PART`` features.
    """
    pid = tl.program_id(0)
    part = pid % parts
    block = pid // parts % blocks
    group = (pid // parts // blocks).to(tl.int64)
    sample = group // H
    head = group % H
    n = tl.load(lengths + sample)
    shift = tl.load(log_negative + group)
    own += sample * own0 + head * own2
    other += sample * other0 + head * other2
    t = block * BLOCK + tl.arange(0, BLOCK)
    d = part * PART + tl.arange(0, PART).to(tl.int64)
    gradient = tl.zeros([BLOCK, PART], tl.float32)
    first, last = _others(block, n, BLOCK, TRIL, COLUMNS)
    for other_block in range(first, last):
        u = other_block * BLOCK + tl.arange(0, BLOCK)
        s = _products(own, other, t, u, n, own1, own3, other1, other3, BLOCK, D, DEPTH) * scale
        if COLUMNS:
            start, end = u[None, :], t[:, None]
            tile = (group * blocks + other_block) * blocks + block
        else:
            start, end = t[:, None], u[None, :]
            tile = (group * blocks + block) * blocks + other_block
        ds = tl.exp(_negatives(s, start, end, n, tiles, cells, tile, TRIL) - shift)
        at = other + u.to(tl.int64)[:, None] * other1 + d[None, :] * other3
        features = tl.load(at, mask=(u < n)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        gradient = tl.dot(ds, features, gradient, input_precision=_PRECISE)
    at = out + ((sample * T + t)[:, None] * H + head) * D + d[None, :]
    tl.store(at, gradient, mask=(t < T)[:, None] & (d < D)[None, :])


# Not specialised on ``write``: both passes must be one binary, so that they find the same cells.
@triton.jit(do_not_specialize=["write"])
def global_pointer_spans_kernel(
    q, k, lengths, counts, offsets, spans, scores, write, threshold, T, H, blocks, scale,
    q0, q1, q2, q3, k0, k1, k2, k3,
    TRIL: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Counts the cells above the threshold in each row `[B, H, T]` or, with ``write``, writes them from ``offsets``."""
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
    found = tl.zeros([BLOCK], tl.int32)
    place = tl.zeros([BLOCK], tl.int64)
    first, last = _others(row, n, BLOCK, TRIL, False)
    if write != 0:
        place = tl.load(offsets + group * T + i, mask=i < T, other=0)
        if tl.sum(tl.load(counts, mask=i < T, other=0)) == 0:
            last = first
    for column in range(first, last):
        j = column * BLOCK + tl.arange(0, BLOCK)
        s = _products(q, k, i, j, n, q1, q3, k1, k3, BLOCK, D, DEPTH) * scale
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


def features_at_once(D, dtype):
    """The same for the features of a score; more of float32 do not fit into the registers."""
    return at_once(D, 16 if dtype == torch.float32 else 64)


def tiles_of(group, start, end, groups, tokens, block):
    """The distinct positive cells by tile, so that a program finds those of its own.

    ``tiles`` int32 `[groups * n * n + 1]`, the first cell of each (group, block of starts, block of ends), and
    ``cells`` int32 `[C, 2]`, (start, end) in this order.
    """
    n = triton.cdiv(tokens, block)
    tile, order = ((group * n + start // block) * n + end // block).sort()
    numbers = torch.arange(groups * n * n + 1, device=start.device)
    return torch.searchsorted(tile, numbers, out_int32=True), torch.stack((start, end), 1)[order].int()


def offsets_of(counts):
    """Where each row begins and, last, how many there are in all, `[N + 1]`; and that number."""
    offsets = counts.new_zeros(len(counts) + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=offsets[1:])
    return offsets, int(offsets[-1])


def global_pointer_scores(q, k, lengths, tril, scale, block=BLOCK):
    check_lengths("global_pointer_scores", lengths, q.shape[1])
    B, T, H, D = q.shape
    out = q.new_empty(B, H, T, T)
    if out.numel():
        blocks = triton.cdiv(T, block)
        global_pointer_scores_kernel[(B * H * blocks * blocks,)](
            q, k, lengths_of(lengths, q), out, T, H, blocks, scale, *q.stride(), *k.stride(),
            TRIL=tril, BLOCK=block, D=D, DEPTH=features_at_once(D, q.dtype), **LAUNCH,
        )  # fmt: skip
    return out


def global_pointer_loss(q, k, spans, lengths, tril, scale, gradients, block=BLOCK):
    """(loss, dq, dk), float32; per head and sample, negatives tile by tile and the few positives one by one."""
    B, T, H, D = q.shape
    op = "global_pointer_loss"
    check_lengths(op, lengths, T)
    check_spans(op, spans, (B, H, T), lengths, tril)
    loss = q.new_zeros((), dtype=torch.float32)
    dq, dk = (q.new_zeros((B, T, H, D) if gradients else 0, dtype=torch.float32) for _ in "qk")
    if B * H * T == 0:
        return loss, dq, dk
    lengths = lengths_of(lengths, q)
    batch, head, start, end = spans.unbind(1)
    key = (((batch * H + head) * T + start) * T + end).unique()
    group, start, end = key // (T * T), key // T % T, key % T
    batch, head = group // H, group % H
    tiles, cells = tiles_of(group, start, end, B * H, T, block)
    blocks = triton.cdiv(T, block)
    constants = {"TRIL": tril, "BLOCK": block, "D": D, "DEPTH": features_at_once(D, q.dtype)} | LAUNCH

    peak, total = (q.new_empty(B * H, T, dtype=torch.float32) for _ in range(2))
    global_pointer_rows_kernel[(B * H * blocks,)](
        q, k, lengths, tiles, cells, peak, total, T, H, blocks, scale, *q.stride(), *k.stride(), **constants
    )
    top = peak.amax(1, keepdim=True)
    top.masked_fill_(top == -torch.inf, 0)
    log_sum = total.mul_(peak.sub_(top).exp_()).sum(1).log() + top[:, 0]
    negative = log_one_plus(log_sum)
    q_at, k_at = q[batch, start, head].float(), k[batch, end, head].float()
    minus = (q_at * k_at).sum(1) * -scale
    minus.masked_fill_(minus == torch.inf, -torch.inf)
    positive = log_one_plus(grouped_logsumexp(minus, group, B * H))
    loss += (negative.sum() + positive.sum()) / B
    if not gradients or D == 0:
        return loss, dq, dk

    part = at_once(D)
    parts = triton.cdiv(D, part)
    for columns, own, other, out in ((False, q, k, dq), (True, k, q, dk)):
        global_pointer_gradient_kernel[(B * H * blocks * parts,)](
            own, other, lengths, tiles, cells, negative, out, T, H, blocks, parts, scale,
            *own.stride(), *other.stride(), COLUMNS=columns, PART=part, **constants,
        )  # fmt: skip
    ds = -(minus - positive[group]).exp()[:, None]
    add_rows(dq.view(-1, D), (batch * T + start) * H + head, ds * k_at)
    add_rows(dk.view(-1, D), (batch * T + end) * H + head, ds * q_at)
    return loss, dq.mul_(scale / B), dk.mul_(scale / B)


def global_pointer_spans(q, k, lengths, tril, scale, threshold, block=BLOCK):
    """Two passes, one to count and one to write: the rows come out in order, without a sort."""
    check_lengths("global_pointer_spans", lengths, q.shape[1])
    threshold = torch.tensor(threshold, dtype=q.dtype).item()  # as torch compares
    B, T, H, D = q.shape
    spans, scores = q.new_empty(0, 4, dtype=torch.int64), q.new_empty(0)
    if B * T * H == 0:
        return spans, scores
    counts = q.new_empty(B * H * T, dtype=torch.int32)
    blocks = triton.cdiv(T, block)

    def run(offsets, write):
        global_pointer_spans_kernel[(B * H * blocks,)](
            q, k, lengths_of(lengths, q), counts, offsets, spans, scores, write, threshold, T, H, blocks, scale,
            *q.stride(), *k.stride(),
            TRIL=tril, BLOCK=block, D=D, DEPTH=features_at_once(D, q.dtype), **LAUNCH,
        )  # fmt: skip

    run(spans, 0)
    offsets, count = offsets_of(counts)
    spans, scores = spans.new_empty(count, 4), scores.new_empty(count)
    if count:
        run(offsets, 1)
    return spans, scores
