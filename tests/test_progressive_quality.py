"""Distances between pictures whose distances are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from overtone.progressive import quality
from overtone.progressive.spectral import dct_basis

DISTANCES = {
    quality.psnr: 100.0,
    quality.ssim: 1.0,
    quality.perceptual_distance: 0.0,
    quality.high_frequency_ratio: 1.0,
}


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    """Two pictures [2, 3, 64, 64] with structure of every size."""
    generator = torch.Generator().manual_seed(0)
    coefficients = torch.randn(2, 3, 64, 64, generator=generator)
    frequency = torch.arange(64) + 1.0
    coefficients /= torch.hypot(frequency[:, None], frequency[None, :])
    basis = dct_basis(64)
    field = basis.T @ coefficients @ basis
    return (0.5 + 0.15 * field / field.std()).clamp(0, 1)


@pytest.mark.parametrize(("distance", "equal"), DISTANCES.items(), ids=lambda f: getattr(f, "__name__", ""))
def test_equal_pictures(picture, distance, equal):
    assert distance(picture, picture.clone()).tolist() == pytest.approx([equal, equal], abs=1e-5)


@pytest.mark.parametrize("distance", DISTANCES, ids=lambda f: f.__name__)
def test_one_value_a_picture_whatever_else_is_in_the_batch(picture, distance):
    noisy = (picture + 0.1 * torch.randn(picture.shape, generator=torch.Generator().manual_seed(1))).clamp(
        0, 1
    )
    mixed = torch.stack([picture[0], noisy[1]])
    together = distance(mixed, picture)
    alone = [distance(mixed[i : i + 1], picture[i : i + 1]).item() for i in range(2)]
    assert together.shape == (2,)
    assert together.tolist() == pytest.approx(alone, abs=1e-5)
    assert abs(together[0] - DISTANCES[distance]) < abs(together[1] - DISTANCES[distance])


@pytest.mark.parametrize("error", [0.5, 0.1, 0.01])
def test_psnr_of_a_known_error(error):
    reference = torch.full((1, 3, 16, 16), 0.25)
    assert quality.psnr(reference + error, reference).item() == pytest.approx(
        -20 * math.log10(error), abs=1e-3
    )


def test_distances_grow_with_the_noise(picture):
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(2))
    measured = [
        (
            -quality.psnr(picture + amount * noise, picture).mean().item(),
            -quality.ssim(picture + amount * noise, picture).mean().item(),
            quality.perceptual_distance(picture + amount * noise, picture).mean().item(),
        )
        for amount in (0.01, 0.05, 0.2)
    ]
    for values in zip(*measured, strict=True):
        assert list(values) == sorted(values)


def test_ssim_of_flat_pictures_is_its_luminance_term():
    a, b = 0.25, 0.75
    c1 = 0.01**2
    flat = quality.ssim(torch.full((1, 3, 32, 32), a), torch.full((1, 3, 32, 32), b)).item()
    assert flat == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), abs=1e-3)


def test_high_frequency_ratio_is_the_energy_kept(picture):
    basis = dct_basis(64)
    coefficients = basis @ (picture - 0.5) @ basis.T
    high = torch.ones(64, 64)
    high[:32, :32] = 0
    halved = 0.5 + basis.T @ (coefficients * (1 - high / 2)) @ basis
    smooth = 0.5 + basis.T @ (coefficients * (1 - high)) @ basis
    assert quality.high_frequency_ratio(halved, picture).tolist() == pytest.approx([0.25, 0.25], abs=0.01)
    assert quality.high_frequency_ratio(smooth, picture).tolist() == pytest.approx([0, 0], abs=1e-3)


@pytest.mark.parametrize("side", [11, 22, 43, 87, 88, 98, 99, 175, 176])
def test_perceptual_distance_takes_every_size(side):
    picture = torch.rand(1, 3, side, side + 5, generator=torch.Generator().manual_seed(side))
    assert quality.perceptual_distance(picture, picture).item() == pytest.approx(0, abs=1e-5)
    assert quality.perceptual_distance(1 - picture, picture).item() > 0.5


def test_too_small_a_picture_is_refused():
    small = torch.rand(1, 3, 10, 64)
    with pytest.raises(ValueError, match="10 px is too small"):
        quality.perceptual_distance(small, small)


def test_pictures_arrays_and_videos_become_tensors():
    array = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    from_pil = quality.as_tensor([Image.fromarray(array), Image.fromarray(array).convert("RGBA")])
    assert from_pil.shape == (2, 3, 16, 24)
    assert torch.equal(from_pil[0], from_pil[1])
    assert torch.equal(from_pil[0], torch.from_numpy(array).permute(2, 0, 1) / 255)
    video = np.stack([array, 255 - array])
    assert quality.as_tensor([video]).shape == (2, 3, 16, 24)
    assert torch.equal(quality.as_tensor([video])[0], from_pil[0])
