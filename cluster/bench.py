"""What a shard costs besides generation: `python -m cluster.bench`. Real Ray actors, no model.

Runs whole jobs of one-row shards through `cluster.driver.run_job` with an engine that does nothing, so that
all that is left is dispatch, reading, encoding of a picture of 8 x 8 px, and the commit on local disk. Also
times commits alone, in this process.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import psutil  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console
from rich.table import Table

from cluster.driver import run_job
from jobs.media import encode_media
from jobs.parts import Made, build_part, commit_part
from jobs.plan import make_plan
from jobs.progress import Snapshot
from jobs.prompts import read_shard
from jobs.spec import JobSpec
from jobs.store import open_store
from progressive.families import FAMILIES
from progressive.schedule import SamplingPlan, plan_sampling
from progressive.settings import Sampling

_MODEL = "black-forest-labs/FLUX.1-schnell"  # its configuration is known offline; nothing of it is loaded
_SIDE_PX = 8
_WARM = 0.1  # share of the shards before the clock starts: workers start one after the other


class NoopEngine:
    """An engine whose pictures are black and take no time."""

    device = "cpu"
    family = FAMILIES["flux1"]
    overlaps = False

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
        return [Image.new("RGB", (_SIDE_PX, _SIDE_PX)) for _ in latents]


class NoopTrajectories:
    """Rows that need nothing done."""

    def run(self, index: int, rows: Sequence[int]) -> list[Any]:
        return []

    def latents(self, rows: Sequence[int]) -> Any:
        return np.zeros((len(rows), 1, 1, 1), np.float32)


def noop_engine(spec: JobSpec) -> NoopEngine:
    """The engine factory; by name, so that workers import it."""
    return NoopEngine()


@dataclass(frozen=True)
class Dispatched:
    """One job of no-op shards."""

    workers: int
    shards: int
    seconds: float
    """From start to end, Ray's own start included."""
    shards_per_s: float
    """In steady state: after the first tenth of the shards."""
    driver_cpu_ms: float
    """CPU time of the driver's process, a shard. This and the next two in steady state, too: unlike seconds,
    they mean something on a machine that does other things as well."""
    worker_cpu_ms: float
    """Of the workers' processes: reading, encoding, the part, its commit."""
    ray_cpu_ms: float
    """Of Ray's own processes."""
    driver_mib: float
    """Largest memory of the driver's process."""
    growth_mib: float
    """How much of that was added after the first tenth of the shards."""


def dispatch(folder: Path, *, shards: int, workers: int) -> Dispatched:
    """Run one job in `folder`, which must not hold one yet. RuntimeError if it does not end well."""
    spec = noop_job(folder, shards=shards, workers=workers)
    seen: list[_Point] = []

    def note(snapshot: Snapshot) -> None:
        warm = snapshot.shards_done >= _WARM * shards and len(seen) < 2
        if not seen or warm or snapshot.shards_done == shards:
            seen.append(_Point.now(snapshot.shards_done))

    begin = time.perf_counter()
    summary = run_job(spec, on_event=note, engine_factory=noop_engine)
    seconds = time.perf_counter() - begin
    if summary.exit_code or summary.rejects:
        raise RuntimeError(summary.text())
    last = seen[-1]
    first = next(point for point in reversed(seen) if point.shards < last.shards)
    done = last.shards - first.shards
    return Dispatched(
        workers=workers,
        shards=shards,
        seconds=seconds,
        shards_per_s=done / (last.at - first.at),
        driver_cpu_ms=1000 * (last.driver_s - first.driver_s) / done,
        worker_cpu_ms=1000 * (last.worker_s - first.worker_s) / done,
        ray_cpu_ms=1000 * (last.ray_s - first.ray_s) / done,
        driver_mib=last.mib,
        growth_mib=last.mib - first.mib,
    )


@dataclass(frozen=True)
class _Point:
    """A moment of a job: shards done, CPU seconds so far, memory of the driver at most."""

    at: float
    shards: int
    driver_s: float
    worker_s: float
    ray_s: float
    mib: float

    @classmethod
    def now(cls, shards: int) -> _Point:
        spent = {True: 0.0, False: 0.0}  # of workers, of what else Ray runs
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                times, title = process.cpu_times(), "".join(process.cmdline()[:1])
                spent[title.startswith("ray::Worker")] += times.user + times.system
        return cls(time.perf_counter(), shards, time.process_time(), spent[True], spent[False], _peak_mib())


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


@dataclass(frozen=True)
class Commits:
    """Commits on local disk, one after the other, building the part included. Milliseconds a shard."""

    median_ms: float
    p99_ms: float
    cpu_ms: float


def commits(folder: Path, *, shards: int) -> Commits:
    """Commit `shards` parts of one row each in `folder`."""
    spec = noop_job(folder, shards=shards, workers=1)
    plan = make_plan(spec)
    store = open_store(spec.output.path)
    data = encode_media(Image.new("RGB", (_SIDE_PX, _SIDE_PX)), spec.output)
    taken, spent = [], 0.0
    for shard in plan.shards():
        read = read_shard(spec, plan.files[shard.file], shard.first_row, shard.num_rows)
        begin, cpu = time.perf_counter(), time.process_time()
        part = build_part(
            spec,
            plan,
            shard,
            attempt=uuid4().hex,
            made=[Made(row, data, _SIDE_PX, _SIDE_PX, 1, (), 0.0) for row in read.rows],
            rejects=read.rejects,
            passthrough=read.passthrough,
            first_row=read.first_row,
            timings=[],
            worker="bench",
            device="cpu",
        )
        assert commit_part(store, part)
        taken.append(1000 * (time.perf_counter() - begin))
        spent += 1000 * (time.process_time() - cpu)
    return Commits(statistics.median(taken), sorted(taken)[int(0.99 * len(taken))], spent / shards)


def _peak_mib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m cluster.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=5000, help="of each job (default: 5000)")
    parser.add_argument("--workers", type=int, action="append", help="repeatable; default: 1 and 2")
    parser.add_argument("--commits", type=int, default=500, help="commits timed alone (default: 500)")
    parser.add_argument("--json", type=Path, help="write all figures here")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="overtone-bench-") as folder:
        alone = commits(Path(folder, "commits"), shards=given.commits)
        runs = [
            dispatch(Path(folder, f"run-{number}"), shards=given.shards, workers=workers)
            for number, workers in enumerate(given.workers or (1, 2))
        ]
    table = Table("workers", "shards/s", "driver CPU", "worker CPU", "Ray CPU", "driver memory", "grown by")
    for run in runs:
        table.add_row(
            str(run.workers),
            f"{run.shards_per_s:,.0f}",
            f"{run.driver_cpu_ms:.2f} ms",
            f"{run.worker_cpu_ms:.2f} ms",
            f"{run.ray_cpu_ms:.2f} ms",
            f"{run.driver_mib:,.0f} MiB",
            f"{run.growth_mib:,.1f} MiB",
        )
    console = Console()
    console.print(f"{given.shards:,} shards of one row; CPU a shard")
    console.print(table)
    console.print(
        f"a commit alone on local disk: median {alone.median_ms:.2f} ms, 99 % within {alone.p99_ms:.2f} ms, "
        f"{alone.cpu_ms:.2f} ms of CPU"
    )
    if given.json:
        figures = {"runs": [asdict(run) for run in runs], "commits": asdict(alone)}
        given.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
