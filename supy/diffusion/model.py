"""A network with what it was trained for: enough to train it, to sample from it and to keep it in a folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from supy._checkpoint import ModelError, write_atomically
from supy._checks import require
from supy.diffusion.data import Images, to_pixels
from supy.diffusion.prediction import check_prediction, training_target
from supy.diffusion.sampler import Sampler
from supy.diffusion.schedule import Schedule
from supy.diffusion.variance import learned_variance_loss
from supy.models import PatchGAU, PostNormUNet, UNet
from supy.models._denoiser import Denoiser
from supy.ops import ddpm_add_noise

FORMAT = 1
FILE = "diffusion.json"
NETWORKS = {"post-norm-unet": PostNormUNet, "unet": UNet, "patch-gau": PatchGAU}


@dataclass(frozen=True)
class DiffusionModel:
    """A network that undoes noise, and the noise that it undoes.

    network: one of `supy.models`, whose config says channels, classes and, by twice as many ``out_channels``, whether
    it predicts a variance. schedule: T steps of noise, as many as the network knows. prediction: "eps", "x0" or "v".
    size: the side of its pictures.

    >>> import supy
    >>> network = supy.models.UNet(supy.models.UNetConfig.small(8, channels=1, base=8, steps=20))
    >>> model = supy.diffusion.DiffusionModel(network, supy.diffusion.Schedule.su(20), size=8)
    >>> model.sample(4, progress=False).shape
    torch.Size([4, 1, 8, 8])
    """

    network: Denoiser
    schedule: Schedule
    prediction: str = "eps"
    size: int = 32

    def __post_init__(self):
        check_prediction("DiffusionModel", self.prediction)
        size = self.size
        require(isinstance(size, int) and size >= 1, "DiffusionModel", f"size is {size!r}, expected at least 1")
        steps, T = self.network.config.steps, self.schedule.T
        require(steps == T, "DiffusionModel", f"the schedule has {T} steps, the network's config {steps}")

    @property
    def channels(self) -> int:
        return self.network.config.channels

    @property
    def classes(self) -> int:
        return self.network.config.classes

    @property
    def learned_variance(self) -> bool:
        return self.network.config.out_channels == 2 * self.channels

    def loss(
        self,
        x0: torch.Tensor,
        t: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        seed: int,
        offset: int = 0,
        bf16: bool = False,
    ) -> torch.Tensor:
        """The sum of squared errors over a picture, averaged over the batch; float32.

        Args:
            x0: pictures `[B, C, S, S]`, -1 to 1. t: int64 `[B]`, 0 to T - 1. labels: int64 `[B]`; K for none.
            seed, offset: of the noise (`supy.ops.philox_normal`). bf16: autocast to bfloat16.
        """
        tables = self.schedule.alpha_bar, self.schedule.beta_bar
        alpha_bar, beta_bar = (table[t.cpu() + 1].to(x0.device) for table in tables)
        x, noise = ddpm_add_noise(x0, alpha_bar, beta_bar, seed=seed, offset=offset)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            output = self.network(x, t, labels)
        output = output.float()
        if self.learned_variance:
            losses = learned_variance_loss(self.schedule, output, x0, noise, t, prediction=self.prediction)
            return losses.mean() * x0[0].numel()
        target = training_target(self.prediction, x0, noise, alpha_bar, beta_bar)
        return (output - target).square().sum() / len(x0)

    def sample(
        self,
        count: int = 64,
        *,
        steps: int | None = None,
        method: str = "ddpm",
        sigma: str | None = None,
        eta: float = 0.0,
        seed: int = 0,
        labels: torch.Tensor | int | None = None,
        guidance: float = 1.0,
        clip: float | None = 1.0,
        batch_size: int = 64,
        progress: bool = True,
    ) -> torch.Tensor:
        """Pictures, uint8 `[count, C, S, S]`. Picture n depends on the seed and n alone, up to the network's rounding.

        Args:
            steps: calls of the network; default: T, at most 100.
            method, sigma, eta, guidance: see `Sampler.sample`; sigma is by default "learned" for such a model.
            labels: of each picture, int64 `[count]`, or of all; default: each class in turn, if the model has classes.
            clip: see `Sampler`. batch_size: pictures at a time.

        Raises:
            ValueError: an argument is out of range, or the network returned NaN.
        """
        op = "DiffusionModel.sample"
        require(count >= 1 and batch_size >= 1, op, f"count is {count}, batch_size {batch_size}; expected at least 1")
        if self.classes and labels is None:
            labels = torch.arange(count) % self.classes
        elif isinstance(labels, int):
            labels = torch.full((count,), labels)
        if labels is not None:
            good = len(labels) == count and self.classes > 0 and 0 <= labels.min() <= labels.max() < self.classes
            wanted = f"{count} of 0 to {self.classes - 1}" if self.classes else "none: the model has no classes"
            require(good, op, f"labels are {labels.tolist()[:5]} ..., expected {wanted}")
        sigma = sigma or ("learned" if self.learned_variance and method == "ddpm" else "posterior")
        steps = steps or min(100, self.schedule.T)
        sampler = Sampler(self.schedule, self.prediction, clip=clip)
        device = next(self.network.parameters()).device
        drawn = []
        for first in range(0, count, batch_size):
            part = slice(first, min(first + batch_size, count))
            x = sampler.sample(
                self.network,
                (part.stop - first, self.channels, self.size, self.size),
                steps=steps,
                method=method,
                sigma=sigma,
                eta=eta,
                seed=seed,
                first=first,
                labels=None if labels is None else labels[part].to(device),
                guidance=guidance,
                progress=progress,
            )
            drawn.append(to_pixels(x).cpu())
        return torch.cat(drawn)

    def config(self) -> dict[str, Any]:
        """What `save` writes beside the network, with the network's own config, in JSON's types."""
        values = {"format": FORMAT, "network": type(self.network).model_type, "prediction": self.prediction}
        return {**values, "size": self.size, "schedule": self.schedule.to_dict()}

    def save(self, folder: Path | str) -> None:
        """Writes diffusion.json and the network's files, each to a temporary file that is then renamed."""
        self.network.save_pretrained(folder)
        text = json.dumps(self.config(), indent=1) + "\n"
        write_atomically(Path(folder) / FILE, text.encode())

    @classmethod
    def load(cls, folder: Path | str, *, device: torch.device | str | None = None) -> Self:
        """Reads what `save` wrote, in evaluation mode; default device: CUDA where there is one, else the CPU.

        Raises:
            supy.diffusion.ModelError: a ValueError; a file is missing or damaged, or the model is of another kind.
        """
        path = Path(folder) / FILE
        try:
            config = json.loads(path.read_bytes())
            if config["format"] != FORMAT:
                raise ValueError(f"format {config['format']}, this supy reads {FORMAT}")
            kinds = {kind.model_type: kind for kind in NETWORKS.values()}
            network = kinds[config["network"]].from_pretrained(folder)
            model = cls(network, Schedule.from_dict(config["schedule"]), config["prediction"], config["size"])
        except FileNotFoundError:
            raise ModelError(f"{path}: expected a diffusion model, found none") from None
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise ModelError(f"{folder}: not a diffusion model of this supy ({str(error) or error!r})") from error
        network.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return model

    def check(self, images: Images) -> None:
        """ValueError unless the images are what the network reads."""
        shape, wanted = list(images.pixels.shape[1:]), [self.channels, self.size, self.size]
        require(shape == wanted, "diffusion.train", f"images have shape {shape}, the model is for {wanted}")
        fits = not self.classes or 0 < images.classes <= self.classes
        require(fits, "diffusion.train", f"images have {images.classes} classes, the model {self.classes}")


def new_model(
    images: Images,
    network: str = "post-norm-unet",
    *,
    width: int | None = None,
    schedule: Schedule | None = None,
    prediction: str = "eps",
    learned_variance: bool = False,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> DiffusionModel:
    """A model for these images, of a size that trains on a CPU, with random weights.

    Args:
        network: "post-norm-unet", "unet" or "patch-gau", see `supy.models`.
        width: of the network; default: 32 for a U-Net, 192 for patch-gau.
        schedule: default `Schedule.su()`.
    """
    op, schedule = "diffusion.new_model", schedule or Schedule.su()
    require(network in NETWORKS, op, f"network is {network!r}, expected {', '.join(map(repr, NETWORKS))}")
    size, channels = images.pixels.shape[2], images.pixels.shape[1]
    sizes = {"channels": channels, "classes": images.classes, "steps": schedule.T}
    sizes["out_channels"] = 2 * channels if learned_variance else channels
    sizes |= {"hidden_size": width or 192} if network == "patch-gau" else {"base": width or 32}
    kind = NETWORKS[network]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = kind(kind.Config.small(size, **sizes))
    network.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return DiffusionModel(network, schedule, prediction, size)
