"""Multi-label cross-entropy in Triton, with dense targets or the indices of the positive classes.

One program sums a few thousand classes of a row, a second kernel adds the parts of a row in their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

CHUNK = 8192  # classes of one program


@triton.jit
def _terms(s, t):
    """Exponents and weights of (1 - t) e^s and t e^-s; -inf and 0 where a term contributes nothing.

    A target below 2^-64 counts as t e^44 at s + 44, so that neither it nor its product vanishes or overflows.
    """
    infinity = float("inf")
    t = tl.where(s == -infinity, 0.0, t)
    tiny = t < 5.421010862427522e-20
    up_weight = 1.0 - t
    down_weight = tl.where(tiny, t * 1.2851600114359308e19, t)
    up = tl.where(up_weight > 0, s, -infinity)
    down = tl.where(down_weight > 0, tl.where(tiny, -s - 44.0, -s), -infinity)
    return up, up_weight, down, down_weight


@triton.jit
def _add(top, total, exponent, weight):
    """Adds weight e^exponent to totals in units of e^top, lane by lane."""
    higher = tl.minimum(tl.maximum(top, exponent), 3.4028234663852886e38)
    return higher, total * tl.exp(top - higher) + weight * tl.exp(exponent - higher)


@triton.jit
def _log_one_plus(top, total):
    """log(1 + total e^top) for totals of parts along the first axis, in float64."""
    highest = tl.max(top, 0)
    total = tl.sum((total * tl.exp(top - highest)).to(tl.float64), 0)
    small = (highest == 0) & (total < 1e-8)  # where 1 + total would lose it
    highest = highest.to(tl.float64)
    return tl.where(small, total, highest + tl.log(total + tl.exp(-highest))).to(tl.float32)


@triton.jit
def _marked(indices, positives, ignore, classes, inside):
    """1 for the classes that are among the indices of the row, else 0."""
    t = tl.zeros(classes.shape, tl.float32)
    first, last = tl.min(classes, 0), tl.max(classes, 0)
    for start in range(0, positives, 64):
        place = start + tl.arange(0, 64)
        index = tl.load(indices + place, mask=place < positives, other=-1)
        here = (place < positives) & (index >= first) & (index <= last) & (index != ignore)
        if tl.sum(here.to(tl.int32), 0) > 0:
            for i in range(start, tl.minimum(start + 64, positives)):
                one = tl.load(indices + i)
                t = tl.where((classes == one) & (one != ignore) & inside, 1.0, t)
    return t


@triton.jit
def _outside(indices, positives, ignore, classes):
    """Whether an index is neither the ignored one nor a class."""
    found = 0
    for start in range(0, positives, 64):
        place = start + tl.arange(0, 64)
        index = tl.load(indices + place, mask=place < positives, other=ignore)
        wrong = (index != ignore) & ((index < 0) | (index >= classes))
        found += tl.sum(wrong.to(tl.int32), 0)
    return found


@triton.jit
def forward_kernel(
    scores, targets, parts,
    classes, positives, ignore, score_row, target_row, chunks,
    INDICES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    scores += row * score_row
    targets += row * target_row
    up_top, up_total = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    down_top, down_total = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    wrong = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, CHUNK, BLOCK):
        i = chunk.to(tl.int64) * CHUNK + start + tl.arange(0, BLOCK)
        inside = i < classes
        s = tl.load(scores + i, mask=inside, other=-float("inf")).to(tl.float32)
        if INDICES:
            t = _marked(targets, positives, ignore, i, inside)
        else:
            t = tl.load(targets + i, mask=inside, other=0).to(tl.float32)
            wrong |= ((t < 0) | (t > 1)).to(tl.int32)
        up, up_weight, down, down_weight = _terms(s, t)
        up_top, up_total = _add(up_top, up_total, up, up_weight)
        down_top, down_total = _add(down_top, down_total, down, down_weight)
    found = tl.sum(wrong, 0)
    if INDICES:
        if chunk == 0:
            found = _outside(targets, positives, ignore, classes)
    parts += (row * chunks + chunk) * 5
    top = tl.max(up_top, 0)
    tl.store(parts, top)
    tl.store(parts + 1, tl.sum(up_total * tl.exp(up_top - top), 0))
    top = tl.max(down_top, 0)
    tl.store(parts + 2, top)
    tl.store(parts + 3, tl.sum(down_total * tl.exp(down_top - top), 0))
    tl.store(parts + 4, found.to(tl.float32))


@triton.jit
def combine_kernel(parts, negative, positive, outside, chunks, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < chunks
    parts += (row * chunks + i) * 5
    for half in tl.static_range(2):
        top = tl.load(parts + 2 * half, mask=inside, other=0.0)
        total = tl.load(parts + 2 * half + 1, mask=inside, other=0.0)
        tl.store((positive if half else negative) + row, _log_one_plus(top, total))
    tl.store(outside + row, tl.sum(tl.load(parts + 4, mask=inside, other=0.0), 0))


@triton.jit
def backward_kernel(
    scores, targets, negative, positive, grad_negative, grad_positive, ds,
    classes, positives, ignore, score_row, target_row,
    INDICES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    scores += row * score_row
    targets += row * target_row
    ds += row * classes
    negative, positive = tl.load(negative + row), tl.load(positive + row)
    grad_negative, grad_positive = tl.load(grad_negative + row), tl.load(grad_positive + row)
    for start in range(0, CHUNK, BLOCK):
        i = tl.program_id(1).to(tl.int64) * CHUNK + start + tl.arange(0, BLOCK)
        inside = i < classes
        s = tl.load(scores + i, mask=inside, other=-float("inf")).to(tl.float32)
        if INDICES:
            t = _marked(targets, positives, ignore, i, inside)
        else:
            t = tl.load(targets + i, mask=inside, other=0).to(tl.float32)
        up, up_weight, down, down_weight = _terms(s, t)
        up = up_weight * tl.exp(up - negative) * grad_negative
        down = down_weight * tl.exp(down - positive) * grad_positive
        tl.store(ds + i, (up - down).to(ds.dtype.element_ty), mask=inside)


def _rows(x):
    x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.view(torch.uint8) if x.dtype == torch.bool else x


def _forward(scores, targets, ignore_index, indices):
    negative, positive = (
        torch.empty(scores.shape[:-1], dtype=torch.float32, device=scores.device) for _ in range(2)
    )
    s, t = _rows(scores), _rows(targets)
    rows, classes = s.shape
    if rows == 0 or classes == 0:
        return negative.zero_(), positive.zero_(), False
    chunks = triton.cdiv(classes, CHUNK)
    chunk = min(CHUNK, triton.next_power_of_2(classes))
    parts = torch.empty((rows, chunks, 5), dtype=torch.float32, device=s.device)
    outside = torch.empty(rows, dtype=torch.float32, device=s.device)
    forward_kernel[(rows, chunks)](
        s, t, parts, classes, t.shape[1], ignore_index, s.stride(0), t.stride(0), chunks,
        INDICES=indices, CHUNK=chunk, BLOCK=min(chunk, 1024),
    )  # fmt: skip
    combine_kernel[(rows,)](
        parts, negative, positive, outside, chunks, BLOCK=triton.next_power_of_2(chunks)
    )
    return negative, positive, bool(outside.any())


def _backward(scores, targets, halves, ignore_index, indices):
    ds = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    s, t = _rows(scores), _rows(targets)
    rows, classes = s.shape
    if rows and classes:
        chunk = min(CHUNK, triton.next_power_of_2(classes))
        backward_kernel[(rows, triton.cdiv(classes, chunk))](
            s, t, *(x.reshape(-1).contiguous() for x in halves), ds,
            classes, t.shape[1], ignore_index, s.stride(0), t.stride(0),
            INDICES=indices, CHUNK=chunk, BLOCK=min(chunk, 1024),
        )  # fmt: skip
    return ds


def multilabel_cross_entropy(scores, targets):
    """(negative, positive, whether a target is outside 0 to 1), scores and targets `[..., K]`."""
    return _forward(scores, targets, -1, False)


def multilabel_cross_entropy_backward(scores, targets, *halves):
    """ds from the halves of the loss and their gradients."""
    return _backward(scores, targets, halves, -1, False)


def sparse_multilabel_cross_entropy(scores, indices, ignore_index):
    """(negative, positive, whether an index names no class), scores `[..., K]`, int64 indices `[..., P]`."""
    return _forward(scores, indices, ignore_index, True)


def sparse_multilabel_cross_entropy_backward(
    scores, indices, negative, positive, grad_negative, grad_positive, ignore_index
):
    """ds from the halves of the loss and their gradients."""
    halves = negative, positive, grad_negative, grad_positive
    return _backward(scores, indices, halves, ignore_index, True)
