"""Grids, neighbour sheets and the Frechet distance against what they must be."""

import numpy as np
import pytest
import torch
from PIL import Image

from supy.diffusion import compare, frechet_distance, grid, nearest, neighbour_sheet, save_png
from supy.diffusion.pictures import GAP, save_loss_curve

generator = torch.Generator().manual_seed(0)


def random_images(count, channels=3, size=32):
    return torch.randint(256, (count, channels, size, size), generator=generator, dtype=torch.uint8)


def test_a_grid_holds_every_image_in_order(tmp_path):
    images = random_images(7)
    sheet = grid(images, columns=3)
    assert sheet.shape == (3, 3 * 34 + GAP, 3 * 34 + GAP)
    for number, image in enumerate(images):
        top, left = GAP + number // 3 * 34, GAP + number % 3 * 34
        assert torch.equal(sheet[:, top : top + 32, left : left + 32], image)
    assert bool((sheet[:, -34:-GAP, 36:] == 128).all())  # no eighth and ninth
    save_png(tmp_path / "new" / "grid.png", sheet)
    assert np.array_equal(Image.open(tmp_path / "new" / "grid.png"), sheet.permute(1, 2, 0))
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["grid.png"]


def test_small_images_are_enlarged(tmp_path):
    images = random_images(1, 1, 8)
    sheet = grid(images)
    assert sheet.shape == (1, 36, 36) and torch.equal(sheet[:, GAP:-GAP:4, GAP:-GAP:4], images[0])
    save_png(tmp_path / "grey.png", sheet)
    assert Image.open(tmp_path / "grey.png").mode == "L"
    with pytest.raises(ValueError, match=r"images are torch.uint8 \[0, 1, 8, 8\], expected uint8 \[N, C, H, W\]"):
        grid(images[:0])


def test_nearest_finds_images_and_their_mirrors():
    images = random_images(3000, 1, 8)  # more than a block
    samples = images[[2500, 3]].clone()
    samples[0, 0, 0, 0] ^= 7
    samples[1] = samples[1].flip(-1)
    difference = abs(int(samples[0, 0, 0, 0]) - int(images[2500, 0, 0, 0]))
    found, distance = nearest(samples, images, flips=True)
    assert torch.equal(found, torch.stack((images[2500], images[3].flip(-1))))
    assert distance.tolist() == [difference / 8, 0.0]  # the root of difference^2 / 64 pixels
    found, distance = nearest(samples, images)
    assert torch.equal(found[0], images[2500]) and distance[1] > 50
    with pytest.raises(ValueError, match="expected the same"):
        nearest(samples, images[:, :, 1:])


def test_a_sheet_shows_each_sample_beside_its_neighbour():
    images = random_images(50)
    samples = images[[7, 40, 2]] // 2 + images[[7, 40, 2]] // 2  # the lowest bit is lost
    sheet = neighbour_sheet(samples, images, pairs=2)
    assert sheet.shape == (3, 2 * 34 + GAP, 4 * 34 + GAP)
    for number, (row, column) in enumerate(((0, 0), (0, 2), (1, 0))):
        both = sheet[:, GAP + row * 34 :, GAP + column * 34 :]
        assert torch.equal(both[:, :32, :32], samples[number])
        assert torch.equal(both[:, :32, 34:66], images[[7, 40, 2][number]])


def test_frechet_distance_of_gaussians():
    """Sets whose means and covariances are exactly known: closed forms for commuting and for 2 x 2 covariances."""

    def exactly(mean, covariance):
        x = torch.randn(500, len(mean), generator=generator, dtype=torch.float64)
        x = x - x.mean(0)
        x = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T, correction=0)), x.T, upper=False)
        return (torch.linalg.cholesky(covariance) @ x).T + mean

    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))[0]
    one, two = torch.rand(2, 5, generator=generator, dtype=torch.float64) + 0.1
    shift = torch.arange(5, dtype=torch.float64)
    a = exactly(torch.zeros(5), turn * one @ turn.T)
    b = exactly(shift, turn * two @ turn.T)
    expected = 30 + (one.sqrt() - two.sqrt()).square().sum().item()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)

    # tr sqrt(M) of a 2 x 2 matrix is sqrt(tr M + 2 sqrt(det M)).
    A = torch.tensor([[2.0, 0.7], [0.7, 1.0]], dtype=torch.float64)
    B = torch.tensor([[1.0, -0.4], [-0.4, 3.0]], dtype=torch.float64)
    product = A @ B
    expected = (A.trace() + B.trace() - 2 * (product.trace() + 2 * product.det().sqrt()).sqrt()).item()
    a, b = exactly(torch.zeros(2), A), exactly(torch.zeros(2), B)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)

    same = torch.randn(50, 80, generator=generator)  # covariances without full rank
    assert frechet_distance(same, same) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="expected"):
        frechet_distance(a, b[:, :1])


def test_compare_tells_real_from_blurred_and_bright():
    before = torch.get_rng_state()
    images = random_images(400, 1, 16)
    real = random_images(150, 1, 16)
    distance, floor = compare(real, images)
    assert 0.7 * floor < distance < 1.4 * floor
    assert (distance, floor) == compare(real, images)  # nothing random is left open
    assert compare(real // 2, images)[0] > 3 * floor
    assert torch.equal(before, torch.get_rng_state())


def test_loss_curve(tmp_path):
    save_loss_curve(tmp_path / "loss.png", range(10, 110, 10), [100 / (i + 1) for i in range(10)])
    assert Image.open(tmp_path / "loss.png").size == (700, 400)
