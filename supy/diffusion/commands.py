"""The commands ``supy diffusion train`` and ``supy diffusion sample``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from supy._checks import positive
from supy.diffusion.data import read_images
from supy.diffusion.model import NETWORKS, DiffusionModel, new_model
from supy.diffusion.pictures import compare, grid, nearest, neighbour_sheet, save_png
from supy.diffusion.prediction import PREDICTIONS
from supy.diffusion.schedule import Schedule
from supy.diffusion.training import TrainingOptions, train

SCHEDULES = {"su": Schedule.su, "linear": Schedule.linear, "cosine": Schedule.cosine}
DATA = "a folder of images, a .npz or .npy file, or digits"


def add_commands(commands: argparse._SubParsersAction) -> None:
    diffusion = commands.add_parser("diffusion", help="pictures from noise").add_subparsers(
        required=True, metavar="ACTION"
    )
    parser = diffusion.add_parser(
        "train",
        help="train a model on images",
        description="Trains a network to undo noise. The folder gets samples and a loss curve as it goes. The same "
        "command goes on after a kill.",
    )
    options = TrainingOptions()
    parser.add_argument("--data", default="digits", metavar="PATH", help=f"{DATA} (default: digits)")
    parser.add_argument("--out", default="runs/diffusion", metavar="DIR", help="for the model (default: %(default)s)")
    parser.add_argument("--size", type=int, help="side of the pictures (default: that of the images, at most 64)")
    parser.add_argument("--channels", type=int, choices=[1, 3], help="grey or colour (default: as the images are)")
    parser.add_argument("--background", default="black", metavar="COLOUR", help="behind transparent pixels")
    parser.add_argument("--network", choices=NETWORKS, default="post-norm-unet", help="default: %(default)s")
    parser.add_argument("--width", type=positive, help="of the network (default: 32, of patch-gau 192)")
    parser.add_argument("--schedule", choices=SCHEDULES, default="su", help="of the noise (default: %(default)s)")
    parser.add_argument("--timesteps", type=positive, default=1000, metavar="T", help="of it (default: %(default)s)")
    parser.add_argument("--prediction", choices=PREDICTIONS, default="eps", help="default: %(default)s")
    parser.add_argument("--learned-variance", action="store_true", help="the network also predicts a variance")
    parser.add_argument("--steps", type=positive, default=options.steps, help="default: %(default)s")
    parser.add_argument("--batch-size", type=positive, default=options.batch_size, help="default: %(default)s")
    parser.add_argument("--accumulate", type=positive, default=1, metavar="N", help="a batch goes in N parts")
    parser.add_argument("--optimizer", choices=["lamb", "adam"], default="lamb", help="unet wants adam (default: lamb)")
    parser.add_argument("--learning-rate", type=float, help="its peak (default: 0.02, of adam 0.001)")
    parser.add_argument("--flips", action="store_true", help="half of the images are mirrored")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=_train)

    parser = diffusion.add_parser(
        "sample", help="draw pictures", description="Draws pictures from a trained model into one PNG."
    )
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--out", default="grid.png", metavar="FILE", help="default: %(default)s")
    parser.add_argument("--count", type=positive, default=64, help="of pictures (default: %(default)s)")
    parser.add_argument("--steps", type=positive, help="calls of the network (default: all, at most 100)")
    parser.add_argument("--method", choices=["ddpm", "ddim"], default="ddpm", help="default: %(default)s")
    parser.add_argument("--sigma", choices=["posterior", "beta", "zero", "learned"], help="noise of ddpm")
    parser.add_argument("--eta", type=float, default=0.0, help="noise of ddim, 0 to 1 (default: 0)")
    parser.add_argument("--label", type=int, help="what to draw (default: each in turn)")
    parser.add_argument("--guidance", type=float, default=1.0, help="by the label (default: 1, which is none)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", metavar="PATH",
                        help=f"images that the model learned from ({DATA}): writes FILE-nearest.png, each sample "
                             "beside the closest image, and prints the Frechet distance")  # fmt: skip
    parser.add_argument("--background", default="black", metavar="COLOUR", help="of --compare's images (%(default)s)")
    parser.set_defaults(run=_sample)


def _train(args: argparse.Namespace) -> None:
    images = read_images(args.data, size=args.size, channels=args.channels, background=args.background)
    channels, size = images.pixels.shape[1:3]
    print(f"{len(images)} images of {size} x {size} x {channels} from {images.source}")
    model = new_model(
        images,
        args.network,
        width=args.width,
        schedule=SCHEDULES[args.schedule](args.timesteps),
        prediction=args.prediction,
        learned_variance=args.learned_variance,
        seed=args.seed,
    )
    options = TrainingOptions(
        steps=args.steps,
        batch_size=args.batch_size,
        accumulate=args.accumulate,
        optimizer=args.optimizer,
        learning_rate=args.learning_rate,
        flips=args.flips,
        seed=args.seed,
    )
    train(model, images, options, folder=args.out)
    print(f"model written to {args.out}")


def _sample(args: argparse.Namespace) -> None:
    model = DiffusionModel.load(args.model)
    images = None
    if args.compare:
        images = read_images(args.compare, size=model.size, channels=model.channels, background=args.background).pixels
    samples = model.sample(
        args.count,
        steps=args.steps,
        method=args.method,
        sigma=args.sigma,
        eta=args.eta,
        seed=args.seed,
        labels=args.label,
        guidance=args.guidance,
    )
    save_png(args.out, grid(samples))
    print(f"{args.count} pictures written to {args.out}")
    if images is not None:
        sheet = Path(args.out).with_suffix("")
        sheet = sheet.with_name(f"{sheet.name}-nearest.png")
        save_png(sheet, neighbour_sheet(samples[:32], images, flips=True))
        print(f"each beside the closest image: {sheet}")
        print(report(samples, images))


def report(samples: torch.Tensor, images: torch.Tensor) -> str:
    """Two lines: how close samples are to images, and what real images would reach."""
    distance = nearest(samples, images, flips=True)[1]
    frechet, floor = compare(samples, images)
    return (
        f"distance to the closest image, of 255, root mean square of a pixel: median {distance.median():.1f}, least "
        f"{distance.min():.1f}\nFrechet distance of pixels' principal components: {frechet:.2f}; of as many held-out "
        f"images: {floor:.2f}"
    )
