"""The sum of a residual branch, normalised, in Triton: a program keeps a row in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _words(place, seed, QUADS: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK words of the stream from number ``place`` on; with QUADS, which 4 divides."""
    if QUADS:
        block = place // 4 + tl.arange(0, BLOCK // 4)
    else:
        block = place // 4 + ((place % 4).to(tl.int32) + tl.arange(0, BLOCK)) // 4
    low, high = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero, zero)
    if QUADS:
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK,))
    else:
        which = ((place % 4).to(tl.int32) + tl.arange(0, BLOCK)) % 4
        words = tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))
    return words


@triton.jit
def _row(
    x, branch, row, width, alpha, seed, first, threshold, scale,
    DROPOUT: tl.constexpr, QUADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Places in the row, which of them it has, z, and the factors of the branch."""
    i = tl.arange(0, BLOCK)
    inside = i < width
    factor = 1.0
    if DROPOUT:
        words = _words(first + row * width, seed, QUADS, BLOCK)
        factor = tl.where(words.to(tl.int64) >= threshold, scale, 0.0)
    z = tl.load(x + row * width + i, mask=inside, other=0.0).to(tl.float32) * alpha
    z += tl.load(branch + row * width + i, mask=inside, other=0.0).to(tl.float32) * factor
    return i, inside, z, factor


@triton.jit
def _normalise(z, inside, width, eps, RMS: tl.constexpr):
    """z normalised and 1 / sqrt(variance + eps). A second mean is added for what a row of equal numbers would show."""
    if not RMS:
        mean = tl.sum(z, 0) / width
        mean += tl.sum(tl.where(inside, z - mean, 0.0), 0) / width
        z = tl.where(inside, z - mean, 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(z * z, 0) / width + eps)
    return z * rstd, rstd


@triton.jit(do_not_specialize=["seed", "first"])
def forward_kernel(
    x, branch, weight, bias, out, alpha, seed, width, first, threshold, scale, eps,
    ALPHA: tl.constexpr, SEED: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, RMS: tl.constexpr,
    DROPOUT: tl.constexpr, QUADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if ALPHA:  # a pointer
        alpha = tl.load(alpha)
    if SEED:
        seed = tl.load(seed)
    i, inside, z, _ = _row(
        x, branch, row, width, alpha, seed.to(tl.int64), first.to(tl.int64), threshold, scale, DROPOUT, QUADS, BLOCK
    )
    y, _ = _normalise(z, inside, width, eps, RMS)
    if WEIGHT:
        y *= tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + i, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed", "first"])
def backward_kernel(
    grad, x, branch, weight, dx, dbranch, partial, alpha, seed, rows, width, first, threshold, scale, eps,
    ALPHA: tl.constexpr, SEED: tl.constexpr, WEIGHT: tl.constexpr, RMS: tl.constexpr, DROPOUT: tl.constexpr,
    QUADS: tl.constexpr, DX: tl.constexpr, DBRANCH: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    if ALPHA:
        alpha = tl.load(alpha)
    if SEED:
        seed = tl.load(seed)
    dbias = tl.zeros((BLOCK,), tl.float32)
    dweight = tl.zeros((BLOCK,), tl.float32)
    for row in range(program, rows, programs):
        i, inside, z, factor = _row(
            x, branch, row, width, alpha, seed.to(tl.int64), first.to(tl.int64), threshold, scale,
            DROPOUT, QUADS, BLOCK,
        )  # fmt: skip
        normalised, rstd = _normalise(z, inside, width, eps, RMS)
        g = tl.load(grad + row * width + i, mask=inside, other=0.0).to(tl.float32)
        if SUMS:
            dbias += g
            dweight += g * normalised
        if WEIGHT:
            g *= tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
        dz = g - normalised * (tl.sum(g * normalised, 0) / width)
        if not RMS:
            dz -= tl.sum(g, 0) / width
            if width == 1:
                dz *= 0.0  # what rounding leaves of a difference that is 0 would be seen
        dz *= rstd
        if DX:
            tl.store(dx + row * width + i, (dz * alpha).to(dx.dtype.element_ty), mask=inside)
        if DBRANCH:
            tl.store(dbranch + row * width + i, (dz * factor).to(dbranch.dtype.element_ty), mask=inside)
    if SUMS:
        i = tl.arange(0, BLOCK)
        tl.store(partial + program * width + i, dbias, mask=i < width)
        tl.store(partial + (programs + program) * width + i, dweight, mask=i < width)


def _settings(x, alpha, seed, offset, dropout, rms):
    """Numbers or pointers, and the constants of a launch."""
    width = x.shape[-1]
    block = max(triton.next_power_of_2(width), 16)
    quads = offset % 4 == 0 and width % 4 == 0
    numbers = 512 if quads or not dropout else 128  # of a row for a warp: as many as leave registers for words
    alpha, seed = (t if t is None or t.is_cuda else t.item() for t in (alpha, seed))
    constants = {
        "ALPHA": isinstance(alpha, torch.Tensor),
        "SEED": isinstance(seed, torch.Tensor),
        "RMS": rms,
        "DROPOUT": dropout > 0,
        "QUADS": quads,
        "BLOCK": block,
        "num_warps": min(max(block // numbers, 1), 16),
    }
    alpha = alpha.float() if constants["ALPHA"] else float(alpha)
    mask = offset, int(dropout * 2**32), 1 / (1 - dropout)
    return alpha, 0 if seed is None else seed, mask, constants


def deep_norm(x, branch, alpha, weight, bias, seed, offset, dropout, eps, rms) -> torch.Tensor:
    x, branch, weight, bias = (t if t is None else t.contiguous() for t in (x, branch, weight, bias))
    out = torch.empty_like(x)
    if x.numel():
        alpha, seed, numbers, constants = _settings(x, alpha, seed, offset, dropout, rms)
        width = x.shape[-1]
        forward_kernel[(x.numel() // width,)](
            x, branch, weight, bias, out, alpha, seed, width, *numbers, eps,
            WEIGHT=weight is not None, BIAS=bias is not None, **constants,
        )  # fmt: skip
    return out


def deep_norm_backward(grad, x, branch, alpha, weight, bias, seed, offset, dropout, eps, rms, wanted):
    grad, x, branch, weight = (t if t is None else t.contiguous() for t in (grad, x, branch, weight))
    sources = x, x, weight, bias
    dx, dbranch, dweight, dbias = (
        torch.empty_like(t, memory_format=torch.contiguous_format) if want else x.new_empty(0)
        for t, want in zip(sources, wanted)
    )
    if x.numel() == 0:
        return tuple(t.zero_() for t in (dx, dbranch, dweight, dbias))
    sums = wanted[2] or wanted[3]
    alpha, seed, numbers, constants = _settings(x, alpha, seed, offset, dropout, rms)
    width = x.shape[-1]
    rows = x.numel() // width
    programs = min(triton.cdiv(rows, 16), 528)
    partial = torch.empty(2, programs, width, device=x.device) if sums else None
    backward_kernel[(programs,)](
        grad, x, branch, weight, dx, dbranch, partial, alpha, seed, rows, width, *numbers, eps,
        WEIGHT=weight is not None, DX=wanted[0], DBRANCH=wanted[1], SUMS=sums, **constants,
    )  # fmt: skip
    for t, want, which in ((dweight, wanted[2], 1), (dbias, wanted[3], 0)):
        if want:
            torch.sum(partial[which], 0, out=t) if t.dtype == torch.float32 else t.copy_(partial[which].sum(0))
    return dx, dbranch, dweight, dbias
