"""What trains the networks beside torch's own optimisers: LAMB, its schedule, and a moving average that starts warm."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from supy._checks import require


class Lamb(torch.optim.Optimizer):
    """Adam, with each tensor's step as long as the tensor itself, times the learning rate (arXiv 1904.00962).

        m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2
        u = m / (1 - b1^s) / (sqrt(v / (1 - b2^s)) + eps) + weight_decay w           s: this step's number, from 1
        w = w - lr r u,  r = |w| / |u|

    r is 1 where w or u is 0, and in a parameter group with ``adapt=False``, which is then Adam (:func:`lamb_groups`).
    Defaults are those that Keras-DDPM trains with (post 9152; bert4keras's Adam with layer adaptation). As a weight
    moves by a fraction lr of its length a step, a run of a few thousand steps wants a larger lr than its 40,000 do:
    about 1e-2.

    Libraries have others: torch none; pytorch-optimizer and torch-optimizer cut |w| off at 10, which large layers
    exceed, and do not correct v; timm's is this one with ``always_adapt`` and ``max_grad_norm=None``, but brings
    torchvision.

    Args:
        params: parameters, or groups of them as of any optimiser.
        lr, betas, eps, weight_decay: as above. adapt: False for r = 1.

    >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> optimizer = Lamb([weight], lr=0.1)
    >>> weight.grad = torch.tensor([1.0, -1.0])
    >>> optimizer.step()
    >>> weight.data                                        # moved by a tenth of its length, 5
    tensor([2.6464, 4.3536])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        adapt: bool = True,
    ):
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            require(value >= 0, "Lamb", f"{name} is {value}, expected 0 or more")
        require(all(0 <= b < 1 for b in betas), "Lamb", f"betas is {betas}, expected two numbers from 0 to below 1")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, adapt=adapt))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._update(group, [p for p in group["params"] if p.grad is not None])
        return loss

    def _update(self, group: dict[str, Any], weights: list[torch.Tensor]) -> None:
        if not weights:
            return
        for weight in weights:
            if not self.state[weight]:
                self.state[weight] = {
                    "step": torch.zeros(()),  # a tensor, so that a state is tensors alone
                    "exp_avg": torch.zeros_like(weight),
                    "exp_avg_sq": torch.zeros_like(weight),
                }
        states = [self.state[weight] for weight in weights]
        steps, means, squares = ([state[name] for state in states] for name in ("step", "exp_avg", "exp_avg_sq"))
        gradients = [weight.grad for weight in weights]
        b1, b2 = group["betas"]
        torch._foreach_add_(steps, 1)
        torch._foreach_lerp_(means, gradients, 1 - b1)
        torch._foreach_mul_(squares, b2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - b2)
        numbers = [step.item() for step in steps]
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, [(1 - b2**s) ** 0.5 for s in numbers])
        torch._foreach_add_(roots, group["eps"])
        updates = torch._foreach_div(means, roots)
        torch._foreach_div_(updates, [1 - b1**s for s in numbers])
        if group["weight_decay"]:
            torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
        if group["adapt"]:
            ratios = [
                torch.where((w > 0) & (u > 0), w / u, 1.0)
                for w, u in zip(torch._foreach_norm(weights), torch._foreach_norm(updates))
            ]
            torch._foreach_mul_(updates, ratios)
        torch._foreach_add_(weights, updates, alpha=-group["lr"])


def lamb_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups for :class:`Lamb`: weights of layers, and, with ``adapt=False``, what norms and biases have.

    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.GroupNorm(1, 2))
    >>> [len(group["params"]) for group in lamb_groups(model)]
    [1, 3]
    """
    layers = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)
    adapted = {id(m.weight) for m in model.modules() if isinstance(m, layers)}
    parts = [[p for p in model.parameters() if (id(p) in adapted) == kind] for kind in (True, False)]
    return [{"params": part, "adapt": kind} for part, kind in zip(parts, (True, False)) if part]


def ddpm_schedule(step: int, total: int = 40_000) -> float:
    """The factor of Keras-DDPM's learning rate: 0 at first, 1 at a tenth of ``total``, 0.5 at half, 0.1 at the end.

    In straight lines; there these are steps 4,000, 20,000 and 40,000. Afterwards it stays 0.1. With
    ``torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: ddpm_schedule(step, total))``.

    >>> [ddpm_schedule(step) for step in (0, 2000, 4000, 12000, 20000, 50000)]
    [0.0, 0.5, 1.0, 0.75, 0.5, 0.1]
    """
    return float(np.interp(step / total, (0, 0.1, 0.5, 1), (0, 1, 0.5, 0.1)))


def warm_average(decay: float) -> Callable:
    """A moving average that soon forgets its first steps, the ``multi_avg_fn`` of torch's ``AveragedModel``.

    The decay of step n is (1 + n) / (10 + n), at most ``decay``; torch's ``get_ema_multi_avg_fn`` has it constant,
    and then weighs the first weights by decay^n, which for 0.9999 and a few thousand steps is most of the average.
    """

    @torch.no_grad()
    def update(averages, values, steps):
        now = min(decay, (1 + float(steps)) / (10 + float(steps)))
        for average, value in zip(averages, values, strict=True):
            average.lerp_(value, 1 - now)

    return update
