"""Batch sizes on a GPU: found once for a model, a GPU and a grid, and never larger than memory holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_engine import FakeEngine, FakeTrajectories, Report

from overtone.cluster.dispatch import Assignment, ShardCommitted, ShardGenerated
from overtone.cluster.worker import Runner
from overtone.cluster.worker.batch_sizes import BATCH_MAX, BatchSizes
from overtone.cluster.worker.known_sizes import KnownSizes
from overtone.cluster.worker.memory import ROOM, Memory
from overtone.jobs.plan import make_plan
from overtone.jobs.spec import JobSpec
from overtone.jobs.store import open_store
from overtone.progressive.schedule import Stage

GIB = 2**30
TOKEN = GIB // 256
"""Bytes that a token takes beside the model, on the fake GPU."""


def stage(side: int) -> Stage:
    return Stage(side, side, 1, 0, 4, side * side // 4, (1.0, 0.5, 0.0))


class FakeMeter:
    """Memory in which the model takes 8 GiB, and a chunk its tokens."""

    def __init__(self, size_gib: float = 80.0) -> None:
        self.size, self.now, self.most = int(size_gib * GIB), 8 * GIB, 0

    def available(self) -> int:
        return self.size

    def held(self) -> int:
        return self.now

    def begin(self) -> None:
        self.most = self.now

    def peak(self) -> int:
        return self.most

    def take(self, tokens: int) -> None:
        self.most = max(self.most, self.now + tokens * TOKEN)
        if self.most > self.size:
            raise MemoryError("out of memory")


@dataclass
class FakeGpu(FakeEngine):
    """A chunk takes as long as 256 tokens do, and longer only beyond those."""

    device: str = "cuda:0"
    device_name: str = "a GPU"
    meter: FakeMeter = field(default_factory=FakeMeter)

    def begin(self, plan: Any, encoded: list[str], seeds: Sequence[int], sampling: Any) -> FakeTrajectories:
        return OnGpu(self, plan, encoded, list(seeds))


class OnGpu(FakeTrajectories):
    def run(self, index: int, rows: Sequence[int]) -> list[Report]:
        tokens = len(rows) * self.plan.stages[index].tokens
        self.engine.meter.take(tokens)
        return [replace(one, seconds=max(1.0, tokens / 256)) for one in super().run(index, rows)]


def job(folder: Path, rows: int, **workers: Any) -> JobSpec:
    folder.mkdir()
    pq.write_table(pa.table({"prompt": [f"p{k}" for k in range(rows)]}), folder / "prompts.parquet")
    return JobSpec.model_validate(
        {
            "model": "tiny",
            "prompts": str(folder / "prompts.parquet"),
            "sampling": {"height": 128, "width": 128, "num_steps": 4, "transition_sigmas": [0.6]},
            "workers": {"batch_cache_dir": str(folder.parent / "kept")} | workers,
            "output": str(folder / "out"),
        }
    )


def chunks(spec: JobSpec, engine: FakeGpu) -> dict[int, list[int]]:
    """Rows of each chunk, by the stage's number from the last; all rows are made."""
    runner = Runner(spec, make_plan(spec), open_store(spec.output.path), engine)
    try:
        made = [*runner.attempt(Assignment(shard=0, attempt=1)), *runner.flush()]
    finally:
        runner.close()
    assert any(isinstance(event, ShardGenerated | ShardCommitted) for event in made)
    (part,) = Path(spec.output.path, "data").glob("*.parquet")
    assert pq.read_metadata(part).num_rows == pq.read_metadata(spec.prompts.path[0]).num_rows
    return {at: [len(rows) for stage, rows in engine.runs if stage == at] for at in (-2, -1)}


def test_the_second_job_makes_no_search(tmp_path):
    first = chunks(job(tmp_path / "a", 120), FakeGpu())
    assert {1, 2, 4, 8} <= set(first[-1])  # 64 tokens a row: 4 of them fill the GPU
    assert {4, 8, 16, 32} <= set(first[-2])
    second = chunks(job(tmp_path / "b", 120), FakeGpu())
    assert set(second[-1]) == {4}
    assert second[-2][0] == 16
    assert len(second[-1]) < len(first[-1])
    (kept,) = (tmp_path / "kept").iterdir()
    data = json.loads(kept.read_text())
    assert kept.name.startswith("tiny-")
    assert data["about"]["device"] == "a GPU"
    assert data["grids"]["16x16x1"] == {
        "rows": 4,
        "tokens": 64,
        "rates": {"1": 1.0, "2": 2.0, "4": 4.0, "8": 4.0},
    }


@pytest.mark.parametrize(
    "other",
    [
        {"device_name": "another GPU"},
        {"workers": {"num_gpus": 0.5}},
        {"workers": {"compile": "blocks"}},
        {"model": {"id": "tiny", "dtype": "float16"}},
        {"sampling": {"true_cfg_scale": 3.0}},
    ],
)
def test_what_sizes_depend_on_has_its_own(tmp_path, other):
    spec = job(tmp_path / "a", 4)
    here = KnownSizes.of_job(spec, "a GPU")
    here.keep(stage(16), 4, {4: 4.0})
    assert KnownSizes.of_job(spec, "a GPU").rows(stage(16)) == 4
    assert KnownSizes.of_job(spec, "a GPU").rows(stage(32)) is None
    said = spec.model_dump(mode="json", exclude_unset=True)
    for key in ("workers", "model", "sampling"):
        said[key] = said[key] | other.get(key, {})
    changed = JobSpec.model_validate(said)
    assert KnownSizes.of_job(changed, other.get("device_name", "a GPU")).rows(stage(16)) is None


def test_another_number_of_steps_or_rows_has_the_same(tmp_path):
    KnownSizes.of_job(job(tmp_path / "a", 4), "a GPU").keep(stage(16), 4, {4: 4.0})
    said = job(tmp_path / "b", 9).model_dump(mode="json", exclude_unset=True)
    said["sampling"] |= {"num_steps": 9}
    assert KnownSizes.of_job(JobSpec.model_validate(said), "a GPU").rows(stage(16)) == 4


def test_a_grid_that_nobody_has_looked_at_begins_with_as_many_tokens_as_the_nearest(tmp_path):
    known = KnownSizes(tmp_path, {"device": "a GPU"})
    known.keep(stage(16), 16, {16: 1.0})  # 1,024 tokens
    known.keep(stage(64), 2, {2: 1.0})  # 2,048 tokens
    sizes = BatchSizes("auto", gpu=True, known=known)
    assert sizes.next(stage(64), stage(64)) == 2
    assert sizes.next(stage(32), stage(64)) in (4, 8)
    assert sizes.next(stage(4), stage(64)) == BATCH_MAX
    assert sizes.next(stage(256), stage(256)) == 1
    sizes.done(stage(256), 1, 1.0)
    sizes.done(stage(256), 1, 1.0)
    assert sizes.next(stage(256), stage(256)) == 2  # a guess is only where the search begins


def test_what_ran_out_of_memory_is_not_kept(tmp_path):
    known = KnownSizes(tmp_path, {})
    sizes = BatchSizes("auto", gpu=True, known=known)
    assert sizes.next(stage(64), stage(64)) == 1
    sizes.failed(stage(64), 8)
    assert KnownSizes(tmp_path, {}).rows(stage(64)) is None
    assert not any(tmp_path.iterdir())


def test_a_number_and_a_cpu_neither_read_nor_keep(tmp_path):
    known = KnownSizes(tmp_path, {})
    known.keep(stage(64), 32, {32: 1.0})
    assert BatchSizes(2, gpu=True, known=known).next(stage(64), stage(64)) == 2
    assert BatchSizes("auto", gpu=False, known=known).next(stage(64), stage(64)) < 32
    chunks(job(tmp_path / "a", 9, batch_size=3), FakeGpu())
    assert not (tmp_path / "kept").exists()


def test_files_that_cannot_be_used_are_searched_for_again(tmp_path):
    known = KnownSizes(tmp_path, {"device": "a GPU"})
    known.keep(stage(64), 32, {32: 1.0})
    (file,) = tmp_path.iterdir()
    for text in (
        "{",
        "[]",
        '{"about": {"device": "another"}, "grids": {}}',
        '{"about": {"device": "a GPU"}}',
    ):
        file.write_text(text)
        assert KnownSizes(tmp_path, {"device": "a GPU"}).rows(stage(64)) is None
    (tmp_path / "no-folder").write_text("a file")
    KnownSizes(tmp_path / "no-folder", {}).keep(stage(64), 32, {32: 1.0})  # nothing is kept, and nothing said


def test_workers_of_a_machine_add_to_the_same_file(tmp_path):
    one, other = KnownSizes(tmp_path, {}), KnownSizes(tmp_path, {})
    one.keep(stage(64), 2, {2: 1.0})
    other.keep(stage(32), 8, {8: 1.0})
    both = KnownSizes(tmp_path, {})
    assert (both.rows(stage(64)), both.rows(stage(32))) == (2, 8)


def test_the_search_stops_where_memory_ends_and_nothing_runs_out(tmp_path):
    engine = FakeGpu(meter=FakeMeter(8 + 2))  # for 512 tokens beside the model
    ran = chunks(job(tmp_path / "a", 60), engine)
    most = ROOM * 10 * GIB - 8 * GIB
    assert max(ran[-1]) * 64 * TOKEN <= most
    assert max(ran[-2]) * 16 * TOKEN <= most
    assert max(ran[-1]) > 1


def test_memory_tells_of_any_grid_by_the_largest_chunk():
    meter = FakeMeter(80)
    memory = Memory(meter)
    assert memory.most(64) is None
    with memory.watching(1024):
        meter.take(1024)
    assert memory.most(256) == int((ROOM * 80 - 8) * GIB / TOKEN / 256)
    with memory.watching(64):
        meter.take(4096)  # a small chunk that took much says less than a large one
    assert memory.most(256) == int((ROOM * 80 - 8) * GIB / TOKEN / 256)
    with pytest.raises(MemoryError), memory.watching(10**6):
        meter.take(10**6)
    assert memory.most(256) == int((ROOM * 80 - 8) * GIB / TOKEN / 256)
    assert memory.most(10**6) == 1
    half = Memory(meter, share=0.5)
    with half.watching(1024):
        meter.take(1024)
    assert half.most(256) == int((ROOM * 40 - 8) * GIB / TOKEN / 256)


@dataclass(frozen=True)
class Warm:
    stage: Stage
    rows: int
    rows_per_s: float


@dataclass
class Compiling(FakeGpu):
    """A size twice as large is as good as twice as fast, up to four rows."""

    warmed: list[tuple[bool, list[int]]] = field(default_factory=list)

    def warm_each(self, plan, batch_sizes, sampling, *, search=False):
        for one, sizes in zip(plan.stages, batch_sizes, strict=True):
            tried = [rows for rows in sizes if not search or rows <= 8]
            self.warmed.append((search, tried))
            yield from (Warm(one, rows, float(min(rows, 4))) for rows in tried)


def test_what_an_engine_finds_while_it_compiles_is_the_search(tmp_path):
    """And the next job compiles for what is known alone: that size, and what is left of it without memory."""
    engine = Compiling()
    assert chunks(job(tmp_path / "a", 9), engine)[-1] == [1, 1, 2, 4, 1]
    assert engine.warmed[:2] == [
        (True, [4]),
        (True, [1]),
    ]  # all that the first batch needs
    assert engine.warmed[2:4] == [(True, [1, 2, 4, 8])] * 2
    engine = Compiling()
    assert chunks(job(tmp_path / "b", 9), engine)[-1] == [4, 4, 1]
    assert engine.warmed[:4] == [(False, [4])] * 2 + [(False, [1, 2, 4])] * 2
