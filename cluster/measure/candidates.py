"""The settings of a search as the plans that they come to: settings with equal plans are one candidate, and
what each costs is known before anything is drawn. Runs nothing."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from overtone.cluster.measure.race import Entrant
from overtone.cluster.measure.settings import Setting
from overtone.cluster.worker import Engine
from overtone.progressive.schedule import SamplingPlan, Stage
from overtone.progressive.settings import NO_CACHE, Sampling

Size = tuple[int | None, int | None]
"""Height and width that a row asks for, pixels; None: the job's own."""


@dataclass(frozen=True)
class Candidate:
    """One sampling plan, for each size, under the first of its names."""

    setting: Setting
    also: tuple[str, ...]
    """Other settings that come to the same plans."""
    plans: Mapping[Size, SamplingPlan]
    entrant: Entrant
    cost_at_full: float
    """Of as many steps at full resolution, in full-size steps."""

    @property
    def name(self) -> str:
        return self.setting.name

    @property
    def split(self) -> str:
        """Steps @ latent grid of each stage, at the most frequent size."""
        return next(iter(self.plans.values())).split


def candidates(
    engine: Engine, settings: Sequence[Setting], sizes: Mapping[Size, int]
) -> tuple[Candidate, ...]:
    """The settings' distinct plans, in the order of the first setting of each; `sizes`: how many rows ask for
    each, the most frequent first.

    Settings that the pipeline cannot have (a step cache, a level on a grid that has no half) are left out.
    ValueError where that is the first of them, the reference.
    """
    found: dict[Hashable, tuple[Setting, list[str], dict[Size, SamplingPlan]]] = {}
    for number, setting in enumerate(settings):
        try:
            plans = {
                size: engine.plan(setting.sampling, height_px=size[0], width_px=size[1]) for size in sizes
            }
        except ValueError:
            if number == 0:
                raise
            continue
        key = tuple(_identity(plan, setting.sampling) for plan in plans.values())
        found.setdefault(key, (setting, [], plans))[1].append(setting.name)
    weights = {
        size: plan.step_cost.step(plan.stages[-1].tokens) * sizes[size]
        for size, plan in next(iter(found.values()))[2].items()
    }
    whole = sum(weights.values())
    return tuple(
        Candidate(
            setting=setting,
            also=tuple(names[1:]),
            plans=plans,
            entrant=Entrant(
                cost=sum(weights[size] * _cost(plan, setting.sampling) for size, plan in plans.items())
                / whole,
                line=setting.group if setting.plain else (setting.group, setting.steps),
                plain=setting.plain,
            ),
            cost_at_full=sum(weights[size] * plan.steps for size, plan in plans.items()) / whole,
        )
        for setting, names, plans in found.values()
    )


def _identity(plan: SamplingPlan, sampling: Sampling) -> Hashable:
    """What decides the pixels, of the settings that a search changes."""
    cache = tuple(getattr(sampling, name) for name in NO_CACHE)
    changes = (plan.mode, plan.noise, plan.transform) if len(plan.stages) > 1 else ()
    return plan.stages, changes, cache


def _cost(plan: SamplingPlan, sampling: Sampling) -> float:
    """The plan's cost without the steps that `taylorseer` extrapolates. What other caches leave out is not
    known before they run, and is not taken off."""
    if sampling.cache != "taylorseer":
        return plan.cost
    alone = plan.stages[-1].grid if sampling.cache_stages == "full" else None
    stages = [
        (stage.tokens, _whole_steps(stage, sampling) if alone in (None, stage.grid) else stage.steps)
        for stage in plan.stages
    ]
    return plan.step_cost.full_size_steps(stages, plan.stages[-1].tokens)


def _whole_steps(stage: Stage, sampling: Sampling) -> int:
    """As the library counts them: the first ones, the second after these, and then one in each interval."""
    first, interval = sampling.cache_warmup_steps, sampling.cache_interval or 3
    return min(stage.steps, first) + len(range(first + 1, stage.steps, interval))
