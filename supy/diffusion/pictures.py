"""Pictures of images and of a run, and how far a set of images is from another."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from supy._checkpoint import write_atomically
from supy._checks import require
from supy.diffusion.data import _pillow, to_float

GAP = 2  # pixels between the images of a picture
COMPONENTS, MOST = 64, 10_000  # of `compare`: features, and images it looks at


def grid(images: torch.Tensor, *, columns: int | None = None, scale: int | None = None) -> torch.Tensor:
    """uint8 `[C, height, width]`: the images uint8 `[N, C, H, W]` row by row, on grey.

    columns: default about as many as rows. scale: each pixel becomes a square of so many; default: such that an image
    is at least 32 pixels high.

    >>> grid(torch.zeros(4, 3, 16, 16, dtype=torch.uint8)).shape
    torch.Size([3, 70, 70])
    """
    good = images.ndim == 4 and len(images) > 0 and images.dtype == torch.uint8
    got = f"images are {images.dtype} {list(images.shape)}"
    require(good, "diffusion.grid", f"{got}, expected uint8 [N, C, H, W], N > 0")
    count, channels, height, width = images.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    scale = scale or -(-32 // height)
    height, width = height * scale + GAP, width * scale + GAP
    sheet = torch.full((channels, -(-count // columns) * height + GAP, columns * width + GAP), 128, dtype=torch.uint8)
    for number, image in enumerate(images):
        top, left = number // columns * height + GAP, number % columns * width + GAP
        large = image.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        sheet[:, top : top + height - GAP, left : left + width - GAP] = large
    return sheet


def save_png(path: Path | str, image: torch.Tensor) -> None:
    """Writes uint8 `[C, H, W]`, C 1 or 3, to a temporary file and renames it. Needs Pillow."""
    Image, _ = _pillow()
    array = image.permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(buffer, "png", optimize=True)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(path), buffer.getvalue())


def save_loss_curve(path: Path | str, steps: Sequence[int], losses: Sequence[float]) -> None:
    """A PNG of the losses over the steps, both axes logarithmic. Needs matplotlib."""
    try:
        from matplotlib.figure import Figure  # without pyplot, hence without a display
    except ImportError:
        raise ImportError("supy.diffusion: the loss curve needs matplotlib: pip install supy[diffusion]") from None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss: squared error of an image", xscale="log", yscale="log")
    axes.plot(steps, losses)
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    write_atomically(Path(path), buffer.getvalue())


def nearest(
    samples: torch.Tensor, images: torch.Tensor, *, flips: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The closest of ``images`` to each of ``samples``, by the sum of squared differences of pixels.

    Args:
        samples, images: uint8 `[M, C, H, W]` and `[N, C, H, W]`.
        flips: mirrored images count too.

    Returns:
        the closest images, mirrored where that is closer, `[M, C, H, W]`, and the distances: the root of the mean
        squared difference of a pixel, float64 `[M]`.

    >>> images = torch.tensor([0, 100, 200], dtype=torch.uint8).view(3, 1, 1, 1)
    >>> found, distance = nearest(torch.full((1, 1, 1, 1), 130, dtype=torch.uint8), images)
    >>> found.item(), distance.item()
    (100, 30.0)
    """
    same = samples.shape[1:] == images.shape[1:] and len(images) > 0
    got = f"samples have shape {list(samples.shape)}, images {list(images.shape)}"
    require(same, "diffusion.nearest", f"{got}; expected the same [C, H, W], N > 0")
    wanted = samples.flatten(1).double()
    best = torch.full((len(samples),), torch.inf, dtype=torch.float64)
    found = torch.zeros_like(samples)
    for block in images.split(2048):
        for candidates in (block, block.flip(-1)) if flips else (block,):
            values = candidates.flatten(1).double()
            # Products and sums of integers below 2^53 are exact.
            squares = wanted.square().sum(1)[:, None] - 2 * wanted @ values.T + values.square().sum(1)
            distance, row = squares.min(1)
            better = distance < best
            best = torch.where(better, distance, best)
            found[better] = candidates[row[better]]
    return found, (best / wanted.shape[1]).sqrt()


def neighbour_sheet(
    samples: torch.Tensor, images: torch.Tensor, *, flips: bool = False, pairs: int = 4
) -> torch.Tensor:
    """`grid` of the samples, each with its closest image at its right, ``pairs`` in a row.

    A model that has learned its images by heart shows the same picture twice.
    """
    found, _ = nearest(samples, images, flips=flips)
    both = torch.stack((samples, found), 1).flatten(0, 1)
    sheet = grid(both, columns=2 * pairs)
    width = (sheet.shape[2] - GAP) // min(2 * pairs, len(both))
    for pair in range(1, min(pairs, len(samples))):  # a dark line between the pairs
        sheet[:, :, 2 * pair * width : 2 * pair * width + GAP] = 0
    return sheet


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The Frechet distance of two sets of vectors, `[N, D]` and `[M, D]`, each taken as a Gaussian.

    |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) with the covariances A and B (Dowson and Landau 1982), in float64.
    The trace of the root is the sum of the roots of the eigenvalues of A^(1/2) B A^(1/2).

    >>> a = torch.tensor([[-1.0], [1.0]])
    >>> frechet_distance(a, a + 3), frechet_distance(a, 2 * a)  # 3^2, (2 - 1)^2
    (9.0, 1.0)
    """
    good = a.ndim == b.ndim == 2 and a.shape[1] == b.shape[1] and min(len(a), len(b)) > 1
    message = f"sets have shapes {list(a.shape)} and {list(b.shape)}, expected [N, D] and [M, D] with N, M > 1"
    require(good, "diffusion.frechet_distance", message)
    a, b = a.double(), b.double()
    shift = (a.mean(0) - b.mean(0)).square().sum()
    A, B = (torch.cov(x.T, correction=0).view(a.shape[1], -1) for x in (a, b))
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()
    return max(0.0, (shift + A.trace() + B.trace() - 2 * cross).item())


def compare(samples: torch.Tensor, images: torch.Tensor) -> tuple[float, float]:
    """The Frechet distance of samples to images, both uint8 `[N, C, H, W]`, and the floor to compare it with.

    The features are the first 64 principal components of the images' pixels (each -1 to 1), so a distance is in squared
    pixels. The images are cut at random, with a fixed seed, into two halves; the samples are compared with the first.
    The floor is the same distance of as many images of the second half: real images get it. Both shrink with the number
    of samples, so only numbers for as many samples compare. Means and covariances of components see brightness,
    colours, layout and large shapes; they do not see whether an edge is sharp.

    >>> images = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    >>> distance, floor = compare(torch.zeros(50, 1, 2, 2, dtype=torch.uint8), images)
    >>> distance > 10 * floor
    True
    """
    require(len(images) > 3, "diffusion.compare", f"there are {len(images)} images, expected at least 4")
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=generator)[:MOST]
    pixels = _flat(images[order])
    with torch.random.fork_rng(devices=[]):  # the components are found from random vectors
        torch.manual_seed(0)
        basis = torch.pca_lowrank(pixels, min(COMPONENTS, *pixels.shape), niter=4)[2]
    features = pixels @ basis
    half = len(features) // 2
    count = min(len(samples), len(features) - half)
    drawn, first, second = _flat(samples[:count]) @ basis, features[:half], features[half : half + count]
    return frechet_distance(drawn, first), frechet_distance(second, first)


def _flat(images: torch.Tensor) -> torch.Tensor:
    return to_float(images).flatten(1).double()
