"""Rotary position embedding."""

from __future__ import annotations

import functools
import math

import torch

from supy import _extension
from supy._checks import Shapes, require
from supy._library import Gradient, Kernel, define
from supy.ops._arguments import NATIVE, TRITON, triton_kernel
from supy.reference.rotary import rotary as reference


def _cpp(x, cosine, sine, interleaved, inverse):
    out = torch.empty_like(x)
    _extension.C.rotary(x, cosine, sine, out, interleaved, inverse)
    return out


def _save(ctx, inputs, output):
    _, cosine, sine, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cosine, sine)


def _backward(ctx, grad):
    # A rotation is orthogonal: its gradient turns back. It is the same operator, so it has every derivative.
    return _rotary(grad, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse), None, None, None, None


_rotary = define(
    "rotary(Tensor x, Tensor cosine, Tensor sine, bool interleaved, bool inverse) -> Tensor",
    reference,
    fake=lambda x, *_: torch.empty_like(x),
    gradient=Gradient(_save, _backward),
    kernels=(
        Kernel("CPU", "cpp", _cpp, NATIVE),
        Kernel("CUDA", "cuda", _cpp, TRITON),
        triton_kernel("rotary", "rotary"),
    ),
)


def rotary(
    x: torch.Tensor,
    *,
    positions: torch.Tensor | None = None,
    base: float = 10000.0,
    interleaved: bool = True,
) -> torch.Tensor:
    """Rotates each pair of features by an angle proportional to its token's position.

    Pair i of token t turns by ``t * base ** (-2 i / D)``: (a, b) -> (a cos - b sin, b cos + a sin), so that the inner
    product of two rotated vectors depends on the distance of their positions alone (post 8265; arXiv 2104.09864).

    Args:
        x: `[..., T, D]`, D even, any floating-point dtype. Half precision computes in float32.
        positions: the position of each token, `[T]` or any shape that broadcasts to `x.shape[:-1]`; default 0 to T - 1.
            Not differentiated.
        base: the longest wavelength is 2 pi base.
        interleaved: pairs are (2i, 2i + 1); else (i, i + D / 2), the layout of GPT-NeoX and most of Hugging Face.

    Returns:
        A tensor like ``x``. Differentiable any number of times with respect to ``x``.

    >>> import math, torch, supy
    >>> quarter = torch.tensor([math.pi / 2])
    >>> supy.ops.rotary(torch.tensor([[1.0, 0.0]]), positions=quarter).round()
    tensor([[-0., 1.]])
    """
    shapes = Shapes("rotary")
    shapes.floating("x", x)
    require(
        x.ndim >= 2 and x.shape[-1] % 2 == 0,
        "rotary",
        f"x has shape {list(x.shape)}, expected [..., T, D] with D even",
    )
    half = x.shape[-1] // 2
    precise = torch.float64 if x.dtype == torch.float64 else torch.float32
    if positions is None:
        cosine, sine = arange_table(x, x.shape[-2], half, float(base))
    else:
        shapes.tensor("positions", positions)
        shapes.same_device("positions", positions, "x", x)
        try:
            fits = torch.broadcast_shapes(positions.shape, x.shape[:-1]) == x.shape[:-1]
        except RuntimeError:
            fits = False
        require(
            fits,
            "rotary",
            f"positions has shape {list(positions.shape)}, expected one that broadcasts to {list(x.shape[:-1])} (from x)",
        )
        cosine, sine = position_table(positions, half, base, precise)
    if x.ndim <= 4:
        return _rotary(x, cosine, sine, interleaved, False)
    # The kernels take four axes: the others are folded into the first.
    fold = math.prod(x.shape[:-3])
    if positions is not None:
        cosine, sine = (
            part.expand(*x.shape[:-1], half).reshape(fold, *x.shape[-3:-1], half) for part in (cosine, sine)
        )
    return _rotary(x.reshape(fold, *x.shape[-3:]), cosine, sine, interleaved, False).view(x.shape)


def arange_table(x: torch.Tensor, length: int, half: int, base: float = 10000.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine `[length, half]` for positions 0 to length - 1, on the device of ``x`` and as precise as it needs."""
    precise = torch.float64 if x.dtype == torch.float64 else torch.float32
    # Fake tensors, subclasses and graphs under compilation must not share tables with plain tensors; what is made while
    # a CUDA graph is captured exists only when the graph runs.
    plain = type(x) is torch.Tensor and not torch.compiler.is_compiling()
    plain = plain and not (x.is_cuda and torch.cuda.is_current_stream_capturing())
    table = _cached_arange_table if plain else _arange_table
    return table(length, half, base, x.device, precise)


def position_table(positions, half, base, dtype):
    # float64, because position * frequency in float32 is off by 1e-3 at position 10,000.
    exponent = torch.arange(half, device=positions.device, dtype=torch.float64) / max(half, 1)
    angle = positions.to(torch.float64).unsqueeze(-1) * base**-exponent
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _arange_table(length, half, base, device, dtype):
    return position_table(torch.arange(length, device=device), half, base, dtype)


@functools.lru_cache(maxsize=32)
def _cached_arange_table(*key):
    with torch.inference_mode(False):  # a tensor made in inference mode could not be saved for a later backward
        return _arange_table(*key)
