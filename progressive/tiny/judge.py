"""Reads a picture of the picture world and says what is in it. A fixed program: no network, no randomness.

Whatever is neither tone of the background is a thing. Each connected piece gets the palette colour nearest
to its inside and the shape whose exact drawing, at the piece's own area and centre, overlaps it best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter

from overtone.progressive.tiny import masks, world
from overtone.progressive.tiny.backdrop import between_tones
from overtone.progressive.tiny.world import Asked, Kind

_BACKGROUND_DISTANCE = 45.0
"""RGB distance from the line between a background's tones at which a pixel belongs to a thing."""
_COLOUR_DISTANCE = 60.0
"""Largest RGB distance from a palette colour that still is that colour."""
_LEAST_AREA = 300
"""Pixels; the smallest thing of the world has about 1,000."""
_LEAST_OVERLAP = 0.75
"""Intersection over union with a shape's exact drawing below which a piece is no shape."""
_SIZE_LIMIT = float(np.sqrt(world.SIZES["small"] * world.SIZES["large"]))
"""Radius between small and large, pixels."""


@dataclass(frozen=True)
class Seen:
    """A thing found in a picture. Colour or shape is None where it is none of the world's."""

    size: str
    colour: str | None
    shape: str | None
    x: float
    """Centre, pixels from the left edge."""
    y: float
    """Centre, pixels from the top edge."""
    radius: float
    overlap: float
    """Intersection over union with the nearest shape, in [0, 1]."""
    piece: np.ndarray = field(repr=False, compare=False)
    """Where it was found: [H, W] bool."""

    @property
    def kind(self) -> Kind | None:
        return Kind(self.size, self.colour, self.shape) if self.colour and self.shape else None


@dataclass(frozen=True)
class Reading:
    things: tuple[Seen, ...]
    """Largest first."""
    background: str
    texture: str


def judge(picture: Image.Image, prompt: str) -> tuple[int, int]:
    """(things right, things asked). Size, colour, shape and place must be right; extra things are ignored.

    ValueError if the picture is not 256x256 or the prompt is no caption of the world.
    """
    asked = world.parse(prompt)
    right = right_things(read(picture).things, asked)
    return sum(thing is not None for thing in right), len(right)


def right_things(seen: Sequence[Seen], asked: Asked) -> list[Seen | None]:
    """For each kind asked for a thing that is right in size, colour, shape and place; None where none is."""
    alike = [[thing for thing in seen if thing.kind == kind] for kind in asked.kinds]
    if asked.relation is None:
        return [next(iter(alike[0]), None)]
    first, second = alike
    for a in first:
        for b in second:
            if _holds(asked.relation, (a.x, a.y), (b.x, b.y)):
                return [a, b]
    middle = (world.SIDE_PX / 2, world.SIDE_PX / 2)  # one is missing or astray: each by its own side
    return [
        next((a for a in first if _holds(asked.relation, (a.x, a.y), middle)), None),
        next((b for b in second if _holds(asked.relation, middle, (b.x, b.y))), None),
    ]


def _holds(relation: str, a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Is a in this relation to b, more so than in a relation across it?"""
    dx, dy = b[0] - a[0], b[1] - a[1]
    along = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation]
    across = dy if relation in ("left of", "right of") else dx
    return along > abs(across)


def read(picture: Image.Image) -> Reading:
    """All that a picture shows. ValueError if it is not 256x256."""
    side = world.SIDE_PX
    if picture.size != (side, side):
        raise ValueError(f"picture is {picture.size[0]}x{picture.size[1]} px; the judge reads {side}x{side}")
    return _read(picture.convert("RGB").tobytes())


# Whoever asks what is right in some pictures also asks how well they are drawn, and reading one takes 0.1 s.
@lru_cache(maxsize=32)
def _read(pixels: bytes) -> Reading:
    """`pixels`: RGB, of a picture of the world's size."""
    whole = Image.frombytes("RGB", (world.SIDE_PX, world.SIDE_PX), pixels)
    rgb = np.asarray(whole.filter(ImageFilter.MedianFilter(3)), np.float32)  # [H, W, 3]
    background = _background(rgb)
    distance, shade = _ground(rgb, background)
    ground = distance <= _BACKGROUND_DISTANCE
    pieces = masks.pieces(masks.opened(~ground), _LEAST_AREA)
    things = [_thing(rgb, part) for piece in pieces for part in _by_colour(rgb, piece)]
    things.sort(key=lambda thing: (-thing.radius, thing.x, thing.y))
    return Reading(tuple(things), background, _texture(shade > 0.5, ground))


# ----------------------------------------------------------------------------------------- background


def _ground(rgb: np.ndarray, background: str) -> tuple[np.ndarray, np.ndarray]:
    """Distance to the line between a background's tones, and place on it (0 first, 1 second): [H, W] each."""
    tone, step, place = between_tones(rgb, background)
    place = np.clip(place, 0, 1)
    return np.linalg.norm(rgb - tone - place[..., None] * step, axis=-1), place


def _background(rgb: np.ndarray) -> str:
    """The background that the most pixels are near to; of equals, the one nearer to the picture."""
    distances = {name: _ground(rgb, name)[0] for name in world.BACKGROUNDS}
    nearest = np.min(list(distances.values()), axis=0)
    near = {name: np.sum((d == nearest) & (d < _BACKGROUND_DISTANCE)) for name, d in distances.items()}
    return max(near, key=lambda name: (near[name], -float(distances[name].mean())))


def _texture(shade: np.ndarray, ground: np.ndarray) -> str:
    """From where the second tone is on background pixels, [H, W] bool: nowhere, in whole rows, in squares."""
    if not ground.any() or not 0.2 < shade[ground].mean() < 0.8:
        return "plain"
    counts = np.maximum(ground.sum(1), 1)
    rows = (shade & ground).sum(1) / counts  # share of the second tone in each row
    return "striped" if np.average(np.abs(rows - 0.5), weights=counts) > 0.3 else "checkered"


# --------------------------------------------------------------------------------------------- pieces


def _by_colour(rgb: np.ndarray, piece: np.ndarray) -> list[np.ndarray]:
    """The piece, or its parts where two things of different colours touch."""
    palette = np.array(list(world.COLOURS.values()), np.float32)
    nearest = np.full(piece.shape, -1)
    nearest[piece] = np.linalg.norm(rgb[piece][:, None] - palette, axis=-1).argmin(-1)
    core = masks.eroded(piece, 2)
    shares = np.bincount(nearest[core], minlength=len(palette)) / max(core.sum(), 1)
    if np.sum(shares > 0.2) < 2:
        return [piece]
    colours = np.flatnonzero(shares > 0.2)
    return [part for colour in colours for part in masks.pieces(masks.opened(nearest == colour), _LEAST_AREA)]


# -------------------------------------------------------------------------------------------- things


def _thing(rgb: np.ndarray, piece: np.ndarray) -> Seen:
    core = masks.eroded(piece, 2)
    inside = np.median(rgb[core if core.any() else piece], axis=0)
    distances = {name: float(np.linalg.norm(inside - np.array(c))) for name, c in world.COLOURS.items()}
    nearest = min(distances, key=lambda name: distances[name])
    colour = nearest if distances[nearest] <= _COLOUR_DISTANCE else None
    overlap, x, y, radius, best = max((*fit(shape, piece), shape) for shape in world.SHAPES)
    shape = best if overlap >= _LEAST_OVERLAP else None
    return Seen("small" if radius < _SIZE_LIMIT else "large", colour, shape, x, y, radius, overlap, piece)


def fit(shape: str, piece: np.ndarray) -> tuple[float, float, float, float]:
    """(overlap, x, y, radius) of the exact shape with the piece's area and centre of mass: intersection over
    union in [0, 1], and pixels. `piece` is bool [H, W] and not empty."""
    rows, columns = np.nonzero(piece)
    area_of_one, drop = _moments(shape)
    radius = float(np.sqrt(len(rows) / area_of_one))
    x, y = float(columns.mean()) + 0.5, float(rows.mean()) + 0.5 - drop * radius
    reach = int(1.2 * radius) + 1  # no shape goes further from its centre
    top, left = int(min(rows.min(), y - reach)), int(min(columns.min(), x - reach))
    bottom, right = int(max(rows.max(), y + reach)) + 1, int(max(columns.max(), x + reach)) + 1
    grid_y, grid_x = np.mgrid[top:bottom, left:right] + 0.5
    drawn = world.signed_distance(shape, grid_x - x, grid_y - y, radius) < 0
    common = np.sum(drawn[rows - top, columns - left])
    return float(common / (drawn.sum() + len(rows) - common)), x, y, radius


@lru_cache(maxsize=len(world.SHAPES))
def _moments(shape: str) -> tuple[float, float]:
    """Area of a shape of radius 1, and how far its centre of mass lies below its centre."""
    y, x = (np.mgrid[:1200, :1200] - 599.5) / 500
    inside = world.signed_distance(shape, x, y, 1.0) < 0
    return float(inside.sum()) / 500**2, float(y[inside].mean())
