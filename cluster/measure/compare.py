"""`overtone tune`: the cheapest setting at an acceptable loss, searched on a job's own prompts and hardware.

    tuning = tune_job(spec, keep=Path("."))
    tuning = tune(spec, engine, rows=32)                       # the caller's engine

Every setting draws the same rows with the same seeds in one process, and is compared with full resolution at
the spec's own number of steps. Starts no Ray: one engine, the one that a worker would hold.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from overtone.cluster.measure.candidates import candidates
from overtone.cluster.measure.drawing import Batch, Budget, Drawing, device_name, in_batches
from overtone.cluster.measure.kept import Kept
from overtone.cluster.measure.pace import OnProgress, Progress, silent
from overtone.cluster.measure.prompts import sample_rows, spread_out
from overtone.cluster.measure.race import Race
from overtone.cluster.measure.results import tuning_of
from overtone.cluster.measure.scorers import FIDELITY, Judge, checked, scorer_for, tiny_judge
from overtone.cluster.measure.search import Search, rungs
from overtone.cluster.measure.settings import Setting, named_like, reference, space
from overtone.cluster.measure.tuning import Tuning
from overtone.cluster.worker import Engine, load_engine, usual_plan
from overtone.jobs.errors import JobError, UserError
from overtone.jobs.rows import Row
from overtone.jobs.sampling import checkpoint_of
from overtone.jobs.spec import JobSpec
from overtone.progressive.errors import ScorerError
from overtone.progressive.families import FAMILIES
from overtone.progressive.schedule import steps_of
from overtone.progressive.scoring import Scorer

LEVELS = (1.0, 2.0, 5.0)
"""Times the allowed drop: what is asked for besides, so that the report shows what more would bring."""
_JUDGEABLE = 50.0
"""Points: a model whose reference pictures the judge gives less has little that it could be seen to lose."""


def tune_job(
    spec: JobSpec,
    *,
    rows: int = 32,
    batch_size: int = 4,
    max_drop: float = 1.0,
    scorer: str | None = None,
    steps: Sequence[int] = (),
    deltas: Sequence[float] = (),
    only: Sequence[str] = (),
    show: Sequence[str] = (),
    exhaustive: bool = False,
    minutes: float | None = None,
    keep: Path | None = None,
    on_progress: OnProgress = silent,
) -> Tuning:
    """Load the spec's model and search settings on its prompts.

    Args:
        scorer: what says how good a picture is, as `scoring.named` takes it, or `fidelity`; unset: the judge
            for the embedded model's own captions, where it gives the reference 50 points at least, and
            fidelity elsewhere.
        steps: the numbers of steps to try; unset: `step_numbers`.
        deltas: the deltas to try; unset: `DELTAS`.
        only: patterns of the settings' names to try besides full resolution; unset: those in the spec's mode.
        show: settings that will be asked of `sheet`, to be known before the work.

    The other arguments, and the errors, are those of `tune`; UserError for a name in `only` or `show` that no
    setting has, and for a scorer that is not there.
    """
    number = _own_steps(spec)
    if number is not None:  # a mistake shows before minutes of loading
        _searched(spec, number, steps, deltas, only, show)
    chosen = spread_out(sample_rows(spec, rows))
    judge = tiny_judge(spec, chosen)
    usual = "judge" if judge is not None else FIDELITY
    measure = scorer_for(scorer or usual)
    on_progress(Progress(0, 0, f"loading {spec.model.id}", None))
    engine = load_engine(spec)
    number = usual_plan(engine, spec.model_copy(update={"sampling": reference(spec.sampling)})).num_steps
    return tune(
        spec,
        engine,
        rows=chosen,
        batch_size=batch_size,
        max_drop=max_drop,
        settings=_searched(spec, number, steps, deltas, only, show),
        judge=judge,
        scorer=measure,
        trusted_from=-math.inf if scorer else _JUDGEABLE,
        exhaustive=exhaustive,
        minutes=minutes,
        keep=keep,
        on_progress=on_progress,
    )


def _own_steps(spec: JobSpec) -> int | None:
    """The spec's number of steps, as far as it is known without the model."""
    try:
        checkpoint = checkpoint_of(spec)
    except UserError:
        return spec.sampling.num_steps
    return steps_of(spec.sampling, FAMILIES[checkpoint.family], checkpoint.default_steps)


def _searched(
    spec: JobSpec,
    num_steps: int,
    steps: Sequence[int],
    deltas: Sequence[float],
    only: Sequence[str],
    show: Sequence[str],
) -> list[Setting]:
    settings = named_like(space(spec.sampling, num_steps, steps=steps, deltas=deltas), only)
    names = {setting.name for setting in settings}
    if unknown := sorted(set(show) - names):
        raise UserError(
            f"--show: no setting is named {unknown[0]!r} among the {len(names)} that are searched; names are "
            "like 'fullres, 5 steps' and 'one level, delta 0.05, 6 steps'"
        )
    return settings


def tune(
    spec: JobSpec,
    engine: Engine,
    *,
    rows: int | Sequence[Row] = 32,
    batch_size: int = 4,
    max_drop: float = 1.0,
    settings: Sequence[Setting] | None = None,
    judge: Judge | None = None,
    scorer: Scorer | None = None,
    trusted_from: float = -math.inf,
    exhaustive: bool = False,
    minutes: float | None = None,
    keep: Path | None = None,
    on_progress: OnProgress = silent,
) -> Tuning:
    """Search the settings (unset: `space`), the first of which is the reference that others are compared to.

    A setting's loss is by how much its pictures score less than the reference's of the same rows, in the
    scorer's units; without a `scorer`, and where it gives the reference less than `trusted_from`, it is 100 x
    the perceptual distance to the reference's pictures. The choice is the cheapest setting whose loss is at
    most `max_drop`; `Race` says how it is found without drawing everything, which `exhaustive` does. A
    `judge` adds a column to the report. One step on each new grid is run first and thrown away, so that no
    setting pays for warming up; settings that the pipeline cannot have are left out.

    Ctrl-C, or `minutes`, ends it with what was measured until then. Where a folder to `keep` it in is given,
    the same search goes on from there. UserError for prompts that cannot be used, and where the scorer cannot
    score their pictures or fails; ValueError for sizes; JobError where it ended before anything was measured.
    """
    chosen = spread_out(sample_rows(spec, rows)) if isinstance(rows, int) else list(rows)
    batches = in_batches(chosen, batch_size)
    sizes = dict(Counter(batch.size for batch in batches for _ in batch.rows).most_common())
    if settings is None:
        number = usual_plan(engine, spec.model_copy(update={"sampling": reference(spec.sampling)})).num_steps
        settings = named_like(space(spec.sampling, number), ())
    found = candidates(engine, settings, sizes)
    if scorer is not None:
        checked(scorer, chosen, found[0].plans)
    about = _about(spec, engine, batches, None if scorer is None else scorer.name)
    kept = Kept(keep, about)
    drawing = Drawing(
        spec,
        engine,
        found,
        batches,
        judge=judge,
        scorer=scorer,
        kept=kept,
        budget=Budget(minutes),
        on_progress=on_progress,
    )
    race = Race(
        [one.entrant for one in found],
        rungs=rungs([len(batch.rows) for batch in batches]),
        drops=tuple(level * max_drop for level in LEVELS) if max_drop else (0.0,),
        halve=not exhaustive,
    )
    search = Search(drawing, race, scorer, trusted_from)
    try:
        complete = search.run()
    except ScorerError as error:
        raise UserError(str(error)) from error
    if complete:
        kept.remove()
    elif not drawing.trials[0].batches:
        raise JobError("interrupted before anything was measured")
    return tuning_of(
        search,
        spec=spec,
        device=device_name(engine),
        prompts=[row.prompt for batch in batches for row in batch.rows],
        complete=complete,
        kept=None if kept.path is None or complete else str(kept.path),
    )


def _about(spec: JobSpec, engine: Engine, batches: Sequence[Batch], scorer: str | None) -> Any:
    """All that a measurement depends on besides its setting."""
    rows = [
        [[row.row_id, row.prompt, row.negative_prompt, row.seed] for row in batch.rows] for batch in batches
    ]
    sizes = [list(batch.size) for batch in batches]
    workers = spec.workers.model_dump(mode="json", include={"compile", "threads"})
    return [spec.model.model_dump(mode="json"), workers, device_name(engine), rows, sizes, scorer]
