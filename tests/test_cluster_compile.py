"""Compilation in a job: before a row is started, and for every batch size that may come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fake_engine import FakeEngine

from overtone.cluster.dispatch import Assignment, RowsStarted, ShardAlive, ShardCommitted, ShardFailed
from overtone.cluster.faults import Verdict, verdict_for
from overtone.cluster.worker import Runner, load_engine
from overtone.cluster.worker.batch_sizes import BATCH_MAX, BatchSizes
from overtone.jobs.plan import make_plan
from overtone.jobs.spec import JobSpec
from overtone.jobs.store import open_store
from overtone.progressive.compile import CompiledEngine
from overtone.progressive.engine import Engine
from overtone.progressive.errors import Recompiled
from overtone.progressive.schedule import SamplingPlan
from overtone.progressive.settings import Sampling


def job(folder: Path, heights: list[int], **workers: Any) -> JobSpec:
    table = pa.table({"prompt": ["a"] * len(heights), "height": heights})
    pq.write_table(table, folder / "prompts.parquet")
    return JobSpec.model_validate(
        {
            "model": "tiny",
            "prompts": str(folder / "prompts.parquet"),
            "sampling": {"height": 64, "width": 64, "num_steps": 4, "transition_sigmas": [0.6]},
            "workers": {"batch_size": 6} | workers,
            "output": str(folder / "out"),
        }
    )


@dataclass
class Compiling(FakeEngine):
    """`too_large`: heights in pixels that not even one row of fits."""

    warmed: list[tuple[int, list[tuple[int, ...]]]] = field(default_factory=list)
    too_large: tuple[int, ...] = ()

    def warm_each(
        self,
        plan: SamplingPlan,
        batch_sizes: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        search: bool = False,
    ) -> Iterator[str]:
        if plan.height_px in self.too_large:
            raise MemoryError("out of memory")
        if plan.height_px not in [height for height, _ in self.warmed]:
            self.warmed.append((plan.height_px, [tuple(sizes) for sizes in batch_sizes]))
            yield "a shape"


def events(folder: Path, engine: FakeEngine, heights: list[int]) -> list[Any]:
    spec = job(folder, heights)
    runner = Runner(spec, make_plan(spec), open_store(spec.output.path), engine)
    try:
        return list(runner.attempt(Assignment(shard=0, attempt=1)))
    finally:
        runner.close()


def test_each_size_is_compiled_for_before_its_first_row(tmp_path):
    engine = Compiling()
    told = events(tmp_path, engine, [64, 64, 128])
    # The coarse stage takes four times the rows for the same tokens; halves, for when memory is short.
    assert engine.warmed == [(height, [(1, 3, 6, 12, 24), (1, 3, 6)]) for height in (64, 128)]
    kinds = [type(event) for event in told]
    assert kinds.count(ShardAlive) >= 3  # one a size, and one when the rows were read
    assert kinds.index(RowsStarted) > kinds.index(ShardAlive)
    (committed,) = (event for event in told if isinstance(event, ShardCommitted))
    assert (committed.rows, committed.rejects) == (3, 0)


def test_a_size_of_which_not_one_row_fits_is_rejected(tmp_path):
    told = events(tmp_path, Compiling(too_large=(128,)), [64, 128])
    (committed,) = (event for event in told if isinstance(event, ShardCommitted))
    assert (committed.rows, committed.rejects) == (2, 1)


def test_a_shape_that_was_not_compiled_for_ends_the_job(tmp_path):
    class Forgets(Compiling):
        def warm_each(self, *args: Any, **kwargs: Any) -> Iterator[str]:
            raise Recompiled("a shape was met that no warm-up had seen")
            yield

    (failed,) = (e for e in events(tmp_path, Forgets(), [64]) if isinstance(e, ShardFailed))
    assert failed.failure.verdict is Verdict.FAIL_JOB
    assert verdict_for(Recompiled) is Verdict.FAIL_JOB


def test_the_sizes_that_may_come():
    plan = FakeEngine().plan(Sampling(height=64, width=64, num_steps=4, transition_sigmas=(0.6,)))
    coarse, full = plan.stages
    assert BatchSizes(5, gpu=True).possible(full, full) == (1, 2, 5)
    auto = BatchSizes("auto", gpu=True)
    assert auto.grows
    assert auto.possible(full, full) == (1, 2, 4, 8, 16, 32, 64)
    assert auto.possible(coarse, full)[-1] == BATCH_MAX


@pytest.mark.parametrize("compile", ["off", "blocks", "max"])
def test_the_spec_chooses_the_engine(tmp_path, monkeypatch, compile):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # the engine sets it: put it back afterwards
    spec = job(tmp_path, [64], compile=compile, compile_cache_dir=str(tmp_path / "compiled"))
    assert "compile" not in str(spec.samples())  # it changes no sample
    threads = torch.get_num_threads()
    try:
        engine = load_engine(spec)
    finally:
        torch.set_num_threads(threads)
    assert type(engine) is (Engine if compile == "off" else CompiledEngine)
    assert (tmp_path / "compiled").is_dir() == (compile != "off")
