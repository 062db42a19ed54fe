"""Noise schedules, with the signal and the noise of each step as square roots: alpha^2 + beta^2 = 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch

from supy._checks import require

Numbers = torch.Tensor | np.ndarray | Sequence[float]


class Schedule:
    """How much signal and noise each of T steps has: x_t = alpha_t x_{t-1} + beta_t noise, alpha_t^2 + beta_t^2 = 1.

    After t steps, x_t = alpha_bar_t x_0 + beta_bar_t noise with alpha_bar_t = alpha_1 ... alpha_t and
    alpha_bar_t^2 + beta_bar_t^2 = 1 (kexue.fm post 9119). The paper (arXiv 2006.11239) names the squares:
    its beta_t is beta_t^2 here, its alpha_bar_t is alpha_bar_t^2; `from_betas` and `betas` convert.

    Args:
        alpha: the T values of alpha_1 to alpha_T, each above 0 and below 1 (so that alpha_bar falls from 1 towards 0).
        timesteps: what the network is told at each step, rising, from 0; by default 0 to T - 1. `stride` sets it.

    Attributes:
        alpha, beta, alpha_bar, beta_bar: float64 `[T + 1]` on the CPU. Entry t belongs to step t; entry 0 is the data
            (alpha and alpha_bar 1, beta and beta_bar 0).
        timesteps: int64 `[T]`; the network is told ``timesteps[t - 1]`` at step t.

    Raises:
        ValueError: ``alpha`` is empty, not finite or out of range, or its product is not above 0.

    >>> import supy
    >>> schedule = supy.diffusion.Schedule([0.8, 0.6])
    >>> schedule.alpha_bar.tolist(), schedule.timesteps.tolist()
    ([1.0, 0.8, 0.48], [0, 1])
    >>> supy.diffusion.Schedule([0.8, 1.5])
    Traceback (most recent call last):
    ValueError: supy.Schedule: alpha has 1.5 at step 2, expected more than 0 and less than 1
    """

    def __init__(self, alpha: Numbers, *, timesteps: Numbers | None = None):
        alpha = _numbers("alpha", alpha)
        bad = (~((alpha > 0) & (alpha < 1))).nonzero().flatten().tolist()
        value = f"{alpha[bad[0]].item()} at step {bad[0] + 1}" if bad else ""
        require(not bad, "Schedule", f"alpha has {value}, expected more than 0 and less than 1")
        self.alpha = torch.cat([alpha.new_ones(1), alpha])
        self.alpha_bar = self.alpha.cumprod(0)
        require(
            self.alpha_bar[-1].item() > 0, "Schedule", f"the product of {len(alpha)} alphas is 0, expected more than 0"
        )
        self.beta = _other(self.alpha)
        self.beta_bar = _other(self.alpha_bar)
        if timesteps is None:
            timesteps = range(len(alpha))
        self.timesteps = _numbers("timesteps", list(timesteps)).long()
        rising = bool((self.timesteps.diff() > 0).all() and (self.timesteps[:1] >= 0).all())
        require(
            self.timesteps.shape == alpha.shape and rising,
            "Schedule",
            f"timesteps has {len(self.timesteps)} values, expected {len(alpha)} rising ones (from alpha), none below 0",
        )

    @classmethod
    def su(cls, T: int = 1000) -> Self:
        """alpha_t = sqrt(1 - 0.02 t / T), of post 9119 and the Keras code that goes with it.

        >>> import supy
        >>> round(supy.diffusion.Schedule.su().alpha_bar[-1].item(), 6)
        0.006482
        """
        _check_steps(T)
        return cls.from_betas(0.02 * torch.arange(1, T + 1, dtype=torch.float64) / T)

    @classmethod
    def linear(cls, T: int = 1000, first: float = 1e-4, last: float = 0.02) -> Self:
        """The paper's betas from ``first`` to ``last`` in equal steps (arXiv 2006.11239); T = 1 has ``first`` alone.

        >>> import supy
        >>> round(supy.diffusion.Schedule.linear().alpha_bar[-1].item(), 6)
        0.006353
        """
        _check_steps(T)
        return cls.from_betas(torch.linspace(first, last, T, dtype=torch.float64))

    @classmethod
    def cosine(cls, T: int = 1000, *, offset: float = 0.008, largest: float = 0.999) -> Self:
        """alpha_bar_t proportional to cos((t / T + offset) / (1 + offset) pi / 2) (arXiv 2102.09672).

        The paper's betas are capped at ``largest``, else the last one would be 1: no signal is left at T.

        >>> import supy
        >>> round(supy.diffusion.Schedule.cosine().alpha_bar[500].item(), 4)
        0.7027
        """
        _check_steps(T)
        angle = (torch.arange(T + 1, dtype=torch.float64) / T + offset) / (1 + offset) * (math.pi / 2)
        signal = angle.cos() ** 2
        return cls.from_betas((1 - signal[1:] / signal[:-1]).clamp(max=largest))

    @classmethod
    def from_betas(cls, betas: Numbers) -> Self:
        """From the paper's betas, which are the squares of ours.

        >>> import supy
        >>> supy.diffusion.Schedule.from_betas([0.36, 0.64]).alpha.tolist()
        [1.0, 0.8, 0.6]
        """
        betas = _numbers("betas", betas)
        good = bool(((betas > 0) & (betas < 1)).all())
        require(good, "Schedule", "betas has values that are not above 0 and below 1")
        return cls((1 - betas).sqrt())

    @classmethod
    def from_alpha_bar(cls, alpha_bar: Numbers, *, timesteps: Numbers | None = None) -> Self:
        """From alpha_bar_1 to alpha_bar_T, falling, each above 0 and below 1.

        >>> import supy
        >>> supy.diffusion.Schedule.from_alpha_bar([0.8, 0.4]).alpha.tolist()
        [1.0, 0.8, 0.5]
        """
        alpha_bar = _numbers("alpha_bar", alpha_bar)
        before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        good = bool(((alpha_bar > 0) & (alpha_bar < before)).all())
        require(good, "Schedule", "alpha_bar does not fall from below 1 towards 0")
        return cls(alpha_bar / before, timesteps=timesteps)

    @property
    def T(self) -> int:
        """The number of steps."""
        return len(self.timesteps)

    @property
    def betas(self) -> torch.Tensor:
        """float64 `[T]`: the paper's betas, which are the squares of ours."""
        return self.beta[1:] ** 2

    @property
    def posterior_sigma(self) -> torch.Tensor:
        """float64 `[T + 1]`: beta_t beta_bar_{t-1} / beta_bar_t, the deviation of x_{t-1} where x_t and x_0 are known.

        It is 0 at t = 1, where x_{t-1} is x_0.
        """
        return torch.cat([self.beta[:1], self.beta[1:] * self.beta_bar[:-1] / self.beta_bar[1:]])

    def stride(self, steps: int, *, start: int | None = None, spacing: str = "trailing") -> Schedule:
        """A schedule of fewer steps: alpha_bar at some of the steps, and what follows from it (post 9181).

        Args:
            steps: how many are kept.
            start: the noisiest step that may be kept; default T.
            spacing: which are kept, for k = 1 to ``steps``. ``"trailing"``: floor(k start / steps), whose last is
                ``start`` itself, where sampling begins with noise. ``"leading"``: 1 + floor((k - 1) start / steps);
                that is every (T / steps)-th from the first, as in the code of post 9181, and sampling then begins with
                more noise than its first step expects.

        Returns:
            a schedule whose ``timesteps`` are those of the steps that were kept.

        >>> import supy
        >>> schedule = supy.diffusion.Schedule.su(10)
        >>> schedule.stride(4).timesteps.tolist()
        [1, 4, 6, 9]
        >>> schedule.stride(4, spacing="leading").timesteps.tolist()
        [0, 2, 5, 7]
        >>> schedule.stride(11)
        Traceback (most recent call last):
        ValueError: supy.Schedule.stride: steps is 11, expected 1 to 10
        """
        op = "Schedule.stride"
        start = self.T if start is None else start
        _check_steps(start, op, "start", self.T)
        _check_steps(steps, op, "steps", start)
        require(
            spacing in ("trailing", "leading"), op, f"spacing is {spacing!r}, expected 'trailing' or 'leading'"
        )
        if spacing == "trailing":
            kept = torch.arange(1, steps + 1) * start // steps
        else:
            kept = torch.arange(steps) * start // steps + 1
        return Schedule.from_alpha_bar(self.alpha_bar[kept], timesteps=self.timesteps[kept - 1])

    def to_dict(self) -> dict[str, list]:
        """What JSON can hold; `from_dict` gives the same schedule, to the bit.

        >>> import json, supy
        >>> schedule = supy.diffusion.Schedule.cosine(8).stride(3)
        >>> supy.diffusion.Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule
        True
        """
        return {"alpha": self.alpha[1:].tolist(), "timesteps": self.timesteps.tolist()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """From what `to_dict` returned; ValueError if it is anything else."""
        good = isinstance(values, dict) and values.keys() == {"alpha", "timesteps"}
        require(good, "Schedule.from_dict", "expected an object with alpha and timesteps")
        return cls(values["alpha"], timesteps=values["timesteps"])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Schedule):
            return NotImplemented
        return torch.equal(self.alpha, other.alpha) and torch.equal(self.timesteps, other.timesteps)

    __hash__ = None

    def __repr__(self) -> str:
        return f"Schedule({self.T} steps, alpha_bar {self.alpha_bar[1]:.4g} to {self.alpha_bar[-1]:.4g})"


def _other(part: torch.Tensor) -> torch.Tensor:
    """The square root of 1 - part^2, exact to the last digits where part is close to 1."""
    return ((1 - part) * (1 + part)).sqrt()


def _numbers(name: str, values: Numbers) -> torch.Tensor:
    """A float64 `[T]` tensor on the CPU, T at least 1."""
    try:
        tensor = torch.as_tensor(values, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"supy.Schedule: {name} is no array of numbers ({error})") from None
    tensor = tensor.detach().clone()
    good = tensor.ndim == 1 and len(tensor) > 0
    require(good, "Schedule", f"{name} has shape {list(tensor.shape)}, expected [T] with T at least 1")
    return tensor


def _check_steps(steps: int, op: str = "Schedule", name: str = "T", most: int | None = None) -> None:
    good = isinstance(steps, int) and not isinstance(steps, bool) and 1 <= steps <= (most or steps)
    require(good, op, f"{name} is {steps!r}, expected {f'1 to {most}' if most else 'an integer, at least 1'}")
