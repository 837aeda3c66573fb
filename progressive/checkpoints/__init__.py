"""What is known of a checkpoint without loading it: family, schedule, licence."""

from __future__ import annotations

from overtone.progressive.checkpoints.checkpoint import Checkpoint
from overtone.progressive.checkpoints.known import (
    UnknownCheckpoint,
    describe,
    family_of,
    is_local_model,
    license_of,
    spectrum_profile,
    without_weights,
)
from overtone.progressive.checkpoints.published import PUBLISHED
from overtone.progressive.checkpoints.sigmas import UnknownSchedule, flow_shift_change

__all__ = [
    "PUBLISHED",
    "Checkpoint",
    "UnknownCheckpoint",
    "UnknownSchedule",
    "describe",
    "family_of",
    "flow_shift_change",
    "is_local_model",
    "license_of",
    "spectrum_profile",
    "without_weights",
]
