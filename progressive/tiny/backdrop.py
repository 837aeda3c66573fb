"""The background of a picture of the picture world, fitted: its tones, and where its texture lies. Knows of
things only where they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from overtone.progressive.tiny import masks, world
from overtone.progressive.tiny.world import Asked

_AWAY_PX = 8
"""Distance from things at which a pixel is the background's alone."""
_INSIDE_PX = 6
"""Distance from a band's edge at which its tone is read, so that a blurred edge changes none."""
_TOLERANCE_PX = 2.0
"""How far beyond the shifts of the world a texture may lie before its phase is faulted."""
_STEP_PX = 0.5
"""Between the shifts that are tried."""
_LEAST_CORRELATION = 0.3
"""With the texture asked for, below which there is none whose phase could be read."""


@dataclass(frozen=True)
class Backdrop:
    picture: np.ndarray
    """The background as it would be without things and with sharp edges, in the picture's own tones: float32
    [H, W, 3], 0 to 255."""
    mean: np.ndarray
    """Between its two tones: [3]."""
    contrast: float
    """Difference of its tones over that of the world's, 0 for none; of a plain background twice the standard
    deviation of its tone, which is the same where one half of it has another."""
    in_phase: tuple[float, ...]
    """For each quarter of the picture its correlation with the texture at the best shift of the world over
    that at the best of all, in [0, 1]; 0 where there is no such texture. Empty where it is plain."""


def fit_backdrop(rgb: np.ndarray, asked: Asked, things: Sequence[np.ndarray]) -> Backdrop:
    """The background asked for, fitted to a picture [H, W, 3] (0 to 255) outside the things (bool [H, W])."""
    ground = masks.away_from(things, _AWAY_PX, rgb.shape[:2])
    if not ground.any():  # nothing but things: then all of it stands for the background
        ground = ~ground
    tone, step, place = between_tones(rgb, asked.background)
    if asked.texture == "plain":
        mean = np.median(rgb[ground], axis=0)
        flat = np.broadcast_to(mean, rgb.shape)
        return Backdrop(flat, mean, 2 * float(place[ground].std()), ())
    shares = [_phase(place[q], ground[q], asked.texture, q)[0] for q in _quarters()]
    _, second = _phase(place, ground, asked.texture, _WHOLE)
    first, other = (masks.eroded(half, _INSIDE_PX) & ground for half in (~second, second))
    tones = [rgb[half].mean(axis=0) if half.any() else tone for half in (first, other)]
    contrast = float((tones[1] - tones[0]) @ step / (step @ step))
    picture = np.where(second[..., None], tones[1], tones[0]).astype(np.float32)
    return Backdrop(picture, (tones[0] + tones[1]) / 2, contrast, tuple(shares))


def between_tones(rgb: np.ndarray, background: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(a background's first tone [3], the step from it to the second [3], and of each pixel of a picture
    [H, W, 3] its place on the line through them, [H, W]: 0 at the first, 1 at the second)."""
    tone = np.array(world.BACKGROUNDS[background], np.float32)
    step = (world.SHADE - 1) * tone
    return tone, step, (rgb - tone) @ step / (step @ step)


_WHOLE = (slice(0, world.SIDE_PX), slice(0, world.SIDE_PX))


def _quarters() -> list[tuple[slice, slice]]:
    halves = slice(0, world.SIDE_PX // 2), slice(world.SIDE_PX // 2, world.SIDE_PX)
    return [(rows, columns) for rows in halves for columns in halves]


def _phase(
    place: np.ndarray, ground: np.ndarray, texture: str, window: tuple[slice, slice]
) -> tuple[float, np.ndarray]:
    """(share of the best correlation that is there at a shift of the world, where the second tone is at the
    best shift of all), of a window of the picture: arrays [H, W]."""
    period = world.STRIPE_PX if texture == "striped" else world.CHECK_PX
    shifts = np.arange(-period / 2, period / 2, _STEP_PX)
    down, across = (_waves(shifts, period, span) for span in window)  # [S, H], [S, W], each +1 or -1
    if texture == "striped":
        shifts_across, across = np.zeros(1), np.ones((1, place.shape[1]))
    else:
        shifts_across = shifts
    deviation = np.where(ground, place - place[ground].mean() if ground.any() else 0.0, 0.0)
    found = -(down @ deviation @ across.T)  # [S, S]: the second tone is where the product of the waves is -1
    allowed = world.PHASE_PX + _TOLERANCE_PX
    near = np.ix_(np.abs(shifts) <= allowed, np.abs(shifts_across) <= allowed)
    row, column = np.unravel_index(found.argmax(), found.shape)
    scale = float(np.sqrt((deviation**2).sum() * ground.sum()))
    share = (
        float(found[near].max() / found[row, column])
        if found[row, column] > _LEAST_CORRELATION * scale
        else 0.0
    )
    return max(0.0, share), np.outer(down[row], across[column]) < 0


def _waves(shifts: np.ndarray, period: float, span: slice) -> np.ndarray:
    """+1 on the first tone's bands and -1 on the second's at each shift, along some of the picture."""
    position = np.arange(span.start, span.stop) + 0.5
    return 1 - 2 * np.rint(world.bands(position + shifts[:, None], period, 1.0))
