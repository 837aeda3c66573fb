"""`overtone tune`: the fastest setting at an acceptable loss, measured on a job's own prompts and hardware.

Runs `fullres` and a sweep of settings over the same few rows with the same seeds in one process, and
compares pictures. Starts no Ray: one engine, the one that a worker would hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from overtone.cluster.measure.settings import Judge, Setting, possible, sample_rows, sweep
from overtone.cluster.measure.tuning import Outcome, Tuning, mark_pareto
from overtone.cluster.worker import Engine, compile_for
from overtone.jobs.rows import Row
from overtone.jobs.spec import JobSpec
from overtone.progressive import quality
from overtone.progressive.schedule import SamplingPlan

_JUDGEABLE_PERCENT = 50.0  # a model that draws less than this right at fullres loses little that a judge sees
_SHOWN_ROWS = 6  # pictures side by side in the report

_DISTANCES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "psnr_db": quality.psnr,
    "ssim": quality.ssim,
    "perceptual_distance": quality.perceptual_distance,
    "high_frequency_ratio": quality.high_frequency_ratio,
}


def tune(
    spec: JobSpec,
    engine: Engine,
    *,
    rows: int | Sequence[Row] = 16,
    batch_size: int = 8,
    max_drop: float = 1.0,
    settings: Sequence[Setting] | None = None,
    judge: Judge | None = None,
    on_progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Tuning:
    """Run the sweep.

    Every setting sees the same rows, seeds and batches, in turns; one step on each of its grids is run first
    and thrown away, so that no setting pays for warming up. With a `judge` the loss is its drop in percentage
    points, without one 100 x the perceptual distance. The first of `settings` (unset: `sweep`) is what the
    others are compared to; step caches that the pipeline cannot have are left out. UserError for prompts that
    cannot be used, ValueError for sizes.
    """
    chosen = sample_rows(spec, rows) if isinstance(rows, int) else list(rows)
    candidates = [s for s in settings or sweep(spec.sampling) if possible(engine, s)]
    tallies = [_Tally() for _ in candidates]
    batches = _batches(chosen, batch_size)
    warm: set[Any] = set()
    for number, (indices, *size) in enumerate(batches):
        batch = [chosen[i] for i in indices]
        encoded = engine.encode([r.prompt for r in batch], [r.negative_prompt for r in batch], spec.sampling)
        reference: list[Any] = []
        for setting, tally in zip(candidates, tallies, strict=True):  # they take turns: a machine that
            on_progress(setting.name, number, len(batches))  # slows down does so for all of them
            plan = engine.plan(setting.sampling, height_px=size[0], width_px=size[1])
            seeds = [row.seed for row in batch]
            if (setting.name, *size) not in warm:
                warm.add((setting.name, *size))
                compile_for(engine, plan, len(batch), setting.sampling)
                engine.denoise(plan.one_step_each(), encoded, seeds, setting.sampling)
            latents, reports = engine.denoise(plan, encoded, seeds, setting.sampling)
            media = engine.decode(plan, latents)
            reference = reference or list(media)
            tally.add(batch, plan, sum(report.seconds for report in reports), media, reference, judge)
    full, *_ = tallies
    # A judge that finds little right at fullres has nothing to count down from: it does not decide.
    full_judged = None if judge is None or full.judged < _JUDGEABLE_PERCENT else full.judged
    outcomes: list[Outcome] = []
    for setting, tally in zip(candidates, tallies, strict=True):
        distances = tally.distances()
        outcomes.append(
            Outcome(
                name=setting.name,
                group=setting.group,
                sampling=setting.sampling.model_dump(mode="json", exclude_defaults=True),
                split=engine.plan(setting.sampling).split,
                seconds_per_row=tally.seconds / len(chosen),
                saving=full.seconds / tally.seconds,
                predicted_saving=tally.full_token_steps / tally.token_steps,
                judge_percent=None if judge is None else tally.judged,
                loss=100 * distances["perceptual_distance"]
                if full_judged is None
                else full_judged - tally.judged,
                **distances,
            )
        )
    outcomes = mark_pareto(outcomes)
    choice = max((o for o in outcomes if o.loss <= max_drop), key=lambda o: o.saving, default=outcomes[0])
    cuda = str(engine.device).startswith("cuda")
    shown = [row for indices, *_ in batches for row in (chosen[i] for i in indices)][:_SHOWN_ROWS]
    return Tuning(
        model=spec.model.id,
        device=torch.cuda.get_device_name(engine.device) if cuda else "CPU",
        rows=len(chosen),
        num_steps=engine.plan(candidates[0].sampling).num_steps,
        loss_metric="100 x perceptual distance" if full_judged is None else "judge, percentage points",
        max_drop=max_drop,
        outcomes=tuple(outcomes),
        choice=choice,
        pictures={c.name: tally.pictures for c, tally in zip(candidates, tallies, strict=True)},
        prompts=tuple(row.prompt for row in shown),
    )


@dataclass
class _Tally:
    """What one setting has given so far. Keeps few pictures: a sweep over many rows needs no more memory."""

    seconds: float = 0.0
    token_steps: int = 0
    full_token_steps: int = 0
    right: int = 0
    asked: int = 0
    values: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in _DISTANCES})
    pictures: list[Image.Image] = field(default_factory=list)

    @property
    def judged(self) -> float:
        """Objects drawn right, percent."""
        return 100 * self.right / max(1, self.asked)

    def add(
        self,
        rows: Sequence[Row],
        plan: SamplingPlan,
        seconds: float,
        media: Sequence[Any],
        reference: Sequence[Any],
        judge: Judge | None,
    ) -> None:
        self.seconds += seconds
        self.token_steps += plan.token_steps * len(rows)
        self.full_token_steps += plan.fullres_token_steps * len(rows)
        self.pictures += [_still(medium) for medium in media[: _SHOWN_ROWS - len(self.pictures)]]
        for row, made, wanted in zip(rows, media, reference, strict=True):
            a, b = quality.as_tensor([made]), quality.as_tensor([wanted])
            for name, measure in _DISTANCES.items():
                self.values[name].append(float(measure(a, b).mean()))
            if judge is not None:
                right, asked = judge(made, row.prompt)
                self.right, self.asked = self.right + right, self.asked + asked

    def distances(self) -> dict[str, Any]:
        """Means over rows."""
        return {name: float(np.mean(found)) for name, found in self.values.items()}


_Batch = tuple[list[int], int | None, int | None]
"""Indices of rows of one size, and the size: height and width in pixels, None for the job's own."""


def _batches(rows: Sequence[Row], batch_size: int) -> list[_Batch]:
    sizes: dict[tuple[int | None, int | None], list[int]] = {}
    for index, row in enumerate(rows):
        sizes.setdefault((row.height, row.width), []).append(index)
    return [
        (indices[i : i + batch_size], *size)
        for size, indices in sizes.items()
        for i in range(0, len(indices), batch_size)
    ]


def _still(media: Any) -> Image.Image:
    """A picture, or the middle frame of a video."""
    return media if isinstance(media, Image.Image) else Image.fromarray(media[len(media) // 2])
