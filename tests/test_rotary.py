"""supy.ops.rotary against a multiplication of complex numbers."""

import cmath
import os
import subprocess
import sys

import pytest
import torch

import supy
from _compare import assert_close_to_reference
from supy import _extension

rotary = supy.ops.rotary

both_layouts = pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])


def by_complex_numbers(x, positions, interleaved, base=10000.0):
    """Pair i of token t times e^(1j * position * base^(-2 i / D))."""
    half = x.shape[-1] // 2
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    frequency = torch.tensor([base ** (-i / max(half, 1)) for i in range(half)], dtype=torch.float64)
    angle = positions.double()[..., None] * frequency
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)
    if interleaved:
        return torch.view_as_real(turned).flatten(-2)
    return torch.cat([turned.real, turned.imag], -1)


SHAPES = {
    "one pair": (1, 2),
    "half is no vector": (3, 17, 6),
    "half is above a vector": (2, 5, 42),
    "heads": (2, 4, 33, 64),
    "more than four axes": (2, 2, 3, 5, 10),
}


@both_layouts
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_float64_is_the_complex_product(shape, interleaved):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    positions = torch.arange(shape[-2])
    got = rotary(x, interleaved=interleaved, base=500.0)
    expected = by_complex_numbers(x, positions, interleaved, base=500.0)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
    grad = torch.randn(shape, dtype=torch.float64)
    (dx,) = torch.autograd.grad(got, x, grad)
    (dx_expected,) = torch.autograd.grad(expected, x, grad)
    torch.testing.assert_close(dx, dx_expected, rtol=1e-13, atol=1e-13)


@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_in_each_dtype(shape, dtype, interleaved):
    torch.manual_seed(0)
    x, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)

    def run(dtype):
        leaf = x.to(dtype).requires_grad_()
        out = rotary(leaf, interleaved=interleaved)
        return out.detach(), torch.autograd.grad(out, leaf, grad.to(dtype))[0]

    got, exact = run(dtype), run(torch.float64)
    with supy.use_backend("reference"):
        plain = run(dtype)
    for name, factor, a, b, c in zip(("out", "dx"), (2, 3), got, exact, plain):
        assert_close_to_reference(f"rotary: {name}", a, b, c, factor)


@both_layouts
@pytest.mark.parametrize("shape", [(), (5,), (1, 5), (2, 1, 1), (2, 3, 5), (2, 1, 5)], ids=str)
def test_positions_broadcast(shape, interleaved):
    """One position for all, one a token, a row a sample, ...; negative and fractional ones too."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    positions = 10 * torch.randn(shape, dtype=torch.float64)
    got = rotary(x, positions=positions, interleaved=interleaved)
    expected = by_complex_numbers(x, positions.expand(2, 3, 5), interleaved)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("position", [10_000, 131_071, 1_000_003])
def test_large_positions_are_precise_in_float32(position):
    """The angle is computed in float64: in float32, position 131,071 is off by 4e-3."""
    x = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    got = rotary(x, positions=torch.tensor([position])).view(2, 2)
    for pair, frequency in zip(got, (1.0, 0.01)):
        expected = cmath.exp(1j * position * frequency)
        torch.testing.assert_close(pair, torch.tensor([expected.real, expected.imag]), rtol=0, atol=1e-7)


def test_inner_products_depend_on_the_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 8, dtype=torch.float64).unbind(0)

    def product(m, n):
        at = torch.tensor([m, n], dtype=torch.float64)
        turned = rotary(torch.stack([q, k]), positions=at)
        return turned[0] @ turned[1]

    torch.testing.assert_close(product(3, 11), product(1003, 1011))
    torch.testing.assert_close(product(5, 5), q @ k)


@both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_inputs_equal_their_copies(dtype, interleaved):
    """Transposed heads, every other feature, a slice at an odd offset, one row for all samples."""
    torch.manual_seed(0)
    base = torch.randn(3, 7, 4, 17).to(dtype)
    views = (
        base[..., :16].transpose(1, 2),
        base[..., :16:2],
        base[:, 1:, :, 1:],
        base[:1, ..., :8].expand(3, 7, 4, 8),
    )
    for x in views:
        got = rotary(x, interleaved=interleaved)
        expected = rotary(x.clone(memory_format=torch.contiguous_format), interleaved=interleaved)
        # A row of unit stride takes another loop, whose compiler may fuse a multiplication and an addition.
        digit = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(got, expected, rtol=digit, atol=digit)


ISA_SCRIPT = """
import sys, torch, supy
torch.manual_seed(0)
x = torch.randn(3, 33, 42)
with supy.use_backend("cpp"):
    torch.save([supy.ops.rotary(y, interleaved=i) for y in (x, x.bfloat16()) for i in (True, False)], sys.argv[1])
"""


@pytest.mark.skipif(_extension.C is None, reason="needs supy._C")
def test_every_instruction_set_agrees(tmp_path):
    results = {}
    for isa in ("generic", "avx2", "avx512"):
        out = tmp_path / isa
        environment = {**os.environ, "SUPY_ISA": isa}
        subprocess.run([sys.executable, "-c", ISA_SCRIPT, out], env=environment, check=True, timeout=120)
        results[isa] = torch.load(out)
    for isa in ("avx2", "avx512"):
        for got, generic in zip(results[isa], results["generic"], strict=True):
            # They differ by whether a multiplication and an addition round together.
            digit = 2 * torch.finfo(got.dtype).eps
            torch.testing.assert_close(got, generic, rtol=digit, atol=digit, msg=lambda m: f"{isa}: {m}")


def test_use_backend_names_what_is_missing():
    x = torch.randn(2, 4)
    with supy.use_backend("reference"):
        plain = rotary(x)
    torch.testing.assert_close(plain, rotary(x))
    if _extension.C is not None:
        with supy.use_backend("cpp"):
            torch.testing.assert_close(rotary(x), plain)
            with pytest.raises(RuntimeError, match="backend 'cpp' was asked for, but .* torch.float64"):
                rotary(x.double())
    with supy.use_backend("triton"), pytest.raises(RuntimeError, match="backend 'triton' was asked for"):
        rotary(x)
    with pytest.raises(ValueError, match="got 'gpu', expected 'reference'"):
        with supy.use_backend("gpu"):
            pass
    torch.testing.assert_close(rotary(x), plain)  # and the choice does not outlive its block


@pytest.mark.parametrize(
    "x, options, error, message",
    [
        (torch.zeros(4), {}, ValueError, r"x has shape \[4\], expected \[\.\.\., T, D\]"),
        (torch.zeros(2, 3), {}, ValueError, r"x has shape \[2, 3\], expected .* D even"),
        (torch.zeros(2, 4).long(), {}, TypeError, "x has dtype torch.int64"),
        (torch.zeros(2, 4), {"positions": torch.zeros(3)}, ValueError, r"positions has shape \[3\], .*\[2\] \(from x\)"),
        (torch.zeros(2, 4), {"positions": torch.zeros(1, 2, 2)}, ValueError, r"positions has shape \[1, 2, 2\]"),
        (torch.zeros(2, 4), {"positions": [0, 1]}, TypeError, "positions is a list"),
    ],
)
def test_errors_say_what_is_wrong(x, options, error, message):
    with pytest.raises(error, match=r"supy\.rotary: .*" + message):
        rotary(x, **options)
