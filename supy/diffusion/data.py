"""Images to train on: from a folder, from an array file, or scikit-learn's digits. All are held as uint8."""

from __future__ import annotations

import logging
import statistics
import warnings
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from supy._checks import require

log = logging.getLogger(__name__)

# What Pillow may decode. Others are rare, or dangerous: it hands EPS to Ghostscript, for example.
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
LARGEST = 64  # default size of large images


@dataclass(frozen=True)
class Images:
    """Square images of one size.

    pixels: uint8 `[N, C, S, S]`, C 1 (grey) or 3 (RGB). labels: int64 `[N]`, from 0, or None. source: where they are
    from.
    """

    pixels: torch.Tensor
    labels: torch.Tensor | None = None
    source: str = ""

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def classes(self) -> int:
        """How many classes the labels have; 0 without labels."""
        return 0 if self.labels is None else int(self.labels.max()) + 1

    def batch(self, rows: torch.Tensor, flip: torch.Tensor | None = None) -> torch.Tensor:
        """These rows as float32 `[B, C, S, S]`, -1 to 1, mirrored left to right where ``flip``, bool `[B]`, is true."""
        pixels = self.pixels[rows]
        if flip is not None:
            pixels = torch.where(flip[:, None, None, None], pixels.flip(-1), pixels)
        return to_float(pixels)


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    """0 to 255 as -1 to 1, in float32."""
    return pixels.float() / 127.5 - 1


def to_pixels(x: torch.Tensor) -> torch.Tensor:
    """-1 to 1 as uint8; values beyond are clipped."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def read_images(
    path: Path | str = "digits",
    *,
    size: int | None = None,
    channels: int | None = None,
    background: str = "black",
) -> Images:
    """The images of a folder or of a file, or scikit-learn's digits.

    Args:
        path: a folder, whose images are read with those of its subfolders (needs Pillow); a `.npy` file of an array,
            uint8 `[N, H, W]` or `[N, H, W, C]` with C 1, 3 or 4; a `.npz` file of such an array named ``images`` and
            perhaps integers ``labels`` `[N]`, or a folder with no image but one such file; or "digits", 1,797 of 8 x 8
            with labels.
        size: side of the square that each image becomes: its shorter side is scaled to it, and the middle cut out.
            Default: the median of the shorter sides, at most 64, rounded down to a multiple of 8, or 8.
        channels: 1 for grey or 3. Default: 1 where all images are grey, else 3.
        background: what shows through transparent pixels, a colour that Pillow knows ("white", "#204060").

    Of an animation the first frame is taken. Files that Pillow cannot read are left out, with one warning that names
    them.

    Raises:
        ValueError: there is no image, or no readable one, or an array is not as above; one line says which.

    >>> images = read_images("digits")
    >>> images.pixels.shape, images.classes
    (torch.Size([1797, 1, 8, 8]), 10)
    """
    for name, value, expected in (("size", size, range(4, 4097)), ("channels", channels, (1, 3))):
        wanted = "4 to 4096" if name == "size" else "1 or 3"
        require(value is None or value in expected, "diffusion", f"{name} is {value!r}, expected {wanted}")
    if background != "black":  # before any image is read
        _pillow()
        from PIL import ImageColor

        try:
            ImageColor.getrgb(background)
        except ValueError:
            known = 'a colour that Pillow knows, such as "white" or "#204060"'
            raise ValueError(f"supy.diffusion: background is {background!r}, expected {known}") from None
    if str(path) == "digits":
        return _digits(size, channels)
    path = Path(path)
    require(path.exists(), "diffusion", f"{path}: expected a folder or a file of images, found none")
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in (".npz", ".npy"))
        images = _image_files(path)
        if images or len(files) != 1:
            return _read_folder(path, images, size, channels, background)
        path = files[0]
    arrays = _load_arrays(path)
    return _from_array(path, arrays["images"], arrays.get("labels"), size, channels, background)


def _digits(size: int | None, channels: int | None) -> Images:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError("supy.diffusion: the digits need scikit-learn: pip install supy[diffusion]") from None
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return _from_array("scikit-learn's digits", pixels, digits.target, size, channels, "black")


def _load_arrays(path: Path) -> dict[str, np.ndarray]:
    """``images`` and perhaps ``labels`` of a `.npz` or `.npy` file; nothing is unpickled."""
    try:
        with open(path, "rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return {"images": loaded}
            require("images" in loaded, "diffusion", f"{path} has arrays {', '.join(loaded)[:80]}; expected images")
            return {name: loaded[name] for name in ("images", "labels") if name in loaded}
    # What NumPy and zipfile raise for files that are damaged, encrypted or packed in an unknown way.
    except (OSError, ValueError, EOFError, KeyError, MemoryError, NotImplementedError, BadZipFile, zlib.error) as error:
        if str(error).startswith("supy."):
            raise
        raise ValueError(f"supy.diffusion: {path} is not a .npz or .npy file of images ({str(error):.100})") from None


def _from_array(
    source: Path | str,
    array: np.ndarray,
    labels: np.ndarray | None,
    size: int | None,
    channels: int | None,
    background: str,
) -> Images:
    shape = list(array.shape)
    good = array.ndim in (3, 4) and array.size > 0 and (array.ndim == 3 or shape[3] in (1, 3, 4))
    wanted = "[N, H, W] or [N, H, W, C] with C 1, 3 or 4"
    require(good, "diffusion", f"images of {source} have shape {shape}, expected {wanted}")
    require(array.dtype == np.uint8, "diffusion", f"images of {source} have dtype {array.dtype}, expected uint8")
    if labels is not None:
        right = labels.shape == (len(array),) and labels.dtype.kind in "iu"
        right = right and 0 <= labels.min() <= labels.max() < 2**20
        got = f"labels of {source} are {labels.dtype} {list(labels.shape)}"
        require(right, "diffusion", f"{got}, expected integers from 0, [{len(array)}]")
        labels = torch.from_numpy(labels.astype(np.int64))
    array = array[..., None] if array.ndim == 3 else array
    size = size or _default_size([min(shape[1:3])])
    channels = channels or (1 if array.shape[3] == 1 else 3)
    same = shape[1:3] == [size, size] and array.shape[3] == channels
    if not same:
        Image, _ = _pillow()
        squeezed = array[..., 0] if array.shape[3] == 1 else array
        array = np.stack([_square(Image.fromarray(image), size, channels, background) for image in squeezed])
    return Images(_channels_first(array), labels, str(source))


def _read_folder(
    folder: Path, files: list[Path], size: int | None, channels: int | None, background: str
) -> Images:
    require(len(files) > 0, "diffusion", f"{folder} holds no image, expected some of {', '.join(FORMATS)}")
    Image, errors = _pillow()
    broken: dict[Path, str] = {}
    sides, grey = [], True
    for file in files if size is None or channels is None else ():  # the headers, which is quick
        try:
            with _open(file) as image:
                sides.append(min(image.size))
                grey = grey and image.mode in ("1", "L") or image.mode.startswith("I")
        except errors as error:
            broken[file] = str(error)
    size = size or _default_size(sides)
    channels = channels or (1 if grey else 3)
    arrays, animated = [], 0
    for file in files:
        if file in broken:
            continue
        try:
            with _open(file) as image:
                animated += getattr(image, "n_frames", 1) > 1
                image.draft(None, (2 * size, 2 * size))  # JPEG alone: decodes fewer pixels of a large one
                arrays.append(_square(image, size, channels, background))
        except errors as error:
            broken[file] = str(error)
    names = ", ".join(str(file.relative_to(folder)) for file in sorted(broken))
    names = names if len(names) < 200 else names[:200] + " ..."
    require(len(arrays) > 0, "diffusion", f"{folder}: none of {len(files)} images can be read: {names}")
    if broken:
        log.warning("%d of %d images cannot be read and are left out: %s", len(broken), len(files), names)
    if animated:
        log.warning("%d animated images: their first frames are taken", animated)
    return Images(_channels_first(np.stack(arrays)), None, str(folder))


def _image_files(folder: Path) -> list[Path]:
    """Those with the name of an image, hidden ones apart."""
    Image, _ = _pillow()
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS}
    found = (file for file in folder.rglob("*") if file.suffix.lower() in endings and file.is_file())
    return sorted(file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts))


def _pillow() -> tuple[Any, tuple[type[Exception], ...]]:
    """Its module Image, and what it raises for files that it cannot read."""
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("supy.diffusion: images need Pillow: pip install supy[diffusion]") from None
    # Damaged files have been seen to raise each of these.
    return Image, (OSError, ValueError, SyntaxError, TypeError, EOFError, IndexError, KeyError, OverflowError,
                   MemoryError, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning)  # fmt: skip


def _open(file: Path):
    with warnings.catch_warnings():  # an image of more than 89 million pixels is an error
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=UserWarning)  # odd metadata
        Image, _ = _pillow()
        return Image.open(file, formats=[kind for kind in FORMATS if kind in Image.OPEN])


def _default_size(sides: Iterable[int]) -> int:
    middle = int(statistics.median(sides or [LARGEST]))
    return max(8, min(middle, LARGEST) // 8 * 8)


def _square(image, size: int, channels: int, background: str) -> np.ndarray:
    """uint8 `[size, size]` or `[size, size, 3]` of an image of any mode and shape."""
    from PIL import Image, ImageColor, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, expected 8 or 16 bits")
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, ImageColor.getrgb(background)[:3] + (255,))
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    image = image.convert("RGB" if channels == 3 else "L")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return np.asarray(image)


def _channels_first(array: np.ndarray) -> torch.Tensor:
    array = array[:, None] if array.ndim == 3 else array.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(array))
