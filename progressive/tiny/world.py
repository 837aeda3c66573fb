"""The picture world: scenes, their captions and their exact renderings. Knows no model and no torch.

A scene has one or two things on a background. Its caption is one sentence of a small grammar,

    a SIZE COLOUR SHAPE [left of | right of | above | below a SIZE COLOUR SHAPE]
        on a TEXTURE BACKGROUND background

and fixes all but small shifts of places, radii and texture phase. Everything follows from the scene's seed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import numpy as np

SIDE_PX = 256
"""Side of a picture. Scenes are laid out in these pixels whatever size they are rendered at."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (247, 140, 20),
    "yellow": (250, 220, 40),
    "green": (40, 160, 60),
    "blue": (35, 80, 215),
    "purple": (130, 50, 165),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "grey": (160, 160, 160),
    "tan": (205, 175, 135),
    "pink": (240, 175, 195),
    "teal": (95, 170, 170),
}

SHADE = 0.78
"""Brightness of a texture's second tone over its first."""
SHAPES = ("circle", "square", "triangle", "ring", "star")
SIZES: dict[str, float] = {"small": 28.0, "large": 50.0}
"""Mean radius of a size, pixels."""
TEXTURES = ("plain", "striped", "checkered")
RELATIONS = ("left of", "right of", "above", "below")
STRIPE_PX = 48.0
"""Two stripes, one of each tone."""
CHECK_PX = 64.0
"""Two squares of a checkered background."""
PHASE_PX = 4.0
"""Most that a texture is shifted to either side, pixels."""
TRAINING_SEEDS = range(0, 1_000_000)
HELD_OUT_SEEDS = range(1_000_000, 2_000_000)
"""Scenes of these seeds are never trained on."""
NUM_FIRST_SCENES = 6144
"""The first scenes trained on. Held-out captions avoid theirs; later scenes avoid the held-out captions."""
NUM_HELD_OUT = 540
"""Held-out captions that no training scene has: those of the manifests."""


@dataclass(frozen=True)
class Kind:
    """What a caption says of a thing."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Asked:
    """What a caption asks for. `relation` is of the first thing to the second; None with one thing."""

    kinds: tuple[Kind, ...]
    relation: str | None
    texture: str
    background: str

    @property
    def caption(self) -> str:
        things = f" {self.relation} ".join(f"a {kind}" for kind in self.kinds)
        return f"{things} on a {self.texture} {self.background} background"


@dataclass(frozen=True)
class Thing:
    kind: Kind
    x: float
    """Centre, pixels from the left edge."""
    y: float
    """Centre, pixels from the top edge."""
    radius: float
    """Of the circle that the shape is drawn in, pixels."""


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    asked: Asked
    phase: tuple[float, float]
    """Shift of the texture, pixels."""


def vocabulary() -> list[str]:
    """Every word of every caption, sorted."""
    relations = " ".join(RELATIONS).split()
    words = {"a", "on", "background", *COLOURS, *BACKGROUNDS, *SHAPES, *SIZES, *TEXTURES, *relations}
    return sorted(words)


def scene(seed: int) -> Scene:
    """The scene of a seed; the same on every machine. Two of three scenes have two things."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    kinds = [_kind(rng)]
    relation = None
    if rng.random() < 2 / 3:
        relation = RELATIONS[rng.integers(len(RELATIONS))]
        kinds.append(_kind(rng))
        while (kinds[1].colour, kinds[1].shape) == (kinds[0].colour, kinds[0].shape):
            kinds[1] = _kind(rng)
    texture = TEXTURES[rng.integers(len(TEXTURES))]
    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    asked = Asked(tuple(kinds), relation, texture, background)
    things = []
    for kind, (x, y) in zip(kinds, places(relation), strict=True):
        dx, dy = rng.uniform(-8, 8, 2) * _freedom(relation)
        radius = SIZES[kind.size] * rng.uniform(0.94, 1.06)
        things.append(Thing(kind, x + float(dx), y + float(dy), float(radius)))
    dx, dy = rng.uniform(-PHASE_PX, PHASE_PX, 2)
    return Scene(tuple(things), asked, (float(dx), float(dy)))


def training(count: int, skip: int = 0) -> list[int]:
    """Seeds to train on, in order, none with a held-out caption; without the first `skip`."""
    first = list(TRAINING_SEEDS[skip : min(skip + count, NUM_FIRST_SCENES)])
    held = frozenset(caption(scene(seed)) for seed in held_out(NUM_HELD_OUT))
    allowed = (s for s in TRAINING_SEEDS[NUM_FIRST_SCENES:] if caption(scene(s)) not in held)
    start = max(0, skip - NUM_FIRST_SCENES)
    return first + list(islice(allowed, start, start + count - len(first)))


def held_out(count: int, skip: int = 0) -> list[int]:
    """Seeds of scenes whose captions are all different and in none of the first training scenes; without the
    first `skip`. The captions of the first `NUM_HELD_OUT` are in no training scene."""
    taken = set(_first_captions())
    found: list[int] = []
    for seed in HELD_OUT_SEEDS:
        sentence = caption(scene(seed))
        if sentence not in taken:
            taken.add(sentence)
            found.append(seed)
        if len(found) == skip + count:
            break
    return found[skip:]


@lru_cache(maxsize=1)
def _first_captions() -> frozenset[str]:
    return frozenset(caption(scene(seed)) for seed in TRAINING_SEEDS[:NUM_FIRST_SCENES])


def _kind(rng: np.random.Generator) -> Kind:
    size = list(SIZES)[rng.integers(len(SIZES))]
    colour = list(COLOURS)[rng.integers(len(COLOURS))]
    return Kind(size, colour, SHAPES[rng.integers(len(SHAPES))])


def places(relation: str | None) -> tuple[tuple[float, float], ...]:
    """Mean centres (x, y) of the things of a relation, pixels."""
    middle, low, high = SIDE_PX / 2, SIDE_PX / 2 - 62, SIDE_PX / 2 + 62
    places = {
        None: ((middle, middle),),
        "left of": ((low, middle), (high, middle)),
        "right of": ((high, middle), (low, middle)),
        "above": ((middle, low), (middle, high)),
        "below": ((middle, high), (middle, low)),
    }
    return places[relation]


def _freedom(relation: str | None) -> tuple[float, float]:
    """Share of the shift that things may have along x and y: less towards each other, so that none touch."""
    if relation is None:
        return 1.0, 1.0
    return (0.5, 1.0) if relation in ("left of", "right of") else (1.0, 0.5)


# ------------------------------------------------------------------------------------------- captions


def caption(scene: Scene) -> str:
    return scene.asked.caption


def _any(words: object) -> str:
    return "(" + "|".join(words) + ")"  # type: ignore[arg-type]


_THING = rf"an? {_any(SIZES)} {_any(COLOURS)} {_any(SHAPES)}"

_CAPTION = re.compile(
    rf"{_THING}(?: {_any(RELATIONS)} {_THING})? on a {_any(TEXTURES)} {_any(BACKGROUNDS)} background"
)


def parse(caption: str) -> Asked:
    """What a caption asks for: the inverse of `Asked.caption`, blind to case and spacing.

    ValueError if the caption is not a sentence of the grammar.
    """
    match = _CAPTION.fullmatch(" ".join(caption.lower().split()).rstrip("."))
    if match is None:
        raise ValueError(
            f"caption is {caption!r}; it must read `a SIZE COLOUR SHAPE [RELATION a SIZE COLOUR SHAPE] on a "
            f"TEXTURE BACKGROUND background`, for example {scene(HELD_OUT_SEEDS[0]).asked.caption!r}"
        )
    first, relation = match.group(1, 2, 3), match.group(4)
    second, ground = match.group(5, 6, 7), match.group(8, 9)
    kinds = (Kind(*first),) if relation is None else (Kind(*first), Kind(*second))
    return Asked(kinds, relation, ground[0], ground[1])


# ------------------------------------------------------------------------------------------- pictures


def render(scene: Scene, side_px: int = SIDE_PX) -> np.ndarray:
    """The picture of a scene: uint8 [side_px, side_px, 3], edges anti-aliased over one pixel."""
    scale = SIDE_PX / side_px
    y, x = np.mgrid[:side_px, :side_px].astype(np.float32)
    x, y = (x + 0.5) * scale, (y + 0.5) * scale  # [H, W], in layout pixels
    tone = np.array(BACKGROUNDS[scene.asked.background], np.float32)
    shade = _texture(scene, x, y, scale)[..., None]
    picture = tone * (1 - (1 - SHADE) * shade)  # [H, W, 3]
    for thing in scene.things:
        distance = signed_distance(thing.kind.shape, x - thing.x, y - thing.y, thing.radius)
        cover = np.clip(0.5 - distance / scale, 0, 1)[..., None]
        picture += cover * (np.array(COLOURS[thing.kind.colour], np.float32) - picture)
    return np.rint(picture).astype(np.uint8)


def _texture(scene: Scene, x: np.ndarray, y: np.ndarray, scale: float) -> np.ndarray:
    """Share of the second tone, [H, W] in [0, 1]."""
    dx, dy = scene.phase
    if scene.asked.texture == "plain":
        return np.zeros_like(x)
    if scene.asked.texture == "striped":
        return bands(y + dy, STRIPE_PX, scale)
    across, down = bands(x + dx, CHECK_PX, scale), bands(y + dy, CHECK_PX, scale)
    return across + down - 2 * across * down


def bands(position: np.ndarray, period: float, scale: float) -> np.ndarray:
    """1 on every second band of half a period, 0 between."""
    inside = period / 4 - np.abs(position % period - period / 2)
    return np.clip(0.5 + inside / scale, 0, 1)


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Distance to a shape's edge in pixels, negative inside; x, y [H, W] from its centre, y downwards.

    Near straight edges it is exact, past their corners a lower bound.
    """
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.86 * radius
    if shape == "triangle":  # equilateral, point up, about the middle of its height
        side, half_height = 0.5 * np.sqrt(3.0), 0.9 * radius
        return np.maximum(y - half_height, side * np.abs(x) - 0.5 * (y + half_height))
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.78 * radius) - 0.22 * radius
    if shape == "star":  # five points, one up: fold the plane into half a point, then one straight edge
        outer, inner, half = 1.1 * radius, 0.45 * radius, np.pi / 5
        angle = np.abs((np.arctan2(x, -y) + half) % (2 * half) - half)
        length = np.hypot(x, y)
        along, aside = length * np.cos(angle), length * np.sin(angle)
        edge = np.array([inner * np.cos(half) - outer, inner * np.sin(half)])
        edge /= np.hypot(*edge)
        return (along - outer) * edge[1] - aside * edge[0]
    raise ValueError(f"shape is {shape!r}; it must be one of {', '.join(SHAPES)}")
