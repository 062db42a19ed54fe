"""The Triton kernels of mixed-chunk attention on a device, against the float64 reference."""

import pytest
import torch

import supy
from _compare import assert_close_to_reference

pytestmark = pytest.mark.gpu

DEVICE, BACKEND = "cuda", "triton"
NAMES = ("out", "dq_quad", "dk_quad", "dq_lin", "dk_lin", "dv", "du")
# name: (B, T, S, E, chunk_size, options); tiles have 128 tokens and 256 values, of float32 128
REGIMES = {
    "one token": (2, 1, 128, 1536, 256, {}),
    "one token, causal": (2, 1, 16, 16, 256, {"causal": True}),
    "chunks of one token, causal": (1, 50, 16, 32, 1, {"causal": True}),
    "small chunks, odd sizes": (2, 70, 5, 20, 33, {}),
    "a token less than a chunk": (1, 255, 128, 256, 256, {}),
    "a chunk, causal": (1, 256, 128, 256, 256, {"causal": True}),
    "a chunk and a token, causal": (2, 257, 128, 1536, 256, {"causal": True}),
    "many chunks": (2, 3000, 128, 1536, 256, {}),
    "many chunks, causal, no gate": (2, 3000, 128, 520, 256, {"causal": True, "gate": False}),
    "chunks of several tiles and a bit, causal": (1, 1500, 72, 100, 300, {"causal": True}),
    "one chunk of several bands, causal": (1, 3000, 64, 64, 4096, {"causal": True}),
    "more features than a product takes": (1, 300, 200, 65, 128, {"causal": True}),
    "samples of length 0, 1, a chunk and T": (4, 300, 48, 40, 64, {"lengths": [0, 1, 64, 300]}),
    "causal and padded": (3, 300, 128, 272, 64, {"lengths": [299, 3, 129], "causal": True}),
    "divided by the chunk": (1, 700, 128, 64, 128, {"causal": True, "normalizer": "chunk_size"}),
    "divided by the number of chunks": (2, 700, 16, 18, 128, {"causal": True, "normalizer": "chunks"}),
    "no tokens": (2, 0, 4, 3, 16, {}),
}


def _make(regime, dtype):
    """The tensors and the slope of the result, samples side by side and NaN in padding; the operator's options."""
    B, T, S, E, chunk_size, options = REGIMES[regime]
    torch.manual_seed(0)
    tensors = [torch.randn(T, B, n).to(DEVICE, dtype).transpose(0, 1) for n in (S, S, S, S, E, E, E)]
    options = {x: torch.tensor(y, device=DEVICE) if isinstance(y, list) else y for x, y in options.items()}
    if "lengths" in options:
        for x in tensors:
            x[torch.arange(T, device=DEVICE) >= options["lengths"][:, None]] = torch.nan
    if not options.pop("gate", True):
        tensors.pop(5)
    return tensors, options | {"chunk_size": chunk_size}


def _run(backend, tensors, options, dtype=None):
    """The result and its gradients."""
    *tensors, slope = (x.detach().to(dtype or x.dtype) for x in tensors)
    tensors = [x.requires_grad_() for x in tensors]
    with supy.use_backend(backend):
        out = supy.ops.mixed_chunk_attention(*tensors, **options)
        return [out.detach(), *torch.autograd.grad(out, tensors, slope)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_values_and_gradients(regime, dtype):
    tensors, options = _make(regime, dtype)
    exact = _run("reference", tensors, options, torch.float64)
    plain = _run("reference", tensors, options)
    got = _run(BACKEND, tensors, options)
    again = _run(BACKEND, tensors, options)
    # Three tf32 products drop the last two bits of their operands, where a product in float32 drops none.
    ulps = 16 if dtype == torch.float32 else 4
    for i, name in enumerate(NAMES[: len(got)]):
        assert_close_to_reference(name, got[i], exact[i], plain[i], 2 if i == 0 else 3, ulps=ulps)
        assert torch.equal(got[i], again[i]), f"{name} differs from run to run"


def test_tf32_where_torch_may_use_it():
    tensors, options = _make("many chunks, causal, no gate", torch.float32)
    exact = _run("reference", tensors, options, torch.float64)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        got = _run(BACKEND, tensors, options)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    for name, a, b in zip(NAMES, got, exact):
        assert (a - b).norm() < 3e-3 * b.norm(), name


def test_expanded_and_strided_inputs():
    tensors, options = _make("a chunk and a token, causal", torch.bfloat16)
    for strange in (
        [x[:1].expand_as(x) for x in tensors],
        [torch.stack((x, x), -1)[..., 1] for x in tensors],
        [torch.cat((x, x), -1)[..., 1 : 1 + x.shape[-1]] for x in tensors],
    ):
        got = _run(BACKEND, strange, options)
        expected = _run(BACKEND, [x.contiguous() for x in strange], options)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_nan_gives_nan():
    tensors, options = _make("a chunk and a token, causal", torch.float32)
    tensors[0][1, 20] = torch.nan
    out, dq_quad, dk_quad, *_ = _run(BACKEND, tensors, options)
    assert out[1, 20].isnan().all() and dq_quad[1, 20].isnan().all() and dk_quad[1, :21].isnan().all()
    assert not out[0].isnan().any() and not out[1, :20].isnan().any()


def test_memory_is_linear_in_the_tokens():
    peaks = []
    for T in (16384, 32768):
        tensors = [torch.randn(1, T, n, device=DEVICE, dtype=torch.bfloat16) for n in (*[128] * 4, 1536, 1536, 1536)]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _run(BACKEND, tensors, {"causal": True})
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 2.1 * peaks[0]
