"""What the Triton kernels of gated attention share: tiles and their products."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

LAUNCH = {"num_warps": 8, "num_stages": 3}
# Two programs on a multiprocessor, so that one multiplies while the other takes exponentials or writes.
PAIRED = {"num_stages": 2}
PAIRED_LONG = LAUNCH | {"maxnreg": 128}
# The sides of a tile: tokens, values, what a product takes at a time, and tokens where two float32 tiles are held.
_HALF = {"BLOCK": 128, "PART": 256, "DEPTH": 64, "COLUMNS": 128, "PRECISION": "tf32"}
_TF32 = {"BLOCK": 128, "PART": 128, "DEPTH": 32, "COLUMNS": 64, "PRECISION": "tf32"}
# Three products in tf32 are off by 1e-7, no more than sums in float32.
_FLOAT = {"BLOCK": 128, "PART": 128, "DEPTH": 16, "COLUMNS": 64, "PRECISION": "tf32x3"}


@triton.jit
def _load(x, tokens, features, n, stride, SIZE: tl.constexpr):
    """x[tokens, features], and 0 from token n and feature SIZE on: what stands in padding is not read."""
    at = x + tokens.to(tl.int64)[:, None] * stride + features[None, :]
    return tl.load(at, mask=(tokens < n)[:, None] & (features < SIZE)[None, :], other=0.0)


@triton.jit
def _inner(x, y, rows, columns, n, x_t, y_t, SIZE: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    """x[rows] . y[columns], a sum over SIZE features, in float32."""
    total = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    for first in range(0, SIZE, DEPTH):
        d = first + tl.arange(0, DEPTH)
        a = _load(x, rows, d, n, x_t, SIZE)
        b = _load(y, columns, d, n, y_t, SIZE)
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
    return total


@triton.jit
def _swish(h):
    return h / (1 + tl.exp(-h))


@triton.jit
def _swish_slope(h):
    """Its derivative."""
    s = tl.sigmoid(h)
    return s + _swish(h) * (1 - s)


def tiles_for(dtype):
    """The sides of tiles, and how float32 is multiplied: as torch may do it."""
    if dtype != torch.float32:
        return _HALF
    return _TF32 if torch.backends.cuda.matmul.fp32_precision == "tf32" else _FLOAT


def power_of_two(size, limit):
    """The power of two that holds the size, from 16, the least of a product, to the limit."""
    return min(limit, max(16, triton.next_power_of_2(size)))


def aligned(*tensors):
    """The tensors, copied where they cannot be read 16 bytes at a time, with zeros up to a multiple of 16 features."""
    return [x if x is None or _is_aligned(x) else torch.nn.functional.pad(x, (0, -x.shape[-1] % 16)) for x in tensors]


def _is_aligned(x):
    *steps, step = x.stride()
    return step == 1 and not any(n % 16 for n in (*steps, x.shape[-1], x.data_ptr()))


def cut(x, size):
    """``x`` without the features that `aligned` added."""
    return x if x.shape[-1] == size else x[..., :size].contiguous()


def strides(*tensors):
    """Of samples and tokens; features are next to each other."""
    return [stride for x in tensors for stride in x.stride()[:2]]


def constants(find, key, *given):
    """find(*key, *given), kept for the next call where nothing is given; the key ends with the device."""
    cuda = key[-1].type == "cuda"
    # What is made while a graph is captured exists only when the graph runs.
    if any(x is not None for x in given) or (cuda and torch.cuda.is_current_stream_capturing()):
        return find(*key, *given)
    # The stream is part of the key: another one would not wait for the kernels.
    return _kept(torch.cuda.current_stream(key[-1]).cuda_stream if cuda else 0, find, *key)


@functools.lru_cache(maxsize=32)
def _kept(stream, find, *key):
    return find(*key)
