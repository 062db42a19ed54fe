"""supy.ops.multilabel_cross_entropy against a loop over classes."""

import math

import pytest
import torch

import supy
from _compare import assert_close_to_reference

ops = supy.ops


def by_classes(scores, targets):
    """One row, term by term in Python floats."""
    negative = positive = 1.0
    for s, t in zip(scores.tolist(), targets.tolist()):
        if s != -math.inf:
            negative += (1 - t) * math.exp(s)
            positive += t * math.exp(-s)
    return math.log(negative) + math.log(positive)


REGIMES = {
    "one class": (3, 1, "hard"),
    "hard labels": (4, 9, "hard"),
    "soft labels, 0 and 1 among them": (4, 9, "soft"),
    "all positive": (2, 5, "ones"),
    "none positive": (2, 5, "zeros"),
    "no class": (2, 0, "soft"),
}


def _make(regime, dtype=torch.float64):
    rows, K, kind = REGIMES[regime]
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(rows, K, generator=generator, dtype=torch.float64)
    targets = torch.rand(rows, K, generator=generator, dtype=torch.float64)
    if kind == "hard":
        targets = (targets > 0.6).double()
    elif kind == "soft":
        targets[:, ::4] = 1
        targets[:, 1::4] = 0
    else:
        targets = torch.full_like(targets, kind == "ones")
    return scores.to(dtype).requires_grad_(), targets.to(dtype)


@pytest.mark.parametrize("regime", REGIMES)
def test_float64_is_the_loop_over_classes(regime):
    scores, targets = _make(regime)
    if scores.shape[1] > 2:
        scores.data[0, 2] = -math.inf
        scores.data[-1] = -math.inf
    loss = ops.multilabel_cross_entropy(scores, targets)
    expected = [by_classes(s, t) for s, t in zip(scores, targets)]
    torch.testing.assert_close(loss.detach(), torch.tensor(expected, dtype=torch.float64))
    (ds,) = torch.autograd.grad(loss.sum(), scores)
    # losses.md 1.2's closed form, with exponentials instead of logarithms.
    visible = scores.detach() > -math.inf
    up = torch.where(visible, (1 - targets) * scores.exp(), 0.0)
    down = torch.where(visible, targets * (-scores).exp(), 0.0)
    closed = up / (1 + up.sum(1, True)) - down / (1 + down.sum(1, True))
    torch.testing.assert_close(ds, closed.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_values_and_gradients_in_each_dtype(regime, dtype):
    scores, targets = _make(regime, dtype)

    def run(s):
        loss = ops.multilabel_cross_entropy(s, targets.to(s.dtype))
        return loss.detach(), *torch.autograd.grad(loss.sum(), s)

    got, exact = run(scores), run(scores.detach().double().requires_grad_())
    with supy.use_backend("reference"):
        plain = run(scores)
    assert got[0].dtype == torch.float32  # half precision loses nothing more
    assert_close_to_reference("multilabel_cross_entropy: loss", got[0], exact[0], plain[0], 2)
    assert_close_to_reference("multilabel_cross_entropy: ds", got[1], exact[1], plain[1], 3)


def test_masked_and_huge_scores_are_never_nan():
    inf = math.inf
    scores = torch.tensor([-inf, -inf, 1e4, -1e4, 300.0, -300.0, inf], requires_grad=True)
    targets = torch.tensor([0, 1, 1, 0, 1, 0, 1])
    loss = ops.multilabel_cross_entropy(scores, targets)
    loss.backward()
    assert loss == 0 and (scores.grad == 0).all()
    masked = torch.full((3,), -inf, requires_grad=True)
    loss = ops.multilabel_cross_entropy(masked, torch.tensor([0.0, 0.5, 1.0]))
    loss.backward()
    assert loss == 0 and (masked.grad == 0).all()


def test_the_published_threshold_class_form():
    """Post 7359's code: flip positives, push the masked side to -1e12, append 0, two logsumexps."""
    scores, targets = _make("hard labels")
    y = (1 - 2 * targets) * scores.detach()
    zero = torch.zeros_like(y[:, :1])
    negative = torch.cat([y - targets * 1e12, zero], 1).logsumexp(1)
    positive = torch.cat([y - (1 - targets) * 1e12, zero], 1).logsumexp(1)
    torch.testing.assert_close(ops.multilabel_cross_entropy(scores, targets), negative + positive)


def test_soft_labels_have_their_minimum_at_sigmoid_of_2s():
    scores = torch.randn(6, dtype=torch.float64, requires_grad=True)
    ops.multilabel_cross_entropy(scores, torch.sigmoid(2 * scores.detach())).backward()
    assert scores.grad.abs().max() < 1e-15


def test_bool_and_integer_targets_equal_floats():
    scores, targets = _make("hard labels")
    expected = ops.multilabel_cross_entropy(scores, targets)
    for dtype in (torch.bool, torch.int64, torch.float32):
        assert torch.equal(ops.multilabel_cross_entropy(scores, targets.to(dtype)), expected)


@pytest.mark.parametrize(
    "targets, message",
    [
        (torch.zeros(2, 2), r"targets has shape \[2, 2\], expected \[2, 3\] \(from scores\)"),
        (torch.tensor([[0, 0, 0], [0, 2, 0]]), r"targets\[1, 1\] is 2, expected 0 to 1"),
        (torch.full((2, 3), -0.1), r"targets\[0, 0\] is -0.1"),
        (torch.zeros(2, 3, requires_grad=True), "targets requires a gradient"),
    ],
)
def test_errors_say_what_is_wrong(targets, message):
    with pytest.raises(ValueError, match=r"supy\.multilabel_cross_entropy: " + message):
        ops.multilabel_cross_entropy(torch.zeros(2, 3), targets)


def test_a_scalar_is_refused():
    with pytest.raises(ValueError, match=r"scores has shape \[\], expected \[\.\.\., K\]"):
        ops.multilabel_cross_entropy(torch.tensor(1.0), torch.tensor(1.0))
