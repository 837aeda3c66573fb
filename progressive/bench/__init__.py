"""How fast the denoising loop is, on models of real size with random weights."""

from __future__ import annotations

from overtone.progressive.bench.cases import AUTO, CASES, FULLRES, Case
from overtone.progressive.bench.command import main
from overtone.progressive.bench.lab import Figures
from overtone.progressive.bench.models import build, empty_transformer, open_pipe, random_text
from overtone.progressive.bench.process import Ready, answer
from overtone.progressive.bench.records import Record, ratio
from overtone.progressive.bench.suite import Line, Stack, Work
from overtone.progressive.bench.suite_command import Suites, add_suite, run_suite
from overtone.progressive.bench.tables import expected, markdown, measured_on
from overtone.progressive.bench.timing import measure, timed

__all__ = [
    "AUTO",
    "CASES",
    "FULLRES",
    "Case",
    "Figures",
    "Line",
    "Ready",
    "Record",
    "Stack",
    "Suites",
    "Work",
    "add_suite",
    "answer",
    "build",
    "empty_transformer",
    "expected",
    "main",
    "markdown",
    "measure",
    "measured_on",
    "open_pipe",
    "random_text",
    "ratio",
    "run_suite",
    "timed",
]
