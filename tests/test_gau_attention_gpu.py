"""The Triton kernels of gated attention on a device, against the float64 reference."""

import pytest
import torch

import supy
from _compare import assert_close_to_reference

pytestmark = pytest.mark.gpu

DEVICE, BACKEND = "cuda", "triton"
NAMES = ("out", "dq", "dk", "dv", "du")
KERNELS = ("relu2", "softmax", "softmax_plus")
# name: (B, T, S, E, options); tiles have 128 tokens and 256 values, of float32 128, and a band at least 22 of them
REGIMES = {
    "one token": (2, 1, 128, 1536, {}),
    "below the floor of 16 keys, odd sizes": (2, 7, 5, 3, {}),
    "a token less than a tile, causal": (2, 127, 64, 100, {"causal": True}),
    "a tile": (2, 128, 128, 256, {}),
    "a tile and a token, no gate": (1, 129, 33, 300, {"gate": False}),
    "more bands than one, causal": (3, 1100, 128, 1536, {"causal": True}),
    "more bands than one": (3, 1100, 128, 520, {}),
    "more features than a product takes": (1, 150, 200, 65, {}),
    "samples of length 0, 1, a tile and T": (4, 300, 48, 40, {"lengths": [0, 1, 128, 300]}),
    "causal and padded, no gate": (3, 300, 128, 272, {"lengths": [299, 3, 129], "causal": True, "gate": False}),
    "packed, with an empty sequence and several in a tile": (1, 700, 128, 64, {"cu_seqlens": [0, 1, 1, 400, 470, 700]}),
    "packed and causal": (1, 700, 16, 18, {"cu_seqlens": [0, 180, 330, 700], "causal": True}),
    "own scale and divisor": (1, 200, 16, 32, {"scale": -0.7, "relu2_length": 512}),
    "every sample masked": (2, 5, 4, 3, {"lengths": [0, 0]}),
    "no tokens": (2, 0, 4, 3, {}),
}
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
every_kernel = pytest.mark.parametrize("kernel", KERNELS)


def _make(regime, dtype):
    """q, k, v, u and the slope of the result, samples side by side and NaN in padding; the operator's options."""
    B, T, S, E, options = REGIMES[regime]
    torch.manual_seed(0)
    tensors = [torch.randn(T, B, n).to(DEVICE, dtype).transpose(0, 1) for n in (S, S, E, E, E)]
    options = {x: torch.tensor(y, device=DEVICE) if isinstance(y, list) else y for x, y in options.items()}
    if "lengths" in options:
        for x in tensors:
            x[torch.arange(T, device=DEVICE) >= options["lengths"][:, None]] = torch.nan
    if not options.pop("gate", True):
        tensors.pop(3)
    return tensors, options


def _run(backend, tensors, kernel, options, dtype=None):
    """The result and its gradients."""
    *tensors, slope = (x.detach().to(dtype or x.dtype) for x in tensors)
    tensors = [x.requires_grad_() for x in tensors]
    with supy.use_backend(backend):
        out = supy.ops.gau_attention(*tensors, kernel=kernel, **options)
        return [out.detach(), *torch.autograd.grad(out, tensors, slope)]


@every_dtype
@every_kernel
@pytest.mark.parametrize("regime", REGIMES)
def test_values_and_gradients(regime, kernel, dtype):
    tensors, options = _make(regime, dtype)
    exact = _run("reference", tensors, kernel, options, torch.float64)
    plain = _run("reference", tensors, kernel, options)
    got = _run(BACKEND, tensors, kernel, options)
    again = _run(BACKEND, tensors, kernel, options)
    # Three tf32 products drop the last two bits of their operands, where a product in float32 drops none.
    ulps = 16 if dtype == torch.float32 else 4
    for i, name in enumerate(NAMES[: len(got)]):
        assert_close_to_reference(f"{kernel}: {name}", got[i], exact[i], plain[i], 2 if i == 0 else 3, ulps=ulps)
        assert torch.equal(got[i], again[i]), f"{name} differs from run to run"


@every_kernel
def test_tf32_where_torch_may_use_it(kernel):
    tensors, options = _make("more bands than one, causal", torch.float32)
    exact = _run("reference", tensors, kernel, options, torch.float64)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        got = _run(BACKEND, tensors, kernel, options)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    for name, a, b in zip(NAMES, got, exact):
        # tf32 has 10 bits; the weights of softmax magnify what scores are off by.
        assert (a - b).norm() < 5e-3 * b.norm(), name


@every_kernel
def test_expanded_and_strided_inputs(kernel):
    tensors, options = _make("a tile", torch.bfloat16)
    for strange in (
        [x[:1].expand_as(x) for x in tensors],
        [torch.stack((x, x), -1)[..., 1] for x in tensors],
        [torch.cat((x, x), -1)[..., 1 : 1 + x.shape[-1]] for x in tensors],
    ):
        got = _run(BACKEND, strange, kernel, options)
        expected = _run(BACKEND, [x.contiguous() for x in strange], kernel, options)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@every_kernel
def test_nan_gives_nan(kernel):
    tensors, options = _make("a tile", torch.float32)
    tensors[0][1, 20] = torch.nan
    out, dq, dk, *_ = _run(BACKEND, tensors, kernel, options)
    assert out[1, 20].isnan().all() and dq[1, 20].isnan().all() and dk[1].isnan().all()
    assert not out[0].isnan().any() and not out[1, :20].isnan().any()


def test_gradients_through_torch_compile():
    tensors, _ = _make("a tile", torch.bfloat16)

    def run(*tensors):
        return supy.ops.gau_attention(*tensors)

    compiled = torch.compile(run, fullgraph=True)
    given = [x.detach().requires_grad_() for x in tensors[:-1]]
    for function in (run, compiled):
        out = function(*given)
        grads = torch.autograd.grad(out, given, tensors[-1])
        if function is run:
            expected = out, *grads
    assert all(torch.equal(a, b) for a, b in zip((out, *grads), expected))


def test_memory_is_not_that_of_the_scores():
    B, T, S, E = 8, 8192, 128, 1536
    tensors = [torch.randn(B, T, n, device=DEVICE, dtype=torch.bfloat16) for n in (S, S, E, E, E)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _run(BACKEND, tensors, "softmax_plus", {})
    # Results and gradients are 0.8 GB, A v, u * grad and float32 gradients of q and k 0.7 GB, two bands 0.2 GB;
    # the scores of all samples would be 1.1 GB in half precision, several times over.
    assert torch.cuda.max_memory_allocated() - before < 1.9e9
