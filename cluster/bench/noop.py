"""An engine, a worker and a job that do nothing: only what surrounds them costs time. Measures nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from PIL import Image

from overtone.cluster.dispatch import Assignment, Event, RowsDone, RowsStarted, ShardCommitted, ShardGenerated
from overtone.cluster.worker import Ready, Worker, in_lists
from overtone.jobs.spec import JobSpec
from overtone.progressive.families import FAMILIES
from overtone.progressive.schedule import SamplingPlan, plan_sampling
from overtone.progressive.settings import Sampling

_MODEL = "black-forest-labs/FLUX.1-schnell"  # its configuration is known offline; nothing of it is loaded
SIDE_PX = 8


class NoopEngine:
    """An engine whose pictures are black and take no time."""

    device = "cpu"
    family = FAMILIES["flux1"]
    overlaps = False

    def row_by_row(self, sampling: Sampling) -> bool:
        return False

    def plan(
        self, sampling: Sampling, *, height_px: int | None = None, width_px: int | None = None
    ) -> SamplingPlan:
        return plan_sampling(sampling, self.family, (1.0, 0.0), height_px=height_px, width_px=width_px)

    def encode(
        self,
        prompts: Sequence[str],
        negatives: Sequence[str | None],
        sampling: Sampling,
        *,
        known: Any = None,
    ) -> list[str]:
        return list(prompts)

    def begin(
        self, plan: SamplingPlan, encoded: list[str], seeds: Sequence[int], sampling: Sampling
    ) -> NoopTrajectories:
        return NoopTrajectories()

    def denoise(
        self, plan: SamplingPlan, encoded: list[str], seeds: Sequence[int], sampling: Sampling
    ) -> tuple[Any, list[Any]]:
        return NoopTrajectories().latents(range(len(seeds))), []

    def decode(self, plan: SamplingPlan, latents: Any) -> list[Image.Image]:
        return [Image.new("RGB", (SIDE_PX, SIDE_PX)) for _ in latents]


class NoopTrajectories:
    """Rows that need nothing done."""

    def run(self, index: int, rows: Sequence[int]) -> list[Any]:
        return []

    def latents(self, rows: Sequence[int]) -> Any:
        return np.zeros((len(rows), 1, 1, 1), np.float32)


def noop_engine(spec: JobSpec) -> NoopEngine:
    """The engine factory; by name, so that workers import it."""
    return NoopEngine()


class NoopWorker(Worker):
    """A worker whose shards are done at once: what remains is what a shard costs the driver and Ray."""

    def load(self, *_: Any, **__: Any) -> Ready:
        self._committing: Assignment | None = None
        return Ready(ray.get_runtime_context().get_node_id(), "cpu", os.getpid())

    def begin(self, epoch: int) -> None:
        pass

    def attempt(self, assignment: Assignment) -> Iterator[list[Event]]:
        yield from in_lists(self._events(assignment))

    def flush(self) -> Iterator[list[Event]]:
        yield from in_lists(self._committed())

    def _events(self, assignment: Assignment) -> Iterator[Event]:
        """Those of a shard of one row, whose commit runs beside the next shard."""
        this = (self._worker, assignment.shard, assignment.attempt)
        yield RowsStarted(*this, ("row",))
        yield RowsDone(*this, ("row",))
        yield from self._committed()
        self._committing = assignment
        if not assignment.commit_first:
            yield ShardGenerated(*this)
        else:
            yield from self._committed()

    def _committed(self) -> Iterator[Event]:
        done, self._committing = self._committing, None
        if done is not None:
            yield ShardCommitted(self._worker, done.shard, done.attempt, 1, 0)


def noop_job(folder: Path, *, shards: int, workers: int) -> JobSpec:
    """A job of `shards` shards of one row each; writes its prompt table."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"prompt": [f"number {i}" for i in range(shards)]}), folder / "prompts.parquet")
    return JobSpec.model_validate(
        {
            "name": "bench",
            "model": _MODEL,
            "prompts": str(folder / "prompts.parquet"),
            "sampling": {"mode": "fullres"},
            "shards": 1,
            "workers": {"count": workers, "num_gpus": 0, "num_cpus": 0.5, "batch_size": 1},
            "output": str(folder / "out"),
        }
    )
