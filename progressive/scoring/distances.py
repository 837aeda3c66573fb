"""Distances between two sets of pictures: of any encoder's features, and without weights. Know no prompts.

Both depend on how many pictures there are: compare only distances of sets of the same size to the same
reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from overtone.progressive.spectral import dct_basis

_BANDS = 10
"""Half octaves of frequency, downwards from half a cycle a pixel; what lies beyond counts to the first."""
_LEAST_SIDE_PX = 64
"""Below, the lowest bands are empty."""
_LEAST_SPREAD = 1.0
"""Decibels, and levels of 255: a reference that varies less is taken to vary so much."""
_OPPONENT = np.array([[0.299, 0.587, 0.114], [1.0, -1.0, 0.0], [0.5, 0.5, -1.0]])
"""RGB to luma (ITU-R BT.601), red against green, yellow against blue."""


@dataclass(frozen=True)
class Frechet:
    """`frechet:...`: the Fréchet distance of an encoder's features."""

    name: str
    encode: Callable[[Sequence[Image.Image]], Any]
    """Pictures to features [N, D]: an array, a tensor, or lists."""
    units: str = "squared Fréchet distance"

    def features(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """float64 [N, D]."""
        found = self.encode(pictures)
        return np.asarray(found.detach().cpu() if isinstance(found, torch.Tensor) else found, np.float64)

    def distance(self, features: np.ndarray, reference: np.ndarray) -> float:
        """As `frechet_distance`."""
        return frechet_distance(features, reference)


def frechet_distance(features: np.ndarray, reference: np.ndarray) -> float:
    """Squared Fréchet distance of the normal distributions with the means and covariances of two sets of
    features [N, D] and [M, D] (Dowson and Landau 1982), in float64; as an FID, where the encoder is
    Inception's.

    |m - m'|^2 + tr(S) + tr(S') - 2 tr((S S')^(1/2)). With S = A^T A and S' = B^T B the last trace is the sum
    of the singular values of A B^T, which is exact where there are fewer rows than features, as the root of a
    singular matrix is not. ValueError for fewer than two rows, and for sets of different encoders.
    """
    _compared(features, reference)
    means = features.mean(axis=0) - reference.mean(axis=0)
    a, b = _root(features), _root(reference)
    cross = float(np.linalg.svd(a @ b.T, compute_uv=False).sum())
    return max(0.0, float(means @ means + (a**2).sum() + (b**2).sum() - 2 * cross))


def _root(features: np.ndarray) -> np.ndarray:
    """A with A^T A the covariance of features [N, D]: triangular, of as few rows as that takes."""
    centred = (features - features.mean(axis=0)) / np.sqrt(len(features) - 1)
    return np.asarray(np.linalg.qr(centred, mode="r"))


def _compared(features: np.ndarray, reference: np.ndarray) -> None:
    for one in (features, reference):
        if one.ndim != 2 or len(one) < 2:
            raise ValueError(f"a distance between sets needs two pictures of each; got features {one.shape}")
    if features.shape[1] != reference.shape[1]:
        raise ValueError(f"features {features.shape} and {reference.shape} are of different encoders")


@dataclass(frozen=True)
class Spectrum:
    """`spectrum`: radial power spectrum and colours, without any weights. It knows textures, detail and
    tints, and nothing of what is drawn."""

    name: str = "spectrum"
    units: str = "standard deviations of the reference"

    def features(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """float64 [N, 16]: power of luma in ten half octaves, decibels, high ones first; mean and standard
        deviation of three opponent colours, in levels of 255. ValueError for sides below 64 px."""
        return np.stack([_described(np.asarray(one.convert("RGB"), np.float64)) for one in pictures])

    def distance(self, features: np.ndarray, reference: np.ndarray) -> float:
        """Root mean square, over the features, of the 2-Wasserstein distance of their normal distributions,
        each over its standard deviation in the reference: 0 for equal ones, 1 where they are off by as much
        as the reference's pictures differ among themselves."""
        _compared(features, reference)
        spread = reference.std(axis=0)
        means = features.mean(axis=0) - reference.mean(axis=0)
        squares = (means**2 + (features.std(axis=0) - spread) ** 2) / np.maximum(spread, _LEAST_SPREAD) ** 2
        return float(np.sqrt(squares.mean()))


def _described(rgb: np.ndarray) -> np.ndarray:
    """Features [16] of a picture [H, W, 3] in 0 to 255."""
    height, width = rgb.shape[:2]
    if min(height, width) < _LEAST_SIDE_PX:
        raise ValueError(
            f"a picture of {height}x{width} px is too small; it needs {_LEAST_SIDE_PX} px a side"
        )
    colours = rgb @ _OPPONENT.T  # [H, W, 3]
    down, across = (dct_basis(side, dtype=torch.float64).numpy() for side in (height, width))
    power = (down @ (colours[..., 0] - colours[..., 0].mean()) @ across.T) ** 2 / (height * width)
    # Orthonormal DCT: coefficient k is of k / 2 cycles a side, half a cycle a pixel at the end.
    radius = np.hypot(np.arange(height)[:, None] / height, np.arange(width)[None] / width)
    band = np.floor(-2 * np.log2(np.maximum(radius, 1e-9))).clip(0, _BANDS).astype(int)
    sums = np.bincount(band.ravel(), power.ravel(), minlength=_BANDS + 1)[:_BANDS]
    decibels = 10 * np.log10(sums + 1e-3)  # a thousandth of a squared level is below what 8 bits can tell
    return np.concatenate([decibels, colours.mean(axis=(0, 1)), colours.std(axis=(0, 1))])
