"""multitask_cross_entropy in Triton's interpreter, against the float64 reference; run by test_triton_kernels.py."""

import math

import pytest
import torch

from _compare import assert_close_to_reference
from supy.kernels.multitask_cross_entropy import multitask_cross_entropy, multitask_cross_entropy_backward
from supy.reference import multitask_cross_entropy as reference

CASES = {  # (shape, kind of targets, multiplier of the scores)
    "one class": ((2, 3, 1), "soft", 1),
    "two classes": ((5, 2), "hard", 2),
    "two chunks of tasks": ((1030, 3), "soft", 2),
    "m no power of two": ((2, 2, 7, 19), "hard", 3),
    "scores of 1e4": ((2, 9, 5), "hard", 1e4),
    "tiny targets": ((2, 9, 5), "tiny", 30),
    "no task": ((2, 0, 3), "soft", 1),
    "no sample": ((0, 4, 3), "soft", 1),
}


def _inputs(case, dtype):
    shape, kind, multiplier = CASES[case]
    generator = torch.Generator().manual_seed(0)
    scores = multiplier * torch.randn(shape, generator=generator)
    targets = torch.rand(shape, generator=generator)
    if kind == "hard":
        targets = torch.zeros(shape, dtype=torch.bool).scatter(-1, targets.argmax(-1, keepdim=True), True)
    elif kind == "tiny":
        targets = 10 ** (-38 * targets)
    if shape[-1] > 4:
        scores[..., 1, 3] = -math.inf
        scores[..., 2, :] = -math.inf
    return scores.to(dtype), targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, hard, dtype):
    scores, targets = _inputs(case, dtype)
    losses, outside = multitask_cross_entropy(scores, targets, hard)
    assert not outside
    grad = torch.linspace(-1, 2, losses.numel()).view(losses.shape)
    got = losses, multitask_cross_entropy_backward(scores, targets, losses, grad, hard)
    results = []
    for s, t in ((scores.double(), targets.double()), (scores, targets)):
        c = reference.multitask_cross_entropy(s, t, hard)
        results.append((c, reference.multitask_cross_entropy_backward(s, t, c, grad.to(c.dtype), hard)))
    for part, factor, a, b, c in zip(("losses", "ds"), (2, 3), got, *results, strict=True):
        # With tiny targets exponents near 60 matter: e^x is off by 60 eps, luck aside.
        ulps = 60 if case == "tiny targets" else 4
        assert_close_to_reference(f"multitask_cross_entropy: {part}", a, b, c, factor, ulps=ulps)


def test_views():
    base = torch.randn(3, 4, 10, generator=torch.Generator().manual_seed(0))
    for scores in (base[..., ::2], base.transpose(1, 2), base[:1].expand(3, 4, 10)):
        targets = (scores > 0.3).float()
        got, _ = multitask_cross_entropy(scores, targets, True)
        copies = [x.clone(memory_format=torch.contiguous_format) for x in (scores, targets)]
        assert torch.equal(got, multitask_cross_entropy(*copies, True)[0])


def test_what_is_outside_is_found():
    for value in (-0.1, 1.5):
        targets = torch.zeros(2, 3, 4)
        targets[1, 2, 3] = value
        assert multitask_cross_entropy(torch.zeros(2, 3, 4), targets, True)[1]
