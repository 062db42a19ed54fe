"""GlobalPointer in Triton's interpreter, against the dense definition in float64; run by test_triton_kernels.py.

Tiles of 16 by 16, so that few tokens make several.
"""

import math

import pytest
import torch

from _compare import assert_close_to_reference
from _spans import REGIMES, WRONG, LargestTensor, Regime, dense_loss, dense_spans, mask, rows_of
from supy.kernels import _spans
from supy.kernels import global_pointer as kernels

BLOCK = 16
# Regimes of the tests of the reference, and what only tiles have.
CASES = REGIMES | {
    "a tile and a token, positives in every tile": Regime(
        (1, 17, 2, 3), [[0, 0, 0, 15], [0, 0, 0, 16], [0, 1, 16, 16], [0, 1, 3, 5], [0, 1, 0, 16]]
    ),
    "three tiles, both triangles, lengths at and beside an edge": Regime(
        (3, 40, 1, 5), [[0, 0, 33, 2], [1, 0, 15, 0], [2, 0, 16, 16], [2, 0, 2, 16]], [40, 16, 17], tril=False
    ),
    "more features than a product takes": Regime((1, 3, 2, 150), [[0, 1, 0, 2]]),
    "no features": Regime((1, 3, 2, 0), [[0, 1, 0, 2]]),
    "no tokens": Regime((2, 0, 2, 3), []),
}
every_case = pytest.mark.parametrize("case", CASES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


def _make(case, dtype):
    """q, k strided in every axis, with NaN in padding; the rows of spans; lengths, tril and scale."""
    B, T, H, D = CASES[case].sizes
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(B, T, H, D, generator=generator) for _ in "qk")
    q *= CASES[case].spread
    for row, score in CASES[case].peaks:
        b, h, i, j = CASES[case].spans[row]
        q[b, i, h] = k[b, j, h] * score * math.sqrt(D) / (k[b, j, h] ** 2).sum()
    lengths = CASES[case].lengths
    if lengths is not None:
        lengths = torch.tensor(lengths)
        for x in (q, k):
            x.masked_fill_((torch.arange(T) >= lengths[:, None])[..., None, None], math.nan)
    storage = torch.full((T, B, D, H, 4), math.nan, dtype=dtype)
    for x, n in ((q, 1), (k, 2)):
        storage[..., n] = x.permute(1, 0, 3, 2)
    q, k = (storage[..., n].permute(1, 0, 3, 2) for n in (1, 2))
    return q, k, rows_of(CASES[case]), (lengths, CASES[case].tril, max(D, 1) ** -0.5)


def _scores(q, k, lengths, tril, scale):
    return mask(torch.einsum("bihd,bjhd->bhij", q.nan_to_num(), k.nan_to_num()) * scale, lengths, tril)


@every_dtype
@every_case
def test_scores(case, dtype):
    q, k, _, options = _make(case, dtype)
    plain = _scores(q.float(), k.float(), *options).to(dtype)
    got = kernels.global_pointer_scores(q, k, *options, block=BLOCK)
    assert_close_to_reference("scores", got, _scores(q.double(), k.double(), *options), plain, 2)


@every_dtype
@every_case
def test_loss(case, dtype, monkeypatch):
    q, k, spans, options = _make(case, dtype)

    def dense(dtype):
        tensors = [x.to(dtype).requires_grad_() for x in (q, k)]
        scores = _scores(*tensors, *options)
        loss = dense_loss(scores, spans) if scores.numel() else scores.sum()
        largest = scores.detach()[scores.isfinite()].abs().amax().item() if scores.isfinite().any() else 0.0
        return largest, [loss.detach(), *torch.autograd.grad(loss, tensors)]

    (largest, exact), (_, plain) = dense(torch.float64), dense(torch.float32)
    got = kernels.global_pointer_loss(q, k, spans, *options, True, block=BLOCK)
    monkeypatch.setattr(_spans, "SORT_AT_ONCE", 0)  # as many labels are sorted
    again = kernels.global_pointer_loss(q, k, spans.flip(0), *options, True, block=BLOCK)
    alone = kernels.global_pointer_loss(q, k, spans, *options, False, block=BLOCK)
    assert torch.equal(alone[0], got[0]) and not alone[1].numel()
    for i, name in enumerate(("loss", "dq", "dk")):
        assert torch.equal(got[i], again[i]), f"{name} depends on the order of the spans"
        # Any order of summing q . k is as good as another: it rounds at the size of the largest score.
        assert_close_to_reference(name, got[i], exact[i], plain[i], 2 if i == 0 else 3, ulps=4 + 4 * largest)


@every_dtype
@every_case
def test_spans(case, dtype):
    q, k, _, options = _make(case, dtype)
    scores = kernels.global_pointer_scores(q, k, *options, block=BLOCK)
    for threshold in (0.0, -math.inf, 0.5):
        rows, values = dense_spans(scores, threshold)
        got, got_values = kernels.global_pointer_spans(q, k, *options, threshold, block=BLOCK)
        assert torch.equal(got, rows) and torch.equal(got_values, values), f"{threshold=}"


def test_a_score_at_the_threshold_is_not_above_it():
    q = torch.ones(1, 2, 1, 1, dtype=torch.float16)
    for threshold, count in ((1.0, 0), (0.999, 3)):
        assert len(kernels.global_pointer_spans(q, q, None, True, 1.0, threshold)[0]) == count
    # 1.0003 rounds to 1 in float16, and the rounded score is compared.
    assert len(kernels.global_pointer_spans(q, q, None, True, 1.0003, 1.0001)[0]) == 0


def test_nan_gives_nan():
    q = torch.zeros(1, 20, 1, 4)
    q[0, 3] = math.nan
    loss, dq, dk = kernels.global_pointer_loss(q, q, torch.zeros(0, 4).long(), None, True, 0.5, True, block=BLOCK)
    assert loss.isnan() and dq.isnan().any() and dk.isnan().any()
    assert kernels.global_pointer_scores(q, q, None, True, 0.5, block=BLOCK)[0, 0, 3, 4].isnan()


@pytest.mark.parametrize("case", WRONG)
def test_wrong_data_is_refused(case):
    row, lengths, message = WRONG[case]
    q = torch.zeros(2, 20, 3, 4)
    tensors = [q, q]
    spans = torch.tensor([[0, 0, 0, 1], row])
    options = None if lengths is None else torch.tensor(lengths), True, 0.5
    with pytest.raises(ValueError, match=message):
        kernels.global_pointer_loss(*tensors, spans, *options, True, block=BLOCK)


def test_only_the_scores_hold_every_score():
    B, T, H, D = 1, 96, 6, 4
    q, k = (torch.randn(B, T, H, D) for _ in "qk")
    with LargestTensor() as seen:
        kernels.global_pointer_loss(q, k, torch.tensor([[0, 5, 2, 95]]), None, True, 0.5, True, block=32)
        kernels.global_pointer_spans(q, k, None, True, 0.5, 5.0, block=32)
    # The interpreter copies tensors byte by byte.
    assert seen.elements <= 4 * B * T * H * D < B * H * T * T / 5
