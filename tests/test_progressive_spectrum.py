"""calibrate: known spectra come back, streams stay streams, latents are taken as the pipelines take them."""

from __future__ import annotations

import inspect
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage21,
    AutoencoderKLWan,
    Flux2Pipeline,
)
from PIL import Image

from overtone import progressive
from overtone.progressive.calibration import Calibration, calibrate, fit_power
from overtone.progressive.checkpoints import spectrum_profile
from overtone.progressive.formulas import Spectrum
from overtone.progressive.spectral import dct_basis, frequencies, patchify


class Identity:
    """A VAE whose latents are the pictures."""

    def __init__(self, **config):
        self.config = config
        self.batches = []

    def encode(self, pixels):
        self.batches.append(tuple(pixels.shape))
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: pixels))


def fields(spectrum, grid, count, channels=4, seed=0):
    """Gaussian fields [channels, H, W] with P(w) = A w^-beta, one by one."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.from_numpy(frequencies("dct", grid)).clamp_min(0.5).float()
    scale = (spectrum.amplitude * w**-spectrum.beta).sqrt()
    rows, columns = dct_basis(grid[0]), dct_basis(grid[1])
    for _ in range(count):
        yield rows.T @ (scale * torch.randn(channels, *grid, generator=generator)) @ columns


@pytest.mark.parametrize(
    ("known", "grid"),
    [
        (Spectrum(203.615097, 1.915461), (64, 64)),
        (Spectrum(219.484718, 2.422687), (60, 104)),
        (Spectrum(1.5, 0.9), (63, 48)),
    ],
)
def test_a_known_spectrum_is_recovered_within_two_percent(known, grid):
    fit = calibrate(Identity(), fields(known, grid, 8, channels=512), batch_size=2)
    assert fit.amplitude == pytest.approx(known.amplitude, rel=0.02)
    assert fit.beta == pytest.approx(known.beta, rel=0.02)
    assert fit.r2 > 0.999
    assert (fit.n, fit.height, fit.width) == (8, *grid)


@pytest.mark.parametrize("known", [Spectrum(203.615097, 1.915461), Spectrum(219.484718, 2.422687)])
def test_the_published_spectra_are_recovered_from_their_own_power(known):
    grid = (60, 104)
    power = known.amplitude * np.maximum(frequencies("dct", grid), 0.5) ** -known.beta
    fit = fit_power(power, 1)
    assert (fit.amplitude, fit.beta) == pytest.approx((known.amplitude, known.beta), rel=1e-4)
    assert fit.r2 == pytest.approx(1)


def test_rings_are_half_a_cycle_wide():
    fit = fit_power(np.ones((32, 32)) + frequencies("dct", (32, 32)), 1)
    assert len(fit.frequencies) == len(fit.powers) == 31
    assert np.abs(np.diff(fit.frequencies) - 0.5).max() < 0.12
    np.testing.assert_allclose(np.array(fit.powers), 1 + np.array(fit.frequencies))
    assert fit.fit_range == (1.0, 15.5)


def test_pictures_are_read_as_they_come_and_never_held():
    drawn = []

    def stream():
        for index, field in enumerate(fields(Spectrum(1, 1), (16, 16), 10, channels=3)):
            drawn.append(index)
            yield field

    vae, seen = Identity(), []
    fit = calibrate(vae, stream(), batch_size=4, on_progress=lambda n: seen.append((n, len(drawn))))
    assert vae.batches == [(4, 3, 16, 16), (4, 3, 16, 16), (2, 3, 16, 16)]
    assert [n for n, _ in seen] == [4, 8, 10]
    assert all(read <= n + 1 for n, read in seen)
    assert fit.n == 10
    assert calibrate(Identity(), fields(Spectrum(1, 1), (16, 16), 10), limit=6).n == 6


def test_the_batch_size_changes_nothing():
    one, many = (
        calibrate(Identity(), fields(Spectrum(3, 2), (24, 32), 9), batch_size=size) for size in (1, 5)
    )
    np.testing.assert_allclose(one.powers, many.powers, rtol=1e-5)


# ------------------------------------------------------------------ kinds of pictures


def noisy(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_pil_pictures_arrays_and_tensors_are_the_same_picture():
    array = noisy(24, 32, 3)
    tensor = torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1
    fits = [calibrate(Identity(), [picture]) for picture in (array, Image.fromarray(array), tensor)]
    np.testing.assert_allclose(fits[0].powers, fits[1].powers)
    np.testing.assert_allclose(fits[0].powers, fits[2].powers, rtol=1e-5)


def test_grey_and_transparent_pictures_become_rgb():
    vae = Identity()
    calibrate(vae, [Image.fromarray(noisy(16, 16)), Image.fromarray(noisy(16, 16, 4))])
    assert vae.batches == [(2, 3, 16, 16)]


def test_other_sizes_are_scaled_and_cut_and_small_ones_left_out(caplog):
    vae = Identity()
    pictures = [noisy(64, 64, 3), noisy(128, 96, 3), noisy(40, 200, 3), noisy(31, 64, 3)]
    assert calibrate(vae, pictures, batch_size=8).n == 3
    assert vae.batches == [(3, 3, 64, 64)]
    assert "1 pictures were left out: smaller than half of 64x64 px" in caplog.text


def test_videos_count_their_frames():
    vae = Identity(temperal_downsample=[True])
    fit = calibrate(vae, [noisy(5, 16, 24, 3), noisy(5, 16, 24, 3), noisy(9, 16, 24, 3)])
    assert vae.batches == [(2, 3, 5, 16, 24), (1, 3, 9, 16, 24)]
    assert (fit.n, fit.height, fit.width) == (3, 16, 24)


def test_an_image_vae_sees_the_frames_of_a_video_one_by_one():
    vae = Identity()
    video = noisy(3, 16, 24, 3)
    fit = calibrate(vae, [video])
    assert vae.batches == [(1, 3, 16, 24)] * 3
    by_frame = calibrate(Identity(), list(video))
    np.testing.assert_allclose(fit.powers, by_frame.powers, rtol=1e-6)


# ------------------------------------------------------------------ latents as the transformer sees them


def test_flux_1_latents_are_shifted_and_scaled():
    plain = calibrate(Identity(), [noisy(16, 16, 3)])
    scaled = calibrate(Identity(scaling_factor=0.5, shift_factor=0.1), [noisy(16, 16, 3)])
    np.testing.assert_allclose(scaled.powers, np.array(plain.powers) / 4, rtol=1e-5)


def test_latents_mean_and_std_are_taken_out_channel_by_channel():
    wan = AutoencoderKLWan(
        base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    picture = noisy(48, 64, 3)
    fit = calibrate(wan, [picture])
    assert (fit.height, fit.width) == (6, 8)
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None, :, None] / 127.5 - 1
    with torch.no_grad():
        z = wan.encode(pixels).latent_dist.mode()
    mean, std = (torch.tensor(wan.config[n]).view(1, 16, 1, 1, 1) for n in ("latents_mean", "latents_std"))
    z = (z - mean) / std
    power = (dct_basis(6) @ z @ dct_basis(8).T).square().mean((0, 1, 2))
    np.testing.assert_allclose(fit.powers, fit_power(power.double().numpy(), 1).powers, rtol=1e-4)


def test_flux_2_latents_are_normalised_as_patches_and_measured_unpatched():
    torch.manual_seed(0)
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    needed, _ = Flux2Pipeline._get_signature_keys(Flux2Pipeline)
    theirs = Flux2Pipeline(**dict.fromkeys(needed) | {"vae": vae})
    picture = noisy(32, 48, 3)
    fit = calibrate(vae, [picture])
    assert (fit.height, fit.width) == (16, 24)
    with torch.no_grad():
        z = theirs._encode_vae_image(torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1, None)
    assert z.shape == (1, 16, 8, 12)
    unpatched = Flux2Pipeline._unpatchify_latents(z)
    assert torch.equal(patchify(unpatched, 2), z)
    power = (dct_basis(16) @ unpatched @ dct_basis(24).T).square().mean((0, 1))
    np.testing.assert_allclose(fit.powers, fit_power(power.double().numpy(), 1).powers, rtol=1e-4)


def test_a_vae_that_takes_rgba_gets_opaque_pictures():
    seen = inspect.signature(AutoencoderKLQwenImage21.__init__).parameters["in_channels"].default
    vae = Identity(in_channels=seen)
    calibrate(vae, [noisy(16, 16, 3)])
    assert vae.batches == [(1, seen, 16, 16)]


def test_a_real_vae_end_to_end():
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2,
    )  # fmt: skip
    fit = progressive.calibrate(vae, [noisy(50, 70, 3), noisy(50, 70, 3)])
    assert (fit.height, fit.width) == (25, 35)
    assert fit.amplitude > 0


# ------------------------------------------------------------------ files


def test_profiles_are_saved_and_read_back(tmp_path):
    fit = calibrate(Identity(), fields(Spectrum(30, 1.7), (32, 32), 8))
    path = tmp_path / "spectrum.json"
    fit.save(path)
    assert Calibration.load(path) == fit
    assert spectrum_profile(path) == fit.spectrum
    assert json.loads(path.read_text())["beta"] == fit.beta


@pytest.mark.parametrize("text", ["{", "[]", '{"amplitude": 1}', '{"amplitude": -1, "beta": 1}'])
def test_a_file_that_is_no_profile(tmp_path, text):
    path = tmp_path / "spectrum.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"spectrum.json"):
        spectrum_profile(path)
    with pytest.raises(ValueError, match=r"spectrum.json is not a spectrum that `calibrate` saved"):
        Calibration.load(path)


def test_the_plot_is_a_png_that_shows_something(tmp_path):
    path = tmp_path / "spectrum.png"
    calibrate(Identity(), fields(Spectrum(30, 1.7), (32, 32), 8)).plot(path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width > 600
        assert len(image.convert("RGB").getcolors(1 << 24)) > 20


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        ([], {}, "images is empty; calibration needs at least one picture"),
        ([noisy(16, 16, 3)], {"height_px": 64, "width_px": 64}, "no picture is large enough for 64x64 px"),
        (["a.png"], {}, "cannot calibrate on a str; give PIL pictures"),
        (
            [np.zeros((16, 16, 3))],
            {},
            r"cannot calibrate on a ndarray of shape \(16, 16, 3\) and type float64",
        ),
        ([np.zeros((16, 16, 3), np.uint8)], {}, "no power at some frequencies; are the pictures blank"),
        (
            [noisy(16, 16, 3)],
            {"fit_range": (5.0, 5.5)},
            r"fit_range is \(5.0, 5.5\); a grid of 16x16 has [01]",
        ),
        ([torch.full((3, 16, 16), torch.nan)], {}, "latents of pictures 0 to 0 are not finite"),
    ],
)
def test_what_cannot_be_measured(images, options, message):
    with pytest.raises(ValueError, match=message):
        calibrate(Identity(), images, **options)


def test_something_that_cannot_encode():
    with pytest.raises(ValueError, match="object cannot encode pictures; give a pipeline or its VAE"):
        calibrate(object(), [noisy(16, 16, 3)])
