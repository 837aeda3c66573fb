"""The folder is the job's only state: whatever dies at any moment, a second run ends with the same data."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from crashing_store import Crash, CrashingStore
from s3_server import KEYS, S3Server
from small_jobs import commit_part, finish, prompt_table, small_job, small_part

from overtone.jobs.errors import FingerprintMismatch, StoreError, UserError, VerifyError
from overtone.jobs.folder import JobFolder
from overtone.jobs.needs import needs_of
from overtone.jobs.plan import JobPlan, make_plan
from overtone.jobs.prompts import expected_row_ids
from overtone.jobs.rows import Quarantined
from overtone.jobs.sampling import checkpoint_of
from overtone.jobs.spec import JobSpec
from overtone.jobs.status import status
from overtone.jobs.store import Store, open_store
from overtone.jobs.store.base import StoreGuarantees
from overtone.jobs.store.open import open_config
from overtone.jobs.verify import verify
from overtone.jobs.verify.check import verify_job
from overtone.progressive.families import FAMILIES

PARTS_ONLY = StoreGuarantees(single=False, multipart=True, max_single_bytes=5 * 1024**3)
BAD = {"../row/2"}


@pytest.fixture
def job(tmp_path):
    spec, plan = small_job(tmp_path, prompt_table(5), shard_rows=2)
    return spec, plan, open_store(spec.output.path)


# What the folder keeps


def test_the_first_run_makes_the_folder_the_jobs_and_the_next_resumes(job):
    spec, plan, store = job
    assert JobFolder(store).open(spec, plan) is False
    assert JobFolder(store).open(spec, plan) is True
    assert [info.key for info in store.list()] == ["_job/plan.parquet", "_job/spec.json"]
    kept_spec, kept_plan = JobFolder(store).load()
    assert kept_spec == spec
    assert kept_plan.fingerprint == plan.fingerprint


def test_how_the_samples_are_computed_may_change_between_runs(job):
    spec, plan, store = job
    JobFolder(store).open(spec, plan)
    faster = JobSpec.model_validate({**spec.model_dump(), "workers": {"count": 7, "batch_size": 3}})
    assert JobFolder(store).open(faster, make_plan(faster)) is True


def test_another_job_is_refused_with_the_difference(job):
    spec, plan, store = job
    JobFolder(store).open(spec, plan)
    before = {info.key: info.etag for info in store.list()}
    other = JobSpec.model_validate(
        {**spec.model_dump(), "shards": 3, "sampling": {**spec.sampling.model_dump(), "delta": 0.2}}
    )
    with pytest.raises(FingerprintMismatch) as caught:
        JobFolder(store).open(other, make_plan(other))
    assert "sampling.delta was unset, now 0.2; shards.rows was 2, now 3." in str(caught.value)
    assert "choose a new `output`" in str(caught.value)
    assert {info.key: info.etag for info in store.list()} == before


def test_changed_input_is_noticed(job, tmp_path):
    spec, plan, store = job
    JobFolder(store).open(spec, plan)
    pq.write_table(prompt_table(5, prompt=["other"] * 5), tmp_path / "prompts.parquet")
    with pytest.raises(FingerprintMismatch, match=r"prompts.parquet: other contents, 1,\d+ bytes"):
        JobFolder(store).open(spec, make_plan(spec))


def test_a_folder_without_a_job_is_named(job, tmp_path):
    for call in (JobFolder.load, JobFolder.finished):
        with pytest.raises(UserError, match="holds no job"):
            call(JobFolder(open_store(str(tmp_path / "empty"))))


def test_a_damaged_folder_is_named(job):
    spec, plan, store = job
    JobFolder(store).open(spec, plan)
    store.put("_job/spec.json", b"{")
    with pytest.raises(UserError, match=r"_job/spec.json\) is damaged"):
        JobFolder(store).load()
    store.put("_job/plan.parquet", store.read("_job/plan.parquet")[:-7])
    with pytest.raises(VerifyError, match=r"plan.parquet.* is damaged"):
        JobFolder(store).open(spec, plan)


def test_finished_shards_are_known_by_their_names_alone(job):
    spec, plan, store = job
    folder = JobFolder(store)
    folder.open(spec, plan)
    assert folder.finished() == set()
    for key in ("data/train-00001-of-00003.parquet", "data/train-00000-of-00004.parquet", "data/notes.txt"):
        store.put(key, b"")
    assert folder.finished() == JobFolder(store).finished() == {1}


def test_each_driver_gets_its_own_epoch(job):
    store = job[2]
    assert JobFolder(store).newest_epoch() == 0
    barrier = threading.Barrier(4)

    def take(n: int) -> int:
        barrier.wait()
        return JobFolder(store).take_epoch(f"driver {n}")

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(take, range(4))) == [1, 2, 3, 4]
    assert JobFolder(store).newest_epoch() == 4
    assert json.loads(store.read("_job/epochs/000004.json"))["owner"].startswith("driver ")


def test_quarantine_is_kept_by_row(job):
    folder = JobFolder(job[2])
    assert folder.quarantined() == {}
    for shard, row_id, deaths in ((1, "../a", 1), (1, "b\0/" * 500, 2), (3, "../a", 2), (1, "../a", 3)):
        folder.add_quarantine(Quarantined(shard, row_id, "WorkerDied", "segfault", deaths))
    rows = JobFolder(job[2]).quarantined()
    assert {shard: {(row.row_id, row.deaths) for row in found} for shard, found in rows.items()} == {
        1: {("../a", 3), ("b\0/" * 500, 2)},
        3: {("../a", 2)},
    }
    assert rows[3][0].message == "segfault"


def test_derived_tables_of_a_writer_that_died_are_written_again(job):
    spec, plan, store = job
    folder = JobFolder(store)
    folder.open(spec, plan)
    finish(store, spec, plan, bad=BAD)
    assert folder.repair_derived() == 0
    for key in ("timings/part-00001.parquet", "rejects/part-00001.parquet", "timings/part-00002.parquet"):
        store.delete(key)
    assert folder.repair_derived() == 2
    assert pq.read_table(io.BytesIO(store.read("rejects/part-00001.parquet")))["row_id"].to_pylist() == [*BAD]
    assert folder.repair_derived() == 0
    store.put("timings/part-00000.parquet", b"")  # as a disk has it that lost its power too early
    assert folder.repair_derived() == 1
    assert pq.read_table(io.BytesIO(store.read("timings/part-00000.parquet"))).num_rows
    assert folder.repair_derived() == 0


# Crash everywhere


def run(store: Store, spec: JobSpec, plan: JobPlan) -> None:
    """A whole run of a job, as a driver and its workers do it."""
    folder = JobFolder(store)
    folder.open(spec, plan)
    folder.take_epoch("test")
    for index in sorted({*range(plan.num_shards)} - folder.finished()):
        commit_part(store, small_part(spec, plan, index, bad=BAD))
    folder.repair_derived()


def rows_in(store: Store) -> list[dict]:
    """What a reader that globs data/*.parquet sees; reads every byte, so that a broken part would raise."""
    parts = [
        pq.read_table(io.BytesIO(store.read(info.key)), page_checksum_verification=True)
        for info in store.list("data/")
        if info.key.endswith(".parquet")
    ]
    return pa.concat_tables(parts).to_pylist() if parts else []


def check_crashes(stores, spec: JobSpec, plan: JobPlan, *, at: str = "") -> None:
    """Kills the process before and after each operation that starts with `at`, then runs again.

    `stores()` gives an empty store.
    """
    undisturbed = CrashingStore(stores())
    run(undisturbed, spec, plan)
    wanted = rows_in(undisturbed.inner)
    names = keys_in(undisturbed.inner)
    assert [row["row_id"] for row in wanted] == [f"../row/{i}" for i in range(plan.num_rows) if i != 2]
    moments = [n for n, operation in enumerate(undisturbed.operations) if operation.startswith(at)]
    assert len(moments) >= plan.num_shards
    for moment in moments:
        for when in ("before", "after"):
            store = stores()
            with pytest.raises(Crash):
                run(CrashingStore(store, moment, when), spec, plan)
            seen = rows_in(store)
            assert [row for row in wanted if row in seen] == seen, (moment, when)
            run(store, spec, plan)
            assert rows_in(store) == wanted, (moment, when)
            assert keys_in(store) == names, (moment, when)


def keys_in(store: Store) -> list[str]:
    return [info.key for info in store.list() if not info.key.startswith("_job/epochs/")]


def test_a_run_killed_at_any_operation_ends_with_the_same_data(job, tmp_path):
    spec, plan, _ = job
    made = []

    def fresh() -> Store:
        made.append(open_store(str(tmp_path / f"out-{len(made)}")))
        return made[-1]

    check_crashes(fresh, spec, plan)
    assert len(made) > 24
    for store in made[::7]:
        report = verify_job(store, spec, plan, expected_row_ids(spec, plan.files, plan.shard_rows))
        assert report.ok, report.text()


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        with S3Server() as server:
            yield server


@pytest.mark.parametrize("multipart", [False, True])
def test_the_same_on_s3(server, tmp_path, multipart):
    spec, plan = small_job(tmp_path, prompt_table(3), shard_rows=2)
    bucket = server.bucket()
    store = open_store(f"s3://{bucket}/run", endpoint_url=server.endpoint_url, region="us-east-1")
    if multipart:
        store = open_config(replace(store.config, guarantees=PARTS_ONLY))

    def fresh() -> Store:
        server.empty(bucket)
        return store

    check_crashes(fresh, spec, plan, at="create data/" if multipart else "create")


def test_the_parts_on_s3_are_those_on_disk(server, tmp_path):
    spec, plan = small_job(tmp_path, prompt_table(5), shard_rows=2)
    local = open_store(spec.output.path)
    s3 = open_store(f"s3://{server.bucket()}/run", endpoint_url=server.endpoint_url, region="us-east-1")
    for store in (local, s3):
        run(store, spec, plan)
    assert rows_in(s3) == rows_in(local)
    assert keys_in(s3) == keys_in(local)
    report = verify(s3.url, endpoint_url=server.endpoint_url, region="us-east-1")
    assert report.ok, report.text()
    shown = status(s3.url, endpoint_url=server.endpoint_url, region="us-east-1")
    assert (shown.rows_done, shown.rows_rejected, shown.finished) == (4, 1, True)


# Another job in the same folder, and other machines.


def test_a_job_that_made_nothing_gives_way_to_another(job):
    spec, plan, store = job
    JobFolder(store).open(spec, plan)
    JobFolder(store).add_quarantine(Quarantined(0, "x", "WorkerDied", "killed", 2))
    other = spec.model_copy(update={"seed": 8})
    folder = JobFolder(store)
    assert folder.gives_way_to(make_plan(other))
    needs = needs_of(other, make_plan(other), FAMILIES["tiny"], checkpoint_of(other))
    assert (needs.state, needs.replaces) == ("new", True)
    assert folder.open(other, make_plan(other), replace=True) is False
    kept, kept_plan = JobFolder(store).load()
    assert (kept.seed, kept_plan.fingerprint) == (8, make_plan(other).fingerprint)
    assert folder.quarantined() == {}
    assert folder.open(other, make_plan(other), replace=True) is True
    assert not folder.gives_way_to(make_plan(other))


@pytest.mark.parametrize("left", ["a part", "a reject", "a driver elsewhere", "a driver here"])
def test_a_job_that_made_something_or_may_be_at_work_does_not(job, left):
    spec, plan, store = job
    folder = JobFolder(store)
    folder.open(spec, plan)
    match left:
        case "a part":
            commit_part(store, small_part(spec, plan, 1))
        case "a reject":
            store.put("rejects/part-00001.parquet", b"")
        case "a driver elsewhere":
            folder.take_epoch("another-machine:17")
        case "a driver here":
            folder.take_epoch()
    other = spec.model_copy(update={"seed": 8})
    with pytest.raises(FingerprintMismatch, match="seed was"):
        folder.open(other, make_plan(other), replace=True)
    with pytest.raises(FingerprintMismatch, match="seed was"):
        needs_of(other, make_plan(other), FAMILIES["tiny"], checkpoint_of(other))  # as `plan` asks
    assert JobFolder(store).load()[0].seed == spec.seed


def test_a_driver_of_this_machine_that_was_killed_keeps_no_folder(job):
    spec, plan, store = job
    JobFolder(store).open(spec, plan)
    code = f"""
import os
from overtone.jobs.folder import JobFolder
from overtone.jobs.store import open_store
JobFolder(open_store({spec.output.path!r})).take_epoch()
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    assert JobFolder(store).newest_epoch() == 1
    assert JobFolder(store).gives_way_to(make_plan(spec.model_copy(update={"seed": 8})))


def test_a_machine_whose_folder_is_another_one_does_not_see_the_job(job, tmp_path):
    spec, plan, store = job
    JobFolder(store).open(spec, plan)
    JobFolder(store).take_epoch("a")
    JobFolder(store).wait_until_seen(plan, 1)
    own = JobFolder(open_store(str(tmp_path / "own disk")))
    with pytest.raises(StoreError, match="no job in it"):
        own.wait_until_seen(plan, patience_s=0.1)
    own.open(spec, plan)  # a copy from before
    own.wait_until_seen(plan, patience_s=0.1)
    with pytest.raises(StoreError, match="knows of no driver 1"):
        own.wait_until_seen(plan, 1, patience_s=0.1)
    with pytest.raises(StoreError, match="another job in it"):
        own.wait_until_seen(make_plan(spec.model_copy(update={"seed": 8})), patience_s=0.1)
