"""Samples from any flow-matching diffusers pipeline, coarse grids first."""

from __future__ import annotations

from overtone.progressive.engine.call import OnStep, PipelineCall, Text
from overtone.progressive.engine.engine import Engine
from overtone.progressive.engine.one_call import Result, generate
from overtone.progressive.engine.stage_runner import PipelineRunner, StageInput, StageRunner
from overtone.progressive.engine.text import Encoded, text_arguments
from overtone.progressive.engine.trajectories import StageReport, Trajectories
from overtone.progressive.engine.warmed import TextsOf, WarmedEngine, WarmUp
from overtone.progressive.pipelines import load

__all__ = [
    "Encoded",
    "Engine",
    "OnStep",
    "PipelineCall",
    "PipelineRunner",
    "Result",
    "StageInput",
    "StageReport",
    "StageRunner",
    "Text",
    "TextsOf",
    "Trajectories",
    "WarmUp",
    "WarmedEngine",
    "generate",
    "load",
    "text_arguments",
]
