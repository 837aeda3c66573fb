"""`overtone tune`: the fastest setting at an acceptable loss, measured on a job's own prompts and hardware.

    tuning = tune_job(spec, page="tune.html", fragment="tune.yaml")
    tuning = tune(spec, engine, rows=16)                       # the caller's engine, no files

Runs `fullres` and a sweep of settings over the same few rows with the same seeds in one process, and compares
pictures. Starts no Ray: one engine, the one that a worker would hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from overtone.cluster.measure.prompts import Judge, sample_rows, tiny_judge
from overtone.cluster.measure.settings import DELTAS, Setting, named_like, possible, sweep
from overtone.cluster.measure.tuning import Outcome, Tuning, mark_pareto
from overtone.cluster.worker import Engine, compile_for, load_engine
from overtone.jobs.errors import UserError
from overtone.jobs.rows import Row
from overtone.jobs.spec import JobSpec
from overtone.progressive import quality
from overtone.progressive.schedule import SamplingPlan

_JUDGEABLE_PERCENT = 50.0  # a model that draws less than this right at fullres loses little that a judge sees
_SHOWN_ROWS = 6  # pictures side by side in the report

OnProgress = Callable[[str, int, int], None]
"""Called with a setting's name, the number of its batch and how many batches there are."""

_DISTANCES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "psnr_db": quality.psnr,
    "ssim": quality.ssim,
    "perceptual_distance": quality.perceptual_distance,
    "high_frequency_ratio": quality.high_frequency_ratio,
}


def tune_job(
    spec: JobSpec,
    *,
    page: str,
    fragment: str,
    sheet: str | None = None,
    rows: int = 16,
    batch_size: int = 8,
    max_drop: float = 1.0,
    deltas: Sequence[float] = (),
    only: Sequence[str] = (),
    show: Sequence[str] = (),
    on_progress: OnProgress = lambda name, done, total: None,
) -> Tuning:
    """Load the spec's model, compare settings on its prompts, and write what was found.

    Args:
        page: the HTML report to write; fragment: the choice as YAML; sheet: also a PNG of the first prompts.
        deltas: the deltas to try; unset: `DELTAS`.
        only: patterns of the settings' names to try besides `fullres`; unset: all.
        show: the settings on the sheet; unset: `fullres` and the choice.

    The other arguments, and the errors, are those of `tune`; UserError for a name in `only` or `show` that no
    setting has.
    """
    settings = named_like(sweep(spec.sampling, deltas=deltas or DELTAS), only)
    names = [setting.name for setting in settings]
    if unknown := sorted(set(show) - set(names)):
        raise UserError(f"--show: no setting is named {unknown[0]!r}; there are: {'; '.join(names)}")
    chosen = sample_rows(spec, rows)
    tuning = tune(
        spec,
        load_engine(spec),
        rows=chosen,
        batch_size=batch_size,
        max_drop=max_drop,
        settings=settings,
        judge=tiny_judge(spec, chosen),
        on_progress=on_progress,
    )
    Path(page).write_text(tuning.html())
    Path(fragment).write_text(tuning.fragment())
    if sheet:
        Path(sheet).write_bytes(tuning.sheet(show))
    return tuning


def tune(
    spec: JobSpec,
    engine: Engine,
    *,
    rows: int | Sequence[Row] = 16,
    batch_size: int = 8,
    max_drop: float = 1.0,
    settings: Sequence[Setting] | None = None,
    judge: Judge | None = None,
    on_progress: OnProgress = lambda name, done, total: None,
) -> Tuning:
    """Run the sweep.

    Every setting runs the same rows, seeds and batches, in turns; one step on each of its grids is run first
    and thrown away, so that no setting pays for warming up. With a `judge` the loss is its drop in percentage
    points, without one 100 x the perceptual distance. The first of `settings` (unset: `sweep`) is the one
    that the others are compared to; step caches that the pipeline cannot have are left out. UserError for
    prompts that cannot be used, ValueError for sizes.
    """
    chosen = sample_rows(spec, rows) if isinstance(rows, int) else list(rows)
    batches = _batches(chosen, batch_size)
    candidates = [s for s in settings or sweep(spec.sampling) if possible(engine, s)]
    trials = [_Trial(setting) for setting in candidates]
    _run(spec, engine, trials, batches, judge, on_progress)
    full, *_ = trials
    # A judge that finds little right at fullres has nothing to count down from: it does not decide.
    decides = judge is not None and full.judged >= _JUDGEABLE_PERCENT
    outcomes = mark_pareto(
        [
            trial.outcome(
                full,
                engine.plan(trial.setting.sampling).split,
                judge_percent=None if judge is None else trial.judged,
                drop=full.judged - trial.judged if decides else None,
            )
            for trial in trials
        ]
    )
    choice = max((o for o in outcomes if o.loss <= max_drop), key=lambda o: o.saving, default=outcomes[0])
    cuda = str(engine.device).startswith("cuda")
    return Tuning(
        model=spec.model.id,
        device=torch.cuda.get_device_name(engine.device) if cuda else "CPU",
        rows=len(chosen),
        num_steps=engine.plan(candidates[0].sampling).num_steps,
        loss_metric="judge, percentage points" if decides else "100 x perceptual distance",
        max_drop=max_drop,
        outcomes=tuple(outcomes),
        choice=choice,
        pictures={trial.setting.name: trial.pictures for trial in trials},
        prompts=tuple(row.prompt for batch in batches for row in batch.rows)[:_SHOWN_ROWS],
    )


class _Batch(NamedTuple):
    """Rows of one size."""

    rows: list[Row]
    height_px: int | None
    """None: the job's own; as for the width."""
    width_px: int | None


def _batches(rows: Sequence[Row], batch_size: int) -> list[_Batch]:
    sizes: dict[tuple[int | None, int | None], list[Row]] = {}
    for row in rows:
        sizes.setdefault((row.height, row.width), []).append(row)
    return [
        _Batch(of_size[i : i + batch_size], *size)
        for size, of_size in sizes.items()
        for i in range(0, len(of_size), batch_size)
    ]


def _run(
    spec: JobSpec,
    engine: Engine,
    trials: Sequence[_Trial],
    batches: Sequence[_Batch],
    judge: Judge | None,
    on_progress: OnProgress,
) -> None:
    """Make every batch at every setting, and compare with what the first setting made of it."""
    warm: set[Any] = set()
    for number, batch in enumerate(batches):
        rows, *size = batch
        encoded = engine.encode([r.prompt for r in rows], [r.negative_prompt for r in rows], spec.sampling)
        seeds = [row.seed for row in rows]
        reference: list[Any] = []
        for trial in trials:  # they take turns: a machine that slows down does so for all of them
            setting = trial.setting
            on_progress(setting.name, number, len(batches))
            plan = engine.plan(setting.sampling, height_px=batch.height_px, width_px=batch.width_px)
            if (setting.name, *size) not in warm:
                warm.add((setting.name, *size))
                compile_for(engine, plan, len(rows), setting.sampling)
                engine.denoise(plan.one_step_each(), encoded, seeds, setting.sampling)
            latents, reports = engine.denoise(plan, encoded, seeds, setting.sampling)
            media = engine.decode(plan, latents)
            reference = reference or list(media)
            trial.add(rows, plan, sum(report.seconds for report in reports), media, reference, judge)


@dataclass
class _Trial:
    """One setting and its figures so far. Keeps few pictures: a sweep over many rows needs no more memory."""

    setting: Setting
    rows: int = 0
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
        """One batch that the setting made, of these rows; `reference` is the first setting's."""
        self.rows += len(rows)
        self.seconds += seconds
        self.token_steps += plan.token_steps * len(rows)
        self.full_token_steps += plan.fullres_token_steps * len(rows)
        self.pictures += [_still(medium) for medium in media[: _SHOWN_ROWS - len(self.pictures)]]
        for row, made, wanted in zip(rows, media, reference, strict=True):
            pair = quality.as_tensor([made]), quality.as_tensor([wanted])
            for name, measure in _DISTANCES.items():
                self.values[name].append(float(measure(*pair).mean()))
            if judge is not None:
                right, asked = judge(made, row.prompt)
                self.right, self.asked = self.right + right, self.asked + asked

    def outcome(
        self, full: _Trial, split: str, *, judge_percent: float | None, drop: float | None
    ) -> Outcome:
        """All figures, against those of the first setting; `drop` is the judge's, None where it decides
        nothing."""
        distances: dict[str, Any] = {name: float(np.mean(values)) for name, values in self.values.items()}
        return Outcome(
            name=self.setting.name,
            group=self.setting.group,
            sampling=self.setting.sampling.model_dump(mode="json", exclude_defaults=True),
            split=split,
            seconds_per_row=self.seconds / self.rows,
            saving=full.seconds / self.seconds,
            predicted_saving=self.full_token_steps / self.token_steps,
            judge_percent=judge_percent,
            loss=100 * distances["perceptual_distance"] if drop is None else drop,
            **distances,
        )


def _still(media: Any) -> Image.Image:
    """A picture, or the middle frame of a video."""
    return media if isinstance(media, Image.Image) else Image.fromarray(media[len(media) // 2])
