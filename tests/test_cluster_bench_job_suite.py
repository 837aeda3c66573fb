"""The suite about whole jobs: what it compares, and that a job, a loop and an engine make all pictures."""

from __future__ import annotations

import numpy as np
import pytest
import ray
from test_progressive_bench import REDUCED

from overtone.cluster.bench import jobs as bench_jobs
from overtone.cluster.bench.job_lab import JobLab, job_of
from overtone.cluster.bench.job_lines import JobLine, bases, job_suite, job_table, over_loop_and_light
from overtone.cluster.bench.real_size import RealSize
from overtone.progressive.bench import Record, Stack

SHORT = {"levels": 1, "delta": 0.05, "num_steps": 3}


def record(name: str, rows: int, seconds: float | None, **more) -> Record:
    return Record(name, "tiny", "plain", rows, "", 1.0, 1.0, "a GPU", "now", 1.0, seconds=seconds, **more)


def test_the_first_line_is_the_job_that_is_told_and_each_has_its_own_engine_beside_it():
    lines = job_suite("gpu")
    assert lines[0].name == (
        "flux1-dev: a job, scales auto, delta 0.05; compile blocks, graphs; 16 pictures, 1 at a time"
    )
    assert len({line.name for line in lines}) == len(lines)
    loop, engine = bases(lines[0])
    assert loop.name == "flux1-dev: plain loop, fullres; plain; 8 pictures, 1 at a time"
    assert engine.name == lines[0].name.replace("a job", "the engine alone")
    assert engine.engine != lines[0].engine  # each is built anew
    assert engine.work.flops == lines[0].work.flops == pytest.approx(16 * 1.79e15, rel=0.01)


def test_a_job_is_measured_by_the_loop_and_by_its_engine():
    loop, engine = record("loop", 8, 80.0), record("engine", 16, 64.0)
    job = over_loop_and_light(record("job", 16, 80.0, denoise_share=0.8), (loop, engine))
    assert (job.over_plain, job.of_light) == (pytest.approx(2.0), pytest.approx(0.8))
    alone = over_loop_and_light(record("job", 16, 80.0, denoise_share=0.8), (None, None))
    assert (alone.over_plain, alone.of_light) == (None, None)
    assert over_loop_and_light(engine, (loop, engine)).of_light is None  # it is the light
    shown = job_table([job, record("out", 16, None, failed="out of memory")]).splitlines()
    assert "| 720 " in shown[2]
    assert "| 80% " in shown[2]
    assert "not measured: out of memory" in shown[3]


def test_flux_is_whole_at_its_real_size(tmp_path):
    """Its transformer reduced, for a CPU; the widths of the texts are the reduced transformer's."""
    line = JobLine("flux1-dev", SHORT | {"height": 64, "width": 64}, rows=2)
    spec = job_of(line, tmp_path, gpu=False)
    factory = RealSize(tuple(REDUCED["flux1-dev"].items()))
    pipe = factory.pipe(spec)
    assert sum(p.numel() for p in pipe.vae.parameters()) == pytest.approx(83.8e6, rel=0.01)  # as published
    engine = factory(spec)
    plan = engine.plan(spec.sampling)
    encoded = engine.encode(["a large blue star", "a circle"], [None, None], spec.sampling)
    assert encoded.positive[0]["prompt_embeds"].shape == (512, 32)
    latents, _ = engine.denoise(plan, encoded, [0, 1], spec.sampling)
    images = engine.decode(plan, latents)
    assert [image.size for image in images] == [(64, 64)] * 2
    assert not np.array_equal(np.asarray(images[0]), np.asarray(images[1]))


def test_only_models_that_are_known_whole_are_built(tmp_path):
    spec = job_of(JobLine("z-image", SHORT, rows=1), tmp_path, gpu=False)
    with pytest.raises(ValueError, match=r"not of FLUX\.1's shape"):
        RealSize().pipe(spec)


@pytest.mark.parametrize("kind", ["loop", "engine"])
def test_what_a_job_is_compared_with_is_timed_without_loading(kind):
    made = JobLab("cpu").measure(JobLine("tiny", SHORT, rows=3, chunk=2, kind=kind))
    assert min(made.seconds, made.load_s, made.prepare_s) > 0
    assert made.denoise_share is None


@pytest.mark.ray
@pytest.mark.chaos
def test_a_job_is_timed_by_its_worker():
    """Its parts, but for the one model, are those of `bench.jobs`, whose tests run each time."""
    try:
        made = JobLab("cpu").measure(JobLine("tiny", SHORT, rows=4, chunk=2))
    finally:
        ray.shutdown()
    assert min(made.seconds, made.load_s) > 0
    assert 0 < made.denoise_share < 1


def test_a_line_says_how_its_job_runs(tmp_path):
    spec = job_of(
        JobLine("flux1-dev", SHORT, Stack("blocks", quantize="fp8"), 16, chunk=4), tmp_path, gpu=True
    )
    said = (spec.workers.compile, spec.model.quantize, spec.workers.batch_size, spec.workers.num_gpus)
    assert said == ("blocks", "fp8", 4, 1)
    assert (spec.sampling.height, spec.sampling.num_steps, spec.shards.rows) == (1024, 3, 4)


def test_the_command_shows_and_refuses_what_the_suite_does_not_take(capsys):
    bench_jobs.main(["--suite", "gpu", "--plan"])
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(job_suite("gpu"))
    with pytest.raises(SystemExit):
        bench_jobs.main(["--suite", "tiny", "--to", "x.jsonl", "--rows", "3"])
    assert "--rows is not for --suite" in capsys.readouterr().err
