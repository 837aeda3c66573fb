"""A job of any size in simulated time, with the real dispatcher."""

from __future__ import annotations

from overtone.cluster.simulate.command import main
from overtone.cluster.simulate.simulation import Simulation
from overtone.cluster.simulate.world import World

__all__ = [
    "Simulation",
    "World",
    "main",
]
