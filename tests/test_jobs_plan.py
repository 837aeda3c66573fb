"""The plan: shards that partition the rows, a fingerprint of what matters, a size that rows do not change."""

from __future__ import annotations

import gc
import os
import tracemalloc
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_engine import FakeEngine
from hypothesis import given, settings
from hypothesis import strategies as st
from small_jobs import model_folder

from overtone.cluster.worker.model import check_edition
from overtone.jobs.errors import FingerprintMismatch, PromptsError, VerifyError
from overtone.jobs.folder import JobFolder
from overtone.jobs.plan import MAX_SHARDS, JobPlan, Shard, Work, difference, make_plan, mismatch
from overtone.jobs.prompts import FileList
from overtone.jobs.prompts.input_file import InputFile
from overtone.jobs.retry_plan import RetryPlan
from overtone.jobs.shard_set import ShardSet
from overtone.jobs.spec import JobSpec
from overtone.jobs.store import open_store
from overtone.progressive.checkpoints import PUBLISHED
from overtone.progressive.families import FAMILIES

SAMPLES = {"seed": 0, "sampling": {"delta": 0.1, "scales": [0.5, 1.0]}}


def file(i: int, num_rows: int, **other) -> InputFile:
    settings = {
        "path": f"/in/{i:05d}.parquet",
        "relpath": f"{i:05d}.parquet",
        "format": "parquet",
        "size_bytes": 1000 + i,
        "etag": f"e{i}",
        "footer_digest": f"d{i}",
        "num_rows": num_rows,
        "file_rows": num_rows,
        "num_row_groups": 1,
        "blocks": (),
        "passthrough": pa.schema([]),
        "columns": (("prompt", "caption"),),
    }
    return InputFile(**(settings | other))


def plan(
    *num_rows: int, shard_rows: int = 4, samples=SAMPLES, passthrough: pa.Schema | None = None
) -> JobPlan:
    files = (file(i, n) for i, n in enumerate(num_rows))
    return JobPlan(FileList.of(files, passthrough or pa.schema([])), shard_rows, samples)


def job(path, **settings) -> JobSpec:
    prompts = path if isinstance(path, dict) else str(path)
    return JobSpec(model="tiny", prompts=prompts, output="/out", **settings)


QUICK = settings(max_examples=50, deadline=None)
ROWS = st.lists(st.integers(0, 40), min_size=1, max_size=8)


@QUICK
@given(ROWS, st.integers(1, 50))
def test_shards_partition_the_rows(num_rows, shard_rows):
    made = plan(*num_rows, shard_rows=shard_rows)
    shards = list(made.shards())
    assert [shard.index for shard in shards] == list(range(made.num_shards))
    rows = [(s.file, row) for s in shards for row in range(s.first_row, s.first_row + s.num_rows)]
    assert rows == [(i, row) for i, n in enumerate(num_rows) for row in range(n)]
    assert all(1 <= shard.num_rows <= shard_rows for shard in shards)
    assert made.num_rows == sum(num_rows)
    assert [made.shard(shard.index) for shard in shards] == shards


@QUICK
@given(ROWS, st.sets(st.integers(0, 100)))
def test_a_job_and_a_retry_are_work_to_a_driver_alike(num_rows, rejected):
    job_plan = plan(*num_rows)
    tried = sorted(index for index in rejected if index < job_plan.num_shards)
    columns = {"shard": tried, "before": [0] * len(tried), "rows": [1] * len(tried)}
    retry_plan = RetryPlan(1, pa.table(columns, schema=RetryPlan.SCHEMA))
    works: list[Work] = [job_plan, retry_plan]
    assert [work.number for work in works] == [0, 1]
    for work in works:
        left_out = [*work.left_out(job_plan.num_shards)]
        indices = [index for index in range(job_plan.num_shards) if work.has(index)]
        assert sorted([*indices, *left_out]) == list(range(job_plan.num_shards))
        assert len(indices) == work.num_shards
        assert sum(map(work.rows_of, indices)) == work.num_rows
        assert not work.has(-1)
        assert not work.has(job_plan.num_shards)


@pytest.mark.parametrize("index", [-1, 3, 10**12])
def test_a_shard_that_is_not_there(index):
    with pytest.raises(IndexError, match=f"shard {index} of 3"):
        plan(4, 8).shard(index)


def test_make_plan_reads_the_row_counts(tmp_path):
    for name, rows in (("a", 5), ("b", 0), ("c", 9)):
        table = pa.table(
            {"prompt": pa.array(["x"] * rows, pa.string()), "tag": pa.array([1] * rows, pa.int8())}
        )
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=3)
    made = make_plan(job(tmp_path, shards=4))
    assert list(made.shards()) == [
        Shard(0, 0, 0, 4),
        Shard(1, 0, 4, 1),
        Shard(2, 2, 0, 4),
        Shard(3, 2, 4, 4),
        Shard(4, 2, 8, 1),
    ]
    assert made.passthrough == pa.schema([("tag", pa.int8())])
    assert [f.num_row_groups for f in made.files] == [2, 1, 3]
    assert made.samples == job(tmp_path).samples()


def test_an_empty_table_is_nothing_to_do(tmp_path):
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(PromptsError, match=r"a\.parquet has no rows; there is nothing to make"):
        make_plan(job(tmp_path))


def test_more_shards_than_part_names_can_number(tmp_path):
    rows = 1_000_000
    pq.write_table(pa.table({"prompt": ["x"] * rows}), tmp_path / "000.parquet")
    for i in range(1, MAX_SHARDS // rows + 1):
        os.link(tmp_path / "000.parquet", tmp_path / f"{i:03d}.parquet")
    with pytest.raises(PromptsError, match=r"101,000,000 shards, .* set shards.rows to a larger number"):
        make_plan(job(tmp_path, shards=1))
    assert make_plan(job(tmp_path, shards=2)).num_shards == 50_500_000


# The fingerprint


def test_workers_and_places_are_not_in_the_fingerprint(tmp_path):
    pq.write_table(pa.table({"prompt": ["x"]}), tmp_path / "a.parquet")
    one = make_plan(job(tmp_path))
    assert make_plan(job(tmp_path, workers=9, name="other")).fingerprint == one.fingerprint
    assert make_plan(job(tmp_path / "a.parquet")).fingerprint == one.fingerprint
    assert difference(one, make_plan(job(tmp_path, workers=9))) == []


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"seed": 3}, "seed was 0, now 3"),
        ({"sampling": {"delta": 0.2}}, "sampling.delta was unset, now 0.2"),
        ({"shards": 5}, "shards.rows was 256, now 5"),
        ({"model": "other/model"}, 'model.id was "tiny", now "other/model"'),
    ],
)
def test_what_changes_samples_changes_the_fingerprint_and_is_named(tmp_path, settings, line):
    pq.write_table(pa.table({"prompt": ["x"]}), tmp_path / "a.parquet")
    one, two = make_plan(job(tmp_path)), make_plan(JobSpec(**(job(tmp_path).model_dump() | settings)))
    assert one.fingerprint != two.fingerprint
    assert difference(one, two) == [line]


def test_changed_files_change_the_fingerprint_and_are_named(tmp_path):
    for name in "abc":
        pq.write_table(pa.table({"prompt": ["x"]}), tmp_path / f"{name}.parquet")
    one = make_plan(job(tmp_path))
    pq.write_table(pa.table({"prompt": ["x", "y"]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").unlink()
    pq.write_table(pa.table({"prompt": ["x"]}), tmp_path / "d.parquet")
    two = make_plan(job(tmp_path))
    assert one.fingerprint != two.fingerprint
    lines = difference(one, two)
    assert lines[:2] == ["input file b.parquet is no longer there", "input file d.parquet is new"]
    assert lines[2:] == ["a.parquet: 2 rows, was 1"]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"num_rows": 57, "file_rows": 57, "size_bytes": 9, "etag": "e", "footer_digest": "d"},
            "57 rows, was 56",
        ),
        ({"num_rows": 1, "file_rows": 1}, "1 row, was 56"),
        ({"size_bytes": 2000, "footer_digest": "d"}, "other contents, 2,000 bytes, was 1,000"),
        ({"footer_digest": "d", "etag": "e"}, "other contents in the same 1,000 bytes"),
        ({"num_rows": 20}, "20 of its 56 rows used, was 56 (prompts.limit)"),
        ({"etag": "e"}, "written anew since the job began: its time of change is another"),
    ],
)
def test_a_changed_file_is_told_by_what_changed_in_it(change, line):
    common = {"num_rows": 56, "file_rows": 56, "relpath": "mine.csv"}
    was, now = (
        JobPlan(FileList.of([file(0, **settings)], pa.schema([])), 4, SAMPLES)
        for settings in (common, common | change)
    )
    assert difference(was, now) == [f"mine.csv: {line}"]


def test_an_object_that_was_stored_anew_is_told_by_its_etag():
    was, now = (
        JobPlan(FileList.of([file(0, 5, path="s3://b/a.csv", etag=etag)], pa.schema([])), 4, SAMPLES)
        for etag in ("1", "2")
    )
    assert difference(was, now) == ["00000.parquet: stored anew since the job began (ETag 2, was 1)"]


def test_one_more_row_in_a_csv_file_is_the_only_reason_given(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("prompt\n" + "a cat\n" * 56)
    old = make_plan(job(path))
    path.write_text("prompt\n" + "a cat\n" * 57)
    assert difference(old, make_plan(job(path))) == ["mine.csv: 57 rows, was 56"]
    path.write_text("prompt\n" + "a dog\n" * 56)
    assert difference(old, make_plan(job(path))) == ["mine.csv: other contents in the same 343 bytes"]


def test_files_that_only_a_limit_leaves_out_are_not_called_new(tmp_path):
    for name in "ab":
        pq.write_table(pa.table({"prompt": ["x", "y"]}), tmp_path / f"{name}.parquet")
    few, more = (make_plan(job({"path": str(tmp_path), "limit": limit})) for limit in (1, 3))
    assert difference(few, more) == [
        "input file b.parquet is used now, and was not (prompts.limit)",
        "a.parquet: 2 of its 2 rows used, was 1 (prompts.limit)",
    ]


def test_the_order_of_the_files_is_a_reason():
    one, other = (
        JobPlan(FileList.of([file(k, 2) for k in order], pa.schema([])), 4, SAMPLES)
        for order in ((0, 1), (1, 0))
    )
    assert one.fingerprint != other.fingerprint
    assert difference(one, other) == [
        "the order of the input files changed: 00001.parquet comes where 00000.parquet came"
    ]


def test_a_job_cut_into_other_parts_is_not_said_to_have_other_samples():
    sentence = mismatch(plan(8, shard_rows=4), plan(8, shard_rows=3))
    assert sentence.startswith("the same samples, but in other parts: shards.rows was 4, now 3.")
    assert "what may change is `workers`, `faults`" in sentence
    other = plan(8, shard_rows=3, samples=SAMPLES | {"seed": 1, "columns": {"prompt": "caption"}})
    sentence = mismatch(plan(8, samples=SAMPLES | {"columns": {}}), other)
    assert sentence.startswith(
        "another job, whose samples would differ: prompts.columns.prompt was unset, now "
    )
    assert "shards.rows was 4, now 3." in sentence


def test_one_byte_in_a_prompt_is_noticed(tmp_path):
    plans = []
    for word in ("cat", "cot"):
        pq.write_table(
            pa.table({"prompt": [word]}), tmp_path / "a.parquet", compression="none", write_statistics=False
        )
        plans.append(make_plan(job(tmp_path)))
    cat, cot = (made.files[0] for made in plans)
    assert cat.footer_digest == cot.footer_digest
    assert plans[0].fingerprint != plans[1].fingerprint


def test_of_many_differences_ten_are_shown():
    lines = difference(plan(*[1] * 30), plan(*[2] * 30))
    assert len(lines) == 11
    assert lines[-1] == "and 20 more such differences of input files"


# What another version of overtone makes in another way


def begun_before(spec: JobSpec) -> JobPlan:
    """The plan of a job as the versions wrote it that knew the first edition of each family's entry."""
    return replace(make_plan(spec), samples=spec.samples(), edition=1)


def of_model(prompts: Path, model: str | dict, **sampling) -> JobSpec:
    return JobSpec(model=model, prompts=str(prompts), output="/out", sampling=sampling)


@pytest.mark.parametrize(
    ("model", "sampling", "why"),
    [
        ("Qwen/Qwen-Image", {}, "with true_cfg_scale unset, a negative prompt runs only where a row has one"),
        ({"id": "some/fine-tune", "family": "qwen-image"}, {}, "a negative prompt runs only where"),
        ({"id": "some/fine-tune", "family": "ideogram4"}, {"num_steps": 48}, "frequencies as published"),
        ({"id": "some/fine-tune", "family": "ideogram4"}, {"num_steps": 20, "mode": "fullres"}, "presets"),
        ("Chroma", {}, "an entry of its own, where it ran on the generic one"),
        ("Qwen/Qwen-Image", {"true_cfg_scale": 4.0}, None),
        ({"id": "some/fine-tune", "family": "ideogram4"}, {"num_steps": 48, "mode": "fullres"}, None),
        ({"id": "some/fine-tune", "family": "generic"}, {}, None),
        ("some/fine-tune", {}, None),
        *((name, {}, None) for name in ("tiny", *PUBLISHED) if name != "Qwen/Qwen-Image"),
    ],
)
def test_a_job_goes_on_under_a_newer_version_unless_its_samples_would_differ(tmp_path, model, sampling, why):
    pq.write_table(pa.table({"prompt": ["p"]}), tmp_path / "a.parquet")
    if model == "Chroma":
        model = model_folder(tmp_path / "model", "ChromaPipeline")
    spec = of_model(tmp_path / "a.parquet", model, **sampling)
    older, now = begun_before(spec), make_plan(spec)
    folder = JobFolder(open_store(str(tmp_path / "out")))
    folder.open(spec, older)
    if why is None:
        assert folder.check(now).fingerprint == older.fingerprint
        return
    with pytest.raises(FingerprintMismatch, match=rf"overtone makes samples of .* in another way \(.*{why}"):
        folder.check(now)
    assert "Go on with the version of overtone that began it, or choose" in mismatch(older, now)


def test_a_worker_finds_out_what_a_fine_tune_of_the_hub_is(tmp_path):
    pq.write_table(pa.table({"prompt": ["p"]}), tmp_path / "a.parquet")
    spec = of_model(tmp_path / "a.parquet", "some/fine-tune")
    engine = FakeEngine(family=FAMILIES["qwen-image"])
    check_edition(engine, spec, make_plan(spec))
    with pytest.raises(FingerprintMismatch, match=r"begun by an older version.* qwen-image in another way"):
        check_edition(engine, spec, begun_before(spec))
    check_edition(FakeEngine(family=FAMILIES["flux1"]), spec, begun_before(spec))
    kept = JobPlan.from_bytes((Path(__file__).parent / "older_job/out/_job/plan.parquet").read_bytes())
    assert kept.edition == 1
    assert make_plan(spec).as_begun(kept).edition == 1


# On disk, and in numbers


@QUICK
@given(ROWS, st.integers(1, 9))
def test_a_plan_comes_back_from_parquet(num_rows, shard_rows):
    passthrough = pa.schema([("a.b", pa.list_(pa.int8())), ("t", pa.timestamp("ns", "UTC"))], {b"k": b"v"})
    made = plan(*num_rows, shard_rows=shard_rows, passthrough=passthrough)
    again = JobPlan.from_bytes(made.to_parquet_bytes())
    assert again.fingerprint == made.fingerprint
    assert list(again.shards()) == list(made.shards())
    assert list(again.files) == list(made.files)
    assert again.passthrough.equals(passthrough, check_metadata=True)


@pytest.mark.parametrize("damage", [b"", b"PAR1", "cut", "other", "edited"])
def test_a_damaged_plan_is_a_verify_error(damage):
    data = plan(5, 5).to_parquet_bytes()
    if damage == "cut":
        data = data[:-20]
    elif damage == "other":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"x": [1]}), sink)
        data = sink.getvalue().to_pybytes()
    elif damage == "edited":
        table = pq.read_table(pa.BufferReader(data))
        sink = pa.BufferOutputStream()
        pq.write_table(table.set_column(3, "size_bytes", pa.array([9, 9])), sink)
        data = sink.getvalue().to_pybytes()
    else:
        data = damage
    with pytest.raises(VerifyError, match="the job's plan"):
        JobPlan.from_bytes(data)


def test_shards_are_made_as_they_are_asked_for():
    made = plan(*[5000 * 256] * 2000, shard_rows=256)
    tracemalloc.start()
    some = list(islice(made.shards(), 3))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [shard.index for shard in some] == [0, 1, 2]
    assert peak < 1e6


def test_footers_are_read_at_most_a_little_ahead(tmp_path):
    """And once each: a job that uses the first rows of many files does not look at the others."""
    for i in range(600):
        pq.write_table(pa.table({"prompt": ["x"]}), tmp_path / f"{i:03d}.parquet")
    (tmp_path / "599.parquet").write_bytes(b"not Parquet")
    assert make_plan(job({"path": str(tmp_path), "limit": 3}, shards=1)).num_shards == 3
    with pytest.raises(PromptsError, match=r"599\.parquet is not a whole Parquet file"):
        make_plan(job({"path": str(tmp_path)}))


def test_a_set_of_shards_is_a_set():
    some, plain = ShardSet(50, [7, 3, 49, 7]), {3, 7, 49}
    assert some == plain
    assert plain == some
    assert list(some) == [3, 7, 49]
    assert len(some) == 3
    assert 3 in some
    assert not {-1, 4, 50} & some
    some.add(4)
    some.discard(7)
    some.discard(7)
    assert some == {3, 4, 49}
    assert 51 not in some
    with pytest.raises(IndexError):
        some.add(50)
    with pytest.raises(IndexError):
        some.add(-1)


def test_a_set_of_ten_million_shards_takes_a_byte_a_shard():
    tracemalloc.start()
    some = ShardSet(10_000_000, range(0, 10_000_000, 1000))
    assert len(some) == 10_000
    assert sum(1 for _ in some) == 10_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10.5e6


def test_a_plan_of_ten_million_shards_is_as_small_as_its_files():
    files = 2000
    gc.collect()
    tracemalloc.start()
    before_arrow = pa.total_allocated_bytes()
    made = plan(*[5000 * 256] * files, shard_rows=256)
    assert made.num_shards == 10_000_000
    assert made.shard(9_999_999) == Shard(9_999_999, files - 1, 4999 * 256, 256)
    assert len(made.fingerprint) == 64
    stored = made.to_parquet_bytes()
    gc.collect()
    held = tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes() - before_arrow
    tracemalloc.stop()
    assert held < 1000 * files  # bytes; 0.1 a shard
    assert len(stored) < 200 * files
    print(f"{held / files:.0f} bytes a file in memory, {len(stored) / files:.0f} on disk")
