"""supy.ops.global_pointer_* against the dense definition in float64."""

import math

import pytest
import torch

import supy
from _compare import assert_close_to_reference
from _spans import (
    REGIMES,
    LargestTensor,
    dense_loss,
    dense_scores,
    dense_spans,
    mask,
    rows_of,
    with_gradients,
)
from supy.reference import global_pointer as reference

ops = supy.ops
every_regime = pytest.mark.parametrize("regime", REGIMES.values(), ids=REGIMES)


def _make(regime, dtype=torch.float64):
    B, T, H, D = regime.sizes
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(B, T, H, D, generator=generator, dtype=torch.float64) for _ in "qk")
    q *= regime.spread
    for row, score in regime.peaks:
        b, h, i, j = regime.spans[row]
        q[b, i, h] = k[b, j, h] * score * math.sqrt(D) / (k[b, j, h] ** 2).sum()
    options = {"tril": regime.tril}
    if regime.lengths is not None:
        options["lengths"] = torch.tensor(regime.lengths)
    return [x.to(dtype).requires_grad_() for x in (q, k)], rows_of(regime), options


def _dense(q, k, spans, lengths=None, tril=True, scale=None):
    return dense_loss(mask(dense_scores(q, k, scale=scale), lengths, tril), spans)


@every_regime
def test_scores(regime):
    tensors, _, options = _make(regime)
    got = ops.global_pointer_scores(*tensors, **options)
    expected = mask(dense_scores(*tensors), options.get("lengths"), regime.tril)
    torch.testing.assert_close(got, expected)
    weight = torch.randn(got.shape, dtype=torch.float64)
    sums = ((s.masked_fill(s == -math.inf, 0) * weight).sum() for s in (got, expected))
    for a, b in zip(*(torch.autograd.grad(s, tensors) for s in sums)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cells_at_once", [1 << 22, 1], ids=["all heads", "head by head"])
@every_regime
def test_loss_in_float64_is_the_dense_one(regime, cells_at_once, monkeypatch):
    monkeypatch.setattr(reference, "CELLS_AT_ONCE", cells_at_once)
    tensors, spans, options = _make(regime)
    for scale in (None, 0.3):
        got = with_gradients(ops.global_pointer_loss, tensors, spans, scale=scale, **options)
        expected = with_gradients(_dense, tensors, spans, scale=scale, **options)
        for name, a, b in zip(("loss", "dq", "dk"), got, expected):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_regime
def test_loss_in_each_dtype(regime, dtype):
    """Beside the dense definition run in the same precision; half precision inputs compute in float32 there too."""
    tensors, spans, options = _make(regime, dtype)
    got = with_gradients(ops.global_pointer_loss, tensors, spans, **options)
    exact = with_gradients(_dense, [x.detach().double().requires_grad_() for x in tensors], spans, **options)
    plain = with_gradients(_dense, [x.detach().float().requires_grad_() for x in tensors], spans, **options)
    assert got[0].dtype == torch.float32
    # Any order of summing q . k is as good as another: it rounds at the size of the largest score.
    ulps = 4 + 4 * dense_scores(*tensors).detach().double().abs().max().item()
    for i, name in enumerate(("loss", "dq", "dk")):
        same = plain[i] if i == 0 else plain[i].to(dtype)
        label = f"global_pointer_loss: {name}"
        assert_close_to_reference(label, got[i], exact[i], same, 2 if i == 0 else 3, ulps=ulps)


def test_padding_has_no_effect():
    tensors, spans, _ = _make(REGIMES["samples of length 0, 1 and T"])
    lengths = torch.tensor([0, 1, 6])
    dirty = [x.detach().clone() for x in tensors]
    for x in dirty:
        x[0], x[1, 1:] = math.nan, math.inf
    dirty = [x.requires_grad_() for x in dirty]

    def scores_sum(q, k, spans, lengths):
        scores = ops.global_pointer_scores(q, k, lengths=lengths)
        return scores.masked_fill(scores == -math.inf, 0).sum()

    for function in (ops.global_pointer_loss, scores_sum):
        clean = with_gradients(function, tensors, spans, lengths=lengths)
        for a, b in zip(with_gradients(function, dirty, spans, lengths=lengths), clean):
            assert torch.equal(a, b)


def test_loss_holds_the_scores_of_a_few_heads():
    B, T, H, D = 2, 512, 40, 8
    torch.manual_seed(0)
    q, k = (torch.randn(B, T, H, D) for _ in "qk")
    spans = torch.tensor([[0, 0, 1, 4], [1, 39, 500, 511]])
    with LargestTensor() as seen:
        reference.global_pointer_loss(q, k, spans, None, True, 0.35, True)
    assert seen.elements <= reference.CELLS_AT_ONCE < B * H * T * T / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.5])
def test_spans_are_those_of_the_scores(threshold, dtype, monkeypatch):
    """In any chunking; to the last digit, as the size of a batched product may change the order of its sums."""
    torch.manual_seed(0)
    digit = 4 * torch.finfo(dtype).eps
    q, k = (torch.randn(3, 17, 5, 8).to(dtype) for _ in "qk")
    for lengths, tril in ((None, True), (torch.tensor([17, 0, 9]), True), (torch.tensor([1, 17, 9]), False)):
        options = {"lengths": lengths, "tril": tril}
        rows, values = dense_spans(ops.global_pointer_scores(q, k, **options), threshold)
        for at_once in (1 << 22, 2000, 1):
            monkeypatch.setattr(reference, "CELLS_AT_ONCE", at_once)
            got, got_values = ops.global_pointer_spans(q, k, threshold=threshold, **options)
            assert torch.equal(got, rows)
            torch.testing.assert_close(got_values, values, rtol=digit, atol=digit)


def test_scores_of_spans_are_detached():
    tensors, _, _ = _make(REGIMES["no positives"])
    _, scores = ops.global_pointer_spans(*tensors, threshold=-100.0)
    assert len(scores) and not scores.requires_grad


def test_the_efficient_form_is_a_special_case():
    """q' = [q, x_h, 1], k' = [k, 1, y_h] gives head h the efficient form's score."""
    torch.manual_seed(0)
    B, T, H, D = 2, 9, 3, 4
    q, k, x, y = (torch.randn(B, T, n, dtype=torch.float64) for n in (D, D, H, H))
    one = torch.ones(B, T, H, 1, dtype=torch.float64)
    wide_q = torch.cat([q[:, :, None].expand(B, T, H, D), x[..., None], one], -1)
    wide_k = torch.cat([k[:, :, None].expand(B, T, H, D), one, y[..., None]], -1)
    spans = torch.tensor([[0, 0, 1, 4], [1, 2, 0, 8]])
    full = ops.global_pointer_loss(wide_q, wide_k, spans, scale=1.0)
    efficient = ops.efficient_global_pointer_loss(q, k, x, y, spans, scale=1.0)
    torch.testing.assert_close(full, efficient)


def _errors():
    q, spans = torch.zeros(2, 5, 3, 4), torch.zeros(0, 4, dtype=torch.int64)
    yield (q, q[:, 1:], spans), {}, ValueError, r"k has shape \[2, 4, 3, 4\], expected \[B, T, H, D\] with B=2"
    yield (q[0], q, spans), {}, ValueError, r"q has shape \[5, 3, 4\], expected \[B, T, H, D\]"
    yield (q, q.half(), spans), {}, TypeError, "k has dtype torch.float16, expected torch.float32"
    yield (q, q, [[0, 0, 0, 0]]), {}, TypeError, "spans is a list, expected a torch.Tensor"
    yield (q, q, spans.float()), {}, TypeError, "spans has dtype torch.float32, expected torch.int64"
    yield (q, q, torch.tensor([[0, 0, 0, 0], [0, 0, 4, 1]])), {}, ValueError, r"spans\[1\] is \[0, 0, 4, 1\]"
    lengths = {"lengths": torch.tensor([0, 5])}
    yield (q, q, torch.tensor([[0, 0, 0, 0]])), lengths, ValueError, r"spans\[0\] is .* below the sample's length"
    yield (q, q, spans), {"lengths": torch.tensor([[5, 5]])}, ValueError, r"lengths has shape \[1, 2\], expected \[B\]"


@pytest.mark.parametrize("arguments, options, error, message", list(_errors()))
def test_errors_say_what_is_wrong(arguments, options, error, message):
    with pytest.raises(error, match=r"supy\.global_pointer_loss: " + message):
        ops.global_pointer_loss(*arguments, **options)


def test_both_triangles_take_a_span_that_ends_before_it_starts():
    q = torch.zeros(1, 3, 1, 2)
    loss = ops.global_pointer_loss(q, q, torch.tensor([[0, 0, 2, 0]]), tril=False)
    torch.testing.assert_close(loss, torch.tensor(math.log(9) + math.log(2)))
