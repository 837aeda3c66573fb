"""Measuring before a job: `tune` compares settings, `estimate` foretells time and cost."""

from __future__ import annotations

from overtone.cluster.measure.charts import html, plot, sheet
from overtone.cluster.measure.compare import tune, tune_job
from overtone.cluster.measure.forecast import estimate
from overtone.cluster.measure.look import preview_rows, show_pictures
from overtone.cluster.measure.pace import Progress
from overtone.cluster.measure.prompts import sample_rows
from overtone.cluster.measure.timing import Profile, load_and_time

__all__ = [
    "Profile",
    "Progress",
    "estimate",
    "html",
    "load_and_time",
    "plot",
    "preview_rows",
    "sample_rows",
    "sheet",
    "show_pictures",
    "tune",
    "tune_job",
]
