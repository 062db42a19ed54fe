"""The CUDA and Triton kernels of rotary on a device, values and gradients, against the float64 reference."""

import pytest
import torch

import supy

pytestmark = pytest.mark.gpu

DEVICE, BACKENDS = "cuda", ("cuda", "triton")

SHAPES = {
    "one pair": (1, 2),
    "half is no power of two": (3, 17, 6),
    "heads": (2, 4, 33, 64),
    "more than four axes": (2, 2, 3, 5, 128),
    "no tokens": (2, 0, 8),
}


def _compute(backend, x, grad, positions, interleaved):
    x = x.detach().requires_grad_()
    with supy.use_backend(backend):
        out = supy.ops.rotary(x, positions=positions, interleaved=interleaved)
        (dx,) = torch.autograd.grad(out, x, grad)
    return {"out": out.detach(), "dx": dx}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients(backend, case, interleaved, layout, dtype):
    generator = torch.Generator().manual_seed(0)
    *batch, tokens, dim = SHAPES[case]
    # Strided: every other feature of a wider tensor. The gradient is expanded, as that of a sum over the batch is.
    x = torch.randn(*batch, tokens, 2 * dim, generator=generator).to(DEVICE, dtype)
    x = x[..., ::2] if layout == "strided" else x[..., :dim].contiguous()
    grad = torch.randn(tokens, dim, generator=generator).to(DEVICE, dtype).expand_as(x)
    positions = torch.arange(tokens, device=DEVICE) + 1000

    exact = _compute("reference", x.double(), grad.double(), positions, interleaved)
    plain = _compute("reference", x, grad, positions, interleaved)
    found = _compute(backend, x, grad, positions, interleaved)
    again = _compute(backend, x, grad, positions, interleaved)
    for name, factor in (("out", 2), ("dx", 3)):
        assert found[name].dtype == dtype and found[name].shape == x.shape
        assert torch.equal(found[name], again[name]), f"{name} differs from run to run"
        if not x.numel():
            continue
        error = (found[name].double() - exact[name]).abs()
        allowed = factor * (plain[name].double() - exact[name]).abs().max()
        allowed += 4 * torch.finfo(dtype).eps * exact[name].abs().max()
        worst = error.argmax().item()
        assert error.max() <= allowed, f"rotary, {backend}: {name} is off by {error.max()} at flat index {worst}"
