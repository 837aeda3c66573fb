"""Which steps run on which grid: pure functions of the schedule and the spectrum. No torch."""

from __future__ import annotations

from overtone.progressive.schedule.drift import Profile, consistency_profile
from overtone.progressive.schedule.ladders import (
    coarse_grid,
    grid_for,
    latent_frames,
    size_from,
    size_of,
    steps_of,
)
from overtone.progressive.schedule.plan import SamplingPlan, Stage, plan_sampling

__all__ = [
    "Profile",
    "SamplingPlan",
    "Stage",
    "coarse_grid",
    "consistency_profile",
    "grid_for",
    "latent_frames",
    "plan_sampling",
    "size_from",
    "size_of",
    "steps_of",
]
