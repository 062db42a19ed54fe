"""Schedulers for the pipelines of Hugging Face's diffusers that compute with supy's steps."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Self

import diffusers
import torch
from diffusers import SchedulerMixin
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput

from supy import ops
from supy._checks import require
from supy.diffusion.prediction import predicted_eps, predicted_x0
from supy.diffusion.schedule import Schedule

PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}

Generators = torch.Generator | list[torch.Generator] | None


class _Steps(SchedulerMixin):  # by that name in this module, diffusers knows how to load what a pipeline saved
    """What both have in common: noising, the predicted picture, and the noise of a step."""

    @classmethod
    def from_schedule(cls, schedule: Schedule, **config) -> Self:
        """A scheduler with the noise of a `Schedule`; ``config`` has diffusers' names.

        >>> import supy
        >>> schedule = supy.diffusion.Schedule.su(100)
        >>> scheduler = supy.diffusion.DDIMScheduler.from_schedule(schedule, clip_sample=False)
        >>> len(scheduler), round(scheduler.alphas_cumprod[-1].sqrt().item() / schedule.alpha_bar[-1].item(), 4)
        (100, 1.0)
        """
        return cls(num_train_timesteps=schedule.T, trained_betas=schedule.betas.tolist(), **config)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t, of each sample's own t of ``timesteps``, int64 `[B]` or one for all."""
        t = timesteps.flatten().to(self._squares.device)
        signal, spread = self._squares[t].sqrt(), (1 - self._squares[t]).sqrt()
        if len(t) == 1:
            signal, spread = signal[0], spread[0]
        return ops.ddpm_add_noise(original_samples, signal, spread, noise=noise.to(original_samples.dtype))[0]

    @cached_property
    def _squares(self) -> torch.Tensor:
        """float64 `[T]` on the CPU: alphas_cumprod, where reading a number waits for no device."""
        return self.alphas_cumprod.double().cpu()

    def _level(self, t: int) -> tuple[float, float]:
        square = self._squares[t].item()
        return math.sqrt(square), math.sqrt(1 - square)

    def _x0(self, x: torch.Tensor, output: torch.Tensor, t: int) -> torch.Tensor:
        """The predicted picture, clipped as the config says."""
        config, (signal, spread) = self.config, self._level(t)
        kind = config.prediction_type
        known = kind in PREDICTIONS
        require(known, type(self).__name__, f"prediction_type is {kind!r}, expected one of {[*PREDICTIONS]}")
        clip = config.clip_sample_range if config.clip_sample and not config.thresholding else None
        if kind == "epsilon" and signal > 0:
            x0 = ops.ddim_step(x, output, signal, 1.0, clip=clip)
        else:
            x0 = predicted_x0(PREDICTIONS[kind], output, x, signal, spread)
            x0 = x0 if clip is None else x0.clamp(-clip, clip)
        return self._threshold_sample(x0) if config.thresholding else x0

    def _add(self, x: torch.Tensor, sigma: float, generator: Generators) -> torch.Tensor:
        """x + sigma noise, written over x."""
        if isinstance(generator, list) and len(generator) > 1:
            return x.add_(_noise(x, generator), alpha=sigma)
        return ops.ddpm_step(x, x, 1.0, 0.0, 1.0, sigma, **_stream(generator, x.numel()), out=x)


class DDPMScheduler(_Steps, diffusers.DDPMScheduler):
    """diffusers' ``DDPMScheduler`` with supy's steps: the same config, files, timesteps and results, but for the noise.

    The noise is that of ``philox_normal``. Its seed comes from the generator that the pipeline hands over, or from
    ``torch.manual_seed``: the same generator gives the same pictures, but not those of diffusers' own class.
    Needs diffusers.

    >>> import torch, supy
    >>> scheduler = supy.diffusion.DDPMScheduler(num_train_timesteps=100, clip_sample=False)
    >>> scheduler.set_timesteps(10)
    >>> x, eps = torch.ones(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)
    >>> for t in scheduler.timesteps:
    ...     x = scheduler.step(eps, t, x, generator=torch.Generator().manual_seed(0)).prev_sample
    >>> x.shape
    torch.Size([1, 3, 8, 8])
    """

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """x_{t-1} and the predicted picture, as in diffusers (arXiv 2006.11239, equation 7)."""
        t = int(timestep)
        previous = int(self.previous_timestep(t))
        learned = None
        if self.variance_type in ("learned", "learned_range"):
            model_output, learned = model_output.chunk(2, 1)
        now, before = self._squares[t].item(), self._squares[previous].item() if previous >= 0 else 1.0
        beta = 1 - now / before  # diffusers names the squares
        x0 = self._x0(sample, model_output.to(sample.dtype), t)
        data, keep = math.sqrt(before) * beta / (1 - now), math.sqrt(now / before) * (1 - before) / (1 - now)
        x = ops.ddpm_add_noise(x0, data, keep, noise=sample)[0]
        if t > 0 and learned is not None:
            variance = self._get_variance(t, predicted_variance=learned)
            sigma = (0.5 * variance).exp() if self.variance_type == "learned_range" else variance.sqrt()
            x.add_(sigma * _noise(x, generator))
        elif t > 0:
            large = self.variance_type.startswith("fixed_large")
            variance = beta if large else max((1 - before) / (1 - now) * beta, 1e-20)
            x = self._add(x, math.sqrt(variance), generator)
        return DDPMSchedulerOutput(prev_sample=x, pred_original_sample=x0) if return_dict else (x, x0)


class DDIMScheduler(_Steps, diffusers.DDIMScheduler):
    """diffusers' ``DDIMScheduler`` with supy's steps: the same config, files, timesteps and results, but for the noise.

    A ``DDIMPipeline`` makes a scheduler of its own from the one that it is given; put this one in its place::

        pipe.scheduler = supy.diffusion.DDIMScheduler.from_config(pipe.scheduler.config)

    Noise, which only ``eta`` above 0 asks for, is as in `DDPMScheduler`. Needs diffusers.

    >>> import torch, supy
    >>> scheduler = supy.diffusion.DDIMScheduler(num_train_timesteps=100, clip_sample=False)
    >>> scheduler.set_timesteps(10)
    >>> x = torch.full((1, 3, 8, 8), 0.5)
    >>> for t in scheduler.timesteps:
    ...     x = scheduler.step(torch.zeros_like(x), t, x).prev_sample
    >>> round(x.max().item() * scheduler.alphas_cumprod[90].sqrt().item(), 4)
    0.5
    """

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = False,
        generator: Generators = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """x of the timestep before and the predicted picture, as in diffusers (arXiv 2010.02502, equation 12)."""
        op, t = "DDIMScheduler.step", int(timestep)
        begun = self.num_inference_steps is not None
        require(begun, op, "set_timesteps was not called, expected it before the first step")
        given = variance_noise is not None and generator is not None
        require(not given, op, "got both generator and variance_noise, expected one of them")
        previous = t - self.config.num_train_timesteps // self.num_inference_steps
        signal, spread = self._level(t)
        before = self._squares[previous].item() if previous >= 0 else self.final_alpha_cumprod.item()
        output = model_output.to(sample.dtype)
        x0 = self._x0(sample, output, t)
        if use_clipped_model_output:
            eps = predicted_eps("x0", x0, sample, signal, spread)
        else:
            eps = predicted_eps(PREDICTIONS[self.config.prediction_type], output, sample, signal, spread)
        sigma = eta * math.sqrt(max((1 - before) * (1 - signal**2 / before), 0.0)) / spread
        x = ops.ddpm_add_noise(x0, math.sqrt(before), math.sqrt(max(1 - before - sigma**2, 0.0)), noise=eps)[0]
        if eta > 0:
            x = self._add(x, sigma, generator) if variance_noise is None else x.add_(variance_noise, alpha=sigma)
        return DDIMSchedulerOutput(prev_sample=x, pred_original_sample=x0) if return_dict else (x, x0)


def _noise(x: torch.Tensor, generator: Generators) -> torch.Tensor:
    """A tensor of noise like x; with a list of generators, a sample from each."""
    if isinstance(generator, list) and len(generator) > 1:
        count = len(generator)
        require(count == len(x), "diffusion", f"got {count} generators, expected {len(x)}, one a sample")
        return torch.cat([_noise(x[i : i + 1], each) for i, each in enumerate(generator)])
    return ops.philox_normal(x.shape, **_stream(generator, x.numel()), dtype=x.dtype, device=x.device)


def _stream(generator: Generators, count: int) -> dict[str, int]:
    """Where the generator's next ``count`` numbers are in a Philox stream."""
    if isinstance(generator, list):
        generator = generator[0]
    if generator is not None and generator.device.type == "cuda":  # a Philox itself; drawing a seed would wait for it
        seed, offset = generator.initial_seed(), generator.get_offset()
        generator.set_offset(offset + (count + 3) // 4 * 4)
        return {"seed": seed - 2**64 if seed >= 2**63 else seed, "offset": offset}
    return {"seed": torch.randint(2**63 - 1, (), generator=generator).item(), "offset": 0}
