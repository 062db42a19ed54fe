"""Gated attention in Triton: the weights of a band of rows at a time, in memory, for all products that need them.

A program cannot hold a row of 1536 values, so several share the rows, and each would compute their scores again: with
256 values a program that is two fifths more work. Instead the weights of a band of ``BAND`` blocks of rows are written
once, `[BAND * BLOCK, T]` in the dtype of v, and every program reads them. Backward does so with bands of keys. Memory
stays O(T (S + E)).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from supy.kernels._tiles import (
    LAUNCH, PAIRED, PAIRED_LONG, _inner, _load, _swish, _swish_slope, aligned, constants, cut, power_of_two, strides,
    tiles_for,
)  # fmt: skip
from supy.reference.gau_attention import _check

# Blocks of rows at a time: a multiple of those that, with six parts of 256 values, fill the 132 multiprocessors of an
# H100, as large as the workspace allows.
BAND, WORKSPACE = 22, 96 << 20
PROGRAMS = 264  # two for each multiprocessor: work of few blocks is split into about as many
LOG2E = math.log2(math.e)  # exponentials are powers of two
_LOG2E, _LOG512 = tl.constexpr(LOG2E), tl.constexpr(math.log(512))
KERNELS = ("relu2", "softmax", "softmax_plus")
GATE, SWISH, SLOPE = 1, 2, 3  # what results are multiplied by: a gate, swish of what is given for it, or its derivative


@triton.jit
def _place(number, samples, blocks, sample_step, block_step):
    """Sample and block of the numbered block, by the steps from sample to sample and from block to block."""
    return (number // sample_step % samples).to(tl.int64), number // block_step % blocks


@triton.jit(do_not_specialize=["T", "count"])
def gau_attention_seen_kernel(
    lengths, ends, keys, key_blocks, query_blocks, tokens, factor, level, slope, T, count, blocks, scale, divisor,
    PADDED: tl.constexpr, PACKED: tl.constexpr, CAUSAL: tl.constexpr, DIVIDED: tl.constexpr, KERNEL: tl.constexpr,
    BLOCK: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """Who sees whom, and the factors of the scores, `[B, width]`; ``KERNEL`` is the place in ``KERNELS``.

    First and last + 1 of the keys that each token sees, T and 0 in padding, `[B, width, 2]`; the same of a block, in
    blocks, of keys and of queries, `[B, blocks, 2]`; the lengths as int32.
    """
    at = tl.program_id(0)
    sample = at // blocks
    block = at % blocks
    i = block * BLOCK + tl.arange(0, BLOCK)
    n = T
    if PADDED:
        n = tl.load(lengths + sample).to(tl.int32)
    first = tl.zeros([BLOCK], tl.int32)
    last = first + n
    if PACKED:
        for start in range(0, count, ENDS):
            e = start + tl.arange(0, ENDS)
            end = tl.load(ends + e, mask=e < count, other=T).to(tl.int32)[None, :]
            before = end <= i[:, None]
            first = tl.maximum(first, tl.max(tl.where(before, end, 0), 1))
            last = tl.minimum(last, tl.min(tl.where(before, T, end), 1))
    inside = i < n
    query = tl.where(inside, first, T)
    if CAUSAL:
        query = tl.where(inside, i, T)
    last = tl.where(inside, last, 0)
    tl.store(query_blocks + 2 * at, tl.min(query, 0) // BLOCK)
    tl.store(query_blocks + 2 * at + 1, tl.cdiv(tl.max(last, 0), BLOCK))
    first = tl.where(inside, first, T)
    if CAUSAL:
        last = tl.minimum(last, i + 1)
    tl.store(key_blocks + 2 * at, tl.min(first, 0) // BLOCK)
    tl.store(key_blocks + 2 * at + 1, tl.cdiv(tl.max(last, 0), BLOCK))
    tl.store(tokens + sample, n)
    row = at.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(keys + 2 * row, first)
    tl.store(keys + 2 * row + 1, last)

    seen = tl.maximum(last - first, 0)
    f = tl.zeros([BLOCK], tl.float32) + scale
    if KERNEL == 0:
        by = tl.zeros([BLOCK], tl.float32) + divisor
        if not DIVIDED:
            by = tl.maximum(seen, 1).to(tl.float32)
        tl.store(level + row, 1 / by)
        tl.store(slope + row, 2 * f / by)  # of A, over relu(s)
    else:
        if KERNEL == 2:
            f *= tl.log(tl.maximum(seen, 16).to(tl.float32)) / _LOG512
        # Of A, over A; the weight of an only key is 1, whatever its score.
        tl.store(slope + row, tl.where(seen > 1, f, 0.0))
        f *= _LOG2E
    tl.store(factor + row, f)


@triton.jit
def _share(seen, at, split, splits):
    """First and last + 1 of a split of the blocks that block ``at`` sees."""
    first = tl.load(seen + 2 * at)
    last = tl.load(seen + 2 * at + 1)
    share = tl.cdiv(last - first, splits)
    first += split * share
    return first, tl.minimum(first + share, last)


@triton.jit
def _weights(s, level, RELU2: tl.constexpr):
    """A from scores: relu(s)^2 * level, or 2^s / e^level. The comparison lets NaN through."""
    if RELU2:
        s = tl.where(s < 0, 0.0, s)
        return s * s * level
    return tl.exp2(s - level * _LOG2E)


@triton.jit
def gau_attention_rows_kernel(
    q, k, keys, seen, lengths, factor, levels, rows, blocks, splits, q_b, q_t, k_b, k_t,
    S: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """log2 of the sum of 2^score over a split of each row's visible keys, `[splits, B, width]`; -inf without any."""
    split = tl.program_id(0) % splits
    number = tl.program_id(0) // splits
    sample = (number // blocks).to(tl.int64)
    n = tl.load(lengths + sample)
    q += sample * q_b
    k += sample * k_b
    i = number % blocks * BLOCK + tl.arange(0, BLOCK)
    row = sample * blocks * BLOCK + i
    begin = tl.load(keys + 2 * row)
    end = tl.load(keys + 2 * row + 1)
    latest = tl.max(begin)  # from there to the earliest end no mask is needed
    earliest = tl.min(end)
    factors = tl.load(factor + row)[:, None]
    d = tl.arange(0, DEPTH)
    # Queries that fit are read once; then keys are read ahead of their products.
    a = _load(q, i, d, n, q_t, S)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    first, last = _share(seen, number, split, splits)
    for other in range(first, last):
        j = other * BLOCK + tl.arange(0, BLOCK)
        if S <= DEPTH:
            s = tl.dot(a, tl.trans(_load(k, j, d, n, k_t, S)), input_precision=PRECISION)
        else:
            s = _inner(q, k, i, j, n, q_t, k_t, S, DEPTH, PRECISION)
        s *= factors
        if (other * BLOCK < latest) | (other * BLOCK + BLOCK > earliest):
            s = tl.where((j[None, :] >= begin[:, None]) & (j[None, :] < end[:, None]), s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        sums = sums * tl.exp2(top - shift) + tl.sum(tl.exp2(s - shift[:, None]), 1)
        top = new
    tl.store(levels + split.to(tl.int64) * rows + row, top + tl.log2(sums))


@triton.jit(do_not_specialize=["start"])
def gau_attention_weights_kernel(
    q, k, keys, seen, lengths, factor, levels, level, weights, start, splits, rows,
    samples, blocks, sample_step, block_step, q_b, q_t, k_b, k_t,
    RELU2: tl.constexpr, LEVELS: tl.constexpr, S: tl.constexpr,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A for a band of queries, `[BAND * BLOCK, width]`, tiles without a visible cell left out.

    Of softmax, ``LEVELS`` parts of the rows' sums are in ``levels``; their log-sum-exp is written to ``level``.
    """
    split = tl.program_id(0) % splits
    slot = tl.program_id(0) // splits
    sample, block = _place(start + slot, samples, blocks, sample_step, block_step)
    at = sample * blocks + block
    n = tl.load(lengths + sample)
    q += sample * q_b
    k += sample * k_b
    t = tl.arange(0, BLOCK)
    i = block * BLOCK + t
    row = at * BLOCK + t
    if RELU2:
        norm = tl.load(level + row)
    else:
        parts = tl.load(levels + tl.arange(0, LEVELS).to(tl.int64)[None, :] * rows + row[:, None])
        top = tl.max(parts, 1)
        shift = tl.where(top == float("-inf"), 0.0, top)
        norm = (top + tl.log2(tl.sum(tl.exp2(parts - shift[:, None]), 1))) / _LOG2E
        if split == 0:
            tl.store(level + row, norm)
    begin = tl.load(keys + 2 * row)
    end = tl.load(keys + 2 * row + 1)
    latest = tl.max(begin)
    earliest = tl.min(end)
    factors = tl.load(factor + row)[:, None]
    d = tl.arange(0, DEPTH)
    a = _load(q, i, d, n, q_t, S)
    first, last = _share(seen, at, split, splits)
    for other in range(first, last):
        j = other * BLOCK + t
        if S <= DEPTH:
            s = tl.dot(a, tl.trans(_load(k, j, d, n, k_t, S)), input_precision=PRECISION)
        else:
            s = _inner(q, k, i, j, n, q_t, k_t, S, DEPTH, PRECISION)
        p = _weights(s * factors, norm[:, None], RELU2)
        if (other * BLOCK < latest) | (other * BLOCK + BLOCK > earliest):
            p = tl.where((j[None, :] >= begin[:, None]) & (j[None, :] < end[:, None]), p, 0.0)
        cell = (slot * BLOCK + t).to(tl.int64)[:, None] * (blocks * BLOCK) + j[None, :]
        tl.store(weights + cell, p.to(weights.dtype.element_ty))


@triton.jit(do_not_specialize=["start"])
def gau_attention_values_kernel(
    weights, x, gate, linear, memories, seen, lengths, attended, out,
    start, T, group, samples, blocks, sample_step, block_step, parts, splits,
    x_b, x_t, gate_b, gate_t, linear_b, linear_t, out_b, out_t,
    GATED: tl.constexpr, SAVE: tl.constexpr, LINEAR: tl.constexpr, S: tl.constexpr, SIZE: tl.constexpr,
    BLOCK: tl.constexpr, PART: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A x for a band of rows, into `[splits, B, T, SIZE]`: a split is its share of the sum, 0 in padding.

    ``GATED``: times ``GATE``, ``SWISH`` or ``SLOPE`` of what is given for a gate. ``SAVE``: A x as well.
    ``LINEAR``: A x + linear memory, with a memory `[S, SIZE]` for every ``group`` of samples.
    """
    part = tl.program_id(0) % parts
    split = tl.program_id(0) // parts % splits
    slot = tl.program_id(0) // parts // splits
    sample, block = _place(start + slot, samples, blocks, sample_step, block_step)
    n = tl.load(lengths + sample)
    x += sample * x_b
    weights += (slot * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None] * (blocks * BLOCK)
    e = part * PART + tl.arange(0, PART)
    total = tl.zeros([BLOCK, PART], tl.float32)
    first, last = _share(seen, sample * blocks + block, split, splits)
    for token in range(first * BLOCK, last * BLOCK, DEPTH):
        t = token + tl.arange(0, DEPTH)
        a = tl.load(weights + t[None, :])
        total = tl.dot(a, _load(x, t, e, n, x_t, SIZE).to(a.dtype), total, input_precision=PRECISION)
    i = block * BLOCK + tl.arange(0, BLOCK)
    if LINEAR:
        linear += sample * linear_b
        memories += sample // group * (S * SIZE)
        for feature in range(0, S, DEPTH):
            d = feature + tl.arange(0, DEPTH)
            b = _load(memories, d, e, S, SIZE, SIZE)
            total = tl.dot(_load(linear, i, d, n, linear_t, S), b, total, input_precision=PRECISION)
    at = (split * samples + sample) * out_b + i.to(tl.int64)[:, None] * out_t + e[None, :]
    inside = (i < T)[:, None] & (e < SIZE)[None, :]
    value = total.to(out.dtype.element_ty)
    if SAVE:
        tl.store(attended + at, value, mask=inside)
    if GATED:
        by = _load(gate + sample * gate_b, i, e, n, gate_t, SIZE)
        if GATED == 2:
            by = _swish(by.to(tl.float32)).to(by.dtype)
        if GATED == 3:
            by = _swish_slope(by.to(tl.float32)).to(by.dtype)
        tl.debug_barrier()  # else the sums are converted before: registers spill
        value = (value * by.to(tl.float32)).to(out.dtype.element_ty)
    tl.store(out + at, value, mask=inside)


@triton.jit
def gau_attention_gate_gradient_kernel(
    grad, u, attended, lengths, g, du, out, mean, T, blocks,
    grad_b, grad_t, u_b, u_t, attended_b, attended_t, du_b, du_t,
    GATED: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """g = u * grad, du = grad * (A v), and the mean A . dA = g . (A v) of each row, `[B, blocks * BLOCK]`.

    ``GATED`` is ``SWISH``: h is given for u = swish(h), du is dh, and u * (A v) goes to ``out``. g may be grad itself.
    """
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.load(lengths + sample)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(0, E, PART):
        e = part + tl.arange(0, PART)
        slope = _load(grad + sample * grad_b, i, e, n, grad_t, E).to(tl.float32)
        value = _load(attended + sample * attended_b, i, e, n, attended_t, E).to(tl.float32)
        if GATED:
            inside = (i < T)[:, None] & (e < E)[None, :]
            at = (sample * T + i)[:, None] * E + e[None, :]
            gate = _load(u + sample * u_b, i, e, n, u_t, E).to(tl.float32)
            dgate = slope * value
            if GATED == 2:
                dgate *= _swish_slope(gate)
                gate = _swish(gate)
                tl.store(out + at, (gate * value).to(out.dtype.element_ty), mask=inside)
            to = du + sample * du_b + i.to(tl.int64)[:, None] * du_t + e[None, :]
            tl.store(to, dgate.to(du.dtype.element_ty), mask=inside)
            slope = (slope * gate).to(g.dtype.element_ty)
            tl.store(g + at, slope, mask=inside)
        total += tl.sum(slope.to(tl.float32) * value, 1)
    tl.store(mean + sample * blocks * BLOCK + i, total)


@triton.jit(do_not_specialize=["start"])
def gau_attention_scores_gradient_kernel(
    q, k, v, g, keys, seen, lengths, factor, slope, level, mean, weights, ds,
    start, samples, blocks, sample_step, block_step, q_b, q_t, k_b, k_t, v_b, v_t, g_b, g_t,
    RELU2: tl.constexpr, S: tl.constexpr, E: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, NARROW: tl.constexpr,
    DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A^T and (dS * factor)^T for a band of keys, `[BAND * BLOCK, width]`, tiles without a visible cell left out."""
    piece = tl.program_id(0) % (BLOCK // COLUMNS)
    other = tl.program_id(0) // (BLOCK // COLUMNS) % blocks
    slot = tl.program_id(0) // (BLOCK // COLUMNS) // blocks
    sample, block = _place(start + slot, samples, blocks, sample_step, block_step)
    at = sample * blocks + block
    if (other >= tl.load(seen + 2 * at)) & (other < tl.load(seen + 2 * at + 1)):
        n = tl.load(lengths + sample)
        # Rows are queries, though they are stored as columns: what each query has then takes few registers.
        i = other * BLOCK + tl.arange(0, BLOCK)
        row = sample * blocks * BLOCK + i
        begin = tl.load(keys + 2 * row)
        end = tl.load(keys + 2 * row + 1)
        row = row[:, None]
        # The factors of the long product wait in memory, so that two programs have room on a multiprocessor.
        for narrow in tl.static_range(0, COLUMNS, NARROW):
            column = piece * COLUMNS + narrow + tl.arange(0, NARROW)
            j = block * BLOCK + column
            s = _inner(q + sample * q_b, k + sample * k_b, i, j, n, q_t, k_t, S, DEPTH, PRECISION)
            s *= tl.load(factor + row)
            if RELU2:
                s = tl.where(s < 0, 0.0, s)
            a = _weights(s, tl.load(level + row), RELU2)
            if not ((tl.max(begin) <= block * BLOCK) & (tl.min(end) >= block * BLOCK + BLOCK)):
                visible = (j[None, :] >= begin[:, None]) & (j[None, :] < end[:, None])
                a = tl.where(visible, a, 0.0)
                s = tl.where(visible, s, 0.0)
            cell = (slot * BLOCK + column).to(tl.int64)[None, :] * (blocks * BLOCK) + i[:, None]
            tl.store(weights + cell, a.to(weights.dtype.element_ty))
            if RELU2:
                a = s
            tl.store(ds + cell, (a * tl.load(slope + row)).to(ds.dtype.element_ty))
        tl.debug_barrier()
        column = piece * COLUMNS + tl.arange(0, COLUMNS)
        j = block * BLOCK + column
        d = _inner(g + sample * g_b, v + sample * v_b, i, j, n, g_t, v_t, E, DEPTH, PRECISION)
        if not RELU2:
            d -= tl.load(mean + row)
        cell = (slot * BLOCK + column).to(tl.int64)[None, :] * (blocks * BLOCK) + i[:, None]
        a = tl.load(ds + cell)
        # Where the factor is 0, v may be infinite; a NaN of s stays.
        d = tl.where(a == 0, 0.0, d.to(a.dtype).to(tl.float32) * a)
        tl.store(ds + cell, d.to(ds.dtype.element_ty))


@triton.jit(do_not_specialize=["start", "end"])
def gau_attention_queries_gradient_kernel(
    ds, k, seen, lengths, dq, start, end, T, samples, blocks, sample_step, block_step, parts, k_b, k_t,
    S: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to dq `[B, T, S]`, in float32, what a band of keys gives; the first one, from 0, begins it."""
    part = tl.program_id(0) % parts
    at = tl.program_id(0) // parts
    sample = at // blocks
    block = at % blocks
    # Those blocks of keys that see these queries are those that these queries see; of them, the ones in the band.
    offset = sample * sample_step
    first = tl.maximum(tl.load(seen + 2 * at), tl.cdiv(tl.maximum(start - offset, 0), block_step))
    last = tl.minimum(tl.load(seen + 2 * at + 1), tl.cdiv(tl.maximum(end - offset, 0), block_step))
    if (first < last) | (start == 0):
        n = tl.load(lengths + sample)
        k += sample.to(tl.int64) * k_b
        i = block * BLOCK + tl.arange(0, BLOCK)
        d = part * PART + tl.arange(0, PART)
        total = tl.zeros([BLOCK, PART], tl.float32)
        for token in range(first * BLOCK, last * BLOCK, DEPTH):
            t = token + tl.arange(0, DEPTH)
            slot = offset + token // BLOCK * block_step - start
            column = (slot * BLOCK + token % BLOCK + tl.arange(0, DEPTH)).to(tl.int64)
            a = tl.load(ds + column[:, None] * (blocks * BLOCK) + i[None, :])
            b = _load(k, t, d, n, k_t, S).to(a.dtype)
            total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)
        to = dq + (sample.to(tl.int64) * T + i)[:, None] * S + d[None, :]
        inside = (i < T)[:, None] & (d < S)[None, :]
        if start > 0:
            total += tl.load(to, mask=inside, other=0.0)
        tl.store(to, total, mask=inside)


class _Seen(NamedTuple):
    """What `gau_attention_seen_kernel` finds."""

    keys: torch.Tensor
    key_blocks: torch.Tensor
    query_blocks: torch.Tensor
    lengths: torch.Tensor
    factor: torch.Tensor
    level: torch.Tensor  # only of relu2
    slope: torch.Tensor


def _find_seen(B, T, block, kernel, causal, scale, relu2_length, device, lengths=None, cu_seqlens=None):
    blocks = triton.cdiv(T, block)
    shapes = (B, blocks * block, 2), (B, blocks, 2), (B, blocks, 2), (B,)
    integers = [torch.empty(shape, dtype=torch.int32, device=device) for shape in shapes]
    numbers = [torch.empty(B, blocks * block, dtype=torch.float32, device=device) for _ in range(3)]
    found = _Seen(*integers, *numbers)
    given = {"PADDED": lengths is not None, "PACKED": cu_seqlens is not None, "DIVIDED": relu2_length is not None}
    gau_attention_seen_kernel[(B * blocks,)](
        # What is not there is not read: anything stands for it.
        found.lengths if lengths is None else lengths.contiguous(),
        found.lengths if cu_seqlens is None else cu_seqlens.contiguous(),
        *found, T, 0 if cu_seqlens is None else len(cu_seqlens), blocks, scale, float(relu2_length or 1),
        **given, CAUSAL=causal, KERNEL=KERNELS.index(kernel), BLOCK=block, ENDS=32,
    )  # fmt: skip
    return found


class _Bands:
    """What forward and backward share: who sees whom, the factors of the scores, and the launches for a band."""

    def __init__(self, like, S, lengths, cu_seqlens, kernel, causal, scale, relu2_length, tiles, band):
        B, T, _ = like.shape
        self.relu2 = kernel == "relu2"
        self.tiles = tiles or tiles_for(like.dtype)
        block = self.tiles["BLOCK"]
        self.blocks = triton.cdiv(T, block)
        if band is None:
            fit = WORKSPACE // (block * block * self.blocks * like.element_size())
            band = max(BAND, fit // BAND * BAND)
        self.bands = [(i, min(i + band, B * self.blocks)) for i in range(0, B * self.blocks, band)]
        # Causal blocks of one place in their samples have equal work; else those of one sample share what they read.
        self.places = (B, self.blocks, *((1, B) if causal else (self.blocks, 1)))
        depth = min(block, self.tiles["DEPTH"])
        self.product = {"BLOCK": block, "DEPTH": depth, "PRECISION": self.tiles["PRECISION"]} | LAUNCH
        # Scores alone: half precision has room for all features; exponentials were faster with half the warps.
        depth = power_of_two(S, 128) if like.dtype != torch.float32 and S <= 128 else depth
        paired = PAIRED | {"num_warps": 8 if self.relu2 else 4}
        self.scores = self.product | {"DEPTH": depth} | (paired if S <= depth else {})
        key = B, T, block, kernel, causal, float(scale), relu2_length, like.device
        self.seen = constants(_find_seen, key, lengths, cu_seqlens)

    def splits(self, count, limit):
        """Into how many shares each of ``count`` sums over blocks is split, so that there are enough programs."""
        return min(max(1, PROGRAMS // count), limit, self.blocks)

    def workspace(self, q, dtype):
        block = self.tiles["BLOCK"]
        return q.new_empty(self.bands[0][1] * block, self.blocks * block, dtype=dtype)

    def levels(self, q, k):
        """log2 of the rows' sums, in parts, and room for their log-sum-exp; relu2 has what it divides by."""
        seen = self.seen
        if self.relu2:
            return None, seen.level
        count = len(q) * self.blocks
        splits = triton.next_power_of_2(self.splits(count, 8))
        levels = seen.factor.new_empty(splits, *seen.factor.shape)
        gau_attention_rows_kernel[(count * splits,)](
            q, k, seen.keys, seen.key_blocks, seen.lengths, seen.factor, levels, seen.factor.numel(), self.blocks,
            splits, *strides(q, k), S=q.shape[2], **self.scores,
        )  # fmt: skip
        return levels, torch.empty_like(seen.factor)

    def weights(self, band, q, k, levels, level, out):
        seen, count = self.seen, band[1] - band[0]
        splits = self.splits(count, 8)
        gau_attention_weights_kernel[(count * splits,)](
            q, k, seen.keys, seen.key_blocks, seen.lengths, seen.factor, level if levels is None else levels, level,
            out, band[0], splits, level.numel(), *self.places, *strides(q, k),
            RELU2=self.relu2, LEVELS=1 if levels is None else len(levels), S=q.shape[2], **self.scores,
        )  # fmt: skip

    def values(
        self, band, weights, x, seen, out, gate=None, gated=GATE, attended=None,
        linear=None, memories=None, group=1, splits=1,
    ):  # fmt: skip
        size = x.shape[2]
        # A product of float32 for float16 takes twice the memory.
        part = power_of_two(size, self.tiles["PART"] if weights.dtype == x.dtype else min(128, self.tiles["PART"]))
        parts = triton.cdiv(size, part)
        options = {"GATED": 0 if gate is None else gated, "SAVE": attended is not None, "LINEAR": linear is not None}
        # What is not there is not read: anything stands for it.
        gate, linear, memories, attended = (x if y is None else y for y in (gate, linear, memories, attended))
        gau_attention_values_kernel[((band[1] - band[0]) * splits * parts,)](
            weights, x, gate, linear, memories, seen, self.seen.lengths, attended, out,
            band[0], x.shape[1], group, *self.places, parts, splits, *strides(x, gate, linear), *out.stride()[-3:-1],
            S=linear.shape[2], SIZE=size, PART=part, **options, **self.product,
        )  # fmt: skip

    def forward(self, q, k, v, out, gate=None, gated=GATE, attended=None, linear=None, memories=None, group=1):
        """Into ``out`` and ``attended``; returns the rows' log-sum-exp, or what relu2 divides by, `[B, width]`."""
        levels, level = self.levels(q, k)
        weights = self.workspace(q, v.dtype)
        for band in self.bands:
            self.weights(band, q, k, levels, level, weights)
            seen = self.seen.key_blocks
            self.values(band, weights, v, seen, out, gate, gated, attended, linear, memories, group)
        return level

    def level(self, stats):
        """The level of `forward` from what it keeps of it, `[B, T]` or empty."""
        if self.relu2:
            return self.seen.level
        missing = self.seen.factor.shape[1] - stats.shape[1]
        return torch.nn.functional.pad(stats, (0, missing)) if missing else stats

    def gate_gradient(self, grad, u, attended, g, du, out=None, gated=GATE):
        """Writes g, du and, for swish, ``out``; returns the means of the rows, `[B, width]`."""
        mean, T, E = torch.empty_like(self.seen.factor), *grad.shape[1:]
        gau_attention_gate_gradient_kernel[(mean.numel() // 16,)](
            grad, u, attended, self.seen.lengths, g, du, g if out is None else out, mean, T, mean.shape[1] // 16,
            *strides(grad, u, attended, du), GATED=gated, E=E, BLOCK=16, PART=256,
        )  # fmt: skip
        return mean

    def gradients(
        self, q, k, v, g, level, mean, dv, gate=None, split=True, linear=None, memories=None, group=1
    ):  # fmt: skip
        """dq and, in parts, dk, in float32, from bands of keys: a band's A^T and dS^T, then its dv, dk and share of dq.

        dv is written; with a gate, times the derivative of its swish.
        """
        weights = self.workspace(q, v.dtype)
        # dS in float16 would underflow: it stays in float32 and is multiplied in tf32, which has the same digits.
        ds = self.workspace(q, torch.float32 if q.dtype == torch.float16 else q.dtype)
        splits = self.splits(self.bands[0][1], 6) if split else 1
        dq = torch.empty(q.shape, dtype=torch.float32, device=q.device)
        dk = torch.empty(splits, *k.shape, dtype=torch.float32, device=q.device)
        columns = self.tiles["COLUMNS"]
        narrow = {"NARROW": min(64, columns)} | self.product
        if ds.dtype == torch.bfloat16:
            narrow |= {"NARROW": min(32, columns)} | PAIRED_LONG
        part = power_of_two(q.shape[2], min(64, self.tiles["PART"]))
        parts = triton.cdiv(q.shape[2], part)
        seen = self.seen
        for start, end in self.bands:
            pieces = (end - start) * self.blocks * (self.tiles["BLOCK"] // columns)
            gau_attention_scores_gradient_kernel[(pieces,)](
                q, k, v, g, seen.keys, seen.query_blocks, seen.lengths, seen.factor, seen.slope, level, mean,
                weights, ds, start, *self.places, *strides(q, k, v, g),
                RELU2=self.relu2, S=q.shape[2], E=v.shape[2], COLUMNS=columns, **narrow,
            )  # fmt: skip
            band = start, end
            self.values(band, weights, g, seen.query_blocks, dv, gate, SLOPE, None, linear, memories, group)
            self.values(band, ds, q, seen.query_blocks, dk, splits=splits)
            gau_attention_queries_gradient_kernel[(q.shape[0] * self.blocks * parts,)](
                ds, k, seen.key_blocks, seen.lengths, dq, start, end, q.shape[1], *self.places, parts, *strides(k),
                S=q.shape[2], PART=part, **self.product,
            )  # fmt: skip
        return dq, dk


def gau_attention(
    q, k, v, u, lengths, cu_seqlens, kernel, causal, scale, relu2_length, save, *, tiles=None, band=None
):
    B, T, E = v.shape
    _check("gau_attention", lengths, cu_seqlens, T)
    if B * T == 0:
        stats = torch.empty((B, T) if save and kernel != "relu2" else 0, dtype=torch.float32, device=q.device)
        return v.new_empty(v.shape), v.new_empty(v.shape if save and u is not None else 0), stats
    q, k, v, u = aligned(q, k, v, u)
    run = _Bands(q, q.shape[2], lengths, cu_seqlens, kernel, causal, scale, relu2_length, tiles, band)
    out = v.new_empty(v.shape)
    attended = v.new_empty(v.shape) if save and u is not None else None
    level = run.forward(q, k, v, out, u, attended=attended)
    stats = level[:, :T].contiguous() if save and not run.relu2 else level.new_empty(0)
    return cut(out, E), v.new_empty(0) if attended is None else cut(attended, E), stats


def gau_attention_backward(
    grad, q, k, v, u, attended, stats, lengths, cu_seqlens, kernel, causal, scale, relu2_length,
    *, tiles=None, band=None,
):  # fmt: skip
    """dq, dk, dv and du, which is empty without a gate."""
    B, T, E = v.shape
    S = q.shape[2]
    if B * T == 0:
        return *(x.new_empty(x.shape) for x in (q, k, v)), v.new_empty(0 if u is None else u.shape)
    grad, q, k, v, u, attended = aligned(grad, q, k, v, u, attended)
    run = _Bands(q, q.shape[2], lengths, cu_seqlens, kernel, causal, scale, relu2_length, tiles, band)
    level = mean = run.level(stats)
    g, du, dv = grad, v.new_empty(0), v.new_empty(v.shape)
    if u is not None:
        g, du = v.new_empty(v.shape), v.new_empty(v.shape)
        mean = run.gate_gradient(grad, u, attended, g, du)
    elif not run.relu2:
        mean = run.gate_gradient(grad, grad, attended, grad, grad, gated=0)
    dq, dk = run.gradients(q, k, v, g, level, mean, dv)
    dk = dk.sum(0) if len(dk) > 1 else dk[0]
    return cut(dq.to(q.dtype), S), cut(dk.to(k.dtype), S), cut(dv, E), du if u is None else cut(du, E)
