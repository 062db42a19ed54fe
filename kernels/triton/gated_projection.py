"""What stands between products and attention of gated layers in Triton: x w_in^T to v, queries and keys, and back.

The gate, its gradient and that of v need no kernel of their own: `gau_attention` reads u as swish(h) and writes dh.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from supy.kernels._tiles import _load, _swish, _swish_slope, power_of_two, strides

ROWS, PART = 8, 512  # tokens and values of a program
GRADIENT_ROWS = 32  # tokens of a program that sums gradients


@triton.jit
def _turn(x, cosine, sine, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Pairs (2 i, 2 i + 1) of x `[ROWS, SIZE]`, turned."""
    a, b = tl.split(tl.reshape(x, [ROWS, SIZE // 2, 2]))
    return tl.reshape(tl.join(a * cosine - b * sine, b * cosine + a * sine), [ROWS, SIZE])


@triton.jit
def gated_projection_activate_kernel(
    h, gamma, beta, cosine, sine, lengths, v, heads, T, samples, blocks, parts, h_b, h_t,
    HEADS: tl.constexpr, S: tl.constexpr, E: tl.constexpr,
    ROWS: tl.constexpr, PART: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """v = swish(h) `[B, T, E]` and the heads, gamma z + beta turned, `[HEADS, B, T, S]`; 0 in padding.

    h `[B, T, 2 E + S]` has u, v and z before their swish; gamma, beta `[HEADS, S]`; cosine, sine `[T, S / 2]`.
    """
    part = tl.program_id(0) % (parts + 1)
    block = tl.program_id(0) // (parts + 1)
    sample = (block // blocks).to(tl.int64)
    n = tl.load(lengths + sample)
    i = block % blocks * ROWS + tl.arange(0, ROWS)
    h += sample * h_b
    if part < parts:
        e = part * PART + tl.arange(0, PART)
        value = _swish(_load(h + E, i, e, n, h_t, E).to(tl.float32)).to(v.dtype.element_ty)
        at = v + (sample * T + i)[:, None] * E + e[None, :]
        tl.store(at, value, mask=(i < T)[:, None] & (e < E)[None, :])
    else:
        d = tl.arange(0, SIZE)
        pair = tl.arange(0, SIZE // 2)
        inside = (i < T)[:, None] & (d < S)[None, :]
        z = _swish(_load(h + 2 * E, i, d, n, h_t, S).to(tl.float32))
        c = _load(cosine, i, pair, n, S // 2, S // 2).to(tl.float32)
        s = _load(sine, i, pair, n, S // 2, S // 2).to(tl.float32)
        for head in tl.static_range(HEADS):
            factor = tl.load(gamma + head * S + d, mask=d < S, other=0.0).to(tl.float32)
            offset = tl.load(beta + head * S + d, mask=d < S, other=0.0).to(tl.float32)
            x = _turn(z * factor[None, :] + offset[None, :], c, s, ROWS, SIZE)
            to = heads + ((head * samples + sample) * T + i)[:, None] * S + d[None, :]
            tl.store(to, x.to(heads.dtype.element_ty), mask=inside)


@triton.jit
def gated_projection_gradient_kernel(
    dq, dk, dq_lin, dk_lin, h, gamma, cosine, sine, lengths, dh, sums, T, samples, blocks, splits,
    h_b, h_t, dh_b, dh_t,
    HEADS: tl.constexpr, S: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """dh of z, and a program's share of the gradients of gamma and beta, `[programs, 2, HEADS, S]`.

    The gradients of the heads are `[B, T, S]`, that of the first keys in ``splits`` parts; without four heads the last
    two are not read.
    """
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.load(lengths + sample)
    i = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, SIZE)
    pair = tl.arange(0, SIZE // 2)
    at = sample * h_b + 2 * E
    x = _load(h + at, i, d, n, h_t, S).to(tl.float32)
    z = _swish(x)
    c = _load(cosine, i, pair, n, S // 2, S // 2).to(tl.float32)
    s = _load(sine, i, pair, n, S // 2, S // 2).to(tl.float32)
    first = sample * T * S
    dz = tl.zeros([ROWS, SIZE], tl.float32)
    for head in tl.static_range(HEADS):
        if head == 0:
            y = _load(dq + first, i, d, n, S, S).to(tl.float32)
        elif head == 1:
            y = tl.zeros([ROWS, SIZE], tl.float32)
            for split in range(splits):
                y += _load(dk + (split * samples + sample) * T * S, i, d, n, S, S).to(tl.float32)
        elif head == 2:
            y = _load(dq_lin + first, i, d, n, S, S).to(tl.float32)
        else:
            y = _load(dk_lin + first, i, d, n, S, S).to(tl.float32)
        y = _turn(y, c, -s, ROWS, SIZE)
        to = sums + (tl.program_id(0).to(tl.int64) * 2 * HEADS + head) * S + d
        tl.store(to, tl.sum(y * z, 0), mask=d < S)
        tl.store(to + HEADS * S, tl.sum(y, 0), mask=d < S)
        dz += y * tl.load(gamma + head * S + d, mask=d < S, other=0.0).to(tl.float32)[None, :]
    to = dh + sample * dh_b + 2 * E + i.to(tl.int64)[:, None] * dh_t + d[None, :]
    tl.store(to, (dz * _swish_slope(x)).to(dh.dtype.element_ty), mask=(i < T)[:, None] & (d < S)[None, :])


def activate(h, E, gamma, beta, cosine, sine, lengths):
    """v `[B, T, E]` and the heads, `[B, T, S]` each, of h `[B, T, 2 E + S]`; ``lengths`` int32 `[B]`."""
    B, T, _ = h.shape
    heads, S = gamma.shape
    v, out = h.new_empty(B, T, E), h.new_empty(heads, B, T, S)
    part = power_of_two(E, PART)
    blocks, parts = triton.cdiv(T, ROWS), triton.cdiv(E, part)
    gated_projection_activate_kernel[(B * blocks * (parts + 1),)](
        h, *(x.contiguous() for x in (gamma, beta, cosine, sine)), lengths, v, out, T, B, blocks, parts, *strides(h),
        HEADS=heads, S=S, E=E, ROWS=ROWS, PART=part, SIZE=triton.next_power_of_2(S),
    )  # fmt: skip
    return v, *out.unbind(0)


def activate_backward(dheads, splits, h, E, gamma, beta, cosine, sine, lengths, dh):
    """Writes dh of z; returns dgamma and dbeta. ``dheads``: `[B, T, S]`, the second ``splits`` times."""
    B, T, _ = h.shape
    heads, S = gamma.shape
    blocks = triton.cdiv(T, GRADIENT_ROWS)
    sums = torch.empty(B * blocks, 2, heads * S, dtype=torch.float32, device=h.device)
    dq, dk, dq_lin, dk_lin = (*dheads, *dheads)[:4]
    gated_projection_gradient_kernel[(B * blocks,)](
        dq, dk, dq_lin, dk_lin, h, *(x.contiguous() for x in (gamma, cosine, sine)), lengths, dh, sums,
        T, B, blocks, splits, *strides(h, dh),
        HEADS=heads, S=S, E=E, ROWS=GRADIENT_ROWS, SIZE=triton.next_power_of_2(S),
    )  # fmt: skip
    dgamma, dbeta = (x.sum(0).view(heads, S) for x in sums.unbind(1))
    return dgamma.to(gamma.dtype), dbeta.to(beta.dtype)
