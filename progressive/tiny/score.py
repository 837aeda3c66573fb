"""Scores the embedded model by judge and appraisal: `python -m overtone.progressive.tiny.score --sheet
sheet.png`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from overtone.progressive import tiny
from overtone.progressive.tiny import world
from overtone.progressive.tiny.appraisal import READINGS, Appraisal, appraise
from overtone.progressive.tiny.judge import judge, read

_BATCH = 8
_THUMBNAIL_PX = 128


@dataclass(frozen=True)
class Score:
    """Counts over all prompts. A thing is right if size, colour, shape and place are."""

    things: int
    right: int
    colours: int
    """Things asked for whose colour some thing in the picture has."""
    prompts: int
    backgrounds: int
    """Pictures with the right background and texture."""

    def text(self) -> str:
        return (
            f"things right {self.right} of {self.things}, colours present {self.colours} of {self.things}, "
            f"backgrounds right {self.backgrounds} of {self.prompts}"
        )


def score(images: Sequence[Image.Image], prompts: Sequence[str]) -> Score:
    """How many of the things and backgrounds asked for are in the pictures."""
    things = right = colours = backgrounds = 0
    for image, prompt in zip(images, prompts, strict=True):
        asked, reading = world.parse(prompt), read(image)
        seen = {thing.colour for thing in reading.things}
        right_here, things_here = judge(image, prompt)
        right, things = right + right_here, things + things_here
        colours += sum(kind.colour in seen for kind in asked.kinds)
        backgrounds += (reading.background, reading.texture) == (asked.background, asked.texture)
    return Score(things, right, colours, len(prompts), backgrounds)


def drawing(appraisals: Sequence[Appraisal]) -> str:
    """How well pictures are drawn: the mean of all points, and for each reading its mean grade and the share
    of pictures that pass it, percent."""
    lines = [f"drawn well {np.mean([one.percent for one in appraisals]):.1f} of 100 points"]
    for name in READINGS:
        grades = [found[name] for one in appraisals if name in (found := one.readings())]
        if grades:
            mean, passed = (100 * np.mean([getattr(g, what) for g in grades]) for what in ("value", "passed"))
            lines.append(f"  {name} {mean:.1f}, passed in {passed:.1f} % of {len(grades)} pictures")
    return "\n".join(lines)


def draw(pipe: Any, prompts: Sequence[str], num_steps: int, true_cfg_scale: float) -> list[Image.Image]:
    """Pictures of the prompts by the plain pipeline, 256x256; picture i from seed i."""
    images: list[Image.Image] = []
    for first in range(0, len(prompts), _BATCH):
        batch = list(prompts[first : first + _BATCH])
        images += pipe(
            batch,
            negative_prompt=[""] * len(batch),
            true_cfg_scale=true_cfg_scale,
            height=world.SIDE_PX,
            width=world.SIDE_PX,
            num_inference_steps=num_steps,
            max_sequence_length=tiny.MAX_SEQUENCE_LENGTH,
            generator=[torch.Generator().manual_seed(first + i) for i in range(len(batch))],
        ).images
    return images


def sheet(images: Sequence[Image.Image], columns: int = 10) -> Image.Image:
    """The pictures, reduced, in rows."""
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (min(columns, len(images)) * _THUMBNAIL_PX, rows * _THUMBNAIL_PX))
    for i, image in enumerate(images):
        small = image.resize((_THUMBNAIL_PX, _THUMBNAIL_PX), Image.Resampling.BOX)
        page.paste(small, (i % columns * _THUMBNAIL_PX, i // columns * _THUMBNAIL_PX))
    return page


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m overtone.progressive.tiny.score",
        description="Draw held-out prompts and count what is right.",
    )
    parser.add_argument(
        "--model", type=Path, default=None, help="diffusers folder; the embedded one if left out"
    )
    parser.add_argument("--prompts", type=int, default=100, help="how many; the quickstart's 40 are left out")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--true-cfg-scale", type=float, default=3.0)
    parser.add_argument("--sheet", type=Path, help="write the pictures here, as one PNG")
    given = parser.parse_args(argv)
    prompts = [world.caption(world.scene(seed)) for seed in world.held_out(given.prompts, skip=40)]
    pipe = DiffusionPipeline.from_pretrained(given.model or tiny.path())
    images = draw(pipe, prompts, given.steps, given.true_cfg_scale)
    if given.sheet is not None:
        sheet(images).save(given.sheet)
    print(score(images, prompts).text())
    print(drawing([appraise(image, prompt) for image, prompt in zip(images, prompts, strict=True)]))


if __name__ == "__main__":
    main()
