"""Change a latent's grid in the frequency domain. Knows no steps, no model and no random numbers.

A transform is a family of orthonormal real bases, one for each side length, whose functions are ordered by
frequency; the first m functions of the basis for n cells mean the same as the basis for m cells. So a
coarse grid *is* the low-frequency corner of a finer one, and the map from m to n cells is one matrix,

    U(n, m) = basis(n)[:m].T @ basis(m)        # [n, m], orthonormal columns

applied to rows and columns, never to frames. All products are float32, batched, on the latents' device.
Bases: `dct` (DCT-II), `fft` (the real Fourier basis about cell centres: sines and cosines instead of
complex pairs, so real stays real on odd sides too), `haar` (ratios that are powers of 2).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from overtone.progressive.formulas import Spectrum
from overtone.progressive.settings import Transform


@lru_cache(maxsize=512)
def dct_basis(size: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """Orthonormal DCT-II matrix [size, size]: `basis @ x` transforms, `basis.T @ X` transforms back.

    Row k is cos(pi k (j + 1/2) / size) over cells j, scaled to norm 1: k / 2 cycles over the side.
    """
    return _tensor(_dct(size), device, dtype)


@lru_cache(maxsize=512)
def fft_basis(size: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """Real Fourier matrix [size, size], used like `dct_basis`; rows 2k - 1, 2k: k cycles over the side."""
    return _tensor(_fft(size), device, dtype)


def _dct(size: int) -> np.ndarray:
    cell = (np.arange(size) + 0.5) / size
    basis = np.cos(np.pi * np.arange(size)[:, None] * cell) * np.sqrt(2 / size)
    basis[0] /= np.sqrt(2)
    return basis


def _fft(size: int) -> np.ndarray:
    """Real Fourier basis, float64 [size, size]: constant, sin 1, cos 1, sin 2, cos 2, ... about cell centres.

    On an even side the last row is the sine alone: about cell centres the cosine at Nyquist is zero
    everywhere. Sines come first so that this row falls in the corner of every finer basis too.
    """
    cell = (np.arange(size) + 0.5) / size
    rows = [np.full(size, 1 / np.sqrt(size))]
    for k in range(1, size // 2 + 1):
        if 2 * k == size:
            rows.append(np.sin(2 * np.pi * k * cell) / np.sqrt(size))
        else:
            rows.append(np.sin(2 * np.pi * k * cell) * np.sqrt(2 / size))
            rows.append(np.cos(2 * np.pi * k * cell) * np.sqrt(2 / size))
    return np.stack(rows)


@lru_cache(maxsize=512)
def widening(
    transform: Transform,
    fine: int,
    coarse: int,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """U: the matrix [fine, coarse] that lays a coarse side into a finer one; U.T is the way back.

    ValueError if fine < coarse, or if `haar` is asked for a ratio that is no power of 2.
    """
    if fine < coarse or coarse < 1:
        raise ValueError(f"cannot lay {coarse} cells into {fine}; a grid can only grow")
    if transform == "haar":
        ratio = fine // coarse
        if ratio * coarse != fine or ratio.bit_count() != 1:
            raise ValueError(
                f"transform `haar` can only double a grid, again and again; got {coarse} to {fine}"
            )
        matrix = np.repeat(np.eye(coarse), ratio, axis=0) / np.sqrt(ratio)  # block means, orthonormal
    elif fine == coarse:
        matrix = np.eye(fine)
    else:
        basis = _dct if transform == "dct" else _fft
        matrix = basis(fine)[:coarse].T @ basis(coarse)
    return _tensor(matrix, device, dtype)


def _tensor(matrix: np.ndarray, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # cached for all callers, also those who differentiate
        return torch.from_numpy(np.ascontiguousarray(matrix)).to(device=device, dtype=dtype)


def corner(
    latents: Tensor, height: int, width: int, *, transform: Transform = "dct", patch: int = 1
) -> Tensor:
    """Low-frequency corner of a grid, as a grid: [..., H, W] -> [..., height, width], float32.

    An orthogonal projection, so white noise stays exactly white. With `patch` p > 1 the channels are the
    p * p sub-pixel planes of a finer latent, and the corner is taken of that.
    """
    latents = unpatchify(latents.float(), patch)
    rows, columns = _pair(transform, latents.shape[-2:], (height * patch, width * patch), latents.device)
    return patchify(rows.T @ latents @ columns, patch)


def expand(
    latents: Tensor,
    noise: Tensor,
    sigma: float,
    height: int,
    width: int,
    *,
    kappa: float = 1.0,
    transform: Transform = "dct",
    patch: int = 1,
    fill: Spectrum | None = None,
) -> Tensor:
    """Latents at noise level `sigma` on a finer grid: kappa * (low: the latents, high: sigma * noise).

    latents [B, C, h, w] or [B, C, T, h, w]; noise the same with any grid from height x width upward, of
    which the corner is used, so that all stages can share one full-resolution noise. Returns float32
    [B, C, (T,) height, width] on the latents' device. `patch` as in `corner`: channels are C * p * p.

    With `fill`, the signal's spectrum on the finer grid, the noise filled in also stands for the signal that
    a trajectory would have there by now: at s = kappa * sigma a coefficient is scaled to the standard
    deviation sqrt((1 - s)^2 P(w) + s^2) instead of s. That is the exact solution of the flow where the data
    are Gaussian, and its first order in the signal where they are not and noise dominates.
    """
    latents = unpatchify(latents.float(), patch)
    noise = unpatchify(noise.to(latents.device, torch.float32), patch)
    target = (height * patch, width * patch)
    if noise.shape[-2:] != target:
        rows, columns = _pair(transform, noise.shape[-2:], target, latents.device)
        noise = rows.T @ noise @ columns
    if fill is not None:
        noise = _shaped(noise, fill, kappa * sigma, transform, latents.shape[-2:])
    rows, columns = _pair(transform, target, latents.shape[-2:], latents.device)
    # basis(n).T @ corner(...) @ basis(n) in four products: the noise's own low corner makes way.
    low = latents - sigma * (rows.T @ noise @ columns)  # [B, C, (T,) h, w]
    return patchify(kappa * (sigma * noise + rows @ low @ columns.T), patch)


def _pair(
    transform: Transform,
    fine: torch.Size | tuple[int, int],
    coarse: torch.Size | tuple[int, int],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    rows = widening(transform, fine[0], coarse[0], device)
    return rows, widening(transform, fine[1], coarse[1], device)


def _shaped(noise: Tensor, fill: Spectrum, sigma: float, transform: Transform, coarse: torch.Size) -> Tensor:
    """Noise [..., H, W] with each coefficient scaled by sqrt(1 + ((1 - sigma) / sigma)^2 P(w))."""
    grid = (noise.shape[-2], noise.shape[-1])
    gain = np.sqrt(1 + ((1 - sigma) / sigma) ** 2 * _power(fill, transform, grid))
    if transform == "haar":  # an octave is all that this basis tells apart: its mean power
        above = np.ones(grid, bool)
        above[: coarse[0], : coarse[1]] = False
        return noise * float(np.sqrt(np.mean(gain[above] ** 2))) if above.any() else noise
    return _scaled(noise, gain, transform)


def whiten(latents: Tensor, spectrum: Spectrum, sigma: float, transform: Transform = "dct") -> Tensor:
    """(1 - sigma) x0 + sigma eps [..., H, W] as white noise, where x0 has this spectrum on the whole grid:
    each coefficient over its standard deviation sqrt((1 - sigma)^2 P(w) + sigma^2). The grid may be a corner
    of the whole one. `haar` tells only octaves apart, and is whitened by the frequencies of `dct`."""
    return _scaled(latents, 1 / _deviation(latents, spectrum, sigma, transform), transform)


def colour(noise: Tensor, spectrum: Spectrum, sigma: float, transform: Transform = "dct") -> Tensor:
    """The inverse of `whiten`: white noise as latents at a noise level."""
    return _scaled(noise, _deviation(noise, spectrum, sigma, transform), transform)


def _deviation(latents: Tensor, spectrum: Spectrum, sigma: float, transform: Transform) -> np.ndarray:
    power = _power(spectrum, transform, (latents.shape[-2], latents.shape[-1]))
    return np.sqrt((1 - sigma) ** 2 * power + sigma**2)


def _power(spectrum: Spectrum, transform: Transform, grid: tuple[int, int]) -> np.ndarray:
    """P(w) of each coefficient, float64 [H, W]; the mean is taken to be as strong as half a cycle."""
    w = frequencies("dct" if transform == "haar" else transform, grid)
    return spectrum.amplitude * np.maximum(w, 0.5) ** -spectrum.beta


def _scaled(latents: Tensor, gain: np.ndarray, transform: Transform) -> Tensor:
    """[..., H, W] with each coefficient times its gain."""
    basis = fft_basis if transform == "fft" else dct_basis
    rows, columns = (basis(side, latents.device) for side in gain.shape)
    scale = torch.from_numpy(gain).to(latents.device, torch.float32)
    return rows.T @ (scale * (rows @ latents @ columns.T)) @ columns


def frequencies(transform: Transform, grid: tuple[int, int]) -> np.ndarray:
    """Radial frequency of each coefficient in cycles over the grid's shorter side, float64 [H, W]."""
    index = [np.arange(side) / 2 if transform == "dct" else (np.arange(side) + 1) // 2 for side in grid]
    rows, columns = (cycles * min(grid) / side for cycles, side in zip(index, grid, strict=True))
    return np.hypot(rows[:, None], columns[None, :])


def unpatchify(latents: Tensor, patch: int) -> Tensor:
    """[B, C * p * p, ..., h, w] -> [B, C, ..., h * p, w * p]; channel c * p * p + row * p + column."""
    if patch == 1:
        return latents
    batch, channels, *frames, height, width = latents.shape
    planes = latents.reshape(batch, channels // patch**2, patch, patch, -1, height, width)
    planes = planes.permute(0, 1, 4, 5, 2, 6, 3)  # [B, C, T, h, p, w, p]
    return planes.reshape(batch, channels // patch**2, *frames, height * patch, width * patch)


def patchify(latents: Tensor, patch: int) -> Tensor:
    """The inverse of `unpatchify`: [B, C, ..., h * p, w * p] -> [B, C * p * p, ..., h, w]."""
    if patch == 1:
        return latents
    batch, channels, *frames, height, width = latents.shape
    cells = latents.reshape(batch, channels, -1, height // patch, patch, width // patch, patch)
    cells = cells.permute(0, 1, 4, 6, 2, 3, 5)  # [B, C, p, p, T, h, w]
    return cells.reshape(batch, channels * patch**2, *frames, height // patch, width // patch)
