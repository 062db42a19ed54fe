"""Cross-entropy of n tasks of m classes in Triton: all classes of some tasks in one program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from supy.kernels.multilabel_cross_entropy import find_outside


@triton.jit
def _load(scores, targets, tasks, classes, s1, s2, t1, t2, i, j):
    """Scores and targets of tasks i, classes j; -inf and 0 where there are none."""
    inside = (i < tasks)[:, None] & (j < classes)[None, :]
    s = tl.load(scores + i[:, None] * s1 + j[None, :] * s2, mask=inside, other=-float("inf")).to(tl.float32)
    t = tl.load(targets + i[:, None] * t1 + j[None, :] * t2, mask=inside, other=0).to(tl.float32)
    return s, tl.where(s == -float("inf"), 0.0, t), inside


@triton.jit
def _terms(s, t, j, HARD: tl.constexpr):
    """Terms weight * others * e^exponent, e^(s - top), which class is the top, how many count.

    others is the sum over the other classes of e^(s - top). That of the largest score leaves this one out from the
    start; the others are at least 1, so that nothing cancels when they subtract their own.
    """
    infinity = float("inf")
    masked = s == -infinity
    count = tl.maximum(tl.sum(tl.where(masked, 0.0, 1.0), 1), 1.0)[:, None]
    if HARD:
        top = tl.max(s, 1)[:, None]
        at = tl.min(tl.where(s == top, j[None, :], 2147483647), 1)[:, None]
        top = tl.where(top == -infinity, 0.0, top)
        is_top = j[None, :] == at
        e = tl.exp(s - top)
        rest = tl.sum(tl.where(is_top, 0.0, e), 1)[:, None]
        others = tl.where(is_top, rest, 1.0 + (rest - e))
        exponent = tl.where(is_top, 0.0, top - s)
    else:
        is_top = masked & (s > 0)
        e = tl.zeros(s.shape, tl.float32)
        others = tl.zeros(s.shape, tl.float32) + 1.0
        exponent = tl.sum(tl.where(masked, 0.0, s / count), 1)[:, None] - s
    # As for multilabel_cross_entropy: t e^44, 44 lower.
    tiny = t < 5.421010862427522e-20
    exponent = tl.where(t != 0, tl.where(tiny, exponent - 44.0, exponent), -infinity)
    weight = tl.where(t != 0, tl.where(tiny, t * 1.2851600114359308e19, t), 0.0)
    return weight, others, exponent, e, is_top, count


@triton.jit
def forward_kernel(
    scores, targets, parts,
    tasks, classes, chunks,
    s0, s1, s2, t0, t1, t2,
    HARD: tl.constexpr,
    CHUNK: tl.constexpr,
    TASKS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    batch, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    scores += batch * s0
    targets += batch * t0
    j = tl.arange(0, BLOCK)
    top, total = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, CHUNK, TASKS):
        i = chunk * CHUNK + start + tl.arange(0, TASKS)
        s, t, _ = _load(scores, targets, tasks, classes, s1, s2, t1, t2, i, j)
        weight, others, exponent, _, _, _ = _terms(s, t, j, HARD)
        higher = tl.minimum(tl.maximum(top, tl.max(exponent, 0)), 3.4028234663852886e38)
        terms = tl.where(t != 0, weight * others * tl.exp(exponent - higher[None, :]), 0.0)
        total = total * tl.exp(top - higher) + tl.sum(terms, 0)
        top = higher
    parts += (batch * chunks + chunk) * 2 * classes
    tl.store(parts + j, top, mask=j < classes)
    tl.store(parts + classes + j, total, mask=j < classes)


@triton.jit
def combine_kernel(parts, losses, classes, chunks, BLOCK: tl.constexpr):
    batch = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = j < classes
    parts += batch * chunks * 2 * classes + j
    top, total = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for chunk in range(0, chunks):
        place = parts + chunk * 2 * classes
        other = tl.load(place, mask=inside, other=0.0)
        higher = tl.maximum(top, other)
        value = tl.load(place + classes, mask=inside, other=0.0)
        total = total * tl.exp(top - higher) + value * tl.exp(other - higher)
        top = higher
    small = (top == 0) & (total < 1e-8)  # where 1 + total would lose it
    total, top = total.to(tl.float64), top.to(tl.float64)
    loss = tl.where(small, total, top + tl.log(total + tl.exp(-top)))
    tl.store(losses + batch * classes + j, loss.to(tl.float32), mask=inside)


@triton.jit
def backward_kernel(
    scores, targets, losses, grad, ds,
    tasks, classes,
    s0, s1, s2, t0, t1, t2, grad0, grad1,
    HARD: tl.constexpr,
    TASKS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1).to(tl.int64) * TASKS + tl.arange(0, TASKS)
    j = tl.arange(0, BLOCK)
    scores += batch * s0
    targets += batch * t0
    s, t, inside = _load(scores, targets, tasks, classes, s1, s2, t1, t2, i, j)
    weight, others, exponent, e, is_top, count = _terms(s, t, j, HARD)
    loss = tl.load(losses + batch * classes + j, mask=j < classes, other=0.0)[None, :]
    g = tl.load(grad + batch * grad0 + j * grad1, mask=j < classes, other=0.0)[None, :]
    q = g * weight * tl.exp(exponent - loss)
    total = tl.sum(tl.where(is_top, 0.0, q), 1)[:, None]
    if HARD:
        of_top = tl.sum(tl.where(is_top, q, 0.0), 1)[:, None]
        out = e * tl.where(is_top, total, of_top + (total - q)) - q * others
    else:
        out = total / count - q
    out = tl.where(s == -float("inf"), 0.0, out)
    place = (batch * tasks + i[:, None]) * classes + j[None, :]
    tl.store(ds + place, out.to(ds.dtype.element_ty), mask=inside)


def _three_axes(x):
    x = x.reshape(x.shape[:-2].numel(), *x.shape[-2:])
    return x.view(torch.uint8) if x.dtype == torch.bool else x


def _blocks(classes):
    block = triton.next_power_of_2(classes)
    return block, max(1, min(64, 4096 // block))


def multitask_cross_entropy(scores, targets, hard):
    """(losses `[..., m]`, whether a target is outside 0 to 1), scores and targets `[..., n, m]`."""
    losses = torch.empty(
        (*scores.shape[:-2], scores.shape[-1]), dtype=torch.float32, device=scores.device
    )
    s, t = _three_axes(scores), _three_axes(targets)
    batch, tasks, classes = s.shape
    if s.numel() == 0:
        return losses.zero_(), False
    outside = find_outside(targets, 1, -1)
    block, at_once = _blocks(classes)
    chunk = 4 * at_once
    chunks = triton.cdiv(tasks, chunk)
    parts = torch.empty((batch, chunks, 2, classes), dtype=torch.float32, device=s.device)
    forward_kernel[(batch, chunks)](
        s, t, parts, tasks, classes, chunks, *s.stride(), *t.stride(),
        HARD=hard, CHUNK=chunk, TASKS=at_once, BLOCK=block,
    )  # fmt: skip
    wide = min(block, 256)
    combine_kernel[(batch, triton.cdiv(classes, wide))](parts, losses, classes, chunks, BLOCK=wide)
    return losses, outside()


def multitask_cross_entropy_backward(scores, targets, losses, grad, hard):
    """ds from the losses `[..., m]` and their gradient."""
    ds = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    s, t = _three_axes(scores), _three_axes(targets)
    batch, tasks, classes = s.shape
    if s.numel():
        block, at_once = _blocks(classes)
        grad = grad.reshape(batch, classes)
        backward_kernel[(batch, triton.cdiv(tasks, at_once))](
            s, t, losses.contiguous(), grad, ds, tasks, classes,
            *s.stride(), *t.stride(), *grad.stride(), HARD=hard, TASKS=at_once, BLOCK=block,
        )  # fmt: skip
    return ds
