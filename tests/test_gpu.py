"""What only a CUDA device can show: `pytest -m gpu`. Every other test runs without one."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_pipes
import torch
from click.testing import CliRunner
from PIL import Image

from overtone import progressive
from overtone.cluster.cli import main
from overtone.cluster.dispatch import Assignment, ShardCommitted
from overtone.cluster.worker import Runner
from overtone.jobs.parts import Timing
from overtone.jobs.plan import make_plan
from overtone.jobs.rows import Row
from overtone.jobs.spec import JobSpec
from overtone.jobs.store import open_store
from overtone.progressive import quality, spectral
from overtone.progressive.bench import Line, Stack
from overtone.progressive.bench.lab import Lab
from overtone.progressive.compile import CompiledEngine
from overtone.progressive.engine import Engine
from overtone.progressive.engine.trajectories import expand
from overtone.progressive.graphs import CudaGraphs, GraphedEngine
from overtone.progressive.pipelines import load
from overtone.progressive.settings import Sampling

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROMPTS = [
    "a large red circle on a plain grey background",
    "a small blue square above a large green ring on a striped tan background",
    "a large yellow star left of a small white triangle on a checkered teal background",
    "a small purple ring on a striped pink background",
]
SAMPLING = Sampling(num_steps=8, true_cfg_scale=3.0, delta=0.05)
GIB = 2**30


def denoise(engine: Engine, prompts: list[str], seeds: list[int], sampling: Sampling = SAMPLING) -> Any:
    """(plan, latents)"""
    plan = engine.plan(sampling)
    encoded = engine.encode(prompts, [None] * len(prompts), sampling)
    return plan, engine.denoise(plan, encoded, seeds, sampling)[0]


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative distance of two tensors."""
    one, other = one.double().cpu(), other.double().cpu()
    return float((one - other).norm() / other.norm())


def psnr(one: Image.Image, other: Image.Image) -> float:
    """dB, of two pictures."""
    return float(quality.psnr(quality.as_tensor([one]), quality.as_tensor([other])))


def picture(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(load("tiny", device="cuda"))


@pytest.fixture(scope="module")
def on_cpu() -> tuple[torch.Tensor, list[Any]]:
    """Latents and pictures of the four prompts as a CPU makes them."""
    engine = Engine(load("tiny", device="cpu"))
    plan, latents = denoise(engine, PROMPTS, [1, 2, 3, 4])
    return latents, engine.decode(plan, latents)


def test_a_gpu_and_a_cpu_make_the_same_pictures(engine, on_cpu):
    plan, latents = denoise(engine, PROMPTS, [1, 2, 3, 4])
    assert apart(latents, on_cpu[0]) < 1e-3
    for mine, theirs in zip(engine.decode(plan, latents), on_cpu[1], strict=True):
        assert psnr(mine, theirs) > 40


def test_a_row_is_the_same_in_any_batch(engine, on_cpu):
    for row in (0, 3):
        _, alone = denoise(engine, [PROMPTS[row]], [row + 1])
        assert apart(alone[0], on_cpu[0][row]) < 1e-3


def test_expansions_are_exact_where_matrix_products_are_not():
    """TF32, which many switch on for speed, would cost an expansion three digits."""
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, 16, 48, 48, generator=generator)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        engine = Engine(tiny_pipes.flux1().to("cuda"))
        plan = engine.plan(Sampling(height=128, width=128, num_steps=6, transition_sigmas=(0.8,)))
        height, width = plan.stages[0].grid
        base = torch.randn(2, 4, *plan.stages[1].grid, generator=generator)
        coarse = noisy[:, :4, :height, :width].contiguous()
        grid = plan.stages[1].grid
        found = expand(engine.call, plan, 1, coarse.cuda(), base.cuda())
        wanted = spectral.expand(
            coarse.double(),
            base.double(),
            plan.stages[0].sigma_end,
            *grid,
            kappa=plan.kappa(0),
            transform=plan.transform,
            patch=engine.family.subcells,
            fill=plan.fill(0),
        )
        assert apart(found, wanted) < 1e-5
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("family", tiny_pipes.BUILDERS)
def test_each_family_in_bfloat16(family):
    engine = Engine(tiny_pipes.BUILDERS[family]().to("cuda", torch.bfloat16))
    video = family.startswith("wan")
    size = {"height": 64, "width": 96, "num_frames": 5} if video else {"height": 128, "width": 96}
    sampling = Sampling(
        num_steps=4, transition_sigmas=(0.8,), call_kwargs={"max_sequence_length": 16}, **size
    )
    plan, latents = denoise(engine, list(tiny_pipes.PROMPTS), [1, 2], sampling)
    assert torch.isfinite(latents).all()
    made = engine.decode(plan, latents)
    assert len(made) == 2
    assert np.asarray(made[0]).std() > 0


def test_a_model_that_lies_in_main_memory_makes_the_same(on_cpu):
    offloaded = Engine(load("tiny", device="cuda", offload="model"))
    assert not offloaded.overlaps
    _, latents = denoise(offloaded, PROMPTS, [1, 2, 3, 4])
    assert apart(latents, on_cpu[0]) < 1e-3


@pytest.mark.parametrize(("quantize", "most"), [("int8", 0.05), ("fp8", 0.2)])
def test_low_precision_is_close_and_small(quantize, most):
    pytest.importorskip("torchao")
    full = load("tiny", device="cuda", dtype="bfloat16")
    low = load("tiny", device="cuda", dtype="bfloat16", quantize=quantize)
    _, wanted = denoise(Engine(full), PROMPTS, [1, 2, 3, 4])
    _, found = denoise(Engine(low), PROMPTS, [1, 2, 3, 4])
    assert 0 < apart(found, wanted) < most


@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_low_precision_is_compiled_and_captured(engine, quantize):
    pytest.importorskip("torchao")
    low = load("tiny", device="cuda", dtype="bfloat16", quantize=quantize)
    _, wanted = denoise(Engine(low), PROMPTS, [1, 2, 3, 4])
    compiled = CompiledEngine(low, capturer=CudaGraphs(engine.device))
    plan = compiled.plan(SAMPLING)
    done = compiled.warm(plan, [(4,)] * len(plan.stages), SAMPLING)
    assert all(one.graphs and one.captures for one in done)
    _, found = denoise(compiled, PROMPTS, [1, 2, 3, 4])
    assert apart(found, wanted) < 0.1
    assert compiled.graphs is not None
    assert not compiled.graphs.refusals


def test_compiled_blocks_make_the_same_and_compile_nothing_more(on_cpu):
    engine = CompiledEngine(load("tiny", device="cuda"), mode="blocks")
    plan = engine.plan(SAMPLING)
    done = engine.warm(plan, [(4,)] * len(plan.stages), SAMPLING)
    assert all(one.graphs for one in done)
    _, latents = denoise(engine, PROMPTS, [1, 2, 3, 4])  # Recompiled, if that compiled
    assert apart(latents, on_cpu[0]) < 1e-3


@pytest.mark.parametrize("compile", [False, True])
def test_captured_calls_give_what_the_calls_give(engine, compile):
    pipe = load("tiny", device="cuda")
    capturer = CudaGraphs(engine.device)
    graphed: Any = (
        CompiledEngine(pipe, capturer=capturer) if compile else GraphedEngine(pipe, capturer=capturer)
    )
    plan = graphed.plan(SAMPLING)
    assert all(one.captures for one in graphed.warm(plan, [(4,)] * len(plan.stages), SAMPLING))
    before = graphed.graphs.counts.captures, graphed.graphs.counts.replays
    _, latents = denoise(graphed, PROMPTS, [1, 2, 3, 4])
    with graphed.graphs.left():
        _, wanted = denoise(graphed, PROMPTS, [1, 2, 3, 4])
    assert torch.equal(latents, wanted)
    calls = 2 * sum(stage.steps for stage in plan.stages)
    assert (graphed.graphs.counts.captures, graphed.graphs.counts.replays) == (before[0], before[1] + calls)
    assert not graphed.graphs.refusals
    assert 0 < graphed.graphs.held_bytes < GIB


@pytest.mark.parametrize("family", tiny_pipes.BUILDERS)
def test_each_family_captured(family):
    pipe = tiny_pipes.BUILDERS[family]().to("cuda", torch.bfloat16)
    video = {"num_frames": 5} if family.startswith("wan") else {}
    sampling = Sampling(height=64, width=96, num_steps=6, transition_sigmas=(0.8,), **video)
    _, wanted = denoise(Engine(pipe), list(tiny_pipes.PROMPTS), [1, 2], sampling)
    graphed = GraphedEngine(pipe)
    for _ in range(2):
        _, latents = denoise(graphed, list(tiny_pipes.PROMPTS), [1, 2], sampling)
        assert torch.equal(latents, wanted)
    assert graphed.graphs.counts.replays, graphed.graphs.refusals


# A worker's runner with a real engine.


def job(folder: Path, rows: int, **sections: Any) -> JobSpec:
    folder.mkdir(parents=True)
    prompts = [PROMPTS[k % len(PROMPTS)] for k in range(rows)]
    table = {"row_id": [f"r{k:03}" for k in range(rows)], "prompt": prompts}
    pq.write_table(pa.table(table), folder / "prompts.parquet")
    sampling = SAMPLING.model_dump(mode="json", exclude_unset=True)
    workers = {"batch_cache_dir": str(folder / "sizes")} | sections.pop("workers", {})
    return JobSpec.model_validate(
        {
            "model": "tiny",
            "prompts": str(folder / "prompts.parquet"),
            "sampling": sampling,
            "shards": rows,
            "workers": workers,
            "output": str(folder / "out"),
        }
        | sections
    )


def rows_of(spec: JobSpec) -> list[dict[str, Any]]:
    files = sorted(Path(spec.output.path, "data").glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def test_what_goes_on_beside_the_denoising_changes_no_picture(engine, tmp_path):
    """Prompts and VAE on streams of their own, batches that grow: against one row after the other."""
    spec = job(tmp_path / "job", 40)
    plan = make_plan(spec)
    assert engine.overlaps
    runner = Runner(spec, plan, open_store(spec.output.path), engine)
    try:
        events = [*runner.attempt(Assignment(0, 1)), *runner.flush()]
    finally:
        runner.close()
    assert [event for event in events if isinstance(event, ShardCommitted)]
    made = rows_of(spec)
    assert [row["row_id"] for row in made] == [f"r{k:03}" for k in range(40)]
    for row in made[::13]:
        one, latents = denoise(engine, [row["prompt"]], [row["seed"]])
        assert psnr(picture(row["image"]["bytes"]), engine.decode(one, latents)[0]) > 40


def test_the_next_job_has_the_batch_sizes_of_the_last(engine, tmp_path):
    spec, together = job(tmp_path / "job", 4), list[list[int]]()
    rows = [Row(f"r{k}", PROMPTS[k % 4], None, k, None, None, k, 0) for k in range(400)]
    for _ in range(2):
        timings: list[Timing] = []
        runner = Runner(spec, None, None, engine, on_timings=timings.extend)
        try:
            runner.make(rows)
        finally:
            runner.close()
        full = engine.plan(SAMPLING).stages[-1].height
        together.append([one.rows for one in timings if (one.stage, one.height) == ("denoise", full)])
    first, second = together
    assert first[0] == 1
    assert set(second[:-1]) == {second[0]}  # no search
    assert len(second) < len(first)


def test_a_line_of_the_suite_is_measured_on_a_gpu():
    lab = Lab(torch.device("cuda"), torch.bfloat16, repeats=1)
    for stack in (Stack(), Stack("blocks")):
        made = lab.measure(Line("tiny", {"levels": 1, "delta": 0.05, "num_steps": 4}, stack, rows=2))
        assert min(made.seconds, made.memory_gib, made.load_s) > 0
    lab.empty()


def test_a_batch_that_memory_does_not_hold_is_halved_and_no_row_lost(engine, tmp_path):
    spec = job(tmp_path / "job", 64, workers={"batch_size": 64})
    timings: list[Timing] = []
    runner = Runner(spec, None, None, engine, on_timings=timings.extend)
    rows = [Row(f"r{k}", PROMPTS[k % 4], None, k, None, None, k, 0) for k in range(64)]
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    room = torch.cuda.memory_reserved() + GIB // 4  # for a few rows, not for 64
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        made, rejects = runner.make(rows)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        runner.close()
    assert rejects == []
    assert sorted(one.row.row_id for one in made) == sorted(row.row_id for row in rows)
    full = engine.plan(SAMPLING).stages[-1].height
    together = [one.rows for one in timings if (one.stage, one.height) == ("denoise", full)]
    assert sum(together) == 64
    assert max(together) < 64  # it did run out of memory
    (one,) = (one for one in made if one.row.row_id == "r9")
    plan, latents = denoise(engine, [one.row.prompt], [9])
    assert psnr(picture(one.data), engine.decode(plan, latents)[0]) > 40


# The whole thing.


def test_a_job_on_a_gpu_from_the_command_line(tmp_path):
    """Two workers that share the GPU; then what the report and the estimate make of it."""
    spec = job(tmp_path / "job", 48, shards=8, workers={"count": 2, "num_gpus": 0.5})
    path = tmp_path / "job" / "job.json"
    path.write_text(spec.to_json())
    run = CliRunner()
    shown = run.invoke(main, ["run", str(path), "--quiet"])
    assert shown.exit_code == 0, shown.output
    assert run.invoke(main, ["verify", spec.output.path]).exit_code == 0
    assert len(rows_of(spec)) == 48
    timings = pq.read_table(Path(spec.output.path, "timings"))
    assert set(timings["device"].to_pylist()) == {"cuda:0"}
    shown = run.invoke(main, ["report", spec.output.path])
    assert shown.exit_code == 0, shown.output
    shown = run.invoke(main, ["estimate", str(path), "--json"])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.output)


def test_the_library_puts_a_model_on_the_gpu_by_itself():
    pipe = load("tiny")
    result = progressive.generate(pipe, PROMPTS[:1], num_steps=4, seeds=[3])
    assert result.latents.device.type == "cuda"
    assert result.images[0].size == (256, 256)
