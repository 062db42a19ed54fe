"""The training loop: ordinary PyTorch, meant to be read and copied.

Every random choice follows from (seed, step), so a run that was killed goes on from its last checkpoint and ends with
the same weights as one that was not.
"""

from __future__ import annotations

import json
import logging
import math
import time
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from supy._checkpoint import Checkpoint, load_optimizer, optimizer_tensors
from supy._checks import require
from supy._device import multiplies_bf16
from supy.diffusion.data import Images
from supy.diffusion.model import DiffusionModel
from supy.diffusion.pictures import grid, save_loss_curve, save_png
from supy.optim import Lamb, ddpm_schedule, lamb_groups, warm_average

log = logging.getLogger(__name__)

SAVE_EVERY = 60  # seconds between checkpoints
SAMPLES = 64  # of a grid


@dataclass(frozen=True)
class TrainingOptions:
    """How :func:`train` trains.

    steps: of the optimiser. batch_size: images a step, of which ``accumulate`` equal parts go through the network one
    after another. optimizer: "lamb", or "adam", which `supy.models.UNet` wants in runs of thousands of steps.
    learning_rate: its peak, by default 2e-2 for LAMB and 1e-3 for Adam. It rises for the first tenth of the steps, falls
    to a half of the peak in the middle and to a tenth at the end, in straight lines, as published for 4,000, 20,000 and
    40,000 steps; there LAMB's peak is 1e-3, with which a run of a tenth as many steps has hardly begun. average: decay of the moving
    average of the weights, which is what is kept; it is shorter at first, (1 + step) / (10 + step). flips: half of the
    images are mirrored. unlabelled: part of the labels that is hidden, so that the network also learns what guidance
    needs. bf16: autocast to bfloat16; None: where the device multiplies in it. pictures: how often during the run a
    sample grid is drawn. seed: of everything random.
    """

    steps: int = 4000
    batch_size: int = 64
    accumulate: int = 1
    optimizer: str = "lamb"
    learning_rate: float | None = None
    average: float = 0.9999
    flips: bool = False
    unlabelled: float = 0.1
    bf16: bool | None = None
    pictures: int = 10
    seed: int = 0

    def __post_init__(self):
        op = "diffusion.TrainingOptions"
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", 2e-2 if self.optimizer == "lamb" else 1e-3)
        for name, good, wanted in (
            ("steps", self.steps >= 1, "at least 1"),
            ("accumulate", 1 <= self.accumulate and self.batch_size % self.accumulate == 0, "a divisor of batch_size"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("optimizer", self.optimizer in ("lamb", "adam"), "lamb or adam"),
            ("learning_rate", 0 < self.learning_rate < math.inf, "above 0"),
            ("average", 0 <= self.average < 1, "0 to below 1"),
            ("unlabelled", 0 <= self.unlabelled <= 1, "0 to 1"),
            ("pictures", self.pictures >= 0, "0 or more"),
            ("seed", 0 <= self.seed < 2**31, "0 to 2^31 - 1"),
        ):
            require(good, op, f"{name} is {getattr(self, name)}, expected {wanted}")


def train(
    model: DiffusionModel,
    images: Images,
    options: TrainingOptions = TrainingOptions(),
    *,
    folder: Path | str | None = None,
    progress: bool = True,
) -> DiffusionModel:
    """Trains ``model.network`` to predict what ``model.prediction`` says, and returns a model of the averaged weights.

    The loss is the sum of squared errors over a picture, averaged over the batch: the mean over pixels is thousands of
    times smaller, and in low precision, or beside an optimiser's epsilon, gradients of that size vanish (post 9152).

    folder: keeps the run's state, from which the same call goes on if it was killed, and at each of
    ``options.pictures`` moments the model, a grid of samples and the loss curve, as they are then.

    Raises:
        FloatingPointError: the loss is not a finite number; the message names the step.
        ValueError: the images do not fit the model, or ``folder`` holds the state of another run.
    """
    model.check(images)
    network, schedule = model.network, model.schedule
    if (left := schedule.alpha_bar[-1].item()) > 0.1:
        log.warning(
            "after %d steps of noise, %.0f %% of a picture is still there, but sampling begins with noise alone; "
            "more steps or the cosine schedule help", schedule.T, 100 * left
        )  # fmt: skip
    device = next(network.parameters()).device
    bf16 = multiplies_bf16(device) if options.bf16 is None else options.bf16
    average = AveragedModel(network, multi_avg_fn=warm_average(options.average)).eval()
    adapted = options.optimizer == "lamb"  # without adaptation LAMB is Adam
    optimizer = Lamb(lamb_groups(network) if adapted else network.parameters(), adapt=adapted)
    first, losses = 0, []
    checkpoint = Checkpoint(folder, _settings(model, images, options)) if folder else None
    if checkpoint and (saved := checkpoint.load()):
        tensors, state = saved
        network.load_state_dict(tensors["network"])
        average.load_state_dict(tensors["average"])
        load_optimizer(optimizer, tensors["optimizer"])
        first, losses = state["step"], tensors["run"]["losses"].tolist()
        log.info("going on after step %d of %s", first, checkpoint.path)
    result = replace(model, network=average.module)
    network.train()
    saved_at = time.monotonic()
    with tqdm(total=options.steps, initial=first, desc="training", unit="step", disable=not progress) as bar:
        for step in range(first, options.steps):
            draws = torch.Generator().manual_seed((options.seed << 32) + step)
            rows = torch.randint(len(images), (options.batch_size,), generator=draws)
            flip = torch.rand(options.batch_size, generator=draws) < 0.5 if options.flips else None
            x0 = images.batch(rows, flip)
            t = torch.randint(schedule.T, (options.batch_size,), generator=draws)
            labels = None
            if model.classes:
                hidden = torch.rand(options.batch_size, generator=draws) < options.unlabelled
                labels = images.labels[rows].masked_fill(hidden, model.classes)

            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * ddpm_schedule(step + 1, options.steps)
            optimizer.zero_grad()
            total = 0.0
            size = options.batch_size // options.accumulate
            for start in range(0, options.batch_size, size):
                part = slice(start, start + size)
                offset = (step * options.batch_size + start) * x0[0].numel()
                loss = model.loss(
                    x0[part].to(device),
                    t[part].to(device),
                    None if labels is None else labels[part].to(device),
                    seed=options.seed,
                    offset=offset,
                    bf16=bf16,
                )
                (loss / options.accumulate).backward()
                total += loss.item() / options.accumulate
            if not math.isfinite(total):
                raise FloatingPointError(
                    f"supy.diffusion: the loss is {total} in step {step + 1}; try a learning rate below "
                    f"{options.learning_rate}"
                )
            optimizer.step()
            average.update_parameters(network)
            losses.append(total)
            bar.update()
            bar.set_postfix(loss=f"{sum(losses[-100:]) / len(losses[-100:]):.4g}", refresh=False)

            done = step + 1
            drawn = options.pictures and done % max(1, options.steps // options.pictures) == 0 or done == options.steps
            if folder and drawn:
                result.save(folder)
                _draw(result, losses, done, Path(folder), options)
            if checkpoint and done < options.steps and (drawn or time.monotonic() - saved_at > SAVE_EVERY):
                saved_at = time.monotonic()
                tensors = {"network": network.state_dict(), "average": average.state_dict()}
                tensors |= {"optimizer": optimizer_tensors(optimizer), "run": {"losses": torch.tensor(losses)}}
                checkpoint.save(tensors, {"step": done})
    if checkpoint:
        checkpoint.remove()
    return result


def _settings(model: DiffusionModel, images: Images, options: TrainingOptions) -> dict:
    """What the weights of a run depend on."""
    crc = zlib.crc32(images.pixels.numpy())
    crc = crc if images.labels is None else zlib.crc32(images.labels.numpy(), crc)
    settings = {"training data": f"{len(images)} images, crc {crc:08x}", "model": model.config()}
    settings |= {"network": asdict(model.network.config), "training options": asdict(options)}
    return json.loads(json.dumps(settings))


def _draw(model: DiffusionModel, losses: list[float], step: int, folder: Path, options: TrainingOptions) -> None:
    """Sample grid and loss curve; one line instead where a library is missing."""
    try:
        samples = model.sample(SAMPLES, steps=min(50, model.schedule.T), seed=options.seed, progress=False)
        save_png(folder / f"samples-{step:06d}.png", grid(samples))
        size = max(1, len(losses) // 200)  # steps of one point
        points = [sum(losses[i : i + size]) / size for i in range(0, len(losses) - size + 1, size)]
        save_loss_curve(folder / "loss.png", range(size, len(losses) + 1, size), points)
    except ImportError as error:
        log.warning("%s", error)
