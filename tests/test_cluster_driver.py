"""Whole jobs on a real Ray, with an engine that has no model: to the end through every kind of failure."""

from __future__ import annotations

import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import fake_engine
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from fake_engine import Fakes, alive
from s3_server import KEYS, S3Server

from overtone.cluster.cli import main
from overtone.cluster.driver import retry_job, run_job
from overtone.jobs.errors import (
    FingerprintMismatch,
    ModelError,
    NoWorkersLeft,
    PromptsError,
    SizeError,
    SpecError,
    StaleDriver,
    TooManyRejects,
)
from overtone.jobs.folder import JobFolder
from overtone.jobs.plan import make_plan
from overtone.jobs.spec import JobSpec
from overtone.jobs.store import open_store
from overtone.jobs.verify import verify

pytestmark = pytest.mark.ray

HERE = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One Ray for all jobs here; its workers inherit the S3 server's keys. Gives its address."""
    import ray
    import ray.cloudpickle

    # Ray would give its workers what other processes of a busy machine leave.
    settings = {**KEYS, "RAY_worker_niceness": "0"}
    before = {key: os.environ.get(key) for key in settings}
    os.environ.update(settings)
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.cloudpickle.register_pickle_by_value(fake_engine)
    yield ray.get_runtime_context().gcs_address
    ray.cloudpickle.unregister_pickle_by_value(fake_engine)
    ray.shutdown()
    for key, value in before.items():
        os.environ.pop(key) if value is None else os.environ.update({key: value})


def job(folder: Path, prompts, *, columns=None, **sections) -> JobSpec:
    folder.mkdir(parents=True, exist_ok=True)
    table = {"row_id": [f"r{k:03}" for k in range(len(prompts))], "prompt": prompts, **(columns or {})}
    if not (folder / "prompts.parquet").exists():
        pq.write_table(pa.table(table), folder / "prompts.parquet")
    workers = {"count": 2, "num_cpus": 0.5, "batch_size": 4, **sections.pop("workers", {})}
    return JobSpec.model_validate(
        {
            "model": "tests/fake",
            "prompts": str(folder / "prompts.parquet"),
            "sampling": {"height": 64, "width": 64, "num_steps": 4},
            "shards": 5,
            "output": str(folder / "out"),
            "workers": workers,
            **sections,
        }
    )


def plain(count):
    return [f"prompt {k}" for k in range(count)]


def table(output, kind="data") -> list[dict]:
    files = sorted(Path(output, kind).glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def pictures(output) -> list[tuple]:
    return [(row["row_id"], row["seed"], row["image"]["bytes"]) for row in table(output)]


# To the end.


def test_a_job_is_made_once_and_a_second_run_does_nothing(tmp_path):
    spec = job(tmp_path, plain(20))
    seen = []
    summary = run_job(spec, engine_factory=Fakes(), on_event=seen.append)
    assert summary.exit_code == 0
    assert (summary.rows, summary.rejects, summary.shards_done) == (20, 0, 4)
    assert [row["row_id"] for row in table(tmp_path / "out")] == [f"r{k:03}" for k in range(20)]
    assert (seen[0].rows_done, seen[-1].rows_done, seen[-1].shards_done) == (0, 20, 4)
    assert verify(str(tmp_path / "out")).ok
    assert (tmp_path / "out" / "contact-sheet.png").read_bytes().startswith(b"\x89PNG")

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    again = run_job(spec, engine_factory=Fakes())
    assert again.exit_code == 0
    assert "nothing to do" in again.text()
    assert before == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()
    }


def test_the_last_shard_is_followed_by_the_card(tmp_path):
    spec = job(tmp_path, [*plain(5), "!raise"])
    run_job(spec, engine_factory=Fakes())
    card = tmp_path / "out" / "README.md"
    assert "num_examples: 5\n" in card.read_text()
    assert "| `RuntimeError` | 1 |" in card.read_text()
    assert verify(str(tmp_path / "out")).ok
    card.unlink()  # as after a run that ended before it
    again = run_job(spec, engine_factory=Fakes())
    assert again.nothing_to_do
    assert "rejected  1 row (1 RuntimeError), 0 of them in this run" in again.text()
    assert "num_examples: 5\n" in card.read_text()


@pytest.mark.parametrize(("count", "rows"), [(1, 7), (2, 4)])
def test_the_same_rows_and_pictures_whatever_the_workers_and_shards(tmp_path, count, rows):
    usual = job(tmp_path / "usual", plain(16))
    spec = job(tmp_path / "other", plain(16), workers={"count": count}, shards=rows)
    shutil.copy2(tmp_path / "usual" / "prompts.parquet", tmp_path / "other" / "prompts.parquet")
    run_job(usual, engine_factory=Fakes())
    run_job(spec, engine_factory=Fakes())
    assert pictures(tmp_path / "other" / "out") == pictures(tmp_path / "usual" / "out")


def test_s3_gives_the_same_parts_as_a_folder(tmp_path):
    local = job(tmp_path, plain(12))
    run_job(local, engine_factory=Fakes())
    with S3Server() as server:
        url = f"s3://{server.bucket()}/run-7"
        output = {"path": url, "endpoint_url": server.endpoint_url, "region": "us-east-1"}
        summary = run_job(local.model_copy(update={"output": local.output.model_validate(output)}),
                          engine_factory=Fakes())  # fmt: skip
        assert summary.exit_code == 0
        store = open_store(url, endpoint_url=server.endpoint_url, region="us-east-1")
        names = sorted(info.key for info in store.list("data/"))
        assert names == sorted(f"data/{path.name}" for path in (tmp_path / "out" / "data").iterdir())
        for name in names:
            there, here = (
                pq.read_table(pa.BufferReader(store.read(name))),
                pq.read_table(tmp_path / "out" / name),
            )
            timed = ["stages", "denoise_seconds"]
            assert there.drop_columns(timed).equals(here.drop_columns(timed))
        assert verify(url, endpoint_url=server.endpoint_url, region="us-east-1").ok
        [line] = [line for line in summary.text().splitlines() if line.startswith("verify")]
        command, *arguments = shlex.split(line.removeprefix("verify"))
        shown = CliRunner().invoke(main, arguments)
        assert (command, shown.exit_code) == ("overtone", 0), shown.output


# What breaks.


def test_two_hundred_rows_with_five_disasters(tmp_path):
    prompts = plain(200)
    for k, what in {13: "!exit", 57: "!raise", 98: "!hang", 131: "!oom", 177: "!nan"}.items():
        prompts[k] = what
    spec = job(tmp_path, prompts, shards=20, faults={"row_timeout_s": 3.0})
    summary = run_job(spec, engine_factory=Fakes())
    assert summary.exit_code == 0
    assert (summary.rows, summary.rejects) == (196, 4)
    reasons = {row["row_id"]: row["error_class"] for row in table(tmp_path / "out", "rejects")}
    assert reasons == {
        "r013": "WorkerDied",
        "r057": "RuntimeError",
        "r098": "RowTimeout",
        "r177": "NotFinite",
    }
    rejects = {row["row_id"]: row for row in table(tmp_path / "out", "rejects")}
    assert rejects["r013"]["attempts"] == 2
    assert rejects["r057"]["message"] == "this prompt raises"
    assert "r131" in {row["row_id"] for row in table(tmp_path / "out")}
    assert summary.workers_lost >= 4
    text = summary.text()
    assert "4 rows (1 NotFinite, 1 RowTimeout, 1 RuntimeError, 1 WorkerDied)" in text
    assert f"{summary.workers_lost} died or were killed" in text
    assert verify(str(tmp_path / "out")).ok


def test_a_row_that_killed_is_remembered_by_the_next_run(tmp_path):
    """The first run is stopped, by too many rejects, after it has found out."""
    prompts = ["!exit", *plain(4), *["!raise"] * 10]
    spec = job(tmp_path, prompts, faults={"max_reject_fraction": 0.5}, workers={"count": 1})
    first = run_job(spec, engine_factory=Fakes())
    assert isinstance(first.error, TooManyRejects)
    assert first.exit_code == 3
    store = open_store(spec.output.path)
    [[kept]] = JobFolder(store).quarantined().values()
    assert (kept.row_id, kept.deaths) == ("r000", 2)
    again = spec.model_copy(update={"faults": spec.faults.model_copy(update={"max_reject_fraction": 1.0})})
    second = run_job(again, engine_factory=Fakes())
    assert second.exit_code == 0
    assert second.workers_lost == 0
    assert verify(spec.output.path).ok


def test_a_bug_ends_the_job_with_its_traceback_and_what_is_done_stays(tmp_path):
    spec = job(tmp_path, [*plain(10), "!bug"], workers={"count": 1})
    summary = run_job(spec, engine_factory=Fakes())
    assert summary.exit_code == 3
    assert 'raise TypeError("no such argument")' in summary.text()
    assert len(table(tmp_path / "out")) == 10


class BadStart:
    """An engine factory that fails."""

    def __init__(self, error=None):
        self.error = error or RuntimeError("no such device")

    def __call__(self, spec):
        raise self.error


@pytest.fixture
def bad_start():
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield BadStart
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_workers_that_never_start_end_the_job(tmp_path, bad_start):
    summary = run_job(job(tmp_path, plain(5), faults={"worker_failures": 1}), engine_factory=bad_start())
    assert isinstance(summary.error, NoWorkersLeft)
    assert summary.exit_code == 3
    assert "no such device" in summary.text()


def test_a_setting_that_the_model_refuses_ends_the_job_at_once(tmp_path):
    spec = job(tmp_path, plain(5), sampling={"height": 100, "width": 64})
    summary = run_job(spec, engine_factory=Fakes())
    assert summary.exit_code == 2  # the same command would meet it again
    assert "96x64" in summary.text()
    assert "the same command" not in summary.text()
    assert JobFolder(open_store(spec.output.path)).newest_epoch() == 0


def test_a_model_that_cannot_be_loaded_is_one_sentence_and_does_not_keep_the_folder(tmp_path, bad_start):
    spec, notes = job(tmp_path, plain(5)), []
    unloadable = bad_start(ModelError("the model x/y cannot be loaded: see its name"))
    summary = run_job(spec, engine_factory=unloadable, on_event=lambda seen: notes.append(seen.note))
    assert (summary.exit_code, summary.traceback, summary.workers_lost) == (2, "", 0)
    assert summary.text().splitlines()[1:] == ["ended: the model x/y cannot be loaded: see its name"]
    assert not any(note and "model x/y" in note for note in notes)
    corrected = spec.model_copy(update={"seed": 5})
    assert run_job(corrected, engine_factory=Fakes()).exit_code == 0
    assert verify(spec.output.path).ok


def test_a_worker_that_does_not_see_the_output_folder_is_told_and_makes_nothing(tmp_path, monkeypatch):
    """The path leads somewhere else in each process, as that of a disk of its own does on each node."""
    spec = job(tmp_path, plain(5), output="/proc/self/cwd/out", faults={"worker_failures": 1})
    monkeypatch.chdir(tmp_path)
    notes = []
    summary = run_job(spec, engine_factory=Fakes(), on_event=lambda seen: notes.append(seen.note or ""))
    assert summary.exit_code == 3
    assert "does not see the output folder /proc/self/cwd/out: there is no job in it" in summary.text()
    assert any("a worker could not start: node " in note for note in notes)
    assert JobFolder(open_store(str(tmp_path / "out"))).newest_epoch() == 0


def test_what_does_not_lie_in_the_store_at_the_end_is_not_done(tmp_path):
    spec = job(tmp_path, plain(20), workers={"count": 1})
    lost = []

    def lose(snapshot):
        """The first part goes where the driver does not see it."""
        if snapshot.shards_done and not lost:
            lost.append(min((tmp_path / "out" / "data").iterdir()))  # others may be there already
            lost[0].unlink()

    summary = run_job(spec, engine_factory=Fakes(0.05), on_event=lose)
    assert (summary.exit_code, summary.shards_done, summary.rows) == (3, 3, 15)
    assert "1 part that workers reported is not in" in summary.text()
    assert "(shards 0)" in summary.text()
    again = run_job(spec, engine_factory=Fakes())
    assert (again.exit_code, again.shards_done, again.rows) == (0, 4, 5)
    assert verify(spec.output.path).ok


def test_a_worker_without_a_place_is_explained_and_takes_nothing_from_anybody(tmp_path):
    spec = job(tmp_path, plain(5), workers={"count": 1, "num_cpus": 64})
    notes = []

    def listen(snapshot):
        notes.append(snapshot.note or "")
        if notes[-1].startswith("waiting for a place"):
            raise KeyboardInterrupt

    summary = run_job(spec, engine_factory=Fakes(), on_event=listen)
    assert summary.exit_code == 3
    assert "a worker wants 64 CPUs and 0 GPUs (`workers`), the cluster's nodes have 1 x (" in notes[-1]
    assert JobFolder(open_store(spec.output.path)).newest_epoch() == 0


def test_a_lost_copy_of_a_shard_does_no_harm(tmp_path):
    """One shard takes long; the idle worker copies it, and whoever is first wins."""
    spec = job(tmp_path, [*plain(8), "!slow 4", *plain(3)], shards=1)
    summary = run_job(spec, engine_factory=Fakes())
    assert summary.exit_code == 0
    assert summary.rows == 12
    assert verify(spec.output.path).ok


# Rejects once more.


def test_a_retry_makes_what_can_be_made_and_forgives_deaths(tmp_path):
    prompts, mended = plain(20), tmp_path / "mended"
    prompts[3], prompts[8], prompts[17] = f"!until {mended}", "!raise", "!nan"
    spec = job(tmp_path, prompts, faults={"row_deaths": 1}, workers={"batch_size": 1})
    first = run_job(spec, engine_factory=Fakes())
    assert (first.rows, first.rejects) == (17, 3), first.text()
    mended.touch()
    before = {path.name: path.read_bytes() for path in (tmp_path / "out" / "data").iterdir()}

    summary = retry_job(spec.output.path, ["workers.count=1"], engine_factory=Fakes())
    assert summary.exit_code == 0  # two of three are rejected again, and that is no reason to stop
    assert (summary.rows, summary.rejects, summary.shards_done, summary.shards_total) == (1, 2, 3, 3)
    assert "retry 1: 1 row in" in summary.text()
    assert sorted(row["row_id"] for row in table(tmp_path / "out", "rejects")) == ["r008", "r017"]
    assert Counter(row["row_id"] for row in table(tmp_path / "out")) == Counter(
        f"r{k:03}" for k in range(20) if k not in (8, 17)
    )
    after = {path.name: path.read_bytes() for path in (tmp_path / "out" / "data").iterdir()}
    assert before.items() <= after.items()
    assert len(after) == len(before) + 3
    assert verify(spec.output.path).ok

    assert "nothing to do" in run_job(spec, engine_factory=Fakes()).text()
    second = retry_job(spec.output.path, engine_factory=Fakes())
    assert (second.rows, second.rejects, second.exit_code) == (0, 2, 0)
    assert verify(spec.output.path).ok


def test_a_retry_that_ended_early_is_finished_by_a_run_of_the_job(tmp_path):
    spec = job(tmp_path, [*plain(20), *["!raise"] * 20], workers={"count": 1})
    assert run_job(spec, engine_factory=Fakes()).rejects == 20
    ended = retry_job(spec.output.path, ["faults.max_reject_fraction=0.3"], engine_factory=Fakes())
    assert isinstance(ended.error, TooManyRejects)
    assert ended.exit_code == 3
    assert JobFolder(open_store(spec.output.path)).unfinished_retry().number == 1
    found = verify(spec.output.path)
    # Where a worker was ended right after a commit: no timings, and the rejects of the attempt before.
    assert set(found.num_problems) <= {"missing_derived", "wrong_derived"}
    summary = run_job(spec, engine_factory=Fakes())
    assert summary.exit_code == 0
    assert "retry 1" in summary.text()
    assert JobFolder(open_store(spec.output.path)).unfinished_retry() is None
    assert verify(spec.output.path).ok


def test_retry_of_the_command_line(tmp_path):
    """The rejects of an engine without a model, once more with the embedded one."""
    spec = job(tmp_path, [*plain(4), "!raise", "!nan"], model="tiny", sampling={"height": 64, "num_steps": 2})
    run_job(spec, engine_factory=Fakes())
    output = spec.output.path
    shown = CliRunner().invoke(main, ["retry", output, "--dry-run"])
    assert (shown.exit_code, shown.output) == (
        0,
        "retry 1 tries 2 rows of 2 shards again (1 NotFinite, 1 RuntimeError)\n",
    )
    for arguments, said in (
        (["--set", "sampling.num_steps=9"], "sampling.num_steps was 2, now 9"),
        (["--set", "workers.cuont=9"], "did you mean count?"),
    ):
        shown = CliRunner().invoke(main, ["retry", output, *arguments])
        assert shown.exit_code == 2
        assert said in shown.output
    shown = CliRunner().invoke(main, ["retry", output, "--quiet", "--set", "workers.count=1"])
    assert shown.exit_code == 0, shown.output
    assert "retry 1: 2 rows in" in shown.output
    assert verify(output).ok
    assert len(table(output)) == 6
    shown = CliRunner().invoke(main, ["retry", output, "--quiet"])
    assert shown.exit_code == 0
    assert "no row is rejected: there is nothing to try again" in shown.output


# Wrong from the start: nothing is written.


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"model": "tinny"}, SpecError),
        ({"model": "black-forest-labs/FLUX.1-dev", "sampling": {"height": 1000, "width": 1024}}, SizeError),
        ({"prompts": {"path": "PROMPTS", "columns": {"prompt": "caption"}}}, PromptsError),
        ({"prompts": "PROMPTS.gone"}, PromptsError),
    ],
)
def test_what_the_user_got_wrong_leaves_no_folder(tmp_path, changes, error):
    spec = job(tmp_path, plain(3))
    place = str(tmp_path / "prompts.parquet")
    data = spec.model_dump(mode="json") | changes
    if "PROMPTS" in str(changes.get("prompts")):
        prompts = changes["prompts"]
        data["prompts"] = (
            prompts.replace("PROMPTS", place) if isinstance(prompts, str) else prompts | {"path": place}
        )
    with pytest.raises(error):
        run_job(JobSpec.model_validate(data), engine_factory=Fakes())
    assert not (tmp_path / "out").exists()


def test_another_job_in_the_same_folder_is_refused(tmp_path):
    spec = job(tmp_path, plain(5))
    run_job(spec, engine_factory=Fakes())
    with pytest.raises(FingerprintMismatch, match="seed"):
        run_job(spec.model_copy(update={"seed": 1}), engine_factory=Fakes())


def test_a_fine_tune_of_the_hub_is_not_gone_on_with_where_its_samples_would_differ_now(tmp_path):
    """Only a worker, which has loaded it, knows of what family it is."""
    spec = job(tmp_path, plain(10))
    folder = JobFolder(open_store(spec.output.path))
    folder.open(spec, replace(make_plan(spec), edition=1))  # as an older version began it
    summary = run_job(spec, engine_factory=Fakes(family="qwen-image"))
    assert (summary.exit_code, summary.rows) == (2, 0)
    assert "begun by an older version of overtone; overtone makes samples of qwen-image" in summary.text()
    assert run_job(spec, engine_factory=Fakes()).exit_code == 0  # of another family: it goes on


# Killed drivers, several drivers.


def start(
    spec: JobSpec, address: str, *, step_s: float = 0.05, pids: Path | None = None, environ=None
) -> subprocess.Popen:
    """A driver as a process group of its own."""
    path = Path(spec.prompts.path[0]).parent / "spec.json"
    path.write_text(spec.to_json())
    folder = pids or path.parent / "pids"
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, str(HERE / "fake_driver.py"), str(path), address, str(step_s), str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]), **(environ or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def parts(output) -> int:
    return len(list(Path(output, "data").glob("*.parquet")))


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "took too long"
        time.sleep(0.02)


def test_killed_at_a_random_moment_and_run_again_every_row_is_there_once(tmp_path, cluster):
    usual = job(tmp_path / "usual", plain(40))
    run_job(usual, engine_factory=Fakes())
    spec = job(tmp_path / "killed", plain(40))
    shutil.copy2(tmp_path / "usual" / "prompts.parquet", tmp_path / "killed" / "prompts.parquet")
    output = tmp_path / "killed" / "out"
    chance = random.Random(os.getpid())
    driver = start(spec, cluster)
    wait_for(lambda: parts(output) >= chance.randrange(1, 5))
    time.sleep(chance.random() * 0.3)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.communicate()
    wait_for(lambda: not alive(tmp_path / "killed" / "pids"))  # they end by themselves, some a part later
    for path in (output / "data").glob("*.parquet"):
        pq.read_table(path)  # whole, as everything visible is
    before = parts(output)
    summary = run_job(spec, engine_factory=Fakes())
    assert summary.exit_code == 0
    assert summary.rows == 40 - 5 * before
    assert pictures(output) == pictures(tmp_path / "usual" / "out")
    assert verify(str(output)).ok


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.chaos)])
def test_a_driver_that_is_interrupted_stops_and_says_how_to_go_on(tmp_path, cluster, number):
    spec = job(tmp_path, plain(40))
    driver = start(spec, cluster, step_s=0.5)
    wait_for(lambda: parts(tmp_path / "out") >= 1)
    driver.send_signal(number)
    out, _ = driver.communicate(timeout=30)
    assert driver.returncode == 3
    assert "the same command again goes on" in out
    assert "Traceback" not in out
    assert "C++" not in out
    assert f"{parts(tmp_path / 'out')} of 8 shards done" in out
    assert run_job(spec, engine_factory=Fakes()).exit_code == 0
    assert verify(spec.output.path).ok


def test_a_run_that_cannot_begin_leaves_the_one_that_works_alone(tmp_path, bad_start):
    spec = job(tmp_path, plain(30), workers={"count": 1}, faults={"worker_failures": 1})
    ended = []
    first = threading.Thread(target=lambda: ended.append(run_job(spec, engine_factory=Fakes(step_s=0.1))))
    first.start()
    wait_for(lambda: parts(tmp_path / "out") >= 1)
    assert isinstance(run_job(spec, engine_factory=bad_start()).error, NoWorkersLeft)
    assert JobFolder(open_store(spec.output.path)).newest_epoch() == 1
    first.join(120)
    assert (ended[0].exit_code, ended[0].rows) == (0, 30)


def test_a_head_that_dies_ends_the_run_with_a_summary(tmp_path):
    """A Ray of the driver's own, whose usual folder has too long a name for its sockets."""
    spec = job(tmp_path, plain(400))
    folder = tmp_path / ("long" * 20)
    folder.mkdir()
    driver = start(spec, "local", environ={"TMPDIR": str(folder)})
    wait_for(lambda: parts(tmp_path / "out") >= 1, 120)
    [head] = [
        process for process in psutil.Process(driver.pid).children(recursive=True) if "gcs" in process.name()
    ]
    head.kill()
    out, _ = driver.communicate(timeout=90)
    assert driver.returncode == 3, out
    assert "ended early: the head of the Ray cluster has been silent for" in out
    assert f"{parts(tmp_path / 'out')} of 80 shards done" in out


def test_of_two_drivers_the_older_one_stops(tmp_path):
    spec = job(tmp_path, plain(60))
    ended = {}

    def drive(name):
        ended[name] = run_job(spec, engine_factory=Fakes(step_s=0.1))

    first = threading.Thread(target=drive, args=("first",))
    first.start()
    wait_for(lambda: parts(tmp_path / "out") >= 1)
    drive("second")
    first.join(60)
    assert ended["second"].exit_code == 0
    older = ended["first"]
    assert isinstance(older.error, StaleDriver) or older.exit_code == 0
    assert Counter(row["row_id"] for row in table(tmp_path / "out")) == Counter(f"r{k:03}" for k in range(60))
    assert verify(spec.output.path).ok


@pytest.mark.chaos  # of tests/test_chaos.py's kind, whose short form kills drivers and machines besides
def test_workers_killed_at_random_cost_no_row(tmp_path):
    spec = job(tmp_path, plain(40), faults={"max_attempts": 100, "row_deaths": 50, "worker_failures": 100})
    pids = tmp_path / "pids"
    pids.mkdir()
    stop = threading.Event()
    killed = []

    def kill():
        chance = random.Random(5)
        while not stop.wait(0.7):
            living = alive(pids)
            if living and len(killed) < 4:
                killed.append(chance.choice(living))
                os.kill(killed[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        summary = run_job(spec, engine_factory=Fakes(0.1, str(pids)))
    finally:
        stop.set()
        killer.join()
    assert summary.exit_code == 0
    assert summary.rejects == 0
    assert 1 <= summary.workers_lost <= len(killed)
    assert verify(spec.output.path).ok


def test_a_worker_that_is_told_to_end_gives_its_shard_back(tmp_path):
    """SIGTERM, as a machine that goes away sends it: nobody is charged, whatever the limits."""
    spec = job(
        tmp_path, plain(20), faults={"max_attempts": 1, "worker_failures": 1}, workers={"batch_size": 1}
    )
    pids = tmp_path / "pids"
    pids.mkdir()

    def end():
        wait_for(lambda: parts(tmp_path / "out") >= 1)
        for path in pids.iterdir():
            os.kill(int(path.name), signal.SIGTERM)

    ender = threading.Thread(target=end)
    ender.start()
    summary = run_job(spec, engine_factory=Fakes(0.05, str(pids)))
    ender.join()
    assert summary.exit_code == 0
    assert summary.rejects == 0
    assert summary.workers_lost == 0
    assert len(list(pids.iterdir())) > 2
