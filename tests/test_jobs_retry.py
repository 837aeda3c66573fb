"""A retry makes rejects anew beside what is there: each row stays in data once or in rejects once."""

from __future__ import annotations

import io
import shutil
from collections import Counter
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from crashing_store import Crash, CrashingStore
from small_jobs import commit_part, finish, prompt_table, small_job, small_part

from overtone.jobs.errors import FingerprintMismatch, SpecError, UserError, VerifyError
from overtone.jobs.folder import JobFolder
from overtone.jobs.parts import part_name
from overtone.jobs.plan import JobPlan
from overtone.jobs.retry import find_rejects, job_to_retry, read_rejected
from overtone.jobs.retry_plan import RetryPlan
from overtone.jobs.rows import Quarantined
from overtone.jobs.spec import JobSpec
from overtone.jobs.status import status
from overtone.jobs.status.reader import StatusReader
from overtone.jobs.store import Store, open_store
from overtone.jobs.verify import verify

ROWS = 12
BAD = ["../row/1", "../row/5", "../row/6", "../row/11"]
"""Of the three shards of four rows: one, two and one. The reader refuses ../row/8 of the last, too."""


def job_in(folder: Path, format: str = "parquet") -> tuple[JobSpec, JobPlan, Store]:
    """A finished job."""
    prompts = [None if i == 8 else f"a picture of number {i}" for i in range(ROWS)]
    spec, plan = small_job(folder, prompt_table(ROWS, prompt=prompts), format=format)
    store = open_store(spec.output.path)
    JobFolder(store).open(spec, plan)
    finish(store, spec, plan, bad=BAD)
    return spec, plan, store


@pytest.fixture(params=["parquet", "webdataset"])
def job(request, tmp_path):
    return job_in(tmp_path, request.param)


@pytest.fixture
def parquet_job(tmp_path):
    return job_in(tmp_path)


def again(job, *, bad=(), store: Store | None = None, only: int | None = None) -> RetryPlan | None:
    """A whole retry, as a driver and its workers do it; `only` so many of its shards. None: nothing to do."""
    spec, plan, place = job
    folder = JobFolder(store or place)
    folder.open(spec, plan)
    folder.repair_derived()
    found = find_rejects(folder, spec, plan)
    if not found.retry.num_shards:
        return None
    retry = folder.begin_retry(found.retry)
    folder.take_epoch("test")
    left = [index for index in retry.shards.tolist() if index not in folder.finished(retry)]
    for index in left[:only]:
        why = f"retry {retry.number}"
        part = small_part(spec, plan, index, bad=bad, retry=retry, store=folder.store, message=why)
        assert commit_part(folder.store, part)
    if only is None:
        folder.repair_derived()
    return retry


def rows_in(store: Store) -> list[str]:
    """The row_ids that a reader of data/*.parquet sees; every byte is read, so a broken part would raise."""
    return [
        row_id
        for info in store.list("data/")
        for row_id in pq.read_table(io.BytesIO(store.read(info.key)))["row_id"].to_pylist()
    ]


def rejects_in(store: Store) -> dict[str, str]:
    """The messages of the rejects by row_id."""
    tables = [pq.read_table(io.BytesIO(store.read(info.key))) for info in store.list("rejects/")]
    rejects = pa.concat_tables(tables).to_pylist()
    assert len({row["row_id"] for row in rejects}) == len(rejects)
    return {row["row_id"]: row["message"] for row in rejects}


# What a retry does


def test_what_is_made_is_in_data_once_and_what_is_not_a_reject_with_its_newest_reason(job):
    spec, plan, store = job
    before = {info.key: info.etag for info in store.list("data/")}
    retry = again(job, bad=["../row/6", "../row/11"])
    assert (retry.number, retry.shards.tolist(), retry.num_rows) == (1, [0, 1, 2], 5)
    assert rejects_in(store) == {
        "../row/6": "retry 1",
        "../row/11": "retry 1",
        "../row/8": "prompt is null",
    }
    after = {info.key: info.etag for info in store.list("data/")}
    assert before.items() <= after.items()
    assert after.keys() - before.keys() == {
        part_name(plan, index, spec.output.format, 1) for index in range(3)
    }
    report = verify(store.url)
    assert report.ok, report.text()
    assert (report.rows, report.rejects, report.rows_expected) == (9, 3, 12)
    assert (report.retries, report.retry_parts, report.retry_parts_left) == (1, 3, 0)


def test_a_second_retry_tries_what_the_first_left(job):
    spec, plan, store = job
    again(job, bad=["../row/6", "../row/11"])
    second = again(job, bad=["../row/11"])
    assert (second.number, second.shards.tolist(), second.num_rows) == (2, [1, 2], 3)
    assert [second.before(shard) for shard in (1, 2)] == [1, 1]
    assert rejects_in(store) == {"../row/11": "retry 2", "../row/8": "prompt is null"}
    third = again(job)
    assert (third.number, third.shards.tolist()) == (3, [2])
    assert again(job) is None  # what is left, the reader refused
    assert verify(store.url).ok
    found = find_rejects(JobFolder(store), spec, plan)
    assert (found.retry.num_shards, found.refused) == (0, 1)
    assert "1 rejected row cannot be made as the prompt table has it" in found.text()


def test_every_row_is_made_as_the_job_itself_would_have_made_it(parquet_job, tmp_path):
    spec, _, store = parquet_job
    again(parquet_job, bad=["../row/6"])
    again(parquet_job)
    shutil.copytree(tmp_path / "out", tmp_path / "retried")
    shutil.rmtree(tmp_path / "out")
    JobFolder(store).open(spec, parquet_job[1])
    finish(store, spec, parquet_job[1])
    columns = "row_id, prompt, seed, image.bytes, tag, score"
    both = [
        duckdb.sql(f"SELECT {columns} FROM '{tmp_path}/{name}/data/*.parquet' ORDER BY row_id").fetchall()
        for name in ("out", "retried")
    ]
    assert len(both[0]) == 11
    assert both[0] == both[1]


def test_only_a_finished_job_is_retried(parquet_job):
    _, plan, store = parquet_job
    store.delete(part_name(plan, 1))
    with pytest.raises(UserError, match=r"has 2 of 3 shards: finish the job first"):
        again(parquet_job)


def test_no_rejects_nothing_to_try(tmp_path):
    spec, plan = small_job(tmp_path, prompt_table(4))
    store = open_store(spec.output.path)
    JobFolder(store).open(spec, plan)
    finish(store, spec, plan)
    assert again((spec, plan, store)) is None
    assert (
        find_rejects(JobFolder(store), spec, plan).text()
        == "no row is rejected: there is nothing to try again"
    )


def test_a_retry_says_what_it_would_try(parquet_job):
    spec, plan, store = parquet_job
    before = {info.key: info.etag for info in store.list()}
    found = find_rejects(JobFolder(store), spec, plan)
    assert found.text().splitlines()[0] == "retry 1 tries 4 rows of 3 shards again (4 RowError)"
    assert {info.key: info.etag for info in store.list()} == before
    again(parquet_job, only=1)
    assert "retry 1 was begun and is not finished" in find_rejects(JobFolder(store), spec, plan).text()


def test_the_footers_decide_which_rows_are_tried_whatever_the_rejects_say(parquet_job):
    """A table of rejects that is out of date must not make a row twice."""
    spec, plan, store = parquet_job
    stale = store.read("rejects/part-00000.parquet")
    again(parquet_job, bad=["../row/6"])
    store.put("rejects/part-00000.parquet", stale)
    retry = again(parquet_job)
    assert retry.shards.tolist() == [1]
    assert read_rejected(store, spec, plan, retry, 1).rows[0].row_id == "../row/6"
    assert Counter(rows_in(store)) == Counter(f"../row/{i}" for i in range(ROWS) if i != 8)
    assert verify(store.url, repair=True).ok
    assert rejects_in(store) == {"../row/8": "prompt is null"}


def test_images_of_one_row_are_tried_each_for_itself(tmp_path):
    spec, plan = small_job(tmp_path, prompt_table(3, num_images=[3, 1, 2]))
    store = open_store(spec.output.path)
    JobFolder(store).open(spec, plan)
    finish(store, spec, plan, bad=["../row/0#1", "../row/2#0", "../row/2#1"])
    assert status(store.url).rows_rejected == 2
    retry = again((spec, plan, store), bad=["../row/2#1"])
    assert retry.num_rows == 2  # input rows
    assert rejects_in(store) == {"../row/2#1": "retry 1"}
    assert verify(store.url).ok


# The folder is the only state


def test_two_drivers_that_begin_a_retry_at_once_have_the_same_one(parquet_job):
    spec, plan, store = parquet_job
    folders = [JobFolder(store), JobFolder(open_store(store.url))]
    found = [find_rejects(folder, spec, plan).retry for folder in folders]
    begun = [folder.begin_retry(retry) for folder, retry in zip(folders, found, strict=True)]
    assert begun[0].to_bytes() == begun[1].to_bytes()
    assert len(folders[0].retries()) == 1
    parts = [small_part(spec, plan, 1, retry=retry) for retry in begun]
    assert [commit_part(store, part) for part in parts] == [True, False]  # the late one loses harmlessly


def test_an_unfinished_retry_is_gone_on_with_before_another_begins(job):
    store = job[2]
    again(job, bad=BAD, only=1)
    folder = JobFolder(store)
    assert folder.unfinished_retry().number == 1
    report = verify(store.url)
    assert report.ok, report.text()
    assert report.retry_parts_left == 2
    assert "it lacks 2 parts" in report.text()
    retry = again(job, bad=["../row/6"])
    assert (retry.number, folder.unfinished_retry()) == (1, None)
    assert rejects_in(store)["../row/1"] == "retry 1"


def test_deaths_are_forgiven_in_a_retry_and_counted_anew(parquet_job):
    folder = JobFolder(parquet_job[2])
    folder.add_quarantine(Quarantined(0, "../row/1", "WorkerDied", "segfault", 2))
    again(parquet_job, only=1, bad=BAD)
    assert list(folder.quarantined()) == [0]
    assert folder.quarantined(1) == {}
    folder.add_quarantine(Quarantined(1, "../row/5", "WorkerDied", "segfault again", 2), retry=1)
    assert [row.row_id for row in JobFolder(parquet_job[2]).quarantined(1)[1]] == ["../row/5"]
    assert list(folder.quarantined()) == [0]
    assert status(parquet_job[2].url).rows_quarantined == 1
    assert [retry.number for retry in folder.retries()] == [1]


def test_a_retry_killed_at_any_operation_ends_with_the_same_rows(parquet_job, tmp_path):
    """Before and after every operation of the store; a second retry finishes what the first left."""
    store = parquet_job[2]
    made = rows_in(store)

    def fresh(name: str) -> Store:
        shutil.copytree(store.url, tmp_path / name)
        return open_store(str(tmp_path / name))

    bad = ["../row/6", "../row/11"]
    undisturbed = CrashingStore(fresh("undisturbed"))
    again(parquet_job, bad=bad, store=undisturbed)
    wanted, left = sorted(rows_in(undisturbed.inner)), rejects_in(undisturbed.inner)
    assert sum(name.startswith("create data/") for name in undisturbed.operations) == 3
    for moment in range(len(undisturbed.operations)):
        for when in ("before", "after"):
            crashed = fresh(f"{moment}-{when}")
            with pytest.raises(Crash):
                again(parquet_job, bad=bad, store=CrashingStore(crashed, moment, when))
            seen = Counter(rows_in(crashed))
            assert max(seen.values()) == 1
            assert seen.keys() >= set(made)
            # A row that was made a moment ago may still be among the rejects, but none is nowhere.
            assert seen.keys() | rejects_in(crashed).keys() == {f"../row/{i}" for i in range(ROWS)}
            again(parquet_job, bad=bad, store=crashed)
            finished = JobFolder(crashed).retries()
            if len(finished) == 2:  # the first was finished but for its last operation
                assert finished[1].shards.tolist() == [1, 2]
            assert sorted(rows_in(crashed)) == wanted
            assert rejects_in(crashed).keys() == left.keys()
            if moment % 4 == 0:
                report = verify(crashed.url, decode=False)
                assert report.ok, (moment, when, report.text())


def test_a_retry_belongs_to_the_job_and_changes_no_samples(parquet_job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(parquet_job[2].url, tmp_path / "moved")
    moved = open_store("moved")
    changed, plan = job_to_retry(moved, ["workers=3", "faults.row_deaths=5", "workers.batch_size=1"])
    assert (changed.workers.min, changed.workers.max, changed.workers.batch_size) == (3, 3, 1)
    assert (changed.faults.row_deaths, changed.faults.max_reject_fraction) == (5, 1.0)
    assert changed.output.path == str(tmp_path / "moved")
    assert plan.fingerprint == parquet_job[1].fingerprint
    limited, _ = job_to_retry(moved, ["faults.max_reject_fraction=0.2"])
    assert limited.faults.max_reject_fraction == 0.2
    for override, error, said in (
        ("sampling.num_steps=3", FingerprintMismatch, "sampling.num_steps was unset, now 3"),
        ("shards=5", FingerprintMismatch, "shards.rows was 4, now 5"),
        ("output.path=elsewhere", SpecError, "belongs to the job in the folder"),
        ("workers.cuont=3", SpecError, r"--set workers.cuont: .*did you mean count"),
    ):
        with pytest.raises(error, match=said):
            job_to_retry(moved, [override])
    pq.write_table(prompt_table(ROWS), tmp_path / "prompts.parquet")
    with pytest.raises(FingerprintMismatch, match=r"prompts.parquet: other contents"):
        job_to_retry(moved)


def test_a_size_that_the_model_cannot_make_is_not_tried_again(tmp_path):
    spec, plan = small_job(tmp_path, prompt_table(ROWS))
    store = open_store(spec.output.path)
    JobFolder(store).open(spec, plan)
    for index, error_class in enumerate(("SizeError", "RowError", "RowError")):
        bad = ["../row/1", "../row/2", "../row/6"]
        assert commit_part(store, small_part(spec, plan, index, bad=bad, error_class=error_class))
    found = find_rejects(JobFolder(store), spec, plan)
    assert (found.classes, found.refused) == ({"RowError": 1}, 2)
    assert found.retry.shards.tolist() == [1]
    assert "2 rejected rows cannot be made as the prompt table has them" in found.text()


# What verify finds


def kinds(store: Store) -> dict[str, int]:
    return dict(verify(store.url).num_problems)


def test_a_row_made_by_the_job_and_again_by_a_retry_is_found(job, tmp_path):
    spec, plan, store = job
    retry = JobFolder(store).begin_retry(find_rejects(JobFolder(store), spec, plan).retry)
    elsewhere = open_store(str(tmp_path / "elsewhere"))  # where ../row/4, which is made here, is a reject
    other = small_part(spec, plan, 1, bad=["../row/4", "../row/5"])
    elsewhere.put(other.key, other.data)
    part = small_part(spec, plan, 1, retry=retry, store=elsewhere)
    assert commit_part(store, part)
    report = verify(store.url)
    assert dict(report.num_problems) == {"wrong_rows": 2, "duplicate_rows": 1}
    assert f"{part.key}: 1 row too many: '../row/4'" in report.text()
    assert f"{part.key}: 1 row missing: '../row/6'" in report.text()
    assert f"row '../row/4' is there again in {part.key}" in report.text()


def test_a_row_that_a_retry_forgot_is_found(job):
    spec, plan, store = job
    retry = JobFolder(store).begin_retry(find_rejects(JobFolder(store), spec, plan).retry)
    part = small_part(spec, plan, 1, retry=retry, forgotten=["../row/5"])
    assert commit_part(store, part)
    report = verify(store.url)
    assert dict(report.num_problems) == {"wrong_rows": 1}
    assert f"{part.key}: 1 row missing: '../row/5'" in report.text()


def test_parts_of_retries_that_are_lost_broken_or_of_no_retry(job):
    spec, plan, store = job
    again(job, bad=BAD)
    again(job)
    assert kinds(store) == {}
    format = spec.output.format
    first, second = part_name(plan, 1, format, 1), part_name(plan, 1, format, 2)
    kept = store.read(first)
    store.put(first, store.read(second))
    assert kinds(store) == {"broken_part": 1, "orphaned_part": 1}
    store.delete(first)
    store.delete("timings/part-00001-retry-001.parquet")
    report = verify(store.url)
    assert dict(report.num_problems) == {"missing_part": 1, "orphaned_part": 1}
    assert f"{second}: the part before it is missing or broken" in report.text()
    store.put(first, kept)
    assert verify(store.url, repair=True).ok
    foreign = [part_name(plan, 1, format, 7), "timings/part-00001-retry-007.parquet"]
    for key in foreign:
        store.put(key, b"")
    assert {problem.where for problem in verify(store.url).problems} == {*foreign}


def test_the_plan_of_a_retry_that_is_damaged_or_gone(job):
    _, _, store = job
    again(job, bad=BAD)
    again(job)
    plan = "_job/retries/001/shards.parquet"
    kept = store.read(plan)
    for change in (lambda: store.put(plan, kept[:-9]), lambda: store.delete(plan)):
        change()
        assert kinds(store)["broken_retry"] == 1
        with pytest.raises(VerifyError, match=r"retries/00[12]/shards.parquet"):
            again(job)
    store.put(plan, kept)
    assert kinds(store) == {}


def test_timings_and_rejects_of_a_retry_are_repaired(job):
    store = job[2]
    again(job, bad=["../row/6"])
    left = rejects_in(store)
    store.put("rejects/part-00000.parquet", store.read("rejects/part-00001.parquet"))
    store.delete("rejects/part-00001.parquet")
    store.delete("timings/part-00002-retry-001.parquet")
    assert kinds(store) == {"missing_derived": 2, "wrong_derived": 1}
    assert verify(store.url, repair=True).repaired == 3
    assert kinds(store) == {}
    assert rejects_in(store) == left


# What is seen from outside


def test_status_of_a_retry_on_its_way(parquet_job):
    store = parquet_job[2]
    reader = StatusReader(store)
    first = reader.read()
    assert (first.rows_done, first.rows_rejected, first.rows_left) == (7, 5, 0)
    assert (first.retry, first.finished) == (0, True)
    again(parquet_job, bad=["../row/6"], only=2)
    for seen in (reader.read(), status(store.url)):
        assert (seen.rows_done, seen.rows_rejected, seen.rows_left) == (9, 1, 2)
        assert (seen.retry, seen.retry_shards_done, seen.retry_shards_total) == (1, 2, 3)
        assert not seen.finished
        assert "retry 1 of rejects: 2 of 3 shards" in seen.text()
        assert sum(worker.rows for worker in seen.workers) == 9
        assert sum(worker.parts for worker in seen.workers) == 5
    again(parquet_job)
    for seen in (reader.read(), status(store.url)):
        assert (seen.rows_done, seen.rows_rejected, seen.rows_left) == (10, 2, 0)
        assert seen.rejects_by_class == {"InvalidRow": 1, "RowError": 1}
        assert seen.finished
        assert seen.size_bytes == sum(info.size_bytes for info in store.list("data/"))


def test_readers_that_glob_see_each_row_once(parquet_job):
    store = parquet_job[2]
    again(parquet_job, bad=["../row/6"])
    counts = duckdb.sql(
        f"SELECT count(*), count(DISTINCT row_id) FROM '{store.url}/data/*.parquet'"
        f" UNION ALL SELECT count(*), count(DISTINCT row_id) FROM '{store.url}/rejects/*.parquet'"
    ).fetchall()
    assert counts == [(10, 10), (2, 2)]
    spent = duckdb.sql(
        f"SELECT count(DISTINCT row_id) FROM '{store.url}/data/*.parquet' JOIN "
        f"(SELECT unnest(row_ids) AS row_id FROM '{store.url}/timings/*.parquet') USING (row_id)"
    ).fetchall()
    assert spent == [(10,)]


def test_datasets_takes_the_parts_of_a_retry_for_the_same_split(parquet_job, tmp_path, monkeypatch):
    for name, value in {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    import datasets

    again(parquet_job, bad=["../row/6"])
    loaded = datasets.load_dataset(parquet_job[2].url, cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == ["train"]
    assert Counter(loaded["train"]["row_id"]) == Counter(
        f"../row/{i}" for i in range(ROWS) if i not in (6, 8)
    )


def test_a_plan_of_a_retry_that_is_none():
    table = pa.table({"shard": [1, 1], "before": [0, 0], "rows": [1, 1]})
    with pytest.raises(VerifyError, match="not in order"):
        RetryPlan.from_bytes(RetryPlan(1, table).to_bytes())
    plan = RetryPlan(2, table.slice(1))
    with pytest.raises(KeyError, match="retry 2 has no shard 0"):
        plan.rows_of(0)
