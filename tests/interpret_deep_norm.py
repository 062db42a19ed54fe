"""deep_norm in Triton's interpreter, against the float64 reference; run by test_triton_kernels.py."""

import pytest
import torch

from supy.kernels import deep_norm as kernels
from supy.reference import deep_norm as reference

# Rows and width, dropout, offset, weight and bias, kind, what is asked for (dx, dbranch, dweight, dbias).
CASES = [
    ((3, 1), 0.0, 0, True, False, (True,) * 4),
    ((37, 20), 0.0, 0, True, False, (True,) * 4),
    ((5, 20), 0.3, 8, True, True, (True,) * 4),  # words by fours
    ((5, 20), 0.3, 4 * 2**32 - 9, False, False, (True, True, False, False)),  # one by one; the second word changes
    ((18, 13), 0.3, 0, True, True, (False, True, True, False)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape, dropout, offset, affine, rms, wanted", CASES)
def test_values_and_gradients(shape, dropout, offset, affine, rms, wanted, dtype):
    torch.manual_seed(0)
    x, branch, grad = torch.randn(3, *shape).to(dtype)
    weight, bias = torch.randn(2, shape[1]).to(dtype) if affine else (None, None)
    alpha, seed = torch.tensor(1.7, dtype=torch.float64), torch.tensor(-3) if dropout else None
    arguments = alpha, weight, bias, seed, offset, dropout, 1e-6, rms
    out = kernels.deep_norm(x, branch, *arguments)
    parts = kernels.deep_norm_backward(grad, x, branch, *arguments, wanted)

    doubled = [t if t is None or not t.is_floating_point() else t.double() for t in arguments[:4]]
    arguments = *doubled, *arguments[4:]
    exact = reference.deep_norm(x.double(), branch.double(), *arguments)
    expected = reference.deep_norm_backward(grad.double(), x.double(), branch.double(), *arguments)
    # A few dozen roundings in float32 of numbers of this size, and one of the result.
    precision = 32 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps
    assert out.dtype == dtype and (out.double() - exact).abs().max() <= precision * exact.abs().max()
    for part, e, want in zip(parts, expected, wanted, strict=True):
        assert part.dtype == dtype
        if not want:
            assert part.numel() == 0
            continue
        scale = e.abs().max() if shape[1] > 1 else 1e3  # 0, but that 1 / sqrt(eps) multiplies what rounding leaves
        assert (part.double() - e).abs().max() <= precision * scale


def test_no_values():
    empty = torch.empty(0, 4)
    arguments = torch.tensor(1.0), torch.ones(4), None, None, 0, 0.0, 1e-6, False
    assert kernels.deep_norm(empty, empty, *arguments).shape == (0, 4)
    assert kernels.deep_norm_backward(empty, empty, empty, *arguments, [True, True, True, False])[2].tolist() == [0] * 4
