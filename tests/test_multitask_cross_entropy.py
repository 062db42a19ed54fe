"""supy.ops.multitask_cross_entropy against loops over tasks and classes."""

import math

import pytest
import torch

import supy
from _compare import assert_close_to_reference

ops = supy.ops
both_forms = pytest.mark.parametrize("form", ["hard", "soft"])


def by_classes(scores, targets, form):
    """One sample, term by term in Python floats."""
    s, t = scores.tolist(), targets.tolist()
    loss = 0.0
    for j in range(scores.shape[1]):
        terms = 1.0
        for row, labels in zip(s, t):
            visible = [x for x in row if x != -math.inf]
            if row[j] == -math.inf:
                continue
            if form == "hard":
                others = [x for k, x in enumerate(row) if k != j and x != -math.inf]
                terms += labels[j] * sum(math.exp(x - row[j]) for x in others)
            else:
                terms += labels[j] * math.exp(sum(visible) / len(visible) - row[j])
        loss += math.log(terms)
    return loss


# name: shape, kind of targets
REGIMES = {
    "one class": ((2, 3, 1), "soft"),
    "one task": ((2, 1, 5), "hard"),
    "tasks above a vector": ((2, 21, 4), "soft"),
    "no batch axis": ((6, 3), "hard"),
    "two batch axes": ((2, 2, 5, 3), "soft"),
    "all positive": ((1, 4, 3), "ones"),
    "none positive": ((1, 4, 3), "zeros"),
    "several chunks of tasks": ((1, 5500, 7), "soft"),
    "many classes": ((2, 3, 700), "soft"),
    "thousands of classes": ((3, 8192), "hard"),
    "no task": ((2, 0, 3), "soft"),
}


def _make(regime, dtype=torch.float64):
    shape, kind = REGIMES[regime]
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    targets = torch.rand(shape, generator=generator, dtype=torch.float64)
    if kind == "hard":
        targets = torch.nn.functional.one_hot(targets.argmax(-1), shape[-1]).double()
    elif kind == "soft":
        targets[..., ::3] = 0  # and rows do not sum to 1
    else:
        targets = torch.full_like(targets, kind == "ones")
    if shape[-1] > 2 and shape[-2] > 2:
        scores[..., 0, 1] = -math.inf
        scores[..., 1, :] = -math.inf
    return scores.to(dtype).requires_grad_(), targets.to(dtype)


def _run(scores, targets, form):
    loss = ops.multitask_cross_entropy(scores, targets, form=form)
    weight = torch.linspace(-1, 2, loss.numel()).view(loss.shape).to(loss)
    return loss.detach(), *torch.autograd.grad(loss, scores, weight)


@both_forms
@pytest.mark.parametrize("regime", [name for name in REGIMES if "chunks" not in name and "thousands" not in name])
def test_float64_is_the_loop(regime, form):
    scores, targets = _make(regime)
    loss, _ = _run(scores, targets, form)
    rows = zip(scores.flatten(0, -3), targets.flatten(0, -3)) if scores.ndim > 2 else [(scores, targets)]
    expected = torch.tensor([by_classes(*row, form) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(loss.flatten() if scores.ndim > 2 else loss[None], expected)


@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_values_and_gradients_in_each_dtype(regime, dtype, form):
    scores, targets = _make(regime, dtype)
    got = _run(scores, targets, form)
    exact = _run(scores.detach().double().requires_grad_(), targets.double(), form)
    with supy.use_backend("reference"):
        plain = _run(scores, targets, form)
    for name, factor, a, b, c in zip(("loss", "ds"), (2, 3), got, exact, plain):
        assert_close_to_reference(f"multitask_cross_entropy: {name}", a, b, c, factor)


@both_forms
def test_gradcheck_without_some_classes(form):
    scores = torch.randn(2, 3, 4, dtype=torch.float64)
    scores[0, 1, 2] = scores[1, 0, :3] = -math.inf
    targets = torch.rand(2, 3, 4, dtype=torch.float64)
    visible = scores > -math.inf

    def loss(x):
        return ops.multitask_cross_entropy(scores.masked_scatter(visible, x), targets, form=form)

    assert torch.autograd.gradcheck(loss, scores[visible].requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_two_classes_are_the_multilabel_loss(dtype):
    """Post 9158: "hard" is that of s_1 - s_2, "soft" that of half of it."""
    scores = torch.randn(3, 40, 2, dtype=dtype)
    t = torch.rand(3, 40, dtype=dtype)
    targets = torch.stack([t, 1 - t], -1)
    difference = scores[..., 0] - scores[..., 1]
    for form, s in (("hard", difference), ("soft", difference / 2)):
        got = ops.multitask_cross_entropy(scores, targets, form=form)
        torch.testing.assert_close(got, ops.multilabel_cross_entropy(s, t))


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-15), (torch.float32, 1e-6)], ids=str)
def test_soft_has_its_minimum_at_softmax(dtype, bound):
    scores = 2 * torch.randn(30, 6, dtype=dtype)
    scores[:, 4] = -math.inf  # left out of every task: else the classes' sums would differ
    scores.requires_grad_()
    ops.multitask_cross_entropy(scores, scores.detach().softmax(-1), form="soft").backward()
    assert scores.grad.abs().max() < bound
    other = scores.detach().softmax(-1).roll(1, -1).masked_fill(scores == -math.inf, 0)
    (ds,) = torch.autograd.grad(ops.multitask_cross_entropy(scores, other, form="soft"), scores)
    assert ds.abs().max() > 1e-3


@both_forms
def test_shifting_a_task_changes_nothing(form):
    scores, targets = torch.randn(20, 5, dtype=torch.float64), torch.rand(20, 5, dtype=torch.float64)
    shifted = scores + 100 * torch.randn(20, 1, dtype=torch.float64)
    got, expected = (ops.multitask_cross_entropy(s, targets, form=form) for s in (scores, shifted))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_rival_far_below_counts_by_itself(dtype):
    """e^-40 beside 1: 1 + e^-40 - 1 would be 0."""
    scores = torch.tensor([[0.0, -40.0], [-40.0, 0.0]], dtype=dtype, requires_grad=True)
    targets = torch.eye(2)
    loss, ds = ops.multitask_cross_entropy(scores, targets), None
    (ds,) = torch.autograd.grad(loss, scores)
    term = math.exp(-40)
    assert loss.item() == pytest.approx(2 * term, rel=1e-6)
    expected = term * torch.tensor([[-1.0, 1], [1, -1]], dtype=dtype)
    torch.testing.assert_close(ds, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)


@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_huge_masked_and_tied_scores_are_never_nan(dtype, form):
    inf = math.inf
    rows = ([1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e4, 1e4, 1e4], [-inf, 1e4, -1e4], [-inf, -inf, 3.0], [-inf] * 3)
    labels = ([1, 0, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0], [1e-38, 1e-30, 0.5])
    for label in labels:
        for tasks in (rows, rows[:1], rows[::-1] * 4):
            scores = torch.tensor(tasks, dtype=dtype, requires_grad=True)
            targets = torch.tensor([label] * len(tasks), dtype=dtype)
            loss, ds = _run(scores, targets, form)
            assert loss.isfinite() and loss >= 0 and ds.isfinite().all()
            assert (ds[scores == -inf] == 0).all()
            exact = ops.multitask_cross_entropy(scores.detach().double(), targets.double(), form=form)
            # The mean of scores of 1e4 is off by 1e-3 in float32.
            torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-3 if form == "soft" else 1e-5)


def test_nan_reaches_only_where_the_reference_has_it():
    scores = torch.randn(20, 4)
    scores[3, 1] = math.nan
    for targets in (torch.rand(20, 4), torch.zeros(20, 4)):
        loss = ops.multitask_cross_entropy(scores, targets)
        with supy.use_backend("reference"):
            torch.testing.assert_close(loss, ops.multitask_cross_entropy(scores, targets), equal_nan=True)


@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_inputs_and_expanded_gradients(dtype, form):
    base, labels = torch.randn(4, 18, 18).to(dtype), torch.rand(4, 18, 18).to(dtype)
    for view in (lambda x: x[..., ::2], lambda x: x.transpose(1, 2), lambda x: x[:1].expand(4, 18, 18)):
        results = []
        for copy in (lambda x: x, lambda x: x.clone(memory_format=torch.contiguous_format)):
            s, t = copy(view(base)).detach().requires_grad_(), copy(view(labels))
            loss = ops.multitask_cross_entropy(s, t, form=form)
            results.append((loss.detach(), *torch.autograd.grad(loss, s, torch.tensor(0.5).expand_as(loss))))
        for a, b in zip(*results):
            assert torch.equal(a, b)


def test_bool_and_integer_targets_equal_floats():
    scores, targets = _make("one task", torch.float32)
    expected = ops.multitask_cross_entropy(scores, targets)
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float64):
        assert torch.equal(ops.multitask_cross_entropy(scores, targets.to(dtype)), expected)


@pytest.mark.parametrize(
    "targets, options, message",
    [
        (torch.zeros(2, 2), {}, r"targets has shape \[2, 2\], expected \[2, 3\] \(from scores\)"),
        (torch.tensor([[0, 0, 0], [0, 2, 0]]), {}, r"targets\[1, 1\] is 2, expected 0 to 1"),
        (torch.full((2, 3), -0.5), {}, r"targets\[0, 0\] is -0.5"),
        (torch.zeros(2, 3, requires_grad=True), {}, "targets requires a gradient"),
        (torch.zeros(2, 3), {"form": "l1"}, "form is 'l1', expected 'hard' or 'soft'"),
    ],
)
def test_errors_say_what_is_wrong(targets, options, message):
    with pytest.raises(ValueError, match=r"supy\.multitask_cross_entropy: " + message):
        ops.multitask_cross_entropy(torch.zeros(2, 3), targets, **options)


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match=r"scores has shape \[3\], expected \[\.\.\., n, m\]"):
        ops.multitask_cross_entropy(torch.zeros(3), torch.zeros(3))
