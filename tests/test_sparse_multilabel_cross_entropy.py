"""supy.ops.sparse_multilabel_cross_entropy against the dense loss."""

import math

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
    """In float32 the published form gives -0.42 at 15, 4.58 at 20, 14.6 at 30, and pushes positives down."""
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


def test_masked_classes_contribute_nothing():
    scores = torch.tensor([1.0, -math.inf, 2.0, -math.inf], requires_grad=True)
    loss, ds = _run(ops.sparse_multilabel_cross_entropy, scores, torch.tensor([1, 2]))
    kept = scores.detach()[[0, 2]].requires_grad_()
    kept, kept_ds = _run(ops.sparse_multilabel_cross_entropy, kept, torch.tensor([1]))
    assert torch.equal(loss, kept) and torch.equal(ds[[0, 2]], kept_ds) and (ds[[1, 3]] == 0).all()
    masked = torch.full((3,), -math.inf, requires_grad=True)
    loss, ds = _run(ops.sparse_multilabel_cross_entropy, masked, torch.tensor([0, -1]))
    assert loss == 0 and (ds == 0).all()


def test_another_ignore_index():
    scores = torch.randn(5, dtype=torch.float64)
    loss = ops.sparse_multilabel_cross_entropy(scores, torch.tensor([0, 3, 0]), ignore_index=0)
    torch.testing.assert_close(loss, dense(scores, torch.tensor([0, 3, 0]), ignore_index=0))


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
