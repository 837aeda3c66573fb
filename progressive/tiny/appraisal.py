"""Says how well a picture of the picture world is drawn, where the judge says only what is in it.

    appraise(picture, prompt).percent              # 100: nothing to find fault with

Each reading looks at one thing alone and has a grade of its own: a blurred picture is faulted for its edges,
and not for its shapes or colours. A fixed program: no network, no randomness.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from overtone.progressive.tiny import masks, world
from overtone.progressive.tiny.backdrop import Backdrop, fit_backdrop
from overtone.progressive.tiny.judge import Reading, Seen, fit, read, right_things
from overtone.progressive.tiny.world import Asked

_BLUR_PX = (1.5, 4.0)
"""Blur of an outline that is not faulted, and blur that is as bad as no outline. The autoencoder's is 1.4."""
_OUTLINE_PX = (0.75, 2.0)
"""The same of the mean distance between a thing's outline and that of the exact shape."""
_COLOUR_DISTANCE = (20.0, 60.0)
"""The same of the RGB distance to the colour that is named; above the second the judge sees another one."""
_CONTRAST_ERROR = (0.2, 0.6)
"""The same of the difference between a texture's contrast and the world's, as a share of the world's."""
_PASSING = 0.5
"""The least grade that passes."""
_REACH_PX = 40.0
"""Farthest from its place in the world at which a thing that is not the one asked for stands for it."""
_OUTLINE_REACH_PX = 5
"""How far to both sides of an outline it is looked at."""
_GAUSSIAN = 0.5 / np.sqrt(np.pi)
"""Standard deviation of a Gaussian times its mean value, weighted by itself."""


@dataclass(frozen=True)
class Grade:
    """One reading of a picture."""

    value: float
    """In [0, 1]: 1 where nothing is to be faulted; of several things or quarters their mean."""
    passed: bool
    """Whether it is at least one half, for each of them."""


@dataclass(frozen=True)
class Appraisal:
    """All readings of a picture. A thing that is nowhere has no outline, shape or colour: grades of 0."""

    things: Grade
    """The judge's share of things with the size, colour, shape and place asked for."""
    edges: Grade
    """How sharp the things' outlines are, whatever their shape."""
    shapes: Grade
    """How near they are to the outlines of the exact shapes asked for."""
    colours: Grade
    """How near things and background are to the colours asked for."""
    phase: Grade | None
    """Whether the texture lies where the world's does, in each quarter of the picture. None: it is plain."""
    contrast: Grade
    """Whether the texture's tones differ as the world's do; of a plain one, whether its tone varies."""
    percent: float
    """All in one, in [0, 100]: the mean over the things asked for and the background. A thing that is not
    right by the judge counts 0, else the mean of its grades for edges, shape and colour; a background that is
    not of the colour and texture asked for counts 0, else the mean of its colour, phase and contrast."""

    def readings(self) -> dict[str, Grade]:
        """The grades by name, without that of a texture that was not asked for."""
        named = {name: getattr(self, name) for name in READINGS}
        return {name: grade for name, grade in named.items() if grade is not None}


READINGS = ("things", "edges", "shapes", "colours", "phase", "contrast")
"""Names of the readings."""


def appraise(picture: Image.Image, prompt: str) -> Appraisal:
    """All readings of a picture. ValueError if it is not 256x256 or the prompt is no caption of the world."""
    asked, reading = world.parse(prompt), read(picture)
    rgb = np.asarray(picture.convert("RGB"), np.float32)  # [H, W, 3], unlike the judge's without a filter
    backdrop = fit_backdrop(rgb, asked, [seen.piece for seen in reading.things])
    right = right_things(reading.things, asked)
    drawn = [_drawn(rgb, backdrop, seen, kind) for seen, kind in _paired(reading, right, asked)]
    ground = _ground(backdrop, asked)
    as_asked = (reading.background, reading.texture) == (asked.background, asked.texture)
    parts = [grades.mean if one else 0.0 for grades, one in zip(drawn, right, strict=True)]
    tone, phases, contrast = ground
    faults = [tone, contrast, *([float(np.mean(phases))] if phases else [])]
    parts.append(float(np.mean(faults)) if as_asked else 0.0)
    return Appraisal(
        things=_grade([float(one is not None) for one in right]),
        edges=_grade([one.edge for one in drawn]),
        shapes=_grade([one.shape for one in drawn]),
        colours=_grade([*(one.colour for one in drawn), tone]),
        phase=_grade(phases) if phases else None,
        contrast=_grade([contrast]),
        percent=100 * float(np.mean(parts)),
    )


def _grade(values: Sequence[float]) -> Grade:
    return Grade(float(np.mean(values)), min(values) >= _PASSING)


def _graded(value: float, limits: tuple[float, float]) -> float:
    """1 up to the first limit, 0 from the second on, a straight line between them."""
    good, bad = limits
    return float(np.clip((value - bad) / (good - bad), 0, 1))


def _ground(backdrop: Backdrop, asked: Asked) -> tuple[float, tuple[float, ...], float]:
    """Grades of the background's colour, phase (of each quarter; none where it is plain) and contrast."""
    tone = np.array(world.BACKGROUNDS[asked.background])
    mean = tone if asked.texture == "plain" else tone * (1 + world.SHADE) / 2
    wanted = 0.0 if asked.texture == "plain" else 1.0
    return (
        _graded(float(np.linalg.norm(backdrop.mean - mean)), _COLOUR_DISTANCE),
        backdrop.in_phase,
        _graded(abs(backdrop.contrast - wanted), _CONTRAST_ERROR),
    )


# -------------------------------------------------------------------------------------------- things


@dataclass(frozen=True)
class _Drawn:
    """Grades of one thing, in [0, 1]."""

    edge: float
    shape: float
    colour: float

    @property
    def mean(self) -> float:
        return (self.edge + self.shape + self.colour) / 3


def _paired(
    reading: Reading, right: Sequence[Seen | None], asked: Asked
) -> list[tuple[Seen | None, world.Kind]]:
    """Each kind asked for with the thing that is right or else, as what may be a bad drawing of it, the thing
    nearest to its place."""
    pairs: list[tuple[Seen | None, world.Kind]] = []
    for kind, one, place in zip(asked.kinds, right, world.places(asked.relation), strict=True):
        left = [seen for seen in reading.things if not any(seen is other for other in right)]
        near = [(float(np.hypot(s.x - place[0], s.y - place[1])), k) for k, s in enumerate(left)]
        distance, k = min(near, default=(np.inf, 0))
        pairs.append((one or (left[k] if distance <= _REACH_PX else None), kind))
    return pairs


def _drawn(rgb: np.ndarray, backdrop: Backdrop, seen: Seen | None, kind: world.Kind) -> _Drawn:
    if seen is None:
        return _Drawn(0.0, 0.0, 0.0)
    core = masks.eroded(seen.piece, 3)
    inside = np.median(rgb[core if core.any() else seen.piece], axis=0)  # [3]
    cover = _cover(rgb, backdrop.picture, inside)
    blur_px = _blur_px(cover, masks.outline(seen.piece, _OUTLINE_REACH_PX))
    outline_px = _outline_px(kind.shape, masks.grown(seen.piece, _OUTLINE_REACH_PX) & (cover > 0.5))
    distance = float(np.linalg.norm(inside - np.array(world.COLOURS[kind.colour])))
    return _Drawn(
        _graded(blur_px, _BLUR_PX), _graded(outline_px, _OUTLINE_PX), _graded(distance, _COLOUR_DISTANCE)
    )


def _cover(rgb: np.ndarray, ground: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Share of a thing's colour in each pixel, [H, W] in [0, 1]: 0 is the ground there."""
    step = inside - ground  # [H, W, 3]
    along = np.einsum("hwc,hwc->hw", rgb - ground, step)
    return np.clip(along / np.maximum(np.einsum("hwc,hwc->hw", step, step), 1.0), 0, 1)


def _blur_px(cover: np.ndarray, band: np.ndarray) -> float:
    """Standard deviation of the Gaussian that would blur a perfect edge as much as those in the band, pixels;
    about 0.6 for an edge that is anti-aliased over one pixel.

    The slope across an edge, weighted by itself, is that Gaussian's own mean: what is flat has no weight.
    """
    slope = np.hypot(*np.gradient(cover))[band]
    return float(_GAUSSIAN * slope.sum() / max(float((slope**2).sum()), 1e-6))


def _outline_px(shape: str, piece: np.ndarray) -> float:
    """Mean distance between a piece's outline and that of the exact shape at its area and centre, pixels."""
    if not piece.any():
        return float("inf")
    overlap, x, y, radius = fit(shape, piece)
    grid_y, grid_x = np.mgrid[: piece.shape[0], : piece.shape[1]] + 0.5
    distance = world.signed_distance(shape, grid_x - x, grid_y - y, radius)
    differing = (1 - overlap) / (1 + overlap) * (piece.sum() + (distance < 0).sum())
    return float(differing / max((np.abs(distance) < 0.5).sum(), 1))
