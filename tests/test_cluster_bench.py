"""The dispatch benchmark runs real jobs: their parts are there, and its figures are those of the jobs."""

from __future__ import annotations

import json

import pytest

from overtone.cluster import bench
from overtone.jobs.plan import make_plan

pytestmark = pytest.mark.ray


def test_every_commit_that_is_timed_leaves_a_part(tmp_path):
    taken = bench.commits(tmp_path, shards=5)
    assert 0 < taken.median_ms <= taken.p99_ms
    assert min(taken.cpu_ms, taken.timings_median_ms, taken.timings_cpu_ms) > 0
    for folder in ("data", "timings"):
        assert len(list((tmp_path / "out" / folder).glob("*.parquet"))) == 5


def test_dispatch_alone_leaves_nothing(tmp_path):
    done = bench.dispatch(tmp_path, shards=30, workers=2)
    assert (done.shard, done.workers, done.shards) == ("nothing", 2, 30)
    assert done.shards_per_s > 0
    assert min(done.driver_cpu_ms, done.worker_cpu_ms) > 0
    assert not (tmp_path / "out").exists()


def test_a_job_of_noop_shards_has_one_row_a_shard(tmp_path):
    plan = make_plan(bench.noop_job(tmp_path, shards=7, workers=2))
    assert (plan.num_shards, plan.num_rows) == (7, 7)


def test_the_command_runs_jobs_through_ray(tmp_path, capsys):
    path = tmp_path / "bench.json"
    bench.main(["--shards", "20", "--workers", "1", "--commits", "2", "--json", str(path)])
    figures = json.loads(path.read_text())
    assert [run["shard"] for run in figures["runs"]] == ["nothing", "one row"]
    for run in figures["runs"]:
        assert (run["workers"], run["shards"]) == (1, 20)
        assert run["shards_per_s"] > 0
        assert min(run["driver_cpu_ms"], run["worker_cpu_ms"]) > 0
        assert run["driver_mib"] > run["growth_mib"]
    assert figures["commits"]["cpu_ms"] > 0
    assert "a commit alone" in capsys.readouterr().out
