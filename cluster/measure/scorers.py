"""What says how good a picture is, while settings are compared: the scorer that a user names, and the
embedded model's judge. Knows no engine and draws nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

from PIL import Image

from overtone.cluster.measure.candidates import Size
from overtone.jobs.errors import UserError
from overtone.jobs.rows import Row
from overtone.jobs.spec import JobSpec
from overtone.progressive.errors import ScorerError
from overtone.progressive.schedule import SamplingPlan
from overtone.progressive.scoring import Scorer, named

FIDELITY = "fidelity"
"""Instead of a scorer: how near a picture is to the reference's, whatever it is worth."""
FIDELITY_UNITS = "100 x perceptual distance"

Judge = Callable[[Image.Image, str], tuple[int, int]]
"""(things drawn right, things asked for) of a picture and its prompt."""


def scorer_for(name: str) -> Scorer | None:
    """The scorer of that name; None for `FIDELITY`. UserError for one that is not there, and for a distance
    between sets, which gives no picture a number."""
    if name == FIDELITY:
        return None
    try:
        found = named(name)
    except ScorerError as error:
        raise UserError(f"--scorer: {error}; {FIDELITY} needs none") from error
    if not hasattr(found, "score"):
        raise UserError(
            f"--scorer: {name!r} is a distance between two sets of pictures, and a search needs a number for "
            f"each picture; give judge, clip, module:function or {FIDELITY}"
        )
    return cast(Scorer, found)


def checked(scorer: Scorer, rows: Sequence[Row], plans: Mapping[Size, SamplingPlan]) -> None:
    """UserError where the scorer cannot score these rows' pictures, whose sizes are the plans'."""
    sizes_px = [(plan.height_px, plan.width_px) for plan in plans.values()]
    try:
        scorer.check([row.prompt for row in rows], sizes_px)
    except ScorerError as error:
        raise UserError(f"--scorer: {error}") from error


def tiny_judge(spec: JobSpec, rows: Sequence[Row]) -> Judge | None:
    """The picture world's own judge, where the job's model is the embedded one and draws captions of that
    world at its size; None elsewhere."""
    sizes = {(row.height or spec.sampling.height, row.width or spec.sampling.width) for row in rows}
    if spec.model.id != "tiny" or not sizes <= {(None, None), (256, 256), (256, None), (None, 256)}:
        return None
    from overtone.progressive.tiny import judge, world

    try:
        for row in rows:
            world.parse(row.prompt)
    except ValueError:
        return None
    return judge.judge
