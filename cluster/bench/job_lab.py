"""The suite's lines about whole jobs, measured: a job on a local Ray, a plain loop, an engine alone. Knows no
budget and no file.

    lab = JobLab("cuda")
    lab.measure(line).seconds

What a job takes is its workers' time from the first shard to the end of the last one's upload, as
`overtone.cluster.bench.jobs` has it; the others take what they do, without loading and warming up.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import time
from functools import partial
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from overtone.cluster.bench.job_lines import JobLine, bases, job_suite, job_table, over_loop_and_light
from overtone.cluster.bench.real_size import RealSize
from overtone.cluster.connection import OBJECT_STORE_BYTES
from overtone.cluster.driver import run_job
from overtone.cluster.worker import EngineFactory
from overtone.jobs.report import Timings, WorkerTime
from overtone.jobs.spec import JobSpec
from overtone.progressive.bench import (
    Figures,
    Line,
    Ready,
    Suites,
    answer,
    measured_on,
    timed,
)
from overtone.progressive.checkpoints import describe
from overtone.progressive.families import FAMILIES
from overtone.progressive.tiny import world

_SHARDS = 4
"""Of a job: one is made while another is committed."""


class JobLab:
    """One machine whose device is free for whichever comes next."""

    def __init__(self, device: str, factory: RealSize | None = None) -> None:
        """`factory`: of a job's engine, and of the plain loop's pipeline; None: `RealSize()`."""
        self._device, self._factory = torch.device(device), factory or RealSize()

    def measure(self, line: Line) -> Figures:
        """Whatever goes wrong is raised."""
        assert isinstance(line, JobLine)
        try:
            with TemporaryDirectory(prefix="overtone-bench-") as folder:
                spec = job_of(line, Path(folder), self._device.type == "cuda")
                return {"job": self._job, "loop": self._loop, "engine": self._engine}[line.kind](line, spec)
        finally:
            torch.compiler.reset()
            gc.collect()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def _job(self, line: JobLine, spec: JobSpec) -> Figures:
        begin = time.perf_counter()
        if not ray.is_initialized():
            start_ray()
        (worker,) = worker_times(spec, line.rows, self._factory)
        altogether = time.perf_counter() - begin
        return Figures(
            seconds=worker.wall_s,
            spread_s=0.0,
            memory_gib=0.0,
            load_s=altogether - worker.wall_s,
            prepare_s=0.0,
            graphs=0,
            denoise_share=worker.denoise_s / worker.wall_s,
        )

    def _loop(self, line: JobLine, spec: JobSpec) -> Figures:
        """The library's own pipeline over the prompts, pictures saved as PNG."""
        begin = time.perf_counter()
        pipe = self._factory.pipe(spec)
        loaded = time.perf_counter()
        sampling, prompts = spec.sampling, _prompts(spec)
        family = FAMILIES[describe(spec.model.id).family]

        def loop(some: list[str], steps: int, folder: Path) -> None:
            for start in range(0, len(some), line.chunk):
                chunk = some[start : start + line.chunk]
                images = pipe(
                    chunk,
                    height=sampling.height,
                    width=sampling.width,
                    num_inference_steps=steps,
                    generator=[torch.Generator().manual_seed(start + k) for k in range(len(chunk))],
                    **family.arguments(sampling, steps),
                ).images
                for number, image in enumerate(images, start):
                    image.save(folder / f"{number:05}.png")

        folder = Path(spec.output.path)
        folder.mkdir()
        loop(prompts[: line.chunk], 2, folder)
        ready = time.perf_counter()
        assert sampling.num_steps is not None
        seconds, gib = timed(self._device, partial(loop, prompts, sampling.num_steps, folder))
        return Figures(seconds, 0.0, gib, loaded - begin, ready - loaded, 0)

    def _engine(self, line: JobLine, spec: JobSpec) -> Figures:
        """The job's engine with the job's prompts, encoded before: nothing but the denoising loop."""
        begin = time.perf_counter()
        engine: Any = self._factory(spec)
        loaded = time.perf_counter()
        sampling, prompts = spec.sampling, _prompts(spec)
        plan = engine.plan(sampling)
        text = engine.encode(prompts, [None] * len(prompts), sampling)
        full = plan.stages[-1].tokens
        # As a job's first chunks: a coarse stage has as many rows as have no more tokens.
        sizes = [min(len(prompts), line.chunk * full // stage.tokens) for stage in plan.stages]
        if hasattr(engine, "warm"):
            engine.warm(plan, [(size,) for size in sizes], sampling)
        seeds = list(range(len(prompts)))
        engine.denoise(plan.one_step_each(), text, seeds, sampling, batch_sizes=sizes)
        ready = time.perf_counter()
        seconds, gib = timed(
            self._device, lambda: engine.denoise(plan, text, seeds, sampling, batch_sizes=sizes)
        )
        return Figures(seconds, 0.0, gib, loaded - begin, ready - loaded, 0)


def start_ray(num_cpus: int | None = None) -> None:
    """A Ray of this process alone, on this machine; `num_cpus`: None for as many as there are."""
    # Ray makes its workers give way to everything else, which the plain loop does not.
    os.environ["RAY_worker_niceness"] = "0"
    ray.init(
        "local",
        num_cpus=num_cpus,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def worker_times(spec: JobSpec, rows: int, factory: EngineFactory | None = None) -> list[WorkerTime]:
    """What each worker of a job took from its first shard to the end of its last one's upload. RuntimeError
    where not all rows were made."""
    summary = run_job(spec, engine_factory=factory)
    if summary.exit_code or summary.rejects or summary.rows != rows:
        raise RuntimeError(summary.text())
    tables = [pq.read_table(path) for path in sorted(Path(spec.output.path, "timings").glob("*.parquet"))]
    return Timings(pa.concat_tables(tables)).workers()


def job_of(line: JobLine, folder: Path, gpu: bool) -> JobSpec:
    """The line's job; writes its prompt table to `folder`."""
    case, stack = line.of, line.stack
    captions = [world.caption(world.scene(seed)) for seed in world.held_out(line.rows)]
    prompts = folder / "prompts.parquet"
    pq.write_table(pa.table({"prompt": captions, "seed": list(range(line.rows))}), prompts)
    workers: dict[str, Any] = {
        "count": 1,
        "num_gpus": int(gpu),
        "batch_size": line.chunk,
        "compile": stack.compile,
    }
    if stack.graphs:
        workers["graphs"] = "auto"
    sampling = line.sampling.model_dump(exclude_unset=True)
    return JobSpec.model_validate(
        {
            "name": "bench",
            "model": {"id": case.model, "quantize": stack.quantize},
            "prompts": str(prompts),
            "sampling": sampling,
            "shards": max(1, -(-line.rows // _SHARDS)),
            "workers": workers,
            "output": str(folder / "out"),
        }
    )


def _prompts(spec: JobSpec) -> list[str]:
    found: list[str] = pq.read_table(spec.prompts.path[0])["prompt"].to_pylist()
    return found


def serve_jobs(connection: Pipe, device: str, dtype: str) -> None:
    """In a process of its own: a `JobLab`, until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one decides
    about = measured_on(torch.device(device), dtype)
    name = about.pop("device")
    answer(connection, Ready(name, about), JobLab(device).measure)


def suites(device: str) -> Suites:
    """Whole jobs with a real-size model, and with the embedded one."""
    return Suites(
        lines=lambda name: job_suite(name),
        serve=serve_jobs,
        arguments=(device, "bfloat16" if device == "cuda" else "float32"),
        bases=bases,
        compare=over_loop_and_light,
        table=job_table,
        others=("rows", "rounds", "steps", "workers", "batch_size", "setting", "json"),
    )
