"""find_unargmaxable: against full linear programs and hulls, with every certificate checked from the layer alone."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.optimize import linprog
from scipy.spatial import ConvexHull

import supy
from supy.argmax import Certificate, find_unargmaxable, verify, witnesses
from supy.argmax.certificates import Layer, dominates
from supy.argmax.search import _separate
from supy.reference.hull_separation import hull_separation

inf = np.inf
FIVE = np.array([[1.0, 2.0], [2.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])


def largest_margins(weight, bias, classes, lower, upper):
    """Of each class k: max over (x, s) of the least (w_k - w_i) . x + (b_k - b_i) s over the rows unlike its own.

    One program of HiGHS, of a block a class with every row, scaled to |x|, s <= 1.
    """
    d = weight.shape[1]
    limits = []
    for j in range(d):
        for limit, sign in ((lower[j], 1), (upper[j], -1)):  # sign * (limit * s - x_j) <= 0
            if np.isfinite(limit):
                row = np.zeros((1, d + 2))
                row[0, j], row[0, d] = -sign, sign * limit
                limits.append(row)
    rows = np.column_stack([weight, bias, np.ones(len(weight))])
    blocks = []
    for k in classes:
        unlike = (rows != rows[k]).any(1)
        blocks.append(np.concatenate([rows[unlike] - rows[k] * ([1] * (d + 1) + [0]), *limits]))
    matrix = sparse.block_diag(blocks, format="csc")
    solved = linprog(
        np.tile(np.r_[np.zeros(d + 1), -1.0], len(blocks)), matrix, np.zeros(matrix.shape[0]),
        bounds=([(-1, 1)] * d + [(0, 1), (None, 1)]) * len(blocks), method="highs-ds",
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )  # fmt: skip
    assert solved.status == 0
    return solved.x.reshape(len(blocks), d + 2)[:, -1]


def random_layer(rng):
    """A small layer with whatever makes programs degenerate: equal, collinear, averaged and zero rows, varied norms."""
    K, d = rng.integers(5, 61), rng.integers(1, 9)
    weight = rng.normal(size=(K, d))
    if rng.random() < 0.5:
        weight *= rng.lognormal(size=(K, 1))
    bias = rng.normal(size=K) if rng.random() < 0.5 else np.zeros(K)
    kind = rng.integers(6)
    if kind == 1:
        weight[3], bias[3] = weight[0], bias[0]
    elif kind == 2:
        weight[2], bias[2] = 0.5 * (weight[0] + weight[1]), 0.5 * (bias[0] + bias[1])
    elif kind == 3:
        weight[1] = 0
        weight[3] = 2 * weight[2]  # collinear
    elif kind == 4:
        weight[:, -1] = weight[:, 0]  # rank-deficient
    elif kind == 5:
        weight = np.round(weight)  # many ties
    lower, upper = np.full(d, -inf), np.full(d, inf)
    box = rng.integers(4)
    if box == 1:
        lower[:], upper[:] = -1.5, 1.5
    elif box == 2:
        lower[:] = 0
    elif box == 3:
        lower = np.where(rng.random(d) < 0.5, -inf, rng.normal(size=d))
        upper = np.where(rng.random(d) < 0.5, inf, np.where(np.isfinite(lower), lower, 0) + rng.random(d))
    return weight, bias, lower, upper


@pytest.mark.parametrize("seed", range(20))
def test_full_linear_programs_agree(seed):
    rng = np.random.default_rng(seed)
    for _ in range(20):
        weight, bias, lower, upper = random_layer(rng)
        report = find_unargmaxable(weight, bias, lower=lower, upper=upper)
        assert verify(weight, bias, report, lower=lower, upper=upper) == []
        rows = np.column_stack([weight, bias])
        wins = largest_margins(weight, bias, range(len(rows)), lower, upper) > 1e-8
        for k, verdict in enumerate(report.verdicts):
            tied = (rows == rows[k]).all(1).sum() > 1
            assert verdict == (("tied" if tied else "argmaxable") if wins[k] else "unargmaxable"), k


def test_five_classes():
    report = find_unargmaxable(FIVE)
    assert report.verdicts == ["argmaxable"] * 4 + ["unargmaxable"]
    proof = report.certificate(4)
    mixed = sum(value * FIVE[k] for k, value in proof.dominators.items())  # several averages make (1, 1)
    # A few roundings of float64 in a sum of four products.
    assert 4 not in proof.dominators and np.allclose(mixed, [1, 1], rtol=0, atol=2e-15)
    assert proof.residual < 1e-15 and abs(proof.surplus) < 1e-15
    assert find_unargmaxable(FIVE, np.array([0, 0, 0, 0, 0.01])).verdicts == ["argmaxable"] * 5


@pytest.mark.parametrize("seed", range(5))
def test_without_bias_in_two_dimensions_the_dead_are_inside_the_hull(seed):
    weight = np.random.default_rng(seed).normal(size=(200, 2))
    dead = set(range(200)) - set(ConvexHull(weight).vertices.tolist())
    assert set(find_unargmaxable(weight).classes("unargmaxable")) == dead


@given(st.integers(1, 30), st.integers(1, 6), st.integers(0, 2**32), st.sampled_from([1e-6, 1.0, 1e6]))
@settings(max_examples=40, deadline=None)
def test_the_bias_of_half_the_square_leaves_no_class_dead(K, d, seed, spread):
    weight = np.random.default_rng(seed).normal(size=(K, d)) * spread
    report = find_unargmaxable(weight, -0.5 * np.square(weight).sum(1))
    assert set(report.verdicts) == {"argmaxable"}


@pytest.mark.parametrize("more", [0, 66])  # rows of 71 numbers are read as they are, shorter ones in blocks
def test_reference_and_kernel_agree(more):
    if supy._extension.C is None:
        # Without a compiler there is only the reference, and nothing to compare with it.
        pytest.skip("needs supy._C")
    rows = torch.from_numpy(np.random.default_rng(0).normal(size=(60, 5)))
    rows = torch.cat([rows.new_zeros(60, more), rows], 1)
    lower, upper = (torch.full((more + 4,), limit, dtype=rows.dtype) for limit in (-1.0, inf))
    arguments = rows, torch.arange(60), lower, upper, torch.tensor([3, 40])
    kind, directions, support, multipliers = _separate(*arguments)
    expected = hull_separation(*arguments)
    assert torch.equal(kind, expected[0]) and set(kind.tolist()) == {1, 2}
    layer = Layer(rows[:, :-1].numpy(), rows[:, -1].numpy(), lower.numpy(), upper.numpy())
    for _, _, who, values in ((kind, directions, support, multipliers), expected):
        for k in torch.where(kind == 2)[0].tolist():
            used = who[k] >= 0
            assert dominates(layer, k, who[k][used].numpy(), values[k][used].numpy(), 1e-12) is None


@pytest.mark.parametrize("change, message", [
    (dict(rows=torch.zeros(1, 3, dtype=torch.float64)), "rows has shape"),
    (dict(rows=torch.zeros(4, 3)), "rows has dtype float32"),
    (dict(classes=torch.tensor([4])), r"classes\[0\] is 4, expected 0 to 3"),
    (dict(start=torch.tensor([0, -1])), r"start\[1\] is -1"),
    (dict(lower=torch.zeros(3, dtype=torch.float64)), "lower has shape"),
    (dict(support=torch.zeros(1, 3, dtype=torch.int64)), "support has shape"),
    (dict(upper=torch.zeros(4, dtype=torch.float64)[::2]), "upper must be contiguous"),
])  # fmt: skip
def test_the_kernel_refuses_what_it_would_read_wrongly(change, message):
    if supy._extension.C is None:
        # Without a compiler there is no binding, and nothing reads memory.
        pytest.skip("needs supy._C")
    double = dict(dtype=torch.float64)
    arguments = dict(
        rows=torch.zeros(4, 3, **double), classes=torch.tensor([0]), lower=torch.zeros(2, **double),
        upper=torch.zeros(2, **double), start=torch.tensor([1]), kind=torch.zeros(1, dtype=torch.int64),
        directions=torch.zeros(1, 3, **double), support=torch.zeros(1, 4, dtype=torch.int64),
        multipliers=torch.zeros(1, 4, **double),
    )  # fmt: skip
    with pytest.raises((TypeError, ValueError), match=message):
        supy._extension.C.hull_separation(*(arguments | change).values())


def test_the_number_of_threads_changes_nothing():
    weight = np.random.default_rng(1).normal(size=(400, 6))
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            report = find_unargmaxable(weight)
            found.append([repr(report.certificate(k)) for k in range(400)])
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]


@pytest.mark.parametrize("offset, verdict", [(1e-9, "argmaxable"), (-1e-9, "unargmaxable"), (0.0, "unargmaxable")])
def test_near_ties(offset, verdict):
    """A point that far outside, inside and on the edge of a triangle, as a weight and as a bias."""
    weight = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0], [0.5 + offset, 0.5 + offset]])
    assert find_unargmaxable(weight)[3] == verdict
    bias = np.array([0.0, 0.0, 0.0, offset])
    report = find_unargmaxable(np.array([[1.0], [-1.0], [2.0], [0.0]]), bias)
    assert report[3] == verdict and verify(np.array([[1.0], [-1.0], [2.0], [0.0]]), bias, report) == []


def test_few_classes_and_dimensions():
    assert find_unargmaxable(np.zeros((0, 3))).verdicts == []
    assert find_unargmaxable(np.ones((1, 3))).verdicts == ["argmaxable"]
    assert find_unargmaxable(np.array([[1.0, 2.0], [3.0, 4.0]])).verdicts == ["argmaxable"] * 2
    assert find_unargmaxable(np.ones((2, 3))).verdicts == ["tied"] * 2
    assert find_unargmaxable(np.array([[3.0], [1.0], [2.0]])).verdicts == ["argmaxable", "argmaxable", "unargmaxable"]
    assert find_unargmaxable(np.zeros((2, 1)), np.array([0.0, 1.0])).verdicts == ["unargmaxable", "argmaxable"]
    assert find_unargmaxable(np.array([[0.0], [-0.0], [1.0]])).verdicts == ["tied", "tied", "argmaxable"]
    # equal rows inside the hull cannot even tie for the maximum
    assert find_unargmaxable(np.array([[1.0], [-1.0], [0.5], [0.5]]))[2:] == ["unargmaxable"] * 2


@pytest.mark.parametrize("size", [1e-200, 1e-30, 1e30, 1e200])
def test_huge_and_tiny_norms(size):
    assert find_unargmaxable(FIVE * size).verdicts == ["argmaxable"] * 4 + ["unargmaxable"]
    mixed = np.concatenate([FIVE * size, -FIVE * size, [[0.0, 0.0]]])
    report = find_unargmaxable(mixed, nonnegative=True)
    assert verify(mixed, None, report, nonnegative=True) == [] and "undecided" not in report.verdicts


def test_tiny_rows_among_large_ones():
    rows = np.concatenate([1e-9 * FIVE, [[0.0, -1.0], [-1.0, 0.0]]])
    report = find_unargmaxable(rows)
    assert report.verdicts[4] == "unargmaxable" and verify(rows, None, report) == []
    assert report.verdicts[:2] == ["argmaxable"] * 2


@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_what_is_found_in_bfloat16_and_float32_holds_in_float64(spread):
    """More than 64 columns, rows far from the origin: some are decided by each product, none wrongly."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(1500, 70)) * np.exp(spread * rng.normal(size=(1500, 1))) + 5
    kinds, seen = set(), witnesses._Filter._compare

    def compare(self, *arguments):
        kinds.add(arguments[4].dtype)
        return seen(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(witnesses._Filter, "_compare", compare)
        report = find_unargmaxable(weight.astype(np.float32), 0.1 * rng.normal(size=1500))
    assert verify(report.layer.weight, report.layer.bias, report) == []
    fast = supy._extension.C is not None and supy._extension.C.build_info()["bf16_products"]
    expected = {torch.float32, torch.bfloat16} if spread else {torch.bfloat16}  # where rows are alike, that is enough
    assert kinds == (expected if fast else {torch.float32})


def test_many_equal_rows():
    """In groups of 10,000, in which nothing may look at all twins for each of them."""
    weight = np.concatenate([FIVE, np.zeros((10_000, 2)), np.full((10_000, 2), 3.0)])
    report = find_unargmaxable(weight)
    assert (len(report.classes("tied")), len(report.classes("unargmaxable"))) == (20_000, 1)
    assert report.certificate(15_000).twins[:2] == (10_005, 10_006)
    proofs = list(report.certificates())
    assert len({id(proof.twins) for proof in proofs}) == 3 and min(proof.margin for proof in proofs[5:]) > 0
    assert verify(weight, None, proofs) == []


def test_bounds_far_from_the_origin():
    """All that distinguishes the classes there is lost in a float32, and most of it in the rounding of the shift."""
    weight = np.random.default_rng(0).normal(size=(50, 3))
    for lower in (1e6, 1e12):
        report = find_unargmaxable(weight, lower=lower, upper=lower + 1)
        assert verify(weight, None, report, lower=lower, upper=lower + 1) == []
        assert report.verdicts.count("undecided") == 0


def test_bounds():
    weight, bias = np.array([[1.0], [0.0]]), np.array([-2.0, 0.0])
    assert find_unargmaxable(weight, bias)[0] == "argmaxable"
    assert find_unargmaxable(weight, bias, bound=1)[0] == "unargmaxable"
    assert find_unargmaxable(weight, bias, bound=2)[0] == "unargmaxable"  # equals the maximum at x = 2, never exceeds
    assert find_unargmaxable(weight, bias, bound=2.01)[0] == "argmaxable"
    assert find_unargmaxable(-weight, bias, nonnegative=True)[0] == "unargmaxable"
    assert find_unargmaxable(weight, bias, lower=3, upper=[4.0])[:] == ["argmaxable", "unargmaxable"]
    assert find_unargmaxable(weight, bias, lower=3.0, upper=3.0)[:] == ["argmaxable", "unargmaxable"]


def test_tensors_of_any_precision_and_what_bias_adds():
    weight = torch.tensor(FIVE)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert find_unargmaxable(torch.nn.Parameter(weight.to(dtype)))[4] == "unargmaxable"
    assert find_unargmaxable(weight.T.contiguous().T, torch.full((5,), 7.0))[4] == "unargmaxable"


@pytest.mark.parametrize("arguments, message", [
    (dict(weight=np.zeros(3)), "weight has shape"),
    (dict(weight=np.zeros((3, 0))), "weight has shape"),
    (dict(weight=np.array([[1.0], [np.nan]])), "NaN or infinite value at \\[1, 0\\]"),
    (dict(weight=np.array([[1.0], [inf]])), "NaN or infinite value"),
    (dict(weight=FIVE, bias=np.zeros(4)), "bias has shape \\[4\\]"),
    (dict(weight=FIVE, bias=np.full(5, np.nan)), "bias has a NaN"),
    (dict(weight=FIVE, lower=1.0, upper=0.0), "at least 1.0"),
    (dict(weight=FIVE, lower=[0.0, 1.0, 2.0]), "lower is"),
    (dict(weight=FIVE, bound=-1.0), "bound is -1"),
    (dict(weight=FIVE, bound=np.nan), "bound is nan"),
    (dict(weight=FIVE, tolerance=0.0), "tolerance is 0"),
])  # fmt: skip
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        find_unargmaxable(**arguments)


def test_what_is_not_numbers():
    with pytest.raises(TypeError, match="weight is list"):
        find_unargmaxable([["a"]])


def test_verify_finds_every_kind_of_lie():
    weight = np.concatenate([FIVE, FIVE[:1]])
    report = find_unargmaxable(weight)
    proofs = list(report.certificates())
    assert [proof.verdict for proof in proofs] == report.verdicts
    assert [proof.margin for proof in proofs[:4]] == pytest.approx([report.certificate(k).margin for k in range(4)])
    assert verify(weight, None, proofs) == []

    def problem(k, **change):
        lies = [dataclasses.replace(proof, **change) if proof.index == k else proof for proof in proofs]
        (found,) = verify(weight, None, lies)
        return found

    assert "wins by" in problem(1, witness=-proofs[1].witness)
    assert "shape" in problem(1, witness=np.zeros(3))
    assert "not finite" in problem(1, witness=np.array([np.nan, 0]))
    assert "residual" in problem(4, dominators={0: 0.5, 1: 0.5})
    assert "sum one" in problem(4, dominators={0: 0.5})
    assert "sum one" in problem(4, dominators={0: 1.5, 1: -0.5})
    assert "distinct" in problem(4, dominators={4: 1.0})
    assert "not a class" in problem(4, dominators={9: 1.0})
    assert "twins" in problem(0, twins=())
    assert "another row" in problem(0, twins=(0, 2))
    assert "not one of its twins" in problem(0, twins=(1, 5))
    assert "not distinct classes" in problem(0, twins=(0, 0)) and "not distinct classes" in problem(0, twins=(0, 9))
    lies = [dataclasses.replace(proof, witness=-proofs[0].witness) if proof.twins else proof for proof in proofs]
    assert [text[:8] for text in verify(weight, None, lies)] == ["class 0:", "class 5:"]
    assert "not a verdict" in problem(3, verdict="dead")
    assert "wins by" in problem(4, verdict="argmaxable", witness=np.ones(2))
    assert "6 classes" not in str(verify(weight, None, proofs)) and "the layer 6" in verify(weight, None, proofs[:5])[0]
    assert "twice" in verify(weight, None, [*proofs, Certificate(0, "undecided")])[0]
    assert "outside the bounds" in str(verify(weight, None, proofs, bound=1e-9))
    assert "surplus" in str(verify(weight, np.array([0, 0, 0, 0, 1.0, 0]), proofs))
    assert "no witness" in problem(1, witness=None)


def test_many_classes_take_little_memory():
    weight = np.random.default_rng(0).normal(size=(20_000, 3)).astype(np.float32)
    report = find_unargmaxable(weight[:, :3], nonnegative=True)
    assert len(report.classes("argmaxable")) + len(report.classes("unargmaxable")) == 20_000
    some = [report.certificate(k) for k in range(0, 20_000, 500)]
    assert all("report has" in problem for problem in verify(weight, None, some, nonnegative=True))


@pytest.mark.slow
def test_a_million_classes():
    """In 13 s, with less than 600 MB beside what Python and torch take."""
    script = """
import resource
import numpy as np
from supy.argmax import find_unargmaxable
find_unargmaxable(np.eye(3))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
weight = np.random.default_rng(0).normal(size=(1_000_000, 4)).astype(np.float32)
report = find_unargmaxable(weight)
print(*(len(report.classes(verdict)) for verdict in ("argmaxable", "unargmaxable")))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    alive, dead, kilobytes = map(int, ran.stdout.split())
    assert alive + dead == 1_000_000 and 0 < alive < 1000 and kilobytes < 600_000


heads = Path(os.environ.get("SUPY_DATA", ""), "heads")


@pytest.mark.skipif(not heads.is_dir() or not os.environ.get("SUPY_DATA"), reason="needs SUPY_DATA with heads/")
def test_g2pm():
    """Every class of a published pinyin converter, whose dead ones are proven."""
    layer = np.load(heads / "g2pm.npz", allow_pickle=False)
    report = find_unargmaxable(layer["weight"], layer["bias"])
    assert verify(layer["weight"], layer["bias"], report) == []
    assert (len(report.classes("argmaxable")), len(report.classes("unargmaxable"))) == (651, 225)
    weight, bias = layer["weight"].astype(np.float64), layer["bias"].astype(np.float64)
    free = np.full(32, inf)
    some = range(0, 876, 60)  # every class was compared once; each program takes a tenth of a second
    wins = largest_margins(weight, bias, some, -free, free) > 1e-8
    assert [report[k] for k in some] == ["argmaxable" if won else "unargmaxable" for won in wins]
