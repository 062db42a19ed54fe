"""The argmax of a linear layer: a product with the largest entry of each row, of which only that is kept."""

from __future__ import annotations

import torch

from supy.reference._masks import wide

_BLOCK = 1 << 23  # logits that are held at once


def linear_argmax(x, weight, bias, exclude, floor):
    """max and argmax over i != exclude_m of x_m . w_i + b_i: (values `[M]`, classes `[M]`), the first of equal ones.

    x `[M, d]`, weight `[K, d]`, bias `[K]`, exclude int64 `[M]`, floor `[M]`. Without a class whose logit is above -inf
    and not below floor_m, the value is -inf and the class -1. A NaN is the largest. Half precision computes in float32.
    """
    x, weight = wide(x), wide(weight)
    M, K = len(x), len(weight)
    values, classes = x.new_full((M,), -torch.inf), torch.full((M,), -1, device=x.device)
    step = max(1, _BLOCK // max(K, 1))
    for begin in range(0, M if K else 0, step):
        part = slice(begin, begin + step)
        logits = x[part] @ weight.T
        if bias is not None:
            logits += bias
        if exclude is not None:
            logits.masked_fill_(torch.arange(K, device=x.device) == exclude[part, None], -torch.inf)
        values[part], classes[part] = logits.max(1)
    none = values == -torch.inf
    if floor is not None:
        none |= values < floor
    return values.masked_fill(none, -torch.inf), classes.masked_fill(none, -1)
