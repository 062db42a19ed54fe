"""Efficient GlobalPointer in Triton's interpreter, against the dense definition in float64; run by
test_triton_kernels.py.

Tiles of 16 by 16, so that few tokens make several.
"""

import math

import pytest
import torch

from _compare import assert_close_to_reference
from _spans import REGIMES, WRONG, LargestTensor, Regime, dense_loss, dense_spans, mask, rows_of
from supy.kernels import _spans
from supy.kernels import efficient_global_pointer as kernels
from supy.kernels.efficient_global_pointer_spans import efficient_global_pointer_spans

BLOCK = 16
NAMES = ("q", "k", "start_bias", "end_bias")
# Regimes of the tests of the reference, and what only tiles have.
CASES = REGIMES | {
    "a tile and a token, positives in every tile": Regime(
        (1, 17, 2, 3), [[0, 0, 0, 15], [0, 0, 0, 16], [0, 1, 16, 16], [0, 1, 3, 5], [0, 1, 0, 16]]
    ),
    "three tiles, both triangles, lengths at and beside an edge": Regime(
        (3, 33, 1, 5), [[0, 0, 32, 2], [1, 0, 15, 0], [2, 0, 16, 16], [2, 0, 2, 16]], [33, 16, 17], tril=False
    ),
    "more heads and features than a product takes": Regime((1, 3, 70, 150), [[0, 1, 0, 2], [0, 69, 0, 2]]),
    "no features": Regime((1, 3, 2, 0), [[0, 1, 0, 2]]),
    "no tokens": Regime((2, 0, 2, 3), []),
}
every_case = pytest.mark.parametrize("case", CASES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


def _make(case, dtype):
    """q, k and the biases, strided in every axis, with NaN in padding; the rows of spans; lengths, tril and scale."""
    regime = CASES[case]
    B, T, H, D = regime.sizes
    scale = max(D, 1) ** -0.5
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(B, T, n, generator=generator) for n in (D, D, H, H)]
    tensors[2] *= regime.spread
    tensors[3] *= regime.spread
    for row, score in regime.peaks:
        b, h, i, j = regime.spans[row]
        now = _scores(*tensors, None, False, scale)[b, h, i, j]
        tensors[2][b, i, h] += (score - now) / 2
        tensors[3][b, j, h] += (score - now) / 2
    lengths = regime.lengths
    if lengths is not None:
        lengths = torch.tensor(lengths)
        for x in tensors:
            x.masked_fill_((torch.arange(T) >= lengths[:, None])[..., None], math.nan)
    return [_strided(x.to(dtype)) for x in tensors], rows_of(regime), (lengths, regime.tril, scale)


def _strided(x):
    """The same values, in storage whose every other element is NaN and whose axes are reversed."""
    storage = torch.full((*x.shape[::-1], 2), math.nan, dtype=x.dtype)
    storage[..., 1] = x.permute(2, 1, 0)
    return storage[..., 1].permute(2, 1, 0)


def _scores(q, k, x, y, lengths, tril, scale):
    a = torch.einsum("bid,bjd->bij", q.nan_to_num(), k.nan_to_num()) * scale
    x, y = (torch.where(z.isnan(), 0, z).mT for z in (x, y))
    return mask(a[:, None] + x[:, :, :, None] + y[:, :, None, :], lengths, tril)


def _dense(dtype, tensors, spans, options):
    """The largest score, and the loss with its gradients."""
    tensors = [x.detach().to(dtype).requires_grad_() for x in tensors]
    scores = _scores(*tensors, *options)
    loss = dense_loss(scores, spans) if scores.numel() else scores.sum()
    finite = scores.detach()[scores.isfinite()].abs()
    return finite.amax().item() if len(finite) else 0.0, [loss.detach(), *torch.autograd.grad(loss, tensors)]


def _check_loss(tensors, spans, options, got):
    largest, exact = _dense(torch.float64, tensors, spans, options)
    _, plain = _dense(torch.float32, tensors, spans, options)
    # The factorised sum adds a, its shift and the logarithm, each rounded at the size of the largest score.
    for i, name in enumerate(("loss", *NAMES)):
        assert_close_to_reference(name, got[i], exact[i], plain[i], 2 if i == 0 else 3, ulps=4 + 4 * largest)


@every_dtype
@every_case
def test_scores(case, dtype):
    tensors, _, options = _make(case, dtype)
    plain = _scores(*(x.float() for x in tensors), *options).to(dtype)
    got = kernels.efficient_global_pointer_scores(*tensors, *options, block=BLOCK)
    assert_close_to_reference("scores", got, _scores(*(x.double() for x in tensors), *options), plain, 2)


@every_dtype
@every_case
def test_loss(case, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "HEADS", 16)
    tensors, spans, options = _make(case, dtype)
    got = kernels.efficient_global_pointer_loss(*tensors, spans, *options, True, block=BLOCK)
    monkeypatch.setattr(_spans, "SORT_AT_ONCE", 0)  # as many labels are sorted
    again = kernels.efficient_global_pointer_loss(*tensors, spans.flip(0), *options, True, block=BLOCK)
    alone = kernels.efficient_global_pointer_loss(*tensors, spans, *options, False, block=BLOCK)
    assert torch.equal(alone[0], got[0]) and not any(x.numel() for x in alone[1:])
    assert all(map(torch.equal, got, again)), "the result depends on the order of the spans"
    _check_loss(tensors, spans, options, got)


@pytest.mark.parametrize("lengths", [None, [20, 18]])
def test_heads_whose_scaled_sum_underflows(lengths, monkeypatch):
    """One head's best start and best end meet on no visible cell; the others are computed by products all the same."""
    torch.manual_seed(0)
    tensors = [torch.randn(2, 20, n) for n in (4, 4, 3, 3)]
    x, y = tensors[2:]
    x[0, 17, 1] += 100  # (17, 17) and later ends only
    y[0, 0, 1] += 100  # (0, 0) only
    x[0, :17, 1] -= 100
    y[0, 1:, 1] -= 100
    spans = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0], [0, 2, 1, 3], [1, 1, 2, 2]])
    seen = []
    direct = kernels.reference._scores_of
    monkeypatch.setattr(kernels.reference, "_scores_of", lambda *a: seen.append(a[1].shape) or direct(*a))
    options = (None if lengths is None else torch.tensor(lengths), True, 0.5)
    got = kernels.efficient_global_pointer_loss(*tensors, spans, *options, True, block=BLOCK)
    assert seen == [(20, 1), (20, 1)], "the case no longer underflows, or other heads do"
    _check_loss(tensors, spans, options, got)


def test_tokens_ruled_out_take_no_slow_path(monkeypatch):
    """Biases of -inf, for tokens or whole heads, leave sums of exactly 0, and tokens ruled out are no peaks."""
    torch.manual_seed(0)
    tensors = [torch.randn(3, 20, n) for n in (4, 4, 3, 3)]
    q, k, x, y = tensors
    x[0] = y[0] = -math.inf  # a sample without candidates
    x[1, 1:] = y[1, :19] = -math.inf  # one cell left, (0, 19), which is positive for head 2
    x[1, :, 1] = -math.inf  # and no start at all for head 1
    y[2, :, 0] = -math.inf  # no end for a head whose starts are high
    x[2, :, 0] += 200
    x[2, 3] = y[2, 3] = y[2, 9] = -math.inf
    q[2, 3] *= 1e4
    k[2, 9] *= 1e4
    spans = torch.tensor([[0, 1, 0, 0], [1, 2, 0, 19], [1, 0, 3, 5], [2, 0, 3, 3], [2, 1, 2, 9], [2, 2, 2, 8]])
    options = (None, True, 0.5)
    with monkeypatch.context() as patch:
        patch.setattr(kernels.reference, "efficient_global_pointer_loss", lambda *_: pytest.fail("the slow path"))
        got = kernels.efficient_global_pointer_loss(*tensors, spans, *options, True, block=BLOCK)
    wide = [z.double() for z in tensors]
    exact = kernels.reference.efficient_global_pointer_loss(*wide, spans, *options, True)
    for name, a, b in zip(("loss", *NAMES), got, exact):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=1e-6, msg=lambda m: f"{name}: {m}")


@every_dtype
@every_case
def test_spans(case, dtype):
    tensors, _, options = _make(case, dtype)
    scores = kernels.efficient_global_pointer_scores(*tensors, *options, block=BLOCK)
    for threshold in (0.0, 1.5):
        rows, values = dense_spans(scores, threshold)
        got, got_values = efficient_global_pointer_spans(*tensors, *options, threshold, block=BLOCK)
        assert torch.equal(got, rows) and torch.equal(got_values, values), f"{threshold=}"


def test_a_score_at_the_threshold_is_not_above_it():
    q, bias = torch.ones(1, 2, 1, dtype=torch.float16), torch.zeros(1, 2, 2, dtype=torch.float16)
    higher = torch.tensor([0.0, 1.0], dtype=torch.float16).expand(1, 2, 2)
    # 1.0003 rounds to 1 in float16, and the rounded score is compared: of each head, and of the best of them.
    for scale, threshold, count in ((1.0, 1.0, 0), (1.0, 0.999, 3), (1.0003, 1.0001, 0)):
        for start_bias, more in ((bias, count), (higher, 3)):
            arguments = q, q, start_bias, bias, None, True, scale, threshold
            rows, _ = efficient_global_pointer_spans(*arguments, block=BLOCK)
            assert (rows[:, 1] == 0).sum() == count and (rows[:, 1] == 1).sum() == more


def test_nan_gives_nan_and_one_head_of_nan_hides_no_other():
    tensors = [torch.ones(1, 4, n) for n in (2, 2, 2, 2)]
    tensors[2][..., 0] = math.nan
    got = kernels.efficient_global_pointer_loss(*tensors, torch.zeros(0, 4).long(), None, True, 0.5, True, block=BLOCK)
    assert all(x.isnan().any() for x in got)
    rows, _ = efficient_global_pointer_spans(*tensors, None, True, 0.5, 0.0, block=BLOCK)
    assert (rows[:, 1] == 1).all() and len(rows) == 10


@pytest.mark.parametrize("case", WRONG)
def test_wrong_data_is_refused(case):
    row, lengths, message = WRONG[case]
    tensors = [torch.zeros(2, 20, n) for n in (4, 4, 3, 3)]
    spans = torch.tensor([[0, 0, 0, 1], row])
    options = None if lengths is None else torch.tensor(lengths), True, 0.5
    with pytest.raises(ValueError, match=message):
        kernels.efficient_global_pointer_loss(*tensors, spans, *options, True, block=BLOCK)


def test_only_the_scores_hold_every_score():
    """Not even one head's, `[B, T, T]`."""
    B, T, H, D = 1, 96, 3, 4
    tensors = [torch.randn(B, T, n) for n in (D, D, H, H)]
    with LargestTensor() as seen:
        kernels.efficient_global_pointer_loss(
            *tensors, torch.tensor([[0, 2, 2, 95]]), None, True, 0.5, True, block=32
        )
        efficient_global_pointer_spans(*tensors, None, True, 0.5, 6.0, block=32)
    # The interpreter copies tensors byte by byte, among them three `[B, T, H]` and less in one piece.
    assert seen.elements <= 5 * 4 * B * T * H < B * T * T
