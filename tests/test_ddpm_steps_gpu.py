"""The CUDA and Triton kernels of the diffusion steps on a device: the CPU's noise, the reference, a CUDA graph."""

import pytest
import torch

import supy
from _compare import assert_close_to_reference
from test_ddpm_steps import CLIPS, DTYPES, SHAPES, STEPS, near_the_bound, tensors, with_gradients

pytestmark = pytest.mark.gpu

every_backend = pytest.mark.parametrize("backend", ["cuda", "triton"])


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed, offset", [(0, 0), (5, 3), (-1, 4 * 2**32 - 29)])
def test_noise_is_that_of_the_cpu(backend, seed, offset, dtype):
    for count in (1, 100_003, 2**20):
        with supy.use_backend(backend):
            got = supy.ops.philox_normal(count, seed, offset=offset, dtype=dtype, device="cuda").cpu()
        expected = supy.ops.philox_normal(count, seed, offset=offset, dtype=dtype)
        digit = 4 * 2**-23 if dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(got, expected, rtol=digit, atol=0)


@every_backend
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(name, shape, clip, dtype, backend):
    step, _, coefficients, (which, values) = STEPS[name]
    keywords = coefficients | {which: torch.tensor(values, dtype=torch.float64)} | clip
    inputs = tensors(shape, dtype)
    exact = with_gradients(step, *(t.double() for t in inputs), keywords)
    with supy.use_backend("reference"):
        plain = with_gradients(step, *inputs, keywords)
    with supy.use_backend(backend):
        got = with_gradients(step, *(t.cuda() for t in inputs), keywords)
    for part, factor, a, b, c in zip(("out", "dx", "deps", "dnoise"), (2, 3, 3, 3), got, exact, plain, strict=True):
        a = a.cpu()
        if part in ("dx", "deps") and clip:
            a = torch.where(near_the_bound(name, inputs, keywords), b.to(dtype), a)
        assert_close_to_reference(f"{name}, {backend}: {part}", a, b, c, factor, ulps=16 if clip else 4)


@every_backend
@pytest.mark.parametrize("shape", [(3, 7, 97), (5000, 2), (3, 2048)], ids=str)
def test_a_seed_is_that_noise(backend, shape):
    x, eps, *_ = (t.cuda() for t in tensors(shape, torch.float32))
    sigma = torch.linspace(0, 1, shape[0], dtype=torch.float64, device="cuda")
    with supy.use_backend(backend):
        for offset in (0, 7):
            noise = supy.ops.philox_normal(shape, 5, offset=offset, device="cuda")
            for value in (0.3, sigma):
                given = supy.ops.ddpm_step(x, eps, 0.96, 0.28, 0.6, value, noise=noise)
                made = supy.ops.ddpm_step(x, eps, 0.96, 0.28, 0.6, value, seed=5, offset=offset)
                torch.testing.assert_close(made, given, rtol=4 * 2**-23, atol=1e-6)
            assert supy.ops.ddpm_add_noise(x, 0.6, 0.8, seed=5, offset=offset)[1].equal(noise)


def test_capture():
    """A graph of steps in place equals the steps, and nothing waits for the device."""
    x, eps, *_ = (t.cuda() for t in tensors((2, 3, 64, 64), torch.float32))
    alpha_bar = torch.tensor([0.5, 0.6], dtype=torch.float64, device="cuda")

    def steps(x):
        for offset in (0, x.numel()):
            supy.ops.ddpm_step(x, eps, 0.96, 0.28, 0.6, 0.2, seed=1, offset=offset, clip=1.0, out=x)
            supy.ops.ddim_step(x, eps, alpha_bar, 0.8, eta=0.5, seed=2, offset=offset, threshold=0.9, out=x)
        return x

    expected, captured = steps(x.clone()), x.clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps(captured)
    captured.copy_(x)
    graph.replay()
    assert captured.equal(expected)
