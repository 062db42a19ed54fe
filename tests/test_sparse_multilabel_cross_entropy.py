"""supy.ops.sparse_multilabel_cross_entropy against the dense loss."""

import math
from functools import partial

import pytest
import torch

import supy
from _compare import assert_close_to_reference

ops = supy.ops


def dense(scores, indices, ignore_index=-1):
    """The dense loss in float64, its labels set one by one."""
    if scores.ndim > 2:
        return torch.stack([dense(*pair, ignore_index) for pair in zip(scores, indices)])
    if scores.ndim == 1:
        return dense(scores[None], indices[None], ignore_index)[0]
    losses = []
    for s, row in zip(scores.double(), indices.tolist()):
        labels = {i for i in row if i != ignore_index}
        positive = [-s[i] for i in labels if s[i] != -math.inf]
        negative = [x for i, x in enumerate(s) if i not in labels]
        zero = s.new_zeros(())
        losses.append(sum(torch.stack([zero, *part]).logsumexp(0) for part in (positive, negative)))
    return torch.stack(losses)


# name: (scores' shape, indices, multiplier of the scores)
REGIMES = {
    "one class": ((2, 1), [[0], [-1]], 1),
    "unsorted, repeated and ignored": ((3, 6), [[4, 1, 4, -1], [-1, -1, -1, -1], [0, 0, 0, 0]], 2),
    "all positive": ((1, 4), [[3, 0, 2, 1]], 1),
    "no label column": ((2, 4), [[], []], 1),
    "leading axes": ((2, 2, 3), [[[2, 0]] * 2] * 2, 1),
    "scores of 100": ((2, 7), [[0, 6], [3, 3]], 100),
}


def _make(regime, dtype):
    shape, indices, multiplier = REGIMES[regime]
    generator = torch.Generator().manual_seed(0)
    scores = multiplier * torch.randn(shape, generator=generator, dtype=torch.float64)
    return scores.to(dtype).requires_grad_(), torch.tensor(indices, dtype=torch.int64)


def _run(loss, scores, indices):
    loss = loss(scores, indices)
    return loss.detach(), *torch.autograd.grad(loss.sum(), scores)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_equals_the_dense_loss(regime, dtype):
    scores, indices = _make(regime, dtype)
    got = _run(ops.sparse_multilabel_cross_entropy, scores, indices)
    exact = _run(dense, scores.detach().double().requires_grad_(), indices)
    with supy.use_backend("reference"):
        plain = _run(ops.sparse_multilabel_cross_entropy, scores, indices)
    if dtype in (torch.float64, torch.float32):
        tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
        # float32 scores of 100: e^s is off by 100 eps.
        tolerance["atol"] *= REGIMES[regime][2]
        for a, b in zip(got, exact):
            torch.testing.assert_close(a.double(), b, **tolerance)
    for name, a, b, c, factor in zip(("loss", "ds"), got, exact, plain, (2, 3)):
        assert_close_to_reference(f"sparse_multilabel_cross_entropy: {name}", a, b, c, factor)


@pytest.mark.parametrize("value", [5.0, 10.0, 15.0, 20.0, 30.0, 80.0])
def test_positive_scores_do_not_cancel(value):
    """As they do in the published form, see below."""
    torch.manual_seed(0)
    scores = torch.randn(1010) * 0.5 - 8
    scores[:10] = value
    scores.requires_grad_()
    indices = torch.arange(10).repeat(2)
    loss, ds = _run(ops.sparse_multilabel_cross_entropy, scores, indices)
    exact, exact_ds = _run(dense, scores.detach().double().requires_grad_(), indices)
    assert 0.3 < loss < 0.5
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    assert (ds[:10] <= 0).all()
    torch.testing.assert_close(ds.double(), exact_ds, rtol=2e-5, atol=1e-30)


# The loss of bert4keras' formula in float32, positives at the first number (losses.md 1.3).
@pytest.mark.parametrize("value, expected", [(5.0, None), (15.0, -0.425), (20.0, 4.575), (30.0, 14.575)])
def test_the_published_form_has_its_known_failure(value, expected):
    torch.manual_seed(0)
    scores = torch.randn(1002) - 8
    scores[:2] = value
    scores.requires_grad_()
    indices = torch.tensor([0, 1])
    loss, ds = _run(partial(ops.sparse_multilabel_cross_entropy, form="published"), scores, indices)
    exact, exact_ds = _run(ops.sparse_multilabel_cross_entropy, scores, indices)
    assert 0.4 < exact < 0.5 and (exact_ds[:2] <= 0).all()
    if expected:
        assert loss.item() == pytest.approx(expected, abs=2e-3)
        # Its gradient is that of the softmax over all classes: an implicit cap near 16.
        torch.testing.assert_close(ds[:2], torch.full((2,), 0.5), rtol=1e-3, atol=0)
    else:
        torch.testing.assert_close(loss, exact, rtol=1e-2, atol=0)
    doubled, _ = _run(partial(ops.sparse_multilabel_cross_entropy, form="published"), scores, indices.repeat(2))
    assert -11 < doubled - loss < -5 if value < 10 else doubled < loss + 1


def bert4keras(scores, indices, mask_zero):
    """One row in Python floats: the formula of post 8888 with bert4keras' clip and mask_zero."""
    s = scores.tolist()
    own = [i for i in indices.tolist() if i != 0 or not mask_zero]
    every = [math.exp(x) for i, x in enumerate(s) if i or not mask_zero]
    a = math.log(1 + sum(every))
    share = sum(math.exp(s[i]) for i in own) / math.exp(a)
    return a + math.log(min(max(1 - share, 1e-7), 1)) + math.log(1 + sum(math.exp(-s[i]) for i in own))


@pytest.mark.parametrize("mask_zero", [False, True])
def test_the_published_form_is_bert4keras(mask_zero):
    scores = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[3, 5, 0], [0, 0, 0], [1, 1, 2], [8, 0, 4]])
    published = partial(ops.sparse_multilabel_cross_entropy, form="published", mask_zero=mask_zero)
    expected = torch.tensor([bert4keras(*row, mask_zero) for row in zip(scores, indices)], dtype=torch.float64)
    torch.testing.assert_close(published(scores, indices).detach(), expected)
    assert torch.autograd.gradcheck(lambda s: published(s, indices), scores)
    compiled = torch.compile(published, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(scores, indices), published(scores, indices))
    if mask_zero:
        _, ds = _run(published, scores, indices)
        assert (ds[:, 0] == 0).all()
    # Far from where it cancels, and without duplicates, it is the exact loss.
    rows = [1, 3] if mask_zero else [0, 3]
    kept = scores[rows], indices[rows]
    if mask_zero:
        kept = kept[0][:, 1:], kept[1] - 1
    torch.testing.assert_close(published(scores, indices)[rows], ops.sparse_multilabel_cross_entropy(*kept))


def test_ignored_entries_of_the_published_form():
    scores = torch.randn(2, 5, dtype=torch.float64)
    published = partial(ops.sparse_multilabel_cross_entropy, form="published")
    short, padded = torch.tensor([[4], [0]]), torch.tensor([[4, -1], [-1, 0]])
    torch.testing.assert_close(published(scores, padded), published(scores, short))
    masked = torch.full((3,), -math.inf, requires_grad=True)
    loss, ds = _run(published, masked, torch.tensor([-1]))
    assert loss == 0 and (ds == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("K, positives", [(7, 20), (1090, 3), (40_003, 500), (40_003, 0)])
def test_equals_the_dense_operator(K, positives, dtype):
    """Below a vector, above a block, several chunks; more indices than classes, and none."""
    generator = torch.Generator().manual_seed(0)
    scores = (4 * torch.randn(3, K, generator=generator)).to(dtype)
    indices = torch.randint(-1, K, (3, positives), generator=generator)
    targets = torch.zeros(3, K + 1, dtype=torch.bool).scatter_(1, indices % (K + 1), True)[:, :K]
    for s in (scores, scores.repeat_interleave(2, 1)[:, ::2], scores[:1].expand(3, K)):
        s = s.detach().requires_grad_()
        got = _run(ops.sparse_multilabel_cross_entropy, s, indices)
        expected = _run(ops.multilabel_cross_entropy, s, targets)
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_huge_scores_are_never_nan():
    for scores in ([1e4, -1e4, 1e4, -1e4], [-1e4] * 4, [1e4] * 4, [-math.inf, 1e4, -1e4, -math.inf]):
        for indices in ([0, 1], [0, 1, 2, 3], [], [3, 3, -1]):
            leaf = torch.tensor(scores, requires_grad=True)
            loss, ds = _run(ops.sparse_multilabel_cross_entropy, leaf, torch.tensor(indices, dtype=torch.int64))
            expected = dense(leaf.detach(), torch.tensor(indices, dtype=torch.int64))
            torch.testing.assert_close(loss.double(), expected)
            assert ds.isfinite().all()


def test_masked_classes_contribute_nothing():
    scores = torch.tensor([1.0, -math.inf, 2.0, -math.inf], requires_grad=True)
    loss, ds = _run(ops.sparse_multilabel_cross_entropy, scores, torch.tensor([1, 2]))
    kept = scores.detach()[[0, 2]].requires_grad_()
    kept, kept_ds = _run(ops.sparse_multilabel_cross_entropy, kept, torch.tensor([1]))
    assert torch.equal(loss, kept) and torch.equal(ds[[0, 2]], kept_ds) and (ds[[1, 3]] == 0).all()
    masked = torch.full((3,), -math.inf, requires_grad=True)
    loss, ds = _run(ops.sparse_multilabel_cross_entropy, masked, torch.tensor([0, -1]))
    assert loss == 0 and (ds == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_another_ignore_index(dtype):
    """One that is a class: it is no label then, and counts as a negative."""
    scores, indices = torch.randn(5).to(dtype).requires_grad_(), torch.tensor([0, 3, 0])
    loss, ds = _run(partial(ops.sparse_multilabel_cross_entropy, ignore_index=0), scores, indices)
    exact = dense(scores.detach(), indices, ignore_index=0)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    assert (ds > 0).tolist() == [True, True, True, False, True]


def test_unknown_forms_are_refused():
    with pytest.raises(ValueError, match="form is 'other', expected 'exact' or 'published'"):
        ops.sparse_multilabel_cross_entropy(torch.zeros(3), torch.tensor([0]), form="other")
    with pytest.raises(ValueError, match="mask_zero=True is a part of form='published' only"):
        ops.sparse_multilabel_cross_entropy(torch.zeros(3), torch.tensor([0]), mask_zero=True)
    with pytest.raises(ValueError, match=r"indices\[0\] is 3"):
        ops.sparse_multilabel_cross_entropy(torch.zeros(3), torch.tensor([3]), form="published")


@pytest.mark.parametrize(
    "scores, indices, error, message",
    [
        (torch.zeros(1, 3), torch.tensor([[0, 3]]), ValueError, r"indices\[0, 1\] is 3, expected 0 to 2 or ignore_index=-1"),
        (torch.zeros(3), torch.tensor([-2]), ValueError, r"indices\[0\] is -2"),
        (torch.zeros(2, 3), torch.zeros(3, 1).long(), ValueError, r"indices has shape \[3, 1\], expected \[2, P\]"),
        (torch.zeros(2, 3), torch.zeros(2).long(), ValueError, r"indices has shape \[2\]"),
        (torch.zeros(2, 0), torch.zeros(2, 1).long(), ValueError, "expected .* with K >= 1"),
        (torch.zeros(2, 3), torch.zeros(2, 1).int(), TypeError, "indices has dtype torch.int32, expected torch.int64"),
    ],
)
def test_errors_say_what_is_wrong(scores, indices, error, message):
    with pytest.raises(error, match=r"supy\.sparse_multilabel_cross_entropy: .*" + message):
        ops.sparse_multilabel_cross_entropy(scores, indices)
