"""The Triton kernels of the multi-label losses on a device, values and gradients, against the float64 reference."""

import math

import pytest
import torch

import supy
from _compare import assert_close_to_reference

pytestmark = pytest.mark.gpu

DEVICE = "cuda"

SHAPES = {
    "one class": (3, 1),
    "K no power of two": (2, 3, 37),
    "several chunks of a row": (4, 20_001),
    "many rows": (3000, 70),
    "no row": (0, 5),
    "no class": (2, 0),
}
TASKS = {
    "one class": (2, 3, 1),
    "two classes": (50, 2),
    "several chunks of tasks": (2, 5000, 7),
    "many classes": (2, 30, 1000),
    "all classes of a task in registers": (3, 8192),
    "no task": (2, 0, 3),
}


def _scores(shape, layout, dtype):
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(*shape[:-1], 2 * shape[-1], generator=generator)
    scores[..., ::7] = -math.inf
    scores = scores.to(DEVICE, dtype)
    return scores[..., ::2] if layout == "strided" else scores[..., : shape[-1]].contiguous()


def _targets(shape, kind):
    targets = torch.rand(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return targets < 0.1 if kind == "bool" else targets


def _run(loss, backend, scores, labels, **options):
    scores = scores.detach().requires_grad_()
    with supy.use_backend(backend):
        value = loss(scores, labels, **options)
        weight = torch.tensor(0.5, device=DEVICE, dtype=value.dtype).expand_as(value)
        return value.detach(), torch.autograd.grad(value, scores, weight)[0]


def _check(loss, scores, labels, **options):
    wide = labels.double() if labels.is_floating_point() else labels
    exact = _run(loss, "reference", scores.double(), wide, **options)
    plain = _run(loss, "reference", scores, labels, **options)
    found = _run(loss, "triton", scores, labels, **options)
    again = _run(loss, "triton", scores, labels, **options)
    for name, factor, a, b, c, d in zip(("loss", "ds"), (2, 3), found, exact, plain, again, strict=True):
        assert torch.equal(a, d), f"{name} differs from run to run"
        assert_close_to_reference(f"{loss.__name__}: {name}", a, b, c, factor)


every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
both_layouts = pytest.mark.parametrize("layout", ["contiguous", "strided"])


@every_dtype
@both_layouts
@pytest.mark.parametrize("kind", ["bool", "soft"])
@pytest.mark.parametrize("case", SHAPES)
def test_dense(case, kind, layout, dtype):
    shape = SHAPES[case]
    _check(supy.ops.multilabel_cross_entropy, _scores(shape, layout, dtype), _targets(shape, kind))


@every_dtype
@both_layouts
@pytest.mark.parametrize("positives", [0, 5, 200])
@pytest.mark.parametrize("case", [case for case in SHAPES if SHAPES[case][-1]])
def test_sparse(case, positives, layout, dtype):
    shape = SHAPES[case]
    generator = torch.Generator().manual_seed(1)
    indices = torch.randint(-1, shape[-1], (*shape[:-1], positives), generator=generator).to(DEVICE)
    _check(supy.ops.sparse_multilabel_cross_entropy, _scores(shape, layout, dtype), indices)


@every_dtype
@both_layouts
@pytest.mark.parametrize("kind", ["bool", "soft"])
@pytest.mark.parametrize("form", ["hard", "soft"])
@pytest.mark.parametrize("case", TASKS)
def test_tasks(case, form, kind, layout, dtype):
    shape = TASKS[case]
    scores, targets = _scores(shape, layout, dtype), _targets(shape, kind)
    _check(supy.ops.multitask_cross_entropy, scores, targets, form=form)


def test_huge_scores_and_tiny_targets_are_never_nan():
    scores = torch.tensor([1e4, -1e4, 1e4, -1e4, -math.inf, -100.0], device=DEVICE).repeat(2000)
    targets = torch.tensor([1, 1, 0, 0, 1, 1e-30], device=DEVICE).repeat(2000)
    _check(supy.ops.multilabel_cross_entropy, scores, targets)
    for form in ("hard", "soft"):
        _check(supy.ops.multitask_cross_entropy, scores.view(-1, 6), targets.view(-1, 6), form=form)


def test_values_out_of_range_are_refused():
    scores = torch.zeros(2, 20_000, device=DEVICE)
    targets = torch.zeros_like(scores)
    targets[1, 19_999] = 2
    with supy.use_backend("triton"):
        with pytest.raises(ValueError, match=r"targets\[1, 19999\] is 2"):
            supy.ops.multilabel_cross_entropy(scores, targets)
        with pytest.raises(ValueError, match=r"targets\[1, 7\] is 2"):
            supy.ops.multitask_cross_entropy(scores[:, -8:], targets[:, -8:])
        with pytest.raises(ValueError, match=r"indices\[1, 0\] is 20000"):
            supy.ops.sparse_multilabel_cross_entropy(scores, torch.tensor([[0], [20_000]], device=DEVICE))
        with pytest.raises(ValueError, match=r"targets\[1, 19999\] is 2"):
            supy.ops.multilabel_cross_entropy(scores, targets.byte())
        # A view, whose elements do not follow each other.
        with pytest.raises(ValueError, match=r"targets\[0, 1\] is 2"):
            supy.ops.multilabel_cross_entropy(scores[:, :2], targets[:, -2:].mT.contiguous().mT.flip(0))


def test_a_gradient_for_each_row():
    scores = _scores((70, 300), "contiguous", torch.float32).detach().requires_grad_()
    targets = _targets((70, 300), "soft")
    weight = torch.rand(70, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    results = []
    for backend in ("triton", "reference"):
        with supy.use_backend(backend):
            results.append(torch.autograd.grad(supy.ops.multilabel_cross_entropy(scores, targets), scores, weight)[0])
    torch.testing.assert_close(*results)
