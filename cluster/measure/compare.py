"""`overtone tune`: the fastest setting at an acceptable loss, measured on a job's own prompts and hardware.

    tuning = tune_job(spec, keep=Path("."))
    tuning = tune(spec, engine, rows=16)                       # the caller's engine

Runs `fullres` and a sweep of settings over the same few rows with the same seeds in one process, and compares
pictures. Starts no Ray: one engine, the one that a worker would hold.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from overtone.cluster.measure.kept import Kept
from overtone.cluster.measure.pace import Countdown, OnProgress, Progress, silent
from overtone.cluster.measure.prompts import Judge, sample_rows, tiny_judge
from overtone.cluster.measure.settings import DELTAS, Setting, named_like, possible, sweep
from overtone.cluster.measure.trial import Trial, measure
from overtone.cluster.measure.tuning import Outcome, Tuning, mark_pareto
from overtone.cluster.worker import Engine, compile_for, load_engine
from overtone.jobs.errors import JobError, UserError
from overtone.jobs.rows import Row
from overtone.jobs.spec import JobSpec
from overtone.progressive.schedule import SamplingPlan

_JUDGEABLE_PERCENT = 50.0  # a model that draws less than this right at fullres loses little that a judge sees
_SHOWN_ROWS = 6  # pictures side by side in the report


def tune_job(
    spec: JobSpec,
    *,
    rows: int = 16,
    batch_size: int = 4,
    max_drop: float = 1.0,
    deltas: Sequence[float] = (),
    only: Sequence[str] = (),
    show: Sequence[str] = (),
    keep: Path | None = None,
    on_progress: OnProgress = silent,
) -> Tuning:
    """Load the spec's model and compare settings on its prompts.

    Args:
        deltas: the deltas to try; unset: `DELTAS`.
        only: patterns of the settings' names to try besides `fullres`; unset: all.
        show: settings that will be asked of `Tuning.sheet`, to be known before the work.

    The other arguments, and the errors, are those of `tune`; UserError for a name in `only` or `show` that no
    setting has.
    """
    settings = named_like(sweep(spec.sampling, deltas=deltas or DELTAS), only)
    names = [setting.name for setting in settings]
    if unknown := sorted(set(show) - set(names)):
        raise UserError(f"--show: no setting is named {unknown[0]!r}; there are: {'; '.join(names)}")
    chosen = sample_rows(spec, rows)
    on_progress(Progress(0, 0, f"loading {spec.model.id}", None))
    return tune(
        spec,
        load_engine(spec),
        rows=chosen,
        batch_size=batch_size,
        max_drop=max_drop,
        settings=settings,
        judge=tiny_judge(spec, chosen),
        keep=keep,
        on_progress=on_progress,
    )


def tune(
    spec: JobSpec,
    engine: Engine,
    *,
    rows: int | Sequence[Row] = 16,
    batch_size: int = 4,
    max_drop: float = 1.0,
    settings: Sequence[Setting] | None = None,
    judge: Judge | None = None,
    keep: Path | None = None,
    on_progress: OnProgress = silent,
) -> Tuning:
    """Run the sweep.

    Every setting runs the same rows, seeds and batches, in turns; one step on each of its grids is run first
    and thrown away, so that no setting pays for warming up. With a `judge` the loss is its drop in percentage
    points, without one 100 x the perceptual distance. The first of `settings` (unset: `sweep`) is the one
    that the others are compared to; step caches that the pipeline cannot have are left out.

    Ctrl-C ends it with what was measured until then. Where a folder to `keep` it in is given, the same sweep
    goes on from there. UserError for prompts that cannot be used, ValueError for sizes, JobError where it was
    interrupted before anything was measured.
    """
    chosen = sample_rows(spec, rows) if isinstance(rows, int) else list(rows)
    batches = _batches(chosen, batch_size)
    candidates = [s for s in settings or sweep(spec.sampling) if possible(engine, s)]
    trials = [Trial(setting) for setting in candidates]
    kept = Kept(keep, _about(spec, engine, batches))
    try:
        _run(spec, engine, trials, batches, judge, kept, on_progress)
        kept.remove()
    except KeyboardInterrupt:
        if not any(trial.batches for trial in trials):
            raise JobError("interrupted before anything was measured") from None
    return _tuning(spec, engine, trials, batches, judge is not None, max_drop, kept)


def _tuning(
    spec: JobSpec,
    engine: Engine,
    trials: Sequence[Trial],
    batches: Sequence[_Batch],
    judged: bool,
    max_drop: float,
    kept: Kept,
) -> Tuning:
    """What the settings that were measured gave, and which of them to take."""
    full, *_ = trials
    # A judge that finds little right at fullres has nothing to count down from: it does not decide.
    decides = judged and full.judged >= _JUDGEABLE_PERCENT
    outcomes = mark_pareto(
        [
            trial.outcome(full, engine.plan(trial.setting.sampling).split, judged=judged, decides=decides)
            for trial in trials
            if trial.batches
        ]
    )
    choice = max((o for o in outcomes if o.loss <= max_drop), key=lambda o: o.saving, default=outcomes[0])
    measured, planned = sum(len(trial.batches) for trial in trials), len(trials) * len(batches)
    return Tuning(
        model=spec.model.id,
        device=_device(engine),
        rows=sum(m.rows for m in full.batches.values()),
        num_steps=engine.plan(full.setting.sampling).num_steps,
        loss_metric="judge, percentage points" if decides else "100 x perceptual distance",
        max_drop=max_drop,
        outcomes=tuple(outcomes),
        choice=choice,
        nearest=_nearest(outcomes, choice),
        pictures={trial.setting.name: trial.pictures for trial in trials if trial.batches},
        prompts=tuple(row.prompt for batch in batches for row in batch.rows)[:_SHOWN_ROWS],
        measured=measured,
        planned=planned,
        kept=None if kept.path is None or measured == planned else str(kept.path),
    )


def _nearest(outcomes: Sequence[Outcome], choice: Outcome) -> Outcome | None:
    """Where nothing that is faster loses little enough: the one that loses least. None where there is a
    choice, and where nothing is faster."""
    if choice is not outcomes[0]:
        return None
    return min((o for o in outcomes[1:] if o.saving > 1), key=lambda o: o.loss, default=None)


def _device(engine: Engine) -> str:
    cuda = str(engine.device).startswith("cuda")
    return torch.cuda.get_device_name(engine.device) if cuda else "CPU"


def _about(spec: JobSpec, engine: Engine, batches: Sequence[_Batch]) -> Any:
    """All that a measurement depends on besides its setting."""
    rows = [
        [[row.row_id, row.prompt, row.negative_prompt, row.seed] for row in batch.rows] for batch in batches
    ]
    sizes = [[batch.height_px, batch.width_px] for batch in batches]
    workers = spec.workers.model_dump(mode="json", include={"compile", "threads"})
    return [spec.model.model_dump(mode="json"), workers, _device(engine), rows, sizes]


class _Batch(NamedTuple):
    """Rows of one size."""

    rows: list[Row]
    height_px: int | None
    """None: the job's own; as for the width."""
    width_px: int | None

    @property
    def size(self) -> tuple[int | None, int | None]:
        return self.height_px, self.width_px


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
    trials: Sequence[Trial],
    batches: Sequence[_Batch],
    judge: Judge | None,
    kept: Kept,
    on_progress: OnProgress,
) -> None:
    """Make every batch at every setting that is not known yet, and compare with what the first setting made
    of it."""
    makers = {batch.size: _Maker(spec, engine, batch.size) for batch in batches}
    weights: dict[Hashable, float] = {
        (number, trial.setting.name): makers[batch.size].plan(trial.setting).token_steps * len(batch.rows)
        for number, batch in enumerate(batches)
        for trial in trials
    }
    countdown, shown = Countdown(weights), _SHOWN_ROWS
    for number, batch in enumerate(batches):
        reference: list[Any] = []
        for trial in trials:  # they take turns: a machine that slows down does so for all of them
            setting, step = trial.setting, (number, trial.setting.name)
            known = kept.load(number, setting)
            if known is not None and (reference or known[1]):
                trial.batches[number], media = known
                reference = reference or media
                countdown.known(step)
                continue
            on_progress(countdown.progress(f"batch {number + 1} of {len(batches)}, {setting.name}"))
            seconds, media = makers[batch.size].make(setting, batch.rows)
            first, reference = not reference, reference or media
            plan = makers[batch.size].plan(setting)
            found = measure(batch.rows, plan, seconds, media, reference, judge, shown)
            trial.batches[number] = found
            kept.save(number, setting, found, media if first else ())
            countdown.done(step)
        shown -= len(batch.rows)


class _Maker:
    """Makes rows of one size, each setting warm."""

    def __init__(self, spec: JobSpec, engine: Engine, size: tuple[int | None, int | None]) -> None:
        self._spec, self._engine, self._size = spec, engine, size
        self._plans: dict[str, SamplingPlan] = {}
        self._warm: set[str] = set()
        self._encoded: tuple[list[Row], Any] = ([], None)

    def plan(self, setting: Setting) -> SamplingPlan:
        """The stages of a setting at this size."""
        if setting.name not in self._plans:
            height_px, width_px = self._size
            self._plans[setting.name] = self._engine.plan(
                setting.sampling, height_px=height_px, width_px=width_px
            )
        return self._plans[setting.name]

    def make(self, setting: Setting, rows: list[Row]) -> tuple[float, list[Any]]:
        """(seconds of denoising and expansions, what was made)."""
        engine, plan, seeds = self._engine, self.plan(setting), [row.seed for row in rows]
        if self._encoded[0] is not rows:
            texts = [row.prompt for row in rows], [row.negative_prompt for row in rows]
            self._encoded = rows, engine.encode(*texts, self._spec.sampling)
        encoded = self._encoded[1]
        if setting.name not in self._warm:
            self._warm.add(setting.name)
            compile_for(engine, plan, len(rows), setting.sampling)
            engine.denoise(plan.one_step_each(), encoded, seeds, setting.sampling)
        latents, reports = engine.denoise(plan, encoded, seeds, setting.sampling)
        return sum(report.seconds for report in reports), list(engine.decode(plan, latents))
