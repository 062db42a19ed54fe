"""The Triton kernels of both GlobalPointers on a device, against the float64 reference."""

import pytest
import torch

import supy
from _compare import assert_close_to_reference
from _spans import REGIMES, WRONG, Regime, rows_of
from supy._library import OPERATORS

pytestmark = pytest.mark.gpu

DEVICE, BACKEND = "cuda", "triton"
# Regimes of the tests of the reference, and what only tiles of 64 by 64 have.
CASES = REGIMES | {
    "tiles and one token, lengths at and beside an edge": Regime(
        (4, 193, 5, 64), [[0, 0, 0, 192], [0, 4, 64, 64], [1, 2, 3, 63], [2, 1, 64, 64], [3, 0, 0, 0]], [193, 64, 65, 1]
    ),
    "tiles, both triangles, odd sizes": Regime(
        (2, 130, 67, 33), [[0, 66, 129, 0], [1, 0, 64, 63], [1, 3, 5, 5]], [130, 100], tril=False
    ),
    "more features than a product takes": Regime((1, 70, 2, 150), [[0, 1, 0, 69]]),
    "every cell of several tiles positive": Regime((1, 70, 1, 16), "all"),
    "no tokens": Regime((2, 0, 2, 3), []),
}
every_form = pytest.mark.parametrize("form", ["global_pointer", "efficient_global_pointer"])
every_case = pytest.mark.parametrize("case", CASES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def _make(form, regime, dtype):
    """The tensors, every other element of wider ones, with NaN in padding; the rows of spans; the keywords."""
    B, T, H, D = regime.sizes
    torch.manual_seed(0)
    shapes = ((B, T, H, D),) * 2 if form == "global_pointer" else ((B, T, D), (B, T, D), (B, T, H), (B, T, H))
    tensors = [torch.randn(*shape, 2).to(DEVICE, dtype)[..., 1] for shape in shapes]
    tensors[-1] *= regime.spread
    options = {"tril": regime.tril}
    if regime.lengths is not None:
        options["lengths"] = torch.tensor(regime.lengths, device=DEVICE)
        padded = torch.arange(T, device=DEVICE) >= options["lengths"][:, None]
        for x in tensors:
            x[padded] = torch.nan
    return tensors, rows_of(regime).to(DEVICE), options


def _loss(backend, form, tensors, spans, options):
    tensors = [x.detach().requires_grad_() for x in tensors]
    with supy.use_backend(backend):
        loss = getattr(supy.ops, f"{form}_loss")(*tensors, spans, **options)
        return [loss.detach(), *torch.autograd.grad(loss, tensors)]


def _scores(backend, form, tensors, options):
    with supy.use_backend(backend):
        return getattr(supy.ops, f"{form}_scores")(*tensors, **options)


def _reference(form, tensors, options):
    """Scores in float64 and in the dtype of the tensors."""
    return [_scores("reference", form, x, options) for x in ([x.double() for x in tensors], tensors)]


def _largest(scores):
    finite = scores[scores.isfinite()].abs()
    return finite.max().item() if len(finite) else 0.0


@every_dtype
@every_case
@every_form
def test_scores(form, case, dtype):
    tensors, _, options = _make(form, CASES[case], dtype)
    exact, plain = _reference(form, tensors, options)
    got = _scores(BACKEND, form, tensors, options)
    assert_close_to_reference(f"{form}_scores", got, exact, plain, 2)
    assert torch.equal(got, _scores(BACKEND, form, tensors, options))


@every_dtype
@every_case
@every_form
def test_loss(form, case, dtype):
    tensors, spans, options = _make(form, CASES[case], dtype)
    exact = _loss("reference", form, [x.double() for x in tensors], spans, options)
    plain = _loss("reference", form, tensors, spans, options)
    got = _loss(BACKEND, form, tensors, spans, options)
    again = _loss(BACKEND, form, tensors, spans.flip(0), options)
    # Any order of summing q . k is as good as another: it rounds at the size of the largest score.
    ulps = 4 + 4 * _largest(_reference(form, tensors, options)[0])
    for i, name in enumerate(("loss", "q", "k", "start_bias", "end_bias")[: len(got)]):
        assert_close_to_reference(f"{form}_loss: {name}", got[i], exact[i], plain[i], 2 if i == 0 else 3, ulps=ulps)
        assert torch.equal(got[i], again[i]), f"{name} differs from run to run, or depends on the order of the spans"


@every_dtype
@every_case
@every_form
def test_spans(form, case, dtype):
    """All cells clearly above the threshold, none clearly below it, in order, with their scores."""
    tensors, _, options = _make(form, CASES[case], dtype)
    T = tensors[0].shape[1]
    exact, plain = _reference(form, tensors, options)
    margin = 4 * torch.finfo(dtype).eps * _largest(exact)
    for threshold in (0.0, 1.5):
        with supy.use_backend(BACKEND):
            find = getattr(supy.ops, f"{form}_spans")
            rows, scores = find(*tensors, threshold=threshold, **options)
            again = find(*tensors, threshold=threshold, **options)
        assert torch.equal(rows, again[0]) and torch.equal(scores, again[1])
        assert (scores.float() > threshold).all() and scores.dtype == dtype
        batch, head, start, end = rows.unbind(1)
        key = ((batch * exact.shape[1] + head) * T + start) * T + end
        assert (key.diff() > 0).all(), "not in order, or twice the same"
        found = torch.zeros_like(exact, dtype=torch.bool)
        found[batch, head, start, end] = True
        assert found[exact > threshold + margin].all() and not found[exact < threshold - margin].any()
        at = batch, head, start, end
        assert_close_to_reference(f"{form}_spans: scores", scores, exact[at], plain[at], 2)


def test_heads_whose_scaled_sum_underflows():
    """One head's best start and best end meet on no visible cell: the direct computation takes over."""
    torch.manual_seed(0)
    tensors = [torch.randn(2, 100, n, device=DEVICE) for n in (4, 4, 3, 3)]
    x, y = tensors[2:]
    x[0, 97, 1] += 100
    y[0, 0, 1] += 100
    x[0, :97, 1] -= 100
    y[0, 1:, 1] -= 100
    spans = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0], [0, 2, 1, 3], [1, 1, 2, 2]], device=DEVICE)
    got = _loss(BACKEND, "efficient_global_pointer", tensors, spans, {})
    exact = _loss("reference", "efficient_global_pointer", [x.double() for x in tensors], spans, {})
    for a, b in zip(got, exact):
        # The bias of a hundred rounds at 100 eps, and so does its exponential.
        torch.testing.assert_close(a.double(), b, rtol=5e-5, atol=5e-5)


def test_tokens_ruled_out():
    torch.manual_seed(0)
    tensors = [torch.randn(2, 100, n, device=DEVICE) for n in (4, 4, 3, 3)]
    tensors[2][0] = tensors[3][0] = -torch.inf
    tensors[2][1, 7:50] = tensors[3][1, 7:50] = -torch.inf
    tensors[3][1, :, 1] = -torch.inf
    tensors[2][1, :, 1] += 200
    spans = torch.tensor([[0, 1, 0, 0], [1, 2, 1, 3], [1, 0, 8, 9]], device=DEVICE)
    got = _loss(BACKEND, "efficient_global_pointer", tensors, spans, {})
    exact = _loss("reference", "efficient_global_pointer", [x.double() for x in tensors], spans, {})
    for a, b in zip(got, exact):
        torch.testing.assert_close(a.double(), b, rtol=5e-5, atol=1e-6)


@every_form
def test_nan_gives_nan(form):
    tensors, spans, options = _make(form, REGIMES["no positives"], torch.float32)
    tensors[0][0, 3] = torch.nan
    assert all(x.isnan().any() for x in _loss(BACKEND, form, tensors, spans, options))


@every_form
@pytest.mark.parametrize("case", WRONG)
def test_wrong_data_is_refused_and_the_device_goes_on(form, case):
    row, lengths, message = WRONG[case]
    tensors, _, _ = _make(form, Regime((2, 20, 3, 4), []), torch.float32)
    spans = torch.tensor([[0, 0, 0, 1]] * 200 + [row], device=DEVICE)
    options = {} if lengths is None else {"lengths": torch.tensor(lengths, device=DEVICE)}
    with pytest.raises(ValueError, match=message):
        _loss(BACKEND, form, tensors, spans, options)
    assert _loss(BACKEND, form, tensors, spans[:-1], {})[0].isfinite()


@every_form
def test_memory_is_not_that_of_the_scores(form):
    B, T, H, D = 2, 1024, 64, 32
    tensors, spans, _ = _make(form, Regime((B, T, H, D), [[0, 0, 1, 4], [1, 63, 900, 1023]]), torch.float32)
    operator = OPERATORS[f"{form}_loss"]
    assert any(kernel.missing() is None for kernel in operator.kernels)
    for run in (
        lambda: _loss(BACKEND, form, tensors, spans, {}),
        # A threshold that few cells pass, as those of a trained model.
        lambda: getattr(supy.ops, f"{form}_spans")(*tensors, threshold=30.0),
    ):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        # Its inputs and gradients are up to 17 MB each, the scores 537 MB.
        assert torch.cuda.max_memory_allocated() - before < B * H * T * T * 4 / 4
