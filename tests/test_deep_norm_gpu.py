"""The CUDA and Triton kernels of deep_norm on a device: the reference, the CPU's mask, the same bits, a CUDA graph."""

import pytest
import torch

import supy
from _compare import assert_close_to_reference
from test_deep_norm import DTYPES, REGIMES, deep_norm, every_kind, regime, tensors, with_gradients

pytestmark = pytest.mark.gpu

every_backend = pytest.mark.parametrize("backend", ["cuda", "triton"])
# A warp, two warps and a block of eight for a row, more rows than partial sums, and more columns than registers hold.
SHAPES = ((300, 200), (70, 1000), (9000, 768), (40, 4096), (5, 8192), (3, 10_000))
CASES = REGIMES | {str(shape): (shape, {}) for shape in SHAPES}


def parts():
    return zip(("out", "dx", "dbranch", "dweight", "dbias"), (2, 3, 3, 3, 3), strict=True)


@every_backend
@every_kind
@pytest.mark.parametrize("dtype, weights", [(d, d) for d in DTYPES] + [(d, torch.float32) for d in DTYPES[1:]], ids=str)
@pytest.mark.parametrize("shape, special", CASES.values(), ids=CASES)
def test_values_and_gradients(shape, special, dtype, weights, kind, backend):
    inputs = regime(shape, special, dtype, weights)
    compared = [with_gradients(deep_norm, *(t.double() for t in inputs), kind=kind)]
    with supy.use_backend("reference"):
        compared.append(with_gradients(deep_norm, *inputs, kind=kind))
    with supy.use_backend(backend):
        got = with_gradients(deep_norm, *(t.cuda() for t in inputs), kind=kind)
    for (part, factor), a, exact, plain in zip(parts(), got, *compared, strict=True):
        assert_close_to_reference(f"deep_norm, {backend}: {part}", a.cpu(), exact, plain, factor)


@every_backend
@pytest.mark.parametrize("offset", [0, 3, 4 * 2**32 - 29])
@pytest.mark.parametrize("shape", [(300, 200), (70, 37), (12, 4096)], ids=str)
def test_mask_is_that_of_the_cpu(shape, offset, backend):
    zero, one = torch.zeros(shape), torch.ones(shape)
    options = {"dropout": 0.3, "offset": offset, "kind": "rms"}
    expected = deep_norm(zero, one, seed=-7, **options) > 0
    for seed in (-7, torch.tensor(-7), torch.tensor(-7, device="cuda")):
        with supy.use_backend(backend):
            got = deep_norm(zero.cuda(), one.cuda(), seed=seed, **options) > 0
            branch = one.cuda().requires_grad_()
            out = deep_norm(zero.cuda(), branch, seed=seed, **options)
            (d,) = torch.autograd.grad(out, branch, torch.linspace(1, 2, one.numel()).view(shape).cuda())
        assert got.cpu().equal(expected) and (d.cpu() != 0).equal(expected)


def _dispatched(*arguments):
    with supy.use_backend("cuda"):
        return deep_norm(*arguments)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits_on_every_run_and_either_way(shape):
    """Also where the dispatcher is between, as with use_backend, and where alpha is in GPU memory."""
    x, branch, weight, bias, grad = (t.cuda() for t in tensors(shape, torch.float32))
    first = with_gradients(deep_norm, x, branch, 2.5, weight, bias, grad)
    for alpha in (2.5, torch.tensor(2.5), torch.tensor(2.5, device="cuda", dtype=torch.float64)):
        for again in (
            with_gradients(deep_norm, x, branch, alpha, weight, bias, grad),
            with_gradients(_dispatched, x, branch, alpha, weight, bias, grad),
        ):
            assert all(a.equal(b) for a, b in zip(first, again, strict=True))


def test_capture():
    """A training step in a graph, with an alpha that changes between replays; nothing waits for the device."""
    x, branch, weight, bias, grad = (t.cuda() for t in tensors((64, 768), torch.float32))
    alpha = torch.tensor(1.0, device="cuda")
    with_gradients(deep_norm, x, branch, alpha, weight, bias, grad)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = with_gradients(deep_norm, x, branch, alpha, weight, bias, grad)
    for value in (1.0, 2.5):
        alpha.fill_(value)
        graph.replay()
        for a, b in zip(captured, with_gradients(deep_norm, x, branch, value, weight, bias, grad), strict=True):
            assert a.equal(b)


def test_module_trains_under_compile():
    from supy.nn import DeepNorm

    module = DeepNorm(768, 2.0, dropout=0.1).cuda()
    x, branch = (t.cuda() for t in tensors((64, 768), torch.float32)[:2])
    compiled = torch.compile(module, fullgraph=True)
    results = []
    for run in (module, compiled):
        module.zero_grad()
        torch.manual_seed(1)
        run(x, branch.requires_grad_()).square().sum().backward()
        results.append(module.weight.grad.clone())
    assert all(r.isfinite().all() for r in results)
    module.eval()
    torch.testing.assert_close(compiled(x, branch), module(x, branch))
