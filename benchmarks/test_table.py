"""Times every row of table.py: `python -m pytest benchmarks -q`, one operator with `-k rotary`.

Each implementation is first compared with the float64 result; what differs fails and is not timed. The comparison only
makes sure that all compute the same thing: the tests hold the precision.
"""

import functools

import pytest
import torch
from ceilings import device_peak, device_seconds
from table import ROWS

TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float64: 1e-9}


def pytest_generate_tests(metafunc):
    cases = {
        f"{row.operator}-{row.case}-{name}": (index, name)
        for index, row in enumerate(ROWS[metafunc.config.option.device])
        for name in row.implementations
    }
    metafunc.parametrize(("index", "name"), cases.values(), ids=cases)


def _double(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@functools.lru_cache(maxsize=1)  # the implementations of a row follow each other
def _prepared(index, device):
    row = ROWS[device][index]
    inputs = [value.to(device) if isinstance(value, torch.Tensor) else value for value in row.inputs()]
    return inputs, row.exact(*map(_double, inputs)) if row.exact else None


def _close(result, expected):
    return result.shape == expected.shape and torch.allclose(
        result.double(), expected, rtol=0, atol=TOLERANCE[result.dtype] * max(1.0, expected.abs().max().item())
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_operator(index, name, benchmark, record, request):
    device = request.config.option.device
    row = ROWS[device][index]
    function = row.implementations[name]
    inputs, expected = _prepared(index, device)
    with torch.set_grad_enabled(row.gradients):
        try:
            result = function(*inputs)
        except ImportError as error:
            record(row, name, None, f"skipped: {error}")
            pytest.skip(str(error))
        if row.exact and name not in row.unlike:
            assert (row.same or _close)(result, expected), f"{name} differs from the float64 result"
        if device == "cuda":
            if not benchmark.disabled:
                del result
                run = functools.partial(function, *inputs)
                record(row, name, device_seconds(run), peak=device_peak(run))
            return
        benchmark.group, benchmark.name = f"{row.operator} {row.case}", name
        benchmark(function, *inputs)
    if benchmark.stats is not None:  # None under --benchmark-disable, which only compares
        record(row, name, benchmark.stats.stats.min)
