"""How fast the denoising loop is, on models of real size with random weights."""

from __future__ import annotations

from overtone.progressive.bench.cases import AUTO, CASES, Case
from overtone.progressive.bench.command import main
from overtone.progressive.bench.models import build, empty_transformer, random_text
from overtone.progressive.bench.tables import expected
from overtone.progressive.bench.timing import measure

__all__ = [
    "AUTO",
    "CASES",
    "Case",
    "build",
    "empty_transformer",
    "expected",
    "main",
    "measure",
    "random_text",
]
