"""What only shows in the C++ kernels of both GlobalPointers: several tiles, instruction sets, threads and memory."""

import math
import os
import subprocess
import sys

import pytest
import torch

import supy
from _compare import assert_close_to_reference
from _spans import dense_loss, dense_scores, dense_spans, with_gradients
from supy import _extension

pytestmark = pytest.mark.skipif(_extension.C is None, reason=f"no C++ kernels: {_extension.missing}")
ops = supy.ops
FORMS = ("full", "efficient")
every_form = pytest.mark.parametrize("form", FORMS)

# B, T, H, D, lengths, tril: a tile has 64 rows and columns, a vector 4, 8 or 16 numbers.
SIZES = {
    "one token more than a tile": (2, 65, 3, 8, None, True),
    "two tiles and a row, and vectors that are not full": (2, 129, 17, 20, [129, 70], True),
    "three tiles, both triangles": (1, 150, 5, 33, [147], False),
    "several groups of heads": (1, 130, 70, 16, None, True),
    "lengths at, below and above a tile": (5, 80, 4, 8, [64, 63, 66, 0, 1], True),
}


def _make(form, sizes, dtype=torch.float64, spread=1.0):
    B, T, H, D, lengths, tril = sizes
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, T, H, D)] * 2 if form == "full" else [(B, T, D)] * 2 + [(B, T, H)] * 2
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) * spread for s in shapes]
    n = torch.tensor(lengths or [T] * B)
    draws = torch.rand(12 * B, 4, generator=generator)
    batch = (draws[:, 0] * B).long()
    cells = (draws[:, 2:] * n[batch, None]).long()
    if tril:
        cells = cells.sort(1).values
    spans = torch.cat([batch[:, None], (draws[:, 1:2] * H).long(), cells], 1)[n[batch] > 0]
    options = {"tril": tril} | ({"lengths": n} if lengths else {})
    return [x.to(dtype).requires_grad_() for x in tensors], spans, options


def _visible_scores(tensors, lengths=None, tril=True):
    s, T = dense_scores(*tensors), tensors[0].shape[1]
    token = torch.arange(T)
    seen = (token[:, None] <= token) | torch.tensor(not tril)
    if lengths is not None:
        inside = token < lengths[:, None]
        seen = (seen & inside[:, :, None] & inside[:, None, :])[:, None]
    return s.masked_fill(~seen, -math.inf)


def _function(form, what):
    return getattr(ops, f"{'' if form == 'full' else 'efficient_'}global_pointer_{what}")


def _dense_with_gradients(tensors, spans, options):
    return with_gradients(lambda *x: dense_loss(_visible_scores(x, **options), spans), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spread", [1.0, 6.0], ids=["ordinary scores", "scores of a hundred"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@every_form
def test_loss_over_several_tiles(form, sizes, spread, dtype):
    tensors, spans, options = _make(form, sizes, dtype, spread)
    got = with_gradients(lambda *x: _function(form, "loss")(*x, spans, **options), tensors)
    wide = [[x.detach().to(to).requires_grad_() for x in tensors] for to in (torch.float64, torch.float32)]
    exact, plain = (_dense_with_gradients(x, spans, options) for x in wide)
    scores = _visible_scores(wide[0], **options).detach()
    ulps = 4 + 4 * scores[scores.isfinite()].abs().max().item()  # what rounding a score does to its exponential
    for i, name in enumerate(("loss", "dq", "dk", "dstart_bias", "dend_bias")[: len(got)]):
        same = plain[i] if i == 0 else plain[i].to(dtype)
        assert_close_to_reference(f"{form} loss: {name}", got[i], exact[i], same, 2 if i == 0 else 3, ulps=ulps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@every_form
def test_spans_are_those_of_the_scores_to_the_bit(form, sizes, dtype):
    tensors, _, options = _make(form, sizes, dtype)
    tensors = [x.detach() for x in tensors]
    scores = _function(form, "scores")(*tensors, **options)
    exact = _visible_scores([x.double() for x in tensors], **options)
    # A score is a sum of terms as large as the largest scores, and rounds in proportion to them.
    digit = 2 * torch.finfo(dtype).eps * exact[exact.isfinite()].abs().max().item()
    torch.testing.assert_close(scores.double(), exact, rtol=0, atol=digit)
    highest = scores.max().item()
    tie = scores.flatten().sort().values[-20].item()
    for threshold in (-1.0, 0.0, tie, highest, -math.inf, math.inf):
        rows, values = dense_spans(scores, threshold)
        got, got_values = _function(form, "spans")(*tensors, threshold=threshold, **options)
        assert torch.equal(got, rows) and torch.equal(got_values, values), threshold
    assert len(got) == 0


def test_heads_that_underflow_over_several_tiles():
    """The factorised sum of heads 1 and 4 is lost, so they are summed directly, over tiles and beside the others."""
    B, T, H, D, lengths, tril = SIZES["two tiles and a row, and vectors that are not full"]
    tensors, spans, options = _make("efficient", (B, T, H, D, lengths, tril))
    with torch.no_grad():
        for h in (1, 4):
            tensors[2][..., h] = torch.linspace(-100, 100, T)  # the best start is the last token, the best end the first
            tensors[3][..., h] = torch.linspace(100, -100, T)
    tensors = [x.detach().float().requires_grad_() for x in tensors]
    got = with_gradients(lambda *x: ops.efficient_global_pointer_loss(*x, spans, **options), tensors)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    for a, b in zip(got, _dense_with_gradients(wide, spans, options)):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=4e-5)  # a bias of 100 rounds at 8e-6


ISA_SCRIPT = """
import sys, torch, supy
sys.path.insert(0, sys.argv[2])
from _spans import with_gradients
from test_global_pointer_kernels import FORMS, SIZES, _function, _make
out = []
for form in FORMS:
    for sizes in list(SIZES.values())[1:3]:
        tensors, spans, options = _make(form, sizes, torch.float32)
        out += with_gradients(lambda *x: _function(form, "loss")(*x, spans, **options), tensors)
        out.append(_function(form, "scores")(*tensors, **options))
torch.save(out, sys.argv[1])
"""


def test_every_instruction_set(tmp_path):
    results = {}
    for isa in ("generic", "avx2", "avx512"):
        command = [sys.executable, "-c", ISA_SCRIPT, tmp_path / isa, os.path.dirname(__file__)]
        subprocess.run(command, env={**os.environ, "SUPY_ISA": isa}, check=True, timeout=300)
        results[isa] = torch.load(tmp_path / isa)
    for isa in ("avx2", "avx512"):
        for got, generic in zip(results[isa], results["generic"], strict=True):
            # Without fused multiplication and addition each product rounds too.
            torch.testing.assert_close(got, generic, rtol=2e-5, atol=2e-6, msg=lambda m: f"{isa}: {m}")


@pytest.mark.parametrize("B", [1, 4], ids=["threads share a sample", "threads take samples"])
@every_form
def test_same_bits_for_any_number_of_threads(form, B):
    for tril in (True, False):
        tensors, spans, options = _make(form, (B, 300, 21, 16, None, tril), torch.float32)
        before = torch.get_num_threads()
        try:
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                result = with_gradients(lambda *x: _function(form, "loss")(*x, spans, **options), tensors)
                plain = [x.detach() for x in tensors]
                results.append([*result, *_function(form, "spans")(*plain, threshold=3.0, **options)])
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("form", FORMS)
def test_nan_and_minus_infinity_far_from_the_first_tile(form):
    tensors, spans, options = _make(form, (1, 140, 3, 8, None, True), torch.float32)
    with torch.no_grad():
        tensors[1][0, 139] = math.nan
    value = _function(form, "loss")(*tensors, spans, **options)
    assert value.isnan()
    value = _function(form, "loss")(*tensors, spans[spans[:, 3] < 139], tril=True, lengths=torch.tensor([139]))
    assert value.isfinite()


@every_form
def test_gradients_handed_out_are_not_the_saved_ones(form):
    """A gradient of 1 hands the saved gradients on without a copy: whoever gets them may write to them all the same."""
    tensors, spans, options = _make(form, (2, 9, 3, 4, None, True), torch.float32)
    loss = _function(form, "loss")(*tensors, spans, **options)
    expected = [x.clone() for x in torch.autograd.grad(loss * 1.0, tensors, retain_graph=True)]
    for _ in range(3):
        loss.backward(retain_graph=True)
    for x, once in zip(tensors, expected):
        torch.testing.assert_close(x.grad, 3 * once)
        x.grad.zero_()
    loss.backward()
    for x, once in zip(tensors, expected):
        assert torch.equal(x.grad, once)


def test_errors_name_the_row_as_the_reference_does():
    q, x = torch.zeros(2, 5, 4), torch.zeros(2, 5, 3)
    rows = [[0, 0, 0, 0], [2, 0, 0, 0], [-1, 0, 0, 0], [0, 3, 0, 0], [0, 0, 0, 5], [0, 0, 3, 2], [1, 0, 2, 3]]
    for row in rows[1:]:
        spans, lengths = torch.tensor([rows[0], row]), torch.tensor([5, 3])
        messages = []
        for backend in ("cpp", "reference"):
            with supy.use_backend(backend), pytest.raises(ValueError) as caught:
                ops.efficient_global_pointer_loss(q, q, x, x, spans, lengths=lengths)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
        assert "spans[1]" in messages[0]


MEMORY_SCRIPT = """
import resource, sys, torch, supy
B, T, H, D = 16, 512, 217, 64
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
torch.manual_seed(0)
tensors = [torch.randn(B, T, n).requires_grad_() for n in (D, D, H, H)]
spans = torch.tensor([[b, h, 7 * b, 7 * b + h] for b in range(B) for h in range(20)])
small = [x.detach()[:1, :8].clone().requires_grad_() for x in tensors]
supy.ops.efficient_global_pointer_loss(*small, spans[:1]).backward()  # loads what a first call loads
before = peak()
supy.ops.efficient_global_pointer_loss(*tensors, spans).backward()
print(peak() - before)
with torch.no_grad():
    low = [*tensors[:2], *(x - 8 for x in tensors[2:])]
    before = peak()
    supy.ops.efficient_global_pointer_spans(*low)
    print(peak() - before)
T, H = 8192, 65
tensors = [torch.randn(1, T, n).requires_grad_() for n in (D, D, H, H)]
before = peak()
supy.ops.efficient_global_pointer_loss(*tensors, torch.tensor([[0, 5, 100, 8000]])).backward()
print(peak() - before)
H = 40
q, k = (torch.randn(4, 512, H, D).requires_grad_() for _ in "qk")
before = peak()
supy.ops.global_pointer_loss(q, k, torch.tensor([[0, 5, 100, 500]])).backward()
print(peak() - before - 2 * q.numel() * 4 / 2**20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss in kB")
def test_memory_of_loss_and_spans():
    """Of whole calls in a process of their own, forward and backward, gradients included; the dense scores of the first
    would take 3,472 MB, those of the third 16,640 MB."""
    result = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT], check=True, capture_output=True, text=True, timeout=300
    )
    loss, spans, long, full = map(float, result.stdout.split())
    assert loss < 64, loss
    assert spans < 16, spans
    assert long < 64, long
    assert full < 16, full  # beside dq and dk
