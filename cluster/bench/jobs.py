"""A whole job against a plain diffusers loop on this machine: `python -m overtone.cluster.bench.jobs`.

Needs no GPU.

Both make the same prompts with the embedded model, in turns, round by round:

- plain: `FluxPipeline` in one process with torch's own number of threads, one batch after the other on the
  full grid, pictures saved as PNG. Loading the model does not count.
- a job: `cluster.driver.run_job`, as `overtone run` does it, on a local Ray with workers of one core each.
  What counts is a worker's time from its first shard to the end of its last one's upload: reading, encoding
  prompts, denoising, decoding, encoding PNG, writing and committing Parquet, and waiting for anything.
  Starting Ray and loading the model do not, nor does the end of a job when some workers have no work left.

A job's ratio is its pictures a second over those of the better plain loop in the same round; its ideal is
what as many steps at full size cost over what the plan's do, by FLOPs.

`--suite gpu --to FILE.jsonl` does the same with FLUX.1 at its real size (cluster/bench/job_lines.py), in as
many sittings of `--budget` seconds as it takes: `--skip-done` goes on. A job is then also compared with its
own engine that does nothing but denoise, its speed of light.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from rich.console import Console
from rich.table import Table

from overtone.cluster.bench.job_lab import start_ray, suites, worker_times
from overtone.jobs.sampling import checkpoint_of, sampling_plan
from overtone.jobs.spec import JobSpec
from overtone.progressive.bench import add_suite, run_suite
from overtone.progressive.families import FAMILIES
from overtone.progressive.pipelines import load
from overtone.progressive.schedule import SamplingPlan
from overtone.progressive.tiny import world

SETTINGS: dict[str, dict[str, Any]] = {
    "fullres": {"mode": "fullres"},
    "levels: 1": {"levels": 1, "delta": 0.05},
    "scales: auto": {"scales": "auto", "min_scale": 0.5, "delta": 0.05},  # 0.5: as small as it was trained on
}

SIZE_PX = FAMILIES["tiny"].default_height


@dataclass(frozen=True)
class Loop:
    """The plain loop with one batch size."""

    batch_size: int
    rows: int
    """In all rounds together."""
    images_per_s: tuple[float, ...]
    """Of each round."""


@dataclass(frozen=True)
class Job:
    """One setting of jobs."""

    setting: str
    split: str
    """Steps @ latent grid of each stage."""
    rows: int
    """In all rounds together."""
    images_per_s: tuple[float, ...]
    """Of each round, of all workers."""
    ratios: tuple[float, ...]
    """The same over the better plain loop's, round by round."""
    ideal: float
    """Cost of as many steps at full resolution over the setting's, by FLOPs."""
    denoise_share: float
    """Of the workers' time, in [0, 1]."""

    @property
    def ratio(self) -> float:
        """The median round's."""
        return statistics.median(self.ratios)

    @property
    def share_of_ideal(self) -> float:
        return self.ratio / self.ideal


def compare(
    folder: Path,
    *,
    rows: int,
    rounds: int,
    num_steps: int,
    workers: int,
    batch_sizes: Sequence[int],
    settings: Sequence[str] = tuple(SETTINGS),
    on_progress: Callable[[str], None] = lambda text: None,
) -> tuple[list[Loop], list[Job]]:
    """Every plain loop and every job once a round, each with `rows` rows. Works in `folder`."""
    captions = [world.caption(world.scene(seed)) for seed in world.held_out(rows)]
    pq.write_table(pa.table({"prompt": captions, "seed": list(range(rows))}), folder / "prompts.parquet")
    loops: dict[int, list[float]] = {size: [] for size in batch_sizes}
    rates: dict[str, list[float]] = {setting: [] for setting in settings}
    shares: dict[str, list[float]] = {setting: [] for setting in settings}
    plans: dict[str, SamplingPlan] = {}
    start_ray(workers)
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_load) as plain:
            for number in range(rounds):
                for size in batch_sizes:
                    on_progress(f"round {number + 1}: plain, batches of {size}")
                    pictures = folder / f"plain-{number}-{size}"
                    took = plain.submit(_loop, captions, size, num_steps, pictures).result()
                    assert len(list(pictures.iterdir())) == rows
                    loops[size].append(rows / took)
                for setting in settings:
                    on_progress(f"round {number + 1}: job, {setting}")
                    output = folder / f"job-{number}-{setting.replace(': ', '-')}"
                    spec = _spec(folder, output, SETTINGS[setting], rows, num_steps, workers)
                    plans[setting] = sampling_plan(spec, checkpoint_of(spec))
                    rate, share = _run(spec, rows)
                    rates[setting].append(rate)
                    shares[setting].append(share)
    finally:
        ray.shutdown()
    best = [max(of_round) for of_round in zip(*loops.values(), strict=True)]
    return (
        [Loop(size, rows * rounds, tuple(rate)) for size, rate in loops.items()],
        [
            Job(
                setting=setting,
                split=plans[setting].split,
                rows=rows * rounds,
                images_per_s=tuple(rates[setting]),
                ratios=tuple(rate / plain for rate, plain in zip(rates[setting], best, strict=True)),
                ideal=plans[setting].saving,
                denoise_share=statistics.mean(shares[setting]),
            )
            for setting in settings
        ],
    )


# The plain loop, in a process of its own.

_pipe: Any = None


def _load() -> None:
    global _pipe
    _pipe = load("tiny", device="cpu")
    _call(["a circle"], [0], 1)  # what is done once in a process


def _call(prompts: Sequence[str], seeds: Sequence[int], num_steps: int) -> list[Any]:
    images: list[Any] = _pipe(
        list(prompts),
        height=SIZE_PX,
        width=SIZE_PX,
        num_inference_steps=num_steps,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        **FAMILIES["tiny"].call,
    ).images
    return images


def _loop(prompts: Sequence[str], batch_size: int, num_steps: int, folder: Path) -> float:
    """Seconds to make and save a picture of each prompt."""
    folder.mkdir()
    begin = time.perf_counter()
    for start in range(0, len(prompts), batch_size):
        some = prompts[start : start + batch_size]
        for number, image in enumerate(_call(some, range(start, start + len(some)), num_steps), start):
            image.save(folder / f"{number:05}.png")
    return time.perf_counter() - begin


# The job.


def _spec(
    folder: Path, output: Path, setting: dict[str, Any], rows: int, num_steps: int, workers: int
) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "bench",
            "model": "tiny",
            "prompts": str(folder / "prompts.parquet"),
            "sampling": {"num_steps": num_steps} | setting,
            "shards": max(
                1, math.ceil(rows / workers / 2)
            ),  # two a worker: one is committed beside the other
            "workers": {"count": workers, "num_gpus": 0},
            "output": str(output),
        }
    )


def _run(spec: JobSpec, rows: int) -> tuple[float, float]:
    """(pictures a second of all workers, the denoiser's share of their time). RuntimeError if it failed."""
    workers = worker_times(spec, rows)
    share = sum(worker.denoise_s for worker in workers) / sum(worker.wall_s for worker in workers)
    return sum(worker.rows / worker.wall_s for worker in workers), share


# The command.


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m overtone.cluster.bench.jobs", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rows", type=int, default=64, help="pictures of each loop and job (default: 64)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each takes its turn (default: 3)")
    parser.add_argument("--steps", type=int, default=30, help="(default: 30)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="(default: one a core)")
    parser.add_argument(
        "--batch-size", type=int, action="append", help="of the plain loop; repeatable; default: 1, 4 and 8"
    )
    parser.add_argument("--setting", choices=SETTINGS, action="append", help="repeatable; default: all")
    parser.add_argument("--json", type=Path, help="write all figures here")
    add_suite(parser)
    parser.add_argument("--only", action="append", metavar="PATTERN", help="of a suite, only these lines")
    parser.add_argument("--plan", action="store_true", help="of a suite: measure nothing, show its lines")
    given = parser.parse_args(arguments)
    if given.suite is not None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        run_suite(parser, given, suites(device), device, only=given.only, plan=given.plan)
        return
    with tempfile.TemporaryDirectory(prefix="overtone-bench-") as folder:
        loops, jobs = compare(
            Path(folder),
            rows=given.rows,
            rounds=given.rounds,
            num_steps=given.steps,
            workers=given.workers,
            batch_sizes=given.batch_size or (1, 4, 8),
            settings=given.setting or tuple(SETTINGS),
            on_progress=lambda text: print(text, flush=True),
        )
    table = Table("", "images/s", "min to max", "over plain", "ideal", "share of ideal", "denoising")
    for loop in loops:
        table.add_row(f"plain, batches of {loop.batch_size}", *_rates(loop.images_per_s))
    for job in jobs:
        table.add_row(
            f"job, {job.setting}",
            *_rates(job.images_per_s),
            f"{job.ratio:.2f} ({min(job.ratios):.2f} to {max(job.ratios):.2f})",
            f"{job.ideal:.2f}",
            f"{job.share_of_ideal:.0%}",
            f"{job.denoise_share:.0%}",
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for job in jobs:
        console.print(f"{job.setting}: {job.split} steps @ grid", highlight=False)
    if given.json:
        figures = {
            "plain": [asdict(loop) for loop in loops],
            "jobs": [
                asdict(job) | {"ratio": job.ratio, "share_of_ideal": job.share_of_ideal} for job in jobs
            ],
            "workers": given.workers,
            "threads": torch.get_num_threads(),
        }
        given.json.write_text(json.dumps(figures, indent=2) + "\n")


def _rates(rates: Sequence[float]) -> tuple[str, str]:
    return f"{statistics.median(rates):.3f}", f"{min(rates):.3f} to {max(rates):.3f}"


if __name__ == "__main__":
    main()
