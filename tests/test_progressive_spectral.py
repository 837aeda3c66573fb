"""Changes of grid: exactness, round trips, white noise, sub-pixel planes, and what a transition costs."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from diffusers import Flux2Pipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from overtone.progressive.formulas import Spectrum, rewind, side_ratio
from overtone.progressive.spectral import (
    corner,
    dct_basis,
    expand,
    fft_basis,
    frequencies,
    patchify,
    unpatchify,
    widening,
)

settings.register_profile("patient", deadline=None)  # a busy machine is not a failure
settings.load_profile("patient")

TRANSFORMS = ("dct", "fft", "haar")


@st.composite
def changes(draw, transforms=TRANSFORMS):
    """(transform, coarse grid, fine grid): any sides, odd ones too, but haar only doubles."""
    transform = draw(st.sampled_from(transforms))
    coarse = draw(st.tuples(st.integers(1, 24), st.integers(1, 24)))
    if transform == "haar":
        factor = draw(st.sampled_from([1, 2, 4]))
        return transform, coarse, tuple(side * factor for side in coarse)
    return transform, coarse, tuple(side + draw(st.integers(0, 24)) for side in coarse)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -------------------------------------------------------------------------------------------------- bases


@pytest.mark.parametrize("basis", [dct_basis, fft_basis])
@pytest.mark.parametrize("size", [1, 2, 3, 8, 45, 90])
def test_bases_are_orthonormal(basis, size):
    matrix = basis(size, "cpu", torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("size", [7, 8])
def test_dct_is_the_fourier_transform_of_the_mirrored_signal(size):
    values = np.random.default_rng(0).standard_normal(size)
    spectrum = np.fft.fft(np.concatenate([values, values[::-1]]))[:size]
    wanted = (np.exp(-0.5j * np.pi * np.arange(size) / size) * spectrum).real / np.sqrt(2 * size)
    wanted[0] /= np.sqrt(2)
    ours = dct_basis(size, "cpu", torch.float64) @ torch.from_numpy(values)
    np.testing.assert_allclose(ours, wanted, atol=1e-12)


@pytest.mark.parametrize("size", [7, 8])
def test_fft_basis_has_the_power_of_the_complex_transform(size):
    """Rows 2k - 1 and 2k together hold what the complex coefficients k and -k hold."""
    values = np.random.default_rng(0).standard_normal(size)
    ours = (fft_basis(size, "cpu", torch.float64) @ torch.from_numpy(values)).square().numpy()
    power = np.abs(np.fft.fft(values, norm="ortho")) ** 2
    for k in range(1, (size + 1) // 2):
        assert ours[2 * k - 1] + ours[2 * k] == pytest.approx(power[k] + power[-k])
    assert ours[0] == pytest.approx(power[0])


@settings(max_examples=60)
@given(changes())
def test_widenings_have_orthonormal_columns_so_white_noise_stays_white(change):
    transform, coarse, fine = change
    for small, large in zip(coarse, fine, strict=True):
        matrix = widening(transform, large, small, "cpu", torch.float64)
        identity = torch.eye(small, dtype=torch.float64)
        torch.testing.assert_close(matrix.T @ matrix, identity, atol=1e-12, rtol=0)


@settings(max_examples=60)
@given(st.sampled_from(["dct", "fft"]), st.integers(1, 30), st.integers(0, 30), st.integers(0, 30))
def test_two_widenings_are_one(transform, small, more, still_more):
    middle, large = small + more, small + more + still_more
    direct = widening(transform, large, small, "cpu", torch.float64)
    by_steps = widening(transform, large, middle, "cpu", torch.float64) @ widening(
        transform, middle, small, "cpu", torch.float64
    )
    torch.testing.assert_close(by_steps, direct, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dct", 8, 9), "cannot lay 9 cells into 8; a grid can only grow"),
        (("dct", 8, 0), "cannot lay 0 cells into 8"),
        (("haar", 12, 8), "`haar` can only double a grid, again and again; got 8 to 12"),
        (("haar", 24, 8), "got 8 to 24"),
    ],
)
def test_widenings_that_do_not_exist(arguments, message):
    with pytest.raises(ValueError, match=message):
        widening(*arguments, "cpu")


# ----------------------------------------------------------------------------------------------- expansions


@settings(max_examples=60)
@given(changes(), st.floats(0.0, 1.0), st.booleans())
def test_the_corner_of_an_expansion_is_what_went_in(change, sigma, video):
    transform, coarse, fine = change
    kappa = rewind(sigma, side_ratio(coarse, fine))[0]
    leading = (2, 3, 2) if video else (2, 3)
    latents, noise = normal(*leading, *coarse), normal(*leading, *fine, seed=1)
    larger = expand(latents, noise, sigma, *fine, kappa=kappa, transform=transform)
    assert larger.shape == (*leading, *fine)
    back = corner(larger, *coarse, transform=transform)
    torch.testing.assert_close(back, kappa * latents, atol=2e-5 * kappa, rtol=0)


@settings(max_examples=30)
@given(changes())
def test_what_is_filled_in_is_the_noise_and_nothing_else(change):
    """With the coarse stage's own noise in the corner, an expansion gives the fine noise itself."""
    transform, coarse, fine = change
    noise = normal(1, 2, *fine)
    low = corner(noise, *coarse, transform=transform)
    larger = expand(0.7 * low, noise, 0.7, *fine, transform=transform)
    torch.testing.assert_close(larger, 0.7 * noise, atol=1e-5, rtol=0)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_ratio_one_is_identity(transform):
    latents = normal(2, 3, 9, 12)
    same = expand(latents, normal(2, 3, 9, 12, seed=1), 0.5, 9, 12, transform=transform)
    torch.testing.assert_close(same, latents, atol=1e-6, rtol=0)
    torch.testing.assert_close(corner(latents, 9, 12, transform=transform), latents, atol=1e-6, rtol=0)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_full_resolution_noise_serves_every_rung(transform):
    """The noise of an expansion may have any finer grid; its corner is used."""
    latents, noise = normal(1, 2, 4, 6), normal(1, 2, 16, 24, seed=1)
    on_the_way = expand(latents, noise, 0.5, 8, 12, transform=transform)
    cut = expand(latents, corner(noise, 8, 12, transform=transform), 0.5, 8, 12, transform=transform)
    torch.testing.assert_close(on_the_way, cut, atol=1e-5, rtol=0)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_constant_keeps_its_value_when_kappa_is_the_ratio(transform):
    flat = torch.full((1, 1, 8, 8), 3.0)
    larger = expand(flat, torch.zeros(1, 1, 16, 16), 0.0, 16, 16, kappa=2.0, transform=transform)
    torch.testing.assert_close(larger, torch.full((1, 1, 16, 16), 3.0), atol=1e-5, rtol=0)


def test_a_smooth_picture_is_the_same_picture_on_the_finer_grid():
    def wave(size):
        cell = (torch.arange(size) + 0.5) / size
        return torch.cos(3 * torch.pi * cell)[:, None] * torch.cos(2 * torch.pi * cell)

    larger = expand(wave(24)[None, None], torch.zeros(1, 1, 54, 54), 0.0, 54, 54, kappa=54 / 24)
    torch.testing.assert_close(larger[0, 0], wave(54), atol=1e-5, rtol=0)


def test_frames_never_mix():
    latents, noise = normal(1, 2, 3, 4, 4), normal(1, 2, 3, 8, 8, seed=1)
    whole = expand(latents, noise, 0.5, 8, 8)
    for frame in range(3):
        alone = expand(latents[:, :, frame], noise[:, :, frame], 0.5, 8, 8)
        torch.testing.assert_close(whole[:, :, frame], alone, atol=1e-6, rtol=0)


def test_low_precision_latents_are_expanded_in_float32():
    latents = normal(1, 1, 4, 4).bfloat16()
    larger = expand(latents, normal(1, 1, 8, 8).bfloat16(), 0.3, 8, 8)
    assert larger.dtype == torch.float32
    torch.testing.assert_close(corner(larger, 4, 4), latents.float(), atol=1e-5, rtol=0)


def test_expansions_can_be_differentiated_even_if_a_basis_was_made_while_sampling():
    widening.cache_clear()
    with torch.inference_mode():
        expand(normal(1, 1, 5, 5), normal(1, 1, 10, 10), 0.5, 10, 10)
    latents = normal(1, 1, 5, 5).requires_grad_()
    expand(latents, normal(1, 1, 10, 10), 0.5, 10, 10).square().sum().backward()
    assert latents.grad is not None
    assert latents.grad.abs().max() > 0


# ---------------------------------------------------------------------------------- noise with a spectrum


@pytest.mark.parametrize("transform", ["dct", "fft"])
def test_fill_gives_each_coefficient_the_trajectorys_standard_deviation(transform):
    """sqrt((1 - s)^2 P(w) + s^2) at s = kappa * sigma, coefficient by coefficient above the corner."""
    sigma, coarse, fine, spectrum = 0.6, (6, 10), (12, 20), Spectrum(30.0, 1.7)
    kappa, level = rewind(sigma, side_ratio(coarse, fine))
    basis = dct_basis if transform == "dct" else fft_basis
    rows, columns = basis(fine[0]), basis(fine[1])
    noise = normal(1, 1, *fine)
    larger = expand(
        torch.zeros(1, 1, *coarse), noise, sigma, *fine, kappa=kappa, transform=transform, fill=spectrum
    )
    ratio = (rows @ larger @ columns.T) / (rows @ noise @ columns.T)
    wanted = np.sqrt((1 - level) ** 2 * spectrum.power(frequencies(transform, fine).clip(0.5)) + level**2)
    above = np.ones(fine, bool)
    above[: coarse[0], : coarse[1]] = False
    np.testing.assert_allclose(ratio[0, 0].numpy()[above], wanted[above], rtol=2e-3)


def test_fill_leaves_the_corner_alone():
    latents, noise, spectrum = normal(1, 2, 6, 6), normal(1, 2, 12, 12, seed=1), Spectrum(30.0, 1.7)
    for transform in TRANSFORMS:
        larger = expand(latents, noise, 0.5, 12, 12, transform=transform, fill=spectrum)
        torch.testing.assert_close(corner(larger, 6, 6, transform=transform), latents, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("transform", "grid"), [("dct", (8, 8)), ("fft", (8, 8)), ("dct", (30, 52))])
def test_frequencies_count_cycles_over_the_shorter_side(transform, grid):
    w = frequencies(transform, grid)
    assert w.shape == grid
    assert w[0, 0] == 0
    # One more half-cycle down the shorter side; along the longer side it is a lower frequency.
    assert w[1, 0] == (0.5 if transform == "dct" else 1)
    assert w[0, 1] == w[1, 0] * min(grid) / grid[1]
    assert w[-1, 0] == pytest.approx((grid[0] - 1) / 2 if transform == "dct" else grid[0] // 2)
    np.testing.assert_allclose(w[2, 3], np.hypot(w[2, 0], w[0, 3]))


# ------------------------------------------------------------------------------------------- sub-pixel planes


@settings(max_examples=30)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_patches_round_trip(patch, channels, height, width, video):
    leading = (2, channels * patch**2, 3) if video else (2, channels * patch**2)
    cells = normal(*leading, height, width)
    planes = unpatchify(cells, patch)
    assert planes.shape[1] == channels
    assert planes.shape[-2:] == (height * patch, width * patch)
    assert torch.equal(patchify(planes, patch), cells)


def test_patches_are_laid_out_as_flux_2_packs_them():
    latents = normal(1, 4, 6, 8)
    assert torch.equal(patchify(latents, 2), Flux2Pipeline._patchify_latents(latents))
    assert torch.equal(
        unpatchify(patchify(latents, 2), 2), Flux2Pipeline._unpatchify_latents(patchify(latents, 2))
    )


def test_expanding_each_sub_pixel_plane_by_itself_shifts_phases():
    """A slope across the picture stays a slope only where the expansion knows the planes' places."""

    def slope(size):
        return (((torch.arange(size) + 0.5) / size) ** 2).expand(1, 1, size, size)

    cells = patchify(slope(32), 2)  # 16 x 16 cells of four planes
    nothing = torch.zeros(1, 4, 32, 32)
    known = unpatchify(expand(cells, nothing, 0.0, 32, 32, kappa=2.0, patch=2), 2)
    ignored = unpatchify(expand(cells, nothing, 0.0, 32, 32, kappa=2.0), 2)
    inside = (..., slice(16, 48))
    error, shifted = ((made - slope(64))[inside].abs().max() for made in (known, ignored))
    assert error < 1e-4
    assert shifted > 5e-3  # a quarter cell off, in steps that tell the planes apart
    assert (ignored[inside].diff().diff().abs().max() / known[inside].diff().diff().abs().max()) > 10


def test_corner_and_expansion_agree_on_patches():
    cells = normal(2, 8, 6, 10)
    larger = expand(cells, normal(2, 8, 12, 20, seed=1), 0.4, 12, 20, kappa=1.3, patch=2)
    torch.testing.assert_close(corner(larger, 6, 10, patch=2), 1.3 * cells, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------ cost


def test_a_transition_costs_under_two_percent_of_a_step_of_the_smallest_real_model():
    """Wan 2.1 1.3B at 1024 px has 1.42e9 parameters and 4,096 tokens. Its step is put at what its matrix
    products alone would take at the speed that this processor reaches on a large one: no step is faster."""
    latents, noise = normal(1, 16, 64, 64), normal(1, 16, 128, 128)
    transition = best_of(lambda: expand(latents, noise, 0.8, 128, 128, kappa=1.1), 20)
    tokens, width = 256, 1536
    hidden, weight = normal(tokens, width), normal(width, width)
    flops_per_s = 2 * tokens * width**2 / best_of(lambda: hidden @ weight, 5)
    step = 2 * 1.42e9 * 4096 / flops_per_s
    assert transition < 0.02 * step
    print(f"transition {1e3 * transition:.2f} ms, step at least {step:.1f} s: {transition / step:.2e}")


def best_of(work, times):
    work()
    took = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        took.append(time.perf_counter() - start)
    return min(took)
