"""Arguments of a pipeline's call that are told in steps, as one stage must be told them. Knows no rows.

A pipeline that is called for the steps [a, b) of n counts them from 0 to b - a. So a fraction f of the whole
schedule is (f n - a) / (b - a) of the stage's, and step k is k - a: below 0 before the stage begins.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from overtone.progressive.families import Family
from overtone.progressive.schedule import SamplingPlan, Stage
from overtone.progressive.settings import Sampling

_LIKE_STEPS = re.compile(
    r"(?:^|_)(?:start|stop|end|begin|ratio|steps?|interval|range|trunc\w*|warmup|cutoff|schedule|phase)(?:_|$)"
)
_NOT_STEPS = re.compile(r"callback|timestep|attention|sigma|cfg_truncation|image|audio|video|prompt|frame")
"""Calls back, is told as a noise level (as `cfg_truncation` is), or is of something else than steps."""


def of_stage(
    family: Family, plan: SamplingPlan, stage: Stage, arguments: dict[str, Any], defaults: dict[str, Any]
) -> dict[str, Any]:
    """The arguments with those that are told in steps as this stage counts them, defaults included."""
    changed = dict(arguments)

    def change(names: tuple[str, ...], how: Callable[[Any], Any]) -> None:
        for name in names:
            value = arguments.get(name, defaults.get(name))
            if value is not None and name in defaults:
                changed[name] = how(value)

    change(family.per_step, lambda values: list(values)[stage.first : stage.last])
    if stage.steps != plan.num_steps:
        change(family.fractions, lambda value: _each(value, lambda f: _fraction(f, plan.num_steps, stage)))
        change(family.counts, lambda value: _each(value, lambda count: count - stage.first))
    return changed


def check_step_arguments(pipeline: str, family: Family, sampling: Sampling, plan: SamplingPlan) -> None:
    """ValueError where a schedule is cut and nobody knows how one of its arguments counts steps."""
    if family.name != "generic" or len(plan.stages) == 1:
        return
    known = {*family.fractions, *family.counts, *family.per_step}
    odd = [
        name
        for name in sampling.call_kwargs
        if name not in known and _LIKE_STEPS.search(name) and not _NOT_STEPS.search(name)
    ]
    if odd:
        raise ValueError(
            f"{pipeline} is not known here, nor how its argument {', '.join(odd)} counts steps, which every "
            "stage counts from its own first; leave it out, use `mode: fullres`, or give a `Family` whose "
            "`fractions`, `counts` or `per_step` names it"
        )


def _each(value: Any, how: Callable[[Any], Any]) -> Any:
    return type(value)(how(one) for one in value) if isinstance(value, list | tuple) else how(value)


def _fraction(fraction: float, num_steps: int, stage: Stage) -> float:
    """The fraction of the stage's steps that, times their number, is the same step to the last bit: pipelines
    compare with `<` and `>`, and a fraction may fall on a step."""
    step = fraction * num_steps - stage.first
    share = step / stage.steps
    near = (share, math.nextafter(share, math.inf), math.nextafter(share, -math.inf))
    return next((one for one in near if stage.steps * one == step), share)
