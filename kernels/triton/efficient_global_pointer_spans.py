"""The spans of Efficient GlobalPointer above a threshold, in Triton: post 8877."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from supy.kernels.efficient_global_pointer import _biases
from supy.kernels.global_pointer import (
    BLOCK,
    DEPTH,
    WIDE,
    _others,
    _products,
    _rows,
    _visible,
    at_once,
    ends_of,
    lengths_of,
)
from supy.reference._masks import check_lengths

HEADS = 16  # heads of a program


# Not specialised on ``write``: both passes must be one binary, so that they find the same cells.
@triton.jit(do_not_specialize=["write"])
def efficient_global_pointer_spans_kernel(
    q, k, x, y, lengths, counts, ends, spans, scores, write, threshold, T, H, blocks, parts, scale,
    q0, q1, q2, k0, k1, k2, x0, x1, x2, y0, y1, y2,
    TRIL: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Counts the cells above the threshold in each row `[B, H, T]` or, with ``write``, writes them up to ``ends``.

    Heads are looked at one by one only in tiles where the best start and the best end of some cell could lift it.
    """
    pid = tl.program_id(0)
    part = pid % parts
    row = pid // parts % blocks
    sample = (pid // parts // blocks).to(tl.int64)
    n = tl.load(lengths + sample)
    q += sample * q0
    k += sample * k0
    x += sample * x0
    y += sample * y0
    i = row * BLOCK + tl.arange(0, BLOCK)
    h = part * HEADS + tl.arange(0, HEADS)
    best_start = tl.max(_biases(x, i, h, n, H, x1, x2), 1)
    at_counts = counts + (sample * H + h[None, :]) * T + i[:, None]
    inside = (h < H)[None, :] & (i < T)[:, None]
    found = tl.zeros([BLOCK, HEADS], tl.int64)
    first, last = _others(row, n, BLOCK, TRIL, False)
    if write != 0:
        count = tl.load(at_counts, mask=inside, other=0)
        # What is found from here on has its place.
        found = tl.load(ends + (sample * H + h[None, :]) * T + i[:, None], mask=inside, other=0) - count
        if tl.sum(tl.sum(count, 1), 0) == 0:
            last = first
    kept = _rows(q, i, n, q1, q2, 0, D, DEPTH)
    for column in range(first, last):
        j = column * BLOCK + tl.arange(0, BLOCK)
        a = _products(kept, q, k, i, j, n, q1, q2, k1, k2, BLOCK, D, DEPTH) * scale
        best_end = tl.max(_biases(y, j, h, n, H, y1, y2), 1)
        visible = _visible(i[:, None], j[None, :], n, TRIL)
        # Rounded as a score is, which never lies above then.
        bound = (a + best_start[:, None] + best_end[None, :]).to(scores.dtype.element_ty).to(tl.float32)
        # Not "above": a head that is NaN hides no other.
        if tl.sum(tl.sum((visible & ((bound <= threshold) == 0)).to(tl.int32), 1), 0) > 0:
            for head in range(part * HEADS, tl.minimum(part * HEADS + HEADS, H)):
                start = tl.load(x + i.to(tl.int64) * x1 + head * x2, mask=i < n, other=0.0).to(tl.float32)
                end = tl.load(y + j.to(tl.int64) * y1 + head * y2, mask=j < n, other=0.0).to(tl.float32)
                s = (a + start[:, None] + end[None, :]).to(scores.dtype.element_ty)
                above = visible & (s.to(tl.float32) > threshold)
                one = above.to(tl.int32)
                of_row = tl.sum(one, 1)
                own = h[None, :] == head
                if write != 0:
                    if tl.sum(of_row, 0) > 0:
                        place = tl.sum(tl.where(own, found, 0), 1)
                        at = place[:, None] + tl.cumsum(one, 1) - one
                        tl.store(scores + at, s, mask=above)
                        tl.store(spans + 4 * at, sample, mask=above)
                        tl.store(spans + 4 * at + 1, tl.cast(head, tl.int64), mask=above)
                        to = tl.broadcast_to(i[:, None], [BLOCK, BLOCK]).to(tl.int64)
                        tl.store(spans + 4 * at + 2, to, mask=above)
                        to = tl.broadcast_to(j[None, :], [BLOCK, BLOCK]).to(tl.int64)
                        tl.store(spans + 4 * at + 3, to, mask=above)
                found += tl.where(own, of_row[:, None], 0)
    if write == 0:
        tl.store(at_counts, found, mask=inside)


def efficient_global_pointer_spans(
    q, k, start_bias, end_bias, lengths, tril, scale, threshold, block=BLOCK
):
    """Two passes, one to count and one to write: the rows come out in order, without a sort."""
    check_lengths("efficient_global_pointer_spans", lengths, q.shape[1])
    threshold = torch.tensor(threshold, dtype=q.dtype).item()  # as torch compares
    B, T, H = start_bias.shape
    D = q.shape[2]
    spans, scores = q.new_empty(0, 4, dtype=torch.int64), q.new_empty(0)
    if B * T * H == 0:
        return spans, scores
    lengths = lengths_of(lengths, q)
    counts = q.new_empty(B * H * T, dtype=torch.int64)
    blocks, parts = triton.cdiv(T, block), triton.cdiv(H, HEADS)

    def run(ends, write):
        efficient_global_pointer_spans_kernel[(B * blocks * parts,)](
            q, k, start_bias, end_bias, lengths, counts, ends, spans, scores, write, threshold, T, H, blocks, parts,
            scale, *q.stride(), *k.stride(), *start_bias.stride(), *end_bias.stride(),
            TRIL=tril, BLOCK=block, D=D, DEPTH=at_once(D, DEPTH), HEADS=HEADS, **WIDE,
        )  # fmt: skip

    run(spans, 0)
    ends, count = ends_of(counts)
    if count:
        spans, scores = spans.new_empty(count, 4), scores.new_empty(count)
        run(ends, 1)
    return spans, scores
