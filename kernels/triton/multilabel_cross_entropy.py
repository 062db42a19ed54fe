"""Multi-label cross-entropy in Triton, with dense targets or the indices of the positive classes.

One program sums a few thousand classes of a row, a second kernel adds the parts of a row in their order. Whether
labels are in their range is found first, in a pass of its own: the host waits for that alone, and goes on launching.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from supy.kernels._fetch import fetch

CHUNK = 8192  # classes of one program
TILE = 4096  # of which are in registers


@triton.jit
def outside_kernel(labels, found, numel, last, ignore, BLOCK: tl.constexpr):
    """Sets ``found`` where a label is neither from 0 to ``last`` nor, of an index, the ignored one."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels + i, mask=i < numel, other=0)
    wrong = (label < 0) | (label > last)
    if label.dtype == tl.int64:
        wrong &= label != ignore
    if tl.sum(wrong.to(tl.int32), 0) > 0:
        tl.store(found, 1)


@triton.jit
def _terms(s, t, HARD: tl.constexpr):
    """Exponents and weights of (1 - t) e^s and t e^-s; -inf and 0 where a term contributes nothing.

    ``HARD``: t is 0 or 1. A target below 2^-64 counts as t e^44 at s + 44, so that neither it nor its product vanishes or overflows.
    """
    infinity = float("inf")
    if HARD:
        up = tl.where(t == 0, s, -infinity)
        down = tl.where((t != 0) & (s != -infinity), -s, -infinity)
        up_weight = 1.0
        down_weight = 1.0
    else:
        t = tl.where(s == -infinity, 0.0, t)
        tiny = t < 5.421010862427522e-20
        up_weight = 1.0 - t
        down_weight = tl.where(tiny, t * 1.2851600114359308e19, t)
        up = tl.where(up_weight > 0, s, -infinity)
        down = tl.where(down_weight > 0, tl.where(tiny, -s - 44.0, -s), -infinity)
    return up, up_weight, down, down_weight


@triton.jit
def _add(top, total, exponent, weight):
    """Adds weight e^exponent over the first axis to totals in units of e^top, lane by lane."""
    higher = tl.minimum(tl.maximum(top, tl.max(exponent, 0)), 3.4028234663852886e38)
    return higher, total * tl.exp(top - higher) + tl.sum(weight * tl.exp(exponent - higher[None, :]), 0)


@triton.jit
def _log_one_plus(top, total):
    """log(1 + total e^top) for totals of parts along the first axis, in float64."""
    highest = tl.max(top, 0)
    total = tl.sum((total * tl.exp(top - highest)).to(tl.float64), 0)
    small = (highest == 0) & (total < 1e-8)  # where 1 + total would lose it
    highest = highest.to(tl.float64)
    return tl.where(small, total, highest + tl.log(total + tl.exp(-highest))).to(tl.float32)


@triton.jit
def _marked(indices, positives, ignore, classes, first, SIZE: tl.constexpr):
    """Whether the classes, ``SIZE`` from the first, are among the indices of the row."""
    found = classes < 0
    for start in range(0, positives, 64):
        place = start + tl.arange(0, 64)
        index = tl.load(indices + place, mask=place < positives, other=-1)
        here = (place < positives) & (index >= first) & (index < first + SIZE) & (index != ignore)
        if tl.sum(here.to(tl.int32), 0) > 0:
            for i in range(start, tl.minimum(start + 64, positives)):
                one = tl.load(indices + i)
                if one != ignore:
                    found |= classes == one
    return found.to(tl.int8)


@triton.jit
def forward_kernel(
    scores, targets, parts,
    classes, positives, ignore, score_row, target_row, chunks,
    INDICES: tl.constexpr,
    HARD: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1).to(tl.int64)
    scores += row * score_row
    targets += row * target_row
    up_top, up_total = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    down_top, down_total = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    for start in range(0, CHUNK, LANES * AT_ONCE):
        first = chunk * CHUNK + start
        i = first + tl.arange(0, AT_ONCE)[:, None] * LANES + tl.arange(0, LANES)[None, :]
        inside = i < classes
        s = tl.load(scores + i, mask=inside, other=-float("inf")).to(tl.float32)
        if INDICES:
            t = _marked(targets, positives, ignore, i, first, LANES * AT_ONCE)
        else:
            t = tl.load(targets + i, mask=inside, other=0)
            if not HARD:
                t = t.to(tl.float32)
        up, up_weight, down, down_weight = _terms(s, t, HARD)
        up_top, up_total = _add(up_top, up_total, up, up_weight)
        down_top, down_total = _add(down_top, down_total, down, down_weight)
    parts += (row * chunks + chunk) * 4
    top = tl.max(up_top, 0)
    tl.store(parts, top)
    tl.store(parts + 1, tl.sum(up_total * tl.exp(up_top - top), 0))
    top = tl.max(down_top, 0)
    tl.store(parts + 2, top)
    tl.store(parts + 3, tl.sum(down_total * tl.exp(down_top - top), 0))


@triton.jit
def combine_kernel(parts, negative, positive, chunks, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < chunks
    parts += (row * chunks + i) * 4
    for half in tl.static_range(2):
        top = tl.load(parts + 2 * half, mask=inside, other=0.0)
        total = tl.load(parts + 2 * half + 1, mask=inside, other=0.0)
        tl.store((positive if half else negative) + row, _log_one_plus(top, total))


@triton.jit
def backward_kernel(
    scores, targets, negative, positive, grad_negative, grad_positive, ds,
    classes, positives, ignore, score_row, target_row, negative_step, positive_step,
    INDICES: tl.constexpr,
    HARD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    scores += row * score_row
    targets += row * target_row
    ds += row * classes
    negative, positive = tl.load(negative + row), tl.load(positive + row)
    grad_negative = tl.load(grad_negative + row * negative_step)
    grad_positive = tl.load(grad_positive + row * positive_step)
    first = tl.program_id(1).to(tl.int64) * BLOCK
    i = first + tl.arange(0, BLOCK)
    inside = i < classes
    s = tl.load(scores + i, mask=inside, other=-float("inf")).to(tl.float32)
    if INDICES:
        t = _marked(targets, positives, ignore, i, first, BLOCK)
    else:
        t = tl.load(targets + i, mask=inside, other=0)
    if HARD:
        down = tl.where(s == -float("inf"), s, -s - positive)
        slope = tl.exp(tl.where(t == 0, s - negative, down)) * tl.where(t == 0, grad_negative, -grad_positive)
    else:
        up, up_weight, down, down_weight = _terms(s, t.to(tl.float32), False)
        slope = up_weight * tl.exp(up - negative) * grad_negative
        slope -= down_weight * tl.exp(down - positive) * grad_positive
    tl.store(ds + i, slope.to(ds.dtype.element_ty), mask=inside)


def find_outside(labels, last, ignore):
    """A function that says whether labels are out of range: begun here, waited for there. Of bool none can be."""
    if labels.dtype == torch.bool or labels.numel() == 0:
        return lambda: False
    labels = labels.contiguous()
    found = torch.zeros(1, dtype=torch.int32, device=labels.device)
    block = 4096
    outside_kernel[(triton.cdiv(labels.numel(), block),)](labels, found, labels.numel(), last, ignore, BLOCK=block)
    found = fetch(found)
    return lambda: bool(found()[0])


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
    outside = find_outside(targets, classes - 1 if indices else 1, ignore_index)
    chunk = min(CHUNK, triton.next_power_of_2(classes))
    chunks = triton.cdiv(classes, chunk)
    # All of a lane's classes in one thread, at 16 bytes a load.
    lanes = min(chunk, 2048 // (s.element_size() if indices else min(s.element_size(), t.element_size())))
    parts = torch.empty((rows, chunks, 4), dtype=torch.float32, device=s.device)
    forward_kernel[(rows, chunks)](
        s, t, parts, classes, t.shape[1], ignore_index, s.stride(0), t.stride(0), chunks,
        INDICES=indices, HARD=not t.is_floating_point(), CHUNK=chunk, LANES=lanes, AT_ONCE=min(chunk, TILE) // lanes,
    )  # fmt: skip
    combine_kernel[(rows,)](
        parts, negative, positive, chunks, BLOCK=triton.next_power_of_2(chunks), num_warps=1
    )
    return negative, positive, outside()


def _backward(scores, targets, halves, ignore_index, indices):
    ds = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    s, t = _rows(scores), _rows(targets)
    rows, classes = s.shape
    if rows and classes:
        block = min(TILE, triton.next_power_of_2(classes))
        halves = [x.reshape(-1) for x in halves]  # the gradients may be one number, expanded
        backward_kernel[(rows, triton.cdiv(classes, block))](
            s, t, *(x.contiguous() for x in halves[:2]), *halves[2:], ds,
            classes, t.shape[1], ignore_index, s.stride(0), t.stride(0), *(x.stride(0) for x in halves[2:]),
            INDICES=indices, HARD=not t.is_floating_point(), BLOCK=block,
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
