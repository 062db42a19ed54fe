"""What the tests of linear_argmax share: named regimes, and the comparison with the float64 reference."""

import torch

from supy.reference.linear_argmax import linear_argmax as reference

# name: (M, K, d, what of bias, exclude, floor, sorted by length)
REGIMES = {
    "one of each": (1, 1, 1, "bias"),
    "the only class excluded": (2, 1, 3, "exclude"),
    "less than a vector": (5, 7, 3, "bias exclude"),
    "a tile and one more": (97, 481, 33, "exclude"),
    "a depth of several parts": (20, 100, 400, "bias"),
    "equal rows": (40, 150, 4, "equal bias exclude"),
    "a floor in the middle": (60, 700, 20, "bias exclude floor"),
    "a floor and blocks that cannot reach it": (500, 1000, 24, "exclude floor sorted"),
    "NaN in a row, a class and a bias; infinite ones": (50, 130, 17, "bias nan"),
    "all classes left out by their bias": (3, 40, 5, "bias none"),
    "no rows": (0, 5, 2, "bias"),
    "no classes": (5, 0, 2, "exclude"),
    "no features": (3, 4, 0, "bias"),
}


def make(regime, dtype, device="cpu"):
    """x, weight, bias, exclude, floor."""
    M, K, d, has = REGIMES[regime]
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(n, d, generator=generator).to(dtype) for n in (M, K))
    bias = exclude = floor = None
    if "bias" in has:
        bias = torch.randn(K, generator=generator)
    if "exclude" in has:
        exclude = torch.arange(M) % (K + 1) - 1
    if "equal" in has:  # integers: equal in every order of summation
        x, weight, bias = (y.round() for y in (x, weight[:50].repeat(3, 1), bias[:50].repeat(3)))
    if "nan" in has:
        x[3, 2] = weight[100, 5] = bias[101] = torch.nan
        x[4, 1], weight[20, 3], bias[30], bias[31] = torch.inf, -torch.inf, torch.inf, -torch.inf
    if "none" in has:
        bias[:] = -torch.inf
    if "sorted" in has:
        weight *= torch.linspace(2, 0.1, K)[:, None].to(dtype)
        x, exclude = weight[:M], torch.arange(M)
    if "floor" in has:
        wide = x.double()
        floor = reference(wide, weight.double(), bias, None, None)[0]
        floor = ((wide.square().sum(1) if "sorted" in has else floor) * torch.linspace(0.5, 1.5, M)).float()
    return tuple(y if y is None else y.to(device) for y in (x, weight, bias, exclude, floor))


def check(function, x, weight, bias, exclude, floor):
    """The value is within rounding of the largest logit, and the class has it; ties and NaN are as in the reference."""
    values, classes = function(x, weight, bias, exclude, floor)
    assert values.dtype == torch.float32 and classes.dtype == torch.int64
    assert values.shape == classes.shape == x.shape[:1]
    wide = x.double(), weight.double(), None if bias is None else bias.double()
    exact, best = reference(*wide, exclude, None)
    # (d + 1) roundings of sums of at most this size, with a unit of 2^-24; tf32 in three products has 2^-20.
    size = wide[0].abs() @ wide[1].abs().T
    size = size.amax(1) if len(weight) else exact.new_zeros(len(x))
    size = size if bias is None or len(weight) == 0 else size + bias.abs().max()
    unit = (x.shape[1] + 2) * 2.0**-24 + (2.0**-18 if x.is_cuda and x.dtype == torch.float32 else 0)
    allowed = torch.where(size.isfinite(), unit * size, 0.0)
    if floor is not None:
        below = exact < floor - allowed
        assert (classes[below] == -1).all() and (values[below] == -torch.inf).all()
        above = exact >= floor + allowed
        assert (classes[above] >= 0).all() and below.any() and above.any()
    found = classes >= 0
    assert (values[~found] == -torch.inf).all()
    if floor is None:
        assert torch.equal(found, best >= 0)
    at = found.nonzero()[:, 0]
    logits = wide[0] @ wide[1].T if wide[2] is None else wide[0] @ wide[1].T + wide[2]
    own = logits[at, classes[at]]
    for got, expected in ((values[at], exact[at]), (own, exact[at])):
        same = (got == expected) | (got.isnan() & expected.isnan()) | ((got - expected).abs() <= allowed[at])
        assert same.all(), (got[~same], expected[~same])
    if exclude is not None:
        assert (classes[at] != exclude[at]).all()
    exactly = (x == x.round()).all() and (weight == weight.round()).all()
    special = exact[at].isnan() | exact[at].isinf()
    assert (classes[at] == best[at])[special | exactly].all()
