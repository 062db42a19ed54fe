"""From noise to pictures: ancestral sampling (DDPM), DDIM, and what steers them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from supy import ops
from supy._checks import Shapes, require
from supy.diffusion.prediction import check_prediction, predicted_eps, predicted_x0
from supy.diffusion.schedule import Schedule
from supy.diffusion.variance import learned_log_variance

BLOCK = 2**40
"""Step k of a sample draws its noise from the values k * BLOCK onwards of the stream that the seed names."""
KNOWN = 2**22
"""Step k draws the noise of known pixels from the block KNOWN + k."""


class Step(NamedTuple):
    """x_{k-1} = keep x_k + data x_0 + sigma noise, where x_0 is what the network predicts."""

    keep: float
    data: float
    sigma: float


class Sampler:
    """Samples from a network that was trained to undo a schedule's noise.

    Args:
        schedule: the schedule that the network was trained with, or one of its `Schedule.stride`.
        prediction: what the network returns: ``"eps"``, the noise; ``"x0"``, the picture; or ``"v"``, the velocity.
        clip: the predicted picture is clipped to [-clip, clip] at each step; None: it is not.
        threshold: dynamic thresholding (arXiv 2205.11487) at this quantile of the predicted picture's magnitudes;
            None: none.

    >>> import torch, supy
    >>> def model(x, t, labels=None):  # exact for pictures that are all 0.5
    ...     signal, noise = schedule.alpha_bar[t + 1].float(), schedule.beta_bar[t + 1].float()
    ...     return (x - 0.5 * signal.view(-1, 1, 1, 1)) / noise.view(-1, 1, 1, 1)
    >>> schedule = supy.diffusion.Schedule.su()
    >>> sampler = supy.diffusion.Sampler(schedule)
    >>> sampler.sample(model, (1, 1, 1, 2), steps=20, method="ddim", progress=False)
    tensor([[[[0.5000, 0.5000]]]])
    """

    def __init__(
        self,
        schedule: Schedule,
        prediction: str = "eps",
        *,
        clip: float | None = None,
        threshold: float | None = None,
    ):
        check_prediction("Sampler", prediction)
        if not isinstance(schedule, Schedule):
            raise TypeError(f"supy.Sampler: schedule is a {type(schedule).__name__}, expected a Schedule")
        self.schedule, self.prediction = schedule, prediction
        self._limits = {"clip": clip, "threshold": threshold}

    @torch.no_grad()
    def sample(
        self,
        model: nn.Module | Callable[..., torch.Tensor],
        shape: tuple[int, int, int, int],
        *,
        steps: int | None = None,
        method: str = "ddpm",
        sigma: str = "posterior",
        eta: float = 0.0,
        analytic: dict[int, float] | None = None,
        seed: int = 0,
        first: int = 0,
        x: torch.Tensor | None = None,
        init: torch.Tensor | None = None,
        start: int | None = None,
        labels: torch.Tensor | None = None,
        guidance: float = 1.0,
        no_label: int | None = None,
        known: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        callback: Callable[[int, int, torch.Tensor, torch.Tensor], bool | None] | None = None,
        check: bool = True,
        progress: bool = True,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """Draws pictures: float32 of this shape, which the caller clips to [-1, 1] and shows.

        Step k turns x_k into x_{k-1} = keep x_k + data x_0 + sigma z, with the x_0 that the network predicts, and
        keep = sqrt(beta_bar_{k-1}^2 - s^2) / beta_bar_k and data = alpha_bar_{k-1} - alpha_bar_k keep (kexue.fm posts
        9152 and 9181; arXiv 2006.11239, 2010.02502). With b = beta_k beta_bar_{k-1} / beta_bar_k, s is b for
        ``"ddpm"`` and eta b for ``"ddim"``.

        Args:
            model: ``model(x, t)`` or ``model(x, t, labels)`` with x `[B, C, H, W]`, t int64 `[B]` counted from 0 and
                labels int64 `[B]`; it returns what ``prediction`` says, `[B, C, H, W]`, or `[B, 2C, H, W]` with a
                learned variance. Its mode (``eval()``), dtype and autocast are the caller's business; x is float32.
            shape: (B, C, H, W).
            steps: how many calls of the network, spread as `Schedule.stride` says; default: every step up to ``start``.
            method: ``"ddpm"`` or ``"ddim"``.
            sigma: of ``"ddpm"``: ``"posterior"``, which is b, right for a single picture and good with few steps;
                ``"beta"``, right for white noise, and noisy with few steps; ``"zero"``; or ``"learned"``, from the
                network's second half (see `learned_variance_loss`).
            eta: of ``"ddim"``: 0, which is deterministic, to 1, which is ``"ddpm"`` with ``"posterior"``.
            analytic: what `estimate_variance` returned. The variance is then s^2 + data^2 Var(x_0 | x_k), the best one
                for the step (arXiv 2201.06503; post 9245).
            seed, first: they name the noise. Picture b has the noise of number first + b: a batch equals its parts to
                the bit where the network does. Value i of picture n at step k (0: where sampling begins) is number
                k 2^40 + n C H W + i of ``philox_normal`` with this seed. With fewer steps, k counts those.
            x: what sampling begins with; default: noise.
            init: pictures that are noised to step ``start`` and then sampled from there.
            start: the step to begin with, 1 to T; default T.
            labels: int64 `[B]`.
            guidance: w of classifier-free guidance (arXiv 2207.12598): (1 - w) model(no label) + w model(label), in
                one call with 2 B pictures; 1 is none.
            no_label: the label that means none; default ``model.config.classes``.
            known, mask: pictures and a bool mask that broadcast to ``shape``. Where the mask is True the result is
                ``known``; at each step those pixels are ``known`` with that step's noise.
            callback: ``callback(i, t, x, x0)`` after step i of 1 to ``steps``, with what the network was told, the new
                x (overwritten by the next step) and the predicted picture. Sampling stops, and x is returned, where
                it returns True.
            check: NaN or infinity from the network is a ValueError that names the first such step: at once on the CPU,
                and after the last step elsewhere, so that no step waits for the device.
            progress: shows a bar.
            device: default: that of ``x`` or ``init``, or of the model's parameters.

        Raises:
            ValueError, TypeError: an argument, or what the network returned, has a wrong shape or value.
        """
        op = "Sampler.sample"
        good = len(shape) == 4 and all(isinstance(size, int) and size >= 0 for size in shape)
        require(good, op, f"shape is {tuple(shape)}, expected (B, C, H, W)")
        schedule = self._schedule(op, steps, start)
        plan = plan_steps(schedule, method, sigma, eta, analytic)
        device = _device(model, x, init) if device is None else torch.device(device)
        size = math.prod(shape[1:])
        good = isinstance(first, int) and first >= 0 and (first + shape[0]) * size <= BLOCK
        require(good, op, f"first is {first!r}, expected 0 or more and at most 2^40 values of noise a step")

        def noise(block: int) -> dict[str, int]:
            return {"seed": seed, "offset": block * BLOCK + first * size}

        labels, no_label = _labels(model, labels, guidance, no_label, shape, device)
        hold = _known(schedule, known, mask, shape, device, noise)
        x = hold(self._begin(schedule, shape, device, x, init, noise), schedule.T)
        flags = []
        for i, k in enumerate(tqdm(range(schedule.T, 0, -1), desc="sampling", disable=not progress), 1):
            t = schedule.timesteps[k - 1].item()
            output, variance = _call(model, x, t, labels, guidance, no_label)
            require(
                sigma != "learned" or variance is not None,
                op,
                f"the network returned {output.shape[1]} channels, expected {2 * shape[1]} with a learned variance",
            )
            if check:
                flags.append(output.isfinite().all())
                if device.type == "cpu" and not flags[-1]:
                    break
            x0 = self._x0(schedule, k, x, output) if callback or self.prediction != "eps" else None
            x = self._move(schedule, k, plan[k], x, output, x0, noise(k))
            if sigma == "learned" and k > 1:
                deviation = (0.5 * learned_log_variance(schedule, variance, torch.tensor([k]))).exp()
                x.addcmul_(deviation, ops.philox_normal(shape, **noise(k), device=device))
            x = hold(x, k - 1)
            if callback and callback(i, t, x, x0):
                break
        _check_finite(op, schedule, flags)
        return x

    @torch.no_grad()
    def estimate_variance(
        self,
        model: nn.Module | Callable[..., torch.Tensor],
        batches: Iterable[torch.Tensor | tuple[torch.Tensor, torch.Tensor]],
        *,
        steps: int | None = None,
        start: int | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> dict[int, float]:
        """How uncertain the picture is at each step, for ``sample(analytic=...)``.

        The mean variance of x_0 given x_t is (beta_bar_t / alpha_bar_t)^2 (1 - E eps(x_t, t)^2), if eps is the best
        prediction (arXiv 2201.06503; post 9245). The result has the last factor, clipped to [0, 1], for each t that the
        network is told. It calls the network ``steps`` times a batch; some hundreds of pictures are enough.

        Args:
            model: as in `sample`.
            batches: training pictures `[B, C, H, W]`, or pairs of them and their labels.
            steps, start: as in `sample`; a result of more steps serves for those of its stride.
            seed: of the noise.

        >>> import torch, supy
        >>> schedule = supy.diffusion.Schedule.su()
        >>> def model(x, t):  # exact where the data is white noise
        ...     return x * schedule.beta_bar[t + 1].float().view(-1, 1, 1, 1)
        >>> batch = supy.ops.philox_normal((64, 3, 8, 8), 1)
        >>> sampler = supy.diffusion.Sampler(schedule)
        >>> found = sampler.estimate_variance(model, [batch], steps=2, start=400, progress=False)
        >>> {t: round(value, 1) for t, value in found.items()}  # alpha_bar^2
        {199: 0.7, 399: 0.2}
        """
        op = "Sampler.estimate_variance"
        schedule = self._schedule(op, steps, start)
        totals, count, values = None, 0, 0
        for batch in tqdm(batches, desc="estimating", disable=not progress):
            x0, labels = batch if isinstance(batch, (tuple, list)) else (batch, None)
            Shapes(op).match("batch", x0, "B C H W")
            x0 = x0.to(_device(model, x0), torch.float32)
            labels = None if labels is None else labels.to(x0.device)
            if totals is None:
                totals = torch.zeros(schedule.T, dtype=torch.float64, device=x0.device)
            for k in range(1, schedule.T + 1):
                level = schedule.alpha_bar[k].item(), schedule.beta_bar[k].item()
                x = ops.ddpm_add_noise(x0, *level, seed=seed, offset=k * BLOCK + values)[0]
                output = _call(model, x, schedule.timesteps[k - 1].item(), labels, 1.0, None)[0]
                totals[k - 1] += predicted_eps(self.prediction, output, x, *level).double().square().sum()
            values += x0.numel()
            count += len(x0)
        require(count > 0, op, "batches has no pictures, expected some")
        require(bool(totals.isfinite().all()), op, "the network returned NaN or infinity")
        factors = (1 - totals.cpu() / values).clamp(0, 1)
        return dict(zip(schedule.timesteps.tolist(), factors.tolist()))

    def _schedule(self, op: str, steps: int | None, start: int | None) -> Schedule:
        T = self.schedule.T
        for name, value, most in (("start", start, T), ("steps", steps, start or T)):
            good = value is None or (isinstance(value, int) and 1 <= value <= most)
            require(good, op, f"{name} is {value!r}, expected 1 to {most}")
        require(T < KNOWN, op, f"the schedule has {T} steps, expected fewer than {KNOWN}")
        if steps is None and start is None:
            return self.schedule
        return self.schedule.stride(steps or start, start=start)

    def _begin(self, schedule, shape, device, x, init, noise) -> torch.Tensor:
        """x_T: what was given, or pictures with noise, or noise."""
        op = "Sampler.sample"
        require(x is None or init is None, op, "x and init are both given, expected one")
        for name, given in (("x", x), ("init", init)):
            if given is not None:
                Shapes(op).floating(name, given)
                same = given.shape == torch.Size(shape)
                require(same, op, f"{name} has shape {list(given.shape)}, expected {list(shape)} (from shape)")
        if x is not None:
            return x.detach().to(device, torch.float32, copy=True)
        if init is not None:
            init = init.detach().to(device, torch.float32)
            return ops.ddpm_add_noise(init, schedule.alpha_bar[-1].item(), schedule.beta_bar[-1].item(), **noise(0))[0]
        return ops.philox_normal(shape, **noise(0), device=device)

    def _x0(self, schedule: Schedule, k: int, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The predicted picture, clipped."""
        signal, spread = schedule.alpha_bar[k].item(), schedule.beta_bar[k].item()
        if self.prediction == "eps":
            return ops.ddim_step(x, output, signal, 1.0, **self._limits)
        x0 = predicted_x0(self.prediction, output, x, signal, spread)
        # From no noise to no noise, the step is the clipping alone.
        return ops.ddim_step(x0, x0, 1.0, 1.0, **self._limits) if any(self._limits.values()) else x0

    def _move(self, schedule, k, step: Step, x, output, x0, noise: dict[str, int]) -> torch.Tensor:
        """x_{k-1}, written over x_k."""
        drawn = noise if step.sigma > 0 else {}
        if self.prediction == "eps":
            alpha, beta_bar = schedule.alpha[k].item(), schedule.beta_bar[k].item()
            # The formula of DDPM with this beta keeps step.keep of x. With s = b it is the schedule's own.
            beta = beta_bar * math.sqrt(max(1 - alpha * step.keep, 0.0))
            return ops.ddpm_step(x, output, alpha, beta, beta_bar, step.sigma, **drawn, **self._limits, out=x)
        # Not through eps: its x_0 is divided by alpha_bar, which magnifies rounding where alpha_bar is small.
        x = ops.ddpm_add_noise(x0, step.data, step.keep, noise=x, out=x)[0]
        return ops.ddpm_step(x, x, 1.0, 0.0, 1.0, step.sigma, **drawn, out=x) if drawn else x


def plan_steps(
    schedule: Schedule, method: str, sigma: str, eta: float, analytic: dict[int, float] | None = None
) -> list[Step]:
    """What each step multiplies x and x_0 with, and its noise; entry 0 is unused."""
    op = "Sampler.sample"
    require(method in ("ddpm", "ddim"), op, f"method is {method!r}, expected 'ddpm' or 'ddim'")
    sigmas = ("posterior", "beta", "zero", "learned")
    require(sigma in sigmas, op, f"sigma is {sigma!r}, expected one of {', '.join(map(repr, sigmas))}")
    good = sigma == "posterior" or (method == "ddpm" and analytic is None)
    require(good, op, f"sigma is {sigma!r}, expected 'posterior' with 'ddim' or an analytic variance")
    require(0 <= eta <= 1, op, f"eta is {eta}, expected 0 to 1")
    require(method == "ddim" or eta == 0, op, f"eta is {eta}, expected 0 with 'ddpm'")

    signal, noise = schedule.alpha_bar, schedule.beta_bar
    s = schedule.posterior_sigma * (eta if method == "ddim" else 1)
    keep = (noise[:-1] ** 2 - s[1:] ** 2).clamp(min=0).sqrt() / noise[1:]
    data = signal[:-1] - signal[1:] * keep
    drawn = {"posterior": s, "beta": schedule.beta}.get(sigma, torch.zeros_like(s))[1:]
    if analytic is not None:
        lacking = [t for t in schedule.timesteps.tolist() if t not in analytic]
        require(not lacking, op, f"analytic has no t = {lacking[:1]}, expected the steps of this schedule")
        factor = torch.tensor([analytic[t] for t in schedule.timesteps.tolist()], dtype=torch.float64)
        drawn = (drawn**2 + data**2 * (noise[1:] / signal[1:]) ** 2 * factor).sqrt()
    rows = zip(keep.tolist(), data.tolist(), drawn.tolist())
    return [Step(1.0, 0.0, 0.0), *(Step(*row) for row in rows)]


def spherical_mix(a: torch.Tensor, b: torch.Tensor, weight: float | torch.Tensor) -> torch.Tensor:
    """a cos(w pi / 2) + b sin(w pi / 2): noise between two noises, as strong as they are (post 9181; arXiv 2010.02502).

    Sampled with ``"ddim"``, it shows pictures between theirs. To mix two pictures instead, hand
    ``init=torch.lerp(a, b, w)`` and a middle ``start`` to `Sampler.sample` (arXiv 2006.11239, section 4.3).

    Args:
        a, b: `[B, ...]`. weight: a float or `[B]`, 0 (``a``) to 1 (``b``).

    >>> import torch, supy
    >>> supy.diffusion.spherical_mix(torch.ones(2), torch.zeros(2), 0.5)
    tensor([0.7071, 0.7071])
    """
    require(a.shape == b.shape, "spherical_mix", f"b has shape {list(b.shape)}, expected {list(a.shape)} (from a)")
    if isinstance(weight, torch.Tensor):
        weight = weight.to(a).view(-1, *[1] * (a.ndim - 1))
        return a * (weight * (math.pi / 2)).cos() + b * (weight * (math.pi / 2)).sin()
    return a * math.cos(weight * math.pi / 2) + b * math.sin(weight * math.pi / 2)


def _call(model, x, t: int, labels, guidance: float, no_label: int | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the network predicts and what it says about the variance, float32 `[B, C, H, W]` each, guided."""
    told = torch.full((len(x),), t, dtype=torch.int64, device=x.device)
    guided = labels is not None and guidance != 1
    if labels is None:
        output = model(x, told)
    elif not guided:
        output = model(x, told, labels)
    else:
        labels = torch.cat([labels, torch.full_like(labels, no_label)])
        output = model(torch.cat([x, x]), torch.cat([told, told]), labels)
    B, C, H, W = x.shape
    count = 2 * B if guided else B
    got = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    good = got in ([count, C, H, W], [count, 2 * C, H, W])
    require(good, "Sampler", f"the network returned {got}, expected {[count, C, H, W]} or twice the channels")
    output, variance = output[:, :C].float(), output[:, C:].float() if output.shape[1] > C else None
    if guided:
        output = torch.lerp(output[B:], output[:B], guidance)
        variance = None if variance is None else variance[:B]
    return output, variance


def _device(model, *tensors: torch.Tensor | None) -> torch.device:
    for tensor in tensors:
        if tensor is not None:
            return tensor.device
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next((parameter.device for parameter in parameters), torch.device("cpu"))


def _labels(
    model, labels, guidance: float, no_label: int | None, shape, device
) -> tuple[torch.Tensor | None, int | None]:
    """The labels on the device, and the number of the label that means none where guidance needs it."""
    op = "Sampler.sample"
    if labels is None:
        require(guidance == 1, op, f"guidance is {guidance}, expected 1 without labels")
        return None, None
    shapes = Shapes(op)
    shapes.match("labels", labels, "B", torch.int64)
    require(len(labels) == shape[0], op, f"labels has shape {list(labels.shape)}, expected [{shape[0]}] (from shape)")
    if no_label is None and guidance != 1:
        no_label = getattr(getattr(model, "config", None), "classes", None)
        known = isinstance(no_label, int)
        require(known, op, "no_label is missing, expected one with guidance: model.config has no classes")
    return labels.to(device), no_label


def _known(schedule: Schedule, known, mask, shape, device, noise) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """A function that puts the known pixels into x_k, with as much noise as x_k has."""
    op = "Sampler.sample"
    require((known is None) == (mask is None), op, "one of known and mask is missing, expected both or none")
    if known is None:
        return lambda x, k: x
    for name, given in (("known", known), ("mask", mask)):
        Shapes(op).tensor(name, given)
        try:
            fits = torch.broadcast_shapes(given.shape, shape) == torch.Size(shape)
        except RuntimeError:
            fits = False
        require(fits, op, f"{name} has shape {list(given.shape)}, expected one that broadcasts to {list(shape)}")
    if mask.dtype != torch.bool:
        raise TypeError(f"supy.{op}: mask has dtype {mask.dtype}, expected torch.bool")
    known = known.detach().to(device, torch.float32).expand(shape).contiguous()
    mask = mask.to(device)

    def hold(x: torch.Tensor, k: int) -> torch.Tensor:
        if k == 0:
            return torch.where(mask, known, x)
        level = schedule.alpha_bar[k].item(), schedule.beta_bar[k].item()
        return torch.where(mask, ops.ddpm_add_noise(known, *level, **noise(KNOWN + k))[0], x)

    return hold


def _check_finite(op: str, schedule: Schedule, flags: list[torch.Tensor]) -> None:
    """Raises for the first step whose flag is not set."""
    good = torch.stack(flags).tolist() if flags else []
    if not all(good):
        i = good.index(False) + 1
        t = schedule.timesteps[-i].item()
        raise ValueError(f"supy.{op}: the network returned NaN or infinity at step {i} of {schedule.T} (t = {t})")
