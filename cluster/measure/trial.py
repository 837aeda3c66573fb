"""One setting of a sweep while it is measured: what each batch gave, and all figures from these. Knows no
engine; a batch that one setting lacks is left out of its comparison with the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from overtone.cluster.measure.pace import half_width
from overtone.cluster.measure.prompts import Judge
from overtone.cluster.measure.settings import Setting
from overtone.cluster.measure.tuning import Outcome
from overtone.jobs.rows import Row
from overtone.progressive import quality
from overtone.progressive.schedule import SamplingPlan

_DISTANCES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "psnr_db": quality.psnr,
    "ssim": quality.ssim,
    "perceptual_distance": quality.perceptual_distance,
    "high_frequency_ratio": quality.high_frequency_ratio,
}


@dataclass(frozen=True)
class Measured:
    """One batch at one setting. Keeps few pictures: a sweep over many rows needs no more memory."""

    rows: int
    seconds: float
    token_steps: int
    """Of all rows."""
    full_token_steps: int
    """The same at full resolution."""
    values: dict[str, list[float]]
    """Distances to the pictures of the first setting, a value a row."""
    right: list[int]
    """Objects drawn right, a number a row; empty without a judge."""
    asked: list[int]
    """Objects asked for."""
    stills: list[Image.Image]
    """The pictures of its first rows, for the report."""


def measure(
    rows: Sequence[Row],
    plan: SamplingPlan,
    seconds: float,
    media: Sequence[Any],
    reference: Sequence[Any],
    judge: Judge | None,
    shown: int,
) -> Measured:
    """What a setting made of these rows, against the first setting's `reference`; keeps `shown` pictures."""
    values: dict[str, list[float]] = {name: [] for name in _DISTANCES}
    for made, wanted in zip(media, reference, strict=True):
        pair = quality.as_tensor([made]), quality.as_tensor([wanted])
        for name, distance in _DISTANCES.items():
            values[name].append(float(distance(*pair).mean()))
    found = [judge(made, row.prompt) for row, made in zip(rows, media, strict=True)] if judge else []
    return Measured(
        rows=len(rows),
        seconds=seconds,
        token_steps=plan.token_steps * len(rows),
        full_token_steps=plan.fullres_token_steps * len(rows),
        values=values,
        right=[right for right, _ in found],
        asked=[asked for _, asked in found],
        stills=[_still(medium) for medium in media[: max(0, shown)]],
    )


def _still(media: Any) -> Image.Image:
    """A picture, or the middle frame of a video."""
    return media if isinstance(media, Image.Image) else Image.fromarray(media[len(media) // 2])


@dataclass
class Trial:
    """One setting and its batches so far, by their numbers."""

    setting: Setting
    batches: dict[int, Measured] = field(default_factory=dict)

    @property
    def judged(self) -> float:
        """Objects drawn right, percent."""
        right, asked = (
            sum(sum(getattr(m, name)) for m in self.batches.values()) for name in ("right", "asked")
        )
        return 100 * right / max(1, asked)

    @property
    def pictures(self) -> list[Image.Image]:
        return [still for measured in self.batches.values() for still in measured.stills]

    def outcome(self, full: Trial, split: str, *, judged: bool, decides: bool) -> Outcome:
        """All figures, against those of the first setting on the same batches. `judged`: there was a judge;
        `decides`: the loss is what it found."""
        own = [*self.batches.values()]
        others = [full.batches[number] for number in self.batches]
        seconds = sum(m.seconds for m in own)
        values = {name: [v for m in own for v in m.values[name]] for name in _DISTANCES}
        losses = _drops(own, others) if decides else [100 * v for v in values["perceptual_distance"]]
        distances: dict[str, Any] = {name: float(np.mean(some)) for name, some in values.items()}
        ratios = [math.log(o.seconds / m.seconds) for m, o in zip(own, others, strict=True)]
        return Outcome(
            name=self.setting.name,
            group=self.setting.group,
            sampling=self.setting.sampling.model_dump(mode="json", exclude_defaults=True),
            split=split,
            seconds_per_row=seconds / sum(m.rows for m in own),
            saving=sum(o.seconds for o in others) / seconds,
            predicted_saving=sum(m.full_token_steps for m in own) / sum(m.token_steps for m in own),
            judge_percent=self.judged if judged else None,
            loss=float(np.mean(losses)),
            saving_error=half_width(ratios),
            loss_error=half_width(losses),
            **distances,
        )


def _drops(own: Sequence[Measured], others: Sequence[Measured]) -> list[float]:
    """What the judge finds less than in the first setting's pictures, a value a row: their mean is the drop
    in percentage points."""
    asked = [n for m in own for n in m.asked]
    pairs = zip((n for m in own for n in m.right), (n for o in others for n in o.right), strict=True)
    return [100 * (before - now) * len(asked) / max(1, sum(asked)) for now, before in pairs]
