"""The C++ kernels of gau_attention and of the whole unit against their float64 references, at the edges of blocks."""

import os
import subprocess
import sys

import pytest
import torch

import supy
from _compare import assert_close_to_reference
from supy import _extension

pytestmark = pytest.mark.skipif(_extension.C is None, reason="the native kernels are not built")
KERNELS = ("relu2", "softmax", "softmax_plus")
DTYPES = (torch.float32, torch.bfloat16)

# name: (B, T, S, E, options). Rows go in blocks of 96 to 256, keys of 384, registers hold 8 or 32 rows.
REGIMES = {
    "one token, a sample without any": (2, 1, 4, 3, {"lengths": [1, 0]}),
    "below a vector": (1, 15, 16, 16, {}),
    "a vector": (1, 16, 16, 16, {"causal": True}),
    "above a vector, odd sizes": (2, 17, 5, 33, {}),
    "below a block": (1, 95, 8, 20, {"causal": True}),
    "a block": (2, 96, 128, 48, {"lengths": [96, 95]}),
    "above a block": (1, 97, 20, 49, {"causal": True}),
    "two blocks of gradients and one row": (1, 193, 12, 8, {}),
    "below the keys of one turn": (1, 383, 8, 16, {"causal": True}),
    "above the keys of one turn": (2, 385, 8, 10, {"lengths": [385, 70], "causal": True}),
    "three turns of keys": (1, 800, 16, 24, {}),
    "packed, from one token to above a block": (1, 700, 32, 40, {"cu_seqlens": [0, 1, 1, 17, 400, 420, 700]}),
    "packed and causal": (1, 520, 8, 16, {"cu_seqlens": [0, 97, 500, 520], "causal": True}),
    "own scale and divisor": (1, 40, 8, 8, {"scale": -0.6, "relu2_length": 512}),
}
NAMES = {"attention": ("q", "k", "v", "u"), "unit": ("x", "w_in", "w_out", "gamma", "beta")}
FUNCTIONS = {"attention": supy.ops.gau_attention, "unit": supy.ops.gated_attention_unit}


def _make(form, regime, dtype):
    B, T, S, E, options = REGIMES[regime]
    options = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in options.items()}
    torch.manual_seed(0)
    if form == "attention":
        tensors = [torch.randn(shape) for shape in ((B, T, S), (B, T, S), (B, T, E), (B, T, E))]
    else:
        S, D = S + S % 2, 24
        tensors = [torch.randn(B, T, D), torch.randn(2 * E + S, D) / D**0.5, torch.randn(D, E) / E**0.5]
        tensors += [1 + 0.1 * torch.randn(2, S), 0.1 * torch.randn(2, S)]
    return [x.to(dtype).requires_grad_() for x in tensors], options


def _run(form, tensors, options):
    out = FUNCTIONS[form](*tensors, **options)
    weight = torch.linspace(-1, 1, max(out.numel(), 1))[: out.numel()].view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), tensors)]


def _compare(form, regime, kernel, dtype):
    tensors, options = _make(form, regime, dtype)
    options["kernel"] = kernel
    got = _run(form, tensors, options)
    exact = _run(form, [x.detach().double().requires_grad_() for x in tensors], options)
    with supy.use_backend("reference"):
        plain = _run(form, tensors, options)
    for i, name in enumerate(("out", *NAMES[form])):
        # The unit is a sequence of products, each sum of which is one chain, where the reference's products keep several.
        ulps = 12 if form == "unit" else 4
        label, factor = f"{form} {kernel}: {name}", 2 if i == 0 else 3
        assert_close_to_reference(label, got[i], exact[i], plain[i], factor, ulps=ulps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("form", FUNCTIONS)
def test_values_and_gradients(form, regime, kernel, dtype):
    _compare(form, regime, kernel, dtype)


@pytest.mark.parametrize("form", FUNCTIONS)
def test_no_gate_and_no_gradient(form):
    """Without a gradient nothing is kept, and the values are the same bits."""
    tensors, options = _make(form, "above the keys of one turn", torch.float32)
    with torch.no_grad():
        plain = FUNCTIONS[form](*tensors, **options)
    assert torch.equal(plain, _run(form, tensors, options)[0])
    if form == "attention":
        ones = torch.ones_like(tensors[3])
        without = _run(form, tensors[:3], options)
        for a, b in zip(without, _run(form, [*tensors[:3], ones.requires_grad_()], options)):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_cuda_runs_where_rows_are_not_aligned(kernel):
    """There the unit is torch's products around the operator of the attention; here with the CPU's kernel for that."""
    module = sys.modules["supy.ops.gated_attention_unit"]
    tensors, options = _make("unit", "a block", torch.float32)
    tensors = [x.detach() for x in tensors]
    tables = module.arange_table(tensors[0], 96, 64)
    given = options["lengths"], None, kernel, False, 0.1, None
    grad = torch.randn_like(tensors[0])
    results = []
    for forward, backward in ((module._around, module._around_backward), (module._unit, module._unit_backward)):
        y, *kept = forward(*tensors, *tables, *given, True)
        results.append([y, *backward(grad, *tensors, *tables, *kept, *given)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5 * b.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FUNCTIONS)
def test_same_bits_for_any_number_of_threads(form, dtype):
    before = torch.get_num_threads()
    results = []
    try:
        for regime in ("three turns of keys", "above the keys of one turn"):
            tensors, options = _make(form, regime, dtype)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(_run(form, tensors, options))
    finally:
        torch.set_num_threads(before)
    for first, *others in (results[:3], results[3:]):
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_larger_tensors_and_expanded_ones(dtype):
    torch.manual_seed(0)
    wide = torch.randn(2, 100, 90, dtype=torch.float32).to(dtype)
    q, k, v, u = wide[..., 3:19], wide[:1, :, 20:36].expand(2, -1, -1), wide[..., 40:81].roll(1, 1), wide.mT[:, :41].mT
    views = [x.detach().requires_grad_() for x in (q, k, v, u)]
    copies = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in views]
    assert not (views[0].is_contiguous() or views[3].is_contiguous())
    for a, b in zip(_run("attention", views, {}), _run("attention", copies, {}), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("form", FUNCTIONS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_padding_has_no_effect(form, kernel):
    tensors, options = _make(form, "a block", torch.float32)
    options = {"lengths": torch.tensor([96, 41]), "kernel": kernel}
    first = _run(form, tensors, options)
    dirty = [x.detach().clone() for x in tensors]
    for x in dirty[: 4 if form == "attention" else 1]:
        x[1, 41:] = torch.nan
    dirty = [x.requires_grad_() for x in dirty]
    for a, b in zip(first, _run(form, dirty, options), strict=True):
        assert torch.equal(a, b)
    assert (first[0][1, 41:] == 0).all() and (first[1][1, 41:] == 0).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_extreme_scores(kernel):
    """Scores of several hundred, rising from key to key, so that the softmax's shift has to move again and again."""
    torch.manual_seed(0)
    tensors = [torch.randn(1, 900, 8), torch.randn(1, 900, 8), torch.randn(1, 900, 12), torch.randn(1, 900, 12)]
    tensors[0][..., 0], tensors[1][..., 0] = 20, torch.linspace(-50, 50, 900)
    exact = supy.ops.gau_attention(*(x.double() for x in tensors), kernel=kernel)
    with supy.use_backend("reference"):
        plain = supy.ops.gau_attention(*tensors, kernel=kernel)
    assert_close_to_reference(f"gau_attention {kernel}: out", supy.ops.gau_attention(*tensors, kernel=kernel), exact, plain, 2)


@pytest.mark.skipif(os.environ.get("SUPY_ISA"), reason="runs in each of these builds already")
@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "bf16_pairs"])
def test_builds_for_other_processors(isa):
    """The same regimes with what an older processor would run."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "values and softmax_plus and unit"],
        env=os.environ | {"SUPY_ISA": isa},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-3000:]


MEMORY_SCRIPT = """
import resource, torch, supy
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def grow(function, tensors):
    leaves = [x.requires_grad_() for x in tensors]
    before = peak()
    function(*leaves, causal=True).sum().backward()
    return peak() - before
T, S, E, D = 8192, 16, 64, 48
torch.manual_seed(0)
attention = [torch.randn(1, T, n) for n in (S, S, E, E)]
unit = [torch.randn(1, T, D), torch.randn(2 * E + S, D), torch.randn(D, E), torch.ones(2, S), torch.zeros(2, S)]
grow(supy.ops.gau_attention, [x[:, :8].clone() for x in attention])  # loads what a first call loads
print(grow(supy.ops.gau_attention, attention))
print(grow(supy.ops.gated_attention_unit, unit))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss in kB")
def test_memory_is_linear_in_the_tokens():
    """Forward and backward in a process of their own, gradients included; one matrix of scores is 256 MB."""
    result = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT], check=True, capture_output=True, text=True, timeout=300
    )
    attention, unit = map(float, result.stdout.split())
    assert attention < 64, attention
    assert unit < 64, unit
