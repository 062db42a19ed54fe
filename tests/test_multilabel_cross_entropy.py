"""supy.ops.multilabel_cross_entropy against a loop over classes."""

import math
import os
import subprocess
import sys

import pytest
import torch

import supy
from _compare import assert_close_to_reference
from supy import _extension

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
    "no row": (0, 5, "soft"),
    "above a vector and a block": (3, 1090, "soft"),
    "hard, above a vector and a block": (3, 1090, "hard"),
    "several chunks of a row": (2, 40_003, "soft"),
    "hard, several chunks of a row": (2, 40_003, "hard"),
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
    if scores.shape[1] > 2 and len(scores):
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


# Each is a way to lose a term or to make a NaN: name, scores, targets.
TRAPS = {
    "huge, both signs": ([1e4, -1e4, 1e4, -1e4, 0.0], [1, 1, 0, 0, 0.5]),
    "tiny target, -s large": ([-100.0, 3.0, -2.0], [1e-30, 1, 0]),
    "tiny target beside a full one": ([-88.0, 0.0], [1e-37, 1]),
    "subnormal target": ([-104.0, -80.0], [1e-44, 1]),
    "target next to 1, s large": ([30.0, 3.0], [1 - 2**-24, 1]),
    "exponents grow": ([0.0, 40.0, 80.0, 200.0, 1e3], [0, 0, 0, 0.5, 0]),
    "exponents fall": ([1e3, 200.0, 80.0, 40.0, 0.0], [0, 0.5, 0, 0, 0]),
    "-inf on both sides": ([-math.inf, -math.inf, -math.inf, 1.0], [0, 0.5, 1, 1]),
    "next to nothing": ([-60.0, -70.0], [0, 0]),
}


def _exact(s, t):
    """Both halves by logarithms in float64, one class after the other."""
    halves = [0.0, 0.0]
    for x, y in zip(s.tolist(), t.tolist()):
        for half, weight, exponent in ((0, 1 - y, x), (1, y, -x)):
            if x != -math.inf and weight > 0:
                term = exponent + math.log(weight)
                high, low = max(halves[half], term), min(halves[half], term)
                halves[half] = high + math.log1p(math.exp(low - high))
    return sum(halves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("repeat", [1, 7, 2000], ids=["once", "above a vector", "above a block"])
@pytest.mark.parametrize("trap", TRAPS)
def test_no_term_is_lost_and_nothing_is_nan(trap, repeat, dtype):
    scores, targets = (torch.tensor(x) for x in TRAPS[trap])
    scores = scores.to(dtype).repeat(repeat).requires_grad_()
    targets = targets.repeat(repeat)
    loss = ops.multilabel_cross_entropy(scores, targets)
    (ds,) = torch.autograd.grad(loss, scores)
    expected = _exact(scores.detach().double(), targets.double())
    assert loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-36)
    # The negatives' share of the gradient is at most 1, and so is the positives'.
    assert ds.isfinite().all() and ds.double().abs().sum() <= 2.01


def test_a_huge_exponent_in_a_later_chunk():
    """The parts of a long row have units of their own."""
    scores, targets = torch.zeros(50_000), torch.zeros(50_000)
    scores[[20_000, 40_000]] = torch.tensor([300.0, -500.0])
    targets[40_000] = 1
    scores.requires_grad_()
    loss = ops.multilabel_cross_entropy(scores, targets)
    (ds,) = torch.autograd.grad(loss, scores)
    assert loss == 800
    assert ds[20_000] == 1 and ds[40_000] == -1 and (ds != 0).sum() == 2


def test_infinite_and_nan_scores_are_those_of_the_reference():
    inf, nan = math.inf, math.nan
    scores = torch.tensor([[inf, 1.0], [1.0, nan], [inf, inf], [nan, -inf], [inf, nan]]).repeat(1, 20)
    for target in ([0.0, 1.0], [1.0, 0.0], [0.5, 0.25], [1.0, nan]):
        results = []
        for backend in ("reference", None):
            leaf = scores.clone().requires_grad_()
            targets = torch.tensor(target).repeat(20).expand_as(leaf)
            if backend:
                with supy.use_backend(backend):
                    loss = ops.multilabel_cross_entropy(leaf, targets)
                    (ds,) = torch.autograd.grad(loss.sum(), leaf)
            else:
                loss = ops.multilabel_cross_entropy(leaf, targets)
                (ds,) = torch.autograd.grad(loss.sum(), leaf)
            results.append((loss.detach(), ds))
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, equal_nan=True)


def test_a_gradient_that_is_not_finite_reaches_every_class():
    for weight in (math.inf, math.nan):
        scores = torch.randn(20, requires_grad=True)
        loss = ops.multilabel_cross_entropy(scores, torch.arange(20) < 3)
        (ds,) = torch.autograd.grad(loss, scores, torch.tensor(weight))
        assert ds.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_inputs_and_expanded_gradients(dtype):
    base = torch.randn(4, 6, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = (torch.rand(4, 6, 50, generator=torch.Generator().manual_seed(1)) < 0.3).to(dtype)
    views = (
        lambda x: x[..., ::2],
        lambda x: x.transpose(0, 2),
        lambda x: x[:1].expand(4, 6, 50),
        lambda x: x[:, 1:, 3:],
        lambda x: x[..., :1],
        lambda x: x[:0, :, ::2],
    )
    for view in views:
        for scores, targets in ((view(base), view(labels)), (view(base), view(labels).clone())):
            results = []
            for s, t in ((scores, targets), (scores.clone(), targets.clone(memory_format=torch.contiguous_format))):
                s = s.detach().requires_grad_()
                loss = ops.multilabel_cross_entropy(s, t)
                weight = torch.tensor(0.5).expand_as(loss)
                results.append((loss.detach(), *torch.autograd.grad(loss, s, weight)))
            for a, b in zip(*results):
                assert torch.equal(a, b)


SCRIPT = """
import sys, torch, supy
torch.manual_seed(0)
torch.set_num_threads(int(sys.argv[2]))
results = []
for rows, K in ((1, 100_000), (40, 5000), (3000, 7)):
    scores = (8 * torch.randn(rows, K)).requires_grad_()
    for x in (scores, scores.bfloat16()):
        for targets in (torch.rand(rows, K), torch.rand(rows, K) < 0.01):
            loss = supy.ops.multilabel_cross_entropy(x, targets)
            ds, = torch.autograd.grad(loss.sum(), scores, retain_graph=True)
            results += [loss.detach(), ds.to(x.dtype)]
    loss = supy.ops.sparse_multilabel_cross_entropy(scores, torch.randint(-1, K, (rows, 9)))
    results += [loss.detach(), *torch.autograd.grad(loss.sum(), scores)]
    scores = (8 * torch.randn(rows, K // 7, 7)).requires_grad_()
    for form in ("hard", "soft"):
        loss = supy.ops.multitask_cross_entropy(scores, torch.rand(rows, K // 7, 7), form=form)
        results += [loss.detach(), *torch.autograd.grad(loss.sum(), scores)]
torch.save(results, sys.argv[1])
"""


@pytest.mark.skipif(_extension.C is None, reason="needs supy._C")
def test_bits_do_not_depend_on_threads_and_instruction_sets_agree(tmp_path):
    """Of all three losses: these kernels share their way of summing."""
    results = {}
    for isa, threads in (("generic", 1), ("avx2", 2), ("avx512", 1), ("avx512", 2), ("avx512", 3)):
        out = tmp_path / f"{isa}{threads}"
        environment = {**os.environ, "SUPY_ISA": isa}
        subprocess.run([sys.executable, "-c", SCRIPT, out, str(threads)], env=environment, check=True, timeout=300)
        results[isa, threads] = torch.load(out)
    for threads in (2, 3):
        for a, b in zip(results["avx512", threads], results["avx512", 1], strict=True):
            assert torch.equal(a, b)
    for key in (("avx2", 2), ("avx512", 1)):
        for got, generic in zip(results[key], results["generic", 1], strict=True):
            # They differ by the order of sums and by roundings; bfloat16 then by its last digit.
            rtol = max(2e-6, torch.finfo(got.dtype).eps)
            torch.testing.assert_close(got, generic, rtol=rtol, atol=4e-6 * generic.abs().max().item())


def test_soft_labels_have_their_minimum_at_sigmoid_of_2s():
    scores = torch.randn(6, dtype=torch.float64, requires_grad=True)
    ops.multilabel_cross_entropy(scores, torch.sigmoid(2 * scores.detach())).backward()
    assert scores.grad.abs().max() < 1e-15


def test_bool_and_integer_targets_equal_floats():
    scores, targets = _make("hard labels")
    expected = ops.multilabel_cross_entropy(scores, targets)
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(ops.multilabel_cross_entropy(scores, targets.to(dtype)), expected)


@pytest.mark.parametrize(
    "targets, message",
    [
        (torch.zeros(2, 2), r"targets has shape \[2, 2\], expected \[2, 3\] \(from scores\)"),
        (torch.tensor([[0, 0, 0], [0, 2, 0]]), r"targets\[1, 1\] is 2, expected 0 to 1"),
        (torch.full((2, 3), -0.1), r"targets\[0, 0\] is -0.1"),
        (torch.tensor([[0, 0, 0], [0, 0, 2]], dtype=torch.uint8), r"targets\[1, 2\] is 2"),
        (torch.tensor([[0, 0, 1.5], [0, 2, 0]]), r"targets\[0, 2\] is 1.5"),
        (torch.tensor([[0, 0, 1 + 1e-12], [0, 0, 0]], dtype=torch.float64), r"targets\[0, 2\] is 1.000000000001"),
        (torch.zeros(2, 3, requires_grad=True), "targets requires a gradient"),
    ],
)
def test_errors_say_what_is_wrong(targets, message):
    with pytest.raises(ValueError, match=r"supy\.multilabel_cross_entropy: " + message):
        ops.multilabel_cross_entropy(torch.zeros(2, 3), targets)


@pytest.mark.parametrize("rows, K", [(3, 50_000), (300, 1100), (3000, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_the_first_of_several_bad_targets_is_named(rows, K, dtype):
    targets = torch.zeros(rows, K, dtype=dtype)
    targets[rows - 1, 0] = targets[rows - 1, K - 1] = targets[rows // 2, K - 1] = 3
    with pytest.raises(ValueError, match=rf"targets\[{rows // 2}, {K - 1}\] is 3"):
        ops.multilabel_cross_entropy(torch.zeros(rows, K), targets)


def test_a_scalar_is_refused():
    with pytest.raises(ValueError, match=r"scores has shape \[\], expected \[\.\.\., K\]"):
        ops.multilabel_cross_entropy(torch.tensor(1.0), torch.tensor(1.0))
