"""Efficient GlobalPointer in Triton: post 8877; one inner product for all heads, whose tiles are never stored."""

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
from supy.kernels.global_pointer import (
    _PRECISE,
    BLOCK,
    DEPTH,
    LAUNCH,
    WIDE,
    _others,
    _products,
    _rows,
    _visible,
    at_once,
    lengths_of,
)
from supy.reference import efficient_global_pointer as reference
from supy.reference._masks import check_lengths

HEADS = 128  # heads at a time
LOSS_BLOCK = 32  # starts and ends of a tile of the loss, so that sums of that many heads fit into registers


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
        q += sample * q0
        k += sample * k0
        kept = _rows(q, i, n, q1, q2, 0, D, DEPTH)
        a = _products(kept, q, k, i, j, n, q1, q2, k1, k2, BLOCK, D, DEPTH) * scale
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
def efficient_global_pointer_peaks_kernel(
    y, lengths, top_y, peak_y, T, H, blocks, parts, y0, y1, y2, BLOCK: tl.constexpr, HEADS: tl.constexpr
):
    """top_y[b, j] = max over heads of y, and peak_y[b, h] = max over tokens."""
    pid = tl.program_id(0)
    part = pid % (blocks + parts)
    sample = (pid // (blocks + parts)).to(tl.int64)
    n = tl.load(lengths + sample)
    y += sample * y0
    if part < blocks:
        j = part * BLOCK + tl.arange(0, BLOCK)
        top = tl.full([BLOCK], float("-inf"), tl.float32)
        for first in range(0, H, HEADS):
            h = first + tl.arange(0, HEADS)
            at = y + j.to(tl.int64)[:, None] * y1 + h[None, :] * y2
            values = tl.load(at, mask=(j < n)[:, None] & (h < H)[None, :], other=float("-inf"))
            top = tl.maximum(top, tl.max(values.to(tl.float32), 1))
        tl.store(top_y + sample * T + j, top, mask=j < T)
    else:
        h = (part - blocks) * HEADS + tl.arange(0, HEADS)
        peak = tl.full([HEADS], float("-inf"), tl.float32)
        for first in range(0, n, BLOCK):
            j = first + tl.arange(0, BLOCK)
            at = y + j.to(tl.int64)[:, None] * y1 + h[None, :] * y2
            values = tl.load(at, mask=(j < n)[:, None] & (h < H)[None, :], other=float("-inf"))
            peak = tl.maximum(peak, tl.max(values.to(tl.float32), 0))
        tl.store(peak_y + sample * H + h, peak, mask=h < H)


@triton.jit
def _biases(z, tokens, heads, n, H, z_t, z_h):
    """z[tokens, heads] in float32; -inf from token n and head H on."""
    at = z + tokens.to(tl.int64)[:, None] * z_t + heads[None, :] * z_h
    return tl.load(at, mask=(tokens < n)[:, None] & (heads < H)[None, :], other=float("-inf")).to(tl.float32)


@triton.jit
def _ends(y, peak_y, j, h, sample, n, H, y1, y2):
    """e^(y_jh - peak_y[h]), the weight of an end."""
    best = tl.load(peak_y + sample * H + h, mask=h < H, other=0.0)
    best = tl.where(best == float("-inf"), 0.0, best)
    return tl.exp(_biases(y, j, h, n, H, y1, y2) - best[None, :])


@triton.jit
def efficient_global_pointer_rows_kernel(
    q, k, x, y, top_y, peak_y, lengths, tiles, keys, peak, sums, tops, totals, T, H, blocks, parts, scale,
    q0, q1, q2, k0, k1, k2, x0, x1, x2, y0, y1, y2,
    TRIL: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """peak[i] = max of a_ij and sums[i, h] = sum of e^(a_ij - peak[i] + y_jh - peak_y[h]) over negative cells (i, j).

    And of a block of starts, ``tops`` and ``totals`` `[B, blocks, H]`: the sum over i of sums[i] e^(x_i + peak[i]) in
    units of its largest exponential.
    """
    pid = tl.program_id(0)
    part = pid % parts
    row = pid // parts % blocks
    sample = (pid // parts // blocks).to(tl.int64)
    n = tl.load(lengths + sample)
    q += sample * q0
    k += sample * k0
    i = row * BLOCK + tl.arange(0, BLOCK)
    h = part * HEADS + tl.arange(0, HEADS)
    x += sample * x0
    y += sample * y0
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK, HEADS], tl.float32)
    first, last = _others(row, n, BLOCK, TRIL, False)
    kept = _rows(q, i, n, q1, q2, 0, D, DEPTH)
    for column in range(first, last):
        j = column * BLOCK + tl.arange(0, BLOCK)
        a = _products(kept, q, k, i, j, n, q1, q2, k1, k2, BLOCK, D, DEPTH) * scale
        positive = _positive(tiles, keys, (sample * blocks + row) * blocks + column, i[:, None], j[None, :], H, BLOCK)
        best_end = tl.load(top_y + sample * T + j, mask=j < n, other=float("-inf"))
        out = positive | (_visible(i[:, None], j[None, :], n, TRIL) == 0) | (best_end == float("-inf"))[None, :]
        a = tl.where(out, float("-inf"), a)
        new = tl.maximum(top, tl.max(a, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        weights = _ends(y, peak_y, j, h, sample, n, H, y1, y2)
        total *= tl.exp(top - shift)[:, None]
        total = tl.dot(tl.exp(a - shift[:, None]), weights, total, input_precision=_PRECISE)
        top = new
    inside = (i < T)[:, None] & (h < H)[None, :]
    tl.store(sums + (sample * T + i)[:, None] * H + h[None, :], total, mask=inside)
    if part == 0:
        tl.store(peak + sample * T + i, top, mask=i < T)
    exponent = _biases(x, i, h, n, H, x1, x2) + top[:, None]
    highest = tl.max(exponent, 0)
    total *= tl.exp(exponent - tl.where(highest == float("-inf"), 0.0, highest)[None, :])
    at = (sample * blocks + row) * H + h
    tl.store(tops + at, highest, mask=h < H)
    tl.store(totals + at, tl.sum(total, 0), mask=h < H)


@triton.jit
def _entries(q, k, x, y, keys, first, begin, end, h, H, blocks, scale, q1, q2, k1, k2, x1, x2, y1, y2,
             BLOCK: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr, CELLS: tl.constexpr):  # fmt: skip
    """Of some sorted spans: scores of their cells for the heads h, which of them the span makes positive, and which
    are negative: those that no span makes positive, said by the first span of a cell."""
    c = first + tl.arange(0, CELLS)
    inside = c < end
    key = tl.load(keys + c, mask=inside, other=0)
    before = tl.load(keys + c - 1, mask=inside & (c > begin), other=-H)
    cell = key // H
    start, stop = _place(cell, blocks, BLOCK)
    a = _at_cells(q, k, start, stop, inside, q1, q2, k1, k2, scale, D, DEPTH)
    there = inside[:, None] & (h < H)[None, :]
    s = a[:, None] + tl.load(x + start[:, None] * x1 + h[None, :] * x2, mask=there, other=0.0).to(tl.float32)
    s += tl.load(y + stop[:, None] * y1 + h[None, :] * y2, mask=there, other=0.0).to(tl.float32)
    own = there & (key != before)[:, None] & (h[None, :] == (key % H)[:, None])
    fresh = inside & (cell != before // H)
    taken = (h < 0)[None, :] & (c < 0)[:, None]
    following = fresh
    step = 0
    while tl.sum(following.to(tl.int32), 0) > 0:
        following &= c + step < end
        other = tl.load(keys + c + step, mask=following, other=0)
        following &= other // H == cell
        taken |= following[:, None] & (h[None, :] == (other % H)[:, None])
        step += 1
    return c, s, own & (s != float("-inf")), there & fresh[:, None] & (taken == 0)


@triton.jit
def efficient_global_pointer_combine_kernel(
    q, k, x, y, peak_y, tiles, keys, tops, totals, base, loss, status, ds, da, N, H, blocks, parts,
    scale, share, limit,
    q0, q1, q2, k0, k1, k2, x0, x1, x2, y0, y1, y2,
    GRADIENTS: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr, HEADS: tl.constexpr,
    CELLS: tl.constexpr,
):  # fmt: skip
    """The loss of some heads of a sample, and what its gradients need.

    ``base`` `[B, H]`: e^(x_i + peak[i] + base) is what sums[i] weighs in the gradient; ``ds`` `[N, H]`: gradients of
    the scores of cells that are positive for some head, span by span, and ``da`` `[parts, N]` their sums over heads.
    ``status`` is below 0 where data is wrong, above where a head's sum underflows though it has cells.
    """
    pid = tl.program_id(0)
    part = pid % parts
    sample = (pid // parts).to(tl.int64)
    h = part * HEADS + tl.arange(0, HEADS)
    top = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    for first in range(0, blocks, CELLS):
        row = first + tl.arange(0, CELLS)
        at = (sample * blocks + row)[:, None] * H + h[None, :]
        there = (row < blocks)[:, None] & (h < H)[None, :]
        others = tl.load(tops + at, mask=there, other=float("-inf"))
        new = tl.maximum(top, tl.max(others, 0))
        shift = tl.where(new == float("-inf"), 0.0, new)
        part_sums = tl.load(totals + at, mask=there, other=0.0) * tl.exp(others - shift[None, :])
        total = total * tl.exp(top - shift) + tl.sum(part_sums, 0)
        top = new
    best = tl.load(peak_y + sample * H + h, mask=h < H, other=0.0)
    # Products below the smallest normal number are lost, as in the reference; nothing is where there are none.
    small = total < limit
    faint = tl.sum((small & (top > float("-inf")) & (best > float("-inf")) & (h < H)).to(tl.int32), 0)
    best = tl.where(best == float("-inf"), 0.0, best)
    sum_top = tl.where(small, float("-inf"), top + best)
    sum_total = tl.where(small, 0.0, total)
    q += sample * q0
    k += sample * k0
    x += sample * x0
    y += sample * y0
    down_top = tl.full([HEADS], float("-inf"), tl.float32)
    down_total = tl.zeros([HEADS], tl.float32)
    begin = tl.load(tiles + sample * blocks * blocks)
    end = tl.load(tiles + (sample + 1) * blocks * blocks)
    for first in range(begin, end, CELLS):
        _, s, own, rest = _entries(
            q, k, x, y, keys, first, begin, end, h, H, blocks, scale, q1, q2, k1, k2, x1, x2, y1, y2,
            BLOCK, D, DEPTH, CELLS,
        )  # fmt: skip
        sum_top, sum_total = _add_exponentials(sum_top, sum_total, tl.where(rest, s, float("-inf")))
        down_top, down_total = _add_exponentials(down_top, down_total, tl.where(own, -s, float("-inf")))
    log_negative = _log_one_plus(sum_top, sum_total)
    log_positive = _log_one_plus(down_top, down_total)
    tl.store(base + sample * H + h, tl.where(small, float("-inf"), best - log_negative), mask=h < H)
    tl.store(loss + pid, tl.sum(tl.where(h < H, log_negative + log_positive, 0.0), 0) * share)
    first_key = tl.load(keys)
    tl.store(status + pid, tl.where(first_key < 0, first_key, faint))
    if GRADIENTS:
        for first in range(begin, end, CELLS):
            c, s, own, rest = _entries(
                q, k, x, y, keys, first, begin, end, h, H, blocks, scale, q1, q2, k1, k2, x1, x2, y1, y2,
                BLOCK, D, DEPTH, CELLS,
            )  # fmt: skip
            up = tl.exp(tl.where(rest, s - log_negative[None, :], float("-inf")))
            slope = (up - tl.exp(tl.where(own, -s - log_positive[None, :], float("-inf")))) * share
            at = ds + c.to(tl.int64)[:, None] * H + h[None, :]
            tl.store(at, slope, mask=(c < end)[:, None] & (h < H)[None, :])
            tl.store(da + tl.cast(part, tl.int64) * N + c, tl.sum(slope, 1), mask=c < end)


@triton.jit
def _exponentials(
    kept, own, other, t, u, peak, top_y, sample, n, tiles, keys, T, H, tile, scale, own_t, own_d, other_t, other_d,
    COLUMNS: tl.constexpr, TRIL: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """P[t, u] = e^(a_tu - peak[t]), or with ``COLUMNS`` e^(a_ut - peak[u]), 0 where the cell is not negative."""
    a = _products(kept, own, other, t, u, n, own_t, own_d, other_t, other_d, BLOCK, D, DEPTH) * scale
    if COLUMNS:
        start, end = u, t
    else:
        start, end = t, u
    shift = tl.load(peak + sample * T + start, mask=start < n, other=0.0)
    best_end = tl.load(top_y + sample * T + end, mask=end < n, other=float("-inf"))
    if COLUMNS:
        start, end, shift, best_end = start[None, :], end[:, None], shift[None, :], best_end[:, None]
    else:
        start, end, shift, best_end = start[:, None], end[None, :], shift[:, None], best_end[None, :]
    positive = _positive(tiles, keys, tile, start, end, H, BLOCK)
    out = positive | (_visible(start, end, n, TRIL) == 0) | (best_end == float("-inf"))
    return tl.exp(tl.where(out, float("-inf"), a - shift))


@triton.jit
def _starts(x, peak, base, i, h, sample, n, T, H, x1, x2):
    """What sums[i, h] weighs in the gradient."""
    top = tl.load(peak + sample * T + i, mask=i < n, other=float("-inf"))
    of_head = tl.load(base + sample * H + h, mask=h < H, other=float("-inf"))
    return tl.exp(_biases(x, i, h, n, H, x1, x2) + top[:, None] + of_head[None, :])


@triton.jit
def _gradient(
    own, other, own_weights, other_weights, peak, top_y, lengths, tiles, keys, da, out, pid, N, T, H, blocks, parts,
    head_parts, scale, share,
    own0, own1, own2, other0, other1, other2,
    COLUMNS: tl.constexpr, TRIL: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr,
    HEADS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """out[t] = scale * sum over u of da[t, u] other[u], where da = P * (own_weights @ other_weights^T)."""
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
    kept = _rows(own, t, n, own1, own2, 0, D, DEPTH)
    for other_block in range(first, last):
        u = other_block * BLOCK + tl.arange(0, BLOCK)
        weights = tl.zeros([BLOCK, BLOCK], tl.float32)
        for head in range(0, H, HEADS):
            h = head + tl.arange(0, HEADS)
            at = own_weights + (sample * T + t)[:, None] * H + h[None, :]
            w = tl.load(at, mask=(t < n)[:, None] & (h < H)[None, :], other=0.0)
            at = other_weights + (sample * T + u)[:, None] * H + h[None, :]
            v = tl.load(at, mask=(u < n)[:, None] & (h < H)[None, :], other=0.0)
            weights = tl.dot(w, tl.trans(v), weights, input_precision=_PRECISE)
        if COLUMNS:
            start, end = u[None, :], t[:, None]
            tile = (sample * blocks + other_block) * blocks + block
        else:
            start, end = t[:, None], u[None, :]
            tile = (sample * blocks + block) * blocks + other_block
        P = _exponentials(
            kept, own, other, t, u, peak, top_y, sample, n, tiles, keys, T, H, tile, scale, own1, own2, other1, other2,
            COLUMNS, TRIL, BLOCK, D, DEPTH,
        )  # fmt: skip
        slope = P * weights * share
        begin = tl.load(tiles + tile)
        stop = tl.load(tiles + tile + 1)
        if begin < stop:
            for c in range(begin, stop):
                cell = (tl.load(keys + c) // H % (BLOCK * BLOCK)).to(tl.int32)
                here = (start % BLOCK == cell // BLOCK) & (end % BLOCK == cell % BLOCK)
                for of_heads in range(head_parts):
                    value = tl.load(da + tl.cast(of_heads, tl.int64) * N + c)
                    slope += tl.where(here, value, 0.0)
        at = other + u.to(tl.int64)[:, None] * other1 + d[None, :] * other2
        features = tl.load(at, mask=(u < n)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        gradient = tl.dot(slope, features, gradient, input_precision=_PRECISE)
    at = out + (sample * T + t)[:, None] * D + d[None, :]
    tl.store(at, gradient * scale, mask=(t < T)[:, None] & (d < D)[None, :])


@triton.jit
def efficient_global_pointer_gradient_kernel(
    q, k, ex, ey, peak, top_y, lengths, tiles, keys, da, dq, dk, N, T, H, blocks, parts, head_parts, programs,
    scale, share,
    q0, q1, q2, k0, k1, k2,
    TRIL: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr, HEADS: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """dq by the first half of the programs, dk by the second; `[B, T, D]`, of which one writes ``PART`` features."""
    pid = tl.program_id(0)
    if pid < programs:
        _gradient(
            q, k, ex, ey, peak, top_y, lengths, tiles, keys, da, dq, pid, N, T, H, blocks, parts,
            head_parts, scale, share, q0, q1, q2, k0, k1, k2, False, TRIL, BLOCK, D, DEPTH, HEADS, PART,
        )  # fmt: skip
    else:
        _gradient(
            k, q, ey, ex, peak, top_y, lengths, tiles, keys, da, dk, pid - programs, N, T, H, blocks, parts,
            head_parts, scale, share, k0, k1, k2, q0, q1, q2, True, TRIL, BLOCK, D, DEPTH, HEADS, PART,
        )  # fmt: skip


@triton.jit
def _add_cells(total, ds, tiles, keys, tile, count, token, h, H, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Adds the rows of ``ds`` of ``count`` tiles to those of their tokens: starts, or ends with ``COLUMNS``."""
    for c in range(tl.load(tiles + tile), tl.load(tiles + tile + count)):
        cell = (tl.load(keys + c) // H % (BLOCK * BLOCK)).to(tl.int32)
        at = cell % BLOCK if COLUMNS else cell // BLOCK
        row = tl.load(ds + tl.cast(c, tl.int64) * H + h, mask=h < H, other=0.0)
        total += tl.where((token % BLOCK == at)[:, None], row[None, :], 0.0)
    return total


@triton.jit
def efficient_global_pointer_biases_kernel(
    q, k, x, y, peak, peak_y, top_y, base, sums, lengths, tiles, keys, ds, ex, ey, dx, dy, T, H, blocks, parts, scale, share,
    q0, q1, q2, k0, k1, k2, x0, x1, x2, y0, y1, y2,
    TRIL: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DEPTH: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """dy and dx `[B, T, H]` of a block of tokens.

    dy[j, h] = share * e^(y_jh - peak_y[h]) * sum over i of P[i, j] weight of start i, and dx[i, h] = share *
    sums[i, h] * that weight; both and what positive cells add. The weights of starts and ends are left in ex and ey.
    """
    pid = tl.program_id(0)
    part = pid % parts
    block = pid // parts % blocks
    sample = (pid // parts // blocks).to(tl.int64)
    n = tl.load(lengths + sample)
    q += sample * q0
    k += sample * k0
    x += sample * x0
    y += sample * y0
    t = block * BLOCK + tl.arange(0, BLOCK)
    h = part * HEADS + tl.arange(0, HEADS)
    inside = (t < T)[:, None] & (h < H)[None, :]
    at = (sample * T + t)[:, None] * H + h[None, :]
    total = tl.load(sums + at, mask=inside & (t < n)[:, None], other=0.0)
    weights = _starts(x, peak, base, t, h, sample, n, T, H, x1, x2)
    tl.store(ex + at, weights, mask=inside)
    total *= weights * share
    total = _add_cells(total, ds, tiles, keys, (sample * blocks + block) * blocks, blocks, t, h, H, BLOCK, False)
    tl.store(dx + at, total, mask=inside)

    total = tl.zeros([BLOCK, HEADS], tl.float32)
    added = tl.zeros([BLOCK, HEADS], tl.float32)
    first, last = _others(block, n, BLOCK, TRIL, True)
    kept = _rows(k, t, n, k1, k2, 0, D, DEPTH)
    for row in range(first, last):
        i = row * BLOCK + tl.arange(0, BLOCK)
        tile = (sample * blocks + row) * blocks + block
        P = _exponentials(
            kept, k, q, t, i, peak, top_y, sample, n, tiles, keys, T, H, tile, scale, k1, k2, q1, q2,
            True, TRIL, BLOCK, D, DEPTH,
        )  # fmt: skip
        weights = _starts(x, peak, base, i, h, sample, n, T, H, x1, x2)
        total = tl.dot(P, weights, total, input_precision=_PRECISE)
        added = _add_cells(added, ds, tiles, keys, tile, 1, t, h, H, BLOCK, True)
    weights = _ends(y, peak_y, t, h, sample, n, H, y1, y2)
    tl.store(ey + at, weights, mask=inside)
    total *= weights * share
    tl.store(dy + at, total + added, mask=inside)


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
            TRIL=tril, BLOCK=block, D=D, DEPTH=at_once(D, DEPTH), PART=part, **LAUNCH,
        )  # fmt: skip
    return out


def efficient_global_pointer_loss(
    q, k, start_bias, end_bias, spans, lengths, tril, scale, gradients, block=LOSS_BLOCK
):
    """(loss, dq, dk, dstart_bias, dend_bias), float32, by the reference's factorised sum.

    P is never stored, and shifted by the maximum of its row, which a program finds on the way. Where a head's sum
    underflows all the same, the reference computes the whole loss.
    """
    B, T, H = start_bias.shape
    D = q.shape[2]
    tensors = q, k, start_bias, end_bias
    arguments = "efficient_global_pointer_loss", spans, lengths, (B, H, T), tril
    out = [z.new_empty(z.shape if gradients else 0, dtype=torch.float32) for z in tensors]
    if B * T * H == 0:
        refuse(*arguments)
        return q.new_zeros((), dtype=torch.float32), *(z.zero_() for z in out)
    blocks, heads, N = triton.cdiv(T, block), at_once(H, HEADS), len(spans)
    parts = triton.cdiv(H, heads)
    known = prepare(*arguments[1:], False, block)
    lengths_, tiles, keys = known
    sizes = [B * T, B * T, B * T * H, B * H, B * H, B * blocks * H, B * blocks * H]
    sizes += [N * H, parts * N, B * T * H, B * T * H] if gradients else [0] * 4
    top_y, peak, sums, peak_y, base, tops, totals, ds, da, ex, ey = workspace(q.device, *sizes)
    loss, status = torch.empty(B * parts, dtype=torch.float32, device=q.device), keys.new_empty(B * parts)
    strides = [step for z in tensors for step in z.stride()]
    sizes = {"BLOCK": block, "D": D}
    tile = sizes | {"TRIL": tril, "DEPTH": at_once(D, DEPTH)} | WIDE

    efficient_global_pointer_peaks_kernel[(B * (blocks + parts),)](
        end_bias, lengths_, top_y, peak_y, T, H, blocks, parts, *end_bias.stride(), BLOCK=block, HEADS=heads
    )
    efficient_global_pointer_rows_kernel[(B * blocks * parts,)](
        *tensors, top_y, peak_y, *known, peak, sums, tops, totals, T, H, blocks, parts, scale, *strides,
        HEADS=heads, **tile,
    )  # fmt: skip
    limits = torch.finfo(torch.float32)
    efficient_global_pointer_combine_kernel[(B * parts,)](
        *tensors, peak_y, tiles, keys, tops, totals, base, loss, status, ds, da, N, H, blocks, parts,
        scale, 1 / B, T * T * limits.tiny / limits.eps, *strides,
        GRADIENTS=gradients, HEADS=heads, DEPTH=at_once(D), CELLS=16, num_warps=8, **sizes,
    )  # fmt: skip
    status = fetch(status)
    if gradients:
        dq, dk, dx, dy = out
        efficient_global_pointer_biases_kernel[(B * blocks * parts,)](
            *tensors, peak, peak_y, top_y, base, sums, *known, ds, ex, ey, dx, dy, T, H, blocks, parts, scale, 1 / B,
            *strides,
            HEADS=heads, **tile,
        )  # fmt: skip
    if gradients and D:
        part = at_once(D)
        pieces = triton.cdiv(D, part)
        programs = B * blocks * pieces
        efficient_global_pointer_gradient_kernel[(2 * programs,)](
            q, k, ex, ey, peak, top_y, *known, da, dq, dk, N, T, H, blocks, pieces, parts, programs,
            scale, 1 / B, *q.stride(), *k.stride(), PART=part, HEADS=min(heads, 16), **tile,
        )  # fmt: skip
    loss = loss.sum()
    status = status()
    if min(status) < 0:
        refuse(*arguments)
    if max(status) > 0:
        loss, *out = reference.efficient_global_pointer_loss(*tensors, spans, lengths, tril, scale, gradients)
    return loss, *out
