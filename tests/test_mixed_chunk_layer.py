"""supy.ops.mixed_chunk_layer and its kernels: all pieces together, in every dtype, for any number of threads."""

import subprocess
import sys

import pytest
import torch

import supy
from _compare import assert_close_to_reference
from supy.ops import mixed_chunk_attention, mixed_chunk_layer
from supy.ops import rotary as rotate

attention_module, layer_module = (sys.modules[f"supy.ops.mixed_chunk_{name}"] for name in ("attention", "layer"))

# name: (B, T, D, S, E, options)
REGIMES = {
    "one piece": (2, 9, 6, 4, 5, {"chunk_size": 4}),
    "one piece, causal": (2, 9, 6, 4, 5, {"chunk_size": 4, "causal": True}),
    "pieces of several samples": (5, 6, 6, 4, 5, {"chunk_size": 4, "causal": True}),
    "a sample in several pieces, the last one short": (2, 53, 6, 4, 5, {"chunk_size": 4, "causal": True}),
    "lengths in several pieces": (4, 40, 6, 4, 5, {"chunk_size": 4, "causal": True, "lengths": [0, 5, 24, 40]}),
    "lengths, not causal": (3, 40, 6, 4, 5, {"chunk_size": 16, "lengths": [7, 40, 0]}),
    "a chunk larger than a piece": (1, 100, 6, 4, 5, {"chunk_size": 40, "causal": True}),
    "a constant normalizer": (1, 40, 6, 4, 5, {"chunk_size": 8, "causal": True, "normalizer": "chunk_size"}),
    "above a vector": (1, 70, 40, 34, 50, {"chunk_size": 16, "causal": True}),
    "one token": (2, 1, 6, 4, 5, {"chunk_size": 4, "causal": True}),
    "a chunk less one token": (1, 15, 6, 4, 5, {"chunk_size": 16, "causal": True}),
    "lengths around a chunk": (5, 33, 6, 4, 5, {"chunk_size": 16, "causal": True, "lengths": [1, 15, 16, 17, 33]}),
    "the same, not causal": (5, 33, 6, 4, 5, {"chunk_size": 16, "lengths": [1, 15, 16, 17, 33]}),
    "a chunk of several blocks": (1, 310, 20, 6, 50, {"chunk_size": 150, "causal": True, "lengths": [299]}),
    "the same, several pieces, not causal": (1, 310, 20, 6, 50, {"chunk_size": 150, "lengths": [299]}),
}
every_regime = pytest.mark.parametrize("regime", REGIMES)


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    monkeypatch.setattr(attention_module, "_SEGMENT", 16)


def _make(regime, dtype=torch.float64):
    B, T, D, S, E, options = REGIMES[regime]
    generator = torch.Generator().manual_seed(1)
    shapes = ((B, T, D), (2 * E + S, D), (D, E), (4, S), (4, S))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    tensors[1] /= D**0.5
    tensors = [x.to(dtype).requires_grad_() for x in tensors]
    lengths = torch.tensor(options["lengths"]) if "lengths" in options else None
    return tensors, {**options, "lengths": lengths}


def in_parts(x, w_in, w_out, gamma, beta, **options):
    """The layer from the operators it consists of, with autograd between them."""
    E = w_out.shape[1]
    h = x @ w_in.T
    u, v, z = (h * h.sigmoid()).split((E, E, gamma.shape[1]), -1)
    heads = (rotate(z * a + b) for a, b in zip(gamma, beta))
    return mixed_chunk_attention(*heads, v, u, **options) @ w_out.T


def _gradients(function, tensors, weight):
    out = function(*tensors)
    return [out, *torch.autograd.grad((out * weight).sum(), tensors)]


NAMES = ("out", "dx", "dw_in", "dw_out", "dgamma", "dbeta")


memories = pytest.mark.parametrize("kept", [1 << 26, 1200, 0], ids=["kept", "some kept", "computed again"])


@memories
@every_regime
def test_float64_is_its_parts(regime, kept, monkeypatch):
    monkeypatch.setattr(layer_module, "_KEPT", kept)
    tensors, options = _make(regime)
    weight = torch.randn(tensors[0].shape, dtype=torch.float64)
    got = _gradients(lambda *x: mixed_chunk_layer(*x, **options), tensors, weight)
    expected = _gradients(lambda *x: in_parts(*x, **options), tensors, weight)
    for name, a, b in zip(NAMES, got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11, msg=lambda m: f"{name}: {m}")


@memories
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_regime
def test_values_and_gradients_in_each_dtype(regime, dtype, kept, monkeypatch):
    monkeypatch.setattr(layer_module, "_KEPT", kept)
    tensors, options = _make(regime, dtype)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    weight = torch.randn(tensors[0].shape).to(dtype)

    def run(given):
        return _gradients(lambda *x: mixed_chunk_layer(*x, **options), given, weight.to(given[0].dtype))

    got, exact = run(tensors), run(exact)
    with supy.use_backend("reference"):
        plain = run(tensors)
    for i, name in enumerate(NAMES):
        assert_close_to_reference(f"mixed_chunk_layer: {name}", got[i], exact[i], plain[i], 3 if i else 2)


def test_without_gradients_nothing_is_kept():
    tensors, options = _make("a sample in several pieces, the last one short", torch.float32)
    expected = mixed_chunk_layer(*tensors, **options)
    with torch.no_grad():
        assert torch.equal(mixed_chunk_layer(*tensors, **options), expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("part", ["attention", "layer"])
def test_threads_show_in_no_bit(part, B, dtype, causal, monkeypatch):
    """Threads share blocks of rows, columns and weights, of pieces of one sample or of several."""
    monkeypatch.setattr(attention_module, "_SEGMENT", 128)
    monkeypatch.setattr(layer_module, "_KEPT", 100_000)
    torch.manual_seed(0)
    if part == "attention":
        function, shapes = mixed_chunk_attention, [(B, 500, n) for n in (40, 40, 40, 40, 300, 300)]
    else:
        function, shapes = mixed_chunk_layer, [(B, 500, 70), (2 * 200 + 40, 70), (70, 200), (4, 40), (4, 40)]
    tensors = [(torch.randn(shape) / shape[-1] ** 0.5).to(dtype).requires_grad_() for shape in shapes]
    weight = torch.randn(B, 500, 300 if part == "attention" else 70).to(dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(_gradients(lambda *x: function(*x, chunk_size=48, causal=causal), tensors, weight))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_gradients_of_weights_add_up_in_float32():
    """In bfloat16 half of 1,000 equal addends would vanish: each is below half an ulp of a sum of 256 of them."""
    tensors = [torch.full(shape, 0.5).to(torch.bfloat16) for shape in ((1, 16_000, 4), (10, 4), (4, 4), (4, 2), (4, 2))]
    tensors = [x.requires_grad_() for x in tensors]
    options = {"chunk_size": 16, "causal": True, "normalizer": "tokens"}
    weight = torch.ones(1, 16_000, 4)

    def run(given):
        return _gradients(lambda *x: mixed_chunk_layer(*x, **options), given, weight.to(given[0].dtype))

    exact = run([x.detach().double().requires_grad_() for x in tensors])
    for name, a, b in list(zip(NAMES, run(tensors), exact, strict=True))[2:4]:
        assert ((a.double() - b).abs() <= 0.02 * b.abs()).all(), name


MEMORY_SCRIPT = """
import resource, sys, torch, supy
sys.modules["supy.ops.mixed_chunk_layer"]._KEPT = KEPT
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
torch.set_num_threads(2)
layer = supy.nn.MixedChunkAttention(256, causal=True)
def run(T):
    x = torch.randn(1, T, 256).requires_grad_()
    before = peak()
    layer(x).sum().backward()
    return peak() - before
run(256)
print(run(16384))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss in kB")
@pytest.mark.parametrize("kept, megabytes", [(1 << 30, 160), (0, 90)], ids=["kept", "computed again"])
def test_memory_of_a_layer(kept, megabytes):
    """y and dx take 32 MB; u, v and z, which autograd would keep three times over, 72 MB where they are kept."""
    script = MEMORY_SCRIPT.replace("KEPT = KEPT", f"KEPT = {kept}")
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=300)
    assert float(result.stdout) < megabytes, result.stdout


def _errors():
    x, w_in, w_out, affine = torch.zeros(2, 5, 6), torch.zeros(14, 6), torch.zeros(6, 5), torch.zeros(4, 4)
    yield (x, w_in[1:], w_out, affine, affine), {}, ValueError, r"w_in has 13 rows, expected 2 E \+ S = 14"
    yield (x, w_in, w_out[1:], affine, affine), {}, ValueError, r"w_out has shape \[5, 5\]"
    yield (x, w_in, w_out, affine[:2], affine[:2]), {}, ValueError, r"gamma has shape \[2, 4\], expected \[4, S\]"
    yield (x, w_in, w_out, affine, affine[:2]), {}, ValueError, r"beta has shape \[2, 4\]"
    yield (x, w_in.double(), w_out, affine, affine), {}, TypeError, "w_in has dtype torch.float64"
    yield (x, w_in, w_out, affine, affine), {"chunk_size": 0}, ValueError, "chunk_size is 0"
    yield (x, w_in, w_out, affine, affine), {"normalizer": "n"}, ValueError, "normalizer is 'n'"
    long = torch.tensor([1, 6])
    for causal in (False, True):
        options = {"lengths": long, "causal": causal}
        yield (x, w_in, w_out, affine, affine), options, ValueError, r"lengths\[1\] is 6, expected 0 to T=5"


@pytest.mark.parametrize("arguments, options, error, message", list(_errors()))
def test_errors_say_what_is_wrong(arguments, options, error, message):
    with pytest.raises(error, match=r"supy\.mixed_chunk_layer: .*" + message):
        mixed_chunk_layer(*arguments, **options)
