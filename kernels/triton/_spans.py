"""What the GlobalPointer losses in Triton share: positive cells sorted by tile, and logarithms of sums."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from supy.reference._masks import check_lengths, check_spans

SORT_AT_ONCE = 2048  # spans: fewer are sorted by the kernel that numbers them


@triton.jit
def _keys(
    spans, given, row, N, B, H, T, blocks, spans0, spans1, given0,
    BY_HEAD: tl.constexpr, TRIL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A number for each span, in the order of tiles and cells in a tile; -1 where it names no visible cell."""
    at = spans + row.to(tl.int64) * spans0
    b = tl.load(at, mask=row < N, other=0)
    h = tl.load(at + spans1, mask=row < N, other=0)
    i = tl.load(at + 2 * spans1, mask=row < N, other=0)
    j = tl.load(at + 3 * spans1, mask=row < N, other=0)
    right = (b >= 0) & (b < B) & (h >= 0) & (h < H) & (i >= 0) & (i < T) & (j >= 0) & (j < T)
    if TRIL:
        right &= i <= j
    if given is not None:
        n = tl.load(given + b * given0, mask=right & (row < N), other=0)
        right &= (i < n) & (j < n)
    group = b * H + h if BY_HEAD else b
    key = ((group * blocks + i // BLOCK) * blocks + j // BLOCK) * BLOCK + i % BLOCK
    key = key * BLOCK + j % BLOCK
    if not BY_HEAD:
        key = key * H + h
    return tl.where(right, key, -1)


@triton.jit
def span_keys_kernel(
    spans, given, lengths, keys, N, B, H, T, blocks, spans0, spans1, given0,
    SORTED: tl.constexpr, BY_HEAD: tl.constexpr, TRIL: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """A number for each span, in the order (sample, head, tile, cell) or, without ``BY_HEAD``, (sample, tile, cell, head).

    It is -1 where a span names no visible cell, and everywhere if a length is wrong; behind them stands one above all.
    ``SORTED``: each goes where it belongs, by comparison with all others. ``lengths`` get what is given, in their range.
    """
    pid = tl.program_id(0)
    wrong = 0
    for first in range(0, B, SIZE):
        sample = first + tl.arange(0, SIZE)
        n = tl.zeros([SIZE], tl.int32) + T
        if given is not None:
            value = tl.load(given + sample * given0, mask=sample < B, other=0)
            wrong += tl.sum(((value < 0) | (value > T)).to(tl.int32), 0)
            n = tl.minimum(tl.maximum(value, 0), T).to(tl.int32)
        if pid == 0:
            tl.store(lengths + sample, n, mask=sample < B)
    row = pid * SIZE + tl.arange(0, SIZE)
    key = _keys(spans, given, row, N, B, H, T, blocks, spans0, spans1, given0, BY_HEAD, TRIL, BLOCK)
    place = row
    if SORTED:
        place = tl.zeros([SIZE], tl.int32)
        for first in range(0, N, SIZE):
            other_row = first + tl.arange(0, SIZE)
            other = _keys(spans, given, other_row, N, B, H, T, blocks, spans0, spans1, given0, BY_HEAD, TRIL, BLOCK)
            before = (other[None, :] == key[:, None]) & (other_row[None, :] < row[:, None])
            before = (before | (other[None, :] < key[:, None])) & (other_row < N)[None, :]
            place += tl.sum(before.to(tl.int32), 1)
    tl.store(keys + place, tl.where(wrong > 0, -1, key), mask=row < N)
    if pid == 0:
        tl.store(keys + N, tl.where(wrong > 0, -1, 1 << 62).to(tl.int64))


@triton.jit
def span_tiles_kernel(keys, tiles, N, count, per_tile, steps, SIZE: tl.constexpr):
    """Where in the sorted keys each tile begins, by bisection."""
    tile = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    first = tile.to(tl.int64) * per_tile
    low = tl.zeros([SIZE], tl.int32)
    high = tl.zeros([SIZE], tl.int32) + N
    for _ in range(steps):
        middle = (low + high) // 2
        below = tl.load(keys + middle) < first  # at N stands what is above all
        low = tl.where(below & (low < high), middle + 1, low)
        high = tl.where(below, high, middle)
    tl.store(tiles + tile, low, mask=tile < count)


@triton.jit
def _positive(tiles, keys, tile, start, end, per_cell, BLOCK: tl.constexpr):
    """Whether the cells (start, end) of a tile are positive."""
    found = (start < 0) & (end < 0)
    first = tl.load(tiles + tile)
    last = tl.load(tiles + tile + 1)
    if first < last:  # a loop directly inside the loop over tiles would keep that from being pipelined
        for c in range(first, last):
            cell = (tl.load(keys + c) // per_cell % (BLOCK * BLOCK)).to(tl.int32)
            found |= (start % BLOCK == cell // BLOCK) & (end % BLOCK == cell % BLOCK)
    return found


@triton.jit
def _place(cell, blocks, BLOCK: tl.constexpr):
    """(start, end) of numbered cells, without the group."""
    tile = cell // (BLOCK * BLOCK)
    start = tile // blocks % blocks * BLOCK + cell // BLOCK % BLOCK
    return start, tile % blocks * BLOCK + cell % BLOCK


@triton.jit
def _at_cells(q, k, start, end, inside, q_t, q_d, k_t, k_d, scale, D: tl.constexpr, DEPTH: tl.constexpr):
    """scale q[start] . k[end] of some cells."""
    total = tl.zeros(start.shape, tl.float32)
    for first in range(0, D, DEPTH):
        d = first + tl.arange(0, DEPTH).to(tl.int64)
        mask = inside[:, None] & (d < D)[None, :]
        a = tl.load(q + start[:, None] * q_t + d[None, :] * q_d, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(k + end[:, None] * k_t + d[None, :] * k_d, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(a * b, 1)
    return total * scale


@triton.jit
def _add_exponentials(top, total, terms):
    """Adds e^terms over the first axis to totals in units of e^top; all -inf are 0."""
    new = tl.maximum(top, tl.max(terms, 0))
    shift = tl.where(new == float("-inf"), 0.0, new)
    return new, total * tl.exp(top - shift) + tl.sum(tl.exp(terms - shift), 0)


@triton.jit
def _log_one_plus(top, total):
    """log(1 + total e^top), precise where it is next to nothing: in float64."""
    x = tl.log(total.to(tl.float64)) + tl.where(top == float("-inf"), 0.0, top).to(tl.float64)
    m = tl.maximum(x, 0.0)
    value = tl.where(x < -18, tl.exp(x), m + tl.log(tl.exp(-m) + tl.exp(x - m)))
    return value.to(tl.float32)


def prepare(spans, lengths, sizes, tril, by_head, block):
    """(int32 lengths, where each tile begins among the sorted keys, the keys) for (B, H, T); nothing is raised here."""
    B, H, T = sizes
    blocks, N = triton.cdiv(T, block), len(spans)
    keys = spans.new_empty(N + 1)
    known = torch.empty(B, dtype=torch.int32, device=spans.device)
    span_keys_kernel[(max(1, triton.cdiv(N, 64)),)](
        spans, lengths, known, keys, N, B, H, T, blocks, *spans.stride(), 0 if lengths is None else lengths.stride(0),
        SORTED=N <= SORT_AT_ONCE, BY_HEAD=by_head, TRIL=tril, BLOCK=block, SIZE=64,
    )  # fmt: skip
    if N > SORT_AT_ONCE:
        keys = keys.sort().values
    count = B * (H if by_head else 1) * blocks * blocks + 1
    tiles = torch.empty(count, dtype=torch.int32, device=spans.device)
    span_tiles_kernel[(triton.cdiv(count, 256),)](
        keys, tiles, N, count, block * block * (1 if by_head else H), N.bit_length(), SIZE=256
    )
    return known, tiles, keys


def workspace(device, *sizes):
    """Uninitialised float32 tensors of at least these sizes, in one allocation."""
    sizes = [triton.cdiv(size, 32) * 32 for size in sizes]  # aligned
    return torch.empty(sum(sizes), dtype=torch.float32, device=device).split(sizes)


def refuse(op, spans, lengths, sizes, tril):
    """Raises ValueError at the first wrong length or span."""
    check_lengths(op, lengths, sizes[2])
    check_spans(op, spans, sizes, lengths, tril)
