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
        asked = plan.height_px, [tuple(sizes) for sizes in batch_sizes]
        if asked not in self.warmed:
            self.warmed.append(asked)
            yield "a shape"


def events(folder: Path, engine: FakeEngine, heights: list[int]) -> list[Any]:
    spec = job(folder, heights)
    runner = Runner(spec, make_plan(spec), open_store(spec.output.path), engine)
    try:
        return list(runner.attempt(Assignment(shard=0, attempt=1)))
    finally:
        runner.close()


FIRST, EVERY = [(24,), (6,)], [(1, 3, 6, 12, 24), (1, 3, 6)]
"""The coarse stage takes four times the rows for the same tokens; halves, for when memory is short."""


def test_each_size_is_compiled_for_before_its_first_row(tmp_path):
    engine = Compiling()
    told = events(tmp_path, engine, [64, 64, 128])
    assert engine.warmed == [(height, FIRST) for height in (64, 128)]
    kinds = [type(event) for event in told]
    assert kinds.count(ShardAlive) >= 3  # one a size, and one when the rows were read
    assert kinds.index(RowsStarted) > kinds.index(ShardAlive)
    (committed,) = (event for event in told if isinstance(event, ShardCommitted))
    assert (committed.rows, committed.rejects) == (3, 0)


def test_the_first_pictures_wait_for_their_own_shapes_alone(tmp_path):
    engine = Compiling()
    told = events(tmp_path, engine, [64] * 30)
    assert engine.warmed == [(64, FIRST), (64, EVERY)]
    begun = [k for k, event in enumerate(told) if isinstance(event, RowsStarted)]
    alive = [k for k, event in enumerate(told) if isinstance(event, ShardAlive)]
    assert any(begun[0] < k < begun[-1] for k in alive)  # the others came between two batches
    (committed,) = (event for event in told if isinstance(event, ShardCommitted))
    assert (committed.rows, committed.rejects) == (30, 0)


def test_where_the_first_size_does_not_fit_smaller_ones_are_compiled_for(tmp_path):
    class Small(Compiling):
        def warm_each(self, plan: Any, batch_sizes: Any, *args: Any, **kwargs: Any) -> Iterator[str]:
            if min(map(min, batch_sizes)) > 3:
                raise MemoryError("out of memory")
            yield from super().warm_each(plan, batch_sizes, *args, **kwargs)

    engine = Small()
    told = events(tmp_path, engine, [64, 64])
    assert engine.warmed == [(64, EVERY)]
    (committed,) = (event for event in told if isinstance(event, ShardCommitted))
    assert (committed.rows, committed.rejects) == (2, 0)


def test_after_a_chunk_that_memory_does_not_hold_smaller_ones_are_compiled_for(tmp_path):
    engine = Compiling(fits={8: 3})
    told = events(tmp_path, engine, [64] * 6)
    assert engine.warmed == [(64, FIRST), (64, EVERY)]
    (committed,) = (event for event in told if isinstance(event, ShardCommitted))
    assert (committed.rows, committed.rejects) == (6, 0)


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
    spec = job(tmp_path, [64], compile=compile, graphs="auto", compile_cache_dir=str(tmp_path / "compiled"))
    assert "compile" not in str(spec.samples())  # it changes no sample
    threads = torch.get_num_threads()
    try:
        engine = load_engine(spec)
    finally:
        torch.set_num_threads(threads)
    assert type(engine) is (Engine if compile == "off" else CompiledEngine)  # a CPU has no graphs
    assert "graphs" not in str(spec.samples())
    assert (tmp_path / "compiled").is_dir() == (compile != "off")
