"""From a search that ended, or was interrupted, to its figures: outcomes, gains, choice. Draws nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from overtone.cluster.measure.drawing import SHOWN_ROWS
from overtone.cluster.measure.scorers import FIDELITY_UNITS
from overtone.cluster.measure.search import Search
from overtone.cluster.measure.settings import FULLRES
from overtone.cluster.measure.tuning import Answer, Outcome, Tuning, mark_pareto
from overtone.cluster.measure.worth import Gain, gain_at_equal_quality
from overtone.jobs.spec import JobSpec


def tuning_of(
    search: Search,
    *,
    spec: JobSpec,
    device: str,
    prompts: Sequence[str],
    complete: bool,
    kept: str | None,
) -> Tuning:
    """What the settings that were drawn gave, and which of them to take. The reference was drawn."""
    drawing, race = search.drawing, search.race
    drawn = [index for index, trial in enumerate(drawing.trials) if trial.batches]
    by_cost = sorted(drawn, key=lambda i: (i != 0, race.entrants[i].cost, i))
    found = dict(zip(by_cost, mark_pareto([_outcome(search, index) for index in by_cost]), strict=True))
    outcomes, max_drop = tuple(found.values()), race.drops[0]
    choice = found[race.winner(max_drop)]
    costs = [
        trial.rows * one.cost for trial, one in zip(drawing.trials, race.entrants, strict=True)
    ]  # of what was drawn
    rows = drawing.trials[0].rows
    return Tuning(
        model=spec.model.id,
        device=device,
        rows=rows,
        num_steps=outcomes[0].num_steps,
        loss_metric=FIDELITY_UNITS + ", fidelity"
        if search.scorer is None
        else f"{search.scorer.name}, {search.scorer.units}",
        max_drop=max_drop,
        outcomes=outcomes,
        choice=choice,
        answers=tuple(
            Answer(drop, found[race.winner(drop)], found[race.winner(drop, plain=True)])
            for drop in race.drops
        ),
        pictures={one.name: drawing.trials[index].pictures for index, one in found.items()},
        prompts=tuple(prompts)[:SHOWN_ROWS],
        nearest=_nearest(outcomes, choice),
        scorer=None if search.scorer is None else search.scorer.name,
        settings=len(drawing.trials),
        drawn=sum(trial.rows for trial in drawing.trials),
        drawn_cost=sum(costs),
        exhaustive_cost=sum(one.cost for one in race.entrants) * rows,
        measured=drawing.made,
        planned=drawing.asked,
        complete=complete,
        kept=kept,
    )


def _outcome(search: Search, index: int) -> Outcome:
    race, trial = search.race, search.drawing.trials[index]
    full, candidate, entrant = search.drawing.trials[0], trial.candidate, race.entrants[index]
    saving, saving_error = trial.saving_over(full)
    difference = race.difference(index, 0)
    distances: dict[str, Any] = {**trial.means()}
    half = difference.half_width
    return Outcome(
        name=candidate.name,
        group=candidate.setting.group,
        sampling=candidate.setting.sampling.model_dump(mode="json", exclude_defaults=True),
        split=candidate.split,
        num_steps=candidate.setting.steps,
        plain=candidate.setting.plain,
        rows=trial.rows,
        cost=entrant.cost,
        seconds_per_row=trial.seconds_per_row,
        saving=saving,
        predicted_saving=candidate.cost_at_full / entrant.cost,
        judge_percent=trial.judged if any(m.asked for m in trial.batches.values()) else None,
        quality=None if search.scorer is None else float(np.mean(race.scores[index])),
        loss=-difference.mean + 0.0,
        gain=_gain(search, index),
        saving_error=saving_error,
        loss_error=half if math.isfinite(half) else None,
        also=candidate.also,
        left_out=race.fate(index),
        **distances,
    )


def _gain(search: Search, index: int) -> Gain | None:
    """Over the full-resolution settings that were drawn on all rows that this one was."""
    race = search.race
    own = race.scores[index]
    plain = [
        i
        for i, one in enumerate(race.entrants)
        if one.plain and i in race.scores and len(race.scores[i]) >= len(own)
    ]
    if not plain:
        return None
    scores = [race.scores[i][: len(own)] for i in plain]
    costs = [race.entrants[i].cost for i in plain]
    undrawn = [one.cost for i, one in enumerate(race.entrants) if one.plain and i not in plain]
    tolerance = 0.0 if race.entrants[index].plain else race.tolerance
    return gain_at_equal_quality(own, race.entrants[index].cost, scores, costs, undrawn, tolerance)


def _nearest(outcomes: Sequence[Outcome], choice: Outcome) -> Outcome | None:
    """Where nothing that is cheaper loses little enough: the one that surely loses least. None where there
    is a choice, and where nothing is cheaper."""
    full = outcomes[0]
    if choice is not full or full.name != FULLRES:
        return None
    cheaper = [one for one in outcomes if one.cost < full.cost]
    return min(cheaper, key=lambda o: (o.loss + (o.loss_error or 0.0), o.loss), default=None)
