"""The power spectrum of a VAE's latents, measured on pictures: what a coarse grid may leave out, and when.

    fit = calibrate(pipe, pictures)          # any iterable of pictures or videos, read once, as it comes
    fit.save("spectrum.json")                # a profile: {"amplitude": ..., "beta": ..., ...}
    fit.plot("spectrum.png")
    progressive.generate(pipe, prompts, spectrum=(fit.amplitude, fit.beta))

Knows no files of pictures, no sampling. The latents are taken as the transformer sees them: centred and
scaled the way the pipelines do it, and of patched latents (FLUX.2) the finer grid that patches stand for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from overtone.progressive.formulas import Spectrum
from overtone.progressive.spectral import dct_basis, frequencies
from overtone.progressive.vae import Coder, batches, usable_pictures


@dataclass(frozen=True)
class Calibration:
    """P(w) = amplitude * w^-beta as measured: a least-squares line through the logarithms of ring means."""

    amplitude: float
    beta: float
    r2: float
    """Share of the variance of log P that the line explains, over the fitted range."""
    frequencies: tuple[float, ...]
    """Of the rings, in cycles over the shorter side: half a cycle wide each, from 0.5 up to Nyquist."""
    powers: tuple[float, ...]
    """Mean square of the orthonormal DCT coefficients in each ring, over pictures, channels and frames."""
    fit_range: tuple[float, float]
    """Frequencies that the line was fitted between."""
    n: int
    """Pictures or videos measured."""
    height: int
    width: int
    """The latent grid, in cells. On another grid the same pictures have another amplitude."""

    @property
    def spectrum(self) -> Spectrum:
        return Spectrum(self.amplitude, self.beta)

    def to_json(self) -> str:
        """JSON that `load` and `progressive.checkpoints.spectrum_profile` read."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def save(self, path: str | Path) -> None:
        """`to_json`, in a file."""
        Path(path).write_text(self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """What `save` wrote. ValueError for anything else."""
        try:
            values = json.loads(Path(path).read_text())
            tuples = {name: tuple(values[name]) for name in ("frequencies", "powers", "fit_range")}
            return cls(**values | tuples)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a spectrum that `calibrate` saved: {error!r}") from error

    def plot(self, path: str | Path | BinaryIO) -> None:
        """A PNG of the measured spectrum and the line."""
        figure = Figure(figsize=(6.4, 4.4), dpi=140, layout="constrained")
        axes = figure.subplots()
        w = np.array(self.frequencies)
        axes.loglog(w, self.powers, "o", markersize=3, color="#2a6f97", label=f"measured, n = {self.n}")
        inside = w[(w >= self.fit_range[0]) & (w <= self.fit_range[1])]
        label = f"{self.amplitude:.4g} w^-{self.beta:.4g}, R² = {self.r2:.4f}"
        axes.loglog(inside, self.amplitude * inside**-self.beta, color="#d1495b", label=label)
        axes.axhline(1, color="#888888", linewidth=0.8, linestyle=":", label="white noise at sigma 1")
        axes.set_xlabel("cycles over the shorter side, w")
        axes.set_ylabel("mean square of a DCT coefficient, P(w)")
        axes.set_title(f"latents of {self.height} x {self.width} cells")
        axes.legend(frameon=False)
        figure.savefig(path, format="png")


def calibrate(
    pipe_or_vae: Any,
    images: Iterable[Any],
    *,
    height_px: int | None = None,
    width_px: int | None = None,
    batch_size: int = 4,
    limit: int | None = None,
    fit_range: tuple[float, float] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Calibration:
    """Fit (A, beta) to the latents of `images`: PIL pictures, uint8 arrays [H, W, 3] or videos [T, H, W, 3],
    or float tensors [C, H, W] or [C, T, H, W] as the VAE takes them (in [-1, 1]).

    They are read once and never held together. Each is scaled and cut to height_px x width_px: the size that
    samples will have, since amplitudes grow with the grid; unset: the family's usual size, or for a VAE alone
    the first picture's. Pictures with a side under half of that are left out, for they lack the fine detail.
    `fit_range`: cycles over the shorter side; unset: above 1, up to just below Nyquist. `on_progress` gets
    the number measured so far. ValueError where nothing usable comes in or the size cannot be made.
    """
    coder = Coder(pipe_or_vae)
    stream = iter(images)
    try:
        first = next(stream)
    except StopIteration:
        raise ValueError("images is empty; calibration needs at least one picture") from None
    size = coder.size(height_px, width_px, first)
    usable = usable_pictures(chain([first], stream), size)
    total: Tensor | None = None
    count = 0
    for batch in batches(islice(usable, limit), batch_size):
        latents = coder.latents(batch)  # [B, C, H, W] or [B, C, T, H, W]
        power = _power(latents)
        if not torch.isfinite(power).all():
            raise ValueError(
                f"the VAE's latents of pictures {count} to {count + len(batch) - 1} are not finite"
            )
        total = power if total is None else total + power
        count += len(batch)
        if on_progress is not None:
            on_progress(count)
    if total is None:
        raise ValueError(
            f"no picture is large enough for {size[0]}x{size[1]} px; give a smaller height_px and width_px"
        )
    return fit_power((total / count).cpu().numpy(), count, fit_range)


def fit_power(power: NDArray[Any], n: int, fit_range: tuple[float, float] | None = None) -> Calibration:
    """The line through a mean power spectrum [H, W] of orthonormal DCT coefficients."""
    grid = (power.shape[0], power.shape[1])
    low, high = fit_range or (1.0, (min(grid) - 1) / 2)
    w = frequencies("dct", grid)
    ring = np.rint(2 * w).astype(int)
    rings = np.arange(1, min(grid))
    sizes = np.bincount(ring.ravel())[rings]
    middles = np.bincount(ring.ravel(), w.ravel())[rings] / sizes
    powers = np.bincount(ring.ravel(), power.ravel())[rings] / sizes
    inside = (middles > low) & (middles < high)
    if inside.sum() < 3:
        raise ValueError(
            f"fit_range is {(low, high)}; a grid of {grid[0]}x{grid[1]} has {inside.sum()} rings in it, "
            "and a fit needs 3"
        )
    if not (powers[inside] > 0).all():
        raise ValueError("the latents have no power at some frequencies; are the pictures blank?")
    x, y = np.log(middles[inside]), np.log(powers[inside])
    slope, intercept = np.polyfit(x, y, 1)
    for _ in range(3):  # a ring's mean power is that of a frequency a little below its middle, by the slope
        means = np.bincount(ring.ravel(), np.maximum(w, 0.5).ravel() ** slope)[rings] / sizes
        x = np.log(means[inside]) / slope
        slope, intercept = np.polyfit(x, y, 1)
    residual = y - (slope * x + intercept)
    spread = y - y.mean()
    return Calibration(
        amplitude=float(np.exp(intercept)),
        beta=float(-slope),
        r2=float(1 - residual @ residual / (spread @ spread)),
        frequencies=tuple(middles.tolist()),
        powers=tuple(powers.tolist()),
        fit_range=(float(low), float(high)),
        n=n,
        height=grid[0],
        width=grid[1],
    )


def _power(latents: Tensor) -> Tensor:
    """Squares of the DCT coefficients, float64 [H, W]: mean over channels and frames, sum over the batch."""
    height, width = latents.shape[-2:]
    rows, columns = dct_basis(height, latents.device), dct_basis(width, latents.device)
    squares = (rows @ latents.float() @ columns.T).square()
    return squares.flatten(1, -3).mean(1, dtype=torch.float64).sum(0)
