"""The argmax of a linear layer in Triton: a program searches its tiles of the product, which stay in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from supy.kernels._tiles import LAUNCH, _load, aligned, tiles_for

PROGRAMS = 264  # as many as an H100 runs at a time: with fewer rows, several share the classes
NO_CLASS = 2**31 - 1


@triton.jit(do_not_specialize=["M", "K", "splits"])  # else each remainder of a chunk is compiled anew
def linear_argmax_rows_kernel(
    x, weight, bias, exclude, ends, values, classes, M, K, splits, x_m, weight_k,
    BIAS: tl.constexpr, EXCLUDE: tl.constexpr, SIZE: tl.constexpr, NONE: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The largest logit and its class, `[splits, M]`, of a split of the first ``ends`` tiles of each block of rows."""
    split = tl.program_id(0) % splits
    block = tl.program_id(0) // splits
    i = block * BLOCK + tl.arange(0, BLOCK)
    if EXCLUDE:
        own = tl.load(exclude + i, mask=i < M, other=-1)[:, None]
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    at = tl.full([BLOCK], NONE, tl.int32)
    odd = tl.full([BLOCK], 0, tl.int32)  # 1 once there was a NaN, which nothing replaces
    end = tl.load(ends + block)
    share = tl.cdiv(end, splits)
    first = split * share
    for tile in range(first, tl.minimum(first + share, end)):
        j = tile * COLUMNS + tl.arange(0, COLUMNS)
        s = tl.zeros([BLOCK, COLUMNS], tl.float32)
        for feature in range(0, SIZE, DEPTH):
            d = feature + tl.arange(0, DEPTH)
            a = _load(x, i, d, M, x_m, SIZE)
            b = _load(weight, j, d, K, weight_k, SIZE)
            s = tl.dot(a, tl.trans(b), s, input_precision=PRECISION)
        if BIAS:
            s += tl.load(bias + j, mask=j < K, other=0.0)[None, :]
        counts = (j < K)[None, :]
        if EXCLUDE:
            counts = counts & (j[None, :] != own)
        s = tl.where(counts, s, float("-inf"))
        nan = tl.max((s != s).to(tl.int32), 1)
        most = tl.max(tl.where(s != s, float("inf"), s), 1)
        wanted = tl.where((nan == 1)[:, None], s != s, s == most[:, None])
        found = tl.min(tl.where(wanted, j[None, :], NONE), 1)
        better = ((most > top) | (nan == 1)) & (odd == 0)
        top = tl.where(better, most, top)
        at = tl.where(better, found, at)
        odd = odd | nan
    to = split.to(tl.int64) * M + i
    tl.store(values + to, tl.where(odd == 1, float("nan"), top), mask=i < M)
    tl.store(classes + to, at, mask=i < M)


def linear_argmax(x, weight, bias, exclude, floor, *, tiles=None, programs=PROGRAMS):
    M, K = len(x), len(weight)
    if M * K * x.shape[1] == 0:
        from supy.reference.linear_argmax import linear_argmax as reference

        return reference(x, weight, bias, exclude, floor)
    tiles = tiles or tiles_for(x.dtype)
    tiles = {name: tiles[name] for name in ("BLOCK", "COLUMNS", "DEPTH", "PRECISION")}
    x, weight = aligned(x, weight)
    blocks, columns = triton.cdiv(M, tiles["BLOCK"]), triton.cdiv(K, tiles["COLUMNS"])
    ends = torch.full((blocks,), columns, dtype=torch.int32, device=x.device)
    if floor is not None:
        reach = _reach(x, weight, bias, floor, tiles["COLUMNS"])
        ends = torch.nn.functional.pad(reach, (0, -M % tiles["BLOCK"])).view(blocks, -1).amax(1)
    splits = max(1, min(columns, programs // blocks))
    values = torch.empty(splits, M, dtype=torch.float32, device=x.device)
    classes = torch.empty(splits, M, dtype=torch.int32, device=x.device)
    bias, exclude = (y if y is None else y.contiguous() for y in (bias, exclude))
    linear_argmax_rows_kernel[(blocks * splits,)](
        x, weight, bias, exclude, ends, values, classes, M, K, splits, x.stride(0), weight.stride(0),
        BIAS=bias is not None, EXCLUDE=exclude is not None, SIZE=x.shape[1], NONE=NO_CLASS, **tiles, **LAUNCH,
    )  # fmt: skip
    best = values.amax(0)
    # Of a NaN, as of equal values, the first split has the first class.
    classes = torch.where((values == best) | values.isnan(), classes, NO_CLASS).amin(0).long()
    none = best == -torch.inf
    if floor is not None:
        none |= best < floor
    return best.masked_fill(none, -torch.inf), classes.masked_fill(none, -1)


def _reach(x, weight, bias, floor, columns):
    """How many tiles of classes, from the first, may reach a row's floor, `[M]`: |x . w| <= |x| |w|, and rounding."""
    size, tiles = x.shape[1], triton.cdiv(len(weight), columns)

    def suffix(values, worst):
        values = torch.nn.functional.pad(values, (0, -len(values) % columns), value=worst).view(tiles, columns).amax(1)
        return values.flip(0).cummax(0).values.flip(0)  # of this tile and those behind it

    longest = suffix(torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64), 0.0)
    highest = longest.new_zeros(1) if bias is None else suffix(bias.double(), -torch.inf)
    reach = []
    for part in torch.arange(len(x), device=x.device).split(4096):
        lengths = torch.linalg.vector_norm(x[part], dim=1, dtype=torch.float64)[:, None]
        most = lengths * longest * (1 + 2.0**-8 + size * 2.0**-20) + size * 1.2e-38  # for tf32, too
        slack = (most + highest.abs()) * 2.0**-21
        reach.append((~(most + highest + slack < floor[part, None])).sum(1, dtype=torch.int32))
    return torch.cat(reach)
