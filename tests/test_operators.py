"""What holds for every operator; a new one adds one row to TABLE.

A row makes the arguments of the public function from (B, T, dtype): its tensors, in order, and its keywords.
"""

from typing import Callable, NamedTuple

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import supy
from supy._library import OPERATORS


class Row(NamedTuple):
    make: Callable
    differentiable: bool = True
    any_order: bool = False  # a second derivative exists
    checks_gradient: bool = True  # gradcheck at B=2, T=4: not where infinite values are the result


def _floats(dtype, *shapes):
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


def _lengths(B, T):
    return torch.arange(B) % (T + 1) if B > 1 else torch.full((B,), T)


def _spans(B, H, T):
    """The last visible token of each sample, for head 0, twice."""
    ends = _lengths(B, T) - 1
    row = torch.stack([torch.arange(B), torch.zeros(B, dtype=torch.int64), ends, ends], 1)
    return row[ends >= 0].repeat(2, 1)


def _gau(**options):
    def make(B, T, dtype):
        masks = {} if "cu_seqlens" in options else {"lengths": _lengths(B, T)}
        return _floats(dtype, (B, T, 4), (B, T, 4), (B, T, 3), (B, T, 3)), options | masks

    return make


def _gau_packed(B, T, dtype):
    ends = torch.tensor([0, T // 2, T // 2, T])
    return _floats(dtype, (1, T, 4), (1, T, 4), (1, T, 3)), {"cu_seqlens": ends, "causal": True}


def _mixed_chunk(**options):
    def make(B, T, dtype):
        sizes = (4, 4, 4, 4, 3, 3)
        return _floats(dtype, *((B, T, n) for n in sizes)), {"chunk_size": 3, "lengths": _lengths(B, T)} | options

    return make


def _mixed_chunk_layer(**options):
    def make(B, T, dtype):
        shapes = (B, T, 5), (2 * 3 + 4, 5), (5, 3), (4, 4), (4, 4)
        tensors = [x / 2 for x in _floats(dtype, *shapes)]
        return tensors, {"chunk_size": 3, "lengths": _lengths(B, T)} | options

    return make


def _unit(**options):
    def make(B, T, dtype):
        shapes = (B, T, 6), (2 * 5 + 4, 6), (6, 5), (2, 4), (2, 4)
        return _floats(dtype, *shapes), options | {"lengths": _lengths(B, T)}

    return make


def _full(loss):
    def make(B, T, dtype):
        spans = [_spans(B, 2, T)] if loss else []
        return _floats(dtype, (B, T, 2, 3), (B, T, 2, 3)) + spans, {"lengths": _lengths(B, T)}

    return make


def _efficient(loss):
    def make(B, T, dtype):
        spans = [_spans(B, 2, T)] if loss else []
        floats = _floats(dtype, (B, T, 3), (B, T, 3), (B, T, 2), (B, T, 2))
        return floats + spans, {"lengths": _lengths(B, T)}

    return make


def _dense_targets(B, T, dtype):
    return [*_floats(dtype, (B, T, 5)), torch.rand(B, T, 5).to(dtype)], {}


def _sparse_targets(B, T, dtype):
    return [*_floats(dtype, (B, T, 5)), torch.randint(-1, 5, (B, T, 3))], {}


def _tasks(form):
    return lambda B, T, dtype: ([*_floats(dtype, (B, T, 3)), torch.rand(B, T, 3).to(dtype)], {"form": form})


def _steps(count, **options):
    """``count`` tensors; an option that is None is a coefficient a sample."""

    def make(B, T, dtype):
        tensors = _floats(dtype, *[(B, T, 3)] * count)
        table = torch.linspace(0.3, 0.7, B, dtype=torch.float64)
        return tensors, {x: table if value is None else value for x, value in options.items()}

    return make


def _step_out(B, T, dtype):
    x, eps, out = _floats(dtype, *[(B, T, 3)] * 3)
    return [x, eps], {"alpha": 0.9, "beta": 0.4, "beta_bar": 0.6, "sigma": 0.3, "seed": 1, "out": out}


def _normals(B, T, dtype):
    return [torch.zeros(B, T, dtype=dtype)], {"seed": 1, "offset": 7 * T + 1}


def _linear(B, T, dtype):
    return [*_floats(dtype, (T, 3), (7, 3), (7,)), torch.arange(T)], {"floor": torch.zeros(T, dtype=dtype)}


def _linear_argmax(x, weight, bias, exclude, floor):
    return supy.ops.linear_argmax(x, weight, bias, exclude=exclude, floor=floor)


def _deep_norm(**options):
    def make(B, T, dtype):
        return _floats(dtype, (B, T, 6), (B, T, 6)), {"alpha": 1 + T / 7} | options

    return make


def _deep_norm_affine(B, T, dtype):
    x, branch, weight, bias = _floats(dtype, (B, T, 6), (B, T, 6), (6,), (6,))
    return [x, branch, weight, bias], {"alpha": 1 + T / 7}


def _edges(G, T):
    return torch.randint(max(T, 1), (3 * G * T, 2))


def _graph(B, T, dtype):
    return [_edges(B, T)], {"num_nodes": T}


def _graphs(B, T, dtype):
    return [_edges(B, T), 3 * T * torch.arange(B + 1), torch.full((B,), T)], {}


TABLE = {
    "batched_maximal_cliques": Row(_graphs, differentiable=False),
    "ddim_step": Row(_steps(2, alpha_bar=None, alpha_bar_prev=0.8)),
    "ddim_step clipped": Row(_steps(2, alpha_bar=None, alpha_bar_prev=0.8, eta=1.0, seed=1, clip=0.3)),
    "ddim_step threshold": Row(
        _steps(2, alpha_bar=0.5, alpha_bar_prev=0.8, threshold=0.9, clip=0.3), checks_gradient=False
    ),
    "ddpm_add_noise": Row(_steps(1, alpha_bar=None, beta_bar=0.8, seed=1)),
    "ddpm_step": Row(_steps(2, alpha=0.9, beta=0.4, beta_bar=None, sigma=0.3, seed=1, offset=3)),
    "ddpm_step out": Row(_step_out, differentiable=False),
    "deep_norm": Row(_deep_norm_affine),
    "deep_norm rms": Row(_deep_norm(kind="rms", dropout=0.3, seed=5, offset=3)),
    "efficient_global_pointer_loss": Row(_efficient(loss=True)),
    "efficient_global_pointer_scores": Row(
        _efficient(loss=False), any_order=True, checks_gradient=False
    ),
    "efficient_global_pointer_spans": Row(_efficient(loss=False), differentiable=False),
    "gated_attention_unit": Row(_unit()),
    "gated_attention_unit relu2": Row(_unit(kernel="relu2", causal=True)),
    "gau_attention": Row(_gau(kernel="softmax_plus")),
    "gau_attention relu2": Row(_gau(kernel="relu2", relu2_length=7, causal=True)),
    "gau_attention packed": Row(_gau_packed),
    "global_pointer_loss": Row(_full(loss=True)),
    "global_pointer_scores": Row(_full(loss=False), any_order=True, checks_gradient=False),
    "global_pointer_spans": Row(_full(loss=False), differentiable=False),
    "linear_argmax": Row(_linear, differentiable=False),
    "maximal_cliques": Row(_graph, differentiable=False),
    "mixed_chunk_attention": Row(_mixed_chunk()),
    "mixed_chunk_attention causal": Row(_mixed_chunk(causal=True, lengths=None)),
    "mixed_chunk_attention chunks": Row(_mixed_chunk(causal=True, normalizer="chunks")),
    "mixed_chunk_layer": Row(_mixed_chunk_layer()),
    "mixed_chunk_layer causal": Row(_mixed_chunk_layer(causal=True, lengths=None)),
    "multilabel_cross_entropy": Row(_dense_targets),
    "multitask_cross_entropy": Row(_tasks("hard")),
    "multitask_cross_entropy soft": Row(_tasks("soft")),
    "philox_normal": Row(_normals, differentiable=False),
    "rotary": Row(lambda B, T, dtype: (_floats(dtype, (B, T, 6)), {}), any_order=True),
    "sparse_multilabel_cross_entropy": Row(_sparse_targets),
}

every_operator = pytest.mark.parametrize("name", TABLE)


def _normals_like(x, **keywords):
    out = x.clone() if isinstance(x, torch.Tensor) else x
    return supy.ops.philox_normal(getattr(x, "shape", ()), out=out, **keywords)


def _deep_norm_ordered(x, branch, weight, bias, alpha):
    return supy.ops.deep_norm(x, branch, alpha, weight, bias)


def _function(name):
    if name == "deep_norm":
        return _deep_norm_ordered
    if name == "ddpm_add_noise":
        return lambda *tensors, **keywords: supy.ops.ddpm_add_noise(*tensors, **keywords)[0]
    if name == "philox_normal":
        return _normals_like
    if name == "linear_argmax":
        return _linear_argmax
    return getattr(supy.ops, name.split()[0])


def _arguments(name, B, T, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    tensors, keywords = TABLE[name].make(B, T, dtype)
    if TABLE[name].differentiable:
        # Dense targets are floating-point and not differentiated: only what the row's operator computes with is.
        last = 1 if "_cross_entropy" in name else len(tensors)
        tensors = [
            x.requires_grad_() if x.is_floating_point() and i < last else x
            for i, x in enumerate(tensors)
        ]
    return tensors, keywords


def _outputs(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


def _run(name, tensors, keywords, function=None):
    """Outputs and, for a differentiable operator, gradients of a weighted sum of the finite outputs."""
    result = _outputs((function or _function(name))(*tensors, **keywords))
    leaves = [x for x in tensors if x.requires_grad]
    if not leaves:
        return result
    out = result[0]
    weight = torch.linspace(1, 2, max(out.numel(), 1))[: out.numel()].view(out.shape).to(out)
    total = (out.masked_fill(out.isinf(), 0) * weight).sum()
    return [out.detach(), *torch.autograd.grad(total, leaves)]


def _same(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_every_public_operator_has_a_row():
    functions = {name for name in supy.ops.__all__ if name[0].islower()}
    functions.remove("mixed_chunk_step")  # no operator: plain PyTorch on a state that it changes
    assert {name.split()[0] for name in TABLE} == functions


@every_operator
def test_opcheck(name):
    """torch.library.opcheck of each registered operator that the call and its backward pass reach."""
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "supy":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    tensors, keywords = _arguments(name, 2, 4)
    with Record():
        _run(name, tensors, keywords)
    assert calls, "the public function calls no registered operator"
    for op, args in calls:
        differentiable = OPERATORS[op.__name__.split(".")[0]].differentiable

        def fresh(x):
            if not isinstance(x, torch.Tensor):
                return x
            return x.detach().clone().requires_grad_(differentiable and x.requires_grad)

        torch.library.opcheck(op, tuple(fresh(x) for x in args))


@every_operator
def test_compile(name, monkeypatch):
    """No graph break, and no new graph for the later lengths: no check of an argument specialises on a size."""
    monkeypatch.undo()  # Dynamo cannot look into what poisons fresh memory
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_function(name), fullgraph=True, backend=backend)
    # How many spans or cliques there are is known only once they are found.
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for T in (5, 9, 14, 20):
            tensors, keywords = _arguments(name, 2, T)
            got = _run(name, tensors, keywords, compiled)
            for a, b in zip(got, _run(name, tensors, keywords), strict=True):
                torch.testing.assert_close(a, b)
    # One of fixed sizes, then one of any size; where a plain int changes too, one more.
    assert backend.frame_count <= 3


@every_operator
def test_same_bits_on_every_run(name):
    tensors, keywords = _arguments(name, 3, 40)
    first = _run(name, tensors, keywords)
    for _ in range(3):
        _same(_run(name, tensors, keywords), first)


@every_operator
def test_gradient_is_that_of_the_values(name):
    row = TABLE[name]
    if not (row.differentiable and row.checks_gradient):
        pytest.skip("no gradient, or infinite values")
    tensors, keywords = _arguments(name, 2, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda *x: _function(name)(*x, **keywords), tensors)


@every_operator
def test_second_derivative_exists_or_raises(name):
    row = TABLE[name]
    if not row.differentiable:
        pytest.skip("no gradient")
    tensors, keywords = _arguments(name, 2, 4, torch.float64)
    leaves = [x for x in tensors if x.requires_grad]
    out = _function(name)(*tensors, **keywords)
    # Squared, so that the first derivative of a linear operator depends on its inputs too.
    total = out.masked_fill(out.isinf(), 0).square().sum()
    first = torch.autograd.grad(total, leaves, create_graph=True)
    if row.any_order:
        assert torch.autograd.grad(first[0].sum(), leaves[0])[0].isfinite().all()
        return
    with pytest.raises(RuntimeError, match=r"supy\.\w+ has no implementation of a second derivative"):
        torch.autograd.grad(sum(x.sum() for x in first), leaves)


@every_operator
def test_views_equal_their_copies(name):
    tensors, keywords = _arguments(name, 2, 4)

    def strided(x):
        wide = torch.empty(*x.shape, 2, dtype=x.dtype)
        wide[..., 0] = x
        wide[..., 1] = 99
        return wide[..., 0]

    def expanded(x):
        return x[:1].expand(x.shape)

    for view in (strided, expanded):
        for index, x in enumerate(tensors):
            if view is expanded and not x.is_floating_point():
                continue  # labels that all name the same place would be another case
            other = [y.detach() for y in tensors]
            other[index] = view(x.detach())
            copied = [y.clone(memory_format=torch.contiguous_format) for y in other]
            for group in (other, copied):
                group[:] = [y.requires_grad_(x.requires_grad) for y, x in zip(group, tensors)]
            got, expected = _run(name, other, keywords), _run(name, copied, keywords)
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b)


@every_operator
@pytest.mark.parametrize("B, T", [(0, 4), (2, 0), (0, 0), (2, 1), (1, 1)])
def test_empty_and_smallest(name, B, T):
    tensors, keywords = _arguments(name, B, T)
    for out in _run(name, tensors, keywords):
        assert not out.isnan().any()


@every_operator
def test_nan_gives_nan(name):
    row = TABLE[name]
    if not row.differentiable:
        pytest.skip("returns what passes a comparison, and NaN passes none")
    tensors, keywords = _arguments(name, 2, 4)
    tensors[0] = torch.full_like(tensors[0], torch.nan)
    assert _function(name)(*tensors, **keywords).isnan().any()


@every_operator
def test_another_dtype_and_no_tensor_are_refused(name):
    tensors, keywords = _arguments(name, 2, 4)
    op, first = name.split()[0], tensors[0].detach()
    other = first.long() if first.is_floating_point() else first.float()
    with pytest.raises(TypeError, match=rf"supy\.{op}: \w+ has dtype {other.dtype}"):
        _function(name)(other, *tensors[1:], **keywords)
    with pytest.raises(TypeError, match=rf"supy\.{op}: \w+ is a list, expected a torch.Tensor"):
        _function(name)(first.tolist(), *tensors[1:], **keywords)
