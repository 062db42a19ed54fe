"""Rotary position embedding in Triton: a program takes as many rows as make some thousand pairs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PAIRS = 1024  # of a program: 8 a thread


@triton.jit
def rotary_kernel(
    x, cosine, sine, out,
    rows, n1, n2, half,
    x0, x1, x2, x3,
    t0, t1, t2, t3,
    o0, o1, o2, o3,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    i2 = row % n2
    i1 = row // n2 % n1
    i0 = row // n2 // n1
    x += i0 * x0 + i1 * x1 + i2 * x2
    out += i0 * o0 + i1 * o1 + i2 * o2
    table = i0 * t0 + i1 * t1 + i2 * t2

    i = tl.arange(0, BLOCK).to(tl.int64)[None, :]
    inside = (row < rows) & (i < half)
    first = 2 * i if INTERLEAVED else i
    second = first + (1 if INTERLEAVED else half)
    a = tl.load(x + first * x3, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + second * x3, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cosine + table + i * t3, mask=inside, other=0.0)
    s = tl.load(sine + table + i * t3, mask=inside, other=0.0)
    if INVERSE:
        s = -s
    tl.store(out + first * o3, (a * c - b * s).to(out.dtype.element_ty), mask=inside)
    tl.store(out + second * o3, (b * c + a * s).to(out.dtype.element_ty), mask=inside)


def rotary(
    x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, interleaved: bool, inverse: bool
) -> torch.Tensor:
    """x with at most four axes, the last one D; cosine, sine float32, broadcast to `[..., D / 2]`."""
    out = torch.empty_like(x)
    half = x.shape[-1] // 2
    if x.numel():
        sizes = (1,) * (4 - x.ndim) + tuple(x.shape[:-1])
        source, target = x.expand(*sizes, 2 * half), out.expand(*sizes, 2 * half)
        cosine, sine = cosine.expand(*sizes, half), sine.expand(*sizes, half)
        rows, block = sizes[0] * sizes[1] * sizes[2], triton.next_power_of_2(half)
        at_once = max(1, PAIRS // block)
        rotary_kernel[(triton.cdiv(rows, at_once),)](
            source, cosine, sine, target, rows, sizes[1], sizes[2], half,
            *source.stride(), *cosine.stride(), *target.stride(),
            INTERLEAVED=interleaved, INVERSE=inverse, ROWS=at_once, BLOCK=block,
        )  # fmt: skip
    return out
