"""Images of every kind become uint8 squares, and what cannot be read is one clear line."""

import io
import logging
import os
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from supy.diffusion import read_images
from supy.diffusion.data import to_float, to_pixels
from supy.events import data_folder

rng = np.random.default_rng(0)
RGB = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
GREY = rng.integers(0, 256, (16, 16), dtype=np.uint8)


def write(folder, name, array, **options):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def test_lossless_formats_keep_every_pixel(tmp_path):
    for ending in ("png", "bmp", "tiff", "ppm", "tga"):
        write(tmp_path, f"{ending}/deep/image.{ending}", RGB)
    write(tmp_path, "webp/image.WEBP", RGB, lossless=True)
    (tmp_path / "notes.txt").write_text("not an image, and not named like one")
    write(tmp_path, ".hidden/image.png", RGB)
    images = read_images(tmp_path)
    assert images.pixels.shape == (6, 3, 16, 16) and images.pixels.dtype == torch.uint8
    for image in images.pixels:
        assert np.array_equal(image.permute(1, 2, 0), RGB)


def test_the_median_side_is_the_size(tmp_path):
    for number, side in enumerate((9, 27, 30, 300)):  # median 28.5, so 24
        write(tmp_path, f"{number}.png", np.full((side, side + 5, 3), side % 256, np.uint8))
    assert read_images(tmp_path).pixels.shape == (4, 3, 24, 24)
    assert read_images(tmp_path, size=8, channels=1).pixels.shape == (4, 1, 8, 8)
    # Tiny and huge images are scaled; a plain one stays plain.
    assert read_images(tmp_path, size=40).pixels.flatten(1).tolist() == [[s % 256] * 4800 for s in (9, 27, 30, 300)]


def test_the_middle_is_cut_out(tmp_path):
    wide = np.zeros((16, 48), np.uint8)
    wide[:, 16:32] = 200
    write(tmp_path, "wide.png", wide)
    write(tmp_path, "high.png", wide.T)
    images = read_images(tmp_path)
    assert images.pixels.shape == (2, 1, 16, 16) and bool((images.pixels == 200).all())


def test_grey_and_colour(tmp_path):
    write(tmp_path, "grey.png", GREY)
    assert np.array_equal(read_images(tmp_path).pixels[0, 0], GREY)  # all grey: one channel
    assert np.array_equal(read_images(tmp_path, channels=3).pixels[0], np.stack([GREY] * 3))
    write(tmp_path, "colour.png", RGB)
    assert read_images(tmp_path).pixels.shape == (2, 3, 16, 16)
    luma = (RGB @ np.array([0.299, 0.587, 0.114])).round()
    assert np.abs(read_images(tmp_path, channels=1).pixels[0, 0].numpy() - luma).max() <= 1


def test_sixteen_bits_and_palettes(tmp_path):
    write(tmp_path, "a.png", GREY.astype(np.uint16) * 257)
    assert np.array_equal(read_images(tmp_path).pixels[0, 0], GREY)
    Image.fromarray(RGB // 64 * 64).quantize(64).save(tmp_path / "b.png")
    Image.fromarray(RGB).convert("CMYK").save(tmp_path / "c.tiff")
    Image.fromarray(GREY > 127).save(tmp_path / "d.png")  # one bit
    images = read_images(tmp_path)
    assert np.array_equal(images.pixels[1].permute(1, 2, 0), RGB // 64 * 64)
    assert np.array_equal(images.pixels[2].permute(1, 2, 0), RGB)
    assert np.array_equal(images.pixels[3, 0] > 127, GREY > 127)


def test_transparency_shows_the_background(tmp_path):
    alpha = rng.integers(0, 256, (16, 16, 1), dtype=np.uint8)
    write(tmp_path, "a.png", np.concatenate((RGB, alpha), 2))
    for colour, value in (("black", (0, 0, 0)), ("#ff8000", (255, 128, 0))):
        mixed = (RGB * (alpha / 255) + np.array(value) * (1 - alpha / 255)).round()
        found = read_images(tmp_path, background=colour).pixels[0].permute(1, 2, 0).numpy()
        assert np.abs(found - mixed).max() <= 1
    palette = Image.fromarray(np.zeros((8, 8), np.uint8), "P")
    palette.putpalette([10, 20, 30])
    palette.save(tmp_path / "b.gif", transparency=0)
    assert read_images(tmp_path, background="white").pixels[1].unique().tolist() == [255]


def test_first_frame_of_an_animation(tmp_path, caplog):
    frames = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (0, 90, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_images(tmp_path, channels=1).pixels.unique().tolist() == [0]
    assert "1 animated images: their first frames are taken" in caplog.text


def test_orientation_of_photographs(tmp_path):
    exif = Image.Exif()
    exif[274] = 3  # turned by 180 degrees
    write(tmp_path, "a.png", GREY, exif=exif)
    assert np.array_equal(read_images(tmp_path).pixels[0, 0], GREY[::-1, ::-1])


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


def huge():
    """A PNG whose header says 30,000 x 30,000."""
    content = bytearray(png(RGB))
    content[16:24] = (30000).to_bytes(4) * 2
    content[29:33] = PngImagePlugin._crc32(bytes(content[12:29])).to_bytes(4)
    return bytes(content)


BROKEN = {
    "empty.png": b"",
    "text.jpg": b"no image at all",
    "cut.png": png(RGB)[:-200],
    "flipped.png": png(RGB)[:60] + b"\xff" * 20 + png(RGB)[80:],
    "huge.png": huge(),
    "eps.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "float.tiff": None,
}


def write_broken(folder):
    for name, content in BROKEN.items():
        (folder / name).write_bytes(content or b"")
    Image.fromarray(RGB[..., 0].astype(np.float32)).save(folder / "float.tiff")


@pytest.mark.parametrize("size", [None, 16])
def test_broken_images_are_left_out_and_named(tmp_path, caplog, size):
    write_broken(tmp_path)
    write(tmp_path, "good.png", RGB)
    images = read_images(tmp_path, size=size)
    assert np.array_equal(images.pixels[0].permute(1, 2, 0), RGB) and len(images) == 1
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("7 of 8 images cannot be read and are left out: ")
    assert all(name in record.getMessage() for name in BROKEN)


def test_nothing_left_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no image, expected some of AVIF"):
        read_images(tmp_path)
    write_broken(tmp_path)
    with pytest.raises(ValueError, match="none of 7 images can be read: cut.png"):
        read_images(tmp_path)
    with pytest.raises(ValueError, match="none: expected a folder or a file of images, found none"):
        read_images(tmp_path / "none")


def test_digits():
    images = read_images()
    assert images.pixels.shape == (1797, 1, 8, 8) and images.classes == 10
    assert images.pixels.min() == 0 and images.pixels.max() == 255  # 0 and 16 of the original
    assert read_images(size=16, channels=3).pixels.shape == (1797, 3, 16, 16)


def test_arrays(tmp_path):
    np.save(tmp_path / "grey.npy", np.stack([GREY, GREY]))
    assert np.array_equal(read_images(tmp_path / "grey.npy").pixels[1, 0], GREY)
    alpha = np.full((16, 16, 1), 255, np.uint8)
    np.savez(tmp_path / "x.npz", images=[np.concatenate((RGB, alpha), 2)] * 3, labels=[0, 2, 1], names=["a", "b", "c"])
    images = read_images(tmp_path / "x.npz")
    assert np.array_equal(images.pixels[2].permute(1, 2, 0), RGB)
    assert images.labels.tolist() == [0, 2, 1] and images.classes == 3
    assert read_images(tmp_path / "x.npz", size=8, channels=1).pixels.shape == (3, 1, 8, 8)
    (tmp_path / "grey.npy").unlink()
    assert len(read_images(tmp_path)) == 3  # a folder that holds nothing but one array file


def pickled(path):
    np.save(path, np.array([print], dtype=object), allow_pickle=True)


def not_deflate(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("images.npy", b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', 'shape': (9999999, 9999, 9999)")


BAD = {
    "pickle": (pickled, "is not a .npz or .npy file of images"),
    "empty": (lambda path: path.write_bytes(b""), "is not a .npz or .npy file of images"),
    "text": (lambda path: path.write_text("hello"), "is not a .npz or .npy file of images"),
    "header": (not_deflate, "is not a .npz or .npy file of images"),
    "other names": (lambda path: save(path, x=[1], y=[2]), "has arrays x, y; expected images"),
    "floats": (lambda path: save(path, images=np.zeros((2, 8, 8))), "have dtype float64, expected uint8"),
    "channels first": (lambda path: save(path, images=np.zeros((2, 3, 8, 8), "u1")), r"shape \[2, 3, 8, 8\], expected"),
    "no image": (lambda path: save(path, images=np.zeros((0, 8, 8), "u1")), r"shape \[0, 8, 8\], expected"),
    "labels": (lambda path: save(path, images=np.zeros((2, 8, 8), "u1"), labels=[1, -1]), "expected integers from 0"),
}


def save(path, **arrays):
    with open(path, "wb") as file:
        np.savez(file, **arrays)


@pytest.mark.parametrize("make, expected", BAD.values(), ids=BAD)
def test_bad_arrays(tmp_path, make, expected):
    path = tmp_path / "bad.npz"
    make(path) if make is not pickled else (pickled(tmp_path / "x.npy"), os.replace(tmp_path / "x.npy", path))
    with pytest.raises(ValueError, match=expected) as error:
        read_images(path)
    assert len(str(error.value).splitlines()) == 1


def test_wrong_arguments():
    with pytest.raises(ValueError, match="size is 2, expected 4 to 4096"):
        read_images(size=2)
    with pytest.raises(ValueError, match="channels is 2, expected 1 or 3"):
        read_images(channels=2)


def test_batches_are_floats_and_mirrored():
    images = read_images()
    rows = torch.tensor([5, 3])
    batch = images.batch(rows, torch.tensor([True, False]))
    assert batch.dtype == torch.float32
    assert torch.equal(batch[0], to_float(images.pixels[5]).flip(-1))
    assert torch.equal(batch[1], to_float(images.pixels[3]))
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_pixels(to_float(values)), values) and to_float(values).aminmax() == (-1, 1)
    assert to_pixels(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_the_tiles():
    folder = data_folder()
    if folder is None or not (folder / "images" / "dcss").is_dir():
        # The project holds no data of others.
        pytest.skip("needs SUPY_DATA with images/dcss")
    images = read_images(folder / "images" / "dcss")
    assert images.pixels.shape == (2418, 3, 32, 32)
