"""Samples from any flow-matching diffusers pipeline, coarse grids first."""

from __future__ import annotations

from overtone.progressive.engine.call import OnStep, Text
from overtone.progressive.engine.engine import Engine
from overtone.progressive.engine.one_call import Result, generate
from overtone.progressive.engine.text import Encoded
from overtone.progressive.engine.trajectories import StageReport, Trajectories

__all__ = [
    "Encoded",
    "Engine",
    "OnStep",
    "Result",
    "StageReport",
    "Text",
    "Trajectories",
    "generate",
]
