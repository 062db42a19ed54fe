"""Output layers in which every class can win, by construction, and a monitor for those in which it may not."""

from __future__ import annotations

import time

import torch
from torch import nn
from torch.nn.utils import parametrize

from supy.argmax.certificates import VERDICTS
from supy.argmax.search import find_unargmaxable


def half_square_bias(weight: torch.Tensor) -> torch.Tensor:
    """The bias ``[K]`` b_i = -|w_i|^2 / 2 of a weight ``[K, d]``, with which every distinct row is argmaxable.

    Proof: w_i . x - |w_i|^2 / 2 = |x|^2 / 2 - |x - w_i|^2 / 2, so the nearest row wins, and for x = w_k that is row k
    alone. (In floating point it holds as long as |w_i - w_k|^2 is well above the rounding errors of |w_k|^2.)

    >>> half_square_bias(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
    tensor([-12.5000,  -2.0000])
    """
    return -0.5 * weight.square().sum(1)


class _HalfSquareBias(nn.Module):
    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = [linear]  # in a list it is no submodule of itself, and a deep copy refers to the copied layer

    def forward(self, unused: torch.Tensor) -> torch.Tensor:
        return half_square_bias(self.linear[0].weight)

    def right_inverse(self, value: torch.Tensor) -> torch.Tensor:
        return value


class _UnitRows(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(weight, dim=1)

    def right_inverse(self, value: torch.Tensor) -> torch.Tensor:
        return value


def prevent_unargmaxable_(linear: nn.Linear, *, parametrize_it: bool = False) -> nn.Linear:
    """Makes every class of a ``torch.nn.Linear`` argmaxable: at its start, or, as a parametrisation, during training.

    With a bias, the bias becomes :func:`half_square_bias` of the weight. Without one, the rows get length one: then
    w_k . w_k = 1 > w_i . w_k for every other row w_i, so the input x = w_k gives class k the largest logit.

    Args:
        linear: the output layer, changed in place.
        parametrize_it: False: only its current values are set, and training may leave them. True: they are computed
            from the trained weight in every forward pass (``torch.nn.utils.parametrize``, which also removes it); the
            bias is not trained any more.

    Returns:
        The layer.

    >>> layer = prevent_unargmaxable_(torch.nn.Linear(2, 50), parametrize_it=True)
    >>> find_unargmaxable(layer.weight, layer.bias)
    Report(50 argmaxable)
    """
    if not isinstance(linear, nn.Linear):
        got = type(linear).__name__
        raise TypeError(f"supy.argmax.prevent_unargmaxable_: linear is a {got}, expected torch.nn.Linear")
    with torch.no_grad():
        if linear.bias is None:
            linear.weight.copy_(nn.functional.normalize(linear.weight, dim=1))
        else:
            linear.bias.copy_(half_square_bias(linear.weight))
    if parametrize_it and linear.bias is None:
        parametrize.register_parametrization(linear, "weight", _UnitRows())
    elif parametrize_it:
        parametrize.register_parametrization(linear, "bias", _HalfSquareBias(linear))
        linear.parametrizations.bias.original.requires_grad_(False)
    return linear


class Monitor:
    """Counts the dead classes of an output layer; call it after each epoch.

    Args:
        linear: a module with ``weight`` ``[K, d]`` and perhaps ``bias`` ``[K]``.
        options: of :func:`find_unargmaxable`, such as ``nonnegative=True``.

    A call searches the layer as it is now, trying first what made classes win at the last call, appends to ``history``
    and returns a dict of the number of classes of each verdict and the ``seconds`` that the search took; ``report`` is
    the last search's.

    >>> monitor = Monitor(prevent_unargmaxable_(torch.nn.Linear(2, 50)))
    >>> monitor()["unargmaxable"]
    0
    """

    def __init__(self, linear: nn.Module, **options):
        self.linear, self.options = linear, options
        self.history: list[dict] = []
        self.report = None

    def __call__(self) -> dict:
        begin = time.perf_counter()
        bias = getattr(self.linear, "bias", None)
        self.report = find_unargmaxable(self.linear.weight, bias, previous=self.report, **self.options)
        counts = {verdict: self.report.verdicts.count(verdict) for verdict in VERDICTS}
        self.history.append({**counts, "seconds": time.perf_counter() - begin})
        return self.history[-1]
