"""Calls of the transformer captured once a shape and replayed at every step: no step waits for launches."""

from __future__ import annotations

from overtone.progressive.graphs.arguments import NotCapturable
from overtone.progressive.graphs.books import Counts, Graphs
from overtone.progressive.graphs.capture import Captured, Capturer, CudaGraphs, Recorder, capturer_for, whole
from overtone.progressive.graphs.engine import GraphedEngine
from overtone.progressive.graphs.runner import GraphedRunner

__all__ = [
    "Captured",
    "Capturer",
    "Counts",
    "CudaGraphs",
    "GraphedEngine",
    "GraphedRunner",
    "Graphs",
    "NotCapturable",
    "Recorder",
    "capturer_for",
    "whole",
]
