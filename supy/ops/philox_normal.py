"""Normal numbers of a counter."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from supy import _extension
from supy._checks import Shapes, require
from supy._library import Kernel, define, is_plain
from supy.ops._steps import DTYPES, changed, check_stream
from supy.reference.philox_normal import philox_normal as reference

OP = "philox_normal"


def _cpp(out, seed, offset):
    dense = out if out.is_contiguous() else out.new_empty(out.shape)
    _extension.C.philox_normal(dense, seed, offset)
    if dense is not out:
        out.copy_(dense)


def _triton(*arguments):
    from supy.kernels.ddpm_steps import philox_normal as kernel

    return kernel(*arguments)


_philox_normal = define(
    "philox_normal(Tensor(a!) out, SymInt seed, SymInt offset) -> ()",
    reference,
    fake=lambda *_: None,
    kernels=(
        Kernel("CPU", "cpp", _cpp, DTYPES),
        Kernel("CUDA", "cuda", _cpp, DTYPES),
        Kernel("CUDA", "triton", _triton, DTYPES),
    ),
)


def philox_normal(
    shape: int | Sequence[int],
    seed: int,
    *,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Standard normal numbers offset, offset + 1, ... of the stream ``seed``, in row-major order.

    A number depends on the seed and its place in the stream alone: not on the device, the backend, the number of
    threads, nor on how the stream is cut into calls. Philox4x32-10 makes four words of 32 bits out of each block of
    the counter, and two Box-Muller transforms make four numbers of them (Salmon et al., SC 2011,
    doi:10.1145/2063384.2063405). On one CPU calls agree to the bit, between backends to 2 ulp of the logarithm, sine
    and cosine. The stream is not that of `torch.randn`.

    Args:
        shape: an int or a sequence of ints.
        seed: an int of 64 bits: -2^63 to 2^63 - 1. Different seeds give independent streams.
        offset: how many numbers of the stream come before the first one. Calls that share a seed are independent as
            long as the ranges offset to offset + numel do not overlap.
        dtype: any floating-point dtype. Half precision rounds float32 numbers; float64 computes in float64.
        device: where to make them.
        out: write there, in any layout, instead of into a new tensor; ``dtype`` and ``device`` are then its own.

    Returns:
        A tensor without a gradient. No number exceeds 6.77, which one in 10^11 should.

    Raises:
        ValueError, TypeError: an argument is out of its range or of another type.

    >>> import supy
    >>> supy.ops.philox_normal(2, seed=1, offset=3).equal(supy.ops.philox_normal(5, seed=1)[3:])
    True
    """
    check_stream(OP, seed, offset)
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if out is None:
        require(all(size >= 0 for size in shape), OP, f"shape is {list(shape)}, expected no negative size")
        if not dtype.is_floating_point:
            raise TypeError(f"supy.{OP}: dtype is {dtype}, expected a floating-point dtype")
        out = torch.empty(shape, dtype=dtype, device=device)
    else:
        Shapes(OP).floating("out", out)
        require(out.shape == shape, OP, f"out has shape {list(out.shape)}, expected {list(shape)} (from shape)")
        require(not out.requires_grad, OP, "out requires a gradient, which is not implemented: detach it")
        changed(out)
    if is_plain(out) and out.dtype in DTYPES and out.is_contiguous():
        _extension.C.philox_normal(out, seed, offset)
    else:
        _philox_normal(out, seed, offset)
    return out
