"""supy.ops.deep_norm and supy.nn.DeepNorm against torch's norms of the sum."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import supy
from _compare import assert_close_to_reference
from supy import _extension
from supy.nn import DeepNorm

deep_norm = supy.ops.deep_norm
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("layer", "rms")
every_kind = pytest.mark.parametrize("kind", KINDS)


def tensors(shape, dtype=torch.float64, weights=None):
    """x, branch, weight, bias and the gradient of the output."""
    torch.manual_seed(0)
    x, branch, grad = (torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(3))
    weight, bias = (torch.randn(shape[-1], dtype=torch.float64).to(weights or dtype) for _ in range(2))
    return x, branch, weight, bias, grad


def torch_norm(x, branch, alpha, weight, bias, eps=1e-6, kind="layer", factor=1.0):
    z = alpha * x + branch * factor
    if kind == "layer":
        return F.layer_norm(z, z.shape[-1:], weight, bias, eps)
    out = F.rms_norm(z, z.shape[-1:], weight, eps)
    return out if bias is None else out + bias


def with_gradients(function, x, branch, alpha, weight, bias, grad, **keywords):
    leaves = [t.detach().requires_grad_() for t in (x, branch, weight, bias) if t is not None]
    affine = leaves[2:] if weight is not None else [None, None]
    out = function(*leaves[:2], alpha, *affine, **keywords)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@every_kind
@pytest.mark.parametrize("affine", [True, False], ids=["weight and bias", "without"])
def test_float64_is_torch_s_norm_of_the_sum(kind, affine):
    x, branch, weight, bias, grad = tensors((3, 5, 7))
    if not affine:
        weight = bias = None
    arguments = x, branch, 2.3, weight, bias, grad
    got = with_gradients(deep_norm, *arguments, kind=kind)
    for a, b in zip(got, with_gradients(torch_norm, *arguments, kind=kind), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)  # float64: torch adds in another order


def kept(shape, dropout, seed, offset=0):
    """The mask, read off the result for a branch of ones: positive where it stays, else 0."""
    return deep_norm(torch.zeros(shape), torch.ones(shape), dropout=dropout, seed=seed, offset=offset, kind="rms") > 0


@every_kind
def test_dropout_is_a_mask_with_gradients(kind):
    x, branch, weight, bias, grad = tensors((3, 5, 7))
    mask = kept(x.shape, 0.4, 9, 5)
    assert 0 < mask.sum() < mask.numel()
    arguments = x, branch, 2.3, weight, bias, grad
    got = with_gradients(deep_norm, *arguments, kind=kind, dropout=0.4, seed=9, offset=5)
    expected = with_gradients(torch_norm, *arguments, kind=kind, factor=mask.double() / 0.6)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)  # float64: torch adds in another order


# Shape, what is special: one of the inputs, the branch and the gradient of the output, in float64.
REGIMES = {
    "width 1": ((5, 1), {}),
    "less than a vector": ((9, 7), {}),
    "whole vectors": ((40, 64), {}),
    "rows for several threads": ((65, 768), {}),
    "a number more than whole vectors": ((6, 4097), {}),
    "equal numbers in a row": ((3, 768), {"x": torch.full((3, 768), 0.1), "branch": torch.full((3, 768), 100.7)}),
    "nearly equal numbers": ((3, 768), {"x": 300 + torch.linspace(0, 1e-2, 3 * 768).view(3, 768)}),
    "huge": ((3, 100), {"x": 1e15 * torch.randn(3, 100, generator=torch.Generator().manual_seed(1))}),
    "tiny": ((3, 100), {"x": torch.full((3, 100), 1e-20), "branch": torch.linspace(0, 1e-20, 300).view(3, 100)}),
    "zeros": ((3, 100), {"x": torch.zeros(3, 100), "branch": torch.zeros(3, 100)}),
    "a lost weight": ((3, 100), {"weight": torch.linspace(0, 1, 100) ** 9}),
    "a large bias": ((3, 100), {"bias": torch.linspace(-9, 99, 100)}),
    "an expanded gradient": ((6, 100), {"grad": torch.tensor(0.7).expand(6, 100)}),
    "a transposed branch": ((6, 100), {"branch": torch.linspace(-1, 1, 600).view(100, 6).T}),
}


def regime(shape, special, dtype, weights):
    """x, branch, alpha, weight, bias and the gradient of the output."""
    names = "x", "branch", "weight", "bias", "grad"
    inputs = dict(zip(names, tensors(shape, dtype, weights), strict=True))
    for name, tensor in special.items():
        narrow = tensor.to(inputs[name].dtype)
        inputs[name] = narrow if narrow.isfinite().all() else (tensor * 1e-12).to(narrow.dtype)  # huge in float16
    x, branch, weight, bias, grad = inputs.values()
    return x, branch, torch.tensor(2.3, dtype=torch.float64), weight, bias, grad


@every_kind
@pytest.mark.parametrize("dtype, weights", [(d, d) for d in DTYPES] + [(d, torch.float32) for d in DTYPES[1:]], ids=str)
@pytest.mark.parametrize("shape, special", REGIMES.values(), ids=REGIMES)
def test_values_and_gradients_in_each_dtype(shape, special, dtype, weights, kind):
    inputs = regime(shape, special, dtype, weights)
    got = with_gradients(deep_norm, *inputs, kind=kind)
    exact = with_gradients(deep_norm, *(t.double() for t in inputs), kind=kind)
    with supy.use_backend("reference"):
        plain = with_gradients(deep_norm, *inputs, kind=kind)
    parts = zip(("out", "dx", "dbranch", "dweight", "dbias"), (2, 3, 3, 3, 3), strict=True)
    for (part, factor), a, b, c in zip(parts, got, exact, plain, strict=True):
        assert_close_to_reference(f"deep_norm: {part}", a, b, c, factor)


def test_mask_is_a_stream_of_its_seed():
    """The same for every view of the stream; the share of zeros is that asked for, to five standard deviations."""
    mask = kept((40, 1000), 0.25, -3)
    assert abs((~mask).double().mean().item() - 0.25) < 5 * (0.25 * 0.75 / 40_000) ** 0.5
    assert kept((4000, 10), 0.25, -3).view(40, 1000).equal(mask)
    assert kept((13, 1000), 0.25, torch.tensor(-3), 7_003).flatten().equal(mask.flatten()[7_003 : 20_003])
    assert not kept((40, 1000), 0.25, -4).equal(mask)
    assert kept((5, 10), 0.0, None).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 3, 4 * 2**32 - 29])
@pytest.mark.parametrize("shape", [(30, 200), (7, 37), (2, 1)], ids=str)
def test_dropout_in_each_dtype(shape, offset, dtype):
    """The reference's mask, to the element, in the values and in the gradients; the second word of a counter changes."""
    inputs = regime(shape, {}, dtype, dtype)
    options = {"dropout": 0.3, "seed": -7, "offset": offset, "kind": "rms"}
    got, exact = (with_gradients(deep_norm, *(t.to(d) for t in inputs), **options) for d in (dtype, torch.float64))
    with supy.use_backend("reference"):
        plain = with_gradients(deep_norm, *inputs, **options)
    assert (got[2] == 0).equal(plain[2] == 0)
    for part, factor, a, b, c in zip(("out", "dx", "dbranch", "dweight", "dbias"), (2, 3, 3, 3, 3), got, exact, plain):
        assert_close_to_reference(f"deep_norm: {part}", a, b, c, factor)


@every_kind
def test_threads_give_the_same_bits(kind):
    inputs = regime((301, 768), {}, torch.float32, torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(with_gradients(deep_norm, *inputs, kind=kind, dropout=0.1, seed=1))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(_extension.C is None, reason="needs supy._C")
@pytest.mark.parametrize(
    "dtype, weight, kept_numbers",
    [(torch.float32, 1.0, 60 + 3 + 40), (torch.float32, 0.0, 120 + 40), (torch.bfloat16, 1.0, 120 + 40 + 6)],
)
def test_what_is_kept_for_the_gradients(dtype, weight, kept_numbers):
    """In float32 the result and a number a row, where the weight allows it, else x and branch, in half precision also
    two numbers a row; never a mask."""
    x, branch, _, bias, _ = tensors((3, 20), dtype)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        weight = torch.full((20,), weight, dtype=dtype, requires_grad=True)
        deep_norm(x.requires_grad_(), branch, 2.0, weight, bias / 8, dropout=0.2, seed=1)
    assert sum(sizes) == kept_numbers


def test_second_derivative_raises_and_the_first_may_be_part_of_a_graph():
    x, branch, weight, _, _ = (t.requires_grad_() for t in tensors((3, 20), torch.float32))
    out = deep_norm(x, branch, 2.0, weight)
    (plain,) = torch.autograd.grad(out.square().sum(), x, retain_graph=True)
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    assert first.equal(plain)
    with pytest.raises(RuntimeError, match=r"supy\.deep_norm has no implementation of a second derivative"):
        first.sum().backward()


def test_alpha_ramps_without_recompiling():
    """As a number, as the attribute of the module and as a tensor."""
    module = DeepNorm(6)
    x, branch = torch.randn(2, 4, 6), torch.randn(2, 4, 6, requires_grad=True)

    def attribute(x, branch, alpha):
        module.alpha = alpha
        return compiled(x, branch)

    def tensor(x, branch, alpha):
        return compiled(x, branch, torch.tensor(alpha))

    for function, call, graphs in ((deep_norm, None, 2), (module, attribute, 2), (deep_norm, tensor, 1)):
        torch._dynamo.reset()
        backend = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(function, fullgraph=True, backend=backend)
        for step in range(6):
            alpha = 1 + step / 7
            got = (call or compiled)(x, branch, alpha)
            torch.testing.assert_close(got, torch_norm(x, branch, alpha, None, None))
            (d,) = torch.autograd.grad(got.square().sum(), branch)
            (expected,) = torch.autograd.grad(torch_norm(x, branch, alpha, None, None).square().sum(), branch)
            # The squares of a normalised row have a constant sum: in exact arithmetic this gradient is nearly 0.
            torch.testing.assert_close(d, expected, rtol=1e-4, atol=1e-5)
        assert backend.frame_count <= graphs, function


def test_module_with_dropout_under_checkpointing():
    """The mask is drawn from torch's generator, which the recomputation restores."""
    module = DeepNorm(16, 1.7, kind="rms", dropout=0.5)
    assert module.bias is None and module.weight.shape == (16,)
    x, branch = torch.randn(4, 16), torch.randn(4, 16, requires_grad=True)
    grads = []
    for run in (module, lambda *inputs: checkpoint(module, *inputs, use_reentrant=False)):
        torch.manual_seed(3)
        grads += torch.autograd.grad(run(x, branch).sum(), branch)
    assert grads[0].equal(grads[1])
    assert not torch.equal(module(x, branch), module(x, branch))
    module.eval()
    torch.testing.assert_close(module(x, branch), torch_norm(x, branch, 1.7, None, None, kind="rms"))


@pytest.mark.parametrize(
    "error, message, change",
    [
        (TypeError, "x is a list", {"x": [1.0]}),
        (TypeError, "x has dtype torch.int64", {"x": torch.ones(2, 3, dtype=torch.int64)}),
        (ValueError, r"x has shape \[\]", {"x": torch.tensor(1.0)}),
        (ValueError, r"branch has shape \[3\], expected \[2, 3\]", {"branch": torch.ones(3)}),
        (ValueError, r"weight has shape \[2\], expected \[D\] with D=3 \(from x\)", {"weight": torch.ones(2)}),
        (TypeError, "bias has dtype torch.float16, expected torch.float32", {"bias": torch.ones(3).half()}),
        (TypeError, "alpha is a list", {"alpha": [1.0]}),
        (ValueError, r"alpha has shape \[2\]", {"alpha": torch.ones(2)}),
        (ValueError, "alpha requires a gradient", {"alpha": torch.ones((), requires_grad=True)}),
        (ValueError, "kind is 'batch'", {"kind": "batch"}),
        (ValueError, "eps is -1.0", {"eps": -1.0}),
        (ValueError, "eps is nan", {"eps": float("nan")}),
        (ValueError, "dropout is 1.0", {"dropout": 1.0, "seed": 1}),
        (ValueError, "dropout needs a seed", {"dropout": 0.5}),
        (TypeError, "seed has dtype torch.float32", {"dropout": 0.5, "seed": torch.tensor(1.0)}),
        (ValueError, "offset is -1", {"dropout": 0.5, "seed": 1, "offset": -1}),
    ],
)
def test_bad_arguments(error, message, change):
    arguments = {"x": torch.ones(2, 3), "branch": torch.ones(2, 3)} | change
    with pytest.raises(error, match=r"supy\.deep_norm: " + message):
        deep_norm(**arguments)
