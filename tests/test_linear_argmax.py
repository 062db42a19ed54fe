"""linear_argmax: against the float64 reference, and its bits for every number of threads and every block."""

import os
import subprocess
import sys

import pytest
import torch

import supy
from _linear_argmax import REGIMES, check, make
from supy.reference.linear_argmax import linear_argmax as reference


def run(x, weight, bias, exclude, floor):
    return supy.ops.linear_argmax(x, weight, bias, exclude=exclude, floor=floor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_values_and_classes(regime, dtype):
    check(run, *make(regime, dtype))


def test_the_reference_is_what_torch_says():
    x, weight, bias, exclude, _ = make("less than a vector", torch.float64)
    logits = x @ weight.T + bias
    logits[torch.arange(5), exclude.clamp(min=0)] = torch.where(exclude < 0, logits[:, 0], -torch.inf)
    values, classes = run(x, weight, bias, exclude, None)
    assert values.dtype == torch.float64 and torch.equal(values, logits.amax(1))
    assert torch.equal(classes, logits.max(1).indices)
    assert torch.equal(reference(x, weight, bias, exclude, values)[1], classes)
    assert (reference(x, weight, bias, exclude, values + 1e-9)[1] == -1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_neither_threads_nor_a_floor_nor_the_rows_beside_change_a_bit(dtype):
    """What a floor leaves out would have changed nothing, and rows alone have the bits that they have in a block."""
    torch.manual_seed(0)
    weight = torch.randn(1500, 40) * torch.logspace(0.5, -0.5, 1500)[:, None]
    weight, own = weight.to(dtype), torch.arange(1500)
    expected = run(weight, weight, None, own, None)
    floor = weight.float().square().sum(1)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(map(torch.equal, run(weight, weight, None, own, None), expected))
            values, classes = run(weight, weight, None, own, floor)
            counts = expected[0] >= floor
            assert 0 < counts.sum() < 1500 and torch.equal(classes >= 0, counts)
            assert torch.equal(values[counts], expected[0][counts])
            assert torch.equal(classes[counts], expected[1][counts])
    finally:
        torch.set_num_threads(threads)
    some = torch.tensor([7, 1400, 3])
    alone = run(weight[some], weight, None, some, None)
    assert torch.equal(alone[0], expected[0][some]) and torch.equal(alone[1], expected[1][some])


def test_more_classes_than_are_packed_at_a_time():
    torch.manual_seed(0)
    weight = torch.randn(20_000, 1024)  # two panels and a part of the third
    x = weight[[0, 9000, 19_999]] + torch.randn(3, 1024)
    values, classes = run(x, weight, None, None, None)
    assert classes.tolist() == [0, 9000, 19_999]
    assert torch.allclose(values, (x * weight[classes]).sum(1), rtol=1e-5)


def test_every_instruction_set():
    script = (
        "import torch; from _linear_argmax import *; from test_linear_argmax import run\n"
        "for r in REGIMES:\n    for t in (torch.float32, torch.bfloat16):\n        check(run, *make(r, t))"
    )
    for name in ("generic", "avx2"):
        environment = os.environ | {"SUPY_ISA": name, "PYTHONPATH": os.path.dirname(__file__)}
        subprocess.run([sys.executable, "-c", script], check=True, env=environment)


def test_no_matrix_of_logits():
    """A row of 4 MB of logits a direction would be 4 GB."""
    import resource

    x, weight = torch.randn(1000, 2), torch.randn(1_000_000, 2)
    run(x[:10], weight, None, None, None)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(x, weight, None, None, None)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


@pytest.mark.parametrize("change, error, message", [
    (dict(x=torch.zeros(4)), ValueError, r"x has shape \[4\]"),
    (dict(x=torch.zeros(4, 3, dtype=torch.int64)), TypeError, "x has dtype"),
    (dict(weight=torch.zeros(5, 2)), ValueError, "weight has shape"),
    (dict(weight=torch.zeros(5, 3, dtype=torch.float64)), TypeError, "weight has dtype"),
    (dict(bias=torch.zeros(4)), ValueError, "bias has shape"),
    (dict(bias=torch.zeros(5, dtype=torch.int64)), TypeError, "bias has dtype"),
    (dict(exclude=torch.zeros(4)), TypeError, "exclude has dtype"),
    (dict(exclude=torch.zeros(5, dtype=torch.int64)), ValueError, "exclude has shape"),
    (dict(floor=torch.zeros(1)), ValueError, "floor has shape"),
    (dict(floor=[1.0] * 4), TypeError, "floor is a list"),
])  # fmt: skip
def test_bad_arguments(change, error, message):
    arguments = dict(x=torch.zeros(4, 3), weight=torch.zeros(5, 3)) | change
    with pytest.raises(error, match=f"supy.linear_argmax: {message}"):
        supy.ops.linear_argmax(**arguments)


@pytest.mark.parametrize("change, message", [
    (dict(weight=torch.zeros(5, 6)[:, ::2]), "weight must have contiguous rows"),
    (dict(weight=torch.zeros(5, 2)), "weight has shape"),
    (dict(exclude=torch.zeros(8, dtype=torch.int64)[::2]), "exclude must be contiguous"),
    (dict(classes=torch.zeros(3, dtype=torch.int64)), "classes has shape"),
    (dict(values=torch.zeros(4, dtype=torch.float64)), "values has dtype"),
])  # fmt: skip
def test_the_kernel_refuses_what_it_would_read_wrongly(change, message):
    if supy._extension.C is None:
        # Without a compiler there is no binding, and nothing reads memory.
        pytest.skip("needs supy._C")
    arguments = dict(x=torch.zeros(4, 3), weight=torch.zeros(5, 3), bias=None, exclude=None, floor=None,
                     values=torch.zeros(4), classes=torch.zeros(4, dtype=torch.int64)) | change  # fmt: skip
    with pytest.raises((TypeError, ValueError), match=message):
        supy._extension.C.linear_argmax(*arguments.values())
