"""What `measure_consistency` found: its numbers, its file and its picture. Knows no model.

The file is JSON with the fields below, under their names; `progressive.schedule.consistency_profile` reads of
it what a plan needs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_COLOURS = ("#0b3954", "#2a6f97", "#61a5c2", "#d1495b", "#edae49", "#66a182", "#8d6a9f", "#888888")


@dataclass(frozen=True)
class Band:
    """One octave of frequencies."""

    low: float
    """Cycles over the shorter side of the picture, from here."""
    high: float
    """To below here."""
    error: float
    """Norm of the difference over the norm of what it is from, over rows, channels and frames."""


@dataclass(frozen=True)
class Prediction:
    """What a model predicts on a coarse grid, from the low band of what it predicts on the full one."""

    scale: float
    height: int
    """Of the coarse grid, in cells."""
    width: int
    sigma: float
    """Noise level of the full grid."""
    sigma_coarse: float
    """The level of the coarse grid with the same signal-to-noise ratio in the low band."""
    error: float
    """As in `Band`, of all frequencies that the coarse grid has."""
    bands: tuple[Band, ...]


@dataclass(frozen=True)
class Autoencoder:
    """The VAE's latent of a picture made smaller, from the low band of its latent of the whole picture."""

    scale: float
    height: int
    width: int
    error: float
    bands: tuple[Band, ...]


@dataclass(frozen=True)
class Consistency:
    """A model measured on several grids at several noise levels."""

    family: str
    height_px: int
    width_px: int
    height: int
    """The full latent grid, in cells."""
    width: int
    rows: int
    """Pictures or samples measured on."""
    source: str
    """`pictures` or `samples`."""
    guidance_scale: float | None
    true_cfg_scale: float | None
    """Guidance of the predictions, as the pipeline's call got it; None where it takes none."""
    predictions: tuple[Prediction, ...]
    """Each scale at each noise level."""
    autoencoder: tuple[Autoencoder, ...]
    """By scale; empty where the model has no VAE that encodes."""

    def to_json(self) -> str:
        """The fields, as JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def save(self, path: str | Path) -> None:
        """`to_json`, in a file."""
        Path(path).write_text(self.to_json())

    def text(self) -> str:
        """A table for a terminal: a line for each noise level, a column for each scale."""
        scales = sorted({found.scale for found in self.predictions})
        sigmas = sorted({found.sigma for found in self.predictions}, reverse=True)
        errors = {(found.sigma, found.scale): found.error for found in self.predictions}
        own = {found.scale: found.error for found in self.autoencoder}
        lines = [f"{'':>12}" + "".join(f"{f'scale {scale:g}':>12}" for scale in scales)]
        lines += [
            f"{f'sigma {sigma:g}':>12}" + "".join(f"{errors[sigma, scale]:>12.1%}" for scale in scales)
            for sigma in sigmas
        ]
        if own:
            lines.append(f"{'autoencoder':>12}" + "".join(f"{own[scale]:>12.1%}" for scale in scales))
        return "\n".join(lines)

    def plot(self, path: str | Path | BinaryIO) -> None:
        """A PNG: the error against the noise level, and by octave at the scale nearest to a half."""
        figure = Figure(figsize=(10.4, 4.2), dpi=140, layout="constrained")
        left, right = figure.subplots(1, 2)
        self._by_level(left)
        self._by_octave(right)
        for axes in (left, right):
            axes.set_ylim(bottom=0)
            axes.legend(frameon=False, fontsize=8)
        figure.suptitle(f"{self.family}, {self.rows} {self.source}, {self.height} x {self.width} cells")
        figure.savefig(path, format="png")

    def _by_level(self, axes: Axes) -> None:
        own = {found.scale: found.error for found in self.autoencoder}
        for number, scale in enumerate(sorted({found.scale for found in self.predictions})):
            of_scale = sorted((f.sigma, 100 * f.error) for f in self.predictions if f.scale == scale)
            colour = _COLOURS[number % len(_COLOURS)]
            axes.plot(*zip(*of_scale, strict=True), "o-", ms=4, color=colour, label=f"scale {scale:g}")
            if scale in own:
                axes.axhline(100 * own[scale], color=colour, lw=0.9, ls=":", label="its autoencoder")
        axes.set_xlabel("noise level of the full grid, sigma")
        axes.set_ylabel("prediction from the full grid's low band, %")

    def _by_octave(self, axes: Axes) -> None:
        scale = min((found.scale for found in self.predictions), key=lambda scale: abs(scale - 0.5))
        lines: list[tuple[str, str, Sequence[Band]]] = [
            (f"sigma {found.sigma:g}", "o-", found.bands)
            for found in self.predictions
            if found.scale == scale
        ]
        lines += [("autoencoder", "s:", found.bands) for found in self.autoencoder if found.scale == scale]
        for number, (label, style, bands) in enumerate(lines):
            errors = [100 * band.error for band in bands]
            axes.plot(
                range(len(bands)), errors, style, ms=4, color=_COLOURS[number % len(_COLOURS)], label=label
            )
        names = [f"{band.low:g}-{band.high:g}" for band in lines[0][2]]
        axes.set_xticks(range(len(names)), names, fontsize=8)
        axes.set_xlabel(f"cycles over the shorter side, at scale {scale:g}")
