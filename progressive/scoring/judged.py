"""The embedded model's own scorers: how well a picture is drawn, and what is in it. Know no other model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from overtone.progressive.errors import ScorerError
from overtone.progressive.tiny import world
from overtone.progressive.tiny.appraisal import appraise
from overtone.progressive.tiny.judge import judge


@dataclass(frozen=True)
class _Judged:
    """What both have in common: they read captions of the picture world and pictures of its size alone."""

    name: str
    units: str
    needs_prompt: bool = True

    def check(self, prompts: Sequence[str], sizes_px: Sequence[tuple[int, int]]) -> None:
        """ScorerError for prompts that are no captions of the picture world, and for sizes but its own."""
        for prompt in prompts:
            try:
                world.parse(prompt)
            except ValueError as error:
                raise ScorerError(f"scorer {self.name!r} is for the embedded model: {error}") from error
        side = world.SIDE_PX
        for height_px, width_px in sizes_px:
            if (height_px, width_px) != (side, side):
                raise ScorerError(
                    f"scorer {self.name!r} is for the embedded model: it reads {side}x{side} px, not "
                    f"{height_px}x{width_px}"
                )


class Drawing(_Judged):
    """`judge`: content, edges, shapes, colours and texture in one, 0 to 100: `Appraisal.percent`."""

    def __init__(self) -> None:
        super().__init__("judge", "points of 100")

    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """One number a picture. ValueError for what `check` refuses."""
        return [appraise(one, prompt).percent for one, prompt in zip(pictures, prompts, strict=True)]


class Things(_Judged):
    """`things`: the share of things in a picture that are drawn as asked for, 0 to 100. Their mean over
    pictures weighs pictures alike, where the share of all things weighs one with two things twice."""

    def __init__(self) -> None:
        super().__init__("things", "percent of things")

    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """One number a picture. ValueError for what `check` refuses."""
        found = [judge(one, prompt) for one, prompt in zip(pictures, prompts, strict=True)]
        return [100 * right / asked for right, asked in found]
