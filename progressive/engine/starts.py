"""What rows start from: noise alone, or a picture's latents under noise; and what their masks keep. Knows no
text and makes no step.

With z the latents of a row's picture, eps its noise and s0 the level that it starts at, a row begins on the
full grid as x = (1 - s0) z + s0 eps, which is what diffusers' image-to-image pipelines begin with.

The flow of Gaussian data with spectrum P keeps x(s) / g(s) constant, g(s)^2 = (1 - s)^2 P + s^2: such an x is
on the way that began with the white noise x / g(s0). So that takes the noise's place (`spectral.whiten`): a
coarse grid begins with its corner, times g of that grid at the level that it begins at, and expansions fill
in the rest of it. For Gaussian data this is exact (tests/test_progressive_oracle.py); at s0 = 1 it is eps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from overtone.progressive import layouts, noise, spectral
from overtone.progressive.engine.call import PipelineCall
from overtone.progressive.formulas import side_ratio
from overtone.progressive.pictures import Pictures
from overtone.progressive.schedule import SamplingPlan, Stage
from overtone.progressive.settings import Fit
from overtone.progressive.vae import Coder, as_pixels


class Starts:
    """Noise, and where there are any the pictures, of some rows."""

    def __init__(
        self,
        call: PipelineCall,
        plan: SamplingPlan,
        pictures: Sequence[Pictures | None],
        seeds: Sequence[int],
        fit: Fit | None,
    ) -> None:
        """Pictures are encoded here, each once. ValueError for a row without one where the plan begins later
        than with noise, and for a mask that lets nothing change."""
        self._call, self._plan, self._seeds = call, plan, list(seeds)
        self._eps = stage_noise(call, seeds, noise.BASE, plan.stages[-1])
        if plan.start and None in pictures:
            raise ValueError(
                f"row {list(pictures).index(None)} has no picture, and `strength` starts every row from one"
            )
        self._pictured = [one is not None for one in pictures]
        self._z: Tensor | None = None
        """[B, C, H, W], zeros for rows without a picture; None: no row has one."""
        self._mask: Tensor | None = None
        """The same, 1 where a row is made and 0 where its picture is kept; None: no row has a mask."""
        size = plan.height_px, plan.width_px
        fitted = {id(one): one.fitted(*size, fit) for one in pictures if one is not None}
        if fitted:
            self._encode([fitted.get(id(one)) for one in pictures])

    def _encode(self, pictures: Sequence[Pictures | None]) -> None:
        coder = _coder(self._call)
        self._z = torch.zeros_like(self._eps)
        known: dict[int, Tensor] = {}  # several rows may start from one picture
        for row, one in enumerate(pictures):
            if one is not None:
                if id(one.image) not in known:
                    known[id(one.image)] = _latents(coder, one, self._call)
                self._z[row] = known[id(one.image)]
        if any(one and one.mask for one in pictures):
            masks = [_mask(one, row, self._eps[row], self._call) for row, one in enumerate(pictures)]
            self._mask = torch.stack(masks)

    @property
    def level(self) -> float:
        """s0, the noise level on the full grid that rows start at."""
        return self._plan.sigmas[self._plan.start]

    def full(self) -> Tensor:
        """[B, C, H, W] or [B, C, T, H, W], float32: the rows as they start on the full grid."""
        if self._z is None:
            return self._eps
        rows = range(len(self._seeds))
        return self._of_pictured(rows, _between(self._z, self._eps, self.level), self._eps)

    def coarse(self, stage: Stage, rows: Sequence[int]) -> Tensor:
        """The same of some rows on a coarse stage's grid, as it starts there."""
        eps = corner(self._call, self._plan, stage, self._eps[list(rows)])
        if self._z is None or self.level == 1:
            return eps
        white = self._white(self._plan.stages[-1], rows, self._eps[list(rows)])
        white = corner(self._call, self._plan, stage, white)
        with self._fine(white) as fine:
            spectrum, transform = self._plan.spectrum_on(stage), self._plan.transform
            coloured = spectral.colour(fine, spectrum, stage.sigma_start, transform)
        return self._of_pictured(rows, spectral.patchify(coloured, self._call.family.subcells), eps)

    def base(self, index: int, rows: Sequence[int]) -> Tensor:
        """What the expansion into stage `index` fills a finer grid up with: on the full grid, or with fresh
        noise on the stage's."""
        plan = self._plan
        if plan.noise == "coupled":
            return self._white(plan.stages[-1], rows, self._eps[list(rows)])
        seeds = [self._seeds[row] for row in rows]
        eps = stage_noise(self._call, seeds, noise.expansion(index - 1), plan.stages[index])
        return self._white(plan.stages[index], rows, eps)

    def _white(self, stage: Stage, rows: Sequence[int], eps: Tensor) -> Tensor:
        """x / g(s0) of the rows' pictures and this noise, up to the frequencies of a stage."""
        if self._z is None or self.level == 1:
            return eps
        x = _between(corner(self._call, self._plan, stage, self._z[list(rows)]), eps, self.level)
        with self._fine(x) as fine:
            white = spectral.whiten(fine, self._plan.spectrum, self.level, self._plan.transform)
        return self._of_pictured(rows, spectral.patchify(white, self._call.family.subcells), eps)

    def _of_pictured(self, rows: Sequence[int], theirs: Tensor, others: Tensor) -> Tensor:
        """`theirs` for the rows that have a picture, and `others` for the rest."""
        pictured = torch.tensor([self._pictured[row] for row in rows], device=others.device)
        return torch.where(pictured.reshape(-1, *[1] * (others.ndim - 1)), theirs, others)

    @contextmanager
    def _fine(self, latents: Tensor) -> Iterator[Tensor]:
        """Latents on the grid that the spectrum is counted on, and exact products."""
        with exact(self._call.device):
            yield spectral.unpatchify(latents, self._call.family.subcells)

    def keep(self, index: int, rows: Sequence[int]) -> Callable[[Tensor, Tensor], Tensor] | None:
        """What the scheduler of stage `index` does with these rows after each step, as FLUX.1's inpainting
        does it: where a mask is black, the picture at the noise level reached. None: no row has a mask."""
        if self._mask is None or self._z is None:
            return None
        stage, call, chosen = self._plan.stages[index], self._call, list(rows)
        z, eps, mask = self._reduced(stage, rows), self._eps[chosen], self._mask[chosen]
        if stage.grid != self._plan.stages[-1].grid:
            eps = corner(call, self._plan, stage, eps)
            mask = _widest(mask, stage, call)
        z, eps, mask = (layouts.pack_as_stepped(call.family, one) for one in (z, eps, mask))
        made = mask > 0

        def keep(latents: Tensor, sigma: Tensor) -> Tensor:
            kept = _between(z, eps, float(sigma))
            return torch.where(made, latents, kept.to(latents.dtype))

        return keep

    def _reduced(self, stage: Stage, rows: Sequence[int]) -> Tensor:
        """The pictures' latents on a stage's grid."""
        assert self._z is not None
        z, full = self._z[list(rows)], self._plan.stages[-1].grid
        if stage.grid == full:
            return z
        return corner(self._call, self._plan, stage, z) / side_ratio(stage.grid, full)


def stage_noise(call: PipelineCall, seeds: Sequence[int], purpose: str, stage: Stage) -> Tensor:
    """The rows' noise for one purpose on the stage's grid, float32 on the pipeline's device."""
    shape = layouts.shape(call.family, call.channels, stage.frames, *stage.grid)
    return noise.batch_noise(seeds, purpose, shape).to(call.device)


def corner(call: PipelineCall, plan: SamplingPlan, stage: Stage, latents: Tensor) -> Tensor:
    """Latents of the full grid cut to a stage's frequencies: of white noise, noise as white."""
    with exact(call.device):
        return spectral.corner(latents, *stage.grid, transform=plan.transform, patch=call.family.subcells)


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Matrix products in full float32, whatever the caller allows: TF32 keeps 10 bits, autocast 8."""
    before = torch.get_float32_matmul_precision()
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        if before == "highest":
            yield
            return
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def _between(z: Tensor, eps: Tensor, level: float) -> Tensor:
    """(1 - s) z + s eps, to the bit as diffusers' schedulers do."""
    sigma = torch.tensor(level, dtype=torch.float32, device=z.device)
    return sigma * eps + (1.0 - sigma) * z


def _coder(call: PipelineCall) -> Coder:
    # A copy has attributes of its own, for a VAE's call sets some and another thread may be decoding.
    vae = call.pipe.vae
    coder = Coder(vae if call.offloads else copy.copy(vae), call.family)
    coder.device = call.device
    return coder


@torch.no_grad()
def _latents(coder: Coder, one: Pictures, call: PipelineCall) -> Tensor:
    """[C, H, W] as the transformer knows them, float32."""
    pixels = as_pixels(np.asarray(one.image)[None]).movedim(-1, 1)  # [1, 3, H, W]
    latents = coder.latents(pixels)
    if latents.ndim == 5:  # a VAE of videos: one frame
        latents = latents[:, :, 0]
    return spectral.patchify(latents.float(), call.family.subcells)[0]


def _mask(one: Pictures | None, row: int, like: Tensor, call: PipelineCall) -> Tensor:
    """[C, H, W] of a row's mask, each cell as the pixel in its corner: as diffusers' pipelines do it."""
    if one is None or one.mask is None:
        return torch.ones_like(like)
    cells = (like.shape[-2] * call.family.subcells, like.shape[-1] * call.family.subcells)
    white = torch.from_numpy(np.asarray(one.mask) / np.float32(255) >= 0.5).float()[None, None]
    mask = torch.nn.functional.interpolate(white, size=cells)
    if not mask.any():
        raise ValueError(
            f"the mask of row {row} is black in all {cells[0]}x{cells[1]} cells: nothing changes"
        )
    planes = mask.expand(-1, like.shape[0] // call.family.subcells**2, -1, -1)
    return spectral.patchify(planes, call.family.subcells)[0].to(like)


def _widest(mask: Tensor, stage: Stage, call: PipelineCall) -> Tensor:
    """A mask on a coarser grid: 1 wherever a part of the cell is to be made anew."""
    patch = call.family.subcells
    fine = spectral.unpatchify(mask, patch)
    coarse = torch.nn.functional.adaptive_max_pool2d(fine, (stage.height * patch, stage.width * patch))
    return spectral.patchify(coarse, patch)
