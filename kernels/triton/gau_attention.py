"""Gated attention in Triton: the weights of a band of rows at a time, in memory, for all products that need them.

A program cannot hold a row of 1536 values, so several share the rows, and each would compute their scores again: with
256 values a program that is two fifths more work. Instead the weights of a band of ``BAND`` blocks of rows are written
once, `[BAND * BLOCK, T]` in the dtype of v, and every program reads them. Backward does so with bands of keys. Memory
stays O(T (S + E)).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from supy.kernels._tiles import LAUNCH, _inner, _load, aligned, cut, power_of_two, strides, tiles_for
from supy.reference.gau_attention import _check

# Blocks of rows at a time: with six parts of 256 values, the 132 multiprocessors of an H100. Short samples: as many as
# make the same workspace at 4096 tokens.
BAND, WIDTH = 22, 4096
SPLITS = 6  # shares of a sum of which there are few
LOG2E = math.log2(math.e)  # exponentials are powers of two


@triton.jit
def _place(number, samples, blocks, sample_step, block_step):
    """Sample and block of the numbered block, by the steps from sample to sample and from block to block."""
    return (number // sample_step % samples).to(tl.int64), number // block_step % blocks


@triton.jit
def _visible(keys, queries, tokens):
    """Whether queries see key tokens; rows of ``keys``, and tokens, spread along the axes of a tile."""
    return (tokens >= tl.load(keys + 2 * queries)) & (tokens < tl.load(keys + 2 * queries + 1))


@triton.jit
def _share(seen, at, split, splits):
    """First and last + 1 of a split of the blocks that block ``at`` sees."""
    first = tl.load(seen + 2 * at)
    last = tl.load(seen + 2 * at + 1)
    share = tl.cdiv(last - first, splits)
    first += split * share
    return first, tl.minimum(first + share, last)


@triton.jit
def _weights(s, visible, level, RELU2: tl.constexpr):
    """A from scores: relu(s)^2 * level, or 2^(s - level). The comparison lets NaN through."""
    if RELU2:
        s = tl.where(visible & ~(s < 0), s, 0.0)
        return s * s * level
    return tl.where(visible, tl.exp2(s - level), 0.0)


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
    factors = tl.load(factor + row)[:, None]
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    first, last = _share(seen, number, split, splits)
    for other in range(first, last):
        j = other * BLOCK + tl.arange(0, BLOCK)
        s = _inner(q, k, i, j, n, q_t, k_t, S, DEPTH, PRECISION) * factors
        s = tl.where(_visible(keys, row[:, None], j[None, :]), s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        sums = sums * tl.exp2(top - shift) + tl.sum(tl.exp2(s - shift[:, None]), 1)
        top = new
    tl.store(levels + split.to(tl.int64) * rows + row, top + tl.log2(sums))


@triton.jit(do_not_specialize=["start"])
def gau_attention_weights_kernel(
    q, k, keys, seen, lengths, factor, level, weights, start, samples, blocks, sample_step, block_step,
    q_b, q_t, k_b, k_t,
    RELU2: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A for a band of queries, `[BAND * BLOCK, width]`, tiles without a visible cell left out."""
    other = tl.program_id(0) % blocks
    slot = tl.program_id(0) // blocks
    sample, block = _place(start + slot, samples, blocks, sample_step, block_step)
    at = sample * blocks + block
    if (other >= tl.load(seen + 2 * at)) & (other < tl.load(seen + 2 * at + 1)):
        n = tl.load(lengths + sample)
        t = tl.arange(0, BLOCK)
        i = block * BLOCK + t
        j = other * BLOCK + t
        s = _inner(q + sample * q_b, k + sample * k_b, i, j, n, q_t, k_t, S, DEPTH, PRECISION)
        row = (at * BLOCK + t)[:, None]
        s *= tl.load(factor + row)
        a = _weights(s, _visible(keys, row, j[None, :]), tl.load(level + row), RELU2)
        cell = (slot * BLOCK + t).to(tl.int64)[:, None] * (blocks * BLOCK) + j[None, :]
        tl.store(weights + cell, a.to(weights.dtype.element_ty))


@triton.jit(do_not_specialize=["start"])
def gau_attention_values_kernel(
    weights, x, gate, linear, memories, seen, lengths, attended, out,
    start, T, group, samples, blocks, sample_step, block_step, parts, splits,
    x_b, x_t, gate_b, gate_t, linear_b, linear_t,
    GATED: tl.constexpr, SAVE: tl.constexpr, LINEAR: tl.constexpr, S: tl.constexpr, SIZE: tl.constexpr,
    BLOCK: tl.constexpr, PART: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """gate * (A x) for a band of rows, into `[splits, B, T, SIZE]`: a split is its share of the sum, 0 in padding.

    ``SAVE``: A x as well. ``LINEAR``: A x + linear memory, with a memory `[S, SIZE]` for every ``group`` of samples.
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
    at = ((split * samples + sample) * T + i)[:, None] * SIZE + e[None, :]
    inside = (i < T)[:, None] & (e < SIZE)[None, :]
    value = total.to(out.dtype.element_ty)
    if SAVE:
        tl.store(attended + at, value, mask=inside)
    if GATED:
        value = (value * _load(gate + sample * gate_b, i, e, n, gate_t, SIZE).to(tl.float32)).to(out.dtype.element_ty)
    tl.store(out + at, value, mask=inside)


@triton.jit
def gau_attention_gate_gradient_kernel(
    grad, u, attended, lengths, g, du, mean, T, blocks, grad_b, grad_t, u_b, u_t, attended_b, attended_t,
    GATED: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """g = u * grad, du = grad * (A v), and the mean A . dA = g . (A v) of each row, `[B, blocks * BLOCK]`."""
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.load(lengths + sample)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(0, E, PART):
        e = part + tl.arange(0, PART)
        slope = _load(grad + sample * grad_b, i, e, n, grad_t, E).to(tl.float32)
        value = _load(attended + sample * attended_b, i, e, n, attended_t, E).to(tl.float32)
        if GATED:
            at = (sample * T + i)[:, None] * E + e[None, :]
            inside = (i < T)[:, None] & (e < E)[None, :]
            tl.store(du + at, (slope * value).to(du.dtype.element_ty), mask=inside)
            slope = (slope * _load(u + sample * u_b, i, e, n, u_t, E)).to(g.dtype.element_ty)
            tl.store(g + at, slope, mask=inside)
        total += tl.sum(slope.to(tl.float32) * value, 1)
    tl.store(mean + sample * blocks * BLOCK + i, total)


@triton.jit(do_not_specialize=["start"])
def gau_attention_scores_gradient_kernel(
    q, k, v, g, keys, seen, lengths, factor, slope, level, mean, weights, ds,
    start, samples, blocks, sample_step, block_step, q_b, q_t, k_b, k_t, v_b, v_t, g_b, g_t,
    RELU2: tl.constexpr, S: tl.constexpr, E: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
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
        column = piece * COLUMNS + tl.arange(0, COLUMNS)
        j = block * BLOCK + column
        d = _inner(g + sample * g_b, v + sample * v_b, i, j, n, g_t, v_t, E, DEPTH, PRECISION)
        s = _inner(q + sample * q_b, k + sample * k_b, i, j, n, q_t, k_t, S, DEPTH, PRECISION)
        row = (sample * blocks * BLOCK + i)[:, None]
        s *= tl.load(factor + row)
        visible = _visible(keys, row, j[None, :])
        a = _weights(s, visible, tl.load(level + row), RELU2)
        cell = (slot * BLOCK + column).to(tl.int64)[None, :] * (blocks * BLOCK) + i[:, None]
        tl.store(weights + cell, a.to(weights.dtype.element_ty))
        if RELU2:
            d = tl.where(visible & ~(s < 0), d * s * tl.load(slope + row), 0.0)
        else:
            d = tl.where(visible, a * (d - tl.load(mean + row)) * tl.load(slope + row), 0.0)
        tl.store(ds + cell, d.to(ds.dtype.element_ty))


@triton.jit(do_not_specialize=["start", "end"])
def gau_attention_queries_gradient_kernel(
    ds, k, seen, lengths, dq, start, end, T, samples, blocks, sample_step, block_step, parts, k_b, k_t,
    S: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to dq `[B, T, S]`, in float32, what a band of keys gives."""
    part = tl.program_id(0) % parts
    at = tl.program_id(0) // parts
    sample = at // blocks
    block = at % blocks
    # Those blocks of keys that see these queries are those that these queries see; of them, the ones in the band.
    offset = sample * sample_step
    first = tl.maximum(tl.load(seen + 2 * at), tl.cdiv(tl.maximum(start - offset, 0), block_step))
    last = tl.minimum(tl.load(seen + 2 * at + 1), tl.cdiv(tl.maximum(end - offset, 0), block_step))
    if first < last:
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
        tl.store(to, tl.load(to, mask=inside, other=0.0) + total, mask=inside)


class _Bands:
    """What forward and backward share: who sees whom, the factors of the scores, and the launches for a band."""

    def __init__(self, q, lengths, cu_seqlens, kernel, causal, scale, relu2_length, tiles, band):
        B, T, _ = q.shape
        self.relu2 = kernel == "relu2"
        self.tiles = tiles or tiles_for(q.dtype)
        block = self.tiles["BLOCK"]
        self.blocks = triton.cdiv(T, block)
        band = band or BAND * max(1, WIDTH // (self.blocks * block))
        self.bands = [(i, min(i + band, B * self.blocks)) for i in range(0, B * self.blocks, band)]
        # Causal blocks of one place in their samples have equal work; else those of one sample share what they read.
        self.places = (B, self.blocks, *((1, B) if causal else (self.blocks, 1)))
        depth = min(block, self.tiles["DEPTH"])
        self.product = {"BLOCK": block, "DEPTH": depth, "PRECISION": self.tiles["PRECISION"]} | LAUNCH

        token = torch.arange(self.blocks * block, dtype=torch.int32, device=q.device)
        first, last = token.new_zeros(1, 1), token.new_full((B, 1), T)
        if lengths is not None:
            last = lengths.int()[:, None]
        self.lengths = last.flatten().contiguous()
        if cu_seqlens is not None:
            ends = cu_seqlens.int()
            sequence = torch.searchsorted(ends, token.clamp(max=T - 1), right=True)
            first, last = ends[sequence - 1][None], ends[sequence][None]
        padded = token >= self.lengths[:, None]

        def seen(first, last):
            """First and last + 1 of what each token sees, `[B, width, 2]`, T and 0 in padding; and by blocks."""
            ends = torch.where(padded, T, first), torch.where(padded, 0, last)
            first, last = (x.view(B, self.blocks, block) for x in ends)
            first, last = first.amin(2) // block, (last.amax(2) + block - 1) // block
            return torch.stack(ends, 2), torch.stack((first, last), 2)

        self.keys, self.key_blocks = seen(first, torch.minimum(last, token + 1) if causal else last)
        _, self.query_blocks = seen(token if causal else first, last)

        count = (self.keys[..., 1] - self.keys[..., 0]).clamp(min=0)
        self.factor = torch.full(count.shape, scale, dtype=torch.float32, device=q.device)
        if self.relu2:
            divisor = count.clamp(min=1) if relu2_length is None else torch.full_like(self.factor, relu2_length)
            self.level = 1 / divisor
            self.slope = 2 * self.factor * self.level  # of A, over relu(s)
            return
        if kernel == "softmax_plus":
            self.factor *= count.clamp(min=16).log() / math.log(512)
        self.slope = self.factor * (count > 1)  # of A, over A; the weight of an only key is 1, whatever its score
        self.factor *= LOG2E

    def workspace(self, q, dtype):
        block = self.tiles["BLOCK"]
        return q.new_empty(self.bands[0][1] * block, self.blocks * block, dtype=dtype)

    def weights(self, band, q, k, level, out):
        gau_attention_weights_kernel[((band[1] - band[0]) * self.blocks,)](
            q, k, self.keys, self.key_blocks, self.lengths, self.factor, level, out, band[0], *self.places,
            *strides(q, k), RELU2=self.relu2, S=q.shape[2], **self.product,
        )  # fmt: skip

    def values(self, band, weights, x, gate, seen, out, attended=None, linear=None, memories=None, group=1, splits=1):
        size = x.shape[2]
        # A product of float32 for float16 takes twice the memory.
        part = power_of_two(size, self.tiles["PART"] if weights.dtype == x.dtype else min(128, self.tiles["PART"]))
        parts = triton.cdiv(size, part)
        options = {"GATED": gate is not None, "SAVE": attended is not None, "LINEAR": linear is not None}
        # What is not there is not read: anything stands for it.
        gate, linear, memories, attended = (x if y is None else y for y in (gate, linear, memories, attended))
        gau_attention_values_kernel[((band[1] - band[0]) * splits * parts,)](
            weights, x, gate, linear, memories, seen, self.lengths, attended, out,
            band[0], x.shape[1], group, *self.places, parts, splits, *strides(x, gate, linear),
            S=linear.shape[2], SIZE=size, PART=part, **options, **self.product,
        )  # fmt: skip

    def gradients(self, q, k, v, g, level, mean, splits, linear=None, memories=None, group=1):
        """dq, dk and dv, from bands of keys: A^T and dS^T of a band, then its dv and dk, and its share of dq."""
        weights = self.workspace(q, v.dtype)
        # dS in float16 would underflow: it stays in float32 and is multiplied in tf32, which has the same digits.
        ds = self.workspace(q, torch.float32 if q.dtype == torch.float16 else q.dtype)
        dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        dk = torch.empty(splits, *k.shape, dtype=torch.float32, device=q.device)
        dv = v.new_empty(v.shape)
        columns = self.tiles["COLUMNS"]
        part = power_of_two(q.shape[2], min(128, self.tiles["PART"]))
        parts = triton.cdiv(q.shape[2], part)
        for start, end in self.bands:
            pieces = (end - start) * self.blocks * (self.tiles["BLOCK"] // columns)
            gau_attention_scores_gradient_kernel[(pieces,)](
                q, k, v, g, self.keys, self.query_blocks, self.lengths, self.factor, self.slope, level, mean,
                weights, ds, start, *self.places, *strides(q, k, v, g),
                RELU2=self.relu2, S=q.shape[2], E=v.shape[2], COLUMNS=columns, **self.product,
            )  # fmt: skip
            band = start, end
            self.values(band, weights, g, None, self.query_blocks, dv, None, linear, memories, group)
            self.values(band, ds, q, None, self.query_blocks, dk, splits=splits)
            gau_attention_queries_gradient_kernel[(q.shape[0] * self.blocks * parts,)](
                ds, k, self.key_blocks, self.lengths, dq, start, end, q.shape[1], *self.places, parts, *strides(k),
                S=q.shape[2], PART=part, **self.product,
            )  # fmt: skip
        return dq.to(q.dtype), dk.sum(0).to(k.dtype), dv


def gau_attention(
    q, k, v, u, lengths, cu_seqlens, kernel, causal, scale, relu2_length, save, *, tiles=None, band=None
):
    B, T, E = v.shape
    _check("gau_attention", lengths, cu_seqlens, T)
    if B * T == 0:
        stats = torch.empty((B, T) if save and kernel != "relu2" else 0, dtype=torch.float32, device=q.device)
        return v.new_empty(v.shape), v.new_empty(v.shape if save and u is not None else 0), stats
    q, k, v, u = aligned(q, k, v, u)
    run = _Bands(q, lengths, cu_seqlens, kernel, causal, scale, relu2_length, tiles, band)
    stats = run.factor.new_empty(0)
    if run.relu2:
        level = run.level
    else:
        levels = torch.empty(SPLITS, *run.factor.shape, dtype=torch.float32, device=q.device)
        gau_attention_rows_kernel[(B * run.blocks * SPLITS,)](
            q, k, run.keys, run.key_blocks, run.lengths, run.factor, levels, run.factor.numel(), run.blocks, SPLITS,
            *strides(q, k), S=q.shape[2], **run.product,
        )  # fmt: skip
        log_sum = levels.mul_(1 / LOG2E).logsumexp(0)
        level = log_sum * LOG2E
        if save:
            stats = log_sum[:, :T].contiguous()
    out = v.new_empty(v.shape)
    attended = v.new_empty(v.shape) if save and u is not None else None
    weights = run.workspace(q, v.dtype)
    for band in run.bands:
        run.weights(band, q, k, level, weights)
        run.values(band, weights, v, u, run.key_blocks, out, attended)
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
    run = _Bands(q, lengths, cu_seqlens, kernel, causal, scale, relu2_length, tiles, band)
    level = torch.nn.functional.pad(stats * LOG2E, (0, run.factor.shape[1] - T)) if stats.numel() else run.level
    g, du, mean = grad, v.new_empty(0), torch.empty_like(level)
    if u is not None:
        g, du = v.new_empty(v.shape), v.new_empty(v.shape)
    if u is not None or not run.relu2:
        gate = grad if u is None else u
        gau_attention_gate_gradient_kernel[(mean.numel() // 16,)](
            grad, gate, attended, run.lengths, g, du, mean, T, mean.shape[1] // 16, *strides(grad, gate, attended),
            GATED=u is not None, E=v.shape[2], BLOCK=16, PART=256,
        )  # fmt: skip

    dq, dk, dv = run.gradients(q, k, v, g, level, mean, SPLITS)
    return cut(dq, S), cut(dk, S), cut(dv, E), du if u is None else cut(du, E)
