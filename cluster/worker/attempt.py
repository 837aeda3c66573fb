"""TODO: cluster/worker/attempt.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from overtone.cluster.dispatch import Assignment
from overtone.cluster.faults import Failure
from overtone.cluster.worker.protocol import Trajectories
from overtone.jobs.parts import StageTime, Timing
from overtone.jobs.prompts import ShardRows
from overtone.jobs.rows import PROMPT_CUT, Reject, Row
from overtone.progressive.schedule import SamplingPlan

ALIVE_S = 1.0
"""How often an attempt that waits for a thread says that it goes on."""


class Returned(Exception):
    """The attempt was asked to stop."""


class Failed(Exception):
    """The attempt cannot go on."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


@dataclass
class Group:
    """Rows of one size that go through the stages together."""

    number: int
    """In the attempt, from 0."""
    rows: list[Row]
    plan: SamplingPlan
    trajectories: Trajectories
    stages: list[list[StageTime]]
    """Of each row."""
    denoise_seconds: list[float]
    """Of each row, with the expansions."""

    def ids(self, some: Iterable[int]) -> tuple[str, ...]:
        return tuple(self.rows[index].row_id for index in some)


@dataclass
class Decoded:
    """A batch as the engine's decoder gave it."""

    media: Sequence[Any]
    latents: Sequence[np.ndarray | None]
    begin: float
    """Seconds since 1970."""
    seconds: float


@dataclass
class Picture:
    """A sample whose picture is being encoded."""

    row: Row
    plan: SamplingPlan
    group: int
    stages: tuple[StageTime, ...]
    denoise_seconds: float
    latents: np.ndarray | None
    encoding: Future[tuple[bytes, float, float]]  # bytes, begin and end in seconds since 1970


@dataclass
class Attempt:
    """What an attempt has gathered."""

    assignment: Assignment
    id: str
    cancelled: Callable[[], bool]
    started: float = field(default_factory=time.time)
    phase: str = "read"
    read: ShardRows | None = None
    pictures: list[Picture] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    groups: int = 0
    named: tuple[str, ...] = ()
    """The rows that were last said to be in flight."""
    decoding: tuple[Group, list[int], Future[Decoded]] | None = None
    """A batch whose pictures are being decoded."""

    @property
    def careful(self) -> bool:
        """One row at a time, and nothing beside it."""
        return self.assignment.isolate or bool(self.assignment.suspects)

    @property
    def shard(self) -> int:
        return self.assignment.shard


def reject_of(row: Row, error_class: str, message: str, phase: str, attempts: int) -> Reject:
    return Reject(
        row_id=row.row_id,
        error_class=error_class,
        message=message,
        stage=phase,
        attempts=attempts,
        source=row.source,
        prompt=row.prompt[:PROMPT_CUT],
    )
