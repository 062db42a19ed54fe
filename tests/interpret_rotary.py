"""Rotary in Triton's interpreter, against the float64 reference; run by test_triton_kernels.py.

Small shapes, in float32 and float16 only: the interpreter takes milliseconds a program, and its bfloat16 `tl.dot` is
wrong.
"""

import pytest
import torch

from supy.kernels.rotary import rotary
from supy.reference.rotary import rotary as rotary_reference

# [A, B, T, D], and what it covers.
ROTARY_SHAPES = {
    "one pair": (1, 1, 1, 2),
    "half is no power of two": (2, 1, 3, 6),
    "three folded axes": (2, 3, 2, 16),
    "half above a block of 8, odd": (1, 2, 3, 22),
    "no tokens": (2, 1, 0, 4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("case", ROTARY_SHAPES)
def test_rotary(case, layout, dtype):
    generator = torch.Generator().manual_seed(0)
    a, b, t, d = ROTARY_SHAPES[case]
    if layout == "strided":  # every other feature of a transposed batch: no axis has stride 1
        x = torch.randn(b, a, t, 2 * d, generator=generator).to(dtype)[..., ::2].transpose(0, 1)
    else:
        x = torch.randn(a, b, t, d, generator=generator).to(dtype)
    angle = torch.randn(t, d // 2, generator=generator)
    table = [f(angle).expand(a, b, t, d // 2) for f in (torch.cos, torch.sin)]
    for interleaved in (True, False):
        for inverse in (True, False):
            out = rotary(x, *table, interleaved, inverse)
            exact = rotary_reference(x.double(), *(part.double() for part in table), interleaved, inverse)
            # Two products and a sum in float32, then one rounding to the dtype.
            size = (x.double().abs() * 2).amax() if x.numel() else 1.0
            bound = size * (4 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps / 2)
            assert out.dtype == dtype and out.shape == x.shape
            assert ((out.double() - exact).abs() <= bound).all(), f"{interleaved=} {inverse=}"
