"""Fidelity: how near a picture is to a reference picture. Knows nothing of how either was made, or how good.

All functions take float32 pictures in [0, 1] shaped [B, 3, H, W] (a video is its frames) and give one value a
picture, [B]. The reference is the `fullres` picture of the same row: where nothing is lost, going coarse
changed nothing. What was changed need not be worse, so none of this is quality, which is a scorer's number
(`overtone.progressive.scoring`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from overtone.progressive.spectral import dct_basis

_MS_SSIM_BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, table of section 3.2
_WINDOW_PX = 11  # of SSIM's Gaussian
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def as_tensor(images: Sequence[Any]) -> Tensor:
    """PIL pictures, uint8 arrays [H, W, 3] or videos [T, H, W, 3] of one size, as [B, 3, H, W] in [0, 1]."""
    frames = [np.asarray(image)[..., :3] for image in images]
    stacked = np.stack(frames)
    stacked = stacked.reshape(-1, *stacked.shape[-3:])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 255


def psnr(picture: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio, dB; 100 where the pictures are equal."""
    error = (picture - reference).square().flatten(1).mean(1)
    return -10 * error.clamp_min(1e-10).log10()


def ssim(picture: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004), at most 1."""
    similarity = structural_similarity_index_measure(picture, reference, data_range=1.0, reduction="none")
    assert isinstance(similarity, Tensor)
    return similarity


def perceptual_distance(picture: Tensor, reference: Tensor) -> Tensor:
    """1 - multi-scale SSIM, in [0, 1]: what a viewer notices from several distances, without learned weights.
    Small pictures use fewer scales (5 need 176 px); ValueError for sides below 11 px, the window's width."""
    betas = np.array(_MS_SSIM_BETAS[: _num_scales(min(picture.shape[-2:]))])
    similarity = multiscale_structural_similarity_index_measure(
        picture,
        reference,
        data_range=1.0,
        betas=tuple((betas / betas.sum()).tolist()),
        normalize="relu",
        reduction="none",
    )
    return 1 - similarity


def _num_scales(side_px: int) -> int:
    """Scales that a picture has room for: each halves it, and the library wants a window of 11 px to fit
    (scales - 1)**2 times too."""
    if side_px < _WINDOW_PX:
        raise ValueError(f"a side of {side_px} px is too small to compare; it needs {_WINDOW_PX} px")
    fits = [n for n in range(1, 6) if side_px // max(2 ** (n - 1), (n - 1) ** 2) >= _WINDOW_PX]
    return max(fits)


def high_frequency_ratio(picture: Tensor, reference: Tensor) -> Tensor:
    """Luma energy above half the Nyquist frequency, over the reference's: below 1 is a loss of detail."""
    return _high_energy(picture) / _high_energy(reference).clamp_min(1e-12)


def _high_energy(picture: Tensor) -> Tensor:
    weights = torch.tensor(_LUMA, dtype=picture.dtype, device=picture.device)
    luma = torch.einsum("bchw,c->bhw", picture, weights)
    height, width = luma.shape[-2:]
    rows = dct_basis(height, luma.device, luma.dtype)
    columns = dct_basis(width, luma.device, luma.dtype)
    energy = (rows @ luma @ columns.T).square()  # [B, H, W] of DCT coefficients
    energy[:, : height // 2, : width // 2] = 0
    return energy.sum((1, 2))
