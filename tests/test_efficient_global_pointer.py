"""supy.ops.efficient_global_pointer_* against the dense definition in float64."""

import functools
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
from supy.reference import efficient_global_pointer as reference

ops = supy.ops
NAMES = ("q", "k", "start_bias", "end_bias")
every_regime = pytest.mark.parametrize("regime", REGIMES.values(), ids=REGIMES)


def _make(regime, dtype=torch.float64):
    B, T, H, D = regime.sizes
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, T, D), (B, T, D), (B, T, H), (B, T, H))
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    tensors[2] *= regime.spread
    tensors[3] *= regime.spread
    for row, score in regime.peaks:
        b, h, i, j = regime.spans[row]
        now = dense_scores(*tensors)[b, h, i, j]
        tensors[2][b, i, h] += (score - now) / 2
        tensors[3][b, j, h] += (score - now) / 2
    options = {"tril": regime.tril}
    if regime.lengths is not None:
        options["lengths"] = torch.tensor(regime.lengths)
    return [x.to(dtype).requires_grad_() for x in tensors], rows_of(regime), options


def _dense(q, k, start_bias, end_bias, spans, lengths=None, tril=True):
    return dense_loss(mask(dense_scores(q, k, start_bias, end_bias), lengths, tril), spans)


@every_regime
def test_scores(regime):
    tensors, _, options = _make(regime)
    got = ops.efficient_global_pointer_scores(*tensors, **options)
    expected = mask(dense_scores(*tensors), options.get("lengths"), regime.tril)
    torch.testing.assert_close(got, expected)
    weight = torch.randn(got.shape, dtype=torch.float64)
    sums = ((s.masked_fill(s == -math.inf, 0) * weight).sum() for s in (got, expected))
    for name, a, b in zip(NAMES, *(torch.autograd.grad(s, tensors) for s in sums)):
        torch.testing.assert_close(a, b, msg=lambda m: f"{name}: {m}")


@every_regime
def test_loss_in_float64_is_the_dense_one(regime):
    tensors, spans, options = _make(regime)
    got = with_gradients(ops.efficient_global_pointer_loss, tensors, spans, **options)
    expected = with_gradients(_dense, tensors, spans, **options)
    for name, a, b in zip(("loss", *NAMES), got, expected):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_regime
def test_loss_in_each_dtype(regime, dtype):
    """Beside the dense definition run in the same precision; half precision inputs compute in float32 there too."""
    tensors, spans, options = _make(regime, dtype)
    call = ops.efficient_global_pointer_loss
    got = with_gradients(call, tensors, spans, **options)
    exact = with_gradients(_dense, [x.detach().double().requires_grad_() for x in tensors], spans, **options)
    plain = with_gradients(_dense, [x.detach().float().requires_grad_() for x in tensors], spans, **options)
    assert got[0].dtype == torch.float32
    # The factorised sum adds a, its shift and the logarithm, each rounded at the size of the largest score.
    ulps = 4 + 4 * dense_scores(*tensors).detach().double().abs().max().item()
    for i, name in enumerate(("loss", *NAMES)):
        same = plain[i] if i == 0 else plain[i].to(dtype)
        label = f"efficient_global_pointer_loss: {name}"
        assert_close_to_reference(label, got[i], exact[i], same, 2 if i == 0 else 3, ulps=ulps)
    with supy.use_backend("reference"):
        again = with_gradients(call, tensors, spans, **options)
    for i, name in enumerate(("loss", *NAMES)):
        label = f"efficient_global_pointer_loss: {name}"
        assert_close_to_reference(label, got[i], exact[i], again[i], 2 if i == 0 else 3, ulps=ulps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_heads_whose_scaled_sum_underflows(dtype, monkeypatch):
    """One head's best start and best end meet on no visible cell: every score lies far below the sum of peaks."""
    gap = 100.0 if dtype == torch.float32 else 800.0
    tensors = [torch.randn(2, 6, n, dtype=torch.float64) for n in (4, 4, 3, 3)]
    tensors[2][0, 5, 1] += gap  # the last token as start: only (5, 5) is visible
    tensors[3][0, 0, 1] += gap  # the first as end: only (0, 0)
    tensors[2][0, :5, 1] -= gap
    tensors[3][0, 1:, 1] -= gap
    tensors = [x.to(dtype).requires_grad_() for x in tensors]
    spans = torch.tensor([[0, 1, 0, 0], [0, 2, 1, 3], [1, 1, 2, 2]])
    seen = []
    direct = reference._faint

    def spy(*arguments):
        for b, heads, s in direct(*arguments):
            seen.append((b, heads.tolist()))
            yield b, heads, s

    monkeypatch.setattr(reference, "_faint", spy)
    for lengths in (None, torch.tensor([6, 4])):
        seen.clear()
        call = functools.partial(ops.efficient_global_pointer_loss, lengths=lengths)
        with supy.use_backend("reference"):
            results = [with_gradients(call, tensors, spans)]
        assert set(map(str, seen)) == {str((0, [1]))}, "the case no longer underflows"
        results.append(with_gradients(call, tensors, spans))
        wide = [x.detach().double().requires_grad_() for x in tensors]
        expected = with_gradients(_dense, wide, spans, lengths=lengths)
        eps = torch.finfo(dtype).eps
        for got in results:
            for name, a, b in zip(("loss", *NAMES), got, expected):
                # The bias of a hundred rounds at 100 eps, and so does its exponential.
                torch.testing.assert_close(a.double(), b, rtol=4 * gap * eps, atol=4 * gap * eps, msg=name)


def test_just_above_the_underflow():
    """Sums of 1e-20: the factorised path, next to the limit, keeps its precision."""
    tensors = [torch.randn(1, 8, n) for n in (4, 4, 2, 2)]
    tensors[2][0, 7] += 24
    tensors[3][0, 0] += 24
    tensors[2][0, 7, 1] += 20
    tensors = [x.requires_grad_() for x in tensors]
    spans = torch.tensor([[0, 0, 0, 0], [0, 0, 7, 7]])
    got = with_gradients(ops.efficient_global_pointer_loss, tensors, spans)
    expected = with_gradients(_dense, [x.detach().double().requires_grad_() for x in tensors], spans)
    for name, a, b in zip(("loss", *NAMES), got, expected):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-6, msg=name)


def test_minus_infinity_in_a_bias_masks():
    """How GPLinker's decoding hides [CLS] and [SEP]: such cells contribute nothing, as a positive neither."""
    tensors, spans, _ = _make(REGIMES["duplicates count once"])
    with torch.no_grad():
        tensors[2][:, 1] = -math.inf  # the row of the first span
        tensors[3][:, 6, 1] = -math.inf
    loss = ops.efficient_global_pointer_loss(*tensors, spans)
    kept = spans[spans[:, 2] != 1]
    scores = mask(dense_scores(*(x.detach() for x in tensors)), None, True)
    torch.testing.assert_close(loss.detach(), dense_loss(scores, kept))
    for grad in torch.autograd.grad(loss, tensors):
        assert grad.isfinite().all()


def test_tokens_ruled_out_take_no_slow_path(monkeypatch):
    """Biases of -inf, for tokens or whole heads, leave sums of exactly 0; that is no underflow to compute directly."""
    tensors, spans, _ = _make(REGIMES["duplicates count once"])
    with torch.no_grad():
        tensors[2][0] = tensors[3][0] = -math.inf  # a sample without candidates
        tensors[2][1, 1:] = tensors[3][1, :7] = -math.inf  # one cell left, (0, 7), which is positive for head 2
        tensors[2][1, :, 1] = -math.inf  # and no start at all for head 1
        tensors[0][1, 3] *= 1e4  # a token ruled out is no peak either
    wide = [x.detach().float().requires_grad_() for x in tensors]
    seen = []
    monkeypatch.setattr(reference, "_scores_of", lambda *x: seen.append(x))
    got = with_gradients(ops.efficient_global_pointer_loss, wide, spans)
    assert not seen
    scores = mask(dense_scores(*(x.detach() for x in tensors)), None, True)[1, :, 0, 7]
    expected = (1 + scores[0].exp()).log() + (1 + (-scores[2]).exp()).log()
    torch.testing.assert_close(got[0].double(), expected / 2, rtol=1e-5, atol=0)
    assert all(x.isfinite().all() for x in got)


def test_padding_has_no_effect():
    tensors, spans, _ = _make(REGIMES["samples of length 0, 1 and T"])
    lengths = torch.tensor([0, 1, 6])
    clean = with_gradients(ops.efficient_global_pointer_loss, tensors, spans, lengths=lengths)
    dirty = [x.detach().clone() for x in tensors]
    for x in dirty:
        x[0], x[1, 1:] = math.nan, math.inf
    dirty = [x.requires_grad_() for x in dirty]
    for a, b in zip(with_gradients(ops.efficient_global_pointer_loss, dirty, spans, lengths=lengths), clean):
        assert torch.equal(a, b)


def test_the_loss_alone_equals_the_losswith_gradients():
    tensors, spans, options = _make(REGIMES["both triangles"])
    loss = ops.efficient_global_pointer_loss(*tensors, spans, **options)
    with torch.no_grad():
        alone = ops.efficient_global_pointer_loss(*tensors, spans, **options)
    assert torch.equal(loss.detach(), alone) and not alone.requires_grad


def test_float16_gradients_survive_a_scaled_loss():
    """A gradient scaler multiplies the loss so that float16 gradients do not vanish; the product is rounded once."""
    tensors, spans, _ = _make(REGIMES["no positives"], torch.float16)
    with torch.no_grad():
        tensors[2] -= 12
        tensors[3] -= 12
    loss = ops.efficient_global_pointer_loss(*tensors, spans)
    (dx,) = torch.autograd.grad(loss * 65536, tensors[2])
    exact = [x.detach().double().requires_grad_() for x in tensors]
    (expected,) = torch.autograd.grad(_dense(*exact, spans) * 65536, exact[2])
    torch.testing.assert_close(dx.double(), expected, rtol=1e-3, atol=6e-8)


def _large(B=2, T=512, H=217, D=64):
    torch.manual_seed(0)
    return [torch.randn(B, T, n) for n in (D, D, H, H)]


def test_loss_never_holds_the_scores():
    B, T, H = 2, 512, 217
    tensors = _large()
    starts = torch.randint(T - 20, (40,))
    spans = torch.stack([torch.randint(B, (40,)), torch.randint(H, (40,)), starts, starts + 5], 1)
    with LargestTensor() as seen:
        reference.efficient_global_pointer_loss(*tensors, spans, None, True, 0.125, True)
    assert seen.elements <= B * T * max(T, H)  # the scores are B * T * T * H


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("threshold", [0.0, -1.0, 3.0])
def test_spans_are_those_of_the_scores(threshold, dtype, monkeypatch):
    """To the bit, in any chunking."""
    torch.manual_seed(0)
    tensors = [torch.randn(3, 17, n).to(dtype) for n in (8, 8, 5, 5)]
    for lengths, tril in ((None, True), (torch.tensor([17, 0, 9]), True), (torch.tensor([1, 17, 9]), False)):
        options = {"lengths": lengths, "tril": tril}
        scores = ops.efficient_global_pointer_scores(*tensors, **options)
        rows, values = dense_spans(scores, threshold)
        for at_once in (1 << 20, 50, 1):
            monkeypatch.setattr(reference, "ELEMENTS_AT_ONCE", at_once)
            got, got_values = ops.efficient_global_pointer_spans(*tensors, threshold=threshold, **options)
            assert torch.equal(got, rows) and torch.equal(got_values, values)


def test_spans_at_the_threshold_are_not_above_it():
    q, bias = torch.ones(1, 2, 1), torch.zeros(1, 2, 1)
    assert len(ops.efficient_global_pointer_spans(q, q, bias, bias, threshold=1.0)[0]) == 0
    assert len(ops.efficient_global_pointer_spans(q, q, bias, bias, threshold=0.999)[0]) == 3


def test_one_head_of_nan_hides_no_other():
    tensors = [torch.ones(1, 3, n) for n in (2, 2, 2, 2)]
    tensors[2][..., 0] = math.nan
    rows, _ = ops.efficient_global_pointer_spans(*tensors)
    assert (rows[:, 1] == 1).all() and len(rows) == 6


def test_scores_of_spans_are_detached():
    tensors, _, _ = _make(REGIMES["no positives"])
    _, scores = ops.efficient_global_pointer_spans(*tensors, threshold=-100.0)
    assert len(scores) and not scores.requires_grad


def test_decoding_with_every_cell_a_candidate_stays_small():
    """Different heads carry the start and the end, so the bound admits every cell and no head passes."""
    tensors = _large()
    tensors[2][..., 0] += 40
    tensors[3][..., 0] -= 80
    tensors[3][..., 1] += 40
    tensors[2][..., 1] -= 80
    for bias in tensors[2:]:
        bias[..., 2:] -= 40
    with LargestTensor() as seen:
        rows, _ = reference.efficient_global_pointer_spans(*tensors, None, True, 0.125, 0.0)
    assert len(rows) == 0
    assert seen.elements <= 3 * reference.ELEMENTS_AT_ONCE  # of which candidate cells are three numbers each


def _errors():
    q, x, spans = torch.zeros(2, 5, 4), torch.zeros(2, 5, 3), torch.zeros(0, 4, dtype=torch.int64)
    yield (q, q[:, 1:], x, x, spans), {}, ValueError, r"k has shape \[2, 4, 4\], expected \[B, T, D\] with B=2"
    yield (q, q, x[:1], x, spans), {}, ValueError, r"start_bias has shape \[1, 5, 3\]"
    yield (q, q, x, q, spans), {}, ValueError, r"end_bias has shape \[2, 5, 4\], .* H=3"
    yield (q, q, x, x.double(), spans), {}, TypeError, "end_bias has dtype torch.float64"
    yield (q, q, x, x, spans.int()), {}, TypeError, "spans has dtype torch.int32, expected torch.int64"
    yield (q, q, x, x, spans[:, 1:]), {}, ValueError, r"spans has shape \[0, 3\], expected \[N, 4\]"
    for row, limit in (
        ([2, 0, 0, 0], "batch < 2"),
        ([-1, 0, 0, 0], "batch < 2"),
        ([0, 3, 0, 0], "head < 3"),
        ([0, 0, 0, 5], "start and end < 5"),
        ([0, 0, 3, 2], "start <= end, because of tril=True"),
        ([1, 0, 2, 3], "start and end below the sample's length"),
    ):
        rows = torch.tensor([[0, 0, 0, 0], row])
        message = rf"spans\[1\] is \[{', '.join(map(str, row))}\], expected .*{limit}"
        yield (q, q, x, x, rows), {"lengths": torch.tensor([5, 3])}, ValueError, message
    yield (q, q, x, x, spans), {"lengths": torch.tensor([5, 6])}, ValueError, r"lengths\[1\] is 6, expected 0 to T=5"


@pytest.mark.parametrize("arguments, options, error, message", list(_errors()))
def test_errors_say_what_is_wrong(arguments, options, error, message):
    with pytest.raises(error, match=r"supy\.efficient_global_pointer_loss: " + message):
        ops.efficient_global_pointer_loss(*arguments, **options)
