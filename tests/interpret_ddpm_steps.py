"""The steps of a diffusion in Triton's interpreter, against the float64 reference; run by test_triton_kernels.py."""

import pytest
import torch

from supy import ops
from supy.kernels import ddpm_steps as kernels
from supy.reference.philox_normal import philox_normal as reference_normal

STEPS = {
    "ddpm_step": ops.ddpm_step.__globals__["_step"],
    "ddim_step": ops.ddim_step.__globals__["_step"],
    "ddpm_add_noise": ops.ddpm_add_noise.__globals__["_step"],
}
SCALARS = {"ddpm_step": [0.96, 0.28, 0.6, 0.2], "ddim_step": [0.5, 0.8, 0.7], "ddpm_add_noise": [0.6, 0.8]}


@pytest.mark.parametrize("seed, offset, count", [(0, 0, 1), (-3, 5, 1500), (2**40 + 7, 4 * 2**32 - 9, 70)])
def test_numbers(seed, offset, count):
    out, exact = torch.empty(count), torch.empty(count, dtype=torch.float64)
    kernels.philox_normal(out, seed, offset)
    reference_normal(exact, seed, offset)
    torch.testing.assert_close(out.double(), exact, rtol=4 * 2**-23, atol=0)  # as in test_philox_normal.py


# Step, where its noise comes from, clip, quantile, whether a coefficient is a tensor.
CASES = [
    ("ddpm_add_noise", "seed", None, None, False),
    ("ddpm_add_noise", "noise", None, None, True),
    ("ddpm_step", "seed", None, None, True),
    ("ddpm_step", "noise", 0.4, None, False),
    ("ddpm_step", "none", 0.1, 0.9, False),
    ("ddim_step", "seed", 0.1, 1.0, True),
    ("ddim_step", "noise", None, None, False),
    ("ddim_step", "none", 0.4, None, True),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name, noisy, clip, quantile, per_sample", CASES)
def test_steps(name, noisy, clip, quantile, per_sample, dtype):
    step, scalars = STEPS[name], list(SCALARS[name])
    if noisy == "none":
        scalars[-1] = 0.0
    torch.manual_seed(0)
    x, eps, noise, grad = torch.randn(4, 2, 3, 371).to(dtype)
    eps = None if name == "ddpm_add_noise" else eps
    noise = noise if noisy == "noise" else None
    seed = 9 if noisy == "seed" else None
    tables = [None] * len(scalars)
    if per_sample:
        which = 2 if name == "ddpm_step" else 0
        tables[which] = torch.tensor([0.4, 0.6], dtype=torch.float64)
    limits = None
    if quantile is not None:
        limits = kernels.limits(step.weights, x, eps, None, tables, scalars, None, clip, quantile)
        exact = step._reference_limits(x.double(), eps.double(), None, tables, scalars, None, clip, quantile)
        torch.testing.assert_close(limits.double(), exact, rtol=1e-5, atol=1e-6)

    def run(steps, double):
        out, made = torch.empty_like(x), torch.empty_like(x) if seed is not None else None
        tensors = [t if t is None or not double else t.double() for t in (x, eps, noise)]
        if double:
            out, made = out.double(), None if made is None else made.double()
        steps(*tensors, tables, scalars, limits, clip, seed, 3, out, made)
        return out, made

    out, made = run(lambda *arguments: kernels.steps(step.weights, *arguments), False)
    exact, exact_made = run(step._reference_out, True)
    # Weights of up to 4 on numbers of up to 4.5 in float32, noise rounded to the dtype, one rounding of the result.
    bound = exact.abs().max() * (16 * torch.finfo(torch.float32).eps + 2 * torch.finfo(dtype).eps)
    assert (out.double() - exact).abs().max() <= bound
    if made is not None:
        assert (made.double() - exact_made).abs().max() <= 5 * torch.finfo(dtype).eps

    arguments = (noise, tables, scalars, limits, clip)
    wanted = [True, eps is not None, noisy != "none"]
    parts = kernels.steps_backward(step.weights, grad, x, eps, *arguments, wanted)
    doubled = [t if t is None else t.double() for t in (grad, x, eps)]
    exact = step._reference_backward(*doubled, *arguments, wanted)
    for part, expected in zip(parts, exact, strict=True):
        assert part.shape == expected.shape and part.dtype == dtype
        error = (part.double() - expected).abs()
        limit = 4 * (1 + expected.abs()) * (4 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps)
        assert (error > limit).sum() <= (2 if clip else 0)  # |x0| within rounding of the bound: either side is right


def test_no_values():
    step = STEPS["ddim_step"]
    empty = torch.empty(2, 0)
    tables, scalars = [None] * 3, [0.5, 0.8, 0.0]
    kernels.steps(step.weights, empty, empty, None, tables, scalars, None, None, None, 0, empty.clone(), None)
    kernels.philox_normal(empty, 1, 0)
    assert kernels.limits(step.weights, empty, empty, None, tables, scalars, None, 1.0, 0.5).tolist() == [1, 1]
