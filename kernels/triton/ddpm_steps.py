"""The steps of a diffusion and their noise in Triton; kernels/common/philox.inl has the same arithmetic."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024  # values a program takes at once


@triton.jit
def _box_muller(w0, w1):
    """sqrt(-2 log u) times cosine and sine of 2 pi w1 / 2^32; see philox.inl."""
    u = w0.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    shifted = u.to(tl.int32, bitcast=True) - 0x3F3504F3
    n = (shifted >> 23).to(tl.float32)
    f = ((shifted & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    p = f * 0.08700436 - 0.14267486
    p = p * f + 0.14914767
    p = p * f - 0.16577585
    p = p * f + 0.19963063
    p = p * f - 0.25001338
    p = p * f + 0.3333391
    square = f * f
    logarithm = n * 0.69314718 + (f + square * (p * f - 0.5))
    radius = tl.sqrt_rn(logarithm * -2.0)
    turned = w1 + 0x20000000
    angle = (w1 << 2).to(tl.int32, bitcast=True).to(tl.float32) * 3.6572951e-10
    r = angle * angle
    s = r * -1.9515282e-4 + 8.3321603e-3
    s = s * r - 1.6666655e-1
    sine = angle * r * s + angle
    c = r * 2.4433157e-5 - 1.3887316e-3
    c = c * r + 4.1666646e-2
    cosine = r * r * c + (1.0 - 0.5 * r)
    quarter = turned >> 30
    odd = (quarter & 1) != 0
    first = tl.where(odd, sine, cosine)
    second = tl.where(odd, cosine, sine)
    first = tl.where(((quarter + 1) & 2) != 0, -first, first)
    second = tl.where((quarter & 2) != 0, -second, second)
    return radius * first, radius * second


@triton.jit
def _normals(block, seed, BLOCK: tl.constexpr):
    """The numbers of BLOCK / 4 blocks of the stream, in their order."""
    low, high = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero, zero)
    n0, n1 = _box_muller(w0, w1)
    n2, n3 = _box_muller(w2, w3)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (BLOCK,))


@triton.jit(do_not_specialize=["seed", "first"])
def normal_kernel(out, count, seed, first, BLOCK: tl.constexpr):
    first = first.to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    z = _normals((first // 4 * 4 + start) // 4 + tl.arange(0, BLOCK // 4), seed.to(tl.int64), BLOCK)
    i = start + tl.arange(0, BLOCK) - first % 4
    tl.store(out + i, z.to(out.dtype.element_ty), mask=(i >= 0) & (i < count))


@triton.jit
def _weight(table, which: tl.constexpr, known, sample, samples, TABLE: tl.constexpr):
    return tl.load(table + which * samples + sample) if TABLE else known


@triton.jit
def _clipped(x0, limit):
    """A NaN stays one."""
    x0 = tl.where(x0 > limit, limit, x0)
    return tl.where(x0 < -limit, -limit, x0)


@triton.jit(do_not_specialize=["seed", "first"])
def step_kernel(
    x, eps, noise, out, made_noise, table, limits,
    samples, size, seed, first, clip,
    w_x, w_eps, w_x0, w_noise, x_to_x0, eps_to_x0,
    EPS: tl.constexpr, NOISE: tl.constexpr, SEEDED: tl.constexpr, MADE: tl.constexpr, CLIPPED: tl.constexpr,
    TABLE: tl.constexpr, LIMITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    w_x = _weight(table, 0, w_x, sample, samples, TABLE)
    w_noise = _weight(table, 3, w_noise, sample, samples, TABLE)
    base = sample * size
    place = first.to(tl.int64) + base
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = start + tl.arange(0, BLOCK) - place % 4
    inside = (i >= 0) & (i < size)
    i += base
    value = tl.load(x + i, mask=inside, other=0.0).to(tl.float32)
    total = value * w_x
    if EPS:
        e = tl.load(eps + i, mask=inside, other=0.0).to(tl.float32)
        if CLIPPED:
            x_to_x0 = _weight(table, 4, x_to_x0, sample, samples, TABLE)
            eps_to_x0 = _weight(table, 5, eps_to_x0, sample, samples, TABLE)
            weight = _weight(table, 2, w_x0, sample, samples, TABLE)
            limit = clip
            if LIMITS:
                limit = tl.load(limits + sample)
                weight = weight * (clip / limit)
            total += _clipped(value * x_to_x0 + e * eps_to_x0, limit) * weight
        else:
            total += e * _weight(table, 1, w_eps, sample, samples, TABLE)
    if SEEDED:
        z = _normals(place // 4 + start // 4 + tl.arange(0, BLOCK // 4), seed.to(tl.int64), BLOCK)
        rounded = z.to(out.dtype.element_ty)
        if MADE:
            tl.store(made_noise + i, rounded, mask=inside)
        total = tl.where(w_noise != 0, total + rounded.to(tl.float32) * w_noise, total)
    if NOISE:
        z = tl.load(noise + i, mask=inside, other=0.0).to(tl.float32)
        total = tl.where(w_noise != 0, total + z * w_noise, total)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    grad, x, eps, dx, deps, dnoise, table, limits,
    samples, size, clip,
    w_x, w_eps, w_x0, w_noise, x_to_x0, eps_to_x0,
    X: tl.constexpr, EPS: tl.constexpr, NOISE: tl.constexpr, CLIPPED: tl.constexpr,
    TABLE: tl.constexpr, LIMITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    i += sample * size
    g = tl.load(grad + i, mask=inside, other=0.0).to(tl.float32)
    gx = g * _weight(table, 0, w_x, sample, samples, TABLE)
    geps = g * _weight(table, 1, w_eps, sample, samples, TABLE)
    if CLIPPED:
        x_to_x0 = _weight(table, 4, x_to_x0, sample, samples, TABLE)
        eps_to_x0 = _weight(table, 5, eps_to_x0, sample, samples, TABLE)
        weight = _weight(table, 2, w_x0, sample, samples, TABLE)
        limit = clip
        if LIMITS:
            limit = tl.load(limits + sample)
            weight = weight * (clip / limit)
        value = tl.load(x + i, mask=inside, other=0.0).to(tl.float32)
        x0 = value * x_to_x0 + tl.load(eps + i, mask=inside, other=0.0).to(tl.float32) * eps_to_x0
        through = tl.where((x0 > limit) | (x0 < -limit), 0.0, g * weight)
        gx += through * x_to_x0
        geps = through * eps_to_x0
    if X:
        tl.store(dx + i, gx.to(dx.dtype.element_ty), mask=inside)
    if EPS:
        tl.store(deps + i, geps.to(deps.dtype.element_ty), mask=inside)
    if NOISE:
        noise_gradient = g * _weight(table, 3, w_noise, sample, samples, TABLE)
        tl.store(dnoise + i, noise_gradient.to(dnoise.dtype.element_ty), mask=inside)


@triton.jit
def _count(x, eps, size, x_to_x0, eps_to_x0, bound, BLOCK: tl.constexpr):
    """How many |x0| are less than the bound, and the least of the others: as bits, which are ordered like numbers."""
    below = tl.zeros((BLOCK,), tl.int64)
    least = tl.full((BLOCK,), 0x7FFFFFFF, tl.int32)
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < size
        x0 = tl.load(x + i, mask=inside, other=0.0).to(tl.float32) * x_to_x0
        x0 += tl.load(eps + i, mask=inside, other=0.0).to(tl.float32) * eps_to_x0
        bits = tl.where(inside, x0.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7FFFFFFF)
        below += (bits < bound).to(tl.int64)
        least = tl.minimum(least, tl.where(bits < bound, 0x7FFFFFFF, bits))
    return tl.sum(below, 0), tl.min(least, 0)


@triton.jit
def limits_kernel(
    x, eps, limits, table, samples, size, rank, rest, clip, x_to_x0, eps_to_x0, TABLE: tl.constexpr, BLOCK: tl.constexpr
):
    sample = tl.program_id(0).to(tl.int64)
    x += sample * size
    eps += sample * size
    x_to_x0 = _weight(table, 4, x_to_x0, sample, samples, TABLE)
    eps_to_x0 = _weight(table, 5, eps_to_x0, sample, samples, TABLE)
    numbers, _ = _count(x, eps, size, x_to_x0, eps_to_x0, 0x7F800001, BLOCK)
    found = tl.zeros((), tl.int32)
    for step in range(31):
        candidate = found | (1 << (30 - step))
        below, _ = _count(x, eps, size, x_to_x0, eps_to_x0, candidate, BLOCK)
        found = tl.where(below <= rank, candidate, found)
    up_to, above = _count(x, eps, size, x_to_x0, eps_to_x0, found + 1, BLOCK)
    low = found.to(tl.float32, bitcast=True)
    high = tl.where((up_to > rank + 1) | (rank + 1 >= size), low, above.to(tl.float32, bitcast=True))
    value = tl.where(rest > 0, low + (high - low) * rest, low)
    value = tl.where(value > clip, value, clip)
    tl.store(limits + sample, tl.where(numbers < size, float("nan"), value))


def _cut(x, tables, limits):
    """Samples and their size; one sample where all share what they are multiplied with."""
    split = limits is not None or any(table is not None and table.ndim for table in tables)
    samples = x.shape[0] if split else 1
    return samples, x.numel() // max(samples, 1)


def _weights(weights, x, tables, scalars, samples, clipped, noisy):
    """A table `[6, samples]`, or None and six numbers where no tensor has to be read for them."""
    if all(table is None for table in tables):
        return None, [float(w) for w in weights("cpu", tables, scalars, clipped, noisy)]
    every = weights(x.device, tables, scalars, clipped, noisy)
    return torch.stack([w.expand(samples) for w in every]).float(), [0.0] * 6


def philox_normal(out: torch.Tensor, seed: int, offset: int) -> None:
    dense = out if out.is_contiguous() else out.new_empty(out.shape)
    if out.numel():
        grid = (triton.cdiv(out.numel() + offset % 4, BLOCK),)
        normal_kernel[grid](dense, out.numel(), seed, offset, BLOCK=BLOCK)
    if dense is not out:
        out.copy_(dense)


def steps(weights, x, eps, noise, tables, scalars, limits, clip, seed, offset, out, made_noise) -> None:
    samples, size = _cut(x, tables, limits)
    clipped = clip is not None
    table, known = _weights(weights, x, tables, scalars, samples, clipped, noise is not None or seed is not None)
    if x.numel() == 0:
        return
    dense = out if out.is_contiguous() else out.new_empty(out.shape)
    x, eps, noise = (tensor if tensor is None else tensor.contiguous() for tensor in (x, eps, noise))
    step_kernel[(triton.cdiv(size + 3, BLOCK), samples)](
        x, eps, noise, dense, made_noise, table, limits,
        samples, size, seed or 0, offset, float(clip or 0), *known,
        EPS=eps is not None, NOISE=noise is not None, SEEDED=seed is not None, MADE=made_noise is not None,
        CLIPPED=clipped, TABLE=table is not None, LIMITS=limits is not None, BLOCK=BLOCK,
    )  # fmt: skip
    if dense is not out:
        out.copy_(dense)


def steps_backward(weights, grad, x, eps, noise, tables, scalars, limits, clip, wanted):
    samples, size = _cut(x, tables, limits)
    table, known = _weights(weights, x, tables, scalars, samples, clip is not None, True)
    parts = tuple(grad.new_empty(grad.shape if want else (0,)) for want in wanted)
    if x.numel():
        grad, x, eps = (tensor if tensor is None else tensor.contiguous() for tensor in (grad, x, eps))
        backward_kernel[(triton.cdiv(size, BLOCK), samples)](
            grad, x, eps, *parts, table, limits, samples, size, float(clip or 0), *known,
            X=wanted[0], EPS=wanted[1], NOISE=wanted[2], CLIPPED=clip is not None,
            TABLE=table is not None, LIMITS=limits is not None, BLOCK=BLOCK,
        )  # fmt: skip
    return parts


def limits(weights, x, eps, noise, tables, scalars, limits, clip, quantile) -> torch.Tensor:
    limits = x.new_full(x.shape[:1], clip, dtype=torch.float32)
    if x.numel():
        samples, size = _cut(x, tables, limits)
        table, known = _weights(weights, x, tables, scalars, samples, True, True)
        place = quantile * (size - 1)
        limits_kernel[(samples,)](
            x.contiguous(), eps.contiguous(), limits, table, samples, size, int(place), place - int(place), float(clip),
            *known[4:], TABLE=table is not None, BLOCK=BLOCK,
        )  # fmt: skip
    return limits
