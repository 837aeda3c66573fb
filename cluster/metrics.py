"""A job's metrics for Prometheus, through Ray's own. Knows names and numbers, not where they come from.

Each node's Ray agent serves what the processes on it report, at its metrics export port, as `ray_<name>` and
counters as `ray_<name>_total`. The driver reports its totals (`JobMetrics`), and each worker the timings of
its batches (`WorkerMetrics`).

Seconds and rows are counters and not histograms: Ray computes a histogram's sum from the middles of its
buckets, so that it would not add up to the time that passed. Tags take few values whatever a job holds: after
the first `MOST_VALUES` of a tag, every other value counts as `other`.
"""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from ray.util.metrics import Counter, Gauge

from overtone.jobs.parts import Timing

MOST_VALUES = 16
"""Values that one process gives a tag, at most, where a job's data decides them."""
OTHER = "other"


@dataclass(frozen=True)
class Metric:
    """A metric: its name without Ray's prefix, and its meaning."""

    kind: Literal["counter", "gauge"]
    name: str
    about: str
    tags: tuple[str, ...]

    @property
    def exported(self) -> str:
        """Its name in Prometheus."""
        return f"ray_{self.name}_total" if self.kind == "counter" else f"ray_{self.name}"


ROWS = Metric("counter", "overtone_rows", "Rows made and committed.", ("job",))
REJECTS = Metric("counter", "overtone_rejects", "Rows rejected, by exception.", ("job", "error_class"))
RETRIES = Metric("counter", "overtone_retries", "Shards given out again.", ("job",))
WORKERS_LOST = Metric("counter", "overtone_workers_lost", "Workers that died or were killed.", ("job",))
SHARDS = Metric("gauge", "overtone_shards", "Shards that are waiting, running or done.", ("job", "state"))
WORKERS = Metric("gauge", "overtone_workers", "Workers that are ready or starting.", ("job", "state"))

STAGE_SECONDS = Metric(
    "counter",
    "overtone_stage_seconds",
    "Seconds a worker spent in a stage; `grid` in latent cells where the stage has one.",
    ("job", "worker", "stage", "grid"),
)

GENERATED = Metric(
    "counter", "overtone_generated_rows", "Rows decoded, committed or not yet.", ("job", "worker")
)

BATCH_ROWS = Metric(
    "gauge", "overtone_batch_rows", "Rows in the newest batch on a grid.", ("job", "worker", "grid")
)

GPU_MEMORY = Metric(
    "gauge", "overtone_gpu_memory_bytes", "GPU memory that a worker's process holds.", ("job", "worker")
)

METRICS = (
    ROWS,
    REJECTS,
    RETRIES,
    WORKERS_LOST,
    SHARDS,
    WORKERS,
    STAGE_SECONDS,
    GENERATED,
    BATCH_ROWS,
    GPU_MEMORY,
)


class JobMetrics:
    """What the driver reports of its job. `job` is the spec's name."""

    def __init__(self, job: str) -> None:
        self._job = {"job": job}
        self._counted: Counts[tuple[Metric, str]] = Counts()
        self._classes = _Few()

    def show(
        self,
        *,
        rows: int,
        rejects: Mapping[str, int],
        retries: int,
        workers_lost: int,
        shards: Mapping[str, int],
        workers: Mapping[str, int],
    ) -> None:
        """Report the totals of this run so far, and how many shards and workers are in each state now."""
        self._count(ROWS, rows)
        for error_class, count in _few(rejects, self._classes).items():
            self._count(REJECTS, count, error_class)
        self._count(RETRIES, retries)
        self._count(WORKERS_LOST, workers_lost)
        for metric, states in ((SHARDS, shards), (WORKERS, workers)):
            for state, count in states.items():
                _gauge(metric).set(count, self._job | {"state": state})

    def close(self) -> None:
        """Report that nothing waits, runs or works for this job any more; for processes that outlive it."""
        for metric, states in ((SHARDS, ("waiting", "running")), (WORKERS, ("ready", "starting"))):
            for state in states:
                _gauge(metric).set(0, self._job | {"state": state})

    def _count(self, metric: Metric, total: int, error_class: str = "") -> None:
        new = total - self._counted[metric, error_class]
        if new > 0:
            self._counted[metric, error_class] = total
            tags = self._job | ({"error_class": error_class} if error_class else {})
            _counter(metric).inc(new, tags)


class WorkerMetrics:
    """What a worker reports: called with the timings of each batch, and of what is done once for a shard."""

    def __init__(self, job: str, worker: int, device: str) -> None:
        self._tags = {"job": job, "worker": str(worker)}
        self._cuda = device.startswith("cuda")
        self._grids = _Few()

    def __call__(self, timings: Sequence[Timing]) -> None:
        for timing in timings:
            grid = self._grids(f"{timing.height}x{timing.width}" if timing.height is not None else "")
            if timing.seconds > 0:
                tags = self._tags | {"stage": timing.stage, "grid": grid}
                _counter(STAGE_SECONDS).inc(timing.seconds, tags)
            if timing.stage == "denoise":
                _gauge(BATCH_ROWS).set(timing.rows, self._tags | {"grid": grid})
            elif timing.stage == "vae_decode":  # the last that is done to a row on the device
                _counter(GENERATED).inc(timing.rows, self._tags)
        if self._cuda:
            import torch  # loaded long ago by the engine that runs on it

            _gauge(GPU_MEMORY).set(torch.cuda.memory_reserved(), self._tags)


class _Few:
    """The first values of a tag as they are, later ones as `other`."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def __call__(self, value: str) -> str:
        if value not in self._known and len(self._known) < MOST_VALUES:
            self._known.add(value)
        return value if value in self._known else OTHER


def _few(counts: Mapping[str, int], few: _Few) -> Counts[str]:
    total: Counts[str] = Counts()
    for value, count in counts.items():
        total[few(value)] += count
    return total


@cache
def _counter(metric: Metric) -> Counter:
    return Counter(metric.name, metric.about, metric.tags)


@cache
def _gauge(metric: Metric) -> Gauge:
    return Gauge(metric.name, metric.about, metric.tags)
