"""The one rule by which values and gradients are compared with the reference."""

import torch


def assert_close_to_reference(name, got, reference64, reference_same_dtype, factor, *, ulps=4):
    """The error is at most ``factor`` times the reference's in the same dtype, plus a few ulp.

    Errors are largest absolute differences from ``reference64``; an ulp is that of its largest
    value in the dtype of ``got``. Infinities must stand in the same places. ``name`` is "operator:
    tensor"; ``factor`` is 2 for values, 3 for gradients.
    """
    shape = reference64.shape
    assert got.shape == shape, f"{name} has shape {got.shape}, expected {shape}"
    assert got.dtype == reference_same_dtype.dtype, f"{name} has dtype {got.dtype}"
    assert reference64.dtype == torch.float64, f"{name}: the reference is {reference64.dtype}"
    if got.numel() == 0:
        return
    error = _distance(got, reference64)
    finite = reference64[reference64.isfinite()].abs()
    ulp = torch.finfo(got.dtype).eps * (finite.max().item() if finite.numel() else 0.0)
    allowed = factor * _distance(reference_same_dtype, reference64).max().item() + ulps * ulp
    worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    assert error.max() <= allowed, (
        f"{name} is off by {error.max():.3g} at {worst}, allowed {allowed:.3g}: "
        f"got {got[worst]}, expected {reference64[worst]}"
    )


def _distance(got, expected):
    got = got.detach().double()
    return torch.where(got == expected, 0.0, got - expected).abs().nan_to_num(nan=torch.inf)
