"""linear_argmax in Triton and the search for witnesses on a device: against the reference and the CPU's verdicts."""

import pytest
import torch

import supy
from _linear_argmax import REGIMES, check, make
from supy.argmax import find_unargmaxable, verify

pytestmark = pytest.mark.gpu


def run(x, weight, bias, exclude, floor):
    with supy.use_backend("triton"):
        return supy.ops.linear_argmax(x, weight, bias, exclude=exclude, floor=floor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_values_and_classes(regime, dtype):
    check(run, *make(regime, dtype, "cuda"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [3, 5000])
def test_neither_a_floor_nor_how_classes_are_shared_changes_a_bit(dtype, rows):
    torch.manual_seed(0)
    weight = torch.randn(5000, 300, device="cuda") * torch.logspace(0.5, -0.5, 5000, device="cuda")[:, None]
    weight = weight.to(dtype)
    own = torch.linspace(0, 4999, rows, device="cuda").long()
    expected = run(weight[own], weight, None, own, None)
    assert all(map(torch.equal, run(weight[own], weight, None, own, None), expected))
    floor = weight[own].float().square().sum(1)
    values, classes = run(weight[own], weight, None, own, floor)
    counts = expected[0] >= floor
    assert torch.equal(classes, torch.where(counts, expected[1], -1))
    assert torch.equal(values, expected[0].masked_fill(~counts, -torch.inf))


def test_tf32_where_torch_may_use_it():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        weight = torch.randn(3000, 64, device="cuda")
        values, _ = run(weight, weight, None, torch.arange(3000, device="cuda"), None)
        report = find_unargmaxable(weight)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    logits = weight.double() @ weight.double().T
    logits.fill_diagonal_(-torch.inf)
    # tf32 has 10 bits.
    assert ((values - logits.amax(1)).abs() < 2e-3 * weight.norm(dim=1).double() * weight.norm(dim=1).max()).all()
    assert verify(weight.cpu(), None, report) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("K, d, options", [
    (3000, 100, {}),  # more than 64 columns: bfloat16 first
    (2000, 12, {}),  # some classes are dead
    (1000, 80, {"bound": 2.0}),
    (500, 5, {"nonnegative": True}),
    (2, 3, {}),
    (1, 3, {}),
])  # fmt: skip
def test_the_cpu_gives_the_same_verdicts(K, d, options, dtype):
    torch.manual_seed(0)
    weight = (torch.randn(K, d) * torch.rand(K, 1).add(0.5)).to(dtype)
    bias = torch.randn(K) if options else None
    if K == 2000:
        weight[7] = weight[5]
    here = find_unargmaxable(weight.cuda(), None if bias is None else bias.cuda(), **options)
    assert here.verdicts == find_unargmaxable(weight, bias, **options).verdicts
    assert verify(weight, bias, here, **options) == []


def test_nothing_stays_on_the_device():
    weight = torch.randn(20_000, 256, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    report = find_unargmaxable(weight)
    assert torch.cuda.memory_allocated() - before < 1e6 and "undecided" not in report.verdicts
    # Rows in float32 and bfloat16, 31 MB, and directions in chunks; the logits would be 1.6 GB.
    assert torch.cuda.max_memory_allocated() - before < 4e8
