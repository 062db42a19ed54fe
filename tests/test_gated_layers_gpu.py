"""The gated layers on a device, whole, against the float64 reference."""

import pytest
import torch

import supy
from _compare import assert_close_to_reference

pytestmark = pytest.mark.gpu

DEVICE, BACKEND = "cuda", "triton"
NAMES = ("out", "dx", "dw_in", "dw_out", "dgamma", "dbeta")
# name: (B, T, D, S, E, options); tiles have 128 tokens and 256 values, of float32 128
UNIT = {
    "one token": (2, 1, 64, 128, 1536, {}),
    "a tile and a token": (2, 129, 96, 64, 304, {}),
    "causal": (2, 700, 128, 128, 512, {"causal": True}),
    "relu2": (2, 700, 128, 128, 512, {"kernel": "relu2"}),
    "samples of length 0, 1, a tile and T": (4, 300, 64, 48, 48, {"lengths": [0, 1, 128, 300]}),
    "causal, padded, softmax": (3, 300, 64, 128, 272, {"lengths": [299, 3, 129], "causal": True, "kernel": "softmax"}),
    "packed": (1, 700, 64, 128, 64, {"cu_seqlens": [0, 1, 1, 400, 470, 700]}),
    "packed, causal, relu2": (1, 700, 64, 16, 32, {"cu_seqlens": [0, 180, 700], "causal": True, "kernel": "relu2"}),
    "sizes that the kernels leave to torch": (2, 70, 12, 10, 21, {"lengths": [70, 9]}),
    "no tokens": (2, 0, 8, 16, 16, {}),
}
CHUNKS = {
    "one token": (2, 1, 64, 128, 1536, {}),
    "one token, causal": (2, 1, 64, 16, 16, {"causal": True}),
    "a chunk and a token, causal": (2, 257, 96, 128, 304, {"causal": True}),
    "many chunks": (2, 1500, 64, 128, 272, {"chunk_size": 128}),
    "many chunks, causal": (2, 5000, 64, 64, 64, {"chunk_size": 128, "causal": True}),
    "padded": (4, 300, 64, 48, 48, {"lengths": [0, 1, 64, 300], "chunk_size": 64}),
    "causal and padded": (3, 300, 64, 128, 272, {"lengths": [299, 3, 129], "chunk_size": 64, "causal": True}),
    "sizes that the kernels leave to torch": (2, 70, 12, 10, 21, {"lengths": [70, 9], "chunk_size": 16}),
    "no tokens": (2, 0, 8, 16, 16, {}),
}
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def _make(row, heads, dtype):
    """x, w_in, w_out, gamma, beta and the slope of the result, with NaN in padding; the options."""
    B, T, D, S, E, options = row
    torch.manual_seed(0)
    shapes = ((B, T, D), (2 * E + S, D), (D, E), (heads, S), (heads, S), (B, T, D))
    tensors = [torch.randn(shape).to(DEVICE) for shape in shapes]
    tensors[1] /= D**0.5
    options = {x: torch.tensor(y, device=DEVICE) if isinstance(y, list) else y for x, y in options.items()}
    if "lengths" in options:
        for x in (tensors[0], tensors[-1]):
            x[torch.arange(T, device=DEVICE) >= options["lengths"][:, None]] = torch.nan
    # gamma and beta stay in float32, as modules have them.
    return [x if i in (3, 4) else x.to(dtype) for i, x in enumerate(tensors)], options


def _run(backend, layer, tensors, options, dtype=None):
    """The result and its gradients."""
    *tensors, slope = (x.detach().to(dtype or x.dtype) for x in tensors)
    tensors = [x.requires_grad_() for x in tensors]
    with supy.use_backend(backend):
        out = layer(*tensors, **options)
        return [out.detach(), *torch.autograd.grad(out, tensors, slope)]


def _check(layer, tensors, options):
    exact = _run("reference", layer, tensors, options, torch.float64)
    plain = _run("reference", layer, tensors, options)
    got = _run(BACKEND, layer, tensors, options)
    again = _run(BACKEND, layer, tensors, options)
    # Three tf32 products drop the last two bits of their operands, where a product in float32 drops none.
    ulps = 16 if got[0].dtype == torch.float32 else 4
    for i, name in enumerate(NAMES):
        assert_close_to_reference(name, got[i], exact[i], plain[i], 2 if i == 0 else 3, ulps=ulps)
        assert torch.equal(got[i], again[i]), f"{name} differs from run to run"


@every_dtype
@pytest.mark.parametrize("regime", UNIT)
def test_gated_attention_unit(regime, dtype):
    _check(supy.ops.gated_attention_unit, *_make(UNIT[regime], 2, dtype))


@every_dtype
@pytest.mark.parametrize("regime", CHUNKS)
def test_mixed_chunk_layer(regime, dtype):
    _check(supy.ops.mixed_chunk_layer, *_make(CHUNKS[regime], 4, dtype))


@pytest.mark.parametrize("layer", [supy.ops.gated_attention_unit, supy.ops.mixed_chunk_layer])
def test_expanded_and_strided_inputs(layer):
    row = UNIT["a tile and a token"]
    tensors, _ = _make(row, 2 if layer is supy.ops.gated_attention_unit else 4, torch.bfloat16)
    for strange in (
        [x[:1].expand_as(x) for x in tensors],
        [torch.stack((x, x), -1)[..., 1] for x in tensors],
        [torch.cat((x, x), -1)[..., 1 : 1 + x.shape[-1]] for x in tensors],
    ):
        got = _run(BACKEND, layer, strange, {})
        expected = _run(BACKEND, layer, [x.contiguous() for x in strange], {})
        for a, b in zip(got, expected, strict=True):
            # The products around the kernels are torch's, which may take another order for another stride.
            assert (a - b).float().norm() <= 1e-2 * b.float().norm()


def test_rotation_and_gradient_through_torch_compile():
    tensors, _ = _make(UNIT["a tile and a token"], 2, torch.bfloat16)
    angle = torch.rand(129, 32, device=DEVICE)

    def run(*tensors):
        return supy.ops.gated_attention_unit(*tensors, rotation=(angle.cos(), angle.sin()), kernel="relu2")

    given = [x.detach().requires_grad_() for x in tensors[:-1]]
    results = []
    for function in (run, torch.compile(run, fullgraph=True)):
        out = function(*given)
        results.append((out, *torch.autograd.grad(out, given, tensors[-1])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_captured_graph_gives_the_same():
    tensors, _ = _make(UNIT["causal"], 2, torch.bfloat16)
    x, *weights, _ = tensors
    run = supy.ops.gated_attention_unit
    with torch.no_grad():
        run(x, *weights, scale=0.5)  # compiles the kernels, and keeps other factors than those of the graph
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(x, *weights)
        first = run(x, *weights)  # must not use what the graph only makes when it runs
        graph.replay()
        torch.cuda.synchronize()
    assert torch.equal(out, first)
