"""Diffusion: noise schedules, sampling, training and pictures."""

from supy._checkpoint import ModelError
from supy.diffusion.data import Images, read_images
from supy.diffusion.model import DiffusionModel, new_model
from supy.diffusion.pictures import (
    compare,
    frechet_distance,
    grid,
    nearest,
    neighbour_sheet,
    save_loss_curve,
    save_png,
)
from supy.diffusion.prediction import predicted_eps, predicted_x0, training_target
from supy.diffusion.sampler import Sampler, spherical_mix
from supy.diffusion.schedule import Schedule
from supy.diffusion.training import TrainingOptions, train
from supy.diffusion.variance import learned_log_variance, learned_variance_loss, variational_bound

__all__ = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DiffusionModel",
    "Images",
    "ModelError",
    "Sampler",
    "Schedule",
    "TrainingOptions",
    "compare",
    "frechet_distance",
    "grid",
    "learned_log_variance",
    "learned_variance_loss",
    "nearest",
    "neighbour_sheet",
    "new_model",
    "predicted_eps",
    "predicted_x0",
    "read_images",
    "save_loss_curve",
    "save_png",
    "spherical_mix",
    "train",
    "training_target",
    "variational_bound",
]


def __getattr__(name: str):
    """The schedulers for diffusers, which is imported only for them."""
    if name not in ("DDIMScheduler", "DDPMScheduler"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from supy.diffusion import diffusers_schedulers
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        raise ImportError(f"supy.diffusion.{name} needs diffusers: pip install supy[diffusers]") from None
    return getattr(diffusers_schedulers, name)
