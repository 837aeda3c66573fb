"""Measuring before a job: `tune` compares settings, `estimate` foretells time and cost."""

from __future__ import annotations

from overtone.cluster.measure.compare import tune
from overtone.cluster.measure.forecast import estimate
from overtone.cluster.measure.settings import DELTAS, named_like, sample_rows, sweep, tiny_judge
from overtone.cluster.measure.timing import Profile, load_and_time

__all__ = [
    "DELTAS",
    "Profile",
    "estimate",
    "load_and_time",
    "named_like",
    "sample_rows",
    "sweep",
    "tiny_judge",
    "tune",
]
