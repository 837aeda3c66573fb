"""How far a model's predictions on coarse grids are from the low band of its full ones, by frequency.

    found = measure_consistency(Engine(pipe), pictures=captioned)      # or prompts=[...]: on its own samples
    found.save("consistency.json")        # `sampling.consistency` of a spec; `schedule.consistency_profile`
    found.plot("consistency.png")

What a prediction is: one call of the pipeline for one step from sigma to 0, which ends at x - sigma v, the
picture that the model takes the noise for. Both grids get the same noise: the coarse one the low band of the
full latent, brought to the level with its signal-to-noise ratio (`formulas.matched`). A model that is
consistent between grids would give the low band of the same picture. The autoencoder is measured beside it:
its latent of a picture made smaller, against the low band of its latent of the whole one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from overtone.progressive import noise
from overtone.progressive.consistency_report import Autoencoder, Band, Consistency, Prediction
from overtone.progressive.engine import Engine, StageInput
from overtone.progressive.formulas import Grid, matched, rewind, side_ratio
from overtone.progressive.layouts import shape
from overtone.progressive.schedule import SamplingPlan, Stage, coarse_grid
from overtone.progressive.settings import NO_CACHE, Sampling
from overtone.progressive.spectral import corner, dct_basis, frequencies, patchify, unpatchify
from overtone.progressive.staged import Trajectory
from overtone.progressive.vae import Coder, batches, usable_pictures

SCALES = (0.25, 0.5, 0.75)
SIGMAS = (0.95, 0.9, 0.8, 0.7, 0.55, 0.4, 0.2)


def measure_consistency(
    engine: Engine,
    *,
    pictures: Iterable[tuple[Any, str]] | None = None,
    prompts: Sequence[str] = (),
    scales: Sequence[float] = SCALES,
    sigmas: Sequence[float] = SIGMAS,
    sampling: Sampling | None = None,
    batch_size: int = 4,
    limit: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Consistency:
    """Measure on `pictures`, pairs of a picture (as `calibrate` takes it) and its text, which may be empty;
    or on the model's own samples of `prompts`, made at full resolution from seeds 0, 1, 2, ...

    `scales`: grids over the full one, in (0, 1). `sigmas`: noise levels of the full grid, in (0, 1).
    `sampling`: size, steps of the own samples, guidance; unset: the model's usual ones. `limit`: most rows.
    `on_progress` gets the number of rows measured so far. ValueError where nothing can be measured: a grid
    that the family cannot make, no pictures of the size, a model that cannot encode them.
    """
    scales, sigmas = sorted(set(scales)), sorted(set(sigmas), reverse=True)
    for name, values in (("scales", scales), ("sigmas", sigmas)):
        if not values or not all(0 < value < 1 for value in values):
            raise ValueError(f"{name} is {list(values)}; give values above 0 and below 1")
    plain = (sampling or Sampling()).model_copy(
        update=NO_CACHE | {"mode": "fullres", "scales": None, "levels": None}
    )
    measured = _Measured(engine, plain, scales, sigmas)
    rows = _of_pictures(engine, plain, pictures) if pictures is not None else _own(engine, plain, prompts)
    for batch in rows(batch_size, limit):
        measured.add(batch)
        if on_progress is not None:
            on_progress(measured.rows)
    if not measured.rows:
        raise ValueError("there is nothing to measure on: no picture is large enough, or no prompt was given")
    return measured.result("samples" if pictures is None else "pictures")


@dataclass(frozen=True)
class _Batch:
    """Rows to measure on, all of one size and number of frames."""

    latents: Tensor
    """As the engine has them: [B, C, H, W] or [B, C, T, H, W], float32."""
    pixels: Tensor | None
    """[B, 3, (T,) H, W] in [-1, 1]; None where the model has no VAE."""
    texts: list[str]


_Rows = Callable[[int, int | None], Iterator[_Batch]]


def _of_pictures(engine: Engine, sampling: Sampling, pictures: Iterable[tuple[Any, str]]) -> _Rows:
    coder, plan = Coder(engine.pipe), engine.plan(sampling)
    size = plan.height_px, plan.width_px

    def rows(batch_size: int, limit: int | None) -> Iterator[_Batch]:
        texts: list[str] = []  # of the pictures that were read and not yet given on

        def usable() -> Iterator[Tensor]:
            for picture, text in pictures:
                for fitted in usable_pictures([picture], size):
                    texts.append(text)
                    yield fitted

        for pixels in batches(islice(usable(), limit), batch_size):
            latents = _engine_latents(engine, coder, pixels)
            frames = latents.shape[2] if latents.ndim == 5 else 1
            wanted = shape(engine.family, engine.channels, frames, *plan.stages[-1].grid)
            if latents.shape[1:] != wanted:
                raise ValueError(
                    f"{type(engine.pipe).__name__} encodes pictures to latents of the shape "
                    f"{tuple(latents.shape[1:])}, and its transformer takes {wanted}: how they become these "
                    "is not known here; measure on its own samples instead (give prompts)"
                )
            yield _Batch(latents, pixels, [texts.pop(0) for _ in range(len(pixels))])

    return rows


def _own(engine: Engine, sampling: Sampling, prompts: Sequence[str]) -> _Rows:
    def rows(batch_size: int, limit: int | None) -> Iterator[_Batch]:
        texts = list(prompts)[:limit]
        plan = engine.plan(sampling)
        for start in range(0, len(texts), batch_size):
            some = texts[start : start + batch_size]
            encoded = engine.encode(some, [None] * len(some), sampling)
            latents, _ = engine.denoise(plan, encoded, range(start, start + len(some)), sampling)
            pixels = None
            if hasattr(getattr(engine.pipe, "vae", None), "encode"):
                drawn = [np.asarray(picture) for picture in engine.decode(plan, latents)]
                pixels = torch.from_numpy(np.stack(drawn)[..., :3]).movedim(-1, 1).float() / 127.5 - 1
            yield _Batch(latents.float(), pixels, some)

    return rows


class _Measured:
    """Sums of squares by scale, noise level and band, over the batches so far."""

    def __init__(
        self, engine: Engine, sampling: Sampling, scales: Sequence[float], sigmas: Sequence[float]
    ) -> None:
        self.rows = 0
        self._engine, self._sampling, self._sigmas = engine, sampling, sigmas
        self._plan: SamplingPlan = engine.plan(sampling)
        family, full = engine.family, self._plan.stages[-1].grid
        self._grids = {scale: coarse_grid(full, scale, family.grid_multiple) for scale in scales}
        for scale, grid in self._grids.items():
            if grid == full or min(grid) * family.subcells < 2:
                raise ValueError(
                    f"scale {scale:g} is a grid of {grid[0]}x{grid[1]} cells of {full[0]}x{full[1]} for "
                    f"{family.name}, on which there is nothing to compare; choose another scale or size"
                )
        self._predictions = {(scale, sigma): _Sums() for scale in scales for sigma in sigmas}
        self._autoencoder = {scale: _Sums() for scale in scales}

    @torch.no_grad()
    def add(self, batch: _Batch) -> None:
        """Measure on these rows, with the noise that the rows of these numbers have as seeds."""
        engine, family = self._engine, self._engine.family
        seeds = range(self.rows, self.rows + len(batch.latents))
        frames = batch.latents.shape[2] if batch.latents.ndim == 5 else 1
        full = self._plan.stages[-1].grid
        eps = noise.batch_noise(seeds, noise.BASE, shape(family, engine.channels, frames, *full))
        eps, latents = eps.to(engine.device), batch.latents.to(engine.device)
        one = _OneStep(engine, self._plan, self._sampling, batch.texts, seeds, frames)

        def low(of_full: Tensor, grid: Grid) -> Tensor:
            return corner(of_full, *grid, patch=family.subcells)

        for sigma in self._sigmas:
            noised = (1 - sigma) * latents + sigma * eps
            whole = one.prediction(noised, full, sigma)
            for scale, grid in self._grids.items():
                ratio = side_ratio(grid, full)
                level = matched(sigma, ratio)
                kappa, _ = rewind(level, ratio)
                coarse = ratio * one.prediction(low(noised, grid) / kappa, grid, level)
                self._predictions[scale, sigma].add(coarse, low(whole, grid), family.subcells)
        if batch.pixels is not None:
            coder = Coder(engine.pipe)
            encoded = _engine_latents(engine, coder, batch.pixels)
            for scale, grid in self._grids.items():
                smaller = _smaller(batch.pixels, [side * family.cell_px for side in grid])
                coarse = side_ratio(grid, full) * _engine_latents(engine, coder, smaller)
                self._autoencoder[scale].add(coarse, low(encoded, grid), family.subcells)
        self.rows += len(batch.latents)

    def result(self, source: str) -> Consistency:
        """All that was measured. ValueError where a prediction is not finite."""
        plan, guidance = self._plan, self._engine.guidance(self._sampling)
        predictions = []
        for (scale, sigma), sums in self._predictions.items():
            level = matched(sigma, side_ratio(self._grids[scale], plan.stages[-1].grid))
            error, bands = sums.errors()
            predictions.append(Prediction(scale, *self._grids[scale], sigma, level, error, bands))
        autoencoder = [
            Autoencoder(scale, *self._grids[scale], *sums.errors())
            for scale, sums in self._autoencoder.items()
            if sums.bands
        ]
        return Consistency(
            family=plan.family,
            height_px=plan.height_px,
            width_px=plan.width_px,
            height=plan.stages[-1].height,
            width=plan.stages[-1].width,
            rows=self.rows,
            source=source,
            guidance_scale=guidance["guidance_scale"],
            true_cfg_scale=guidance["true_cfg_scale"],
            predictions=tuple(predictions),
            autoencoder=tuple(autoencoder),
        )


class _OneStep:
    """The pipeline's own call for one step of these rows, on any grid and at any noise level."""

    def __init__(
        self,
        engine: Engine,
        plan: SamplingPlan,
        sampling: Sampling,
        texts: list[str],
        seeds: Sequence[int],
        frames: int,
    ) -> None:
        family = engine.family
        video = family.default_frames is not None
        num_frames = (frames - 1) * family.frames_per_latent + 1 if video else plan.num_frames
        self._engine, self._sampling, self._seeds = engine, sampling, seeds
        self._plan, self._frames = replace(plan, num_frames=num_frames), frames
        self._encoded = engine.encode(texts, [None] * len(texts), sampling)
        self._schedule = engine.call.schedule(
            plan.num_steps, plan.height_px, plan.width_px, num_frames, sampling
        )

    def prediction(self, latents: Tensor, grid: Grid, sigma: float) -> Tensor:
        """What the model takes `latents` at noise level `sigma` for, float32 in the same layout: the end of
        one step to 0, in the place of the schedule's step whose own level is nearest."""
        own = self._plan.sigmas[:-1]
        first = min(range(len(own)), key=lambda step: abs(own[step] - sigma))
        tokens = round(grid[0] * grid[1] * self._frames / self._engine.family.patch**2)
        unguided = () if self._sampling.guides_from(sigma) else (first,)
        stage = Stage(*grid, self._frames, first, first + 1, tokens, (sigma, 0.0), unguided)
        plan = replace(self._plan, stages=(stage,))
        made: dict[int, Tensor] = {}
        for chunk in self._engine.runner.chunks(plan, 0, range(len(latents)), self._sampling):
            generators = [noise.row_generator(self._seeds[row], noise.sampler(0)) for row in chunk]
            scheduler = Trajectory(self._schedule, plan).stage(0, generators)
            given = StageInput(
                plan, 0, scheduler, latents[chunk], self._encoded[chunk], generators, self._sampling, None
            )
            made |= dict(zip(chunk, self._engine.runner.run(given).float(), strict=True))
        return torch.stack([made[row] for row in range(len(latents))])


@dataclass
class _Sums:
    """Squares of a difference and of what it is from, by octave."""

    bands: dict[tuple[float, float], list[float]] = field(default_factory=dict)

    def add(self, found: Tensor, wanted: Tensor, subcells: int) -> None:
        """Both on one grid, in the engine's layout."""
        found, wanted = (unpatchify(one.float(), subcells) for one in (found, wanted))
        rows, columns = (dct_basis(side, wanted.device) for side in wanted.shape[-2:])

        def squares(values: Tensor) -> Any:
            coefficients = rows @ values @ columns.T
            return coefficients.square().flatten(0, -3).sum(0, dtype=torch.float64).cpu().numpy()

        away, own = squares(found - wanted), squares(wanted)
        w = frequencies("dct", (wanted.shape[-2], wanted.shape[-1]))
        low, high = 0.0, 1.0
        while low <= w.max():
            inside = (w >= low) & (w < high)
            sums = self.bands.setdefault((low, high), [0.0, 0.0])
            sums[0] += float(away[inside].sum())
            sums[1] += float(own[inside].sum())
            low, high = high, 2 * high

    def errors(self) -> tuple[float, tuple[Band, ...]]:
        """Relative L2 distance in all and by octave. ValueError where it is not finite."""
        away, own = (sum(sums[part] for sums in self.bands.values()) for part in (0, 1))
        if not (np.isfinite(away) and own > 0):
            raise ValueError("the model's predictions are not finite, or zero: nothing can be compared")
        bands = (Band(*ends, (a / b) ** 0.5 if b else 0.0) for ends, (a, b) in self.bands.items())
        return (away / own) ** 0.5, tuple(bands)


def _engine_latents(engine: Engine, coder: Coder, pixels: Tensor) -> Tensor:
    """[B, 3, (T,) H, W] in [-1, 1] as the engine has latents of them."""
    latents = coder.latents(pixels).float()
    if engine.family.default_frames is None and latents.ndim == 5:  # an image model with a video's VAE
        latents = latents[:, :, 0]
    return patchify(latents, engine.family.subcells)


def _smaller(pixels: Tensor, size: Sequence[int]) -> Tensor:
    """The pictures at another size in pixels, antialiased."""
    video = pixels.ndim == 5
    frames = pixels.transpose(1, 2).flatten(0, 1) if video else pixels  # [B * T, 3, H, W]
    frames = torch.nn.functional.interpolate(frames, size=tuple(size), mode="bicubic", antialias=True)
    return frames.unflatten(0, (len(pixels), -1)).transpose(1, 2) if video else frames
