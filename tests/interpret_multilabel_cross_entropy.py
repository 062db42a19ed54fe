"""The multi-label losses in Triton's interpreter, against the float64 reference; run by test_triton_kernels.py.

In float32 and float16, and with few rows: the interpreter takes milliseconds a program.
"""

import math

import pytest
import torch

from _compare import assert_close_to_reference
from supy.kernels import multilabel_cross_entropy as module
from supy.kernels.multilabel_cross_entropy import (
    multilabel_cross_entropy,
    multilabel_cross_entropy_backward,
    sparse_multilabel_cross_entropy,
    sparse_multilabel_cross_entropy_backward,
)
from supy.reference import multilabel_cross_entropy as dense
from supy.reference import sparse_multilabel_cross_entropy as sparse

CASES = {  # (rows, K, kind of targets, multiplier of the scores)
    "one class": ((3,), 1, "soft", 1),
    "leading axes, K no power of two": ((2, 2), 5, "soft", 2),
    "bool targets": ((2,), 40, "bool", 2),
    "two chunks of two blocks": ((2,), 2100, "soft", 2),
    "scores of 1e4": ((2,), 70, "bool", 1e4),
    "tiny targets where -s is large": ((2,), 33, "tiny", 1),
    "no row": ((0,), 4, "soft", 1),
    "no class": ((2,), 0, "soft", 1),
}


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 2048)


def _inputs(case, dtype):
    rows, K, kind, multiplier = CASES[case]
    generator = torch.Generator().manual_seed(0)
    scores = multiplier * torch.randn(*rows, K, generator=generator)
    targets = torch.rand(*rows, K, generator=generator)
    if kind == "bool":
        targets = targets < 0.2
    elif kind == "tiny":
        targets, scores = 10 ** (-38 * targets), scores - 80
    else:
        targets[..., ::3] = 0
        targets[..., 1::5] = 1
    if K > 30:
        scores[..., 3] = -math.inf
    return scores.to(dtype), targets


def _check(name, scores, labels, kernels, references, *options):
    forward, backward = kernels
    *got, outside = forward(scores, labels, *options)
    assert not outside
    grads = [torch.linspace(-1, 2, half.numel()).view(half.shape) for half in got]
    got.append(backward(scores, labels, *got, *grads, *options))
    wide = labels.double() if labels.is_floating_point() else labels
    results = []
    for s, t in ((scores.double(), wide), (scores, labels)):
        halves = references[0](s, t, *options)
        ds = references[1](s, t, *halves, *(g.to(halves[0].dtype) for g in grads), *options)
        results.append((*halves, ds))
    for part, factor, a, b, c in zip(("negative", "positive", "ds"), (2, 2, 3), got, *results, strict=True):
        assert_close_to_reference(f"{name}: {part}", a, b, c, factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_dense(case, dtype):
    scores, targets = _inputs(case, dtype)
    kernels = multilabel_cross_entropy, multilabel_cross_entropy_backward
    references = dense.multilabel_cross_entropy, dense.multilabel_cross_entropy_backward
    _check("multilabel_cross_entropy", scores, targets, kernels, references)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("positives", [0, 3, 70])
@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][1]])
def test_sparse(case, positives, dtype):
    scores, _ = _inputs(case, dtype)
    generator = torch.Generator().manual_seed(1)
    indices = torch.randint(-1, scores.shape[-1], (*scores.shape[:-1], positives), generator=generator)
    kernels = sparse_multilabel_cross_entropy, sparse_multilabel_cross_entropy_backward
    references = sparse.sparse_multilabel_cross_entropy, sparse.sparse_multilabel_cross_entropy_backward
    _check("sparse_multilabel_cross_entropy", scores, indices, kernels, references, -1)


def test_views():
    base = torch.randn(3, 2, 14, generator=torch.Generator().manual_seed(0))
    for scores in (base[..., ::2], base[:, :1, :7].expand(3, 2, 7), base.transpose(0, 1)[..., 1:8]):
        targets = (scores > 0.3).float()
        got = multilabel_cross_entropy(scores, targets)[:2]
        expected = multilabel_cross_entropy(scores.clone(memory_format=torch.contiguous_format), targets.clone())
        for a, b in zip(got, expected[:2], strict=True):
            assert torch.equal(a, b)


def test_what_is_outside_is_found():
    scores = torch.zeros(2, 9)
    for value in (-0.1, 1.5):
        targets = torch.zeros(2, 9)
        targets[1, 8] = value
        assert multilabel_cross_entropy(scores, targets)[2]
    assert multilabel_cross_entropy(scores, torch.full((2, 9), 2, dtype=torch.uint8))[2]
    for value in (-2, 9):
        assert sparse_multilabel_cross_entropy(scores, torch.tensor([[0], [value]]), -1)[2]
    assert not sparse_multilabel_cross_entropy(scores, torch.tensor([[0], [9]]), 9)[2]


def test_nan_and_infinite_scores_are_those_of_the_reference():
    scores = torch.tensor([[math.inf, 1.0], [1.0, math.nan], [-math.inf, -math.inf], [math.inf, -math.inf]])
    for targets in (torch.tensor([[0.0, 1.0]] * 4), torch.tensor([[1.0, 0.5]] * 4)):
        got = multilabel_cross_entropy(scores, targets)[:2]
        for a, b in zip(got, dense.multilabel_cross_entropy(scores, targets), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)
